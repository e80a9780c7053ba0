"""Fresh samples of a fixed guide, and what they and the particles that it was fitted to say of it.

An importance sample's own error does not show where the guide is too thin. The particles have mean weight
E[w | C] = P (1 + relative variance): particles whose weights are far above anything that was sampled lie where the
guide does not go (:func:`seen`).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from probest import diagnostics
from probest.budget import Meter
from probest.evidence import Floats, Population
from probest.guides.base import Guide
from probest.guides.program import BoundProgram

__all__ = ["Batch", "above", "beyond", "clipped", "draw", "join", "kept_weights", "second_moment", "seen", "shares_of"]

_BLOCK = 2_000_000  # numbers of z alive at once
_ODD = 0.05  # mass of particles beyond all samples that does not make a guide thin: it is in the estimate's error
_NONE = 3.0  # expected samples of which none is seen once in twenty times (rule of three)
_KEEP = 40_000_000  # numbers of z kept of points on target: 320 MB


class Batch(NamedTuple):
    """Fresh samples of a fixed guide: log-weights of all (−inf off target), and the points on target."""

    log_w: Floats
    z: Floats
    severity: Floats


def draw(meter: Meter, guide: Guide | BoundProgram, n: int, rng: np.random.Generator, inside: bool) -> Batch:
    """``n`` fresh samples, in blocks of rows; keeps z of the first that are on target, as far as memory goes."""
    rows = max(1, _BLOCK // guide.dim)
    log_w: list[Floats] = []
    kept: list[Floats] = []
    severity: list[Floats] = []
    for start in range(0, n, rows):
        z, part, level = _fresh(meter, guide, min(rows, n - start), rng)
        if inside:
            part = np.where(level >= 0.0, part, -np.inf)
        at = np.flatnonzero(np.isfinite(part))[: max(0, _KEEP // guide.dim - sum(len(part) for part in kept))]
        at = at[: len(z)]
        log_w.append(part)
        kept.append(z[at])
        severity.append(level[at])
    return Batch(np.concatenate(log_w), np.concatenate(kept), np.concatenate(severity))


def _fresh(
    meter: Meter, guide: Guide | BoundProgram, n: int, rng: np.random.Generator
) -> tuple[Floats, Floats, Floats]:
    """z (no rows where the guide knows only native values), log-weights and severities of ``n`` samples."""
    if isinstance(guide, BoundProgram):
        return np.empty((0, guide.dim)), *guide.draw(meter, n, rng)
    z = guide.sample(n, rng)
    result = meter.evaluate(z)
    return z, guide.log_ratio(z) + result.log_weight, result.severity


def join(a: Batch, b: Batch) -> Batch:
    """Both batches; z stays aligned with the first finite log-weights, so a full ``a`` takes no more."""
    log_w = np.concatenate([a.log_w, b.log_w])
    room = 0 if len(a.z) < np.count_nonzero(np.isfinite(a.log_w)) else max(0, _KEEP // a.z.shape[1] - len(a.z))
    return Batch(log_w, np.concatenate([a.z, b.z[:room]]), np.concatenate([a.severity, b.severity[:room]]))


def kept_weights(batch: Batch) -> Floats:
    """Log-weights of the points whose z was kept."""
    return batch.log_w[np.isfinite(batch.log_w)][: len(batch.z)]


def clipped(log_w: Floats) -> Floats:
    """No weight above mean · √n: less variance for what averages over points, and none of them carries it all."""
    return np.asarray(np.minimum(log_w, diagnostics.log_mean_exp(log_w)[0] + 0.5 * math.log(len(log_w))))


def second_moment(log_w: Floats) -> float:
    """log of n Σw² / (Σw)² = 1 + relative variance; inf when nothing was on target."""
    ess = diagnostics.effective_sample_size(log_w)
    return math.log(len(log_w) / ess) if ess > 0.0 else math.inf


def shares_of(log_w: Floats) -> Floats:
    """Weights that sum to 1; all 0 where there are none."""
    total = diagnostics.log_sum_exp(log_w)
    return np.exp(log_w - total) if math.isfinite(total) else np.zeros(len(log_w))


def seen(
    population: Population | None, guide: Guide | BoundProgram, batch: Floats, *, planned: int = 0
) -> tuple[float, float, float]:
    """How the particles' own weights compare with the sampled ones: coverage, unseen mass, log second moment.

    coverage: sampled over particles' estimate of E[w²], at most 1 when the guide is thin where particles are.
    unseen: the particles' mass at weights above the largest that was sampled (:func:`beyond`).
    planned: samples that there will be, if more than the batch has: the largest weight grows like their square root,
    as far as weights have a variance.
    """
    if population is None:
        return 1.0, 0.0, -math.inf
    mean = diagnostics.log_mean_exp(batch)[0]
    if not math.isfinite(mean):
        return 0.0, 1.0, math.inf
    weights = guide.log_ratio(population.z) + population.log_weight
    share = shares_of(population.log_w)
    lacking = beyond(weights, share, batch, planned)
    unseen = float(lacking.sum())
    if unseen <= _ODD:  # a few particles, which cannot matter more than what they are counted as
        lacking = np.zeros_like(lacking)
    beside, sampled = lacking > 0.0, np.minimum(weights, float(np.max(batch)))
    theirs = np.concatenate([_log(lacking[beside]) + weights[beside], _log(share - lacking) + sampled])
    log_square = diagnostics.log_sum_exp(theirs) - mean
    return math.exp(min(0.0, second_moment(batch) - log_square)), unseen, log_square


def beyond(weights: Floats, share: Floats, batch: Floats, planned: int = 0) -> Floats:
    r"""Of the mass ``share`` of each particle (log-weights ``weights``), what no sample of ``batch`` shows, credibly.

    At weights above all that were sampled the guide gave no sample; by the particles it should have given
    :math:`\lambda = n P \sum_i a_i / w_i`, where a are their shares. With many expected and none seen, it is the
    particles that claim too much (a few of them, all of one ancestor): of a part of the event that gave none, at most
    3/λ of that is credible (rule of three). This is asked of all parts of which weights are above some level.
    """
    growth = 0.5 * math.log(max(1.0, planned / len(batch)))
    out = np.zeros(len(weights))
    far = np.flatnonzero(weights > float(np.max(batch)) + math.log(1.5) + growth)
    if not len(far):
        return out
    far = far[np.argsort(-weights[far], kind="stable")]
    mean = diagnostics.log_mean_exp(batch)[0]
    expected = max(planned, len(batch)) * np.cumsum(share[far] * np.exp(np.minimum(mean - weights[far], 0.0)))
    credible = np.cumsum(share[far]) * np.minimum(1.0, _NONE / np.maximum(expected, _NONE))
    out[far] = np.diff(np.maximum.accumulate(credible), prepend=0.0)
    return out


def above(weights: Floats, share: Floats, among: Floats) -> float:
    """The part of a sample of the target (log-weights ``weights``, log-shares ``share``) whose weights are above all of
    ``among``, those of another such sample.
    """
    far = weights > float(np.max(among)) + math.log(1.5)
    return math.exp(diagnostics.log_sum_exp(share[far]) - diagnostics.log_sum_exp(share)) if far.any() else 0.0


def _log(share: Floats) -> Floats:
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(np.maximum(share, 0.0)))
