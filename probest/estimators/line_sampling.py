r"""Line sampling: one direction is integrated exactly, the others are sampled.

Along a unit vector a, z splits into :math:`z_\perp + r a`, and the event cuts each line in intervals whose ends are
roots of the severity. With h_k a partition of unity over the modes k and q_k a law of :math:`z_\perp`,

.. math:: P = \sum_k E_{q_k}\Big[ \frac{\varphi(z_\perp)}{q_k(z_\perp)}
          \int_{s \ge 0} h_k(z_\perp + r a_k)\, \varphi(r)\, dr \Big].

Its mean is P for *any* directions, if all roots are found; good directions make what is averaged nearly constant. They
are those of the design points (:mod:`probest.lines.design_points`), or rays from the origin where catastrophes surround
it (then r is chi-distributed: directional sampling). Nothing is counted twice, since h sums to 1: its shares are those
of unit normals at the design points, weighted by their first-order probabilities.

*Rounds.* First lines learn: roots and the gradients there give a quadratic model of the boundary over the few
coordinates that matter (:mod:`probest.lines.boundary`). Gradients that point to an unknown mode start a new walk. The
model gives a proposal q_k, a guess of every root, and a control variate whose mean takes no model calls; fresh lines
measure what the model misses. To stop by their spread, and to take the better of two estimates, costs a bias that
vanishes with the number of lines. Where they show the model to be poor it learns once more, and fresh lines are drawn
anew.

*All roots.* Each line is asked at one random point beyond its root (these points are the particles); lines that
answer "safe", and a few others for audit, are looked at on a grid (:mod:`probest.lines.roots`). Where lines
were seen to leave the event again, or to enter it elsewhere, all are.

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
from probest.estimators.base import Need, check_needs
from probest.evidence import Code, EventLike, Evidence, Floats, Note, Particles, Run
from probest.guides.base import Guide, Prior
from probest.lines.along import Chi, Normal, Position, between, log_mass
from probest.lines.boundary import Boundary, Proposal, fit_boundary, propose
from probest.lines.design_points import DesignPoints, Search, even_normals
from probest.lines.roots import Crossings, Intervals, Pencil, find_crossings
from probest.seeds import generator

__all__ = ["LineSampling"]

_NODES, _NODE_WEIGHTS = np.polynomial.legendre.leggauss(6)
_FAR = math.log(1e-4)  # what lies beyond is at most this share of the mode
_FLOOR = 0.005  # of the standard error: what lines that agree cannot tell
_MOST_MODES = 12
_SLOWEST = 0.5  # nats a unit at least: below the bulk the mass beyond hardly changes
_CHEAP, _DEAR = 8, 40  # calls to keep for a line, if it is simple and if it needs a grid
_LIGHTEST = 0.2  # weight in the fit of a line that hardly counts
_LEAST = 5  # fresh lines a mode
_ROUNDS = 20
_LESSONS = 4  # each with twice as many lines as the one before
_CURVED = 1.5  # times as many fresh lines where a boundary bends
_POOR = 0.2  # misfit of a model, in nats
_MANY = 32  # fresh lines where the model is poor
_STRETCH = 1.5  # width of the first lines in few dimensions: to see what bends away
_FEW = 8  # dimensions
_LOOKS = 5
_AROUND = 16  # points far out that are asked for modes


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
    fresh: int = 8
    needs: ClassVar[frozenset[Need]] = frozenset({"gradient", "unconditioned"})

    def __post_init__(self) -> None:
        if self.precision is not None and not self.precision > 0.0:
            raise ValueError(f"precision must be positive (a standard error of log P), got {self.precision}")
        for name, least in (("starts", 2), ("first", 4), ("fresh", 6)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

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
            ledger = [_nothing(self, meter.calls, meter.seconds, note)]
        return Run(tuple(ledger), meter.calls)


class _Model(NamedTuple):
    """The boundaries of all modes, and for one of them a proposal made from them."""

    boundaries: tuple[Boundary | None, ...]
    proposal: Proposal


class _Round(NamedTuple):
    """Lines of one mode, drawn from one law: log φ/q of each, and the model that was fixed before they were drawn."""

    lines: Pencil
    log_w: Floats
    crossings: Crossings
    model: _Model | None
    learning: bool


class _Values(NamedTuple):
    """What each fresh line of a mode says of its probability, relative to the scale; their standard deviation, at least
    what is known of it; and an error that all have in common.
    """

    values: Floats
    spread: float
    error: float


@dataclass
class _Mode:
    """One family of parallel lines (or rays, where direction is None) and what was found on them."""

    direction: Floats | None
    beta: float
    slope: float
    law: Position
    rounds: list[_Round] = field(default_factory=list)
    rough: bool = False

    @property
    def far(self) -> float:
        level = self.law.log_sf(np.array([max(self.beta, 0.0)])) + _FAR
        return float(self.law.isf(level)[0])

    @property
    def rate(self) -> float:
        """Nats that the mass beyond the boundary loses per unit."""
        r = np.array([self.beta, self.beta + 1e-4])
        fall = self.law.log_sf(r)
        rate = float(fall[0] - fall[1]) / 1e-4
        return max(rate, _SLOWEST) if math.isfinite(rate) else max(self.beta, _SLOWEST)


@dataclass
class _Campaign:
    """One run: modes, rounds of lines, and the verdict."""

    method: LineSampling
    meter: Meter
    rng: np.random.Generator
    modes: list[_Mode] = field(default_factory=list)
    spent: int = 0
    price: float = 0.0
    complete: bool = True
    scale: float = 0.0

    def run(self) -> list[Evidence]:
        few = self.meter.event.dim <= _FEW
        search = Search(self.meter, calls=self.meter.left // 2, each=4 if few else 8)
        starts = (5 * self.method.starts) // 8 if few else self.method.starts
        if not search.run(self.rng, starts, 6 * self.method.starts):
            return [self._nothing(Code.NO_BOUNDARY, "gradients lead to no boundary of the event.")]
        points = self._look_around(search)
        ledger = [self._heuristic("design points (FORM)", points.log_form)]
        around = points.origin >= 0.0 or _endless(points)
        if not around:
            points = self._explore(search, points)
            around = _endless(points)
        if around:
            self._surround(points)
        self.scale = max(self._learnt(k) for k in range(len(self.modes)))
        if not math.isfinite(self.scale):
            return [*ledger, self._nothing(Code.NO_HITS, "no line through the design points meets the event.")]
        models = self._models()
        if not around:
            second = diagnostics.log_sum_exp(np.array([m.proposal.log_mean for m in models if m is not None]))
            ledger.append(self._heuristic("curved design points (SORM)", min(second, 0.0)))
        lessons = 0
        counts = self._first_counts(models)
        for _ in range(_ROUNDS):
            for k, count in enumerate(counts):
                self._measure(k, models[k], count)
            chosen = self._all_chosen()
            if self._precise(chosen):
                break
            counts = self._further_counts(chosen)
            if not sum(counts):
                size = self.method.first << lessons
                if around or lessons == _LESSONS or self.meter.left < 12 * size * len(self.modes):
                    break
                lessons += 1
                self._relearn(models, size)
                counts = self._further_counts(self._all_chosen())
            models = self._models()
        return [*ledger, self._conclude(points, search)]

    # --- finding modes ---------------------------------------------------------------------------------------------

    def _look_around(self, search: Search) -> DesignPoints:
        """Design points, after points far out have been asked for more of them (unless there is no end of them)."""
        quiet = 0
        for _ in range(_LOOKS):
            points = search.points()
            if _endless(points) or quiet == (1 if len(search.arrived) == 1 else 2):
                break
            quiet = 0 if search.look_around(self.rng, _AROUND) else quiet + 1
        return search.points()

    def _surround(self, points: DesignPoints) -> None:
        """Rays from the origin instead of modes."""
        dim = self.meter.event.dim
        beta = float(np.median(np.abs(points.beta)))
        self.modes = [_Mode(None, beta, float(np.median(points.slope)), Chi(dim), rough=points.origin >= 0.0)]
        self._normals = np.empty((0, dim))
        self._learn(0)

    def _explore(self, search: Search, points: DesignPoints) -> DesignPoints:
        """First lines through every mode; where their gradients lead to further modes, these too."""
        for attempt in range(_LOOKS):
            self._adopt(points)
            for k in range(len(self.modes)):
                if not self.modes[k].rounds:
                    self._learn(k)
            suspects = self._suspects()
            last = attempt == _LOOKS - 1 or len(self.modes) > _MOST_MODES
            if last or not len(suspects) or not search.start_from(suspects):
                break
            before, points = len(points.beta), search.points()
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
        """Points on lines that are about as near as the known modes, but lead elsewhere.

        Roots whose gradients point away from known modes, and intervals of the event that belong to none.
        """
        least = min(mode.beta for mode in self.modes)
        found, target = [], []
        for mode in self.modes:
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
        apart = np.linalg.norm(towards[:, None] - self._normals[None], axis=2)
        elsewhere = (apart > 0.5 * (1.0 + 0.5 * away)[:, None]).all(axis=1)
        z = z[elsewhere & (away < least + 1.2) & (np.sum(towards * z, axis=1) > 0.0)]
        return np.asarray(z[np.argsort(np.linalg.norm(z, axis=1), kind="stable")[:4]])

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
        if mode.direction is None or not 1 < dim <= _FEW:
            lines, log_w = self._lines(k, Prior(dim), n)
        else:  # spread out evenly, so that what bends away is seen
            across = np.linalg.qr(np.column_stack([mode.direction, np.eye(dim)]))[0][:, 1:]
            u = _STRETCH * even_normals(n, dim - 1, self.rng)
            log_w = np.sum(0.5 * (u / _STRETCH) ** 2 - 0.5 * u**2 + math.log(_STRETCH), axis=1)
            lines = Pencil(u @ across.T, np.broadcast_to(mode.direction, (n, dim)), mode.law)
        self._add(k, lines, log_w, np.full(n, mode.beta), None, gradient=mode.direction is not None, learning=True)

    def _relearn(self, models: list[_Model | None], n: int) -> None:
        """Fresh lines with gradients where the model now puts the event; what was measured so far only teaches."""
        for k, (mode, model) in enumerate(zip(self.modes, models, strict=True)):
            mode.rounds = [r._replace(learning=True) for r in mode.rounds]
            self._measure(k, model, n, gradient=True)

    def _measure(self, k: int, model: _Model | None, n: int, *, gradient: bool = False) -> None:
        """Fresh lines of a mode, drawn from the model's proposal."""
        mode = self.modes[k]
        n = min(n, self.meter.left // (_DEAR if mode.rough else _CHEAP))
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
        model: _Model | None,
        *,
        gradient: bool,
        learning: bool = False,
    ) -> None:
        mode = self.modes[k]
        n = len(log_w)
        scan = np.full(n, mode.rough)
        scan[: n // 16 + (1 if learning else 0)] = True  # audit
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
        )
        self.price = max((self.meter.calls - before) / n, 0.5 * self.price)
        mode.rounds.append(_Round(lines, log_w, crossings, model, learning))
        mode.rough |= bool(crossings.rough.any())
        self.complete &= crossings.complete

    def _log_f(self, k: int, base: Floats, intervals: Intervals) -> Floats:
        """log of the (partitioned) probability of the event on each line; base: scalar products with design points."""
        owner, low, high = intervals
        law = self.modes[k].law
        mass = log_mass(law, low, high)
        if len(self.modes) > 1:
            along = self._normals @ _along(self.modes[k])
            r = between(law, low[:, None], high[:, None], 0.5 * (_NODES + 1.0))
            share = self._log_share(k, base[owner][:, None, :] + r[:, :, None] * along)
            mass = mass + np.log(np.exp(share) @ (0.5 * _NODE_WEIGHTS))
        return _summed(mass, owner, len(base))

    def _log_line(self, k: int, r: _Round) -> Floats:
        """log of what each line of a round says of its mode's probability."""
        return r.log_w + self._log_f(k, r.lines.offset @ self._normals.T, r.crossings.intervals)

    def _log_share(self, k: int, levels: Floats) -> Floats:
        """log h_k, from the scalar products of the points with all design points (last axis)."""
        parts = self._log_p + levels
        top = parts.max(axis=-1, keepdims=True)
        return np.asarray(parts[..., k] - top[..., 0] - np.log(np.sum(np.exp(parts - top), axis=-1)))

    # --- the model of the boundary ---------------------------------------------------------------------------------

    def _models(self) -> list[_Model | None]:
        """A model of every mode's boundary, from all roots that belong to the mode."""
        if any(mode.direction is None for mode in self.modes):
            return [None for _ in self.modes]
        z, gradient, worth = self._roots()
        home = np.argmax(self._log_p + z @ self._normals.T, axis=1)
        boundaries = tuple(self._fit(k, z, gradient, worth, home) for k in range(len(self.modes)))
        return [self._propose(k, boundaries, z[home == k]) for k in range(len(self.modes))]

    def _roots(self) -> tuple[Floats, Floats, Floats]:
        """All roots, the gradients there (nan where not known), and the logarithm of what each line is worth."""
        z, gradient, worth = [], [], []
        for k, mode in enumerate(self.modes):
            for r in mode.rounds:
                log_line = self._log_line(k, r)
                rows = np.flatnonzero(np.isfinite(r.crossings.root) & np.isfinite(log_line))
                z.append(r.lines.at(rows, r.crossings.root[rows]))
                gradient.append(r.crossings.gradient[rows])
                worth.append(log_line[rows])
        return np.concatenate(z), np.concatenate(gradient), np.concatenate(worth)

    def _fit(self, k: int, z: Floats, gradient: Floats, worth: Floats, home: np.ndarray) -> Boundary | None:
        rows = np.flatnonzero(home == k)
        direction = self.modes[k].direction
        if len(rows) < 2 or direction is None:
            return None
        rise = gradient[rows] @ direction
        with np.errstate(all="ignore"):
            slopes = -(gradient[rows] - rise[:, None] * direction) / rise[:, None]
        slopes[~(rise > 0.05 * self.modes[k].slope)] = np.nan
        weight = np.exp(np.maximum(0.5 * (worth[rows] - worth[rows].max()), math.log(_LIGHTEST)))
        root = z[rows] @ direction
        others = np.delete(self._normals, k, axis=0)
        others = others - (others @ direction)[:, None] * direction
        return fit_boundary(z[rows] - root[:, None] * direction, root, slopes, weight, self.modes[k].rate, others)

    def _propose(self, k: int, boundaries: tuple[Boundary | None, ...], seen: Floats) -> _Model | None:
        own = boundaries[k]
        if own is None:
            return None
        proposal = propose(own, lambda u: self._modelled(k, boundaries, u), seen @ own.basis, self.rng)
        return _Model(boundaries, proposal) if math.isfinite(proposal.log_mean) else None

    def _entry(self, k: int, boundaries: tuple[Boundary | None, ...], u: Floats) -> Floats:
        """Where lines of mode k at coordinates u first enter the event, by the models of all modes."""
        own = boundaries[k]
        assert own is not None
        entry = own.root(u)
        for j, other in enumerate(boundaries):
            if j == k or other is None:
                continue
            frame = np.column_stack([_along(self.modes[j]), other.basis])
            level, rise = u @ (own.basis.T @ frame), _along(self.modes[k]) @ frame
            entry = np.minimum(entry, other.crossing(level[:, 0], float(rise[0]), level[:, 1:], rise[1:]))
        return np.maximum(entry, own.least)

    def _modelled(self, k: int, boundaries: tuple[Boundary | None, ...], u: Floats) -> Floats:
        """log f̂ at coordinates u, by the models."""
        own = boundaries[k]
        assert own is not None
        base = u @ (own.basis.T @ self._normals.T)
        entry = self._entry(k, boundaries, u)
        return self._log_f(k, base, Intervals(np.arange(len(u)), entry, np.full(len(u), np.inf)))

    def _modelled_lines(self, k: int, r: _Round) -> Floats:
        """log f̂ of a round's lines, by the model they were drawn from."""
        assert r.model is not None
        own = r.model.boundaries[k]
        assert own is not None
        return self._modelled(k, r.model.boundaries, r.lines.offset @ own.basis)

    # --- estimates -------------------------------------------------------------------------------------------------

    def _values(self, k: int, learning: bool) -> tuple[Floats, Floats, float]:
        """What each line says of the mode's probability, relative to the scale.

        Plain, with the control variate, and the control variate's own error.
        """
        plain, varied, errors = [np.empty(0)], [np.empty(0)], [np.empty(0)]
        for r in self.modes[k].rounds:
            if r.learning != learning:
                continue
            value = np.exp(self._log_line(k, r) - self.scale)
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

    def _learnt(self, k: int) -> float:
        mode = self.modes[k]
        parts = [self._log_line(k, r) for r in mode.rounds if r.learning]
        return diagnostics.log_mean_exp(np.concatenate(parts))[0]

    def _chosen(self, k: int) -> _Values:
        """Values of the fresh lines of a mode: those with the smaller variance.

        Few lines may agree by chance. How much lines from the proposal should vary is known from the model.
        """
        plain, varied, error = self._values(k, learning=False)
        models = [r.model.proposal for r in self.modes[k].rounds if r.model is not None and not r.learning]
        expected = max((m.spread * math.exp(m.log_mean - self.scale) for m in models), default=0.0)
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

    def _misfit(self, k: int) -> float:
        """Nats by which the model of a mode errs on fresh lines (root mean square, as each counts for the estimate)."""
        square = weight = 0.0
        for r in self.modes[k].rounds:
            if r.model is not None and not r.learning:
                log_line = self._log_line(k, r)
                gap = log_line - r.log_w - self._modelled_lines(k, r)
                share = np.exp(log_line - self.scale)
                weight += float(share.sum())
                square += float(share @ np.where(share > 0.0, gap, 0.0) ** 2)
        return math.sqrt(square / weight) if weight > 0.0 else 0.0

    def _least(self, chosen: list[_Values]) -> Floats:
        """Fresh lines that each mode needs: more where its model is poor, since few may then miss what matters."""
        means = np.array([np.sum(c.values) / max(len(c.values), 1) for c in chosen])
        share = means / max(float(means.sum()), 1e-300)
        poor = np.array([self._misfit(k) > _POOR for k in range(len(self.modes))])
        return np.where(poor, np.maximum(_MANY * np.sqrt(np.maximum(share, 0.0)), _LEAST), _LEAST)

    def _precise(self, chosen: list[_Values]) -> bool:
        mean, error = self._spread(chosen)
        done = np.array([len(c.values) for c in chosen])
        precision = self.method.precision
        if precision is None or not mean > 0.0 or np.any(done < self._least(chosen)):
            return False
        # the error of few lines may be small by chance: its upper confidence limit counts
        dof = max(int(done.sum()) - len(done), 1)
        return error * math.sqrt(dof / float(chdtri(dof, 0.8))) <= precision * mean

    def _first_counts(self, models: list[_Model | None]) -> list[int]:
        """Fresh lines for each mode, shared out by what the models say of the modes."""
        sums = np.array([self._learnt(k) if m is None else m.proposal.log_mean for k, m in enumerate(models)])
        share = np.exp(sums - diagnostics.log_sum_exp(sums))
        bends = any(m is not None and m.proposal.spread > 0.0 for m in models)
        lines = self.method.fresh * 0.5 * (1 + len(models)) * (_CURVED if bends else 1.0)
        return [max(_LEAST, round(lines * part)) for part in share.tolist()]

    def _further_counts(self, chosen: list[_Values]) -> list[int]:
        """Fresh lines for each mode to reach the precision; zeros where the calls that are left do not suffice."""
        mean, _ = self._spread(chosen)
        spread, done = np.array([c.spread for c in chosen]), np.array([len(c.values) for c in chosen])
        if not mean > 0.0 or not np.sum(spread) > 0.0:
            return [0 for _ in chosen]
        aim = (self.method.precision or 1e-9) * mean * 0.9
        wanted = 1.1 * np.sum(spread) * spread / aim**2
        more = np.maximum(0.0, np.maximum(wanted, self._least(chosen)) - done)
        if not np.any(more > 0.0):  # nearly there: what is missing is certainty of the error itself
            more[int(np.argmax(spread))] = _LEAST
        more = np.where(more > 0.0, np.maximum(more, _LEAST), 0.0)
        afford = self.meter.left / (max(self.price, 2.0) * max(float(more.sum()), 1.0))
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
        return _nothing(self.method, self._calls(), self.meter.seconds, Note(code, sentence))

    def _conclude(self, points: DesignPoints, search: Search) -> Evidence:
        chosen = self._all_chosen()
        total = sum(len(c.values) for c in chosen)
        mean, _ = self._spread(chosen)
        if not mean > 0.0 or any(len(c.values) < _LEAST for c in chosen):
            sentence = "too few lines met the event: its boundary is too rough, or the budget too small."
            return self._nothing(Code.FEW_COUNT, sentence)
        # deviations as if all lines were one sample: their mean square over n - 1 is the stratified variance
        deviation = np.concatenate([_deviations(c) * (total / (len(c.values) * mean)) for c in chosen])
        sampled, _ = diagnostics.deviation_error(deviation)
        log_prob = self.scale + math.log(mean)
        rounds = [r for mode in self.modes for r in mode.rounds if not r.learning]
        slip = float(np.mean(np.concatenate([r.crossings.slip for r in rounds])))
        systematic = math.hypot(*(c.error / mean for c in chosen), slip, _FLOOR, 0.5 * points.left_out)
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
            claim="consistent",
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

    def _complaints(self, error: float, deviation: Floats, log_prob: float, search: Search) -> tuple[Note, ...]:
        notes = []
        wanted = max(0.1, 2.0 * (self.method.precision or 0.05))
        if error > wanted:
            sentence = f"the standard error {error:.2f} is above {wanted:.2f}: raise the budget."
            notes.append(Note(Code.IMPRECISE, sentence))
        largest = float(np.max(np.abs(deviation))) / len(deviation)
        if largest > 0.25:
            sentence = "a single line carries much of the estimate: use tempering, or raise the budget."
            notes.append(Note(Code.ONE_CARRIES, sentence))
        if not self.complete:
            notes.append(Note(Code.BUDGET_SPENT, "the budget ran out while lines were looked at: raise it."))
        if search.lost > 0.6 * search.begun:
            sentence = "most gradient walks found no boundary: modes may have been missed; use tempering."
            notes.append(Note(Code.STRAYED, sentence))
        learnt = [self._values(k, learning=True)[0] for k in range(len(self.modes))]
        first = sum(float(np.mean(values)) for values in learnt)
        spread = math.sqrt(sum(float(np.var(values)) / max(len(values) - 1, 1) for values in learnt))
        now = math.exp(log_prob - self.scale)
        if abs(first - now) > 4.0 * math.hypot(spread, error * now) + 0.2 * now:
            sentence = "first and fresh lines disagree: a few lines carry the estimate; use tempering."
            notes.append(Note(Code.DISAGREE, sentence))
        return tuple(notes)

    def _particles(self) -> Particles | None:
        z, log_w, severity = [], [], []
        for k, mode in enumerate(self.modes):
            count = sum(len(r.log_w) for r in mode.rounds)
            for r in mode.rounds:
                weight = r.log_w - math.log(count)
                owner, low, high = r.crossings.intervals
                weight = weight + _summed(log_mass(r.lines.law, low, high), owner, len(weight))
                share = self._log_share(k, r.crossings.at @ self._normals.T) if len(self.modes) > 1 else 0.0
                z.append(r.crossings.at)
                log_w.append(weight[r.crossings.on] + share)
                severity.append(r.crossings.severity)
        every = np.concatenate(log_w)
        if not len(every):
            return None
        return Particles(np.concatenate(z), every - diagnostics.log_sum_exp(every), np.concatenate(severity))


def _endless(points: DesignPoints) -> bool:
    """Whether there are more modes than directions could serve: as good as every start found its own."""
    single = int(np.sum(points.starts == 1))
    return len(points.beta) > _MOST_MODES or (single >= 5 and single >= 0.7 * int(np.sum(points.starts)))


def _along(mode: _Mode) -> Floats:
    assert mode.direction is not None
    return mode.direction


def _deviations(chosen: _Values) -> Floats:
    """Deviations from the mean, stretched where more spread is known than they show."""
    deviation = chosen.values - np.mean(chosen.values)
    shown = float(np.std(chosen.values))
    if shown >= 0.5 * chosen.spread:
        return np.asarray(deviation * (chosen.spread / shown if shown > 0.0 else 1.0))
    sign = np.where(np.arange(len(deviation)) % 2 == 0, 1.0, -1.0)
    return np.asarray(sign * chosen.spread)


def _summed(log_mass: Floats, owner: np.ndarray, n: int) -> Floats:
    """log of the sum over each line's intervals, ``(n,)``."""
    total = np.full(n, -np.inf)
    np.logaddexp.at(total, owner, log_mass)
    return total


def _nothing(method: LineSampling, calls: int, seconds: float, note: Note) -> Evidence:
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
