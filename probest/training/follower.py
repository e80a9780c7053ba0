"""What follows the catastrophes of a model while it trains, and the hard cases that it gives."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np

from probest.evidence import Floats, Particles
from probest.programs.event import Event
from probest.programs.strata import Strata

__all__ = ["Cases", "Follower"]


class Cases(NamedTuple):
    """Hard cases of the present model.

    z ``(n, dim)``; held: values of the held sites ``(n, ...)``; severity ``(n,)``; noise ``(n,)``: σ of each, in units
    of severity; share ``(n,)``: its part of the gradient, sum 1; group ``(n,)``: its stratum.
    """

    z: Floats
    held: dict[str, np.ndarray]
    severity: Floats
    noise: Floats
    share: Floats
    group: np.ndarray


class Follower(Protocol):
    """The ladder (:mod:`probest.training.ladder`), or guides (:mod:`probest.training.pursuit`)."""

    strata: Strata | None

    @property
    def log_prob(self) -> float:
        """log P as it follows it; NaN before its first step."""

    def cases(self) -> Cases:
        """The cases of its last step, with what training on them takes."""

    def advance(self, event: Event, rng: np.random.Generator) -> None:
        """Follow the event as it is now."""

    def severity_of(self, event: Event, z: Floats, group: np.ndarray) -> Floats:
        """Severities ``(n,)`` at z ``(n, dim)`` in the strata ``group`` ``(n,)``, a call each."""

    def noise_of(self, group: np.ndarray) -> Floats:
        """The least σ in the strata ``group`` ``(n,)``."""

    def welcome(self, particles: Particles, rng: np.random.Generator) -> None:
        """Learn of catastrophes that another search found."""

    def arrays(self) -> dict[str, np.ndarray]:
        """All that changes, by name, for a checkpoint."""

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Raises ValueError if these are of another run."""
