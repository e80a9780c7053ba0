"""Splitting with moves that keep a prefix: against exact events."""

from __future__ import annotations

import math

import numpy as np
import pytest

from probest import Splitting
from probest.evidence import Code
from probest.testing import check_run
from probest.testing.events import ExactEvent, half_space, sphere, union


def seed(value: int) -> np.random.SeedSequence:
    return np.random.SeedSequence(value)


@pytest.mark.parametrize("event", [half_space(6, 3.5), union(4, (3.5,) * 4), sphere(5, 5.0)], ids=lambda e: e.name)
def test_its_mean_is_the_probability(event: ExactEvent) -> None:
    """Of P itself, over eight seeds; wrong once in 30,000."""
    runs = [Splitting(precision=None).run(event, budget=60_000, seed=seed(i)).conclusion for i in range(8)]
    ratio = np.array([math.exp(run.log_prob - event.log_prob) for run in runs])
    error = math.sqrt(np.mean([run.std_error**2 for run in runs]) / len(runs))
    assert abs(ratio.mean() - 1.0) < 4.0 * error
    assert np.mean([abs(run.log_prob - event.log_prob) < 2.0 * run.std_error for run in runs]) > 0.5
    assert all(run.interval[0] < run.log_prob < run.interval[1] for run in runs)


def test_a_run_is_a_run() -> None:
    event = half_space(6, 3.0)
    run = Splitting().run(event, budget=120_000, seed=seed(0))
    check_run(run, event, 120_000)
    assert run.conclusion.converged
    assert run.conclusion.particles is not None
    assert (run.conclusion.particles.z.mean(axis=1) * math.sqrt(6.0) >= 3.0 - 1e-9).all()
    assert len(run.conclusion.levels) > 2


@pytest.mark.parametrize("budget", [1, 30, 500, 3_000])
def test_too_small_a_budget_is_said(budget: int) -> None:
    event = half_space(6, 5.0)
    run = Splitting().run(event, budget=budget, seed=seed(0))
    check_run(run, event, budget)
    assert not run.conclusion.converged
    assert run.conclusion.codes & {Code.BUDGET_SPENT, Code.UNREACHED, Code.FEW_ANCESTORS, Code.IMPRECISE}


def test_a_severity_without_grades_is_said() -> None:
    event = ExactEvent("never", 3, -np.inf, lambda z: np.full(len(z), -1.0))
    run = Splitting().run(event, budget=20_000, seed=seed(0))
    assert run.conclusion.codes == {Code.FLAT, Code.NO_HITS}
    assert run.conclusion.log_prob == -np.inf
    assert run.calls == 20_000  # what is left bounds P
    assert run.conclusion.interval[1] < math.log(4.0 / 19_000)


def test_ties_are_levels_of_their_own() -> None:
    """A severity of whole numbers: how many of twelve coordinates are above 1."""
    p = 0.15865525393145707
    truth = math.log(sum(math.comb(12, k) * p**k * (1 - p) ** (12 - k) for k in range(7, 13)))
    event = ExactEvent("counts", 12, truth, lambda z: (z > 1.0).sum(axis=1) - 6.5)
    run = Splitting().run(event, budget=40_000, seed=seed(0)).conclusion
    assert abs(run.log_prob - truth) < 4.0 * run.std_error
    assert run.std_error < 0.2


@pytest.mark.parametrize("field", [{"particles": 4}, {"sweeps": 0}, {"survive": 1.0}, {"precision": 0.0}])
def test_settings_are_checked(field: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(field))):
        Splitting(**field)  # type: ignore[arg-type]
