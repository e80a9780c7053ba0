r"""Tilts: location and scale of an adversary's own randomness, in the few directions that matter.

In standard-normal coordinates z the law is a mixture of Gaussians on a subspace, :math:`u = B^\top z`, and the
adversary as it is in all other directions: every site of the program is moved and scaled, together with the others
where that matters (a tilt of rank r), and each component may hold another mode. The subspace is that in which the
severity's gradients at catastrophes lie. Values of discrete sites (strata) are drawn by each component from a law of
its own. The first law is fitted to the catastrophes, stratum by stratum.

Reference: Au & Beck (1999) and Papaioannou, Geyer & Straub (2019) fit such mixtures as importance densities.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from probest.adversaries.base import Law, ratio_of
from probest.backends.base import Array, Backend, Parts
from probest.diagnostics import systematic_resample
from probest.evidence import Floats, Particles
from probest.guides.base import stratify
from probest.guides.mixture import fit_mixture
from probest.guides.subspace import gradient_rows, informed_basis
from probest.programs.event import Event
from probest.programs.strata import Strata, held_rows, strata_of

__all__ = ["Tilt", "TiltLaw", "fitted_to", "subspace"]

_FITTED = 2_000  # particles that the first law is fitted to, at most
_ASKED = 256  # particles whose gradients find the subspace
_THRESHOLD = 0.1  # least share of a direction, see `informed_basis`
_INDEPENDENT, _JITTER = 1e-6, 1e-9
_STRATA = 256  # combinations of values of discrete sites that are chosen among, at most
_ELSEWHERE = 0.02  # of a component's draws that come from any stratum
_APART = 10.0  # how far strata are from each other, in deviations


@dataclass(frozen=True)
class Tilt:
    """A family: in each stratum a mixture of at most ``components`` Gaussians in at most ``rank`` directions.

    from_particles: begin with a fit to the catastrophes; else with random places at the adversary's own scale.
    """

    components: int = 12
    rank: int = 24
    from_particles: bool = True

    def __post_init__(self) -> None:
        for name in ("components", "rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected a whole number of at least 1")

    def build(self, event: Event, particles: Particles, rng: np.random.Generator) -> TiltLaw:
        z = fitted_to(particles, rng)
        strata = _strata(event)
        group = np.zeros(len(z), dtype=np.intp) if strata is None else strata.index_of(z)
        z, group = z[group >= 0], group[group >= 0]
        strata_count = 1 if strata is None else len(strata)
        bases = {int(k): self._basis(event, strata, z[group == k], int(k)) for k in np.unique(group)}
        left, size, _ = np.linalg.svd(np.concatenate(list(bases.values()), axis=1), full_matrices=False)
        basis = np.ascontiguousarray(left[:, size > _INDEPENDENT])
        if self.from_particles:
            weights, means, factors, choice = self._fitted(z, group, bases, basis, strata_count, rng)
        else:
            k, rank = self.components, basis.shape[1]
            weights, means = np.full(k, 1.0 / k), rng.standard_normal((k, rank))
            factors, choice = np.tile(np.eye(rank), (k, 1, 1)), np.full((k, strata_count), 1.0 / strata_count)
        inverse = np.linalg.inv(factors)  # lower triangular again
        params = {
            "logits": np.log(np.maximum(weights, 1e-6)),
            "means": means,
            "below": np.tril(inverse, -1),
            "log_scale": -np.log(np.einsum("kii->ki", inverse)),
            "choice": np.log(choice),
        }
        return TiltLaw.of(event, params | {"basis": basis}, strata)

    def check_playable(self, event: Event) -> None:
        """Every event's tilts can be opponents."""

    def turned(self, turn: int) -> Tilt:
        """By turns from random places and from the catastrophes."""
        return replace(self, from_particles=turn % 2 == 1)

    def opponent(self, event: Event, law: Law, parts: Parts) -> TiltLaw:
        """The law with these parameters."""
        assert isinstance(law, TiltLaw)
        return replace(law, parts=parts)

    def restored(self, event: Event, arrays: dict[str, np.ndarray]) -> TiltLaw:
        """The law with these parameters, as :meth:`TiltLaw.arrays` gives them."""
        return TiltLaw.of(event, arrays)

    def _fitted(
        self,
        z: Floats,
        group: np.ndarray,
        bases: dict[int, Floats],
        basis: Floats,
        strata: int,
        rng: np.random.Generator,
    ) -> tuple[Floats, Floats, Floats, Floats]:
        """Weights ``(k,)``, means ``(k, r)``, factors ``(k, r, r)`` and choices of strata ``(k, strata)``.

        Those of each stratum are fitted in its own subspace, and are as the adversary in what the others add to it.
        """
        found: list[tuple[Floats, ...]] = []
        for k, own in bases.items():
            mine = z[group == k]
            fit = fit_mixture(mine, np.zeros(len(mine)), own, rng, most=self.components)
            inside = basis.T @ own
            change = np.einsum("kij,klj->kil", fit.factors, fit.factors) - np.eye(own.shape[1])
            covariance = np.eye(basis.shape[1]) + np.einsum("ai,kij,bj->kab", inside, change, inside)
            factors = np.linalg.cholesky(covariance + _JITTER * np.eye(basis.shape[1]))
            choice = np.full((fit.components, strata), _ELSEWHERE / strata)
            choice[:, k] += 1.0 - _ELSEWHERE
            found.append((fit.weights * len(mine) / len(z), fit.means @ inside.T, factors, choice))
        weights, means, factors, choice = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return weights, means, factors, choice

    def _basis(self, event: Event, strata: Strata | None, z: Floats, k: int) -> Floats:
        """Orthonormal directions ``(dim, r)`` that matter to catastrophes z of the stratum k."""
        held = None if strata is None else strata[k].values
        basis = subspace(event, z, rank=self.rank, held=held)
        if strata is None:
            return basis
        left, size, _ = np.linalg.svd(basis * np.isin(np.arange(event.dim), strata.free)[:, None], full_matrices=False)
        return left[:, size > _INDEPENDENT]


def fitted_to(particles: Particles, rng: np.random.Generator) -> Floats:
    """Equally weighted catastrophes ``(n, dim)`` for a first law."""
    return particles.z[systematic_resample(particles.log_weight, _FITTED, rng)]


def subspace(
    event: Event,
    z: Floats,
    *,
    threshold: float = _THRESHOLD,
    asked: int = _ASKED,
    rank: int = 24,
    held: Mapping[str, np.ndarray] | None = None,
) -> Floats:
    """Orthonormal directions ``(dim, r)`` that matter to equally weighted catastrophes z, by the severity's gradients.

    threshold, rank: see :func:`probest.guides.subspace.informed_basis`. asked: how many of z are asked for a gradient,
    about. held: values of sites, the same for all.
    """
    some, rows = z[:: max(1, len(z) // asked)], None
    if event.differentiable:
        kept = None if held is None else held_rows(held, len(some))
        slope = event.evaluate(some, gradient=True, held=kept).severity_grad
        rows = gradient_rows(some, np.zeros(len(some)), slope, None)
    return informed_basis(z, np.zeros(len(z)), rows, threshold=threshold, rank=rank)


def _log_ratio(backend: Backend, log_p: Floats, params: dict[str, Array], u: Array, k: Array) -> Array:
    """log q − log p at subspace coordinates u ``(n, r)`` in the strata k ``(n,)``."""
    xp, means, below, log_scale = backend.special.xp, params["means"], params["below"], params["log_scale"]
    away = u[:, None, :] - means[None]
    # the inverse factors: ``below`` strictly below the diagonal, exp(-log_scale) on it
    mask = backend.from_host(np.tril(np.ones(below.shape[1:]), -1))
    white = xp.einsum("kij,nkj->nki", below * mask, away) + xp.exp(-log_scale)[None] * away
    logits = params["logits"] - _log_sum(xp, params["logits"], 0)
    choice = params["choice"] - _log_sum(xp, params["choice"], 1)[:, None] - backend.from_host(log_p)
    parts = logits[None] + choice[:, k].T - log_scale.sum(-1)[None] - 0.5 * (white * white).sum(-1)
    return _log_sum(xp, parts, 1) + 0.5 * (u * u).sum(-1)


def _log_sum(xp: Any, values: Array, axis: int) -> Array:
    top = xp.amax(values, axis)
    return top + xp.log(xp.exp(values - xp.expand_dims(top, axis)).sum(axis))


@dataclass
class TiltLaw:
    """A :class:`~probest.adversaries.base.Law`; its points are ``u`` ``(n, r)``, ``z`` ``(n, dim)``, strata ``k``.

    And an :class:`~probest.adversaries.base.Opponent`.
    """

    event: Event
    basis: Floats
    strata: Strata | None
    parts: Parts

    @classmethod
    def of(cls, event: Event, arrays: dict[str, np.ndarray], strata: Strata | None = None) -> TiltLaw:
        """The law with these parameters, as :meth:`arrays` gives them."""
        strata = strata or _strata(event)
        log_p = np.zeros(1) if strata is None else strata.log_prob
        params = {name: value for name, value in arrays.items() if name != "basis"}
        learnt = event.backend.bind(partial(_log_ratio, event.backend, log_p), params)
        return cls(event, arrays["basis"], strata, event.parts._replace(adversary=learnt, params={}))

    def arrays(self) -> dict[str, np.ndarray]:
        """The parameters and the basis, by name."""
        owned = _owned(self.parts.adversary)
        return {name: self.event.backend.to_host(value) for name, value in owned.items()} | {"basis": self.basis}

    def log_ratio(self, parts: Parts, points: dict[str, Array]) -> Array:
        return parts.adversary(points["u"], points["k"])

    def draw(self, parts: Parts, n: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        weights, means, factors, choice = self._mixture(parts)
        kind = stratify(n, weights, rng)
        z = rng.standard_normal((n, len(self.basis)))
        inside = z @ self.basis
        u = means[kind] + np.einsum("nij,nj->ni", factors[kind], inside)
        k = (rng.random((n, 1)) > np.cumsum(choice[kind], axis=1)[:, :-1]).sum(axis=1)
        return {"u": u, "z": z + (u - inside) @ self.basis.T, "k": k}

    def plain(self, n: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        z = rng.standard_normal((n, len(self.basis)))
        return self.points(z)

    def points(self, z: Floats) -> dict[str, np.ndarray]:
        k = np.zeros(len(z), dtype=np.intp) if self.strata is None else np.maximum(self.strata.index_of(z), 0)
        return {"u": z @ self.basis, "z": z, "k": k}

    def features(self, points: dict[str, np.ndarray]) -> Floats:
        if self.strata is None:
            return points["u"]
        apart = _APART * np.eye(len(self.strata))[points["k"]]
        return np.concatenate([points["u"], apart], axis=1)

    def cases(self, event: Event, n: int, rng: np.random.Generator) -> tuple[Floats, np.ndarray | None]:
        drawn = self.draw(self.parts, n, rng)
        return drawn["z"], None if self.strata is None else drawn["k"]

    def distance(self, other: Any, rng: np.random.Generator) -> float:
        points, backend = self.draw(self.parts, 1_024, rng), self.event.backend
        there = {**points, "u": points["z"] @ other.basis}
        gap = ratio_of(backend, self, self.parts, points) - ratio_of(backend, other, other.parts, there)
        return float(np.mean(gap))

    def played(self) -> Callable[..., Any]:
        return self.program(self.parts, 1.0)

    def severity(self, points: dict[str, np.ndarray]) -> Floats:
        held = None if self.strata is None else self.strata.held(points["k"])
        return self.event.evaluate(points["z"], held=held).severity

    def program(self, parts: Parts, share: float) -> Callable[..., Any]:
        """Sites ``tilted``, ``component``, ``stratum`` and ``noise``; the adversary's own are inside, and not seen."""
        event, basis, strata = self.event, self.basis, self.strata
        frontend, backend = event.composition.frontend, event.backend
        xp = backend.special.xp
        weights, means, factors, choice = (backend.from_host(value) for value in self._mixture(parts))
        axes, given = backend.from_host(basis), None
        values: dict[str, Array] = {}
        if strata is not None:
            given = backend.from_host(np.exp(strata.log_prob))
            values = {name: backend.from_host(value) for name, value in strata.values.items()}

        def tilted(*model: Any) -> Any:
            chosen = frontend.sample("tilted", "Bernoulli", backend.from_host(np.asarray(share)))
            component = frontend.sample("component", "Categorical", weights)
            noise = frontend.sample("noise", "Normal", xp.zeros(len(basis)), xp.ones(len(basis)), event_dims=1)
            inside = noise @ axes
            # one of few by its indicator: batches over the component, in both libraries
            one = xp.asarray(xp.arange(len(means)) == component) * 1.0
            u = one @ means + xp.einsum("k,kij,j->i", one, factors, inside)
            z = xp.where(chosen == 1, noise + axes @ (u - inside), noise)
            held = {}
            if given is not None:
                k = frontend.sample("stratum", "Categorical", xp.where(chosen == 1, one @ choice, given))
                held = {name: _row(xp, value, k) for name, value in values.items()}
            return event.composition.replay(event.parts, z, *model, held=held)

        if event.composition.closed_loop:
            return lambda model: tilted(model)
        return lambda: tilted()

    def _mixture(self, parts: Parts) -> tuple[Floats, Floats, Floats, Floats]:
        """Weights ``(k,)``, means ``(k, r)``, lower Cholesky factors ``(k, r, r)``, choices of strata ``(k, s)``."""
        owned = _owned(parts.adversary)
        params = {name: self.event.backend.to_host(value) for name, value in owned.items()}
        inverse = np.tril(params["below"], -1)
        inverse[:, np.arange(inverse.shape[1]), np.arange(inverse.shape[1])] = np.exp(-params["log_scale"])
        return _softmax(params["logits"]), params["means"], np.linalg.inv(inverse), _softmax(params["choice"])


def _strata(event: Event) -> Strata | None:
    """What a tilt chooses among: strata of fixed probability."""
    strata = strata_of(event, _STRATA)
    return None if strata is None or strata.varies else strata


def _owned(bound: Any) -> dict[str, Array]:
    """The parameters of a bound function, in either library."""
    return dict(bound.params.items()) if hasattr(bound, "params") else bound.args[0]


def _row(xp: Any, values: Array, k: Array) -> Array:
    """The k-th of ``values``, by its indicator, with its type."""
    one = xp.reshape(xp.arange(len(values)) == k, (-1,) + (1,) * (values.ndim - 1))
    return xp.astype(xp.where(one, values, xp.zeros_like(values)).sum(0), values.dtype)


def _softmax(logits: Floats) -> Floats:
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True))
