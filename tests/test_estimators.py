"""Every estimator on every exact event: closed forms only, at one stated failure rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import special, stats

from probest.budget import Meter
from probest.estimators.base import Estimator, UnmetNeedError, check_needs
from probest.estimators.combined import Combined
from probest.estimators.importance import Importance
from probest.estimators.line_sampling import LineSampling
from probest.estimators.monte_carlo import MonteCarlo
from probest.estimators.surrogate import Surrogate
from probest.estimators.tempering import Tempering
from probest.evidence import Code, Floats
from probest.guides.base import Defensive, Prior
from probest.guides.fit import fit_guide
from probest.guides.mixture import Mixture, fit_mixture
from probest.guides.radial import fit_radial
from probest.guides.subspace import informed_basis
from probest.smc.families import Families, combine
from probest.smc.moves import State, refresh
from probest.smc.softening import EVENT
from probest.testing import FAILURE_RATE, check_estimator, check_evidence, check_run, check_truth
from probest.testing.events import (
    EXACT_EVENTS,
    ExactEvent,
    boolean,
    conditioned,
    constant,
    half_space,
    impossible,
    sphere,
    union,
)

BUDGET = 50_000
METHODS: tuple[tuple[Estimator, int], ...] = (
    (MonteCarlo(max_samples=20_000), BUDGET),
    (Tempering(particles=256), BUDGET),
    (Importance(), BUDGET),
    (LineSampling(), 20_000),
    (Surrogate(), 4_000),
    (Combined(), BUDGET),
)
NEED_NOT_CONVERGE: dict[str, frozenset[str]] = {
    # these two say nothing until a particle is a catastrophe: moves have nothing to go by
    "tempering": frozenset({"union4_equal_d20_nograd", "half_space_d2_b3_bool", "half_space_d50_b2.5_bool"}),
    # no gradient leads anywhere; and where the boundary passes through the median, lines have no direction of their own
    "line sampling": frozenset({"staircase_d10", "plateau_d10", "half_space_d2_b0"}),
    # a penalised quadratic does not learn these from some thousand cases
    "surrogate": frozenset({"union4_equal_d20_nograd", "plateau_d10"}),
    # two searches leave too much room for what neither saw, and its samples take half of the budget each
    "combined": frozenset({"conditioned_d20"}),
}


def must_converge(method: Estimator, event: ExactEvent) -> bool:
    """Whether a method that is not converged on the event, within its budget here, has a defect."""
    if isinstance(method, MonteCarlo):
        return math.exp(event.log_prob) * method.max_samples > 25 and not event.weighted  # 5 standard deviations of 0
    return event.name not in NEED_NOT_CONVERGE.get(method.name, frozenset())


def each_method(function: Callable[..., None]) -> Any:
    """Runs a test for every method."""
    methods = [method for method, _ in METHODS]
    return pytest.mark.parametrize("method", methods, ids=lambda method: method.name.replace(" ", "_"))(function)


def skip_unless_able(method: Estimator, event: ExactEvent) -> None:
    if isinstance(method, Surrogate) and event.differentiable and event.dim >= 10:
        pytest.skip("minutes of regressions, for an event that has a gradient")
    try:
        check_needs(method, event)
    except UnmetNeedError as error:
        pytest.skip(str(error))


def seed(value: int) -> np.random.SeedSequence:
    return np.random.SeedSequence(value)


@pytest.mark.parametrize("event", EXACT_EVENTS, ids=lambda event: event.name)
@pytest.mark.parametrize(("method", "budget"), METHODS, ids=lambda of: getattr(of, "name", "").replace(" ", "_"))
def test_every_estimator_on_every_exact_event(method: Estimator, budget: int, event: ExactEvent) -> None:
    skip_unless_able(method, event)
    run = method.run(event, budget=budget, seed=seed(1))
    check_run(run, event, budget)
    evidence = run.conclusion
    if must_converge(method, event):
        assert evidence.converged, evidence.notes
    if isinstance(method, MonteCarlo) and not event.weighted:
        # exact: both binomial tails of the hits at the true P
        assert run.counts is not None
        p = math.exp(event.log_prob)
        tails = (
            stats.binom.cdf(run.counts.hits, run.counts.draws, p),
            stats.binom.sf(run.counts.hits - 1, run.counts.draws, p),
        )
        assert min(tails) > FAILURE_RATE / 2
    else:
        check_truth(evidence, event, FAILURE_RATE)


def test_the_matrix_names_events_that_exist() -> None:
    named = set().union(*NEED_NOT_CONVERGE.values())
    assert named <= {event.name for event in EXACT_EVENTS}


@pytest.mark.parametrize("event", [*EXACT_EVENTS[:14], EXACT_EVENTS[-1]], ids=lambda event: event.name)
def test_the_default_strategy_is_precise(event: ExactEvent) -> None:
    evidence = Combined().run(event, budget=BUDGET, seed=seed(2)).conclusion
    assert evidence.converged, evidence.notes
    assert evidence.std_error < 0.11


@pytest.mark.parametrize("event", [impossible(3), constant(3)], ids=lambda event: event.name)
@each_method
def test_nothing_to_find_is_said_so(method: Estimator, event: ExactEvent) -> None:
    budget = 1_500 if isinstance(method, Surrogate) else 5_000  # regressions take their time
    run = method.run(event, budget=budget, seed=seed(0))
    check_run(run, event, budget)
    evidence = run.conclusion
    assert evidence.log_prob == -math.inf
    assert not evidence.converged
    if not isinstance(method, LineSampling):  # which draws nothing that could bound P
        assert evidence.interval[1] < 0.0


@pytest.mark.parametrize("budget", [1, 7, 40, 300, 1500])
@pytest.mark.parametrize("event", [half_space(20, 5.0), conditioned(5, 3.0, 1.0, 0.5)], ids=lambda e: e.name)
@each_method
def test_the_budget_is_a_ceiling(method: Estimator, event: ExactEvent, budget: int) -> None:
    skip_unless_able(method, event)
    check_run(method.run(event, budget=budget, seed=seed(0)), event, budget)


@each_method
def test_bad_input_is_named(method: Estimator) -> None:
    event = half_space(2, 1.0)
    for budget in (0, -5):
        with pytest.raises(ValueError, match="budget"):
            method.run(event, budget=budget, seed=seed(0))
    broken = replace(event, severity=lambda z: np.where(z[:, 0] > 1.0, np.nan, -1.0))
    if isinstance(method, LineSampling):  # lines go where draws do not: that a model is undefined there is no error
        conclusion = method.run(broken, budget=1000, seed=seed(0)).conclusion
        assert not conclusion.converged
        return
    with pytest.raises(ValueError, match="severity"):
        method.run(broken, budget=1000, seed=seed(0))


@each_method
def test_every_estimator_keeps_the_contract_that_users_can_check(method: Estimator) -> None:
    (outcome,) = check_estimator(method, [half_space(5, 2.0)], budget=8_000)
    assert outcome.run is not None
    assert abs(outcome.error) < 1.0


def test_importance_from_a_given_guide_is_unbiased() -> None:
    event = half_space(3, 3.0)
    guide = Defensive((Mixture(np.eye(3), np.ones(1), np.full((1, 3), 1.8), np.eye(3)[None]), Prior(3)), (0.9, 0.1))
    method = Importance(guide=guide, precision=None, max_samples=200)
    ratios = [
        math.exp(method.run(event, budget=200, seed=seed(i)).conclusion.log_prob - event.log_prob) for i in range(200)
    ]
    score = (np.mean(ratios) - 1.0) / (np.std(ratios, ddof=1) / math.sqrt(len(ratios)))
    assert abs(score) < stats.norm.isf(FAILURE_RATE / 2)


def test_tempering_particles_follow_the_posterior() -> None:
    beta = 4.0
    evidence = Tempering(particles=1024).run(half_space(30, beta), budget=100_000, seed=seed(0)).conclusion
    assert evidence.particles is not None
    z, log_weight, _ = evidence.particles
    u = z @ np.full(30, 1.0 / math.sqrt(30.0))
    mean = float(np.exp(log_weight) @ u)
    law = stats.truncnorm(beta, np.inf)
    # related particles: worth at least an eighth of their number
    tolerance = stats.norm.isf(FAILURE_RATE / 2) * law.std() / math.sqrt(1024 / 8)
    assert abs(mean - law.mean()) < tolerance


def test_unequal_modes_survive_in_their_shares() -> None:
    thresholds = (4.0, 4.5, 5.5, 5.5)
    evidence = Combined().run(union(20, thresholds), budget=BUDGET, seed=seed(0)).conclusion
    assert evidence.converged
    assert evidence.particles is not None
    z, log_weight, _ = evidence.particles
    w = np.exp(log_weight)
    tails = special.ndtr(-np.array(thresholds))
    share = float(w @ (z[:, 0] < -4.0))
    n_eff = 1.0 / float(np.sum(w**2))
    truth = tails[1] / tails.sum()
    assert abs(share - truth) < stats.norm.isf(FAILURE_RATE / 2) * math.sqrt(truth / n_eff) * 1.5


def test_conditioned_adversary_gives_its_evidence_and_prior() -> None:
    event = conditioned(10, 3.0, 1.0, 0.4)
    for method in (Tempering(particles=512), Combined()):
        evidence = method.run(event, budget=BUDGET, seed=seed(0)).conclusion
        reach = stats.norm.isf(FAILURE_RATE / 2)
        assert abs(evidence.log_evidence - event.log_evidence) < reach * 0.1
        assert evidence.prior_particles is not None
        z, log_weight, _ = evidence.prior_particles
        variance = 2.0 + 0.4**2
        # z₁ given the observation is N(1/variance, 1 − 1/variance); related particles: worth at least an eighth
        error = math.sqrt((1.0 - 1.0 / variance) / (len(z) / 8))
        assert abs(float(np.exp(log_weight) @ z[:, 0]) - 1.0 / variance) < reach * error
    crude = MonteCarlo(max_samples=20_000).run(conditioned(2, 0.5, 1.0, 1.0), budget=BUDGET, seed=seed(0)).conclusion
    assert abs(crude.log_prob - conditioned(2, 0.5, 1.0, 1.0).log_prob) < 4.0 * crude.std_error
    assert abs(crude.log_evidence - conditioned(2, 0.5, 1.0, 1.0).log_evidence) < 0.05


def test_zero_hits_of_a_boolean_checker_say_what_to_do() -> None:
    evidence = MonteCarlo(max_samples=1000).run(boolean(half_space(2, 6.0)), budget=1000, seed=seed(0)).conclusion
    assert evidence.interval == (-math.inf, pytest.approx(math.log(-math.expm1(math.log(0.05) / 1000))))
    assert "severity" in evidence.notes[0]


def test_useless_gradients_are_done_without() -> None:
    event = half_space(10, 4.0)
    nan = replace(event, gradient=lambda z: np.full_like(z, np.nan))
    evidence = Tempering().run(nan, budget=100_000, seed=seed(0)).conclusion
    check_evidence(evidence, nan, 100_000)
    assert abs(evidence.log_prob - event.log_prob) < 8.0 * evidence.std_error


def test_calls_do_not_grow_with_the_dimension() -> None:
    calls = [Combined().run(half_space(d, 5.0), budget=BUDGET, seed=seed(0)).conclusion.calls for d in (10, 1000)]
    assert calls[1] < 1.5 * calls[0]


def test_ledger_ends_with_the_conclusion() -> None:
    ledger = Combined().run(conditioned(20, 4.0, 1.0, 0.3), budget=BUDGET, seed=seed(0)).ledger
    first, *looks, last = [line.method for line in ledger]
    assert (first, last) == ("monte carlo", "combined")
    assert looks == ["tempering", "importance sampling"] * (len(looks) // 2)
    assert ledger[-1].calls == sum(line.calls for line in ledger[:-1])


def test_a_campaign_goes_on_from_what_it_knows() -> None:
    event = next(event for event in EXACT_EVENTS if event.name == "staircase_d10")
    campaign = Combined(precision=0.02).begin(event, seed(0))
    first = campaign.spend(4_000)
    looks = len(campaign.looks)
    second = campaign.spend(20_000)
    for run, budget in ((first, 4_000), (second, 20_000)):
        check_evidence(run.conclusion, event, budget)
        assert run.calls == sum(line.calls for line in run.ledger[:-1]) <= budget
    assert len(campaign.looks) > looks >= 1
    assert campaign.looks[0].population is campaign.memory.looks[0]
    assert not {line.method for line in second.ledger} & {"monte carlo", "line sampling"}  # no second opening
    assert second.conclusion.std_error < first.conclusion.std_error
    assert second.conclusion.interval[0] <= event.log_prob <= second.conclusion.interval[1]


def test_a_bump_that_no_gradient_leads_to_is_met_by_draws() -> None:
    """4 exp(−8 (a − 2.8)²) + a/2 + b/2 in 60 dimensions: one draw in 200 sees the bump, which holds all of P. Lines
    from near the origin find a mode 38 nats lower, and agree on it.
    """
    grid = np.linspace(-9.0, 9.0, 200_001)
    hidden, limit = 4.0 * np.exp(-8.0 * (grid - 2.8) ** 2) + 0.5 * grid, 7.5
    logs = stats.norm.logpdf(grid) + special.log_ndtr(-(limit - hidden) / 0.5)
    truth = float(special.logsumexp(logs) + math.log(grid[1] - grid[0]))

    def severity(z: Floats) -> Floats:
        return 4.0 * np.exp(-8.0 * (z[:, 0] - 2.8) ** 2) + 0.5 * z[:, 0] + 0.5 * z[:, 1] - limit

    def gradient(z: Floats) -> Floats:
        slope = np.zeros_like(z)
        slope[:, 0] = 0.5 - 64.0 * (z[:, 0] - 2.8) * np.exp(-8.0 * (z[:, 0] - 2.8) ** 2)
        slope[:, 1] = 0.5
        return slope

    event = ExactEvent("bump_d60", 60, truth, severity, gradient)
    found = Combined().run(event, budget=50_000, seed=seed(0)).conclusion
    assert found.interval[0] - 0.1 <= truth <= found.interval[1] + 0.1
    assert abs(found.log_prob - truth) < 0.5


def test_a_smooth_problem_is_settled_by_lines() -> None:
    ledger = Combined().run(half_space(10, 5.0), budget=BUDGET, seed=seed(0)).ledger
    assert [line.claim for line in ledger] == ["unbiased", "heuristic", "heuristic", "consistent", "consistent"]
    assert ledger[-2].method == "line sampling"
    assert ledger[-1].calls == sum(line.calls for line in ledger[:-1])


def test_an_interrupted_ledger_keeps_its_lines() -> None:
    whole = conditioned(20, 4.0, 1.0, 0.3)
    calls = 0

    def severity(z: Floats) -> Floats:
        nonlocal calls
        calls += len(z)
        if calls > 2000:
            raise KeyboardInterrupt
        return whole.severity(z)

    run = Combined().run(replace(whole, severity=severity), budget=BUDGET, seed=seed(0))
    assert [line.method for line in run.ledger] == ["monte carlo", "combined"]
    assert Code.INTERRUPTED in run.conclusion.codes
    assert not run.conclusion.converged
    assert run.conclusion.log_prob == run.ledger[0].log_prob
    calls = 2000  # interrupted at once, there is nothing to return
    with pytest.raises(KeyboardInterrupt):
        Combined().run(replace(whole, severity=severity), budget=BUDGET, seed=seed(0))


def many_modes(dim: int, count: int, beta: float) -> ExactEvent:
    """``count`` balls in random directions, at distance ``beta`` from the origin: no mixture of a few parts fits."""
    rng = np.random.Generator(np.random.Philox(7))
    centres = rng.standard_normal((count, dim))
    centres *= beta / np.linalg.norm(centres, axis=1, keepdims=True)

    def severity(z: Floats) -> Floats:
        square = np.sum(z**2, axis=1)[:, None] - 2.0 * z @ centres.T + beta**2
        return np.asarray(0.7 * math.sqrt(dim) - np.sqrt(square.min(axis=1)), dtype=np.float64)

    def gradient(z: Floats) -> Floats:
        square = np.sum(z**2, axis=1)[:, None] - 2.0 * z @ centres.T + beta**2
        away = z - centres[np.argmin(square, axis=1)]
        return np.asarray(-away / np.linalg.norm(away, axis=1, keepdims=True), dtype=np.float64)

    # distances from a centre at radius β: noncentral chi-square, and the balls are disjoint up to a negligible rest
    log_prob = math.log(count) + float(stats.ncx2.logcdf(0.49 * dim, dim, beta**2))
    return ExactEvent(f"many_modes_{count}", dim, log_prob, severity, gradient)


def test_more_modes_than_a_guide_or_a_student_can_hold_are_not_converged() -> None:
    event, budget = many_modes(40, 60, 5.5), 32_000
    ledger = Combined().run(event, budget=budget, seed=seed(0)).ledger
    check_evidence(ledger[-1], event, budget)
    assert ledger[-1].calls > 0.7 * budget
    assert not ledger[-1].converged
    assert ledger[-1].interval[0] <= event.log_prob <= ledger[-1].interval[1]
    particles = ledger[-1].particles
    assert particles is not None
    assert 1.0 / np.sum(np.exp(2.0 * particles.log_weight)) > 200


def test_pooled_families_are_unbiased_and_weighted_by_size() -> None:
    rng = np.random.Generator(np.random.Philox(0))
    sizes = (100.0, 900.0)
    pairs = [[Families(np.log(rng.gamma(2.0, 0.5, 16)), None, size) for size in sizes] for _ in range(500)]
    verdicts = [combine(pair) for pair in pairs]
    values = np.exp([verdict.log_prob for verdict in verdicts])
    by_hand = [sum(size * np.exp(run.log_z).mean() for run, size in zip(pair, sizes, strict=True)) for pair in pairs]
    np.testing.assert_allclose(values, np.array(by_hand) / sum(sizes))
    assert abs(values.mean() - 1.0) < stats.norm.isf(FAILURE_RATE / 2) * values.std() / math.sqrt(len(values))
    covered = sum(verdict.interval[0] <= 0.0 <= verdict.interval[1] for verdict in verdicts)
    assert stats.binom.cdf(covered, len(verdicts), 0.93) > FAILURE_RATE


def test_one_family_alone_claims_nothing() -> None:
    verdict = combine([Families(np.where(np.arange(16) == 0, 0.0, -np.inf), None, 160.0)])
    assert verdict.error > 1.0
    assert verdict.effective == pytest.approx(1.0)


def test_refreshed_coordinates_leave_the_target_alone() -> None:
    # exact draws of a half-space's posterior stay exact draws, whatever the coordinates
    beta, dim, n = 2.0, 6, 4000
    event = half_space(dim, beta)
    rng = np.random.Generator(np.random.Philox(1))
    axis = np.full(dim, 1.0 / math.sqrt(dim))
    z = rng.standard_normal((n, dim))
    law = stats.truncnorm(beta, np.inf)
    z += (law.rvs(n, random_state=rng) - z @ axis)[:, None] * axis
    state = State(z, event.severity(z), np.zeros(n), None, None, np.zeros(4), soft=EVENT)
    meter = Meter(event, 100 * n)
    before = z.copy()
    for _ in range(20):
        refresh(state, meter, rng)
    assert np.mean(np.any(state.z != before, axis=1)) > 0.9
    assert stats.kstest(state.z @ axis, law.cdf).pvalue > FAILURE_RATE
    side = state.z[:, 0] - state.z[:, 1]
    assert stats.kstest(side / math.sqrt(2.0), "norm").pvalue > FAILURE_RATE
    assert state.severity.min() >= 0.0


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_guide_densities_integrate_to_one(dim: int) -> None:
    rng = np.random.Generator(np.random.Philox(0))
    z = rng.standard_normal((300, dim)) * 0.7 + 2.0
    weights = np.zeros(300)
    mixture = fit_mixture(z, weights, informed_basis(z, weights), rng)
    guides = [mixture, mixture.with_wide_tails(0.3, 2.0), fit_radial(z, weights), fit_guide(z, weights, rng).guide]
    n = 40_000
    for guide in guides:
        # E_φ over a wide normal of q/φ: draws from a law wider than both, so that weights are bounded
        x = 3.0 * rng.standard_normal((n, dim))
        log_wide = stats.norm.logpdf(x, scale=3.0).sum(axis=1)
        ratio = np.exp(stats.norm.logpdf(x).sum(axis=1) - guide.log_ratio(x) - log_wide)
        score = (ratio.mean() - 1.0) / (ratio.std() / math.sqrt(n))
        assert abs(score) < stats.norm.isf(FAILURE_RATE / 2)
        # and the sampler agrees with the density: E_q[φ/q] over the bulk of φ is the mass of that bulk
        y = guide.sample(n, rng)
        assert y.shape == (n, dim)
        inside = np.linalg.norm(y - 2.0, axis=1) < 1.0
        weight = np.where(inside, np.exp(guide.log_ratio(y)), 0.0)
        truth = stats.ncx2.cdf(1.0, dim, 4.0 * dim)
        assert abs(weight.mean() - truth) < stats.norm.isf(FAILURE_RATE / 2) * weight.std() / math.sqrt(n)


def test_shell_is_recognised() -> None:
    # rays from the origin carry it: one family without a direction, where a half-space has one mode with one
    event = sphere(100, 14.467812505937182)
    run = Combined().run(event, budget=BUDGET, seed=seed(5))
    assert run.ledger[-2].method == "line sampling"
    fitted = fit_guide(run.conclusion.particles.z, run.conclusion.particles.log_weight, np.random.default_rng(0))
    assert fitted.kind == "radial"
    assert fitted.basis is None
    plain = Combined().run(half_space(100, 5.0), budget=BUDGET, seed=seed(5)).conclusion
    assert fit_guide(plain.particles.z, plain.particles.log_weight, np.random.default_rng(0)).kind != "radial"


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: MonteCarlo(max_samples=0), "max_samples"),
        (lambda: MonteCarlo(precision=0.0), "precision"),
        (lambda: Tempering(islands=1), "islands"),
        (lambda: Tempering(particles=4), "particles"),
        (lambda: Tempering(target=1.0), "target"),
        (lambda: Importance(precision=-1.0), "precision"),
        (lambda: Combined(pilot=0), "pilot"),
        (lambda: Defensive((Prior(2),), (0.5,)), "shares"),
    ],
)
def test_settings_are_checked(make: object, name: str) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=name):
        make()


def test_a_budget_that_finds_nothing_is_spent_on_the_bound() -> None:
    budget = 20_000
    for event in (impossible(3), constant(3)):
        run = Combined().run(event, budget=budget, seed=seed(0))
        assert run.calls == budget
        assert run.conclusion.log_prob == -math.inf
        assert run.conclusion.interval[1] < math.log(2.0 * 3.0 / budget)
        early = Combined(bound=False).run(event, budget=budget, seed=seed(0))
        assert early.calls < budget
        assert early.conclusion.interval[1] > run.conclusion.interval[1]
