"""How near to the worst adversary that a KL budget allows does `search()` come, and does it keep all modes?

    python benchmarks/adversaries.py --seeds 5 --out adversaries.json

The worst P within B nats of the given adversary is known in closed form from P, and P is known exactly for all but the
digits network (there: an estimate of 200,000 calls). Efficiency is P under the found adversary, by plain sampling, over
that. Kept: how many of the modes have at least half their share (half-spaces of a union, by which of them is exceeded;
classes of digits, by their share of catastrophes under the given adversary, those of a hundredth and more).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy import stats

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from models import digits  # noqa: E402
from models._libraries import Backend, library  # noqa: E402
from probest import Problem, estimate, search  # noqa: E402
from probest.adversaries import Flow, Tilt  # noqa: E402

DIM = 20
LIMITS = np.array([4.3, 4.2, 4.1, 4.0])
SIGNS = np.array([1.0, 1.0, -1.0, 1.0])


class Case(NamedTuple):
    """A problem, log P (None: to be estimated), what to learn, and the share of each mode and the mode of each case."""

    problem: Problem
    log_prob: float | None
    family: Any
    shares: np.ndarray
    mode: Callable[[dict[str, np.ndarray]], np.ndarray]


def normal_cases(backend: Backend) -> dict[str, Case]:
    lib = library(backend)
    xp = lib.xp
    signs, limits = xp.asarray(SIGNS), xp.asarray(LIMITS)

    def adversary() -> Any:
        return lib.sample("x", lib.dist.Normal(xp.zeros(DIM), 1.0).to_event(1))

    def switched() -> Any:
        return lib.sample("on", lib.dist.Bernoulli(1e-3)), adversary()

    def program(w: Any) -> Any:
        return lib.sample("x", lib.dist.Normal(w["mean"], xp.exp(w["log_scale"])).to_event(1))

    half = Problem(adversary, lambda x: x.sum() / DIM**0.5, lambda _, y: y - 5.0)
    union = Problem(adversary, lambda x: signs * x[:4] - limits, lambda _, y: y.max())
    bent = Problem(adversary, lambda x: x[1] + 0.3 * x[0] ** 2, lambda _, y: y - 6.0)
    grid = np.linspace(-12.0, 12.0, 24_001)
    exact_bent = math.log((stats.norm.pdf(grid) * stats.norm.sf(6.0 - 0.3 * grid**2)).sum() * (grid[1] - grid[0]))
    switch = Problem(switched, lambda c: c[1].sum() / DIM**0.5, lambda c, y: y - xp.where(c[0] == 1, 2.0, 7.0))
    each = stats.norm.sf(LIMITS)
    learnt = lib.bind(program, mean=np.zeros(DIM), log_scale=np.zeros(DIM))
    one, alone = np.ones(1), lambda points: np.zeros(len(next(iter(points.values()))), dtype=np.intp)
    exact_union = math.log(-math.expm1(np.log1p(-each).sum()))

    def exceeded(points: dict[str, np.ndarray]) -> np.ndarray:
        return np.asarray((SIGNS * points["z"][:, :4] - LIMITS).argmax(axis=1))

    exact_switch = math.log(1e-3 * stats.norm.sf(2.0) + 0.999 * stats.norm.sf(7.0))
    return {
        "half-space": Case(half, float(stats.norm.logsf(5.0)), Tilt(), one, alone),
        "half-space, program": Case(half, float(stats.norm.logsf(5.0)), learnt, one, alone),
        "union of 4": Case(union, exact_union, Tilt(), each / each.sum(), exceeded),
        "union of 4, random start": Case(
            union, exact_union, Tilt(components=8, from_particles=False), each / each.sum(), exceeded
        ),
        "rare switch": Case(switch, exact_switch, Tilt(), one, alone),
        "parabola, one Gaussian": Case(bent, exact_bent, Tilt(components=1), one, alone),
        "parabola": Case(bent, exact_bent, Tilt(), one, alone),
        "parabola, flow": Case(bent, exact_bent, Flow(), one, alone),
    }


def digits_case() -> Case:
    problem = digits.problem()
    base = estimate(problem, budget=200_000, progress=False)
    particles = base.conclusion.particles
    assert particles is not None
    assert problem.strata is not None
    weight = np.exp(particles.log_weight)
    shares = np.bincount(problem.strata.index_of(particles.z), weights=weight / weight.sum(), minlength=10)
    return Case(problem, None, Tilt(), shares, lambda points: points["k"])


def judged(case: Case, base: Any, kl: float, seed: int) -> dict[str, float]:
    found = search(case.problem, case.family, kl=kl, base=base, seed=seed, progress=False)
    points = found.law.draw(found.parts, 4_000, np.random.default_rng(seed))
    caught = found.law.severity(points) >= 0.0
    kept = np.bincount(case.mode({name: value[caught] for name, value in points.items()}), minlength=len(case.shares))
    counted = case.shares >= 0.01
    enough = kept / max(1, kept.sum()) >= 0.5 * case.shares
    return {
        "kl": found.kl, "log_prob": found.log_prob, "efficiency": found.efficiency, "share": found.share,
        "kept": int((enough & counted).sum()), "modes": int(counted.sum()), "coverage": found.coverage,
        "calls": found.calls, "seconds": found.seconds,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--kl", type=float, nargs="+", default=[2.0, 5.0])
    parser.add_argument("--backends", nargs="+", choices=("pyro", "numpyro"), default=["pyro", "numpyro"])
    parser.add_argument("--only", help="problems whose name contains this")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    cases = {
        f"{name} ({backend})": case for backend in options.backends for name, case in normal_cases(backend).items()
    }
    if not options.only or options.only in "digits (pyro)":
        cases["digits (pyro)"] = digits_case()
    cases = {name: case for name, case in cases.items() if not options.only or options.only in name}
    table, records = Table("problem", "KL", "log P", "efficiency", "from", "modes kept", "calls", "seconds"), []
    for name, case in cases.items():
        budget = 200_000 if case.log_prob is None else 50_000
        base = estimate(case.problem, budget=budget, progress=False)
        for kl in options.kl:
            runs = [judged(case, base, kl, seed) for seed in range(options.seeds)]
            records += [{"problem": name, "budget": kl, "seed": seed, **run} for seed, run in enumerate(runs)]
            middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            table.add_row(
                name, f"{middle['kl']:.2f}", f"{base.log_prob:.2f} to {middle['log_prob']:.2f}",
                f"{middle['efficiency']:.2f}", f"{min(run['efficiency'] for run in runs):.2f}",
                f"{min(run['kept'] for run in runs):.0f} of {middle['modes']:.0f}", f"{middle['calls']:.0f}",
                f"{middle['seconds']:.0f}",
            )  # fmt: skip
            if options.out:
                options.out.write_text(json.dumps(records, indent=1))
    Console().print(table)


if __name__ == "__main__":
    main()
