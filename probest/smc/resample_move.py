"""More particles from few, by moves that leave the law of catastrophes as it is.

Line sampling settles a smooth problem with two dozen lines, and leaves as many particles: enough for log P, too few
for averages over catastrophes such as a gradient. Resampled and moved (:mod:`probest.smc.moves`) they spread
over the modes; each particle's law stays that of a catastrophe, so nothing can become wrong that was right before. The
shares of distant modes stay about as the weights had them.

Reference: Gilks & Berzuini (2001), Following a moving target: resample-move.
"""

from __future__ import annotations

import math

import numpy as np

from probest import diagnostics
from probest.budget import GRADIENT_CALLS, Meter
from probest.evidence import Floats, Particles
from probest.seeds import generator
from probest.smc.moves import adapted, fit_moves, guided_sweep, probe, refresh, walk
from probest.smc.population import State
from probest.smc.softening import EVENT

__all__ = ["cost", "thicken"]

_PROBES = 64  # gradients a sweep, for the directions of moves
_LEAST = 4  # particles, below which there is nothing to start from


def thicken(meter: Meter, particles: Particles, n: int, *, seed: np.random.SeedSequence, sweeps: int = 5) -> Particles:
    """``n`` equally weighted particles, or the given ones where these are worth as many.

    sweeps: rounds of moves; :func:`cost` says what they take. The adversary must not be conditioned.
    """
    event = meter.event
    if event.weighted or diagnostics.effective_sample_size(particles.log_weight) >= n or len(particles.z) < _LEAST:
        return particles
    rng = generator(seed)
    at = diagnostics.systematic_resample(particles.log_weight, n, rng)
    state = _state(particles.z[at], particles.severity[at])
    for _ in range(sweeps):
        refresh(state, meter, rng)
        accepted = walk(state, meter, rng, state.angle)
        state.angle = adapted(state.angle, accepted, 0.35, gain=2.0, least=1e-3)
        probe(state, meter, event.differentiable, _PROBES)
        guided_sweep(state, meter, rng, fit_moves(state, rng), np.arange(n))
    return Particles(state.z, np.full(n, -math.log(n)), state.severity)


def cost(n: int, sweeps: int) -> int:
    """Model calls that ``n`` particles take at most."""
    return sweeps * (3 * n + GRADIENT_CALLS * min(n, _PROBES))


def _state(z: Floats, severity: Floats) -> State:
    """The particles as a population in the event."""
    return State(z, severity, np.zeros(len(z)), None, None, np.zeros(1), power=1.0, soft=EVENT, drift=EVENT, angle=0.5)
