"""log Pr[s(z) ≥ 0] for z ~ N(0, I), by reading s: tilt, propagate, correct.

The prior's moments say nothing about tails. So the input and the noise of every layer are shifted to where the event
mostly happens, the function is propagated from there, and what a Gaussian severity lacks is put back by terms of first
order in 1 / width:

*Tilt.* With s of mean μ and variance σ² about the shifted law, a = E ∇s, g_k the mean gradient in y_k, N_k the
covariance of y_k that is not linear in x_k, and "covariance" κ = a·m + Σ g_k·δ_k:

    β = −(μ − κ) / σ,   λ = φ(β) / Φ(−β),   m ← (λ/σ) a,   δ_k ← (λ/σ) N_k g_k,   log P ≈ log Φ(−β)

to a fixed point; between full rounds the covariances stay frozen and only vectors move.

*Correct.* Perturbation theory about that point. Vertices are the joint cumulants of p residuals of a neuron with q
times its x (`probest.moments.statistics`), legs c = Cov(s, x), edges the covariances within a layer. Diagrams with legs
are the *prefactor* (curvature seen along the tilt), those that close upon themselves the *rings*. They change the
severity's cumulants: κ_r by δ puts D_r δ / r! back, D_r = ∂^r Φ / Φ in the mean. Within a layer they are sums over
neurons and pairs. Across layers: later ones are quadratic forms Q₁ (of the mean) and Q₂ (of half the variance) on
earlier values, and with α = diag Q, q = diag(Q D S), r = diag(S D Q D S) a neuron meets its own value there in three
ways,

    Σ_ij u_i u_j K(x_i x_i x_j x_j) = 4 f₃ q r + ν (2 α r + 4 q²) + 4 κ₃₁ α q + κ₄ α²
    Σ_i u_i K(x_i x_i s) = f₂ g r + 2 κ' g q + κ₃ g α

from (p, q) = (1, 3), (2, 2), (3, 1), (4, 0) and (1, 2), (2, 1), (3, 0). On tanh networks of two layers of 128 this
gives a δκ₂ of 4.2 % where sampling says 4.5 %, (1, 2) and the first of (2, 2) alone 14 %.

What it states as its error is a multiple of the size of the terms and of √κ, κ = max tr S² / (tr S)² of any layer: one
over the number of directions that a layer's values use.

*Several outputs together*, s ≥ 0 in all entries: with log Pr[N(μ − κ, Σ) ≥ 0] in place of log Φ(−β) and w its gradient,
m ← Σ w_j a_j, δ_k ← N_k Σ w_j g_kj. The corrections are those of the sum c·s, c = w / Σ w, and D_r the derivatives
along Σ c: what the entries' terms have apart from that direction is left out, and since they may cancel in the sum, the
stated error is √J times as large.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from probest.checkers import Branch
from probest.moments.hermite import (
    Expansion,
    Quadrature,
    at_nodes,
    closed_form,
    correlations,
    covariance,
    expand,
    number,
    slope,
)
from probest.moments.layers import INPUT, Base, Layer, Layers, Linear
from probest.moments.orthant import log_orthant, orthant
from probest.moments.statistics import Statistics, statistics
from probest.tuning import tuned

__all__ = ["Through", "Tilt", "Tilted", "Tilting", "resettled", "tilted", "untilted"]

Array = Any


_TRIAL = "reading.py --reference (as in the trial that DESIGN reports)"
_CYCLES = "reading.py (narrow: moves of 0.9 of the way cycle there)"
_COST = "reading.py (passes)"

_ROUGHLY = Quadrature(
    reach=9.0,
    nodes=64,
    most_nodes=512,
    per_piece=24,
    most_per_piece=48,
    tolerance=1e-4,
    covariance=2e-3,
    orders=32,
    refused=math.inf,
)


@dataclass(frozen=True)
class Tilting:
    """What a reading goes by. Set by hand; ``benchmarks/reading.py`` shows what comes of it."""

    # to the fixed point
    rounds: int = tuned(3, "full propagations, at least", _TRIAL)
    most_rounds: int = tuned(8, "the same, at most, while the tilt has not settled", _CYCLES)
    between: int = tuned(40, "moves between two of them, covariances frozen, at most", _CYCLES)
    damping: float = tuned(0.9, "share of the way that a move goes, at first", _TRIAL)
    shortening: float = tuned(0.7, "share of the way left, above which the next moves are halved", _CYCLES)
    least: float = tuned(0.05, "share of the way that a move goes, at least", _CYCLES)
    close: float = tuned(0.005, "standard deviations left of the way, below which moves end", _COST)
    followed: int = tuned(10, "such moves that a gradient goes through", "tests (central differences)")
    noises: bool = tuned(True, "whether the layers' noises are tilted too", "reading.py (layerwise against plain)")
    # what is settled, and how exact it is
    settled: float = tuned(0.02, "nats that the last round may have moved log Φ(−β)", _TRIAL)
    near: float = tuned(0.1, "standard deviations that the input's tilt may be off its fixed point", _CYCLES)
    error: float = tuned(1.14, "half of a 90 % interval, in Σ |terms| √κ", "reading.py (covered)")
    # other modes, and the look
    alike: float = tuned(0.7, "cosine of two tilts of the input above which they are one mode", "by its meaning")
    nowhere: float = tuned(1e-3, "length of a tilt below which it has no direction", "by its meaning")
    away: float = tuned(3.0, "distance of another start where the first tilt is shorter than 1", "by its meaning")
    shifted: float = tuned(0.1, "shift of z by which the mean of catastrophes is told", "by its meaning")
    negligible: float = tuned(1e-3, "share of P at which a stratum does not matter", "by its meaning")
    least_look: int = tuned(32, "model calls below which nothing can be seen", "by its meaning")
    misread: float = tuned(0.01, "standard deviations by which model and reading may differ", "by its meaning")
    surprise: float = tuned(1e-4, "failure rate, on either side, of the look's interval", "by its meaning")
    quadrature: Quadrature = tuned(_ROUGHLY, "how finely neurons are integrated", _COST)


class Tilt(NamedTuple):
    """Where the input and each layer's noise are shifted to: ``(dim,)`` and, of each layer, ``(n,)``."""

    input: Array
    noises: tuple[Array, ...]


class Tilted(NamedTuple):
    """What came of it.

    which: of which outputs together. log_prob, with the corrections; gaussian: log Φ(−β); terms: the corrections by
    name, in nats; error: half of an interval of 90 %; moved: by how much the last round moved log Φ(−β); left: how far
    the input's tilt still is from its fixed point; kappa: see the module; beta; tilt; direction: a / |a|, of the
    severity's mean gradient, ``(dim,)``; share: a·a / σ², the part of the severity's variance that is linear in z;
    foreseen: the log of the share of catastrophes where the input alone is tilted, to first order; sd: of the severity;
    about: the propagation. Of several outputs together, direction, share, beta and sd are of the sum that stands for
    them.
    """

    which: Branch
    log_prob: Array
    gaussian: Array
    terms: Mapping[str, Array]
    error: float
    moved: float
    left: float
    kappa: float
    beta: Array
    tilt: Tilt
    direction: Array
    share: Array
    foreseen: Array
    sd: Array
    about: _Pass


class _Layer(NamedTuple):
    """A layer in a propagation: x of covariance S, y = D x + noise of covariance N."""

    S: Array
    D: Array
    N: Array
    expansion: Expansion


class _Pass(NamedTuple):
    """A propagation. gains: mean gradient of s in each y, and ``a`` in z, s the sum that stands for the outputs.

    all: those of all outputs, each ``(J, n)``; means ``(J,)`` and cov ``(J, J)`` of these.
    """

    layers: tuple[_Layer, ...]
    gains: tuple[Array, ...]
    a: Array
    tail: _Tail
    all: tuple[Array, ...]
    means: Array
    cov: Array

    @property
    def sd(self) -> Array:
        return self.tail.sd

    @property
    def beta(self) -> Array:
        return self.tail.beta

    @property
    def slope(self) -> Array:
        return self.tail.slope

    @property
    def log_prob(self) -> Array:
        return self.tail.log_prob


class Through(NamedTuple):
    """A propagation through all layers, which all outputs have in common."""

    layers: tuple[_Layer, ...]
    means: Mapping[Base, Array]
    blocks: Mapping[tuple[Base, Base], Array]


def untilted(net: Layers, settings: Tilting | None = None) -> Through:
    """The first propagation of every output of a network."""
    return _through(net, _no_tilt(net), settings or Tilting())


def tilted(
    net: Layers,
    *,
    which: int | Branch = 0,
    start: Tilt | None = None,
    settings: Tilting | None = None,
    first: Through | None = None,
) -> Tilted:
    """log Pr[output ``which`` ≥ 0], or of several outputs together.

    Args:
        net: the severities, in layers.
        which: which of them; or the numbers and signs of those that have to be positive together.
        start: a tilt to start from; None: no shift.
        settings: the constants.
        first: the propagation without a tilt, where it is known and there is no start.

    Raises:
        ValueError: a nonlinearity is not finite within reach of the tilt.
    """
    settings = settings or Tilting()
    s = net.special
    output = _some(net, which)
    tilt = start or _no_tilt(net)
    through = first if first is not None and start is None else _through(net, tilt, settings)
    found = _ended(net, output, through, tilt)
    moved = math.inf
    for turn in range(settings.most_rounds - 1):
        if turn >= settings.rounds - 1 and moved <= settings.settled and _left(s, found, tilt) <= settings.near:
            break
        before = number(s, found.log_prob)
        tilt = _settled(net, output, found, tilt, settings)
        found = _ended(net, output, _through(net, tilt, settings), tilt)
        moved = abs(number(s, found.log_prob) - before)
    terms = _corrections(net, found, settings)
    size = sum(abs(number(s, x)) for x in terms.values())
    kappa = max((_spread(s, layer.S) for layer in found.layers), default=0.0)
    length = s.xp.sqrt(s.xp.sum(found.a * found.a))
    unshifted = found.means - sum((s.xp.sum(g * n, axis=1) for g, n in zip(found.all, tilt.noises, strict=True)), 0.0)
    return Tilted(
        which=((which, 1.0),) if isinstance(which, int) else which,
        log_prob=found.log_prob + sum(terms.values(), 0.0 * found.log_prob),
        gaussian=found.log_prob,
        terms=terms,
        error=settings.error * size * math.sqrt(kappa * found.means.shape[0]),
        moved=moved,
        left=_left(s, found, tilt),
        kappa=kappa,
        beta=found.beta,
        tilt=tilt,
        direction=found.a / s.xp.where(length > 0, length, 1.0),
        share=length * length / s.xp.where(found.sd > 0, found.sd, 1.0) ** 2,
        foreseen=_log_positive(s, unshifted, found.cov),
        sd=found.sd,
        about=found,
    )


def resettled(
    net: Layers, found: Tilted, start: Tilt, *, which: int | Branch = 0, settings: Tilting | None = None
) -> Tilt:
    """Where the tilt goes from another start, by vectors alone: with covariances as ``found`` has them."""
    return _settled(net, _some(net, which), found.about, start, settings or Tilting())


def _some(net: Layers, which: int | Branch) -> Linear:
    """An output by itself, or several together."""
    chosen = ((which, 1.0),) if isinstance(which, int) else which

    def rows(whole: Array) -> Array:
        found: Array = net.special.xp.stack([whole[row] if sign == 1.0 else sign * whole[row] for row, sign in chosen])
        return found

    return Linear({b: rows(m) for b, m in net.output.terms.items()}, rows(net.output.shift))


def _no_tilt(net: Layers) -> Tilt:
    zero = 0.0 * net.output.shift
    return Tilt(
        _zeros(net.special, net.dim, zero), tuple(_zeros(net.special, layer.linear.size, zero) for layer in net.layers)
    )


def _through(net: Layers, tilt: Tilt, settings: Tilting) -> Through:
    """Means and covariances of all layers, about the tilt."""
    s, xp = net.special, net.special.xp
    means: dict[Base, Array] = {INPUT: tilt.input}
    blocks: dict[tuple[Base, Base], Array] = {}  # of pairs in use; the input's own is the identity
    known: list[_Layer] = []
    for k, layer in enumerate(net.layers):
        later = net.used_later(k)
        h = _mean(layer.linear, means)
        others = [b for b in means if b in later or b in layer.linear.terms]
        with_others = {b: _covariance(layer.linear, b, blocks) for b in others}
        S = _quadratic(layer.linear, with_others)
        std = xp.sqrt(s.clip(xp.linalg.diagonal(S), 0.0, None))
        expansion = expand(s, layer.function, h, std, layer.breaks, settings.quadrature, closed=True)
        C = _own(s, expansion, S, settings.quadrature)
        D = slope(s, expansion)
        known.append(_Layer(S, D, C - D[:, None] * S * D[None, :], expansion))
        x, y = ("x", k), ("y", k)
        means[x], means[y] = h, expansion.mean + tilt.noises[k]
        blocks[x, x], blocks[y, y], blocks[y, x] = S, C, D[:, None] * S
        for b, block in with_others.items():
            blocks[x, b], blocks[y, b] = block, D[:, None] * block
        for b in [b for b in means if b not in later]:
            del means[b]
        for pair in [pair for pair in blocks if not set(pair) <= set(means)]:
            del blocks[pair]
    return Through(tuple(known), means, blocks)


def _ended(net: Layers, output: Linear, through: Through, tilt: Tilt) -> _Pass:
    """What the propagation says of these outputs."""
    s, (known, means, blocks) = net.special, through
    mean = _mean(output, means)
    cov = _quadratic(output, {b: _covariance(output, b, blocks) for b in output.terms})
    gains, a = _gains(net, output, [layer.D for layer in known])
    tail = _tail(s, mean, cov, a, gains, tilt)
    one, reduced = _weighed(tail, a), tuple(_weighed(tail, g) for g in gains)
    return _Pass(known, reduced, one, tail, gains, mean, cov)


def _weighed(tail: _Tail, rows: Array) -> Array:
    """The rows ``(J, n)`` by their weights in the tail, ``(n,)``."""
    return rows[0] if tail.weights is None else tail.weights @ rows


def _log_positive(s: Any, mean: Array, cov: Array) -> Array:
    """log Pr that all entries are."""
    if mean.shape[0] == 1:
        return s.log_ndtr(mean[0] / _sd(s, cov[0, 0]))
    return log_orthant(s, mean[None], cov)[0]


def _sd(s: Any, variance: Array) -> Array:
    return s.xp.sqrt(s.clip(variance, float(s.xp.finfo(variance.dtype).tiny), None))


def _left(s: Any, found: _Pass, tilt: Tilt) -> float:
    """How far the input's tilt is from where it points to."""
    return math.sqrt(number(s, s.xp.sum((found.slope * found.a - tilt.input) ** 2)))


class _Tail(NamedTuple):
    """The event as a Gaussian severity has it.

    weights: of the outputs in the sum that stands for them, None of one alone; sd: of that; beta; slope: λ / σ of the
    tilt; D2, D3, D4: derivatives of the probability in the mean, over it; E2 = D₃ − 2 t D₂ + t³ and E3 = D₄ − 3 t D₃ +
    3 t² D₂ − t⁴, t the slope.
    """

    weights: Array | None
    sd: Array
    beta: Array
    slope: Array
    log_prob: Array
    D2: Array
    D3: Array
    D4: Array
    E2: Array
    E3: Array


def _tail(s: Any, mean: Array, cov: Array, a: Array, gains: Sequence[Array], tilt: Tilt) -> _Tail:
    """Of means ``(J,)``, covariance ``(J, J)`` and gains ``(J, n)`` of the outputs; J = 1 in closed form."""
    xp = s.xp
    along = a @ tilt.input
    for g, noise in zip(gains, tilt.noises, strict=True):
        along = along + g @ noise
    if mean.shape[0] > 1:
        sd = xp.sqrt(s.clip(xp.linalg.diagonal(cov), float(xp.finfo(cov.dtype).tiny), None))
        o = orthant(s, mean - along, s.with_diagonal(cov, sd * sd))
        t = o.slope
        E2, E3 = o.third - 2 * t * o.second + t**3, o.fourth - 3 * t * o.third + 3 * t * t * o.second - t**4
        beta = o.second * o.sd / t
        return _Tail(o.weights, o.sd, beta, t, o.log_prob, o.second, o.third, o.fourth, E2, E3)
    sd = _sd(s, cov[0, 0])
    beta = -(mean - along)[0] / sd
    log_prob = s.log_ndtr(-beta)
    t = xp.exp(-0.5 * beta * beta - 0.5 * math.log(2 * math.pi) - log_prob) / sd
    lam = t * sd
    x = lam - beta
    D2, D3, D4 = beta * lam / sd**2, (beta**2 - 1) * lam / sd**3, (beta**3 - 3 * beta) * lam / sd**4
    return _Tail(None, sd, beta, t, log_prob, D2, D3, D4, lam * (x * x - 1) / sd**3, lam * (3 * x - x**3) / sd**4)


def _settled(net: Layers, output: Linear, about: _Pass, tilt: Tilt, settings: Tilting) -> Tilt:
    """The tilt, moved towards its fixed point with the covariances of ``about``.

    Where the way that is left does not get shorter, moves overshoot, and are shortened.
    """
    s, xp, quadrature = net.special, net.special.xp, settings.quadrature
    share, before = settings.damping, math.inf
    for _ in range(settings.between):
        means: dict[Base, Array] = {INPUT: tilt.input}
        slopes = []
        for k, layer in enumerate(net.layers):
            h = _mean(layer.linear, means)
            expansion = _coarsely(s, layer, h, about.layers[k].expansion.std, quadrature)
            slopes.append(slope(s, expansion))
            means["x", k], means["y", k] = h, expansion.mean + tilt.noises[k]
        gains, a = _gains(net, output, slopes)
        shaped = [g @ layer.N for layer, g in zip(about.layers, gains, strict=True)]
        cov = a @ a.T
        for g, n in zip(gains, shaped, strict=True):
            cov = cov + g @ n.T
        tail = _tail(s, _mean(output, means), cov, a, gains, tilt)
        steep, one = tail.slope, _weighed(tail, a)
        pulled = [_weighed(tail, n) for n in shaped]
        way = Tilt(steep * one - tilt.input, tuple(steep * w - n for n, w in zip(tilt.noises, pulled, strict=True)))
        left = math.sqrt(number(s, xp.sum(way.input**2)))
        if left > settings.shortening * before:
            share = max(share / 2, settings.least)
        before = left
        noises = tilt.noises
        if settings.noises:
            noises = tuple(n + share * w for n, w in zip(noises, way.noises, strict=True))
        tilt = Tilt(tilt.input + share * way.input, noises)
        if left <= settings.close:
            break
    return tilt


def _gains(net: Layers, output: Linear, slopes: Sequence[Array]) -> tuple[tuple[Array, ...], Array]:
    """Mean gradients of the outputs in every y, and in z, each ``(J, n)``."""
    gains: dict[Base, Array] = dict(output.terms)
    like = output.shift[:, None]
    found: list[Array] = []
    for k in reversed(range(len(net.layers))):
        layer, D = net.layers[k], slopes[k]
        none = 0.0 * like * D
        g = gains.pop(("y", k), none)
        found.append(g)
        at_x = D * g + gains.pop(("x", k), none)
        for b, matrix in layer.linear.terms.items():
            gains[b] = gains.get(b, 0.0 * like) + at_x @ matrix
    a = gains.get(INPUT)
    return tuple(reversed(found)), like * _zeros(net.special, net.dim, like) if a is None else a


def _corrections(net: Layers, o: _Pass, settings: Tilting) -> dict[str, Array]:
    """Prefactor, rings within layers and across layers, by name, in nats."""
    s, xp = net.special, net.special.xp
    t, D2, D3, D4 = o.slope, o.tail.D2, o.tail.D3, o.tail.D4
    zero = 0.0 * o.log_prob
    V = C = A = F = zero
    within = ("ring 3", "ring 4", "neuron 3", "neuron 4", "triangle")
    across = ("across 2", "across 3", "across 4", "cubic")
    rings = dict.fromkeys(within + across, zero)
    legs = _legs(net, o)
    known = [statistics(s, _at_nodes(s, layer.expansion, settings.quadrature)) for layer in o.layers]
    forms = _Forms()
    for k in reversed(range(len(net.layers))):
        layer, g, c = o.layers[k], o.gains[k], legs[k]
        f, S = known[k], layer.S
        (a1, H1, P1), (a2, H2, P2) = forms.through(k, f.D)
        u, dl = g * f.f2, 0.5 * f.nu * g * g
        off = s.with_diagonal(S, 0.0)
        S2 = off * off
        V = V + xp.sum(u * c * c)
        C = C + xp.sum(g * g * f.kappa * c)
        A = A + xp.sum(c * dl * c) + xp.sum(u * c * (off @ (u * c)))
        F = F + xp.sum(g * f.f3 * c**3)
        X = u[:, None] * off
        rings["ring 3"] = rings["ring 3"] + D3 * 0.5 * xp.sum(u * (S2 @ dl))
        rings["ring 4"] = rings["ring 4"] + D4 * 0.25 * xp.sum(dl * (S2 @ dl))
        rings["neuron 3"] = rings["neuron 3"] + D3 * xp.sum(g**3 * f.kappa3) / 6
        rings["neuron 4"] = rings["neuron 4"] + D4 * xp.sum(g**4 * f.kappa4) / 24
        rings["triangle"] = rings["triangle"] + D3 * xp.sum((X @ X) * X.T) / 6
        d1, d2 = u, dl
        if P1 is not None:
            q1, q2 = xp.sum(H1 * S, axis=1), xp.sum(H2 * S, axis=1)
            r1, r2 = (xp.sum((S @ P) * S, axis=1) for P in (P1, P2))
            e1, e2 = 0.5 * f.nu * a1 + f.f3 * q1, 0.5 * f.nu * a2 + f.f3 * q2
            d1, d2 = u + e1, dl + e2
            two = 0.5 * xp.sum(u * r1) + 0.5 * xp.sum(u * (S2 @ e1)) + 0.25 * xp.sum(e1 * (S2 @ e1))
            two = two + 0.5 * xp.sum(e1 * r1)
            two = two + xp.sum(0.5 * f.nu * q1 * q1 + 0.5 * f.k31 * a1 * q1 + 0.125 * f.kappa4 * a1 * a1)
            two = two + xp.sum(f.kappa * g * q1 + 0.5 * f.kappa3 * g * a1)
            three = xp.sum(d1 * (S2 @ d2)) + xp.sum(d1 * r2) + xp.sum(d2 * r1) - xp.sum(u * (S2 @ dl))
            three = 0.5 * three + xp.sum(f.kappa * g * q2 + 0.5 * f.kappa3 * g * a2)
            three = three + xp.sum(g * g * (0.5 * f.k31 * q1 + 0.25 * f.kappa4 * a1))
            three = three + xp.sum(f.nu * q1 * q2 + 0.5 * f.k31 * (a1 * q2 + a2 * q1) + 0.25 * f.kappa4 * a1 * a2)
            four = 0.25 * (xp.sum(d2 * (S2 @ d2)) + 2 * xp.sum(d2 * r2) - xp.sum(dl * (S2 @ dl)))
            four = four + xp.sum(g * g * (0.5 * f.k31 * q2 + 0.25 * f.kappa4 * a2))
            four = four + xp.sum(0.5 * f.nu * q2 * q2 + 0.5 * f.k31 * a2 * q2 + 0.125 * f.kappa4 * a2 * a2)
            rings["across 2"] = rings["across 2"] + D2 * two
            rings["across 3"] = rings["across 3"] + D3 * three
            rings["across 4"] = rings["across 4"] + D4 * four
        rings["cubic"] = rings["cubic"] + D2 * _cubic(net, o, known, k)
        forms.below(k, net.layers[k].linear, d1, s.with_diagonal(d1[:, None] * off * d1[None, :], d2))
    return {
        "curvature": 0.5 * V * o.tail.E2,
        "covariance": 0.5 * C * (D3 - t * D2),
        "spread": 0.5 * A * (D4 - 2 * t * D3 + t * t * D2),
        "third": F / 6 * o.tail.E3,
        **rings,
    }


def _cubic(net: Layers, o: _Pass, known: Sequence[Statistics], k: int) -> Array:
    """Σ_i g f₃ K(x_i, x_i, x_i, s) / 6 over all neurons i above layer k, K the joint cumulant that layer k makes."""
    xp = net.special.xp
    f, g, S = known[k], o.gains[k], o.layers[k].S
    total = 0.0 * o.log_prob
    paths: dict[Base, Array] = {}
    for above in range(k + 1, len(net.layers)):
        linear = net.layers[above].linear
        path: Array = linear.terms.get(("y", k))
        for b, matrix in linear.terms.items():
            if b in paths:
                path = matrix @ paths[b] if path is None else path + matrix @ paths[b]
        if path is None:
            continue
        upper = known[above]
        paths["x", above], paths["y", above] = path, upper.D[:, None] * path
        seen = (path * f.D[None, :]) @ S
        weight = o.gains[above] * upper.f3
        twice, both, own = seen * seen, path * seen, path * path
        made = f.f3 * (weight @ (twice * seen)) + 3 * f.nu * (weight @ (both * seen))
        made = made + 3 * f.k31 * (weight @ (both * path)) + f.kappa4 * (weight @ (own * path))
        total = total + xp.sum(g * made) / 6
    return total


def _legs(net: Layers, o: _Pass) -> list[Array]:
    """Cov(s, x_k), as far as s is linear in z and in the layers' noises."""
    known: dict[Base, Array] = {INPUT: o.a}
    found = []
    for k, layer in enumerate(net.layers):
        c = sum((m @ known[b] for b, m in layer.linear.terms.items()), 0.0 * layer.linear.shift)
        found.append(c)
        known["x", k] = c
        known["y", k] = o.layers[k].D * c + o.layers[k].N @ o.gains[k]
    return found


class _Forms:
    """What later layers are to earlier values, to second order: two quadratic forms, in blocks of pairs of bases."""

    def __init__(self) -> None:
        self._blocks: tuple[dict[tuple[Base, Base], Array], ...] = ({}, {})

    def through(self, k: int, D: Array) -> list[tuple[Array, Array, Array]]:
        """Of each form: its diagonal on y_k; its rows of y_k, y_k on the other side being D x_k; all of it on x_k so.

        All None where there is nothing above.
        """
        x, y = ("x", k), ("y", k)
        found = []
        for blocks in self._blocks:
            own = blocks.pop((y, y), None)
            half = None if own is None else own * D[None, :]
            if own is not None:
                _put(blocks, x, x, D[:, None] * half)
            for a, b in [pair for pair in blocks if y in pair]:
                block = blocks.pop((a, b))
                other, block = (b, block) if a == y else (a, block.T)
                if other == x:
                    half = block if half is None else half + block
                    block = D[:, None] * block
                    _put(blocks, x, x, block + block.T)
                else:
                    _put(blocks, x, other, D[:, None] * block)
            whole = blocks.get((x, x))
            if whole is not None and half is None:
                half = 0.0 * whole
            found.append((0.0 * D if own is None else own.diagonal(), half, whole))
        return found

    def below(self, k: int, linear: Linear, *added: Array) -> None:
        """x_k, with something added to each form of it, a diagonal or a matrix, replaced by what it is made of."""
        x = ("x", k)
        bases = [b for b in linear.terms if b != INPUT]
        for blocks, more in zip(self._blocks, added, strict=True):
            own = blocks.pop((x, x), None)
            for i, b in enumerate(bases):
                left = linear.terms[b].T
                seen = left * more[None, :] if more.ndim == 1 else left @ more
                seen = seen if own is None else seen + left @ own
                for other in bases[i:]:
                    _put(blocks, b, other, seen @ linear.terms[other])
            for pair in [pair for pair in blocks if x in pair]:
                block = blocks.pop(pair)
                other, block = (pair[1], block) if pair[0] == x else (pair[0], block.T)
                for b in bases if other != INPUT else ():
                    seen = linear.terms[b].T @ block
                    _put(blocks, b, other, seen + seen.T if b == other else seen)


def _put(blocks: dict[tuple[Base, Base], Array], a: Base, b: Base, block: Array) -> None:
    if (b, a) in blocks and a != b:
        a, b, block = b, a, block.T
    known = blocks.get((a, b))
    blocks[a, b] = block if known is None else known + block


def _mean(linear: Linear, means: Mapping[Base, Array]) -> Array:
    total = linear.shift
    for base, matrix in linear.terms.items():
        total = total + matrix @ means[base]
    return total


def _covariance(linear: Linear, other: Base, blocks: Mapping[tuple[Base, Base], Array]) -> Array:
    """Cov(linear, other)."""
    total: Array = None
    for base, matrix in linear.terms.items():
        if base == other == INPUT:
            term = matrix
        elif (base, other) in blocks:
            term = matrix @ blocks[base, other]
        else:
            term = matrix @ blocks[other, base].T
        total = term if total is None else total + term
    return total


def _quadratic(linear: Linear, with_terms: Mapping[Base, Array]) -> Array:
    """Cov(linear, linear)."""
    total: Array = None
    for base, matrix in linear.terms.items():
        term = with_terms[base] @ matrix.T
        total = term if total is None else total + term
    if total is None:
        total = 0.0 * linear.shift[:, None] * linear.shift[None, :]
    return total


def _coarsely(s: Any, layer: Layer, mean: Array, std: Array, quadrature: Quadrature) -> Expansion:
    """The expansion of a layer's function, good enough to move by."""
    found = closed_form(s, layer.function, mean, std, layer.breaks, quadrature.reach)
    if found is not None:
        return found
    few = quadrature.per_piece // 2 if layer.breaks else quadrature.nodes // 2
    return at_nodes(s, layer.function, mean, std, layer.breaks, few, quadrature.reach)


def _at_nodes(s: Any, e: Expansion, quadrature: Quadrature) -> Expansion:
    """The expansion with its nodes, by which its statistics are summed."""
    if e.bends is None or e.function is None:
        return e
    return at_nodes(s, e.function, e.location, e.std, e.breaks, quadrature.per_piece, quadrature.reach)


def _own(s: Any, expansion: Expansion, S: Array, settings: Quadrature) -> Array:
    """Cov(y, y), its diagonal exact."""
    correlation = s.filled_diagonal(correlations(s, expansion, expansion, S), 0.0)
    found, _ = covariance(s, expansion, expansion, correlation, settings)
    return s.filled_diagonal(found, expansion.variance)


def _spread(s: Any, S: Array) -> float:
    """tr S² / (tr S)²: one over the number of directions that the values use."""
    trace = number(s, s.xp.linalg.trace(S))
    return number(s, s.xp.sum(S * S)) / trace**2 if trace > 0 else 0.0


def _zeros(s: Any, size: int, like: Array) -> Array:
    return s.array(np.zeros(size), like)
