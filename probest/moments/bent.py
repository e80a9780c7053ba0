"""Functions that are affine between breaks (ReLU, leaky, |x|, clamps, steps): their expansion in closed form.

With breaks at t_b, in standard deviations from the mean, jumps J_b of f and S_b of its slope there, He_k the
probabilists' Hermite polynomials and φ the standard normal density, integrating by parts k times gives

    E[f He_k] = Σ_b φ(t_b) (J_b He_{k−1}(t_b) + S_b He_{k−2}(t_b)),    k ≥ 2,

and E[f He_1] = Σ_p β_p P(piece p) + Σ_b J_b φ(t_b) with β_p the slopes. Means and variances are those of truncated
normal variables. Whether a function is of this kind is seen from its values.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Bends", "bent", "series"]

Array = Any

_PER_PIECE = 12  # values that have to lie on one line
_ROUNDINGS = 64.0  # units in the last place of the largest of them, by which they may miss it


class Bends(NamedTuple):
    """Where a function that is affine in pieces is not affine, in standard deviations from the mean.

    at, jump, bend ``(B, n)``: places; jumps of f and of its slope there. first ``(n,)``: c_1. jumps: whether any.
    special: the functions of the library that these are arrays of: NumPy's where no gradient passes, which is faster.
    """

    at: Array
    jump: Array
    bend: Array
    first: Array
    jumps: bool
    special: Any


def bent(
    s: Any, f: Callable[[Array], Array], mean: Array, std: Array, breaks: Sequence[Array | float], reach: float
) -> tuple[Array, Array, Bends] | None:
    """Mean and variance ``(n,)`` of f(x), x ~ N(mean, std²), and its bends; None where f is not affine in pieces.

    Arguments are those of `hermite.expand`; in double precision only, for tails are differences here.
    """
    eps = float(s.xp.finfo(mean.dtype).eps)
    if not breaks or eps > 1e-12:
        return None
    own, like = s, mean
    s, (mean, std, *cuts) = own.on_host(mean, std, *(own.array(b, mean) + 0.0 * mean for b in breaks))
    xp = s.xp
    safe = xp.where(std > 0, std, 1.0)
    at = xp.sort(xp.stack([s.clip((cut - mean) / safe, -reach, reach) for cut in cuts]), axis=0)
    end = 0.0 * at[:1] + reach
    points = xp.concat([-end, at]) + (xp.concat([at, end]) - xp.concat([-end, at])) * s.array(_inside(), mean)
    values = f(own.array((mean + std * points).reshape((-1, mean.shape[0])), like))
    if tuple(values.shape) != (_PER_PIECE * (len(cuts) + 1), mean.shape[0]):
        return None
    of_values, (values,) = own.on_host(values)
    if of_values is not s:  # a gradient passes through one of the two
        s, xp = own, own.xp
        values, at, end, points = (own.array(x, like) for x in (values, at, end, points))
    values = values.reshape(points.shape)
    run = points[-1] - points[0]
    wide = run > 1e-9
    slope = xp.where(wide, (values[-1] - values[0]) / xp.where(wide, run, 1.0), 0.0)
    start = values[0] - slope * points[0]
    off = np.abs(np.asarray(s.stop_gradient(values - start - slope * points)))
    largest = np.abs(np.asarray(s.stop_gradient(values))).max(axis=(0, 1))
    if not (off <= _ROUNDINGS * eps * largest + np.finfo(np.float64).tiny).all():
        return None
    share, one, two = _truncated(s, xp.concat([-end, at]), xp.concat([at, end]))
    average = xp.sum(start * share + slope * one, axis=0)
    rest = start - average
    variance = xp.sum(rest * rest * share + 2 * rest * slope * one + slope * slope * two, axis=0)
    bend = slope[1:] - slope[:-1]
    jump = start[1:] - start[:-1] + bend * at
    jumps = bool((np.abs(np.asarray(s.stop_gradient(jump))) > _ROUNDINGS * eps * largest).any())
    first = xp.sum(slope * share, axis=0)
    if jumps:
        first = first + xp.sum(jump * _density(xp, at), axis=0)
    return own.array(average, like), own.array(variance, like), Bends(at, jump, bend, first, jumps, s)


def series(bends: Bends, orders: int) -> Iterator[Array]:
    """c_1, ..., c_orders of the orthonormal Hermite polynomials, each ``(n,)``, arrays of ``bends.special``."""
    yield bends.first
    xp, at = bends.special.xp, bends.at
    density = _density(xp, at)
    by_bend, by_jump = density * bends.bend, density * bends.jump
    below, polynomial = 0.0, 1.0 + 0.0 * at  # orders k − 3 and k − 2
    for k in range(2, orders + 1):
        terms = by_bend * polynomial / math.sqrt(k * (k - 1))
        below, polynomial = polynomial, (at * polynomial - math.sqrt(k - 2) * below) / math.sqrt(k - 1)
        if bends.jumps:
            terms = terms + by_jump * polynomial / math.sqrt(k)
        yield xp.sum(terms, axis=0)


@functools.cache
def _inside() -> np.ndarray:
    """Places within a piece, ``(_PER_PIECE, 1, 1)`` in (0, 1), at no regular distance."""
    k = np.arange(_PER_PIECE)
    places: np.ndarray = (k + 0.5) / _PER_PIECE + 0.02 * np.sin(7.0 * k)
    return places[:, None, None]


def _density(xp: Any, x: Array) -> Array:
    return xp.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _truncated(s: Any, low: Array, high: Array) -> tuple[Array, Array, Array]:
    """∫ φ, ∫ ε φ and ∫ ε² φ between ``low`` and ``high``."""
    xp = s.xp
    right = low > 0  # by the smaller tails
    a, b = xp.where(right, -high, low), xp.where(right, -low, high)
    share = xp.exp(s.log_ndtr(b)) - xp.exp(s.log_ndtr(a))
    left, last = _density(xp, low), _density(xp, high)
    return share, left - last, share + low * left - high * last
