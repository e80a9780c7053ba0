"""Covariances of functions of two nearly collinear Gaussians, where Mehler's series converges too slowly.

With y = ρ x + √(1 − ρ²) η the covariance of f(x) and f(y) is an integral over x of f(x) E f(y | x). Both are
Gauss–Legendre sums between the places where f bends or jumps; the outer one has further cuts on either side of where
the inner function, smoothed by √(1 − ρ²), changes quickly. For any f, and at any ρ.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from probest.moments.hermite import Expansion, Quadrature, coefficients, pieces

__all__ = ["with_close_pairs"]

Array = Any


def with_close_pairs(
    s: Any, expansion: Expansion, correlation: Array, found: Array, settings: Quadrature
) -> tuple[Array, bool]:
    """``found``, Cov(f(x_i), f(x_j)) ``(n, n)``, with the pairs replaced for which the series was not enough; and
    whether that was done.

    correlation ``(n, n)``, 0 on its diagonal. Nothing is done where the function is not known any more, or where the
    pairs are more than ``settings.pairs``.
    """
    if expansion.function is None:
        return found, False
    rho = np.abs(np.asarray(s.stop_gradient(correlation)))
    series = list(coefficients(s, expansion, settings.orders))
    scale = float(s.xp.max(s.stop_gradient(expansion.variance)))
    rest = expansion.variance - sum(c * c for c in series)
    tails = np.sqrt(np.maximum(np.asarray(s.stop_gradient(rest)), 0.0))
    missing = rho ** (len(series) + 1) * tails[:, None] * tails[None, :]
    rows, columns = np.nonzero(np.triu(missing > settings.covariance * scale, 1))
    if not 0 < len(rows) <= settings.pairs:
        return found, not len(rows)
    for i, j in _matchings(rows, columns):
        values = _between(s, expansion, correlation, i, j, settings)
        found = s.put(s.put(found, i, j, values), j, i, values)
    return found, True


def _matchings(rows: np.ndarray, columns: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The pairs in groups in which no row and no column is twice: a function of n entries is evaluated at once."""
    while len(rows):
        _, first = np.unique(rows, return_index=True)
        _, second = np.unique(columns[first], return_index=True)
        chosen = first[second]
        yield rows[chosen], columns[chosen]
        rows, columns = np.delete(rows, chosen), np.delete(columns, chosen)


def _between(s: Any, e: Expansion, correlation: Array, i: np.ndarray, j: np.ndarray, settings: Quadrature) -> Array:
    """Cov(f(x_i), f(x_j)) ``(p,)`` for pairs of entries."""
    xp, reach = s.xp, settings.reach
    rho = correlation[i, j]
    width = xp.sqrt(s.clip(1 - rho * rho, float(xp.finfo(rho.dtype).eps) ** 2, None))
    safe = xp.where(e.std > 0, e.std, 1.0)
    at = [(b - e.location) / safe for b in e.breaks]
    zero = 0.0 * rho
    size = settings.per_piece if at else settings.nodes
    cuts = [a[i] + zero for a in at]
    for a in at:
        centre = a[j] / xp.where(xp.abs(rho) > 0, rho, 1.0)
        around = 8 * width / xp.abs(rho)
        cuts += [centre - around, centre, centre + around]
    outer, outer_weights = pieces(s, cuts, zero, reach, size)
    left = _evaluated(s, e, outer, i)
    total = zero
    inner_cuts = [(a[j] - rho * outer) / width for a in at]
    inner, inner_weights = pieces(s, inner_cuts, 0.0 * outer, 9.0, size)
    together = max(1, settings.at_once // (outer.shape[0] * e.mean.shape[0]))
    for start in range(0, inner.shape[0], together):
        eta, weight = inner[start : start + together], inner_weights[start : start + together]
        nodes = rho * outer + width * eta
        right = _evaluated(s, e, nodes.reshape((-1, len(j))), j).reshape(nodes.shape)
        total = total + xp.sum(outer_weights * left * xp.sum(weight * right, axis=0), axis=0)
    return total


def _evaluated(s: Any, e: Expansion, nodes: Array, entries: np.ndarray) -> Array:
    """f − E f at ``nodes`` ``(Q, p)``, in standard deviations, of the given entries."""
    xp = s.xp
    size = e.mean.shape[0]
    place = np.full(size, len(entries))
    place[entries] = np.arange(len(entries))
    filled = xp.concat([nodes, 0.0 * nodes[:, :1]], axis=1)[:, place]
    assert e.function is not None
    values = e.function(e.location + e.std * filled) - e.mean
    return values[:, entries]
