r"""Distilling: a student learns the severity, and what it knows is the guide.

A student (:mod:`probest.surrogates.student`) is taught all answers of the model so far, gradients among them. Tempering
on the student, which costs no model calls, gives particles of :math:`\varphi\,\Phi(\hat s/\hat\sigma)`; the model
answers at some of these, with gradients, and the student is taught again. They lie where the student is unsure *and*
where the adversary goes. When the answers show that enough fresh samples are affordable, or a share of the budget is
spent, one more and larger tempering on the student gives its mass Z, and the guide (:mod:`probest.surrogates.guide`).

The student is asked where it is unsure, so that its answers there do not show what it is wrongly sure of. In a
class of the digits network two fifths of all catastrophes lay where it held them to be out of the question. So a part
of all cases, and of the guide, takes its error to be several times as large: what lies there turns up, with large
weights until it is learned. In that class, a third still did not.

What the student does not know of is the guide's to lack: looks that know nothing of it are held against it, as against
any guide (:mod:`probest.guides.memory`).

References: Dubourg, Sudret & Deheeger (2013), Metamodel-based importance sampling for structural reliability analysis;
Bourinet (2016), Rare-event probability estimation with adaptive support vector regression surrogates.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from itertools import count
from typing import NamedTuple

import numpy as np

from probest import diagnostics
from probest.budget import GRADIENT_CALLS, Meter
from probest.estimators.tempering import Tempering
from probest.evidence import Floats, Run
from probest.guides.base import Defensive, allocate
from probest.seeds import child_seed, generator
from probest.smc.families import pool
from probest.surrogates.features import Softened
from probest.surrogates.guide import DistilledGuide
from probest.surrogates.student import Distilled, Student
from probest.surrogates.watched import Watched
from probest.tuning import tuned

__all__ = ["DistillingTuning", "Taught", "distilled_guide", "tempered"]

_FREE = 10**12
_BY = "networks.py"


@dataclass(frozen=True)
class DistillingTuning:
    """How a student is made a guide of. Set by hand, on the first dozen random networks of the benchmark."""

    least_slopes: int = tuned(100, "gradients to learn from, at least", _BY)
    share: float = tuned(0.35, "of the budget that is left, for its lessons", _BY)
    rounds: int = tuned(10, "lessons at most", _BY)
    least_asked: int = tuned(100, "cases asked in each round, at least", _BY)
    most_asked: int = tuned(2_000, "the same, at most", _BY)
    wide: float = tuned(5.0, "times the student's error, that a part of the guide takes it to be", _BY)
    least_wide: float = tuned(0.3, "deviations of z, that it is taken to be there at least", _BY)
    wide_share: float = tuned(0.3, "of the samples, from that part", _BY)
    affordable: float = tuned(0.4, "of the budget that is left, for fresh samples that would do", _BY)
    particles: int = tuned(1_024, "of the temperings while it learns, which cost no model calls", _BY)
    last_particles: int = tuned(8_192, "of each of the last, at most", _BY)
    least_last: int = tuned(2_048, "the same, at least", _BY)
    one_error: float = tuned(5.0, "over the root of their number: the usual error of one of them, in nats", _BY)
    moves: int = tuned(4, "of each particle on each level, at most", _BY)
    runs: int = tuned(6, "last temperings, at most", _BY)
    exact: float = tuned(0.6, "times the precision: the error of its mass that ends them", _BY)
    roughly: float = tuned(0.1, "nats: the same for a trial of the guide", _BY)

    @property
    def shares(self) -> tuple[float, float]:
        """Of the samples, from the part with the student's own error and from the wide one."""
        return 1.0 - self.wide_share, self.wide_share


class Stream(IntEnum):
    """Names of the seeds."""

    TEACH = 0
    TEMPER = 1
    ASK = 2
    LAST = 3
    MORE = 4


class Taught(NamedTuple):
    """A guide that a student knows, and the error of the logarithm of its density, in nats."""

    guide: Defensive
    error: float


def distilled_guide(
    student: Student,
    meter: Meter,
    *,
    precision: float,
    budget: int,
    seed: np.random.SeedSequence,
    trial: bool = False,
    tuning: DistillingTuning | None = None,
) -> Taught | None:
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
    first = meter.calls
    for turn in range(tuning.rounds + 1):
        cases = watched.cases()
        if np.count_nonzero(~np.isnan(cases.slope[:, 0])) < tuning.least_slopes:
            return None
        known = student.teach(cases, generator(child_seed(seed, Stream.TEACH, turn)))
        if known is None:
            return None
        if meter.calls + GRADIENT_CALLS * size > first + spent:
            break
        own = child_seed(seed, Stream.TEMPER, turn)
        laws = [
            tempered(each, tuning.particles, tuning, child_seed(own, k)) for k, each in enumerate(_both(known, tuning))
        ]
        if laws[0] is None or laws[1] is None:
            student.known = known._replace(noise=2.0 * known.noise)
            continue
        needed = _asked(student, meter, (laws[0], laws[1]), size, child_seed(seed, Stream.ASK, turn), tuning)
        if needed / precision**2 < tuning.affordable * (budget - (meter.calls - first)):
            break
    return _guide(student, tuning.roughly if trial else tuning.exact * precision, seed, tuning)


def _both(known: Distilled, tuning: DistillingTuning) -> tuple[Distilled, Distilled]:
    """What the student knows with the error that it has where it looked, and with a larger one.

    Where it is sure of what is not so it never looks: its own answers do not show that.
    """
    return known, known._replace(noise=max(tuning.wide * known.noise, tuning.least_wide))


def _asked(
    student: Student,
    meter: Meter,
    runs: tuple[Run, Run],
    size: int,
    seed: np.random.SeedSequence,
    tuning: DistillingTuning,
) -> float:
    """Ask the model at particles of both laws; the second moment of the weights that these show (inf for none)."""
    known = student.known
    assert known is not None
    rng = generator(seed)
    shares = tuning.shares
    counts = allocate(size, shares, rng)
    u = np.concatenate([_particles(run, rng)[:count] for run, count in zip(runs, counts, strict=True)])
    severity = meter.evaluate(known.whole(u, rng), gradient=True).severity
    log_q = np.full(len(u), -np.inf)
    for share, run, each in zip(shares, runs, _both(known, tuning), strict=True):
        log_q = np.logaddexp(log_q, math.log(share) + each.log_chance(u) - run.conclusion.log_prob)
    effective = diagnostics.effective_sample_size(np.where(severity >= 0.0, -log_q, -np.inf))
    student.examined(u[: counts[0]], severity[: counts[0]])
    student.proven = effective > 2.0
    return len(u) / effective if effective > 0.1 * tuning.least_asked else math.inf


def _guide(student: Student, error: float, seed: np.random.SeedSequence, tuning: DistillingTuning) -> Taught | None:
    """Temper on the student until both masses are known to ``error`` nats."""
    assert student.known is not None
    parts: list[DistilledGuide] = []
    size = int(np.clip((tuning.one_error / error) ** 2, tuning.least_last, tuning.last_particles))
    for k, known in enumerate(_both(student.known, tuning)):
        own = child_seed(seed, Stream.LAST, k)
        runs: list[Run] = []
        while len(runs) < tuning.runs:
            run = tempered(known, size, tuning, child_seed(own, len(runs)))
            if run is not None:
                runs.append(run)
            elif not runs:
                return None
            if (len(runs) > 1 or error >= tuning.roughly) and pool(runs).std_error <= error:
                break
        mass = pool(runs)
        parts.append(DistilledGuide(known, mass.log_prob, mass.std_error, _draws(known, runs, own, tuning)))
    shares = tuning.shares
    return Taught(
        Defensive(tuple(parts), shares), math.hypot(*(part.error * a for part, a in zip(parts, shares, strict=True)))
    )


def _draws(
    known: Distilled, runs: list[Run], seed: np.random.SeedSequence, tuning: DistillingTuning
) -> Callable[[], Floats]:
    """Pools of particles: at first that of the temperings, then more of them as they are asked for."""
    rng = generator(child_seed(seed, Stream.MORE))
    first = np.concatenate([_particles(run, rng) for run in runs])
    ready = [first[rng.permutation(len(first))]]
    turns = count()

    def more() -> Floats:
        if ready:
            return ready.pop()
        run = tempered(known, tuning.last_particles, tuning, child_seed(seed, Stream.MORE, next(turns)))
        return _particles(runs[0] if run is None else run, rng)

    return more


def tempered(known: Distilled, particles: int, tuning: DistillingTuning, seed: np.random.SeedSequence) -> Run | None:
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
