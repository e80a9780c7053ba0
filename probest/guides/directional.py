r"""A guide for catastrophes in some directions at some distance: von Mises–Fisher in direction, Nakagami in radius.

In polar coordinates z = r a with ‖a‖ = 1,

.. math:: q(r, a) = \sum_k \pi_k\, \mathrm{Nak}(r; m_k, \Omega_k)\, \mathrm{vMF}(a; \mu_k, \kappa_k),

where r² is Gamma with shape m and mean Ω, and vMF(a; μ, κ) ∝ exp(κ μᵀa) on the sphere. In many dimensions the radius
of a Gaussian is nearly fixed and a Gaussian mixture that moves it has to move its mean far; here both are free.
Relative to the uniform law on the sphere the direction's density is exp(κ μᵀa) / ₀F₁(; d/2; κ²/4), which neither over-
nor underflows in logarithms. The mean directions lie in the failure-informed subspace (as the mean of the catastrophes
does, where there is one), so that only r numbers of each have to be learnt, and EM costs O(n · r) a step.

It fails where catastrophes are cut out by the distance along a direction alone (a half-space: the Gaussian mixture is
then better) and where directions form curved bands.

References: Wang & Song (2016), Cross-entropy-based adaptive importance sampling using von Mises–Fisher mixture for high
dimensional reliability analysis; Papaioannou, Geyer & Straub (2019), Improved cross entropy-based importance sampling
with a flexible mixture model; Wood (1994), Simulation of the von Mises–Fisher distribution; Banerjee, Dhillon, Ghosh &
Sra (2005), Clustering on the unit hypersphere; DLMF 10.41 for Bessel functions of large order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import special

from probest import diagnostics
from probest.evidence import Floats
from probest.guides.base import Defensive, Prior, stratify
from probest.guides.em import expectation_maximisation, least_bic

__all__ = ["Directional", "fit_directional", "log_normaliser"]

_TINY = 1e-290
_MOST_SHAPE = 1e5  # of the Nakagami law: a relative scale of the radius of 0.0016


@dataclass(frozen=True)
class Directional:
    """weights ``(k,)``; directions ``(k, dim)`` unit; concentration κ ≥ 0, shape m and spread Ω, each ``(k,)``."""

    weights: Floats
    directions: Floats
    concentration: Floats
    shape: Floats
    spread: Floats

    @property
    def dim(self) -> int:
        return int(self.directions.shape[1])

    @property
    def components(self) -> int:
        return len(self.weights)

    def sample(self, n: int, rng: np.random.Generator) -> Floats:
        kind = stratify(n, self.weights, rng)
        z = rng.standard_normal((n, self.dim))
        mean = self.directions[kind]
        cosine = _sample_cosines(self.concentration[kind], self.dim, rng)
        z -= np.einsum("ij,ij->i", z, mean)[:, None] * mean  # uniform in the directions across
        z *= (np.sqrt(np.maximum(1.0 - cosine**2, 0.0)) / np.sqrt(np.einsum("ij,ij->i", z, z)))[:, None]
        z += cosine[:, None] * mean
        square = rng.standard_gamma(self.shape[kind]) * self.spread[kind] / self.shape[kind]
        z *= np.sqrt(square)[:, None]
        return z

    def log_ratio(self, z: Floats) -> Floats:
        log_square = np.log(np.maximum(np.einsum("ij,ij->i", z, z), _TINY))
        cosines = (z @ self.directions.T) * np.exp(-0.5 * log_square)[:, None]
        half = 0.5 * self.dim
        # densities of log r²: the prior's (chi-square) and the guide's
        log_chi = half * (log_square - math.log(2.0)) - 0.5 * np.exp(log_square) - special.gammaln(half)
        log_q = special.logsumexp(_log_parts(self, log_square, cosines), axis=1)
        return np.asarray(log_chi - log_q, dtype=np.float64)

    def widened(self, factor: float) -> Directional:
        """The same directions, with angles and relative radii spread ``factor`` times as wide (about)."""
        shrink = factor**-2
        return Directional(
            self.weights,
            self.directions,
            self.concentration * shrink,
            np.maximum(self.shape * shrink, 0.5),
            self.spread,
        )

    def mirrored(self) -> Directional:
        """The same law at −z."""
        return Directional(self.weights, -self.directions, self.concentration, self.shape, self.spread)

    def around(self) -> Directional:
        """The same radii in all directions."""
        return Directional(self.weights, self.directions, np.zeros_like(self.concentration), self.shape, self.spread)

    def defended(self) -> Defensive:
        """Slightly and much widened, all around, opposite, and the prior."""
        parts = (self.widened(1.15), self.widened(2.0), self.around(), self.mirrored(), Prior(self.dim))
        return Defensive(parts, (0.78, 0.13, 0.05, 0.02, 0.02))


def log_normaliser(dim: int, kappa: Floats) -> Floats:
    """log ₀F₁(; dim/2; κ²/4): log of the mean of exp(κ a₁) over the unit sphere in ``dim`` ≥ 2 dimensions, κ ≥ 0.

    By its series for small κ, by the exponentially scaled Bessel function where that does not underflow, and by the
    uniform expansion in the order (DLMF 10.41.3) elsewhere, which is where the order is above 90.
    """
    kappa = np.asarray(kappa, dtype=np.float64)
    order, half = 0.5 * dim - 1.0, 0.5 * dim
    x = 0.25 * kappa**2
    series = x / half * (1.0 - 0.5 * x / (half * (half + 1.0)))
    safe = np.maximum(kappa, 1e-150)
    scaled = special.ive(order, safe)
    small = scaled < _TINY
    log_bessel = np.log(np.where(small, 1.0, scaled)) + safe
    if small.any() and order > 0.0:
        log_bessel = np.where(small, _uniform_log_bessel(order, safe), log_bessel)
    value = log_bessel + special.gammaln(half) - order * np.log(0.5 * safe)
    return np.asarray(np.where(x < 1e-4 * half, series, value), dtype=np.float64)


def _uniform_log_bessel(order: float, kappa: Floats) -> Floats:
    """log I_ν(κ) for a large order ν."""
    root = np.hypot(order, kappa)
    p = order / root
    s = p * p
    u1 = p * (3.0 - 5.0 * s) / 24.0
    u2 = s * (81.0 + s * (-462.0 + 385.0 * s)) / 1152.0
    u3 = p * s * (30375.0 + s * (-369603.0 + s * (765765.0 - 425425.0 * s))) / 414720.0
    tail = np.log1p((u1 + (u2 + u3 / order) / order) / order)
    eta = root + order * np.log(kappa / (order + root))
    return np.asarray(eta - 0.5 * np.log(2.0 * math.pi * root) + tail, dtype=np.float64)


def _mean_cosine(dim: int, kappa: Floats) -> Floats:
    """E[a₁] under vMF: I_{d/2}(κ) / I_{d/2−1}(κ), from two normalisers that never underflow."""
    return np.asarray(kappa / dim * np.exp(log_normaliser(dim + 2, kappa) - log_normaliser(dim, kappa)))


def _sample_cosines(kappa: Floats, dim: int, rng: np.random.Generator) -> Floats:
    """μᵀa for one vMF draw a of each concentration, ``(n,)`` (Wood 1994, with terms that do not cancel)."""
    m = dim - 1.0
    b = m / (2.0 * kappa + np.sqrt(4.0 * kappa**2 + m * m))
    x0 = (1.0 - b) / (1.0 + b)
    c = kappa * x0 + m * (np.log(4.0 * b) - 2.0 * np.log1p(b))
    out = np.empty(len(kappa))
    open_ = np.arange(len(kappa))
    while len(open_):
        beta = rng.beta(0.5 * m, 0.5 * m, len(open_))
        bo, ko = b[open_], kappa[open_]
        w = (1.0 - (1.0 + bo) * beta) / (1.0 - (1.0 - bo) * beta)
        accept = ko * w + m * np.log1p(-x0[open_] * w) - c[open_] >= -rng.standard_exponential(len(open_))
        out[open_[accept]] = w[accept]
        open_ = open_[~accept]
    return out


def _log_parts(law: Directional, log_square: Floats, cosines: Floats) -> Floats:
    """log of weight times density, of log r² and relative to uniform directions, of each component ``(n, k)``."""
    m = law.shape
    radial = m * (np.log(m / law.spread) + log_square[:, None]) - m / law.spread * np.exp(log_square)[:, None]
    constant = np.log(law.weights) - special.gammaln(m) - log_normaliser(law.dim, law.concentration)
    return np.asarray(constant + radial + law.concentration * cosines, dtype=np.float64)


def fit_directional(
    z: Floats,
    log_w: Floats,
    basis: Floats,
    rng: np.random.Generator,
    *,
    most: int = 4,
    effective: float | None = None,
    steps: int = 25,
) -> Directional:
    """The law with the least BIC among 1 to ``most`` components, mean directions in ``basis``, by weighted EM.

    z ``(n, dim)`` with ``dim`` ≥ 2; log_w ``(n,)``; basis ``(dim, r)`` orthonormal.
    effective: how many independent points the sample is worth, where less than its effective sample size.
    """
    w = np.exp(log_w - diagnostics.log_sum_exp(log_w))
    n_eff = min(effective or math.inf, diagnostics.effective_sample_size(log_w))
    log_square = np.log(np.maximum(np.einsum("ij,ij->i", z, z), _TINY))
    inside = (z @ basis) * np.exp(-0.5 * log_square)[:, None]
    r = basis.shape[1]
    return least_bic(
        lambda k: _em(inside, log_square, w, k, n_eff, basis, rng, steps),
        lambda k: k * (r + 3.0) - 1.0,
        n_eff,
        most=most,
        points=2.0 * (r + 3),
        patience=1,
    )


def _em(
    inside: Floats,
    log_square: Floats,
    w: Floats,
    k: int,
    n_eff: float,
    basis: Floats,
    rng: np.random.Generator,
    steps: int,
) -> tuple[float, Directional]:
    """EM from directions picked far apart; returns the mean log-likelihood and the law."""
    n, (dim, r) = len(w), basis.shape
    norm = np.sqrt(np.maximum(np.einsum("ij,ij->i", inside, inside), 1e-30))
    unit = inside / norm[:, None]
    picked = [unit[rng.choice(n, p=w)]]
    for _ in range(1, k):
        gap = 1.0 - np.max(unit @ np.array(picked).T, axis=1)
        p = w * np.maximum(gap, 1e-12)
        picked.append(unit[rng.choice(n, p=p / p.sum())])
    share = np.zeros((n, k))
    share[np.arange(n), np.argmax(unit @ np.array(picked).T, axis=1)] = 1.0
    square = np.exp(log_square)

    def step(share: Floats) -> tuple[float, Floats, Directional]:
        weighted = w[:, None] * (share + 1e-9)  # a component that lost all its points becomes the law of all points
        mass = weighted.sum(axis=0)
        weighted /= mass
        points = np.maximum(mass / mass.sum() * n_eff, 1.0)
        mean = weighted.T @ inside
        length = np.sqrt(np.maximum(np.einsum("ij,ij->i", mean, mean), 1e-30))
        # the squared length of a mean of n random unit vectors is r / (dim n) in r of dim directions: take that off
        excess = r / (dim * points)
        resultant = np.sqrt(np.clip((length**2 - excess) / (1.0 - np.minimum(excess, 0.5)), 0.0, 1.0))
        spread = weighted.T @ square
        law = Directional(
            mass / mass.sum(),
            (mean / length[:, None]) @ basis.T,
            _concentration(dim, np.minimum(resultant, 1.0 - 1e-9)),
            _nakagami_shape(np.log(spread) - weighted.T @ log_square, points),
            spread,
        )
        parts = _log_parts(law, log_square, inside @ (mean / length[:, None]).T)
        density = special.logsumexp(parts, axis=1)
        return float(w @ density), np.exp(parts - density[:, None]), law

    return expectation_maximisation(share, step, steps)


def _concentration(dim: int, resultant: Floats) -> Floats:
    """κ with mean cosine ``resultant``: Banerjee's guess and Newton steps (Sra 2012)."""
    kappa = resultant * (dim - resultant**2) / (1.0 - resultant**2)
    for _ in range(3):
        a = _mean_cosine(dim, kappa)
        slope = 1.0 - a * a - (dim - 1.0) * np.where(kappa > 0.0, a / np.maximum(kappa, _TINY), 1.0 / dim)
        step = (a - resultant) / np.maximum(slope, 1e-12)
        kappa = np.clip(kappa - step, 0.5 * kappa, 2.0 * kappa)
    return np.asarray(kappa, dtype=np.float64)


def _nakagami_shape(gap: Floats, points: Floats) -> Floats:
    """m with log m − ψ(m) = ``gap``, as from one more point of relative variance 1 (few points look too alike)."""
    gap = np.maximum((gap * points + 0.5 / points) / points, 1e-12)
    m = (3.0 - gap + np.sqrt((gap - 3.0) ** 2 + 24.0 * gap)) / (12.0 * gap)
    for _ in range(3):
        m = m - (np.log(m) - special.digamma(m) - gap) / (1.0 / m - special.polygamma(1, m))
    return np.asarray(np.clip(m, 0.5, _MOST_SHAPE), dtype=np.float64)
