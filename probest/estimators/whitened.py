r"""Coordinates in which a conditioned adversary is standard normal, where there are such: linear-Gaussian programs.

Where the log-weight of observed sites is a quadratic function of z, the adversary given its observations is Gaussian,
with precision :math:`H = I - \nabla^2 \log w` and mean :math:`\mu = H^{-1} \nabla \log w(0)`. In
:math:`u = L^{-1}(z - \mu)`, :math:`L L^T = H^{-1}`, nothing is left of the condition but a constant, the evidence. So
every method works there as without observations: lines, plain draws, moments. State spaces with linear dynamics and
Gaussian noise are of this kind, however many observations they have.

Whether the weight is a quadratic is not assumed but tried, near and far: where it is not, the inner method runs on the
problem as it is.

Reference: Kalman (1960), in one step instead of recursively.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any

import numpy as np
import scipy

from probest.backends.base import Array, Parts
from probest.budget import Meter, UndefinedError
from probest.estimators.base import Estimator
from probest.evidence import Evaluation, EventLike, Evidence, Floats, Particles, Run
from probest.seeds import child_seed, generator
from probest.tuning import tuned

__all__ = ["Whitened"]

_GIVEN = "given.py (observed)"


@dataclass(frozen=True)
class WhitenedTuning:
    """When it is tried, and what counts as a quadratic."""

    most: int = tuned(300, "coordinates, at most", "by its meaning: the cube of it is time")
    share: float = tuned(0.2, "of the budget, at most, for the curvature (6 calls a coordinate)", _GIVEN)
    step: float = tuned(0.5, "of the differences: exact for a quadratic, and large beside rounding", _GIVEN)
    draws: int = tuned(200, "of the conditioned adversary, which try it", _GIVEN)
    far: float = tuned(3.0, "times as far out, half of them", _GIVEN)
    constant: float = tuned(0.01, "nats by which what should be constant may vary, near", _GIVEN)


class Stream(IntEnum):
    """Names of the seeds of a run."""

    TRY = 0
    INNER = 1


@dataclass(frozen=True)
class Whitened:
    """``inner``, in coordinates in which a conditioned adversary is standard normal; as it is where there are none.

    warm_start: particles of an earlier run, for an inner method that takes some.
    """

    inner: Estimator
    warm_start: Particles | None = field(default=None, repr=False, compare=False)
    tuning: WhitenedTuning = field(default_factory=WhitenedTuning, repr=False)

    @property
    def name(self) -> str:
        return self.inner.name

    def run(self, event: EventLike, *, budget: int, seed: np.random.SeedSequence) -> Run:
        """As the inner method's; catastrophes are in the event's own coordinates."""
        meter = Meter(event, budget)
        found = self._found(event, meter, seed)
        if found is None:  # whatever was spent on it is a part of the budget: some is left
            run = self._warmed(None).run(event, budget=meter.left, seed=seed)
            return _counted(run, meter.calls)
        white, drawn = found
        run = self._warmed(white).run(white, budget=meter.left, seed=child_seed(seed, Stream.INNER))
        ledger = tuple(white.restored(line) for line in run.ledger)
        last = replace(ledger[-1], prior_particles=drawn)
        population = run.population
        if population is not None:
            population = population._replace(z=white.place(population.z), rows=None)
        return _counted(replace(run, ledger=(*ledger[:-1], last), population=population), meter.calls)

    def _warmed(self, white: _WhiteEvent | None) -> Any:
        if self.warm_start is None or "warm_start" not in getattr(self.inner, "__dataclass_fields__", ()):
            return self.inner
        start = self.warm_start
        if white is not None:
            start = start._replace(z=white.coordinates(start.z))
        return replace(self.inner, warm_start=start)  # type: ignore[type-var]

    def _found(
        self, event: EventLike, meter: Meter, seed: np.random.SeedSequence
    ) -> tuple[_WhiteEvent, Particles] | None:
        """The event in white coordinates, and draws of the conditioned adversary; None where there are none."""
        tuning, dim = self.tuning, event.dim
        price = 6 * dim + 3 + 2 * tuning.draws
        discrete = getattr(event, "discrete_sites", ())
        if not event.weighted or not event.differentiable or discrete or dim > tuning.most:
            return None
        if price > tuning.share * meter.budget:
            return None
        steps = tuning.step * np.eye(dim)
        try:
            rise = meter.evaluate(np.concatenate([np.zeros((1, dim)), steps, -steps]), gradient=True).log_weight_grad
        except UndefinedError:
            return None
        if rise is None or not np.isfinite(rise).all():
            return None
        curvature = (rise[1 : dim + 1] - rise[dim + 1 :]) / (2.0 * tuning.step)
        precision = np.eye(dim) - 0.5 * (curvature + curvature.T)
        try:
            factor = np.linalg.cholesky(precision)
        except np.linalg.LinAlgError:
            return None
        scale = scipy.linalg.solve_triangular(factor, np.eye(dim), lower=True).T  # scale scaleᵀ = precision⁻¹
        white = _WhiteEvent(event, scale @ (scale.T @ rise[0]), scale, 0.0)
        u = generator(child_seed(seed, Stream.TRY)).standard_normal((2 * tuning.draws, dim))
        u[tuning.draws :] *= tuning.far
        z = white.place(u)
        try:
            at = meter.evaluate(z)
        except UndefinedError:
            return None
        rest = at.log_weight + 0.5 * np.sum(u * u, axis=1) - 0.5 * np.sum(z * z, axis=1)
        room = tuning.constant * np.where(np.arange(len(u)) < tuning.draws, 1.0, tuning.far**2)
        level = float(np.median(rest[: tuning.draws]))
        if not (np.abs(rest - level) <= room).all():
            return None
        evidence = level - float(np.sum(np.log(np.diag(factor))))
        equal = np.full(tuning.draws, -math.log(tuning.draws))
        drawn = Particles(z[: tuning.draws], equal, at.severity[: tuning.draws])
        return replace(white, log_evidence=evidence), drawn


@dataclass(frozen=True)
class _WhiteEvent:
    """An event in coordinates u of which z = mean + scale u."""

    event: Any
    mean: Floats
    scale: Floats
    log_evidence: float

    weighted = False

    @property
    def dim(self) -> int:
        return int(self.event.dim)

    @property
    def differentiable(self) -> bool:
        return bool(self.event.differentiable)

    @property
    def boolean(self) -> bool:
        return bool(self.event.boolean)

    @property
    def backend(self) -> Any:
        return self.event.backend

    def place(self, u: Floats) -> Floats:
        z: Floats = self.mean + u @ self.scale.T
        return z

    def coordinates(self, z: Floats) -> Floats:
        return np.asarray(np.linalg.solve(self.scale, (z - self.mean).T).T, dtype=np.float64)

    def evaluate(self, z: Floats, *, gradient: bool = False) -> Evaluation:
        found = self.event.evaluate(self.place(z), gradient=gradient)
        slope = None if found.severity_grad is None else found.severity_grad @ self.scale
        return Evaluation(found.severity, np.zeros(len(z)), slope)

    @property
    def branches(self) -> Any:
        return self.event.branches

    def function(self, parts: Parts | None = None, *, apart: bool = False) -> Callable[[Array], Array]:
        """As :meth:`probest.programs.event.Event.function`."""
        whole, put = self.event.function(parts, apart=apart), self.backend.from_host
        mean, scale = put(self.mean), put(self.scale)
        return lambda u: whole(mean + scale @ u)

    def restored(self, line: Evidence) -> Evidence:
        """A line of evidence with its particles in the event's own coordinates."""
        particles = line.particles
        if particles is not None:
            particles = particles._replace(z=self.place(particles.z))
        return replace(line, particles=particles, log_evidence=self.log_evidence)


def _counted(run: Run, calls: int) -> Run:
    """The run with calls that were made before it."""
    last = run.ledger[-1]
    ledger = (*run.ledger[:-1], replace(last, calls=last.calls + calls))
    return replace(run, ledger=ledger, calls=run.calls + calls)
