r"""Moves that a student proposes: many steps on what it knows, then one answer of the model.

A chain of steps that are reversible for :math:`\varphi\,\hat g`, with ĝ the softening of the student's severity, takes
z to z'. That is accepted with probability

.. math:: \min\left(1, \frac{g(s(z'))\; \hat g(\hat s(z))}{g(s(z))\; \hat g(\hat s(z'))}\right),

so that the population is the one that it would be without (the surrogate transition method). One call moves a particle
as far as the student is right. Directions that the student does not see are drawn anew. Each of the steps is a Langevin
step, a random walk or a redrawing of some coordinates, by a coin that is the same whichever way the chain is read.

Where the student is wrong, proposals are refused: particles there move by local steps alone.

Reference: Liu (2001), Monte Carlo strategies in scientific computing, § 9.4.3; Christen & Fox (2005), Markov chain
Monte Carlo using an approximation (delayed acceptance).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from probest.budget import Meter
from probest.evidence import Evaluation, Floats
from probest.smc.moves import Correction, adapted, climb, ensure_gradient, metropolis, refresh, walk
from probest.smc.population import State
from probest.smc.softening import EVENT, Noise
from probest.surrogates.student import Sketch

__all__ = ["sketched_sweep"]

_FREE = 10**12


def sketched_sweep(
    state: State, meter: Meter, rng: np.random.Generator, sketch: Sketch, at: NDArray[np.intp], steps: int
) -> float:
    """A move of the particles ``at``, 1 call each; returns the mean acceptance. steps: on what the student knows."""
    soft = Noise(1.0 / sketch.noise) if state.soft is EVENT else state.soft
    angle, accepted = state.sketch_angle, [0.0, 0]

    def propose(rows: NDArray[np.intp]) -> tuple[Floats, Correction]:
        free = Meter(sketch, _FREE)
        u = sketch.known.inside(state.z[rows])
        severity = sketch.evaluate(u).severity
        before = soft.log(severity)
        inner = State(u, severity, np.zeros(len(u)), None, None, state.log_z, soft=soft, drift=soft)
        for kind in rng.integers(4, size=steps):
            if kind == 0:
                inner.portion, inner.refresh_angle = float(rng.random()), 0.5 * math.pi
                refresh(inner, free, rng)
            elif kind == 1 or not ensure_gradient(inner, free, True):
                walk(inner, free, rng, 0.5 * angle)
            else:
                accepted[0] += climb(inner, free, rng, angle)
                accepted[1] += 1
        correction = before - soft.log(inner.severity)

        def corrected(_: Evaluation) -> Floats:
            return correction

        return sketch.known.whole(inner.z, rng), corrected

    acceptance = metropolis(state, meter, rng, at, propose)
    if accepted[1]:
        state.sketch_angle = adapted(angle, accepted[0] / accepted[1], state.tuning.accept_climb)
    return acceptance
