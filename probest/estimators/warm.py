r"""Particles kept warm: a population that follows the catastrophes while the model changes.

*Idea.* Training moves the event a little at each step, so particles need not be found anew: they are a Markov chain on
:math:`\pi_\sigma \propto \varphi(z)\, w(z)\, \Phi(s(z)/\sigma)`, moved by the same kernel as tempering. The noise σ is
what the severity changes over the natural length of the tail: its gradient's norm divided by
:math:`\beta = \sqrt{-2 \log P}`. So about half of the particles are catastrophes, and the smoothed event is as rare as
the hard one to within a factor that barely depends on the model.

The change of log P from model to model is followed by reweighting,
:math:`\log P_{t+1} - \log P_t \approx \log \tfrac1n \sum_i \Phi(s_{t+1}(z_i)/\sigma) / \Phi(s_t(z_i)/\sigma)`.

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

from probest.diagnostics import log_mean_exp, systematic_resample
from probest.estimators.base import GRADIENT_CALLS, EventLike, Floats, Meter, Particles
from probest.estimators.moves import State, move

__all__ = ["Walkers"]

ACCEPTANCE = 0.55
LEAST_TAIL = 1.0


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

    def advance(self, event: EventLike, rng: np.random.Generator, moves: int = 1) -> int:
        """Move the population on the event as it is now; returns the model calls spent."""
        meter = Meter(event, len(self.z) * GRADIENT_CALLS * (moves + 1))
        at = meter.evaluate(self.z, gradient=True)
        assert at.severity_grad is not None
        if self.severity is not None:
            change = log_ndtr(at.severity / self.noise) - log_ndtr(self.severity / self.noise)
            self.log_prob = min(self.log_prob + log_mean_exp(change)[0], 0.0)
        slope = float(np.median(np.linalg.norm(at.severity_grad, axis=1)))
        if slope > 0 or math.isnan(self.noise):
            self.noise = max(slope, 1e-12) / math.sqrt(max(-2.0 * self.log_prob, LEAST_TAIL))
        state = State(
            z=self.z,
            severity=at.severity,
            log_weight=at.log_weight,
            severity_grad=at.severity_grad,
            weight_grad=at.log_weight_grad,
            log_z=np.array([self.log_prob]),
            power=1.0,
            inverse_noise=1.0 / self.noise,
            drift_noise=1.0 / self.noise,
            angle=self.angle,
        )
        for _ in range(moves):
            acceptance = move(state, meter, rng, True)
            state.angle = float(np.clip(state.angle * math.exp(acceptance - ACCEPTANCE), 1e-3, 1.4))
        self.z, self.severity, self.angle = state.z, state.severity, state.angle
        return meter.calls
