r"""Looks at the kinds of catastrophe one by one, where the severity is the largest of several.

Each kind (:mod:`probest.moments.kinds`) is an event of its own, and gets a tempering run of its own. What two kinds
have in common counts for the one whose severity is larger there, so that the runs' estimates add up to P of all that
were looked for, and each is unbiased as tempering is:

.. math:: P = \sum_k P\{s_k \ge 0,\ k = \arg\max_j s_j\}.

Of the hundred kinds that a pair of classes can be confused in, a few matter. Which, a student says that has learned all
that was answered so far (:mod:`probest.surrogates.student`): tempering on what it knows of each kind takes no model
calls. (It is taught those for which a linear fit where their severity is largest promises most. The fit alone was off
by 10 nats and more, the student by 2.) They are looked for in this order until what is left promises too little.

It finds modes that a run on the whole severity loses: in a class of the digits network, looks of 128 particles came
upon one of two pairs of classes with half of P each, hardly ever on both, and differed by nats; looks at either pair
differed by half a nat.

Where the budget ends that, what is left counts as room (:func:`promised`).

It fails where a kind by itself has modes that come into reach late, and where students are wrong by nats: what was not
looked for is left to looks at the whole severity.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import NamedTuple

import numpy as np
from scipy import special

from probest import diagnostics
from probest.budget import Meter
from probest.estimators.distilling import DistillingTuning, tempered
from probest.estimators.tempering import Tempering
from probest.evidence import Families, Floats, Particles, Population, Run
from probest.guides.memory import together
from probest.seeds import child_seed, generator
from probest.smc.families import combine, complaints
from probest.surrogates.student import Student
from probest.surrogates.watched import Cases, OneKind, Watched
from probest.tuning import tuned

__all__ = ["ByKinds", "ByKindsTuning", "look_by_kinds", "promised"]

_BY = "networks.py"
_WHOLE = -1
_NEVER = 1e29  # minus a severity beyond which there is none


@dataclass(frozen=True)
class ByKindsTuning:
    """How kinds are chosen, and looked for. Set by hand on three classes of the digits network."""

    fitted: tuple[float, ...] = tuned((1.3, 5.0), "times dim cases, where a kind is most severe, that fits are of", _BY)
    least_fitted: int = tuned(40, "of them, at least", _BY)
    considered: int = tuned(48, "kinds of the largest severities seen, that fits are made of", _BY)
    candidates: int = tuned(6, "kinds that a student is taught, and tempers on, to choose by", _BY)
    rough: float = tuned(12.0, "nats that a linear fit may be too low, for a kind to be among them", _BY)
    students: int = tuned(2, "of them: what one has not understood, another may", _BY)
    lesson_share: float = tuned(0.7, "of a student's usual steps", _BY)
    noise: float = tuned(0.2, "deviations of z, that it is taken to be off", _BY)
    particles: int = tuned(256, "of each of its temperings, which cost no model calls", _BY)
    smooth: float = tuned(0.1, "of the fit's largest singular value, as its ridge", _BY)
    slack: float = tuned(2.0, "nats by which the student may be too low", _BY)
    least: float = tuned(0.03, "of what was found, that a kind has to promise", _BY)
    most: int = tuned(12, "kinds, at most", _BY)
    margin: float = tuned(1.3, "times what the kind before took, that has to be left", _BY)
    known: float = tuned(0.12, "of all catastrophes seen, that are enough of a kind", _BY)
    fewer: float = tuned(0.25, "times what a kind promises, that its share of what was seen falls short by", _BY)
    hopeless: float = tuned(2.0, "nats below what would be enough, at which a kind's run is given up", _BY)


class Stream(IntEnum):
    """Names of the seeds."""

    KIND = 0
    PROMISE = 1


class _Found(NamedTuple):
    """A run, of one kind or of the whole (-1), and at its particles the severity ``(n,)`` and what all kinds say,
    ``(n, K)``.
    """

    which: int
    run: Run
    severity: Floats
    kinds: Floats


class ByKinds(NamedTuple):
    """run: None where no kind promises enough, the budget does not allow any, or the severity turned out not to be the
    largest of its kinds. short: whether the budget ended it, so that kinds may be left that promise enough.
    """

    run: Run | None
    short: bool


def look_by_kinds(
    watched: Watched,
    first: Run,
    method: Tempering,
    tried: set[int],
    *,
    budget: int,
    seed: np.random.SeedSequence,
    tuning: ByKindsTuning | None = None,
) -> ByKinds:
    """``first``, a tempering run that reached the event, and one for each kind that is missing and promises enough.

    Together they are one run, the calls of which are those after the first.
    The event that is watched has kinds and is not weighted. method: of each run, with as many islands as the first.
    tried: kinds that were looked for before, to which those that are looked for now are added.
    """
    tuning, meter = tuning or ByKindsTuning(), Meter(watched, budget)
    found: list[_Found] = []
    assert first.population is not None
    price, turn, log_prob = first.calls / len(first.population.z), len(tried), first.conclusion.log_prob
    cases = watched.cases()
    apart = np.abs(cases.kinds.max(axis=1, initial=-np.inf) - cases.severity) > 1e-3 * (1.0 + np.abs(cases.severity))
    if apart.any():
        return ByKinds(None, False)
    known = np.flatnonzero(_seen(cases) >= tuning.known)
    short = True

    def learn(which: int, run: Run) -> bool:
        if run.population is None or meter.left < len(run.population.z):
            return False
        at = run.population.z.astype(np.float64, copy=False)
        severity = meter.evaluate(at).severity
        found.append(_Found(which, run, severity, watched.cases().kinds[-len(at) :].astype(np.float64)))
        return True

    while len(tried) < turn + tuning.most and meter.left > tuning.margin * price * method.particles:
        least = (_total(found) if found else log_prob) + math.log(tuning.least)
        promise = _promises(
            watched.cases(), [*tried, *known], least, tuning, child_seed(seed, Stream.PROMISE, len(tried))
        )
        which = int(np.argmax(promise))
        if promise[which] + tuning.slack < least:
            short = False
            break
        if not found and not learn(_WHOLE, first):
            break
        tried.add(which)
        student = None if method.student is None else Student()
        hopeless = replace(method.tuning, floor=max(method.tuning.floor, least - tuning.hopeless))
        each = replace(method, student=student, tuning=hopeless)
        event = Watched(OneKind(watched, which), watched.most)
        run = each.run(event, budget=meter.left, seed=child_seed(seed, Stream.KIND, which))
        meter.charge(run.calls)
        if learn(which, run):
            price = run.calls / method.particles
    return ByKinds(_together(found, meter, len(tried) - turn) if found else None, short)


def promised(
    watched: Watched,
    tried: set[int],
    log_prob: float,
    *,
    seed: np.random.SeedSequence,
    tuning: ByKindsTuning | None = None,
) -> float:
    """What kinds may hold that were neither looked for nor seen enough of, as a share of P. No model calls.

    A kind counts if a student has it that it holds ``least`` of ``log_prob``, and much more than its part of all
    catastrophes that were seen: what a guide has samples of need not be looked for. It may hold more by ``slack``.
    """
    tuning, cases = tuning or ByKindsTuning(), watched.cases()
    seen = _seen(cases)
    known = np.flatnonzero(seen >= tuning.known)
    promise = _promises(cases, [*tried, *known.tolist()], log_prob + math.log(tuning.least), tuning, seed)
    share = np.exp(np.minimum(promise - log_prob, 0.0))
    left = (share >= tuning.least) & (seen < tuning.fewer * share)
    return float(share[left].sum()) * math.exp(tuning.slack)


def _seen(cases: Cases) -> Floats:
    """The share ``(K,)`` of each kind in all catastrophes that were seen."""
    count = np.bincount(cases.kinds[cases.severity >= 0.0].argmax(axis=1), minlength=cases.kinds.shape[1])
    return count / max(int(count.sum()), 1)


def _promises(
    cases: Cases, known: list[int], least: float, tuning: ByKindsTuning, seed: np.random.SeedSequence
) -> Floats:
    """log P of each kind ``(K,)``, as students of those that may matter have it; −∞ for the others, and the known."""
    out = np.full(cases.kinds.shape[1], -np.inf)
    rough, slopes = _rough(cases, tuning)
    rough[known] = -np.inf
    order = np.argsort(-rough, kind="stable")[: tuning.candidates]
    some = tuple(int(k) for k in order if rough[k] > least - tuning.rough)
    if not some:
        return out
    for number in range(tuning.students):
        own = child_seed(seed, number)
        learned = Student().teach(cases, generator(own), tuning.lesson_share, some, slopes[list(some)])
        if learned is None:
            return rough
        for k, which in enumerate(some):
            one = learned._replace(noise=tuning.noise).only(k)
            run = tempered(one, tuning.particles, DistillingTuning(), child_seed(own, k))
            out[which] = max(out[which], -math.inf if run is None else run.conclusion.log_prob)
    return out


def _rough(cases: Cases, tuning: ByKindsTuning) -> tuple[Floats, Floats]:
    """log P of each kind ``(K,)`` to first order, and the directions ``(K, dim)`` in which it becomes one: the more
    likely of some linear fits where its severity is largest.
    """
    out = np.full(cases.kinds.shape[1], -np.inf)
    slopes = np.zeros((len(out), cases.z.shape[1]))
    largest = cases.kinds.max(axis=0)
    for k in np.argsort(-largest, kind="stable")[: tuning.considered]:
        if largest[k] < -_NEVER:
            break
        order = np.argsort(-cases.kinds[:, k], kind="stable")[: int(max(tuning.fitted) * cases.z.shape[1])]
        for size in tuning.fitted:
            rows = order[: max(tuning.least_fitted, int(size * cases.z.shape[1]))]
            promise, slope = _first_order(cases.z[rows], cases.kinds[rows, k], tuning.smooth)
            if promise > out[k]:
                out[k], slopes[k] = promise, slope
    return out, slopes


def _first_order(z: Floats, severity: Floats, smooth: float) -> tuple[float, Floats]:
    """log P of a linear fit to a severity, and its direction ``(dim,)``."""
    x, s = z.astype(np.float64), severity.astype(np.float64)
    u, size, vt = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)
    slope = vt.T @ (size / (size**2 + (smooth * size[0]) ** 2) * (u.T @ (s - s.mean())))
    length, at_zero = float(np.linalg.norm(slope)), float(s.mean() - slope @ x.mean(axis=0))
    return (float(special.log_ndtr(at_zero / length)), slope / length) if length > 0.0 else (-math.inf, slope)


def _owned(found: Sequence[_Found]) -> list[np.ndarray]:
    """Of each run, which of its particles count: of a kind's those of that kind, of the whole's those of no such."""
    reached = [one.which for one in found if one.which != _WHOLE]
    most = [one.kinds.argmax(axis=1) for one in found]
    return [
        (one.severity >= 0.0) & (~np.isin(largest, reached) if one.which == _WHOLE else largest == one.which)
        for one, largest in zip(found, most, strict=True)
    ]


def _total(found: Sequence[_Found]) -> float:
    """log P of what was found."""
    shares = [
        one.run.conclusion.log_prob + math.log(max(float(own.mean()), 1e-300))
        for one, own in zip(found, _owned(found), strict=True)
    ]
    return diagnostics.log_sum_exp(np.array(shares))


def _together(found: Sequence[_Found], meter: Meter, tried: int) -> Run:
    """The runs as one, whose estimate is the sum of what each has that is its own."""
    kept = [(one, own) for one, own in zip(found, _owned(found), strict=True) if own.any()]
    kept = kept or [(found[0], np.ones(len(found[0].severity), dtype=bool))]
    shares = [one.run.conclusion.log_prob + math.log(float(own.mean())) for one, own in kept]
    populations: list[Population] = []
    family = []
    for one, own in kept:
        population, families = one.run.population, one.run.families
        assert population is not None
        assert families is not None
        count = float(own.sum())
        populations.append(population._replace(
            z=population.z[own], log_w=population.log_w[own], log_weight=population.log_weight[own],
            effective=max(1.0, count / 2.0),
        ))  # fmt: skip
        family.append(families.log_z + math.log(count / len(own)))
    families = Families(special.logsumexp(np.stack(family), axis=0), None, sum(len(own) for _, own in kept))
    verdict = combine([families])
    # independent runs of parts of P: what each is worth counts by the square of its part
    part = np.exp(np.array(shares) - diagnostics.log_sum_exp(np.array(shares)))
    worth = np.array([one.run.conclusion.diagnostics["island_ess"] for one, _ in kept])
    verdict = verdict._replace(effective=1.0 / float(np.sum(part**2 / worth)))
    notes = complaints(verdict)
    log_w = np.concatenate(
        [np.full(int(own.sum()), share - math.log(own.sum())) for share, (_, own) in zip(shares, kept, strict=True)]
    )
    particles = Particles(
        np.concatenate([population.z.astype(np.float64) for population in populations]),
        log_w - diagnostics.log_sum_exp(log_w),
        np.concatenate([one.severity[own] for one, own in kept]),
    )
    largest = kept[int(np.argmax(shares))][0].run.conclusion
    evidence = replace(
        largest,
        method="tempering by kinds",
        log_prob=min(verdict.log_prob, 0.0),
        std_error=verdict.error,
        interval=verdict.interval,
        calls=meter.calls,
        seconds=meter.seconds,
        converged=not notes,
        particles=particles,
        diagnostics={"island_ess": verdict.effective, "kinds": float(len(kept)), "tried": float(tried)},
        notes=notes,
    )
    return Run.of(evidence, population=together(populations, shares), families=families)
