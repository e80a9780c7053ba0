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

from probest.evidence import Floats

__all__ = ["ADVERSARY", "EVENT", "Index", "Noise", "Softening", "Tilt", "learn_index"]

_AHEAD = 2.0  # how much index there is beyond the last knot: less than a population could run away to
_FAR = 1e100  # an index beyond which nothing is
_STEEPEST = 1e150  # index a unit of severity
_LARGEST = 1e300  # severities beyond it are as good as infinite; their differences would not be


class Softening(Protocol):
    """A factor of the target."""

    def log(self, severity: Floats) -> Floats:
        """log g(s), ``(n,)``."""

    def slope(self, severity: Floats) -> Floats:
        """d log g / d s, ``(n,)``."""


@dataclass(frozen=True)
class Noise:
    """Φ(s/σ); ``inverse`` is 1/σ, more than 0: one for all severities, or one for each."""

    inverse: float | Floats

    def log(self, severity: Floats) -> Floats:
        return np.asarray(special.log_ndtr(self.inverse * severity), dtype=np.float64)

    def slope(self, severity: Floats) -> Floats:
        with np.errstate(all="ignore"):
            ratio = math.sqrt(2.0 / math.pi) / special.erfcx(-self.inverse * severity / math.sqrt(2.0))
        return np.where(np.isfinite(ratio), self.inverse * ratio, 0.0)


@dataclass(frozen=True)
class Index:
    """h as a piecewise linear function: increasing knots ``(k,)``, their index, and the slopes outside of them.

    Above the last knot h levels off. A severity may grow so fast there that a straight line would make the far end
    of it the most likely place of all, and a population that never saw what lies between would jump to it.
    """

    knots: Floats
    index: Floats
    below: float
    above: float

    def __call__(self, severity: Floats) -> Floats:
        s = np.clip(severity, -_LARGEST, _LARGEST)
        with np.errstate(over="ignore"):
            out = np.interp(s, self.knots, self.index)
            out += self.below * np.minimum(s - self.knots[0], 0.0)
            out -= _AHEAD * np.expm1(-self.above * np.maximum(s - self.knots[-1], 0.0) / _AHEAD)
        return np.asarray(np.where(severity == -np.inf, -np.inf, np.clip(out, -_FAR, _FAR)), dtype=np.float64)

    def slope(self, severity: Floats) -> Floats:
        with np.errstate(over="ignore"):
            inside = np.minimum(np.diff(self.index) / np.diff(self.knots), _STEEPEST)
            slopes = np.concatenate([[self.below], inside, [self.above]])
            slope = slopes[np.searchsorted(self.knots, severity)]
            slope *= np.exp(-self.above * np.clip(severity - self.knots[-1], 0.0, _LARGEST) / _AHEAD)
        return np.asarray(slope, dtype=np.float64)

    def reach(self, severity: float) -> float:
        """The index as it may be at a severity above all knots: extended by a straight line."""
        return (
            float(self(np.array([severity]))[0])
            if severity <= self.knots[-1]
            else float(min(self.index[-1] + self.above * (severity - self.knots[-1]), _FAR))
        )


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
    third = s[min(n - 1, n // 3)] if n else -math.inf
    start = max(0, min(len(knots) - 2, int(np.searchsorted(knots, third))))
    if not index[-1] > index[start]:
        start = int(np.searchsorted(index, index[-1])) - 1
    if start < 0:
        return None
    with np.errstate(over="ignore"):
        above = (index[-1] - index[start]) / (knots[-1] - knots[start])
        below = (index[1] - index[0]) / (knots[1] - knots[0])
    return Index(knots, index, min(float(below), _STEEPEST), min(float(above), _STEEPEST))
