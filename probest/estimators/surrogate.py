r"""A learned severity that guides, while the checker itself decides: for checkers that say only yes or no.

Where nothing tells how far a case is from a catastrophe, or where no gradient does, a cheap surrogate ŝ of the severity
is fitted to all cases seen so far. Its own error σ̂ is measured on cases that it has not been fitted to.

1. *Look*: a yes-or-no checker is asked at inflated standard deviations until some catastrophes are known; segments from
   a catastrophe to a safe case are bisected, which puts cases on both sides of the boundary.
2. *Learn*: fit ŝ, temper on it to the population :math:`\pi \propto \varphi\, \Phi(\hat s/\hat\sigma)` (this costs no
   model calls), ask the checker at some of these particles, and repeat. They lie where the surrogate is unsure *and*
   where the adversary goes: what there is to learn about P.
3. *Weigh*: fit a guide to those particles that are catastrophes, and sample afresh with the model and checker deciding
   (:mod:`probest.estimators.importance`): unbiased whatever the surrogate. The particles give a second estimate,

.. math:: P = Z\, E_\pi\!\left[\frac{1_C}{\Phi(\hat s/\hat\sigma)}\right],
          \qquad Z = E_\varphi[\Phi(\hat s/\hat\sigma)] \text{ by tempering,}

which needs no guide, and the two have to agree.

The surrogate is a penalised linear model of features: coordinates, their products, radial functions around cases near
the boundary, and the values of discrete sites where the event can decode them; the kind of features that predicts the
newest cases best, before it is fitted to them, is chosen. It is a logistic regression of yes and no, or a least-squares
fit of real severities, weighted towards the limit.

It fails where a mode is in a place that no exploration reached; where an exploration did, all cases known to be
catastrophes are compared with the result. In many dimensions a boundary that is curved in many directions cannot be
learned from some thousand cases: the surrogate's error is then large, few particles are catastrophes, and it says so.

References: Bourinet (2016), Rare-event probability estimation with adaptive support vector regression surrogates;
Echard, Gayton & Lemaire (2011), AK-MCS; Dubourg, Sudret & Deheeger (2013), Metamodel-based importance sampling for
structural reliability analysis (the second estimate).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import ClassVar, NamedTuple

import numpy as np
import scipy
from scipy import special

from probest import diagnostics
from probest.budget import Meter
from probest.estimators.base import Need, check_least, check_needs, check_precision
from probest.estimators.importance import Importance, importance_sample
from probest.estimators.tempering import Tempering
from probest.evidence import Code, EventLike, Evidence, Floats, Note, Particles, Population, Run
from probest.guides.memory import Memory
from probest.guides.subspace import gradient_rows, informed_basis
from probest.seeds import child_seed, generator
from probest.surrogates.features import Decode, Learned, Softened
from probest.surrogates.regression import Judged, fit_surrogate
from probest.surrogates.tuning import SurrogateTuning
from probest.verdict import reach

__all__ = ["Surrogate"]

_NO_WAY = Note(
    Code.NOT_LEARNED,
    "nothing that was seen says where catastrophes are: raise the budget, or return a severity that does.",
)


class Explored(NamedTuple):
    """Independent draws from normal laws of several scales, with log φ − log q of their mixture.

    size: how many of each scale; the first is the adversary's own.
    """

    cases: Judged
    log_ratio: Floats
    size: int


class Reached(NamedTuple):
    """Particles of φ Φ(ŝ/σ̂), and its mass by tempering as evidence."""

    z: Floats
    mass: Evidence


class Tried(NamedTuple):
    """A surrogate with what its particles, judged, say of P; share: how many of them count, effectively."""

    learned: Learned
    log_prob: float
    error: float
    share: float

    @property
    def least(self) -> float:
        return self.log_prob - 2.0 * self.error


class Stream(IntEnum):
    """Names of the seeds of a run."""

    LOOK = 0
    LEARN = 1
    TEMPER = 2
    LAST_TEMPER = 3
    JUDGE = 4
    SAMPLE = 5


@dataclass(frozen=True)
class Surrogate:
    """Importance sampling guided by a learned severity.

    precision: wanted standard error of log P; None spends the budget.
    look: draws at each scale (three times the dimension at least). batch: cases judged in each round of learning.
    rounds: at most so many. share: of the budget, at most, for looking and learning.
    particles: of the last tempering on the surrogate, which costs no model calls.
    """

    precision: float | None = 0.05
    look: int = 400
    batch: int = 250
    rounds: int = 10
    share: float = 0.6
    particles: int = 2048
    tuning: SurrogateTuning = field(default_factory=SurrogateTuning, repr=False)
    needs: ClassVar[frozenset[Need]] = frozenset({"unconditioned"})

    def __post_init__(self) -> None:
        check_precision(self.precision)
        check_least(self, look=10, batch=10, rounds=1, particles=256)
        if not 0.0 < self.share < 1.0:
            raise ValueError(f"share must be between 0 and 1, got {self.share}")

    @property
    def name(self) -> str:
        return "surrogate"

    def run(self, event: EventLike, *, budget: int, seed: np.random.SeedSequence) -> Run:
        """Look, learn, weigh."""
        check_needs(self, event)
        meter = Meter(event, budget)
        explored = _look(self, meter, generator(child_seed(seed, Stream.LOOK)))
        best = _learn(self, meter, explored, seed)
        if isinstance(best, Note):
            return Run.of(_nothing(self, meter, explored, best))
        return Run.of(_estimated_twice(self, meter, explored, best, seed))


def _judge(meter: Meter, z: Floats) -> Judged:
    return Judged(z, meter.evaluate(z).severity)


def _look(method: Surrogate, meter: Meter, rng: np.random.Generator) -> Explored:
    """Draws of the adversary and, for yes or no, of wider ones until catastrophes are known."""
    dim = meter.event.dim
    size = max(1, int(min(max(method.look, 3 * dim), 0.3 * method.share * meter.budget / len(method.tuning.scales))))
    scales: list[float] = []
    cases = Judged(np.empty((0, dim)), np.empty(0))
    for scale in method.tuning.scales if meter.event.boolean else method.tuning.scales[:1]:
        if cases.hit.sum() >= method.tuning.known or meter.left < size:
            break
        scales.append(scale)
        cases = cases.plus(_judge(meter, scale * rng.standard_normal((size, dim))))
    square = np.einsum("ij,ij->i", cases.z, cases.z)
    log_q = [-0.5 * square / s**2 - dim * math.log(s) - math.log(len(scales)) for s in scales]
    return Explored(cases, np.asarray(-0.5 * square - special.logsumexp(log_q, axis=0)), size)


def _bisect(meter: Meter, ends: Judged, known: Judged, steps: int) -> Judged:
    """Judged next to the boundary: halve segments from ``ends`` to the nearest known case of the other kind."""
    new = Judged(ends.z[:0], ends.severity[:0])
    inside: list[Floats] = []
    outside: list[Floats] = []
    for end, other, from_, to in ((ends.hit, ~known.hit, inside, outside), (~ends.hit, known.hit, outside, inside)):
        if end.any() and other.any():
            from_.append(ends.z[end])
            to.append(known.z[other][np.argmin(scipy.spatial.distance.cdist(ends.z[end], known.z[other]), axis=1)])
    if not inside:
        return new
    a, b = np.concatenate(inside), np.concatenate(outside)
    for _ in range(steps):
        if meter.left < 4 * len(a):
            break
        middle = _judge(meter, 0.5 * (a + b))
        new = new.plus(middle)
        hit = middle.hit[:, None]
        a, b = np.where(hit, middle.z, a), np.where(hit, b, middle.z)
    return new


def _learn(method: Surrogate, meter: Meter, explored: Explored, seed: np.random.SeedSequence) -> Tried | Note:
    """The surrogate after its rounds of learning, with the most that any round knew of; or why there is none."""
    event, cases = meter.event, explored.cases
    decode = _decoder(event)
    rng = generator(child_seed(seed, Stream.LEARN))
    if event.boolean and not cases.hit.any():
        return Note(
            Code.NO_HITS,
            f"no catastrophe in {len(cases.z)} draws, not even at {method.tuning.scales[-1]:g} standard deviations: "
            "return a severity (how far from the limit; at least 0 is a catastrophe), or raise the budget.",
        )
    if not event.boolean and np.all(cases.severity == cases.severity[0]):
        sentence = "the severity is the same at every draw, so there is nothing to learn from: use crude sampling."
        return Note(Code.FLAT, sentence)
    held = np.arange(len(cases.z)) % 4 == 0
    known, fresh = cases.at(~held), cases.at(held)
    if event.boolean:
        hits = rng.permutation(np.flatnonzero(known.hit))[:60]
        known = known.plus(_bisect(meter, known.at(hits), known, 5))
    floor = (1.0 - method.share) * meter.budget
    learned = fit_surrogate(known, fresh, event.boolean, None, decode, rng, method.tuning)
    tried: list[Tried] = []
    for turn in range(method.rounds):
        reached = _temper(
            method, learned, event.dim, method.tuning.first_particles, 4, child_seed(seed, Stream.TEMPER, turn)
        )
        if reached is None:  # richer features, and more doubt, may show a way
            basis = np.eye(event.dim) if event.dim <= method.tuning.radial else None
            learned = fit_surrogate(known, fresh, event.boolean, basis, decode, rng, method.tuning)
            learned = learned._replace(noise=4.0**turn * learned.noise)
            continue
        if meter.left - 2 * method.batch < floor:
            break
        known = known.plus(fresh)
        fresh = _judge(meter, reached.z[rng.permutation(len(reached.z))[: method.batch]])
        log_w = _log_weights(learned, fresh)
        mean, error = diagnostics.log_mean_exp(log_w)
        error = math.hypot(reached.mass.std_error, math.sqrt(2.0) * error)
        share = diagnostics.effective_sample_size(log_w) / len(fresh.z)
        tried.append(Tried(learned, reached.mass.log_prob + mean, error, share))
        if (
            len(tried) > 1
            and tried[-1].share > method.tuning.good
            and tried[-2].share > method.tuning.good
            and _close(*tried[-2:])
        ):
            break
        if event.boolean:
            known = known.plus(_bisect(meter, fresh.at(slice(40)), known, 3))
        enough = tried[-1].share > method.tuning.good and learned.features.centres is None
        learned = fit_surrogate(
            known,
            fresh,
            event.boolean,
            None if enough else _directions(method, learned, reached.z),
            decode,
            rng,
            method.tuning,
        )
    if not tried:
        return _NO_WAY
    # a surrogate that lacks a part of the event may be exact on the rest: the sharpest of those that know of most
    most = max((one for one in tried if one.share * method.batch >= 10.0), key=lambda one: one.least, default=tried[-1])
    best = max((one for one in tried if _close(one, most)), key=lambda one: one.share, default=tried[-1])
    return best._replace(log_prob=most.log_prob, error=most.error)


def _close(one: Tried, other: Tried) -> bool:
    """Whether both know of the same P, as far as their errors tell."""
    return abs(one.log_prob - other.log_prob) <= reach(one.error, other.error)


def _directions(method: Surrogate, learned: Learned, z: Floats) -> Floats:
    """The few directions ``(dim, r)`` in which the surrogate matters to its particles; all where there are few."""
    if z.shape[1] <= method.tuning.radial:
        return np.eye(z.shape[1])
    equal = np.zeros(len(z))
    slope = learned.features.slope(z, learned.coefficients)
    return informed_basis(z, equal, gradient_rows(z, equal, slope, None), rank=method.tuning.radial)


def _decoder(event: EventLike) -> Decode | None:
    """The values of discrete sites, where the event has some and can tell them without its model."""
    decode: Decode | None = getattr(event, "discrete_values", None)
    return decode if decode is not None and decode(np.zeros((1, event.dim))).shape[1] else None


def _temper(
    method: Surrogate, learned: Learned, dim: int, particles: int, moves: int, seed: np.random.SeedSequence
) -> Reached | None:
    """Temper on the surrogate; None when there is no way to its event."""
    tempering = Tempering(particles=particles, max_moves=moves)
    found = tempering.run(Softened(learned, dim + 1), budget=method.tuning.free * particles, seed=seed)
    return None if found.population is None else Reached(found.population.z[:, :-1], found.conclusion)


def _log_weights(learned: Learned, cases: Judged) -> Floats:
    """log of 1_C / Φ(ŝ/σ̂): from the surrogate's particles to catastrophes."""
    return np.where(cases.hit, -learned.log_chance(cases.z), -np.inf)


def _estimated_twice(
    method: Surrogate, meter: Meter, explored: Explored, best: Tried, seed: np.random.SeedSequence
) -> Evidence:
    """Both estimates, and the verdict on them."""
    learned = best.learned
    # guides are poor where sites are discrete: there the particles themselves have to be precise
    particles = method.particles * (1 if learned.features.decode is None else 4)
    reached = _temper(method, learned, meter.event.dim, particles, 8, child_seed(seed, Stream.LAST_TEMPER))
    if reached is None or meter.left < 20:
        return _nothing(method, meter, explored, _NO_WAY)
    rng = generator(child_seed(seed, Stream.JUDGE))
    size = min(method.tuning.judged, len(reached.z), max(10, meter.left // 4))
    cases = _judge(meter, reached.z[rng.permutation(len(reached.z))[:size]])
    second = _second(method, meter, best, reached, cases)
    found = second.particles
    if found is None or len(found.z) < 16:
        return replace(_nothing(method, meter, explored, _NO_WAY), notes=second.notes)
    rows = None
    if learned.features.decode is None:
        slope = learned.features.slope(found.z, learned.coefficients)
        rows = gradient_rows(found.z, found.log_weight, slope, None)
    effective = 0.5 * diagnostics.effective_sample_size(found.log_weight)
    population = Population(found.z, found.log_weight, np.zeros(len(found.z)), rows, effective)
    importance = Importance(precision=method.precision, give_up=method.tuning.give_up)
    first = importance_sample(
        importance, meter.event, Memory.of(population), None, budget=meter.left, seed=child_seed(seed, Stream.SAMPLE)
    )
    return _verdict(meter, explored, first, second)


def _second(method: Surrogate, meter: Meter, best: Tried, reached: Reached, cases: Judged) -> Evidence:
    """The estimate that needs no guide: the surrogate's mass times the mean of 1_C / Φ(ŝ/σ̂) over its particles."""
    log_w = _log_weights(best.learned, cases)
    mean, error = diagnostics.log_mean_exp(log_w)
    hits, ess = int(cases.hit.sum()), diagnostics.effective_sample_size(log_w)
    khat = diagnostics.pareto_khat(log_w)
    mass = reached.mass
    log_prob, lower, upper = -math.inf, -math.inf, 0.0
    if hits > 1:
        error = math.hypot(mass.std_error, math.sqrt(2.0) * error)  # resampled particles are related: half as many
        log_prob = min(mass.log_prob + mean, 0.0)
        below, above = diagnostics.mean_interval(log_w)
        lower = log_prob - math.hypot(mass.log_prob - mass.interval[0], math.sqrt(2.0) * (mean - below))
        upper = min(log_prob + math.hypot(mass.interval[1] - mass.log_prob, math.sqrt(2.0) * (above - mean)), 0.0)
    notes = list(mass.notes)
    if ess < 50.0:
        sentence = f"the surrogate's particles are worth {ess:.0f} catastrophes: it has not learned the limit."
        notes.append(Note(Code.NOT_LEARNED, sentence))
    if khat > 0.7 and ess < 0.4 * hits:
        sentence = "catastrophes lie where the surrogate sees none: the estimate may be too low."
        notes.append(Note(Code.HEAVY_TAILS, sentence))
    if log_prob + 2.0 * error < best.least:
        sentence = "the particles of an earlier surrogate showed more: this one lacks a part of the catastrophes."
        notes.append(Note(Code.UNSEEN, sentence))
    if error > 0.2:
        sentence = f"the standard error of the surrogate's particles is {error:.2f}: raise the budget."
        notes.append(Note(Code.IMPRECISE, sentence))
    hit = cases.at(cases.hit)
    particles = Particles(hit.z, log_w[cases.hit] - diagnostics.log_sum_exp(log_w), hit.severity) if hits else None
    return Evidence(
        method=method.name,
        log_prob=log_prob,
        std_error=error if hits > 1 else math.inf,
        interval=(lower, upper),
        claim="consistent",
        calls=meter.calls,
        seconds=meter.seconds,
        converged=not notes,
        particles=particles,
        diagnostics={"khat": khat, "ess": ess, "hits": float(hits), "samples": float(len(cases.z))},
        notes=tuple(notes),
    )


def _verdict(meter: Meter, explored: Explored, first: Evidence, second: Evidence) -> Evidence:
    """The fresh samples of the guide where they pass their checks, else the particles; neither against the other."""
    found = [line for line in (first, second) if math.isfinite(line.log_prob)]
    notes: list[str] = []
    chosen, other = (first, second) if first.converged else (second, first)
    # what misses a part is too low: one that failed its checks is a reason to doubt only where it says more
    more, apart = other.log_prob - chosen.log_prob, reach(first.std_error, second.std_error)
    agree = len(found) < 2 or (more <= apart and (more >= -apart or not other.converged))
    if not first.converged:
        sentence = "the guide did not pass its checks: this is the estimate of the surrogate's particles."
        notes.append(Note(Code.SECOND_CHOICE, sentence))
    if not agree:
        sentence = "the guide and the surrogate's particles disagree beyond their errors: raise the budget."
        notes.append(Note(Code.DISAGREE, sentence))
    if _floor(explored) > chosen.interval[1]:
        agree = False
        sentence = "draws at larger standard deviations found more than this estimate knows of: raise the budget."
        notes.append(Note(Code.UNSEEN, sentence))
    converged = chosen.converged and agree
    lower, upper = chosen.interval
    if not converged:
        chosen = min(found, key=lambda line: line.std_error, default=second)
        lower = min((line.interval[0] for line in found), default=-math.inf)
        upper = max((line.interval[1] for line in found), default=0.0)
        notes += [*first.notes, *second.notes]
    seen = {"particles": second.log_prob, "particles_error": second.std_error}
    return replace(
        chosen,
        method=second.method,
        claim="consistent",
        interval=(lower, upper),
        calls=meter.calls + first.calls,
        seconds=meter.seconds,
        converged=converged,
        diagnostics={**chosen.diagnostics, **seen},
        notes=tuple(dict.fromkeys(notes)),
    )


def _floor(explored: Explored) -> float:
    """What log P is above, with 99.95 % confidence, by the draws of all scales as one importance sample."""
    return diagnostics.mean_interval(np.where(explored.cases.hit, explored.log_ratio, -np.inf), 0.999)[0]


def _nothing(method: Surrogate, meter: Meter, explored: Explored, note: Note) -> Evidence:
    """No surrogate: the draws of the adversary itself bound P."""
    hits = int(explored.cases.at(slice(explored.size)).hit.sum())
    return Evidence.nothing(
        method.name,
        note,
        calls=meter.calls,
        seconds=meter.seconds,
        upper=diagnostics.binomial_interval(hits, explored.size)[1],
        diagnostics={"hits": float(hits), "samples": float(explored.size)},
    )
