"""What a learnable adversary is: a law with parameters, known by its density relative to the given adversary's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np

from probest.backends.base import Array, Parts
from probest.evidence import Floats, Particles
from probest.programs.event import Event

__all__ = ["Drawn", "Family", "Law", "Points"]

Points = dict[str, np.ndarray]
"""Draws as the law knows them: named arrays ``(n, ...)``."""


class Drawn(NamedTuple):
    """Draws of a law: what it knows them by, and log q − log p of each, ``(n,)``."""

    points: Points
    log_ratio: Floats


class Law(Protocol):
    """A law q_θ of draws of the given adversary p, whose parameters θ are in ``parts``."""

    parts: Parts

    def log_ratio(self, parts: Parts, points: dict[str, Array]) -> Array:
        """log q_θ − log p at each point, ``(n,)``, differentiable in ``parts``."""

    def draw(self, parts: Parts, n: int, rng: np.random.Generator) -> Points:
        """Draws of q_θ."""

    def plain(self, n: int, rng: np.random.Generator) -> Points:
        """Draws of p."""

    def points(self, z: Floats) -> Points:
        """Draws of p in standard-normal coordinates ``(n, dim)`` as points."""

    def features(self, points: Points) -> Floats:
        """Where points are, ``(n, k)``, in units of the given adversary's spread: near is alike."""

    def severity(self, points: Points) -> Floats:
        """Severities ``(n,)``, a model call each."""

    def program(self, parts: Parts, share: float) -> Callable[..., Any]:
        """The adversary that is q_θ with probability ``share`` and p otherwise, as a program of its library."""


class Family(Protocol):
    """A kind of law, to be built for an event."""

    def build(self, event: Event, particles: Particles, rng: np.random.Generator) -> Law:
        """A law of this kind to begin with. particles: catastrophes of the given adversary."""
