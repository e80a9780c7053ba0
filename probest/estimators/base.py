"""What an estimator is: a small frozen object with one method, ``run(event, budget=..., seed=...)``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Protocol

import numpy as np

from probest.evidence import EventLike, Run

__all__ = ["Estimator", "Need", "UnmetNeedError", "check_least", "check_needs", "check_precision"]

Need = Literal["gradient", "unconditioned", "continuous", "readable"]
"""``gradient``: a severity with a gradient. ``unconditioned``: an adversary without observed sites or factors.
``continuous``: no discrete sites. ``readable``: the severity is a function of torch or JAX that can be traced.
"""

_LACKING: Mapping[Need, str] = {
    "gradient": "a severity with a gradient (a checker that returns a real number, through operations of the library)",
    "unconditioned": "an adversary without observed sites or factors",
    "continuous": "an adversary without discrete sites",
    "readable": "a model and a checker in torch or JAX, whose operations can be read",
}


class Estimator(Protocol):
    """A method of estimating log P. Frozen, configured by its fields, without state between runs.

    needs: what an event must have; without it the estimator is refused before it runs. May be left out for nothing.
    """

    @property
    def name(self) -> str: ...

    def run(self, event: EventLike, *, budget: int, seed: np.random.SeedSequence) -> Run:
        """Estimate log P within ``budget`` model calls. The same seed gives the same run.

        Raises UnmetNeedError, before anything is spent, if the event lacks what the estimator needs.
        """


class UnmetNeedError(ValueError):
    """An estimator cannot be used on this event; the message says what is missing."""


def check_needs(method: Estimator, event: EventLike) -> None:
    """Raise UnmetNeedError, naming what is missing, unless the event has what the method needs."""
    given: dict[Need, bool] = {
        "gradient": event.differentiable,
        "unconditioned": not event.weighted,
        "continuous": not getattr(event, "discrete_sites", ()),
        "readable": hasattr(event, "function"),
    }
    needs: frozenset[Need] = getattr(method, "needs", frozenset())
    unknown = set(needs) - set(given)
    if unknown:
        raise ValueError(
            f"needs of {method.name}: {', '.join(map(repr, sorted(unknown)))} is not one of {', '.join(given)}"
        )
    lacking = [_LACKING[need] for need in given if need in needs and not given[need]]
    if lacking:
        raise UnmetNeedError(
            f"{method.name} needs {', and '.join(lacking)}, which this problem has not. Use Tempering()"
        )


def check_precision(precision: float | None) -> None:
    """Raise ValueError unless the precision is None or a positive number of nats."""
    if precision is not None and not precision > 0.0:
        raise ValueError(f"precision must be positive (a standard error of log P), got {precision}")


def check_least(method: Estimator, **least: float) -> None:
    """Raise ValueError, naming the field, unless each of these fields of the method is at least so large."""
    for name, value in least.items():
        if getattr(method, name) < value:
            raise ValueError(f"{name} must be at least {value}, got {getattr(method, name)}")
