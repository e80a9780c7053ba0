"""Several models beside each other: what each can do, how likely its catastrophe is, and what that cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from probest.report.text import format_count, format_log, format_prob, format_seconds
from probest.result import Result

__all__ = ["Candidate", "comparison_table"]


class Candidate(NamedTuple):
    """A trained model. ``calls`` and ``seconds`` are what its training spent, estimates not counted."""

    name: str
    accuracy: float
    estimate: Result
    audit: Result
    calls: int
    seconds: float


def comparison_table(title: str, candidates: Sequence[Candidate]) -> Table:
    """A column for each candidate."""
    rows: list[tuple[str, list[str]]] = [
        ("task accuracy", [f"{100 * c.accuracy:.1f} %" for c in candidates]),
        ("P", [_level(c.estimate, format_prob) for c in candidates]),
        ("log P", [_level(c.estimate, format_log) for c in candidates]),
        ("  95 % interval", [_interval(c.estimate) for c in candidates]),
        ("log P, audit", [_level(c.audit, format_log) for c in candidates]),
        ("  95 % interval", [_interval(c.audit) for c in candidates]),
        ("converged", [_converged(c) for c in candidates]),
        ("model calls", [format_count(c.calls) for c in candidates]),
        ("seconds", [format_seconds(c.seconds) for c in candidates]),
    ]
    table = Table("", title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for candidate in candidates:
        table.add_column(Text(candidate.name), justify="right")
    for name, cells in rows:
        table.add_row(Text(name, style="bold"), *map(Text, cells))
    return table


def _level(estimate: Result, shown: Callable[[float], str]) -> str:
    """log P or P; where no catastrophe was found, what it is at most."""
    if math.isfinite(estimate.log_prob):
        return shown(estimate.log_prob)
    return f"≤ {shown(estimate.upper)}"


def _interval(estimate: Result) -> str:
    return f"[{format_log(estimate.lower)}, {format_log(estimate.upper)}]"


def _converged(candidate: Candidate) -> str:
    words = {True: "yes", False: "no"}
    return f"{words[candidate.estimate.converged]}, audit {words[candidate.audit.converged]}"
