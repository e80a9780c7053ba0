r"""Particles kept warm: a population that follows the catastrophes while the model changes.

*Idea.* Training moves the event a little at each step, so particles need not be found anew: they are a Markov chain on
:math:`\pi_\sigma \propto \varphi(z)\, w(z)\, \Phi(s(z)/\sigma)`, moved by the same kernel as tempering. The noise σ is
steered so that about half of the particles are catastrophes: when training pushes the event away, σ grows and lets
the particles spread to wherever the model is worst now; when they are all inside, it shrinks.

*When it fails.* A chain cannot know of a mode that it never visited. Training therefore re-seeds the population from
a fresh tempering run now and then (:meth:`Walkers.reseed`), and what is reported is never taken from warm particles.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from probest.diagnostics import systematic_resample
from probest.estimators.base import EventLike, Floats, Meter, Particles
from probest.estimators.tempering import State
from probest.estimators.tempering import _move as move

__all__ = ["Walkers"]

INSIDE = 0.5
GAIN = 0.3
ACCEPTANCE = 0.55
LEAST_NOISE, MOST_NOISE = 1e-3, 1e3


@dataclass
class Walkers:
    """``z``: ``(n, dim)`` particles near the event; ``noise``: σ in units of severity; ``log_prob``: log P when seeded."""

    z: Floats
    noise: float
    log_prob: float
    angle: float = 0.3
    scale: float = 1.0

    @classmethod
    def seeded(cls, particles: Particles, log_prob: float, count: int, rng: np.random.Generator) -> Walkers:
        """A population from posterior particles; σ starts at their median severity."""
        z = particles.z[systematic_resample(particles.log_weight, count, rng)]
        scale = max(float(np.median(particles.severity)), 1e-6)
        return cls(z.copy(), scale, log_prob, scale=scale)

    def reseed(self, particles: Particles, log_prob: float, rng: np.random.Generator) -> None:
        """Replace the whole population by posterior particles of the present event."""
        fresh = Walkers.seeded(particles, log_prob, len(self.z), rng)
        self.z, self.noise, self.log_prob, self.scale = fresh.z, fresh.noise, log_prob, fresh.scale

    def advance(self, event: EventLike, rng: np.random.Generator, moves: int = 1) -> int:
        """Move the population on the event as it is now; returns the model calls spent."""
        calls = len(self.z) * 3 * (moves + 1)
        meter = Meter(event, calls)
        at = meter.evaluate(self.z, gradient=True)
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
        self.z, self.angle = state.z, state.angle
        inside = float(np.mean(state.severity >= 0))
        noise = self.noise * math.exp(GAIN * (INSIDE - inside))
        self.noise = float(np.clip(noise, LEAST_NOISE * self.scale, MOST_NOISE * self.scale))
        return meter.calls
