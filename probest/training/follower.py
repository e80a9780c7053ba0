"""What follows the catastrophes of a model while it trains, and the hard cases that it gives."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np

from probest.backends.base import Array, Hard, Parts
from probest.evidence import Evaluation, Floats, Particles
from probest.programs.event import Event
from probest.programs.strata import Strata

__all__ = ["Cases", "Follower", "averaged", "hard", "in_strata", "learn_spread", "spread_of"]


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
    """The ladder (:mod:`probest.training.ladder`), guides (:mod:`probest.training.pursuit`), or a reading of the model
    (:mod:`probest.training.reader`).
    """

    @property
    def strata(self) -> Strata | None:
        """Whose index ``group`` is."""

    @property
    def log_prob(self) -> float:
        """log P as it follows it; NaN before its first step."""

    def cases(self) -> Cases:
        """The cases of its last step, with what training on them takes."""

    def pressure(self, event: Event, cases: Cases) -> Hard | Callable[[Parts], Array] | None:
        """What the model steps down: particles among ``cases``, or a function of the parameters; None for nothing."""

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


def hard(event: Event, cases: Cases) -> Hard:
    """The cases as particles whose probability of catastrophe is stepped down.

    Discrete sites whose law may depend on the model, since it draws them or runs before they are drawn, are held at
    their values: what it does to their probabilities is a part of the gradient (their scores), and z has none of it.
    Not so where the adversary is conditioned: what the model does to the observations' probability would count too.
    """
    held, interleaved = dict(cases.held), event.composition.interleaved
    if interleaved and event.weighted:
        return Hard(cases.z, held, cases.noise, cases.share, np.zeros(len(cases.z)))
    if interleaved and set(event.discrete_sites) - set(held):
        found = event.decode(cases.z, held).sites
        event.model_calls += len(cases.z)
        held |= {name: found[name] for name in event.discrete_sites if name not in held and name in found}
    return Hard(cases.z, held, cases.noise, cases.share, cases.share)


def in_strata(
    event: Event, strata: Strata | None, weighted: bool, z: Floats, group: np.ndarray, *, gradient: bool
) -> Evaluation:
    """The event with each row in its stratum; log-weights are 0 where the adversary is not conditioned."""
    found = event.evaluate(z, gradient=gradient, held=None if strata is None else strata.held(group))
    return found if weighted else Evaluation(found.severity, np.zeros(len(z)), found.severity_grad)


def spread_of(spread: Floats, group: np.ndarray) -> Floats:
    """g of the strata ``group`` ``(n,)``; the usual one where nothing is known yet."""
    usual = float(np.nanmedian(spread)) if np.isfinite(spread).any() else 1.0
    return np.asarray(np.where(np.isnan(spread), usual, spread)[group])


def learn_spread(spread: Floats, slope: Floats, group: np.ndarray, keep: float) -> None:
    """g of each stratum, in place: the median slope ``(n,)`` of its rows, averaged with what was known."""
    for k in np.unique(group):
        mine = slope[(group == k) & np.isfinite(slope) & (slope > 0.0)]
        if mine.size:
            spread[k] = averaged(spread[k], float(np.median(mine)), keep)
        elif np.isnan(spread[k]):
            spread[k] = 1.0


def averaged(old: float, new: float, keep: float) -> float:
    """A running mean, of which ``keep`` is what there was; the new value alone where there was nothing."""
    return new if math.isnan(old) else keep * old + (1.0 - keep) * new
