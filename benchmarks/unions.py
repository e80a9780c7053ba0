"""How good is the default estimate where a severity is the largest of several? Programs whose checker is a maximum.

    python benchmarks/unions.py --members 12 --seeds 2 --out unions.json
    python benchmarks/unions.py --families walks,networks --members 6 --backend pyro

Families, each with members drawn at random, 2 to 49 dimensions, maxima of 2 to 49 parts: half-spaces, limits on every
step of a first-order autoregressive walk, bent limits, |.| of directions, outputs of a ReLU network, oscillations at
many times, exponentials against a limit, a sphere beside two half-spaces. They are programs of NumPyro (or Pyro), so
that an estimate sees what the maximum is over. The truth is counted in up to ``--draws`` plain draws; ``covered`` and
``wrong`` allow for three of its standard errors. The columns are those of reliability.py.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from reliability import Case, add_members, of_problem, told  # noqa: E402

from models._libraries import Backend, library  # noqa: E402
from probest import Problem  # noqa: E402

# Severities of all parts, (..., K), at z (..., dim); the first argument is numpy, jax.numpy or torch's namespace.
Parts = Callable[[Any, Any], Any]
Family = Callable[[np.random.Generator, int], Parts]


def like(xp: Any, z: Any, value: Any) -> Any:
    """An array of z's library and type."""
    return xp.asarray(value, dtype=z.dtype)


def unit_rows(rng: np.random.Generator, count: int, dim: int) -> np.ndarray:
    rows = rng.standard_normal((count, dim))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def half_spaces(rng: np.random.Generator, dim: int) -> Parts:
    normals = unit_rows(rng, int(rng.integers(2, 40)), dim)
    limits = rng.uniform(3.0, 3.8, len(normals))
    return lambda xp, z: z @ like(xp, z, normals.T) - like(xp, z, limits)


def walk(rng: np.random.Generator, dim: int) -> Parts:
    decay, limit = rng.uniform(0.3, 0.99), rng.uniform(3.2, 4.0)
    steps = np.tril(decay ** (np.arange(dim)[:, None] - np.arange(dim)).clip(0))
    steps /= np.linalg.norm(steps, axis=1, keepdims=True)
    return lambda xp, z: z @ like(xp, z, steps.T) - limit


def bent(rng: np.random.Generator, dim: int) -> Parts:
    normals = unit_rows(rng, int(rng.integers(2, 13)), dim)
    bend, limits = rng.uniform(-0.24, 0.36, len(normals)), rng.uniform(3.0, 3.9, len(normals))

    def parts(xp: Any, z: Any) -> Any:
        return (
            z @ like(xp, z, normals.T) - like(xp, z, limits) + like(xp, z, bend) * ((z * z).mean(-1)[..., None] - 1.0)
        )

    return parts


def both_sides(rng: np.random.Generator, dim: int) -> Parts:
    normals = unit_rows(rng, int(rng.integers(2, 11)), dim)
    limits = rng.uniform(3.2, 4.0, len(normals))
    return lambda xp, z: xp.abs(z @ like(xp, z, normals.T)) - like(xp, z, limits)


def network(rng: np.random.Generator, dim: int) -> Parts:
    width, outputs = 40, int(rng.integers(2, 11))
    shapes = ((dim, width), (width, width), (width, outputs))
    first, second, last = (rng.standard_normal(shape) * math.sqrt(2.0 / shape[0]) for shape in shapes)

    def values(xp: Any, z: Any) -> Any:
        zero = like(xp, z, 0.0)
        hidden = xp.maximum(z @ like(xp, z, first), zero)
        return xp.maximum(hidden @ like(xp, z, second), zero) @ like(xp, z, last)

    drawn = values(np, np.random.default_rng(5).standard_normal((100_000, dim))).max(axis=1)
    limit = float(np.quantile(drawn, 1.0 - 10.0 ** -rng.uniform(3.0, 4.0)))
    return lambda xp, z: values(xp, z) - limit


def oscillation(rng: np.random.Generator, dim: int) -> Parts:
    times = np.linspace(0.0, 6.0, int(rng.integers(2, 31)))
    waves = np.cos(np.outer(times, rng.uniform(0.5, 3.0, dim)) + rng.uniform(0.0, 2.0 * math.pi, dim))
    waves, limit = waves * math.sqrt(2.0 / dim), rng.uniform(3.3, 4.2)

    def parts(xp: Any, z: Any) -> Any:
        x = z @ like(xp, z, waves.T)
        return xp.abs(x + 0.05 * x * x) - limit

    return parts


def exponentials(rng: np.random.Generator, dim: int) -> Parts:
    count, limit = min(dim, int(rng.integers(2, 40))), math.exp(1.2 * rng.uniform(3.6, 4.2))
    return lambda xp, z: xp.exp(1.2 * z[..., :count]) + 0.2 * z.sum(-1)[..., None] - limit


def beside_a_sphere(rng: np.random.Generator, dim: int) -> Parts:
    first, second = unit_rows(rng, 2, dim)
    limits = rng.uniform(3.2, 4.0, 3)
    radius = math.sqrt(dim) + 0.78 * limits[2]

    def parts(xp: Any, z: Any) -> Any:
        plane = z @ like(xp, z, first) - limits[0]
        rippled = 20.0 * (z @ like(xp, z, second) - limits[1]) + xp.sin(z[..., 0])
        return xp.stack([plane, rippled, xp.sqrt((z * z).sum(-1)) - radius], -1)

    return parts


FAMILIES: dict[str, Family] = {
    "half_spaces": half_spaces,
    "walks": walk,
    "bent": bent,
    "both_sides": both_sides,
    "networks": network,
    "oscillations": oscillation,
    "exponentials": exponentials,
    "spheres": beside_a_sphere,
}


def counted(parts: Parts, dim: int, draws: int) -> tuple[float, float]:
    """log P and its standard error, from plain draws: until 4,000 of them are catastrophes."""
    rng, hits, n = np.random.default_rng(99), 0, 0
    while n < draws and hits < 4_000:
        z = rng.standard_normal((100_000, dim))
        hits, n = hits + int(np.count_nonzero(parts(np, z).max(axis=-1) >= 0.0)), n + len(z)
    if hits < 100:
        raise RuntimeError(f"only {hits} catastrophes in {n} draws: raise --draws")
    return math.log(hits / n), 1.0 / math.sqrt(hits)


def problem(parts: Parts, dim: int, backend: Backend) -> Problem:
    sample, dist, xp = library(backend)
    return Problem(
        lambda: sample("z", dist.Normal(xp.zeros(dim), 1.0).to_event(1)),
        lambda x: x,
        lambda _, y: xp.max(parts(xp, y)),
    )


def cases(options: argparse.Namespace) -> Iterator[Case]:
    for family in options.families.split(","):
        for i in range(options.first, options.first + options.members):
            rng = np.random.default_rng((20_261_130, i, *family.encode()))
            dim = int(rng.integers(2, 50))
            parts = FAMILIES[family](rng, dim)
            truth, error = counted(parts, dim, options.draws)
            yield of_problem(f"{family}{i}_d{dim}", truth, problem(parts, dim, options.backend), options, error)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_members(parser, FAMILIES, seeds=2)
    parser.add_argument("--first", type=int, default=0, help="number of the first member")
    parser.add_argument("--backend", choices=("pyro", "numpyro"), default="numpyro")
    parser.add_argument("--precision", type=float, default=0.05)
    parser.add_argument("--draws", type=int, default=8_000_000, help="plain draws for the truth, at most")
    options = parser.parse_args(argv)
    return told(cases(options), options)


if __name__ == "__main__":
    raise SystemExit(main())
