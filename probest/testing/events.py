"""Events with a known log P, in a few lines of NumPy each: what every estimator is held against.

Each is an :class:`ExactEvent`: severity and gradient as functions of a batch of z, and the truth as ``log_prob``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import integrate, special, stats

from probest.evidence import Evaluation, Floats

Batch = Callable[[Floats], Floats]


@dataclass(frozen=True)
class ExactEvent:
    """``severity`` maps ``(n, dim)`` to ``(n,)``, ``gradient`` to ``(n, dim)``; both without a loop over rows."""

    name: str
    dim: int
    log_prob: float
    severity: Batch
    gradient: Batch | None = None
    boolean: bool = False
    log_weight: Batch | None = None
    log_weight_gradient: Batch | None = None
    log_evidence: float = 0.0

    @property
    def differentiable(self) -> bool:
        return self.gradient is not None and not self.boolean

    @property
    def weighted(self) -> bool:
        return self.log_weight is not None

    def evaluate(self, z: Floats, *, gradient: bool = False) -> Evaluation:
        severity = np.asarray(self.severity(z), dtype=np.float64)
        log_weight = np.zeros(len(z)) if self.log_weight is None else self.log_weight(z)
        if not gradient:
            return Evaluation(severity, log_weight)
        grad = np.zeros_like(z) if self.gradient is None else self.gradient(z)
        weight_grad = None if self.log_weight_gradient is None else self.log_weight_gradient(z)
        return Evaluation(severity, log_weight, grad, weight_grad)


def numeric_gradient(severity: Batch, step: float = 1e-5) -> Batch:
    """Central differences: for low-dimensional events whose gradient is not worth writing out."""

    def gradient(z: Floats) -> Floats:
        out = np.empty_like(z)
        for j in range(z.shape[1]):
            up, down = z.copy(), z.copy()
            up[:, j] += step
            down[:, j] -= step
            out[:, j] = (severity(up) - severity(down)) / (2.0 * step)
        return out

    return gradient


def half_space(dim: int, beta: float) -> ExactEvent:
    """a·z ≥ β with a = (1, …, 1)/√dim."""
    a = np.full(dim, 1.0 / math.sqrt(dim))
    return ExactEvent(
        f"half_space_d{dim}_b{beta:g}",
        dim,
        float(special.log_ndtr(-beta)),
        lambda z: z @ a - beta,
        lambda z: np.broadcast_to(a, z.shape).copy(),
    )


def union(dim: int, thresholds: tuple[float, ...]) -> ExactEvent:
    """z₁ > t₀ or −z₁ > t₁ or z₂ > t₂ or −z₂ > t₃."""
    t = np.asarray(thresholds)
    safe = [1.0 - special.ndtr(-t[2 * j]) - special.ndtr(-t[2 * j + 1]) for j in range(2)]
    log_prob = math.log(-math.expm1(math.log(safe[0]) + math.log(safe[1])))

    def branches(z: Floats) -> Floats:
        return np.asarray(np.stack([z[:, 0], -z[:, 0], z[:, 1], -z[:, 1]], axis=1) - t, dtype=np.float64)

    def gradient(z: Floats) -> Floats:
        k = np.argmax(branches(z), axis=1)
        out = np.zeros_like(z)
        out[np.arange(len(z)), k // 2] = np.where(k % 2 == 0, 1.0, -1.0)
        return out

    label = "equal" if len(set(thresholds)) == 1 else "unequal"
    return ExactEvent(f"union4_{label}_d{dim}", dim, log_prob, lambda z: branches(z).max(axis=1), gradient)


def half_space_or_sphere(dim: int, log_plane: float, log_shell: float) -> ExactEvent:
    """z₁ ≥ β or ‖z‖ ≥ radius, each of a given log-probability: the sphere is nothing to first order."""
    beta, radius = float(-special.ndtri_exp(log_plane)), float(stats.chi.isf(math.exp(log_shell), dim))

    def severity(z: Floats) -> Floats:
        return np.asarray(np.maximum(z[:, 0] - beta, (z**2).sum(axis=1) / radius - radius))

    def gradient(z: Floats) -> Floats:
        plane = z[:, 0] - beta > (z**2).sum(axis=1) / radius - radius
        return np.where(plane[:, None], np.eye(dim)[0], 2.0 * z / radius)

    def both(t: float) -> float:
        return float(stats.norm.pdf(t) * stats.chi2.sf(radius**2 - t**2, dim - 1))

    twice = integrate.quad(both, beta, radius)[0] + float(stats.norm.sf(radius))
    log_prob = math.log(math.exp(log_plane) + math.exp(log_shell) - twice)
    return ExactEvent(f"half_space_or_sphere_d{dim}", dim, log_prob, severity, gradient)


def sphere(dim: int, radius: float) -> ExactEvent:
    """‖z‖ ≥ radius."""

    def gradient(z: Floats) -> Floats:
        return np.asarray(z / np.linalg.norm(z, axis=1, keepdims=True), dtype=np.float64)

    return ExactEvent(
        f"sphere_d{dim}",
        dim,
        float(stats.chi.logsf(radius, dim)),
        lambda z: np.linalg.norm(z, axis=1) - radius,
        gradient,
    )


def ball(dim: int, radius: float) -> ExactEvent:
    """‖z‖ ≤ radius: rare in many dimensions, and on the inside."""
    return ExactEvent(
        f"ball_d{dim}",
        dim,
        float(stats.chi.logcdf(radius, dim)),
        lambda z: radius - np.linalg.norm(z, axis=1),
        lambda z: -z / np.linalg.norm(z, axis=1, keepdims=True),
    )


def band(dim: int, low: float, high: float) -> ExactEvent:
    """low < z₁ < high: severity rises, then falls again."""

    def gradient(z: Floats) -> Floats:
        out = np.zeros_like(z)
        out[:, 0] = np.where(z[:, 0] - low < high - z[:, 0], 1.0, -1.0)
        return out

    log_prob = math.log(special.ndtr(-low) - special.ndtr(-high))
    return ExactEvent(f"band_d{dim}", dim, log_prob, lambda z: np.minimum(z[:, 0] - low, high - z[:, 0]), gradient)


def corner(dim: int, beta: float, sides: int) -> ExactEvent:
    """min over ``sides`` coordinates of z_i − β: an intersection, kinked at its most likely point."""

    def gradient(z: Floats) -> Floats:
        out = np.zeros_like(z)
        out[np.arange(len(z)), np.argmin(z[:, :sides], axis=1)] = 1.0
        return out

    return ExactEvent(
        f"corner{sides}_d{dim}",
        dim,
        sides * float(special.log_ndtr(-beta)),
        lambda z: z[:, :sides].min(axis=1) - beta,
        gradient,
    )


def parabola(dim: int, beta: float, kappa: float) -> ExactEvent:
    """z₂ ≥ β + κ z₁²: curved away from the origin (κ > 0) or around it (κ < 0)."""

    def gradient(z: Floats) -> Floats:
        out = np.zeros_like(z)
        out[:, 0], out[:, 1] = -2.0 * kappa * z[:, 0], 1.0
        return out

    value = integrate.quad(
        lambda x: math.exp(special.log_ndtr(-beta - kappa * x * x) - 0.5 * x * x + 0.5 * beta * beta),
        -40.0,
        40.0,
        points=[-beta, 0.0, beta],
        limit=500,
    )[0]
    log_prob = math.log(value) - 0.5 * math.log(2.0 * math.pi) - 0.5 * beta * beta
    return ExactEvent(
        f"parabola_d{dim}_k{kappa:g}", dim, log_prob, lambda z: z[:, 1] - beta - kappa * z[:, 0] ** 2, gradient
    )


def islands(dim: int) -> ExactEvent:
    """Two discs of radius 1 at (±3.8, 0): the leaf problem; catastrophes end on every side."""

    def severity(z: Floats) -> Floats:
        return 1.0 - (np.abs(z[:, 0]) - 3.8) ** 2 - z[:, 1] ** 2

    def gradient(z: Floats) -> Floats:
        out = np.zeros_like(z)
        out[:, 0] = -2.0 * (np.abs(z[:, 0]) - 3.8) * np.sign(z[:, 0])
        out[:, 1] = -2.0 * z[:, 1]
        return out

    log_prob = math.log(2.0) + float(stats.ncx2.logcdf(1.0, 2, 3.8**2))
    return ExactEvent(f"islands_d{dim}", dim, log_prob, severity, gradient)


def staircase(dim: int, beta: float) -> ExactEvent:
    """⌊4 z₁⌋/4 ≥ β: discontinuous, with a gradient that is zero everywhere."""
    return ExactEvent(
        f"staircase_d{dim}",
        dim,
        float(special.log_ndtr(-beta)),
        lambda z: np.floor(4.0 * z[:, 0]) / 4.0 - beta,
        lambda z: np.zeros_like(z),
    )


def plateau(dim: int, beta: float, floor: float) -> ExactEvent:
    """max(z₁ − β, −floor): tells nothing further than ``floor`` from the event."""

    def gradient(z: Floats) -> Floats:
        out = np.zeros_like(z)
        out[:, 0] = z[:, 0] - beta > -floor
        return out

    return ExactEvent(
        f"plateau_d{dim}",
        dim,
        float(special.log_ndtr(-beta)),
        lambda z: np.maximum(z[:, 0] - beta, -floor),
        gradient,
    )


def cliff(dim: int, beta: float) -> ExactEvent:
    """z₁ − β with a jump of 10 at the boundary and a gradient that does not see it."""

    def gradient(z: Floats) -> Floats:
        out = np.zeros_like(z)
        out[:, 0] = 1.0
        return out

    return ExactEvent(
        f"cliff_d{dim}",
        dim,
        float(special.log_ndtr(-beta)),
        lambda z: z[:, 0] - beta + np.where(z[:, 0] >= beta, 10.0, 0.0),
        gradient,
    )


def wedge(slope: float) -> ExactEvent:
    """slope · z₁ − |z₂| in the plane: the limit passes through the median, and most lines along it see nothing."""

    def gradient(z: Floats) -> Floats:
        return np.column_stack([np.full(len(z), slope), -np.sign(z[:, 1])])

    log_prob = math.log(math.atan(slope) / math.pi)
    return ExactEvent(f"wedge_{slope:g}", 2, log_prob, lambda z: slope * z[:, 0] - np.abs(z[:, 1]), gradient)


def side_condition(dim: int, beta: float, side: float) -> ExactEvent:
    """min(z₁ − β, z₂ + side): a share of the half-space is no catastrophe."""

    def gradient(z: Floats) -> Floats:
        out = np.zeros_like(z)
        first = z[:, 0] - beta < z[:, 1] + side
        out[:, 0], out[:, 1] = first, ~first
        return out

    return ExactEvent(
        f"side_d{dim}",
        dim,
        float(special.log_ndtr(-beta) + special.log_ndtr(side)),
        lambda z: np.minimum(z[:, 0] - beta, z[:, 1] + side),
        gradient,
    )


def gate(dim: int, opens: float, inside: float, outside: float) -> ExactEvent:
    """z₁ − limit, where the limit is lower once z₂ is beyond ``opens``: a step that no gradient shows."""

    def gradient(z: Floats) -> Floats:
        out = np.zeros_like(z)
        out[:, 0] = 1.0
        return out

    through = stats.norm.sf(opens) * stats.norm.sf(inside) + stats.norm.cdf(opens) * stats.norm.sf(outside)
    return ExactEvent(
        f"gate_d{dim}",
        dim,
        math.log(through),
        lambda z: z[:, 0] - np.where(z[:, 1] > opens, inside, outside),
        gradient,
    )


def cauchy(limit: float) -> ExactEvent:
    """A Cauchy variable against a limit: the severity grows like exp(z²/2)."""

    def value(z: Floats) -> Floats:
        tail = np.maximum(stats.norm.sf(np.abs(z[:, 0])), 1e-300)
        return np.asarray(np.sign(z[:, 0]) / np.tan(math.pi * tail))

    def gradient(z: Floats) -> Floats:
        density = math.pi * stats.norm.pdf(z[:, 0])
        with np.errstate(over="ignore", invalid="ignore"):
            return np.asarray(np.nan_to_num(density * (1.0 + value(z) ** 2)))[:, None]

    return ExactEvent(
        f"cauchy_{limit:g}", 1, math.log(math.atan(1.0 / limit) / math.pi), lambda z: value(z) - limit, gradient
    )


def gradient_free(event: ExactEvent) -> ExactEvent:
    """The same event without its gradient."""
    return ExactEvent(f"{event.name}_nograd", event.dim, event.log_prob, event.severity)


def boolean(event: ExactEvent) -> ExactEvent:
    """The same event through a checker that says only yes or no."""
    return ExactEvent(
        f"{event.name}_bool",
        event.dim,
        event.log_prob,
        lambda z: np.where(event.severity(z) >= 0.0, 1.0, -1.0),
        boolean=True,
    )


def conditioned(dim: int, beta: float, observed: float, noise: float) -> ExactEvent:
    """z₁ ≥ β given that z₁ + z₂ was observed, with Gaussian noise, to be ``observed``: P in closed form."""
    variance = 2.0 + noise**2
    log_evidence = float(stats.norm.logpdf(observed, 0.0, math.sqrt(variance)))
    mean, sd = observed / variance, math.sqrt(1.0 - 1.0 / variance)

    def gradient(z: Floats) -> Floats:
        out = np.zeros_like(z)
        out[:, 0] = 1.0
        return out

    def weight_gradient(z: Floats) -> Floats:
        out = np.zeros_like(z)
        out[:, :2] = ((observed - z[:, 0] - z[:, 1]) / noise**2)[:, None]
        return out

    return ExactEvent(
        f"conditioned_d{dim}",
        dim,
        float(special.log_ndtr((mean - beta) / sd)),
        lambda z: z[:, 0] - beta,
        gradient,
        log_weight=lambda z: stats.norm.logpdf(observed, z[:, 0] + z[:, 1], noise),
        log_weight_gradient=weight_gradient,
        log_evidence=log_evidence,
    )


def impossible(dim: int) -> ExactEvent:
    """Severity −1 − z₁²: there is no catastrophe at all."""

    def gradient(z: Floats) -> Floats:
        out = np.zeros_like(z)
        out[:, 0] = -2.0 * z[:, 0]
        return out

    return ExactEvent(f"impossible_d{dim}", dim, -math.inf, lambda z: -1.0 - z[:, 0] ** 2, gradient)


def constant(dim: int) -> ExactEvent:
    """Severity −1 everywhere."""
    return ExactEvent(f"constant_d{dim}", dim, -math.inf, lambda z: np.full(len(z), -1.0), np.zeros_like)


HIDDEN_EVENTS: tuple[ExactEvent, ...] = (
    wedge(0.1),
    side_condition(2, 4.5, 1.3),
    side_condition(30, 4.5, 0.5),
    gate(3, 2.0, 0.5, 6.5),
    gate(15, 2.0, 0.5, 6.5),
    cauchy(1e4),
    cauchy(1e7),
)
"""Events of which a few lines that agree see only a part, or which gradients overshoot."""

EXACT_EVENTS: tuple[ExactEvent, ...] = (
    half_space(2, 0.0),
    half_space(2, 3.0),
    half_space(100, 5.0),
    half_space(1000, 5.0),
    half_space(1000, 8.0),
    half_space(100, 11.4),
    union(50, (5.0, 5.0, 5.0, 5.0)),
    union(50, (5.0, 5.5, 4.8, 5.2)),
    sphere(100, 14.467812505937182),
    ball(20, 1.2),
    band(10, 4.0, 4.5),
    corner(20, 3.0, 3),
    parabola(2, 5.0, 0.5),
    parabola(10, 5.0, -0.08),
    islands(2),
    islands(20),
    staircase(10, 4.0),
    plateau(10, 4.0, 2.0),
    cliff(10, 4.0),
    gradient_free(half_space(100, 4.0)),
    gradient_free(union(20, (4.0, 4.0, 4.0, 4.0))),
    boolean(half_space(2, 3.0)),
    boolean(half_space(50, 2.5)),
    conditioned(20, 4.0, 1.0, 0.3),
)
