r"""Strata: a program with the values of its discrete sites held.

With the values k of the discrete sites held, the program is smooth again and P = Σ_k p_k P_k, p_k the probability of
the values. Sites whose values can be listed (Bernoulli, Categorical, Binomial, DiscreteUniform, OrderedLogistic, the
component sites of mixtures; Poisson and Geometric up to a tail that is bounded) are held, as both libraries enumerate
them for inference; ``infer={"enumerate": False}`` at a site leaves it out. Where the listed combinations are more than
``most``, the sites with the fewest values are held and the others stay random.

p_k is what the program says with the values held, exactly. Where it depends on other draws, or where sites are
observed, it is no number: such programs have no strata yet.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from probest.evidence import Evaluation, Floats
from probest.programs.base import Site
from probest.programs.event import Event

__all__ = ["MOST", "Strata", "StratumEvent", "strata_of"]

MOST = 4096
"""Strata that are listed, at most, unless said otherwise."""

_PROBES = 4  # draws of each stratum that tell whether its probability depends on them
_MOST_CLOSED = 256  # strata of a closed loop, whose listing runs the model
_EQUAL = 1e-4  # nats: float32 rounds the sum of the log-densities of some dozens of sites by less


class Stratum(NamedTuple):
    """Values of the held sites, by name, and the log of their probability."""

    values: dict[str, np.ndarray]
    log_prob: float


@dataclass(frozen=True)
class Strata:
    """The strata of an event, the most probable first.

    sites: those that are held. values: ``(m, ...)`` of each. log_prob: ``(m,)`` log p_k. left_out: log of the
    probability that no stratum holds, at most (counts beyond their lists).
    """

    event: Event
    sites: tuple[Site, ...]
    values: Mapping[str, np.ndarray]
    log_prob: Floats
    left_out: float

    def __len__(self) -> int:
        return len(self.log_prob)

    def __getitem__(self, k: int) -> Stratum:
        return Stratum({name: value[k] for name, value in self.values.items()}, float(self.log_prob[k]))

    @property
    def free(self) -> np.ndarray:
        """Coordinates of z that the held sites leave, as indices."""
        taken = {site.name for site in self.sites}
        owned = np.repeat([site.name in taken for site in self.event.sites], [site.size for site in self.event.sites])
        return np.flatnonzero(~owned)

    def full(self, z: Floats) -> Floats:
        """The coordinates of the whole program; those of held sites are 0, and say nothing."""
        out = np.zeros((len(z), self.event.dim))
        out[:, self.free] = z
        return out

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
        return False

    def evaluate(self, z: Floats, *, gradient: bool = False) -> Evaluation:
        found = self.strata.event.evaluate(self.strata.full(z), gradient=gradient, held=_rows(self.held, len(z)))
        slope = found.severity_grad
        return Evaluation(found.severity, np.zeros(len(z)), None if slope is None else slope[:, self.free])


def strata_of(event: Event, most: int = MOST, seed: int = 0) -> Strata | None:
    """The strata of an event, or None where there is nothing to hold.

    That is: no discrete site with a list, observed sites, or probabilities that depend on other draws.
    """
    if event.weighted:
        return None
    sites = _held(event.sites, min(most, _MOST_CLOSED) if event.composition.closed_loop else most)
    if not sites:
        return None
    types = event.site_values(np.zeros((1, event.dim)), tuple(site.name for site in sites))
    values = _combinations(sites, types)
    rng = np.random.Generator(np.random.Philox(seed))
    log_p = _log_density(event, values, rng.standard_normal((_PROBES, event.dim)))
    order = np.argsort(-log_p[:, 0], kind="stable")
    order = order[log_p[order].max(axis=1) > -math.inf]
    if not np.all(np.ptp(log_p[order], axis=1) < _EQUAL):
        return None
    values, mean = {name: value[order] for name, value in values.items()}, log_p[order, 0]
    return Strata(event, sites, values, mean, _tail(sites, values, mean))


def _held(sites: tuple[Site, ...], most: int) -> tuple[Site, ...]:
    """The sites to hold: as many as make at most ``most`` combinations, those with the fewest first."""
    sizes = {site.name: site.size * math.log(len(site.choices)) for site in sites if site.choices}
    chosen, log_count = set(), 0.0
    for name in sorted(sizes, key=lambda name: sizes[name]):
        if log_count + sizes[name] <= math.log(most) + 1e-9:
            chosen.add(name)
            log_count += sizes[name]
    return tuple(site for site in sites if site.name in chosen)


def _combinations(sites: tuple[Site, ...], types: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All combinations of the elements of all sites, each ``(m, *shape)`` with the site's own type."""
    axes = [np.asarray(site.choices) for site in sites for _ in range(site.size)]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(axes))
    ends = np.cumsum([0, *(site.size for site in sites)])
    return {
        site.name: grid[:, a:b].reshape(-1, *site.base_shape).astype(types[site.name].dtype)
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
        flat = values[site.name].reshape(len(log_p), -1)
        for j in range(flat.shape[1]):
            last, before = site.choices[-1], site.choices[-2]
            end, previous = (float(np.exp(log_p[flat[:, j] == value]).sum()) for value in (last, before))
            ratio = end / previous if previous > 0.0 else 0.0
            total += end * ratio / (1.0 - ratio) if ratio < 1.0 else 1.0
    return math.log(total) if total > 0.0 else -math.inf


def _rows(held: Mapping[str, np.ndarray], n: int) -> dict[str, np.ndarray]:
    return {name: np.broadcast_to(value, (n, *np.shape(value))).copy() for name, value in held.items()}
