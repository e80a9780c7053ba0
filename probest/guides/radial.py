r"""A guide for shells: the direction uniform on the sphere, the radius fitted.

Where catastrophes surround the origin (‖z‖ ≥ R) no few directions matter and a Gaussian mixture would need
exponentially many components. In polar coordinates the problem is one-dimensional: with f the density of
r = ‖z‖, here a Gaussian mixture in log r,

.. math:: \log \varphi(z) - \log q(z) = \log \chi_d(r) - \log f(r),

χ_d the chi density of ``dim`` degrees of freedom; directions cancel.
It fails when the direction matters as well: the weights then say so (hits are rare).

Reference: Wang & Song (2016), Cross-entropy-based adaptive importance sampling using von Mises–Fisher mixture
for high dimensional reliability analysis (this is its uniform-direction case).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import special

from probest import diagnostics
from probest.evidence import Floats
from probest.guides.base import Defensive, Prior, stratify

__all__ = ["Radial", "fit_radial", "fit_radius", "log_length"]

_LOG2PI = math.log(2.0 * math.pi)


@dataclass(frozen=True)
class Radial:
    """log r is a mixture of normals: ``weights``, ``means``, ``scales``, each ``(k,)``."""

    dim: int
    weights: Floats
    means: Floats
    scales: Floats

    @property
    def components(self) -> int:
        return len(self.weights)

    def sample(self, n: int, rng: np.random.Generator) -> Floats:
        z = rng.standard_normal((n, self.dim))
        z *= (self.sample_radius(n, rng) / np.sqrt(np.einsum("ij,ij->i", z, z)))[:, None]
        return z

    def sample_radius(self, n: int, rng: np.random.Generator) -> Floats:
        """``(n,)`` radii."""
        kind = stratify(n, self.weights, rng)
        return np.asarray(np.exp(self.means[kind] + self.scales[kind] * rng.standard_normal(n)), dtype=np.float64)

    def log_ratio(self, z: Floats) -> Floats:
        return self.log_density_ratio(log_length(np.einsum("ij,ij->i", z, z)))

    def log_density_ratio(self, log_r: Floats) -> Floats:
        """log φ − log q at these log-radii ``(n,)``."""
        half = 0.5 * self.dim
        # densities of log r: the prior's (chi) and the guide's
        log_chi = self.dim * log_r - 0.5 * np.exp(2.0 * log_r) - (half - 1.0) * math.log(2.0) - special.gammaln(half)
        t = (log_r[:, None] - self.means) / self.scales
        parts = np.log(self.weights) - np.log(self.scales) - 0.5 * _LOG2PI - 0.5 * t * t
        return np.asarray(log_chi - special.logsumexp(parts, axis=1), dtype=np.float64)

    def with_wide_tails(self, share: float, factor: float) -> Radial:
        """This law with probability ``1 - share``, its copy widened by ``factor`` with the rest."""
        weights = np.concatenate([(1.0 - share) * self.weights, share * self.weights])
        scales = np.concatenate([self.scales, factor * self.scales])
        return Radial(self.dim, weights, np.concatenate([self.means, self.means]), scales)

    def widened(self, factor: float) -> Radial:
        """The same guide with every scale of log r multiplied by ``factor``."""
        return Radial(self.dim, self.weights, self.means, self.scales * factor)

    def defended(self) -> Defensive:
        """Slightly and much widened, and the prior."""
        return Defensive((self.widened(1.15), self.widened(2.0), Prior(self.dim)), (0.8, 0.17, 0.03))


def log_length(square: Floats) -> Floats:
    """log r of r² ``(n,)``, finite at 0."""
    return np.asarray(0.5 * np.log(np.maximum(square, 1e-300)), dtype=np.float64)


def fit_radial(z: Floats, log_w: Floats) -> Radial:
    """The radius of weighted points ``(n, dim)``."""
    return fit_radius(log_length(np.einsum("ij,ij->i", z, z)), log_w, z.shape[1])


def fit_radius(log_r: Floats, log_w: Floats, dim: int) -> Radial:
    """Two components cut at the weighted median of log r: a shell's radii are skewed, one normal wastes half."""
    w = np.exp(log_w - diagnostics.log_sum_exp(log_w))
    order = np.argsort(log_r, kind="stable")
    below = np.zeros(len(log_r), dtype=np.bool_)
    below[order] = np.cumsum(w[order]) <= 0.6
    overall = math.sqrt(max(float(w @ (log_r - float(w @ log_r)) ** 2), 1e-12))
    weights, means, scales = [], [], []
    for part in (below, ~below):
        mass = float(w[part].sum())
        if mass <= 0.0:
            continue
        centre = float(w[part] @ log_r[part]) / mass
        spread = math.sqrt(float(w[part] @ (log_r[part] - centre) ** 2) / mass)
        weights.append(mass)
        means.append(centre)
        scales.append(max(1.2 * spread, 0.25 * overall, 1e-4))
    total = np.array(weights)
    return Radial(dim, total / total.sum(), np.array(means), np.array(scales))
