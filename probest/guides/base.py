"""What a guide is: a fitted proposal for fresh samples, known through its density relative to the adversary's.

A guide q never has to be good to be right: importance weights φ/q mend it. It has to be *nowhere much too
thin*, so every guide in use is wrapped by :class:`Defensive`, which adds the prior itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from probest.diagnostics import Ints
from probest.evidence import Floats

__all__ = ["Defensive", "Guide", "Law", "Prior", "allocate", "stratify"]


class Guide(Protocol):
    """A proposal on z."""

    @property
    def dim(self) -> int: ...

    def sample(self, n: int, rng: np.random.Generator) -> Floats:
        """``(n, dim)`` independent draws."""

    def log_ratio(self, z: Floats) -> Floats:
        """log φ(z) − log q(z), ``(n,)``: the log importance weight of a draw."""


class Law(Guide, Protocol):
    """A guide as it comes out of a fit, before it is made safe."""

    @property
    def components(self) -> int: ...

    def defended(self) -> Defensive:
        """The law with what it may have missed: wider copies of itself, other directions, and the prior."""


def allocate(n: int, shares: Sequence[float] | Floats, rng: np.random.Generator) -> Ints:
    """How many of ``n`` draws each part gets: within one of ``n * share``, and exactly that on average, ``(k,)``.

    Draws that are divided so have the variance of their mean within parts alone, never more than independent choices of
    the part (Owen & Zhou 2000).
    """
    ends = np.cumsum(np.asarray(shares, dtype=np.float64))
    marks = np.ceil(n * ends / ends[-1] - rng.random()).astype(np.intp)
    marks[-1] = n
    return np.asarray(np.diff(np.maximum(marks, 0), prepend=0), dtype=np.intp)


def stratify(n: int, shares: Sequence[float] | Floats, rng: np.random.Generator) -> Ints:
    """The part of each of ``n`` draws, in random order, in the numbers of :func:`allocate`, ``(n,)``."""
    return np.asarray(rng.permutation(np.repeat(np.arange(len(shares)), allocate(n, shares, rng))), dtype=np.intp)


@dataclass(frozen=True)
class Prior:
    """The standard normal itself: the proposal that is never too thin anywhere."""

    dim: int

    def sample(self, n: int, rng: np.random.Generator) -> Floats:
        return rng.standard_normal((n, self.dim))

    def log_ratio(self, z: Floats) -> Floats:
        return np.zeros(len(z))


@dataclass(frozen=True)
class Defensive:
    """A mixture of guides, sampled in fixed shares. Weights use the whole mixture's density, whatever part drew.

    parts: the guides. shares: their probabilities, which sum to 1.
    The weight φ/q is at most 1/share of the prior where that is a part (Hesterberg 1995; Owen & Zhou 2000).
    """

    parts: tuple[Guide, ...]
    shares: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.parts) != len(self.shares) or abs(sum(self.shares) - 1.0) > 1e-9 or min(self.shares) <= 0.0:
            raise ValueError(f"shares must be positive, sum to 1 and match parts, got {self.shares}")

    @property
    def dim(self) -> int:
        return self.parts[0].dim

    def sample(self, n: int, rng: np.random.Generator) -> Floats:
        counts = allocate(n, self.shares, rng)
        z = np.concatenate([part.sample(int(m), rng) for part, m in zip(self.parts, counts, strict=True)])
        return z[rng.permutation(n)]

    def log_ratio(self, z: Floats) -> Floats:
        total = np.full(len(z), -np.inf)
        for part, share in zip(self.parts, self.shares, strict=True):
            total = np.logaddexp(total, np.log(share) - part.log_ratio(z))
        return -total
