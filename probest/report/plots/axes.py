"""Axes, scales and marks that the pictures share."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from probest.evidence import Evidence
from probest.report.extras import extra

__all__ = [
    "COLOURS",
    "LINES",
    "MARKERS",
    "WIDTH",
    "axes",
    "figure_of",
    "grid",
    "limits",
    "prob_scale",
    "styled",
    "whisker",
]

WIDTH = 7.0
"""Inches; a notebook's column."""

MARKERS = {"unbiased": "o", "consistent": "s", "lower": ">", "upper": "<", "heuristic": "D"}
COLOURS = {"unbiased": "C0", "consistent": "C0", "lower": "C2", "upper": "C3", "heuristic": "0.45"}
LINES: dict[bool, Any] = {True: "-", False: (0, (2, 1.5))}
"""Solid for what has converged, broken for what has not."""

_LN10 = math.log(10.0)
_STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": "medium",
    "axes.labelsize": "small",
    "xtick.labelsize": "small",
    "ytick.labelsize": "small",
    "legend.frameon": False,
    "legend.fontsize": "small",
    "figure.constrained_layout.use": True,
}


@contextmanager
def styled() -> Iterator[None]:
    """What the pictures ask for beside the style in use, which keeps its colours and fonts.

    Only these settings are put back afterwards: a notebook's backend, loaded with the first figure, makes settings of
    its own that have to stay (with ``rc_context`` no figure but the first was shown).
    """
    settings = extra("matplotlib", "plots").rcParams
    before = {name: settings[name] for name in _STYLE}
    settings.update(_STYLE)
    try:
        yield
    finally:
        settings.update(before)


def axes(ax: Any, height: float) -> Any:
    """The axes, or new ones of that height in inches."""
    if ax is not None:
        return ax
    return extra("matplotlib.pyplot", "plots").subplots(figsize=(WIDTH, height))[1]


def grid(rows: int, columns: int, size: tuple[float, float], **options: Any) -> Any:
    """An array of new axes, ``(rows, columns)``."""
    return extra("matplotlib.pyplot", "plots").subplots(rows, columns, figsize=size, squeeze=False, **options)[1]


def figure_of(ax: Any) -> Any:
    """The figure of axes, or of an array of them, as the plots return them."""
    return np.ravel(ax)[0].figure


def limits(values: list[float], *, room: float = 0.08, least: float = 0.5) -> tuple[float, float]:
    """The ends of an axis that holds all that is finite among the values, with some room; at least so wide."""
    finite = [x for x in values if math.isfinite(x)] or [-1.0, 0.0]
    low, high = min(finite), max(finite)
    wide = max(high - low, least)
    middle = 0.5 * (low + high)
    return middle - (0.5 + room) * wide, middle + (0.5 + room) * wide


def prob_scale(ax: Any, where: str) -> None:
    """P along the edge ``where``, opposite to an axis of log P in nats."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    vertical = where in ("left", "right")
    secondary = (ax.secondary_yaxis if vertical else ax.secondary_xaxis)(
        where, functions=(lambda x: np.asarray(x) / _LN10, lambda x: np.asarray(x) * _LN10)
    )
    axis = secondary.yaxis if vertical else secondary.xaxis
    low, high = sorted(ax.get_ylim() if vertical else ax.get_xlim())
    whole = (high - low) / _LN10 >= 2.0
    axis.set_major_locator(MaxNLocator(5, integer=whole, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda x, _: _power(x)))
    (secondary.set_ylabel if vertical else secondary.set_xlabel)("P")


def _power(exponent: float) -> str:
    """10 to this power, as the text of a tick."""
    if abs(exponent - round(exponent)) < 1e-9:
        return rf"$10^{{{round(exponent)}}}$" if exponent else "1"
    below = math.floor(exponent)
    return rf"${10 ** (exponent - below):.1f}\cdot10^{{{below}}}$"


def whisker(ax: Any, row: Evidence, height: float, ends: tuple[float, float], **style: Any) -> None:
    """A line's 95 % interval and its estimate, at a height; arrows where it is open or leaves the axis."""
    colour = style.pop("color", COLOURS[row.claim])
    low, high = (min(max(end, ends[0]), ends[1]) for end in row.interval)
    ax.plot([low, high], [height, height], color=colour, linestyle=LINES[row.converged], linewidth=1.6, zorder=3)
    for end, at, marker in zip(row.interval, ends, "<>", strict=True):
        if (end < at) if marker == "<" else (end > at):
            ax.plot(at, height, marker, color=colour, markersize=5, clip_on=False, zorder=4)
    if math.isfinite(row.log_prob):
        face = colour if row.converged else "white"
        marker = MARKERS[row.claim]
        ax.plot(row.log_prob, height, marker, color=colour, markerfacecolor=face, markersize=6, zorder=5)
    elif row.interval[1] < 0.0:
        ax.plot(high, height, "|", color=colour, markersize=10, zorder=4)
