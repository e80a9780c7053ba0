"""Pictures of estimates, of catastrophes, of training runs and of searches.

Each function draws on the axes that it is given, or on new ones, sized for a notebook, and returns them. Methods and
claims differ in marker and line as well as in colour, so that all are legible in grey; colours are those of the style
in use (``plt.style.use``). log P is in nats, with P itself along the other edge. Matplotlib is imported by the first
call.
"""

from __future__ import annotations

from typing import Any

from probest.report.plots.cases import plot_cases, plot_pairs
from probest.report.plots.ledger import (
    plot_diagnostics,
    plot_intervals,
    plot_ledger,
    plot_path,
    plot_worst_case,
)
from probest.report.plots.training import plot_costs, plot_history, plot_search
from probest.report.protocols import RunLike
from probest.result import Result

__all__ = [
    "RESULT_KINDS",
    "RUN_KINDS",
    "plot_cases",
    "plot_costs",
    "plot_diagnostics",
    "plot_history",
    "plot_intervals",
    "plot_ledger",
    "plot_pairs",
    "plot_path",
    "plot_result",
    "plot_run",
    "plot_search",
    "plot_worst_case",
]

RESULT_KINDS = {
    "ledger": plot_ledger,
    "intervals": plot_intervals,
    "path": plot_path,
    "pairs": plot_pairs,
    "cases": plot_cases,
    "diagnostics": plot_diagnostics,
    "worst_case": plot_worst_case,
}
RUN_KINDS = {"history": plot_history, "costs": plot_costs}


def plot_result(result: Result, kind: str = "ledger", **options: Any) -> Any:
    """Draw one of ``RESULT_KINDS``. Raises ValueError for any other."""
    return _chosen(RESULT_KINDS, kind)(result, **options)


def plot_run(run: RunLike, kind: str = "history", **options: Any) -> Any:
    """Draw one of ``RUN_KINDS``, or of ``RESULT_KINDS`` of the estimate to believe. Raises ValueError for any other."""
    if kind in RESULT_KINDS:
        return plot_result(run.believed, kind, **options)
    return _chosen({**RUN_KINDS, **RESULT_KINDS}, kind)(run, **options)


def _chosen(kinds: dict[str, Any], kind: str) -> Any:
    if kind not in kinds:
        raise ValueError(f"kind={kind!r}: expected one of {', '.join(map(repr, kinds))}")
    return kinds[kind]
