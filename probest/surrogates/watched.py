"""An event that keeps what it was asked and what it answered, for a surrogate to learn from."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from probest.evidence import Evaluation, EventLike, Floats

__all__ = ["Cases", "OneKind", "Watched"]


_HUGE = 1e30


class Cases(NamedTuple):
    """z ``(n, dim)``; severity ``(n,)``, finite; slope ``(n, dim)``: its gradient, NaN in rows where none was asked;
    kinds ``(n, K)``: those of the kinds of catastrophe, of which it is the largest; K = 0 for an event without.
    """

    z: Floats
    severity: Floats
    slope: Floats
    kinds: Floats


class Watched:
    """The event, and all its answers, as long as they are no more than ``most`` numbers; then every second is let go.

    Everything else is the event's own. Where it has kinds (:mod:`probest.moments.kinds`), it is always asked for
    theirs too, which takes no more calls.
    """

    def __init__(self, event: EventLike, most: int = 30_000_000) -> None:
        self.event = event
        self.most = most
        self._kept: list[Cases] = []
        self._numbers = 0
        self._apart = True  # as far as is known

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

    @property
    def kinds(self) -> Any:
        """The event's, unless it turned out that they cannot be evaluated."""
        return getattr(self.event, "kinds", None) if self._apart else None

    def evaluate(self, z: Floats, *, gradient: bool = False) -> Evaluation:
        if self.kinds is not None:
            try:
                return self.evaluate_kinds(z, gradient=gradient)[0]
            except Exception:  # what is wrong with the event itself is seen below
                self._apart = False
                self._kept = [cases._replace(kinds=np.empty((len(cases.z), 0))) for cases in self._kept]
        result = self.event.evaluate(z, gradient=gradient)
        self._keep(z, result.severity, result.severity_grad if gradient else None, np.empty((len(z), 0)))
        return result

    def evaluate_kinds(
        self, z: Floats, which: int | np.ndarray | None = None, *, gradient: bool = False
    ) -> tuple[Evaluation, Floats, Floats]:
        """As :meth:`probest.programs.event.Event.evaluate_kinds`; what all kinds say is kept."""
        event: Any = self.event
        result: Evaluation
        result, severity, kinds = event.evaluate_kinds(z, which, gradient=gradient)
        slope = result.severity_grad if gradient else None
        if slope is not None and which is not None:
            slope = np.where((kinds[np.arange(len(z)), which] >= kinds.max(axis=1))[:, None], slope, np.nan)
        self._keep(z, severity, slope, kinds)
        return result, severity, kinds

    def _keep(self, z: Floats, severity: Floats, slope: Floats | None, kinds: Floats) -> None:
        cases = _finite(Cases(z, severity, np.full(z.shape, np.nan) if slope is None else slope, kinds))
        single: list[Any] = [
            part.astype(np.float32) for part in (cases.z, cases.slope, np.clip(cases.kinds, -_HUGE, _HUGE))
        ]
        self._kept.append(Cases(single[0], cases.severity, single[1], single[2]))
        self._numbers += sum(part.size for part in single)
        if self._numbers > self.most:
            self._kept = [Cases(*(part[::2] for part in _together(self._kept)))]
            self._numbers = self._kept[0].z.size * 2 + self._kept[0].kinds.size

    def cases(self) -> Cases:
        """All that was kept, in the order in which it was asked."""
        if len(self._kept) > 1:
            self._kept = [_together(self._kept)]
        none = np.empty((0, self.dim))
        return self._kept[0] if self._kept else Cases(none, np.empty(0), none, np.empty((0, 0)))


class OneKind:
    """One kind of catastrophe by itself, as an event; or of each row of z its own, where there are as many rows.

    whole: an event that has kinds; where it is watched, what it is asked is kept as answers of the whole.
    """

    differentiable, boolean, weighted = True, False, False

    def __init__(self, whole: Any, which: int | np.ndarray) -> None:
        self.whole, self.which = whole, which

    @property
    def dim(self) -> int:
        dim: int = self.whole.dim
        return dim

    def evaluate(self, z: Floats, *, gradient: bool = False) -> Evaluation:
        result: Evaluation = self.whole.evaluate_kinds(z, self.which, gradient=gradient)[0]
        return result


def _finite(cases: Cases) -> Cases:
    """Those whose severity and gradient are numbers that can be reckoned with."""
    good = (np.abs(cases.severity) < _HUGE) & ~(np.abs(cases.slope) > _HUGE).any(axis=1)
    return cases if good.all() else Cases(*(part[good] for part in cases))


def _together(kept: list[Cases]) -> Cases:
    return Cases(*(np.concatenate(parts) for parts in zip(*kept, strict=True)))
