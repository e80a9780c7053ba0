"""The default strategy: look, climb, aim, check.

1. *Look*: a small crude sample. If P is large enough, crude sampling finishes the job.
2. *Climb*: tempering with some hundreds of particles finds the catastrophes (a crude sample with enough hits
   replaces it: those are exact).
3. *Aim*: a guide is fitted to the particles and sampled afresh, one forward call each.
4. *Check*: the two must agree within their errors, the weights must have a variance, and the particles must lie
   where the guide samples. If not, more particles and a new guide. A guide that is hopeless already on its trial
   (many curved modes, as of deep networks) is left at once.
5. *Fall back*: all that is left of the budget goes into tempering, as large as fits; all runs are pooled by their sizes
   (:mod:`probest.estimators.families`). If methods disagree, the answer is "not converged". Disagreement is never
   averaged away.

It fails where tempering fails: a mode that no particle found, in a place that no fresh sample reached.

Reference: for the parts see :mod:`probest.estimators.tempering` and :mod:`probest.estimators.importance`.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from probest import diagnostics
from probest.estimators.base import EventLike, Evidence, Meter, Particles, child_seed
from probest.estimators.families import pool
from probest.estimators.importance import Importance, Population, population_of, prior_population_of, weigh
from probest.estimators.monte_carlo import MonteCarlo
from probest.estimators.tempering import Prior, State, Tempering, families_of, temper

__all__ = ["Combined"]

_ENOUGH_HITS = 60  # crude hits that make a guide without tempering
_GIVE_UP = 0.25  # standard error that a guide has to promise to be worth its samples
_SHARE = 0.92  # of what is left that a tempering run is sized for: levels and moves vary from run to run
_MOST = 30_000_000  # numbers of z in one run at most
_BOOLEAN_HITS = 24  # as few as that where there is no severity to climb


@dataclass(frozen=True)
class Combined:
    """Crude sample, tempering, importance sampling, and the checks between them.

    precision: wanted standard error of log P; stops there. None spends the budget.
    pilot: size of the first crude sample.
    particles: of the first tempering; a second one, when needed, takes four times as many or what fits.
    warm_start: particles of an earlier run, for tempering (:class:`probest.estimators.tempering.Tempering`).
    """

    precision: float | None = 0.05
    pilot: int = 500
    particles: int = 256
    warm_start: Particles | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.precision is not None and not self.precision > 0.0:
            raise ValueError(f"precision must be positive (a standard error of log P), got {self.precision}")
        for name, least in (("pilot", 10), ("particles", 64)):
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
        crude = ledger.add(
            MonteCarlo(max_samples=self.pilot).run(event, budget=min(self.pilot, ledger.left), seed=child_seed(seed, 0))
        )
        p = math.exp(crude.log_prob)
        if not event.weighted and p > 0.0 and (1.0 - p) / (p * aim**2) <= min(0.8 * ledger.left, 4000.0):
            return self._finish_crude(event, ledger, seed, crude)
        if event.boolean:
            return self._conclude_boolean(event, ledger, seed, crude)
        if crude.diagnostics["hits"] >= _ENOUGH_HITS and not event.weighted and crude.particles is not None:
            weighed = self._weigh(event, ledger, child_seed(seed, 2), _crude_population(crude.particles), None)
            if weighed.converged and _agree(weighed, crude):
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
            if weighed.converged and _agree(weighed, found):
                return _with_particles(weighed, found)
            share, particles = 0.95, min(4 * self.particles, int(0.8 * ledger.left / run.cost))
            if weighed.diagnostics["hopeless"] or particles < self.particles:
                break
        self._fall_back(event, ledger, seed, runs)
        return _judge(ledger, crude, runs)

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
        method = MonteCarlo(precision=self.precision, first_batch=self.pilot)
        if ledger.left < 1:
            return crude
        more = method.run(event, budget=ledger.left, seed=child_seed(seed, 1))
        return ledger.add(more)

    def _conclude_boolean(
        self, event: EventLike, ledger: _Ledger, seed: np.random.SeedSequence, crude: Evidence
    ) -> Evidence:
        """Nothing to climb: crude sampling until there are hits enough to aim at, then a guide."""
        if ledger.left < 1:
            return crude
        first = crude
        if crude.diagnostics["hits"] < _BOOLEAN_HITS:
            size = max(1, int(0.6 * ledger.left))
            method = MonteCarlo(max_samples=size, hits=_BOOLEAN_HITS, precision=self.precision)
            first = ledger.add(method.run(event, budget=size, seed=child_seed(seed, 6)))
        if first.particles is not None and first.diagnostics["hits"] >= _BOOLEAN_HITS and not event.weighted:
            weighed = self._weigh(event, ledger, child_seed(seed, 2), _crude_population(first.particles), None)
            if weighed.converged and _agree(weighed, first):
                return weighed
        if ledger.left < 1:
            return first
        rest = MonteCarlo(precision=self.precision).run(event, budget=ledger.left, seed=child_seed(seed, 7))
        ledger.add(rest)
        # the first sample ran to its fixed size when it found few hits: then both count as one
        whole = not event.weighted and first.diagnostics["hits"] < _BOOLEAN_HITS
        return _pool(first, rest) if whole and first is not crude else rest

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


def _agree(a: Evidence, b: Evidence) -> bool:
    """Within three standard errors of their difference (and 0.1 for what the errors leave out)."""
    if not (math.isfinite(a.log_prob) and math.isfinite(b.log_prob)):
        return False
    error = min(math.hypot(a.std_error, b.std_error), 1.0)
    return abs(a.log_prob - b.log_prob) <= 3.0 * error + 0.1


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


def _with_particles(weighed: Evidence, found: Evidence) -> Evidence:
    """The importance sample's estimate, with the better particles: tempering's where few of its own weights count."""
    particles = weighed.particles
    if found.particles is not None and weighed.diagnostics["ess"] < 0.5 * len(found.particles.z):
        particles = found.particles
    return replace(weighed, particles=particles, prior_particles=found.prior_particles)


def _judge(ledger: _Ledger, crude: Evidence, runs: list[_Run]) -> Evidence:
    """No importance sample passed its checks: all tempering runs as one conclude, if nothing speaks against it."""
    upper = crude.interval[1]
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
    agree = all(_agree(best, line) for line in weighed if line.converged) and lower <= upper
    if not agree:
        notes.append("the methods disagree beyond their errors: raise the budget, or look at the ledger's particles.")
        seen = [line.log_prob for line in weighed]
        lower, top = min(lower, *seen, lower), max(top, *seen, top)
    if weighed and agree:
        notes.append("the guide did not pass its checks (see the ledger): this is tempering's own estimate.")
    if best.std_error > 0.3 and best.converged:
        notes.append(f"the standard error is {best.std_error:.2f}: raise the budget.")
    converged = best.converged and agree and best.std_error <= 0.3
    return replace(best, interval=(lower, top), converged=converged, notes=tuple(notes))
