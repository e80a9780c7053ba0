"""The default strategy: look, line up, climb, aim, check.

1. *Look*: a small crude sample. If P is large, crude sampling finishes the job.
2. *Line up*: where the severity has a gradient, line sampling along the design points' directions
   (:mod:`probest.estimators.line_sampling`) settles smooth problems and unions of smooth ones in some hundreds of
   calls. If its lines vary too much, or its own checks fail, what follows starts from nothing. Where only their
   precision does not do, a guide is fitted to their particles (see *aim*).
3. *Climb*: tempering with some hundreds of particles finds the catastrophes (a crude sample with enough hits
   replaces it: those are exact).
4. *Aim*: a guide is fitted to the particles and sampled afresh, one forward call each.
5. *Check*: the two must agree within their errors, the weights must have a variance, and the particles must lie
   where the guide samples. If not, more particles and a new guide. A guide that is hopeless already on its trial
   (many curved modes, as of deep networks) is left at once.
6. *Fall back*: all that is left of the budget goes into tempering, as large as fits; all runs are pooled by their sizes
   (:mod:`probest.smc.families`). If methods disagree, the answer is "not converged". Disagreement is never
   averaged away.

Where there is nothing to climb (a checker that returns a bool) or no gradient to climb by, a learned severity comes
first (:mod:`probest.estimators.surrogate`); the steps above follow where it did not pass its checks.

It fails where gradients and tempering fail: a mode that no walk and no particle found, in a place that no fresh sample
reached.

Reference: for the parts see :mod:`probest.estimators.line_sampling`, :mod:`probest.estimators.tempering` and
:mod:`probest.estimators.importance`.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from scipy import stats

from probest import diagnostics
from probest.budget import Meter
from probest.estimators.importance import Importance, Population, agree, population_of, prior_population_of, weigh
from probest.estimators.line_sampling import LineSampling
from probest.estimators.monte_carlo import MonteCarlo
from probest.estimators.surrogate import Surrogate
from probest.estimators.tempering import Prior, State, Tempering, families_of, temper
from probest.evidence import EventLike, Evidence, Particles
from probest.seeds import child_seed
from probest.smc.families import pool
from probest.smc.resample_move import cost, thicken

__all__ = ["Combined"]

_ENOUGH_HITS = 60  # crude hits that make a guide without tempering
_GIVE_UP = 0.25  # standard error that a guide has to promise to be worth its samples
_SHARE = 0.92  # of what is left that a tempering run is sized for: levels and moves vary from run to run
_MOST = 30_000_000  # numbers of z in one run at most
_CHEAP = 700.0  # calls for which crude sampling is preferred to lines
_LINES = 0.4  # of the budget, at most, for line sampling
_LEAST_LINES = 100  # calls without which it is not tried
_CLOSE = 1.2  # times the precision, that will do
_MARKOV = math.log(40.0)
_THICK, _THICK_SHARE, _SWEEPS = 192, 30, 3  # particles made from those of lines, calls left for each, rounds of moves
_VAGUE = 1.5  # standard error of lines whose particles say nothing
_BOOLEAN_HITS = 24  # as few as that where there is no severity to climb
_LEARN = 1000  # calls left below which nothing is learned


@dataclass(frozen=True)
class Combined:
    """Crude sample, line sampling, tempering, importance sampling, and the checks between them.

    precision: wanted standard error of log P; stops there. None spends the budget.
    look: size of the first crude sample where line sampling may follow; pilot: where it does not, or did not do.
    particles: of the first tempering; a second one, when needed, takes four times as many or what fits.
    warm_start: particles of an earlier run, for tempering (:class:`probest.estimators.tempering.Tempering`).
    """

    precision: float | None = 0.05
    look: int = 12
    pilot: int = 500
    particles: int = 256
    warm_start: Particles | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.precision is not None and not self.precision > 0.0:
            raise ValueError(f"precision must be positive (a standard error of log P), got {self.precision}")
        for name, least in (("look", 1), ("pilot", 10), ("particles", 64)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

    @property
    def name(self) -> str:
        return "combined"

    def run(self, event: EventLike, *, budget: int, seed: np.random.SeedSequence) -> Evidence:
        """The conclusion alone; :meth:`run_ledger` has the evidence it rests on."""
        return self.run_ledger(event, budget=budget, seed=seed)[-1]

    def run_ledger(
        self, event: EventLike, *, budget: int, seed: np.random.SeedSequence, lines: list[Evidence] | None = None
    ) -> list[Evidence]:
        """All evidence in the order it was found; the last is the conclusion, whose ``calls`` are the sum.

        lines: an empty list that is filled as evidence comes, so that an interrupted run loses nothing.
        """
        Meter(event, budget)  # checks the budget
        started = time.perf_counter()
        ledger = _Ledger(budget, [] if lines is None else lines)
        conclusion = self._conclude(event, ledger, seed)
        seconds = time.perf_counter() - started
        ledger.lines.append(replace(conclusion, method=self.name, calls=budget - ledger.left, seconds=seconds))
        return ledger.lines

    def _conclude(self, event: EventLike, ledger: _Ledger, seed: np.random.SeedSequence) -> Evidence:
        aim = self.precision or 0.02
        lined: Evidence | None = None
        aimed: Evidence | None = None
        if event.differentiable and not event.weighted:
            look = self._sample(event, ledger, child_seed(seed, 8), self.look)
            if _crude_cost(look, aim) <= min(0.8 * ledger.left, _CHEAP):
                return self._finish_crude(event, ledger, seed, look)
            lined = self._line_up(event, ledger, child_seed(seed, 9), look)
            if lined is not None and lined.converged and lined.std_error <= _CLOSE * aim:
                return lined
            aimed = None if lined is None else self._aim(event, ledger, child_seed(seed, 10), lined)
            if aimed is not None and lined is not None and aimed.converged and agree(aimed, lined):
                return aimed
        if ledger.left < 1:
            return lined or look
        crude = self._sample(event, ledger, child_seed(seed, 0), self.pilot)
        if not event.weighted and _crude_cost(crude, aim) <= min(0.8 * ledger.left, 4000.0):
            return self._finish_crude(event, ledger, seed, crude)
        if event.boolean:
            return self._conclude_boolean(event, ledger, seed, crude)
        learned = None if event.differentiable else self._learn(event, ledger, seed, crude, 0.7)
        if learned is not None and learned.converged:
            return learned
        if crude.diagnostics["hits"] >= _ENOUGH_HITS and not event.weighted and crude.particles is not None:
            weighed = self._weigh(event, ledger, child_seed(seed, 2), _crude_population(crude.particles), None)
            if weighed.converged and agree(weighed, crude):
                return weighed
        runs: list[_Run] = []
        share, particles = 0.8, self.particles
        for attempt in range(2):
            run = self._temper(event, ledger, child_seed(seed, 3, attempt), particles, share)
            if run is None:
                break
            runs.append(run)
            weighed = self._weigh(
                event, ledger, child_seed(seed, 4, attempt), population_of(run.state), prior_population_of(run.prior)
            )
            found = _pooled(runs)
            if weighed.converged and agree(weighed, found) and not _contradicts(lined, weighed):
                return _with_particles(weighed, found)
            share, particles = 0.95, min(4 * self.particles, int(0.8 * ledger.left / run.cost))
            if weighed.diagnostics["hopeless"] or particles < self.particles:
                break
        self._fall_back(event, ledger, seed, runs)
        return _better(_settle(_judge(ledger, crude, runs, lined), lined, aimed), learned)

    def _sample(self, event: EventLike, ledger: _Ledger, seed: np.random.SeedSequence, n: int) -> Evidence:
        return ledger.add(MonteCarlo(max_samples=n).run(event, budget=min(n, ledger.left), seed=seed))

    def _line_up(
        self, event: EventLike, ledger: _Ledger, seed: np.random.SeedSequence, look: Evidence
    ) -> Evidence | None:
        """Line sampling, not converged if the crude sample speaks against it; None without calls enough to try."""
        budget = int(_LINES * ledger.left)
        if budget < _LEAST_LINES:
            return None
        *heuristics, lined = LineSampling(precision=self.precision).run_ledger(event, budget=budget, seed=seed)
        for line in heuristics:
            ledger.add(line)
        low, high = (math.exp(end) for end in lined.interval)
        hits, n = int(look.diagnostics["hits"]), int(look.diagnostics["samples"])
        odd = stats.binom.sf(hits - 1, n, high) < 1e-3 or stats.binom.cdf(hits, n, low) < 1e-3
        if odd and lined.converged:
            note = "the crude sample speaks against this: a mode is missing, or lines miss parts of the event."
            lined = replace(lined, converged=False, notes=(*lined.notes, note))
        return ledger.add(lined)

    def _aim(self, event: EventLike, ledger: _Ledger, seed: np.random.SeedSequence, lined: Evidence) -> Evidence | None:
        """A guide fitted to the particles of lines that varied too much; None where these are too few or too vague."""
        n = min(_THICK, ledger.left // _THICK_SHARE)
        if lined.particles is None or n < 64 or not lined.std_error < _VAGUE:
            return None
        meter = Meter(event, cost(n, _SWEEPS))
        particles = thicken(meter, lined.particles, n, seed=child_seed(seed, 0), sweeps=_SWEEPS)
        population = _crude_population(particles)._replace(effective=len(particles.z) / 3.0)
        ledger.left -= meter.calls
        weighed = self._weigh(event, ledger, child_seed(seed, 1), population, None)
        ledger.lines[-1] = weighed = replace(weighed, calls=weighed.calls + meter.calls)
        return weighed

    def _fall_back(self, event: EventLike, ledger: _Ledger, seed: np.random.SeedSequence, runs: list[_Run]) -> None:
        """Temper with what is left: as many particles as fit, until too few would or the precision is reached."""
        most = max(self.particles, _MOST // event.dim)
        for attempt in range(8):
            if not runs or (self.precision is not None and _pooled(runs).std_error <= self.precision):
                return
            particles = min(most, int(_SHARE * ledger.left / max(run.cost for run in runs)))
            if particles < min(self.particles, max(run.size for run in runs) / 4):
                return
            run = self._temper(event, ledger, child_seed(seed, 5, attempt), particles, 1.0)
            if run is None:
                return
            runs.append(run)

    def _finish_crude(
        self, event: EventLike, ledger: _Ledger, seed: np.random.SeedSequence, crude: Evidence
    ) -> Evidence:
        """A fresh crude sample to the precision: the pilot decided on it, so the pilot is left out."""
        # one batch that should do: looks in between would favour samples that look precise by chance
        expected = _crude_cost(crude, self.precision or 0.02)
        method = MonteCarlo(precision=self.precision, first_batch=max(self.look, int(min(1.1 * expected, ledger.left))))
        if ledger.left < 1:
            return crude
        more = method.run(event, budget=ledger.left, seed=child_seed(seed, 1))
        return ledger.add(more)

    def _conclude_boolean(
        self, event: EventLike, ledger: _Ledger, seed: np.random.SeedSequence, crude: Evidence
    ) -> Evidence:
        """Nothing to climb: a learned severity, else crude sampling until there are hits to aim at, then a guide."""
        learned = self._learn(event, ledger, seed, crude, 0.8) if crude.diagnostics["hits"] < _BOOLEAN_HITS else None
        if learned is not None and learned.converged:
            return learned
        if ledger.left < 1:
            return crude
        first = crude
        if crude.diagnostics["hits"] < _BOOLEAN_HITS:
            size = max(1, int(0.6 * ledger.left))
            method = MonteCarlo(max_samples=size, hits=_BOOLEAN_HITS, precision=self.precision)
            first = ledger.add(method.run(event, budget=size, seed=child_seed(seed, 6)))
        if first.particles is not None and first.diagnostics["hits"] >= _BOOLEAN_HITS and not event.weighted:
            weighed = self._weigh(event, ledger, child_seed(seed, 2), _crude_population(first.particles), None)
            if weighed.converged and agree(weighed, first):
                return weighed
        if ledger.left < 1:
            return first
        rest = MonteCarlo(precision=self.precision).run(event, budget=ledger.left, seed=child_seed(seed, 7))
        ledger.add(rest)
        # the first sample ran to its fixed size when it found few hits: then both count as one
        whole = not event.weighted and first.diagnostics["hits"] < _BOOLEAN_HITS
        return _better(_pool(first, rest) if whole and first is not crude else rest, learned)

    def _learn(
        self, event: EventLike, ledger: _Ledger, seed: np.random.SeedSequence, crude: Evidence, share: float
    ) -> Evidence | None:
        """A learned severity as the guide; converged only if the crude sample does not speak against it."""
        if event.weighted or ledger.left < _LEARN:
            return None
        method = Surrogate(precision=self.precision)
        learned = method.run(event, budget=int(share * ledger.left), seed=child_seed(seed, 8))
        hits, samples = (int(crude.diagnostics[key]) for key in ("hits", "samples"))
        lower, upper = diagnostics.binomial_interval(hits, samples, 0.999)
        if learned.converged and not (lower <= learned.interval[1] and learned.interval[0] <= upper):
            note = "the learned severity and the crude sample disagree: raise the budget."
            learned = replace(learned, converged=False, notes=(*learned.notes, note))
        return ledger.add(learned)

    def _temper(
        self, event: EventLike, ledger: _Ledger, seed: np.random.SeedSequence, particles: int, share: float
    ) -> _Run | None:
        method = Tempering(particles=max(64, particles), max_moves=6, warm_start=self.warm_start)
        evidence, state, prior = temper(method, event, budget=max(1, int(share * ledger.left)), seed=seed)
        ledger.add(evidence)
        return None if state is None else _Run(evidence, state, prior)

    def _weigh(
        self,
        event: EventLike,
        ledger: _Ledger,
        seed: np.random.SeedSequence,
        population: Population,
        prior: Population | None,
    ) -> Evidence:
        method = Importance(precision=self.precision, give_up=_GIVE_UP)
        budget = ledger.left if self.precision is None else max(1, int(0.5 * ledger.left))
        return ledger.add(weigh(method, event, population, prior, budget=budget, seed=seed))


def _crude_cost(crude: Evidence, aim: float) -> float:
    """Calls that crude sampling would need for a standard error ``aim``."""
    p = math.exp(crude.log_prob)
    return (1.0 - p) / (p * aim**2) if p > 0.0 else math.inf


class _Run(NamedTuple):
    """A tempering run that reached the event."""

    evidence: Evidence
    state: State
    prior: Prior | None

    @property
    def size(self) -> int:
        return len(self.state.z)

    @property
    def cost(self) -> float:
        """Model calls a particle."""
        return self.evidence.calls / self.size


def _pooled(runs: list[_Run]) -> Evidence:
    return pool([(run.evidence, families_of(run.state, run.prior)) for run in runs])


class _Ledger:
    """The evidence so far and what is left of the budget."""

    def __init__(self, budget: int, lines: list[Evidence]) -> None:
        self.left = budget
        self.lines = lines

    def add(self, evidence: Evidence) -> Evidence:
        self.left -= evidence.calls
        self.lines.append(evidence)
        return evidence


def _crude_population(particles: Particles) -> Population:
    n = len(particles.z)
    return Population(particles.z, particles.log_weight, np.zeros(n), None, float(n))


def _settle(judged: Evidence, *others: Evidence | None) -> Evidence:
    """Where nothing passed: the evidence with the least error, and an interval that spans all of them."""
    found = [line for line in (judged, *others) if line is not None and math.isfinite(line.log_prob)]
    if judged.converged or len(found) < 2:
        return judged
    best = min(found, key=lambda line: line.std_error)
    lower, upper = min(line.interval[0] for line in found), max(line.interval[1] for line in found)
    notes = tuple(dict.fromkeys((*judged.notes, *best.notes)))
    return replace(best, converged=False, interval=(lower, upper), notes=notes)


def _contradicts(lined: Evidence | None, other: Evidence) -> bool:
    return lined is not None and lined.converged and not agree(lined, other)


def _pool(a: Evidence, b: Evidence) -> Evidence:
    """Two crude samples as one."""
    hits, n = (int(a.diagnostics[key] + b.diagnostics[key]) for key in ("hits", "samples"))
    error = math.sqrt((1.0 - hits / n) / hits) if hits else math.inf
    return replace(
        b,
        log_prob=math.log(hits / n) if hits else -math.inf,
        std_error=error,
        interval=diagnostics.binomial_interval(hits, n),
        converged=error <= 0.2,
        diagnostics={"hits": float(hits), "samples": float(n)},
    )


def _better(bound: Evidence, learned: Evidence | None) -> Evidence:
    """The learned severity's estimate, unconverged as it is, where there is only a bound besides."""
    if learned is None or math.isfinite(bound.log_prob) or not math.isfinite(learned.log_prob):
        return bound
    return replace(learned, interval=(learned.interval[0], max(learned.interval[1], bound.interval[1])))


def _with_particles(weighed: Evidence, found: Evidence) -> Evidence:
    """The importance sample's estimate, with the better particles: tempering's where few of its own weights count."""
    particles = weighed.particles
    if found.particles is not None and weighed.diagnostics["ess"] < 0.5 * len(found.particles.z):
        particles = found.particles
    return replace(weighed, particles=particles, prior_particles=found.prior_particles)


def _judge(ledger: _Ledger, crude: Evidence, runs: list[_Run], lined: Evidence | None) -> Evidence:
    """No importance sample passed its checks: all tempering runs as one conclude, if nothing speaks against it."""
    upper = crude.interval[1]
    if not runs and lined is not None and math.isfinite(lined.log_prob):
        # P̂ is unbiased whatever else is wrong: by Markov's inequality it is seldom 40 times too high
        return replace(lined, converged=False, interval=(min(lined.interval[0], lined.log_prob - _MARKOV), upper))
    if not runs:
        tempered = [line for line in ledger.lines if line.method == "tempering"]
        if math.isfinite(crude.log_prob):
            return replace(crude, converged=False, notes=(*crude.notes, *(n for line in tempered for n in line.notes)))
        last = tempered[-1] if tempered else crude
        return replace(last, interval=(-math.inf, upper), claim="upper", converged=False)
    best = _pooled(runs)
    weighed = [line for line in ledger.lines if line.method == "importance sampling" and math.isfinite(line.log_prob)]
    notes = list(best.notes)
    lower, top = best.interval
    agreed = all(agree(best, line) for line in weighed if line.converged) and lower <= upper
    if lined is not None and lined.converged and agree(best, lined) and lined.std_error < best.std_error:
        return lined
    agreed = agreed and not _contradicts(lined, best)
    if not agreed:
        notes.append("the methods disagree beyond their errors: raise the budget, or look at the ledger's particles.")
        others = [lined] if lined is not None and lined.converged else []
        seen = [line.log_prob for line in (*weighed, *others)]
        lower, top = min(lower, *seen, lower), max(top, *seen, top)
    if weighed and agreed:
        notes.append("the guide did not pass its checks (see the ledger): this is tempering's own estimate.")
    if best.std_error > 0.3 and best.converged:
        notes.append(f"the standard error is {best.std_error:.2f}: raise the budget.")
    converged = best.converged and agreed and best.std_error <= 0.3
    return replace(best, interval=(lower, top), converged=converged, notes=tuple(notes))
