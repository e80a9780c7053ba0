"""What is each constant worth? Every field of a tuning dataclass is halved and doubled, the others left as they are.

    python benchmarks/tuning.py --of lines --seeds 5
    python benchmarks/tuning.py --of tempering --seeds 3 --budget 20000 --out tuning.json

A row compares a changed value with the default on the same events and seeds: the ratio of calls, the ratio of the mean
squared error of log P at equal calls (error² times calls; above 1 the default is better), and the changes of the shares
of runs that converged and of those that were confidently wrong (converged, and off by more than 0.1 and 3 standard
errors). Few seeds tell only of large effects: `noise` is what the ratio does when nothing but the seeds change.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from probest.estimators import Combined, Importance, LineSampling, Surrogate, Tempering, UnmetNeedError  # noqa: E402
from probest.testing import EXACT_EVENTS, ExactEvent  # noqa: E402
from probest.tuning import meanings  # noqa: E402

METHODS: dict[str, Callable[[], Any]] = {
    "combined": Combined,
    "importance": Importance,
    "lines": LineSampling,
    "surrogate": Surrogate,
    "tempering": lambda: Tempering(particles=256),
}


@dataclass(frozen=True)
class Outcome:
    """A method on all events and seeds. loss: mean of error² times calls, errors capped at a nat."""

    calls: float
    loss: float
    converged: float
    wrong: float


@dataclass(frozen=True)
class Row:
    field: str
    default: Any
    value: Any
    calls: float
    loss: float
    converged: float
    wrong: float
    by: str


def run(method: Any, events: list[ExactEvent], seeds: range, budget: int) -> Outcome:
    calls, losses, converged, wrong = [], [], [], []
    for event in events:
        for seed in seeds:
            found = method.run(event, budget=budget, seed=np.random.SeedSequence(seed))
            line = found.conclusion
            error = abs(line.log_prob - event.log_prob) if math.isfinite(line.log_prob) else math.inf
            calls.append(found.calls)
            losses.append(min(error, 1.0) ** 2 * found.calls)
            converged.append(line.converged)
            wrong.append(line.converged and error > 0.1 + 3.0 * line.std_error)
    return Outcome(*(float(np.mean(part)) for part in (calls, losses, converged, wrong)))


def able(method: Any) -> list[ExactEvent]:
    """The events that the method can be used on."""
    events = []
    for event in EXACT_EVENTS:
        try:
            method.run(event, budget=10, seed=np.random.SeedSequence(0))
        except UnmetNeedError:
            continue
        events.append(event)
    return events


def changes(value: Any) -> Iterator[Any]:
    """Half and twice the value."""
    for factor in (0.5, 2.0):
        if isinstance(value, int):
            changed: Any = max(1, round(factor * value))
        elif isinstance(value, float):
            changed = factor * value
        else:
            continue
        if changed != value:
            yield changed


def table(rows: list[Row], title: str) -> Table:
    out = Table(title=title)
    for column in ("field", "default", "value", "calls", "loss", "converged", "wrong"):
        out.add_column(column, justify="left" if column == "field" else "right")
    for row in rows:
        marked = "bold" if row.loss > 1.3 or row.loss < 0.77 or row.wrong > 0.0 else ""
        out.add_row(
            row.field, f"{row.default:g}", f"{row.value:g}", f"{row.calls:.2f}", f"{row.loss:.2f}",
            f"{row.converged:+.2f}", f"{row.wrong:+.3f}", style=marked,
        )  # fmt: skip
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--of", choices=sorted(METHODS), required=True)
    parser.add_argument("--fields", default="", help="only those whose name contains this")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=900)
    parser.add_argument("--budget", type=int, default=10_000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    method = METHODS[options.of]()
    events = able(method)
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    usual = run(method, events, seeds, options.budget)
    again = run(method, events, range(seeds.stop, seeds.stop + options.seeds), options.budget)
    rows = []
    fields = {name: found for name, found in meanings(method.tuning).items() if options.fields in name}
    for name, (value, _, by) in track(fields.items(), description=options.of, console=Console(stderr=True)):
        for changed in changes(value):
            try:
                found = run(
                    replace(method, tuning=replace(method.tuning, **{name: changed})), events, seeds, options.budget
                )
            except (ValueError, RuntimeError, ArithmeticError) as error:
                Console(stderr=True).print(f"{name}={changed!r}: {type(error).__name__}: {error}")
                continue
            ratios = found.calls / usual.calls, found.loss / usual.loss
            shares = found.converged - usual.converged, found.wrong - usual.wrong
            rows.append(Row(name, value, changed, *ratios, *shares, by))
    console = Console(width=120)
    console.print(table(rows, f"{options.of}: {len(events)} events, {options.seeds} seeds, budget {options.budget:,}"))
    console.print(f"noise: loss with other seeds {again.loss / usual.loss:.2f}, calls {again.calls / usual.calls:.2f}")
    console.print(f"default: {usual.calls:,.0f} calls, converged {usual.converged:.2f}, wrong {usual.wrong:.3f}")
    if options.out:
        record = {"default": asdict(usual), "noise": asdict(again), "rows": [asdict(row) for row in rows]}
        options.out.write_text(json.dumps(record, indent=1, allow_nan=True))


if __name__ == "__main__":
    main()
