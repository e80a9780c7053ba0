"""The joint Gaussian law of whatever is alive while a function is read.

Every vector keeps its mean, its own covariance and its covariance with each other vector that is still in use: exact
for linear operations, and 2 n³ a layer where factors shared between all tensors would grow by n with every layer. A
block is kept by the younger of the two vectors and forgotten with either: weak references say what is in use. It is
computed when it is asked for: the input's block with every layer on the way is not, and that with a short output is
found backwards, from the output's few rows.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from probest.moments.hermite import Expansion

__all__ = ["Block", "Gaussian", "Joint", "Origin"]

Array = Any


class Block:
    """A covariance of two vectors, ``(n, n_other)``, computed when it is asked for.

    make: computes it. below: ``rows`` ``(m, n)`` to ``rows @ block``, without it; None where there is no such way.
    """

    __slots__ = ("_below", "_make", "_symmetric", "_value")

    def __init__(self, make: Callable[[], Array], below: Callable[[Array], Array] | None = None) -> None:
        self._make: Callable[[], Array] | None = make
        self._below, self._value, self._symmetric = below, None, False

    @classmethod
    def of(cls, value: Array | Block, *, symmetric: bool = False) -> Block:
        """A block that is known, or that already is one."""
        if isinstance(value, Block):
            return value
        block = cls(lambda: value)
        block._value, block._make, block._symmetric = value, None, symmetric
        return block

    @property
    def value(self) -> Array:
        """The block itself."""
        if self._make is not None:
            self._value = self._make()
            self._make = self._below = None
        return self._value

    @property
    def transposed(self) -> Array:
        """``(n_other, n)``."""
        return self.value if self._symmetric else self.value.T

    @property
    def known(self) -> bool:
        """Whether it was asked for already."""
        return self._make is None

    def below(self, rows: Array) -> Array:
        """``rows`` ``(m, n)`` times the block."""
        return rows @ self.value if self._below is None else self._below(rows)


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
        self.blocks: weakref.WeakKeyDictionary[Gaussian, Block] = weakref.WeakKeyDictionary()
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
        return self.block(left, right).value

    def block(self, left: Gaussian, right: Gaussian) -> Block:
        """The same, not computed yet."""
        if left is right:
            return Block.of(left.cov, symmetric=True)
        if left.number > right.number:
            return left.blocks[right]
        kept = right.blocks[left]
        return Block(lambda: kept.transposed)

    def add(
        self,
        mean: Array,
        cov: Array,
        blocks: Mapping[Gaussian, Array | Block],
        *,
        origin: Origin | None = None,
        positive: bool = False,
    ) -> Gaussian:
        """A new vector. blocks: its covariance ``(n, n_other)`` with each one that is alive."""
        new = Gaussian(next(self._numbers), mean, cov, origin, positive)
        new.blocks.update({v: Block.of(block) for v, block in blocks.items()})
        self._alive[new.number] = new
        return new
