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
    rows: Floats | None = None,
    effective: float | None = None,
) -> Fitted:
    """The candidate (mixtures in subspaces of several sizes, radial) that predicts held-out particles best."""
    n, dim = z.shape
    alive = np.isfinite(log_w)
    half = np.arange(n) < n // 2
    kinds: list[tuple[str, float]] = [("mixture", 1.0), ("mixture", 0.15)]
    if 2 < dim <= 12 and n > 12 * dim:
        kinds.append(("mixture", 0.0))
    if dim >= 3:
        kinds.append(("radial", 0.0))
    else:
        kinds = kinds[:1]
    scores = np.zeros(len(kinds))
    for first in (True, False):
        # the subspace is part of the fit: found from the training half alone, or it would recognise the other
        train = (half if first else ~half) & alive
        test = alive & ~train
        if train.sum() < 8 or test.sum() < 1:
            continue
        middle = 0 if rows is None else len(rows) // 2
        part_rows = None if rows is None else rows[:middle] if first else rows[middle:]
        if part_rows is not None:
            part_rows = part_rows * np.sqrt(2.0)
        w = np.exp(log_w[test] - diagnostics.log_sum_exp(log_w[test]))
        known: dict[int, float] = {}
        for i, (kind, threshold) in enumerate(kinds):
            basis = _basis(kind, threshold, z[train], log_w[train], part_rows)
            rank = -1 if basis is None else basis.shape[1]
            if rank not in known:
                enough = None if effective is None else 0.5 * effective
                part = _one(z[train], log_w[train], basis, rng, enough)
                known[rank] = float(w @ _defend(part).log_ratio(z[test]))
            scores[i] -= known[rank]
    kind, threshold = kinds[int(np.argmax(scores))]
    basis = _basis(kind, threshold, z[alive], log_w[alive], rows)
    return _fitted(_one(z[alive], log_w[alive], basis, rng, effective), kind, basis)


def _basis(kind: str, threshold: float, z: Floats, log_w: Floats, rows: Floats | None) -> Floats | None:
    if kind == "radial":
        return None
    if threshold == 0.0:
        return np.eye(z.shape[1])
    return informed_basis(z, log_w, rows, threshold=threshold)


def refit_guide(fitted: Fitted, z: Floats, log_w: Floats, rng: np.random.Generator, *, moments: bool = False) -> Fitted:
    """The same kind of guide, in the same subspace, fitted to another sample (cross-entropy step).

    moments: find the subspace anew from the sample's moments (where there never were gradients).
    """
    basis = fitted.basis
    if moments and basis is not None and z.shape[1] > 2:
        basis = informed_basis(z, log_w)
    return _fitted(_one(z, log_w, basis, rng, None), fitted.kind, basis)


def _one(
    z: Floats, log_w: Floats, basis: Floats | None, rng: np.random.Generator, effective: float | None
) -> Mixture | Radial:
    if basis is None:
        return fit_radial(z, log_w)
    return fit_mixture(z, log_w, basis, rng, effective=effective)


def _defend(part: Mixture | Radial) -> Defensive:
    """The fit, slightly and much widened, and where else to look: opposite the fit, all around it, and the prior."""
    if isinstance(part, Radial):
        return Defensive((part.widened(1.15), part.widened(2.0), Prior(part.dim)), (0.8, 0.17, 0.03))
    parts = (part.widened(1.15), part.widened(2.0), part.around(), part.mirrored(), Prior(part.dim))
    return Defensive(parts, (0.78, 0.13, 0.05, 0.02, 0.02))


def _fitted(part: Mixture | Radial, kind: str, basis: Floats | None) -> Fitted:
    return Fitted(_defend(part), kind, basis, len(part.weights))
