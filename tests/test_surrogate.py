"""A learned severity that guides: closed forms only, the checker deciding."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import special

from models import discrete
from probest import estimate
from probest.budget import Meter
from probest.estimators.combined import Combined
from probest.estimators.surrogate import Explored, Surrogate, _floor, _verdict
from probest.evidence import Code, Evaluation, Evidence, Floats
from probest.surrogates.features import Features, Learned, Softened
from probest.surrogates.regression import Judged
from probest.testing import FAILURE_RATE
from probest.testing.events import (
    ExactEvent,
    boolean,
    conditioned,
    gradient_free,
    half_space,
    impossible,
    islands,
    union,
)

BUDGET = 10_000


def seed(value: int) -> np.random.SeedSequence:
    return np.random.SeedSequence(value)


@pytest.mark.parametrize(
    "event",
    [
        boolean(half_space(2, 5.0)),
        boolean(half_space(50, 4.0)),
        boolean(union(2, (4.0, 4.0, 4.0, 4.0))),
        boolean(islands(2)),
        gradient_free(half_space(100, 4.0)),
    ],
    ids=lambda event: event.name,
)
def test_events_out_of_reach_of_crude_sampling(event: ExactEvent) -> None:
    evidence = Combined().run(event, budget=BUDGET, seed=seed(0)).conclusion
    assert evidence.calls <= BUDGET
    assert evidence.converged, evidence.notes
    assert evidence.std_error < 0.1
    reach = float(special.stdtrit(60, 1.0 - FAILURE_RATE / 2)) * evidence.std_error
    assert abs(evidence.log_prob - event.log_prob) < reach


def test_the_checker_decides_and_the_calls_are_counted() -> None:
    event = boolean(half_space(3, 3.5))
    asked: list[int] = []

    class Counted(ExactEvent):
        def evaluate(self, z: Floats, *, gradient: bool = False) -> Evaluation:
            assert not gradient
            asked.append(len(z))
            return ExactEvent.evaluate(self, z)

    counted = Counted(event.name, event.dim, event.log_prob, event.severity, boolean=True)
    evidence = Surrogate().run(counted, budget=BUDGET, seed=seed(1)).conclusion
    assert evidence.calls == sum(asked) <= BUDGET
    assert evidence.particles is not None
    assert evidence.particles.severity.min() >= 0.0
    np.testing.assert_array_equal(event.severity(evidence.particles.z), 1.0)


@pytest.mark.parametrize("budget", [1, 30, 400, 1500])
@pytest.mark.parametrize("event", [boolean(half_space(4, 3.0)), gradient_free(half_space(30, 4.0))])
def test_the_budget_is_a_ceiling(event: ExactEvent, budget: int) -> None:
    evidence = Surrogate().run(event, budget=budget, seed=seed(2)).conclusion
    assert evidence.calls <= budget
    assert evidence.interval[0] <= event.log_prob <= evidence.interval[1]
    assert evidence.converged or evidence.notes


@pytest.mark.parametrize("event", [boolean(impossible(3)), boolean(half_space(2, 40.0)), gradient_free(impossible(3))])
def test_what_cannot_be_found_is_a_bound(event: ExactEvent) -> None:
    evidence = Combined().run(event, budget=3_000, seed=seed(3)).conclusion
    assert evidence.log_prob == -math.inf
    assert not evidence.converged
    assert math.isfinite(evidence.interval[1])
    assert evidence.notes


def test_conditioned_adversaries_are_refused() -> None:
    with pytest.raises(ValueError, match="Tempering"):
        Surrogate().run(conditioned(3, 2.0, 1.0, 0.5), budget=1000, seed=seed(0))


@pytest.mark.parametrize("setting", ["look", "batch", "rounds", "particles", "precision", "share"])
def test_settings_are_checked(setting: str) -> None:
    with pytest.raises(ValueError, match=setting):
        Surrogate(**{setting: 0})


def test_slopes_of_the_features() -> None:
    """Against central differences, for every kind at once."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((5, 3)))[0]
    features = Features(basis, True, rng.standard_normal((7, 3)), 1.3)
    coefficients = rng.standard_normal(1 + 5 + 6 + 7)
    soft = Softened(Learned(features, coefficients, 0.7), 6)
    z = rng.standard_normal((4, 6))
    at = soft.evaluate(z, gradient=True)
    assert at.severity_grad is not None
    for j in range(6):
        step = np.zeros(6)
        step[j] = 1e-6
        difference = (soft.evaluate(z + step).severity - soft.evaluate(z - step).severity) / 2e-6
        np.testing.assert_allclose(at.severity_grad[:, j], difference, rtol=1e-5, atol=1e-7)


def test_discrete_sites_are_decoded(backend: str) -> None:
    event = discrete.problem(backend).event
    z = np.random.default_rng(0).standard_normal((5, 50))
    np.testing.assert_array_equal(event.discrete_values(z), (z > special.ndtri(0.95)).astype(float))
    assert event.model_calls == 0


def test_discrete_sites_are_learned_from() -> None:
    """Fifty Bernoulli sites: the severity is linear in their values, far from it in z."""
    pytest.importorskip("pyro")
    result = estimate(discrete.problem("pyro"), estimator=Combined(), budget=BUDGET, progress=False, seed=1)
    assert result.calls <= BUDGET
    (learned,) = (line for line in result.ledger if line.method == "surrogate")
    # tempering's error of log P: Student t, with half the freedom of its 16 families
    reach = float(special.stdtrit(7, 1.0 - FAILURE_RATE / 2)) * learned.std_error
    assert abs(learned.log_prob - discrete.log_prob()) < reach
    # its guide did not pass, so that no fresh sample confirms it: it does not conclude alone
    assert Code.UNCHECKED in learned.codes
    assert not learned.converged


def test_a_learned_severity_that_lacks_a_part_does_not_conclude() -> None:
    """Fifty rare failures, three of them a catastrophe: particles that climb a learned severity see a tenth of P."""
    pytest.importorskip("pyro")
    built, truth = (part(parts=50, rate=1e-3, limit=3) for part in (discrete.problem, discrete.log_prob))
    result = estimate(built, estimator=Combined(), budget=BUDGET, progress=False, seed=0)
    assert not (result.converged and abs(result.log_prob - truth) > 0.1 + 3 * result.std_error)
    assert result.upper >= truth


@pytest.mark.parametrize("extreme", [-1e30, -np.inf])
def test_severities_without_a_scale_far_below(extreme: float) -> None:
    """What is impossible may say so by −inf, or by a large number; it must not spoil the fit near the limit."""
    event = gradient_free(half_space(10, 4.0))
    hostile = ExactEvent("hostile", 10, event.log_prob, lambda z: np.where(z[:, 0] < -1.0, extreme, event.severity(z)))
    evidence = Surrogate().run(hostile, budget=4_000, seed=seed(0)).conclusion
    assert not math.isnan(evidence.log_prob)
    assert evidence.calls <= 4_000
    assert math.isfinite(evidence.log_prob)


def test_a_guide_that_knows_less_than_the_exploration_is_not_believed() -> None:
    """One of two modes is cut out of what the surrogate learns from: the draws at all scales have seen it."""
    event = boolean(half_space(2, 2.0))
    rng = np.random.default_rng(0)
    z = rng.standard_normal((2_000, 2))
    explored = Explored(Judged(z, event.severity(z)), np.zeros(2_000), 2_000)
    assert -5.0 < _floor(explored) < event.log_prob

    def line(log_prob: float, error: float, converged: bool) -> Evidence:
        ends = (log_prob - 2 * error, log_prob + 2 * error)
        return Evidence("surrogate", log_prob, error, ends, "unbiased", 0, 0.0, converged)

    meter = Meter(event, 100)
    right, low = line(event.log_prob, 0.02, True), line(event.log_prob - 3.0, 0.02, True)
    assert _verdict(meter, explored, right, line(event.log_prob + 0.05, 0.05, True)).converged
    assert not _verdict(meter, explored, low, line(event.log_prob - 3.0, 0.05, True)).converged
    assert not _verdict(meter, explored, right, line(event.log_prob + 1.0, 0.05, False)).converged
    assert _verdict(meter, explored, right, line(event.log_prob - 1.0, 0.05, False)).converged
    both = _verdict(meter, explored, line(event.log_prob - 1.0, 0.5, False), right)
    assert both.converged
    assert both.log_prob == right.log_prob
