"""Tempering by itself: its scale, its moves between modes, restarts, memory, and events that are not well behaved."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from library import library
from scipy import special, stats

from probest import Problem, estimate
from probest.budget import Meter
from probest.estimators.monte_carlo import MonteCarlo
from probest.estimators.tempering import Tempering
from probest.evidence import Evaluation, Evidence, Floats, Particles
from probest.guides.mixture import Mixture
from probest.smc.population import resampled
from probest.smc.scouts import scouts_from, search, with_scouts
from probest.smc.softening import EVENT, Index, Noise, Softening, Tilt, learn_index
from probest.smc.tuning import TemperingTuning
from probest.testing import FAILURE_RATE
from probest.testing.events import (
    ExactEvent,
    conditioned,
    constant,
    corner,
    gradient_free,
    half_space,
    islands,
    parabola,
    sphere,
    union,
)

TUNING = TemperingTuning()


def seed(value: int) -> np.random.SeedSequence:
    return np.random.SeedSequence(value)


def rng(value: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(value))


def branches(dim: int, thresholds: tuple[float, ...], scales: tuple[float, ...]) -> ExactEvent:
    """max over coordinates of scale · (z − threshold): modes that come up at different severities."""
    t, c = np.asarray(thresholds), np.asarray(scales)

    def gradient(z: Floats) -> Floats:
        k = np.argmax(c * (z[:, : len(t)] - t), axis=1)
        out = np.zeros_like(z)
        out[np.arange(len(z)), k] = c[k]
        return out

    log_prob = math.log(-math.expm1(sum(math.log1p(-special.ndtr(-x)) for x in t)))
    return ExactEvent(f"branches{len(t)}", dim, log_prob, lambda z: (c * (z[:, : len(t)] - t)).max(axis=1), gradient)


# --- the scale -------------------------------------------------------------------------------------------------------


def test_the_index_of_a_normal_severity_is_the_severity() -> None:
    n = 20_000
    s = rng().standard_normal(n)
    index = learn_index(None, s, np.full(n, -math.log(n)))
    assert index is not None
    x = np.linspace(-1.0, 2.5, 20)  # beyond the last knot too
    # h(x) has the error of P(S ≥ x) over φ(x); four deviations of its slope where it is extended
    tolerance = 5.0 * np.sqrt(special.ndtr(-x) * special.ndtr(x) / n) / stats.norm.pdf(x) + 0.05
    assert np.all(np.abs(index(x) - x) < tolerance)


@pytest.mark.parametrize("unit", [1e-20, 1.0, 1e20])
def test_the_index_does_not_depend_on_units_or_growth(unit: float) -> None:
    n = 5000
    s = rng().standard_normal(n)
    log_w = np.full(n, -math.log(n))
    plain, grown = learn_index(None, s, log_w), learn_index(None, unit * np.exp(3.0 * s), log_w)
    assert plain is not None
    assert grown is not None
    inside = s[np.abs(s) < 1.6]
    np.testing.assert_allclose(grown(grown.knots), plain(plain.knots), atol=1e-6)
    assert np.all(np.abs(grown(unit * np.exp(3.0 * inside)) - inside) < 0.8)
    assert np.all(np.diff(grown(np.sort(unit * np.exp(3.0 * s)))) >= 0.0)


@pytest.mark.parametrize(
    "softening",
    [Noise(0.7), Tilt(2.5, Index(np.array([-2.0, -1.0, 0.5]), np.array([0.0, 1.5, 2.0]), 0.4, 1.1))],
    ids=["noise", "tilt"],
)
def test_slopes_are_derivatives(softening: Softening) -> None:
    s = np.array([-7.0, -3.3, -1.7, -0.2, 0.3, 0.9])
    step = 1e-6
    numeric = (softening.log(s + step) - softening.log(s - step)) / (2.0 * step)
    np.testing.assert_allclose(softening.slope(s), numeric, rtol=1e-5, atol=1e-8)


def test_infinite_severities_have_a_place() -> None:
    index = Index(np.array([-1.0, 0.0]), np.array([1.0, 2.0]), 1.0, 1.0)
    both = np.array([-np.inf, np.inf])
    np.testing.assert_array_equal(EVENT.log(both), [-np.inf, 0.0])
    tilted = Tilt(3.0, index).log(both)
    assert tilted[0] == -np.inf
    assert -0.01 < tilted[1] <= 0.0
    assert learn_index(None, np.full(10, -np.inf), np.full(10, -math.log(10))) is None


# --- accuracy for its calls ------------------------------------------------------------------------------------------

SHORT = (
    half_space(2, 8.0),
    half_space(1000, 8.0),
    sphere(100, 14.467812505937182),
    union(50, (5.0, 5.0, 5.0, 5.0)),
    union(50, (5.0, 5.5, 4.8, 5.2)),
    conditioned(20, 4.0, 1.0, 0.3),
)


@pytest.mark.parametrize("event", SHORT, ids=lambda event: event.name)
def test_four_thousand_calls_reach_the_event(event: ExactEvent) -> None:
    evidence = Tempering(particles=256).run(event, budget=4000, seed=seed(0)).conclusion
    assert evidence.calls <= 4000
    assert math.isfinite(evidence.log_prob)
    reach = float(special.stdtrit(7, 1.0 - FAILURE_RATE / 2)) * evidence.std_error
    assert abs(evidence.log_prob - event.log_prob) < reach


def test_intervals_cover() -> None:
    events = (half_space(100, 5.0), parabola(2, 5.0, 0.5), islands(2), corner(20, 3.0, 3))
    covered, runs = 0, 0
    for event in events:
        for i in range(6):
            evidence = Tempering(particles=256).run(event, budget=10_000, seed=seed(i)).conclusion
            covered += evidence.interval[0] <= event.log_prob <= evidence.interval[1]
            runs += 1
    assert stats.binom.cdf(covered, runs, 0.92) > FAILURE_RATE


@pytest.mark.parametrize("growth", [lambda s: s, lambda s: np.exp(s) - 1.0, lambda s: 1e-20 * s**3])
def test_growth_and_units_of_the_severity_do_not_matter(growth: Callable[[Floats], Floats]) -> None:
    event = gradient_free(half_space(5, 5.0))
    grown = replace(event, severity=lambda z: growth(event.severity(z)))
    evidence = Tempering(particles=256).run(grown, budget=20_000, seed=seed(0)).conclusion
    assert evidence.converged
    reach = float(special.stdtrit(7, 1.0 - FAILURE_RATE / 2)) * evidence.std_error
    assert abs(evidence.log_prob - event.log_prob) < reach


# --- modes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("thresholds", "scales"), [((4.0, 4.3), (10.0, 1.0)), ((4.5, 4.6, 4.8, 5.0), (1.0, 3.0, 10.0, 0.3))]
)
def test_modes_of_unequal_steepness_survive(thresholds: tuple[float, ...], scales: tuple[float, ...]) -> None:
    # a mode has at least 4 % of the mass; in 80 benchmark runs none was lost, so two in five would be far off
    event = branches(50, thresholds, scales)
    share = special.ndtr(-np.asarray(thresholds))
    share /= share.sum()
    lost = 0
    for i in range(5):
        evidence = Tempering(particles=256).run(event, budget=10_000, seed=seed(i)).conclusion
        assert evidence.particles is not None
        found = np.mean(evidence.particles.z[:, : len(share)] > thresholds, axis=0)
        lost += bool(np.any((share > 0.05) & (found < 0.1 * share)))
    assert lost <= 1


def test_scouts_find_what_draws_do_not_show() -> None:
    event = branches(50, (4.0, 4.3), (10.0, 1.0))
    places = search(Meter(event, 10_000), rng(), TUNING)
    assert len(places) == 2
    np.testing.assert_allclose(np.sort(np.linalg.norm(places, axis=1)), [4.0, 4.3], atol=1e-6)
    assert not len(search(Meter(sphere(100, 14.0), 10_000), rng(), TUNING))  # too many directions
    assert not len(search(Meter(constant(3), 10_000), rng(), TUNING))  # no direction


def test_a_law_with_scouts_is_a_law() -> None:
    law = Mixture(np.eye(3)[:, :1], np.ones(1), np.full((1, 1), 2.0), np.eye(1)[None])
    places = np.array([[0.0, 3.0, 0.0], [2.0, 0.0, 0.0]])
    joined = with_scouts(law, places, TUNING)
    assert joined.basis.shape == (3, 2)
    assert joined.weights.sum() == pytest.approx(1.0)
    n = 100_000
    z = 2.5 * rng().standard_normal((n, 3))
    ratio = np.exp(stats.norm.logpdf(z).sum(axis=1) - stats.norm.logpdf(z, scale=2.5).sum(axis=1) - joined.log_ratio(z))
    assert abs(ratio.mean() - 1.0) < stats.norm.isf(FAILURE_RATE / 2) * ratio.std() / math.sqrt(n)


# --- restarts --------------------------------------------------------------------------------------------------------


def test_a_warm_start_says_where_to_look_and_nothing_else() -> None:
    event = half_space(20, 5.0)
    before = Tempering(particles=256).run(half_space(20, 4.5), budget=10_000, seed=seed(0)).conclusion
    assert before.particles is not None
    places = scouts_from(before.particles, rng(), TUNING)
    assert np.all(np.abs(places @ np.full(20, 1.0 / math.sqrt(20.0)) - 4.7) < 0.5)
    # as wrong a start as can be: the opposite side
    opposite = before.particles._replace(z=-before.particles.z)
    for start in (before.particles, opposite):
        runs = [Tempering(128, warm_start=start).run(event, budget=6000, seed=seed(i)).conclusion for i in range(4)]
        covered = sum(run.interval[0] <= event.log_prob <= run.interval[1] for run in runs)
        assert stats.binom.cdf(covered, len(runs), 0.9) > FAILURE_RATE
    with pytest.raises(ValueError, match="warm_start"):
        Tempering(warm_start=before.particles).run(half_space(3, 2.0), budget=1000, seed=seed(0))


def test_a_warm_start_keeps_a_mode_without_gradients() -> None:
    event = gradient_free(branches(20, (4.0, 4.3), (10.0, 1.0)))
    law = stats.truncnorm(4.0, np.inf)
    z = rng().standard_normal((400, 20))
    for j, at in enumerate((slice(0, 200), slice(200, 400))):
        z[at, j] = law.rvs(200, random_state=rng(j))
    start = Particles(z, np.full(400, -math.log(400)), event.severity(z))
    runs = [
        Tempering(particles=256, warm_start=start).run(event, budget=10_000, seed=seed(i)).conclusion for i in range(5)
    ]
    # without the steep mode every run would be 1.5 too low, with an interval of 0.3 around that
    assert np.median([run.log_prob - event.log_prob for run in runs]) > -0.75
    assert sum(run.interval[0] <= event.log_prob <= run.interval[1] for run in runs) >= 3


def test_estimates_start_from_estimates(backend: str) -> None:
    lib = library(backend)

    def problem(beta: float) -> Problem:
        return Problem(lambda: lib.sample("x", lib.dist.Normal(0.0, 1.0)), lambda x: x, lambda x, y: y - beta)

    truth = float(special.log_ndtr(-4.2))
    before = estimate(problem(4.0), budget=4000, progress=False)
    for method in (None, Tempering(particles=128)):
        after = estimate(problem(4.2), budget=8000, estimator=method, warm_start=before, progress=False)
        reach = float(special.stdtrit(7, 1.0 - FAILURE_RATE / 2)) * after.std_error
        assert abs(after.log_prob - truth) < reach
    with pytest.raises(TypeError, match="warm_start"):
        estimate(problem(4.2), warm_start=1.0, progress=False)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="warm_start"):
        estimate(problem(4.2), estimator=MonteCarlo(), warm_start=before.conclusion, progress=False)


# --- memory ----------------------------------------------------------------------------------------------------------


def test_resampling_in_place_is_resampling() -> None:
    draw = rng()
    for n, keep, dim in ((1, 1, 1), (5, 5, 2), (300, 300, 5000), (300, 120, 5000), (50, 49, 3)):
        value = draw.standard_normal((n, dim))
        index = np.sort(draw.integers(0, n, keep))
        expected = value[index]
        np.testing.assert_array_equal(resampled(value, index), expected)


@pytest.mark.parametrize("guided", [True, False])
def test_memory_is_that_of_the_population(guided: bool) -> None:
    n, dim = 3000, 2000
    method = Tempering(particles=n, max_moves=1, guided=guided)
    tracemalloc.start()
    method.run(half_space(dim, 1.0), budget=20 * n, seed=seed(0))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # z, its gradient in local moves, the wide first draws, and a block of each temporary
    assert peak < (2 if guided else 3) * 8 * n * dim + 170_000_000


# --- events that are not well behaved --------------------------------------------------------------------------------

ODD: dict[str, Callable[[Floats], Floats]] = {
    "constant": lambda z: np.full(len(z), -1.0),
    "always": lambda z: np.full(len(z), 1.0),
    "minus infinity": lambda z: np.full(len(z), -np.inf),
    "plus infinity": lambda z: np.full(len(z), np.inf),
    "infinite but here": lambda z: np.where(z[:, 0] > 0.0, z[:, 0] - 4.0, -np.inf),
    "infinite in the event": lambda z: np.where(z[:, 0] > 3.0, np.inf, z[:, 0] - 3.0),
    "both infinities": lambda z: np.where(z[:, 0] > 3.0, np.inf, -np.inf),
    "plateau": lambda z: np.maximum(z[:, 0] - 4.0, -1.0),
    "staircase": lambda z: np.floor(z[:, 0]) - 3.0,
    "heavy tails": lambda z: np.sign(z[:, 0]) * np.expm1(np.minimum(z[:, 0] ** 4, 600.0)) - 1e30,
    "tiny": lambda z: 1e-20 * (z[:, 0] - 4.0),
    "huge": lambda z: 1e20 * (z[:, 0] - 4.0),
    "largest": lambda z: np.where(z[:, 0] > 4.0, 1e308, -1e308),
    "tiny above huge": lambda z: np.where(z[:, 0] > 3.0, 1e-300, -1e300),
    "approached": lambda z: -np.exp(-z[:, 0]),
    "rounded": lambda z: np.round(z.sum(axis=1), 1) - 9.0,
    "subnormal": lambda z: 5e-324 * np.round(z[:, 0] - 4.0),
}


class Odd(ExactEvent):
    """With a gradient that is as odd: NaN, infinite or missing now and then."""

    def evaluate(self, z: Floats, *, gradient: bool = False) -> Evaluation:
        plain = super().evaluate(z)
        if not gradient:
            return plain
        grad = np.random.Generator(np.random.Philox(3)).standard_normal(z.shape)
        grad[z[:, 0] > 1.0] = np.nan
        grad[z[:, 0] < -1.0] = np.inf
        return Evaluation(plain.severity, plain.log_weight, grad)


def check(evidence: Evidence, budget: int) -> None:
    lower, upper = evidence.interval
    assert 0 < evidence.calls <= budget
    assert not any(
        map(math.isnan, (evidence.log_prob, evidence.std_error, lower, upper, *evidence.diagnostics.values()))
    )
    assert lower <= evidence.log_prob <= 0.0
    assert evidence.log_prob <= upper <= 0.0
    assert evidence.converged or evidence.notes


@pytest.mark.parametrize("budget", [200, 5000])
@pytest.mark.parametrize("differentiable", [False, True])
@pytest.mark.parametrize("name", ODD)
def test_odd_severities_give_an_honest_answer(name: str, differentiable: bool, budget: int) -> None:
    gradient = np.zeros_like if differentiable else None
    event = Odd(name, 4, math.nan, ODD[name], gradient)
    evidence = Tempering(particles=128).run(event, budget=budget, seed=seed(0)).conclusion
    check(evidence, budget)
    if evidence.converged:  # then crude sampling, or the closed form, says the same
        z = rng(1).standard_normal((1_000_000, 4))
        hits = int(np.count_nonzero(ODD[name](z) >= 0.0))
        low, high = (stats.beta.ppf(q, hits + 0.5, len(z) - hits + 0.5) for q in (1e-5, 1.0 - 1e-5))
        reach = 6.0 * evidence.std_error + 1e-9
        assert math.log(low) - reach < evidence.log_prob < math.log(high) + reach
