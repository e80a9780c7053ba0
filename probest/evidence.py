"""What estimators read and what they leave: an event in, evidence and particles out.

An estimator sees a problem only through :class:`EventLike`: a batch of standard-normal coordinates goes in, severities
(and gradients) come out, all as NumPy float64. So estimators are written and tested once, for both backends, and can be
tested on events that are three lines of NumPy. What it leaves is :class:`Evidence`, a line of the argument.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

__all__ = ["Claim", "Evaluation", "EventLike", "Evidence", "Floats", "Particles"]

Floats = NDArray[np.float64]

Claim = Literal["unbiased", "consistent", "lower", "upper", "heuristic"]


class Evaluation(NamedTuple):
    """An event at ``n`` points.

    severity: ``(n,)``; at least 0 is a catastrophe.
    log_weight: ``(n,)`` log-weight of observed sites, discrete corrections and factors; zeros when there are none.
    severity_grad: ``(n, dim)`` gradient of the severity in z, or None when it was not asked for.
    log_weight_grad: ``(n, dim)`` gradient of the log-weight, or None when not asked for or not weighted.
    """

    severity: Floats
    log_weight: Floats
    severity_grad: Floats | None = None
    log_weight_grad: Floats | None = None


@runtime_checkable
class EventLike(Protocol):
    """A problem as functions of standard-normal coordinates z of shape ``(n, dim)``."""

    @property
    def dim(self) -> int: ...

    @property
    def differentiable(self) -> bool:
        """Whether the severity has a useful gradient in z (False for a boolean checker)."""

    @property
    def boolean(self) -> bool:
        """Whether the checker says only yes or no; severity is then +1 or -1."""

    @property
    def weighted(self) -> bool:
        """Whether the adversary is conditioned, so that log-weights are not all zero."""

    def evaluate(self, z: Floats, *, gradient: bool = False) -> Evaluation:
        """Severity and log-weight at each row of z. Costs 1 call a row, 3 with the gradient."""


class Particles(NamedTuple):
    """A weighted sample of catastrophes (rows with severity >= 0), in z.

    z: ``(n, dim)``. log_weight: ``(n,)`` normalised so that its log-sum-exp is 0. severity: ``(n,)``.
    Expectations over the particles estimate expectations under the adversary given a catastrophe.
    """

    z: Floats
    log_weight: Floats
    severity: Floats


@dataclass(frozen=True)
class Evidence:
    """One line of the argument: log P or a bound on it, and how far to believe it.

    log_prob: natural log; ``-inf`` when no catastrophe was seen (then ``interval`` has a finite upper end).
    std_error: standard error of ``log_prob`` in nats; ``inf`` when unknown.
    interval: 95 % interval of log P, ``(lower, upper)``; ``(-inf, x)`` is an upper bound only.
    claim: what the number is: ``unbiased`` (P̂ has mean P), ``consistent``, a ``lower`` or ``upper`` bound,
        or ``heuristic`` (a number without a guarantee).
    calls: model calls spent (forward 1, gradient 3). seconds: wall clock.
    converged: the method's own verdict; ``notes`` say why not and what to do.
    diagnostics: named numbers (``ess``, ``khat``, ``acceptance`` ...).
    prior_particles: for a conditioned adversary, a weighted sample of the adversary itself (not of catastrophes).
    log_evidence: log of the adversary's own evidence (the normaliser of its observed sites); 0 when there are none.
    """

    method: str
    log_prob: float
    std_error: float
    interval: tuple[float, float]
    claim: Claim
    calls: int
    seconds: float
    converged: bool
    particles: Particles | None = None
    prior_particles: Particles | None = None
    log_evidence: float = 0.0
    diagnostics: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
