r"""The failure-informed subspace: the few directions in which catastrophes differ from the adversary's draws.

It comes from gradients: eigenvectors of Σ w (β² g gᵀ + ∇ℓ ∇ℓᵀ), with g the unit severity gradient, β = z·g and ℓ the
log-weight of observed sites. Without gradients it comes from the particles' second moments, as far as those stand out
from noise.

It fails where every direction matters a little (a shell): all eigenvalues are then alike.

References: Uribe, Papaioannou, Marzouk & Straub (2021), Cross-entropy-based importance sampling with failure-informed
dimension reduction; El Masri, Morio & Simatos (2021), Improvement of the cross-entropy method in high dimension.
"""

from __future__ import annotations

import math

import numpy as np
import scipy

from probest import diagnostics
from probest.evidence import Floats

__all__ = ["gradient_rows", "informed_basis", "with_mean"]

_MAX_RANK = 24
_MAX_ROWS = 2000
_SURELY = 4.0  # standard deviations


def gradient_rows(z: Floats, log_w: Floats, severity_grad: Floats | None, weight_grad: Floats | None) -> Floats | None:
    """Rows R, at most two a point, with RᵀR = Σ w (β² g gᵀ + ∇ℓ ∇ℓᵀ); None where no gradient says anything."""
    w = np.exp(log_w - diagnostics.log_sum_exp(log_w))
    rows, owners = [], []
    if severity_grad is not None:
        norm = np.linalg.norm(severity_grad, axis=1)
        good = np.flatnonzero(np.isfinite(norm) & (norm > 0.0))
        if len(good) > 0.5 * len(z):
            unit = severity_grad[good] / norm[good, None]
            reach = np.maximum(1.0, np.abs(np.einsum("ij,ij->i", unit, z[good])))
            rows.append(unit * (np.sqrt(w[good]) * reach)[:, None])
            owners.append(good)
    if weight_grad is not None:
        good = np.flatnonzero(np.isfinite(weight_grad).all(axis=1))
        rows.append(weight_grad[good] * np.sqrt(w[good])[:, None])
        owners.append(good)
    if sum(map(len, rows)) == 0:
        return None
    # in the particles' order, so that half of the rows belongs to half of the particles
    return np.concatenate(rows)[np.argsort(np.concatenate(owners), kind="stable")]


def informed_basis(
    z: Floats, log_w: Floats, rows: Floats | None = None, *, threshold: float = 0.2, rank: int = _MAX_RANK
) -> Floats:
    """The ``(dim, r)`` basis of directions that a sample of the target differs from the prior in, r ≥ 1.

    rows: from :func:`gradient_rows`, at these points or at some of them; None goes by second moments.
    threshold: least eigenvalue kept, in units of the prior's variance. rank: the most directions.
    """
    n, dim = z.shape
    effective = diagnostics.effective_sample_size(log_w)
    most = int(max(1, min(dim, rank, effective / 6.0)))
    if dim <= 2:
        return np.eye(dim)
    if rows is not None and len(rows):
        value, vectors = _row_space(rows)
        kept = int(np.clip(np.count_nonzero(value >= threshold), 1, most))
        return np.ascontiguousarray(vectors[:, :kept])
    w = np.exp(log_w - diagnostics.log_sum_exp(log_w))
    if n > _MAX_ROWS:
        keep = np.argsort(-w, kind="stable")[:_MAX_ROWS]
        z, w = z[keep], w[keep] / w[keep].sum()
    return _moment_basis(z, w, effective, most)


def with_mean(basis: Floats, z: Floats, log_w: Floats, effective: float | None = None) -> Floats:
    """The basis, and the direction of what it leaves of the sample's mean, where that is no chance.

    Of several limits the gradient is that of one, the nearest in its own units: limits that have large ones are seldom
    it, and what they demand shows in the mean alone. effective: how many independent points the sample is worth, where
    less than its effective sample size.
    """
    free = z.shape[1] - basis.shape[1]
    if free == 0:
        return basis
    enough = min(effective or math.inf, diagnostics.effective_sample_size(log_w))
    mean = np.exp(log_w - diagnostics.log_sum_exp(log_w)) @ z
    mean -= basis @ (basis.T @ mean)
    square = float(mean @ mean)
    if enough * square <= free + _SURELY * math.sqrt(2.0 * free):  # chi-square's mean and deviation
        return basis
    return np.column_stack([basis, mean / math.sqrt(square)])


def _row_space(rows: Floats) -> tuple[Floats, Floats]:
    """Eigenvalues of RᵀR, largest first, and orthonormal eigenvectors as columns, by the smaller Gram matrix."""
    m, dim = rows.shape
    if m >= dim:
        value, vectors = np.linalg.eigh(rows.T @ rows)
        return value[::-1], vectors[:, ::-1]
    value, left = np.linalg.eigh(rows @ rows.T)
    value, left = value[::-1], left[:, ::-1]
    rank = max(1, int(np.count_nonzero(value > 1e-10 * max(value[0], 1e-300))))
    vectors = np.linalg.qr(rows.T @ left[:, :rank])[0]
    return value[:rank], vectors


def _moment_basis(z: Floats, w: Floats, effective: float, most: int) -> Floats:
    """Leading directions of Σ w z zᵀ that exceed what noise in ``effective`` samples would give."""
    n, dim = z.shape
    _, singular, vt = scipy.linalg.svd(z * np.sqrt(w)[:, None], full_matrices=False, check_finite=False)
    value = singular**2
    edge = (1.0 + math.sqrt(dim / max(effective, 1.0))) ** 2
    information = 0.5 * (value - 1.0 - np.log(np.maximum(value, 1e-12)))
    below = (1.0 - math.sqrt(dim / effective)) ** 2 if effective > dim else -1.0
    matters = (value > edge) | ((value < 0.8 * below) & (n > dim))
    order = np.argsort(-np.where(matters, information, -1.0), kind="stable")
    rank = int(np.clip(np.count_nonzero(matters), 1, most))
    return np.ascontiguousarray(vt[order[:rank]].T)
