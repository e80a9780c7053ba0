"""Pictures of catastrophes: where they lie among the draws of D, and what the model saw and did."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from probest.diagnostics import even_rows
from probest.report.plots.axes import WIDTH, grid, styled
from probest.report.trees import leaves, mapped
from probest.result import Case, Result, Sample

__all__ = ["plot_cases", "plot_pairs", "show_case"]

_POINTS = 1_000
_CAUGHT, _DRAWN = "#a50f15", "0.7"  # far apart in grey too
_GREATEST_AXIS = 4_096


def plot_pairs(estimate: Result, *, names: Sequence[str] | None = None, most: int = 4) -> Any:
    """Where catastrophes lie, beside draws of D: each pair of coordinates, and each by itself on the diagonal.

    Args:
        estimate: with catastrophes.
        names: coordinates to show, such as ``"wind[3]"`` or ``"start"``, of sites or of ``observation`` and ``action``;
            by default those that catastrophes move furthest from D's own, in standard deviations.
        most: so many of them.

    Returns:
        An array of Axes, ``(k, k)``; those above the diagonal are empty.

    Raises:
        ValueError: there are no catastrophes, or a name is not one of the coordinates.
    """
    caught = estimate.catastrophes
    if caught is None:
        raise ValueError('kind="pairs": no catastrophe was found. Give estimate() a larger budget')
    drawn = estimate.drawn
    chosen = _named(caught, names) if names is not None else _moved(caught, drawn, most)
    inside = _thinned(caught, {name: _column(caught, name) for name in chosen})
    outside = None if drawn is None else _thinned(drawn, {name: _column(drawn, name) for name in chosen})
    with styled():
        size = min(WIDTH, 1.1 + 1.7 * len(chosen))
        ax = grid(len(chosen), len(chosen), (size, size * 0.92), sharex="col")
        for i, below in enumerate(chosen):
            for j, across in enumerate(chosen):
                _pair(ax[i, j], i, j, inside[across], inside[below], outside and (outside[across], outside[below]))
            ax[-1, i].set_xlabel(below)
            if i:
                ax[i, 0].set_ylabel(below)
        ax[0, 0].set_ylabel("density")
        handles, labels = ax[0, 0].get_legend_handles_labels()
        corner = ax[0, -1] if len(chosen) > 1 else ax[0, 0]
        corner.legend(handles, labels, loc="upper right")
    return ax


def plot_cases(
    estimate: Result,
    *,
    show: Callable[[Any, Case], None] | None = None,
    shape: tuple[int, int] | None = None,
    rows: int = 2,
    columns: int = 6,
) -> Any:
    """Some catastrophes, as likely ones as their weights say, as the model saw them.

    Args:
        estimate: with catastrophes.
        show: ``show(ax, case)`` draws one :class:`~probest.result.Case`; by default :func:`show_case`. The title is the
            severity, unless ``show`` sets another.
        shape: height and width, where the observation is an image laid out as a vector.
        rows: how many rows.
        columns: how many columns; ``rows * columns`` cases at most.

    Returns:
        An array of Axes, ``(rows, columns)``.

    Raises:
        ValueError: there are no catastrophes.
    """
    caught = estimate.catastrophes
    if caught is None:
        raise ValueError('kind="cases": no catastrophe was found. Give estimate() a larger budget')
    chosen = np.unique(even_rows(caught.weights, rows * columns))
    with styled():
        ax = grid(rows, columns, (WIDTH, rows * WIDTH / columns * 1.15), sharey=show is None)
        for at in ax.flat[len(chosen) :]:
            at.set_axis_off()
        for at, index in zip(ax.flat, chosen, strict=False):
            case = case_at(caught, int(index))
            if show is None:
                show_case(at, case, shape=shape)
            else:
                show(at, case)
            if not any(at.get_title(loc=side) for side in ("left", "center", "right")):
                at.set_title(f"severity {case.severity:.2g}", fontsize="x-small", pad=2)
    return ax


def case_at(sample: Sample, index: int) -> Case:
    """One case of a sample."""

    def row(leaf: Any) -> Any:
        return np.asarray(leaf)[index]

    sites = {name: row(sample[name]) for name in sample}
    observation, action = mapped(row, sample.observation), mapped(row, sample.action)
    return Case(sites, float(sample.severity[index]), observation, action)


def show_case(ax: Any, case: Case, *, shape: tuple[int, int] | None = None) -> None:
    """The largest array of the observation: an image where it has two axes or a ``shape``, a line or bars otherwise."""
    seen = max((np.asarray(leaf) for _, leaf in leaves(case.observation)), key=np.size)
    seen = seen.reshape(shape) if shape is not None else seen
    seen = seen[0] if seen.ndim == 3 and seen.shape[0] == 1 else seen
    if seen.ndim == 3 and seen.shape[0] == 3:
        seen = np.moveaxis(seen, 0, -1)  # channels first, as torch has them
    if seen.ndim >= 2 and min(seen.shape[:2]) > 2:
        ax.imshow(seen, cmap="gray_r", aspect="auto" if seen.ndim == 2 and seen.shape[0] > 4 * seen.shape[1] else None)
        ax.set_axis_off()
    elif seen.size > 12:
        ax.plot(seen.reshape(-1), color=_CAUGHT, linewidth=0.9)
        ax.axhline(0.0, color="0.6", linewidth=0.6, zorder=0)
    else:
        ax.bar(range(seen.size), seen.reshape(-1), color=_CAUGHT)
        ax.axhline(0.0, color="0.6", linewidth=0.6)
        ax.set_xticks(range(seen.size) if seen.size < 7 else [])


def _pair(ax: Any, i: int, j: int, x: np.ndarray, y: np.ndarray, outside: Any) -> None:
    if j > i:
        ax.set_axis_off()
    elif i == j:
        edges = np.histogram_bin_edges(np.concatenate([x, *([] if outside is None else [outside[0]])]), 24)
        if outside is not None:
            ax.hist(outside[0], edges, density=True, histtype="step", color="0.45", linestyle="--", label="D")
        ax.hist(x, edges, density=True, histtype="stepfilled", color=_CAUGHT, alpha=0.55, label="catastrophes")
        ax.set_yticks([])
    else:
        if outside is not None:
            ax.plot(*outside, ".", color=_DRAWN, markersize=3.0, markeredgewidth=0)
        ax.plot(x, y, "x", color=_CAUGHT, markersize=3, alpha=0.6, markeredgewidth=0.7)


def _columns(sample: Sample) -> list[tuple[str, int]]:
    """Names of the sites' coordinates, site by site; and of observation and action where there are no sites."""
    found = []
    for name, values in _arrays(sample).items():
        found += [(name, k) for k in range(min(int(np.prod(values.shape[1:])), _GREATEST_AXIS))]
    return found


def _arrays(sample: Sample) -> dict[str, np.ndarray]:
    arrays = {name: np.asarray(sample[name]) for name in sample}
    for what in ("observation", "action"):
        for name, leaf in leaves(getattr(sample, what), what):
            arrays.setdefault(name, np.asarray(leaf))
    return arrays


def _label(name: str, values: np.ndarray, k: int) -> str:
    shape = values.shape[1:]
    return name if not shape else f"{name}[{', '.join(str(i) for i in np.unravel_index(k, shape))}]"


def _column(sample: Sample, label: str) -> np.ndarray:
    name, _, rest = label.partition("[")
    values = _arrays(sample)[name]
    index: Any = (slice(None), *(int(i) for i in rest.rstrip("]").split(","))) if rest else ...
    return np.asarray(values[index], dtype=np.float64)


def _named(sample: Sample, names: Sequence[str]) -> list[str]:
    arrays = _arrays(sample)
    known = {_label(name, arrays[name], k) for name, k in _columns(sample)}
    missing = [name for name in names if name not in known]
    if missing or not names:
        some = ", ".join(sorted(known)[:8])
        raise ValueError(f"names: {missing[0] if missing else names!r} is not a coordinate; there are {some} …")
    return list(names)


def _moved(caught: Sample, drawn: Sample | None, most: int) -> list[str]:
    """The coordinates of sites that differ most from D's own in mean or spread; the first ones without draws of D."""
    inside = {name: np.asarray(caught[name]) for name in caught if np.asarray(caught[name]).dtype.kind in "fiub"}
    scores: list[tuple[float, str]] = []
    for name, values in inside.items():
        flat = values.reshape(len(values), -1)[:, :_GREATEST_AXIS].astype(float)
        mean = caught.weights @ flat
        spread = np.sqrt(np.maximum(caught.weights @ (flat - mean) ** 2, 0.0))
        score = np.zeros(flat.shape[1])
        if drawn is not None:
            given = np.asarray(drawn[name]).reshape(len(drawn.weights), -1)[:, :_GREATEST_AXIS].astype(float)
            centre, wide = drawn.weights @ given, given.std(0)
            with np.errstate(divide="ignore", invalid="ignore"):
                score = np.hypot((mean - centre) / wide, np.maximum(spread / wide - 1.0, 0.0))
        scores += [
            (-float(s), _label(name, values, k)) for k, s in enumerate(score) if np.isfinite(s) and spread[k] + s > 0
        ]
    ranked = [label for _, label in sorted(scores, key=lambda entry: entry[0])]  # stable: ties in the program's order
    if not ranked:
        raise ValueError('kind="pairs": no site of the adversary has numbers that vary')
    return ranked[:most]


def _thinned(sample: Sample, columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Columns of equally likely cases, at most ``_POINTS`` of them."""
    rows = even_rows(sample.weights, min(_POINTS, len(sample.weights)))
    return {name: values[rows] for name, values in columns.items()}
