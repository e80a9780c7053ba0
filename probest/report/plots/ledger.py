"""Pictures of the argument: what each method said, how tempering got there, and how healthy the samples are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from probest.evidence import QUANTILES, Evidence
from probest.report.plots.axes import COLOURS, LINES, MARKERS, WIDTH, axes, grid, limits, prob_scale, styled, whisker
from probest.report.tables import moves
from probest.report.text import format_count, format_log
from probest.result import Result

__all__ = ["KHAT", "plot_diagnostics", "plot_intervals", "plot_ledger", "plot_path", "plot_worst_case"]

KHAT = 0.7
"""Pareto k from which on weights have hardly a mean (Vehtari et al. 2024)."""


def plot_ledger(estimate: Result, ax: Any = None) -> Any:
    """The ledger as a waterfall: what each method said, in the order in which they ran, and by how much it moved log P.

    A bar reaches from the estimate before to this one; bounds and strata have none. Hollow marks and broken lines have
    not converged. The band is the conclusion's 95 % interval.
    """
    rows = estimate.ledger
    with styled():
        ax = axes(ax, 1.3 + 0.34 * len(rows))
        ends = limits(_shown(rows), room=0.06)
        _band(ax, estimate, ends)
        before = math.nan
        for height, row in enumerate(rows):
            if moves(row):
                if math.isfinite(before):
                    width = row.log_prob - before
                    ax.barh(height, width, left=before, height=0.56, color="0.5", alpha=0.35, linewidth=0, zorder=1)
                    if height + 1 < len(rows) or abs(width) > 1e-12:
                        ax.plot([before] * 2, [height - 0.72, height], color="0.5", linewidth=0.8, zorder=1)
                    sign = "+" if width >= 0 else ""
                    _beside(ax, height, f"{sign}{format_log(width)}")
                before = row.log_prob
            whisker(ax, row, height, ends)
        _name_rows(ax, [(row.method, row) for row in rows], ends)
        _claims(ax, rows)
        ax.set_title(_title(estimate), pad=8)
        prob_scale(ax, "top")
    return ax


def plot_intervals(
    results: Result | Mapping[str, Result],
    ax: Any = None,
    *,
    exact: float | Sequence[float] | None = None,
) -> Any:
    """Intervals beside each other: of several results, or of the strata or methods of one.

    Args:
        results: by name; or a single result, whose strata are shown where it has some, and its methods otherwise.
        ax: where to draw.
        exact: log P where it is known: one for all, or one each.

    Raises:
        ValueError: there is nothing to draw, or ``exact`` has another length.
    """
    named = _named(results)
    if not named:
        raise ValueError("results is empty: expected results by name")
    truth: Any = [] if exact is None else np.broadcast_to(np.asarray(exact, float), np.shape(exact) or len(named))
    if len(truth) not in (0, len(named)):
        raise ValueError(f"exact has {len(truth)} values for {len(named)} results: expected one for all, or one each")
    with styled():
        ax = axes(ax, 1.3 + 0.34 * len(named))
        rows = [row for _, row in named]
        ends = limits([*_shown(rows), *truth], room=0.06)
        for height, row in enumerate(rows):
            whisker(ax, row, height, ends)
        for height, value in enumerate(truth):
            ax.plot([value] * 2, [height - 0.35, height + 0.35], color="0.2", linewidth=1.2)
        _name_rows(ax, named, ends)
        _claims(ax, rows)
        if len(truth):
            ax.set_title("upright: the exact value", pad=8)
        prob_scale(ax, "top")
    return ax


def plot_path(estimate: Result, ax: Any = None) -> Any:
    """Severity on tempering's way from D to the event, against what of D's mass is left.

    The last run of tempering in the ledger: median, middle half and 5 to 95 % of its population's severities at each
    level. The medians of other runs are thin lines. Runs that see the same world follow the same path.

    Raises:
        ValueError: no method of the ledger tempered.
    """
    runs = [[level for level in row.levels if not level.conditioning] for row in estimate.ledger if row.levels]
    runs = [run for run in runs if len(run) > 1]
    if not runs:
        raise ValueError(
            'kind="path": no method of the ledger tempered, so there is no path; ask for it with '
            "estimate(problem, estimator=Tempering())"
        )
    last = runs[-1]
    with styled():
        ax = axes(ax, 3.4)
        left = [level.log_prob for level in last]
        ends = dict(zip(QUANTILES, _within(np.array([level.severity for level in last])).T, strict=True))
        colour: Any = {"color": "C0", "linewidth": 0}
        ax.fill_between(left, ends[0.05], ends[0.95], alpha=0.18, label="5 to 95 %", **colour)
        ax.fill_between(left, ends[0.25], ends[0.75], alpha=0.35, label="middle half", **colour)
        ax.plot(left, ends[0.5], "o-", color="C0", markersize=3.5, label="median")
        for i, run in enumerate(runs[:-1]):
            middle = _within(np.array([level.severity for level in run]))[:, 2]
            label = "medians of other runs" if i == 0 else None
            ax.plot([level.log_prob for level in run], middle, color="0.4", linewidth=0.8, linestyle="--", label=label)
        ax.axhline(0.0, color="0.2", linewidth=1.0)
        ax.annotate(
            "catastrophe", (1.0, 0.0), (-2, 3), xycoords=("axes fraction", "data"), textcoords="offset points",
            ha="right", va="bottom", fontsize="small",
        )  # fmt: skip
        ax.invert_xaxis()
        ax.set_xlabel("log of the mass that is left (nats)")
        ax.set_ylabel("severity")
        ax.legend(loc="lower right")
        prob_scale(ax, "top")
    return ax


def plot_diagnostics(estimate: Result, ax: Any = None) -> Any:
    """Effective sample size, and Pareto k, of each method that has them: two axes.

    Args:
        estimate: its ledger.
        ax: two axes to draw on.

    Raises:
        ValueError: no method of the ledger has any.
    """
    sizes = [(row.method, _size(row), row) for row in estimate.ledger]
    tails = [(row.method, row.diagnostics.get("khat", math.nan), row) for row in estimate.ledger]
    panels = [[entry for entry in panel if math.isfinite(entry[1])] for panel in (sizes, tails)]
    if not any(panels):
        raise ValueError(
            'kind="diagnostics": no method of the ledger drew a weighted sample, so none has an effective size or a k'
        )
    with styled():
        if ax is None:
            ax = grid(1, 2, (WIDTH, 1.2 + 0.32 * max(map(len, panels))))[0]
        for at, panel in zip(ax, panels, strict=True):
            for height, (_, value, row) in enumerate(panel):
                at.plot([0, value], [height] * 2, color="0.7", linewidth=1.0, zorder=1)
                marker = {
                    "color": COLOURS[row.claim],
                    "markerfacecolor": COLOURS[row.claim] if row.converged else "white",
                }
                at.plot(value, height, MARKERS[row.claim], markersize=6, **marker)
            at.set_yticks(range(len(panel)), [name for name, _, _ in panel])
            at.set_ylim(max(len(panel), 1) - 0.4, -0.6)
        ax[0].set_xlabel("effective sample size (independent cases)")
        ax[1].set_xlabel(f"Pareto k of the weights (below {KHAT:g})")
        ax[1].axvline(KHAT, color="C3", linestyle="--", linewidth=1.0)
        if not panels[1]:
            ax[1].text(0.5, 0.5, "no importance sample", transform=ax[1].transAxes, ha="center", color="0.4")
            ax[1].set_xlim(0.0, 1.0)
    return ax


def plot_worst_case(estimate: Result, ax: Any = None, *, kl: Sequence[float] | None = None, level: float = 0.95) -> Any:
    """The probability that an adversary within so many nats of D can reach, with its interval.

    Args:
        estimate: its conclusion.
        ax: axes to draw on.
        kl: nats; by default up to where a catastrophe is certain.
        level: of the interval.

    Raises:
        ValueError: no catastrophe was found.
    """
    curve = estimate.worst_case_curve(kl, level=level)
    with styled():
        ax = axes(ax, 3.2)
        ax.fill_between(curve.kl, curve.lower, curve.upper, color="C0", alpha=0.2, linewidth=0)
        ax.plot(curve.kl, curve.prob, color="C0")
        ax.set_yscale("log")
        ax.set_ylim(max(float(curve.prob[0]) * 0.3, 1e-300), 1.5)
        ax.set_xlabel("KL(q ‖ D), nats")
        ax.set_ylabel("largest P under q")
        ax.set_title("What an adversary within so many nats can reach", pad=8)
    return ax


def _size(row: Evidence) -> float:
    found = (row.diagnostics.get(name, math.nan) for name in ("ess", "island_ess", "hits"))
    return next((value for value in found if math.isfinite(value)), math.nan)


def _shown(rows: Sequence[Evidence]) -> list[float]:
    """What the axis has to hold: estimates, and ends of intervals that are not so far off that they hide the rest."""
    found = [row.log_prob for row in rows if math.isfinite(row.log_prob)]
    ends = [end for row in rows for end in row.interval if math.isfinite(end)]
    if not found:
        return ends
    room = max(3.0, 0.25 * abs(min(found)))
    return found + [end for end in ends if min(found) - room <= end <= max(found) + room]


def _within(severity: np.ndarray) -> np.ndarray:
    """Severities with what is infinite at the lowest that is not: an axis has an end."""
    finite = severity[np.isfinite(severity) & (np.abs(severity) < 1e12)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (-1.0, 0.0)
    return np.asarray(np.clip(severity, low, high))


def _band(ax: Any, estimate: Result, ends: tuple[float, float]) -> None:
    low, high = max(estimate.lower, ends[0]), min(estimate.upper, ends[1])
    if low < high:
        ax.axvspan(low, high, color="C0", alpha=0.12, linewidth=0, zorder=0)


def _named(results: Result | Mapping[str, Result]) -> list[tuple[str, Evidence]]:
    """Lines to set beside each other: several conclusions, the strata of one result with their sum, or its methods."""
    if isinstance(results, Mapping):
        return [(name, result.conclusion) for name, result in results.items()]
    strata = [(row.stratum, row) for row in results.ledger if row.stratum is not None]
    if strata:
        return [*strata, (results.conclusion.method, results.conclusion)]
    return [(row.method, row) for row in results.ledger]


def _name_rows(ax: Any, named: Sequence[tuple[str, Evidence]], ends: tuple[float, float]) -> None:
    ax.set_yticks(range(len(named)), [f"{name}  {format_count(row.calls)}" for name, row in named])
    ax.set_ylim(len(named) - 0.4, -0.6)
    ax.set_xlim(*ends)
    ax.set_xlabel("log P (nats), 95 % intervals; beside each name its model calls")


def _beside(ax: Any, height: float, text: str) -> None:
    ax.annotate(
        text, (1.0, height), (4, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
        va="center", fontsize="x-small", color="0.35", annotation_clip=False,
    )  # fmt: skip


def _claims(ax: Any, rows: Sequence[Evidence]) -> None:
    """A legend of the claims that occur."""
    from matplotlib import rcParams
    from matplotlib.lines import Line2D
    from matplotlib.transforms import ScaledTranslation

    claims = dict.fromkeys(row.claim for row in rows if math.isfinite(row.log_prob))
    marks = [Line2D([], [], color=COLOURS[c], marker=MARKERS[c], linestyle="", label=c) for c in claims]
    if any(not row.converged for row in rows):
        marks.append(Line2D([], [], color="0.3", linestyle=LINES[False], label="not converged"))
    if marks:  # below the axis and its label, whatever the height of the axes
        below = ScaledTranslation(0.0, -3.4 * rcParams["font.size"] / 72.0, ax.figure.dpi_scale_trans)
        ax.legend(
            handles=marks, loc="upper left", ncols=4, borderaxespad=0.0,
            bbox_to_anchor=(0.0, 0.0), bbox_transform=ax.transAxes + below,
        )  # fmt: skip


def _title(estimate: Result) -> str:
    said = f"log P = {format_log(estimate.log_prob)} ± {format_log(estimate.std_error)}"
    if not math.isfinite(estimate.log_prob):
        said = f"no catastrophe seen: log P ≤ {format_log(estimate.upper)}"
    return f"{said}, {'converged' if estimate.converged else 'not converged'}"
