r"""A Gaussian mixture in the few directions that matter, the standard normal in all others.

With B the ``(dim, r)`` orthonormal basis of the failure-informed subspace and u = Bᵀz,

.. math:: \frac{q(z)}{\varphi(z)} = \frac{\sum_k \pi_k N(u; m_k, S_k)}{N(u; 0, I_r)},

so the density relative to the adversary costs O(dim · r) a point and nothing is lost in the other directions.
B is found in :mod:`probest.guides.subspace`. The mixture is fitted by EM with weights, regularised, from several
starts; the number of components by BIC.

It fails where catastrophes surround the origin in many directions (a shell: see :mod:`probest.guides.radial`)
and where modes are many and curved; the weights then show a large k̂.

References: Uribe, Papaioannou, Marzouk & Straub (2021), Cross-entropy-based importance sampling with
failure-informed dimension reduction; El Masri, Morio & Simatos (2021), Improvement of the cross-entropy method
in high dimension.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from probest import diagnostics
from probest.evidence import Floats
from probest.guides.base import Defensive, Prior, stratify
from probest.guides.em import expectation_maximisation, least_bic

__all__ = ["Mixture", "fit_mixture"]

_MAX_POINTS = 20_000
_LOG2PI = math.log(2.0 * math.pi)


@dataclass(frozen=True)
class Mixture:
    """basis ``(dim, r)``; weights ``(k,)``; means ``(k, r)``; factors ``(k, r, r)`` lower Cholesky."""

    basis: Floats
    weights: Floats
    means: Floats
    factors: Floats

    @property
    def dim(self) -> int:
        return int(self.basis.shape[0])

    @property
    def components(self) -> int:
        return len(self.weights)

    def sample(self, n: int, rng: np.random.Generator) -> Floats:
        z = rng.standard_normal((n, self.dim))
        z += (self.sample_inside(n, rng) - z @ self.basis) @ self.basis.T
        return z

    def log_ratio(self, z: Floats) -> Floats:
        return self.log_density_ratio(z @ self.basis)

    def log_density_ratio(self, u: Floats) -> Floats:
        """log φ − log q at subspace coordinates u ``(n, r)``."""
        log_q = _log_sum(_log_parts(u, self.weights, self.means, self.factors))
        reference = -0.5 * np.einsum("ij,ij->i", u, u) - 0.5 * u.shape[1] * _LOG2PI
        return np.asarray(reference - log_q, dtype=np.float64)

    def sample_inside(self, n: int, rng: np.random.Generator) -> Floats:
        """``(n, r)`` draws of the subspace coordinates alone."""
        kind = stratify(n, self.weights, rng)
        u = rng.standard_normal((n, self.means.shape[1]))
        for k in range(len(self.weights)):
            at = kind == k
            u[at] = self.means[k] + u[at] @ self.factors[k].T
        return u

    def with_wide_tails(self, share: float, factor: float) -> Mixture:
        """This mixture with probability ``1 - share``, its copy widened by ``factor`` with the rest."""
        return Mixture(
            self.basis,
            np.concatenate([(1.0 - share) * self.weights, share * self.weights]),
            np.concatenate([self.means, self.means]),
            np.concatenate([self.factors, factor * self.factors]),
        )

    def mirrored(self) -> Mixture:
        """The mixture at −z: catastrophes often come in opposite pairs, one of which may have been missed."""
        return Mixture(self.basis, self.weights, -self.means, self.factors)

    def around(self) -> Mixture:
        """One round component at the origin, as wide as the mixture is far from it: looks in every direction."""
        square = np.sum(self.means**2, axis=1) + np.sum(self.factors**2, axis=(1, 2))
        r = self.means.shape[1]
        scale = max(1.0, math.sqrt(float(self.weights @ square) / r))
        return Mixture(self.basis, np.ones(1), np.zeros((1, r)), scale * np.eye(r)[None])

    def widened(self, factor: float) -> Mixture:
        """The same mixture with every standard deviation multiplied by ``factor``."""
        return Mixture(self.basis, self.weights, self.means, self.factors * factor)

    def defended(self) -> Defensive:
        """Slightly and much widened, and where else to look: all around, opposite, and the prior."""
        parts = (self.widened(1.15), self.widened(2.0), self.around(), self.mirrored(), Prior(self.dim))
        return Defensive(parts, (0.78, 0.13, 0.05, 0.02, 0.02))


def fit_mixture(
    z: Floats,
    log_w: Floats,
    basis: Floats,
    rng: np.random.Generator,
    *,
    most: int = 8,
    effective: float | None = None,
    starts: int = 2,
    steps: int = 25,
) -> Mixture:
    """The mixture in ``basis`` with the least BIC among 1 to ``most`` components, by weighted EM.

    effective: how many independent points the sample is worth, where less than its effective sample size.
    starts: EM runs for each number of components, of at most ``steps`` steps.
    """
    if len(z) > _MAX_POINTS:
        keep = np.argsort(-log_w, kind="stable")[:_MAX_POINTS]
        z, log_w = z[keep], log_w[keep]
    u = z @ basis
    w = np.exp(log_w - diagnostics.log_sum_exp(log_w))
    n_eff = min(effective or math.inf, diagnostics.effective_sample_size(log_w))
    r = u.shape[1]
    # axis by axis in units of the whole sample: sums of squares then lose no digits
    centre = w @ u
    scale = np.sqrt(np.maximum(w @ (u - centre) ** 2, 1e-20))
    u = (u - centre) / scale
    rows, columns = np.triu_indices(r)
    features = np.concatenate([np.ones((1, len(u))), u.T, u.T[rows] * u.T[columns]])

    def fit(k: int) -> tuple[float, _Fit]:
        fits = [_em(u, features, w, k, n_eff, rng, steps) for _ in range(1 if k == 1 else starts)]
        return max(fits, key=lambda pair: pair[0])

    weights, means, scatter = least_bic(
        fit,
        lambda k: k * (1.0 + r + 0.5 * r * (r + 1)) - 1.0,
        n_eff,
        most=most,
        points=2.0 * (r + 1),
        patience=2,  # two modes a direction: one more component may not help where two would
    )
    return Mixture(basis, weights, centre + scale * means, scale[:, None] * np.linalg.cholesky(scatter))


class _Fit(NamedTuple):
    """weights ``(k,)``, means ``(k, r)``, covariances ``(k, r, r)``."""

    weights: Floats
    means: Floats
    scatter: Floats


def _log_parts(u: Floats, weights: Floats, means: Floats, factors: Floats) -> Floats:
    """log of weight times density of each component at each point, ``(k, n)``."""
    inverse = np.linalg.inv(factors)
    y = np.matmul(u[None] - means[:, None, :], inverse.transpose(0, 2, 1))
    logdet = np.sum(np.log(np.diagonal(factors, axis1=1, axis2=2)), axis=1)
    out = -0.5 * np.einsum("kni,kni->kn", y, y)
    return np.asarray(out + (np.log(weights) - logdet - 0.5 * u.shape[1] * _LOG2PI)[:, None], dtype=np.float64)


def _log_sum(parts: Floats) -> Floats:
    top = parts.max(axis=0)
    return np.asarray(top + np.log(np.sum(np.exp(parts - top), axis=0)), dtype=np.float64)


def _em(
    u: Floats, features: Floats, w: Floats, k: int, n_eff: float, rng: np.random.Generator, steps: int
) -> tuple[float, _Fit]:
    """Weighted EM from a k-means++ start; returns the mean log-likelihood and the fit.

    features: 1, u and the products of its coordinates, ``(1 + r + r (r + 1) / 2, n)``: both the log-densities and the
    moments are linear in them, so that a step is two matrix products.
    """
    n, r = u.shape
    rows, columns = np.triu_indices(r)
    double = np.where(rows == columns, 1.0, 2.0)
    means = np.empty((k, r))
    cumulative = np.cumsum(w)
    means[0] = u[min(int(np.searchsorted(cumulative, rng.random() * cumulative[-1])), n - 1)]
    distances = np.empty((k, n))
    distances[0] = np.sum((u - means[0]) ** 2, axis=1)
    for j in range(1, k):
        cumulative = np.cumsum(w * distances[:j].min(axis=0))
        means[j] = u[min(int(np.searchsorted(cumulative, rng.random() * cumulative[-1])), n - 1)]
        distances[j] = np.sum((u - means[j]) ** 2, axis=1)
    share = np.zeros((k, n))
    share[np.argmin(distances, axis=0), np.arange(n)] = 1.0

    def step(share: Floats) -> tuple[float, Floats, _Fit]:
        moments = (share * w) @ features.T
        mass = np.maximum(moments[:, 0], 1e-12)
        weights = np.maximum(mass / mass.sum(), 1e-9)
        weights /= weights.sum()
        moments /= mass[:, None]
        means = moments[:, 1 : r + 1]
        scatter = np.empty((k, r, r))
        scatter[:, rows, columns] = scatter[:, columns, rows] = moments[:, r + 1 :]
        scatter -= means[:, :, None] * means[:, None, :]
        # shrink to the diagonal as if r + 1 more points had been seen there
        pull = ((r + 1.0) / (mass * n_eff + r + 1.0))[:, None, None]
        scatter *= 1.0 - pull * (1.0 - np.eye(r))
        scatter += 1e-6 * np.eye(r)
        parts = _coefficients(weights, means, scatter, rows, columns, double) @ features
        density = _log_sum(parts)
        return float(w @ density), np.exp(parts - density), _Fit(weights, means, scatter)

    return expectation_maximisation(share, step, steps)


def _coefficients(
    weights: Floats,
    means: Floats,
    scatter: Floats,
    rows: NDArray[np.intp],
    columns: NDArray[np.intp],
    double: Floats,
) -> Floats:
    """Of the features in the log of weight times density of each component, ``(k, 1 + r + r (r + 1) / 2)``."""
    precision = np.linalg.inv(scatter)
    linear = np.einsum("kij,kj->ki", precision, means)
    constant = np.log(weights) - 0.5 * (np.linalg.slogdet(scatter)[1] + means.shape[1] * _LOG2PI)
    constant -= 0.5 * np.einsum("ki,ki->k", linear, means)
    return np.concatenate([constant[:, None], linear, -0.5 * double * precision[:, rows, columns]], axis=1)
