"""From weighted particles to a guide: candidates are fitted to one half, judged on the other, the best refitted.

The judge is the mean of log q − log φ over held-out particles (cross-entropy to the target); the winner always
gets a widened copy of itself and the prior as defensive parts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from probest import diagnostics
from probest.estimators.base import Floats
from probest.guides.base import Defensive, Guide, Prior
from probest.guides.mixture import Mixture, fit_mixture, informed_basis
from probest.guides.radial import Radial, fit_radial

__all__ = ["Fitted", "fit_guide", "refit_guide"]


@dataclass(frozen=True)
class Fitted:
    """A guide ready for use, and what it was made of. basis is None for a radial guide."""

    guide: Guide
    kind: str
    basis: Floats | None
    components: int


def fit_guide(
    z: Floats,
    log_w: Floats,
    rng: np.random.Generator,
    *,
    severity_grad: Floats | None = None,
    weight_grad: Floats | None = None,
    effective: float | None = None,
) -> Fitted:
    """The candidate (mixtures in subspaces of several sizes, radial) that predicts held-out particles best."""
    n, dim = z.shape
    bases: list[Floats] = []
    for threshold in (1.0, 0.15):
        basis = informed_basis(z, log_w, severity_grad, weight_grad, threshold=threshold)
        if not any(basis.shape == other.shape for other in bases):
            bases.append(basis)
    if 2 < dim <= 12 and n > 12 * dim:
        bases.append(np.eye(dim))
    fits: list[tuple[str, Floats | None]] = [("mixture", basis) for basis in bases]
    if dim >= 3:
        fits.append(("radial", None))
    scores = []
    half = np.arange(n) < n // 2
    alive = np.isfinite(log_w)
    for kind, basis in fits:
        score = 0.0
        for train in (half & alive, ~half & alive):
            test = alive & ~train
            if train.sum() < 8 or test.sum() < 1:
                continue
            part = _one(z[train], log_w[train], kind, basis, rng, None if effective is None else 0.5 * effective)
            w = np.exp(log_w[test] - diagnostics.log_sum_exp(log_w[test]))
            score -= float(w @ _defend(part).log_ratio(z[test]))
        scores.append(score)
    kind, basis = fits[int(np.argmax(scores))]
    return _fitted(_one(z[alive], log_w[alive], kind, basis, rng, effective), kind, basis)


def refit_guide(fitted: Fitted, z: Floats, log_w: Floats, rng: np.random.Generator, *, moments: bool = False) -> Fitted:
    """The same kind of guide, in the same subspace, fitted to another sample (cross-entropy step).

    moments: find the subspace anew from the sample's moments (where there never were gradients).
    """
    basis = fitted.basis
    if moments and basis is not None and z.shape[1] > 2:
        basis = informed_basis(z, log_w)
    return _fitted(_one(z, log_w, fitted.kind, basis, rng, None), fitted.kind, basis)


def _one(
    z: Floats, log_w: Floats, kind: str, basis: Floats | None, rng: np.random.Generator, effective: float | None
) -> Mixture | Radial:
    if basis is None:
        return fit_radial(z, log_w)
    return fit_mixture(z, log_w, basis, rng, effective=effective)


def _defend(part: Mixture | Radial) -> Defensive:
    return Defensive((part.widened(1.15), part.widened(2.0), Prior(part.dim)), (0.8, 0.17, 0.03))


def _fitted(part: Mixture | Radial, kind: str, basis: Floats | None) -> Fitted:
    return Fitted(_defend(part), kind, basis, len(part.weights))


