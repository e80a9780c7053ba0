r"""Strata: hold the discrete sites, estimate where it matters, add up.

With p_k the probability of the values k of the discrete sites and P_k that of a catastrophe given these,

.. math:: P = \sum_k p_k P_k .

A walk or a line sees one value of a switch and calls it the world; here every value that can be listed is held once and
looked at, whatever its probability (:mod:`probest.programs.strata`).

1. *Look*: a few draws of every stratum, in one batch, the same for all. A stratum without other randomness is settled
   by one of them. Where strata are too many to estimate apart, those with equal severities at all draws, some of them
   far out, count as one (in a chain only the number of visits may matter, not which they were) until its catastrophes
   say otherwise: every member is asked at some.
2. *Estimate*: the strata that look likeliest first, each by ``inner``, to the precision that its share of P asks for:
   with shares r_k and errors e_k the error of log P is √Σ (r_k e_k)², and at equal cost e_k = precision / √r_k.
   A stratum is never worth more than p_k: once those that are left sum to a negligible part, they are left.
   A stratum where nothing is found is searched by draws at several scales, up to six standard deviations; where these
   find nothing either it counts as empty. No number of draws could rule out more than the rule of three does, so this
   is a search like that for modes anywhere else, and no bound: what sampling alone leaves is in the stratum's own line.
3. *Refine*: shares are known now; strata whose error is too large for theirs are estimated again, afresh, once: to go
   on until an error looks small would favour estimates that are precise by chance, which are high where P_k is near 1.

What was neither estimated nor searched is in the interval with its p_k, and strata where nothing was found, but which
the budget did not allow to search, with p_k times their bound.

Where the sites' combinations are more than ``max_strata`` and there is no other randomness, a Gaussian process over
the list of them says which to ask (:mod:`probest.estimators.kriging`). Elsewhere, and where they are more than can be
listed at all, a guide over all of them comes first (:mod:`probest.estimators.cross_entropy`), and strata of the few
that can be held where it does not converge.

It fails where there are many more strata than the budget has estimates for: then it says so. What ``inner`` misses
within a stratum is missed here.

Reference: Owen (2013), Monte Carlo theory, methods and examples, ch. 8 (stratification and allocation).
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import NamedTuple

import numpy as np
from scipy.special import log_ndtr

from probest import diagnostics
from probest.budget import FORWARD_CALLS
from probest.estimators.base import check_precision
from probest.estimators.combined import Campaign, Combined, wide
from probest.estimators.cross_entropy import CrossEntropy, listed_sites
from probest.estimators.kriging import Kriging, combinations
from probest.estimators.monte_carlo import MonteCarlo
from probest.evidence import Code, EventLike, Evidence, Floats, Note, Particles, Run
from probest.programs.base import Site
from probest.programs.event import Event
from probest.programs.strata import MOST, Glance, Strata, StratumEvent, columns_of, glances, placed, strata_of
from probest.seeds import child_seed, generator, number
from probest.tuning import tuned
from probest.verdict import RULES, agree, imprecise, settle, wanted_error

__all__ = ["Stratified", "StratifiedTuning"]

_PROGRAMS = "programs.py"
_LEAST = 2_000  # calls, below which a closed loop's strata would take most of the budget to list


class Stream(IntEnum):
    """Names of the seeds of a run."""

    LOOK = 0
    ESTIMATE = 1
    REFINE = 2
    PLACE = 3
    SEARCH = 4
    PRIOR = 5
    GUIDED = 6
    BOUND = 7
    KRIGED = 8
    LIST = 9
    GLANCE = 10
    EVERY = 11


@dataclass(frozen=True)
class StratifiedTuning:
    """How a budget is divided between strata. Set by hand on the families of benchmarks/programs.py."""

    listing: float = tuned(0.2, "of the budget, for probabilities in a closed loop that depend on draws", _PROGRAMS)
    alone: float = tuned(0.125, "of the budget in calls, values of one site that is held alone, at most", _PROGRAMS)
    glances: int = tuned(8, "draws at which every value of other sites is held once, at most", _PROGRAMS)
    glance_share: float = tuned(0.2, "of the budget, at most, for that", _PROGRAMS)
    every: float = tuned(0.4, "of the budget, at most, for asking every combination once", _PROGRAMS)
    seldom_seen: float = tuned(8.0, "catastrophes that a combination should have, to be missed", _PROGRAMS)
    matters: float = tuned(0.2, "share of P that such a value has to seem worth, to contradict", _PROGRAMS)
    hardly: float = tuned(0.1, "of that share, below which catastrophes hardly have it", _PROGRAMS)
    looks: int = tuned(16, "draws of each stratum in the first look, at most", _PROGRAMS)
    far: float = tuned(4.0, "scale of a third of them, in standard deviations", _PROGRAMS)
    apart: float = tuned(0.2, "of the budget, for which all strata would be estimated apart", _PROGRAMS)
    price: int = tuned(200, "calls that a smooth stratum takes", _PROGRAMS)
    dear_price: int = tuned(
        1500, "calls that it takes where answers are yes or no, or where it is conditioned", _PROGRAMS
    )
    rounding: float = tuned(
        1e-5, "of the median deviation of severities, by which those of alike strata may differ", _PROGRAMS
    )
    halvings: int = tuned(5, "of the way to a catastrophe, to ask next to the boundary", _PROGRAMS)
    asked: int = tuned(4, "catastrophes of a part at which its members are asked whether they are alike", _PROGRAMS)
    boolean_asked: int = tuned(12, "as many where answers are only yes or no", _PROGRAMS)
    look_share: float = tuned(0.1, "of the budget, at most, for looking (but three draws each)", _PROGRAMS)
    scales: tuple[float, ...] = tuned((1.0, 1.5, 2.0, 3.0, 4.0, 6.0), "standard deviations of a search", _PROGRAMS)
    searched: int = tuned(2_000, "draws that have to find nothing before a stratum counts as empty", _PROGRAMS)
    searched_least: int = tuned(64, "of them, at least, for each of those that count as one", _PROGRAMS)
    search_share: float = tuned(0.1, "of what is left, at most, for each such search", _PROGRAMS)
    least_calls: int = tuned(60, "calls below which no stratum is estimated", _PROGRAMS)
    first_pass: float = tuned(
        0.6, "of an equal part of the budget, for each stratum before shares are known", _PROGRAMS
    )
    negligible: float = tuned(0.01, "share of P that the strata which are left out may hold", _PROGRAMS)
    vaguest: float = tuned(0.1, "standard error that a stratum is estimated to, at most", _PROGRAMS)
    doubt: float = tuned(
        0.02, "of what a stratum may hold at most, against its error, where it has not converged", _PROGRAMS
    )
    taught: int = tuned(
        20_000, "calls of one stratum, from which a student is worth its time", "networks.py --problems drawn"
    )
    kept: int = tuned(3, "times what is kept for a student, for those of all strata", "memory")
    slack: float = tuned(
        1.3, "times the error that its share asks for, at which a stratum is estimated again", _PROGRAMS
    )
    rows: int = tuned(12, "strata with a row of their own in the ledger", "reading")
    guided: float = tuned(0.9, "of the budget, for a guide over discrete sites that are too many to list", _PROGRAMS)
    least_guided: int = tuned(2000, "calls below which it is not tried", _PROGRAMS)
    prior_particles: int = tuned(400, "of the conditioned adversary", "memory")
    prior_draws: int = tuned(32, "draws that each of them is chosen from", "acceptance.py")
    particles: int = tuned(4000, "that are kept over all strata", "memory")


class _Looked(NamedTuple):
    """Values that were held once. worth: log of what each seems to add to P."""

    glances: list[Glance]
    worth: Floats
    calls: int


@dataclass
class _Part:
    """Strata that look like one: their places in the list, and what is known of P_k.

    exact: log P_k where there is no other randomness; severity: then. flat: no draw of the look differed from another.
    empty: nothing was found, near or far out.
    """

    members: np.ndarray
    log_p: float
    score: float
    evidence: Evidence | None = None
    exact: float | None = None
    severity: float = math.nan
    calls: int = 0
    log_p_error: float = 0.0
    asked: bool = False
    refined: bool = False
    campaign: Campaign | None = None
    flat: bool = False
    empty: bool = False

    @property
    def k(self) -> int:
        """The most probable of them, which stands for all."""
        return int(self.members[0])

    @property
    def known(self) -> bool:
        return self.exact is not None or self.evidence is not None

    @property
    def searched(self) -> bool:
        """Whether another estimate would go on from what is known."""
        return self.campaign is not None and self.campaign.searched

    @property
    def log_prob(self) -> float:
        """log P_k."""
        return self.exact if self.exact is not None else -math.inf if self.evidence is None else self.evidence.log_prob

    @property
    def joint(self) -> float:
        return self.log_p + self.log_prob

    @property
    def error(self) -> float:
        own = 0.0 if self.exact is not None else math.inf if self.evidence is None else self.evidence.std_error
        return math.hypot(own, self.log_p_error)

    @property
    def upper(self) -> float:
        """log of what p_k P_k is below; of an empty stratum this is what was not looked at, and not counted."""
        if self.exact is not None:
            return self.joint
        return self.log_p if self.evidence is None else self.log_p + self.evidence.interval[1]


@dataclass(frozen=True)
class Stratified:
    """Estimate the strata of a program apart, and add up.

    precision: wanted standard error of log P; None spends the budget.
    inner: the method for one stratum; its ``precision``, where it has that field, is set by the stratum's share.
    max_strata: combinations of values that are listed, at most; sites beyond that stay random.
    tuning: how the budget is divided.
    """

    precision: float | None = 0.05
    inner: Combined = field(default_factory=Combined)
    max_strata: int = MOST
    tuning: StratifiedTuning = field(default_factory=StratifiedTuning, repr=False)

    def __post_init__(self) -> None:
        check_precision(self.precision)
        if self.max_strata < 2:
            raise ValueError(
                f"max_strata must be at least 2, got {self.max_strata}; use the inner method without strata"
            )

    @property
    def name(self) -> str:
        return "stratified"

    def run(self, event: EventLike, *, budget: int, seed: np.random.SeedSequence) -> Run:
        """The strata's evidence and their sum; that of ``inner`` alone where the event has no strata."""
        strata, guided, left = None, None, budget
        if self._listable(event, budget):
            guided = self._kriging.run(event, budget=left, seed=child_seed(seed, Stream.KRIGED))
            left -= guided.calls
            if math.isfinite(guided.conclusion.log_prob) or left < 1:
                return guided
        if isinstance(event, Event) and (budget >= _LEAST or not event.composition.interleaved):
            before = event.model_calls
            own = number(child_seed(seed, Stream.LIST))
            strata = strata_of(
                event,
                self.max_strata,
                own,
                alone=int(self.tuning.alone * budget) if self.max_strata >= MOST else 0,
                calls=int(self.tuning.listing * budget),
            )
            left -= event.model_calls - before  # a closed loop runs its model to list them, whatever comes of it
        unheld, looked = self._unheld(event, strata), None
        if guided is None and unheld and isinstance(event, Event):
            guided = self._guided(event, left, seed)
            left -= 0 if guided is None else guided.calls
            if guided is not None and (guided.conclusion.converged or left < 1):
                return replace(guided, calls=budget - left)
        if unheld and isinstance(event, Event):
            looked = self._glance(event, unheld, left, seed)
            left -= 0 if looked is None else looked.calls
        if strata is None or len(strata) < 2 or left < len(strata):
            run = self.inner.run(event, budget=left, seed=seed)
        else:
            run = _Campaign(self, strata, seed, left=left, budget=left).run()
        run = _with_guided(run, guided, budget - left, unheld)
        return self._with_glances(event, run, unheld, looked) if unheld and isinstance(event, Event) else run

    @property
    def _around(self) -> int:
        """Calls that say how far severities spread around their medians."""
        return self.tuning.glances * self.tuning.looks

    def _combinations(self, event: Event, budget: int) -> int | None:
        """Of the values of all listed sites, where so many calls are to be had for asking each once; else None."""
        logs = sum(site.elements * math.log(len(site.choices)) for site in listed_sites(event))
        if event.composition.interleaved or logs > math.log(max(self.tuning.every * budget, 1.0)):
            return None
        return round(math.exp(logs))

    def _checked(self, event: Event, guided: Run, count: int, left: int, seed: np.random.SeedSequence) -> Run:
        """What a guide concluded, not converged where a combination of values that it does not know seems to matter.

        Asked of every one of the ``count`` combinations: one that no other resembles leads no search to itself. Each is
        asked once, where all else is at its median.
        """
        last, strata = guided.conclusion, strata_of(event, count, number(child_seed(seed, Stream.EVERY)))
        found = last.particles
        if strata is None or len(strata) + self._around > left or found is None or not len(found.z):
            return guided
        members, middle = np.arange(len(strata)), np.zeros((1, len(strata.free)))
        severity = event.evaluate(
            np.repeat(strata.full(middle), len(members), axis=0), held=strata.held(members)
        ).severity
        rng = generator(child_seed(seed, Stream.EVERY, 1))
        few = np.repeat(members[: self.tuning.glances], self.tuning.looks)
        draws = strata.full(
            np.tile(rng.standard_normal((self.tuning.looks, len(strata.free))), (self.tuning.glances, 1))
        )
        around = event.evaluate(draws[: len(few)], held=strata.held(few)).severity.reshape(-1, self.tuning.looks)
        spread = float(np.median(around.std(axis=1)))
        with np.errstate(divide="ignore", invalid="ignore"):
            score = np.where(severity >= 0.0, np.inf, -np.inf) if spread == 0.0 else severity / spread
        worth = strata.log_prob + log_ndtr(score) - last.log_prob
        known = np.zeros(len(strata), dtype=np.bool_)
        at = strata.index_of(found.z)
        known[at[at >= 0]] = True
        worth = np.where(known | (worth < math.log(self.tuning.seldom_seen / len(found.z))), -np.inf, worth)
        if diagnostics.log_sum_exp(worth) < math.log(self.tuning.matters):
            return guided
        label = strata.label(int(np.argmax(worth)))
        return _opened(guided, f"{label} seems to matter, and no catastrophe has it: raise the budget.")

    def _unheld(self, event: EventLike, strata: Strata | None) -> tuple[Site, ...]:
        """Sites that could be listed and that no stratum holds."""
        if not isinstance(event, Event):
            return ()
        held = {site.name for site in strata.sites} if strata is not None else set()
        return tuple(site for site in listed_sites(event) if site.name not in held)

    def _glance(self, event: Event, sites: tuple[Site, ...], left: int, seed: np.random.SeedSequence) -> _Looked | None:
        """Every value of these sites, held once at a few draws; None where that takes too much of the budget."""
        tuning = self.tuning
        count = sum(site.elements * len(site.choices) for site in sites)
        draws = int(min(tuning.glances, tuning.glance_share * left / max(count, 1)))
        if draws < 2:
            return None
        rng, before = generator(child_seed(seed, Stream.GLANCE)), event.model_calls
        z = rng.standard_normal((draws, event.dim))
        found = glances(event, sites, z, rng)
        plain = event.evaluate(z)
        at = event.evaluate(np.concatenate([one.z for one in found]))
        usual = diagnostics.log_mean_exp(plain.log_weight)[0]
        severity, log_weight = at.severity.reshape(-1, draws), at.log_weight.reshape(-1, draws)
        with np.errstate(invalid="ignore"):
            relative = np.nan_to_num(np.array([diagnostics.log_mean_exp(row)[0] for row in log_weight]) - usual)
        worth = np.array([one.log_prob + _guess(row) for one, row in zip(found, severity, strict=True)])
        return _Looked(found, worth + np.where(np.isfinite(relative), relative, 0.0), event.model_calls - before)

    def _with_glances(self, event: Event, run: Run, sites: tuple[Site, ...], looked: _Looked | None) -> Run:
        """The run, not converged and open above where a value that was held once seems worth far more than its share of
        the answer.
        """
        last = run.conclusion
        if not math.isfinite(last.log_prob) or (looked is None and not last.converged):
            return run
        if looked is None:
            names = ", ".join(repr(site.name) for site in sites)
            return _opened(
                run, f"the budget does not allow to look at every value of {names}, one may matter: raise it."
            )
        found = self._contradicts(event, last, looked)
        if found is None:
            return run
        value = f"{found.site.name} = {found.code}"
        return _opened(run, f"{value} seems to matter, and hardly any catastrophe has it: raise the budget.")

    def _contradicts(self, event: Event, last: Evidence, looked: _Looked) -> Glance | None:
        """The value that seems worth most, beyond the share of catastrophes that have it; None where there is none."""
        found = last.particles
        codes = event.discrete_draws(found.z) if found is not None and len(found.z) else None
        weight = None if found is None or codes is None else np.exp(found.log_weight - found.log_weight.max())
        for i in np.argsort(-looked.worth):
            one, share = looked.glances[int(i)], math.exp(min(float(looked.worth[i]) - last.log_prob, 0.0))
            if share < self.tuning.matters:
                return None
            column = columns_of(event, (one.site,))[0][one.element]
            have = 0.0 if codes is None or weight is None else weight[codes[:, column] == one.code].sum() / weight.sum()
            if have < self.tuning.hardly * share:
                return one
        return None

    @property
    def _kriging(self) -> Kriging:
        return Kriging(precision=self.precision)

    def _listable(self, event: EventLike, budget: int) -> bool:
        """Whether there are discrete sites alone, too many combinations for strata and few enough to list."""
        if event.weighted or event.boolean or budget < self.tuning.least_guided:
            return False
        return self.max_strata < combinations(event) <= self._kriging.most

    def _guided(self, event: Event, left: int, seed: np.random.SeedSequence) -> Run | None:
        """The cross-entropy method, and what every combination says of it; None where it does not apply."""
        if event.weighted or left < self.tuning.least_guided:
            return None
        count = self._combinations(event, left)
        reserve = 0 if count is None else count + self._around
        budget = int(min(self.tuning.guided * left, left - reserve))
        method = CrossEntropy(precision=self.precision)
        run = method.run(event, budget=budget, seed=child_seed(seed, Stream.GUIDED))
        if count is None or not run.conclusion.converged:
            return run
        before = event.model_calls
        checked = self._checked(event, run, count, left - run.calls, seed)
        return replace(checked, calls=run.calls + event.model_calls - before)


@dataclass
class _Campaign:
    """One run: the strata and what is left of the budget. rounding: by how much equal severities may differ."""

    method: Stratified
    strata: Strata
    seed: np.random.SeedSequence
    left: int
    budget: int
    parts: list[_Part] = field(default_factory=list)
    reads: bool | None = None
    rounding: float = 0.0

    def __post_init__(self) -> None:
        self.started = time.perf_counter()
        self.tuning = self.method.tuning
        self.aim = self.method.precision or 0.01

    def run(self) -> Run:
        interrupted = False
        try:
            self._look()
            self._estimate()
            self._refine()
        except KeyboardInterrupt:
            if not any(part.known for part in self.parts):
                raise
            interrupted = True
        return self._conclude(interrupted)

    # --- looking ---------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """The same few draws of every stratum that the budget allows, the most probable first."""
        strata, dim = self.strata, len(self.strata.free)
        each = 1
        if dim:
            each = int(np.clip(self.tuning.look_share * self.budget / len(strata), 3, self.tuning.looks))
            each = min(each, self.left)
        count = min(len(strata), max(1, self.left // (2 * each)) if dim else self.left)
        z = generator(child_seed(self.seed, Stream.LOOK)).standard_normal((each, dim))
        far = max(0, min(each // 3, 4)) if dim else 0
        z[each - far :] *= self.tuning.far
        severity = self._severities(np.arange(count), z)
        near = severity[:, : each - far]
        # a program that adds up its draws rounds differently in every stratum
        finite = severity[np.isfinite(severity)]
        spread = float(np.median(np.abs(finite - np.median(finite)))) if len(finite) else 0.0
        self.rounding = self.tuning.rounding * spread
        if not dim:
            self.parts = [self._settled_part(k, float(severity[k, 0])) for k in range(count)]
        else:
            for rows in self._alike(severity):
                part = self._part(rows, _guess(near[rows[0]]))
                part.flat = bool(np.all(severity[rows[0]] == severity[rows[0], 0]))
                self.parts.append(part)
        self.parts += [self._part(np.array([k]), 0.0) for k in range(count, len(strata))]

    def _severities(self, members: np.ndarray, z: Floats) -> Floats:
        """Of these strata at all of these points ``(n, free)``, in one batch: ``(members, n)``."""
        severity = self._values(np.repeat(members, len(z)), np.tile(z, (len(members), 1)))
        return severity.reshape(len(members), len(z))

    def _values(self, members: np.ndarray, z: Floats) -> Floats:
        """Of one stratum at each point: ``(n,)``."""
        held = self.strata.held(members)
        self.left -= FORWARD_CALLS * len(z)
        return self.strata.event.evaluate(self.strata.full(z), held=held).severity

    def _alike(self, severity: Floats) -> list[np.ndarray]:
        """Rows with equal severities, but for rounding; every row alone where they can be estimated apart."""
        if self.strata.varies or len(self.strata) * self._price <= self.tuning.apart * self.budget:
            return [np.array([k]) for k in range(len(severity))]
        _, inverse = np.unique(_rounded(severity, self.rounding), axis=0, return_inverse=True)
        inverse = inverse.ravel()
        order = np.argsort(inverse, kind="stable")
        return np.split(order, np.flatnonzero(np.diff(inverse[order])) + 1)

    def _part(self, members: np.ndarray, guess: float) -> _Part:
        log_p = diagnostics.log_sum_exp(self.strata.log_prob[members])
        error = float(self.strata.std_error[members].max())
        return _Part(members, log_p, log_p + guess, log_p_error=error)

    def _settled_part(self, k: int, severity: float) -> _Part:
        part = self._part(np.array([k]), 0.0)
        part.exact, part.severity = 0.0 if severity >= 0.0 else -math.inf, severity
        return part

    def _ask(self, part: _Part) -> None:
        """Ask all members of a part at some of its catastrophes; those that answer otherwise become other parts.

        Where answers are only yes or no, this is next to its boundary, on both sides.
        """
        part.asked = True
        found = None if part.evidence is None else part.evidence.particles
        if len(part.members) < 2 or found is None:
            return
        most = self.tuning.boolean_asked if self.strata.event.boolean else self.tuning.asked
        at = np.linspace(0, len(found.z) - 1, min(len(found.z), most)).astype(np.intp)
        z = found.z[at]
        if self.strata.event.boolean:
            if self.left < self.tuning.halvings * len(z):
                part.asked = False
                return
            z = self._astride(part.k, z)
        if self.left < len(part.members) * len(z):
            part.asked = False
            return
        severity = self._severities(part.members, z)
        level = _rounded(severity, self.rounding)
        differ = (level != level[0]).any(axis=1)
        if differ.any():
            self._split(part, differ, z)

    def _astride(self, k: int, z: Floats) -> Floats:
        """Points just within and just outside a stratum's event, on the rays through catastrophes."""
        low, high = np.zeros(len(z)), np.ones(len(z))
        for _ in range(self.tuning.halvings):
            middle = 0.5 * (low + high)
            hit = self._severities(np.array([k]), z * middle[:, None])[0] >= 0.0
            low, high = np.where(hit, low, middle), np.where(hit, middle, high)
        return np.concatenate([z * high[:, None], z * low[:, None]])

    # --- estimating ------------------------------------------------------------------------------------------------

    def _estimate(self) -> None:
        """Strata in the order of what they look like, until what is left is negligible or the budget is spent."""
        total = diagnostics.log_sum_exp(np.array([part.score for part in self.parts]))
        equal = math.inf  # what is left later is better spent where it is needed
        while waiting := sorted((part for part in self.parts if not part.known), key=lambda part: -part.score):
            part = waiting[0]
            rest = diagnostics.log_sum_exp(np.array([other.log_p for other in waiting]))
            if rest <= self._joint() + math.log(self.tuning.negligible):
                return
            if part.flat and part.score < part.log_p and not self._reached(part):
                continue
            share = math.exp(min(part.score - total, 0.0))
            equal = min(equal, self.left * self.tuning.first_pass / self._needed(waiting))
            budget = int(equal)
            if budget < self._least:
                budget = min(self.left, self._least)
            if budget < self.tuning.least_calls:
                return
            self._run(part, self._precision(max(share, 0.02)), budget, Stream.ESTIMATE)
            self._ask(part)
            if not math.isfinite(part.log_prob):
                self._reached(part)

    @property
    def _least(self) -> int:
        """Calls without which a stratum's estimate is worth little, as far as the whole budget goes."""
        return max(self.tuning.least_calls, min(2 * self._price, self.budget // 20))

    @property
    def _price(self) -> int:
        """Calls that a stratum takes."""
        dear = self.strata.varies or self.strata.event.boolean
        return self.tuning.dear_price if dear else self.tuning.price

    def _needed(self, waiting: list[_Part]) -> int:
        """How many of the parts that wait will be estimated, as the look has it: until the rest is negligible."""
        log_p, score = (np.array([getattr(part, name) for part in waiting]) for name in ("log_p", "score"))
        total = np.logaddexp(diagnostics.log_sum_exp(score), self._joint())
        rest = np.logaddexp.accumulate(log_p[::-1])[::-1]
        return max(1, int(np.count_nonzero(rest > total + math.log(self.tuning.negligible))))

    def _reached(self, part: _Part) -> bool:
        """Whether wider and wider draws reach anything in a stratum; where they do not, it counts as empty.

        Every other coordinate of half of the draws is wide: a limit on one need not go with large values of the others.
        All members are searched, the likeliest most; those in which something turns up become other parts.
        """
        tuning, rng = self.tuning, generator(child_seed(self.seed, Stream.SEARCH, part.k))
        log_p = self.strata.log_prob[part.members]
        wanted = np.maximum(tuning.searched * np.exp(log_p - log_p[0]), tuning.searched_least)
        afford = min(1.0, tuning.search_share * self.left / float(wanted.sum()))
        counts = np.ceil(afford * wanted).astype(np.intp)
        if part.empty or counts[0] < tuning.searched // 4 or int(counts.sum()) > self.left:
            return not part.empty
        z, wide = self._wide(int(counts.sum()), rng)
        severity = self._values(np.repeat(part.members, counts), z)
        part.calls += len(z)
        ends = np.cumsum(counts)[:-1]
        rows = np.split(severity, ends)
        found = np.array([np.any(row >= 0.0) or (part.evidence is None and np.ptp(row) > 0.0) for row in rows])
        worst = z[np.argsort(-severity, kind="stable")[: tuning.looks]]
        quiet = np.flatnonzero(~found)
        if found.any() and len(quiet) and self.left >= len(quiet) * len(worst):  # where others found something
            found[quiet] = (self._severities(part.members[quiet], worst) >= 0.0).any(axis=1)
        if found[0]:
            part.flat = False
            return True
        if found.any():
            self._split(part, found, worst)
        part.empty = True
        if part.evidence is None:
            bound = diagnostics.binomial_interval(0, int(np.count_nonzero(wide[: counts[0]] == 1.0)))[1]
            note = Note(Code.FLAT, f"no catastrophe in {len(z)} draws near and far out.")
            part.evidence = Evidence.nothing("search", note, calls=len(z), seconds=0.0, upper=bound)
        return False

    def _wide(self, n: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
        """Draws of several scales, and the largest scale of each."""
        scale = np.resize(self.tuning.scales, n)
        wide = np.repeat(scale[:, None], len(self.strata.free), axis=1)
        wide[(rng.random(wide.shape) < 0.5) & (np.arange(n) // len(self.tuning.scales) % 2 == 1)[:, None]] = 1.0
        return wide * rng.standard_normal(wide.shape), scale

    def _split(self, part: _Part, others: np.ndarray, z: Floats) -> None:
        """Take members out of a part; among themselves they are grouped by their severities at z."""
        leaving, part.members = part.members[others], part.members[~others]
        part.log_p = diagnostics.log_sum_exp(self.strata.log_prob[part.members])
        severity = self._severities(leaving, z)
        self.parts += [self._part(leaving[rows], _guess(severity[rows[0]])) for rows in self._alike(severity)]

    def _refine(self) -> None:
        """Strata again: those whose error is too large for their share, and those that may hold more.

        Those that were searched go on from what they know, as often as it takes; others start afresh, once.
        """
        while True:
            total = self._joint()
            estimated = [part for part in self.parts if part.evidence is not None]
            wanting = [(self._worth(part, total), part) for part in estimated if not part.refined]
            wanting = [(worth, part) for worth, part in wanting if worth > 0.0 and self.left >= self._further(part)]
            if not wanting or (self.method.precision is not None and max(self._errors()) <= self.aim):
                return
            part = max(wanting, key=lambda one: (one[0], -one[1].calls))[1]
            on = part.searched
            share = math.exp(min(part.joint - total, 0.0)) if math.isfinite(part.joint) else 1.0
            budget = min(self.left, max((1 if on else 4) * part.calls, self.left // len(wanting)))
            calls = part.calls
            self._run(part, self._precision(max(share, self.tuning.negligible)), budget, Stream.REFINE)
            part.refined = not on or part.calls == calls
            self._ask(part)

    def _further(self, part: _Part) -> int:
        """Calls without which another estimate of the stratum says little more than it has."""
        return max(self.tuning.least_calls, part.calls // 3 if part.searched else part.calls)

    def _worth(self, part: _Part, total: float) -> float:
        """What another estimate of the stratum may change in P, relative to it; 0 where its own will do."""
        assert part.evidence is not None
        if part.empty:
            return 0.0
        share = math.exp(min(part.joint - total, 0.0)) if math.isfinite(total) else 0.0
        most = 1.0 if not math.isfinite(total) else math.exp(min(part.upper - total, 0.0))
        open_ = not part.evidence.converged and most > self.tuning.negligible
        poor = share > self.tuning.negligible and part.error > self.tuning.slack * self._precision(share)
        if not (open_ or poor):
            return 0.0
        return share * min(part.error, 1.0) + (self.tuning.doubt * most if open_ else 0.0)

    def _errors(self) -> tuple[float, float]:
        """Of log P: the standard error, and by how much strata that are not converged may change it.

        Each of these may be off by all that its interval allows, and all of them together.
        """
        total = self._joint()
        if not math.isfinite(total):
            return math.inf, math.inf
        error, doubt = 0.0, 0.0
        for part in self.parts:
            if not part.known or part.empty or not math.isfinite(part.joint):
                continue
            share = math.exp(min(part.joint - total, 0.0))
            error = math.hypot(error, share * min(part.error, 1e3))
            if part.evidence is not None and not part.evidence.converged:
                low, high = part.evidence.interval
                above = math.exp(min(part.log_p + high - total, 50.0)) - share
                doubt += max(above, -share * math.expm1(low - part.log_prob))
        return error, doubt

    def _precision(self, share: float) -> float:
        return min(self.tuning.vaguest, self.aim / math.sqrt(share))

    def _run(self, part: _Part, precision: float, budget: int, stream: Stream) -> None:
        """An estimate of one stratum, which goes on where an earlier one was.

        Where it starts afresh it replaces the earlier one if it is converged or sharper.
        """
        before = part.evidence
        afresh = not part.searched
        if part.campaign is None or afresh:
            warm = before.particles if before is not None and not before.converged else None
            inner = self.method.inner
            if self.reads is None:  # strata are of one function: where the first is no wide network, none is
                self.reads = inner.read and wide(StratumEvent(self.strata, part.k), inner.tuning) is not None
            inner = replace(inner, warm_start=warm, bound=False, read=self.reads)
            seed = child_seed(self.seed, stream, part.k, part.calls)
            numbers = inner.tuning.most_kept * min(self.tuning.kept, len(self.parts)) // len(self.parts)
            part.campaign = inner.begin(StratumEvent(self.strata, part.k), seed, numbers)
        taught = self.method.inner.taught and part.calls + budget >= self.tuning.taught
        part.campaign.method = replace(part.campaign.method, precision=precision, taught=taught)
        run = part.campaign.spend(budget)
        self.left -= run.calls
        part.calls += run.calls
        found = run.conclusion
        beaten = before is None or (not before.converged and found.std_error < before.std_error)
        if found.converged or beaten or not afresh:
            part.evidence = found

    def _joint(self) -> float:
        """log Σ p_k P_k so far."""
        return diagnostics.log_sum_exp(np.array([part.joint for part in self.parts if part.known] or [-math.inf]))

    # --- evidence --------------------------------------------------------------------------------------------------

    def _conclude(self, interrupted: bool) -> Run:
        total = self._joint()
        known = [part for part in self.parts if part.known and math.isfinite(part.joint)]
        shares = np.array([math.exp(part.joint - total) for part in known])
        errors = self._errors()
        missing = [part.upper for part in self.parts if not (part.empty or (part.known and math.isfinite(part.joint)))]
        missing = [bound for bound in (*missing, self.strata.left_out) if bound > -math.inf]
        beyond = diagnostics.log_sum_exp(np.array(missing)) - total if missing else -math.inf
        lower, upper = self._interval(known, shares, total, beyond)
        notes = self._notes(known, shares, errors, beyond, interrupted)
        prior = self._prior() if self.strata.event.weighted else None  # paid for, as is the bound within the interval
        line = Evidence(
            method=self.method.name,
            log_prob=min(total, 0.0),
            std_error=errors[0] if known else math.inf,
            interval=(lower, upper),
            claim="consistent" if known else "upper",
            calls=self.budget - self.left,
            seconds=time.perf_counter() - self.started,
            converged=not notes and bool(known),
            particles=self._particles(known, shares),
            prior_particles=prior,
            log_evidence=self.strata.log_evidence,
            diagnostics={
                "strata": float(len(self.parts)),
                "estimated": float(sum(p.known for p in self.parts)),
                "empty": float(sum(p.empty for p in self.parts)),
            },
            notes=notes,
        )
        return Run((*self._rows(known), line), line.calls)

    def _prior(self) -> Particles | None:
        """A sample of the conditioned adversary: draws within each stratum by its probability, resampled by weight."""
        strata, tuning = self.strata, self.tuning
        n = min(tuning.prior_particles, self.left)
        if n < 2:
            return None
        rng = generator(child_seed(self.seed, Stream.PRIOR))
        k = diagnostics.systematic_resample(strata.log_prob, n, rng)
        at = rng.standard_normal((n * tuning.prior_draws if strata.varies else n, len(strata.free)))
        if strata.varies:
            owner = np.repeat(k, tuning.prior_draws)
            log_w = strata.event.log_density(strata.full(at), strata.held(owner))
            groups = np.split(np.arange(len(owner)), np.flatnonzero(np.diff(owner)) + 1)
            chosen = [
                rows[diagnostics.systematic_resample(log_w[rows], len(rows) // tuning.prior_draws, rng)]
                for rows in groups
                if np.isfinite(log_w[rows]).any()
            ]
            rows = np.concatenate(chosen)
            at, k = at[rows], owner[rows]
        z, kept = placed(strata.event, strata.sites, strata.held(k), strata.full(at), rng, varies=strata.varies)
        z = z[kept]
        if not len(z):
            return None
        severity = strata.event.evaluate(z).severity
        self.left -= FORWARD_CALLS * len(z)
        return Particles(z, np.full(len(z), -math.log(len(z))), severity)

    def _interval(self, known: list[_Part], shares: Floats, total: float, beyond: float) -> tuple[float, float]:
        if not known:  # all that is not excluded
            bounds = np.array([*(part.upper for part in self.parts), self.strata.left_out])
            return -math.inf, min(diagnostics.log_sum_exp(bounds), self._bound(), 0.0)
        down, up = [], []
        for part in known:
            low, high = (part.log_prob, part.log_prob) if part.evidence is None else part.evidence.interval
            wide = 1.96 * part.log_p_error
            down.append(-math.expm1(-math.hypot(max(part.log_prob - low, 0.0), wide)))
            up.append(math.expm1(min(math.hypot(max(high - part.log_prob, 0.0), wide), 50.0)))
        below = float(np.sqrt(np.sum((shares * down) ** 2)))
        above = float(np.sqrt(np.sum((shares * up) ** 2))) + math.exp(min(beyond, 700.0))
        log_prob = min(total, 0.0)
        return log_prob + math.log1p(-below) if below < 1.0 else -math.inf, min(log_prob + math.log1p(above), 0.0)

    def _bound(self) -> float:
        """log of what plain draws of the whole program, for what is left of the budget, bound P by (95 %)."""
        n = 0 if self.strata.event.weighted else self.left
        if n < 1:
            return 0.0
        run = MonteCarlo().run(self.strata.event, budget=n, seed=child_seed(self.seed, Stream.BOUND))
        self.left -= run.calls
        return run.conclusion.interval[1]

    def _notes(
        self, known: list[_Part], shares: Floats, errors: tuple[float, float], beyond: float, interrupted: bool
    ) -> tuple[Note, ...]:
        notes = []
        if interrupted:
            notes.append(Note(Code.INTERRUPTED, "interrupted: this is the evidence gathered until then."))
        if not known:
            return (*notes, Note(Code.NO_HITS, "no catastrophe was found in any stratum: raise the budget."))
        wanted = wanted_error(self.method.precision)
        open_ = [part for part in known if part.evidence and not part.empty and not part.evidence.converged]
        if open_ and math.hypot(*errors) > wanted:
            worst = max(open_, key=lambda part: part.upper)
            assert worst.evidence is not None
            reason = f" ({worst.evidence.notes[0]})" if worst.evidence.notes else ""
            where = self.strata.label(worst.k)
            notes.append(Note(Code.UNREACHED, f"{len(open_)} strata have not converged, {where} first{reason}"))
        if any(share > 0.01 and part.evidence and not part.asked for part, share in zip(known, shares, strict=True)):
            sentence = "the budget did not allow to ask whether strata that look alike are alike: raise it."
            notes.append(Note(Code.UNCHECKED, sentence))
        if beyond > math.log(2.0 * self.aim):
            times = math.exp(min(beyond, 50.0))
            sentence = f"strata where nothing was found may hold {times:.2g} times as much: raise the budget."
            notes.append(Note(Code.UNSEEN, sentence))
        return (*notes, *imprecise(errors[0], wanted))

    def _rows(self, known: list[_Part]) -> list[Evidence]:
        """A row for each of the largest strata, with what it adds to P."""
        rows = []
        largest = sorted((p for p in known if p.evidence is not None), key=lambda p: -p.joint)
        for part in largest[: self.tuning.rows]:
            line = part.evidence
            assert line is not None
            low, high = (min(part.log_p + end, 0.0) for end in line.interval)
            rows.append(
                replace(
                    line,
                    method=self._name(part),
                    stratum=self._name(part),
                    log_prob=min(part.joint, 0.0),
                    interval=(low, high),
                    calls=part.calls,
                    particles=None,
                    prior_particles=None,
                )
            )
        return rows

    def _name(self, part: _Part) -> str:
        more = f" and {len(part.members) - 1} alike" if len(part.members) > 1 else ""
        return self.strata.label(part.k)[:40] + more

    def _particles(self, known: list[_Part], shares: Floats) -> Particles | None:
        """Catastrophes of all strata in the coordinates of the whole program, each stratum with its share."""
        rng = generator(child_seed(self.seed, Stream.PLACE))
        z, log_w, severity, values = [], [], [], []
        for part, share in zip(known, shares, strict=True):
            if share < 1e-6:
                continue
            if part.evidence is None:
                found = Particles(np.zeros((1, len(self.strata.free))), np.zeros(1), np.array([part.severity]))
            elif part.evidence.particles is None:
                continue
            else:
                found = part.evidence.particles
            most = max(16, math.ceil(share * self.tuning.particles))
            if len(found.z) > most:
                at = diagnostics.systematic_resample(found.log_weight, most, rng)
                found = Particles(found.z[at], np.full(most, -math.log(most)), found.severity[at])
            z.append(self.strata.full(found.z))
            log_w.append(found.log_weight + math.log(share))
            severity.append(found.severity)
            log_p = self.strata.log_prob[part.members]
            members = diagnostics.systematic_resample(log_p, len(found.z), rng)
            values.append(part.members[rng.permutation(members)])
        if not z:
            return None
        held = self.strata.held(np.concatenate(values))
        strata = self.strata
        where, kept = placed(strata.event, strata.sites, held, np.concatenate(z), rng, varies=strata.varies)
        log_weight = np.concatenate(log_w)[kept]
        if not len(log_weight):
            return None
        return Particles(where[kept], log_weight - diagnostics.log_sum_exp(log_weight), np.concatenate(severity)[kept])


def _opened(run: Run, sentence: str) -> Run:
    """The run, not converged: what was not looked at is bounded by nothing but its probability, which is not known."""
    last = run.conclusion
    notes = (*last.notes, Note(Code.UNSEEN, sentence))
    last = replace(last, converged=False, interval=(last.interval[0], 0.0), notes=notes)
    return replace(run, ledger=(*run.ledger[:-1], last))


def _with_guided(run: Run, guided: Run | None, before: int, unheld: tuple[Site, ...]) -> Run:
    """A run after one of the cross-entropy method that did not converge. before: calls before the run.

    That one errs low, seldom high: it does not conclude, but refutes a lower conclusion. Nor does a run converge that
    left sites random: it sees what they usually are.
    """
    if guided is None:
        return replace(run, calls=run.calls + before)
    calls = run.calls + before
    first, last = guided.conclusion, replace(run.conclusion, calls=calls)
    if unheld:
        names = ", ".join(repr(site.name) for site in unheld[:3]) + (", ..." if len(unheld) > 3 else "")
        note = Note(Code.UNCHECKED, f"{names} stayed random, and the cross-entropy method did not converge.")
        last = replace(last, converged=False, notes=(*last.notes, note))
        if first.std_error <= RULES.vaguest:  # it sees all sites
            top = max(first.interval[1], last.interval[1] if math.isfinite(last.log_prob) else -math.inf)
            last = replace(first, interval=(first.interval[0], top))
    higher = math.isfinite(first.log_prob) and first.log_prob > last.log_prob and not agree(first, last)
    if higher:
        note = Note(Code.DISAGREE, "the cross-entropy method found more: raise the budget.")
        last = replace(last, converged=False, notes=(*last.notes, note))
    last = replace(settle(last, first), calls=calls)
    return replace(run, ledger=(*guided.ledger, *run.ledger[:-1], last), calls=calls)


def _rounded(severity: Floats, apart: float) -> np.ndarray:
    """Severities ``(strata, n)`` as integers, column by column, equal where no gap above ``apart`` parts them."""
    order = np.argsort(severity, axis=0, kind="stable")
    with np.errstate(invalid="ignore"):
        steps = np.diff(np.take_along_axis(severity, order, axis=0), axis=0) > apart
    level = np.concatenate([np.zeros((1, severity.shape[1]), dtype=np.intp), np.cumsum(steps, axis=0)])
    out = np.empty_like(level)
    np.put_along_axis(out, order, level, axis=0)
    return out


def _guess(severity: Floats) -> float:
    """log P_k as a few draws have it: by a normal law of the severity, or by the hits."""
    n = len(severity)
    hits = int(np.count_nonzero(severity >= 0.0))
    if hits:
        return math.log(hits / n)
    if n < 2 or not np.isfinite(severity).all():
        return -1.0
    spread = float(np.std(severity, ddof=1))
    return float(log_ndtr(float(np.mean(severity)) / spread)) if spread > 0.0 else -30.0
