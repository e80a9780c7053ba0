"""Does the stated interval cover the truth? Runs the default strategy on problems with a known log P.

    python benchmarks/coverage.py --seeds 20 --budget 50000 --out coverage.json --problems half_space,RP22

For each problem: median and 90th percentile of |error of log P|, share of stated 95 % intervals that cover the
truth, mean calls, share converged, and how often it was *confidently wrong* (converged, with an error above
0.1 + 3 standard errors). The reference problems are read from a JSON file (``--reference``).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy import special

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from exact_events import (  # noqa: E402
    EXACT_EVENTS,
    ExactEvent,
    boolean,
    half_space,
    islands,
    numeric_gradient,
    sphere,
    union,
)

from probest.estimators.base import Estimator, Floats  # noqa: E402
from probest.estimators.combined import Combined  # noqa: E402
from probest.estimators.importance import Importance  # noqa: E402
from probest.estimators.surrogate import Surrogate  # noqa: E402
from probest.estimators.tempering import Tempering  # noqa: E402

METHODS: dict[str, Estimator] = {
    "combined": Combined(),
    "importance": Importance(),
    "surrogate": Surrogate(),
    "tempering": Tempering(),
}
SQRT2 = math.sqrt(2.0)


def _g_rp55(x: Floats) -> Floats:
    d = x[:, 0] - x[:, 1]
    c = 0.2 + 0.6 * d**4
    branches = [c - d / SQRT2, c + d / SQRT2, d + 5.0 / SQRT2 - 2.2, -d + 5.0 / SQRT2 - 2.2]
    return np.asarray(np.min(branches, axis=0), dtype=np.float64)


def _g_rp60(x: Floats) -> Floats:
    a, b, c, d, e = x.T
    one = np.min([b - e / 2, c - e / 2, d - e / 2], axis=0)
    two = np.maximum(d - e, np.minimum(b - e, c - e))
    return np.asarray(np.minimum(a - e, np.maximum(one, two)), dtype=np.float64)


def _g_rp38(x: Floats) -> Floats:
    a, b, c, d, e, f, g = x.T
    top = d**2 - 4 * e * f * g**2 + d * (f + 4 * e + 2 * f * g)
    return np.asarray(15.59e4 - a * b**3 / (2 * c**3) * top / (d * e * (d + f + 2 * f * g)), dtype=np.float64)


def _g_four_branch(x: Floats) -> Floats:
    a, b = x.T
    c = 3.0 + 0.1 * (a - b) ** 2
    branches = [c - (a + b) / SQRT2, c + (a + b) / SQRT2, a - b + 7 / SQRT2, b - a + 7 / SQRT2]
    return np.asarray(np.min(branches, axis=0), dtype=np.float64)


def _leaf(x: Floats) -> Floats:
    discs = [np.sum((x + 3.8) ** 2, axis=1), np.sum((x - 3.8) ** 2, axis=1)]
    return np.asarray(np.min(discs, axis=0) - 1.0, dtype=np.float64)


LIMIT_STATES: dict[str, Callable[[Floats], Floats]] = {
    "RP8": lambda x: x[:, 0] + 2 * x[:, 1] + 2 * x[:, 2] + x[:, 3] - 5 * x[:, 4] - 5 * x[:, 5],
    "RP14": lambda x: x[:, 0] - 32 / (np.pi * x[:, 1] ** 3) * np.sqrt(x[:, 2] ** 2 * x[:, 3] ** 2 / 16 + x[:, 4] ** 2),
    "RP22": lambda x: 2.5 - (x[:, 0] + x[:, 1]) / SQRT2 + 0.1 * (x[:, 0] - x[:, 1]) ** 2,
    "RP33": lambda x: np.minimum(-x.sum(axis=1) + 3 * math.sqrt(3), 3 - x[:, 2]),
    "RP35": lambda x: np.minimum(
        2 - x[:, 1] + np.exp(-0.1 * x[:, 0] ** 2) + (0.2 * x[:, 0]) ** 4, 4.5 - x[:, 0] * x[:, 1]
    ),
    "RP38": _g_rp38,
    "RP55": _g_rp55,
    "RP54": lambda x: x.sum(axis=1) - 8.951,
    "RP75": lambda x: 3 - x[:, 0] * x[:, 1],
    "RP89": lambda x: np.minimum(-(x[:, 0] ** 2) - x[:, 1] + 8, -x[:, 0] / 5 - x[:, 1] + 6),
    "RP60": _g_rp60,
    "FourBranch": _g_four_branch,
    "R-S": lambda x: x[:, 0] - x[:, 1],
    "AxialBeam": lambda x: x[:, 0] - x[:, 1] / (100 * np.pi),
    "nofis_Leaf": _leaf,
}


def marginal_map(marginals: object, dim: int) -> Callable[[Floats], Floats]:
    """z to x, column by column, exact in both tails."""
    rows = marginals if isinstance(marginals, list) else [["normal", 0.0, 1.0]]
    if len(rows) < dim:
        rows = [rows[0]] * dim

    def column(law: list[object], z: Floats) -> Floats:
        kind, a, b = str(law[0]), float(str(law[1])), float(str(law[2]))
        if kind == "normal":
            return a + b * z
        if kind == "lognormal":
            return np.asarray(np.exp(a + b * z))
        if kind == "uniform":
            return np.asarray(a + (b - a) * special.ndtr(z))
        if kind == "gumbel":
            return np.asarray(a - b * np.log(-special.log_ndtr(z)))
        if kind == "exponential":
            return np.asarray(b - special.log_ndtr(-z) / a)
        raise ValueError(f"unknown marginal {kind!r}")

    return lambda z: np.stack([column(rows[j], z[:, j]) for j in range(dim)], axis=1)


def reference_events(path: Path) -> Iterator[ExactEvent]:
    """The problems of the reference file whose limit state is written here, severity = −g."""
    for entry in json.loads(path.read_text()):
        name, dim = entry["name"], entry["dim"]
        if name not in LIMIT_STATES:
            continue
        g, to_x = LIMIT_STATES[name], marginal_map(entry["marginals"], dim)

        def severity(z: Floats, g: Callable[[Floats], Floats] = g, to_x: Callable[[Floats], Floats] = to_x) -> Floats:
            return -g(to_x(z))

        yield ExactEvent(name, dim, math.log(entry["reference"]), severity, numeric_gradient(severity))


@dataclass(frozen=True)
class Row:
    problem: str
    log_prob: float
    median_error: float
    p90_error: float
    coverage: float
    calls: float
    converged: float
    confidently_wrong: int
    seeds: int
    seconds: float


def assess(event: ExactEvent, method: Estimator, seeds: int, budget: int, first: int) -> Row:
    started = time.perf_counter()
    seeding = [np.random.SeedSequence(seed) for seed in range(first, first + seeds)]
    runs = [method.run(event, budget=budget, seed=source) for source in seeding]
    errors = np.array([abs(run.log_prob - event.log_prob) for run in runs])
    covered = [run.interval[0] <= event.log_prob <= run.interval[1] for run in runs]
    wrong = [r.converged and e > 0.1 + 3.0 * r.std_error for r, e in zip(runs, errors, strict=True)]
    if max(run.calls for run in runs) > budget:
        raise AssertionError(f"{event.name}: {max(run.calls for run in runs)} calls exceed the budget of {budget}")
    return Row(
        event.name,
        event.log_prob,
        float(np.median(errors)),
        float(np.quantile(errors, 0.9, method="higher")),
        float(np.mean(covered)),
        float(np.mean([run.calls for run in runs])),
        float(np.mean([run.converged for run in runs])),
        int(np.sum(wrong)),
        seeds,
        (time.perf_counter() - started) / seeds,
    )


def problems(reference: Path) -> list[ExactEvent]:
    events = [half_space(d, b) for d in (2, 100, 1000) for b in (3.0, 5.0, 8.0)]
    events += [union(50, (5.0, 5.0, 5.0, 5.0)), union(2, (5.0, 5.0, 5.0, 5.0)), sphere(100, 14.467812505937182)]
    events += [boolean(e) for e in (half_space(2, 5.0), half_space(50, 4.0), union(2, (4.0,) * 4), islands(2))]
    known = {event.name for event in events}
    events += [event for event in EXACT_EVENTS if event.name not in known]
    return events + (list(reference_events(reference)) if reference.exists() else [])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--budget", type=int, default=50_000)
    parser.add_argument("--method", choices=sorted(METHODS), default="combined")
    parser.add_argument("--problems", default="", help="comma-separated parts of problem names; all when empty")
    parser.add_argument("--reference", type=Path, default=ROOT / "benchmarks" / "reliability.json")
    parser.add_argument("--out", type=Path, default=None, help="write the rows as JSON here")
    args = parser.parse_args()
    wanted = [part for part in args.problems.split(",") if part]
    chosen = [e for e in problems(args.reference) if not wanted or any(part in e.name for part in wanted)]
    console = Console(width=130)
    table = Table(title=f"{args.method}, {args.seeds} seeds, budget {args.budget:,} calls")
    for title in ("problem", "log P", "median |err|", "p90", "coverage", "calls", "converged", "conf. wrong", "s/run"):
        table.add_column(title, justify="left" if title == "problem" else "right")
    rows = []
    for event in chosen:
        row = assess(event, METHODS[args.method], args.seeds, args.budget, args.first_seed)
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
        table.add_row(
            row.problem,
            f"{row.log_prob:.2f}",
            f"{row.median_error:.3f}",
            f"{row.p90_error:.3f}",
            f"{row.coverage:.2f}",
            f"{row.calls:,.0f}",
            f"{row.converged:.2f}",
            str(row.confidently_wrong),
            f"{row.seconds:.2f}",
        )
        if args.out is not None:
            args.out.write_text(json.dumps([vars(r) for r in rows], indent=1) + "\n")
    console.print(table)
    runs = sum(row.seeds for row in rows)
    wrong = sum(row.confidently_wrong for row in rows)
    covered = sum(row.coverage * row.seeds for row in rows) / max(1, runs)
    console.print(f"{runs} runs: coverage {covered:.3f}, confidently wrong {wrong} ({wrong / max(1, runs):.4f})")


if __name__ == "__main__":
    main()
