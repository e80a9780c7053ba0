r"""A normalizing flow in the few directions that matter, the standard normal in all others.

With B the basis of the failure-informed subspace, u = Bᵀz and v = L⁻¹(u − m) (m and LLᵀ the mean and covariance of the
particles there), the density of v is a neural spline flow's, fitted by weighted maximum likelihood with a part of the
particles held out. The flow comes from zuko (torch) or from flowjax (JAX), whichever is asked for; its base noise is
drawn by NumPy and its first weights are always the same, so that the same seed gives the same samples. A Gaussian
mixture in the same subspace is the flow's companion: widened, it keeps what the flow leaves too thin.

A flow bends around curved and banana-shaped events where a mixture needs many components, and costs seconds to fit: it
is never a default. It fails where modes lie far apart (thin bridges between them waste samples, and one may be missed)
and where particles are few.

References: Durkan, Bekasov, Murray & Papamakarios (2019), Neural spline flows; Gao, Isaacson & Krause (2020),
i-flow; Uribe, Papaioannou, Marzouk & Straub (2021) for the subspace.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from probest import diagnostics
from probest.evidence import Floats
from probest.guides.base import Defensive, Prior
from probest.guides.mixture import Mixture, fit_mixture

__all__ = ["FLOWS", "Flow", "check_installed", "fit_flow"]

FLOWS = {
    "zuko": ("probest.backends.flow_torch", "flows-torch"),
    "flowjax": ("probest.backends.flow_jax", "flows-jax"),
}
_LOG2PI = math.log(2.0 * math.pi)
_HELD_OUT = 0.2
_LEARNING_RATE, _PATIENCE = 0.01, 8


class Density(Protocol):
    """A fitted flow on ``(n, r)`` points, as the push-forward of standard normals."""

    def push(self, x: Floats) -> Floats: ...

    def log_density(self, v: Floats) -> Floats: ...


@dataclass(frozen=True)
class Flow:
    """density: of v; basis ``(dim, r)``; centre ``(r,)``; factor ``(r, r)`` lower Cholesky; companion: a mixture."""

    density: Density
    basis: Floats
    centre: Floats
    factor: Floats
    companion: Mixture

    @property
    def dim(self) -> int:
        return int(self.basis.shape[0])

    @property
    def components(self) -> int:
        return 1

    def sample(self, n: int, rng: np.random.Generator) -> Floats:
        z = rng.standard_normal((n, self.dim))
        # the coordinates inside are the flow's base noise
        inside = z @ self.basis
        u = self.centre + self.density.push(inside) @ self.factor.T
        z += (u - inside) @ self.basis.T
        return z

    def log_ratio(self, z: Floats) -> Floats:
        u = z @ self.basis
        v = np.linalg.solve(self.factor, (u - self.centre).T).T
        log_q = self.density.log_density(np.ascontiguousarray(v)) - np.sum(np.log(np.diagonal(self.factor)))
        log_q = np.where(np.isnan(log_q), -np.inf, log_q)  # where a network overflows, the other parts remain
        reference = -0.5 * np.einsum("ij,ij->i", u, u) - 0.5 * u.shape[1] * _LOG2PI
        return np.asarray(reference - log_q, dtype=np.float64)

    def defended(self) -> Defensive:
        """The flow, its companion slightly and much widened, all around, opposite, and the prior."""
        fit = self.companion
        parts = (self, fit.widened(1.15), fit.widened(2.0), fit.around(), fit.mirrored(), Prior(self.dim))
        return Defensive(parts, (0.6, 0.18, 0.13, 0.05, 0.02, 0.02))


def check_installed(library: str) -> None:
    """Raise ValueError, saying what to install, unless the library of these flows is there."""
    if importlib.util.find_spec(library) is None:
        raise ValueError(f"guides: {library} is not installed: pip install 'probest[{FLOWS[library][1]}]'")


def fit_flow(
    library: str,
    z: Floats,
    log_w: Floats,
    basis: Floats,
    rng: np.random.Generator,
    *,
    effective: float | None = None,
    steps: int = 400,
) -> Flow:
    """A flow of ``library`` (``zuko`` or ``flowjax``) in ``basis`` by weighted maximum likelihood.

    z ``(n, dim)``; log_w ``(n,)``; effective: see :func:`probest.guides.mixture.fit_mixture`. steps: of Adam, at most.
    Imports the library; raises ValueError where it is not installed.
    """
    check_installed(library)
    module = importlib.import_module(FLOWS[library][0])
    companion = fit_mixture(z, log_w, basis, rng, effective=effective)
    u, w = z @ basis, np.exp(log_w - diagnostics.log_sum_exp(log_w))
    centre = w @ u
    r = basis.shape[1]
    covariance = (w[:, None] * (u - centre)).T @ (u - centre)
    factor = np.linalg.cholesky(covariance + (1e-6 * np.trace(covariance) / r + 1e-12) * np.eye(r))
    v = np.linalg.solve(factor, (u - centre).T).T
    order = rng.permutation(len(v))
    cut = max(1, int(_HELD_OUT * len(v)))
    parts = [(v[rows], w[rows] / max(w[rows].sum(), 1e-300)) for rows in (order[cut:], order[:cut])]
    density: Density = module.fit_flow(*parts, steps=steps, learning_rate=_LEARNING_RATE, patience=_PATIENCE)
    return Flow(density, basis, centre, factor, companion)
