r"""The modes of an event: families of parallel lines, what was found on them, and models of their boundaries.

With h_k a partition of unity over the modes k, what a line of mode k says of its probability is the integral of h_k
over its intervals of the event, weighted by φ/q of the law that it was drawn from: nothing is counted twice, since the
shares sum to 1. What lies beyond the planes of several modes is theirs in equal parts, all else belongs to the nearest
plane (Owen, Maximov & Chertkov 2019, for half-spaces; the planes are blurred here):

.. math:: h_k(z) \propto \Phi\big((a_k \cdot z - \beta_k) / \sigma\big).

So a line that runs into another mode's part of the event early on counts there for next to nothing. (Shares of unit
normals at the design points, as a mixture has them, let one such line carry a tenth of P, among 46 limits on a walk.)

Reference: Owen, Maximov & Chertkov (2019), Importance sampling the union of rare events.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from scipy.special import log_ndtr

from probest import diagnostics
from probest.budget import Meter
from probest.evidence import Floats, Particles
from probest.guides.base import Guide, Prior
from probest.lines.along import Normal, Position, between, log_mass
from probest.lines.boundary import Boundary, Proposal, fit_boundary, propose
from probest.lines.design_points import DesignPoints, even_normals
from probest.lines.roots import Crossings, Intervals, Pencil, find_crossings, summed
from probest.lines.tuning import LineTuning

__all__ = ["Mode", "Modes", "Round"]

_NODES, _NODE_WEIGHTS = np.polynomial.legendre.leggauss(6)


class Model(NamedTuple):
    """The boundaries of all modes, and for one of them a proposal made from them."""

    boundaries: tuple[Boundary | None, ...]
    proposal: Proposal


class Round(NamedTuple):
    """Lines of one mode, drawn from one law: log φ/q of each, and the model that was fixed before they were drawn."""

    lines: Pencil
    log_w: Floats
    crossings: Crossings
    model: Model | None
    learning: bool


@dataclass
class Mode:
    """One family of parallel lines (or rays, where direction is None) and what was found on them."""

    direction: Floats | None
    beta: float
    slope: float
    law: Position
    tuning: LineTuning
    rounds: list[Round] = field(default_factory=list)
    rough: bool = False

    @property
    def far(self) -> float:
        level = self.law.log_sf(np.array([max(self.beta, 0.0)])) + math.log(self.tuning.beyond)
        return float(self.law.isf(level)[0])

    @property
    def rate(self) -> float:
        """Nats that the mass beyond the boundary loses per unit."""
        r = np.array([self.beta, self.beta + 1e-4])
        fall = self.law.log_sf(r)
        rate = float(fall[0] - fall[1]) / 1e-4
        return max(rate, self.tuning.slowest) if math.isfinite(rate) else max(self.beta, self.tuning.slowest)


@dataclass
class Modes:
    """The modes of one run and the lines through them.

    first: lines that learn a mode's boundary. price: calls that a line took lately. complete: whether the calls
    sufficed to look at all lines that needed it. scale: a log-probability that values are relative to.
    """

    meter: Meter
    rng: np.random.Generator
    first: int
    tuning: LineTuning
    members: list[Mode] = field(default_factory=list)
    price: float = 0.0
    complete: bool = True
    scale: float = 0.0

    def __len__(self) -> int:
        return len(self.members)

    def __iter__(self) -> Iterator[Mode]:
        return iter(self.members)

    def surround(self, mode: Mode) -> None:
        """Rays from the origin instead of modes."""
        self.members = [mode]
        self._directions, self._beta = np.empty((0, self.meter.event.dim)), np.empty(0)
        self.learn(0)

    def adopt(self, points: DesignPoints) -> None:
        """Modes for the design points, in their order; known ones keep their lines."""
        old = self.members
        self.members = []
        for direction, beta, slope in zip(points.direction, points.beta, points.slope, strict=True):
            known = next(
                (m for m in old if m.direction is not None and float(m.direction @ direction) > 1 - 1e-9), None
            )
            self.members.append(known or Mode(direction, float(beta), float(slope), Normal(), self.tuning))
        self._directions, self._beta = points.direction, points.beta

    def suspects(self) -> Floats:
        """Points on lines that are about as near as the known modes, but lead elsewhere.

        Roots whose gradients point away from known modes, and intervals of the event that belong to none.
        """
        least = min(mode.beta for mode in self.members)
        found, target = [], []
        for mode in self.members:
            first = mode.rounds[0]
            root, gradient = first.crossings.root, first.crossings.gradient
            rows = np.flatnonzero(np.isfinite(root) & np.isfinite(gradient).all(axis=1))
            z = first.lines.at(rows, root[rows])
            normal = gradient[rows] / np.maximum(np.linalg.norm(gradient[rows], axis=1), 1e-300)[:, None]
            found.append(z)
            target.append(np.sum(normal * z, axis=1)[:, None] * normal)
            owner, _, high = first.crossings.intervals
            behind = high < 0.0
            z = first.lines.at(owner[behind], high[behind])
            found.append(z)
            target.append(z)
        z, towards = np.concatenate(found), np.concatenate(target)
        away = np.linalg.norm(towards, axis=1)
        at = self._directions * self._beta[:, None]
        apart = np.linalg.norm(towards[:, None] - at[None], axis=2)
        elsewhere = (apart > 0.5 * (1.0 + 0.5 * away)[:, None]).all(axis=1)
        z = z[elsewhere & (away < least + 1.2) & (np.sum(towards * z, axis=1) > 0.0)]
        return np.asarray(z[np.argsort(np.linalg.norm(z, axis=1), kind="stable")[:4]])

    @property
    def few(self) -> bool:
        """Whether there are so few modes that each can be looked at closely."""
        return len(self.members) <= self.tuning.several

    # --- lines -----------------------------------------------------------------------------------------------------

    def _lines(self, k: int, guide: Guide, n: int) -> tuple[Pencil, Floats]:
        """Lines of mode k drawn from a guide, and log φ/q of each."""
        mode, dim = self.members[k], self.meter.event.dim
        if mode.direction is None:
            z = self.rng.standard_normal((n, dim))
            return Pencil(np.zeros((n, dim)), z / np.linalg.norm(z, axis=1, keepdims=True), mode.law), np.zeros(n)
        z = guide.sample(n, self.rng)
        offset = z - (z @ mode.direction)[:, None] * mode.direction
        return Pencil(offset, np.broadcast_to(mode.direction, z.shape), mode.law), guide.log_ratio(offset)

    def learn(self, k: int) -> None:
        """The first lines of a mode: with gradients, one of them on a grid, drawn wide in few dimensions."""
        mode, dim = self.members[k], self.meter.event.dim
        first = self.first if self.few else max(2, self.first * self.tuning.several // len(self.members))
        n = min(first, self.meter.left // 12)
        if n < 1:
            return
        if mode.direction is None or not 1 < dim <= self.tuning.few:
            lines, log_w = self._lines(k, Prior(dim), n)
        else:  # spread out evenly, so that what bends away is seen
            across = np.linalg.qr(np.column_stack([mode.direction, np.eye(dim)]))[0][:, 1:]
            u = self.tuning.stretch * even_normals(n, dim - 1, self.rng)
            log_w = np.sum(0.5 * (u / self.tuning.stretch) ** 2 - 0.5 * u**2 + math.log(self.tuning.stretch), axis=1)
            lines = Pencil(u @ across.T, np.broadcast_to(mode.direction, (n, dim)), mode.law)
        self._add(k, lines, log_w, np.full(n, mode.beta), None, gradient=mode.direction is not None, learning=True)

    def relearn(self, models: list[Model | None], n: int) -> None:
        """Fresh lines with gradients where the model now puts the event; what was measured so far only teaches."""
        for k, (mode, model) in enumerate(zip(self.members, models, strict=True)):
            mode.rounds = [r._replace(learning=True) for r in mode.rounds]
            self.measure(k, model, n, gradient=True)

    def measure(self, k: int, model: Model | None, n: int, *, gradient: bool = False) -> None:
        """Fresh lines of a mode, drawn from the model's proposal."""
        mode = self.members[k]
        n = min(n, self.meter.left // (self.tuning.grid_price if mode.rough else self.tuning.simple_price))
        if n < 1:
            return
        lines, log_w = self._lines(k, Prior(self.meter.event.dim) if model is None else model.proposal.guide, n)
        guess = np.full(n, mode.beta)
        if model is not None and (own := model.boundaries[k]) is not None:
            guess = self._entry(k, model.boundaries, lines.offset @ own.basis)
        self._add(k, lines, log_w, guess, model, gradient=gradient)

    def _add(
        self,
        k: int,
        lines: Pencil,
        log_w: Floats,
        guess: Floats,
        model: Model | None,
        *,
        gradient: bool,
        learning: bool = False,
    ) -> None:
        mode = self.members[k]
        n = len(log_w)
        scan = np.full(n, mode.rough)
        scan[: n // 16 + (1 if learning and k < self.tuning.several else 0)] = True  # audit
        before = self.meter.calls
        crossings = find_crossings(
            self.meter,
            lines,
            self.rng,
            guess=guess,
            slope=mode.slope,
            rate=mode.rate,
            near=mode.beta,
            far=mode.far,
            gradient=gradient,
            scan=scan,
            tuning=self.tuning,
        )
        self.price = max((self.meter.calls - before) / n, 0.5 * self.price)
        mode.rounds.append(Round(lines, log_w, crossings, model, learning))
        mode.rough |= bool(crossings.rough.any())
        self.complete &= crossings.complete

    def _log_f(self, k: int, base: Floats, intervals: Intervals) -> Floats:
        """log of the (partitioned) probability of the event on each line; base: scalar products with design points."""
        owner, low, high = intervals
        law = self.members[k].law
        if len(self.members) > 1:  # shares change at the mode's own plane
            middle = np.clip(self.members[k].beta, low, high)
            owner, low, high = np.tile(owner, 2), np.concatenate([low, middle]), np.concatenate([middle, high])
        mass = log_mass(law, low, high)
        if len(self.members) > 1:
            along = self._directions @ _along(self.members[k])
            r = between(law, low[:, None], high[:, None], 0.5 * (_NODES + 1.0))
            share = self.log_share(k, base[owner][:, None, :] + r[:, :, None] * along)
            mass = mass + np.logaddexp.reduce(share + np.log(0.5 * _NODE_WEIGHTS), axis=1)
        return summed(mass, owner, len(base))

    def log_line(self, k: int, r: Round) -> Floats:
        """log of what each line of a round says of its mode's probability."""
        return r.log_w + self._log_f(k, r.lines.offset @ self._directions.T, r.crossings.intervals)

    def log_share(self, k: int, levels: Floats) -> Floats:
        """log h_k, from the scalar products of the points with all directions (last axis)."""
        parts = log_ndtr((levels - self._beta) / self.tuning.blur)
        top = parts.max(axis=-1, keepdims=True)
        return np.asarray(parts[..., k] - top[..., 0] - np.log(np.sum(np.exp(parts - top), axis=-1)))

    # --- the model of the boundary ---------------------------------------------------------------------------------

    def models(self) -> list[Model | None]:
        """A model of every mode's boundary, from all roots that belong to the mode; None where there are many modes, of
        which few lines each say too little: proposals from such models are worse than none.
        """
        if not self.few or any(mode.direction is None for mode in self.members):
            return [None for _ in self.members]
        z, gradient, worth = self._roots()
        home = np.argmax(z @ self._directions.T - self._beta, axis=1)
        boundaries = tuple(self._fit(k, z, gradient, worth, home) for k in range(len(self.members)))
        return [self._propose(k, boundaries, z[home == k]) for k in range(len(self.members))]

    def _roots(self) -> tuple[Floats, Floats, Floats]:
        """All roots, the gradients there (nan where not known), and the logarithm of what each line is worth."""
        z, gradient, worth = [], [], []
        for k, mode in enumerate(self.members):
            for r in mode.rounds:
                log_line = self.log_line(k, r)
                rows = np.flatnonzero(np.isfinite(r.crossings.root) & np.isfinite(log_line))
                z.append(r.lines.at(rows, r.crossings.root[rows]))
                gradient.append(r.crossings.gradient[rows])
                worth.append(log_line[rows])
        return np.concatenate(z), np.concatenate(gradient), np.concatenate(worth)

    def _fit(self, k: int, z: Floats, gradient: Floats, worth: Floats, home: np.ndarray) -> Boundary | None:
        rows = np.flatnonzero(home == k)
        direction = self.members[k].direction
        if len(rows) < 2 or direction is None:
            return None
        rise = gradient[rows] @ direction
        with np.errstate(all="ignore"):
            slopes = -(gradient[rows] - rise[:, None] * direction) / rise[:, None]
        slopes[~(rise > 0.05 * self.members[k].slope)] = np.nan
        weight = np.exp(np.maximum(0.5 * (worth[rows] - worth[rows].max()), math.log(self.tuning.lightest)))
        root = z[rows] @ direction
        others = np.delete(self._directions, k, axis=0)
        others = others - (others @ direction)[:, None] * direction
        return fit_boundary(
            z[rows] - root[:, None] * direction, root, slopes, weight, self.members[k].rate, others, self.tuning
        )

    def _propose(self, k: int, boundaries: tuple[Boundary | None, ...], seen: Floats) -> Model | None:
        own = boundaries[k]
        if own is None:
            return None
        proposal = propose(own, lambda u: self._modelled(k, boundaries, u), seen @ own.basis, self.rng, self.tuning)
        return Model(boundaries, proposal) if math.isfinite(proposal.log_mean) else None

    def _entry(self, k: int, boundaries: tuple[Boundary | None, ...], u: Floats) -> Floats:
        """Where lines of mode k at coordinates u first enter the event, by the models of all modes."""
        own = boundaries[k]
        assert own is not None
        entry = own.root(u)
        for j, other in enumerate(boundaries):
            if other is None or j == k:
                continue
            frame = np.column_stack([_along(self.members[j]), other.basis])
            level, rise = u @ (own.basis.T @ frame), _along(self.members[k]) @ frame
            entry = np.minimum(entry, other.crossing(level[:, 0], float(rise[0]), level[:, 1:], rise[1:]))
        return np.maximum(entry, own.least)

    def _modelled(self, k: int, boundaries: tuple[Boundary | None, ...], u: Floats) -> Floats:
        """log f̂ at coordinates u, by the models."""
        own = boundaries[k]
        assert own is not None
        base = u @ (own.basis.T @ self._directions.T)
        entry = self._entry(k, boundaries, u)
        return self._log_f(k, base, Intervals(np.arange(len(u)), entry, np.full(len(u), np.inf)))

    def _modelled_lines(self, k: int, r: Round) -> Floats:
        """log f̂ of a round's lines, by the model they were drawn from."""
        assert r.model is not None
        own = r.model.boundaries[k]
        assert own is not None
        return self._modelled(k, r.model.boundaries, r.lines.offset @ own.basis)

    def claimed(self, models: list[Model | None], n: int) -> Floats:
        """``n`` points from what the models say of the event, a little inside; none where a mode has no model.

        On rays the intervals that were found are the model: each should be met in any direction.
        """
        if any(mode.direction is None for mode in self.members):
            return self._claimed_around(self.members[0], n)
        if any(model is None for model in models):
            return np.empty((0, self.meter.event.dim))
        log_mean = np.array([model.proposal.log_mean for model in models if model is not None])
        counts = np.bincount(diagnostics.systematic_resample(log_mean, n, self.rng), minlength=len(models))
        found = [np.empty((0, self.meter.event.dim))]
        for k, (model, count) in enumerate(zip(models, counts.tolist(), strict=True)):
            if model is None or not count:
                continue
            own, mode = model.boundaries[k], self.members[k]
            assert own is not None
            lines, log_w = self._lines(k, model.proposal.guide, 16 * count)
            u = lines.offset @ own.basis
            rows = diagnostics.systematic_resample(log_w + self._modelled(k, model.boundaries, u), count, self.rng)
            entry = self._entry(k, model.boundaries, u[rows])
            begins = mode.law.isf(mode.law.log_sf(entry) - self.tuning.inside - 2.0 * self.misfit(k))
            ends = np.maximum(entry + 0.9 * self._thickness(mode), begins)
            r = between(mode.law, begins, ends, self.rng.random(count))
            found.append(lines.offset[rows] + r[:, None] * _along(mode))
        return np.concatenate(found)

    def _thickness(self, mode: Mode) -> float:
        """How far the event reaches along the mode's lines; mostly without end."""
        through = [r.crossings.intervals[2] - r.crossings.intervals[1] for r in mode.rounds]
        found = np.concatenate(through)
        return float(np.median(found)) if len(found) else math.inf

    def _claimed_around(self, mode: Mode, n: int) -> Floats:
        low, high = (np.concatenate([r.crossings.intervals[end] for r in mode.rounds]) for end in (1, 2))
        mass = log_mass(mode.law, low, high)
        if not n or not np.isfinite(mass).any():
            return np.empty((0, self.meter.event.dim))
        rows = diagnostics.systematic_resample(mass, n, self.rng)
        r = between(mode.law, low[rows], high[rows], self.rng.uniform(self.tuning.inside, 1.0 - self.tuning.inside, n))
        z = self.rng.standard_normal((n, self.meter.event.dim))
        return np.asarray(z * (r / np.linalg.norm(z, axis=1))[:, None])

    def explained(self, z: Floats, models: list[Model | None]) -> np.ndarray:
        """Which catastrophes the models have, nearly: those that no mode's line enters later."""
        out = np.zeros(len(z), dtype=np.bool_)
        for k, (model, mode) in enumerate(zip(models, self.members, strict=True)):
            if mode.direction is None:
                return np.ones(len(z), dtype=np.bool_)
            along = z @ mode.direction
            entry = np.full(len(z), mode.beta)
            if model is not None and (own := model.boundaries[k]) is not None:
                entry = own.root((z - along[:, None] * mode.direction) @ own.basis)
            out |= entry <= along + self.tuning.nearly
            out |= np.linalg.norm(z - mode.beta * mode.direction, axis=1) < 2.0 * self.tuning.nearly
        return out

    # --- what lines say -----------------------------------------------------------------------------------------

    def values(self, k: int, learning: bool) -> tuple[Floats, Floats, float]:
        """What each line says of the mode's probability, relative to the scale.

        Plain, with the control variate, and the control variate's own error.
        """
        plain, varied, errors = [np.empty(0)], [np.empty(0)], [np.empty(0)]
        for r in self.members[k].rounds:
            if r.learning != learning:
                continue
            value = np.exp(self.log_line(k, r) - self.scale)
            plain.append(value)
            if r.model is None:
                varied.append(value)
                errors.append(np.zeros(len(value)))
                continue
            modelled = self._modelled_lines(k, r)
            mean = math.exp(r.model.proposal.log_mean - self.scale)
            varied.append(value - np.exp(r.log_w + modelled - self.scale) + mean)
            own = mean * math.hypot(r.model.proposal.error, 0.5 * r.model.proposal.unseen)
            errors.append(np.full(len(value), own))
        error = np.concatenate(errors)
        return np.concatenate(plain), np.concatenate(varied), float(error.mean()) if len(error) else 0.0

    def learnt(self, k: int) -> float:
        mode = self.members[k]
        parts = [self.log_line(k, r) for r in mode.rounds if r.learning]
        return diagnostics.log_mean_exp(np.concatenate(parts))[0]

    def misfit(self, k: int) -> float:
        """Nats by which the model of a mode errs on fresh lines (root mean square, as each counts for the estimate)."""
        square = weight = 0.0
        for r in self.members[k].rounds:
            if r.model is not None and not r.learning:
                log_line = self.log_line(k, r)
                gap = log_line - r.log_w - self._modelled_lines(k, r)
                share = np.exp(log_line - self.scale)
                weight += float(share.sum())
                square += float(share @ np.where(share > 0.0, gap, 0.0) ** 2)
        return math.sqrt(square / weight) if weight > 0.0 else 0.0

    def particles(self) -> Particles | None:
        z, log_w, severity = [], [], []
        for k, mode in enumerate(self.members):
            count = sum(len(r.log_w) for r in mode.rounds)
            for r in mode.rounds:
                weight = r.log_w - math.log(count)
                owner, low, high = r.crossings.intervals
                weight = weight + summed(log_mass(r.lines.law, low, high), owner, len(weight))
                share = self.log_share(k, r.crossings.at @ self._directions.T) if len(self.members) > 1 else 0.0
                z.append(r.crossings.at)
                log_w.append(weight[r.crossings.on] + share)
                severity.append(r.crossings.severity)
        every = np.concatenate(log_w)
        if not len(every):
            return None
        return Particles(np.concatenate(z), every - diagnostics.log_sum_exp(every), np.concatenate(severity))


def _along(mode: Mode) -> Floats:
    assert mode.direction is not None
    return mode.direction
