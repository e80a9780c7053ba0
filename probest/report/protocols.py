"""What a report reads of training runs and searches, so that reports depend on neither."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from probest.evidence import Floats
from probest.result import Result

__all__ = ["RunLike", "SearchLike", "StepLike"]


class StepLike(Protocol):
    """One recorded step of training."""

    @property
    def step(self) -> int: ...

    @property
    def task_loss(self) -> float: ...

    @property
    def taught_loss(self) -> float: ...

    @property
    def log_prob(self) -> float: ...

    @property
    def look(self) -> float | None: ...


class CostLike(Protocol):
    @property
    def calls(self) -> int: ...

    @property
    def seconds(self) -> float: ...


class CostsLike(Protocol):
    @property
    def parts(self) -> Mapping[str, CostLike]: ...


class RunLike(Protocol):
    """A training run."""

    @property
    def history(self) -> Sequence[StepLike]: ...

    @property
    def before(self) -> Result: ...

    @property
    def after(self) -> Result: ...

    @property
    def audit(self) -> Result | None: ...

    @property
    def believed(self) -> Result: ...

    @property
    def converged(self) -> bool: ...

    @property
    def advice(self) -> Sequence[str]: ...

    @property
    def costs(self) -> CostsLike: ...


class SearchLike(Protocol):
    """A search for the worst adversary."""

    @property
    def base(self) -> Result: ...

    @property
    def history(self) -> Floats: ...

    @property
    def log_prob(self) -> float: ...

    @property
    def interval(self) -> tuple[float, float]: ...

    @property
    def kl(self) -> float: ...

    @property
    def efficiency(self) -> float: ...

    @property
    def converged(self) -> bool: ...

    @property
    def advice(self) -> Sequence[str]: ...

    @property
    def worst_case(self) -> float: ...
