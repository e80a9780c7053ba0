r"""Tempering: walk a population from the adversary to the catastrophes, and multiply the shares that survive.

With φ the standard normal density of z, w the weight of observed sites and g a softened event, the population follows

.. math:: \pi_t(z) \propto \varphi(z)\, w(z)^{\kappa_t}\, g_t(s(z)),

first κ from 0 to 1 (a conditioned adversary's own evidence), then g from 1 to the event. g is logistic in the *index*
of the severity (:mod:`probest.smc.softening`), a scale on which severities are standard normal; so each step
has a known length, and choosing it by the very particles that it weighs, which makes estimates low, is left to
the few steps at the edge. Weights are averaged (their product estimates the evidence), the population is resampled and
moved. Moves are reversible for φ, so their cost does not grow with the dimension (:mod:`probest.smc.moves`).
The population is as large as the budget allows for the levels that are still ahead.

The population is drawn in islands, and every particle keeps the name of the island its first ancestor came from.
All particles compete in one resampling (islands that never exchanged particles would each have to find every mode
by themselves, and the mean of their estimates would hang on the luckiest). The share that each island's family has
in the end, relative to its fair share, is an estimate of P by itself; the spread of these is an honest standard error
(Chan & Lai 2013; Lee & Whiteley 2018): where few families are left, moves did not forget their ancestors, and the error
is large.

It fails when catastrophes lie where no particle climbs (a plateau, a mode hidden behind a valley): a mode that
no particle finds is missing from the estimate *and* from its error. Compare with crude Monte Carlo where P is
not too small, and with fresh importance samples elsewhere.

References: Del Moral, Doucet & Jasra (2006), Sequential Monte Carlo samplers; Cotter, Roberts, Stuart & White
(2013), MCMC methods for functions; Papaioannou, Papadimitriou & Straub (2016), Sequential importance sampling
for structural reliability; Zhou, Johansen & Aston (2016) for the conditional ESS; Chan & Lai (2013), A general theory
of particle filters; Lee & Whiteley (2018), Variance estimation in the particle filter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from enum import IntEnum

import numpy as np

from probest import diagnostics
from probest.budget import FORWARD_CALLS, GRADIENT_CALLS, Meter
from probest.evidence import Code, EventLike, Evidence, Families, Floats, Note, Particles, Population, Run
from probest.seeds import child_seed, generator
from probest.smc.families import combine, complaints
from probest.smc.moves import (
    adapted,
    climb,
    ensure_gradient,
    fit_moves,
    guided_sweep,
    probe,
    rank_correlation,
    refresh,
    walk,
)
from probest.smc.population import State, interleave, is_flat, minus, reweight, slow, total
from probest.smc.scouts import scouts_from, search
from probest.smc.softening import EVENT, Index, Tilt, learn_index
from probest.smc.transition import sketched_sweep
from probest.smc.tuning import TemperingTuning
from probest.surrogates.student import Sketch, Student
from probest.surrogates.watched import Watched

__all__ = ["Tempering"]

_LOG2 = math.log(2.0)


class Stream(IntEnum):
    """Names of the seeds of a run, beside its own."""

    SCOUTS = 0


@dataclass(frozen=True)
class Tempering:
    """Sequential Monte Carlo from the adversary to the event.

    particles: size of the population, over all islands (the first levels take more).
    islands: groups of first particles; the spread of what their families come to gives the standard error.
    target: share of the effective sample size that one step may leave (conditional ESS).
    max_moves: at most this many moves of every particle a level.
    decorrelation: moves stop once the severities' rank correlation with the level's start is below this.
    gradient: use the severity's gradient in moves where the event has one.
    guided: try independent moves from a mixture fitted to the population first.
    tuning: the constants that decide the rest.
    warm_start: particles of an earlier run, of this problem or of one that changed a little. They only say where moves
        may jump to (:mod:`probest.smc.scouts`) and never enter the estimate, which means what it means without.
    student: it proposes moves (:mod:`probest.smc.transition`), and the estimate means what it means without. Where the
        event is watched (:class:`probest.surrogates.watched.Watched`) it learns on the way. For adversaries that are
        not conditioned, and severities with a gradient.
    """

    particles: int = 512
    islands: int = 16
    target: float = 0.75
    max_moves: int = 8
    decorrelation: float = 0.5
    gradient: bool = True
    guided: bool = True
    tuning: TemperingTuning = field(default_factory=TemperingTuning, repr=False)
    warm_start: Particles | None = field(default=None, repr=False, compare=False)
    student: Student | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.islands < 2:
            raise ValueError(f"islands must be at least 2 (their spread is the standard error), got {self.islands}")
        if self.particles < 4 * self.islands:
            raise ValueError(f"particles must be at least 4 an island, got {self.particles} for {self.islands} islands")
        if not 0.0 < self.target < 1.0:
            raise ValueError(f"target must be between 0 and 1, got {self.target}")
        if self.max_moves < 1:
            raise ValueError(f"max_moves must be at least 1, got {self.max_moves}")

    def _check_student(self, event: EventLike) -> None:
        if self.student is None:
            return
        if event.weighted:
            raise ValueError("student: what it proposes does not know of observations; temper without it")
        if self.student.known is not None and len(self.student.known.basis) != event.dim:
            sizes = f"{len(self.student.known.basis)} coordinates, the problem has {event.dim}"
            raise ValueError(f"student is of another adversary: it was taught {sizes}; give a new Student()")

    @property
    def name(self) -> str:
        return "tempering"

    def run(self, event: EventLike, *, budget: int, seed: np.random.SeedSequence) -> Run:
        """Temper until the particles are catastrophes or the budget is spent; with the populations, if they are.

        Raises ValueError if ``warm_start`` or ``student`` belongs to another adversary, or a student is given for one
        that is conditioned.
        """
        meter = Meter(event, budget)
        self._check_student(event)
        rng = generator(seed)
        if meter.budget < 4 * self.islands:
            sentence = (
                f"a budget of {budget} calls is too small for {self.islands} islands: give at least some thousands."
            )
            return _report(self, meter, None, None, 0, Note(Code.BUDGET_SPENT, sentence))
        state, drawn = _init(self, meter, rng)
        if self.warm_start is not None:
            if self.warm_start.z.shape[1] != event.dim:
                sizes = f"{self.warm_start.z.shape[1]} coordinates, the problem has {event.dim}"
                raise ValueError(f"warm_start is of another adversary: its particles have {sizes}; start without it")
            state.places = scouts_from(self.warm_start, generator(child_seed(seed, Stream.SCOUTS)), self.tuning)
        elif self.gradient and self.guided and event.differentiable and not event.weighted:
            state.places = search(meter, generator(child_seed(seed, Stream.SCOUTS)), self.tuning)
        prior: State | None = None
        gradient = self.gradient and event.differentiable
        failure = _condition(state, self, meter, rng, gradient) if event.weighted else None
        if failure is None:
            if event.weighted:
                prior = replace(
                    state,
                    z=state.z.copy(),
                    severity=state.severity.copy(),
                    log_weight=state.log_weight.copy(),
                    log_z=state.log_z.copy(),
                )
            failure = _climb_to_event(state, self, meter, rng, gradient)
        if failure is not None:
            return _report(self, meter, state, prior, drawn, failure)
        _move_level(state, self, meter, rng, gradient, meter.left)
        if not gradient and event.differentiable:
            state.rows = None  # gradients say more than a regression
        probe(state, meter, event.differentiable, 128)
        return _report(self, meter, state, prior, drawn, None)


def _condition(state: State, method: Tempering, meter: Meter, rng: np.random.Generator, gradient: bool) -> Note | None:
    """Bring in the weight of the observed sites; says what went wrong, or nothing."""
    tuning = method.tuning
    while state.power < 1.0:
        n = len(state.z)
        keep = _affordable(state, method, meter, 2.0 * tuning.conditioning)
        equal = np.zeros(n)
        power = diagnostics.next_temperature(
            equal,
            lambda x: (x - state.power) * state.log_weight,
            easy=state.power,
            hard=1.0,
            target=_share(method, method.target, keep, n),
        )
        if not reweight(state, method.islands, rng, keep, power, state.soft):
            return Note(
                Code.INCOMPATIBLE, "no particle is compatible with the observed sites: check them, or raise the budget."
            )
        if not _move_level(state, method, meter, rng, gradient, meter.left / (2.0 * tuning.conditioning)):
            return Note(
                Code.BUDGET_SPENT,
                "the budget ran out while conditioning the adversary on its observed sites: raise it.",
            )
    return None


def _climb_to_event(
    state: State, method: Tempering, meter: Meter, rng: np.random.Generator, gradient: bool
) -> Note | None:
    """Harden the softened event until it is the event; says what went wrong, or nothing."""
    tuning = method.tuning
    index: Index | None = None
    before = state.conditioned = total(state)
    while True:
        n = len(state.z)
        log_w = total(state) - before - math.log(n) - state.soft.log(state.severity)
        # a softening that was chosen by the particles that it weighs would favour low estimates: it lags a level
        learnt = learn_index(index, state.severity, log_w)
        index = learnt if index is None else index
        if index is None and not np.any(state.severity >= 0.0):
            return Note(
                Code.FLAT,
                "the severity is the same at every particle, so nothing says where catastrophes are: return how far "
                "from the limit a run is, or use crude sampling with a larger budget.",
            )
        target = _hurried(state, method, meter, index)
        levels = _levels_left(state, index, target)
        keep = _affordable(state, method, meter, levels)
        soft = _next_softening(state, index, _share(method, target, keep, n))
        if not reweight(state, method.islands, rng, keep, state.power, soft):
            return Note(
                Code.UNREACHED,
                "the population died out before it reached a catastrophe: raise the budget or the particles.",
            )
        if total(state) - before < tuning.floor or state.levels >= tuning.max_levels:
            return Note(
                Code.UNREACHED,
                "the severity approaches its limit without reaching it: a catastrophe may be impossible, "
                "or hidden where the severity does not lead.",
            )
        if soft is EVENT:
            return None
        index = learnt
        if not _move_level(state, method, meter, rng, gradient, tuning.sized_for * meter.left / max(1.0, levels - 1.0)):
            return Note(
                Code.BUDGET_SPENT,
                "the budget ran out before the particles were catastrophes: raise it (or lower particles).",
            )


def _levels_left(state: State, index: Index | None, target: float) -> float:
    """How many levels the event is away, if the index is right: tilts of a normal law, and a few for its edge."""
    if index is None:
        return 1.0
    distance = index.reach(0.0) - float(np.median(np.maximum(index(state.severity), -40.0)))
    return float(state.tuning.edge + max(0.0, distance) / math.sqrt(-math.log(target)))


def _affordable(state: State, method: Tempering, meter: Meter, levels: float) -> int:
    """The population for so many more levels: what was asked for, or as many as the budget allows."""
    most = int(method.tuning.sized_for * meter.left / (levels * min(state.cost, 4.0)))
    return min(len(state.z), max(4 * method.islands, min(method.particles, most)))


def _hurried(state: State, method: Tempering, meter: Meter, index: Index | None) -> float:
    """The conditional ESS of a step: the method's, or less where not even the smallest population affords it."""
    tuning = method.tuning
    most = tuning.sized_for * meter.left / (4 * method.islands * max(1.0, min(state.cost, 2.0)))
    levels = _levels_left(state, index, method.target)
    if levels <= max(most, tuning.edge + 1.0):
        return method.target
    longer = (levels - tuning.edge) / max(most - tuning.edge, 1.0)
    return float(max(tuning.hastiest, method.target ** (longer**2)))


def _share(method: Tempering, target: float, keep: int, n: int) -> float:
    """The conditional ESS to step to: a population that shrinks anyway may step further."""
    return max(method.tuning.hastiest, min(target, keep / n))


def _init(method: Tempering, meter: Meter, rng: np.random.Generator) -> tuple[State, int]:
    """Draw the population; more of it where most severities are equal (boolean checkers, plateaus)."""
    k, tuning = method.islands, method.tuning
    most = min(tuning.first_wide * method.particles, max(method.particles, tuning.most_numbers // meter.event.dim))
    each = max(2, int(min(most, tuning.first_share * meter.budget)) // k)
    z = rng.standard_normal((k * each, meter.event.dim))
    first = meter.evaluate(z)
    severity, log_weight = first.severity, first.log_weight
    drawn = len(z)
    log_z = np.zeros(k)
    if not meter.event.weighted:
        # a severity that says nothing at most draws is searched by brute force: up to half of the budget
        while is_flat(severity, 4 * k) and drawn < meter.budget // 2:
            more = min(drawn // k, (meter.budget // 2 - drawn) // k)
            if more < 1:
                break
            extra = rng.standard_normal((k * more, meter.event.dim))
            result = meter.evaluate(extra)
            z = interleave(z, extra, k)
            severity = interleave(severity, result.severity, k)
            log_weight = interleave(log_weight, result.log_weight, k)
            drawn += k * more
            if z.size > tuning.most_numbers:
                break
    hits = int(np.count_nonzero(severity >= 0.0))
    size = float(k * each)
    state = State(z, severity, log_weight, None, None, log_z, size=size, first_hits=hits, tuning=tuning)
    state.record()
    return state, drawn


def _next_softening(state: State, index: Index | None, target: float) -> Tilt:
    """The hardest tilt whose conditional ESS is the target; the event itself when it is within reach."""
    equal = np.zeros(len(state.severity))
    now = state.soft.log(state.severity)
    within = diagnostics.conditional_ess(equal, minus(EVENT.log(state.severity), now)) >= target
    if within or index is None:
        return EVENT
    assert isinstance(state.soft, Tilt)

    def share(tilt: Tilt) -> float:
        return diagnostics.conditional_ess(equal, minus(tilt.log(state.severity), now))

    # where an index that has been learnt anew stands now: its slope may differ from what was extended before
    rate, known = state.soft.rate, state.soft.index
    if known is not None:
        rates = rate * np.geomspace(0.25, 4.0, 33)
        shares = [share(Tilt(float(x), index)) for x in rates]
        rate = float(rates[int(np.argmax(shares))])
        if max(shares) < target:
            rate, index = state.soft.rate, known
    step = rate + math.sqrt(-math.log(target))
    if step < float(index(np.zeros(1))[0]):
        # severities are normal on the index: the step is known, and only a bad index is corrected
        least, hard = 0.5 * target, step
    else:
        least, hard = target, 4.0 * rate + 8.0
    rate = diagnostics.next_temperature(
        equal,
        lambda x: minus(Tilt(x, index).log(state.severity), now),
        easy=max(rate, 1e-6),
        hard=hard,
        target=least,
    )
    return Tilt(rate, index)


def _move_level(
    state: State, method: Tempering, meter: Meter, rng: np.random.Generator, gradient: bool, allowance: float
) -> bool:
    """Move until severities are decorrelated from the level's start, or ``allowance`` calls are spent.

    False when the budget did not allow one move.
    """
    calls = meter.calls
    n = len(state.z)
    done = _move(state, method, meter, rng, gradient, allowance)
    state.cost = 0.5 * state.cost + 0.5 * (meter.calls - calls) / n
    state.record()
    return done


def _move(
    state: State, method: Tempering, meter: Meter, rng: np.random.Generator, gradient: bool, allowance: float
) -> bool:
    start, tuning = slow(state).copy(), method.tuning
    n = len(state.z)
    most = meter.calls + min(allowance, meter.left)
    sketch = None if method.student is None or state.rest > 0 else _sketch(state, method.student, meter, rng)
    if sketch is not None:
        done = _move_by_sketch(state, method, sketch, meter, rng, most)
        if done is not None:
            state.correlation = rank_correlation(start, slow(state))
            return done
    elif method.guided and state.rest == 0:
        probe(state, meter, gradient, int(np.clip(n // 12, 6, 64)))
        laws = fit_moves(state, rng)
        unmoved = 1.0
        while unmoved > tuning.unmoved:
            if meter.left < n:
                return unmoved < 1.0
            if unmoved < 1.0 and meter.calls + n > most:
                return True
            # a mode that the laws lack would be stuck, and die out: some of the particles take a local step
            local = rng.random(n) < tuning.walkers
            acceptance = guided_sweep(state, meter, rng, laws, np.flatnonzero(~local))
            walked = walk(state, meter, rng, state.walk_angle, np.flatnonzero(local))
            state.walk_angle = adapted(state.walk_angle, walked, tuning.accept_walk)
            state.moves += 1
            state.acceptance = acceptance
            unmoved *= 1.0 - (1.0 - tuning.walkers) * acceptance
            factor = 1.2 if acceptance > 0.35 else 0.7 if acceptance < 0.2 else 1.0
            state.side_angle = min(1.5, factor * state.side_angle)
            if acceptance < tuning.refused:
                state.rest = tuning.resting
                break
        state.correlation = rank_correlation(start, slow(state))
        if unmoved <= tuning.unmoved and state.correlation <= max(method.decorrelation, tuning.mixed):
            return True
        if unmoved <= tuning.unmoved:  # accepted, but only since it moved little in all other directions
            state.rest = tuning.resting
    state.rest = max(0, state.rest - 1)
    if gradient:
        for _ in range(min(method.max_moves, int(0.5 * (most - meter.calls) / n))):
            state.acceptance = refresh(state, meter, rng)
            state.moves += 1
        state.correlation = rank_correlation(start, slow(state))
    gradient = ensure_gradient(state, meter, gradient)
    cost = n * (GRADIENT_CALLS if gradient else FORWARD_CALLS)
    aim = tuning.accept_climb if gradient else tuning.accept_walk
    for i in range(method.max_moves if gradient else 2 * method.max_moves):
        if meter.left < cost:
            return i > 0
        if i > 0 and meter.calls + cost > most:
            break
        if not gradient and i % 2 == 0:
            state.acceptance = refresh(state, meter, rng)
        else:
            step = climb if gradient else walk
            state.acceptance = step(state, meter, rng, state.angle)
            state.angle = adapted(state.angle, state.acceptance, aim, gain=1.5)
        state.moves += 1
        state.correlation = rank_correlation(start, slow(state))
        if i > 0 and state.correlation <= method.decorrelation and state.acceptance > 0.15:
            break
    return True


def _sketch(state: State, student: Student, meter: Meter, rng: np.random.Generator) -> Sketch | None:
    """What the student knows, after a lesson where it has still to learn and the event is watched; None for nothing."""
    tuning, watched = state.tuning, meter.event
    if isinstance(watched, Watched) and not student.proven:
        n = len(state.z)
        count = min(n, tuning.lesson)
        if meter.left > 8 * n + GRADIENT_CALLS * count:
            at = np.linspace(0, n - 1, count).astype(np.intp)
            meter.evaluate(state.z[at].astype(np.float64, copy=False), gradient=True)
        student.teach(watched.cases(), rng, tuning.lesson_share)
    return student.sketch


def _move_by_sketch(
    state: State, method: Tempering, sketch: Sketch, meter: Meter, rng: np.random.Generator, most: float
) -> bool | None:
    """Moves that a student proposes, and local steps of some particles; None where few of its proposals are accepted.

    False when the budget did not allow one move.
    """
    n, tuning, unmoved = len(state.z), method.tuning, 1.0
    while unmoved > tuning.unmoved:
        if meter.left < n or (unmoved < 1.0 and meter.calls + n > most):
            return unmoved < 1.0
        local = rng.random(n) < tuning.walkers
        acceptance = sketched_sweep(state, meter, rng, sketch, np.flatnonzero(~local), tuning.sketched)
        walked = walk(state, meter, rng, state.walk_angle, np.flatnonzero(local))
        state.walk_angle = adapted(state.walk_angle, walked, tuning.accept_walk)
        state.moves += 1
        state.acceptance = acceptance
        unmoved *= 1.0 - (1.0 - tuning.walkers) * acceptance
        if acceptance < tuning.refused:
            state.rest = tuning.resting
            return None
    return True


def _population(state: State) -> Population:
    equal = np.zeros(len(state.z))
    # resampled particles are related: count them as half
    return Population(state.z, equal, state.log_weight, state.rows, diagnostics.effective_sample_size(equal) / 2.0)


def _report(
    method: Tempering, meter: Meter, state: State | None, prior: State | None, drawn: int, failure: Note | None
) -> Run:
    """What a run leaves that reached the event, or says in ``failure`` why not.

    Without a population of catastrophes only the first draws bound P without an assumption (exact binomial). A
    softening is at least ½ on the event, so P ≤ 2 E[g(s)] too; that bound trusts the population: a diagnostic only.
    """
    info: dict[str, float] = {}
    log_prob, error, interval = -math.inf, math.inf, (-math.inf, 0.0)
    notes: tuple[Note, ...] = () if failure is None else (failure,)
    population: Population | None = None
    families: Families | None = None
    particles = prior_particles = None
    if state is not None:
        info = {"levels": float(state.levels), "moves": float(state.moves), "acceptance": state.acceptance}
        families = Families(state.log_z, None if prior is None else prior.log_z, state.size)
        verdict = combine([families])
        if failure is not None:
            if drawn and not meter.event.weighted:
                interval = (-math.inf, diagnostics.binomial_interval(state.first_hits, drawn)[1])
            if state.started:
                info["soft_upper"] = verdict.log_prob + _LOG2
        else:
            log_prob, error, interval = min(verdict.log_prob, 0.0), verdict.error, verdict.interval
            info |= {"correlation": state.correlation, "island_ess": verdict.effective}
            notes = complaints(verdict)
            if any(note.code is Code.FEW_ANCESTORS for note in notes) and drawn and not meter.event.weighted:
                # so few ancestors may all be in a small mode: nothing but plain draws bounds P from above
                upper = diagnostics.binomial_interval(state.first_hits, drawn)[1]
                interval = (interval[0], max(interval[1], upper))
            if state.correlation > method.tuning.stuck:
                sentence = "the particles hardly move inside the event: raise max_moves or the budget."
                notes = (*notes, Note(Code.STUCK, sentence))
            population = _population(state)
            particles = _equal(state.z, state.severity)
            prior_particles = None if prior is None else _equal(prior.z, prior.severity)
    evidence = Evidence(
        method=method.name,
        log_prob=log_prob,
        std_error=error,
        interval=interval,
        claim="consistent" if failure is None else "upper",
        calls=meter.calls,
        seconds=meter.seconds,
        converged=not notes,
        particles=particles,
        prior_particles=prior_particles,
        log_evidence=0.0 if prior is None else diagnostics.log_mean_exp(prior.log_z)[0],
        diagnostics=info,
        notes=notes,
        levels=() if state is None else tuple(state.path),
    )
    return Run.of(
        evidence,
        population=population,
        prior_population=None if prior is None else _population(prior),
        families=families if failure is None else None,
    )


def _equal(z: Floats, severity: Floats) -> Particles:
    return Particles(z.astype(np.float64, copy=False), np.full(len(z), -math.log(len(z))), severity)
