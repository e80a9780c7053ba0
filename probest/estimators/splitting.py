r"""Multilevel splitting for programs that unfold in order: keep a prefix, redraw the rest.

Text is written from left to right, and a rollout has its noise step by step. With levels
:math:`\ell_1 < \dots < \ell_m = 0` of the severity s,

.. math:: P = \prod_i \Pr[s \ge \ell_i \mid s \ge \ell_{i-1}],

each factor the share of a population that survives. Survivors are multiplied and moved: of the coordinates z in the
order of the program either all from a random place on are drawn anew, or those of one place alone (what follows it then
follows it in another way). What falls below the level is put back. Both moves are reversible for the adversary above a
level, whatever the severity is; no gradient is needed.

1. *Pilot*: one population finds the levels, each the severity that a share of it reaches.
2. *Islands*: independent populations climb these levels, fixed now, so that each one's estimate has mean P. Sixteen
   show how many are needed; the error is that of their mean.

It fails where what survives a level has few ancestors that can reach the next: islands differ then by factors, and the
mean hangs on few of them, which it says.

References: Kahn & Harris (1951), Estimation of particle transmission by random sampling; Botev & Kroese (2012),
Efficient Monte Carlo simulation via the generalized splitting method; Au & Beck (2001), Subset simulation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import ClassVar, NamedTuple

import numpy as np

from probest import diagnostics
from probest.budget import Meter
from probest.estimators.base import Need, check_least, check_needs, check_precision
from probest.estimators.monte_carlo import MonteCarlo
from probest.evidence import Code, EventLike, Evidence, Floats, Level, Note, Particles, Run
from probest.seeds import child_seed, generator
from probest.smc.moves import rewritten
from probest.tuning import tuned
from probest.verdict import imprecise, wanted_error

__all__ = ["Splitting", "SplittingTuning"]

_LANGUAGE = "language.py"


class Stream(IntEnum):
    """Names of the seeds of a run."""

    PILOT = 0
    ISLAND = 1
    PLAIN = 2


@dataclass(frozen=True)
class SplittingTuning:
    """How a budget is divided. Set by hand; ``benchmarks/language.py`` shows what it comes to."""

    pilot: float = tuned(0.4, "of the budget, at most, for finding the levels", _LANGUAGE)
    ascents: int = tuned(2, "populations of an island, in that of the pilot", _LANGUAGE)
    first: int = tuned(16, "islands that show how many are needed", _LANGUAGE)
    few: float = tuned(0.3, "of the islands, that their estimates have to be worth", _LANGUAGE)
    kept: int = tuned(2_000, "catastrophes, at most", "memory")


@dataclass(frozen=True)
class Splitting:
    """Splitting with moves that keep a prefix of the program's draws.

    precision: wanted standard error of log P; None spends the budget. particles: of an island. survive: share of a
    population that a level leaves. sweeps: moves of every particle at a level. tuning: how a budget is divided.
    """

    precision: float | None = 0.05
    particles: int = 128
    survive: float = 0.3
    sweeps: int = 3
    tuning: SplittingTuning = field(default_factory=SplittingTuning, repr=False)
    needs: ClassVar[frozenset[Need]] = frozenset({"unconditioned"})

    def __post_init__(self) -> None:
        check_precision(self.precision)
        check_least(self, particles=8, sweeps=1)
        if not 0.0 < self.survive < 1.0:
            raise ValueError(f"survive must be between 0 and 1, got {self.survive}")

    @property
    def name(self) -> str:
        return "splitting"

    def run(self, event: EventLike, *, budget: int, seed: np.random.SeedSequence) -> Run:
        """Find levels, climb them from scratch, again and again."""
        check_needs(self, event)
        return Run.of(_Campaign(self, event, Meter(event, budget), seed).run())


class _Climb(NamedTuple):
    """What an island came to: log of its estimate, and its catastrophes with their severities."""

    log_prob: float
    z: Floats
    severity: Floats


@dataclass
class _Campaign:
    """One run."""

    method: Splitting
    event: EventLike
    meter: Meter
    seed: np.random.SeedSequence
    way: list[Level] = field(default_factory=list)

    def run(self) -> Evidence:
        method, tuning = self.method, self.method.tuning
        pilot = self._pilot(generator(child_seed(self.seed, Stream.PILOT)))
        if isinstance(pilot, Note):
            return self._plainly(pilot)
        cost = method.particles * (1 + method.sweeps * (len(pilot) - 1))
        room = self.meter.left // cost
        if room < 2:
            note = Note(Code.BUDGET_SPENT, f"the budget leaves room for {room} islands of {cost} calls: raise it.")
            return self._plainly(note)
        islands = [self._climb(pilot, i) for i in range(min(room, tuning.first))]
        wanted = room
        if method.precision is not None:
            spread = diagnostics.log_mean_exp(_log(islands))[1] * math.sqrt(len(islands))
            wanted = room if not math.isfinite(spread) else math.ceil(1.5 * (spread / method.precision) ** 2)
        islands += [self._climb(pilot, i) for i in range(len(islands), min(room, wanted))]
        return self._conclude(islands)

    def _plainly(self, why: Note) -> Evidence:
        """What is left of the budget as plain draws, where no way leads up: they find something, or bound P."""
        method, left = self.method, self.meter.left
        if left < 1:
            return Evidence.nothing(method.name, why, calls=self.meter.calls, seconds=self.meter.seconds)
        plain = MonteCarlo(precision=method.precision)
        run = plain.run(self.event, budget=left, seed=child_seed(self.seed, Stream.PLAIN))
        self.meter.charge(run.calls)
        found = run.conclusion
        notes = found.notes if found.converged else (*found.notes, why)
        return replace(
            found,
            method=method.name,
            calls=self.meter.calls,
            seconds=self.meter.seconds,
            notes=notes,
            claim="consistent",
        )

    def _pilot(self, rng: np.random.Generator) -> list[float] | Note:
        """Levels up to 0; or why there are none."""
        method = self.method
        most = self.meter.budget * method.tuning.pilot
        n = min(method.particles * method.tuning.ascents, int(most / (1 + method.sweeps)))
        if n < 8:
            return Note(Code.BUDGET_SPENT, "the budget is too small to find levels: give at least some thousands.")
        z = rng.standard_normal((n, self.event.dim))
        severity = self.meter.evaluate(z).severity
        levels: list[float] = []
        log_prob, accepted = 0.0, 1.0
        while True:
            level = float(np.quantile(severity, 1.0 - method.survive, method="higher"))
            if levels and level <= levels[-1]:  # more than that share is alike: the next severity that there is
                above = severity[severity > levels[-1]]
                if not len(above):
                    return Note(
                        Code.FLAT, "no move leads to a greater severity: grade it more finely, or raise the budget."
                    )
                level = float(above.min())
            level = min(level, 0.0)
            alive = np.flatnonzero(severity >= level)
            log_prob += math.log(len(alive) / n)
            levels.append(level)
            self.way.append(Level.of(severity, log_prob, accepted))
            if level >= 0.0:
                return levels
            if self.meter.calls + n * method.sweeps > most:
                return Note(Code.UNREACHED, "the budget does not reach from the first draws to the event: raise it.")
            rows = alive[rng.integers(len(alive), size=n)]
            z, severity, accepted = self._move(z[rows], severity[rows], level, rng)

    def _climb(self, levels: list[float], island: int) -> _Climb:
        rng, n = generator(child_seed(self.seed, Stream.ISLAND, island)), self.method.particles
        z = rng.standard_normal((n, self.event.dim))
        severity = self.meter.evaluate(z).severity
        log_prob = 0.0
        for i, level in enumerate(levels):
            alive = np.flatnonzero(severity >= level)
            if not len(alive):
                return _Climb(-math.inf, z[:0], severity[:0])
            log_prob += math.log(len(alive) / n)
            if i + 1 == len(levels):
                z, severity = z[alive], severity[alive]
                break
            rows = alive[rng.permutation(n) % len(alive)]
            z, severity, _ = self._move(z[rows], severity[rows], level, rng)
        return _Climb(log_prob, z, severity)

    def _move(
        self, z: Floats, severity: Floats, level: float, rng: np.random.Generator
    ) -> tuple[Floats, Floats, float]:
        """The population moved above a level, and the share of its last moves that stayed there."""
        for _ in range(self.method.sweeps):
            proposed = rewritten(z, rng)
            found = self.meter.evaluate(proposed).severity
            kept = found >= level
            z, severity = np.where(kept[:, None], proposed, z), np.where(kept, found, severity)
        return z, severity, float(kept.mean())

    def _conclude(self, islands: list[_Climb]) -> Evidence:
        method, log_w = self.method, _log(islands)
        log_prob, error = diagnostics.log_mean_exp(log_w)
        error *= math.sqrt((len(islands) - 1.0) / max(len(islands) - 3.0, 1.0))  # Student's: it is a guess itself
        if not math.isfinite(log_prob):
            note = Note(Code.NO_HITS, "no island reached the event: raise the budget.")
            return Evidence.nothing(method.name, note, calls=self.meter.calls, seconds=self.meter.seconds)
        worth = diagnostics.effective_sample_size(log_w)
        notes = [*imprecise(error, wanted_error(method.precision))]
        if worth < max(4.0, method.tuning.few * len(islands)):
            sentence = f"the {len(islands)} islands are worth {worth:.1f}: few carry the estimate; raise the budget."
            notes.append(Note(Code.FEW_ANCESTORS, sentence))
        lower, upper = diagnostics.mean_interval(log_w)
        return Evidence(
            method=method.name,
            log_prob=min(log_prob, 0.0),
            std_error=error,
            interval=(lower, min(upper, 0.0)),
            claim="consistent",
            calls=self.meter.calls,
            seconds=self.meter.seconds,
            converged=not notes,
            particles=self._particles(islands),
            diagnostics={"islands": float(len(islands)), "island_ess": worth, "levels": float(len(self.way))},
            notes=tuple(notes),
            levels=tuple(self.way),
            batches=tuple(log_w[: method.tuning.first].tolist()),  # how many others there are, these have decided
        )

    def _particles(self, islands: list[_Climb]) -> Particles:
        own = [np.full(len(one.z), one.log_prob - math.log(len(one.z))) for one in islands if len(one.z)]
        z, severity = (np.concatenate([getattr(one, name) for one in islands]) for name in ("z", "severity"))
        log_w = np.concatenate(own)
        rows, share = diagnostics.thinned(np.exp(log_w - log_w.max()), self.method.tuning.kept)
        return Particles(z[rows], np.log(share), severity[rows])


def _log(islands: list[_Climb]) -> Floats:
    return np.array([one.log_prob for one in islands])
