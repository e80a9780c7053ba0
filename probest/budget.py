"""What a run may cost, counted in model calls: a forward pass is 1, a forward pass with its gradient 3.

Everything that an estimator evaluates goes through a :class:`Meter`, so that the budget is a hard ceiling everywhere.
"""

from __future__ import annotations

import time

import numpy as np

from probest.evidence import Evaluation, EventLike, Floats

__all__ = ["FORWARD_CALLS", "GRADIENT_CALLS", "Meter", "UndefinedError"]

FORWARD_CALLS = 1
GRADIENT_CALLS = 3


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
