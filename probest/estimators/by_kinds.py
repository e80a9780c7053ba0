r"""Looks at the kinds of catastrophe one by one, where the severity is the largest of several.

Each kind (:mod:`probest.moments.kinds`) is an event of its own, and gets a tempering run of its own. What two kinds
have in common counts for the one whose severity is larger there, so that the runs' estimates add up to P of all that
were looked for, and each is unbiased as tempering is:

.. math:: P = \sum_k P\{s_k \ge 0,\ k = \arg\max_j s_j\}.

Of the hundred kinds that a pair of classes can be confused in, a few matter. Which, a linear fit to the severity of
each where it is largest says, roughly (a first-order estimate, after Hasofer & Lind 1974); they are looked for in this
order until what is left promises too little.

It finds modes that a run on the whole severity loses: in a class of the digits network, looks of 128 particles came
upon one of two pairs of classes with half of P each, hardly ever on both, and differed by nats; looks at either pair
differed by half a nat.

It fails where a kind by itself has modes that come into reach late, and where the fit is wrong by nats: what was not
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
from probest.estimators.tempering import Tempering
from probest.evidence import Families, Floats, Particles, Population, Run
from probest.guides.memory import together
from probest.seeds import child_seed
from probest.smc.families import combine, complaints
from probest.surrogates.student import Student
from probest.surrogates.watched import Cases, OneKind, Watched
from probest.tuning import tuned

__all__ = ["ByKindsTuning", "look_by_kinds"]

_BY = "networks.py"
_WHOLE = -1
_NEVER = 1e29  # minus a severity beyond which there is none


@dataclass(frozen=True)
class ByKindsTuning:
    """How kinds are chosen, and looked for. Set by hand on three classes of the digits network."""

    fitted: tuple[float, ...] = tuned((1.3, 5.0), "times dim cases, where a kind is most severe, that fits are of", _BY)
    least_fitted: int = tuned(40, "of them, at least", _BY)
    smooth: float = tuned(0.1, "of the fit's largest singular value, as its ridge", _BY)
    slack: float = tuned(3.0, "nats by which a fit may be too low", _BY)
    least: float = tuned(0.03, "of what was found, that a kind has to promise", _BY)
    most: int = tuned(12, "kinds, at most", _BY)
    margin: float = tuned(1.3, "times what the kind before took, that has to be left", _BY)
    known: float = tuned(0.12, "of the first run's particles, that are enough of a kind", _BY)
    hopeless: float = tuned(2.0, "nats below what would be enough, at which a kind's run is given up", _BY)


class Stream(IntEnum):
    """Names of the seeds."""

    KIND = 0


class _Found(NamedTuple):
    """A run, of one kind or of the whole (-1), and at its particles the severity ``(n,)`` and what all kinds say,
    ``(n, K)``.
    """

    which: int
    run: Run
    severity: Floats
    kinds: Floats

    @property
    def z(self) -> Floats:
        assert self.run.population is not None
        return self.run.population.z.astype(np.float64, copy=False)


def look_by_kinds(
    watched: Watched,
    first: Run,
    method: Tempering,
    *,
    budget: int,
    seed: np.random.SeedSequence,
    tuning: ByKindsTuning | None = None,
) -> Run | None:
    """``first``, a tempering run that reached the event, and one for each kind that it lacks and that promises enough.

    Together they are one run, the calls of which are those after the first. None where the budget does not allow any,
    and where the severity turned out not to be the largest of its kinds.
    The event that is watched has kinds and is not weighted. method: of each run, with as many islands as the first.
    """
    tuning, meter = tuning or ByKindsTuning(), Meter(watched, budget)
    found: list[_Found] = []
    tried: set[int] = set()
    assert first.population is not None
    price = first.calls / len(first.population.z)

    def learn(which: int, run: Run) -> bool:
        if run.population is None or meter.left < len(run.population.z):
            return False
        at = run.population.z.astype(np.float64, copy=False)
        severity = meter.evaluate(at).severity
        found.append(_Found(which, run, severity, watched.cases().kinds[-len(at) :].astype(np.float64)))
        return True

    cases = watched.cases()
    apart = np.abs(cases.kinds.max(axis=1, initial=-np.inf) - cases.severity) > 1e-3 * (1.0 + np.abs(cases.severity))
    if apart.any() or not learn(_WHOLE, first):
        return None
    promise = np.full(cases.kinds.shape[1], -np.inf)
    seen, count = np.unique(found[0].kinds.argmax(axis=1), return_counts=True)
    known = seen[count >= tuning.known * len(found[0].kinds)]
    while len(tried) < tuning.most and meter.left > tuning.margin * price * method.particles:
        promise = np.maximum(promise, _promises(watched.cases(), tuning))  # cases of other kinds may spoil a fit
        promise[[*tried, *known]] = -np.inf
        which = int(np.argmax(promise))
        least = _total(found) + math.log(tuning.least)
        if promise[which] + tuning.slack < least:
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
    return _together(found, meter, len(tried))


def _promises(cases: Cases, tuning: ByKindsTuning) -> Floats:
    """log P of each kind ``(K,)`` to first order: the largest of some linear fits where its severity is largest."""
    out = np.full(cases.kinds.shape[1], -np.inf)
    for k in range(len(out)):
        if cases.kinds[:, k].max() < -_NEVER:
            continue
        order = np.argsort(-cases.kinds[:, k], kind="stable")[: int(max(tuning.fitted) * cases.z.shape[1])]
        for size in tuning.fitted:
            rows = order[: max(tuning.least_fitted, int(size * cases.z.shape[1]))]
            out[k] = max(out[k], _first_order(cases.z[rows], cases.kinds[rows, k], tuning.smooth))
    return out


def _first_order(z: Floats, severity: Floats, smooth: float) -> float:
    """log P of a linear fit to a severity."""
    x, s = z.astype(np.float64), severity.astype(np.float64)
    u, size, vt = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)
    slope = vt.T @ (size / (size**2 + (smooth * size[0]) ** 2) * (u.T @ (s - s.mean())))
    length, at_zero = float(np.linalg.norm(slope)), float(s.mean() - slope @ x.mean(axis=0))
    return float(special.log_ndtr(at_zero / length)) if length > 0.0 else -math.inf


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
    owned = _owned(found)
    kept = [(one, own) for one, own in zip(found, owned, strict=True) if own.any()]
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
    each = np.exp(np.array(shares) - diagnostics.log_sum_exp(np.array(shares)))  # independent runs of parts of P
    families_of = np.array([one.run.conclusion.diagnostics["island_ess"] for one, _ in kept])
    verdict = verdict._replace(effective=1.0 / float(np.sum(each**2 / families_of)))
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
