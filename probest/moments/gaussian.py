"""The joint Gaussian law of whatever is alive while a function is read.

Every vector keeps its mean, its own covariance and its covariance with each other vector that is still in use: exact
for linear operations, and 3 n³ a layer where factors shared between all tensors would grow by n with every layer. A
block is kept by the younger of the two vectors and forgotten with either: weak references say what is in use.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from probest.moments.hermite import Expansion

__all__ = ["Gaussian", "Joint", "Origin"]

Array = Any


@dataclass(frozen=True)
class Origin:
    """Where a vector came from: f of another one, entry by entry. The other may be gone."""

    source: weakref.ref[Gaussian]
    expansion: Expansion


class Gaussian:
    """A vector of the joint law: mean ``(n,)``, cov ``(n, n)``, and whether it stands for something that is ≥ 0.

    difference: whether it is one of two such, as E x² − (E x)² is, which may be ≥ 0 by more than its law shows.
    logarithm: the Gaussian whose exponential carries it from then on, once it was asked for.
    """

    __slots__ = ("__weakref__", "blocks", "cov", "difference", "logarithm", "mean", "number", "origin", "positive")

    def __init__(self, number: int, mean: Array, cov: Array, origin: Origin | None, positive: bool) -> None:
        self.number, self.mean, self.cov = number, mean, cov
        self.origin, self.positive, self.difference = origin, positive, False
        self.blocks: weakref.WeakKeyDictionary[Gaussian, Array] = weakref.WeakKeyDictionary()
        self.logarithm: Gaussian | None = None

    @property
    def size(self) -> int:
        return int(self.mean.shape[0])


class Joint:
    """All vectors that are alive."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._alive: weakref.WeakValueDictionary[int, Gaussian] = weakref.WeakValueDictionary()

    def alive(self) -> list[Gaussian]:
        """Oldest first."""
        return [self._alive[number] for number in sorted(self._alive.keys())]

    def between(self, left: Gaussian, right: Gaussian) -> Array:
        """Cov(left, right) ``(n_left, n_right)``."""
        if left is right:
            return left.cov
        if left.number > right.number:
            return left.blocks[right]
        return right.blocks[left].T

    def add(
        self,
        mean: Array,
        cov: Array,
        blocks: Mapping[Gaussian, Array],
        *,
        origin: Origin | None = None,
        positive: bool = False,
    ) -> Gaussian:
        """A new vector. blocks: its covariance ``(n, n_other)`` with each one that is alive."""
        new = Gaussian(next(self._numbers), mean, cov, origin, positive)
        new.blocks.update(blocks)
        self._alive[new.number] = new
        return new
