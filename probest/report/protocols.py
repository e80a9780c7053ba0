"""What a report reads of the things it shows, so that reports depend on no backend and on no estimator."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from probest.evidence import Evidence, Floats

__all__ = ["EstimateLike", "RunLike", "SampleLike", "SearchLike", "StepLike"]


class SampleLike(Protocol):
    """Weighted cases: a mapping from site names to arrays of shape ``(n, ...)``."""

    @property
    def weights(self) -> Floats:
        """``(n,)``, summing to one."""

    @property
    def severity(self) -> Floats:
        """``(n,)``, at least 0 for a catastrophe."""

    @property
    def observation(self) -> Any:
        """What the model saw: a pytree of arrays of shape ``(n, ...)``."""

    @property
    def action(self) -> Any:
        """What the model did: a pytree of arrays of shape ``(n, ...)``."""

    def __iter__(self) -> Iterator[str]: ...

    def __getitem__(self, name: str, /) -> Any: ...


class EstimateLike(Protocol):
    """An estimate of log P, with its ledger."""

    @property
    def log_prob(self) -> float: ...

    @property
    def std_error(self) -> float: ...

    @property
    def lower(self) -> float: ...

    @property
    def upper(self) -> float: ...

    @property
    def converged(self) -> bool: ...

    @property
    def advice(self) -> Sequence[str]: ...

    @property
    def ledger(self) -> Sequence[Evidence]: ...

    @property
    def conclusion(self) -> Evidence: ...

    @property
    def calls(self) -> int: ...

    @property
    def seconds(self) -> float: ...

    @property
    def catastrophes(self) -> SampleLike | None: ...

    @property
    def drawn(self) -> SampleLike | None:
        """Draws of the adversary itself."""


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
    def before(self) -> EstimateLike: ...

    @property
    def after(self) -> EstimateLike: ...

    @property
    def audit(self) -> EstimateLike | None: ...

    @property
    def believed(self) -> EstimateLike: ...

    @property
    def converged(self) -> bool: ...

    @property
    def advice(self) -> Sequence[str]: ...

    @property
    def costs(self) -> CostsLike: ...


class SearchLike(Protocol):
    """A search for the worst adversary."""

    @property
    def base(self) -> EstimateLike: ...

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
