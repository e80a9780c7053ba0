r"""A severity as a sum of functions of single coordinates, from its gradients.

.. math:: s(z) \approx c + \sum_i f_i(z_i)

The i-th entry of a gradient is f_i'(z_i), whatever the other coordinates are: so dim curves of one variable are all
that there is to learn, and a thousand gradients show them, however many modes they make together (two a coordinate are
2^dim). Each f_i' is a smoothing spline of first order on a grid (hat functions, with a penalty on second differences),
whose smoothness cross-validation chooses for all of them together; what such functions explain of the gradients that
were left out says whether the severity is a sum at all.

Reference: Eilers & Marx (1996), Flexible smoothing with B-splines and penalties; Hastie & Tibshirani (1986),
Generalized additive models.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from scipy import linalg

from probest.evidence import Floats

__all__ = ["Sums", "fit_sums"]

_REACH, _STEP = 8.0, 0.1
_SMOOTH = tuple(10.0**k for k in range(-4, 4))  # penalties tried, in units of the weight of a cell
_RIDGE = 1e-3  # of the penalty, that pulls slopes towards their mean where there are no cases
_STRAIGHT = 1e-3  # of gradients' squares, that vary
_BLOCK = 100  # cases that are left out together: relatives lie next to each other


class Sums(NamedTuple):
    """values and slopes ``(G, dim)``: f_i and f_i' on a grid from −8 to 8, straight beyond.

    constant c; reach: x is drawn together to reach · asinh(x / reach), as a student is told severities.
    """

    values: Floats
    slopes: Floats
    constant: float = 0.0
    reach: float = math.inf

    def value(self, z: Floats) -> Floats:
        """``(n,)`` at z ``(n, dim)``."""
        return self._drawn(self._sum(z, _placed(z)))

    def value_and_slope(self, z: Floats) -> tuple[Floats, Floats]:
        """``(n,)`` and ``(n, dim)`` at z ``(n, dim)``."""
        placed = _placed(z)
        total, slope = self._sum(z, placed), _between(self.slopes, placed)
        shrunk = 1.0 / np.sqrt(1.0 + (total / self.reach) ** 2)
        return self._drawn(total), slope * shrunk[:, None]

    def _drawn(self, total: Floats) -> Floats:
        return total if math.isinf(self.reach) else np.asarray(self.reach * np.arcsinh(total / self.reach))

    def _sum(self, z: Floats, placed: _Placed) -> Floats:
        cell, part, beyond = placed
        at = np.arange(z.shape[1])
        low, rise = self.slopes[cell, at], self.slopes[cell + 1, at]
        inside = self.values[cell, at] + _STEP * part * (low + 0.5 * part * (rise - low))
        return np.asarray(self.constant + (inside + beyond * (low + part * (rise - low))).sum(axis=1))


class _Placed(NamedTuple):
    """The cell of each coordinate, the share of it that lies below, and how far beyond the grid it is."""

    cell: np.ndarray
    part: Floats
    beyond: Floats


def _placed(z: Floats) -> _Placed:
    clipped = np.clip(z, -_REACH, _REACH)
    place = (clipped + _REACH) / _STEP
    cell = np.minimum(place.astype(np.intp), round(2.0 * _REACH / _STEP) - 1)
    return _Placed(cell, place - cell, z - clipped)


def fit_sums(z: Floats, slope: Floats, weight: Floats) -> tuple[Sums, float]:
    """The sums that gradients ``(n, dim)`` at z show, and the share of these that they explain where left out.

    The share is of the gradients' squared deviations from their mean, by ``weight`` ``(n,)``: 1 for a sum, 0 or less
    where other coordinates decide, and 0 where there is next to none to explain, of a plane. The constant is 0:
    gradients do not show it. Raises ValueError for fewer than two gradients.
    """
    if len(z) < 2:
        raise ValueError(f"fit_sums: {len(z)} gradients say nothing about a sum, two are needed")
    z, slope = z.astype(np.float64), slope.astype(np.float64)
    mean = weight @ slope / weight.sum()
    slope = slope - mean
    fold = np.arange(len(z)) // min(_BLOCK, len(z) // 2) % 2
    halves = [_equations(z[fold == k], slope[fold == k], weight[fold == k]) for k in (0, 1)]
    whole = float(weight @ np.sum(slope**2, axis=1))
    missed = []
    for smooth in _SMOOTH:
        off = 0.0
        for k in (0, 1):
            told = _between(_solved(*halves[1 - k], smooth), _placed(z[fold == k]))
            off += float(weight[fold == k] @ np.sum((slope[fold == k] - told) ** 2, axis=1))
        missed.append(off)
    best = int(np.argmin(missed))
    slopes = mean + _solved(halves[0][0] + halves[1][0], halves[0][1] + halves[1][1], _SMOOTH[best])
    values = np.zeros_like(slopes)
    values[1:] = np.cumsum(0.5 * _STEP * (slopes[1:] + slopes[:-1]), axis=0)
    middle = len(slopes) // 2
    bent = whole > _STRAIGHT * float(weight @ np.sum((slope + mean) ** 2, axis=1))
    return Sums(values - values[middle], slopes), 1.0 - missed[best] / whole if bent else 0.0


def _between(slopes: Floats, placed: _Placed) -> Floats:
    cell, part, _ = placed
    at = np.arange(slopes.shape[1])
    return np.asarray((1.0 - part) * slopes[cell, at] + part * slopes[cell + 1, at])


def _equations(z: Floats, slope: Floats, weight: Floats) -> tuple[Floats, Floats]:
    """Normal equations of the hat functions: bands ``(2, G, dim)`` (diagonal, next to it) and right-hand sides."""
    cell, part, _ = _placed(z)
    grid, dim = round(2.0 * _REACH / _STEP) + 1, z.shape[1]
    bands, right = np.zeros((2, grid, dim)), np.zeros((grid, dim))
    at = np.broadcast_to(np.arange(dim), cell.shape)
    w = np.broadcast_to(weight[:, None], cell.shape)
    for step, share in ((0, 1.0 - part), (1, part)):
        np.add.at(bands[0], (cell + step, at), w * share**2)
        np.add.at(right, (cell + step, at), w * share * slope)
    np.add.at(bands[1], (cell, at), w * part * (1.0 - part))
    return bands, right


def _solved(bands: Floats, right: Floats, smooth: float) -> Floats:
    """Slopes on the grid ``(G, dim)``: normal equations with a penalty on second differences, column by column."""
    grid, dim = right.shape
    second = np.zeros((3, grid))  # bands of D'D, D the second differences
    for offsets in ((0, 0), (1, 1), (2, 2), (0, 1), (1, 2), (0, 2)):
        product = float(np.prod([(1.0, -2.0, 1.0)[o] for o in offsets]))
        second[offsets[1] - offsets[0], offsets[0] : grid - 2 + offsets[0]] += product
    found = np.empty_like(right)
    for i in range(dim):
        penalty = smooth * max(float(bands[0, :, i].sum()), 1e-300) * _STEP
        lower = penalty * second
        lower[0] += bands[0, :, i] + _RIDGE * penalty
        lower[1] += bands[1, :, i]
        found[:, i] = linalg.solveh_banded(lower, right[:, i], lower=True, check_finite=False)
    return found
