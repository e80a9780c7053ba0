r"""Strata: a program with the values of its discrete sites held.

With the values k of the discrete sites held, the program is smooth again and P = Σ_k p_k P_k, p_k the probability of
the values. Sites whose values can be listed (Bernoulli, Categorical, Binomial, DiscreteUniform, OrderedLogistic, the
component sites of mixtures; Poisson and Geometric up to a tail that is bounded) are held, as both libraries enumerate
them for inference; ``infer={"enumerate": False}`` at a site leaves it out. Where the listed combinations are more than
``most``, the sites with the fewest values are held and the others stay random.

p_k is what the program says with the values held. Where it depends on other draws, or where observations do, a stratum
is a conditioned event, whose log-weight is log p_k(z); with the evidence E_k = ∫ φ p_k of each,

.. math:: P = \sum_k \pi_k P_k, \qquad \pi_k = E_k / \sum_j E_j ,

P_k the probability under the adversary given the observations and the values k. E_k takes draws of the adversary alone,
no calls of the model, and has an error; where p_k is the same at every draw it is exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy.special import log_ndtr, ndtri_exp

from probest.backends.base import Array, Backend, Parts
from probest.checkers import Branch
from probest.diagnostics import effective_sample_size, log_mean_exp, log_sum_exp
from probest.evidence import Evaluation, Floats
from probest.programs.base import Site
from probest.programs.event import Event

if TYPE_CHECKING:
    from probest.moments.kinds import Kinds

__all__ = [
    "MOST",
    "Glance",
    "Strata",
    "StratumEvent",
    "columns_of",
    "free_of",
    "glances",
    "held_rows",
    "placed",
    "strata_of",
]

MOST = 4096
"""Strata that are listed, at most, unless said otherwise."""

_PROBES = 4  # draws of each stratum that tell whether its probability depends on them
_MOST_CLOSED = 256  # strata of a closed loop, whose listing runs the model
_CLOSED_CALLS = 10_000  # for probabilities that depend on other draws there
_DRAWS = (64, 16_384)  # of each stratum that integrate a probability that does depend on them
_MOST_DRAWS = 1_000_000  # over all strata
_WORTH = 100.0  # equally weighted draws, that these have to be worth
_FURTHEST, _HALVINGS = 12.0, 28  # of the bisection of a coordinate
_TRIED = (4, 64)  # draws of an element's other coordinates
_LONGEST, _NEVER = 160, -60.0  # values of a count without an end; nats below its likeliest where the list may end
_EQUAL = 1e-4  # nats: float32 rounds the sum of the log-densities of some dozens of sites by less


class Stratum(NamedTuple):
    """Values of the held sites, by name, and the log of their probability given the observations."""

    values: dict[str, np.ndarray]
    log_prob: float


@dataclass(frozen=True)
class Strata:
    """The strata of an event, the most probable first.

    sites: those that are held. values: ``(m, ...)`` of each. log_prob: ``(m,)`` log p_k, given the observations where
    there are any. left_out: log of the probability that no stratum holds, at most (counts beyond their lists).
    std_error: ``(m,)`` of log_prob; rounding alone where no draws are needed. varies: whether p_k depends on the other
    draws. log_evidence: log of the adversary's evidence, 0 without observations.
    """

    event: Event
    sites: tuple[Site, ...]
    values: Mapping[str, np.ndarray]
    log_prob: Floats
    left_out: float
    std_error: Floats
    varies: bool = False
    log_evidence: float = 0.0

    def __len__(self) -> int:
        return len(self.log_prob)

    def __getitem__(self, k: int) -> Stratum:
        return Stratum({name: value[k] for name, value in self.values.items()}, float(self.log_prob[k]))

    @property
    def free(self) -> np.ndarray:
        """Coordinates of z that the held sites leave, as indices."""
        return free_of(self.event, self.sites)

    def full(self, z: Floats) -> Floats:
        """The coordinates of the whole program; those of held sites are 0, and say nothing."""
        out = np.zeros((len(z), self.event.dim))
        out[:, self.free] = z
        return out

    def held(self, k: np.ndarray) -> dict[str, np.ndarray]:
        """Values of the held sites ``(n, ...)`` in the strata k ``(n,)``."""
        return {name: value[k] for name, value in self.values.items()}

    def index_of(self, z: Floats) -> np.ndarray:
        """The stratum of each row of z ``(n, dim)``, coordinates of the whole program; -1 where it has none."""
        drawn = self.event.discrete_draws(z)[:, np.concatenate(columns_of(self.event, self.sites))]
        listed = np.concatenate([site.coded(self.values[site.name]) for site in self.sites], axis=1)
        known = {row.tobytes(): k for k, row in enumerate(listed.astype(np.float64))}
        return np.array([known.get(row.tobytes(), -1) for row in drawn.astype(np.float64)], dtype=np.intp)

    def label(self, k: int) -> str:
        """The values of a stratum in words, such as ``s=1, kind=[0 2]``."""
        return ", ".join(f"{name}={np.array2string(np.asarray(v), threshold=8)}" for name, v in self[k].values.items())

    def __repr__(self) -> str:
        names = ", ".join(site.name for site in self.sites)
        shown = "; ".join(f"{self.label(k)}: {math.exp(self.log_prob[k]):.3g}" for k in range(min(len(self), 6)))
        return f"Strata({len(self)} of {names}: {shown}{'; ...' if len(self) > 6 else ''})"


@dataclass
class StratumEvent:
    """An event with discrete sites held: an :class:`~probest.evidence.EventLike` in the coordinates that are left."""

    strata: Strata
    k: int

    def __post_init__(self) -> None:
        self.free = self.strata.free
        self.held = self.strata[self.k].values
        self.discrete_sites = tuple(name for name in self.strata.event.discrete_sites if name not in self.held)

    @property
    def dim(self) -> int:
        return len(self.free)

    @property
    def differentiable(self) -> bool:
        return self.strata.event.differentiable

    @property
    def boolean(self) -> bool:
        return self.strata.event.boolean

    @property
    def weighted(self) -> bool:
        return self.strata.varies

    @property
    def backend(self) -> Backend:
        return self.strata.event.backend

    @property
    def branches(self) -> tuple[Branch, ...]:
        return self.strata.event.branches

    def function(self, parts: Parts | None = None, *, apart: bool = False) -> Callable[[Array], Array]:
        """As :meth:`probest.programs.event.Event.function`, of the coordinates that are left."""
        whole = self.strata.event.function(parts, self.held, apart=apart)
        place = self.backend.from_host(np.eye(self.strata.event.dim)[self.free])
        return lambda z: whole(z @ place)

    @property
    def kinds(self) -> Kinds | None:
        return self.strata.event.kinds

    def evaluate_kinds(
        self, z: Floats, which: int | np.ndarray | None = None, *, gradient: bool = False
    ) -> tuple[Evaluation, Floats, Floats]:
        """As :meth:`probest.programs.event.Event.evaluate_kinds`, in the coordinates that are left."""
        held, at = held_rows(self.held, len(z)), self.strata.full(z)
        found, severity, kinds = self.strata.event.evaluate_kinds(at, which, gradient=gradient, held=held)
        return self._left(found), severity, kinds

    def evaluate(self, z: Floats, *, gradient: bool = False) -> Evaluation:
        held = held_rows(self.held, len(z))
        return self._left(self.strata.event.evaluate(self.strata.full(z), gradient=gradient, held=held))

    def _left(self, found: Evaluation) -> Evaluation:
        """The same, of the coordinates that are left."""
        slope = None if found.severity_grad is None else found.severity_grad[:, self.free]
        if not self.weighted:
            return Evaluation(found.severity, np.zeros(len(found.severity)), slope)
        rise = None if found.log_weight_grad is None else found.log_weight_grad[:, self.free]
        return Evaluation(found.severity, found.log_weight, slope, rise)


def free_of(event: Event, held: tuple[Site, ...]) -> np.ndarray:
    """Coordinates of z that these sites leave, as indices."""
    taken = {site.name for site in held}
    owned = np.repeat([site.name in taken for site in event.sites], [site.size for site in event.sites])
    return np.flatnonzero(~owned)


def columns_of(event: Event, sites: tuple[Site, ...]) -> list[np.ndarray]:
    """Where the codes of each of these discrete sites stand in a row of :meth:`Event.discrete_draws`."""
    listed = [site for site in event.sites if site.discrete]
    starts = np.cumsum([0, *(site.elements for site in listed)])
    place = {site.name: start for site, start in zip(listed, starts, strict=False)}
    return [place[site.name] + np.arange(site.elements) for site in sites]


def strata_of(
    event: Event, most: int = MOST, seed: int = 0, *, alone: int = 0, calls: int = _CLOSED_CALLS
) -> Strata | None:
    """The strata of an event, or None where there is nothing to hold. A site ``alone`` may have so many values.

    That is: no discrete site with a list; observations that leave few draws of weight; counts without an end whose
    observations favour large ones. A closed loop runs its model for each probability; where these depend on other
    draws, it does so ``calls`` times, or 64 times for each stratum, if that is more.
    """
    rng = np.random.Generator(np.random.Philox(seed))
    names = tuple(site.name for site in event.sites if site.choices)
    if not names:
        return None
    types = event.site_values(np.zeros((1, event.dim)), names)
    sites = tuple(_reaching(event, site, types, rng) for site in event.sites)
    interleaved = event.composition.interleaved
    sites = _held(sites, min(most, _MOST_CLOSED) if interleaved else most, 0 if interleaved else alone)
    if not sites:
        return None
    values = _combinations(sites, types)
    probes = _PROBES if len(free_of(event, sites)) else 1
    log_p = _log_density(event, values, rng.standard_normal((probes, event.dim)))
    varies = not bool(np.all((log_p.max(axis=1) == -math.inf) | (_spread(log_p) < _EQUAL)))
    mean = log_p[:, 0]
    with np.errstate(invalid="ignore"):
        error = np.finfo(np.float32).eps * (1.0 + np.abs(mean))
    if varies:
        integrated = _integrated(event, values, rng, calls if event.composition.interleaved else _MOST_DRAWS)
        if integrated is None:
            return None
        mean, error = integrated
    order = np.argsort(-mean, kind="stable")
    order = order[mean[order] > -math.inf]
    if not len(order):
        return None
    values, mean = {name: value[order] for name, value in values.items()}, mean[order]
    evidence = log_sum_exp(mean) if event.weighted or varies else 0.0
    mean = mean - evidence
    left_out = _tail(sites, values, mean)
    if event.weighted and left_out > math.log(_EQUAL):
        return None
    log_evidence = evidence if event.weighted else 0.0
    return Strata(event, sites, values, mean, left_out, error[order], varies, log_evidence)


def _spread(log_p: Floats) -> Floats:
    with np.errstate(invalid="ignore"):
        spread = np.ptp(log_p, axis=1)
    return np.where(np.isnan(spread), math.inf, spread)


def _integrated(
    event: Event, values: Mapping[str, np.ndarray], rng: np.random.Generator, most: int
) -> tuple[Floats, Floats] | None:
    """log E_k and its standard error, by the same draws for all; None where too few of the draws have weight."""
    count = len(next(iter(values.values())))
    n = int(np.clip(most // count, *_DRAWS))
    log_p = _log_density(event, values, rng.standard_normal((n, event.dim)))
    worth = effective_sample_size(np.logaddexp.reduce(log_p, axis=0))
    if worth < min(_WORTH, 0.5 * n):
        return None
    means = [log_mean_exp(row) if np.isfinite(row).any() else (-math.inf, 0.0) for row in log_p]
    return np.array([mean for mean, _ in means]), np.array([error for _, error in means])


def _reaching(event: Event, site: Site, types: Mapping[str, np.ndarray], rng: np.random.Generator) -> Site:
    """A count without an end, with a list as long as its law asks for; without one where ``_LONGEST`` are too few.

    That is, up to where it is e^-60 times as likely as at its most likely, at a few draws of all else. A count that
    takes more values is nearly continuous, and left random. What is interleaved with the model keeps its list.
    """
    if site.complete or not site.choices or not site.elements or event.composition.interleaved:
        return site
    grid = np.arange(_LONGEST)
    held = {site.name: site.decoded(np.repeat(grid[:, None], site.elements, axis=1), types[site.name].dtype)}
    log_p = _log_density(event, held, rng.standard_normal((_PROBES, event.dim))) / site.elements
    with np.errstate(invalid="ignore"):
        below = np.nan_to_num(log_p - log_p.max(axis=0), nan=-np.inf).max(axis=1)
    if below[-1] > _NEVER:
        return site._replace(choices=())
    needed = int(np.flatnonzero(below > _NEVER).max(initial=0)) + 2
    return site._replace(choices=tuple(range(max(len(site.choices), needed))))


def _held(sites: tuple[Site, ...], most: int, alone: int) -> tuple[Site, ...]:
    """The sites to hold: as many as make at most ``most`` combinations, those with the fewest first.

    Where there are none, the one with the fewest, if these are no more than ``alone``.
    """
    sizes = {site.name: site.elements * math.log(len(site.choices)) for site in sites if site.choices}
    chosen, log_count = set(), 0.0
    for name in sorted(sizes, key=lambda name: sizes[name]):
        if log_count + sizes[name] <= math.log(most) + 1e-9:
            chosen.add(name)
            log_count += sizes[name]
        elif not chosen and sizes[name] <= math.log(max(alone, 1)):
            return tuple(site for site in sites if site.name == name)
    return tuple(site for site in sites if site.name in chosen)


def _combinations(sites: tuple[Site, ...], types: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All combinations of the elements of all sites, each ``(m, *shape)`` with the site's own type."""
    axes = [np.asarray(site.choices) for site in sites for _ in range(site.elements)]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(axes))
    ends = np.cumsum([0, *(site.elements for site in sites)])
    return {
        site.name: site.decoded(grid[:, a:b], types[site.name].dtype)
        for site, a, b in zip(sites, ends, ends[1:], strict=False)
    }


def _log_density(event: Event, values: Mapping[str, np.ndarray], z: Floats) -> Floats:
    """log p_k at each z, ``(m, n)``."""
    count, n = len(next(iter(values.values()))), len(z)
    held = {name: np.repeat(value, n, axis=0) for name, value in values.items()}
    with np.errstate(all="ignore"):
        log_p = event.log_density(np.tile(z, (count, 1)), held)
    return np.where(np.isnan(log_p), -math.inf, log_p).reshape(count, n)


def _tail(sites: tuple[Site, ...], values: Mapping[str, np.ndarray], log_p: Floats) -> float:
    """log of a bound on the probability of counts beyond their lists: their tails fall at least geometrically."""
    total = 0.0
    for site in sites:
        if site.complete:
            continue
        flat = site.coded(values[site.name])
        for j in range(flat.shape[1]):
            last, before = site.choices[-1], site.choices[-2]
            end, previous = (float(np.exp(log_p[flat[:, j] == value]).sum()) for value in (last, before))
            ratio = end / previous if previous > 0.0 else 0.0
            total += end * ratio / (1.0 - ratio) if ratio < 1.0 else 1.0
    return math.log(total) if total > 0.0 else -math.inf


def held_rows(held: Mapping[str, np.ndarray], n: int) -> dict[str, np.ndarray]:
    """The same values of held sites for each of n rows."""
    return {name: np.broadcast_to(value, (n, *np.shape(value))).copy() for name, value in held.items()}


def placed(
    event: Event,
    sites: tuple[Site, ...],
    held: Mapping[str, np.ndarray],
    z: Floats,
    rng: np.random.Generator,
    *,
    varies: bool = True,
) -> tuple[Floats, np.ndarray]:
    """z ``(n, dim)`` with coordinates at which the sites have the held values, and which rows have them.

    Values rise with the last coordinate of their element, so the interval of each is found by bisection; by one for all
    rows with the same values, unless their probability ``varies`` with other draws. Where an element has other
    coordinates too, these are chosen among some draws, by how likely they make the value. Elements are bisected
    together, which is right where they do not depend on each other; rows that do not come out right once more, element
    after element.
    """
    z = z.copy()
    slices = event.composition.slices
    own = [np.arange(event.dim)[slices[site.name]].reshape(site.elements, -1) for site in sites]
    at = [row for rows in own for row in rows]
    columns = np.concatenate(columns_of(event, sites))
    wanted = np.concatenate([site.coded(held[site.name]) for site in sites], axis=1)
    _put(event, z, at, columns, wanted, rng, varies=varies)
    right = (event.discrete_draws(z)[:, columns] == wanted).all(axis=1)
    wrong = np.flatnonzero(~right)
    if len(wrong) and len(at) > 1:
        again = z[wrong]
        for k in range(len(at)):
            one = slice(k, k + 1)
            _put(event, again, at[one], columns[one], wanted[wrong, one], rng, varies=True)
        z[wrong] = again
        right[wrong] = (event.discrete_draws(again)[:, columns] == wanted[wrong]).all(axis=1)
    return z, right


def _put(
    event: Event,
    z: Floats,
    at: list[np.ndarray],
    columns: np.ndarray,
    wanted: Floats,
    rng: np.random.Generator,
    *,
    varies: bool,
) -> Floats:
    """Put elements, in place, at coordinates where their codes ``(n, elements)`` are those wanted.

    at: the coordinates of each element. Returns the logs of the probabilities of these values, ``(n, elements)``.
    """
    first, inverse = np.arange(len(z)), np.arange(len(z))
    if not varies:
        _, first, inverse = np.unique(wanted, axis=0, return_index=True, return_inverse=True)
        inverse = inverse.ravel()
    several = any(len(own) > 1 for own in at)
    tries = int(np.clip(_TRIED[1] * _TRIED[0] // len(first), *_TRIED)) if several else 1
    pool = np.repeat(z[first], tries, axis=0)
    log_w = np.zeros((len(pool), len(at)))
    for e, own in enumerate(at):
        drawn = np.resize([1.0, 2.0], len(pool))[:, None] * rng.standard_normal((len(pool), len(own) - 1))
        pool[:, own[:-1]] = drawn
        half = 0.5 * np.sum(drawn**2, axis=1)
        log_w[:, e] = -half - np.logaddexp(-half, -0.25 * half - (len(own) - 1) * math.log(2.0))
    last = np.array([own[-1] for own in at])
    lower, upper = _interval(event, pool, last, columns, np.repeat(wanted[first], tries, axis=0))
    side, ends = _tails(lower, upper)
    log_w = (log_w + _log_mass(ends)).reshape(len(first), tries, len(at))[inverse]
    chosen = np.argmax(log_w + rng.gumbel(size=log_w.shape), axis=1) + tries * inverse[:, None]
    share = rng.uniform(0.02, 0.98, wanted.shape)
    for e, own in enumerate(at):
        row = chosen[:, e]
        with np.errstate(divide="ignore"):
            mixed = np.logaddexp(ends[0, row, e] + np.log1p(-share[:, e]), ends[1, row, e] + np.log(share[:, e]))
        z[:, own[:-1]] = pool[row][:, own[:-1]]
        z[:, own[-1]] = side[row, e] * ndtri_exp(mixed)
    return np.asarray(np.logaddexp.reduce(log_w, axis=1) - math.log(tries))


class Glance(NamedTuple):
    """One value of one element of a site: its code, the log of its probability, and points ``(n, dim)`` with it."""

    site: Site
    element: int
    code: int
    log_prob: float
    z: Floats


def glances(event: Event, sites: tuple[Site, ...], z: Floats, rng: np.random.Generator) -> list[Glance]:
    """Every value of every element of these sites, at the same points ``(n, dim)`` otherwise. No model is run for it,
    unless sites are interleaved with it. Values that no coordinate leads to are left out.
    """
    out, n = [], len(z)
    for site, columns in zip(sites, columns_of(event, sites), strict=True):
        own = np.arange(event.dim)[event.composition.slices[site.name]].reshape(site.elements, -1)
        for e in range(site.elements):
            codes = np.repeat(np.asarray(site.choices, dtype=np.float64), n)
            at = np.tile(z, (len(site.choices), 1))
            log_p = _put(event, at, [own[e]], columns[e : e + 1], codes[:, None], rng, varies=True)[:, 0]
            for k, code in enumerate(site.choices):
                rows = slice(k * n, (k + 1) * n)
                if np.isfinite(log_p[rows]).any():
                    out.append(Glance(site, e, code, log_mean_exp(log_p[rows])[0], at[rows]))
    return out


def _interval(event: Event, z: Floats, at: np.ndarray, column: np.ndarray, wanted: Floats) -> tuple[Floats, Floats]:
    """Where the values are those wanted: the first coordinate with them and the first beyond, each ``(n, len(at))``."""
    n = len(z)
    low, high = np.full((2, *wanted.shape), -_FURTHEST), np.full((2, *wanted.shape), _FURTHEST)
    both = np.concatenate([z, z])
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        both[:, at] = middle.reshape(2 * n, -1)
        value = event.discrete_draws(both)[:, column].reshape(2, *wanted.shape)
        above = np.stack([value[0] >= wanted, value[1] > wanted])
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    return high[0], high[1]


def _tails(lower: Floats, upper: Floats) -> tuple[Floats, Floats]:
    """The side from which an interval is seen in the lower tail, and the logs of what lies below its two ends there."""
    side = np.where(lower + upper > 0.0, -1.0, 1.0)
    return side, log_ndtr(np.stack([side * lower, side * upper]))


def _log_mass(ends: Floats) -> Floats:
    """log of the probability between two ends, given the logs of what lies below each."""
    low, high = np.sort(ends, axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.nan_to_num(high + np.log(-np.expm1(low - high)), nan=-np.inf))
