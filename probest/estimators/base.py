"""What an estimator is: a small frozen object with one method, ``run(event, budget=..., seed=...)``."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from probest.evidence import EventLike, Evidence

__all__ = ["Estimator"]


class Estimator(Protocol):
    """A method of estimating log P. Frozen, configured by its fields, without state between runs."""

    @property
    def name(self) -> str: ...

    def run(self, event: EventLike, *, budget: int, seed: np.random.SeedSequence) -> Evidence:
        """Estimate log P within ``budget`` model calls. The same seed gives the same evidence."""
