"""Pictures of training runs and of searches for the worst adversary."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from probest.report.plots.axes import WIDTH, axes, grid, limits, prob_scale, styled
from probest.report.protocols import RunLike, SearchLike
from probest.result import Result

__all__ = ["plot_costs", "plot_history", "plot_search"]


def plot_history(run: RunLike, ax: Any = None) -> Any:
    """log P over training, with looks, estimates and audit; and the task's loss below: two axes.

    The ladder follows log P from step to step and bounds nothing; looks and estimates are independent of it. An arrow
    down says "at most": no catastrophe was found.

    Args:
        run: the run.
        ax: two axes to draw on, above each other.
    """
    steps = np.array([record.step for record in run.history] or [0])
    ladder = np.array([record.log_prob for record in run.history] or [math.nan])
    with styled():
        if ax is None:
            ax = grid(2, 1, (WIDTH, 4.6), sharex=True, height_ratios=(2.2, 1.0))[:, 0]
        upper, lower = ax
        upper.plot(steps, ladder, color="C0", linewidth=1.0, label="ladder (bounds nothing)")
        looks = [(record.step, record.look) for record in run.history if record.look is not None]
        seen = [(step, look) for step, look in looks if math.isfinite(look)]
        if seen:
            upper.plot(*zip(*seen, strict=True), "s", color="C1", markersize=5, label="fresh looks")
        for step in (step for step, look in looks if not math.isfinite(look)):
            upper.plot(step, 0.02, "v", color="C1", transform=upper.get_xaxis_transform(), clip_on=False)
        span = max(int(steps[-1]), 1)
        points = [("before", run.before, 0.0, "o", "0.2"), ("after", run.after, span, "o", "C2")]
        if run.audit is not None:
            points.append(("audit", run.audit, span * 1.03, "D", "C3"))
        for name, result, at, marker, colour in points:
            _point(upper, result, at, marker, colour, name)
        held = [x for _, result, *_ in points for x in (result.log_prob, result.upper)]
        held += [look for _, look in seen]
        settled = ladder[len(ladder) // 20 :]  # its first steps only find their way
        upper.set_ylim(*limits([*settled[np.isfinite(settled)].tolist(), *held]))
        upper.set_ylabel("log P (nats)")
        upper.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3, columnspacing=1.2, handletextpad=0.5)
        prob_scale(upper, "right")
        lower.plot(steps, [record.task_loss for record in run.history] or [math.nan], color="0.35", linewidth=0.8)
        taught = np.array([record.taught_loss for record in run.history] or [math.nan])
        if np.isfinite(taught).any():
            lower.plot(steps, taught, color="C1", linestyle="--", linewidth=0.8, label="lessons")
            lower.legend(loc="upper right")
        lower.set_ylabel("task loss")
        lower.set_xlabel("training step")
    return ax


def plot_costs(run: RunLike, ax: Any = None) -> Any:
    """What a run spent its model calls and its seconds on: two axes."""
    parts = run.costs.parts
    with styled():
        if ax is None:
            ax = grid(1, 2, (WIDTH, 1.1 + 0.3 * len(parts)), sharey=True)[0]
        for at, values, label in (
            (ax[0], [part.calls for part in parts.values()], "model calls"),
            (ax[1], [part.seconds for part in parts.values()], "seconds"),
        ):
            bars = at.barh(list(parts), values, color="C0", alpha=0.7)
            at.bar_label(bars, [f"{value:,.0f}" for value in values], padding=3, fontsize="x-small")
            at.set_xlabel(label)
            at.margins(x=0.2)
            at.ticklabel_format(axis="x", style="plain")
            at.xaxis.set_major_locator(_few())
        ax[0].invert_yaxis()
    return ax


def plot_search(search: SearchLike, ax: Any = None) -> Any:
    """log P under the adversary that is learnt, over steps; the KL that it spends; and the closed form's optimum."""
    history = np.asarray(search.history, dtype=float)
    with styled():
        ax = axes(ax, 3.4)
        steps = np.arange(len(history))
        ax.plot(steps, history[:, 0], color="C0", label="log P, as learnt")
        ax.axhline(search.base.log_prob, color="0.2", linewidth=1.0, linestyle=":", label="log P under D")
        ax.axhline(search.worst_case, color="C3", linewidth=1.0, linestyle="--", label="the most that its KL allows")
        last = max(len(history) - 1, 0)
        low, high = search.interval
        _bar(ax, last, search.log_prob, low, high, "D", "C3", "found, by plain sampling")
        ax.set_xlabel("step")
        ax.set_ylabel("log P (nats)")
        other = ax.twinx()
        other.spines["right"].set_visible(True)
        other.plot(steps, history[:, 1], color="0.5", linewidth=0.8, linestyle="-.", label="KL (right)")
        other.set_ylabel("KL(found ‖ D) (nats)")
        other.set_ylim(0.0, 1.3 * max(float(np.nanmax(history[:, 1])) if len(history) else 0.0, search.kl, 1e-9))
        marks = [*ax.get_legend_handles_labels()[0], *other.get_legend_handles_labels()[0]]
        ax.legend(marks, [str(mark.get_label()) for mark in marks], loc="center right")
    return ax


def _point(ax: Any, result: Result, at: float, marker: str, colour: str, name: str) -> None:
    """An estimate with its interval; an arrow down from its upper bound where it found nothing."""
    if math.isfinite(result.log_prob):
        _bar(ax, at, result.log_prob, result.lower, result.upper, marker, colour, name)
    else:
        ax.plot(at, result.upper, "v", color=colour, markersize=7, label=f"{name} (at most)")


def _bar(ax: Any, at: float, middle: float, low: float, high: float, marker: str, colour: str, name: str) -> None:
    down, up = (0.0 if not math.isfinite(end) else abs(end - middle) for end in (low, high))
    ax.errorbar(at, middle, [[down], [up]], fmt=marker, color=colour, capsize=3, markersize=6, label=name, zorder=5)


def _few() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(3)
