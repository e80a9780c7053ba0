"""An estimate as a table for the terminal.

The ledger has a row for every piece of evidence, in the order in which it was gathered. ``moved`` is by how many
nats a row differs from the estimate before it: small moves by different methods are what makes a number
believable. Bounds and strata move nothing, so that column is empty for them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from probest.evidence import Evidence
from probest.report.protocols import RunLike, SearchLike
from probest.report.text import (
    format_count,
    format_interval,
    format_log,
    format_prob,
    format_seconds,
    format_values,
)
from probest.report.trees import leaves
from probest.verdict import PARTS

if TYPE_CHECKING:
    from probest.result import Case, Result

__all__ = [
    "COLUMNS",
    "LedgerRow",
    "advice",
    "case_rows",
    "estimate_table",
    "estimate_text",
    "ledger_rows",
    "moves",
    "run_rows",
    "search_rows",
    "verdict",
]

COLUMNS = ("method", "claim", "log P", "P", "95 % interval of P", "calls", "seconds", "moved")
_EXPENDABLE = ("P", "seconds", "moved", "claim", "calls")
_BOUNDS = ("lower", "upper")


class LedgerRow(NamedTuple):
    """A row of the ledger: a cell for each of ``COLUMNS``, and what decides how it is shown."""

    cells: tuple[str, ...]
    converged: bool
    concludes: bool


def ledger_rows(estimate: Result) -> list[LedgerRow]:
    """The ledger of ``estimate``, a row for each piece of evidence."""
    before = math.nan
    rows = []
    for evidence in estimate.ledger:
        moved = evidence.log_prob - before if moves(evidence) else math.nan
        rows.append(_row(evidence, moved, concludes=evidence is estimate.conclusion))
        before = evidence.log_prob if moves(evidence) else before
    return rows


def moves(evidence: Evidence) -> bool:
    """Whether a line says what log P is, so that it moves the answer: bounds and strata do not."""
    whole = evidence.stratum is None and not evidence.method.endswith(PARTS)
    return evidence.claim not in _BOUNDS and whole and math.isfinite(evidence.log_prob)


def verdict(estimate: Result) -> str:
    """The conclusion in one sentence."""
    state = "converged" if estimate.converged else "not converged"
    spent = f"{format_count(estimate.calls)} model calls, {format_seconds(estimate.seconds)}"
    if estimate.log_prob == -math.inf:
        return f"No catastrophe seen: P ≤ {format_prob(estimate.upper)} (95 %). {state.capitalize()}; {spent}."
    interval = format_interval((estimate.lower, estimate.upper))
    log_prob = _with_error(estimate.log_prob, estimate.std_error)
    return f"P = {format_prob(estimate.log_prob)} {interval} (95 %), log P = {log_prob}. {state.capitalize()}; {spent}."


def advice(estimate: Result) -> list[str]:
    """What to do next: the estimate's own advice, or else the notes of the evidence that did not converge."""
    own = list(estimate.advice)
    if own or estimate.converged:
        return own
    return [f"{row.method}: {note}" for row in estimate.ledger if not row.converged for note in row.notes]


def case_rows(case: Case) -> list[tuple[str, str]]:
    """What is in a case, by name: small values as they are, large ones by their range and norm."""
    trees = [*leaves(case.sites), *leaves(case.observation, "observation"), *leaves(case.action, "action")]
    return [(name, format_values(np.asarray(leaf))) for name, leaf in trees]


def run_rows(run: RunLike) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Estimates before and after training and the audit, as a head and rows."""
    found = {"before": run.before, "after": run.after} | ({} if run.audit is None else {"audit": run.audit})
    head = ("", "converged", "log P", "P", "95 % interval of P", "calls", "seconds")
    rows = [(name, "yes" if one.converged else "no", *_levels(one)) for name, one in found.items()]
    spent = [(f"spent: {name}", "", "", "", "", *_spent(part)) for name, part in run.costs.parts.items()]
    return head, rows + spent


def search_rows(search: SearchLike) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The given adversary, the one that was found, and the worst that its KL allows, as a head and rows."""
    head = ("adversary", "", "KL", "log P", "P", "95 % interval of P")
    low, high = search.interval
    kl = f"{search.kl:.2f}"
    base = (*_levels(search.base)[:3],)
    found = (format_log(search.log_prob), format_prob(search.log_prob), format_interval((low, high)))
    worst = (format_log(search.worst_case), format_prob(search.worst_case), "")
    return head, [("D", "", "0.00", *base), ("found", "", kl, *found), ("worst, closed form", "", kl, *worst)]


def _levels(one: Result) -> tuple[str, ...]:
    interval = format_interval((one.lower, one.upper))
    level = _with_error(one.log_prob, one.std_error)
    return level, format_prob(one.log_prob), interval, format_count(one.calls), format_seconds(one.seconds)


def _spent(cost: Any) -> tuple[str, str]:
    return format_count(cost.calls), format_seconds(cost.seconds)


def estimate_table(estimate: Result) -> Group:
    """A rich renderable: the ledger, the verdict, and advice where there is any."""
    lines = [Text(verdict(estimate), style="green" if estimate.converged else "yellow")]
    lines += [Text(f"• {line}") for line in advice(estimate)]
    return Group(_Ledger(ledger_rows(estimate)), *lines)


def estimate_text(estimate: Result, width: int = 120) -> str:
    """The same as plain text, for ``str(estimate)`` and for logs."""
    buffer = StringIO()
    Console(file=buffer, width=width, color_system=None, force_jupyter=False).print(estimate_table(estimate))
    return "\n".join(line.rstrip() for line in buffer.getvalue().strip("\n").splitlines())


@dataclass(frozen=True)
class _Ledger:
    """The rows as a table. Where the terminal is narrow, columns that others imply are left out."""

    rows: list[LedgerRow]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        unbounded = options.update(max_width=10_000)
        for left_out in range(len(_EXPENDABLE) + 1):
            columns = [name for name in COLUMNS if name not in _EXPENDABLE[:left_out]]
            table = self._table(columns)
            if Measurement.get(console, unbounded, table).maximum <= options.max_width:
                break
        yield table

    def _table(self, columns: Sequence[str]) -> Table:
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for name in columns:
            table.add_column(name, justify="left" if name in ("method", "claim") else "right", no_wrap=True)
        for row in self.rows:
            cells = [Text(cell) for name, cell in zip(COLUMNS, row.cells, strict=True) if name in columns]
            table.add_row(*cells, style="bold" if row.concludes else None if row.converged else "dim")
        return table


def _row(evidence: Evidence, moved: float, *, concludes: bool) -> LedgerRow:
    cells = (
        evidence.method,
        evidence.claim,
        _with_error(evidence.log_prob, evidence.std_error),
        format_prob(evidence.log_prob),
        format_interval(evidence.interval),
        format_count(evidence.calls),
        format_seconds(evidence.seconds),
        "" if math.isnan(moved) else f"{'+' if moved >= 0 else ''}{format_log(moved)}",
    )
    return LedgerRow(cells, evidence.converged, concludes)


def _with_error(log_prob: float, std_error: float) -> str:
    return format_log(log_prob) if math.isinf(log_prob) else f"{format_log(log_prob)} ± {format_log(std_error)}"
