r"""The surface of an event, sampled: what makes log P differentiable although the event is hard.

*Idea.* Moving a parameter moves the boundary of the event, and P changes by the probability that the boundary
sweeps over. For severity :math:`s_\theta` and z standard normal,

.. math::  \partial_\theta P = \int_{s = 0} \varphi(z)\, \frac{\partial_\theta s}{|\nabla s|}\, dS .

The integral is taken along lines (line sampling, made differentiable; no smoothing). Along a unit direction a, a
particle splits into :math:`z = z_\perp + r a`; the line meets the event in intervals whose ends are roots r* of
the severity, and an end contributes :math:`\varphi(r^*)\,\partial_\theta s / |a \cdot \nabla s|`. Particles are
distributed as :math:`\varphi(z_\perp)\, q(z_\perp) / P` with q the probability of the event on the line, so dividing
by q gives the relative change :math:`\partial_\theta \log P`.

*Several modes.* Directions are unit gradients of a few particles, and rays from the origin. Each surface point belongs
to direction k with weight :math:`h_k \propto |n \cdot a_k|^{12}` (n its unit normal): the weights sum to 1, and lines
that graze the surface count for nothing. A particle follows one direction, drawn from the same weights at the particle
or, as often, from their mean over all particles: at a corner every particle lies on lines through several faces, of
which its own gradient knows one, and what is drawn with probability 0 is missing (half of the gradient was, once).

*Antithetic lines.* The line through :math:`-z_\perp` has the same prior density. Averaging over the pair is exact
and removes what is odd in :math:`z_\perp`.

*When it fails.* Roots are bracketed on a grid: an event that is a thin island along a line can be missed. A severity
without gradient in z has no surface here.

References: Koutsourelakis, Pradlwarter & Schuëller (2004), Reliability of structures in high dimensions, part I;
Bourinet & Lemaire (2008), reliability sensitivities by line integration; Owen (2013), ch. 8 (antithetics).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import scipy
from scipy.special import logsumexp

from probest.diagnostics import systematic_resample
from probest.evidence import Floats, Particles
from probest.lines.along import Chi, Normal, between, log_mass
from probest.lines.roots import between_roots, summed
from probest.programs.event import Event
from probest.tuning import tuned

__all__ = ["Surface", "sample_surface"]


@dataclass(frozen=True)
class SurfaceTuning:
    """How the surface of an event is sampled. Set by hand on closed forms (``tests/test_gradient.py``)."""

    directions: int = tuned(32, "unit gradients that lines may follow", "acceptance.py (gradients)")
    grid: int = tuned(17, "points of a line between which roots are bracketed", "acceptance.py (gradients)")
    margin: float = tuned(
        2.5, "standard deviations beyond a particle that its line is followed", "acceptance.py (gradients)"
    )
    nodes: int = tuned(8, "quadrature nodes of an interval, where draws are weighted", "acceptance.py (gradients)")
    sharpness: int = tuned(12, "power of the cosine in the partition of unity", "acceptance.py (gradients)")
    elsewhere: float = tuned(0.5, "of directions drawn as for all particles", "tests/test_gradient.py (corners)")
    ray_share: float = tuned(
        0.05, "of rays in it: they serve shells; straight lines have antithetic partners", "acceptance.py (gradients)"
    )


TUNING = SurfaceTuning()


class Surface(NamedTuple):
    """Weighted points of the boundary: ``∂ log P = Σ coefficient · ∂ severity(z)``.

    z: ``(n, dim)`` with severity ``severity`` (zero up to the root tolerance). held: values ``(n, ...)`` of discrete
    sites, which stay as they are. coefficient: ``(n,)``, positive, in nats per unit of severity.
    radius: ``(n,)`` signed distance r* along the line, positive on the side where the event is the tail beyond it.
    slope: ``(n,)`` derivative of the severity along the line, positive. gaussian: ``(n,)`` whether the tail beyond
    radius is a Gaussian tail whose exact log-probability should be used for finite changes.
    log_weight: ``(n,)`` at the point. relative_error: standard error of the total boundary flux, relative to it.
    """

    z: Floats
    held: dict[str, np.ndarray]
    severity: Floats
    coefficient: Floats
    radius: Floats
    slope: Floats
    gaussian: np.ndarray
    relative_error: float


class _Lines(NamedTuple):
    """Straight lines ``offset + r * direction`` (r standard normal), or rays from 0 (r chi-distributed)."""

    offset: Floats
    direction: Floats
    ray: np.ndarray
    reach: Floats
    held: dict[str, np.ndarray]

    def at(self, index: np.ndarray, r: Floats) -> Floats:
        points: Floats = self.offset[index] + r[:, None] * self.direction[index]
        return points


def sample_surface(event: Event, particles: Particles, *, lines: int, seed: np.random.SeedSequence) -> Surface:
    """Surface points from ``lines`` lines through posterior particles.

    Costs about 25 model calls a line. Raises ValueError if no line crosses the boundary.
    """
    rng = np.random.Generator(np.random.Philox(seed))
    n = max(lines // 2, 1)
    guiding, z = _split(particles, n, rng)
    held, normal = _normals(event, z)
    directions = _normals(event, guiding)[1]
    share = _share(normal, z, directions)
    share = (1.0 - TUNING.elsewhere) * share + TUNING.elsewhere * share.mean(axis=0)
    choice = np.array([rng.choice(len(row), p=row) for row in share])
    probability = share[np.arange(n), choice]
    ray = choice == len(directions)

    direction = np.where(ray[:, None], _unit(z), directions[np.where(ray, 0, choice)])
    along = np.sum(z * direction, axis=1)
    offset = np.where(ray[:, None], 0.0, z - along[:, None] * direction)
    straight = np.flatnonzero(~ray)
    pair = np.concatenate([np.arange(n), straight])
    both = _Lines(
        offset=np.concatenate([offset, -offset[straight]]),
        direction=direction[pair],
        ray=ray[pair],
        reach=np.where(ray, along + TUNING.margin, np.abs(along) + TUNING.margin)[pair],
        held={name: value[pair] for name, value in held.items()},
    )
    line, root, inside = _roots(event, both, along[pair])
    return _assemble(event, both, pair, line, root, inside, directions, choice, probability)


def _assemble(
    event: Event,
    lines: _Lines,
    pair: np.ndarray,
    line: np.ndarray,
    root: Floats,
    inside: np.ndarray,
    directions: Floats,
    choice: np.ndarray,
    probability: Floats,
) -> Surface:
    """Coefficients from roots. ``pair[line]`` is the particle; both lines of a particle share one total q."""
    if not len(line):
        raise ValueError(
            "no line through the catastrophes crosses the boundary of the event, so log P has no gradient that can be "
            "estimated here: the severity may be constant, or the event nearly everything"
        )
    n, dim = len(choice), lines.offset.shape[1]
    z = lines.at(line, root)
    held = {name: value[line] for name, value in lines.held.items()}
    at = event.evaluate(z, gradient=True, held=held)
    grad = _continuous(event, at.severity_grad)
    normal = _unit(grad)
    slope_signed = np.sum(grad * lines.direction[line], axis=1)
    slope = np.maximum(np.abs(slope_signed), np.finfo(float).tiny)

    log_q = _log_line_probability(event, lines, line, root, inside, pair, n)
    log_density = np.where(
        lines.ray[line], scipy.stats.chi.logpdf(np.maximum(root, 1e-300), dim), scipy.stats.norm.logpdf(root)
    )
    particle = pair[line]
    own = _share(normal, z, directions)[np.arange(len(line)), choice[particle]]
    flux = np.exp(log_density + at.log_weight - log_q[particle]) * own / (probability[particle] * n)
    total = np.bincount(particle, weights=flux, minlength=n)
    spread = np.std(total) * np.sqrt(n) / max(np.sum(total), np.finfo(float).tiny)
    rising = slope_signed > 0
    keep = flux > 0
    return Surface(
        z=z[keep],
        held={name: value[keep] for name, value in held.items()},
        severity=at.severity[keep],
        coefficient=(flux / slope)[keep],
        radius=np.where(rising, root, -root)[keep],
        slope=slope[keep],
        gaussian=(~lines.ray[line])[keep],
        relative_error=float(spread),
    )


def _roots(event: Event, lines: _Lines, known: Floats) -> tuple[np.ndarray, Floats, np.ndarray]:
    """All sign changes of the severity on a grid along each line, refined.

    Returns the line of each root, the root, and for every grid cell of every line whether its left end is inside.
    """
    count = len(lines.reach)
    low = np.where(lines.ray, 1e-6, -lines.reach)
    grid = low[:, None] + (lines.reach - low)[:, None] * np.linspace(0, 1, TUNING.grid - 1)
    grid = np.sort(np.concatenate([grid, np.clip(known, low, lines.reach)[:, None]], axis=1), axis=1)
    index = np.repeat(np.arange(count), TUNING.grid)
    severity = event.evaluate(lines.at(index, grid.ravel()), held=_take(lines.held, index)).severity
    inside = (severity >= 0).reshape(count, TUNING.grid)
    line, cell = np.nonzero(inside[:, 1:] != inside[:, :-1])
    left, right = grid[line, cell], grid[line, cell + 1]

    def signed(r: Floats, at: np.ndarray) -> Floats:
        values: Floats = event.evaluate(lines.at(at, r), held=_take(lines.held, at)).severity
        return values

    from scipy.optimize import elementwise

    if not len(line):
        return line, left, inside[:, 0]
    found = elementwise.find_root(
        signed, (left, right), args=(line,), tolerances={"xatol": 1e-6, "xrtol": 1e-7, "fatol": 0.0}, maxiter=60
    )
    return line, np.asarray(found.x, dtype=np.float64), inside[:, 0]


def _log_line_probability(
    event: Event, lines: _Lines, line: np.ndarray, root: Floats, inside: np.ndarray, pair: np.ndarray, n: int
) -> Floats:
    """``(n,)`` log of the event's (weighted) probability on the lines of each particle, summed over its lines."""
    dim = lines.offset.shape[1]
    who, a, b = between_roots(inside, line, root, np.where(lines.ray, 0.0, -np.inf))
    straight = ~lines.ray[who]
    mass = np.where(straight, log_mass(Normal(), a, b), log_mass(Chi(dim), np.maximum(a, 0.0), b))
    if event.weighted or lines.held:
        nodes, weights = np.polynomial.legendre.leggauss(TUNING.nodes)
        t = 0.5 * (nodes + 1)
        r = np.where(
            straight[:, None],
            between(Normal(), a[:, None], b[:, None], t),
            between(Chi(dim), np.maximum(a, 0.0)[:, None], b[:, None], t),
        )
        index = np.repeat(who, TUNING.nodes)
        log_weight = event.evaluate(lines.at(index, r.ravel()), held=_take(lines.held, index)).log_weight
        mass = mass + logsumexp(log_weight.reshape(-1, TUNING.nodes) + np.log(weights / 2), axis=1)
    return summed(mass, pair[who], n)


def _share(normal: Floats, z: Floats, directions: Floats) -> Floats:
    """``(n, k + 1)`` partition of unity over the directions, the ray last."""
    cosines = np.concatenate([normal @ directions.T, np.sum(normal * _unit(z), axis=1, keepdims=True)], axis=1)
    powers = np.abs(cosines) ** TUNING.sharpness + 1e-12
    powers[:, -1] *= TUNING.ray_share
    result: Floats = powers / powers.sum(axis=1, keepdims=True)
    return result


def _split(particles: Particles, n: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Particles that give the directions, and ``n`` that give the lines.

    A line must not choose its own direction, nor may a relative of its particle; relatives of tempering lie in the
    same island, and islands lie one after the other. So the first rows guide and the others are followed.
    """
    count = len(particles.z)
    first = min(max(count // 4, 1), count - 1) if count > 1 else 0
    rows = np.arange(count)
    followed = rows[first:]
    guides = rows[:first] if first and logsumexp(particles.log_weight[:first]) > -np.inf else rows
    if logsumexp(particles.log_weight[followed]) == -np.inf:
        followed = rows
    chosen = guides[systematic_resample(particles.log_weight[guides], min(TUNING.directions, len(guides)), rng)]
    return particles.z[chosen], particles.z[followed[systematic_resample(particles.log_weight[followed], n, rng)]]


def _normals(event: Event, z: Floats) -> tuple[dict[str, np.ndarray], Floats]:
    """Values of the discrete sites at z, and the unit gradient of the severity with these held."""
    held = event.site_values(z, event.discrete_sites) if event.discrete_sites else {}
    return held, _unit(_continuous(event, event.evaluate(z, gradient=True, held=held).severity_grad))


def _continuous(event: Event, grad: Floats | None) -> Floats:
    """The gradient along coordinates that move the severity continuously."""
    assert grad is not None
    result: Floats = np.where(event.discrete_coordinates, 0.0, np.nan_to_num(grad))
    return result


def _unit(vectors: Floats) -> Floats:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    result: Floats = vectors / np.where(norms > 0, norms, 1.0)
    return result


def _take(held: dict[str, np.ndarray], index: np.ndarray) -> dict[str, np.ndarray]:
    return {name: value[index] for name, value in held.items()}
