"""The libraries' own autoguides as proposals: trained by SVI on a softened program in standard-normal coordinates.

    softened = problem.conditioned(0.5, gaussianized=True)
    auto = AutoMultivariateNormal(softened)             # and SVI, as ever
    estimate(problem, guide=Autoguide(auto, params))

An autoguide draws all sites at once, from a law over one vector. In standard-normal coordinates that vector is z but
for its order, so its law is a proposal on z like any other: with a share of the adversary's own draws, and held against
catastrophes that tempering finds (:mod:`probest.estimators.importance`).

It fails where a mode is missing, as variational guides do that were trained by their own draws; the check says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from probest.backends.base import Array
from probest.evidence import Floats
from probest.guides.base import Defensive, Prior
from probest.programs.base import BASE, Posterior
from probest.programs.event import Event, ProblemError

__all__ = ["Autoguide"]


@dataclass(frozen=True)
class Autoguide:
    """A trained autoguide of ``problem.conditioned(temperature, gaussianized=True)``, for ``estimate(..., guide=)``.

    auto: the autoguide. params: what SVI found, for NumPyro (``svi_result.params``); Pyro keeps them in the guide.
    prior: share of samples drawn from the adversary itself, between 0 and 1.
    """

    auto: Any
    params: Mapping[str, Array] = field(default_factory=dict)
    prior: float = 0.1

    def __post_init__(self) -> None:
        if not 0.0 < self.prior < 1.0:
            raise ValueError(f"prior must be between 0 and 1 (a share of the samples), got {self.prior}")

    def bind(self, event: object) -> Defensive:
        """The guide of this event.

        Raises ProblemError where it is of another program, has no density of its own, or the event is no program.
        """
        if not isinstance(event, Event):
            raise ProblemError("an autoguide can only guide a problem that is a program: build it with Problem(...)")
        found = event.composition.frontend.posterior(self.auto, self.params)
        wanted = {site.name + BASE: site for site in event.sites if site.size}
        if set(found.places) != set(wanted):
            raise ProblemError(
                f"guide: the autoguide draws {', '.join(map(repr, sorted(found.places)))}; make it of "
                "problem.conditioned(temperature, gaussianized=True), whose sites are "
                f"{', '.join(map(repr, sorted(wanted)))}"
            )
        order = np.concatenate([found.places[name].ravel() for name in wanted])
        law = _Law(found, order)
        try:
            law.log_ratio(np.zeros((1, event.dim)))
        except NotImplementedError as error:
            raise ProblemError(
                f"guide: {type(self.auto).__name__} has no density at points that it has not drawn itself, so its "
                "samples cannot be weighed; use one that has, such as AutoMultivariateNormal"
            ) from error
        return Defensive((law, Prior(event.dim)), (1.0 - self.prior, self.prior))


@dataclass(frozen=True)
class _Law:
    """A law over a vector as a guide on z. order ``(dim,)``: where each coordinate of z stands in the vector."""

    found: Posterior
    order: np.ndarray

    @property
    def dim(self) -> int:
        return len(self.order)

    def sample(self, n: int, rng: np.random.Generator) -> Floats:
        if not n:
            return np.empty((0, self.dim))
        draws: Callable[[int, int], np.ndarray] = self.found.sample
        return np.asarray(draws(n, int(rng.integers(2**31)))[:, self.order], dtype=np.float64)

    def log_ratio(self, z: Floats) -> Floats:
        vector = np.empty_like(z)
        vector[:, self.order] = z
        log_phi = -0.5 * np.sum(z**2, axis=1) - 0.5 * self.dim * np.log(2.0 * np.pi)
        return np.asarray(log_phi - self.found.log_prob(vector), dtype=np.float64)
