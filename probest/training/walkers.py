r"""Particles kept warm: a population that follows the catastrophes while the model changes.

*Idea.* Training moves the event a little at each step, so particles need not be found anew: they are a Markov chain on
:math:`\pi_\sigma \propto \varphi(z)\, w(z)\, \Phi(s(z)/\sigma)`, moved by the same kernel as tempering. The noise σ is
``breadth`` times what the severity changes over one standard deviation of z. That is broad: near catastrophes count,
so that a model learns a margin, and new modes are seen before they matter. For a half-space at distance β the smoothed
event has :math:`\log P_\sigma \approx \log P / (1 + \text{breadth}^2)`.

The change of log P from model to model is followed by reweighting with
:math:`\Phi(s_{t+1}(z_i)/\sigma) / \Phi(s_t(z_i)/\sigma)`, whose mean estimates :math:`P_{\sigma, t+1} / P_{\sigma, t}`;
particles are resampled when these weights have become uneven.

*When it fails.* A chain cannot know of a mode that it never visited, and the reweighting errs low with every step. So
training re-seeds the population from a fresh tempering run now and then (:meth:`Walkers.reseed`), and what is reported
is never taken from warm particles.

Reference: Del Moral, Doucet & Jasra (2006), Sequential Monte Carlo samplers (the weights of a slowly changing target).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import log_ndtr

from probest.budget import GRADIENT_CALLS, Meter
from probest.diagnostics import effective_sample_size, log_mean_exp, systematic_resample
from probest.evidence import EventLike, Floats, Particles
from probest.smc.moves import adapted, climb
from probest.smc.population import State
from probest.smc.softening import Noise
from probest.tuning import tuned

__all__ = ["Walkers"]


_DEMOS = "probest demo, digits and pendulum, a few seeds each"


@dataclass(frozen=True)
class WalkerTuning:
    """How warm particles follow a model. Set by hand on the two demos."""

    breadth: float = tuned(0.8, "of what the severity changes over a standard deviation of z: the smoothing", _DEMOS)
    acceptance: float = tuned(0.55, "that gradient steps aim at", _DEMOS)
    max_moves: int = tuned(6, "moves a training step, at most", _DEMOS)
    lag: float = tuned(2.0, "nats that the mean of log Φ(s/σ) may be below a half-space's in equilibrium", _DEMOS)


TUNING = WalkerTuning()


@dataclass
class Walkers:
    """The population, ``z`` of shape ``(n, dim)``.

    severity: ``(n,)`` under the model that the population last saw, or None before it saw any. noise: σ, in units of
    severity.
    log_prob: the running log P.
    """

    z: Floats
    log_prob: float
    severity: Floats | None = None
    noise: float = math.nan
    angle: float = 0.3

    @classmethod
    def seeded(cls, particles: Particles, log_prob: float, count: int, rng: np.random.Generator) -> Walkers:
        """A population of ``count`` from posterior particles."""
        return cls(particles.z[systematic_resample(particles.log_weight, count, rng)], log_prob)

    def reseed(self, particles: Particles, log_prob: float, rng: np.random.Generator) -> None:
        """Replace the whole population by posterior particles of the present event."""
        fresh = Walkers.seeded(particles, log_prob, len(self.z), rng)
        self.z, self.log_prob, self.severity = fresh.z, log_prob, None

    def advance(self, event: EventLike, rng: np.random.Generator) -> int:
        """Reweight, resample and move the population on the event as it is now; returns the model calls spent.

        Moves are repeated, up to ``max_moves`` times, until the population has caught up with the event.
        """
        n = len(self.z)
        meter = Meter(event, n * GRADIENT_CALLS * (TUNING.max_moves + 1))
        at = meter.evaluate(self.z, gradient=True)
        assert at.severity_grad is not None
        rows = np.arange(n)
        before = None if self.severity is None else log_ndtr(self.severity / self.noise)
        if before is not None:
            change = log_mean_exp(log_ndtr(at.severity / self.noise) - before)[0]
            self.log_prob = min(self.log_prob + (1 + TUNING.breadth**2) * change, 0.0)
        slope = float(np.median(np.linalg.norm(at.severity_grad, axis=1)))
        if slope > 0 or math.isnan(self.noise):
            self.noise = TUNING.breadth * max(slope, 1e-12)
        if before is not None:
            weights = log_ndtr(at.severity / self.noise) - before
            if effective_sample_size(weights) < n / 2:
                rows = systematic_resample(weights, n, rng)
        state = State(
            z=self.z[rows],
            severity=at.severity[rows],
            log_weight=at.log_weight[rows],
            severity_grad=at.severity_grad[rows],
            weight_grad=None if at.log_weight_grad is None else at.log_weight_grad[rows],
            log_z=np.array([self.log_prob]),
            power=1.0,
            soft=Noise(1.0 / self.noise),
            drift=Noise(1.0 / self.noise),
            angle=self.angle,
        )
        typical = math.sqrt(max(-2.0 * self.log_prob, 0.0)) * TUNING.breadth / (1 + TUNING.breadth**2)
        caught_up = float(log_ndtr(-typical)) - TUNING.lag
        for _ in range(TUNING.max_moves):
            acceptance = climb(state, meter, rng, state.angle)
            state.angle = adapted(state.angle, acceptance, TUNING.acceptance, least=1e-3)
            if np.mean(log_ndtr(state.severity / self.noise)) >= caught_up:
                break
        self.z, self.severity, self.angle = state.z, state.severity, state.angle
        return meter.calls
