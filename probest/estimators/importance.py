r"""Importance sampling from a fitted guide: fresh, independent samples, one forward call each.

With q a guide fixed before its samples are drawn, and w the weight of observed sites (1 when there are none),

.. math:: \hat P = \frac1n \sum_i \mathbf 1_C(z_i)\, \frac{\varphi(z_i)}{q(z_i)}\, w(z_i),

is unbiased and its error is that of a mean of independent numbers. The guide comes from weighted particles of
the target (:mod:`probest.guides.fit`), is tried on a small batch, refitted to the union of particles and weighted
hits (cross-entropy), and then fixed. The concluding samples are fresh, and the trial fixes their number before any of
them is drawn (Stein 1945): to stop when their own error looks small would favour samples that lack large weights. For a
conditioned adversary the evidence of its observed sites is estimated the same way with a guide of its own, and
subtracted.

It fails when the guide is too thin somewhere in the event: the estimate is then too low and *its own error does
not show it*. Two checks do. The weights' Pareto shape k̂ says whether their variance exists. The particles that
the guide was fitted to have mean weight E[w | C] = P (1 + relative variance): particles whose weights are far
above anything that was sampled lie where the guide does not go (``coverage`` and ``unseen`` in the diagnostics).
A second opinion, ``smoothed``, is the estimate with the largest weights replaced by what a Pareto tail says of them.

References: Kahn & Marshall (1953); Rubinstein & Kroese (2004), The cross-entropy method; Hesterberg (1995),
Weighted average importance sampling and defensive mixture distributions; Vehtari et al. (2024);
Stein (1945), A two-sample test for a linear hypothesis whose power is independent of the variance.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import NamedTuple, cast

import numpy as np

from probest import diagnostics
from probest.budget import Meter
from probest.estimators.base import check_least, check_precision
from probest.estimators.distilling import distilled_guide
from probest.estimators.tempering import Tempering
from probest.evidence import Code, EventLike, Evidence, Floats, Note, Particles, Population, Run
from probest.guides.autoguide import Autoguide
from probest.guides.base import Defensive, Guide
from probest.guides.fit import CHEAP, DISTILLED, KINDS, VARIATIONAL, Fitted, ranked_guides, refit_guide
from probest.guides.flow import FLOWS, check_installed
from probest.guides.memory import Memory
from probest.guides.program import BoundProgram, ProgramGuide
from probest.guides.sample import Batch, beyond, clipped, draw, join, kept_weights, second_moment, seen, shares_of
from probest.guides.variational import GaussianGuide, climbed, informed
from probest.seeds import child_seed, generator
from probest.smc.softening import Noise
from probest.surrogates.student import Student
from probest.surrogates.watched import Watched
from probest.tuning import tuned
from probest.verdict import agree, imprecise, wanted_error

__all__ = ["Importance", "importance_sample"]


class Outcome(NamedTuple):
    """What importance sampling of one target came to."""

    log_w: Floats
    hits: Batch
    fitted: Fitted
    log_mean: float
    error: float
    interval: tuple[float, float]
    smoothed: float
    khat: float
    ess: float
    coverage: float
    unseen: float
    hopeless: bool
    fresh: bool  # whether nothing was chosen by these samples


class Stream(IntEnum):
    """Names of the seeds of a run."""

    FIND = 0
    SAMPLE = 1


class Target(IntEnum):
    """Names of the seeds of an importance sample: of the event, and of the conditioned adversary's own evidence."""

    EVENT = 0
    ADVERSARY = 1


_EXACT = "reliability.py --exact --estimator importance"
_NETWORKS = "networks.py"


@dataclass(frozen=True)
class ImportanceTuning:
    """When a guide is refitted, given up, or sampled more. Set by hand; ``benchmarks/tuning.py --of importance``."""

    trial_share: float = tuned(0.03, "of the budget that is left, for each trial of a guide", "networks.py")
    good_enough: float = tuned(4.0, "second moment of the weights at which a guide is not refitted", _EXACT)
    least_gain: float = tuned(0.2, "nats of the second moment that a refit has to bring for another", _EXACT)
    probe: float = tuned(0.2, "of a trial's samples, for the next best guide where the best missed", "modes.py")
    probes: int = tuned(4, "such guides at most", "modes.py")
    far_off: float = tuned(1.5, "times the precision, at which the concluding sample is enlarged, once", _EXACT)
    enlarged: int = tuned(10, "times, at most: one large weight says little about how many are needed", _EXACT)
    safe: float = tuned(1.2, "times the samples that will just do, where it is enlarged to what is enough", _NETWORKS)
    distil_beyond: float = tuned(
        0.3, "of the budget that is left, for fresh samples: beyond, a student learns", _NETWORKS
    )
    distil_left: int = tuned(8_000, "calls left below which none does", _NETWORKS)
    distil_sums: int = tuned(800, "the same, where severities are sums over coordinates", "modes.py (waves)")
    distil_share: float = tuned(0.15, "of its samples, from the guide that was fitted", _NETWORKS)
    distil_precision: float = tuned(0.02, "nats that it aims at where none are asked for", _NETWORKS)
    climb_steps: int = tuned(60, "steps of a variational guide up its bound", "bounds.py --parts gradients")
    climb_batch: int = tuned(32, "draws of each", "bounds.py --parts gradients")
    climb_draws: int = tuned(8, "of them under one logarithm", "bounds.py --parts gradients")
    climb_rank: int = tuned(8, "directions in which it has a width of its own", "bounds.py --parts gradients")
    climb_widths: tuple[float, float] = tuned(
        (1.0, 0.1), "of the softening, first and last, of what the severity changes over a deviation of z", "bounds.py"
    )
    heavy: float = tuned(0.7, "Pareto shape of weights without a variance to speak of", "Vehtari et al. (2024)")
    few: float = tuned(50.0, "effective samples that are too few to conclude from", _EXACT)
    unseen: float = tuned(0.05, "mass of particles where the guide gave no sample, that refutes it", _EXACT)
    coverage: float = tuned(0.2, "sampled over the particles' second moment of the weights, that refutes it", _EXACT)


@dataclass(frozen=True)
class Importance:
    """Importance sampling from a guide.

    precision: wanted standard error of log P; None spends the budget.
    first_batch: samples that try out a guide. rounds: at most this many refits of it.
    max_samples: at most this many concluding samples.
    guide: a fixed proposal to use as it is, or a program (:class:`~probest.guides.program.ProgramGuide`) or autoguide,
        which is checked against particles; None finds particles by ``find`` and fits one.
    guides: kinds of law to fit, which held-out particles choose among: ``mixture``, ``radial``, ``directional``,
        ``cylinder``, and ``zuko`` or ``flowjax``, the normalizing flows of these libraries, which take seconds to fit.
        ``variational``: beside these, a Gaussian guide that climbs its variational bound on the event, by gradients.
        ``distilled``: where these would take too many samples, what a network knows that was taught the model's answers
        (:mod:`probest.estimators.distilling`), which takes some seconds; for severities with gradients.
    find: the tempering that finds particles, with at most half of the budget.
    give_up: largest standard error worth sampling for. A guide that promises worse with all that is left of the budget
        is left after its trial; None samples regardless.
    wary: give it up too where the particles that it was fitted to say that it is thin, or lacks some of them.
    """

    precision: float | None = 0.05
    first_batch: int = 1000
    rounds: int = 4
    max_samples: int = 1_000_000
    guide: Guide | ProgramGuide | Autoguide | None = None
    guides: tuple[str, ...] = CHEAP
    find: Tempering = field(default_factory=lambda: Tempering(particles=256, max_moves=5))
    give_up: float | None = None
    wary: bool = False
    tuning: ImportanceTuning = field(default_factory=ImportanceTuning, repr=False)

    def __post_init__(self) -> None:
        check_precision(self.precision)
        check_least(self, first_batch=10, max_samples=10, rounds=0)
        unknown = set(self.guides) - set(KINDS)
        if unknown or not self.guides:
            raise ValueError(f"guides must be some of {', '.join(KINDS)}, got {self.guides}")
        for kind in self.guides:
            if kind in FLOWS:
                check_installed(kind)

    @property
    def name(self) -> str:
        return "importance sampling"

    def run(self, event: EventLike, *, budget: int, seed: np.random.SeedSequence) -> Run:
        """Find particles (unless a guide is given), fit, sample afresh.

        A program is sampled as it is; tempering's particles show what it leaves out.
        """
        meter = Meter(event, budget)
        own = child_seed(seed, Stream.SAMPLE)
        guide = self.guide
        if guide is not None and not isinstance(guide, ProgramGuide | Autoguide):
            fitted = Fitted(guide, "given", None, 1)
            return Run.of(importance_sample(self, event, Memory(), None, budget=budget, seed=own, fitted=fitted))
        program = None if guide is None else Fitted(guide.bind(event), "program", None, 1)
        if DISTILLED in self.guides and event.differentiable:
            event = Watched(event)
        share = max(1, budget // 2) if program is not None or budget >= 1000 else budget
        found = self.find.run(event, budget=share, seed=child_seed(seed, Stream.FIND))
        if found.calls >= budget or (found.population is None and program is None):
            # nothing to sample from, or nothing left to sample with: what the search says is the conclusion
            return replace(found, ledger=(replace(found.conclusion, method=self.name, seconds=meter.seconds),))
        evidence = importance_sample(
            self,
            event,
            Memory.of(found.population),
            None if found.prior_population is None else Memory.of(found.prior_population),
            budget=budget - found.calls,
            seed=own,
            fitted=program,
        )
        if program is not None:
            evidence = _checked(evidence, found)
        ledger = (*found.ledger, replace(evidence, seconds=meter.seconds))
        return replace(found, ledger=ledger, calls=found.calls + evidence.calls, families=None)


def _checked(evidence: Evidence, found: Run) -> Evidence:
    """What a guide of the user's says, held against the particles that tempering found."""
    notes = list(evidence.notes)
    if found.population is None:
        sentence = "tempering found no catastrophe to check the guide against: raise the budget."
        notes.append(Note(Code.UNCHECKED, sentence))
    elif not agree(evidence, found.conclusion):
        sentence = "the guide and tempering disagree beyond their errors: the guide lacks something, or find."
        notes.append(Note(Code.DISAGREE, sentence))
    return replace(
        evidence,
        particles=evidence.particles or found.conclusion.particles,
        prior_particles=found.conclusion.prior_particles,
        converged=not notes,
        notes=tuple(notes),
    )


def importance_sample(
    method: Importance,
    event: EventLike,
    memory: Memory,
    prior: Memory | None,
    *,
    budget: int,
    seed: np.random.SeedSequence,
    fitted: Fitted | None = None,
    trial: bool = False,
    enough: float | None = None,
    spare: int = 0,
) -> Evidence:
    """Fit a guide to what is known (and, for a conditioned adversary, one to ``prior``) and sample afresh.

    memory: gets the samples, and the guide that new looks are held against. trial: stop when the guide is chosen; what
    there is to say then rests on the trial's few samples, and is never converged. enough: standard error that a sample
    is enlarged for, once, where the calls that this takes are there; ``spare``, beyond the budget, count as there (not
    for a conditioned adversary, which has two samples to draw).
    """
    spare = 0 if event.weighted else spare
    meter = Meter(event, budget + spare)
    precision = method.precision
    reserve = spare
    if event.weighted:
        precision = None if precision is None else precision / math.sqrt(2.0)
        enough = None if enough is None else enough / math.sqrt(2.0)
        reserve = meter.budget // 2
    plan = _Plan(method, meter, precision, trial, enough, spare)
    joint = _sample_target(plan, memory, fitted, reserve, child_seed(seed, Target.EVENT), True)
    below: Outcome | None = None
    if event.weighted:
        given = fitted if prior is None else None
        own = child_seed(seed, Target.ADVERSARY)
        below = _sample_target(plan, Memory() if prior is None else prior, given, 0, own, False)
    return _evidence(method, meter, joint, below, trial)


class _Plan(NamedTuple):
    """What both targets have in common. precision: wanted standard error of one target's log-mean, enough: the largest
    one that will do, for which ``spare`` calls may be drawn from what is reserved.
    """

    method: Importance
    meter: Meter
    precision: float | None
    trial: bool
    enough: float | None
    spare: int


class _Aim(NamedTuple):
    """A guide that was tried. cost: log second moment of its weights; fresh: whether no other was tried before it."""

    fitted: Fitted
    tried: Batch
    cost: float
    fresh: bool


def _sample_target(
    plan: _Plan, memory: Memory, fitted: Fitted | None, reserve: int, seed: np.random.SeedSequence, inside: bool
) -> Outcome:
    """Fit, try, refit, fix, sample. Only samples drawn after the guide was chosen enter the estimate."""
    method, meter = plan.method, plan.meter
    rng = generator(child_seed(seed, 0))
    whole = fitted is not None and plan.precision is None  # nothing to learn from a trial
    aim = _aim(plan, memory, fitted, reserve, rng, inside, whole, child_seed(seed, 1))
    best, tried = aim.fitted, aim.tried
    left = meter.left - reserve
    nothing = not np.isfinite(tried.log_w).any()
    hopeless = fitted is None and (nothing if plan.trial else _hopeless(method, tried, left))
    if method.wary and not plan.trial:
        thin, lacks, _ = seen(memory.population(), best.guide, tried.log_w)
        hopeless = hopeless or thin < method.tuning.coverage or lacks > method.tuning.unseen
    total = tried
    if hopeless or plan.trial:
        if not aim.fresh and left > 0:  # the batches that picked a guide among several favour low estimates
            total = draw(meter, best.guide, min(left, len(tried.log_w)), rng, inside)
    elif not whole:
        total = _conclude(plan, best, aim.cost, tried, reserve, rng, inside)
    if fitted is None and total is not tried:
        memory.keep(best.guide, total)
    memory.conclude(best.guide, total.log_w)
    log_mean, error = diagnostics.log_mean_exp(total.log_w)
    lower, upper = diagnostics.mean_interval(total.log_w)
    if best.error > 0.0:  # of the guide's own density
        width = 1.96 * best.error
        error = math.hypot(error, best.error)
        lower, upper = log_mean - math.hypot(log_mean - lower, width), log_mean + math.hypot(upper - log_mean, width)
    coverage, unseen, _ = seen(memory.population(), best.guide, total.log_w)
    if total is not tried:
        unseen = max(unseen, float(beyond(tried.log_w, shares_of(tried.log_w), total.log_w).sum()))
    smooth, khat = diagnostics.pareto_smooth(total.log_w)
    return Outcome(
        total.log_w,
        total,
        best,
        log_mean,
        error,
        (lower, upper),
        diagnostics.log_mean_exp(smooth)[0],
        khat,
        diagnostics.effective_sample_size(total.log_w),
        coverage,
        unseen,
        hopeless,
        whole or total is not tried,
    )


def _aim(
    plan: _Plan,
    memory: Memory,
    given: Fitted | None,
    reserve: int,
    rng: np.random.Generator,
    inside: bool,
    whole: bool,
    seed: np.random.SeedSequence,
) -> _Aim:
    """The given guide, or the best of those fitted to what is known, as far as each one's trial shows."""
    method, meter, precision = plan.method, plan.meter, plan.precision
    left = meter.left - reserve
    fitted = given
    others: Iterator[Fitted] = iter(())
    if fitted is None:
        known = memory.known()
        kinds = tuple(kind for kind in method.guides if kind not in (VARIATIONAL, DISTILLED)) or CHEAP
        others = ranked_guides(known.z, known.log_w, rng, rows=known.rows, effective=known.effective, kinds=kinds)
        fitted = next(others)
    looks = memory.population()
    most = max(method.first_batch // 2, int(method.tuning.trial_share * left))
    size = max(1, min(left, method.max_samples) if whole else min(most, left // 4))
    batch = draw(meter, fitted.guide, size, rng, inside)
    best = _Aim(fitted, batch, _cost(looks, fitted.guide, batch.log_w), True)
    if given is not None:
        return best
    memory.keep(fitted.guide, batch)
    if inside and _is_sum(plan, memory, best, meter.left - reserve):
        best = _better(plan, memory, best, size, reserve, rng, seed)
        if best.fitted.kind == DISTILLED:
            return best
    if not np.isfinite(batch.log_w).any():
        second = _other_that_hits(plan, memory, others, size, reserve, rng, inside)
        if second is not None:
            batch = draw(meter, second.guide, size, rng, inside)
            memory.keep(second.guide, batch)
            fitted, best = second, _Aim(second, batch, _cost(looks, second.guide, batch.log_w), False)
    other = _climbed(plan, memory, reserve, rng) if VARIATIONAL in method.guides and inside else None
    taught = memory.student is not None and memory.student.known is not None
    if other is not None:
        rival = draw(meter, other.guide, min(size, max(1, (meter.left - reserve) // 4)), rng, inside)
        memory.keep(other.guide, rival)
        cost = _cost(looks, other.guide, rival.log_w)
        best = _Aim(other, rival, cost, False) if cost < best.cost else best._replace(fresh=False)
        if best.fitted is other:
            return best
    for _ in range(0 if taught else method.rounds):
        left = meter.left - reserve
        enough = best.cost <= math.log(method.tuning.good_enough) or (
            precision is not None and best.cost < math.log(2.0 * size * precision**2)
        )
        known = memory.known()
        if enough or not np.isfinite(batch.log_w).any() or left < 3 * size or len(known.z) < 16:
            break
        fitted = refit_guide(fitted, known.z, known.log_w, rng, moments=known.rows is None)
        batch = draw(meter, fitted.guide, size, rng, inside)
        memory.keep(fitted.guide, batch)
        cost = _cost(looks, fitted.guide, batch.log_w)
        gain = best.cost - cost
        best = _Aim(fitted, batch, cost, False) if gain > 0.0 else best._replace(fresh=False)
        if gain < method.tuning.least_gain:
            break
    left = meter.left - reserve
    if inside and left >= method.tuning.distil_left and _learns(plan, best, method.tuning.distil_beyond * left):
        best = _better(plan, memory, best, size, reserve, rng, seed)
        if best.fitted.kind == DISTILLED:
            return best
    if best.fresh:
        return best
    known = memory.known()  # the last trial too: better by more than what an untried guide risks
    return best._replace(fitted=refit_guide(best.fitted, known.z, known.log_w, rng, moments=known.rows is None))


def _other_that_hits(
    plan: _Plan,
    memory: Memory,
    others: Iterator[Fitted],
    size: int,
    reserve: int,
    rng: np.random.Generator,
    inside: bool,
) -> Fitted | None:
    """Where the best guide missed the event: the next one a few draws of which do not."""
    tuning, meter = plan.method.tuning, plan.meter
    probe = max(1, int(tuning.probe * size))
    for other in itertools.islice(others, tuning.probes):
        if meter.left - reserve < 2 * size + probe:
            return None
        batch = draw(meter, other.guide, probe, rng, inside)
        memory.keep(other.guide, batch)
        if np.isfinite(batch.log_w).any():
            return other
    return None


def _learns(plan: _Plan, best: _Aim, most: float) -> bool:
    """Whether a student may be taught, and what was fitted would take more samples than ``most``."""
    method, event = plan.method, plan.meter.event
    if DISTILLED not in method.guides or event.weighted or best.fitted.kind == "program":
        return False
    wanted = plan.precision or method.tuning.distil_precision
    return _samples_for(wanted, best.cost, best.tried.log_w) > most


def _is_sum(plan: _Plan, memory: Memory, best: _Aim, left: int) -> bool:
    """Whether a student is taught before anything else is tried: of a sum over coordinates it knows all soon."""
    event = plan.meter.event
    if not isinstance(event, Watched) or left < plan.method.tuning.distil_sums or not _learns(plan, best, left):
        return False
    memory.student = memory.student or Student()
    return memory.student.sums_up(event.cases())


def _better(
    plan: _Plan,
    memory: Memory,
    best: _Aim,
    size: int,
    reserve: int,
    rng: np.random.Generator,
    seed: np.random.SeedSequence,
) -> _Aim:
    """What a student knows, beside the best that was fitted, where its trial is better; or that.

    The fitted guide keeps a share: weights are bounded where the student is sure of what is not so.
    """
    tuning, meter = plan.method.tuning, plan.meter
    memory.student = memory.student or Student()
    precision = plan.precision or tuning.distil_precision
    left = meter.left - reserve
    taught = distilled_guide(memory.student, meter, precision=precision, budget=left, seed=seed, trial=plan.trial)
    if taught is None or meter.left < 1:
        return best
    share = tuning.distil_share
    mixed = Defensive((taught.guide, cast(Guide, best.fitted.guide)), (1.0 - share, share))
    fitted = Fitted(mixed, DISTILLED, best.fitted.basis, best.fitted.components, taught.error)
    batch = draw(meter, mixed, max(1, min(size, (meter.left - reserve) // 4)), rng, True)
    memory.keep(mixed, batch)
    cost = _cost(memory.population(), mixed, batch.log_w)
    return _Aim(fitted, batch, cost, False) if cost < best.cost else best._replace(fresh=False)


def _climbed(plan: _Plan, memory: Memory, reserve: int, rng: np.random.Generator) -> Fitted | None:
    """A Gaussian guide that started where what is known lies and climbed its bound on the event, by gradients.

    It competes with the fitted one by the second moment of its weights, as both trials and the particles show it. None
    without gradients, or calls for them.
    """
    tuning, meter = plan.method.tuning, plan.meter
    known = memory.known()
    left = meter.left - reserve
    if not meter.event.differentiable or left < 3 * tuning.climb_steps * tuning.climb_batch or not len(known.z):
        return None
    chosen = diagnostics.systematic_resample(known.log_w, tuning.climb_batch, rng)
    slopes = meter.evaluate(known.z[chosen], gradient=True).severity_grad
    if slopes is None or not np.isfinite(slopes).all():
        return None
    usual = float(np.median(np.linalg.norm(slopes, axis=1)))
    if usual <= 0.0:
        return None
    weight = np.exp(known.log_w - diagnostics.log_sum_exp(known.log_w))
    guide = GaussianGuide.standard(weight @ known.z, informed(slopes, tuning.climb_rank))
    widths = usual * np.geomspace(*tuning.climb_widths, tuning.climb_steps)
    softs = [Noise(1.0 / float(width)) for width in widths]
    guide = climbed(meter, guide, softs, rng, batch=tuning.climb_batch, draws=tuning.climb_draws)
    return Fitted(guide.defended(), VARIATIONAL, guide.basis, 1)


def _hopeless(method: Importance, tried: Batch, left: int) -> bool:
    """Whether more samples of this guide would be wasted: they promise an error above ``give_up``.

    The second moment of n weights is at most n, so a small trial cannot show how bad a guide is: one effective sample
    less counts.
    """
    if method.give_up is None:
        return False
    counted = diagnostics.effective_sample_size(tried.log_w) - 1.0
    return not len(tried.log_w) < method.give_up**2 * counted * max(left, 1)


def _conclude(
    plan: _Plan, fitted: Fitted, cost: float, tried: Batch, reserve: int, rng: np.random.Generator, inside: bool
) -> Batch:
    """Fresh samples of a fixed guide, in a number that the trial fixes; the trial itself does not count.

    To stop as soon as the error of the samples themselves looks small is to stop early when large weights happen to be
    missing, and their mean is then too low. So nothing is looked at until the samples are drawn (Stein 1945). Only
    where the trial was far off (an error above 1.5 times the precision) is the sample enlarged, once, and pooled; and
    once more to what is enough, where that can be reached.
    """
    method, meter, precision, guide = plan.method, plan.meter, plan.precision, fitted.guide
    room = min(meter.left - reserve, method.max_samples)
    if room < 1:
        return tried
    if precision is None:
        return draw(meter, guide, room, rng, inside)
    wanted = max(method.first_batch, _samples_for(precision, cost, tried.log_w))
    total = draw(meter, guide, int(min(room, wanted)), rng, inside)
    room = min(meter.left - reserve, method.max_samples - len(total.log_w))
    if room >= 1 and not diagnostics.log_mean_exp(total.log_w)[1] <= method.tuning.far_off * precision:
        more = _samples_for(precision, cost, total.log_w) - len(total.log_w)
        most = method.tuning.enlarged * len(total.log_w)
        total = join(total, draw(meter, guide, int(max(1, min(room, more, most))), rng, inside))
    if plan.enough is not None and plan.enough > fitted.error:
        error = diagnostics.log_mean_exp(total.log_w)[1] / math.sqrt(plan.enough**2 - fitted.error**2)
        room = min(meter.left - reserve + plan.spare, method.max_samples - len(total.log_w))
        more = (method.tuning.safe * error**2 - 1.0) * len(total.log_w)
        if error > 1.0 and more <= room:
            total = join(total, draw(meter, guide, math.ceil(more), rng, inside))
    return total


def _samples_for(precision: float, cost: float, log_w: Floats) -> float:
    """How many samples bring the error to ``precision``, by these weights (on the safe side) and the particles."""
    relative = math.expm1(cost) if cost < 50.0 else math.inf
    mean = diagnostics.log_mean_exp(log_w)[0]
    if len(log_w) > 1 and math.isfinite(mean):
        relative = max(relative, len(log_w) * diagnostics.deviation_error(np.exp(log_w - mean) - 1.0)[0] ** 2)
    return max(relative, 0.25) / precision**2


def _cost(population: Population | None, guide: Guide | BoundProgram, log_w: Floats) -> float:
    """log of 1 + relative variance: the larger of what the samples and what the particles say."""
    return max(second_moment(log_w), seen(population, guide, log_w)[2])


def _evidence(method: Importance, meter: Meter, joint: Outcome, below: Outcome | None, trial: bool) -> Evidence:
    log_prob, error = joint.log_mean, joint.error
    lower, upper = joint.interval
    hits = int(np.count_nonzero(np.isfinite(joint.log_w)))
    if below is not None:
        log_prob -= below.log_mean
        width = 1.96 * below.error
        low = math.hypot(joint.log_mean - lower, width) if math.isfinite(lower) else math.inf
        high = math.hypot(upper - joint.log_mean, width) if math.isfinite(upper) else math.inf
        error = math.hypot(error, below.error)
        lower, upper = log_prob - low, log_prob + high
    targets = [joint] if below is None else [joint, below]
    khat = max(t.khat for t in targets)
    ess = min(t.ess for t in targets)
    coverage = min(t.coverage for t in targets)
    unseen = max(t.unseen for t in targets)
    error = math.hypot(error, unseen)
    if math.isfinite(upper):  # further up by the variance and the mass that the particles show and the samples do not
        upper = log_prob + (upper - log_prob) / math.sqrt(max(coverage, 0.1)) - math.log1p(-min(unseen, 0.5))
    notes = []
    if hits == 0:
        sentence = "no fresh sample of the guide was a catastrophe: use tempering, or raise the budget."
        notes.append(Note(Code.NO_HITS, sentence))
        log_prob, error, lower, upper = -math.inf, math.inf, -math.inf, 0.0
    tuning = method.tuning
    if khat > tuning.heavy and ess < 0.4 * hits:  # nearly constant weights have no tail whose shape could matter
        sentence = f"the weights are heavy-tailed (k̂ = {khat:.2f}): the guide is thin somewhere; use tempering."
        notes.append(Note(Code.HEAVY_TAILS, sentence))
    if ess < tuning.few and hits:
        notes.append(Note(Code.FEW_COUNT, f"only {ess:.0f} effective samples: raise the budget."))
    if unseen > tuning.unseen or coverage < tuning.coverage:
        sentence = "the particles show catastrophes where the guide does not sample: the estimate is likely too low."
        notes.append(Note(Code.UNSEEN, sentence))
    if any(t.hopeless for t in targets):
        sentence = "the guide was given up after its trial: too few of its samples would count."
        notes.append(Note(Code.GIVEN_UP, sentence))
    elif trial:
        notes.append(Note(Code.TRIAL, "only a trial of the guide, before more is searched."))
    elif hits:
        notes += imprecise(error, wanted_error(method.precision))
    fixed = method.precision is None and method.give_up is None  # else samples are added, or given up, by what they say
    particles = None
    if len(joint.hits.z):
        log_w = clipped(kept_weights(joint.hits))
        particles = Particles(joint.hits.z, log_w - diagnostics.log_sum_exp(log_w), joint.hits.severity)
    return Evidence(
        method=method.name,
        log_prob=log_prob,
        std_error=error,
        interval=(lower, min(upper, 0.0) if math.isfinite(upper) else 0.0),
        claim="unbiased" if fixed and below is None else "consistent",
        calls=meter.calls,
        seconds=meter.seconds,
        converged=not notes,
        particles=particles,
        log_evidence=0.0 if below is None else below.log_mean,
        diagnostics={
            "khat": khat,
            "smoothed": joint.smoothed - (0.0 if below is None else below.smoothed),
            "ess": ess,
            "hits": float(hits),
            "samples": float(sum(len(t.log_w) for t in targets)),
            "coverage": coverage,
            "unseen": unseen,
            "rank": 0.0 if joint.fitted.basis is None else float(joint.fitted.basis.shape[1]),
            "components": float(joint.fitted.components),
        },
        notes=tuple(notes),
        batches=diagnostics.batch_means(joint.log_w) if below is None and joint.fresh else (),
    )
