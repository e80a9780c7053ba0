"""Variational bounds of softened events, and their gradients in the guide and in the model."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import integrate, special, stats

from probest.budget import Meter
from probest.evidence import Particles
from probest.guides.variational import Adam, BoundGradient, GaussianGuide, bound_gradient, informed, upper_gradient
from probest.smc.softening import ADVERSARY, Noise
from probest.testing.events import ExactEvent, half_space, parabola

DIM, BETA, WIDTH = 5, 4.0, 0.7
SIGMAS = 4.5  # of a mean: wrong once in 150,000


def guide_of(rng: np.random.Generator, rank: int = 3) -> GaussianGuide:
    basis = np.linalg.qr(rng.standard_normal((DIM, rank)))[0]
    factor = np.tril(0.3 * rng.standard_normal((rank, rank)), -1) + np.diag(rng.uniform(0.5, 1.2, rank))
    return GaussianGuide(0.5 * rng.standard_normal(DIM), basis, factor)


def meter(event: ExactEvent) -> Meter:
    return Meter(event, 10**9)


def nudged(guide: GaussianGuide, name: str, at: tuple[int, ...], by: float) -> GaussianGuide:
    value = getattr(guide, name).copy()
    value[at] += by
    return replace(guide, **{name: value})


ENTRIES = [("mean", (1,)), ("mean", (4,)), ("factor", (0, 0)), ("factor", (2, 1)), ("factor", (1, 1))]


def test_a_guide_is_a_normal_law() -> None:
    rng = np.random.default_rng(0)
    guide = guide_of(rng)
    noise = rng.standard_normal((50, DIM))
    z = guide.at(noise)
    np.testing.assert_allclose(guide.noise(z), noise, atol=1e-10)
    stretch = np.eye(DIM) + guide.basis @ (guide.factor - np.eye(3)) @ guide.basis.T
    law = stats.multivariate_normal(guide.mean, stretch @ stretch.T)
    np.testing.assert_allclose(guide.log_ratio(z), stats.norm.logpdf(z).sum(axis=1) - law.logpdf(z), atol=1e-9)
    np.testing.assert_allclose(guide.slope(noise), -(z - guide.mean) @ np.linalg.inv(stretch @ stretch.T), atol=1e-9)
    turned = guide.turned(np.linalg.qr(np.column_stack([guide.basis, rng.standard_normal(DIM)]))[0])
    np.testing.assert_allclose(turned.log_ratio(z), guide.log_ratio(z), atol=1e-9)
    assert (guide.defended().log_ratio(10.0 * z) <= math.log(10.0) + 1e-9).all()


@pytest.mark.parametrize(("alpha", "draws"), [(1.0, 1), (1.0, 8), (0.0, 8), (0.5, 4), (-1.0, 8)])
def test_the_total_gradient_is_that_of_central_differences(alpha: float, draws: int) -> None:
    event, soft = parabola(DIM, BETA, 0.2), Noise(1.0 / WIDTH)
    rng = np.random.default_rng(1)
    guide, noise = guide_of(rng), rng.standard_normal((16, DIM))

    def bound(one: GaussianGuide) -> BoundGradient:
        return bound_gradient(meter(event), one, noise, soft, draws=draws, alpha=alpha, kind="total")

    found = bound(guide).guide
    for name, at in ENTRIES:
        ends = [bound(nudged(guide, name, at, by)).value for by in (-1e-4, 1e-4)]
        slope = (ends[1] - ends[0]) / 2e-4
        assert getattr(found, name)[at] == pytest.approx(slope, rel=1e-3, abs=1e-3)


def test_sticking_is_the_path_with_the_density_held() -> None:
    event, soft = parabola(DIM, BETA, 0.2), Noise(1.0 / WIDTH)
    rng = np.random.default_rng(2)
    guide, noise = guide_of(rng), rng.standard_normal((16, DIM))
    found = bound_gradient(meter(event), guide, noise, soft, draws=1, alpha=1.0, kind="sticking").guide

    def held(one: GaussianGuide) -> float:
        z = one.at(noise)
        return float(np.mean(guide.log_ratio(z) + soft.log(event.evaluate(z).severity)))

    for name, at in ENTRIES:
        slope = (held(nudged(guide, name, at, 1e-4)) - held(nudged(guide, name, at, -1e-4))) / 2e-4
        assert getattr(found, name)[at] == pytest.approx(slope, rel=1e-3, abs=1e-3)


def test_sticking_lands() -> None:
    """Where the guide is the posterior, no draw has any gradient."""
    guide = GaussianGuide.standard(np.zeros(DIM), np.eye(DIM)[:, :2])
    noise = np.random.default_rng(3).standard_normal((8, DIM))
    size = {
        kind: np.abs(
            bound_gradient(
                meter(half_space(DIM, BETA)), guide, noise, ADVERSARY, draws=1, alpha=1.0, kind=kind
            ).guide.mean  # type: ignore[arg-type]
        ).max()
        for kind in ("total", "sticking", "doubly")
    }
    assert size["sticking"] == size["doubly"] == 0.0
    assert size["total"] > 0.1


@pytest.mark.parametrize(("alpha", "draws"), [(1.0, 1), (0.0, 8), (0.5, 4), (-1.0, 4)])
def test_estimators_agree_on_average(alpha: float, draws: int) -> None:
    event, soft = half_space(DIM, 2.0), Noise(1.0 / WIDTH)
    rng = np.random.default_rng(4)
    guide = GaussianGuide(np.r_[1.8, 0.2, 0.0, 0.0, 0.1], np.eye(DIM)[:, :2], np.array([[0.8, 0.0], [0.1, 0.9]]))
    kinds: Any = ("total", "doubly", "sticking") if draws == 1 else ("total", "doubly")
    means: dict[str, list[np.ndarray]] = {kind: [] for kind in kinds}
    for _ in range(40):
        noise = rng.standard_normal((draws * 400, DIM))
        for kind in kinds:
            found = bound_gradient(meter(event), guide, noise, soft, draws=draws, alpha=alpha, kind=kind).guide
            means[kind].append(np.r_[found.mean, found.factor[np.tril_indices(2)]])
    total = np.array(means["total"])
    for kind in kinds[1:]:
        difference = np.array(means[kind]) - total
        error = difference.std(axis=0, ddof=1) / math.sqrt(len(difference))
        assert (np.abs(difference.mean(axis=0)) < SIGMAS * error + 1e-9).all()
        assert np.array(means[kind]).std(axis=0).sum() < total.std(axis=0).sum()


def test_the_evidence_lower_bound_of_a_half_space_and_its_gradient() -> None:
    """Along the normal one quadrature gives bound and gradient; all else is a divergence between normals."""
    axis = half_space(DIM, BETA).evaluate(np.zeros((1, DIM)), gradient=True).severity_grad
    assert axis is not None
    normal = axis[0]
    basis = np.column_stack([normal, np.linalg.svd(normal[None])[2][1]])

    def exact(mean: float, spread: float) -> float:
        def inside(u: float) -> float:
            return float(stats.norm.pdf(u) * special.log_ndtr((mean + spread * u - BETA) / WIDTH))

        divergence = 0.5 * (mean**2 + spread**2 - 1.0) - math.log(spread)
        return float(integrate.quad(inside, -12.0, 12.0)[0]) - divergence

    mean, spread = 2.0, 0.7
    guide = GaussianGuide(mean * normal, basis, np.diag([spread, 1.0]))
    noise = np.random.default_rng(5).standard_normal((1_000_000, DIM))
    soft = Noise(1.0 / WIDTH)
    for kind in ("total", "sticking", "doubly"):
        found = bound_gradient(meter(half_space(DIM, BETA)), guide, noise, soft, draws=1, alpha=1.0, kind=kind)
        assert found.value == pytest.approx(exact(mean, spread), abs=SIGMAS * found.error)
        by_mean = (exact(mean + 1e-4, spread) - exact(mean - 1e-4, spread)) / 2e-4
        by_spread = (exact(mean, spread + 1e-4) - exact(mean, spread - 1e-4)) / 2e-4
        assert float(found.guide.mean @ normal) == pytest.approx(by_mean, rel=0.02)
        assert found.guide.factor[0, 0] == pytest.approx(by_spread, rel=0.02)


def climbed(event: ExactEvent, steps: int, draws: int, alpha: float) -> tuple[GaussianGuide, BoundGradient]:
    rng, soft = np.random.default_rng(6), Noise(1.0 / WIDTH)
    slope = event.evaluate(rng.standard_normal((20, DIM)), gradient=True).severity_grad
    assert slope is not None
    guide = GaussianGuide.standard(np.zeros(DIM), informed(slope, 3))
    adam = Adam.of(guide)
    for i in range(steps):
        found = bound_gradient(meter(event), guide, rng.standard_normal((64, DIM)), soft, draws=draws, alpha=alpha)
        guide = adam.step(guide, found.guide, share=1.0 - i / steps)
    noise = rng.standard_normal((200_000 - 200_000 % draws, DIM))
    return guide, bound_gradient(meter(event), guide, noise, soft, draws=draws, alpha=alpha)


@pytest.mark.parametrize(("draws", "alpha", "gap"), [(1, 1.0, 0.05), (16, 0.0, 0.01)])
def test_ascent_closes_the_gap(draws: int, alpha: float, gap: float) -> None:
    """The softened half-space has log Φ(−β/√(1 + σ²)), and this slope in β."""
    _, found = climbed(half_space(DIM, BETA), 200, draws, alpha)
    distance, scale = BETA / math.hypot(1.0, WIDTH), math.hypot(1.0, WIDTH)
    exact = float(special.log_ndtr(-distance))
    assert found.value == pytest.approx(exact, abs=gap)
    assert found.value < exact + SIGMAS * found.error
    slope = -np.exp(stats.norm.logpdf(distance) - special.log_ndtr(-distance)) / scale
    by_limit = -float(found.weight @ Noise(1.0 / WIDTH).slope(found.severity))
    if alpha == 0.0:  # of one draw a group, the bound's own slope is another than that of log P
        assert by_limit == pytest.approx(slope, rel=0.02)


def test_the_upper_bound_of_particles_and_its_gradient() -> None:
    rng = np.random.default_rng(7)
    z = rng.standard_normal((400, DIM)) + np.r_[3.0, np.zeros(DIM - 1)]
    log_w = rng.standard_normal(400)
    particles, log_g = Particles(z, log_w, np.zeros(400)), rng.standard_normal(400)
    guide = guide_of(rng)
    value, found = upper_gradient(guide, particles, log_g)
    weight = special.softmax(log_w)
    assert value == pytest.approx(float(weight @ (guide.log_ratio(z) + log_g)))
    for name, at in ENTRIES:
        ends = [upper_gradient(nudged(guide, name, at, by), particles, log_g)[0] for by in (-1e-4, 1e-4)]
        assert getattr(found, name)[at] == pytest.approx((ends[1] - ends[0]) / 2e-4, rel=1e-3, abs=1e-3)


def test_what_cannot_be_is_said() -> None:
    event, guide = half_space(DIM, BETA), GaussianGuide.standard(np.zeros(DIM), np.eye(DIM)[:, :2])
    noise = np.zeros((6, DIM))
    with pytest.raises(ValueError, match="multiple of draws"):
        bound_gradient(meter(event), guide, noise, ADVERSARY, draws=4)
    with pytest.raises(ValueError, match="alpha"):
        bound_gradient(meter(event), guide, noise, ADVERSARY, draws=1, alpha=1.5)
    with pytest.raises(ValueError, match="biased"):
        bound_gradient(meter(event), guide, noise, ADVERSARY, draws=2, alpha=0.0, kind="sticking")
