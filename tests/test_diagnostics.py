"""Diagnostics against closed forms, quadrature and independent implementations."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import special, stats

from probest import diagnostics
from probest.testing import FAILURE_RATE


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


def test_log_sum_exp_survives_extremes() -> None:
    assert diagnostics.log_sum_exp(np.array([-1e5, -1e5])) == pytest.approx(-1e5 + math.log(2.0))
    assert diagnostics.log_sum_exp(np.array([])) == -math.inf
    assert diagnostics.log_sum_exp(np.full(3, -np.inf)) == -math.inf
    values = rng().normal(size=100) * 50
    assert diagnostics.log_sum_exp(values) == pytest.approx(float(special.logsumexp(values)))


def test_log_mean_exp_matches_the_plain_mean_and_its_error() -> None:
    w = rng().exponential(size=500)
    mean, error = diagnostics.log_mean_exp(np.log(w) - 700.0)
    assert mean == pytest.approx(math.log(w.mean()) - 700.0)
    assert error == pytest.approx(w.std(ddof=1) / w.mean() / math.sqrt(500))


def test_zero_weights_count_in_the_mean() -> None:
    mean, error = diagnostics.log_mean_exp(np.array([0.0, -np.inf, -np.inf, -np.inf]))
    assert mean == pytest.approx(math.log(0.25))
    assert error == pytest.approx(np.std([1, 0, 0, 0], ddof=1) / 0.25 / 2.0)
    assert diagnostics.log_mean_exp(np.full(4, -np.inf)) == (-math.inf, math.inf)


def test_effective_sample_size() -> None:
    assert diagnostics.effective_sample_size(np.full(7, -900.0)) == pytest.approx(7.0)
    assert diagnostics.effective_sample_size(np.array([0.0, -np.inf])) == pytest.approx(1.0)
    assert diagnostics.effective_sample_size(np.full(4, -np.inf)) == 0.0


@pytest.mark.parametrize("shape", [0.2, 0.5, 0.8, 1.2])
def test_khat_recovers_the_shape_of_a_pareto_tail(shape: float) -> None:
    n = 100_000
    log_w = -shape * np.log(rng(3).random(n))  # w = U^{-k}: exactly Pareto with shape k
    tail = 3.0 * math.sqrt(n)
    tolerance = stats.norm.isf(FAILURE_RATE / 2) * (1.0 + shape) / math.sqrt(tail)
    assert abs(diagnostics.pareto_khat(log_w + 500.0) - shape) < tolerance + 10.0 / tail


def test_smoothing_keeps_the_normaliser() -> None:
    log_w = 0.4 * rng(1).standard_normal(20_000) - 300.0
    smoothed, khat = diagnostics.pareto_smooth(log_w)
    assert khat < 0.5
    before, error = diagnostics.log_mean_exp(log_w)
    assert abs(diagnostics.log_mean_exp(smoothed)[0] - before) < error
    assert smoothed.max() <= log_w.max()


def test_khat_of_constant_and_of_too_few_weights() -> None:
    assert diagnostics.pareto_khat(np.zeros(1000)) == -math.inf
    assert diagnostics.pareto_khat(np.full(1000, -np.inf)) == math.inf
    assert diagnostics.pareto_khat(np.zeros(3)) == math.inf


@pytest.mark.parametrize(("hits", "n"), [(1, 10), (5, 1000), (999, 1000), (50, 100)])
def test_binomial_interval_inverts_the_binomial_tails(hits: int, n: int) -> None:
    low, high = np.exp(diagnostics.binomial_interval(hits, n))
    assert stats.binom.sf(hits - 1, n, low) == pytest.approx(0.025)
    assert stats.binom.cdf(hits, n, high) == pytest.approx(0.025)


def test_binomial_interval_at_zero_hits_is_an_upper_bound() -> None:
    low, high = diagnostics.binomial_interval(0, 100)
    assert low == -math.inf
    assert (1.0 - math.exp(high)) ** 100 == pytest.approx(0.05)
    assert diagnostics.binomial_interval(0, 10**12)[1] == pytest.approx(math.log(-math.log(0.05) / 1e12))
    with pytest.raises(ValueError, match="hits"):
        diagnostics.binomial_interval(3, 2)


@pytest.mark.parametrize("skew", [0.3, 0.8, 1.2])
def test_mean_interval_covers_for_lognormal_weights(skew: float) -> None:
    random = rng(5)
    repeats, n = 1000, 300
    covered = 0
    for _ in range(repeats):
        low, high = diagnostics.mean_interval(skew * random.standard_normal(n))
        covered += low <= 0.5 * skew**2 <= high
    assert covered >= stats.binom.ppf(FAILURE_RATE, repeats, 0.92)


def test_next_temperature_meets_its_target() -> None:
    log_l = rng(2).standard_normal(5000) * 3.0
    equal = np.zeros(5000)
    x = diagnostics.next_temperature(equal, lambda t: t * log_l, easy=0.0, hard=1.0, target=0.5)
    assert diagnostics.conditional_ess(equal, x * log_l) == pytest.approx(0.5, abs=1e-3)
    # for normal log-weights of variance v the share is exp(-v)
    assert x == pytest.approx(math.sqrt(math.log(2.0)) / 3.0, rel=0.1)
    assert diagnostics.next_temperature(equal, lambda t: 1e-9 * log_l, easy=0.0, hard=1.0, target=0.5) == 1.0


def test_conditional_ess_does_not_cancel_at_huge_increments() -> None:
    increment = np.array([-1e26, -2e26, -3e26])
    assert diagnostics.conditional_ess(np.zeros(3), increment) == pytest.approx(1.0 / 3.0)


@pytest.mark.parametrize("resample", [diagnostics.systematic_resample, diagnostics.stratified_resample])
def test_resampling_counts(resample: object) -> None:
    assert callable(resample)
    w = np.array([0.1, 0.0, 0.4, 0.5])
    with np.errstate(divide="ignore"):
        log_w = np.log(w) - 800.0
    counts = np.bincount(resample(log_w, 1000, rng(4)), minlength=4)
    assert counts[1] == 0
    assert np.abs(counts - 1000 * w).max() <= 2
    with pytest.raises(ValueError, match="log_w"):
        resample(np.full(3, -np.inf), 5, rng())
