"""A program of the user's as a learnable adversary: any Pyro or NumPyro program with ``param`` sites or modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from probest.backends.base import Array, Parts
from probest.evidence import Floats, Particles
from probest.guides.program import BoundProgram, ProgramGuide
from probest.programs.event import Event, ProblemError

__all__ = ["Learnable", "ProgramLaw"]

_LOG_P = "probest_log_p"


@dataclass(frozen=True)
class Learnable:
    """A family of one program: it draws the sites of the given adversary, under the same names, by laws of its own.

    program: takes no argument; what it returns is ignored, since the given adversary turns the same sites into an
    observation (a decoder that stays as it is keeps them plausible). Its parameters are ``param`` sites, or those of
    modules that it is made of: a ``torch.nn.Module`` whose ``forward`` is the program, an equinox or nnx module, or
    ``jax.tree_util.Partial``. params: first values of ``param`` sites, where not the program's own.
    """

    program: Callable[[], Any]
    params: Mapping[str, Array] = field(default_factory=dict)

    def build(self, event: Event, particles: Particles, rng: np.random.Generator) -> ProgramLaw:
        return self.law(event)

    def law(self, event: Event) -> ProgramLaw:
        """The program as it is."""
        bound = ProgramGuide(self.program, params=self.params).bind(event)
        backend = event.backend
        if not bound.parts.params and not backend.parameters(self.program):
            raise ProblemError(
                "adversary: it has no parameters to learn. Give it param sites, or make it of a module (torch "
                "nn.Module, equinox, nnx, jax.tree_util.Partial)"
            )
        return ProgramLaw(event, bound, bound.parts)


def answered(event: Event, law: ProgramLaw) -> ProgramLaw:
    """The law of an adversary whose model draws sites too, from one of all sites (:meth:`Event.opened`), which is of a
    module whose ``adversary`` draws the adversary's own.
    """
    return _Answered(law.event, law.bound, law.parts, event)


@dataclass
class ProgramLaw:
    """A :class:`~probest.adversaries.base.Law`; its points are the values of the sites, and their density under p."""

    event: Event
    bound: BoundProgram
    parts: Parts

    def log_ratio(self, parts: Parts, points: dict[str, Array]) -> Array:
        values = {name: value for name, value in points.items() if name != _LOG_P}
        return self.bound.log_density(parts, values) - points[_LOG_P]

    def draw(self, parts: Parts, n: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        size = sum(site.size for site in self.bound.sites)
        return self._weighed(self.bound.values(parts, self.bound.sites, rng.standard_normal((n, size))))

    def plain(self, n: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        return self.points(rng.standard_normal((n, self.event.dim)))

    def points(self, z: Floats) -> dict[str, np.ndarray]:
        return self._weighed(self.bound.values(self.event.parts, self.event.sites, z))

    def features(self, points: dict[str, np.ndarray]) -> Floats:
        usual = self.plain(256, np.random.Generator(np.random.Philox(0)))
        names = [name for name in points if name != _LOG_P]
        spread = {name: np.maximum(usual[name].std(axis=0), 1e-12) for name in names}
        return np.concatenate([(points[n] / spread[n]).reshape(len(points[n]), -1) for n in names], axis=1)

    def severity(self, points: dict[str, np.ndarray]) -> Floats:
        values = {name: value for name, value in points.items() if name != _LOG_P}
        possible = np.flatnonzero(np.isfinite(points[_LOG_P]))
        severity = np.full(len(points[_LOG_P]), -np.inf)
        held = {name: value[possible] for name, value in values.items()}
        severity[possible] = self.event.evaluate(np.zeros((len(possible), self.event.dim)), held=held).severity
        return severity

    def program(self, parts: Parts, share: float) -> Callable[..., Any]:
        """``learnt`` chooses; sites of the given adversary are ``given/…``, those of the learnt one ``other/…``."""
        event = self.event
        frontend, backend = event.composition.frontend, event.backend
        xp = backend.special.xp

        def mixed() -> Any:
            chosen = frontend.sample("learnt", "Bernoulli", backend.from_host(np.asarray(share)))
            given = frontend.scoped(event.parts.adversary, "given")()
            held = self.bound.draws(parts, "other")
            other = event.composition.replay(event.parts, xp.zeros(event.dim), held=held)
            return backend.tree_map(lambda a, b: xp.where(chosen == 1, a, b), other, given)

        return mixed

    def _weighed(self, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        log_p, inside = self.bound.density(self.event.parts, values)
        return values | {_LOG_P: np.where(inside, log_p, -np.inf)}


@dataclass
class _Answered(ProgramLaw):
    """asked: the event before its adversary was made to draw what the model draws."""

    asked: Event

    def severity(self, points: dict[str, np.ndarray]) -> Floats:
        return ProgramLaw(self.asked, self.bound, self.parts).severity(points)

    def program(self, parts: Parts, share: float) -> Callable[..., Any]:
        """As of any law, but what is learnt draws the adversary's own sites alone."""
        own = parts._replace(adversary=parts.adversary.adversary)
        return ProgramLaw(self.asked, replace(self.bound, event=self.asked), own).program(own, share)
