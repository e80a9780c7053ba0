r"""Tempering: walk a population from the adversary to the catastrophes, and multiply the shares that survive.

The event is softened by noise of size σ on the severity. With φ the standard normal density of z, w the weight
of observed sites and Φ the normal distribution function, the population follows

.. math:: \pi_t(z) \propto \varphi(z)\, w(z)^{\lambda_t}\, \Phi(s(z) / \sigma_t),

first λ from 0 to 1 (a conditioned adversary's own evidence), then σ from ∞ to 0, where what is left is the
event. Each step is as long as the conditional effective sample size allows; weights are averaged (their
product estimates the evidence), the population is resampled and moved. Moves are preconditioned Crank–Nicolson
Langevin, reversible for φ, so their cost does not grow with the dimension; without a useful gradient they are
plain pCN. Between them a few coordinates at a time are drawn afresh, which crosses what lies between modes. Step sizes
follow the acceptance; moves repeat until severities are decorrelated. The first draws are several times as many as the
particles, and the population shrinks by halves: where modes part, many draws are worth more than many moves.

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
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from probest import diagnostics
from probest.estimators.base import (
    FORWARD_CALLS,
    GRADIENT_CALLS,
    EventLike,
    Evidence,
    Floats,
    Meter,
    Particles,
    generator,
)
from probest.estimators.families import Families, combine, complaints
from probest.estimators.moves import (
    State,
    ensure_gradient,
    fit_moves,
    guided_sweep,
    log_target,
    move,
    probe,
    rank_correlation,
    refresh,
    slow,
    soft,
    total,
)

__all__ = ["Prior", "State", "Tempering", "families_of", "temper"]

_MAX_LEVELS = 300
_FLOOR = -2000.0  # log P below which the event counts as impossible
_LEVEL_SHARE = 0.18  # of what is left of the budget, at most, for one level's local moves
_WIDE = 8  # times as many first draws as particles, where the budget is large enough
_LOG2 = math.log(2.0)


class Prior(NamedTuple):
    """What is kept of a conditioned adversary on the way: its particles and each island's log-evidence."""

    z: Floats
    severity: Floats
    log_weight: Floats
    rows: Floats | None
    log_z: Floats


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
    """

    particles: int = 512
    islands: int = 16
    target: float = 0.5
    max_moves: int = 8
    decorrelation: float = 0.5
    gradient: bool = True
    guided: bool = True

    def __post_init__(self) -> None:
        if self.islands < 2:
            raise ValueError(f"islands must be at least 2 (their spread is the standard error), got {self.islands}")
        if self.particles < 4 * self.islands:
            raise ValueError(f"particles must be at least 4 an island, got {self.particles} for {self.islands} islands")
        if not 0.0 < self.target < 1.0:
            raise ValueError(f"target must be between 0 and 1, got {self.target}")
        if self.max_moves < 1:
            raise ValueError(f"max_moves must be at least 1, got {self.max_moves}")

    @property
    def name(self) -> str:
        return "tempering"

    def run(self, event: EventLike, *, budget: int, seed: np.random.SeedSequence) -> Evidence:
        """Temper until the particles are catastrophes or the budget is spent."""
        return temper(self, event, budget=budget, seed=seed)[0]


def temper(
    method: Tempering, event: EventLike, *, budget: int, seed: np.random.SeedSequence
) -> tuple[Evidence, State | None, Prior | None]:
    """As :meth:`Tempering.run`, with the final population (None when it is not in the event) and its gradients."""
    meter = Meter(event, budget)
    rng = generator(seed)
    if meter.budget < 4 * method.islands:
        note = f"a budget of {budget} calls is too small for {method.islands} islands: give at least some thousands."
        return _unfinished(method, meter, None, None, 0, note), None, None
    state, drawn = _init(method, meter, rng)
    prior: Prior | None = None
    gradient = method.gradient and event.differentiable
    if event.weighted:
        while state.power < 1.0:
            power = _next_power(state, method.target)
            if not _reweight(state, power, 0.0, rng, method):
                note = "no particle is compatible with the observed sites: check them, or raise the budget."
                return _unfinished(method, meter, state, None, drawn, note), None, None
            if not _move_level(state, method, meter, rng, gradient):
                note = "the budget ran out while conditioning the adversary on its observed sites: raise it."
                return _unfinished(method, meter, state, None, drawn, note), None, None
        prior = Prior(
            state.z.copy(),
            state.severity.copy(),
            state.log_weight.copy(),
            state.rows,
            state.log_z.copy(),
        )
    while True:
        noise = _next_noise(state, method.target)
        if noise is None:
            note = (
                "the severity is the same at every particle, so nothing says where catastrophes are: return how far "
                "from the limit a run is, or use crude sampling with a larger budget."
            )
            return _unfinished(method, meter, state, prior, drawn, note), None, prior
        if not _reweight(state, 1.0, noise, rng, method):
            note = "the population died out before it reached a catastrophe: raise the budget or the particles."
            return _unfinished(method, meter, state, prior, drawn, note), None, prior
        if total(state) < _FLOOR or state.levels >= _MAX_LEVELS:
            note = (
                "the severity approaches its limit without reaching it: a catastrophe may be impossible, "
                "or hidden where the severity does not lead."
            )
            return _unfinished(method, meter, state, prior, drawn, note), None, prior
        if math.isinf(noise):
            break
        if not _move_level(state, method, meter, rng, gradient):
            note = "the budget ran out before the particles were catastrophes: raise it (or lower particles)."
            return _unfinished(method, meter, state, prior, drawn, note), None, prior
    _move_level(state, method, meter, rng, gradient)
    probe(state, meter, gradient, 128)
    return _finished(method, meter, state, prior), state, prior


def _init(method: Tempering, meter: Meter, rng: np.random.Generator) -> tuple[State, int]:
    """Draw the population; more of it where most severities are equal (boolean checkers, plateaus)."""
    k = method.islands
    each = min(method.particles // k, meter.budget // (2 * k) or 1)
    wide = int(min(_WIDE, 0.12 * meter.budget / (each * k)))
    each *= max(1, wide)
    z = rng.standard_normal((k * each, meter.event.dim))
    first = meter.evaluate(z)
    severity, log_weight = first.severity, first.log_weight
    drawn = len(z)
    log_z = np.zeros(k)
    if not meter.event.weighted:
        # a severity that says nothing at most draws is searched by brute force: up to half of the budget
        while _flat(severity, 4 * k) and drawn < meter.budget // 2:
            more = min(drawn // k, (meter.budget // 2 - drawn) // k)
            if more < 1:
                break
            extra = rng.standard_normal((k * more, meter.event.dim))
            result = meter.evaluate(extra)
            z = _interleave(z, extra, k)
            severity = _interleave(severity, result.severity, k)
            log_weight = _interleave(log_weight, result.log_weight, k)
            drawn += k * more
            if len(z) * meter.event.dim > 60_000_000:
                break
    hits = int(np.count_nonzero(severity >= 0.0))
    return State(z, severity, log_weight, None, None, log_z, first_hits=hits), drawn


def _flat(severity: Floats, least: int) -> bool:
    """Whether fewer than ``least`` draws rise above the lowest severity: too few to climb from."""
    low = severity.min()
    return bool(np.count_nonzero(severity > low + 1e-12 * (1.0 + abs(low))) < least)


def _interleave(old: Floats, new: Floats, k: int) -> Floats:
    """Append ``new`` to ``old`` island by island."""
    shape = old.shape[1:]
    joined = np.concatenate([old.reshape(k, -1, *shape), new.reshape(k, -1, *shape)], axis=1)
    return joined.reshape(-1, *shape)


def _minus(a: Floats, b: Floats) -> Floats:
    """a − b with −inf where a is −inf (b is finite wherever a particle survived)."""
    out = np.full_like(a, -np.inf)
    np.subtract(a, b, out=out, where=a > -np.inf)
    return out


def _next_power(state: State, target: float) -> float:
    equal = np.zeros(len(state.severity))
    return diagnostics.next_temperature(
        equal, lambda x: (x - state.power) * state.log_weight, easy=state.power, hard=1.0, target=target
    )


def _next_noise(state: State, target: float) -> float | None:
    """The next 1/σ: inf when the event itself is within reach, None when severities say nothing."""
    equal = np.zeros(len(state.severity))
    now = soft(state.severity, state.inverse_noise)
    if diagnostics.conditional_ess(equal, _minus(soft(state.severity, math.inf), now)) >= target:
        return math.inf
    finite = state.severity[np.isfinite(state.severity)]
    flat = finite.size == 0 or np.ptp(finite) <= 1e-12 * np.abs(finite).max()
    if flat and (finite.size == len(state.severity) or not np.any(state.severity >= 0.0)):
        return None
    largest = float(np.abs(finite).max()) if finite.size else 1.0
    start = state.inverse_noise or 1e-4 / max(largest, 1e-300)
    log_noise = diagnostics.next_temperature(
        equal,
        lambda x: _minus(soft(state.severity, math.exp(x)), now),
        easy=math.log(start),
        hard=math.log(start) + 40.0,
        target=target,
    )
    return math.exp(log_noise) if log_noise < math.log(start) + 39.9 else math.inf


def _reweight(state: State, power: float, noise: float, rng: np.random.Generator, method: Tempering) -> bool:
    """Weigh by the new target, resample, and count each family's share of the evidence. False when all died."""
    new = log_target(state.severity, state.log_weight, power, noise)
    old = log_target(state.severity, state.log_weight, state.power, state.inverse_noise)
    increment = _minus(new, old)
    k = method.islands
    each = len(increment) // k
    # the first levels decide which modes there are, and moves are cheap there: the population shrinks by halves
    keep = k * min(each, max(method.particles // k, each // 2))
    gain = diagnostics.log_mean_exp(increment)[0]
    if not math.isfinite(gain):
        return False
    if math.isfinite(noise):
        state.drift_noise = noise
    family = np.repeat(np.arange(k), each) if state.family is None else state.family
    overall = total(state) + gain
    index = diagnostics.systematic_resample(increment, keep, rng)
    for name in ("z", "severity_grad", "weight_grad"):
        value = getattr(state, name)
        if value is None:
            continue
        if keep < len(increment):
            setattr(state, name, value[index])
        else:
            value[:] = value[index]
    state.severity = state.severity[index]
    state.log_weight = state.log_weight[index]
    state.family = family[index]
    with np.errstate(divide="ignore"):
        state.log_z = overall + np.log(np.bincount(state.family, minlength=k) * (k / keep))
    state.power, state.inverse_noise = power, noise
    state.levels += 1
    return True


def _move_level(state: State, method: Tempering, meter: Meter, rng: np.random.Generator, gradient: bool) -> bool:
    """Move until severities are decorrelated from the level's start. False when the budget did not allow one move."""
    start = slow(state).copy()
    if method.guided and state.rest == 0:
        probe(state, meter, gradient, 64)
        laws = fit_moves(state, rng)
        unmoved = 1.0
        while unmoved > 0.35:
            if meter.left < len(state.z):
                return unmoved < 1.0
            acceptance = guided_sweep(state, meter, rng, laws)
            state.severity_grad = state.weight_grad = None
            state.moves += 1
            state.acceptance = acceptance
            unmoved *= 1.0 - acceptance
            factor = 1.2 if acceptance > 0.35 else 0.7 if acceptance < 0.2 else 1.0
            state.side_angle = min(1.5, factor * state.side_angle)
            if acceptance < 0.12:
                state.rest = 2
                break
        state.correlation = rank_correlation(start, slow(state))
        if unmoved <= 0.35 and state.correlation <= max(method.decorrelation, 0.6):
            # a mode that the mixture lacks would be stuck, and die out: one small step for everyone
            if meter.left >= len(state.z):
                walked = move(state, meter, rng, False, state.walk_angle)
                state.walk_angle = float(np.clip(state.walk_angle * math.exp(2.0 * (walked - 0.35)), 1e-4, 1.4))
                state.moves += 1
            return True
        if unmoved <= 0.35:  # accepted, but only since it moved little in all other directions
            state.rest = 2
    state.rest = max(0, state.rest - 1)
    n = len(state.z)
    if gradient:
        most = min(method.max_moves, int(0.5 * _LEVEL_SHARE * meter.left / n))
        for _ in range(most):
            state.acceptance = refresh(state, meter, rng)
            state.moves += 1
        state.correlation = rank_correlation(start, slow(state))
    gradient = ensure_gradient(state, meter, gradient)
    cost = n * (GRADIENT_CALLS if gradient else FORWARD_CALLS)
    aim = 0.55 if gradient else 0.35
    most = method.max_moves if gradient else 2 * method.max_moves
    # where the budget is short, fewer moves a level: a run that ends without reaching the event says nothing
    most = min(most, max(1, int(_LEVEL_SHARE * meter.left / cost)))
    for i in range(most):
        if meter.left < cost:
            return i > 0
        if not gradient and i % 2 == 0:
            state.acceptance = refresh(state, meter, rng)
        else:
            state.acceptance = move(state, meter, rng, gradient, state.angle)
            state.angle = float(np.clip(state.angle * math.exp(1.5 * (state.acceptance - aim)), 1e-4, 1.4))
        state.moves += 1
        state.correlation = rank_correlation(start, slow(state))
        if i > 0 and state.correlation <= method.decorrelation and state.acceptance > 0.15:
            break
    return True


def families_of(state: State, prior: Prior | None) -> Families:
    """What each family of a finished run says of P."""
    return Families(state.log_z, None if prior is None else prior.log_z, float(len(state.z)))


def _finished(method: Tempering, meter: Meter, state: State, prior: Prior | None) -> Evidence:
    verdict = combine([families_of(state, prior)])
    n = len(state.z)
    notes = list(complaints(verdict))
    if state.correlation > 0.9:
        notes.append("the particles hardly move inside the event: raise max_moves or the budget.")
    converged = not notes
    particles = Particles(state.z, np.full(n, -math.log(n)), state.severity)
    prior_particles = None
    if prior is not None:
        prior_particles = Particles(prior.z, np.full(len(prior.z), -math.log(len(prior.z))), prior.severity)
    return Evidence(
        method=method.name,
        log_prob=min(verdict.log_prob, 0.0),
        std_error=verdict.error,
        interval=verdict.interval,
        claim="consistent",
        calls=meter.calls,
        seconds=meter.seconds,
        converged=converged,
        particles=particles,
        prior_particles=prior_particles,
        log_evidence=0.0 if prior is None else diagnostics.log_mean_exp(prior.log_z)[0],
        diagnostics={
            "levels": float(state.levels),
            "moves": float(state.moves),
            "acceptance": state.acceptance,
            "correlation": state.correlation,
            "island_ess": verdict.effective,
        },
        notes=tuple(notes),
    )


def _unfinished(
    method: Tempering, meter: Meter, state: State | None, prior: Prior | None, drawn: int, note: str
) -> Evidence:
    """No population of catastrophes: only the first draws bound P without an assumption (exact binomial).

    On the event Φ(s/σ) ≥ ½, so P ≤ 2 E[Φ(s/σ)] too; that bound trusts the population, and is a diagnostic only.
    """
    upper = 0.0
    log_evidence = 0.0
    info: dict[str, float] = {}
    if state is not None:
        if drawn and not meter.event.weighted:
            upper = diagnostics.binomial_interval(state.first_hits, drawn)[1]
        if 0.0 < state.inverse_noise < math.inf:
            info["soft_upper"] = combine([families_of(state, prior)]).log_prob + _LOG2
        if prior is not None:
            log_evidence = diagnostics.log_mean_exp(prior.log_z)[0]
        info |= {"levels": float(state.levels), "moves": float(state.moves), "acceptance": state.acceptance}
    return Evidence(
        method=method.name,
        log_prob=-math.inf,
        std_error=math.inf,
        interval=(-math.inf, upper),
        claim="upper",
        calls=meter.calls,
        seconds=meter.seconds,
        converged=False,
        log_evidence=log_evidence,
        diagnostics=info,
        notes=(note,),
    )
