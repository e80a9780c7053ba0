"""Where a standard-normal point lies along a line: normal along a straight line, chi along a ray from the origin.

Masses of intervals and draws from them, in logarithms and accurate in both tails.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy import special, stats

from probest.estimators.base import Floats

__all__ = ["Chi", "Normal", "Position", "between", "log_mass"]


class Position(Protocol):
    """The law of a coordinate r along a line. All methods work elementwise."""

    @property
    def low(self) -> float:
        """The least value of r."""

    def log_sf(self, r: Floats) -> Floats:
        """log P(R > r)."""

    def isf(self, log_sf: Floats) -> Floats:
        """The r whose :meth:`log_sf` this is."""


@dataclass(frozen=True)
class Normal:
    """A straight line: r is standard normal."""

    low: float = -np.inf

    def log_sf(self, r: Floats) -> Floats:
        return np.asarray(special.log_ndtr(-r), dtype=np.float64)

    def isf(self, log_sf: Floats) -> Floats:
        return np.asarray(-special.ndtri_exp(log_sf), dtype=np.float64)


@dataclass(frozen=True)
class Chi:
    """A ray from the origin: r is the norm of ``dim`` standard normals."""

    dim: int
    low: float = 0.0

    def log_sf(self, r: Floats) -> Floats:
        return np.asarray(stats.chi.logsf(np.maximum(r, 0.0), self.dim), dtype=np.float64)

    def isf(self, log_sf: Floats) -> Floats:
        return np.asarray(stats.chi.isf(np.exp(log_sf), self.dim), dtype=np.float64)


def log_mass(law: Position, low: Floats, high: Floats) -> Floats:
    """log P(low < R < high); −inf where the interval is empty."""
    upper, lower = law.log_sf(low), law.log_sf(high)
    with np.errstate(divide="ignore", invalid="ignore"):
        mass = upper + np.log(-np.expm1(np.minimum(lower - upper, 0.0)))
        if isinstance(law, Normal):  # below the median the other tail is the accurate one
            mirror = law.log_sf(-high) + np.log(-np.expm1(np.minimum(law.log_sf(-low) - law.log_sf(-high), 0.0)))
            mass = np.where(high < 0.0, mirror, mass)
    return np.where(np.isnan(mass), -np.inf, mass)


def between(law: Position, low: Floats, high: Floats, share: Floats) -> Floats:
    """The r with a ``share`` (0 to 1) of the interval's mass below it."""
    upper, lower = law.log_sf(low), law.log_sf(high)
    with np.errstate(divide="ignore"):
        level = upper + np.log1p(share * np.expm1(np.minimum(lower - upper, 0.0)))
    return np.asarray(np.clip(law.isf(level), low, high), dtype=np.float64)
