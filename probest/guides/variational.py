r"""A Gaussian guide, variational bounds of log P that it gives, and their gradients in the guide.

*Guide*: :math:`z = \mu + \varepsilon + V(A - 1)V^\top \varepsilon`, ε standard normal: a mean, and a triangular A in
the few directions V that matter; in all others its law is that of the adversary's coordinates.

*Bound*: of a softened event, whose factor g lies between 0 and 1 (:mod:`probest.smc.softening`), with log-weights
:math:`\ell = \log \varphi + \log w + \log g(s) - \log q` of draws of the guide in groups of K,

.. math:: L_\alpha = \frac{1}{1 - \alpha} \log \frac1K \sum_{k \le K} e^{(1 - \alpha) \ell_k} .

α = 1 is the evidence lower bound (the mean of ℓ), α = 0 that of K draws under one logarithm; both are below
:math:`\log E_\varphi[w g]` in expectation, the second nearer. α < 0 goes to an upper bound as K grows (−1: that of χ²);
of few draws it is too low, and a guide that steps it down collapses.

*Gradients* in the guide, with :math:`\tilde u` the softmax of (1 − α) ℓ in its group:

- ``total``: :math:`\sum \tilde u\, d\ell`, the derivative of L as it is at the same ε.
- ``sticking``: its path through z alone. Right on average for α = 1, where what is left out has mean 0; for a guide
  that fits, it has no variance.
- ``doubly``: what is left out, reparameterised once more: :math:`\sum (\alpha \tilde u + (1 - \alpha) \tilde u^2)
  \,\partial_z \ell \, dz`. Right on average for every α, and its noise does not drown it as K grows. For α = 1 the same
  as ``sticking``.

In the model the gradient is :math:`\sum \tilde u\, \partial \log g(s)`: a mean over the draws with weights ũ.

References: Roeder, Wu & Duvenaud (2017), Sticking the landing; Tucker, Lawson, Gu & Maddison (2019), Doubly
reparameterized gradient estimators for Monte Carlo objectives; Burda, Grosse & Salakhutdinov (2016), Importance
weighted autoencoders; Li & Turner (2016), Rényi divergence variational inference; Kingma & Ba (2015), Adam.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from scipy.linalg import solve_triangular

from probest import diagnostics
from probest.budget import Meter
from probest.evidence import Evaluation, Floats, Particles
from probest.guides.base import Defensive, Prior
from probest.tuning import tuned

if TYPE_CHECKING:
    from probest.smc.softening import Softening

__all__ = [
    "Adam",
    "BoundGradient",
    "GaussianGuide",
    "Gradient",
    "bound_gradient",
    "climbed",
    "gradient_at",
    "informed",
    "upper_gradient",
]

Gradient = Literal["total", "sticking", "doubly"]

_STEEPEST = 1e150  # slope of a softening, beyond which nothing is known


@dataclass(frozen=True)
class GaussianGuide:
    """mean ``(dim,)``; basis V ``(dim, r)``, orthonormal columns; factor A ``(r, r)``, lower triangular, diagonal > 0.

    The law of μ + ε + V(A − 1)Vᵀε, ε standard normal.
    """

    mean: Floats
    basis: Floats
    factor: Floats

    @classmethod
    def standard(cls, mean: Floats, basis: Floats) -> GaussianGuide:
        """The law of the adversary's coordinates, moved to a mean."""
        return cls(mean, basis, np.eye(basis.shape[1]))

    @property
    def dim(self) -> int:
        return len(self.mean)

    @property
    def components(self) -> int:
        return 1

    def defended(self) -> Defensive:
        """With a share of wider draws, and of the prior."""
        wide = replace(self, factor=1.5 * np.maximum(self.factor, np.diag(np.full(len(self.factor), 0.3))))
        return Defensive((self, wide, Prior(self.dim)), (0.8, 0.1, 0.1))

    def at(self, noise: Floats) -> Floats:
        """z ``(n, dim)`` from ε."""
        inner = noise @ self.basis
        return np.asarray(self.mean + noise + (inner @ self.factor.T - inner) @ self.basis.T)

    def noise(self, z: Floats) -> Floats:
        """ε ``(n, dim)`` of z."""
        off = z - self.mean
        inner = off @ self.basis
        return np.asarray(off + (self._solved(inner) - inner) @ self.basis.T)

    def sample(self, n: int, rng: np.random.Generator) -> Floats:
        return self.at(rng.standard_normal((n, self.dim)))

    def log_ratio(self, z: Floats) -> Floats:
        noise = self.noise(z)
        stretched = float(np.log(np.diag(self.factor)).sum())
        return np.asarray(0.5 * np.sum(noise**2 - z**2, axis=1) + stretched)

    def slope(self, noise: Floats) -> Floats:
        """∂ log q / ∂z ``(n, dim)`` at the z of ε."""
        inner, back = self._back(noise)
        return np.asarray(-noise - (back - inner) @ self.basis.T)

    def pulled(self, noise: Floats, along: Floats) -> GaussianGuide:
        """What ``(n, dim)`` derivatives along z come to in the mean and the factor, summed over draws."""
        inner = noise @ self.basis
        return replace(self, mean=along.sum(axis=0), factor=np.tril((along @ self.basis).T @ inner))

    def score(self, noise: Floats, weight: Floats) -> GaussianGuide:
        """Derivative of Σ weight · log q in the mean and the factor, at fixed z."""
        inner, back = self._back(noise)
        factor = np.tril((weight[:, None] * back).T @ inner) - weight.sum() * np.diag(1.0 / np.diag(self.factor))
        return replace(self, mean=-(weight @ self.slope(noise)), factor=factor)

    def turned(self, basis: Floats) -> GaussianGuide:
        """The same mean, and the covariance as far as another basis can hold it."""
        inner = basis.T @ self.basis
        covariance = np.eye(basis.shape[1]) + inner @ (self.factor @ self.factor.T - np.eye(len(self.factor))) @ inner.T
        factor: Floats = np.asarray(np.linalg.cholesky(covariance), dtype=np.float64)
        return GaussianGuide(self.mean, basis, factor)

    def _back(self, noise: Floats) -> tuple[Floats, Floats]:
        """Vᵀε, and what A⁻ᵀ makes of it."""
        inner = noise @ self.basis
        return inner, np.asarray(solve_triangular(self.factor, inner.T, lower=True, trans="T").T)

    def _solved(self, inner: Floats) -> Floats:
        return np.asarray(solve_triangular(self.factor, inner.T, lower=True).T)


class BoundGradient(NamedTuple):
    """A bound and its gradient.

    value: the bound, a mean over groups; error: its standard error. guide: the derivatives in mean and factor, as a
    guide. z ``(n, dim)``, severity ``(n,)``; weight ``(n,)``: ũ, which sum to 1: of each draw in the model's gradient.
    """

    value: float
    error: float
    guide: GaussianGuide
    z: Floats
    severity: Floats
    weight: Floats


def bound_gradient(
    meter: Meter,
    guide: GaussianGuide,
    noise: Floats,
    soft: Softening,
    *,
    draws: int,
    alpha: float = 0.0,
    kind: Gradient = "doubly",
) -> BoundGradient:
    """The bound of a softened event at draws ε ``(n, dim)`` of a guide, and its gradient: 3 calls a draw.

    draws: K; n is a multiple of it.
    Raises ValueError for another n, for ``alpha`` above 1, and for ``sticking`` where it is biased (``alpha`` below 1).
    """
    z = guide.at(noise)
    return gradient_at(guide, noise, z, meter.evaluate(z, gradient=True), soft, draws=draws, alpha=alpha, kind=kind)


def gradient_at(
    guide: GaussianGuide,
    noise: Floats,
    z: Floats,
    found: Evaluation,
    soft: Softening,
    *,
    draws: int,
    alpha: float = 0.0,
    kind: Gradient = "doubly",
) -> BoundGradient:
    """As :func:`bound_gradient`, from what the event says at the draws z ``(n, dim)``, gradients included."""
    n = len(noise)
    if n < 1 or n % draws:
        raise ValueError(f"noise has {n} rows: expected a multiple of draws={draws}")
    if not alpha <= 1.0:
        raise ValueError(f"alpha={alpha!r}: expected a number up to 1")
    if kind == "sticking" and alpha < 1.0 and draws > 1:
        raise ValueError("kind='sticking' is biased for alpha below 1: use 'doubly'")
    log_w = guide.log_ratio(z) + soft.log(found.severity) + found.log_weight
    along = _along(guide, noise, z, found, soft)
    share, groups = _shares(log_w, draws, alpha)
    path = share if kind != "doubly" else alpha * share + (1.0 - alpha) * groups * share**2
    slope = guide.pulled(noise, path[:, None] * along)
    if kind == "total":
        explicit = guide.score(noise, share)
        slope = replace(slope, mean=slope.mean - explicit.mean, factor=slope.factor - explicit.factor)
    value, error = _bound(log_w, draws, alpha)
    return BoundGradient(value, error, slope, z, found.severity, share)


def upper_gradient(guide: GaussianGuide, particles: Particles, log_g: Floats) -> tuple[float, GaussianGuide]:
    """The upper bound E[log φ + log g − log q] over draws of the posterior, and its gradient in the guide.

    log_g ``(n,)``: of the softened event at the particles, with the log-weight where there is one. What does not depend
    on the guide is no part of the gradient.
    """
    weight = np.exp(particles.log_weight - diagnostics.log_sum_exp(particles.log_weight))
    score = guide.score(guide.noise(particles.z), weight)
    value = float(weight @ (guide.log_ratio(particles.z) + log_g))
    return value, replace(score, mean=-score.mean, factor=-score.factor)


def climbed(
    meter: Meter, guide: GaussianGuide, softs: Sequence[Softening], rng: np.random.Generator, *, batch: int, draws: int
) -> GaussianGuide:
    """The guide after a step up its bound under each softening in turn: 3 · batch calls a step.

    The rate falls to nothing over the last half of them.
    """
    adam, count = Adam.of(guide), len(softs)
    for i, soft in enumerate(softs):
        noise = rng.standard_normal((batch, guide.dim))
        found = bound_gradient(meter, guide, noise, soft, draws=draws)
        guide = adam.step(guide, found.guide, share=min(1.0, 2.0 * (1.0 - i / count)))
    return guide


def informed(slopes: Floats, rank: int) -> Floats:
    """``(dim, r)`` orthonormal directions in which most of these gradients ``(n, dim)``, each of length 1, lie."""
    norm = np.linalg.norm(slopes, axis=1)
    usable = np.isfinite(norm) & (norm > 0.0)
    dim = slopes.shape[1]
    if not usable.any():
        return np.eye(dim)[:, : min(rank, dim)]
    _, _, rows = np.linalg.svd(slopes[usable] / norm[usable][:, None], full_matrices=False)
    return np.ascontiguousarray(rows[: min(rank, dim)].T)


@dataclass(frozen=True)
class AdamTuning:
    """Steps of a guide. The decays are those of the paper, for gradients as noisy as these."""

    rate: float = tuned(0.1, "of a mean, in standard deviations a step", "bounds.py --parts gradients")
    first: float = tuned(0.8, "of the mean gradient that stays a step", "bounds.py --parts gradients")
    second: float = tuned(0.95, "of its mean square", "bounds.py --parts gradients")


@dataclass
class Adam:
    """Ascent of a guide; its state is part of a checkpoint, so that a resumed run goes on as it would have."""

    mean: Floats
    square: Floats
    steps: int = 0
    tuning: AdamTuning = field(default_factory=AdamTuning, repr=False)

    @classmethod
    def of(cls, guide: GaussianGuide) -> Adam:
        size = len(_packed(guide, guide))
        return cls(np.zeros(size), np.zeros(size))

    def step(self, guide: GaussianGuide, slope: GaussianGuide, share: float = 1.0) -> GaussianGuide:
        """The guide one step up; share: of the rate. A gradient that is not finite is none."""
        gradient = _packed(slope, guide)
        if not np.isfinite(gradient).all():
            return guide
        tuning = self.tuning
        self.steps += 1
        self.mean = tuning.first * self.mean + (1.0 - tuning.first) * gradient
        self.square = tuning.second * self.square + (1.0 - tuning.second) * gradient**2
        ahead = self.mean / (1.0 - tuning.first**self.steps)
        size = np.sqrt(self.square / (1.0 - tuning.second**self.steps))
        return _moved(guide, share * tuning.rate * ahead / np.maximum(size, 1e-12))


def _packed(slope: GaussianGuide, guide: GaussianGuide) -> Floats:
    """Derivatives in the mean, in A below its diagonal, and in the logarithms of its diagonal."""
    below = slope.factor[np.tril_indices(len(slope.factor), -1)]
    return np.concatenate([slope.mean, below, np.diag(slope.factor) * np.diag(guide.factor)])


def _moved(guide: GaussianGuide, step: Floats) -> GaussianGuide:
    rank = len(guide.factor)
    mean, below, stretch = np.split(step, [guide.dim, len(step) - rank])
    factor = guide.factor.copy()
    factor[np.tril_indices(rank, -1)] += below
    diagonal = np.clip(np.diag(guide.factor) * np.exp(np.clip(stretch, -0.3, 0.3)), 1e-3, 10.0)
    factor[np.diag_indices(rank)] = diagonal
    return replace(guide, mean=guide.mean + mean, factor=factor)


def _along(guide: GaussianGuide, noise: Floats, z: Floats, found: Evaluation, soft: Softening) -> Floats:
    """∂ℓ / ∂z, ``(n, dim)``."""
    assert found.severity_grad is not None
    with np.errstate(all="ignore"):
        slope = np.minimum(soft.slope(found.severity), _STEEPEST)[:, None] * found.severity_grad
    along = np.where(np.isfinite(slope), slope, 0.0) - z - guide.slope(noise)
    if found.log_weight_grad is not None:
        along = along + np.where(np.isfinite(found.log_weight_grad), found.log_weight_grad, 0.0)
    return np.asarray(along)


def _shares(log_w: Floats, draws: int, alpha: float) -> tuple[Floats, int]:
    """ũ over all groups, which sum to 1, and the number of groups."""
    groups = log_w.reshape(-1, draws)
    with np.errstate(invalid="ignore"):
        scaled = (
            np.where(np.isfinite(groups), (1.0 - alpha) * groups, -np.inf) if alpha < 1.0 else np.zeros_like(groups)
        )
    top = scaled.max(axis=1, keepdims=True)
    share = np.exp(scaled - np.where(np.isfinite(top), top, 0.0))
    total = share.sum(axis=1, keepdims=True)
    share = np.where(total > 0.0, share / np.where(total > 0.0, total, 1.0), 1.0 / draws)
    return (share / len(groups)).ravel(), len(groups)


def _bound(log_w: Floats, draws: int, alpha: float) -> tuple[float, float]:
    groups = log_w.reshape(-1, draws)
    if alpha == 1.0:
        values = groups.mean(axis=1)
    else:
        values = (np.logaddexp.reduce((1.0 - alpha) * groups, axis=1) - math.log(draws)) / (1.0 - alpha)
    error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return float(values.mean()), error
