r"""Moves of a population: what keeps a softened event's particles distributed as they should be.

Kernels, all exact for :math:`\pi \propto \varphi(z)\, w(z)^\kappa\, g(s(z))` with g a softening of the event
(:mod:`probest.smc.softening`) and built on
proposals that leave the standard normal φ alone, so that cost does not grow with the dimension:

- *local* (:func:`climb`, :func:`walk`): preconditioned Crank–Nicolson Langevin, or plain pCN without a gradient;
- *refreshing* (:func:`refresh`): a few coordinates are drawn anew from φ, the others stay. Where severities are rough
  this crosses from mode to mode when small steps of all coordinates cannot (on the digits problem it made the variance
  at equal cost four times smaller);
- *guided* (:func:`guided_sweep`): independent draws from a law fitted to the population in the few directions that
  matter (or of the radius, where no few do), pCN in all others. One forward call each, and it jumps between modes.
  Each half of the population is moved by the other half's law, since a kernel fitted to the particles that it moves
  would be biased.

Guided moves alone fail where the mixture lacks a mode: its particles would be stuck. So tempering always adds a
local step.

Reference: Cotter, Roberts, Stuart & White (2013), MCMC methods for functions; Cui, Law & Marzouk (2016),
Dimension-independent likelihood-informed MCMC (the split into informed directions and the rest).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import scipy
from numpy.typing import NDArray

from probest.budget import GRADIENT_CALLS, Meter
from probest.evidence import Evaluation, Floats
from probest.guides.mixture import Mixture, fit_mixture
from probest.guides.radial import Radial, fit_radial
from probest.guides.subspace import gradient_rows, informed_basis
from probest.smc.population import State, log_target, total
from probest.smc.scouts import with_scouts

__all__ = [
    "Correction",
    "adapted",
    "climb",
    "ensure_gradient",
    "fit_moves",
    "guided_sweep",
    "metropolis",
    "probe",
    "rank_correlation",
    "refresh",
    "rewritten",
    "walk",
]

Rows = NDArray[np.intp]

LONGEST = 1.4  # step, as an angle: beyond it next to nothing of z stays
_BLOCK = 1_000_000  # numbers alive at once in each temporary of a move


def ensure_gradient(state: State, meter: Meter, gradient: bool) -> bool:
    """Evaluate gradients where there are none yet; False when they are absent, NaN or zero at most particles."""
    if not gradient:
        state.severity_grad = state.weight_grad = None
        return False
    n = len(state.z)
    if state.severity_grad is None:
        if meter.left < 4 * GRADIENT_CALLS * n:
            return False
        grad = np.empty_like(state.z)
        weight_grad = np.empty_like(state.z) if meter.event.weighted else None
        for rows in np.array_split(np.arange(n), math.ceil(state.z.size / _BLOCK)):
            # relatives lie next to each other, and are often the same
            _, first, inverse = np.unique(state.z[rows, 0], return_index=True, return_inverse=True)
            result = meter.evaluate(state.z[rows[first]], gradient=True)
            if result.severity_grad is None:
                return False
            grad[rows] = result.severity_grad[inverse]
            if weight_grad is not None and result.log_weight_grad is not None:
                weight_grad[rows] = result.log_weight_grad[inverse]
        state.severity_grad, state.weight_grad = grad, weight_grad
    if not state.started and state.weight_grad is not None:
        return bool(np.isfinite(state.weight_grad).all(axis=1).mean() > 0.5)
    norm = np.linalg.norm(state.severity_grad, axis=1)
    useful = bool(np.mean(np.isfinite(norm) & (norm > 0.0)) > 0.5)
    if not useful:
        state.severity_grad = state.weight_grad = None
    return useful


Correction = Callable[[Evaluation], Floats]
Propose = Callable[[Rows], tuple[Floats, Correction]]


def metropolis(
    state: State, meter: Meter, rng: np.random.Generator, at: Rows, propose: Propose, gradient: bool = False
) -> float:
    """One Metropolis–Hastings step of the particles ``at``, in blocks of rows and in place; the mean acceptance.

    propose: proposals for some rows, and what their log-density ratio adds to that of the targets.
    """
    if not len(at):
        return 0.0
    accepted = 0.0
    for rows in np.array_split(at, math.ceil(len(at) * state.z.shape[1] / _BLOCK)):
        proposal, correction = propose(rows)
        proposal = proposal.astype(state.z.dtype, copy=False).astype(np.float64, copy=False)  # what will be kept
        log_u = np.log(rng.random(len(rows)))
        result = meter.evaluate(proposal, gradient=gradient)
        before = log_target(state, state.severity[rows], state.log_weight[rows])
        with np.errstate(invalid="ignore"):
            log_ratio = log_target(state, result.severity, result.log_weight) - np.maximum(before, -1e300)
            log_ratio += correction(result)
        log_ratio = np.where(np.isnan(log_ratio), -np.inf, log_ratio)
        accepted += float(np.sum(np.exp(np.minimum(log_ratio, 0.0))))
        taken = np.flatnonzero(log_u < log_ratio)
        kept = rows[taken]
        state.z[kept] = proposal[taken]
        state.severity[kept] = result.severity[taken]
        state.log_weight[kept] = result.log_weight[taken]
        if gradient and state.severity_grad is not None and result.severity_grad is not None:
            state.severity_grad[kept] = result.severity_grad[taken]
            if state.weight_grad is not None and result.log_weight_grad is not None:
                state.weight_grad[kept] = result.log_weight_grad[taken]
    if not gradient:
        state.severity_grad = state.weight_grad = None
    return accepted / len(at)


def _drift(state: State, severity: Floats, grad: Floats, weight_grad: Floats | None, cap: float) -> Floats:
    """Gradient of the log-target without φ, its length capped: a function of the point alone, so moves stay exact."""
    with np.errstate(all="ignore"):
        drift = grad * state.drift.slope(severity)[:, None]
        if weight_grad is not None and state.power > 0.0:
            drift += state.power * weight_grad
        norm = np.linalg.norm(drift, axis=1)
        scale = np.where(np.isfinite(norm), np.minimum(1.0, cap / np.maximum(norm, 1e-300)), 0.0)
    drift[~np.isfinite(norm)] = 0.0
    drift *= scale[:, None]
    return drift


def _everyone(state: State) -> Rows:
    return np.arange(len(state.z))


def adapted(angle: float, acceptance: float, aim: float, *, gain: float = 1.0, least: float = 1e-4) -> float:
    """The angle of the next step: longer where more than ``aim`` of the last was accepted (Andrieu & Thoms 2008)."""
    return float(np.clip(angle * math.exp(gain * (acceptance - aim)), least, LONGEST))


def walk(state: State, meter: Meter, rng: np.random.Generator, angle: float, at: Rows | None = None) -> float:
    """A pCN step of about ``angle`` (its cosine is what stays of z) of the particles ``at``, 1 call each."""

    def propose(rows: Rows) -> tuple[Floats, Correction]:
        angles = np.minimum(angle * (0.5 + rng.random(len(rows))), 0.5 * math.pi)
        noise = rng.standard_normal((len(rows), state.z.shape[1]))
        noise *= np.sin(angles)[:, None]
        noise += np.cos(angles)[:, None] * state.z[rows]
        return noise, lambda _: np.zeros(len(rows))

    return metropolis(state, meter, rng, _everyone(state) if at is None else at, propose)


def climb(state: State, meter: Meter, rng: np.random.Generator, angle: float) -> float:
    """A preconditioned Crank–Nicolson Langevin step of every particle, 3 calls each; needs the gradients at hand."""
    cap = 1.5 * (math.sqrt(max(0.0, -2.0 * total(state))) + 1.0)

    def propose(rows: Rows) -> tuple[Floats, Correction]:
        assert state.severity_grad is not None
        z = state.z[rows].astype(np.float64, copy=False)
        angles = np.minimum(angle * (0.5 + rng.random(len(rows))), 0.5 * math.pi)
        rho, sigma = np.cos(angles), np.sin(angles)
        weight_grad = None if state.weight_grad is None else state.weight_grad[rows]
        drift = _drift(state, state.severity[rows], state.severity_grad[rows], weight_grad, cap)
        proposal = rng.standard_normal(z.shape)
        proposal *= sigma[:, None]
        proposal += (1.0 - rho)[:, None] * drift
        proposal += rho[:, None] * z

        def correction(result: Evaluation) -> Floats:
            # log of q(z | z') / q(z' | z) relative to plain pCN, whose ratio is φ(z)/φ(z')
            assert result.severity_grad is not None
            back = _drift(state, result.severity, result.severity_grad, result.log_weight_grad, cap)
            share, half = (1.0 - rho) / sigma**2, 0.5 * (1.0 - rho)
            ahead = _dot(drift, proposal) - rho * _dot(drift, z) - half * _dot(drift, drift)
            behind = _dot(back, z) - rho * _dot(back, proposal) - half * _dot(back, back)
            return np.asarray(share * (behind - ahead), dtype=np.float64)

        return proposal, correction

    return metropolis(state, meter, rng, _everyone(state), propose, gradient=True)


def _dot(a: Floats, b: Floats) -> Floats:
    return np.asarray(np.einsum("ij,ij->i", a, b), dtype=np.float64)


def refresh(state: State, meter: Meter, rng: np.random.Generator, at: Rows | None = None) -> float:
    """Fresh values for a random few coordinates of the particles ``at``, 1 call each; returns the mean acceptance.

    Each particle has its own coordinates. They are redrawn from the prior altogether (mixed with what was there once
    even one coordinate at a time is refused), so that a move can cross what lies between two modes, and one sensitive
    coordinate does not shorten the steps of all others. Discrete choices have a coordinate of their own and flip here.
    """
    dim = state.z.shape[1]
    rho, sigma = math.cos(state.refresh_angle), math.sin(state.refresh_angle)

    def propose(rows: Rows) -> tuple[Floats, Correction]:
        z, m = state.z[rows], len(rows)
        chosen = rng.random((m, dim)) < state.portion * (0.3 + 1.4 * rng.random((m, 1)))
        chosen[np.arange(m), rng.integers(dim, size=m)] = True
        return np.where(chosen, rho * z + sigma * rng.standard_normal((m, dim)), z), lambda _: np.zeros(m)

    acceptance = metropolis(state, meter, rng, _everyone(state) if at is None else at, propose)
    step = math.exp(1.5 * (acceptance - 0.35))
    single = state.portion * dim <= 0.7
    if (step < 1.0 and single) or (step > 1.0 and state.refresh_angle < 1.57):
        state.refresh_angle = float(np.clip(state.refresh_angle * step, 1e-3, 0.5 * math.pi))
    else:
        state.portion = float(np.clip(state.portion * step, 0.6 / dim, 1.0))
    return acceptance


def rewritten(z: Floats, rng: np.random.Generator) -> Floats:
    """Proposals ``(..., dim)``, reversible for φ: all coordinates from a random place on anew, or that one alone.

    For programs that unfold in order: what comes before the place stays as it is.
    """
    dim = z.shape[-1]
    place, one = np.arange(dim), (*z.shape[:-1], 1)
    cut = rng.integers(dim, size=one)
    fresh = np.where(rng.random(one) < 0.5, place >= cut, place == cut)
    return np.where(fresh, rng.standard_normal(z.shape), z)


def probe(state: State, meter: Meter, gradient: bool, count: int) -> None:
    """Renew the gradient information, from at most ``count`` evenly spaced particles where none is at hand.

    What was known before counts as much as what is new, and is forgotten after a few times.
    """
    n = len(state.z)
    if not gradient:
        state.rows = None
        if state.started and not meter.event.weighted and not meter.event.boolean:
            state.rows = _regression_rows(state)
        return
    grad, weight_grad = state.severity_grad, state.weight_grad
    at = np.arange(n)
    if grad is None or n > 2000:
        at = np.linspace(0, n - 1, min(n, count if grad is None else 2000)).astype(np.intp)
    z = state.z[at].astype(np.float64, copy=False)
    if grad is None:
        if meter.left < GRADIENT_CALLS * len(at) + 2 * n:
            return
        result = meter.evaluate(z, gradient=True)
        grad, weight_grad = result.severity_grad, result.log_weight_grad
    else:
        grad, weight_grad = grad[at], None if weight_grad is None else weight_grad[at]
    rows = gradient_rows(z, np.zeros(len(at)), grad if state.started else None, weight_grad)
    if rows is None or state.rows is None:
        state.rows = rows
        return
    # the first half of the rows belongs to the first half of the particles: keep it so
    fresh, old = len(rows) // 2, len(state.rows) // 2
    kept = min(old, 3 * fresh)
    parts = (rows[:fresh], state.rows[:kept], rows[fresh:], state.rows[old : old + kept])
    state.rows = math.sqrt(0.5) * np.concatenate(parts)


def _regression_rows(state: State) -> Floats | None:
    """Without gradients: the direction of a linear regression of the severity, if it predicts held-out particles."""
    n, dim = state.z.shape
    at = np.linspace(0, n - 1, min(n, 4000)).astype(np.intp)
    at = at[np.abs(state.severity[at]) < 1e100]  # where squares are numbers
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
    return np.asarray(directions * (reach / math.sqrt(2.0))[:, None], dtype=np.float64)


def fit_moves(state: State, rng: np.random.Generator) -> tuple[Mixture | Radial, Mixture | Radial]:
    """Laws for independent moves, one from each half of the population: radial where no few directions matter.

    Each half is moved by the other half's law: a kernel fitted to the particles that it moves would be biased.
    """
    n, dim = state.z.shape
    middle, tuning = _middle(state), state.tuning
    laws: list[Mixture | Radial] = []
    for low, high in ((0, middle), (middle, n)):
        at = np.linspace(low, high - 1, min(high - low, 2000)).astype(np.intp)
        z, equal = state.z[at].astype(np.float64, copy=False), np.zeros(len(at))
        rows = state.rows
        # directions found from moments alone would be noise in many dimensions
        few = rows is not None or dim <= max(2, n // 40)
        basis = np.empty((dim, 0))
        if few:
            half = 0 if rows is None else len(rows) // 2
            mine = None if rows is None else rows[:half] if low == 0 else rows[half:]
            basis = informed_basis(z, equal, mine, threshold=tuning.threshold, rank=tuning.rank)
        if rows is not None and dim > 8:
            # do directions of this half hold what the other half's gradients say?
            other = rows[half:] if low == 0 else rows[:half]
            few = float(np.sum((other @ basis) ** 2)) >= 0.7 * float(np.sum(other**2))
        if few:
            fit = fit_mixture(z, equal, basis, rng, most=tuning.components, effective=0.6 * len(z), starts=1, steps=15)
            wide = fit.with_wide_tails(tuning.tails_share, tuning.tails_factor)
            laws.append(with_scouts(wide, state.places, tuning))
        else:
            shell = fit_radial(z, equal)
            laws.append(shell.with_wide_tails(tuning.radial_tails_share, tuning.radial_tails_factor))
    return laws[1], laws[0]


def _propose(
    z: Floats, law: Mixture | Radial, rho: float, sigma: float, rng: np.random.Generator
) -> tuple[Floats, Floats]:
    """Proposals and their log (φ/q)(z') − log (φ/q)(z): independent where the law is, reversible for φ elsewhere."""
    proposal = rng.standard_normal(z.shape)
    proposal *= sigma
    if isinstance(law, Mixture):
        u = law.sample_inside(len(z), rng)
        proposal += rho * z
        proposal += (u - proposal @ law.basis) @ law.basis.T
        return proposal, law.log_density_ratio(u) - law.log_density_ratio(z @ law.basis)
    # directions: pCN on θ R with a fresh radius R of the prior is reversible for the uniform law of θ
    square = np.einsum("ij,ij->i", z, z)
    fresh = np.sqrt(rng.chisquare(z.shape[1], len(z)) / np.maximum(square, 1e-300))
    proposal += (rho * fresh)[:, None] * z
    length = np.sqrt(np.maximum(np.einsum("ij,ij->i", proposal, proposal), 1e-300))
    proposal *= (law.sample_radius(len(z), rng) / length)[:, None]
    return proposal, law.log_ratio(proposal) - law.log_ratio(z)


def _middle(state: State) -> int:
    return len(state.z) // 2


def guided_sweep(
    state: State, meter: Meter, rng: np.random.Generator, laws: tuple[Mixture | Radial, Mixture | Radial], at: Rows
) -> float:
    """A move of the particles ``at``: independent where the fitted law is, pCN in all other directions. 1 call each.

    The law is relative to φ and pCN is reversible for φ, so the ratio is that of the targets times
    (φ/q)(z') / (φ/q)(z).
    """
    rho, sigma = math.cos(state.side_angle), math.sin(state.side_angle)
    accepted = 0.0
    upper = at >= _middle(state)
    for law, rows in zip(laws, (at[~upper], at[upper]), strict=True):

        def propose(rows: Rows, law: Mixture | Radial = law) -> tuple[Floats, Correction]:
            proposal, correction = _propose(state.z[rows].astype(np.float64, copy=False), law, rho, sigma, rng)
            return proposal, lambda _: correction

        accepted += len(rows) * metropolis(state, meter, rng, rows, propose)
    return accepted / max(1, len(at))


def rank_correlation(a: Floats, b: Floats) -> float:
    """Spearman's correlation; 1 where nothing moved and 0 where it is not defined."""
    if not (np.isfinite(a).all() and np.isfinite(b).all()) or np.ptp(a) == 0.0 or np.ptp(b) == 0.0:
        return 1.0 if np.array_equal(a, b) else 0.0
    return float(scipy.stats.spearmanr(a, b).statistic)
