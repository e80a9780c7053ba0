r"""Line sampling: one direction is integrated exactly, the others are sampled.

Along a unit vector a, z splits into :math:`z_\perp + r a`, and the event cuts each line in intervals whose ends are roots
of the severity. With h_k a partition of unity over the modes k and q_k a law of :math:`z_\perp`,

.. math:: P = \sum_k E_{q_k}\Big[ \frac{\varphi(z_\perp)}{q_k(z_\perp)}
          \int_{s \ge 0} h_k(z_\perp + r a_k)\, \varphi(r)\, dr \Big].

It is unbiased for *any* directions, if all roots are found; good directions make what is averaged nearly constant. They
are those of the design points (:mod:`probest.estimators.design`), or rays from the origin where catastrophes surround it
(then r is chi-distributed: directional sampling). Nothing is counted twice, since h sums to 1: its shares are those of
unit normals at the design points, weighted by their first-order probabilities.

*Rounds.* A first round of lines learns: roots and the gradients there give a quadratic model r̂(u) of the boundary over
the few coordinates u of :math:`z_\perp` that matter (second-order, SORM-like). Gradients that point to an unknown mode
start a new walk. The model gives a proposal q_k close to φ Φ(−r̂), a guess of every root, and a control variate whose mean is
computed without model calls; fresh lines then measure what the model misses, so the estimate stays unbiased.

*All roots.* Each line is asked at one random point beyond its root (these points are the particles); lines that answer "safe", and a few others for
audit, are looked at on a grid (:mod:`probest.estimators.tracing`). Where lines were seen to leave the event again, all are.

It fails where there are more modes than directions (deep networks): the lines' contributions then vary wildly, and the
estimate is not converged. It cannot tell of modes that no gradient leads to.

References: Koutsourelakis, Pradlwarter & Schuëller (2004), Reliability of structures in high dimensions, part I;
Bjerager (1988), Probability integration by directional simulation; Hohenbichler & Rackwitz (1988), Improvement of
second-order reliability estimates by importance sampling; Papaioannou & Straub (2021), Combination line sampling.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from scipy.special import log_ndtr

from probest import diagnostics
from probest.estimators.base import EventLike, Evidence, Floats, Meter, Particles, generator
from probest.estimators.boundary import Boundary, fit_boundary, propose
from probest.estimators.design import DesignPoints, Search
from probest.estimators.position import Chi, Normal, Position, between, log_mass
from probest.estimators.tracing import Intervals, Pencil, Traced, trace
from probest.guides.base import Guide, Prior
from probest.guides.mixture import Mixture

__all__ = ["LineSampling"]

_NODES, _NODE_WEIGHTS = np.polynomial.legendre.leggauss(6)
_FAR = math.log(1e-4)  # what lies beyond is at most this share of the mode
_FLOOR = 0.005  # of the standard error: what lines that agree cannot tell
_MOST_MODES = 12
_LEAST = 5  # fresh lines a mode
_ROUNDS = 5
_STRETCH = 1.5  # width of the first lines in few dimensions: to see what bends away


@dataclass(frozen=True)
class LineSampling:
    """Line sampling along the directions of the design points.

    precision: wanted standard error of log P; None spends the budget.
    starts: gradient walks that look for design points (more where they find several).
    first: lines of each mode that learn its boundary. fresh: lines that measure, in the first round (for one mode).
    """

    precision: float | None = 0.05
    starts: int = 8
    first: int = 8
    fresh: int = 12

    def __post_init__(self) -> None:
        if self.precision is not None and not self.precision > 0.0:
            raise ValueError(f"precision must be positive (a standard error of log P), got {self.precision}")
        for name, least in (("starts", 2), ("first", 4), ("fresh", 6)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

    @property
    def name(self) -> str:
        return "line sampling"

    def run(self, event: EventLike, *, budget: int, seed: np.random.SeedSequence) -> Evidence:
        """Find design points, then sample lines."""
        lines = self.run_ledger(event, budget=budget, seed=seed)
        return replace(lines[-1], calls=sum(line.calls for line in lines))

    def run_ledger(self, event: EventLike, *, budget: int, seed: np.random.SeedSequence) -> list[Evidence]:
        """First- and second-order estimates (heuristic) and line sampling's own, each with the calls it added."""
        meter = Meter(event, budget)
        if not event.differentiable or event.weighted:
            reason = "a severity with a gradient, and an adversary without observed sites, are needed"
            return [_nothing(self, meter.calls, meter.seconds, f"line sampling does not apply: {reason}.")]
        return _Campaign(self, meter, generator(seed)).run()


class _Model(NamedTuple):
    """A boundary, the proposal made from it, and the log of its own probability with its relative error."""

    boundary: Boundary
    guide: Guide
    log_mean: float
    error: float


class _Round(NamedTuple):
    """Lines of one mode, drawn from one law: ``log_w`` is log φ/q of each; ``model`` was fixed before they were drawn."""

    lines: Pencil
    log_w: Floats
    traced: Traced
    model: _Model | None
    learning: bool


@dataclass
class _Mode:
    """One family of parallel lines (or rays, where direction is None) and what was found on them."""

    direction: Floats | None
    beta: float
    slope: float
    law: Position
    rounds: list[_Round] = field(default_factory=list)
    leaves: bool = False

    @property
    def far(self) -> float:
        level = self.law.log_sf(np.array([max(self.beta, 0.0)])) + _FAR
        return float(self.law.isf(level)[0])

    @property
    def rate(self) -> float:
        """Nats that the mass beyond the boundary loses per unit."""
        r = np.array([self.beta, self.beta + 1e-4])
        fall = self.law.log_sf(r)
        return float(fall[0] - fall[1]) / 1e-4


@dataclass
class _Campaign:
    """One run: modes, rounds of lines, and the verdict."""

    method: LineSampling
    meter: Meter
    rng: np.random.Generator
    modes: list[_Mode] = field(default_factory=list)
    spent: int = 0
    searched: int = 0
    scale: float = 0.0

    def run(self) -> list[Evidence]:
        search = Search(self.meter, calls=self.meter.left // 2)
        if not search.run(self.rng, self.method.starts, 6 * self.method.starts):
            return [self._nothing("gradients lead to no boundary of the event.")]
        points = search.points()
        self.searched = self.meter.calls
        ledger = [self._heuristic("design points (FORM)", points.log_form)]
        around = points.origin >= 0.0 or (len(points.beta) >= 6 and bool(np.all(points.starts == 1)))
        if around:
            self._surround(points)
        elif len(points.beta) > _MOST_MODES:
            return [*ledger, self._nothing("there are more modes than lines can serve.")]
        else:
            points = self._explore(search, points)
            if len(points.beta) > _MOST_MODES:
                return [*ledger, self._nothing("there are more modes than lines can serve.")]
        self.scale = max(self._learnt(k) for k in range(len(self.modes)))
        if not math.isfinite(self.scale):
            return [*ledger, self._nothing("no line through the design points meets the event.")]
        for attempt in range(_ROUNDS):
            models = [self._model(k) for k in range(len(self.modes))]
            if attempt == 0 and not around:
                second = diagnostics.log_sum_exp(np.array([m.log_mean for m in models if m is not None]))
                ledger.append(self._heuristic("curved design points (SORM)", min(second, 0.0)))
            counts = self._counts(models, attempt)
            if counts is None:
                break
            for k, (model, count) in enumerate(zip(models, counts, strict=True)):
                if count:
                    self._measure(k, model, count)
            if self._precise():
                break
        return [*ledger, self._conclude(points, search)]

    # --- finding modes ---------------------------------------------------------------------------------------------

    def _surround(self, points: DesignPoints) -> None:
        """Rays from the origin instead of modes."""
        dim = self.meter.event.dim
        beta = float(np.median(np.abs(points.beta)))
        self.modes = [_Mode(None, beta, float(np.median(points.slope)), Chi(dim), leaves=points.origin >= 0.0)]
        self._learn(0)

    def _explore(self, search: Search, points: DesignPoints) -> DesignPoints:
        """First lines through every mode; where their gradients lead to further modes, these too."""
        for _ in range(3):
            self._adopt(points)
            for k in range(len(self.modes)):
                if not self.modes[k].rounds:
                    self._learn(k)
            suspects = self._suspects()
            before = len(points.beta)
            if not len(suspects) or len(self.modes) > _MOST_MODES or not search.start_from(suspects):
                break
            points = search.points()
            if len(points.beta) == before:
                break
        return points

    def _adopt(self, points: DesignPoints) -> None:
        """Modes for the design points, in their order; known ones keep their lines."""
        old = self.modes
        self.modes = []
        for direction, beta, slope in zip(points.direction, points.beta, points.slope, strict=True):
            known = next(
                (m for m in old if m.direction is not None and float(m.direction @ direction) > 1 - 1e-9), None
            )
            self.modes.append(known or _Mode(direction, float(beta), float(slope), Normal()))
        self._normals = points.direction * points.beta[:, None]
        self._log_p = np.asarray(log_ndtr(-points.beta)) - 0.5 * points.beta**2

    def _suspects(self) -> Floats:
        """Points on lines whose gradients lead to a boundary that is about as near as the known modes, but elsewhere."""
        least = min(mode.beta for mode in self.modes)
        found = []
        for mode in self.modes:
            first = mode.rounds[0]
            root, gradient = first.traced.root, first.traced.gradient
            rows = np.flatnonzero(np.isfinite(root) & np.isfinite(gradient).all(axis=1))
            z = first.lines.at(rows, root[rows])
            normal = gradient[rows] / np.maximum(np.linalg.norm(gradient[rows], axis=1), 1e-300)[:, None]
            away = np.sum(normal * z, axis=1)
            target = away[:, None] * normal
            apart = np.linalg.norm(target[:, None] - self._normals[None], axis=2)
            elsewhere = (apart > 0.5 * (1.0 + 0.5 * np.abs(away))[:, None]).all(axis=1)
            likely = (away < least + 1.2) & (away > 0.0)
            found.append(z[elsewhere & likely])
        every = np.concatenate(found)
        return every[np.argsort(np.linalg.norm(every, axis=1), kind="stable")[:4]]

    # --- lines -----------------------------------------------------------------------------------------------------

    def _lines(self, k: int, guide: Guide, n: int) -> tuple[Pencil, Floats]:
        """Lines of mode k drawn from a guide, and log φ/q of each."""
        mode, dim = self.modes[k], self.meter.event.dim
        if mode.direction is None:
            z = self.rng.standard_normal((n, dim))
            return Pencil(np.zeros((n, dim)), z / np.linalg.norm(z, axis=1, keepdims=True), mode.law), np.zeros(n)
        z = guide.sample(n, self.rng)
        offset = z - (z @ mode.direction)[:, None] * mode.direction
        return Pencil(offset, np.broadcast_to(mode.direction, z.shape), mode.law), guide.log_ratio(offset)

    def _learn(self, k: int) -> None:
        """The first lines of a mode: with gradients, one of them on a grid, drawn wide in few dimensions."""
        mode, dim = self.modes[k], self.meter.event.dim
        n = max(1, min(self.method.first, self.meter.left // 12))
        wide = Mixture(np.eye(dim), np.ones(1), np.zeros((1, dim)), _STRETCH * np.eye(dim)[None]) if dim <= 6 else None
        guide = wide or Prior(dim)
        lines, log_w = self._lines(k, guide, n)
        self._add(k, lines, log_w, np.full(n, mode.beta), None, learning=True)

    def _measure(self, k: int, model: _Model | None, n: int) -> None:
        """Fresh lines of a mode, drawn from the model's proposal."""
        mode = self.modes[k]
        lines, log_w = self._lines(k, Prior(self.meter.event.dim) if model is None else model.guide, n)
        guess = np.full(n, mode.beta) if model is None else model.boundary.root(lines.offset @ model.boundary.basis)
        self._add(k, lines, log_w, guess, model, learning=False)

    def _add(
        self, k: int, lines: Pencil, log_w: Floats, guess: Floats, model: _Model | None, *, learning: bool
    ) -> None:
        mode = self.modes[k]
        n = len(log_w)
        scan = np.full(n, mode.leaves)
        if learning:
            scan[:1] = True
        traced = trace(
            self.meter,
            lines,
            self.rng,
            guess=guess,
            slope=mode.slope,
            far=mode.far,
            gradient=learning and mode.direction is not None,
            scan=scan,
        )
        mode.rounds.append(_Round(lines, log_w, traced, model, learning))
        if not mode.leaves and traced.leaves.any():
            mode.leaves = True

    def _log_f(self, k: int, lines: Pencil, intervals: Intervals) -> Floats:
        """log of the (partitioned) probability of the event on each line."""
        owner, low, high = intervals
        mass = log_mass(lines.law, low, high)
        if len(self.modes) > 1:
            along = self._normals @ self.modes[k].direction
            base = lines.offset @ self._normals.T
            r = between(lines.law, low[:, None], high[:, None], 0.5 * (_NODES + 1.0))
            share = self._log_share(k, base[owner][:, None, :] + r[:, :, None] * along)
            mass = mass + np.log(np.exp(share) @ (0.5 * _NODE_WEIGHTS))
        total = np.full(len(lines.offset), -np.inf)
        np.logaddexp.at(total, owner, mass)
        return total

    def _log_share(self, k: int, levels: Floats) -> Floats:
        """log h_k, from the scalar products of the points with all design points (last axis)."""
        parts = self._log_p + levels
        top = parts.max(axis=-1, keepdims=True)
        return np.asarray(parts[..., k] - top[..., 0] - np.log(np.sum(np.exp(parts - top), axis=-1)))

    # --- the model of the boundary ---------------------------------------------------------------------------------

    def _model(self, k: int) -> _Model | None:
        mode = self.modes[k]
        if mode.direction is None:
            return None
        offset = np.concatenate([r.lines.offset for r in mode.rounds])
        root = np.concatenate([r.traced.root for r in mode.rounds])
        gradient = np.concatenate([r.traced.gradient for r in mode.rounds])
        log_f = np.concatenate([r.log_w + self._log_f(k, r.lines, r.traced.intervals) for r in mode.rounds])
        rows = np.flatnonzero(np.isfinite(root) & np.isfinite(log_f))
        if len(rows) < 2:
            return None
        rise = gradient[rows] @ mode.direction
        with np.errstate(all="ignore"):
            slopes = -(gradient[rows] - rise[:, None] * mode.direction) / rise[:, None]
        slopes[~(rise > 0.05 * mode.slope)] = np.nan
        weight = np.exp(np.maximum(0.5 * (log_f[rows] - log_f[rows].max()), math.log(0.05)))
        others = np.delete(self._normals, k, axis=0)
        others = others - (others @ mode.direction)[:, None] * mode.direction
        boundary = fit_boundary(offset[rows], root[rows], slopes, weight, mode.rate, others)
        guide, log_mean, error = propose(boundary, lambda u: self._modelled(k, boundary, u), self.rng)
        return _Model(boundary, guide, log_mean, error) if math.isfinite(log_mean) else None

    def _modelled(self, k: int, boundary: Boundary, u: Floats) -> Floats:
        """log f̂ at coordinates u, by the model."""
        lines = Pencil(u @ boundary.basis.T, np.empty((len(u), 0)), self.modes[k].law)
        return self._log_f(k, lines, Intervals(np.arange(len(u)), boundary.root(u), np.full(len(u), np.inf)))

    # --- estimates -------------------------------------------------------------------------------------------------

    def _values(self, k: int, learning: bool) -> tuple[Floats, Floats, float]:
        """What each line says of the mode's probability, relative to the scale: plain, with the control variate, and the
        control variate's own error.
        """
        plain, varied, error = [np.empty(0)], [np.empty(0)], 0.0
        for r in self.modes[k].rounds:
            if r.learning != learning:
                continue
            value = np.exp(r.log_w + self._log_f(k, r.lines, r.traced.intervals) - self.scale)
            plain.append(value)
            if r.model is None:
                varied.append(value)
                continue
            modelled = self._modelled(k, r.model.boundary, r.lines.offset @ r.model.boundary.basis)
            mean = math.exp(r.model.log_mean - self.scale)
            varied.append(value - np.exp(r.log_w + modelled - self.scale) + mean)
            error = max(error, mean * r.model.error)
        return np.concatenate(plain), np.concatenate(varied), error

    def _learnt(self, k: int) -> float:
        mode = self.modes[k]
        parts = [r.log_w + self._log_f(k, r.lines, r.traced.intervals) for r in mode.rounds if r.learning]
        return diagnostics.log_mean_exp(np.concatenate(parts))[0]

    def _chosen(self, k: int) -> tuple[Floats, float]:
        """Values of the fresh lines of a mode (those with the smaller variance), and the error common to them."""
        plain, varied, error = self._values(k, learning=False)
        if len(plain) and np.var(varied) + error**2 * len(varied) < 0.7 * np.var(plain):
            return varied, error
        return plain, 0.0

    def _spread(self) -> tuple[float, float]:
        """The estimate relative to the scale, and its standard error."""
        chosen = [self._chosen(k) for k in range(len(self.modes))]
        mean = sum(float(np.mean(values)) for values, _ in chosen if len(values))
        square = sum(
            float(np.var(values)) / max(len(values) - 1, 1) + error**2 for values, error in chosen if len(values)
        )
        return mean, math.sqrt(square)

    def _precise(self) -> bool:
        mean, error = self._spread()
        return mean > 0.0 and self.method.precision is not None and error <= 0.9 * self.method.precision * mean

    def _counts(self, models: list[_Model | None], attempt: int) -> list[int] | None:
        """Fresh lines for each mode, or None where the precision cannot be reached with the calls that are left."""
        sizes = len(self.modes)
        if attempt == 0:
            sums = np.array([self._learnt(k) if m is None else m.log_mean for k, m in enumerate(models)])
            share = np.exp(sums - diagnostics.log_sum_exp(sums))
            first = np.maximum(_LEAST, np.rint(self.method.fresh * 0.5 * (1 + sizes) * share)).astype(int)
            return first.tolist() if self.meter.left >= 6 * first.sum() else None
        mean, _ = self._spread()
        values = [self._chosen(k)[0] for k in range(sizes)]
        spread, done = np.array([np.std(v) for v in values]), np.array([len(v) for v in values])
        if not mean > 0.0 or not spread.sum() > 0.0:
            return None
        aim = (self.method.precision or 1e-9) * mean * 0.85
        more = np.maximum(0.0, 1.1 * spread.sum() * spread / aim**2 - done)
        ever = sum(len(r.log_w) for mode in self.modes for r in mode.rounds)
        price = max(4.0, (self.meter.calls - self.searched) / ever)
        afford = self.meter.left / (price * max(float(more.sum()), 1.0))
        if afford < 1.0 and self.method.precision is not None:
            return None
        capped = np.minimum(more * min(1.0, 0.9 * afford), np.maximum(3 * done, 2 * self.method.fresh))
        counts = np.ceil(capped).astype(int)
        return counts.tolist() if counts.sum() >= 1 and self.meter.left >= 2 * counts.sum() else None

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

    def _nothing(self, note: str) -> Evidence:
        return _nothing(self.method, self._calls(), self.meter.seconds, note)

    def _conclude(self, points: DesignPoints, search: Search) -> Evidence:
        chosen = [self._chosen(k) for k in range(len(self.modes))]
        total = sum(len(values) for values, _ in chosen)
        mean = sum(float(np.mean(values)) for values, _ in chosen if len(values))
        if not mean > 0.0 or any(len(values) < _LEAST for values, _ in chosen):
            return self._nothing(
                "too few fresh lines met the event: the boundary is too rough, or the budget too small."
            )
        # deviations as if all lines were one sample: their mean square over n - 1 is the stratified variance
        deviation = np.concatenate([(v - np.mean(v)) * (total / (len(v) * mean)) for v, _ in chosen])
        sampled, _ = diagnostics.deviation_error(deviation)
        log_prob = self.scale + math.log(mean)
        rounds = [r for mode in self.modes for r in mode.rounds if not r.learning]
        slip = float(np.mean(np.concatenate([r.traced.slip for r in rounds])))
        systematic = math.hypot(*(error / mean for _, error in chosen), slip, _FLOOR, 0.5 * points.left_out)
        error = math.hypot(sampled, systematic)
        lower, upper = diagnostics.deviation_interval(log_prob, deviation) if sampled > 0.0 else (log_prob, log_prob)
        lower = log_prob - math.hypot(log_prob - lower, 1.96 * systematic)
        upper = log_prob + math.hypot(upper - log_prob, 1.96 * systematic)
        notes = self._complaints(error, deviation, log_prob, search)
        return Evidence(
            method=self.method.name,
            log_prob=min(log_prob, 0.0),
            std_error=error,
            interval=(lower, min(upper, 0.0)),
            claim="unbiased",
            calls=self._calls(),
            seconds=self.meter.seconds,
            converged=not notes,
            particles=self._particles(),
            diagnostics={
                "modes": float(len(self.modes)),
                "lines": float(total),
                "starts": float(search.begun),
                "strayed": float(search.lost),
                "largest": float(np.max(np.abs(deviation))) / total,
            },
            notes=notes,
        )

    def _complaints(self, error: float, deviation: Floats, log_prob: float, search: Search) -> tuple[str, ...]:
        notes = []
        wanted = max(0.1, 2.0 * (self.method.precision or 0.05))
        if error > wanted:
            notes.append(f"the standard error {error:.2f} is above {wanted:.2f}: raise the budget.")
        largest = float(np.max(np.abs(deviation))) / len(deviation)
        if largest > 0.25:
            notes.append("a single line carries much of the estimate: use tempering, or raise the budget.")
        if search.lost > 0.6 * search.begun:
            notes.append("most gradient walks found no boundary: modes may have been missed; use tempering.")
        learnt = [self._values(k, learning=True)[0] for k in range(len(self.modes))]
        first = sum(float(np.mean(values)) for values in learnt)
        spread = math.sqrt(sum(float(np.var(values)) / max(len(values) - 1, 1) for values in learnt))
        now = math.exp(log_prob - self.scale)
        if abs(first - now) > 4.0 * math.hypot(spread, error * now) + 0.2 * now:
            notes.append("first and fresh lines disagree: a few lines carry the estimate; use tempering.")
        return tuple(notes)

    def _particles(self) -> Particles | None:
        z, log_w, severity = [], [], []
        for k, mode in enumerate(self.modes):
            count = sum(len(r.log_w) for r in mode.rounds)
            for r in mode.rounds:
                weight = r.log_w - math.log(count)
                weight = weight + _line_masses(r.lines, r.traced.intervals)
                share = self._log_share(k, r.traced.at @ self._normals.T) if len(self.modes) > 1 else 0.0
                z.append(r.traced.at)
                log_w.append(weight[r.traced.on] + share)
                severity.append(r.traced.severity)
        every = np.concatenate(log_w)
        if not len(every):
            return None
        return Particles(np.concatenate(z), every - diagnostics.log_sum_exp(every), np.concatenate(severity))


def _line_masses(lines: Pencil, intervals: Intervals) -> Floats:
    total = np.full(len(lines.offset), -np.inf)
    np.logaddexp.at(total, intervals.owner, log_mass(lines.law, intervals.low, intervals.high))
    return total


def _nothing(method: LineSampling, calls: int, seconds: float, note: str) -> Evidence:
    return Evidence(
        method=method.name,
        log_prob=-math.inf,
        std_error=math.inf,
        interval=(-math.inf, 0.0),
        claim="upper",
        calls=calls,
        seconds=seconds,
        converged=False,
        notes=(note,),
    )
