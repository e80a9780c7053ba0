r"""Design points: the most likely catastrophes, found by gradient steps from many starts at once.

A design point is a local minimum of ‖z‖ on the boundary of the event: the centre of a mode, and the outer normal
there is the direction in which the mode is left fastest. From a point u with severity s and gradient g the linearised
boundary is nearest to the origin at

.. math:: u^\ast = \frac{g \cdot u - s}{\|g\|^2}\, g ,

to which every start steps (Hasofer & Lind 1974; Rackwitz & Fiessler 1978) if the merit ½‖u‖² + c |s| falls there
(Zhang & Der Kiureghian 1995). If not, the boundary bends or has a corner: the linearisation there joins the one at u,
and the next target is nearest to the origin beyond both, and so on (cutting planes, Kelley 1960; exact where the event
is convex); after some of these the step is halved. Starts whose targets meet go on as one, so that a linear boundary
costs one gradient a start and one more to see that it is linear.

A steep branch of the severity shows only near its limit, hidden until there by flatter branches, so no start near the
origin sees it. Hence :meth:`Search.look_around` asks points far out; catastrophes that no known mode explains become
starts, at the place where the ray to them enters the event. From there one walk more stays *within* the event, and so
on the branch that rules there: it goes towards the nearest point beyond all planes that it has met, as far as that is a
catastrophe, and takes up the plane that stops it (an active set).

The half-space beyond the design point gives the first-order estimate (FORM) Φ(−β), β = ‖u‖. It is a heuristic.
It fails on curved boundaries, and where modes were missed; :mod:`probest.estimators.line_sampling` mends the first, and
the number of starts that arrived at each mode tells of the second.

References: Kelley (1960), The cutting-plane method for solving convex programs; Lawson & Hanson (1974), ch. 23;
Hasofer & Lind (1974), Exact and invariant second-moment code format; Rackwitz & Fiessler (1978),
Structural reliability under combined random load sequences; Zhang & Der Kiureghian (1995), Two improved algorithms
for reliability analysis; Der Kiureghian & Dakessian (1998), Multiple design points in first and second-order
reliability.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import scipy
from scipy import optimize
from scipy.special import log_ndtr, ndtri

from probest.budget import GRADIENT_CALLS, Meter, UndefinedError
from probest.diagnostics import log_sum_exp
from probest.evidence import Evaluation, Floats
from probest.lines.tuning import LineTuning
from probest.surrogates.watched import OneKind

__all__ = ["DesignPoints", "Search", "even_normals", "linearised"]


_FURTHEST = 100.0  # no limit is looked for further out: log P there is below -5000


class DesignPoints(NamedTuple):
    """Distinct modes, the most likely first.

    direction: ``(k, dim)`` unit outer normals. beta: ``(k,)`` distance of the boundary from the origin along them.
    slope: ``(k,)`` rise of the severity per unit of distance. starts: ``(k,)`` how many starts arrived at each.
    left_out: first-order probability of modes that were too unlikely to keep, relative to the kept.
    lost: starts that did not arrive anywhere. origin: severity at z = 0. around: whether modes lie in the starts' own
    directions, so that there is no end of them.
    """

    direction: Floats
    beta: Floats
    slope: Floats
    starts: np.ndarray
    left_out: float
    lost: int
    origin: float
    around: bool

    @property
    def log_form(self) -> float:
        """First-order estimate of log P, modes added up."""
        return min(0.0, log_sum_exp(np.asarray(log_ndtr(-self.beta), dtype=np.float64)))

    @property
    def met_once(self) -> float:
        """First-order share of modes that one start alone arrived at: about that of those that none did (Good 1953)."""
        once = np.asarray(log_ndtr(-self.beta[self.starts == 1]), dtype=np.float64)
        return math.exp(log_sum_exp(once) - self.log_form) if len(once) else 0.0


@dataclass
class _Walk:
    """A gradient walk: the last accepted point, linearisations since then, and where it goes next."""

    tuning: LineTuning
    u: Floats
    severity: float
    grad: Floats
    target: Floats
    planes: list[_Plane]
    weight: int = 1
    part: float = 1.0
    stuck: bool = False
    start: Floats | None = None
    kind: int | None = None  # of catastrophe, by itself

    def __post_init__(self) -> None:
        self.reach = float(np.linalg.norm(self.target))

    @classmethod
    def at(
        cls,
        tuning: LineTuning,
        u: Floats,
        severity: float,
        grad: Floats,
        weight: int = 1,
        part: float = 1.0,
        start: Floats | None = None,
        kind: int | None = None,
    ) -> _Walk:
        plane = _plane(u, severity, grad)
        return cls(tuning, u, severity, grad, plane.normal * plane.offset, [plane], weight, part, False, start, kind)

    @property
    def straight(self) -> bool:
        """Whether it went on in the direction that it started in: towards or away from the origin."""
        if self.start is None:
            return False
        size = float(np.linalg.norm(self.start)) * float(np.linalg.norm(self.target))
        return abs(float(self.start @ self.target)) > 0.7 * size

    @property
    def candidate(self) -> Floats:
        return self.u + self.part * (self.target - self.u)

    @property
    def gap(self) -> float:
        """Distance of the boundary from u, by the linearisation."""
        return abs(self.severity) / float(np.linalg.norm(self.grad))

    @property
    def arrived(self) -> bool:
        near = self.tuning.arrival * min(max(1.0, 0.2 * self.reach), self.tuning.far_arrival)
        return self.gap <= near and (self.stuck or float(np.linalg.norm(self.target - self.u)) <= near)

    @property
    def _cornered(self) -> bool:
        """Whether planes found right here already make u the nearest point."""
        here = [plane for plane in self.planes if float(np.linalg.norm(plane.base - self.u)) <= 0.5]
        target = _nearest(here)
        return target is not None and float(np.linalg.norm(target - self.u)) <= 2.0 * self.tuning.arrival

    def meets(self, other: _Walk, distance: float) -> bool:
        """Whether the targets are within ``distance``, in units that grow with the distance from the origin.

        Those of different kinds have to be nearer: they are known to be two.
        """
        if self.kind != other.kind and self.kind is not None and other.kind is not None:
            distance *= self.tuning.same_kind
        within = distance * (1.0 + 0.5 * other.reach)
        return abs(self.reach - other.reach) <= within and float(np.linalg.norm(self.target - other.target)) <= within

    def stepped(self, severity: float, grad: Floats) -> _Walk:
        """The walk after the candidate was evaluated."""
        candidate = self.candidate
        norm = float(np.linalg.norm(self.grad))
        price = (2.0 * max(float(np.linalg.norm(self.u)), float(np.linalg.norm(self.target))) + 1.0) / norm
        telling = _telling(severity, grad)
        units = len(self.planes) > 1 and telling  # limits may have units of their own: each in distances
        price_after = price * norm / float(np.linalg.norm(grad)) if units else price
        before = 0.5 * float(self.u @ self.u) + price * abs(self.severity)
        after = 0.5 * float(candidate @ candidate) + price_after * abs(severity)
        hoped = 0.5 * float(candidate @ candidate)
        if telling and after < before - self.tuning.sufficient * max(before - hoped, 0.0):
            part = min(1.0, 2.0 * self.part)
            ahead = _Walk.at(self.tuning, candidate, severity, grad, self.weight, part, self.start, self.kind)
            near = [
                plane for plane in self.planes if float(np.linalg.norm(plane[2] - candidate)) < self.tuning.near_planes
            ]
            if len(self.planes) > 1 and near:  # where planes together helped they still bound the event
                planes = [*near, *ahead.planes][-self.tuning.planes :]
                target = _nearest(planes)
                if target is not None:
                    together = replace(ahead, planes=planes, target=target)
                    # standing still between planes from elsewhere is not arriving: here the event is not convex
                    return together if not together.arrived or together._cornered else replace(ahead, part=0.5)
            return ahead
        planes = [*self.planes, _plane(candidate, severity, grad)] if telling else self.planes
        if telling and self.part == 1.0 and len(planes) <= self.tuning.planes:
            target = _nearest(planes)
            if target is not None:
                return replace(self, target=target, planes=planes, part=1.0)
        if self.part < 0.1:  # no step helps: at best this is a corner on the boundary
            return replace(self, target=self.u, planes=planes, part=1.0, stuck=True)
        first = _Walk.at(self.tuning, self.u, self.severity, self.grad)
        return replace(self, target=first.target, planes=first.planes, part=0.4 * self.part)


def _telling(severity: float, grad: Floats) -> bool:
    with np.errstate(over="ignore"):
        norm = float(np.linalg.norm(grad))
    return math.isfinite(severity) and math.isfinite(norm) and norm > 1e-12 * abs(severity)


class _Plane(NamedTuple):
    """The event linearised at ``base``: ``normal · z >= offset``."""

    normal: Floats
    offset: float
    base: Floats


def _plane(u: Floats, severity: float, grad: Floats) -> _Plane:
    normal, offset = linearised(u[None], np.array([severity]), grad[None])
    return _Plane(normal[0], float(np.clip(offset[0], -_FURTHEST, _FURTHEST)), u)


def linearised(z: Floats, severity: Floats, grad: Floats) -> tuple[Floats, Floats]:
    """The boundary linearised at each row of z, ``(n, dim)``: unit normals, and distances from the origin ``(n,)``.

    Normal times distance is the step of Hasofer and Lind (1974). Not finite where a gradient is zero.
    """
    with np.errstate(all="ignore"):
        slope = np.linalg.norm(grad, axis=1)
        return grad / slope[:, None], (np.einsum("ij,ij->i", grad, z) - severity) / slope


def _nearest(planes: list[_Plane]) -> Floats | None:
    """The point of least norm beyond all planes (least distance programming); None if there is none."""
    normals, offsets = np.array([plane.normal for plane in planes]), np.array([plane.offset for plane in planes])
    basis, inside = np.linalg.qr(normals.T)
    matrix = np.vstack([inside, offsets])
    goal = np.zeros(len(matrix))
    goal[-1] = 1.0
    residual = matrix @ scipy.optimize.nnls(matrix, goal)[0] - goal
    if abs(residual[-1]) < 1e-9:
        return None
    return np.asarray(basis @ (-residual[:-1] / residual[-1]))


Room = Callable[[int], bool]


@dataclass
class Search:
    """A search that can be resumed with more starts, once other evidence suggests where a mode may be.

    each: starts for each mode, where there are several. suspects: where catastrophes that no known mode explained at
    the time enter the event. slopes: unit gradients where walks began. spent: model calls so far. climbs, summits:
    climbs from plain draws, and those that ended below the limit. explored: calls for these, which are not in spent.
    supports: the coordinates that kinds of catastrophe depend on, ``(dim,)`` bool each.
    """

    meter: Meter
    calls: int | None = None
    arrived: list[_Walk] = field(default_factory=list)
    begun: int = 0
    lost: int = 0
    each: int = 8
    origin: float = math.nan
    suspects: list[Floats] = field(default_factory=list)
    slopes: list[Floats] = field(default_factory=list)
    spent: int = 0
    climbs: int = 0
    summits: int = 0
    explored: int = 0
    supports: list[np.ndarray] = field(default_factory=list)
    tuning: LineTuning = field(default_factory=LineTuning, repr=False)

    def __post_init__(self) -> None:
        self.floor = self.meter.left - min(self.meter.left, self.calls if self.calls is not None else self.meter.left)

    def _evaluate(self, z: Floats, gradient: bool = False) -> Evaluation:
        before = self.meter.calls
        result = self.meter.evaluate(z, gradient=gradient)
        self.spent += self.meter.calls - before
        return result

    def _evaluate_kinds(self, z: Floats, which: np.ndarray, gradient: bool = False) -> Evaluation:
        meter = Meter(OneKind(self.meter.event, which), self.meter.left)
        result = meter.evaluate(z, gradient=gradient)
        self.meter.charge(meter.calls)
        self.spent += meter.calls
        return result

    def _evaluate_either(self, z: Floats, kinds: np.ndarray | None, gradient: bool = False) -> Evaluation:
        """The event, or of each row its own kind of it."""
        return self._evaluate(z, gradient) if kinds is None else self._evaluate_kinds(z, kinds, gradient)

    def _ask(self, walks: list[_Walk]) -> Evaluation:
        """The event, or each walk's kind of it, at the candidates, with gradients."""
        kinds = None if walks[0].kind is None else np.array([walk.kind for walk in walks])
        return self._evaluate_either(np.array([walk.candidate for walk in walks]), kinds, gradient=True)

    def _room(self, rows: int) -> bool:
        return self.meter.left - self.floor >= GRADIENT_CALLS * rows

    def run(self, rng: np.random.Generator, starts: int, most: int) -> bool:
        """Random starts; False when they find nothing."""
        dim = self.meter.event.dim
        if not self._room(starts + 2):
            return False
        self.origin = float(self._evaluate(np.zeros((1, dim))).severity[0])
        wanted = min(
            self.tuning.first_starts, starts
        )  # the others may then meet what the first ones found, and stop early
        while self.begun < wanted and self._room(2 * (wanted - self.begun)):
            count = wanted - self.begun
            z = rng.standard_normal((count, dim))
            told = self.start_from(z[::2])
            if told < len(z[::2]) / 2:
                return False
            with contextlib.suppress(UndefinedError):  # so far out the model need not be defined
                self.start_from(self.tuning.wide * z[1::2])
            self.begun = wanted
            if wanted >= starts and not self.arrived and not self._from_far():
                return False
            wanted = min(most, self._wanted(starts)) if self.begun >= starts else starts
        return bool(self.arrived)

    def by_kinds(self, rng: np.random.Generator) -> None:
        """Where the severity is the largest of several, a walk to each of these by itself; not where a few points cover
        all directions.

        Each is smooth where their maximum has a ridge, and none hides another. What they arrive at was not met by
        chance: it counts as if all the starts that it should have had had arrived there.
        """
        kinds, tuning, dim = getattr(self.meter.event, "kinds", None), self.tuning, self.meter.event.dim
        count = 0 if kinds is None else min(kinds.count, tuning.kinds)
        share = int(tuning.kind_share * (self.meter.left - self.floor))  # of which first gradients take half, at most
        if kinds is None or dim <= tuning.covered or 2 * GRADIENT_CALLS * count > share:
            return
        floor, self.floor = self.floor, self.meter.left - share
        which = np.arange(count) if kinds.count == count else rng.choice(kinds.count, count, replace=False)
        with contextlib.suppress(UndefinedError):
            walks = self._kinds_at(tuning.kind_start * rng.standard_normal((count, dim)), which)
            self.supports = [walk.grad != 0.0 for walk in walks]
            walks = sorted(walks, key=_log_form, reverse=True)[: tuning.kind_walks]
            for first in range(0, len(walks), tuning.kind_batch):
                some = self._bracketed(walks[first : first + tuning.kind_batch])
                ended = _follow(self._ask, some, self.arrived, self._room, tuning)
                if not ended:  # the likeliest of what is left lead nowhere
                    break
                ended = [replace(walk, weight=self.each) for walk in ended]
                self.arrived = _merge([*self.arrived, *ended], tuning.same_mode)
        self.floor = floor

    def _kinds_at(self, z: Floats, which: np.ndarray) -> list[_Walk]:
        """Walks to kinds of catastrophe, from the rows of z, where these have a gradient to follow."""
        result = self._evaluate_kinds(z, which, gradient=True)
        assert result.severity_grad is not None
        cases = zip(which.tolist(), z, result.severity.tolist(), result.severity_grad, strict=True)
        return [_Walk.at(self.tuning, u, s, slope, kind=k) for k, u, s, slope in cases if _telling(s, slope)]

    def _bracketed(self, walks: list[_Walk]) -> list[_Walk]:
        """The walks; those that are sent far beyond where D goes start anew, where the ray there enters the event.

        Where the severity grows like exp(z), steps from below lead far beyond, and each of those back is as short as
        any other.
        """
        far = [walk for walk in walks if walk.reach > self.tuning.far_out]
        price = 1 + self.tuning.halvings + GRADIENT_CALLS
        if not far or self.meter.left - self.floor < price * len(far):
            return walks
        kinds = None if far[0].kind is None else np.array([walk.kind for walk in far])
        inside = np.array([self.tuning.far_out * walk.target / walk.reach for walk in far])
        met = self._evaluate_either(inside, kinds).severity >= 0.0
        if not met.any():
            return walks
        kinds = None if kinds is None else kinds[met]
        inside = self._entries(inside[met], kinds)
        result = self._evaluate_either(inside, kinds, gradient=True)
        assert result.severity_grad is not None
        sent = [walk for walk, yes in zip(far, met.tolist(), strict=True) if yes]
        cases = zip(sent, inside, result.severity.tolist(), result.severity_grad, strict=True)
        anew = [
            _Walk.at(self.tuning, u, severity, grad, walk.weight, 1.0, walk.start, walk.kind)
            for walk, u, severity, grad in cases
            if _telling(severity, grad)
        ]
        return [walk for walk in walks if not any(walk is one for one in sent)] + anew

    def go_on(self, rng: np.random.Generator, calls: int) -> bool:
        """More starts, and more points far out, for so many calls, until a mode is new and counts; whether one is."""
        self.floor = self.meter.left - min(calls, self.meter.left)
        dim, known = self.meter.event.dim, list(self.arrived)
        most = max(_log_form(walk) for walk in known)
        while self._room(2 * self.tuning.batch):
            z = rng.standard_normal((self.tuning.batch, dim))
            z[1::2] *= self.tuning.wide
            with contextlib.suppress(UndefinedError):
                self.start_from(z)
            for _ in range(self.tuning.batch // 4):
                self.look_around(rng, self.tuning.around)
            if self._turned_up(known, most):
                return True
        return False

    def go_from(self, z: Floats, log_prob: float) -> bool:
        """Walks from the rows of z; whether they lead to a mode that is new and counts beside ``log_prob``."""
        known, self.floor = list(self.arrived), 0
        return self.start_from(z) > 0 and self._turned_up(known, log_prob)

    def _turned_up(self, known: list[_Walk], log_prob: float) -> bool:
        """Whether there is a mode, to first order of a share of ``log_prob`` that counts, that was not known."""
        least = log_prob + math.log(self.tuning.counts)
        new = [w for w in self.arrived if not any(w.meets(k, self.tuning.same_mode) for k in known)]
        return any(_log_form(walk) > least for walk in new)

    @property
    def short(self) -> bool:
        """Whether the budget ended it before as many starts as known modes ask for."""
        return self.begun < self._wanted(self.begun)

    @property
    def astray(self) -> bool:
        """Whether most starts arrived nowhere."""
        return self.lost > 0.6 * self.begun

    def _from_far(self) -> bool:
        """Walks that failed, once more from the other side: from where rays along their gradients enter the event.

        Where the severity grows like exp(z²/2), as with heavy tails, steps from near the origin lead beyond all bounds.
        """
        if not self.slopes or not self._room(2 * len(self.slopes)):
            return False
        far = self.tuning.far_out * np.array(self.slopes)
        with contextlib.suppress(UndefinedError):
            caught = far[self._evaluate(far).severity >= 0.0]
            return len(caught) > 0 and self.start_from(self._entries(caught)) > 0 and bool(self.arrived)
        return False

    def look_around(self, rng: np.random.Generator, points: int) -> bool:
        """Ask ``points`` points far out (in few dimensions also around the modes) for modes; True if one turned up."""
        dim = self.meter.event.dim
        if dim < 2 or not self.arrived:
            return False
        sides = [_normal(walk) for walk in self.arrived]
        # catastrophes often come in opposite pairs
        opposite = np.array([-self.tuning.opposite * max(offset, 0.5) * normal for normal, offset in sides])
        nearest = max(min(side[1] for side in sides), 0.0)
        if dim <= self.tuning.covered:
            near = _circle(points + points // 4, rng) if dim == 2 else even_normals(points, dim, rng)
            near *= (1.25 * nearest + 0.5) / np.linalg.norm(near, axis=1, keepdims=True)
            found = self._unexplained(np.concatenate([opposite, near]))
            out = rng.uniform(-self.tuning.far_out, self.tuning.far_out, (points // 2, dim))
        else:
            found = self._unexplained(opposite)
            out = rng.choice([-1.0, 1.0], (points, dim)) * rng.uniform(
                self.tuning.far_out - 2.0, self.tuning.far_out, (points, dim)
            )
            out = _aside(out, sides, rng.uniform(0.0, self.tuning.before, points))
        with contextlib.suppress(UndefinedError):
            found = np.concatenate([found, self._unexplained(out)])
        if not len(found):
            return False
        before, entries = len(self.arrived), self._entries(found)
        self.suspects.extend(entries)
        self.start_from(entries)
        ended = [walk for walk in map(self._within, entries) if walk is not None]
        self.arrived = _merge([*self.arrived, *ended], self.tuning.same_mode)
        return len(self.arrived) > before

    def explore(self, rng: np.random.Generator, draws: int) -> bool:
        """Walks from the most severe of plain draws, and from those that are more severe than known modes have it.

        What a bump hides from gradients elsewhere, some draws may have met. True if a mode turned up.
        """
        draws = min(draws, self.meter.left - self.floor - GRADIENT_CALLS * 2 * self.tuning.severest)
        if draws < 4 * self.tuning.severest or not self.arrived:
            return False
        spent = self.spent
        z = rng.standard_normal((draws, self.meter.event.dim))
        severity = self._evaluate(z).severity
        foreseen = np.full(draws, -np.inf)
        for walk in self.arrived:
            normal, offset = _normal(walk)
            foreseen = np.maximum(foreseen, float(np.linalg.norm(walk.grad)) * (z @ normal - offset))
        with np.errstate(invalid="ignore"):
            excess = np.nan_to_num(severity - foreseen, nan=-np.inf)
        half = self.tuning.severest // 2
        rows = np.unique(np.concatenate([np.argsort(-severity)[:half], np.argsort(-excess)[:half]]))
        known, before = list(self.arrived), len(self.arrived)
        with contextlib.suppress(UndefinedError):
            self.start_from(z[rows])
            aside = self._aside_of_modes(self._climbed(z[rows]))
            self.suspects.extend(aside)
            ended = [walk for walk in map(self._within, aside) if walk is not None]
            self.arrived = _merge([*self.arrived, *ended], self.tuning.same_mode)
        # how often random starts meet a mode says how many they miss; these were sent
        self.arrived = [w if w.weight > 1 or any(w is k for k in known) else replace(w, weight=2) for w in self.arrived]
        self.explored, self.spent = self.explored + self.spent - spent, spent
        return len(self.arrived) > before

    def _aside_of_modes(self, z: Floats) -> Floats:
        """Of these catastrophes those that no known mode explains, at most a few, the nearest first."""
        if not len(z):
            return z
        sides = [_normal(walk) for walk in self.arrived]
        beyond = np.max([z @ normal - offset for normal, offset in sides], axis=0)
        aside = z[beyond < -0.1]
        order = np.argsort(np.linalg.norm(aside, axis=1), kind="stable")
        return np.asarray(aside[order[: 2 * self.tuning.suspects]])

    def _climbed(self, z: Floats) -> Floats:
        """Where climbing the severity from the rows of z leads to a catastrophe (L-BFGS: ridges are narrow)."""
        caught: list[Floats] = []
        far = max(self.tuning.far_out, 1.5 * max(abs(_normal(walk)[1]) for walk in self.arrived))

        def climb(start: Floats) -> None:
            u, asked = np.clip(start, -far, far), 0

            def fallen(u: Floats) -> tuple[float, Floats]:
                nonlocal asked
                asked += 1
                if asked > self.tuning.climb_steps or not self._room(1):
                    raise StopIteration
                found = self._evaluate(u[None], gradient=True)
                assert found.severity_grad is not None
                severity, grad = float(found.severity[0]), found.severity_grad[0]
                if severity >= 0.0:
                    caught.append(np.array(u))
                    raise StopIteration
                return (-severity, -grad) if _telling(severity, grad) else (math.inf, np.zeros_like(u))

            with contextlib.suppress(StopIteration):
                while True:  # in boxes, so that a step along a ridge does not leap to what lies beyond
                    low, high = np.maximum(u - self.tuning.box, -far), np.minimum(u + self.tuning.box, far)
                    box = list(zip(low, high, strict=True))
                    ended = optimize.minimize(fallen, u, jac=True, method="L-BFGS-B", bounds=box)
                    before, u = u, ended.x
                    if not np.any(np.abs(u - before) >= self.tuning.box - 1e-6):
                        break
                self.summits += 1
                self.climbs += 1

        for row in z:
            climb(row)
        self.climbs += len(caught)
        return np.array(caught) if caught else z[:0]

    def _within(self, z: Floats) -> _Walk | None:
        """A walk from a catastrophe towards the origin that never leaves the event; None where it does not arrive.

        Other walks step to where the boundary would be if it were a plane. Where a flatter branch of the severity rules
        outside of the event, that leads away from the mode that z belongs to. This one goes to the last catastrophe on
        the way there, and what it meets bounds its next step (an active set). It ends in the mode's nearest corner.
        """
        u, planes = z, list[_Plane]()
        parts = np.linspace(0.0, 1.0, self.tuning.parts + 1)[1:]
        for _ in range(self.tuning.walk_steps):
            if not self._room(2 + len(parts)):
                return None
            result = self._evaluate(u[None], gradient=True)
            assert result.severity_grad is not None
            severity, grad = float(result.severity[0]), result.severity_grad[0]
            if not _telling(severity, grad):
                return None
            planes = [*planes, _plane(u, severity, grad)][-self.tuning.planes :]
            target = _nearest(planes)
            if target is None:
                return None
            walk = _Walk.at(self.tuning, u, severity, grad)
            if float(np.linalg.norm(target - u)) <= self.tuning.arrival * max(1.0, 0.2 * walk.reach):
                return replace(walk, target=u, stuck=True) if walk.gap <= self.tuning.arrival else None
            way = u + parts[:, None] * (target - u)
            outside = np.flatnonzero(self._evaluate(way).severity < 0.0)
            last = int(outside[0]) if len(outside) else len(way)
            inner, outer = (u if last == 0 else way[last - 1]), (way[last] if last < len(way) else None)
            u = inner if outer is None else self._between(inner[None], outer[None])[0]
        return None

    def nearer(self, z: Floats) -> Floats:
        """A catastrophe nearer to the origin: coordinates that it does not need are 0, the rest as short as it allows.

        Half of the coordinates are tried first, then half of these, and so on (delta debugging, Zeller 1999).
        """
        parts = [np.arange(len(z))[half] for half in np.array_split(np.arange(len(z)), 2)]
        while parts and self._room(len(parts)):
            tried = np.repeat(z[None], len(parts), axis=0)
            for row, part in zip(tried, parts, strict=True):
                row[part] = 0.0
            needed = self._evaluate(tried).severity < 0.0
            # each alone may not be needed, and yet both together: they go one after the other
            for row, part in zip(needed.tolist(), parts, strict=True):
                if not row and self._room(1):
                    without = z.copy()
                    without[part] = 0.0
                    if self._evaluate(without[None]).severity[0] >= 0.0:
                        z = without
            halves = [np.array_split(part, 2) for part in parts if len(part) > 1 and np.any(z[part])]
            parts = [half for pair in halves for half in pair]
        return np.asarray(self._entries(z[None])[0])

    def _unexplained(self, z: Floats) -> Floats:
        """Catastrophes among the rays through z that come earlier than any known mode has it; at most a few of them.

        A known mode has it that a ray enters the event at its plane. Rays whose point z is safe are not followed.
        """
        if not self._room(len(z)):
            return z[:0]
        length = np.linalg.norm(z, axis=1)
        sides = [_normal(walk) for walk in self.arrived]
        with np.errstate(divide="ignore", invalid="ignore"):
            planes = [np.where(z @ n > 0.0, max(b, 0.0) * length / (z @ n), np.inf) for n, b in sides]
        expected = np.min(planes, axis=0)
        caught = np.flatnonzero(self._evaluate(z).severity >= 0.0)
        early = caught[length[caught] < expected[caught] - 0.1]
        late = np.setdiff1d(caught, early)
        if len(z) and z.shape[1] <= self.tuning.covered and len(late) and self._room(len(late)):
            before = z[late] * (self.tuning.earlier * expected[late] / length[late])[:, None]
            inside = self._evaluate(before).severity >= 0.0
            z = z.copy()
            z[late[inside]] = before[inside]
            early = np.concatenate([early, late[inside]])
        margin = np.linalg.norm(z[early], axis=1) - expected[early]
        return np.asarray(z[early[np.argsort(margin, kind="stable")[: self.tuning.suspects]]])

    def _entries(self, z: Floats, kinds: np.ndarray | None = None) -> Floats:
        """Where the rays to z enter the event (or each its own kind of it), roughly."""
        return self._between(z, np.zeros_like(z), kinds)

    def _between(self, inside: Floats, outside: Floats, kinds: np.ndarray | None = None) -> Floats:
        """The last catastrophe (of a kind) on the way from each row of ``inside`` to ``outside``, by bisection."""
        for _ in range(self.tuning.halvings):
            if not self._room(2 * len(inside)):
                break
            middle = 0.5 * (inside + outside)
            caught = (self._evaluate_either(middle, kinds).severity >= 0.0)[:, None]
            inside, outside = np.where(caught, middle, inside), np.where(caught, outside, middle)
        return np.asarray(inside)

    def start_from(self, z: Floats) -> int:
        """Walks from the rows of z; returns how many had a gradient to follow."""
        if not self._room(len(z)):
            return 0
        self.begun += len(z)
        result = self._evaluate(z, gradient=True)
        assert result.severity_grad is not None
        cases = zip(z, result.severity.tolist(), result.severity_grad, strict=True)
        walks = [_Walk.at(self.tuning, *case, start=case[0]) for case in cases if _telling(case[1], case[2])]
        told = len(walks)
        self.slopes.extend(walk.grad / float(np.linalg.norm(walk.grad)) for walk in walks)
        with contextlib.suppress(UndefinedError):  # so far out the model need not be defined
            walks = self._bracketed(walks)
        ended = _follow(self._ask, walks, self.arrived, self._room, self.tuning)
        self.lost += len(z) - sum(walk.weight for walk in ended)
        self.arrived = _merge([*self.arrived, *ended], self.tuning.same_mode)
        return told

    def _wanted(self, starts: int) -> int:
        """Starts that it takes to believe that no mode of a size like the known ones was missed.

        Each known mode that counts should have been met twice, and ``each`` starts a mode should have arrived at such.
        """
        if self.begun >= self.tuning.astray_after and self.astray:
            return self.begun
        counted = self._counted()
        known, met = len(counted), sum(walk.weight for walk in counted)
        if known >= 5 and known > 0.75 * met and self._all_around():  # more starts will not change that
            return self.begun
        rare = known > 1 and min(walk.weight for walk in counted) < 2
        each = self.each if known <= self.tuning.several else min(self.each, self.tuning.each_of_many)
        missing = max(starts, each * known if known > 1 else 0) - met
        return self.begun + max(missing, 4 if rare else 0)

    def _all_around(self) -> bool:
        """Whether every start found a mode in its own direction: there is no end of them."""
        return sum(walk.straight for walk in self.arrived) > 0.5 * len(self.arrived)

    def _counted(self) -> list[_Walk]:
        log_p = [_log_form(walk) for walk in self.arrived]
        return [
            walk
            for walk, value in zip(self.arrived, log_p, strict=True)
            if value > max(log_p) + math.log(self.tuning.counts)
        ]

    def points(self) -> DesignPoints:
        """What was found, the most likely first."""
        walks = sorted(self.arrived, key=_log_form, reverse=True)
        log_p = np.array([_log_form(walk) for walk in walks])
        keep = int(np.count_nonzero(log_p >= log_p[0] + math.log(self.tuning.negligible)))
        left_out = math.exp(log_sum_exp(log_p[keep:]) - log_sum_exp(log_p[:keep])) if keep < len(log_p) else 0.0
        walks = walks[:keep]
        sides = [_normal(walk) for walk in walks]
        slopes = [float(walk.grad @ side[0]) for walk, side in zip(walks, sides, strict=True)]
        least = [0.05 * float(np.linalg.norm(walk.grad)) for walk in walks]
        return DesignPoints(
            np.array([side[0] for side in sides]),
            np.array([side[1] for side in sides]),
            np.maximum(slopes, least),
            np.array([walk.weight for walk in walks]),
            left_out,
            self.lost,
            self.origin,
            self._all_around(),
        )


def _aside(z: Floats, sides: list[tuple[Floats, float]], part: Floats) -> Floats:
    """The points moved to the safe side of known modes, which would explain whatever is found beyond them.

    Every other one is mirrored; the rest go a part of the way to the mode, where another limit may hold than beyond.
    Between opposite modes there is no safe side: there the component along their normals is removed.
    """
    normals = np.array([normal for normal, _ in sides])
    opposite = np.any(normals @ normals.T < -0.5, axis=1).tolist()
    mirrored = np.arange(len(z)) % 2 == 0
    for (normal, offset), pressed in zip(sides, opposite, strict=True):
        along = z @ normal
        short = np.where(mirrored, -np.abs(along), part * max(offset, 0.0))
        z = z + (np.where(along > 0.0, short, along) * (not pressed) - along)[:, None] * normal
    return np.asarray(z)


def _circle(n: int, rng: np.random.Generator) -> Floats:
    angle = 2.0 * math.pi * (np.arange(n) + rng.random()) / n
    return np.column_stack([np.cos(angle), np.sin(angle)])


def even_normals(n: int, dim: int, rng: np.random.Generator) -> Floats:
    """``n`` standard normals that fill space more evenly than independent ones (scrambled Sobol)."""
    points = scipy.stats.qmc.Sobol(dim, rng=rng).random_base2(math.ceil(math.log2(max(n, 2))))[:n]
    return np.asarray(ndtri(np.clip(points, 1e-12, 1.0 - 1e-12)), dtype=np.float64)


def _normal(walk: _Walk) -> tuple[Floats, float]:
    """Direction and distance. At a corner the way to it is the better direction than any one face's normal."""
    normal, offset, _ = _plane(walk.u, walk.severity, walk.grad)
    away = float(np.linalg.norm(walk.target))
    if away > 0.0 and abs(float(normal @ walk.target)) < 0.98 * away:
        return walk.target / away, away
    return normal, offset


def _log_form(walk: _Walk) -> float:
    return float(log_ndtr(-_normal(walk)[1]))


def _follow(
    ask: Callable[[list[_Walk]], Evaluation], walks: list[_Walk], known: list[_Walk], room: Room, tuning: LineTuning
) -> list[_Walk]:
    """Step all walks together until each has arrived or strayed; returns those that arrived."""
    ended: list[_Walk] = []
    for step in range(tuning.walk_steps):
        walks = _merge(walks, 0.5 * tuning.same_mode if step else 0.05)
        near = 0.7 * tuning.same_mode if step else 0.02  # the first step has to hit what is known
        done = [w.arrived or any(w.meets(k, near) for k in known) for w in walks]
        ended += [walk for walk, end in zip(walks, done, strict=True) if end]
        walks = [walk for walk, end in zip(walks, done, strict=True) if not end and not walk.stuck]
        if not walks or not room(len(walks)):
            break
        result = ask(walks)
        assert result.severity_grad is not None
        seen = zip(walks, result.severity.tolist(), result.severity_grad, strict=True)
        walks = [walk.stepped(severity, grad) for walk, severity, grad in seen]
    return _merge(ended, tuning.same_mode)


def _merge(walks: list[_Walk], distance: float) -> list[_Walk]:
    """Walks with nearly the same target as one: the one nearest to its own target."""
    kept: list[_Walk] = []
    for walk in sorted(walks, key=lambda w: float(np.linalg.norm(w.target - w.u)) + w.gap):
        same = next((other for other in kept if walk.meets(other, distance)), None)
        if same is None:
            kept.append(walk)
        else:
            same.weight += walk.weight
    return kept
