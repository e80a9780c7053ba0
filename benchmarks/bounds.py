"""Do bounds hold, and how far apart are they?

    OMP_NUM_THREADS=1 python benchmarks/bounds.py --json build/bounds.json
    OMP_NUM_THREADS=1 python benchmarks/bounds.py --seeds 20 --runs 0

First, `Bounds()` on the exact problems of probest.testing: the mean of each bound over all seeds, less the truth, in
standard errors of that mean ("lower" should not be far above 0, "upper" not far below), the mean gap, and the share of
runs whose bounds are less than half a nat apart. Then `lower_bound(0.95)` of fresh importance samples and of plain
draws: how often it is above the truth ("violated"), and by how much it is below on average.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from probest import Bounds, Importance, MonteCarlo, Tempering  # noqa: E402
from probest.markov import lower_bound  # noqa: E402
from probest.testing import EXACT_EVENTS  # noqa: E402


def bounds(event: Any, seeds: int, budget: int) -> dict[str, Any] | None:
    lower, upper, errors, gaps = [], [], [], []
    for i in range(seeds):
        run = Bounds().run(event, budget=budget, seed=np.random.SeedSequence(i))
        named = {line.method: line for line in run.ledger}
        if "upper bound" not in named:
            continue
        one, other = named["lower bound"], named["upper bound"]
        lower.append(one.log_prob - event.log_prob)
        upper.append(other.log_prob - event.log_prob)
        errors.append((one.std_error, other.std_error))
        gaps.append(other.log_prob - one.log_prob)
    if len(gaps) < 2:
        return None
    deviation = [float(np.mean(v) / max(np.std(v) / math.sqrt(len(v)), 1e-9)) for v in (lower, upper)]
    means = [float(np.mean(v)) for v in (lower, upper)]
    return {
        "event": event.name,
        "lower": means[0],
        "lower_in_errors": deviation[0],
        "upper": means[1],
        "upper_in_errors": deviation[1],
        "gap": float(np.mean(gaps)),
        "close": float(np.mean(np.array(gaps) < 0.5)),
        "runs": len(gaps),
    }


def certain(event: Any, runs: int, method: Any, budget: int) -> dict[str, Any]:
    below = []
    for i in range(runs):
        run = method.run(event, budget=budget, seed=np.random.SeedSequence([7, i]))
        below.append(lower_bound(run.ledger, 0.95) - event.log_prob)
    found = np.array(below)
    some = found[np.isfinite(found)]
    mean = float(some.mean()) if len(some) else math.nan
    return {"event": event.name, "method": method.name, "violated": float(np.mean(found > 0)), "mean": mean}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--budget", type=int, default=20_000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    console = Console()
    events = [event for event in EXACT_EVENTS if not event.weighted and not event.boolean]
    first = Table(title=f"bounds, {options.seeds} seeds, {options.budget:,} calls")
    for column in ("event", "lower", "in errors", "upper", "in errors", "gap", "close", "runs"):
        first.add_column(column)
    rows = []
    for event in events:
        row = bounds(event, options.seeds, options.budget)
        if row is None:
            console.print(f"{event.name}: no upper bound")
            continue
        rows.append(row)
        figures = (f"{value:.3g}" for value in list(row.values())[1:])
        first.add_row(row["event"], *figures)
    console.print(first)
    second, sure = Table(title=f"lower_bound(0.95), {options.runs} runs"), []
    for column in ("event", "method", "violated", "mean below"):
        second.add_column(column)
    small = Importance(find=Tempering(particles=64, max_moves=3), first_batch=100, precision=0.3)
    for event in events[:6] if options.runs else ():
        for method, budget in ((small, 4_000), (MonteCarlo(), 3_000)):
            row = certain(event, options.runs, method, budget)
            sure.append(row)
            second.add_row(row["event"], row["method"], f"{row['violated']:.3f}", f"{row['mean']:.2f}")
    if sure:
        console.print(second)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"bounds": rows, "certain": sure}, indent=1))


if __name__ == "__main__":
    main()
