r"""Line sampling: one direction is integrated exactly, the others are sampled.

Along a unit vector a, z splits into :math:`z_\perp + r a`, and the event cuts each line in intervals whose ends are
roots of the severity. With h_k a partition of unity over the modes k and q_k a law of :math:`z_\perp`,

.. math:: P = \sum_k E_{q_k}\Big[ \frac{\varphi(z_\perp)}{q_k(z_\perp)}
          \int_{s \ge 0} h_k(z_\perp + r a_k)\, \varphi(r)\, dr \Big].

Its mean is P for *any* directions, if all roots are found; good directions make what is averaged nearly constant. They
are those of the design points (:mod:`probest.lines.design_points`), or rays from the origin where catastrophes surround
it (then r is chi-distributed: directional sampling). Nothing is counted twice, since h sums to 1: what lies beyond the
planes of several modes is theirs in equal parts (:mod:`probest.lines.modes`).

*Kinds.* Where the severity is the largest of several (``any_of``, ``eventually``, a maximum over time), each of these
is walked to by itself: none hides another, and none is left to chance.

*Rounds.* First lines learn: roots and the gradients there give a quadratic model of the boundary over the few
coordinates that matter (:mod:`probest.lines.boundary`). Gradients that point to an unknown mode start a new walk. The
model gives a proposal q_k, a guess of every root, and a control variate whose mean takes no model calls; fresh lines
measure what the model misses. (Of more than a dozen modes, the few lines of each make no model, and none is needed: a
line then varies by how many other modes it lies in.) To stop by their spread, and to take the better of two estimates,
costs a bias that vanishes with the number of lines. Where they show the model to be poor it learns once more, and fresh
lines are drawn anew.

*All roots.* Each line is asked at one random point beyond its root (these points are the particles); lines that
answer "safe", and a few others for audit, are looked at on a grid (:mod:`probest.lines.roots`). Where lines
were seen to leave the event again, or to enter it elsewhere, all are.

*Shells.* What lies far out in many directions at once is nothing to first order, and may be most of P: rays at a radius
that is exceeded as rarely as would matter ask for it, and measure it (:mod:`probest.lines.shells`).

*The search goes on* until it has cost as much as the lines: precision about known modes is worth no more than to know
that there are no others. Where it comes upon one that counts, lines are drawn anew.

It fails where there are more modes than directions (deep networks): the lines' contributions then vary wildly, and the
estimate is not converged. It cannot tell of modes that no gradient leads to.

References: Koutsourelakis, Pradlwarter & Schuëller (2004), Reliability of structures in high dimensions, part I;
Bjerager (1988), Probability integration by directional simulation; Hohenbichler & Rackwitz (1988), Improvement of
second-order reliability estimates by importance sampling; Papaioannou & Straub (2021), Combination line sampling.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import numpy as np
from scipy.special import chdtri, log_ndtr

from probest import diagnostics
from probest.budget import Meter, UndefinedError
from probest.estimators.base import Need, check_least, check_needs, check_precision
from probest.evidence import Code, EventLike, Evidence, Floats, Note, Run
from probest.lines.along import Chi
from probest.lines.design_points import DesignPoints, Search
from probest.lines.modes import Mode, Model, Modes
from probest.lines.shells import Shells, joined
from probest.lines.tuning import LineTuning
from probest.seeds import generator
from probest.verdict import imprecise, wanted_error

__all__ = ["LineSampling"]


@dataclass(frozen=True)
class LineSampling:
    """Line sampling along the directions of the design points.

    precision: wanted standard error of log P; None spends the budget.
    starts: gradient walks that look for design points (more where they find several).
    first: lines of each mode that learn its boundary. fresh: lines that measure, in the first round (for one mode).
    tuning: the constants that decide the rest.
    """

    precision: float | None = 0.05
    starts: int = 8
    first: int = 8
    fresh: int = 8
    tuning: LineTuning = field(default_factory=LineTuning, repr=False)
    needs: ClassVar[frozenset[Need]] = frozenset({"gradient", "unconditioned"})

    def __post_init__(self) -> None:
        check_precision(self.precision)
        check_least(self, starts=2, first=4, fresh=6)

    @property
    def name(self) -> str:
        return "line sampling"

    def run(self, event: EventLike, *, budget: int, seed: np.random.SeedSequence) -> Run:
        """Find design points, then sample lines.

        The ledger has the first- and second-order estimates (heuristic), then line sampling's own.
        """
        check_needs(self, event)
        meter = Meter(event, budget)
        try:
            ledger = _Campaign(self, meter, generator(seed)).run()
        except UndefinedError as error:  # lines go further out than draws do; what follows them may not need that
            note = Note(Code.UNDEFINED, f"lines reached a point where {error}.")
            ledger = [Evidence.nothing(self.name, note, calls=meter.calls, seconds=meter.seconds)]
        return Run(tuple(ledger), meter.calls)


class _Values(NamedTuple):
    """What each fresh line of a mode says of its probability, relative to the scale; their standard deviation, at least
    what is known of it; and an error that all have in common.
    """

    values: Floats
    spread: float
    error: float


@dataclass
class _Campaign:
    """One run: modes, rounds of lines, and the verdict."""

    method: LineSampling
    meter: Meter
    rng: np.random.Generator
    spent: int = 0
    audited: int = 0
    demanded: int = 0
    late: bool = False

    def __post_init__(self) -> None:
        self.modes = self._no_modes()

    def _no_modes(self) -> Modes:
        return Modes(self.meter, self.rng, self.method.first, self.method.tuning)

    def run(self) -> list[Evidence]:
        few = self.meter.event.dim <= self.method.tuning.few
        calls = min(self.meter.left // 2, self.method.tuning.search_calls)
        search = Search(self.meter, calls=calls, each=4 if few else 8, tuning=self.method.tuning)
        search.by_kinds(self.rng.spawn(1)[0])
        starts = (5 * self.method.starts) // 8 if few else self.method.starts
        if not search.run(self.rng, starts, self.method.tuning.most_starts):
            return [self._nothing(Code.NO_BOUNDARY, "gradients lead to no boundary of the event.")]
        points = self._look_around(search)
        around = points.origin >= 0.0 or _endless(points, self.method.tuning)
        # where starts went astray lines will not conclude, and draws lead walks no further than starts do
        hopeless = search.astray and self.meter.event.dim > self.method.tuning.covered
        draws = min(self.method.tuning.explored, int(self.method.tuning.explored_share * self.meter.left))
        if not (around or hopeless) and search.explore(self.rng.spawn(1)[0], draws):
            points = self._look_around(search)
            around = points.origin >= 0.0 or _endless(points, self.method.tuning)
        ledger = [self._heuristic("design points (FORM)", points.log_form)]
        if not around:
            points = self._explore(search, points)
            around = _endless(points, self.method.tuning)
        if around:
            self._surround(points)
        failure = self._scaled()
        if failure is not None:
            return [*ledger, failure]
        models = self.modes.models()
        if any(model is not None for model in models):
            second = diagnostics.log_sum_exp(np.array([m.proposal.log_mean for m in models if m is not None]))
            ledger.append(self._heuristic("curved design points (SORM)", min(second, 0.0)))
        models = self._measure(models, around)
        while self._within(search) if around else self._search_on(search):
            around = False
            if self.meter.left < self._lined(search):
                points, self.late = search.points(), True  # too late to draw lines through it: it counts as unmet
                break
            self.modes = self._no_modes()  # lines share the event out between the modes that were known when drawn
            self.audited = self.demanded = 0
            points = self._explore(search, search.points())
            failure = self._scaled()
            if failure is not None:
                return [*ledger, failure]
            models = self._measure(self.modes.models(), around)
        outside = math.inf if around else self._outside(search, models)
        return [*ledger, self._conclude(points, search, models, outside)]

    def _scaled(self) -> Evidence | None:
        """Set the scale of all values by the first lines of every mode; what to say where they do not allow that."""
        if not all(mode.rounds for mode in self.modes):
            sentence = f"the budget is too small for lines through {len(self.modes)} modes: raise it."
            return self._nothing(Code.FEW_COUNT, sentence)
        self.modes.scale = max(self.modes.learnt(k) for k in range(len(self.modes)))
        if not math.isfinite(self.modes.scale):
            return self._nothing(Code.NO_HITS, "no line through the design points meets the event.")
        return None

    def _measure(self, models: list[Model | None], around: bool) -> list[Model | None]:
        """Fresh lines, in rounds, until they are precise and stand their audit; the models that they ended with."""
        lessons, taught, tuning = 0, 0, self.method.tuning
        counts = self._first_counts(models)
        for _ in range(tuning.rounds):
            for k, count in enumerate(counts):
                self.modes.measure(k, models[k], count)
            chosen = self._all_chosen()
            if self._precise(chosen) and self._audit(models):
                break
            counts = self._further_counts(chosen)
            if not sum(counts):
                size = self.method.first << lessons
                enough = lessons == tuning.lessons or taught > tuning.lesson_calls
                if around or enough or self.meter.left < 12 * size * len(self.modes):
                    break
                lessons += 1
                before = self.meter.calls
                self.modes.relearn(models, size)
                taught += self.meter.calls - before
                counts = self._further_counts(self._all_chosen())
            models = self.modes.models()
        return models

    # --- finding modes ---------------------------------------------------------------------------------------------

    def _look_around(self, search: Search) -> DesignPoints:
        """Design points, after points far out have been asked for more of them (unless there is no end of them)."""
        quiet = 0
        for _ in range(self.method.tuning.looks):
            points = search.points()
            if _endless(points, self.method.tuning) or quiet == 2:
                break
            quiet = 0 if search.look_around(self.rng, self.method.tuning.around) else quiet + 1
        return search.points()

    def _search_on(self, search: Search) -> bool:
        """Search for modes until that has cost as much as the lines have; whether one turned up that counts.

        To measure known modes precisely is worth no more than to know that there are no others.
        """
        owed = int(self.method.tuning.searched * self._lined(search)) - search.spent
        return owed > 0 and search.go_on(self.rng, min(owed, self.meter.left // 2))

    def _within(self, search: Search) -> bool:
        """Whether rays that agree pass a mode by: catastrophes a little within the shell that they know lead to it."""
        mean, _ = self._spread(chosen := self._all_chosen())
        n = min(self.method.tuning.rays_within, self.meter.left // 2)
        if search.origin >= 0.0 or not self._precise(chosen) or not n:
            return False
        log_prob = self.modes.scale + math.log(mean)
        z = self.rng.standard_normal((n, self.meter.event.dim))
        z /= np.linalg.norm(z, axis=1, keepdims=True)
        z *= Chi(self.meter.event.dim).isf(np.array([min(log_prob + self.method.tuning.within, -1e-6)]))
        early = z[self.meter.evaluate(z).severity >= 0.0]
        return len(early) > 0 and search.go_from(early[: self.method.tuning.suspects], log_prob)

    def _lined(self, search: Search) -> int:
        """Calls that lines have cost."""
        return self.meter.calls - search.spent - search.explored

    def _surround(self, points: DesignPoints) -> None:
        """Rays from the origin instead of modes."""
        beta, law = float(np.median(np.abs(points.beta))), Chi(self.meter.event.dim)
        self.modes.surround(
            Mode(None, beta, float(np.median(points.slope)), law, self.method.tuning, rough=points.origin >= 0.0)
        )

    def _explore(self, search: Search, points: DesignPoints) -> DesignPoints:
        """First lines through every mode; where their gradients lead to further modes, these too."""
        for attempt in range(self.method.tuning.looks):
            self.modes.adopt(points)
            for k in range(len(self.modes)):
                if not self.modes.members[k].rounds:
                    self.modes.learn(k)
            if not all(mode.rounds for mode in self.modes):  # the budget has no lines for them
                break
            suspects = self.modes.suspects()
            last = attempt == self.method.tuning.looks - 1 or len(self.modes) > self.method.tuning.most_modes
            if last or not len(suspects) or not search.start_from(suspects):
                break
            before, points = len(points.beta), search.points()
            if len(points.beta) == before:
                break
        return points

    # --- estimates -------------------------------------------------------------------------------------------------

    def _chosen(self, k: int) -> _Values:
        """Values of the fresh lines of a mode: those with the smaller variance.

        Few lines may agree by chance. How much lines from the proposal should vary is known from the model.
        """
        plain, varied, error = self.modes.values(k, learning=False)
        models = [r.model.proposal for r in self.modes.members[k].rounds if r.model is not None and not r.learning]
        expected = max((m.spread * math.exp(m.log_mean - self.modes.scale) for m in models), default=0.0)
        if not len(plain):
            return _Values(plain, 0.0, 0.0)
        spread = max(float(np.std(plain)), expected)
        own = float(np.std(varied))
        if own**2 + error**2 * len(varied) < 0.7 * spread**2:
            return _Values(varied, own, error)
        return _Values(plain, spread, 0.0)

    def _all_chosen(self) -> list[_Values]:
        return [self._chosen(k) for k in range(len(self.modes))]

    def _spread(self, chosen: list[_Values]) -> tuple[float, float]:
        """The estimate relative to the scale, and its standard error."""
        mean = sum(float(np.mean(c.values)) for c in chosen if len(c.values))
        square = sum(c.spread**2 / max(len(c.values) - 1, 1) + c.error**2 for c in chosen if len(c.values))
        return mean, math.sqrt(square)

    @property
    def _fewest(self) -> int:
        """Fresh lines that a mode needs in any case."""
        return self.method.tuning.least if self.modes.few else self.method.tuning.sparse

    def _least(self, chosen: list[_Values]) -> Floats:
        """Fresh lines that each mode needs: more where its model is poor, since few may then miss what matters."""
        means = np.array([np.sum(c.values) / max(len(c.values), 1) for c in chosen])
        share = means / max(float(means.sum()), 1e-300)
        poor = np.array([self.modes.misfit(k) > self.method.tuning.poor for k in range(len(self.modes))])
        many = np.where(poor, self.method.tuning.many * np.sqrt(np.maximum(share, 0.0)), 0.0)
        return np.maximum(np.maximum(many, np.ceil(self.demanded * share)), self._fewest)

    def _precise(self, chosen: list[_Values]) -> bool:
        mean, error = self._spread(chosen)
        done = np.array([len(c.values) for c in chosen])
        precision = self.method.precision
        if precision is None or not mean > 0.0 or np.any(done < self._least(chosen)):
            return False
        # the error of few lines may be small by chance: its upper confidence limit counts
        dof = max(int(done.sum()) - len(done), 1)
        return error * math.sqrt(dof / float(chdtri(dof, 0.8))) <= precision * mean

    def _audit(self, models: list[Model | None]) -> bool:
        """Whether points in what lines claim are catastrophes; where some are not, so many more lines have to say so.

        Lines that agree leave room for a share of about 3 in their number of others that do not (rule of three).
        """
        total = sum(len(c.values) for c in self._all_chosen())
        if self.method.precision is not None and not self.audited and not self.demanded:
            wanted = math.ceil(self.method.tuning.audited / self.method.precision) - total
            z = self.modes.claimed(models, max(0, min(wanted, self.meter.left // 2)))
            missed = int(np.count_nonzero(self.meter.evaluate(z).severity < 0.0)) if len(z) else 0
            if not missed:
                self.audited = len(z)
            else:
                share = missed / len(z)
                self.demanded = math.ceil(1.5 * share / max(1.0 - share, 0.1) / self.method.precision**2)
        return total >= self.demanded

    def _outside(self, search: Search, models: list[Model | None]) -> float:
        """Distance from the origin of the nearest catastrophe seen that no mode explains; inf without any."""
        nearest = math.inf
        search.floor = 0  # what it was given may be spent, and this is worth it
        suspects = np.array(search.suspects)[:16] if search.suspects else np.empty((0, self.meter.event.dim))
        for z in suspects[~self.modes.explained(suspects, models)][: self.method.tuning.suspects]:
            near = search.nearer(z)
            if not self.modes.explained(near[None], models)[0]:
                nearest = min(nearest, float(np.linalg.norm(near)))
        return nearest

    def _blocks(self, search: Search) -> list[np.ndarray]:
        """Coordinates that a limit may be on together: all, those of a site, those that gradients depend on."""
        dim = self.meter.event.dim
        if dim <= self.method.tuning.covered or any(mode.direction is None for mode in self.modes):
            return []
        masks = [np.ones(dim, dtype=bool), *getattr(self.meter.event, "blocks", ()), *search.supports]
        blocks = {mask.tobytes(): np.flatnonzero(mask) for mask in masks if mask.sum() > self.method.tuning.covered}
        return list(blocks.values())[: self.method.tuning.blocks]

    def _first_counts(self, models: list[Model | None]) -> list[int]:
        """Fresh lines for each mode, shared out by what the models say of the modes."""
        sums = np.array([self.modes.learnt(k) if m is None else m.proposal.log_mean for k, m in enumerate(models)])
        if not self.modes.few:  # two lines may say far too much, and would take all there is for their mode
            first = np.array([mode.law.log_sf(np.array([mode.beta]))[0] for mode in self.modes])
            sums = np.minimum(sums, first + self.method.tuning.trusted)
        share = np.exp(sums - diagnostics.log_sum_exp(sums))
        bends = any(m is not None and m.proposal.spread > 0.0 for m in models)
        lines = self.method.fresh * 0.5 * (1 + len(models)) * (self.method.tuning.curved if bends else 1.0)
        return [max(self._fewest, round(lines * part)) for part in share.tolist()]

    def _further_counts(self, chosen: list[_Values]) -> list[int]:
        """Fresh lines for each mode to reach the precision; zeros where the calls that are left do not suffice."""
        mean, _ = self._spread(chosen)
        spread, done = np.array([c.spread for c in chosen]), np.array([len(c.values) for c in chosen])
        if not mean > 0.0 or not (np.sum(spread) > 0.0 or self.demanded):
            return [0 for _ in chosen]
        aim = (self.method.precision or 1e-9) * mean * 0.9
        wanted = 1.1 * np.sum(spread) * spread / aim**2
        more = np.maximum(0.0, np.maximum(wanted, self._least(chosen)) - done)
        if not np.any(more > 0.0):  # nearly there: what is missing is certainty of the error itself
            more[int(np.argmax(spread))] = self._fewest
        more = np.where(more > 0.0, np.maximum(more, self._fewest), 0.0)
        afford = self.meter.left / (max(self.modes.price, 2.0) * max(float(more.sum()), 1.0))
        if afford < 1.0 and self.method.precision is not None:
            return [0 for _ in chosen]
        capped = np.minimum(more * min(1.0, 0.9 * afford), np.maximum(3 * done, 2 * self.method.fresh))
        return [int(count) for count in np.ceil(capped)]

    # --- evidence --------------------------------------------------------------------------------------------------

    def _calls(self) -> int:
        """Calls since the last evidence."""
        calls, self.spent = self.meter.calls - self.spent, self.meter.calls
        return calls

    def _heuristic(self, name: str, log_prob: float) -> Evidence:
        return Evidence(
            method=name,
            log_prob=log_prob,
            std_error=math.inf,
            interval=(-math.inf, 0.0),
            claim="heuristic",
            calls=self._calls(),
            seconds=self.meter.seconds,
            converged=False,
            diagnostics={"modes": float(len(self.modes))},
        )

    def _nothing(self, code: Code, sentence: str) -> Evidence:
        note = Note(code, sentence)
        return Evidence.nothing(self.method.name, note, calls=self._calls(), seconds=self.meter.seconds)

    def _conclude(self, points: DesignPoints, search: Search, models: list[Model | None], outside: float) -> Evidence:
        chosen = self._all_chosen()
        total = sum(len(c.values) for c in chosen)
        mean, _ = self._spread(chosen)
        if not mean > 0.0 or any(len(c.values) < self._fewest for c in chosen):
            sentence = "too few lines met the event: its boundary is too rough, or the budget too small."
            return self._nothing(Code.FEW_COUNT, sentence)
        # deviations as if all lines were one sample: their mean square over n - 1 is the stratified variance
        deviation = np.concatenate([_deviations(c) * (total / (len(c.values) * mean)) for c in chosen])
        sampled, _ = diagnostics.deviation_error(deviation)
        log_prob = self.modes.scale + math.log(mean)
        rounds = [r for mode in self.modes for r in mode.rounds if not r.learning]
        slip = float(np.mean(np.concatenate([r.crossings.slip for r in rounds])))
        unlooked = 1.0 / (total + self.audited)  # a share that as many lines and points cannot tell of
        shells = Shells(self.meter, self.modes, models, self.rng, self.method.tuning, log_prob)
        shells.look(self._blocks(search), 0.5 * (self.method.precision or 0.02))
        unmet = points.met_once if search.short or self.late or not self.modes.few else 0.0
        systematic = math.hypot(
            *(c.error / mean for c in chosen),
            slip,
            self.method.tuning.floor,
            0.5 * points.left_out,
            unlooked,
            unmet,
        )
        lower, upper = diagnostics.deviation_interval(log_prob, deviation) if sampled > 0.0 else (log_prob, log_prob)
        lower = log_prob - math.hypot(log_prob - lower, 1.96 * systematic)
        upper = log_prob + math.hypot(upper - log_prob, 1.96 * systematic)
        # shells add to what lines say
        whole, rough = 1.0 + shells.share, shells.share if shells.unmeasured else 0.0
        sides = [side / whole for side in (log_prob - lower, upper - log_prob)]
        below, above = (math.hypot(side, 1.96 * shells.error / whole) for side in sides)
        error = _in_nats(math.hypot(sampled, systematic, shells.error, rough) / whole)
        notes = self._complaints(error, deviation, log_prob, search)
        if float(log_ndtr(-outside)) > log_prob + math.log(self.method.tuning.weighty):
            sentence = (
                f"a catastrophe at {outside:.1f} standard deviations lies outside of what lines found; use tempering."
            )
            notes = (*notes, Note(Code.UNSEEN, sentence))
        if shells.unmeasured:
            sentence = "catastrophes that are far out in many directions at once hold a part of P: raise the budget."
            notes = (*notes, Note(Code.UNSEEN, sentence))
        elif shells.unasked:
            sentence = "no calls were left to ask what lies far out in many directions at once: raise the budget."
            notes = (*notes, Note(Code.BUDGET_SPENT, sentence))
        log_prob += math.log(whole)
        top = log_prob + above if not (shells.unmeasured or shells.unasked) else 0.0
        return Evidence(
            method=self.method.name,
            log_prob=min(log_prob, 0.0),
            std_error=error,
            interval=(log_prob - below, min(top, 0.0)),
            claim="consistent",
            calls=self._calls(),
            seconds=self.meter.seconds,
            converged=not notes,
            particles=joined(self.modes.particles(), shells.particles()),
            diagnostics={
                "modes": float(len(self.modes)),
                "lines": float(total),
                "starts": float(search.begun),
                "strayed": float(search.lost),
                "audited": float(self.audited),
                "unmet": unmet,
                "beyond": shells.share / whole,
                "form": points.log_form,
                "largest": float(np.max(np.abs(deviation))) / total,
            },
            notes=notes,
        )

    def _complaints(self, error: float, deviation: Floats, log_prob: float, search: Search) -> tuple[Note, ...]:
        notes = [*imprecise(error, wanted_error(self.method.precision))]
        largest = float(np.max(np.abs(deviation))) / len(deviation)
        if largest > 0.25:
            sentence = "a single line carries much of the estimate: use tempering, or raise the budget."
            notes.append(Note(Code.ONE_CARRIES, sentence))
        if not self.modes.complete:
            notes.append(Note(Code.BUDGET_SPENT, "the budget ran out while lines were looked at: raise it."))
        if search.astray:
            sentence = "most gradient walks found no boundary: modes may have been missed; use tempering."
            notes.append(Note(Code.STRAYED, sentence))
        if search.summits > self.method.tuning.most_summits * search.climbs:
            sentence = (
                "climbing from severe draws mostly ends below the limit: modes may have been missed; use tempering."
            )
            notes.append(Note(Code.UNSEEN, sentence))
        learnt = [self.modes.values(k, learning=True)[0] for k in range(len(self.modes))]
        first = sum(float(np.mean(values)) for values in learnt)
        spread = math.sqrt(sum(float(np.var(values)) / max(len(values) - 1, 1) for values in learnt))
        now = math.exp(log_prob - self.modes.scale)
        if abs(first - now) > 4.0 * math.hypot(spread, error * now) + 0.2 * now:
            sentence = "first and fresh lines disagree: a few lines carry the estimate; use tempering."
            notes.append(Note(Code.DISAGREE, sentence))
        return tuple(notes)


def _endless(points: DesignPoints, tuning: LineTuning) -> bool:
    """Whether there are more modes than directions could serve: as good as every start found its own."""
    single = int(np.sum(points.starts == 1))
    alone = single >= 5 and single >= 0.7 * int(np.sum(points.starts))
    return len(points.beta) > tuning.most_modes or (alone and (points.around or single >= tuning.alone))


def _in_nats(share: float) -> float:
    """An error of P, as a share of it, as one of log P: the same up to 1, and beyond by its logarithm."""
    return share if share <= 1.0 else 1.0 + math.log(share)


def _deviations(chosen: _Values) -> Floats:
    """Deviations from the mean, stretched where more spread is known than they show."""
    deviation = chosen.values - np.mean(chosen.values)
    shown = float(np.std(chosen.values))
    if shown >= 0.5 * chosen.spread:
        return np.asarray(deviation * (chosen.spread / shown if shown > 0.0 else 1.0))
    sign = np.where(np.arange(len(deviation)) % 2 == 0, 1.0, -1.0)
    return np.asarray(sign * chosen.spread)
