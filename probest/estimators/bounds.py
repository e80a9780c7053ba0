r"""Variational bounds: log P between a lower and an upper bound that a guide gives.

With q a guide, w = φ/q · 1_C the weight of its draws, and C the catastrophes, for any q with q(C) > 0

.. math::

    \log P &\ge \log q(C) + E_{q \mid C}\Big[\log \tfrac1K \textstyle\sum_{k \le K} \tfrac{\varphi}{q}(z_k)\Big], \\
    \log P &\le E_{z_1 \sim \varphi \mid C,\; z_2 \dots z_K \sim q}
        \Big[\log \tfrac1K \textstyle\sum_{k \le K} w(z_k)\Big],

both tighter with more draws K; for K = 1 they are the evidence lower bound and its counterpart under the posterior, and
q need not lie within C. The second takes draws of the posterior: particles of a tempering run that the guide knows
nothing of. The Rényi bounds :math:`\frac{1}{1-\alpha} \log E_q[w^{1-\alpha}]` are above log P for α < 0 (α = −1 is
that of χ²) and below it for α in (0, 1); of finitely many draws they are too low, the upper ones most.

Each bound holds in expectation, and is stated with its standard error. Where the guide misses a mode the lower one is
low and the upper one, whose particles know of it, is high: the gap says so. Where tempering misses it too, nothing
does.

1. *Find*: tempering; a guide fitted to its particles, refitted to its own samples (as in
   :mod:`probest.estimators.importance`).
2. *Lower*: fresh draws of the guide.
3. *Upper*: a second tempering run, from other seeds, and fresh draws.

References: Burda, Grosse & Salakhutdinov (2016), Importance weighted autoencoders; Grosse, Ghahramani & Adams (2015),
Sandwiching the marginal likelihood using bidirectional Monte Carlo; Li & Turner (2016), Rényi divergence variational
inference; Dieng, Tran, Ranganath, Paisley & Blei (2017), Variational inference via χ upper bound minimization.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import IntEnum
from typing import ClassVar, NamedTuple

import numpy as np

from probest import diagnostics
from probest.budget import Meter
from probest.estimators.base import Need, check_least, check_needs
from probest.estimators.importance import Importance, importance_sample
from probest.estimators.tempering import Tempering
from probest.evidence import Claim, Code, EventLike, Evidence, Floats, Note, Particles, Population, Run
from probest.guides.autoguide import Autoguide
from probest.guides.base import Guide
from probest.guides.fit import CHEAP
from probest.guides.memory import Memory
from probest.guides.program import BoundProgram, ProgramGuide
from probest.guides.sample import draw
from probest.seeds import child_seed, generator
from probest.tuning import tuned

__all__ = ["Bounds", "BoundsTuning", "renyi_bound"]


class Stream(IntEnum):
    """Names of the seeds of a run."""

    FIND = 0
    FIT = 1
    LOWER = 2
    AGAIN = 3
    UPPER = 4


_BOUNDS = "bounds.py"


@dataclass(frozen=True)
class BoundsTuning:
    """How a budget is divided. Set by hand; ``benchmarks/bounds.py`` shows what they come to."""

    find: float = tuned(0.3, "of the budget, at most, for the particles that the guide is fitted to", _BOUNDS)
    fit: float = tuned(0.15, "for trials of the guide", _BOUNDS)
    again: float = tuned(0.8, "of what is left then, at most, for the particles of the upper bound", _BOUNDS)
    posterior: int = tuned(1000, "of these that enter it, at most", _BOUNDS)
    gap: float = tuned(0.5, "nats between the bounds, up to which they have converged", "by its meaning")


@dataclass(frozen=True)
class Bounds:
    """A lower and an upper bound of log P, from a guide and from posterior particles.

    draws: K, the draws of the guide under one logarithm. find: the tempering that finds particles, twice.
    guides: kinds of law to fit, as in :class:`~probest.estimators.importance.Importance`.
    guide: a fixed guide, or a program (:class:`~probest.guides.program.ProgramGuide`) trained by whatever means; None
        fits one. tuning: how a budget is divided.
    """

    draws: int = 32
    find: Tempering = field(default_factory=lambda: Tempering(particles=256, max_moves=5))
    guides: tuple[str, ...] = CHEAP
    guide: Guide | ProgramGuide | Autoguide | None = None
    tuning: BoundsTuning = field(default_factory=BoundsTuning, repr=False)
    needs: ClassVar[frozenset[Need]] = frozenset({"unconditioned"})

    def __post_init__(self) -> None:
        check_least(self, draws=1)
        Importance(guides=self.guides)  # checks them

    @property
    def name(self) -> str:
        return "bounds"

    def run(self, event: EventLike, *, budget: int, seed: np.random.SeedSequence) -> Run:
        """Tempering, lower bound, tempering, upper bound, and a conclusion whose interval lies between them.

        The conclusion's number is the guide's importance sample; it has converged where the bounds are in order and no
        further apart than ``tuning.gap``.
        """
        check_needs(self, event)
        return _Campaign(self, event, Meter(event, budget), seed).run()


class _Bound(NamedTuple):
    """A bound, its standard error, and that of the same kind with one draw."""

    value: float
    error: float
    single: float


@dataclass
class _Campaign:
    """One run."""

    method: Bounds
    event: EventLike
    meter: Meter
    seed: np.random.SeedSequence
    lines: list[Evidence] = field(default_factory=list)

    def run(self) -> Run:
        tuning, budget = self.method.tuning, self.meter.budget
        guide: Guide | BoundProgram | None = None
        if isinstance(self.method.guide, ProgramGuide | Autoguide):
            guide = self.method.guide.bind(self.event)
        elif self.method.guide is not None:
            guide = self.method.guide
        else:
            found = self._temper(Stream.FIND, int(tuning.find * budget))
            guide = None if found is None else self._fit(found, int(tuning.fit * budget))
        if guide is None or self.meter.left < 4 * self.method.draws:
            return self._nothing()
        again = self._temper(Stream.AGAIN, int(tuning.again * self.meter.left))
        if self.meter.left < 4 * self.method.draws:
            return self._nothing()
        rng = generator(child_seed(self.seed, Stream.LOWER))
        before, fresh = self.meter.calls, draw(self.meter, guide, self.meter.left, rng, True)
        spent = self.meter.calls - before
        log_prob, error = diagnostics.log_mean_exp(fresh.log_w)
        if not math.isfinite(log_prob):
            return self._nothing()
        lower = _lower(fresh.log_w, self.method.draws)
        self._line("lower bound", lower, "lower", spent)
        upper = None
        if again is not None:
            rng = generator(child_seed(self.seed, Stream.UPPER))
            upper = _upper(fresh.log_w, guide, again, self.method.draws, tuning.posterior, rng)
            self._line("upper bound", upper, "upper", 0)
        gap = math.inf if upper is None else upper.value - lower.value
        own = math.inf if upper is None else math.hypot(lower.error, upper.error)
        notes = []
        if upper is None:
            notes.append(Note(Code.IMPRECISE, "there is no upper bound, for lack of particles: raise the budget."))
        elif gap > tuning.gap:
            notes.append(Note(Code.IMPRECISE, f"the bounds are {gap:.2f} nats apart: raise the budget, or the guide."))
        if upper is not None and gap < -3.0 * own - 0.05:
            notes.append(Note(Code.DISAGREE, "the lower bound is above the upper one: tempering has missed a mode."))
        top = 0.0 if upper is None else min(0.0, upper.value + 1.96 * upper.error)
        figures = {"gap": gap, "ess": diagnostics.effective_sample_size(fresh.log_w)}
        figures |= {"elbo": lower.single, "chi_square": renyi_bound(fresh.log_w, -1.0)}
        if upper is not None:
            figures["eubo"] = upper.single
        particles = None
        if len(fresh.z):
            log_w = fresh.log_w[np.isfinite(fresh.log_w)][: len(fresh.z)]
            particles = Particles(fresh.z, log_w - diagnostics.log_sum_exp(log_w), fresh.severity)
        conclusion = Evidence(
            method=self.method.name,
            log_prob=min(log_prob, 0.0),
            std_error=error,
            interval=(min(lower.value - 1.96 * lower.error, log_prob), max(top, log_prob)),
            claim="unbiased",
            calls=self.meter.calls,
            seconds=self.meter.seconds,
            converged=not notes,
            particles=particles,
            diagnostics=figures,
            notes=tuple(notes),
            batches=diagnostics.batch_means(fresh.log_w),
        )
        return Run((*self.lines, conclusion), self.meter.calls)

    def _temper(self, stream: Stream, budget: int) -> Population | None:
        if budget < 1:
            return None
        run = self.method.find.run(self.event, budget=budget, seed=child_seed(self.seed, stream))
        self.meter.charge(run.calls)
        self.lines += run.ledger
        return run.population

    def _fit(self, found: Population, budget: int) -> Guide | BoundProgram | None:
        memory = Memory.of(found)
        method = Importance(guides=self.method.guides, precision=0.5, first_batch=max(10, budget // 2))
        seed = child_seed(self.seed, Stream.FIT)
        line = importance_sample(method, self.event, memory, None, budget=max(1, budget), seed=seed, trial=True)
        self.meter.charge(line.calls)
        self.lines.append(line)
        return None if memory.latest is None else memory.latest[0]

    def _line(self, name: str, bound: _Bound, claim: Claim, calls: int) -> None:
        width = 1.96 * bound.error
        value = min(bound.value, 0.0)
        below, above = (-width, math.inf) if claim == "lower" else (-math.inf, width)
        self.lines.append(
            Evidence(
                method=name,
                log_prob=value,
                std_error=bound.error,
                interval=(value + below, min(0.0, value + above)),
                claim=claim,
                calls=calls,
                seconds=0.0,
                converged=True,
                diagnostics={"draws": float(self.method.draws), "single": bound.single},
            )
        )

    def _nothing(self) -> Run:
        note = Note(Code.NO_HITS, "no catastrophe was found that a guide could be fitted to: raise the budget.")
        calls, seconds = self.meter.calls, self.meter.seconds
        return Run((*self.lines, Evidence.nothing(self.method.name, note, calls=calls, seconds=seconds)), calls)


def _lower(log_w: Floats, draws: int) -> _Bound:
    """From weights of all draws of a guide, −inf off target."""
    hits = log_w[np.isfinite(log_w)]
    n, on = len(log_w), len(hits)
    draws = min(draws, on)
    groups = hits[: on - on % draws].reshape(-1, draws)
    values = np.logaddexp.reduce(groups, axis=1) - math.log(draws)
    share = on / n
    error = math.sqrt(float(values.var()) / len(values) + (1.0 - share) / on)
    return _Bound(math.log(share) + float(values.mean()), error, math.log(share) + float(hits.mean()))


def _upper(
    log_w: Floats,
    guide: Guide | BoundProgram,
    particles: Population,
    draws: int,
    most: int,
    rng: np.random.Generator,
) -> _Bound:
    """From posterior particles, and weights of all draws of a guide that knows nothing of them."""
    chosen = diagnostics.systematic_resample(particles.log_w, min(most, len(particles.z)), rng)
    own = guide.log_ratio(particles.z[chosen])
    others = rng.choice(log_w, size=(len(own), draws - 1)) if draws > 1 else np.empty((len(own), 0))
    values = np.logaddexp.reduce(np.column_stack([own, others]), axis=1) - math.log(draws)
    share = max(float(np.mean(np.isfinite(log_w))), 1.0 / len(log_w))
    error = float(values.std()) / math.sqrt(max(1.0, min(particles.effective, len(own))))
    if draws > 1:  # the draws are those of all particles
        error = math.hypot(error, diagnostics.log_mean_exp(log_w)[1] * (draws - 1) / draws)
    return _Bound(float(values.mean()), error, math.log(share) + float(own.mean()))


def renyi_bound(log_w: Floats, alpha: float) -> float:
    r"""Rényi's bound from log-weights ``(n,)`` of a guide's draws: :math:`\log E[w^{1 - \alpha}] / (1 - \alpha)`.

    alpha: below 0 it is an upper bound of log P, between 0 and 1 a lower one, at 0 log of the mean weight; as it goes
    to 1, where all weights have to be positive, the evidence lower bound. Of a finite sample it is biased downwards.

    Raises ValueError for ``alpha`` above 1, and at 1 where a weight is 0.
    """
    if not alpha <= 1.0:
        raise ValueError(f"alpha={alpha!r}: expected a number up to 1")
    if alpha == 1.0:
        if not np.isfinite(log_w).all():
            raise ValueError("alpha=1: some weights are 0, so that the mean of their logs is -inf")
        return float(np.mean(log_w))
    return (diagnostics.log_sum_exp((1.0 - alpha) * log_w) - math.log(len(log_w))) / (1.0 - alpha)
