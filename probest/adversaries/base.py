"""What a learnable adversary is: a law with parameters, known by its density relative to the given adversary's."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from probest.backends.base import Array, Backend, Parts
from probest.evidence import Floats, Particles
from probest.programs.event import Event

__all__ = ["Drawn", "Family", "Law", "Opponent", "Playable", "Points", "ratio_of"]

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


class Opponent(Protocol):
    """A law with its parameters that :func:`probest.train` plays against (:mod:`probest.training.opponents`)."""

    def cases(self, event: Event, n: int, rng: np.random.Generator) -> tuple[Floats, np.ndarray | None]:
        """About n draws as coordinates ``(n, dim)`` from which the event's adversary draws the same, and the strata
        that they are in, where the coordinates do not say.
        """

    def distance(self, other: Any, rng: np.random.Generator) -> float:
        """KL(this ‖ other) in nats, of another of its kind."""

    def played(self) -> Callable[..., Any]:
        """As a program of its library."""

    def arrays(self) -> dict[str, np.ndarray]:
        """Its parameters by name, for a checkpoint."""


class Playable(Family, Protocol):
    """A family whose laws can be opponents."""

    def check_playable(self, event: Event) -> None:
        """Raises ProblemError where its laws of this event cannot be."""

    def turned(self, turn: int) -> Family:
        """What begins the search of so many: not always from the same place."""

    def opponent(self, event: Event, law: Law, parts: Parts) -> Opponent:
        """A law that was learnt, as an opponent."""

    def restored(self, event: Event, arrays: dict[str, np.ndarray]) -> Opponent:
        """The opponent with these parameters, as :meth:`Opponent.arrays` gives them."""


@dataclass(frozen=True, eq=False)
class _Ratio:
    """What a law says of points, for a backend to compile; the same for the same law."""

    law: Law

    def __call__(self, parts: Parts, z: Array, held: Points) -> Array:
        del z
        return self.law.log_ratio(parts, held)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Ratio) and other.law is self.law

    def __hash__(self) -> int:
        return id(self.law)


def ratio_of(backend: Backend, law: Law, parts: Parts, points: Points) -> Floats:
    """log q_θ − log p₀ at points ``(n,)``, on the host; ``-inf`` where q draws nothing."""
    rows = np.zeros((len(next(iter(points.values()))), 1))
    with backend.no_gradient():
        found = backend.on_host(_Ratio(law), parts, rows, points)[0]
    return np.asarray(np.where(np.isnan(found), -math.inf, found), dtype=np.float64)
