r"""Scouts: places where catastrophes may be, for moves to jump to.

A population follows the mode that is easiest to see from where the adversary's draws are. A steeper one beside it is a
ridge that comes up late, and too few particles stand near it by then. So a few scouts start far out, at draws
of the adversary two to five times as wide, and take Newton-like steps to the limit surface (Hasofer & Lind 1974;
Rackwitz & Fiessler 1978: :math:`z \leftarrow (g \cdot z - s)\, g / \lVert g\rVert^2`). Where a few of them agree on few
directions, independent moves propose places along these too. Scouts say where to look, never how likely it is: a move
is accepted by the target alone, so nothing that a scout gets wrong enters the estimate.

The particles of an earlier run, of the same problem or of a slightly changed one, are scouts too
(:func:`scouts_from`).

It fails where no scout finds the way (deep networks: each ends somewhere else; then none is used).
"""

from __future__ import annotations

import numpy as np

from probest.budget import GRADIENT_CALLS, Meter
from probest.evidence import Floats, Particles
from probest.guides.mixture import Mixture, fit_mixture
from probest.guides.subspace import informed_basis
from probest.lines.design_points import linearised
from probest.smc.tuning import TemperingTuning

__all__ = ["scouts_from", "search", "with_scouts"]


def search(meter: Meter, rng: np.random.Generator, tuning: TemperingTuning) -> Floats:
    """Places ``(k, dim)`` on the limit surface, nearest first; none where scouts do not agree on a few."""
    dim = meter.event.dim
    none = np.empty((0, dim))
    if meter.left < 8 * tuning.scouts * (GRADIENT_CALLS * tuning.scout_steps + 1):
        return none
    spreads = np.linspace(tuning.scouts_near, tuning.scouts_far, tuning.scouts)
    z = spreads[:, None] * rng.standard_normal((tuning.scouts, dim))
    for _ in range(tuning.scout_steps):
        at = meter.evaluate(z, gradient=True)
        if at.severity_grad is None:
            return none
        slope = np.linalg.norm(at.severity_grad, axis=1)
        unit, length = linearised(z, at.severity, at.severity_grad)
        good = np.isfinite(unit).all(axis=1) & (np.abs(length) < 40.0)
        z, severity = (length[:, None] * unit)[good], at.severity[good]
        if len(z) < tuning.scouts // 4:
            return none
    after = meter.evaluate(z).severity
    z = z[np.isfinite(after) & (after >= -0.2 * np.abs(severity) - 0.05 * slope[good] * np.linalg.norm(z, axis=1))]
    return _distinct(z, tuning)


def scouts_from(particles: Particles, rng: np.random.Generator, tuning: TemperingTuning) -> Floats:
    """Places ``(k, dim)`` where the particles of an earlier run gather."""
    basis = informed_basis(particles.z, particles.log_weight)
    fit = fit_mixture(particles.z, particles.log_weight, basis, rng, most=tuning.places)
    return np.asarray(fit.means @ basis.T, dtype=np.float64)


def _distinct(z: Floats, tuning: TemperingTuning) -> Floats:
    """One place for each direction, the nearest; none of them where there are too many."""
    z = z[np.argsort(np.linalg.norm(z, axis=1), kind="stable")]
    chosen: list[Floats] = []
    for place in z:
        near = 0.8 * np.linalg.norm(place)
        if all(float(place @ other) < near * np.linalg.norm(other) for other in chosen):
            chosen.append(place)
    return np.array(chosen) if 0 < len(chosen) <= tuning.places else np.empty((0, z.shape[1]))


def with_scouts(law: Mixture, places: Floats | None, tuning: TemperingTuning) -> Mixture:
    """The law with a share of its draws along the ways to these places, in a basis that holds both."""
    if places is None or not len(places):
        return law
    extra = places - (places @ law.basis) @ law.basis.T
    left, size, _ = np.linalg.svd(extra.T, full_matrices=False)
    basis = np.concatenate([law.basis, left[:, size > 1e-6 * max(1.0, float(size[0]))]], axis=1)
    old, rank = law.basis.shape[1], basis.shape[1]
    means = np.concatenate(
        [np.pad(law.means, ((0, 0), (0, rank - old))), *((r * places) @ basis for r in tuning.scouts_reach)]
    )
    factors = np.tile(np.eye(rank), (len(means), 1, 1))
    factors[: len(law.means), :old, :old] = law.factors
    ways = np.full(len(means) - len(law.means), tuning.scouts_share / (len(means) - len(law.means)))
    return Mixture(basis, np.concatenate([(1.0 - tuning.scouts_share) * law.weights, ways]), means, factors)
