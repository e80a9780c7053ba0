r"""Softened events: what stands for the catastrophe on the way to it.

A softening is a factor g(s) of the severity, increasing in s; its logarithm and slope are all that moves need.

- :class:`Noise`: :math:`\Phi(s/\sigma)`, the event under noise of size σ. A population that follows a model while it
  trains keeps it fixed.
- :class:`Tilt`: :math:`1 / (1 + \exp(-\lambda (h(s) - h(0))))` with h the *index* of a severity,
  :math:`h(x) = -\Phi^{-1}(P(S \ge x))`, learnt from the population on the way (:class:`Index`). On that scale
  severities of the adversary are standard normal whatever their units, so that a path from λ = 0 is that of a
  half-space: as many levels as the event is standard deviations away, the population as wide as the prior along it,
  and no scale on which severities may not grow. It depends on the order of severities alone, like subset simulation,
  and takes :math:`\sqrt{|\log P|}` levels where that takes :math:`|\log P|`.

References: Papaioannou, Papadimitriou & Straub (2016), Sequential importance sampling for structural reliability
(smoothed events); Au & Beck (2001), Subset simulation (levels by the order of severities alone); Hasofer & Lind (1974)
for the index.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy import special

from probest.estimators.base import Floats

__all__ = ["ADVERSARY", "EVENT", "Index", "Noise", "Softening", "Tilt", "learn_index"]

_LARGEST = 1e300  # severities beyond it are as good as infinite; their differences would not be


class Softening(Protocol):
    """A factor of the target."""

    def log(self, severity: Floats) -> Floats:
        """log g(s), ``(n,)``."""

    def slope(self, severity: Floats) -> Floats:
        """d log g / d s, ``(n,)``."""


@dataclass(frozen=True)
class Noise:
    """Φ(s/σ); ``inverse`` is 1/σ, more than 0."""

    inverse: float

    def log(self, severity: Floats) -> Floats:
        return np.asarray(special.log_ndtr(self.inverse * severity), dtype=np.float64)

    def slope(self, severity: Floats) -> Floats:
        with np.errstate(all="ignore"):
            ratio = math.sqrt(2.0 / math.pi) / special.erfcx(-self.inverse * severity / math.sqrt(2.0))
        return np.where(np.isfinite(ratio), self.inverse * ratio, 0.0)


@dataclass(frozen=True)
class Index:
    """h as a piecewise linear function: increasing knots ``(k,)``, their index, and the slopes outside of them."""

    knots: Floats
    index: Floats
    below: float
    above: float

    def __call__(self, severity: Floats) -> Floats:
        s = np.clip(severity, -_LARGEST, _LARGEST)
        out = np.interp(s, self.knots, self.index)
        out += self.below * np.minimum(s - self.knots[0], 0.0)
        out += self.above * np.maximum(s - self.knots[-1], 0.0)
        return np.asarray(np.where(severity == -np.inf, -np.inf, out), dtype=np.float64)

    def slope(self, severity: Floats) -> Floats:
        slopes = np.concatenate([[self.below], np.diff(self.index) / np.diff(self.knots), [self.above]])
        return np.asarray(slopes[np.searchsorted(self.knots, severity)], dtype=np.float64)


@dataclass(frozen=True)
class Tilt:
    """The logistic factor at ``rate`` λ on an index: λ = 0 leaves the adversary alone, λ = ∞ is the event itself."""

    rate: float
    index: Index | None = None

    def log(self, severity: Floats) -> Floats:
        if self.rate == 0.0:
            return np.zeros_like(severity)
        if self.index is None:
            return np.where(severity >= 0.0, 0.0, -np.inf)
        return np.asarray(special.log_expit(self.rate * self._beyond(severity)), dtype=np.float64)

    def slope(self, severity: Floats) -> Floats:
        if self.index is None:
            return np.zeros_like(severity)
        refused = special.expit(-self.rate * self._beyond(severity))
        return np.asarray(self.rate * self.index.slope(severity) * refused, dtype=np.float64)

    def _beyond(self, severity: Floats) -> Floats:
        assert self.index is not None
        return self.index(severity) - self.index(np.zeros(1))


ADVERSARY = Tilt(0.0)
EVENT = Tilt(math.inf)


def learn_index(before: Index | None, severity: Floats, log_w: Floats) -> Index | None:
    """The index from particles ``(n,)`` with P(S ≥ x) ≈ Σ exp(log_w) 1[S ≥ x]; below them what was known before.

    The top twentieth only enters as a whole: beyond it h is extended by the slope over the upper third. None where all
    severities are equal and nothing was known before.
    """
    order = np.argsort(-severity, kind="stable")
    s = severity[order]
    finite = np.isfinite(s)
    log_p = np.logaddexp.accumulate(log_w[order])[finite]
    s = np.clip(s[finite], -_LARGEST, _LARGEST)
    n = len(s)
    knots, index = np.empty(0), np.empty(0)
    for first in (max(4, n // 20), 4, 1):
        ranks = np.unique(np.geomspace(min(first, max(n, 1)), max(first, 0.75 * n), 12).astype(np.intp))
        ranks = ranks[ranks <= n]
        knots = np.unique(s[ranks - 1])
        last = n - np.searchsorted(s[::-1], knots)  # how many are at least as severe: ties count in full
        index = -special.ndtri_exp(np.minimum(log_p[last - 1], -1e-6))
        if len(knots) >= 3:
            break
    if before is not None:
        lower = before.knots < knots[0] if len(knots) else np.ones(len(before.knots), dtype=np.bool_)
        ceiling = index[0] if len(index) else math.inf
        knots = np.concatenate([before.knots[lower], knots])
        index = np.concatenate([np.minimum(before.index[lower], ceiling), index])
    index = np.maximum.accumulate(index)
    if len(knots) < 2:
        return None
    with np.errstate(over="ignore"):
        start = len(knots) - 2
        if n and knots[start] > s[min(n - 1, n // 3)]:
            start = min(start, int(np.searchsorted(knots, s[min(n - 1, n // 3)])))
        above = float((index[-1] - index[start]) / (knots[-1] - knots[start]))
        below = float((index[1] - index[0]) / (knots[1] - knots[0]))
    if not (above > 0.0 and math.isfinite(above)):
        rises = np.flatnonzero(index < index[-1])
        if not len(rises):
            return None
        above = float((index[-1] - index[rises[-1]]) / (knots[-1] - knots[rises[-1]]))
    return Index(knots, index, below if math.isfinite(below) else 0.0, above)
