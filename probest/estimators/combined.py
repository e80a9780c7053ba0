"""The default strategy: line up, look, learn, look again, sample afresh.

1. *A crude sample*, small. If P is large, crude sampling finishes the job.
2. *Read*: where the severity is a wide network, moment propagation (:mod:`probest.estimators.moments`) reads log P from
   its weights. If it states a small error, the next look has to bear it out: a search that knows nothing of it, whose
   value agrees, and whose catastrophes lie where the reading says that they do. Then it concludes.
3. *Line up*: where the severity has a gradient, line sampling along the design points' directions
   (:mod:`probest.estimators.line_sampling`) settles smooth problems and unions of smooth ones in some hundreds of
   calls. If its lines vary too much, or its own checks fail, what follows starts from nothing. Where only their
   precision does not do, a guide is fitted to their particles (see *aim*).
4. *Look*: a small tempering run finds catastrophes. Looks are independent searches, by turns with gradients and
   without. Where the severity is the largest of several, kinds of catastrophe that a look lacks are looked for one by
   one (:mod:`probest.estimators.by_kinds`).
5. *Learn*: all that looks and earlier guides' samples found goes into one memory (:mod:`probest.guides.memory`), to
   which a guide is fitted. Where a fitted law would take too many samples, a small network is taught all answers so
   far, asks for more where it is unsure, and what it knows is the guide (:mod:`probest.estimators.distilling`); at once
   where severities turn out to be sums over coordinates (:mod:`probest.surrogates.sums`). Later looks make the moves
   that it proposes (:mod:`probest.smc.transition`). Each new look is held against the guide: what lies where the guide
   gave no sample is new. A first look has its own halves to be held against.
6. *Sample afresh*, once so little is new that what may still be unknown (:func:`probest.verdict.with_room`) is below
   the precision, or the budget allows no further look. Weights must have a variance, particles must lie where the
   guide samples, and no higher estimate may stand against it.
7. *Fall back*: where a guide is hopeless (many curved modes, as of deep networks), all that is left of the budget goes
   into tempering, as large as fits; all runs are pooled by their sizes (:mod:`probest.smc.families`). If methods
   disagree, the answer is "not converged". Disagreement is never averaged away.

Where there is nothing to climb (a checker that returns a bool) or no gradient to climb by, a learned severity comes
first (:mod:`probest.estimators.surrogate`); the steps above follow where it did not pass its checks.

It fails where gradients and tempering fail: a mode that no walk and no particle found, in a place that no fresh sample
reached. Modes whose share is small until just before the limit are lost by small populations; several looks, each of
which finds them once in a few times, are what stands against that, and looks at each kind by itself.

Reference: for the parts see :mod:`probest.estimators.line_sampling`, :mod:`probest.estimators.tempering`,
:mod:`probest.estimators.importance`, :mod:`probest.estimators.distilling` and :mod:`probest.guides.memory`.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace
from enum import IntEnum

import numpy as np
import scipy

from probest import diagnostics
from probest.budget import GRADIENT_CALLS, Meter
from probest.estimators.base import check_least, check_needs, check_precision
from probest.estimators.by_kinds import look_by_kinds, promised
from probest.estimators.importance import Importance, importance_sample
from probest.estimators.line_sampling import LineSampling
from probest.estimators.moments import MomentPropagation, advance, elsewhere, read
from probest.estimators.monte_carlo import MonteCarlo
from probest.estimators.surrogate import Surrogate
from probest.estimators.tempering import Tempering
from probest.evidence import Code, Counts, EventLike, Evidence, Note, Particles, Population, Run
from probest.guides.fit import CHEAP, DISTILLED
from probest.guides.memory import Memory
from probest.guides.subspace import gradient_rows
from probest.lines.tuning import LineTuning
from probest.moments.layers import Layers
from probest.seeds import child_seed, generator
from probest.smc.families import pool
from probest.smc.resample_move import cost, thicken
from probest.surrogates.student import Student
from probest.surrogates.watched import Watched
from probest.tuning import tuned
from probest.verdict import (
    RULES,
    agree,
    contradicts,
    judge,
    or_learned,
    refuted,
    room_left,
    settle,
    wanted_error,
    with_room,
)

__all__ = ["Campaign", "Combined", "wide"]


class Stream(IntEnum):
    """Names of the seeds of a run."""

    PILOT = 0
    FINISH = 1
    CRUDE_GUIDE = 2
    TEMPER = 3
    GUIDE = 4
    FALL_BACK = 5
    SEARCH = 6
    REST = 7
    LOOK = 8
    LINES = 9
    AIM = 10
    LEARN = 11
    BOUND = 12
    AGAIN = 13
    HALVES = 14
    LINES_AGAIN = 15
    READ = 16
    KINDS = 17
    KINDS_LEFT = 18


class Aim(IntEnum):
    """Names of the seeds of a guide that is aimed at the particles of lines."""

    THICKEN = 0
    SAMPLE = 1


_LEAST_LOOK = 64  # particles
_NETWORKS = "reliability.py and random ReLU networks (10 to 50 inputs, 2 to 4 layers, P near 1e-4; script not kept)"
_EXACT = "reliability.py --exact"
_LEARNED = "networks.py"
_READ = "wide.py"


@dataclass(frozen=True)
class CombinedTuning:
    """How the default strategy divides a budget. Set by hand; ``benchmarks/tuning.py --of combined`` tries each."""

    # crude sampling
    cheap: float = tuned(700.0, "calls for which crude sampling is preferred to lines", "reliability.py")
    affordable: float = tuned(4000.0, "calls for which it is preferred to tempering", _EXACT)
    enough_hits: int = tuned(60, "crude hits that make a guide without tempering", _EXACT)
    boolean_hits: int = tuned(24, "as few as that where there is no severity to climb", _EXACT)
    # reading
    read_left: int = tuned(4_000, "calls left below which nothing is read", _READ)
    read_layers: int = tuned(16, "layers of what is read, at most", _READ)
    narrowest: int = tuned(32, "entries of its widest layer, at least: lines do as well else", _READ)
    widest: int = tuned(2048, "the same, at most: its cube is the time that it takes", _READ)
    planes: float = tuned(0.01, "stated error up to which it is a half-space, nearly: lines are cheaper there", _READ)
    read_looks: int = tuned(4, "looks that may bear a reading out, at most", _READ)
    blurred: float = tuned(0.25, "standard error of the share elsewhere, beyond which a look shows nothing", _READ)
    # lines
    lines: float = tuned(0.3, "of the budget, at most, for line sampling", _LEARNED)
    planar: float = tuned(0.2, "nats between lines and the first order, at most, where modes are planes", "modes.py")
    more_lines: float = tuned(0.9, "of the budget that is left, for them", "modes.py")
    least_lines: int = tuned(100, "calls without which it is not tried", "reliability.py --calls-to-accuracy")
    close: float = tuned(1.2, "times the precision, that will do", "reliability.py")
    thick: int = tuned(128, "particles that are made from those of lines", _NETWORKS)
    thick_price: int = tuned(30, "calls left for each of them", _NETWORKS)
    thick_slopes: int = tuned(64, "gradients among them, for the directions that matter", "modes.py --families corners")
    sweeps: int = tuned(3, "rounds of their moves", _NETWORKS)
    vague: float = tuned(1.5, "standard error of lines whose particles say nothing", _NETWORKS)
    # tempering and guides
    first_share: float = tuned(0.7, "of the budget that is left, at most, for the first look", _EXACT)
    retry_share: float = tuned(0.25, "for the second, where the first found nothing", _EXACT)
    attempts: int = tuned(9, "looks with a guide each, at most", _LEARNED)
    reserve: float = tuned(0.2, "of the budget, that looks leave for the samples of the last guide", _LEARNED)
    look_margin: float = tuned(1.2, "times what the last look took a particle, for the next", _LEARNED)
    too_few: float = tuned(2.0, "independent catastrophes, below which plain draws alone bound P from above", _LEARNED)
    without: float = tuned(0.65, "of what a look takes, one without gradients", _LEARNED)
    sketched_price: float = tuned(0.6, "of a look's price, one whose moves a student proposes", _LEARNED)
    taught_left: int = tuned(20_000, "calls left, for a student to learn on the way of a look", _LEARNED)
    worth_most: float = tuned(4.0, "independent catastrophes that one look counts as, at most", _LEARNED)
    island: int = tuned(8, "particles of each of its islands", _LEARNED)
    kind_size: int = tuned(64, "particles for each kind of catastrophe, where there are several", _LEARNED)
    kind_share: float = tuned(0.3, "of the budget that is left, for all of them, at most", _LEARNED)
    kind_next: int = tuned(128, "particles of the looks after them", _LEARNED)
    hopeless_looks: int = tuned(2, "looks after which a guide that is given up is left for good", _LEARNED)
    guide_share: float = tuned(0.5, "of the budget that is left, at most, for a guide's samples", _EXACT)
    once_more: float = tuned(0.1, "of the budget, that is left for a student's guide where it fell short", _LEARNED)
    give_up: float = tuned(0.5, "standard error that a guide has to promise to be worth its samples", _NETWORKS)
    far_from: float = tuned(1.5, "times the precision, the same where a student may learn instead", _LEARNED)
    sized_for: float = tuned(0.92, "of what is left, what the last tempering runs are sized for", _NETWORKS)
    most_numbers: int = tuned(30_000_000, "of z in one run, at most", "memory.py")
    most_kept: int = tuned(30_000_000, "of z and gradients, that are kept for a student", "memory")
    # a learned severity
    learn_left: int = tuned(1000, "calls left below which nothing is learned", _EXACT)
    learn_share: float = tuned(0.7, "of the budget that is left, for a severity without a gradient", _EXACT)
    learn_boolean: float = tuned(0.8, "for a checker that says only yes or no", _EXACT)
    search_share: float = tuned(0.6, "for crude sampling until there are hits, where that failed", _EXACT)


@dataclass(frozen=True)
class Combined:
    """Crude sample, line sampling, tempering, importance sampling, and the checks between them.

    precision: wanted standard error of log P; stops there. None spends the budget.
    look: size of the first crude sample where line sampling may follow; pilot: where it does not, or did not do.
    particles: of each of the first three looks; later ones take twice as many as the one before.
    read: whether the severity of a wide network is read from its weights first.
    taught: whether a student may learn the severity, which takes up to a minute.
    bound: where nothing is found, spend what is left of the budget on plain draws, which bound P by 3 in their number.
    tuning: how the budget is divided.
    warm_start: particles of an earlier run, for tempering (:class:`probest.estimators.tempering.Tempering`).
    """

    precision: float | None = 0.05
    look: int = 12
    pilot: int = 500
    particles: int = 128
    read: bool = True
    taught: bool = True
    bound: bool = True
    tuning: CombinedTuning = field(default_factory=CombinedTuning, repr=False)
    warm_start: Particles | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_precision(self.precision)
        check_least(self, look=1, pilot=10, particles=64)

    @property
    def name(self) -> str:
        return "combined"

    def run(self, event: EventLike, *, budget: int, seed: np.random.SeedSequence) -> Run:
        """All evidence in the order it was found; the last is the conclusion, whose ``calls`` are the sum.

        Interrupted by Ctrl-C, what was found until then is returned, not converged; raised again where that is nothing.
        """
        return self.begin(event, seed).spend(budget)

    def begin(self, event: EventLike, seed: np.random.SeedSequence, numbers: int | None = None) -> Campaign:
        """A run whose budget comes in parts. numbers: that are kept for a student, at most."""
        return Campaign(self, event, seed, numbers or self.tuning.most_kept)


@dataclass
class _Crude:
    """A crude sample."""

    evidence: Evidence
    counts: Counts


@dataclass
class Campaign:
    """One run: the evidence so far, what is left of the budget, and what each kind of evidence came to.

    It goes on where it was when it gets more to spend: what earlier looks found is in its memory. Where it concluded
    before any look, it starts afresh.
    """

    method: Combined
    event: EventLike
    seed: np.random.SeedSequence
    numbers: int  # that are kept for a student, at most
    left: int = 0
    rounds: int = 0
    lines: list[Evidence] = field(default_factory=list)
    crude: _Crude | None = None
    reading: Evidence | None = None
    advance: float = 1.0  # of catastrophes, on average, as the reading has it
    lined: Evidence | None = None
    aimed: Evidence | None = None
    learned: Evidence | None = None
    attempt: int = 0
    looks: list[Run] = field(default_factory=list)
    worth: float = 0.0  # of all looks, in independent catastrophes
    new: float = 0.0  # of them, those of the last look that were
    tempered: list[Run] = field(default_factory=list)
    sketched: list[Run] = field(default_factory=list)  # of them, those whose moves a student proposed
    tried: set[int] = field(default_factory=set)  # kinds of catastrophe that were looked for one by one
    short: bool = False  # whether kinds may be left that promise enough
    weighed: list[Evidence] = field(default_factory=list)
    roomy: list[Evidence] = field(default_factory=list)  # importance samples of all that was known
    memory: Memory = field(default_factory=Memory)
    prior: Memory = field(default_factory=Memory)

    def __post_init__(self) -> None:
        self.source = self.event
        discrete = getattr(self.event, "discrete_sites", ())
        if self.method.taught and self.event.differentiable and not self.event.weighted and not discrete:
            self.event = Watched(self.event, self.numbers)

    @property
    def _watched(self) -> bool:
        """Whether answers are kept for a student, and one may learn from them."""
        return self.method.taught and isinstance(self.event, Watched)

    @property
    def searched(self) -> bool:
        """Whether more to spend would go on from what is known."""
        return self.crude is not None

    def spend(self, budget: int) -> Run:
        """The run so far and on, as :meth:`Combined.run` returns it; the ledger and the calls are those of this part.

        Raises ValueError for an empty budget.
        """
        Meter(self.event, budget)  # checks the budget
        started, before = time.perf_counter(), len(self.lines)
        self.left = budget
        if self.rounds and not self.searched:
            self.seed = child_seed(self.seed, Stream.AGAIN)
        self.rounds += 1
        try:
            conclusion = self._bounded(self._go_on() if self.searched else self._conclude())
        except KeyboardInterrupt:
            if not self.lines:
                raise
            last = self.lines[-1]
            sentence = "interrupted: this is the evidence gathered until then. Estimate again for a verdict"
            conclusion = replace(last, converged=False, notes=(*last.notes, Note(Code.INTERRUPTED, sentence)))
        calls, seconds = budget - self.left, time.perf_counter() - started
        claim = "consistent" if conclusion.claim == "unbiased" else conclusion.claim  # chosen by what it says
        conclusion = replace(conclusion, method=self.method.name, claim=claim, calls=calls, seconds=seconds)
        return Run((*self.lines[before:], conclusion), calls)

    @property
    def _reached(self) -> list[Run]:
        """Tempering runs that reached the event."""
        return [run for run in self.tempered if run.population is not None]

    @property
    def aim(self) -> float:
        return self.method.precision or 0.02

    @property
    def tuning(self) -> CombinedTuning:
        return self.method.tuning

    def _conclude(self) -> Evidence:
        event, aim = self.event, self.aim
        lined: Evidence | None = None
        aimed: Evidence | None = None
        if event.differentiable and not event.weighted:
            look = self._sample(Stream.LOOK, self.method.look)
            if _crude_cost(look.evidence, aim) <= min(0.8 * self.left, self.tuning.cheap):
                return self._finish_crude(look)
            self._read()
            bent = self._promises() and self.reading is not None and self.reading.std_error > self.tuning.planes
            lined = None if bent else self._line_up(look, Stream.LINES, self.tuning.lines)
            if lined is not None and self._lacks_starts(lined):
                lined = self._line_up(look, Stream.LINES_AGAIN, self.tuning.more_lines) or lined
            if lined is not None and self._many_planes(lined) and (lined.converged or self._lacks_starts(lined)):
                return lined  # nothing else finds so many, and lines say how many starts met one alone
            if lined is not None and lined.converged and lined.std_error <= self.tuning.close * aim:
                return lined
            aimed = None if lined is None else self._aim(lined)
            if aimed is not None and lined is not None and aimed.converged and self._bears_out(lined, aimed):
                return aimed
            if self.left < 1:
                return lined or look.evidence
        crude = self._sample(Stream.PILOT, self.method.pilot)
        if not event.weighted and _crude_cost(crude.evidence, aim) <= min(0.8 * self.left, self.tuning.affordable):
            return self._finish_crude(crude)
        if event.boolean:
            return self._conclude_boolean(crude)
        learned = None if event.differentiable else self._learn(crude, self.tuning.learn_share)
        if learned is not None and learned.converged:
            return learned
        if crude.counts.hits >= self.tuning.enough_hits and not event.weighted and crude.evidence.particles is not None:
            weighed = self._sample_guide(self._seed(Stream.CRUDE_GUIDE), _independent(crude.evidence.particles))
            if weighed.converged and agree(weighed, crude.evidence):
                return weighed
        self.crude, self.lined, self.aimed, self.learned = crude, lined, aimed, learned
        return self._go_on()

    def _go_on(self) -> Evidence:
        """Search and sample with what there is to spend, and settle what all evidence says."""
        assert self.crude is not None
        concluded = self._search()
        if concluded is not None:
            return concluded
        self._fall_back()
        runs = self._reached
        failed = [run.conclusion for run in self.tempered if run.population is None]
        wanted = wanted_error(self.method.precision)
        tempered = pool(runs) if runs else None
        if tempered is not None and self.worth > 0.0:  # modes that no look came upon, as for samples of a guide
            tempered = with_room(tempered, self.worth, self.new, self.method.precision)
        judged = judge(self.crude.evidence, tempered, failed, self.weighed, self.lined, wanted)
        # lines may claim what is not there, so that those whose claims were not checked refute nothing
        lined = self.lined
        checked = lined if lined is not None and (lined.converged or self._lacks_starts(lined)) else None
        settled = settle(judged, checked, self.aimed, *self.roomy)
        if tempered is not None and agree(settled, tempered):
            settled = _with_particles(settled, tempered)
        return or_learned(settled, self.learned)

    def _search(self) -> Evidence | None:
        """Look, learn, look again until hardly anything new turns up, then sample afresh; None where that does not end.

        Every look, by turns with gradients and without, is an independent search. It is held against the guide that the
        looks before it led to: what lies where the guide gave no sample is new, and is learned. As long as so few
        looks would leave too much room for what none of them saw, a guide is only tried.
        """
        tuning, wanted = self.tuning, wanted_error(self.method.precision)
        at_start, failures = self.left, 0
        tried = bool(self.looks)  # a guide was only tried, or has to be tried again
        while self.attempt < tuning.attempts:
            run = self._look(at_start)
            if run is None:
                break
            if run.population is None:
                failures += 1
                if self.looks or failures > 1 or Code.FLAT in run.conclusion.codes:
                    break
                continue
            self._learn_from(run, run.population, self._reserve(at_start))
            again = self._can_look(at_start)
            if self._promises() and not self._speaks_against():
                borne_out = self._borne_out()
                if borne_out is not None:
                    return borne_out
                if again and len(self.looks) < tuning.read_looks:
                    continue
            tried = again and math.hypot(self.aim, room_left(self.worth, self.new)) > wanted
            weighed = self._aim_and_sample(tried, again)
            if not tried and self._passes(weighed):
                return _with_particles(weighed, pool(self.looks))
            if Code.GIVEN_UP in weighed.codes and len(self.looks) >= tuning.hopeless_looks:
                return None
        student = self.memory.student
        if student is not None and student.proven and self.left > tuning.once_more * at_start:
            tried = True  # nothing else is worth as much: it has learned from what the last sample showed
        if tried and self.left > 0:
            weighed = self._aim_and_sample(False, False)
            if self._passes(weighed):
                return _with_particles(weighed, pool(self.looks))
        return None

    def _learn_from(self, run: Run, population: Population, planned: int) -> None:
        """What a look found, and how much of it is new.

        However many families it ends with, they had their moves and their bottlenecks in common: two looks worth 4 and
        10 were seen to miss a mode of the digits network that held half of P.
        """
        effective, below = run.conclusion.diagnostics["island_ess"], run.conclusion.log_evidence
        mass = run.conclusion.log_prob + below
        if self.looks:
            share = self.memory.novelty(population, mass, planned)
        else:
            share = self.memory.disagreement(population, generator(self._seed(Stream.HALVES)))
        if self._watched:  # looks of other events are not moved by what one student knows
            effective = min(effective, self.tuning.worth_most)
        self.new = effective * share
        self.worth += effective
        self.looks.append(run)
        self.memory.add(population, mass)
        if run.prior_population is not None:
            self.prior.add(run.prior_population, below)

    def _passes(self, weighed: Evidence) -> bool:
        """Whether an importance sample of all that is known concludes: it is converged, and nothing refutes it."""
        higher = [pool(self.looks), *self.roomy]
        if self.aimed is not None and self.aimed.converged:
            higher.append(self.aimed)
        stands = not contradicts(self.lined, weighed) and not refuted(weighed, higher)
        self.roomy.append(weighed)
        return weighed.converged and stands

    def _look(self, at_start: int) -> Run | None:
        """An independent search for catastrophes; None where the budget does not allow another."""
        if self.looks and not self._can_look(at_start):
            return None
        budget = self.left - self._reserve(at_start)
        if not self.looks:
            budget = int((self.tuning.retry_share if self.tempered else self.tuning.first_share) * self.left)
        if budget < 1:
            return None
        sketched = self._sketched(budget)
        method = sketched or self._plain()
        run = self._add(method.run(self.event, budget=budget, seed=self._seed(Stream.TEMPER, self.attempt)))
        if run.population is not None and self._has_kinds and self.left >= self.tuning.taught_left:
            spare = self.left - self._reserve(at_start) if self.looks else self.left
            run = self._and_by_kinds(run, int(min(spare, self.tuning.kind_share * self.left)))
        self.attempt += 1
        self.tempered.append(run)
        if sketched is not None and run.population is not None:
            self.sketched.append(run)
        return run

    @property
    def _has_kinds(self) -> bool:
        """Whether there are kinds of catastrophe, which are looked for one by one."""
        return self._watched and getattr(self.event, "kinds", None) is not None

    def _and_by_kinds(self, first: Run, budget: int) -> Run:
        """A look and, for each kind of catastrophe that it lacks, one at that kind."""
        assert isinstance(self.event, Watched)
        islands = len(first.families.log_z) if first.families is not None else 16
        size = max(self.tuning.kind_size, 4 * islands)
        method = Tempering(particles=size, islands=islands, max_moves=2, target=0.5, student=self.memory.student)
        seed = self._seed(Stream.KINDS, self.attempt)
        run, self.short = look_by_kinds(self.event, first, method, self.tried, budget=max(1, budget), seed=seed)
        return first if run is None else self._add(run)

    def _with_kinds_left(self, weighed: Evidence) -> Evidence:
        """An estimate that would conclude, with room for kinds that the budget did not allow to look for."""
        if not (weighed.converged and self.short and self._has_kinds):
            return weighed
        assert isinstance(self.event, Watched)
        seed = self._seed(Stream.KINDS_LEFT, len(self.weighed))
        share = promised(self.event, self.tried, weighed.log_prob, seed=seed)
        if share == 0.0:
            return weighed
        sentence = f"kinds of catastrophe that may hold {share:.0%} as much were not looked for: raise the budget."
        interval = (weighed.interval[0], min(0.0, weighed.interval[1] + math.log1p(share)))
        notes = (*weighed.notes, Note(Code.UNSEEN, sentence))
        return replace(weighed, converged=False, interval=interval, notes=notes)

    def _plain(self) -> Tempering:
        gradient = self.attempt % 3 == 0 or self.memory.student is not None
        moves, target = (2, 0.5) if gradient else (4, 0.3)
        if gradient and self._watched and self.left >= self.tuning.taught_left:
            self.memory.student = self.memory.student or Student()
        return Tempering(
            particles=self._look_size,
            max_moves=moves,
            target=target,
            gradient=gradient,
            warm_start=self.method.warm_start,
            student=self.memory.student,
        )

    def _sketched(self, budget: int) -> Tempering | None:
        """A look whose moves a student proposes; None where there is none, or too few particles are affordable.

        It is unbiased as any other, and less independent than one: what the student lacks, it hardly moves in.
        """
        student, tuning = self.memory.student, self.tuning
        if student is None or not student.proven or not self.looks:
            return None
        price = min(map(_price, self.sketched), default=tuning.sketched_price * _price(self.looks[-1]))
        # where kinds were looked for one by one, many looks are worth more than large ones
        most = tuning.kind_next if self._has_kinds else 2 * self._look_size
        size = min(most, int(budget / (tuning.look_margin * price)))
        if size < _LEAST_LOOK:
            return None
        islands = max(16, size // tuning.island)
        return Tempering(particles=size, islands=islands, max_moves=2, target=0.5, student=student)

    @property
    def _look_size(self) -> int:
        """Particles of the next look: the first three alike, then doubled each time."""
        return max(_LEAST_LOOK, self.method.particles) * int(2 ** max(0, self.attempt - 2))

    def _reserve(self, at_start: int) -> int:
        """What looks leave for the samples of the last guide."""
        return int(self.tuning.reserve * at_start)

    def _can_look(self, at_start: int) -> bool:
        """Whether the budget allows one more look besides the samples of the last guide."""
        if self.attempt >= self.tuning.attempts:
            return False
        if self._sketched(self.left - self._reserve(at_start)) is not None:
            return True
        cheaper = self.tuning.without if self.attempt % 3 == 1 else 1.0
        price = self.tuning.look_margin * cheaper * _price(self.looks[-1])
        size = _LEAST_LOOK if self._watched else self._look_size
        return self.left - self._reserve(at_start) > price * size

    def _bounded(self, conclusion: Evidence) -> Evidence:
        """Where nothing was found, plain draws for what is left of the budget: they find something, or bound P."""
        if not self.method.bound or math.isfinite(conclusion.log_prob) or self.event.weighted or self.left < 1:
            return conclusion
        rest = self._crude(Stream.BOUND, MonteCarlo(precision=self.method.precision), self.left).evidence
        if math.isfinite(rest.log_prob):
            return rest
        return replace(conclusion, interval=(-math.inf, min(conclusion.interval[1], rest.interval[1])))

    def _read(self) -> None:
        """Read the event from its weights, if it is a wide network."""
        if not self.method.read or self.left < self.tuning.read_left:
            return
        with np.errstate(over="ignore", invalid="ignore"):  # nine deviations out, an exponential has no end
            net = wide(self.source, self.tuning)
            if net is None:
                return
            method = MomentPropagation()
            self._add(method.estimate(net, Meter(self.event, self.left), self._seed(Stream.READ)))
        self.reading = self.lines[-1]
        if self._promises():
            self.advance = advance(net, self.reading)

    def _promises(self) -> bool:
        """Whether the reading will do, if a look bears it out."""
        read, precision = self.reading, self.method.precision
        return (
            read is not None and precision is not None and read.converged and read.std_error < wanted_error(precision)
        )

    def _speaks_against(self) -> bool:
        """Whether catastrophes that looks found are fewer or more than the reading says, or lie elsewhere."""
        read, crude = self.reading, self.crude
        if read is None or crude is None or not (agree(read, pool(self.looks)) and agree(read, crude.evidence)):
            return True
        share, error = self._elsewhere(read)
        return share > RULES.errors * error

    def _elsewhere(self, read: Evidence) -> tuple[float, float]:
        found = self.memory.population()
        assert found is not None
        return elsewhere(read, self.advance, found, self.worth)

    def _borne_out(self) -> Evidence | None:
        """The reading, with room for what no look saw; None where that is too much."""
        assert self.reading is not None
        share, error = self._elsewhere(self.reading)
        new = self.worth * min(max(share, 0.0), 1.0)
        whole = with_room(self.reading, self.worth, new, self.method.precision)
        if error > self.tuning.blurred or not whole.converged:
            return None
        looks = pool(self.looks)
        figures = {**whole.diagnostics, "elsewhere": share, "looked": looks.log_prob}
        return replace(whole, particles=looks.particles, weigher=None, diagnostics=figures)

    def _seed(self, *key: int) -> np.random.SeedSequence:
        return child_seed(self.seed, *key)

    def _add(self, run: Run) -> Run:
        self.left -= run.calls
        self.lines += run.ledger
        return run

    def _sample(self, stream: Stream, n: int) -> _Crude:
        return self._crude(stream, MonteCarlo(max_samples=n), min(n, self.left))

    def _crude(self, stream: Stream, method: MonteCarlo, budget: int) -> _Crude:
        run = self._add(method.run(self.event, budget=budget, seed=self._seed(stream)))
        assert run.counts is not None
        return _Crude(run.conclusion, run.counts)

    def _line_up(self, look: _Crude, stream: Stream, share: float) -> Evidence | None:
        """Line sampling, not converged if the crude sample speaks against it; None without calls enough to try."""
        budget = int(share * self.left)
        if budget < self.tuning.least_lines:
            return None
        lines = LineSampling(precision=self.method.precision)
        self._add(lines.run(self.event, budget=budget, seed=self._seed(stream)))
        lined = self.lines[-1]
        low, high = (math.exp(end) for end in lined.interval)
        hits, n = look.counts
        odd = scipy.stats.binom.sf(hits - 1, n, high) < 1e-3 or scipy.stats.binom.cdf(hits, n, low) < 1e-3
        if odd and lined.converged:
            sentence = "the crude sample speaks against this: a mode is missing, or lines miss parts of the event."
            self.lines[-1] = lined = replace(
                lined, converged=False, notes=(*lined.notes, Note(Code.DISAGREE, sentence))
            )
        return lined

    def _many_planes(self, lined: Evidence) -> bool:
        """Whether there are many modes, and each is nearly a half-space: lines say what the first order says."""
        many = lined.diagnostics.get("modes", 0.0) > LineTuning().several
        return many and abs(lined.diagnostics.get("form", math.inf) - lined.log_prob) <= self.tuning.planar

    def _lacks_starts(self, lined: Evidence) -> bool:
        """Whether lines through many planes lack nothing but starts enough to have met them all."""
        if lined.converged or lined.codes != {Code.IMPRECISE} or not self._many_planes(lined):
            return False
        own = lined.std_error**2 - lined.diagnostics["unmet"] ** 2
        return own <= wanted_error(self.method.precision) ** 2

    def _bears_out(self, lined: Evidence, aimed: Evidence) -> bool:
        """Whether lines agree with the guide fitted to their particles, and nothing says that they missed a mode.

        The guide would miss it too. In few dimensions they were looked for all around, whatever became of walks.
        """
        doubtful = {Code.UNSEEN, Code.DISAGREE, Code.BUDGET_SPENT}
        if self.event.dim > LineTuning().covered:
            doubtful.add(Code.STRAYED)
        missed = lined.codes & doubtful or lined.diagnostics.get("unmet", 0.0) > 0.0
        return agree(aimed, lined) and not missed

    def _aim(self, lined: Evidence) -> Evidence | None:
        """A guide fitted to the particles of lines that varied too much; None where these are too few or too vague.

        What follows learns from these particles too: lines may know of a mode that nothing else finds.
        """
        before = self.left
        population = self._thickened(lined)
        if population is None:
            return None
        self.memory.add(population, lined.log_prob)
        if not lined.std_error < self.tuning.vague:
            return None
        thick = before - self.left
        weighed = self._sample_guide(self._seed(Stream.AIM, Aim.SAMPLE), population)
        weighed = replace(weighed, calls=weighed.calls + thick)
        unseen = tuple(note for note in lined.notes if isinstance(note, Note) and note.code == Code.UNSEEN)
        if unseen:  # what lines do not hold, their particles do not show
            interval = (weighed.interval[0], max(weighed.interval[1], lined.interval[1]))
            weighed = replace(weighed, converged=False, interval=interval, notes=(*weighed.notes, *unseen))
        self.lines[-1] = self.weighed[-1] = weighed
        return weighed

    def _thickened(self, lined: Evidence) -> Population | None:
        """The particles of lines, and more by moves within the event; None where there are too few calls for that."""
        n = min(self.tuning.thick, self.left // self.tuning.thick_price)
        if lined.particles is None or n < 64:
            return None
        slopes = GRADIENT_CALLS * self.tuning.thick_slopes
        meter = Meter(self.event, cost(n, self.tuning.sweeps) + slopes)
        seed = self._seed(Stream.AIM, Aim.THICKEN)
        particles = thicken(meter, lined.particles, n, seed=seed, sweeps=self.tuning.sweeps)
        at = np.linspace(0, len(particles.z) - 1, min(self.tuning.thick_slopes, len(particles.z))).astype(np.intp)
        slope = meter.evaluate(particles.z[at], gradient=True).severity_grad
        rows = gradient_rows(particles.z[at], np.zeros(len(at)), slope, None)
        self.left -= meter.calls
        return _independent(particles)._replace(effective=len(particles.z) / 3.0, rows=rows)

    def _fall_back(self) -> None:
        """Temper with what is left: as many particles as fit, until too few would or the precision is reached."""
        method = self.method
        most = max(method.particles, self.tuning.most_numbers // self.event.dim)
        for _ in range(8):
            runs = self._reached
            if not runs or (method.precision is not None and pool(runs).std_error <= method.precision):
                return
            particles = min(most, int(self.tuning.sized_for * self.left / max(map(_price, runs))))
            if particles < min(method.particles, max(map(_size, runs)) / 4):
                return
            run = self._temper(self._seed(Stream.FALL_BACK, len(self.tempered)), particles)
            if run.population is None:
                return

    def _finish_crude(self, crude: _Crude) -> Evidence:
        """A fresh crude sample to the precision: the pilot decided on it, so the pilot is left out."""
        if self.left < 1:
            return crude.evidence
        # one batch that should do: looks in between would favour samples that look precise by chance
        expected = _crude_cost(crude.evidence, self.aim)
        first = max(self.method.look, int(min(1.1 * expected, self.left)))
        method = MonteCarlo(precision=self.method.precision, first_batch=first)
        return self._crude(Stream.FINISH, method, self.left).evidence

    def _conclude_boolean(self, crude: _Crude) -> Evidence:
        """Nothing to climb: a learned severity, else crude sampling until there are hits to aim at, then a guide."""
        learned = (
            self._learn(crude, self.tuning.learn_boolean) if crude.counts.hits < self.tuning.boolean_hits else None
        )
        if learned is not None and learned.converged:
            return learned
        if self.left < 1:
            return crude.evidence
        first = crude
        if crude.counts.hits < self.tuning.boolean_hits:
            size = max(1, int(self.tuning.search_share * self.left))
            method = MonteCarlo(max_samples=size, hits=self.tuning.boolean_hits, precision=self.method.precision)
            first = self._crude(Stream.SEARCH, method, size)
        particles, enough = first.evidence.particles, first.counts.hits >= self.tuning.boolean_hits
        if particles is not None and enough and not self.event.weighted:
            weighed = self._sample_guide(self._seed(Stream.CRUDE_GUIDE), _independent(particles))
            if weighed.converged and agree(weighed, first.evidence):
                return weighed
        if self.left < 1:
            return first.evidence
        rest = self._crude(Stream.REST, MonteCarlo(precision=self.method.precision), self.left)
        # the first sample ran to its fixed size when it found few hits: then both count as one
        whole = not self.event.weighted and not enough and first is not crude
        return or_learned(_both(first, rest) if whole else rest.evidence, learned)

    def _learn(self, crude: _Crude, share: float) -> Evidence | None:
        """A learned severity as the guide; converged only if the crude sample does not speak against it."""
        if self.event.weighted or self.left < self.tuning.learn_left:
            return None
        method = Surrogate(precision=self.method.precision)
        self._add(method.run(self.event, budget=int(share * self.left), seed=self._seed(Stream.LEARN)))
        learned = self.lines[-1]
        lower, upper = diagnostics.binomial_interval(*crude.counts, 0.999)
        if learned.converged and not (lower <= learned.interval[1] and learned.interval[0] <= upper):
            note = Note(Code.DISAGREE, "the learned severity and the crude sample disagree: raise the budget.")
            self.lines[-1] = learned = replace(learned, converged=False, notes=(*learned.notes, note))
        if learned.converged and Code.SECOND_CHOICE in learned.codes:
            # particles that climbed a learned severity know of what it learned, and no fresh sample confirmed them
            note = Note(Code.UNCHECKED, "a learned severity alone does not conclude: raise the budget.")
            self.lines[-1] = learned = replace(learned, converged=False, notes=(*learned.notes, note))
        return learned

    def _temper(self, seed: np.random.SeedSequence, particles: int) -> Run:
        method = Tempering(particles=max(64, particles), max_moves=6, warm_start=self.method.warm_start)
        run = self._add(method.run(self.event, budget=max(1, self.left), seed=seed))
        self.tempered.append(run)
        return run

    def _sample_guide(self, seed: np.random.SeedSequence, population: Population) -> Evidence:
        """A guide fitted to a population alone, sampled afresh."""
        share = 1.0 if self.method.precision is None else self.tuning.guide_share
        return self._weigh(seed, Memory.of(population), None, share)

    def _aim_and_sample(self, trial: bool, again: bool) -> Evidence:
        """A guide fitted to all that is known, and fresh samples. trial: no more of these than choose the guide."""
        student = self.memory.student
        whole = not again or self.method.precision is None or (not trial and student is not None and student.proven)
        share = 1.0 if whole else self.tuning.guide_share
        prior = self.prior if self.event.weighted else None
        seed = self._seed(Stream.GUIDE, len(self.weighed))
        weighed = self._weigh(seed, self.memory, prior, share, trial)
        new = self.new
        if len(self.looks) == 1:  # nothing else tells of modes that were seen once, were all alike and as many as parts
            new = max(new, self.worth * (1.0 - 1.0 / weighed.diagnostics["components"]) ** max(self.worth - 1.0, 0.0))
        weighed = with_room(weighed, self.worth, new, self.method.precision)
        if self.worth - new < self.tuning.too_few and self.crude is not None and math.isfinite(weighed.log_prob):
            top = max(weighed.interval[1], self.crude.evidence.interval[1])
            weighed = replace(weighed, interval=(weighed.interval[0], top), converged=False)
        if not trial:
            weighed = self._with_kinds_left(weighed)
        self.lines[-1] = self.weighed[-1] = weighed
        return weighed

    def _weigh(
        self, seed: np.random.SeedSequence, memory: Memory, prior: Memory | None, share: float, trial: bool = False
    ) -> Evidence:
        runs = self._reached
        vague = pool(runs).std_error if runs else 0.0  # what tempering can say without a guide
        guides = (*CHEAP, DISTILLED) if memory is self.memory and self._watched else CHEAP
        give_up = max(self.tuning.give_up, vague)
        wary = self._watched and memory is not self.memory
        if wary:  # a student of all that is known will do better
            give_up = self.tuning.far_from * self.aim
        method = Importance(precision=self.method.precision, give_up=give_up, guides=guides, wary=wary)
        budget = max(1, int(share * self.left))
        room = room_left(self.worth, self.new) if memory is self.memory else 0.0
        wanted = wanted_error(self.method.precision)
        enough = math.sqrt(wanted**2 - room**2) if room < wanted else None
        evidence = importance_sample(
            method, self.event, memory, prior, budget=budget, seed=seed, trial=trial, enough=enough,
            spare=self.left - budget,
        )  # fmt: skip
        run = Run.of(evidence)
        self.weighed.append(self._add(run).conclusion)
        return self.weighed[-1]


def wide(event: EventLike, tuning: CombinedTuning) -> Layers | None:
    """The severity in layers, where it is a wide network that is worth reading; None elsewhere.

    A discrete site is a function of z with steps, which no reading sees: held in strata it is none.
    """
    if getattr(event, "discrete_sites", ()):
        return None
    try:
        check_needs(MomentPropagation(), event)
        net = read(event, tuning.read_layers)
    except Exception:  # whatever a model does when it is traced: it can still be asked
        return None
    width = max((layer.linear.size for layer in net.layers), default=0)
    return net if tuning.narrowest <= width <= tuning.widest else None


def _crude_cost(crude: Evidence, aim: float) -> float:
    """Calls that crude sampling would need for a standard error ``aim``."""
    p = math.exp(crude.log_prob)
    return (1.0 - p) / (p * aim**2) if p > 0.0 else math.inf


def _size(run: Run) -> int:
    """Particles of a tempering run that reached the event."""
    assert run.population is not None
    return len(run.population.z)


def _price(run: Run) -> float:
    """Model calls a particle."""
    return run.calls / _size(run)


def _independent(particles: Particles) -> Population:
    n = len(particles.z)
    return Population(particles.z, particles.log_weight, np.zeros(n), None, float(n))


def _both(a: _Crude, b: _Crude) -> Evidence:
    """Two crude samples as one."""
    hits, n = a.counts.hits + b.counts.hits, a.counts.draws + b.counts.draws
    error = math.sqrt((1.0 - hits / n) / hits) if hits else math.inf
    return replace(
        b.evidence,
        log_prob=math.log(hits / n) if hits else -math.inf,
        std_error=error,
        interval=diagnostics.binomial_interval(hits, n),
        converged=error <= 0.2,
        diagnostics={"hits": float(hits), "samples": float(n)},
    )


def _with_particles(chosen: Evidence, found: Evidence) -> Evidence:
    """The chosen estimate, with the better particles: tempering's where few of its own count."""
    own, others = chosen.particles, found.particles
    if own is None or (others is not None and diagnostics.effective_sample_size(own.log_weight) < 0.5 * len(others.z)):
        own = others
    return replace(chosen, particles=own, prior_particles=found.prior_particles)
