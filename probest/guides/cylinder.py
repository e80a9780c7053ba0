r"""A Gaussian mixture in the few directions that matter, and a distance from their subspace of its own.

With u = Bᵀz and ρ = ‖z − B u‖,

.. math:: \log \frac{\varphi(z)}{q(z)} = \log \frac{N(u; 0, I_r)}{\sum_k \pi_k N(u; m_k, S_k)}
          + \log \frac{\chi_{d-r}(\rho)}{f(\rho)},

f a Gaussian mixture in log ρ (:mod:`probest.guides.radial`) and χ the chi density. Where catastrophes lie within or
beyond a distance of a point that is not the origin, or severities grow with ‖z‖ (networks of ReLU do), all directions
matter a little: one number says what they have in common, where a mixture would need one for each.
It fails where directions outside the subspace matter by themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from probest.evidence import Floats
from probest.guides.base import Defensive, Prior
from probest.guides.mixture import Mixture, fit_mixture
from probest.guides.radial import Radial, fit_radius, log_length

__all__ = ["Cylinder", "fit_cylinder"]


@dataclass(frozen=True)
class Cylinder:
    """inside: the law of u; across: that of the other ``dim − r`` directions, which are alike."""

    inside: Mixture
    across: Radial

    @property
    def dim(self) -> int:
        return self.inside.dim

    @property
    def components(self) -> int:
        return self.inside.components

    def sample(self, n: int, rng: np.random.Generator) -> Floats:
        basis = self.inside.basis
        z = rng.standard_normal((n, self.dim))
        z -= (z @ basis) @ basis.T
        z *= (self.across.sample_radius(n, rng) / np.sqrt(np.einsum("ij,ij->i", z, z)))[:, None]
        z += self.inside.sample_inside(n, rng) @ basis.T
        return z

    def log_ratio(self, z: Floats) -> Floats:
        u = z @ self.inside.basis
        log_r = log_length(_square_across(z, u))
        return np.asarray(self.inside.log_density_ratio(u) + self.across.log_density_ratio(log_r))

    def widened(self, factor: float) -> Cylinder:
        """Every standard deviation within the subspace, and of log ρ, multiplied by ``factor``."""
        return Cylinder(self.inside.widened(factor), self.across.widened(factor))

    def defended(self) -> Defensive:
        """Slightly and much widened, the other directions as the adversary has them, and where else to look."""
        wide = self.inside.widened(1.15)
        parts = (self.widened(1.15), self.widened(2.0), wide, self.inside.around(), self.inside.mirrored())
        return Defensive((*parts, Prior(self.dim)), (0.74, 0.12, 0.05, 0.05, 0.02, 0.02))


def _square_across(z: Floats, u: Floats) -> Floats:
    return np.asarray(np.einsum("ij,ij->i", z, z) - np.einsum("ij,ij->i", u, u))


def fit_cylinder(
    z: Floats,
    log_w: Floats,
    basis: Floats,
    rng: np.random.Generator,
    *,
    effective: float | None = None,
    starts: int = 2,
) -> Cylinder:
    """The mixture in ``basis`` (:func:`~probest.guides.mixture.fit_mixture`), and the distance from it."""
    inside = fit_mixture(z, log_w, basis, rng, effective=effective, starts=starts)
    log_r = log_length(_square_across(z, z @ basis))
    return Cylinder(inside, fit_radius(log_r, log_w, z.shape[1] - basis.shape[1]))
