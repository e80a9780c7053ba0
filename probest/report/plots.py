"""Pictures of an estimate, of a training run and of catastrophes.

Each function draws on the axes that it is given, or on new ones of ``matplotlib.pyplot``, and returns the axes.
Matplotlib is imported by the first call, not before.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from probest.report.arviz import leaves
from probest.report.protocols import CatastrophesLike, EstimateLike, RunLike

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_catastrophes", "plot_estimate", "plot_history"]

_LN10 = math.log(10.0)
_COLOURS = {"unbiased": "C0", "consistent": "C0", "lower": "C2", "upper": "C3", "heuristic": "C7"}


def plot_estimate(estimate: EstimateLike, ax: Axes | None = None) -> Axes:
    """The ledger as a forest plot: a row for each method, its 95 % interval, and the conclusion as a band."""
    ax = ax or _new_axes(figsize=(7.0, 1.2 + 0.4 * len(estimate.ledger)))
    ends = [x / _LN10 for row in estimate.ledger for x in (*row.interval, row.log_prob) if math.isfinite(x)]
    left, right = (min(ends), max(ends)) if ends else (-1.0, 0.0)
    margin = 0.05 * (right - left) or 0.05
    left, right = left - margin, right + margin
    for height, row in enumerate(estimate.ledger):
        lower, upper = (min(max(x / _LN10, left), right) for x in row.interval)
        style = "-" if row.converged else ":"
        ax.plot([lower, upper], [height, height], style, color=_COLOURS[row.claim], linewidth=2)
        for end, marker in zip(row.interval, "<>", strict=True):
            if math.isinf(end):
                ax.plot(left if end < 0 else right, height, marker, color=_COLOURS[row.claim], clip_on=False)
        if math.isfinite(row.log_prob):
            ax.plot(row.log_prob / _LN10, height, "o", color=_COLOURS[row.claim])
    if math.isfinite(estimate.lower) and math.isfinite(estimate.upper):
        ax.axvspan(estimate.lower / _LN10, estimate.upper / _LN10, color="C0", alpha=0.12, linewidth=0)
    ax.set_xlim(left, right)
    ax.set_yticks(range(len(estimate.ledger)), [f"{row.method} ({row.claim})" for row in estimate.ledger])
    ax.invert_yaxis()
    ax.set_xlabel(r"$\log_{10} P$, 95 % interval")
    ax.set_title("converged" if estimate.converged else "not converged", loc="left")
    return ax


def plot_history(run: RunLike, ax: Axes | None = None) -> Axes:
    """log P at each step, the task loss on a second axis, and the audit with its interval at the end."""
    ax = ax or _new_axes(figsize=(7.0, 4.0))
    steps = [record.step for record in run.history]
    last = steps[-1] if steps else 0
    ax.plot(
        steps,
        [record.log_prob / _LN10 for record in run.history],
        color="C0",
        drawstyle="steps-post",
        label="P in training",
    )
    if run.audit is not None:
        _point(ax, last, run.audit)
    ax.set_xlabel("step")
    ax.set_ylabel(r"$\log_{10} P$")
    loss = ax.twinx()
    loss.plot(steps, [record.task_loss for record in run.history], color="C7", linewidth=0.8, label="task loss")
    loss.set_ylabel("task loss")
    lines = [*ax.get_legend_handles_labels()[0], *loss.get_legend_handles_labels()[0]]
    ax.legend(lines, [str(line.get_label()) for line in lines], loc="upper right", frameon=False)
    return ax


def plot_catastrophes(
    catastrophes: CatastrophesLike,
    ax: Axes | None = None,
    *,
    shape: tuple[int, int] | None = None,
    rows: int = 4,
    columns: int = 8,
) -> Axes:
    """The likeliest catastrophes, as the model saw them: a grid of images, or a line for each.

    Args:
        catastrophes: a weighted sample of catastrophes.
        ax: where to draw.
        shape: height and width, where the observation is an image laid out as a vector.
        rows: how many rows of images.
        columns: how many columns; ``rows * columns`` catastrophes are shown.
    """
    ax = ax or _new_axes(figsize=(columns * 0.9, rows * 0.9))
    seen = _largest_leaf(catastrophes.observation)
    best = np.argsort(-np.asarray(catastrophes.weights), kind="stable")[: rows * columns]
    seen = seen[best].reshape(len(best), *shape) if shape else seen[best]
    seen = seen.squeeze(1) if seen.ndim == 4 and seen.shape[1] == 1 else seen
    if seen.ndim == 3:
        ax.imshow(_grid(seen, rows, columns), cmap="gray_r")
        ax.set_axis_off()
    else:
        ax.plot(seen.reshape(len(seen), -1).T, color="C3", alpha=0.4, linewidth=0.8)
    ax.set_title("catastrophes, as the model sees them", loc="left")
    return ax


def _point(ax: Axes, step: int, audit: EstimateLike) -> None:
    """The audit with its interval; an upper bound where it found nothing."""
    centre = audit.log_prob if math.isfinite(audit.log_prob) else audit.upper
    below = max(centre - audit.lower, 0.0) if math.isfinite(audit.lower) else 0.0
    above = max(audit.upper - centre, 0.0)
    error = np.array([[below], [above]]) / _LN10
    ax.errorbar([step], [centre / _LN10], error, fmt="o", color="C3", capsize=4, label="audit")


def _grid(images: np.ndarray, rows: int, columns: int) -> np.ndarray:
    height, width = images.shape[1:]
    blank = float(images.min())
    grid = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1), blank)
    for place, image in enumerate(images):
        top, left = place // columns * (height + 1), place % columns * (width + 1)
        grid[top : top + height, left : left + width] = image
    return grid


def _largest_leaf(tree: Any) -> np.ndarray:
    """The largest array of a pytree: the image, rather than the label beside it."""
    return max((np.asarray(leaf) for _, leaf in leaves(tree)), key=lambda leaf: leaf.size)


def _new_axes(figsize: tuple[float, float]) -> Axes:
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=figsize, layout="constrained")[1]
