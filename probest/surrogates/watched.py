"""An event that keeps what it was asked and what it answered, for a surrogate to learn from."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from probest.evidence import Evaluation, EventLike, Floats

__all__ = ["Cases", "Watched"]


_HUGE = 1e30


class Cases(NamedTuple):
    """z ``(n, dim)``; severity ``(n,)``, finite; slope ``(n, dim)``: its gradient, NaN in rows where none was asked."""

    z: Floats
    severity: Floats
    slope: Floats


class Watched:
    """The event, and all its answers, as long as they are no more than ``most`` numbers; then every second is let go.

    Everything else is the event's own.
    """

    def __init__(self, event: EventLike, most: int = 30_000_000) -> None:
        self.event = event
        self.most = most
        self._kept: list[Cases] = []
        self._numbers = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.event, name)

    @property
    def dim(self) -> int:
        return self.event.dim

    @property
    def differentiable(self) -> bool:
        return self.event.differentiable

    @property
    def boolean(self) -> bool:
        return self.event.boolean

    @property
    def weighted(self) -> bool:
        return self.event.weighted

    def evaluate(self, z: Floats, *, gradient: bool = False) -> Evaluation:
        result = self.event.evaluate(z, gradient=gradient)
        slope = result.severity_grad if gradient and result.severity_grad is not None else np.full(z.shape, np.nan)
        cases = _finite(Cases(z, result.severity, slope))
        self._kept.append(Cases(cases.z.astype(np.float32), cases.severity, cases.slope.astype(np.float32)))
        self._numbers += 2 * cases.z.size
        if self._numbers > self.most:
            self._kept = [Cases(*(part[::2] for part in _together(self._kept)))]
            self._numbers = 2 * self._kept[0].z.size
        return result

    def cases(self) -> Cases:
        """All that was kept, in the order in which it was asked."""
        if len(self._kept) > 1:
            self._kept = [_together(self._kept)]
        return self._kept[0] if self._kept else Cases(np.empty((0, self.dim)), np.empty(0), np.empty((0, self.dim)))


def _finite(cases: Cases) -> Cases:
    """Those whose severity and gradient are numbers that can be reckoned with."""
    good = (np.abs(cases.severity) < _HUGE) & ~(np.abs(cases.slope) > _HUGE).any(axis=1)
    return cases if good.all() else Cases(*(part[good] for part in cases))


def _together(kept: list[Cases]) -> Cases:
    return Cases(*(np.concatenate(parts) for parts in zip(*kept, strict=True)))
