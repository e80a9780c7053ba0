"""What every estimator shares: the event it reads, the evidence it returns, the particles it leaves.

An estimator is a small frozen object with one method, ``run(event, budget=..., seed=...)``. It sees the
problem only through :class:`EventLike`: a batch of standard-normal coordinates goes in, severities (and
gradients) come out, all as NumPy float64. So estimators are written and tested once, for both backends,
and can be tested on events that are three lines of NumPy.

Cost is counted in model calls: a forward pass is 1, a forward pass with its gradient is 3.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "FORWARD_CALLS",
    "GRADIENT_CALLS",
    "Claim",
    "Estimator",
    "Evaluation",
    "EventLike",
    "Evidence",
    "Floats",
    "Meter",
    "Particles",
    "UndefinedError",
    "child_seed",
    "generator",
]

Floats = NDArray[np.float64]

FORWARD_CALLS = 1
GRADIENT_CALLS = 3

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


class Estimator(Protocol):
    """A method of estimating log P. Frozen, configured by its fields, without state between runs."""

    @property
    def name(self) -> str: ...

    def run(self, event: EventLike, *, budget: int, seed: np.random.SeedSequence) -> Evidence:
        """Estimate log P within ``budget`` model calls. The same seed gives the same evidence."""


class UndefinedError(ValueError):
    """The severity or the log-weight is NaN somewhere."""


class Meter:
    """Counts the calls an estimator makes, refuses more than the budget, and refuses NaN severities.

    Everything an estimator evaluates goes through here, so that the budget is a hard ceiling everywhere.
    """

    def __init__(self, event: EventLike, budget: int) -> None:
        if isinstance(budget, bool) or not isinstance(budget, int | np.integer) or budget < 1:
            raise ValueError(f"budget must be a positive whole number of model calls, got {budget!r}")
        if event.dim < 1:
            raise ValueError(f"event.dim must be at least 1, got {event.dim}: the adversary draws nothing at random")
        self.event = event
        self.budget = int(budget)
        self.calls = 0
        self.started = time.perf_counter()

    @property
    def left(self) -> int:
        return self.budget - self.calls

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def charge(self, cost: int) -> None:
        """Count calls before they are made."""
        if cost > self.left:
            raise RuntimeError(f"an estimator asked for {cost} calls with {self.left} left of its budget: a bug")
        self.calls += cost

    def evaluate(self, z: Floats, *, gradient: bool = False) -> Evaluation:
        """The event at z, checked; raises UndefinedError for a NaN, ValueError for a wrong shape."""
        n = z.shape[0]
        self.charge(n * (GRADIENT_CALLS if gradient else FORWARD_CALLS))
        result = self.event.evaluate(z, gradient=gradient)
        for name, value in (("severity", result.severity), ("log_weight", result.log_weight)):
            if value.shape != (n,):
                raise ValueError(f"{name} must have shape ({n},), got {value.shape}")
            if np.isnan(value).any():
                row = int(np.flatnonzero(np.isnan(value))[0])
                raise UndefinedError(
                    f"{name} is NaN at {int(np.isnan(value).sum())} of {n} points (the first has |z| = "
                    f"{float(np.linalg.norm(z[row])):.3g}): return a number, or -inf where there can be no catastrophe"
                )
        return result


def child_seed(seed: np.random.SeedSequence, *key: int) -> np.random.SeedSequence:
    """A child of ``seed`` by name. Unlike ``seed.spawn`` it leaves no trace: the same key gives the same child."""
    return np.random.SeedSequence(entropy=seed.entropy, spawn_key=(*seed.spawn_key, *key), pool_size=seed.pool_size)


def generator(seed: np.random.SeedSequence) -> np.random.Generator:
    """The random numbers of a seed: counter-based (Philox), float64, on the host."""
    return np.random.Generator(np.random.Philox(seed))
