r"""The weigh phase: log P as a differentiable function of the parameters, with the particles held fixed.

*Idea.* The find phase leaves particles and, on request, points of the event's surface. Near the parameters θ₀ of the
estimate, log P changes by three things, each an average over fixed points:

- the surface moves: each point contributes the change of the log-probability of the tail beyond it;
- weights change: observed sites, and discrete sites at the values they have (their score);
- the adversary's own evidence changes, if it is conditioned: log P is then P(catastrophe, observed) / P(observed).

The value at θ₀ is the estimate itself; the gradient at θ₀ is the gradient of log P without smoothing bias (Fisher's
identity for weights and discrete sites, the surface integral of :mod:`probest.gradient.surface` for the rest). For a
half-space the value is exact at every θ; in general trust it while it moves by a nat or so, then estimate again.

A boolean checker has no surface that can be seen. Then all sites are held at their native values and only the
adversary's density is differentiated: exact in the adversary's parameters, and nothing can be said of the model's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import scipy
from scipy.special import log_ndtr

from probest.backends.base import Array, Backend, Parts
from probest.budget import Meter
from probest.diagnostics import systematic_resample
from probest.evidence import Evidence, Floats, Particles
from probest.gradient.surface import Surface, sample_surface
from probest.programs.event import Event
from probest.seeds import child_seed
from probest.smc.resample_move import cost, thicken

__all__ = ["GradientError", "Weigher"]

SCORE_PARTICLES = 1_000
TEXT_PARTICLES = 4_000  # a gradient of text is a mean of scores alone


class GradientError(ValueError):
    """log P has no gradient of the kind asked for; the message says why."""


class _Scores(NamedTuple):
    """Equally weighted particles whose log-weight is followed. held: sites kept at their values."""

    z: Floats
    held: dict[str, np.ndarray]
    log_weight: Floats


@dataclass(frozen=True)
class Weigher:
    """``weigher(parts) -> log P`` near the parameters it was built at. Build with :meth:`at`."""

    event: Event
    log_prob: float
    surface: Surface | None
    posterior: _Scores | None
    prior: _Scores | None

    @classmethod
    def at(cls, event: Event, evidence: Evidence, *, lines: int, seed: np.random.SeedSequence) -> Weigher:
        """Find what the gradient needs, from the particles of ``evidence``.

        Raises GradientError if there are no particles, or if the parameters have changed since the estimate.
        """
        particles = evidence.particles
        if particles is None or not len(particles.z) or not np.isfinite(evidence.log_prob):
            raise GradientError(
                "the estimate has no catastrophes, so log P has no gradient: estimate again with a larger budget, or "
                "with a checker that returns a real severity"
            )
        probe = particles.z[:16]
        if not np.allclose(event.evaluate(probe).severity, particles.severity[:16], rtol=1e-4, atol=1e-4):
            raise GradientError(
                "the parameters of the model or adversary have changed in place since the estimate, so its particles "
                "no longer belong to them: call log_prob_at once before changing parameters, or estimate again"
            )
        rng = np.random.Generator(np.random.Philox(seed))
        particles = thicken(Meter(event, cost(lines, 5)), particles, lines, seed=child_seed(seed, 1))
        surface = None
        if event.differentiable:
            surface = sample_surface(event, particles, lines=lines, seed=child_seed(seed, 0))
        frozen = event.discrete_sites if event.differentiable else None
        follow = event.weighted or not event.differentiable or bool(event.discrete_sites)
        posterior = _scores(event, particles, frozen, rng) if follow else None
        prior = evidence.prior_particles
        given = _scores(event, prior, frozen, rng) if event.weighted and prior is not None else None
        return cls(event, evidence.log_prob, surface, posterior, given)

    def __call__(self, parts: Parts) -> Array:
        """log P at ``parts``, differentiable in their arrays."""
        backend = self.event.backend
        value = backend.special.xp.zeros(()) + self.log_prob
        if self.surface is not None:
            value = value + self._surface_change(self.surface, parts)
        if self.posterior is not None:
            value = value + self._weight_change(self.posterior, parts)
        if self.prior is not None:
            value = value - self._weight_change(self.prior, parts)
        return value

    def _surface_change(self, surface: Surface, parts: Parts) -> Array:
        backend = self.event.backend
        special, xp, put = backend.special, backend.special.xp, backend.from_host
        severity, _ = self.event.scores(put(surface.z), _native(backend, surface.held), parts)
        rise = severity - put(surface.severity)
        tail = surface.gaussian & (surface.radius > 0)
        linear = xp.sum(put(np.where(tail, 0.0, surface.coefficient)) * rise)
        if not tail.any():
            return linear
        radius = np.where(tail, surface.radius, 1.0)
        share = surface.coefficient * surface.slope / np.exp(scipy.stats.norm.logpdf(radius) - log_ndtr(-radius))
        share = np.where(tail, share, 0.0)
        moved = put(radius) - rise / put(surface.slope)
        change = special.log_ndtr(-moved) - put(log_ndtr(-radius))
        change = xp.where(put(tail), change, xp.zeros_like(change))
        return linear + float(share.sum()) * _log_average(xp, change, put(share / share.sum()))

    def _weight_change(self, scores: _Scores, parts: Parts) -> Array:
        backend = self.event.backend
        put = backend.from_host
        _, log_weight = self.event.scores(put(scores.z), _native(backend, scores.held), parts)
        count = len(scores.z)
        return _log_average(backend.special.xp, log_weight - put(scores.log_weight), put(np.full(count, 1.0 / count)))


def _scores(event: Event, particles: Particles, frozen: tuple[str, ...] | None, rng: np.random.Generator) -> _Scores:
    """Particles with the sites in ``frozen`` (None: all latent sites) held at their values."""
    count = min(TEXT_PARTICLES if event.is_text else SCORE_PARTICLES, len(particles.z))
    z = particles.z[systematic_resample(particles.log_weight, count, rng)]
    names = tuple(site.name for site in event.sites if site.parent is None) if frozen is None else frozen
    held = event.site_values(z, names) if names else {}
    return _Scores(z, held, event.evaluate(z, held=held).log_weight)


def _native(backend: Backend, held: dict[str, np.ndarray]) -> dict[str, Array]:
    return {name: backend.from_host(value) for name, value in held.items()}


def _log_average(xp: Any, change: Array, share: Array) -> Array:
    """log Σ share · exp(change), with share summing to 1; shifted by a constant so that nothing overflows."""
    top = xp.max(change)
    return top + xp.log(xp.sum(share * xp.exp(change - top)))
