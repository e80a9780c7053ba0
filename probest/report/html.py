"""An estimate as HTML for notebooks: no scripts, no style sheets, no fetches; colours follow the notebook's theme."""

from __future__ import annotations

from html import escape

from probest.report.protocols import EstimateLike
from probest.report.tables import COLUMNS, LedgerRow, advice, ledger_rows, verdict

__all__ = ["estimate_html"]

_CELL = "padding:.2em .8em;white-space:nowrap;text-align:"


def estimate_html(estimate: EstimateLike) -> str:
    """The ledger as a table, the verdict above it, and advice below where there is any."""
    colour = "#2e7d32" if estimate.converged else "#b26a00"
    head = "".join(f'<th style="{_CELL}{_align(i)}">{escape(name)}</th>' for i, name in enumerate(COLUMNS))
    body = "".join(_row_html(row) for row in ledger_rows(estimate))
    items = "".join(f"<li>{escape(line)}</li>" for line in advice(estimate))
    return (
        '<div class="probest-estimate">'
        f'<p style="border-left:4px solid {colour};padding-left:.6em;margin:.4em 0">{escape(verdict(estimate))}</p>'
        f'<table style="border-collapse:collapse;font-variant-numeric:tabular-nums">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        f"{f'<ul>{items}</ul>' if items else ''}</div>"
    )


def _row_html(row: LedgerRow) -> str:
    style = "font-weight:bold" if row.concludes else "" if row.converged else "opacity:.6"
    cells = "".join(f'<td style="{_CELL}{_align(i)}">{escape(cell)}</td>' for i, cell in enumerate(row.cells))
    return f'<tr style="{style}">{cells}</tr>'


def _align(column: int) -> str:
    return "left" if column < 2 else "right"
