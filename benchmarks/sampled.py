"""Random programs of ten families, at a P that plain draws still reach: is anything converged and wrong?

    OMP_NUM_THREADS=1 python benchmarks/sampled.py --first 0 --programs 50 --budget 30000 --json build/sampled.json
    python benchmarks/sampled.py --families student,observed --programs 100

Families (in Pyro): a random scale, a mixture with rare components, Student t inputs, counts, a loop in time, Beta,
Gamma and Weibull inputs, waves in 5 to 40 dimensions, sums of trees, maxima, minima and products of networks, an
observed site. Models are random; one checker in seven says only yes or no. The limit is a quantile (5e-5 to 1e-3) of
plain draws; the truth is that of ``--draws`` others. `wrong`: converged, and off by more than .15 and three standard
errors, the truth's included. `covered`: the 95 % interval holds the truth, three of its standard errors allowed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)

from probest import Problem, estimate  # noqa: E402

Drawn = Callable[[], Tensor]
Model = Callable[[Tensor], Tensor]
ACTIVATIONS = (torch.relu, functional.gelu, torch.tanh, functional.silu, functional.softplus)


def tensor(values: Any) -> Tensor:
    return torch.as_tensor(np.asarray(values), dtype=torch.float32)


def network(rng: np.random.Generator, dim: int, width: int, depth: int) -> Model:
    f, sizes = ACTIVATIONS[rng.integers(len(ACTIVATIONS))], [dim, *[width] * depth, 1]
    layers = [
        (tensor(1.4 * rng.standard_normal((n, m)) / math.sqrt(m)), tensor(0.3 * rng.standard_normal(n)))
        for m, n in itertools.pairwise(sizes)
    ]

    def model(x: Tensor) -> Tensor:
        for weights, bias in layers[:-1]:
            x = f(weights @ x + bias)
        return (layers[-1][0] @ x + layers[-1][1])[0]

    return model


def normal(dim: int) -> Tensor:
    return pyro.sample("x", dist.Normal(torch.zeros(dim), 1.0).to_event(1))


def scale(rng: np.random.Generator) -> tuple[Drawn, Model]:
    dim, law = int(rng.integers(3, 25)), (dist.LogNormal(0.0, 0.5), dist.Gamma(2.0, 2.0), dist.HalfNormal(1.0))
    chosen = law[rng.integers(3)]
    return lambda: pyro.sample("scale", chosen) * normal(dim), network(rng, dim, int(rng.integers(8, 40)), 2)


def mixture(rng: np.random.Generator) -> tuple[Drawn, Model]:
    dim, parts = int(rng.integers(2, 15)), int(rng.integers(2, 6))
    shares = np.maximum(rng.dirichlet(np.full(parts, 0.5)), 1e-3)
    means, spread = tensor(1.5 * rng.standard_normal((parts, dim))), tensor(rng.uniform(0.3, 1.5, parts))
    law = dist.Categorical(tensor(shares / shares.sum()))

    def drawn() -> Tensor:
        k = pyro.sample("part", law).long().reshape(1)
        return means.index_select(0, k)[0] + spread.index_select(0, k)[0] * normal(dim)

    return drawn, network(rng, dim, 20, int(rng.integers(1, 3)))


def student(rng: np.random.Generator) -> tuple[Drawn, Model]:
    dim, law = int(rng.integers(2, 12)), dist.StudentT(float(rng.uniform(2, 6)), 0.0, 1.0)
    return lambda: pyro.sample("x", law.expand([dim]).to_event(1)), network(rng, dim, 16, int(rng.integers(1, 3)))


def counts(rng: np.random.Generator) -> tuple[Drawn, Model]:
    dim, rate = int(rng.integers(2, 8)), float(rng.uniform(0.5, 6))
    law = dist.Poisson(rate) if rng.random() < 0.5 else dist.Binomial(12, probs=tensor(rate / 12))
    return lambda: torch.cat([normal(dim), pyro.sample("count", law).reshape(1) / 2]), network(rng, dim + 1, 12, 1)


def loop(rng: np.random.Generator) -> tuple[Drawn, Model]:
    steps, kept = int(rng.integers(8, 30)), float(rng.uniform(0.5, 0.98))

    def drawn() -> Tensor:
        state, path = torch.zeros(()), []
        for push in normal(steps):
            state = kept * state + push * (1 + 0.3 * torch.tanh(state))
            path.append(state)
        return torch.stack(path)

    ends: tuple[Model, ...] = (lambda x: x.max(), lambda x: x.abs().mean(), lambda x: torch.relu(x - 1.5).sum())
    return drawn, ends[rng.integers(3)]


def skewed(rng: np.random.Generator) -> tuple[Drawn, Model]:
    dim = int(rng.integers(2, 10))
    a, b = rng.uniform(0.7, 5, 2)
    law = (dist.Beta(a, b), dist.Gamma(a, b), dist.Weibull(1.0, a + 0.3))[rng.integers(3)]
    row, form = tensor(rng.standard_normal(dim)), tensor(0.5 * rng.standard_normal((dim, dim)))
    return lambda: pyro.sample("x", law.expand([dim]).to_event(1)), lambda x: row @ x + x @ form @ x


def waves(rng: np.random.Generator) -> tuple[Drawn, Model]:
    dim, length, slope = int(rng.integers(5, 40)), float(rng.uniform(0.7, 2.5)), float(rng.uniform(0, 1.2))
    row = tensor(rng.standard_normal(dim) / math.sqrt(dim))
    return lambda: normal(dim), lambda x: slope * (row @ x) - torch.cos(length * x).sum() / math.sqrt(dim)


def trees(rng: np.random.Generator) -> tuple[Drawn, Model]:
    dim, number, slope = int(rng.integers(3, 15)), int(rng.integers(5, 40)), float(rng.uniform(0, 0.3))
    first, second = (torch.as_tensor(rng.integers(0, dim, number)) for _ in range(2))
    above, beyond = (tensor(1.2 * rng.standard_normal(number)) for _ in range(2))
    leaves = tensor(rng.standard_normal((4, number)))

    def model(x: Tensor) -> Tensor:
        left, right = x[first] > above, x[second] > beyond
        found = torch.where(left, torch.where(right, *leaves[:2]), torch.where(right, *leaves[2:]))
        return found.sum() / math.sqrt(number) + slope * x.sum() / math.sqrt(dim)

    return lambda: normal(dim), model


def networks(rng: np.random.Generator) -> tuple[Drawn, Model]:
    dim = int(rng.integers(5, 120))
    one, other = (network(rng, dim, int(rng.integers(10, 50)), int(rng.integers(1, 5))) for _ in range(2))
    ways: tuple[Model, ...] = (
        lambda x: torch.maximum(one(x), other(x)),
        lambda x: torch.minimum(one(x), other(x) + 1),
        lambda x: one(x) * torch.sigmoid(other(x)),
    )
    return lambda: normal(dim), ways[rng.integers(3)]


def observed(rng: np.random.Generator) -> tuple[Drawn, Model]:
    dim, seen, noise = int(rng.integers(2, 10)), tensor(rng.uniform(-1, 2)), float(rng.uniform(0.3, 1))
    row = tensor(rng.standard_normal(dim) / math.sqrt(dim))

    def drawn() -> Tensor:
        x = normal(dim)
        pyro.sample("seen", dist.Normal(row @ x, noise), obs=seen)
        return x

    return drawn, network(rng, dim, 15, int(rng.integers(1, 3)))


FAMILIES = (scale, mixture, student, counts, loop, skewed, waves, trees, networks, observed)


def sample(event: Any, draws: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Severities of plain draws, and their weights by what was observed."""
    rng = np.random.default_rng(seed)
    found = [event.evaluate(rng.standard_normal((100_000, event.dim))) for _ in range(draws // 100_000)]
    log_w = np.concatenate([one.log_weight for one in found])
    return np.concatenate([one.severity for one in found]), np.exp(log_w - log_w.max())


def measured(number: int, family: Callable[[np.random.Generator], tuple[Drawn, Model]], options: Any) -> dict[str, Any]:
    rng = np.random.default_rng([number, 2026])
    drawn, model = family(rng)
    event = Problem(drawn, model, lambda x, y: y).event  # noqa: ARG005
    severity, weight = sample(event, 400_000, number)
    order = np.argsort(-severity)
    share = np.cumsum(weight[order]) / weight.sum()
    limit = float(severity[order[np.searchsorted(share, 10 ** -rng.uniform(3.0, 4.3))]])
    boolean = bool(rng.random() < 1 / 7)
    checker = (lambda x, y: y >= limit) if boolean else (lambda x, y: y - limit)  # noqa: ARG005
    found = estimate(Problem(drawn, model, checker), budget=options.budget, seed=number, progress=False)
    severity, weight = sample(event, options.draws, 1_000_000 + number)
    hit = severity >= limit
    p = float(weight @ hit / weight.sum())
    own = math.sqrt(float(weight**2 @ (hit - p) ** 2)) / (weight.sum() * p)
    error = found.log_prob - math.log(p)
    return {
        "program": f"{family.__name__} {number}" + " (yes or no)" * boolean,
        "dim": event.dim,
        "log_prob": math.log(p),
        "own_error": own,
        "error": error,
        "stated": found.std_error,
        "calls": found.calls,
        "converged": bool(found.converged),
        "wrong": bool(found.converged and abs(error) > max(0.15, 3 * math.hypot(found.std_error, own))),
        "covered": bool(found.lower - 3 * own <= math.log(p) <= found.upper + 3 * own),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--programs", type=int, default=50)
    parser.add_argument("--families", default="", help="names, with commas; all when empty")
    parser.add_argument("--budget", type=int, default=30_000)
    parser.add_argument("--draws", type=int, default=2_000_000, help="behind each truth")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    named = options.families.split(",") if options.families else []
    families = [family for family in FAMILIES if not named or family.__name__ in named]
    rows: list[dict[str, Any]] = []
    for number in range(options.first, options.first + options.programs):
        rows.append(measured(number, families[number % len(families)], options))
        print(json.dumps(rows[-1]), file=sys.stderr)
        if options.json is not None:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(rows, indent=1))
    table = Table("family", "programs", "median |error|", "within .1", "converged", "covered", "wrong", "calls")
    for name in [*(family.__name__ for family in families), ""]:
        own = [row for row in rows if row["program"].startswith(name)]
        errors = np.abs([row["error"] for row in own])
        if own:
            table.add_row(
                name or "all", str(len(own)), f"{np.median(errors):.3f}", f"{np.mean(errors <= 0.1):.2f}",
                *(f"{sum(row[key] for row in own)}" for key in ("converged", "covered", "wrong")),
                f"{np.median([row['calls'] for row in own]):,.0f}",
            )  # fmt: skip
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
