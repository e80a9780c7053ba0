"""Where a standard-normal point lies along a line: normal along a straight line, chi along a ray from the origin.

Masses of intervals and draws from them, in logarithms and accurate in both tails.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy import special

from probest.evidence import Floats

__all__ = ["Chi", "Normal", "Position", "between", "log_mass"]


class Position(Protocol):
    """The law of a coordinate r along a line. All methods work elementwise."""

    @property
    def low(self) -> float:
        """The least value of r."""

    def log_sf(self, r: Floats) -> Floats:
        """log P(R > r)."""

    def log_cdf(self, r: Floats) -> Floats:
        """log P(R < r)."""

    def isf(self, log_sf: Floats) -> Floats:
        """The r whose :meth:`log_sf` this is."""


@dataclass(frozen=True)
class Normal:
    """A straight line: r is standard normal."""

    low: float = -np.inf

    def log_sf(self, r: Floats) -> Floats:
        return np.asarray(special.log_ndtr(-r), dtype=np.float64)

    def log_cdf(self, r: Floats) -> Floats:
        return np.asarray(special.log_ndtr(r), dtype=np.float64)

    def isf(self, log_sf: Floats) -> Floats:
        return np.asarray(-special.ndtri_exp(log_sf), dtype=np.float64)


@dataclass(frozen=True)
class Chi:
    """A ray from the origin: r is the norm of ``dim`` standard normals."""

    dim: int
    low: float = 0.0

    def log_sf(self, r: Floats) -> Floats:
        with np.errstate(divide="ignore"):
            return np.asarray(np.log(special.gammaincc(0.5 * self.dim, 0.5 * np.maximum(r, 0.0) ** 2)))

    def log_cdf(self, r: Floats) -> Floats:
        with np.errstate(divide="ignore"):
            return np.asarray(np.log(special.gammainc(0.5 * self.dim, 0.5 * np.maximum(r, 0.0) ** 2)))

    def isf(self, log_sf: Floats) -> Floats:
        return np.asarray(np.sqrt(2.0 * special.gammainccinv(0.5 * self.dim, np.exp(log_sf))))


def log_mass(law: Position, low: Floats, high: Floats) -> Floats:
    """log P(low < R < high), from the tail in which that is accurate; −inf where the interval is empty."""
    with np.errstate(divide="ignore", invalid="ignore"):
        above, beyond = law.log_sf(low), law.log_sf(high)
        under, below = law.log_cdf(high), law.log_cdf(low)
        upper = above + np.log(-np.expm1(np.minimum(beyond - above, 0.0)))
        lower = under + np.log(-np.expm1(np.minimum(below - under, 0.0)))
    mass = np.where(under < above, lower, upper)
    return np.asarray(np.where(np.isnan(mass), -np.inf, mass), dtype=np.float64)


def between(law: Position, low: Floats, high: Floats, share: Floats) -> Floats:
    """The r with a ``share`` (0 to 1) of the interval's mass below it."""
    upper, lower = law.log_sf(low), law.log_sf(high)
    with np.errstate(divide="ignore"):
        level = upper + np.log1p(share * np.expm1(np.minimum(lower - upper, 0.0)))
    return np.asarray(np.clip(law.isf(level), low, high), dtype=np.float64)
