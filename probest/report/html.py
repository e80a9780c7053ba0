"""Results as HTML for notebooks: no scripts, no style sheets, no fetches; colours follow the notebook's theme."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

from probest.report.tables import COLUMNS, LedgerRow, advice, case_rows, ledger_rows, run_rows, search_rows, verdict

if TYPE_CHECKING:
    from probest.report.protocols import RunLike, SearchLike
    from probest.result import Case, Result

__all__ = ["STATES", "case_html", "estimate_html", "ledger_html", "run_html", "search_html"]

STATES = {True: ("converged", "#2e7d32"), False: ("not converged", "#b26a00")}
"""What a result says of itself, and the colour of that."""

_CELL = "padding:.2em .6em;white-space:nowrap;text-align:"


def estimate_html(estimate: Result) -> str:
    """The ledger as a table, the verdict above it, and advice below where there is any."""
    return _framed(estimate.converged, verdict(estimate), ledger_html(estimate), advice(estimate))


def ledger_html(estimate: Result) -> str:
    """The ledger as a table."""
    body = "".join(_row_html(row) for row in ledger_rows(estimate))
    return _table_html(COLUMNS, body)


def run_html(run: RunLike) -> str:
    """Before, after and audit as a table, and what is missing below."""
    head, rows = run_rows(run)
    body = "".join(_cells(row) for row in rows)
    said = f"Trained for {len(run.history):,} steps; believe log P = {run.believed.log_prob:.2f}."
    return _framed(run.converged, said, _table_html(head, body), run.advice)


def search_html(search: SearchLike) -> str:
    """What was found, beside the given adversary and the closed form's optimum."""
    head, rows = search_rows(search)
    said = f"Found {search.efficiency:.0%} of the worst that {search.kl:.2f} nats allow."
    return _framed(search.converged, said, _table_html(head, "".join(map(_cells, rows))), search.advice)


def case_html(case: Case) -> str:
    """What is in a case: a row for each site, for what M saw and for what it did."""
    body = "".join(_cells(row) for row in case_rows(case))
    said = "A catastrophe" if case.severity >= 0.0 else "No catastrophe"
    return _framed(case.severity < 0.0, f"{said}: severity {case.severity:.4g}.", _table_html(("", "value"), body), ())


def _framed(converged: bool, said: str, table: str, items: Iterable[str]) -> str:
    _, colour = STATES[converged]
    notes = "".join(f"<li>{escape(line)}</li>" for line in items)
    return (
        '<div class="probest-estimate">'
        f'<p style="border-left:4px solid {colour};padding-left:.6em;margin:.4em 0">{escape(said)}</p>'
        f"{table}{f'<ul>{notes}</ul>' if notes else ''}</div>"
    )


def _table_html(columns: Sequence[str], body: str) -> str:
    head = "".join(f'<th style="{_CELL}{_align(i)}">{escape(name)}</th>' for i, name in enumerate(columns))
    return (
        '<div style="overflow-x:auto">'
        '<table style="border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.9em">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _row_html(row: LedgerRow) -> str:
    return _cells(row.cells, "font-weight:bold" if row.concludes else "" if row.converged else "opacity:.6")


def _cells(cells: Sequence[str], style: str = "") -> str:
    inside = "".join(f'<td style="{_CELL}{_align(i)}">{escape(cell)}</td>' for i, cell in enumerate(cells))
    return f'<tr style="{style}">{inside}</tr>'


def _align(column: int) -> str:
    return "left" if column < 2 else "right"
