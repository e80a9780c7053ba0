r"""A quadratic model of a mode's boundary, learnt from roots and gradients on a few lines.

Along direction a the boundary is a graph, :math:`r = r^\ast(u)` over the coordinates u of :math:`z_\perp` that
matter; its slopes are :math:`-\nabla_\perp s / (a \cdot \nabla s)`, so one gradient tells as much as a root in every
coordinate. The model r̂(u) = c + g·u + ½ uᵀKu is fitted by least squares to roots and slopes, with the curvature
pulled towards the mean one. It serves as a guess of roots, gives a proposal close to
:math:`\varphi(u)\,\Phi(-\hat r(u))`, and a control variate. None of this has to be right: fresh lines measure what the
model misses.

Reference: Der Kiureghian, Lin & Hwang (1987), Second-order reliability approximations (a boundary fitted by points);
Hohenbichler & Rackwitz (1988).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from probest import diagnostics
from probest.evidence import Floats
from probest.guides.base import Defensive, Guide, Prior
from probest.guides.mixture import Mixture
from probest.lines.tuning import LineTuning

__all__ = ["Boundary", "Proposal", "fit_boundary", "propose"]


class Boundary(NamedTuple):
    """basis ``(dim, r)``, orthonormal and orthogonal to the direction; constant, linear ``(r,)``, curvature ``(r, r)``.

    least: the boundary is not believed to come nearer than this.
    """

    basis: Floats
    constant: float
    linear: Floats
    curvature: Floats
    least: float

    def root(self, u: Floats) -> Floats:
        """Where lines at coordinates u ``(n, r)`` enter the event, by the model."""
        bend = np.einsum("ij,jk,ik->i", u, self.curvature, u)
        return np.asarray(np.maximum(self.constant + u @ self.linear + 0.5 * bend, self.least), dtype=np.float64)

    def crossing(self, level: Floats, rise: float, u: Floats, drift: Floats) -> Floats:
        """Where points that move as level + rise · r along the direction, u + drift · r across it, enter the event.

        level ``(n,)``, u ``(n, r)``; inf where they do not, or approach it from behind.
        """
        bent = self.curvature @ drift
        a = -0.5 * float(drift @ bent)
        b = rise - float(self.linear @ drift) - u @ bent
        c = level - self.constant - u @ self.linear - 0.5 * np.einsum("ij,jk,ik->i", u, self.curvature, u)
        with np.errstate(all="ignore"):
            upward = -2.0 * c / (b + np.sqrt(b * b - 4.0 * a * c))
        return np.asarray(np.where(np.isfinite(upward) & (b > 0.0), upward, np.inf), dtype=np.float64)


def fit_boundary(
    offset: Floats,
    root: Floats,
    slopes: Floats,
    weight: Floats,
    rate: float,
    others: Floats,
    tuning: LineTuning,
) -> Boundary:
    """The model from lines with roots.

    offset ``(n, dim)``; root ``(n,)``; slopes ``(n, dim)``: of the boundary at the line, nan rows where not known;
    weight ``(n,)``: how much each line counts, at most 1; rate: nats a unit of r; others ``(k, dim)``: directions that
    the basis shall span in any case.
    """
    known = np.isfinite(slopes).all(axis=1)
    basis = _basis(offset, slopes[known], weight[known], rate, others, tuning)
    u = offset @ basis
    r = basis.shape[1]
    n = len(root)
    pairs = [(i, j) for i in range(r) for j in range(i, r)]
    square = (
        np.stack([u[:, i] * u[:, j] * (0.5 if i == j else 1.0) for i, j in pairs], axis=1) if r else np.empty((n, 0))
    )
    # unknowns: constant, linear, mean curvature, deviations from it (pulled to zero)
    bowl = 0.5 * np.sum(u**2, axis=1, keepdims=True)
    rows = [np.column_stack([np.ones(n), u, bowl, square]) * weight[:, None]]
    values = [root * weight]
    if r and known.any():
        v, w, at = slopes[known] @ basis, weight[known], u[known]
        for c in range(r):
            bend = np.zeros((len(at), len(pairs)))
            for p, (i, j) in enumerate(pairs):
                if i == c:
                    bend[:, p] = at[:, j]
                elif j == c:
                    bend[:, p] = at[:, i]
            unit = np.zeros((len(at), r))
            unit[:, c] = 1.0
            rows.append(np.column_stack([np.zeros(len(at)), unit, at[:, c], bend]) * w[:, None])
            values.append(v[:, c] * w)
    matrix, target = np.concatenate(rows), np.concatenate(values)
    pull = np.zeros((1 + len(pairs), matrix.shape[1]))
    pull[0, 1 + r] = 0.05
    pull[1:, 2 + r :] = tuning.ridge * np.eye(len(pairs)) * math.sqrt(max(1.0, len(pairs) / max(len(target), 1)))
    matrix = np.concatenate([matrix, pull])
    answer = np.linalg.lstsq(matrix, np.concatenate([target, np.zeros(len(pull))]), rcond=None)[0]
    curvature = np.zeros((r, r))
    for value, (i, j) in zip(answer[2 + r :], pairs, strict=True):
        curvature[i, j] = curvature[j, i] = value
    curvature += answer[1 + r] * np.eye(r)
    return Boundary(basis, float(answer[0]), answer[1 : 1 + r], curvature, float(np.min(root)) - tuning.nearer / rate)


def _basis(offset: Floats, slopes: Floats, weight: Floats, rate: float, others: Floats, tuning: LineTuning) -> Floats:
    """Coordinates that the boundary depends on: the span of slopes that matter, and of the other modes' directions."""
    dim = offset.shape[1]
    parts = [others[np.linalg.norm(others, axis=1) > 1e-6]]
    if len(slopes):
        _, size, rows = np.linalg.svd(slopes * (weight / math.sqrt(len(slopes)))[:, None] * rate, full_matrices=False)
        parts.append(rows[size**2 > tuning.matters])
    span = np.concatenate(parts)[: tuning.coordinates]
    if not len(span):
        return np.empty((dim, 0))
    q, size, _ = np.linalg.svd(span.T, full_matrices=False)
    return np.ascontiguousarray(q[:, size > 1e-8 * size[0]])


class Proposal(NamedTuple):
    """A proposal and what the model alone says.

    log_mean: log of the integral of φ(u) f̂(u), with its relative error. spread: relative standard deviation of the
    weights that the proposal would have if the model were right. unseen: share of the integral further out than any
    line that the model was fitted to.
    """

    guide: Guide
    log_mean: float
    error: float
    spread: float
    unseen: float


def propose(
    boundary: Boundary,
    log_mass: Callable[[Floats], Floats],
    seen: Floats,
    rng: np.random.Generator,
    tuning: LineTuning,
) -> Proposal:
    """A proposal for the model's own target φ(u) f̂(u); no model calls.

    log_mass: log f̂ at coordinates ``(n, r)``. seen ``(m, r)``: where the model was fitted. The Gaussian that matches
    the target's moments is found by iterated importance sampling, and widened.
    """
    dim, r = boundary.basis.shape
    if r == 0:
        return Proposal(Prior(dim), float(log_mass(np.zeros((1, 0)))[0]), 0.0, 0.0, 0.0)
    normal = around = Mixture(boundary.basis, np.ones(1), np.zeros((1, r)), np.eye(r)[None])
    coarse = max(tuning.coarse_cloud, tuning.cloud_rank * r)
    for width in (1.5, 1.3, 1.2, 1.2):
        wide = normal.widened(width)
        u = wide.sample_inside(coarse, rng)
        log_w = wide.log_density_ratio(u) + log_mass(u)
        total = diagnostics.log_sum_exp(log_w)
        if not math.isfinite(total):
            break
        w = np.exp(np.minimum(log_w - total, math.log(20.0 / coarse)))
        w /= w.sum()
        mean = w @ u
        scatter = ((u - mean) * w[:, None]).T @ (u - mean)
        scatter = 0.95 * scatter + 0.05 * np.diag(np.diag(scatter)) + 1e-6 * np.eye(r)
        factor = np.asarray(np.linalg.cholesky(scatter), dtype=np.float64)
        normal = Mixture(boundary.basis, np.ones(1), mean[None], factor[None])
    inner, shares = (normal.widened(1.15), normal.widened(1.8), around), (0.75, 0.15, 0.1)
    counts = [int(share * tuning.cloud) for share in shares]
    u = np.concatenate([part.sample_inside(count, rng) for part, count in zip(inner, counts, strict=True)])
    log_q = [math.log(share) - part.log_density_ratio(u) for part, share in zip(inner, shares, strict=True)]
    log_w = log_mass(u) - np.logaddexp.reduce(log_q)
    log_mean, error = diagnostics.log_mean_exp(log_w)
    reach = np.max(_distance(normal, seen), initial=0.0)
    unseen = math.exp(
        min(0.0, diagnostics.log_sum_exp(log_w[_distance(normal, u) > reach]) - diagnostics.log_sum_exp(log_w))
    )
    return Proposal(Defensive((*inner[:2], Prior(dim)), shares), log_mean, error, error * math.sqrt(len(u)), unseen)


def _distance(normal: Mixture, u: Floats) -> Floats:
    """Mahalanobis distances from a one-component mixture."""
    steps = np.linalg.solve(normal.factors[0], (u - normal.means[0]).T)
    return np.asarray(np.sqrt(np.sum(steps**2, axis=0)), dtype=np.float64)
