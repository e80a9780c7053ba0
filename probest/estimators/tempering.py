r"""Tempering: walk a population from the adversary to the catastrophes, and multiply the shares that survive.

The event is softened by noise of size σ on the severity. With φ the standard normal density of z, w the weight
of observed sites and Φ the normal distribution function, the population follows

.. math:: \pi_t(z) \propto \varphi(z)\, w(z)^{\lambda_t}\, \Phi(s(z) / \sigma_t),

first λ from 0 to 1 (a conditioned adversary's own evidence), then σ from ∞ to 0, where what is left is the
event. Each step is as long as the conditional effective sample size allows; weights are averaged (their
product estimates the evidence), the population is resampled and moved. Moves are preconditioned Crank–Nicolson
Langevin, reversible for φ, so their cost does not grow with the dimension; without a useful gradient they are
plain pCN. Step sizes follow the acceptance; moves repeat until severities are decorrelated.

The population is split into islands that never exchange particles and share only the schedule and the step
size, so the spread of their estimates is an honest standard error (jackknife, Student t).

It fails when catastrophes lie where no particle climbs (a plateau, a mode hidden behind a valley): a mode that
no island finds is missing from the estimate *and* from its error. Compare with crude Monte Carlo where P is
not too small, and with fresh importance samples elsewhere.

References: Del Moral, Doucet & Jasra (2006), Sequential Monte Carlo samplers; Cotter, Roberts, Stuart & White
(2013), MCMC methods for functions; Papaioannou, Papadimitriou & Straub (2016), Sequential importance sampling
for structural reliability; Zhou, Johansen & Aston (2016) for the conditional ESS.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

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
from probest.guides.mixture import Mixture, fit_mixture, gradient_rows, informed_basis

__all__ = ["State", "Tempering", "temper"]

_BLOCK = 1_000_000  # numbers alive at once in each temporary of a move
_MAX_LEVELS = 300
_FLOOR = -2000.0  # log P below which the event counts as impossible
_LOG2 = math.log(2.0)


@dataclass
class State:
    """The population: equal weights inside an island, ``log_z`` the running log-evidence of each island.

    z ``(n, dim)``; gradients ``(n, dim)`` or None (not known now); rows: gradient information for a subspace;
    ``inverse_noise`` = 1/σ, 0 at the start and inf in the event; rest: levels until guided moves are tried again.
    """

    z: Floats
    severity: Floats
    log_weight: Floats
    severity_grad: Floats | None
    weight_grad: Floats | None
    log_z: Floats
    power: float = 0.0
    inverse_noise: float = 0.0
    drift_noise: float = 0.0
    angle: float = 1.0
    side_angle: float = 1.2
    walk_angle: float = 1.0
    rows: Floats | None = None
    rest: int = 0
    first_hits: int = 0
    levels: int = 0
    moves: int = 0
    acceptance: float = 1.0
    correlation: float = 0.0


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

    particles: size of the population, over all islands.
    islands: independent groups; their spread gives the standard error.
    target: share of the effective sample size that one step may leave (conditional ESS).
    max_moves: at most this many moves of every particle a level.
    decorrelation: moves stop once the severities' rank correlation with the level's start is below this.
    gradient: use the severity's gradient in moves where the event has one.
    guided: try independent moves from a mixture fitted to the population first.
    """

    particles: int = 512
    islands: int = 8
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
        if _total(state) < _FLOOR or state.levels >= _MAX_LEVELS:
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
    _probe(state, meter, gradient, 128)
    return _finished(method, meter, state, prior), state, prior


def _init(method: Tempering, meter: Meter, rng: np.random.Generator) -> tuple[State, int]:
    """Draw the population; more of it where most severities are equal (boolean checkers, plateaus)."""
    k = method.islands
    each = min(method.particles // k, meter.budget // (2 * k) or 1)
    z = rng.standard_normal((k * each, meter.event.dim))
    first = meter.evaluate(z)
    severity, log_weight = first.severity, first.log_weight
    drawn = len(z)
    log_z = np.zeros(k)
    if not meter.event.weighted:
        # a severity that says nothing at most draws is searched by brute force: up to half of the budget
        while _mostly_equal(severity) and drawn < meter.budget // 2:
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


def _mostly_equal(severity: Floats) -> bool:
    low = severity.min()
    return bool(np.count_nonzero(severity > low + 1e-12 * (1.0 + abs(low))) < 0.05 * len(severity))


def _interleave(old: Floats, new: Floats, k: int) -> Floats:
    """Append ``new`` to ``old`` island by island."""
    shape = old.shape[1:]
    joined = np.concatenate([old.reshape(k, -1, *shape), new.reshape(k, -1, *shape)], axis=1)
    return joined.reshape(-1, *shape)


def _soft(severity: Floats, inverse_noise: float) -> Floats:
    """log Φ(s/σ): 0 at σ = ∞ (the constant ½ is left out) and the indicator at σ = 0."""
    if inverse_noise == 0.0:
        return np.zeros_like(severity)
    if math.isinf(inverse_noise):
        return np.where(severity >= 0.0, 0.0, -np.inf)
    return np.asarray(special.log_ndtr(inverse_noise * severity), dtype=np.float64)


def _log_target(severity: Floats, log_weight: Floats, power: float, inverse_noise: float) -> Floats:
    soft = _soft(severity, inverse_noise)
    return soft + power * log_weight if power > 0.0 else soft


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
    now = _soft(state.severity, state.inverse_noise)
    if diagnostics.conditional_ess(equal, _minus(_soft(state.severity, math.inf), now)) >= target:
        return math.inf
    finite = state.severity[np.isfinite(state.severity)]
    if finite.size == 0 or np.ptp(finite) <= 1e-12 * np.abs(finite).max():
        if finite.size == len(state.severity) or not np.any(state.severity >= 0.0):
            return None
    largest = float(np.abs(finite).max()) if finite.size else 1.0
    start = state.inverse_noise or 1e-4 / max(largest, 1e-300)
    log_noise = diagnostics.next_temperature(
        equal,
        lambda x: _minus(_soft(state.severity, math.exp(x)), now),
        easy=math.log(start),
        hard=math.log(start) + 40.0,
        target=target,
    )
    return math.exp(log_noise) if log_noise < math.log(start) + 39.9 else math.inf


def _reweight(state: State, power: float, noise: float, rng: np.random.Generator, method: Tempering) -> bool:
    """Weigh by the new target, update each island's evidence, resample inside islands. False when all died."""
    new = _log_target(state.severity, state.log_weight, power, noise)
    old = _log_target(state.severity, state.log_weight, state.power, state.inverse_noise)
    increment = _minus(new, old)
    k = method.islands
    each = len(increment) // k
    keep = min(each, method.particles // k)
    log_z = np.array([diagnostics.log_sum_exp(part) for part in increment.reshape(k, each)]) - math.log(each)
    if not np.any(np.isfinite(log_z + state.log_z)):
        return False
    if math.isfinite(noise):
        state.drift_noise = noise
    shrink = keep < each
    pick: list[NDArray[np.intp]] = []
    for i in range(k):
        part = increment[i * each : (i + 1) * each]
        if math.isfinite(log_z[i]):
            pick.append(i * each + diagnostics.systematic_resample(part, keep, rng))
        else:  # a dead island: its particles stay, with weight zero from here on
            pick.append(i * each + np.arange(keep))
    state.log_z = state.log_z + log_z
    for name in ("z", "severity_grad", "weight_grad"):
        value = getattr(state, name)
        if value is None:
            continue
        if shrink:
            setattr(state, name, value[np.concatenate(pick)])
        else:
            for i in range(k):  # island by island, so that no second copy of the population is alive
                value[i * each : (i + 1) * each] = value[pick[i]]
    index = np.concatenate(pick)
    state.severity = state.severity[index]
    state.log_weight = state.log_weight[index]
    state.power, state.inverse_noise = power, noise
    state.levels += 1
    return True


def _total(state: State) -> float:
    return diagnostics.log_sum_exp(state.log_z) - math.log(len(state.log_z))


def _ensure_gradient(state: State, meter: Meter, gradient: bool) -> bool:
    """Evaluate gradients where there are none yet; False when they are absent, NaN or zero at most particles."""
    if not gradient:
        state.severity_grad = state.weight_grad = None
        return False
    n, dim = state.z.shape
    if state.severity_grad is None:
        if meter.left < 4 * GRADIENT_CALLS * n:
            return False
        _, first, inverse = np.unique(state.z[:, 0], return_index=True, return_inverse=True)
        result = meter.evaluate(state.z[first], gradient=True)
        if result.severity_grad is None:
            return False
        state.severity_grad = result.severity_grad[inverse]
        if result.log_weight_grad is not None:
            state.weight_grad = result.log_weight_grad[inverse]
    if state.inverse_noise == 0.0 and state.weight_grad is not None:
        return bool(np.isfinite(state.weight_grad).all(axis=1).mean() > 0.5)
    norm = np.linalg.norm(state.severity_grad, axis=1)
    useful = bool(np.mean(np.isfinite(norm) & (norm > 0.0)) > 0.5)
    if not useful:
        state.severity_grad = state.weight_grad = None
    return useful


def _drift(
    state: State, severity: Floats, grad: Floats, weight_grad: Floats | None, cap: float
) -> Floats:
    """Gradient of the log-target without φ, its length capped: a function of the point alone, so moves stay exact."""
    tau = state.drift_noise
    with np.errstate(all="ignore"):
        mills = tau * math.sqrt(2.0 / math.pi) / special.erfcx(-tau * severity / math.sqrt(2.0))
        drift = grad * np.where(np.isfinite(mills), mills, 0.0)[:, None]
        if weight_grad is not None and state.power > 0.0:
            drift += state.power * weight_grad
        norm = np.linalg.norm(drift, axis=1)
        scale = np.where(np.isfinite(norm), np.minimum(1.0, cap / np.maximum(norm, 1e-300)), 0.0)
    drift *= scale[:, None]
    drift[~np.isfinite(norm)] = 0.0
    return drift


def _move(state: State, meter: Meter, rng: np.random.Generator, gradient: bool, typical: float) -> float:
    """One move of every particle, in blocks of rows; returns the mean acceptance probability."""
    n, dim = state.z.shape
    cap = 1.5 * (math.sqrt(max(0.0, -2.0 * _total(state))) + 1.0)
    rows = max(1, _BLOCK // dim)
    accepted = 0.0
    for start in range(0, n, rows):
        at = slice(start, min(start + rows, n))
        z = state.z[at]
        m = len(z)
        angle = np.minimum(typical * (0.5 + rng.random(m)), 0.5 * math.pi)
        noise = rng.standard_normal((m, dim))
        log_u = np.log(rng.random(m))
        rho, sigma = np.cos(angle), np.sin(angle)
        noise *= sigma[:, None]
        proposal = noise
        if gradient:
            assert state.severity_grad is not None
            gw = None if state.weight_grad is None else state.weight_grad[at]
            drift = _drift(state, state.severity[at], state.severity_grad[at], gw, cap)
            proposal = noise + (1.0 - rho)[:, None] * drift
        proposal += rho[:, None] * z
        result = meter.evaluate(proposal, gradient=gradient)
        log_ratio = _log_target(result.severity, result.log_weight, state.power, state.inverse_noise)
        before = _log_target(state.severity[at], state.log_weight[at], state.power, state.inverse_noise)
        log_ratio -= np.where(before > -np.inf, before, 0.0)  # -inf only in a dead island, where nothing matters
        if gradient:
            assert result.severity_grad is not None
            back = _drift(state, result.severity, result.severity_grad, result.log_weight_grad, cap)
            # log of q(z | z') / q(z' | z) relative to plain pCN, whose ratio is φ(z)/φ(z')
            share = (1.0 - rho) / sigma**2
            ahead = np.einsum("ij,ij->i", drift, proposal) - rho * np.einsum("ij,ij->i", drift, z)
            behind = np.einsum("ij,ij->i", back, z) - rho * np.einsum("ij,ij->i", back, proposal)
            half = 0.5 * (1.0 - rho)
            log_ratio += share * (behind - half * np.einsum("ij,ij->i", back, back))
            log_ratio -= share * (ahead - half * np.einsum("ij,ij->i", drift, drift))
        log_ratio = np.where(np.isnan(log_ratio), -np.inf, log_ratio)
        accepted += float(np.sum(np.exp(np.minimum(log_ratio, 0.0))))
        taken = np.flatnonzero(log_u < log_ratio)
        rows_taken = taken + start
        state.z[rows_taken] = proposal[taken]
        state.severity[rows_taken] = result.severity[taken]
        state.log_weight[rows_taken] = result.log_weight[taken]
        if gradient and state.severity_grad is not None and result.severity_grad is not None:
            state.severity_grad[rows_taken] = result.severity_grad[taken]
            if state.weight_grad is not None and result.log_weight_grad is not None:
                state.weight_grad[rows_taken] = result.log_weight_grad[taken]
    return accepted / n


def _probe(state: State, meter: Meter, gradient: bool, count: int) -> None:
    """Renew the gradient information, from at most ``count`` evenly spaced particles where none is at hand."""
    n = len(state.z)
    if not gradient:
        state.rows = None
        if state.inverse_noise > 0.0 and not meter.event.weighted and not meter.event.boolean:
            state.rows = _regression_rows(state)
        return
    grad, weight_grad = state.severity_grad, state.weight_grad
    at = np.arange(n)
    if grad is None or n > 2000:
        at = np.linspace(0, n - 1, min(n, count if grad is None else 2000)).astype(np.intp)
    if grad is None:
        if meter.left < GRADIENT_CALLS * len(at) + 2 * n:
            return
        result = meter.evaluate(state.z[at], gradient=True)
        grad, weight_grad = result.severity_grad, result.log_weight_grad
    else:
        grad, weight_grad = grad[at], None if weight_grad is None else weight_grad[at]
    if state.inverse_noise == 0.0:
        grad = None
    state.rows = gradient_rows(state.z[at], np.zeros(len(at)), grad, weight_grad)


def _regression_rows(state: State) -> Floats | None:
    """Without gradients: the direction of a linear regression of the severity, if it predicts held-out particles."""
    n, dim = state.z.shape
    at = np.linspace(0, n - 1, min(n, 4000)).astype(np.intp)
    at = at[np.isfinite(state.severity[at])]
    middle = len(at) // 2
    if middle < 1.2 * dim + 8 or dim <= 2:
        return None
    s = state.severity[at]
    slopes = []
    for train, test in ((at[:middle], at[middle:]), (at[middle:], at[:middle])):
        centre, level = state.z[train].mean(axis=0), state.severity[train].mean()
        slope = np.linalg.lstsq(state.z[train] - centre, state.severity[train] - level, rcond=1e-6)[0]
        residual = state.severity[test] - level - (state.z[test] - centre) @ slope
        if not float(np.var(residual)) < 0.3 * float(np.var(s)):
            return None
        slopes.append(slope / max(float(np.linalg.norm(slope)), 1e-300))
    directions = np.array(slopes)
    reach = np.maximum(1.0, np.abs((state.z[at] @ directions.T).mean(axis=0)))
    return directions * (reach / math.sqrt(2.0))[:, None]


def _fit_moves(state: State, rng: np.random.Generator) -> tuple[Mixture, Mixture] | None:
    """Mixtures for independent moves, one from each half of the islands; None where no few directions matter.

    Each half is moved by the other half's mixture: a kernel fitted to the particles that it moves would be biased.
    """
    n, dim = state.z.shape
    if state.rows is None and dim > max(2, n // 40):
        return None  # directions found from moments alone would be noise
    fits = []
    middle = _middle(state)
    for low, high in ((0, middle), (middle, n)):
        at = np.linspace(low, high - 1, min(high - low, 2000)).astype(np.intp)
        z, equal = state.z[at], np.zeros(len(at))
        rows = state.rows if state.rows is None else state.rows[(at[0] * len(state.rows)) // n :][: len(state.rows) // 2]
        basis = informed_basis(z, equal, rows, threshold=0.07, rank=12)
        if rows is not None and dim > 8:
            caught = float(np.sum((rows @ basis) ** 2)) / max(float(np.sum(rows**2)), 1e-300)
            if caught < 0.5:
                return None
        fit = fit_mixture(z, equal, basis, rng, most=5, effective=0.6 * len(z), starts=1, steps=15)
        fits.append(fit.with_wide_tails(0.4, 2.0))
    return fits[1], fits[0]


def _middle(state: State) -> int:
    k = len(state.log_z)
    return (k // 2) * (len(state.z) // k)


def _guided_sweep(
    state: State, meter: Meter, rng: np.random.Generator, mixtures: tuple[Mixture, Mixture]
) -> float:
    """One move of every particle: independent in the mixture's subspace, pCN in all other directions. 1 call each.

    The mixture is relative to φ and pCN is reversible for φ, so the ratio is that of the targets times
    (φ/q)(z') / (φ/q)(z) in the subspace.
    """
    n, dim = state.z.shape
    rows = max(1, _BLOCK // dim)
    rho, sigma = math.cos(state.side_angle), math.sin(state.side_angle)
    accepted = 0.0
    middle = _middle(state)
    blocks = [(i, min(i + rows, middle), mixtures[0]) for i in range(0, middle, rows)]
    blocks += [(i, min(i + rows, n), mixtures[1]) for i in range(middle, n, rows)]
    for start, stop, mixture in blocks:
        at = slice(start, stop)
        z = state.z[at]
        inside = z @ mixture.basis
        u = mixture.sample_inside(len(z), rng)
        proposal = rng.standard_normal(z.shape)
        log_u = np.log(rng.random(len(z)))
        proposal *= sigma
        proposal += rho * z
        proposal += (u - proposal @ mixture.basis) @ mixture.basis.T
        result = meter.evaluate(proposal)
        log_ratio = _log_target(result.severity, result.log_weight, state.power, state.inverse_noise)
        before = _log_target(state.severity[at], state.log_weight[at], state.power, state.inverse_noise)
        log_ratio -= np.where(before > -np.inf, before, 0.0)
        log_ratio += mixture.log_density_ratio(u) - mixture.log_density_ratio(inside)
        log_ratio = np.where(np.isnan(log_ratio), -np.inf, log_ratio)
        accepted += float(np.sum(np.exp(np.minimum(log_ratio, 0.0))))
        taken = np.flatnonzero(log_u < log_ratio)
        state.z[taken + start] = proposal[taken]
        state.severity[taken + start] = result.severity[taken]
        state.log_weight[taken + start] = result.log_weight[taken]
    return accepted / n


def _move_level(state: State, method: Tempering, meter: Meter, rng: np.random.Generator, gradient: bool) -> bool:
    """Move until severities are decorrelated from the level's start. False when the budget did not allow one move."""
    start = _slow(state).copy()
    if method.guided and state.rest == 0:
        _probe(state, meter, gradient, 64)
        mixtures = _fit_moves(state, rng)
        if mixtures is None:
            state.rest = 3
        unmoved = 1.0
        while mixtures is not None and unmoved > 0.35:
            if meter.left < len(state.z):
                return unmoved < 1.0
            acceptance = _guided_sweep(state, meter, rng, mixtures)
            state.severity_grad = state.weight_grad = None
            state.moves += 1
            state.acceptance = acceptance
            unmoved *= 1.0 - acceptance
            factor = 1.2 if acceptance > 0.35 else 0.7 if acceptance < 0.2 else 1.0
            state.side_angle = min(1.5, factor * state.side_angle)
            if acceptance < 0.12:
                state.rest = 1
                break
        state.correlation = _rank_correlation(start, _slow(state))
        if unmoved <= 0.35:
            # a mode that the mixture lacks would be stuck, and die out: one small step for everyone
            if meter.left >= len(state.z):
                walked = _move(state, meter, rng, False, state.walk_angle)
                state.walk_angle = float(np.clip(state.walk_angle * math.exp(2.0 * (walked - 0.35)), 1e-4, 1.4))
                state.moves += 1
            return True
    state.rest = max(0, state.rest - 1)
    gradient = _ensure_gradient(state, meter, gradient)
    cost = len(state.z) * (GRADIENT_CALLS if gradient else FORWARD_CALLS)
    aim = 0.55 if gradient else 0.35
    most = method.max_moves if gradient else 2 * method.max_moves
    for i in range(most):
        if meter.left < cost:
            return i > 0
        state.acceptance = _move(state, meter, rng, gradient, state.angle)
        state.moves += 1
        state.angle = float(np.clip(state.angle * math.exp(1.5 * (state.acceptance - aim)), 1e-4, 1.4))
        state.correlation = _rank_correlation(start, _slow(state))
        if state.correlation <= method.decorrelation and state.acceptance > 0.15:
            break
    return True


def _slow(state: State) -> Floats:
    """What moves have to decorrelate: the severity, or the log-weight while conditioning."""
    return state.severity if state.inverse_noise > 0.0 else state.log_weight


def _rank_correlation(a: Floats, b: Floats) -> float:
    if np.ptp(a) == 0.0 or np.ptp(b) == 0.0 or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return 1.0 if np.array_equal(a, b) else 0.0
    return float(np.corrcoef(stats.rankdata(a), stats.rankdata(b))[0, 1])


def _combine(log_z: Floats, log_prior: Floats | None) -> tuple[float, float, float]:
    """log P from islands, its jackknife standard error, and the larger spread of the islands' own logs."""
    k = len(log_z)

    def value(mask: NDArray[np.bool_]) -> float:
        top = diagnostics.log_sum_exp(log_z[mask])
        below = diagnostics.log_sum_exp(log_prior[mask]) if log_prior is not None else math.log(mask.sum())
        return top - below

    everything = np.ones(k, dtype=np.bool_)
    estimate = value(everything)
    left_out = []
    for i in range(k):
        mask = everything.copy()
        mask[i] = False
        left_out.append(value(mask))
    left = np.array(left_out)
    if not np.isfinite(left).all():
        return estimate, math.inf, math.inf
    error = float(np.sqrt((k - 1) / k * np.sum((left - left.mean()) ** 2)))
    each = log_z - (0.0 if log_prior is None else log_prior)
    spread = float(np.std(each, ddof=1)) if np.isfinite(each).all() else math.inf
    return estimate, error, spread


def _finished(method: Tempering, meter: Meter, state: State, prior: Prior | None) -> Evidence:
    log_prior = None if prior is None else prior.log_z
    log_prob, error, spread = _combine(state.log_z, log_prior)
    k = method.islands
    each = len(state.z) // k
    weight = np.repeat(state.log_z, each)
    alive = np.isfinite(weight)
    dead = int(np.count_nonzero(~np.isfinite(state.log_z)))
    t = float(special.stdtrit(k - 1, 0.975))
    # logs of islands that spread widely mean that the mean hangs on a few of them: it errs low
    width = max(error, min(spread, 2.0) / math.sqrt(k))
    above = 0.5 * min(spread, 2.0) ** 2 / k * t if math.isfinite(spread) else 1.0
    interval = (-math.inf, 0.0)
    if math.isfinite(error):
        interval = (log_prob - t * width, min(0.0, log_prob + t * width + above))
    notes = []
    if dead:
        notes.append(f"{dead} of {k} islands found no catastrophe: raise the particles or the budget.")
    if state.correlation > 0.9:
        notes.append("the particles hardly move inside the event: raise max_moves or the budget.")
    converged = dead == 0 and width <= 0.5 and state.correlation <= 0.9
    if width > 0.5 and not dead:
        notes.append(f"the islands disagree (standard error {width:.2f}): raise the particles or the budget.")
    particles = Particles(
        state.z[alive], weight[alive] - diagnostics.log_sum_exp(weight[alive]), state.severity[alive]
    )
    prior_particles = None
    if prior is not None:
        prior_weight = np.repeat(prior.log_z, len(prior.z) // k)
        prior_weight = prior_weight - diagnostics.log_sum_exp(prior_weight)
        prior_particles = Particles(prior.z, prior_weight, prior.severity)
    return Evidence(
        method=method.name,
        log_prob=min(log_prob, 0.0),
        std_error=width,
        interval=interval,
        claim="consistent",
        calls=meter.calls,
        seconds=meter.seconds,
        converged=converged,
        particles=particles,
        prior_particles=prior_particles,
        log_evidence=0.0 if prior is None else diagnostics.log_sum_exp(prior.log_z) - math.log(k),
        diagnostics={
            "levels": float(state.levels),
            "moves": float(state.moves),
            "acceptance": state.acceptance,
            "correlation": state.correlation,
            "island_ess": diagnostics.effective_sample_size(state.log_z),
            "island_spread": spread,
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
            info["soft_upper"] = _combine(state.log_z, None if prior is None else prior.log_z)[0] + _LOG2
        if prior is not None:
            log_evidence = diagnostics.log_sum_exp(prior.log_z) - math.log(method.islands)
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
