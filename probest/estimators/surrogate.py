r"""A learned severity that guides, while the checker itself decides: for checkers that say only yes or no.

Where nothing tells how far a case is from a catastrophe, or where no gradient does, a cheap surrogate ŝ of the severity
is fitted to all cases seen so far. Its own error σ̂ is measured on cases that it has not been fitted to.

1. *Look*: a yes-or-no checker is asked at inflated standard deviations until some catastrophes are known; segments from
   a catastrophe to a safe case are bisected, which puts cases on both sides of the boundary.
2. *Learn*: fit ŝ, temper on it to the population :math:`\pi \propto \varphi\, \Phi(\hat s/\hat\sigma)` (this costs no
   model calls), ask the checker at some of these particles, and repeat. They lie where the surrogate is unsure *and*
   where the adversary goes: what there is to learn about P.
3. *Weigh*: fit a guide to those particles that are catastrophes, and sample afresh with the model and checker deciding
   (:mod:`probest.estimators.importance`): unbiased whatever the surrogate. The particles give a second estimate,

.. math:: P = Z\, E_\pi\!\left[\frac{1_C}{\Phi(\hat s/\hat\sigma)}\right],
          \qquad Z = E_\varphi[\Phi(\hat s/\hat\sigma)] \text{ by tempering,}

which needs no guide, and the two have to agree.

The surrogate is a penalised linear model of features: coordinates, their products, radial functions around cases near
the boundary, and the values of discrete sites where the event can decode them; the kind of features that predicts the
newest cases best, before it is fitted to them, is chosen. It is a logistic regression of yes and no, or a least-squares
fit of real severities, weighted towards the limit.

It fails where a mode is in a place that no exploration reached; where an exploration did, all cases known to be
catastrophes are compared with the result. In many dimensions a boundary that is curved in many directions cannot be
learned from some thousand cases: the surrogate's error is then large, few particles are catastrophes, and it says so.

References: Bourinet (2016), Rare-event probability estimation with adaptive support vector regression surrogates;
Echard, Gayton & Lemaire (2011), AK-MCS; Dubourg, Sudret & Deheeger (2013), Metamodel-based importance sampling for
structural reliability analysis (the second estimate).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from scipy import linalg, special
from scipy.spatial.distance import cdist

from probest import diagnostics
from probest.budget import Meter
from probest.estimators.importance import Importance, Population, weigh
from probest.estimators.tempering import Tempering, temper
from probest.evidence import Evaluation, EventLike, Evidence, Floats, Particles
from probest.guides.mixture import gradient_rows, informed_basis
from probest.seeds import child_seed, generator

__all__ = ["Surrogate"]

_SCALES = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # standard deviations at which catastrophes are looked for
_KNOWN = 30  # catastrophes that end the search
_PRODUCTS = 24  # up to so many dimensions, all products of coordinates are features
_RADIAL = 6  # up to so many directions, radial features
_CENTRES = 120
_PENALTIES = (1.0, 1e-2, 1e-4)
_SIMPLER = 0.9  # how much better a richer kind of features has to predict to be taken
_GOOD = 0.5  # effective share of the particles at which the surrogate has learned enough
_FAR = 100.0  # times the scale of severities near the limit: beyond that, how far does not matter
_HUGE = 1e30
_FREE = 400  # evaluations of the surrogate a particle: they cost no model calls
_SECOND = 600  # particles of the last tempering that are judged
_NO_WAY = "nothing that was seen says where catastrophes are: raise the budget, or return a severity that does."


Decode = Callable[[Floats], Floats]


class Features(NamedTuple):
    """What the surrogate is linear in: 1, z, and products and radial functions in directions ``basis`` ``(dim, r)``.

    centres: ``(m, r)`` of radial functions of one ``width``; None for none. decode: z to the values of discrete sites
    ``(n, k)``, or None; with them the surrogate has no gradient.
    """

    basis: Floats
    products: bool = False
    centres: Floats | None = None
    width: float = 1.0
    decode: Decode | None = None

    def __call__(self, z: Floats) -> Floats:
        columns = [np.ones((len(z), 1)), z]
        if self.decode is not None:
            columns.append(self.decode(z))
        u = z @ self.basis
        if self.products:
            i, j = np.triu_indices(u.shape[1])
            columns.append(u[:, i] * u[:, j])
        if self.centres is not None:
            columns.append(self._radial(u, self.centres))
        return np.concatenate(columns, axis=1)

    def slope(self, z: Floats, coefficients: Floats) -> Floats:
        """Gradient in z, ``(n, dim)``, of the combination with these coefficients."""
        u = z @ self.basis
        inner = np.zeros_like(u)
        at = z.shape[1] + 1
        if self.products:
            i, j = np.triu_indices(u.shape[1])
            form = np.zeros((u.shape[1], u.shape[1]))
            form[i, j] = coefficients[at : at + len(i)]
            inner += u @ (form + form.T)
            at += len(i)
        if self.centres is not None:
            pull = self._radial(u, self.centres) * (coefficients[at:] / self.width**2)
            inner += pull @ self.centres - u * pull.sum(axis=1, keepdims=True)
        return np.asarray(coefficients[1 : z.shape[1] + 1] + inner @ self.basis.T, dtype=np.float64)

    def _radial(self, u: Floats, centres: Floats) -> Floats:
        return np.asarray(np.exp(-0.5 * cdist(u, centres, "sqeuclidean") / self.width**2), dtype=np.float64)


class Learned(NamedTuple):
    """A fitted surrogate and the standard deviation of its error."""

    features: Features
    coefficients: Floats
    noise: float

    def severity(self, z: Floats) -> Floats:
        return np.asarray(self.features(z) @ self.coefficients, dtype=np.float64)

    def log_chance(self, z: Floats) -> Floats:
        """log Φ(ŝ/σ̂): how likely a catastrophe is, as far as the surrogate can tell."""
        return np.asarray(special.log_ndtr(self.severity(z) / self.noise), dtype=np.float64)


@dataclass(frozen=True)
class Softened:
    """The surrogate with its error as one more coordinate e: the event ŝ(z) + σ̂ e ≥ 0 has probability E[Φ(ŝ/σ̂)]."""

    learned: Learned
    dim: int
    boolean: bool = False
    weighted: bool = False

    @property
    def differentiable(self) -> bool:
        return self.learned.features.decode is None

    def evaluate(self, z: Floats, *, gradient: bool = False) -> Evaluation:
        inner = z[:, :-1]
        noise = self.learned.noise
        severity = self.learned.severity(inner) + noise * z[:, -1]
        if not gradient:
            return Evaluation(severity, np.zeros(len(z)))
        slope = self.learned.features.slope(inner, self.learned.coefficients)
        return Evaluation(severity, np.zeros(len(z)), np.column_stack([slope, np.full(len(z), noise)]))


class Cases(NamedTuple):
    """Judged cases: z ``(n, dim)`` and severity ``(n,)``."""

    z: Floats
    severity: Floats

    @property
    def hit(self) -> np.ndarray:
        return self.severity >= 0.0

    def at(self, rows: np.ndarray | slice) -> Cases:
        return Cases(self.z[rows], self.severity[rows])

    def plus(self, other: Cases) -> Cases:
        return Cases(np.concatenate([self.z, other.z]), np.concatenate([self.severity, other.severity]))


class Explored(NamedTuple):
    """Independent draws from normal laws of several scales, with log φ − log q of their mixture.

    size: how many of each scale; the first is the adversary's own.
    """

    cases: Cases
    log_ratio: Floats
    size: int


class Reached(NamedTuple):
    """Particles of φ Φ(ŝ/σ̂), and its mass by tempering as evidence."""

    z: Floats
    mass: Evidence


class Tried(NamedTuple):
    """A surrogate with what its particles, judged, say of P; share: how many of them count, effectively."""

    learned: Learned
    log_prob: float
    error: float
    share: float

    @property
    def least(self) -> float:
        return self.log_prob - 2.0 * self.error


Solver = Callable[[Floats, Floats, float, Sequence[float]], list[Floats]]
"""``solve(features of n cases, severities, near, penalties)``: coefficients for each penalty."""


@dataclass(frozen=True)
class Surrogate:
    """Importance sampling guided by a learned severity.

    precision: wanted standard error of log P; None spends the budget.
    look: draws at each scale (three times the dimension at least). batch: cases judged in each round of learning.
    rounds: at most so many. share: of the budget, at most, for looking and learning.
    particles: of the last tempering on the surrogate, which costs no model calls.
    """

    precision: float | None = 0.05
    look: int = 400
    batch: int = 250
    rounds: int = 10
    share: float = 0.6
    particles: int = 2048

    def __post_init__(self) -> None:
        if self.precision is not None and not self.precision > 0.0:
            raise ValueError(f"precision must be positive (a standard error of log P), got {self.precision}")
        for name, least in (("look", 10), ("batch", 10), ("rounds", 1), ("particles", 256)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0.0 < self.share < 1.0:
            raise ValueError(f"share must be between 0 and 1, got {self.share}")

    @property
    def name(self) -> str:
        return "surrogate"

    def run(self, event: EventLike, *, budget: int, seed: np.random.SeedSequence) -> Evidence:
        """Look, learn, weigh. Raises ValueError for a conditioned adversary: there is no surrogate of its weights."""
        if event.weighted:
            raise ValueError("event: a surrogate learns severities alone; use Tempering for a conditioned adversary")
        meter = Meter(event, budget)
        explored = _look(self, meter, generator(child_seed(seed, 0)))
        best = _learn(self, meter, explored, seed)
        if isinstance(best, str):
            return _nothing(self, meter, explored, best)
        return _weigh(self, meter, explored, best, seed)


def _judge(meter: Meter, z: Floats) -> Cases:
    return Cases(z, meter.evaluate(z).severity)


def _look(method: Surrogate, meter: Meter, rng: np.random.Generator) -> Explored:
    """Draws of the adversary and, for yes or no, of wider ones until catastrophes are known."""
    dim = meter.event.dim
    size = max(1, int(min(max(method.look, 3 * dim), 0.3 * method.share * meter.budget / len(_SCALES))))
    scales: list[float] = []
    cases = Cases(np.empty((0, dim)), np.empty(0))
    for scale in _SCALES if meter.event.boolean else _SCALES[:1]:
        if cases.hit.sum() >= _KNOWN or meter.left < size:
            break
        scales.append(scale)
        cases = cases.plus(_judge(meter, scale * rng.standard_normal((size, dim))))
    square = np.einsum("ij,ij->i", cases.z, cases.z)
    log_q = [-0.5 * square / s**2 - dim * math.log(s) - math.log(len(scales)) for s in scales]
    return Explored(cases, np.asarray(-0.5 * square - special.logsumexp(log_q, axis=0)), size)


def _bisect(meter: Meter, ends: Cases, known: Cases, steps: int) -> Cases:
    """Cases next to the boundary: halve segments from ``ends`` to the nearest known case of the other kind."""
    new = Cases(ends.z[:0], ends.severity[:0])
    inside: list[Floats] = []
    outside: list[Floats] = []
    for end, other, from_, to in ((ends.hit, ~known.hit, inside, outside), (~ends.hit, known.hit, outside, inside)):
        if end.any() and other.any():
            from_.append(ends.z[end])
            to.append(known.z[other][np.argmin(cdist(ends.z[end], known.z[other]), axis=1)])
    if not inside:
        return new
    a, b = np.concatenate(inside), np.concatenate(outside)
    for _ in range(steps):
        if meter.left < 4 * len(a):
            break
        middle = _judge(meter, 0.5 * (a + b))
        new = new.plus(middle)
        hit = middle.hit[:, None]
        a, b = np.where(hit, middle.z, a), np.where(hit, b, middle.z)
    return new


def _learn(method: Surrogate, meter: Meter, explored: Explored, seed: np.random.SeedSequence) -> Tried | str:
    """The surrogate after its rounds of learning, with the most that any round knew of; or why there is none."""
    event, cases = meter.event, explored.cases
    decode = _decoder(event)
    rng = generator(child_seed(seed, 1))
    if event.boolean and not cases.hit.any():
        return (
            f"no catastrophe in {len(cases.z)} draws, not even at {_SCALES[-1]:g} standard deviations: return a "
            "severity (how far from the limit; at least 0 is a catastrophe), or raise the budget."
        )
    if not event.boolean and np.all(cases.severity == cases.severity[0]):
        return "the severity is the same at every draw, so there is nothing to learn from: use crude sampling."
    held = np.arange(len(cases.z)) % 4 == 0
    known, fresh = cases.at(~held), cases.at(held)
    if event.boolean:
        hits = rng.permutation(np.flatnonzero(known.hit))[:60]
        known = known.plus(_bisect(meter, known.at(hits), known, 5))
    floor = (1.0 - method.share) * meter.budget
    learned = _fit(known, fresh, event.boolean, None, decode, rng)
    tried: list[Tried] = []
    for turn in range(method.rounds):
        reached = _temper(learned, event.dim, 512, 4, child_seed(seed, 2, turn))
        if reached is None:  # richer features, and more doubt, may show a way
            basis = np.eye(event.dim) if event.dim <= _RADIAL else None
            learned = _fit(known, fresh, event.boolean, basis, decode, rng)
            learned = learned._replace(noise=4.0**turn * learned.noise)
            continue
        if meter.left - 2 * method.batch < floor:
            break
        known = known.plus(fresh)
        fresh = _judge(meter, reached.z[rng.permutation(len(reached.z))[: method.batch]])
        log_w = _log_weights(learned, fresh)
        mean, error = diagnostics.log_mean_exp(log_w)
        error = math.hypot(reached.mass.std_error, math.sqrt(2.0) * error)
        share = diagnostics.effective_sample_size(log_w) / len(fresh.z)
        tried.append(Tried(learned, reached.mass.log_prob + mean, error, share))
        if len(tried) > 1 and tried[-1].share > _GOOD and tried[-2].share > _GOOD and _close(*tried[-2:]):
            break
        if event.boolean:
            known = known.plus(_bisect(meter, fresh.at(slice(40)), known, 3))
        enough = tried[-1].share > _GOOD and learned.features.centres is None
        learned = _fit(known, fresh, event.boolean, None if enough else _directions(learned, reached.z), decode, rng)
    if not tried:
        return _NO_WAY
    # a surrogate that lacks a part of the event may be exact on the rest: the sharpest of those that know of most
    most = max((one for one in tried if one.share * method.batch >= 10.0), key=lambda one: one.least, default=tried[-1])
    best = max((one for one in tried if _close(one, most)), key=lambda one: one.share, default=tried[-1])
    return best._replace(log_prob=most.log_prob, error=most.error)


def _close(one: Tried, other: Tried) -> bool:
    """Whether both know of the same P, as far as their errors tell."""
    return abs(one.log_prob - other.log_prob) <= 2.0 * min(math.hypot(one.error, other.error), 0.5) + 0.2


def _directions(learned: Learned, z: Floats) -> Floats:
    """The few directions ``(dim, r)`` in which the surrogate matters to its particles; all where there are few."""
    if z.shape[1] <= _RADIAL:
        return np.eye(z.shape[1])
    equal = np.zeros(len(z))
    slope = learned.features.slope(z, learned.coefficients)
    return informed_basis(z, equal, gradient_rows(z, equal, slope, None), rank=_RADIAL)


def _decoder(event: EventLike) -> Decode | None:
    """The values of discrete sites, where the event has some and can tell them without its model."""
    decode: Decode | None = getattr(event, "discrete_values", None)
    return decode if decode is not None and decode(np.zeros((1, event.dim))).shape[1] else None


def _temper(learned: Learned, dim: int, particles: int, moves: int, seed: np.random.SeedSequence) -> Reached | None:
    """Temper on the surrogate; None when there is no way to its event."""
    method = Tempering(particles=particles, max_moves=moves)
    mass, state, _ = temper(method, Softened(learned, dim + 1), budget=_FREE * particles, seed=seed)
    return None if state is None else Reached(state.z[:, :-1], mass)


def _log_weights(learned: Learned, cases: Cases) -> Floats:
    """log of 1_C / Φ(ŝ/σ̂): from the surrogate's particles to catastrophes."""
    return np.where(cases.hit, -learned.log_chance(cases.z), -np.inf)


def _fit(
    known: Cases, fresh: Cases, boolean: bool, basis: Floats | None, decode: Decode | None, rng: np.random.Generator
) -> Learned:
    """The kind of features that predicts ``fresh`` best when fitted to ``known``, fitted to both; simple ones first."""
    solve = _logistic if boolean else _least_squares
    near = _scale(known, fresh)
    best: tuple[float, float, Features, int] | None = None
    kinds = [Features(np.empty((known.z.shape[1], 0)), decode=decode)]
    if decode is None:
        kinds += _kinds(known, solve, basis, near, rng)
    for features in kinds:
        least = math.inf if best is None else _SIMPLER * best[0]
        test = features(fresh.z)
        for i, coefficients in enumerate(solve(features(known.z), known.severity, near, _PENALTIES)):
            loss, noise = _loss(test @ coefficients, fresh, boolean, near)
            if loss < least:
                best, least = (loss, noise, features, i), loss
    assert best is not None
    _, noise, features, i = best
    both = known.plus(fresh)
    coefficients = solve(features(both.z), both.severity, near, _PENALTIES[: i + 1])[-1]
    spread = float(np.std(features(rng.standard_normal((500, both.z.shape[1]))) @ coefficients))
    return Learned(features, coefficients, max(noise, 0.05 * spread, 1e-300))


def _kinds(known: Cases, solve: Solver, basis: Floats | None, near: float, rng: np.random.Generator) -> list[Features]:
    """Candidates beyond z itself, simple ones first. Radial functions sit around cases that others put near the limit.

    basis: the few directions that matter, or None for no radial functions: what these say of places without cases is
    often wrong, so they wait until there are cases near the limit that simpler features cannot explain.
    """
    dim = known.z.shape[1]
    kinds: list[Features] = []
    if dim <= _PRODUCTS:
        kinds.append(Features(np.eye(dim), True))
    elif basis is not None:
        kinds.append(Features(basis, True))
    if basis is not None:
        x = kinds[-1](known.z)
        (coefficients,) = solve(x, known.severity, near, _PENALTIES[1:2])
        close = np.argsort(np.abs(x @ coefficients), kind="stable")[: 3 * _CENTRES]
        centres = known.z[rng.permutation(close)[:_CENTRES]] @ basis
        kinds += [Features(basis, True, centres, width * math.sqrt(basis.shape[1])) for width in (1.5, 0.7)]
    return kinds


def _scale(known: Cases, fresh: Cases) -> float:
    """The severity up to which a case counts as near the limit: typical of fresh cases, not much less than of all."""
    sizes = [np.minimum(np.abs(cases.severity), _HUGE) for cases in (fresh, known)]
    return max(float(np.median(sizes[0])), 0.1 * float(np.median(sizes[1])), 1.0 / _HUGE)


def _near_limit(severity: Floats, near: float) -> Floats:
    """Weights that count cases near the limit: what is far beyond or below it need not be predicted well."""
    return np.asarray(1.0 / (1.0 + (severity / near) ** 2), dtype=np.float64)


def _loss(guess: Floats, fresh: Cases, boolean: bool, near: float) -> tuple[float, float]:
    """How badly the guess predicts, and the standard deviation σ̂ of its error: most likely, or by mean square."""
    if boolean:
        noises = max(float(np.std(guess)), 1e-300) * np.geomspace(0.01, 10.0, 25)
        right = np.where(fresh.hit, guess, -guess)
        losses = -np.mean(special.log_ndtr(right / noises[:, None]), axis=1)
        return float(losses.min()), float(noises[np.argmin(losses)])
    severity = np.clip(fresh.severity, -_FAR * near, _FAR * near)
    w = _near_limit(severity, near)
    square = float(w @ (guess - severity) ** 2 / w.sum())
    return square, math.sqrt(square)


def _standardised(x: Floats, w: Floats) -> tuple[Floats, Floats, Floats]:
    """Columns (the first is the constant) with weighted mean 0 and variance 1; the means and deviations."""
    mean = w @ x
    mean[0] = 0.0
    x = x - mean
    deviation = np.sqrt(w @ x**2)
    deviation[deviation < 1e-9] = 1.0
    x /= deviation
    return x, mean, deviation


def _original(c: Floats, mean: Floats, deviation: Floats) -> Floats:
    out = c / deviation
    out[0] -= out[1:] @ mean[1:]
    return out


def _least_squares(x: Floats, severity: Floats, near: float, penalties: Sequence[float]) -> list[Floats]:
    """Ridge regressions, weighted towards the limit, one for each penalty."""
    severity = np.clip(severity, -_FAR * near, _FAR * near)
    w = _near_limit(severity, near)
    w /= w.sum()
    x, mean, deviation = _standardised(x, w)
    weighted = x * w[:, None]
    gram, moment = x.T @ weighted, severity @ weighted
    free = np.arange(len(gram)) == 0
    solutions = []
    for penalty in penalties:
        ridge = np.diag(np.where(free, 0.0, 0.01 * penalty) + 1e-12)
        solutions.append(_original(linalg.solve(gram + ridge, moment, assume_a="pos"), mean, deviation))
    return solutions


def _logistic(x: Floats, severity: Floats, near: float, penalties: Sequence[float]) -> list[Floats]:
    """Logistic regressions of yes and no, one for each penalty, each by Newton from the one before. near: unused."""
    del near
    n, p = x.shape
    x, mean, deviation = _standardised(x, np.full(n, 1.0 / n))
    x *= np.where(severity >= 0.0, 1.0, -1.0)[:, None]  # so that positive is right
    c, right = np.zeros(p), np.zeros(n)
    solutions = []
    for penalty in penalties:
        ridge = np.full(p, 0.1 * penalty)
        ridge[0] = 1e-8
        now = _log_loss(right) + 0.5 * float(ridge @ c**2)
        for _ in range(10):
            wrong = special.expit(-right)
            slope = ridge * c - wrong @ x / n
            curve = (x * (wrong * (1.0 - wrong) / n)[:, None]).T @ x
            curve[np.diag_indices(p)] += ridge
            step = linalg.solve(curve, slope, assume_a="pos")
            moved, size, before = x @ step, 1.0, now
            while size > 1e-3:
                now = _log_loss(right - size * moved) + 0.5 * float(ridge @ (c - size * step) ** 2)
                if now < before:
                    break
                size *= 0.5
            if not now < before:
                now = before
                break
            c, right = c - size * step, right - size * moved
            if now > 0.999 * before:
                break
        solutions.append(_original(c, mean, deviation))
    return solutions


def _log_loss(right: Floats) -> float:
    return float(np.mean(np.logaddexp(0.0, -right)))


def _weigh(method: Surrogate, meter: Meter, explored: Explored, best: Tried, seed: np.random.SeedSequence) -> Evidence:
    """Both estimates, and the verdict on them."""
    learned = best.learned
    # guides are poor where sites are discrete: there the particles themselves have to be precise
    particles = method.particles * (1 if learned.features.decode is None else 4)
    reached = _temper(learned, meter.event.dim, particles, 8, child_seed(seed, 3))
    if reached is None or meter.left < 20:
        return _nothing(method, meter, explored, _NO_WAY)
    rng = generator(child_seed(seed, 4))
    size = min(_SECOND, len(reached.z), max(10, meter.left // 4))
    cases = _judge(meter, reached.z[rng.permutation(len(reached.z))[:size]])
    second = _second(method, meter, best, reached, cases)
    found = second.particles
    if found is None or len(found.z) < 16:
        return replace(_nothing(method, meter, explored, _NO_WAY), notes=second.notes)
    rows = None
    if learned.features.decode is None:
        slope = learned.features.slope(found.z, learned.coefficients)
        rows = gradient_rows(found.z, found.log_weight, slope, None)
    effective = 0.5 * diagnostics.effective_sample_size(found.log_weight)
    population = Population(found.z, found.log_weight, np.zeros(len(found.z)), rows, effective)
    importance = Importance(precision=method.precision, give_up=0.25)
    first = weigh(importance, meter.event, population, None, budget=meter.left, seed=child_seed(seed, 5))
    return _verdict(meter, explored, first, second)


def _second(method: Surrogate, meter: Meter, best: Tried, reached: Reached, cases: Cases) -> Evidence:
    """The estimate that needs no guide: the surrogate's mass times the mean of 1_C / Φ(ŝ/σ̂) over its particles."""
    log_w = _log_weights(best.learned, cases)
    mean, error = diagnostics.log_mean_exp(log_w)
    hits, ess = int(cases.hit.sum()), diagnostics.effective_sample_size(log_w)
    khat = diagnostics.pareto_khat(log_w)
    mass = reached.mass
    log_prob, lower, upper = -math.inf, -math.inf, 0.0
    if hits > 1:
        error = math.hypot(mass.std_error, math.sqrt(2.0) * error)  # resampled particles are related: half as many
        log_prob = min(mass.log_prob + mean, 0.0)
        below, above = diagnostics.mean_interval(log_w)
        lower = log_prob - math.hypot(mass.log_prob - mass.interval[0], math.sqrt(2.0) * (mean - below))
        upper = min(log_prob + math.hypot(mass.interval[1] - mass.log_prob, math.sqrt(2.0) * (above - mean)), 0.0)
    notes = list(mass.notes)
    if ess < 50.0:
        notes.append(f"the surrogate's particles are worth {ess:.0f} catastrophes: it has not learned the limit.")
    if khat > 0.7 and ess < 0.4 * hits:
        notes.append("catastrophes lie where the surrogate sees none: the estimate may be too low.")
    if log_prob + 2.0 * error < best.least:
        notes.append("the particles of an earlier surrogate showed more: this one lacks a part of the catastrophes.")
    if error > 0.2:
        notes.append(f"the standard error of the surrogate's particles is {error:.2f}: raise the budget.")
    hit = cases.at(cases.hit)
    particles = Particles(hit.z, log_w[cases.hit] - diagnostics.log_sum_exp(log_w), hit.severity) if hits else None
    return Evidence(
        method=method.name,
        log_prob=log_prob,
        std_error=error if hits > 1 else math.inf,
        interval=(lower, upper),
        claim="consistent",
        calls=meter.calls,
        seconds=meter.seconds,
        converged=not notes,
        particles=particles,
        diagnostics={"khat": khat, "ess": ess, "hits": float(hits), "samples": float(len(cases.z))},
        notes=tuple(notes),
    )


def _verdict(meter: Meter, explored: Explored, first: Evidence, second: Evidence) -> Evidence:
    """The fresh samples of the guide where they pass their checks, else the particles; neither against the other."""
    error = min(math.hypot(first.std_error, second.std_error), 1.0)
    found = [line for line in (first, second) if math.isfinite(line.log_prob)]
    notes = []
    chosen, other = (first, second) if first.converged else (second, first)
    # what misses a part is too low: one that failed its checks is a reason to doubt only where it says more
    more, reach = other.log_prob - chosen.log_prob, 3.0 * error + 0.1
    agree = len(found) < 2 or (more <= reach and (more >= -reach or not other.converged))
    if not first.converged:
        notes.append("the guide did not pass its checks: this is the estimate of the surrogate's particles.")
    if not agree:
        notes.append("the guide and the surrogate's particles disagree beyond their errors: raise the budget.")
    if _floor(explored) > chosen.interval[1]:
        agree = False
        notes.append("draws at larger standard deviations found more than this estimate knows of: raise the budget.")
    converged = chosen.converged and agree
    lower, upper = chosen.interval
    if not converged:
        chosen = min(found, key=lambda line: line.std_error, default=second)
        lower = min((line.interval[0] for line in found), default=-math.inf)
        upper = max((line.interval[1] for line in found), default=0.0)
        notes += [*first.notes, *second.notes]
    seen = {"particles": second.log_prob, "particles_error": second.std_error}
    return replace(
        chosen,
        method=second.method,
        interval=(lower, upper),
        calls=meter.calls + first.calls,
        seconds=meter.seconds,
        converged=converged,
        diagnostics={**chosen.diagnostics, **seen},
        notes=tuple(dict.fromkeys(notes)),
    )


def _floor(explored: Explored) -> float:
    """What log P is above, with 99.95 % confidence, by the draws of all scales as one importance sample."""
    return diagnostics.mean_interval(np.where(explored.cases.hit, explored.log_ratio, -np.inf), 0.999)[0]


def _nothing(method: Surrogate, meter: Meter, explored: Explored, note: str) -> Evidence:
    """No surrogate: the draws of the adversary itself bound P."""
    hits = int(explored.cases.at(slice(explored.size)).hit.sum())
    return Evidence(
        method=method.name,
        log_prob=-math.inf,
        std_error=math.inf,
        interval=(-math.inf, diagnostics.binomial_interval(hits, explored.size)[1]),
        claim="upper",
        calls=meter.calls,
        seconds=meter.seconds,
        converged=False,
        diagnostics={"hits": float(hits), "samples": float(explored.size)},
        notes=(note,),
    )
