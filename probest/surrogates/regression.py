"""Fitting a learned severity: penalised regressions, weighted towards the limit, and the choice between kinds.

A logistic regression of yes and no, or a least-squares fit of real severities; the kind of features that predicts the
newest cases best, before it is fitted to them, is chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import scipy
from scipy import special

from probest.evidence import Floats
from probest.surrogates.features import Decode, Features, Learned
from probest.surrogates.tuning import SurrogateTuning

__all__ = ["Judged", "fit_surrogate"]

_HUGE = 1e30


class Judged(NamedTuple):
    """Judged cases: z ``(n, dim)`` and severity ``(n,)``."""

    z: Floats
    severity: Floats

    @property
    def hit(self) -> np.ndarray:
        return self.severity >= 0.0

    def at(self, rows: np.ndarray | slice) -> Judged:
        return Judged(self.z[rows], self.severity[rows])

    def plus(self, other: Judged) -> Judged:
        return Judged(np.concatenate([self.z, other.z]), np.concatenate([self.severity, other.severity]))


Solver = Callable[[Floats, Floats, float, Sequence[float], float], list[Floats]]
"""``solve(features of n cases, severities, near, penalties, far)``: coefficients for each penalty."""


def fit_surrogate(
    known: Judged,
    fresh: Judged,
    boolean: bool,
    basis: Floats | None,
    decode: Decode | None,
    rng: np.random.Generator,
    tuning: SurrogateTuning,
) -> Learned:
    """The kind of features that predicts ``fresh`` best when fitted to ``known``, fitted to both; simple ones first."""
    solve = _logistic if boolean else _least_squares
    near = _scale(known, fresh)
    best: tuple[float, float, Features, int] | None = None
    kinds = [Features(np.empty((known.z.shape[1], 0)), decode=decode)]
    if decode is None:
        kinds += _kinds(known, solve, basis, near, rng, tuning)
    for features in kinds:
        least = math.inf if best is None else tuning.simpler * best[0]
        test = features(fresh.z)
        for i, coefficients in enumerate(solve(features(known.z), known.severity, near, tuning.penalties, tuning.far)):
            loss, noise = _loss(test @ coefficients, fresh, boolean, near, tuning.far)
            if loss < least:
                best, least = (loss, noise, features, i), loss
    assert best is not None
    _, noise, features, i = best
    both = known.plus(fresh)
    coefficients = solve(features(both.z), both.severity, near, tuning.penalties[: i + 1], tuning.far)[-1]
    spread = float(np.std(features(rng.standard_normal((500, both.z.shape[1]))) @ coefficients))
    return Learned(features, coefficients, max(noise, 0.05 * spread, 1e-300))


def _kinds(
    known: Judged, solve: Solver, basis: Floats | None, near: float, rng: np.random.Generator, tuning: SurrogateTuning
) -> list[Features]:
    """Candidates beyond z itself, simple ones first. Radial functions sit around cases that others put near the limit.

    basis: the few directions that matter, or None for no radial functions: what these say of places without cases is
    often wrong, so they wait until there are cases near the limit that simpler features cannot explain.
    """
    dim = known.z.shape[1]
    kinds: list[Features] = []
    if dim <= tuning.products:
        kinds.append(Features(np.eye(dim), True))
    elif basis is not None:
        kinds.append(Features(basis, True))
    if basis is not None:
        x = kinds[-1](known.z)
        (coefficients,) = solve(x, known.severity, near, tuning.penalties[1:2], tuning.far)
        close = np.argsort(np.abs(x @ coefficients), kind="stable")[: 3 * tuning.centres]
        centres = known.z[rng.permutation(close)[: tuning.centres]] @ basis
        kinds += [Features(basis, True, centres, width * math.sqrt(basis.shape[1])) for width in tuning.widths]
    return kinds


def _scale(known: Judged, fresh: Judged) -> float:
    """The severity up to which a case counts as near the limit: typical of fresh cases, not much less than of all."""
    sizes = [np.minimum(np.abs(cases.severity), _HUGE) for cases in (fresh, known)]
    return max(float(np.median(sizes[0])), 0.1 * float(np.median(sizes[1])), 1.0 / _HUGE)


def _near_limit(severity: Floats, near: float) -> Floats:
    """Weights that count cases near the limit: what is far beyond or below it need not be predicted well."""
    return np.asarray(1.0 / (1.0 + (severity / near) ** 2), dtype=np.float64)


def _loss(guess: Floats, fresh: Judged, boolean: bool, near: float, far: float) -> tuple[float, float]:
    """How badly the guess predicts, and the standard deviation σ̂ of its error: most likely, or by mean square."""
    if boolean:
        noises = max(float(np.std(guess)), 1e-300) * np.geomspace(0.01, 10.0, 25)
        right = np.where(fresh.hit, guess, -guess)
        losses = -np.mean(special.log_ndtr(right / noises[:, None]), axis=1)
        return float(losses.min()), float(noises[np.argmin(losses)])
    severity = np.clip(fresh.severity, -far * near, far * near)
    w = _near_limit(severity, near)
    square = float(w @ (guess - severity) ** 2 / w.sum())
    return square, math.sqrt(square)


def _standardised(x: Floats, w: Floats) -> tuple[Floats, Floats, Floats]:
    """Columns (the first is the constant) with weighted mean 0 and variance 1; the means and deviations."""
    mean = w @ x
    mean[0] = 0.0
    x = x - mean
    deviation = np.sqrt(w @ x**2)
    deviation[deviation < 1e-9] = 1.0
    x /= deviation
    return x, mean, deviation


def _original(c: Floats, mean: Floats, deviation: Floats) -> Floats:
    out = c / deviation
    out[0] -= out[1:] @ mean[1:]
    return out


def _least_squares(x: Floats, severity: Floats, near: float, penalties: Sequence[float], far: float) -> list[Floats]:
    """Ridge regressions, weighted towards the limit, one for each penalty."""
    severity = np.clip(severity, -far * near, far * near)
    w = _near_limit(severity, near)
    w /= w.sum()
    x, mean, deviation = _standardised(x, w)
    weighted = x * w[:, None]
    gram, moment = x.T @ weighted, severity @ weighted
    free = np.arange(len(gram)) == 0
    solutions = []
    for penalty in penalties:
        ridge = np.diag(np.where(free, 0.0, 0.01 * penalty) + 1e-12)
        solutions.append(_original(scipy.linalg.solve(gram + ridge, moment, assume_a="pos"), mean, deviation))
    return solutions


def _logistic(x: Floats, severity: Floats, near: float, penalties: Sequence[float], far: float) -> list[Floats]:
    """Logistic regressions of yes and no, one for each penalty, each by Newton from the one before."""
    del near, far
    n, p = x.shape
    x, mean, deviation = _standardised(x, np.full(n, 1.0 / n))
    x *= np.where(severity >= 0.0, 1.0, -1.0)[:, None]  # so that positive is right
    c, right = np.zeros(p), np.zeros(n)
    solutions = []
    for penalty in penalties:
        ridge = np.full(p, 0.1 * penalty)
        ridge[0] = 1e-8
        now = _log_loss(right) + 0.5 * float(ridge @ c**2)
        for _ in range(10):
            wrong = special.expit(-right)
            slope = ridge * c - wrong @ x / n
            curve = (x * (wrong * (1.0 - wrong) / n)[:, None]).T @ x
            curve[np.diag_indices(p)] += ridge
            step = scipy.linalg.solve(curve, slope, assume_a="pos")
            moved, size, before = x @ step, 1.0, now
            while size > 1e-3:
                now = _log_loss(right - size * moved) + 0.5 * float(ridge @ (c - size * step) ** 2)
                if now < before:
                    break
                size *= 0.5
            if not now < before:
                now = before
                break
            c, right = c - size * step, right - size * moved
            if now > 0.999 * before:
                break
        solutions.append(_original(c, mean, deviation))
    return solutions


def _log_loss(right: Floats) -> float:
    return float(np.mean(np.logaddexp(0.0, -right)))
