"""Elementwise functions of Gaussians: Hermite expansions, by quadrature, for any f that is applied entry by entry.

For x ~ N(m, v) write x = m + √v ε and f(x) = Σ_k c_k he_k(ε), he_k = He_k / √k! the orthonormal Hermite polynomials:

    E f = c_0,    E f' = c_1 / √v,    Var f = Σ_{k≥1} c_k²,    Cov(f(x_i), g(x_j)) = Σ_{k≥1} c_ki d_kj ρ_ij^k

(Mehler's formula; Daniely, Frostig and Singer 2016). Cut off after order K, the last series lacks at most
|ρ|^(K+1) √(T_i U_j), with T = Var f − Σ_{1≤k≤K} c_k² and U the same for g: T is known, so the order follows from a
tolerance, and what is left out is stated.

The integrals are Gauss–Legendre sums between the places where f or a derivative of it jumps (`breaks`), and the
trapezoidal rule where there are none: it converges geometrically in the distance of f's nearest singularity from the
real axis (Trefethen and Weideman 2014). The number of nodes is doubled until the moments no longer move.

Every function takes the backend's special functions (`special_torch`, `special_jax`) as ``s``. The numbers of nodes and
orders depend on values, so nothing here can be compiled as a whole; everything can be differentiated.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy import special
from scipy.stats import qmc

from probest.moments.bent import Bends, bent, series

__all__ = [
    "QUADRATURE",
    "Expansion",
    "Quadrature",
    "at_nodes",
    "closed_form",
    "coefficients",
    "correlations",
    "covariance",
    "expand",
    "hermite",
    "legendre",
    "normal_points",
    "number",
    "pieces",
    "slope",
]

Array = Any


@dataclass(frozen=True)
class Quadrature:
    """How finely integrals are taken.

    Attributes:
        reach: standard deviations to either side of the mean: f may act as far as 8 from it.
        nodes, most_nodes: without breaks, the number at first and the largest.
        per_piece, most_per_piece: between two breaks, the same.
        tolerance: by how much half the nodes may change E f, E f' and Var f, in units of f's standard deviation and
            |E f|.
        covariance: error allowed in a covariance, in units of the largest standard deviations of f and g.
        orders: the most Hermite orders that are kept.
        lattice: points, and as many opposite ones, for functions of several values together (softmax, the largest of
            them); a power of 2.
        together: up to so many values, functions of their softmax and the like are kept until the moments are needed.
        short: the same for sums over a row of a function applied entry by entry: norms.
        pairs: the most pairs of nearly collinear arguments whose covariance is integrated, and not left to the series.
        at_once: the most values of f that are computed at once for such pairs; bounds the memory.
        backwards: a covariance with so many fewer rows than columns is found from its rows, by pulling them back.
        refused: the change of the moments, as above, from which on they are not used.
    """

    reach: float = 12.0
    nodes: int = 128
    most_nodes: int = 8192
    per_piece: int = 64
    most_per_piece: int = 256
    tolerance: float = 1e-7
    covariance: float = 1e-6
    orders: int = 128
    refused: float = 1e-3
    lattice: int = 512
    together: int = 64
    short: int = 16
    pairs: int = 2000
    at_once: int = 2_000_000
    backwards: int = 64

    def __post_init__(self) -> None:
        positive = (
            "reach",
            "nodes",
            "most_nodes",
            "per_piece",
            "most_per_piece",
            "tolerance",
            "covariance",
            "orders",
            "refused",
        )
        for name in positive:
            if not getattr(self, name) > 0:
                raise ValueError(f"Quadrature({name}={getattr(self, name)!r}): it must be above 0")


QUADRATURE = Quadrature()
"""What is taken where nothing else is said."""


class Expansion(NamedTuple):
    """f of n Gaussians x_i ~ N(m_i, v_i), by quadrature: Q nodes for each.

    mean, variance ``(n,)`` of f(x). nodes ``(Q, n)``: ε, in standard deviations from m. weights ``(Q, n)``: of the
    standard normal law. centred ``(Q, n)``: f − E f there. std ``(n,)``: √v. error: by how much half the nodes would
    have changed the moments, in units of f's standard deviation and |mean|. location ``(n,)``: m. function, breaks: f,
    where it is still wanted, and where it may jump. bends: of a function that is affine in pieces, instead of nodes,
    weights and values, which are None then.
    """

    mean: Array
    variance: Array
    nodes: Array
    weights: Array
    centred: Array
    std: Array
    error: float
    location: Array
    function: Callable[[Array], Array] | None
    breaks: Sequence[Array | float]
    bends: Bends | None = None


def expand(
    s: Any,
    f: Callable[[Array], Array],
    mean: Array,
    std: Array,
    breaks: Sequence[Array | float] = (),
    settings: Quadrature = QUADRATURE,
    *,
    closed: bool = False,
) -> Expansion:
    """The expansion of ``f`` of N(mean, std²), entry by entry.

    Args:
        s: the backend's special functions.
        f: takes an array ``(Q, n)`` of values of x and is applied entry by entry.
        mean: ``(n,)``, of x.
        std: ``(n,)``, of x; ≥ 0.
        breaks: values of x, scalars or ``(n,)``, at which f or one of its first derivatives may jump.
        settings: how finely.
        closed: where ``f`` is affine between breaks, by closed forms, without nodes.

    Raises:
        ValueError: ``f`` is not finite within reach, or does not return one value for each of x.
    """
    known = closed_form(s, f, mean, std, breaks, settings.reach) if closed else None
    if known is not None:
        return known
    size, most = (settings.per_piece, settings.most_per_piece) if breaks else (settings.nodes, settings.most_nodes)
    coarse = at_nodes(s, f, mean, std, breaks, size // 2, settings.reach)
    while True:
        fine = at_nodes(s, f, mean, std, breaks, size, settings.reach)
        error = _moved(s, coarse, fine)
        if math.isnan(error):
            raise ValueError(
                f"{getattr(f, '__name__', 'f')} is not finite within {settings.reach:g} standard deviations of the mean"
            )
        if error <= max(settings.tolerance, 64 * float(s.xp.finfo(fine.mean.dtype).eps)) or 2 * size > most:
            return fine._replace(error=error)
        coarse, size = fine, 2 * size


def closed_form(
    s: Any, f: Callable[[Array], Array], mean: Array, std: Array, breaks: Sequence[Array | float], reach: float
) -> Expansion | None:
    """The expansion of a function that is affine between breaks, without nodes; None for others. As `expand`."""
    found = bent(s, f, mean, std, breaks, reach)
    if found is None:
        return None
    average, variance, bends = found
    return Expansion(average, variance, None, None, None, std, 0.0, mean, f, breaks, bends)


def covariance(
    s: Any, left: Expansion, right: Expansion, correlation: Array, settings: Quadrature = QUADRATURE
) -> tuple[Array, float]:
    """Cov(f(x_i), g(y_j)) ``(n, m)`` for jointly Gaussian x and y of the given correlations, and a bound of its error.

    The bound, in units of the largest standard deviations of f and g, is of what the orders left out can amount to.
    """
    xp = s.xp
    scale = number(s, xp.max(left.variance)) ** 0.5 * number(s, xp.max(right.variance)) ** 0.5
    largest = min(max(number(s, xp.max(correlation)), -number(s, xp.min(correlation))), 1.0)
    if scale == 0 or largest == 0:
        return 0.0 * correlation, 0.0
    found = [coefficients(s, side, settings.orders) for side in ((left,) if right is left else (left, right))]
    rest = [np.asarray(s.stop_gradient(side.variance)) for side in (left, right)]
    pairs, missing = [], math.inf
    for k, cs in enumerate(zip(*found, strict=True), start=1):
        pairs.append((cs[0], cs[-1]))
        rest = [tail - np.asarray(s.stop_gradient(c)) ** 2 for tail, c in zip(rest, pairs[-1], strict=True)]
        tails = [max(float(tail.max()), 0.0) ** 0.5 for tail in rest]
        missing = largest ** (k + 1) * tails[0] * tails[1] / scale
        if missing <= settings.covariance:
            break
    (c, d), *lower = reversed(pairs)
    total = s.nested(0.0 * correlation, c, d, correlation)
    for c, d in lower:
        total = s.nested(total, c, d, correlation)
    return total, missing


def hermite(s: Any, expansion: Expansion, order: int) -> Array:
    """c_order, ``(n,)``: the coefficient of the orthonormal Hermite polynomial of that order, from 1 on."""
    for k, c in enumerate(coefficients(s, expansion, order), start=1):
        if k == order:
            return c
    raise ValueError(f"order={order!r}: Hermite coefficients are counted from 1 on")


def slope(s: Any, expansion: Expansion) -> Array:
    """E f', ``(n,)``; 0 where x does not vary."""
    live = expansion.std > 0
    return s.xp.where(live, hermite(s, expansion, 1) / s.xp.where(live, expansion.std, 1.0), 0.0)


def correlations(s: Any, left: Expansion, right: Expansion, cov: Array) -> Array:
    """Of the arguments of two expansions, from their covariance ``(n, m)``; 0 where one does not vary."""
    xp = s.xp
    a, b = (xp.where(side.std > 0, 1 / xp.where(side.std > 0, side.std, 1.0), 0.0) for side in (left, right))
    return s.in_units(cov, a, b)


def coefficients(s: Any, expansion: Expansion, orders: int) -> Iterator[Array]:
    """c_1, ..., c_orders, each ``(n,)`` and computed when it is asked for."""
    if expansion.bends is not None:
        yield from (s.array(c, expansion.mean) for c in series(expansion.bends, orders))
        return
    x, weighted = expansion.nodes, expansion.weights * expansion.centred
    below, polynomial = 1.0, x
    for k in range(1, orders + 1):
        yield (weighted * polynomial).sum(0)
        below, polynomial = polynomial, (x * polynomial - math.sqrt(k) * below) / math.sqrt(k + 1)


@functools.cache
def legendre(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Gauss–Legendre points in (−1, 1) and their weights."""
    return np.polynomial.legendre.leggauss(size)


@functools.cache
def normal_points(dim: int, size: int) -> np.ndarray:
    """``size`` points of N(0, I) in ``dim`` dimensions and their opposites, ``(2 size, dim)``: Sobol', scrambled by a
    fixed seed. size: a power of 2.
    """
    uniform = qmc.Sobol(dim, seed=0).random_base2(size.bit_length() - 1)
    points = special.ndtri(uniform)
    return np.stack([points, -points], axis=1).reshape((2 * size, dim))


def pieces(s: Any, cuts: Sequence[Array], like: Array, reach: float, size: int) -> tuple[Array, Array]:
    """Gauss–Legendre nodes between ``cuts``, within ± reach, and standard normal weights, along a new first axis.

    like: zeros of the shape of each cut, which may be none. size: nodes of each piece.
    """
    xp = s.xp
    shape = (size, *(1 for _ in like.shape))
    points, shares = (s.array(values.reshape(shape), like) for values in legendre(size))
    inside = [s.clip(cut, -reach, reach) for cut in cuts]
    edges = [like - reach, *(xp.sort(xp.stack(inside), axis=0) if inside else []), like + reach]
    halves = [(high - low) / 2 for low, high in itertools.pairwise(edges)]
    nodes = xp.concat([low + half * (points + 1) for low, half in zip(edges[:-1], halves, strict=True)])
    widths = xp.concat([half * shares for half in halves])
    return nodes, widths * xp.exp(-0.5 * nodes * nodes) / math.sqrt(2 * math.pi)


def at_nodes(
    s: Any, f: Callable[[Array], Array], mean: Array, std: Array, breaks: Sequence[Any], size: int, reach: float
) -> Expansion:
    """The expansion by ``size`` nodes, of each piece where there are breaks; its error is not looked at."""
    xp = s.xp
    if breaks:
        safe = xp.where(std > 0, std, 1.0)
        nodes, weights = pieces(s, [(s.array(b, mean) - mean) / safe for b in breaks], 0.0 * mean, reach, size)
    else:
        nodes = s.array(np.linspace(-reach, reach, size + 1), mean)[:, None] + 0.0 * mean
        weights = 2 * reach / size * xp.exp(-0.5 * nodes * nodes) / math.sqrt(2 * math.pi)
    values = f(mean + std * nodes)
    if values.shape != nodes.shape:
        raise ValueError(
            f"{getattr(f, '__name__', 'f')} returned shape {tuple(values.shape)} for an array of shape "
            f"{tuple(nodes.shape)}: it has to be applied entry by entry"
        )
    average = xp.sum(weights * values, axis=0)
    centred = values - average
    return Expansion(
        average, xp.sum(weights * centred**2, axis=0), nodes, weights, centred, std, math.nan, mean, f, breaks
    )


def _moved(s: Any, coarse: Expansion, fine: Expansion) -> float:
    """The largest change of E f, Var f and c_1, in units of f's standard deviation and |E f|."""
    xp = s.xp
    mean, variance = s.stop_gradient(fine.mean), s.stop_gradient(fine.variance)
    scale = xp.sqrt(variance) + xp.abs(mean) + float(xp.finfo(mean.dtype).tiny) ** 0.5
    slopes = s.stop_gradient(hermite(s, fine, 1) - hermite(s, coarse, 1))
    moves = (
        xp.abs(s.stop_gradient(coarse.mean) - mean) / scale,
        xp.abs(slopes) / scale,
        xp.abs(s.stop_gradient(coarse.variance) - variance) / scale**2,
    )
    sizes = [float(xp.max(move)) for move in moves]
    return math.nan if any(map(math.isnan, sizes)) else max(sizes)


def number(s: Any, value: Array) -> float:
    """A scalar for decisions, without its gradient."""
    return float(s.stop_gradient(value))
