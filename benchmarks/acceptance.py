"""The whole way through problems with closed-form answers: program in, log P and its gradient out, both libraries.

    python benchmarks/acceptance.py --seeds 20 --budget 50000 --backends pyro,numpyro --out acceptance.json

First table: estimates by `estimate(problem)` against the exact log P. `covered` is the share of seeds whose 95 %
interval holds the truth; `wrong` counts runs that are converged and yet off by more than 0.1 + 3 standard errors.
Second table: the gradient of log P at beta = 5 in the threshold, the direction and a location parameter of the
adversary, as a ratio to the closed form.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from models import conditioned, discrete, exponential, halfspace, sphere, union  # noqa: E402
from probest import Problem, estimate  # noqa: E402


class Case(NamedTuple):
    """A problem with its exact answer."""

    build: Callable[[Any], Problem]
    log_prob: float


def _half_space(dim: int, beta: float) -> Case:
    return Case(lambda backend: halfspace.problem(backend, dim=dim, beta=beta), halfspace.log_prob(beta=beta))


CASES: dict[str, Case] = {
    **{f"half-space d={d} beta={b}": _half_space(d, float(b)) for d in (2, 100, 1000) for b in (3, 5, 8)},
    "union of 4 d=50 beta=5": Case(lambda backend: union.problem(backend), union.log_prob()),
    "sphere d=100 P=1e-9": Case(lambda backend: sphere.problem(backend), sphere.log_prob()),
    "conditioned": Case(lambda backend: conditioned.problem(backend), conditioned.log_prob()),
    "sum of 20 exponentials": Case(lambda backend: exponential.problem(backend), exponential.log_prob()),
    "50 Bernoulli sites": Case(lambda backend: discrete.problem(backend), discrete.log_prob()),
}


def run_estimates(name: str, case: Case, backend: str, seeds: int, budget: int) -> dict[str, Any]:
    """A row of the first table."""
    problem = case.build(backend)
    rows = []
    for seed in range(seeds):
        start = time.perf_counter()
        result = estimate(problem, budget=budget, seed=seed, progress=False)
        rows.append((result, time.perf_counter() - start))
    errors = np.array([abs(r.log_prob - case.log_prob) for r, _ in rows])
    wrong = sum(r.converged and e > 0.1 + 3 * r.std_error for (r, _), e in zip(rows, errors, strict=True))
    return {
        "problem": name,
        "backend": backend,
        "log_prob": case.log_prob,
        "median_error": float(np.median(errors)),
        "p90_error": float(np.quantile(errors, 0.9)),
        "covered": float(np.mean([r.lower <= case.log_prob <= r.upper for r, _ in rows])),
        "converged": float(np.mean([r.converged for r, _ in rows])),
        "wrong": int(wrong),
        "calls": float(np.mean([r.calls for r, _ in rows])),
        "first_seconds": rows[0][1],
        "seconds": float(np.median([s for _, s in rows[1:]] or [rows[0][1]])),
    }


def run_gradients(backend: str, seeds: int, budget: int) -> list[dict[str, Any]]:
    """Ratios of the estimated gradient to the closed form, per seed, at beta = 5 in 100 dimensions."""
    at = {"beta": 5.0, "angle": 0.4, "location": 0.8}
    exact = halfspace.gradient(**at)
    problem = halfspace.problem(backend, dim=100, **at)
    ratios: dict[str, list[float]] = {name: [] for name in exact}
    for seed in range(seeds):
        result = estimate(problem, budget=budget, seed=seed, progress=False)
        for name, value in _gradients(backend, problem, result).items():
            ratios[name].append(value / exact[name])
    return [
        {
            "backend": backend,
            "parameter": name,
            "exact": exact[name],
            "median_ratio": float(np.median(values)),
            "worst": float(np.max(np.abs(np.array(values) - 1))),
        }
        for name, values in ratios.items()
    ]


def _gradients(backend: str, problem: Problem, result: Any) -> dict[str, float]:
    if backend == "pyro":
        parts = [problem.model, problem.adversary]
        for part in parts:
            part.zero_grad()
        result.log_prob_at().backward()
        return {name: p.grad.item() for part in parts for name, p in _named(part)}
    import jax

    grads = jax.grad(lambda m, a: result.log_prob_at(model=m, adversary=a), argnums=(0, 1))(
        problem.model, problem.adversary
    )
    return {name: float(value) for part in grads for arg in part.args for name, value in arg.items()}


def _named(module: Any) -> Any:
    return ((name.rsplit(".", 1)[-1], p) for name, p in module.named_parameters())


def _table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title=title)
    for column in rows[0]:
        table.add_column(column, justify="left" if isinstance(rows[0][column], str) else "right")
    for row in rows:
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--budget", type=int, default=50_000)
    parser.add_argument("--backends", default="pyro,numpyro")
    parser.add_argument("--problems", default="", help="only those whose name contains this")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    console = Console(width=180)
    estimates, gradients = [], []
    for backend in options.backends.split(","):
        for name, case in CASES.items():
            if options.problems in name:
                estimates.append(run_estimates(name, case, backend, options.seeds, options.budget))
                console.print(f"[dim]{backend} {name}: {estimates[-1]['median_error']:.3f}[/dim]")
        gradients += run_gradients(backend, options.seeds, options.budget)
    console.print(_table(f"estimate(), {options.seeds} seeds, budget {options.budget:,}", estimates))
    covered = float(np.mean([row["covered"] for row in estimates]))
    console.print(f"covered over all: {covered:.3f}; confidently wrong: {sum(row['wrong'] for row in estimates)}")
    console.print(_table("gradient of log P, ratio to the closed form", gradients))
    if options.out:
        options.out.write_text(json.dumps({"estimates": estimates, "gradients": gradients}, indent=1, allow_nan=True))


if __name__ == "__main__":
    assert math.isfinite(sum(case.log_prob for case in CASES.values()))
    main()
