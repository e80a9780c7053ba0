"""Guides against closed forms: densities, samplers, fits, and which of them held-out particles choose."""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
from scipy import integrate, special, stats

from probest import diagnostics
from probest.estimators import importance
from probest.estimators.combined import Combined
from probest.estimators.importance import Importance, importance_sample
from probest.evidence import Floats, Population
from probest.guides.base import Defensive, Prior, allocate
from probest.guides.cylinder import Cylinder
from probest.guides.directional import Directional, fit_directional, log_normaliser
from probest.guides.fit import Fitted, fit_guide, ranked_guides
from probest.guides.flow import FLOWS, check_installed, fit_flow
from probest.guides.memory import Memory
from probest.guides.mixture import Mixture
from probest.guides.radial import Radial
from probest.guides.sample import Batch, beyond, seen
from probest.guides.subspace import gradient_rows, informed_basis, with_mean
from probest.guides.variational import GaussianGuide
from probest.testing import FAILURE_RATE
from probest.testing.events import ExactEvent, half_space, numeric_gradient, parabola

REACH = stats.norm.isf(FAILURE_RATE / 2)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


def cone(dim: int, radius: float, cosine: float) -> ExactEvent:
    """‖z‖ ≥ radius and z₁ ≥ cosine · ‖z‖: radius and direction are independent, so P is a product of closed forms."""

    def severity(z: Floats) -> Floats:
        r = np.linalg.norm(z, axis=1)
        return np.asarray(np.minimum(r - radius, 3.0 * (z[:, 0] / r - cosine)), dtype=np.float64)

    half = 0.5 * (dim - 1.0)
    log_prob = stats.chi.logsf(radius, dim) + stats.beta.logsf(0.5 + 0.5 * cosine, half, half)
    return ExactEvent(f"cone_d{dim}", dim, float(log_prob), severity, numeric_gradient(severity))


def cone_sample(dim: int, radius: float, cosine: float, n: int, random: np.random.Generator) -> Floats:
    """Exact draws of the cone's posterior, by inverting both distribution functions."""
    half = 0.5 * (dim - 1.0)
    t = 2.0 * stats.beta.isf(random.random(n) * stats.beta.sf(0.5 + 0.5 * cosine, half, half), half, half) - 1.0
    r = stats.chi.isf(random.random(n) * stats.chi.sf(radius, dim), dim)
    side = random.standard_normal((n, dim - 1))
    side /= np.linalg.norm(side, axis=1, keepdims=True)
    z = np.column_stack([t, np.sqrt(1.0 - t**2)[:, None] * side])
    return np.asarray(r[:, None] * z, dtype=np.float64)


@pytest.mark.parametrize("dim", [2, 3, 10, 200, 1000])
@pytest.mark.parametrize("kappa", [0.0, 1e-6, 0.5, 20.0, 300.0, 1e4])
def test_normaliser_of_directions_is_an_integral(dim: int, kappa: float) -> None:
    # the mean of exp(κ cos θ), with density of θ ∝ sin^(d-2) θ, by quadrature around the largest value of the integrand
    c = kappa / max(dim - 2.0, 1e-9)
    peak = math.acos(min(1.0, 2.0 * c / (1.0 + math.sqrt(1.0 + 4.0 * c * c)))) if dim > 2 else 0.0

    def exponent(x: float) -> float:
        return kappa * math.cos(x) + (dim - 2.0) * math.log(max(math.sin(x), 1e-300))

    top = exponent(peak) if dim > 2 else kappa
    width = 1.0 / math.sqrt(dim + kappa)
    ends = sorted({0.0, *(min(max(peak + k * width, 0.0), math.pi) for k in (-12, -4, -1, 1, 4, 12)), math.pi})
    value = sum(
        integrate.quad(lambda x: math.exp(exponent(x) - top), a, b, epsabs=1e-14, epsrel=1e-12)[0]
        for a, b in itertools.pairwise(ends)
    )
    log_sphere = special.gammaln(0.5 * (dim - 1.0)) + 0.5 * math.log(math.pi) - special.gammaln(0.5 * dim)
    assert log_normaliser(dim, np.array([kappa]))[0] == pytest.approx(top + math.log(value) - log_sphere, abs=1e-8)


@pytest.mark.parametrize(("dim", "kappa"), [(2, 3.0), (5, 0.0), (50, 40.0), (1000, 1e4)])
def test_directional_sampler_follows_its_density(dim: int, kappa: float) -> None:
    mean = np.eye(dim)[:1]
    law = Directional(np.ones(1), mean, np.array([kappa]), np.array([0.6 * dim]), np.array([1.3 * dim]))
    n = 20_000
    z = law.sample(n, rng(1))
    square = np.sum(z**2, axis=1)
    assert stats.kstest(square, stats.gamma(0.6 * dim, scale=1.3 / 0.6).cdf).pvalue > FAILURE_RATE
    cosine = z[:, 0] / np.sqrt(square)
    # d/dκ of the normaliser is the mean cosine
    step = 1e-4 * max(kappa, 1.0)
    slope = np.diff(log_normaliser(dim, np.array([max(kappa - step, 0.0), kappa + step])))[0]
    slope /= step if kappa < step else 2.0 * step
    assert abs(cosine.mean() - slope) < REACH * cosine.std() / math.sqrt(n) + 1e-4 / math.sqrt(dim)
    # weights of draws against a law that is known: E_q[φ/q] of the half with positive first coordinate is 1/2
    wide = Directional(np.ones(1), mean, np.array([0.2]), np.array([0.5 * dim]), np.array([1.0 * dim]))
    y = wide.sample(n, rng(2))
    w = np.exp(wide.log_ratio(y)) * (y[:, 0] > 0.0)
    assert abs(w.mean() - 0.5) < REACH * w.std() / math.sqrt(n)


def test_directional_fit_recovers_its_parameters() -> None:
    dim, n = 30, 20_000
    means = np.eye(dim)[:2]
    law = Directional(
        np.array([0.3, 0.7]), means, np.array([40.0, 80.0]), np.array([20.0, 60.0]), np.array([50.0, 90.0])
    )
    fit = fit_directional(law.sample(n, rng(3)), np.zeros(n), np.eye(dim)[:, :5], rng(4))
    order = np.argsort(fit.weights)
    assert fit.components == 2
    np.testing.assert_allclose(fit.weights[order], law.weights, atol=REACH * 0.5 / math.sqrt(n) * 2)
    np.testing.assert_allclose(np.sum(fit.directions[order] * means, axis=1), 1.0, atol=1e-2)
    np.testing.assert_allclose(fit.concentration[order], law.concentration, rtol=0.05)
    np.testing.assert_allclose(fit.shape[order], law.shape, rtol=0.12)
    np.testing.assert_allclose(fit.spread[order], law.spread, rtol=0.02)


def test_cylinder_follows_its_density() -> None:
    dim, n = 12, 40_000
    basis = np.linalg.qr(rng(1).standard_normal((dim, 2)))[0]
    inside = Mixture(basis, np.array([0.4, 0.6]), np.array([[0.0, 0.5], [0.3, -0.2]]), np.stack([1.2 * np.eye(2)] * 2))
    radius = math.sqrt(dim - 2)
    across = Radial(dim - 2, np.array([0.5, 0.5]), np.log([0.9 * radius, radius]), np.array([0.3, 0.3]))
    law = Cylinder(inside, across)
    z = law.sample(n, rng(2))
    log_r = np.log(np.linalg.norm(z - z @ basis @ basis.T, axis=1))
    mixed = 0.5 * sum(stats.norm.cdf(np.sort(log_r), m, 0.3) for m in across.means)
    assert stats.kstest(mixed, "uniform").pvalue > FAILURE_RATE
    # E_q[φ/q] of what has probability 1/4 under the adversary: one half by sign, the other by length
    w = np.exp(law.log_ratio(z)) * (z[:, 0] > 0.0) * (np.sum(z**2, axis=1) > stats.chi2.median(dim))
    assert abs(w.mean() - 0.25) < REACH * w.std() / math.sqrt(n)


def test_what_lies_within_a_distance_of_an_axis_is_a_cylinder() -> None:
    dim, n, reach, beyond_ = 40, 600, 4.5, 2.5
    log_prob = stats.norm.logsf(beyond_) + stats.chi.logcdf(reach, dim - 1)
    u = rng(1).random((2, n))
    rho = stats.chi.ppf(u[0] * stats.chi.cdf(reach, dim - 1), dim - 1)
    side = rng(2).standard_normal((n, dim - 1))
    side *= (rho / np.linalg.norm(side, axis=1))[:, None]
    z = np.column_stack([stats.norm.isf(u[1] * stats.norm.sf(beyond_)), side])

    def severity(z: Floats) -> Floats:
        return np.asarray(np.minimum(z[:, 0] - beyond_, reach - np.linalg.norm(z[:, 1:], axis=1)))

    event = ExactEvent("axis", dim, float(log_prob), severity, numeric_gradient(severity))
    assert fit_guide(z, np.zeros(n), rng(3)).kind == "cylinder"
    population = Population(z, np.zeros(n), np.zeros(n), None, float(n))
    evidence = importance_sample(
        Importance(), event, Memory.of(population), None, budget=50_000, seed=np.random.SeedSequence(0)
    )
    assert evidence.converged, evidence.notes
    assert abs(evidence.log_prob - log_prob) < REACH * evidence.std_error


def beyond_limits(scale: Floats, limit: float, dim: int, n: int) -> tuple[ExactEvent, Population]:
    """All of several coordinates beyond a limit, each in units of its own; exact draws of the posterior."""
    k = len(scale)

    def each(z: Floats) -> Floats:
        return np.asarray(scale * (z[:, :k] - limit))

    def gradient(z: Floats) -> Floats:
        which = each(z).argmin(axis=1)
        return np.asarray(scale[which, None] * np.eye(dim)[which])

    event = ExactEvent("limits", dim, k * float(stats.norm.logsf(limit)), lambda z: each(z).min(axis=1), gradient)
    z = rng(1).standard_normal((n, dim))
    z[:, :k] = stats.norm.isf(rng(2).random((n, k)) * stats.norm.sf(limit))
    rows = gradient_rows(z, np.zeros(n), gradient(z), None)
    return event, Population(z, np.zeros(n), np.zeros(n), rows, float(n))


def test_limits_that_no_gradient_shows_are_seen_by_the_mean() -> None:
    """The gradient is nearly always that of the limit in the smallest units."""
    event, found = beyond_limits(np.array([1e-3, 1.0, 1.0]), 2.0, 40, 300)
    basis = informed_basis(found.z, found.log_w, found.rows, threshold=0.15)
    assert basis.shape[1] == 1
    whole = with_mean(basis, found.z, found.log_w)
    assert whole.shape[1] == 2
    np.testing.assert_allclose(whole.T @ whole, np.eye(2), atol=1e-12)
    assert whole[1:3, 1].sum() ** 2 / 2.0 > 0.85  # along (0, 1, 1) / √2, but for the noise of 37 others
    assert with_mean(basis, found.z, found.log_w, 5.0).shape[1] == 1  # five points do not tell
    assert with_mean(np.eye(40), found.z, found.log_w).shape == (40, 40)
    evidence = importance_sample(
        Importance(), event, Memory.of(found), None, budget=50_000, seed=np.random.SeedSequence(0)
    )
    assert evidence.converged, evidence.notes
    assert abs(evidence.log_prob - event.log_prob) < REACH * evidence.std_error


def test_where_the_best_guide_misses_the_event_the_next_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    event, found = beyond_limits(np.ones(2), 2.0, 10, 300)
    ranked = list(ranked_guides(found.z, found.log_w, rng(0), rows=found.rows, effective=300.0))
    assert len({(f.kind, None if f.basis is None else f.basis.shape[1]) for f in ranked}) == len(ranked) > 1
    away = Fitted(Mixture(np.eye(10), np.ones(1), np.full((1, 10), -9.0), np.eye(10)[None]), "mixture", np.eye(10), 1)
    tried: list[int] = []

    def misleading(*args: object, **options: object) -> Iterator[Fitted]:
        for i, each in enumerate((away, away, *ranked)):
            tried.append(i)
            yield each

    monkeypatch.setattr(importance, "ranked_guides", misleading)
    evidence = importance_sample(
        Importance(), event, Memory.of(found), None, budget=50_000, seed=np.random.SeedSequence(0)
    )
    assert tried == [0, 1, 2]
    assert evidence.converged, evidence.notes
    assert abs(evidence.log_prob - event.log_prob) < REACH * evidence.std_error


def test_a_cone_beyond_a_radius_is_directional() -> None:
    event = cone(40, 9.0, 0.5)
    z = cone_sample(40, 9.0, 0.5, 600, rng(5))
    fitted = fit_guide(z, np.zeros(600), rng(6))
    assert fitted.kind == "directional"
    population = Population(z, np.zeros(600), np.zeros(600), None, 600.0)
    evidence = importance_sample(
        Importance(), event, Memory.of(population), None, budget=50_000, seed=np.random.SeedSequence(0)
    )
    assert evidence.converged, evidence.notes
    assert abs(evidence.log_prob - event.log_prob) < REACH * evidence.std_error


def test_a_sample_is_enlarged_to_what_is_enough_where_spare_calls_reach_it() -> None:
    event = cone(40, 9.0, 0.5)
    z = cone_sample(40, 9.0, 0.5, 600, rng(5))
    population = Population(z, np.zeros(600), np.zeros(600), None, 600.0)

    def errors(enough: float | None = None, spare: int = 0) -> tuple[float, int]:
        memory, own = Memory.of(population), np.random.SeedSequence(0)
        method = Importance(precision=0.1, rounds=0, first_batch=100)
        found = importance_sample(method, event, memory, None, budget=1_500, seed=own, enough=enough, spare=spare)
        return found.std_error, found.calls

    usual, calls = errors()
    wanted = 0.7 * usual
    assert errors(enough=wanted, spare=20_000)[0] < wanted
    assert errors(enough=wanted, spare=0) == (usual, calls), "calls for something else were taken"
    assert errors(enough=1.1 * usual, spare=20_000) == (usual, calls), "what was enough was enlarged"


def test_allocation_is_even_and_right_on_average() -> None:
    shares = (0.78, 0.13, 0.05, 0.02, 0.02)
    random = rng(7)
    counts = np.array([allocate(37, shares, random) for _ in range(4000)])
    assert (counts.sum(axis=1) == 37).all()
    assert (np.abs(counts - 37 * np.array(shares)) < 1.0).all()
    error = counts.std(axis=0) / math.sqrt(len(counts))
    assert (np.abs(counts.mean(axis=0) - 37 * np.array(shares)) <= REACH * error + 1e-12).all()
    assert allocate(0, shares, random).sum() == 0


def test_fixed_shares_do_not_raise_the_variance() -> None:
    parts = (Mixture(np.eye(1), np.ones(1), np.full((1, 1), 4.0), np.eye(1)[None]), Prior(1))
    guide = Defensive(parts, (0.5, 0.5))
    random = rng(8)
    sums, spread = [], []
    for _ in range(400):
        z = guide.sample(100, random)
        w = np.where(z[:, 0] > 3.5, np.exp(guide.log_ratio(z)), 0.0)
        sums.append(w.mean())
        spread.append(w.var() / 100)
    truth = stats.norm.sf(3.5)
    assert abs(np.mean(sums) - truth) < REACH * np.std(sums) / math.sqrt(len(sums))
    # the stated variance is that of independent choices: never too small (chi-square)
    assert np.var(sums) < np.mean(spread) * stats.chi2.isf(FAILURE_RATE, 399) / 399


@pytest.mark.parametrize("library", FLOWS)
def test_flows_are_densities_and_guides(library: str) -> None:
    if importlib.util.find_spec(library) is None:  # not importorskip: the import itself would change settings of torch
        pytest.skip(f"{library} is not installed")
    event = parabola(6, 3.0, -0.2)
    draws = rng(9).standard_normal((600_000, 6))
    z = draws[event.severity(draws) >= 0.0][:600]
    basis = np.eye(6)[:, :2]
    flow = fit_flow(library, z, np.zeros(len(z)), basis, rng(10), steps=40)
    # the density integrates to one over the plane, by the trapezoidal rule
    grid = np.linspace(-7.0, 9.0, 251)
    x, y = (axis.ravel() for axis in np.meshgrid(grid, grid))
    plane = np.column_stack([x, y, np.zeros((len(x), 4))])
    density = np.exp(stats.norm.logpdf(x) + stats.norm.logpdf(y) - flow.log_ratio(plane))
    cell = (grid[1] - grid[0]) ** 2
    assert density.sum() * cell == pytest.approx(1.0, abs=5e-3)
    # and the sampler follows it: the shares of four quadrants around the median, and the other directions are normal
    sample = flow.sample(3000, rng(11))
    for above in (0, 1):
        for right in (0, 1):
            part = ((y > 3.3) == above) & ((x > 0.0) == right)
            share = np.mean(((sample[:, 1] > 3.3) == above) & ((sample[:, 0] > 0.0) == right))
            assert abs(share - density[part].sum() * cell) < REACH * 0.5 / math.sqrt(3000) + 0.02
    assert stats.kstest(sample[:, 4], "norm").pvalue > FAILURE_RATE
    # the density is that of the draws: what pushing standard normals does to an area, by central differences
    noise, step = rng(12).standard_normal((50, 2)), 0.01 * np.eye(2)
    columns = [(flow.density.push(noise + d) - flow.density.push(noise - d)) / 0.02 for d in step]
    area = np.abs(columns[0][:, 0] * columns[1][:, 1] - columns[0][:, 1] * columns[1][:, 0])
    expected_density = stats.norm.logpdf(noise).sum(axis=1) - np.log(area)
    off = flow.density.log_density(flow.density.push(noise)) - expected_density
    assert np.median(np.abs(off)) < 0.01
    np.testing.assert_array_equal(sample, flow.sample(3000, rng(11)))
    again = fit_flow(library, z, np.zeros(len(z)), basis, rng(10), steps=40)
    np.testing.assert_array_equal(again.log_ratio(z), flow.log_ratio(z))
    fitted = Fitted(flow.defended(), library, basis, 1)
    population = Population(z, np.zeros(len(z)), np.zeros(len(z)), None, float(len(z)))
    evidence = importance_sample(
        Importance(), event, Memory.of(population), None, budget=20_000, seed=np.random.SeedSequence(0), fitted=fitted
    )
    assert evidence.converged, evidence.notes
    assert abs(evidence.log_prob - event.log_prob) < REACH * evidence.std_error


def test_unknown_and_missing_guides_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for guides in ((), ("flow",)):
        with pytest.raises(ValueError, match="guides"):
            Importance(guides=guides)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="flows-torch"):
        check_installed("zuko")


def test_intervals_cover() -> None:
    events = (half_space(2, 3.0), half_space(20, 4.0), parabola(2, 4.0, 0.5))
    method = Combined()
    runs = [
        (event, method.run(event, budget=50_000, seed=np.random.SeedSequence(i)).conclusion)
        for i in range(10)
        for event in events
    ]
    covered = sum(run.interval[0] <= event.log_prob <= run.interval[1] for event, run in runs)
    assert stats.binom.cdf(covered, len(runs), 0.93) > FAILURE_RATE


def lacking(good: bool, seed: int) -> tuple[ExactEvent, Population, Fitted]:
    """z₁ ≥ 4 or z₂ ≥ 4, with exact particles of both, and a guide of both or of the first alone."""
    random = rng(seed)
    event = ExactEvent("two", 5, math.log(2.0 * stats.norm.sf(4.0)), lambda z: np.maximum(z[:, 0], z[:, 1]) - 4.0)
    z = random.standard_normal((256, 5))
    first = random.random(256) < 0.5
    tail = stats.norm.isf(random.random(256) * stats.norm.sf(4.0))
    z[np.arange(256), np.where(first, 0, 1)] = tail
    known = z if good else z[first]
    fitted = fit_guide(known, np.zeros(len(known)), random)
    assert isinstance(fitted.guide, Defensive)
    bare = Defensive((fitted.guide.parts[0], Prior(5)), (0.9, 0.1))
    return event, Population(z, np.zeros(256), np.zeros(256), None, 128.0), Fitted(bare, "mixture", fitted.basis, 1)


def test_a_missing_mode_is_flagged_and_a_good_guide_is_not() -> None:
    flagged = {True: 0, False: 0}
    repeats = 25
    for good in flagged:
        for i in range(repeats):
            event, population, fitted = lacking(good, i)
            source = np.random.SeedSequence(i)
            evidence = importance_sample(
                Importance(), event, Memory.of(population), None, budget=3000, seed=source, fitted=fitted
            )
            flagged[good] += any("particles show" in note for note in evidence.notes)
    # rates of at most 2 % and at least 99 %, at this many repeats
    assert flagged[True] <= stats.binom.isf(FAILURE_RATE, repeats, 0.02)
    assert flagged[False] >= stats.binom.ppf(FAILURE_RATE, repeats, 0.99)


@pytest.mark.parametrize(("odd", "thin"), [(1, False), (20, True)])
def test_one_odd_particle_in_hundreds_does_not_make_a_guide_thin(odd: int, thin: bool) -> None:
    """Its weight may be any number; that it is one in hundreds says that it matters little."""
    rng = np.random.default_rng(3)
    z = rng.standard_normal((300, 2)) + 1.0
    z[:odd] = [-9.0, 0.0]
    guide = Defensive((GaussianGuide.standard(np.array([1.0, 0.0]), np.eye(2)),), (1.0,))
    drawn = guide.sample(5_000, rng)
    population = Population(z, np.zeros(300), np.zeros(300), None, 300.0)
    coverage, unseen, _ = seen(population, guide, guide.log_ratio(drawn))
    assert unseen == pytest.approx(odd / 300, abs=0.01)
    assert (coverage < 0.2) == thin


@pytest.mark.parametrize(("height", "credible"), [(3.0, 0.05), (2_000.0, 0.4)])
def test_particles_that_many_samples_should_have_met_are_not_believed(height: float, credible: float) -> None:
    """Two fifths of all particles have weights above all that were sampled: of 10,000 samples, 0.4 · 10⁴ / height."""
    rng = np.random.default_rng(0)
    batch = np.log(rng.uniform(0.5, 1.5, 10_000))
    weights = np.log(np.where(np.arange(1_000) < 400, height, 1.0))
    lacking = beyond(weights, np.full(1_000, 1e-3), batch)
    assert lacking[400:].sum() == 0.0
    expected = 0.4 * 10_000 / height
    assert lacking.sum() == pytest.approx(0.4 * min(1.0, 3.0 / expected), rel=0.02)
    assert lacking.sum() <= credible + 1e-9
    # those of the greatest weights are believed, whatever the others claim
    weights[:100] = math.log(1e6)
    assert beyond(weights, np.full(1_000, 1e-3), batch)[:100].sum() == pytest.approx(0.1)


class Bounded:
    """Uniform on the unit square, in place of a normal law: no density at all elsewhere."""

    dim = 2

    def log_ratio(self, z: Floats) -> Floats:
        inside = ((z > 0.0) & (z < 1.0)).all(axis=1)
        return np.where(inside, stats.norm.logpdf(z).sum(axis=1), math.inf)


@pytest.mark.parametrize(("odd", "covered"), [(3, True), (60, False)])
def test_particles_where_a_guide_has_no_density(odd: int, covered: bool) -> None:
    rng = np.random.default_rng(0)
    guide, drawn, z = Bounded(), rng.random((5_000, 2)), rng.random((300, 2))
    z[:odd] += 2.0
    coverage, unseen, _ = seen(Population(z, np.zeros(300), np.zeros(300), None, 300.0), guide, guide.log_ratio(drawn))
    assert unseen == pytest.approx(odd / 300)
    assert (coverage > 0.5) == covered


def test_smoothed_is_a_second_opinion() -> None:
    event = half_space(10, 4.0)
    evidence = Importance().run(event, budget=20_000, seed=np.random.SeedSequence(0)).conclusion
    assert abs(evidence.diagnostics["smoothed"] - evidence.log_prob) < 3.0 * evidence.std_error
    assert math.isfinite(diagnostics.pareto_khat(np.log(rng().random(100))))


def test_samples_of_several_guides_weigh_as_one_sample_of_their_mixture() -> None:
    """By hand: φ over the mixture of both densities, by the numbers of draws, whichever guide a point came from."""
    random, dim = rng(0), 3
    shifts, sizes = (1.0, 3.0), (40, 120)
    memory = Memory()
    points = []
    for shift, size in zip(shifts, sizes, strict=True):
        guide = Mixture(np.eye(dim)[:, :1], np.ones(1), np.full((1, 1), shift), np.eye(1)[None])
        z = guide.sample(size, random)
        memory.keep(guide, Batch(guide.log_ratio(z), z, np.ones(size)))
        points.append(z)
    z = np.concatenate(points)
    densities = [size * stats.norm.pdf(z[:, 0], shift) for shift, size in zip(shifts, sizes, strict=True)]
    by_hand = np.log(stats.norm.pdf(z[:, 0]) * sum(sizes) / sum(densities))
    by_hand = np.minimum(by_hand, np.log(np.mean(np.exp(by_hand))) + 0.5 * math.log(len(z)))
    known = memory.known()
    order, mine = np.lexsort(known.z.T), np.lexsort(z.T)
    np.testing.assert_array_equal(known.z[order], z[mine])
    shares = np.exp(known.log_w - np.logaddexp.reduce(known.log_w))[order]
    np.testing.assert_allclose(shares, (np.exp(by_hand) / np.exp(by_hand).sum())[mine], rtol=1e-9)
