r"""Distilling: a student learns the severity, and what it knows is the guide.

A student (:mod:`probest.surrogates.student`) is taught all answers of the model so far, gradients among them. Tempering
on the student, which costs no model calls, gives particles of :math:`\varphi\,\Phi(\hat s/\hat\sigma)`; the model
answers at some of these, with gradients, and the student is taught again. They lie where the student is unsure *and*
where the adversary goes. When the answers show that enough fresh samples are affordable, or a share of the budget is
spent, one more and larger tempering on the student gives its mass Z, and the guide (:mod:`probest.surrogates.guide`).

What the student does not know of is the guide's to lack: looks that know nothing of it are held against it, as against
any guide (:mod:`probest.guides.memory`).

References: Dubourg, Sudret & Deheeger (2013), Metamodel-based importance sampling for structural reliability analysis;
Bourinet (2016), Rare-event probability estimation with adaptive support vector regression surrogates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from probest import diagnostics
from probest.budget import GRADIENT_CALLS, Meter
from probest.estimators.tempering import Tempering
from probest.evidence import Evidence, Floats, Run
from probest.seeds import child_seed, generator
from probest.smc.families import pool
from probest.surrogates.features import Softened
from probest.surrogates.guide import DistilledGuide
from probest.surrogates.student import Distilled, Student
from probest.surrogates.watched import Watched
from probest.tuning import tuned

__all__ = ["DistillingTuning", "distilled_guide"]

_FREE = 10**12
_BY = "networks.py"


@dataclass(frozen=True)
class DistillingTuning:
    """How a student is made a guide of. Set by hand on random networks other than the benchmark's."""

    least_slopes: int = tuned(100, "gradients to learn from, at least", _BY)
    share: float = tuned(0.35, "of the budget that is left, for its lessons", _BY)
    rounds: int = tuned(10, "lessons at most", _BY)
    least_asked: int = tuned(100, "cases asked in each round, at least", _BY)
    most_asked: int = tuned(2_000, "the same, at most", _BY)
    affordable: float = tuned(0.4, "of the budget that is left, for fresh samples that would do", _BY)
    particles: int = tuned(1_024, "of the temperings while it learns, which cost no model calls", _BY)
    last_particles: int = tuned(8_192, "of each of the last", _BY)
    moves: int = tuned(4, "of each particle on each level, at most", _BY)
    runs: int = tuned(6, "last temperings, at most", _BY)
    exact: float = tuned(0.6, "times the precision: the error of its mass that ends them", _BY)
    roughly: float = tuned(0.1, "nats: the same for a trial of the guide", _BY)


class Stream(IntEnum):
    """Names of the seeds."""

    TEACH = 0
    TEMPER = 1
    ASK = 2
    LAST = 3
    MORE = 4


class Asked(NamedTuple):
    """What the model said of a student's particles: how many they were and how many are worth their weights."""

    cases: int
    effective: float


def distilled_guide(
    student: Student,
    meter: Meter,
    *,
    precision: float,
    budget: int,
    seed: np.random.SeedSequence,
    trial: bool = False,
    tuning: DistillingTuning | None = None,
) -> DistilledGuide | None:
    """The guide of a student that learns from all answers so far and, with so many calls at most, from more.

    trial: its mass need not be known well yet. None where it learned nothing that leads to a catastrophe, or where
    nobody watched the event.
    """
    tuning = tuning or DistillingTuning()
    watched = meter.event
    if not isinstance(watched, Watched):
        return None
    spent = int(tuning.share * budget)
    size = int(np.clip(spent // (GRADIENT_CALLS * tuning.rounds), tuning.least_asked, tuning.most_asked))
    stop = meter.calls + spent
    known: Distilled | None = None
    for turn in range(tuning.rounds + 1):
        cases = watched.cases()
        if np.count_nonzero(~np.isnan(cases.slope[:, 0])) < tuning.least_slopes:
            return None
        known = student.teach(cases, generator(child_seed(seed, Stream.TEACH, turn)))
        if known is None:
            return None
        if meter.calls + GRADIENT_CALLS * size > stop:
            break
        rng = generator(child_seed(seed, Stream.ASK, turn))
        run = _tempered(known, tuning.particles, tuning, child_seed(seed, Stream.TEMPER, turn))
        if run is None:
            student.known = known._replace(noise=2.0 * known.noise)
            continue
        asked = _asked(student, meter, _particles(run, rng)[:size], rng)
        if asked.effective > 0.1 * tuning.least_asked:
            needed = asked.cases / asked.effective / precision**2
            if needed < tuning.affordable * (budget - (meter.calls - stop + spent)):
                break
    known = student.known
    assert known is not None
    return _guide(known, tuning.roughly if trial else tuning.exact * precision, seed, tuning)


def _asked(student: Student, meter: Meter, u: Floats, rng: np.random.Generator) -> Asked:
    """Ask the model at a student's particles."""
    known = student.known
    assert known is not None
    z = rng.standard_normal((len(u), meter.event.dim))
    z += (u - z @ known.basis) @ known.basis.T
    severity = meter.evaluate(z, gradient=True).severity
    log_w = np.where(severity >= 0.0, -known.log_chance(u), -np.inf)
    student.examined(u, severity)
    effective = diagnostics.effective_sample_size(log_w)
    student.proven = effective > 2.0
    return Asked(len(u), effective)


def _guide(
    known: Distilled, error: float, seed: np.random.SeedSequence, tuning: DistillingTuning
) -> DistilledGuide | None:
    """Temper on the student until its mass is known to ``error`` nats."""
    runs: list[Run] = []
    while len(runs) < tuning.runs:
        run = _tempered(known, tuning.last_particles, tuning, child_seed(seed, Stream.LAST, len(runs)))
        if run is not None:
            runs.append(run)
        elif not runs:
            return None
        if (len(runs) > 1 or error >= tuning.roughly) and pool(runs).std_error <= error:
            break
    mass: Evidence = pool(runs)
    rng = generator(child_seed(seed, Stream.MORE))
    ready = [_particles(run, rng) for run in runs]
    ready = [np.concatenate(ready)[rng.permutation(sum(map(len, ready)))]]
    later = iter(range(10**9))

    def more() -> Floats:
        if ready:
            return ready.pop()
        run = _tempered(known, tuning.last_particles, tuning, child_seed(seed, Stream.MORE, next(later)))
        return np.empty((0, known.basis.shape[1])) if run is None else _particles(run, rng)

    return DistilledGuide(known, mass.log_prob, mass.std_error, more)


def _tempered(known: Distilled, particles: int, tuning: DistillingTuning, seed: np.random.SeedSequence) -> Run | None:
    """Temper on the student; None when there is no way to its event."""
    method = Tempering(particles=particles, max_moves=tuning.moves)
    event = Softened(known, known.basis.shape[1] + 1)
    run = method.run(event, budget=_FREE, seed=seed)
    return None if run.population is None or not math.isfinite(run.conclusion.log_prob) else run


def _particles(run: Run, rng: np.random.Generator) -> Floats:
    """Equally weighted particles of the student's guide, in random order."""
    assert run.population is not None
    population = run.population
    rows = diagnostics.systematic_resample(population.log_w, len(population.z), rng)
    return population.z[rng.permutation(rows), :-1]
