r"""log P as it is read from the weights, as what a model is trained against: no case is drawn for it.

At each step the present model is read anew (:class:`probest.MomentPropagation`): its severity is brought into layers,
tilted to where a catastrophe mostly happens, and propagated. The number is differentiable in the weights, and its
gradient is what the model steps down.

Hard cases, for a teacher's answers, are draws about the tilts.

*When it fails.* As the reading does: narrow networks, and severities far from Gaussian near the event. Training moves a
model to where its estimate is lowest, which may be where the estimate is wrong; the audit reads nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from scipy import special

from probest.backends.base import Array, Hard, Parts
from probest.estimators.base import UnmetNeedError
from probest.estimators.moments import MomentPropagation, Reading, StratifiedReading
from probest.evidence import Floats, Particles
from probest.guides.base import allocate
from probest.programs.event import Event
from probest.programs.strata import Strata
from probest.training.follower import Cases, in_strata

__all__ = ["Reader"]


@dataclass
class Reader:
    """particles: draws about the tilts at a step. log_prob: as read at the last step; last: its draws."""

    particles: int
    dim: int
    log_prob: float = math.nan
    method: MomentPropagation = field(default_factory=lambda: MomentPropagation(look=0))
    weigher: Reading | StratifiedReading | None = None
    last: Cases | None = None

    @classmethod
    def built(cls, event: Event, particles: int, rng: np.random.Generator) -> Reader:
        """Reads the event once. Raises ValueError where it cannot be read."""
        found = cls(particles, event.dim)
        try:
            found._read(event, rng)
        except UnmetNeedError as error:
            raise ValueError(f"objective='reading': {error}") from error
        if found.weigher is None:
            raise ValueError(
                "objective='reading': the model and its checker cannot be read. See what "
                "estimate(problem, estimator=MomentPropagation()) says, or use objective='log_prob'"
            )
        return found

    @property
    def strata(self) -> Strata | None:
        """Those that the reading holds."""
        return self.weigher.strata if isinstance(self.weigher, StratifiedReading) else None

    def advance(self, event: Event, rng: np.random.Generator) -> None:
        """Read the event as it is now."""
        self._read(event, rng)
        self.last = self._drawn(event, rng)

    def cases(self) -> Cases:
        """Draws about the tilts."""
        assert self.last is not None
        return self.last

    def pressure(self, event: Event, cases: Cases) -> Callable[[Parts], Array] | Hard | None:
        """log P as a function of the parameters; None where the present model could not be read."""
        return None if self.weigher is None else self.weigher(event)

    def severity_of(self, event: Event, z: Floats, group: np.ndarray) -> Floats:
        """Severities ``(n,)`` at z ``(n, dim)`` in the strata ``group`` ``(n,)``, a call each."""
        return in_strata(event, self.strata, False, z, group, gradient=False).severity

    def noise_of(self, group: np.ndarray) -> Floats:
        """The standard deviation of severities about the tilts."""
        return np.full(len(group), 1.0 if self.last is None else float(self.last.noise[0]))

    def welcome(self, particles: Particles, rng: np.random.Generator) -> None:
        """What others found changes no reading."""

    def arrays(self) -> dict[str, np.ndarray]:
        """Nothing but the number: the rest is read from the model."""
        return {"log_prob": np.array(self.log_prob)}

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        self.log_prob = float(arrays["log_prob"])

    def _read(self, event: Event, rng: np.random.Generator) -> None:
        seed = np.random.SeedSequence(int(rng.integers(2**63)))
        line = self.method.run(event, budget=self.method.max_strata, seed=seed).conclusion  # which spends none of it
        known = math.isfinite(line.log_prob) and line.weigher is not None
        self.log_prob, self.weigher = (line.log_prob, line.weigher) if known else (math.nan, None)

    def _drawn(self, event: Event, rng: np.random.Generator) -> Cases:
        """Equal draws of each tilt, in the stratum it is of, weighed as draws of the adversary."""
        tilts, group = self._tilts()
        owner = np.repeat(np.arange(len(tilts)), allocate(self.particles, np.full(len(tilts), 1.0 / len(tilts)), rng))
        z = tilts[owner] + rng.standard_normal((len(owner), self.dim))
        severity = self.severity_of(event, z, group[owner])
        log_w = -np.einsum("ij,ij->i", tilts[owner], z) + 0.5 * np.sum(tilts[owner] ** 2, axis=1)
        log_w = np.where(severity >= 0.0, log_w, -np.inf)
        total = special.logsumexp(log_w)
        share = np.exp(log_w - total) if math.isfinite(total) else np.full(len(z), 1.0 / len(z))
        held = {} if self.strata is None else self.strata.held(group[owner])
        return Cases(z, held, severity, np.full(len(z), max(float(severity.std()), 1e-12)), share, group[owner])

    def _tilts(self) -> tuple[Floats, np.ndarray]:
        """The tilts ``(m, dim)`` and their strata; the middle of the adversary where there are none."""
        readings: dict[int, Reading | None] = {}
        if isinstance(self.weigher, StratifiedReading):
            readings = {k: r for k, r in enumerate(self.weigher.readings) if self.weigher.shares[k] > 0.0}
        elif self.weigher is not None:
            readings = {0: self.weigher}
        free = slice(None) if self.strata is None else self.strata.free
        rows, group = [], []
        for k, reading in readings.items():
            for tilt in () if reading is None else reading.tilts:
                row = np.zeros(self.dim)
                row[free] = tilt.input
                rows.append(row)
                group.append(k)
        return (np.stack(rows), np.array(group)) if rows else (np.zeros((1, self.dim)), np.zeros(1, dtype=np.intp))
