"""Conditioned adversaries that are Gaussian given what was observed, against closed forms, in both libraries."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats
from scipy.special import log_ndtr

from probest import Problem, estimate
from tests.library import assert_same_event, gradient, library

NOISE = 0.5


def walk(lib: Any, seen: np.ndarray, drift: Any = None) -> Any:
    """Positions of a random walk, each seen with noise."""

    def adversary(params: Any = None) -> Any:
        steps = lib.sample("steps", lib.dist.Normal(lib.xp.zeros(len(seen)), 1.0).to_event(1))
        start = 0.0 if params is None else params["start"]
        positions = start + lib.xp.cumsum(steps, 0)
        lib.sample("seen", lib.dist.Normal(positions, NOISE).to_event(1), obs=lib.array(seen.astype(np.float32)))
        return positions

    return adversary if drift is None else lib.module(adversary, drift)


def posterior(seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of the positions given what was seen."""
    n = len(seen)
    prior = np.minimum.outer(np.arange(1.0, n + 1), np.arange(1.0, n + 1))
    gain = prior @ np.linalg.inv(prior + NOISE**2 * np.eye(n))
    return gain @ seen, prior - gain @ prior


def test_it_is_the_same_event_in_both_libraries() -> None:
    seen = np.cumsum(np.random.default_rng(20).standard_normal(20))
    assert_same_event(lambda lib: Problem(walk(lib, seen), lambda x: x, lambda _, y: y[-1] - 3.0))


@pytest.mark.parametrize(("steps", "beta"), [(20, 5.0), (50, 10.3)])
def test_a_state_space_with_many_observations_is_as_easy_as_a_half_space(
    any_backend: str, steps: int, beta: float
) -> None:
    """P down to 1e-25: within 0.1, in some thousands of calls, with evidence and catastrophes."""
    lib = library(any_backend)
    seen = np.cumsum(np.random.default_rng(steps).standard_normal(steps))
    mean, covariance = posterior(seen)
    limit = float(mean[-1] + math.sqrt(covariance[-1, -1]) * beta)
    result = estimate(Problem(walk(lib, seen), lambda x: x, lambda _, y: y[-1] - limit), progress=False)
    assert result.converged, result.advice
    assert abs(result.log_prob - log_ndtr(-beta)) < 0.1
    assert result.calls < 5_000
    prior = np.minimum.outer(np.arange(1.0, steps + 1), np.arange(1.0, steps + 1)) + NOISE**2 * np.eye(steps)
    expected = stats.multivariate_normal(np.zeros(steps), prior).logpdf(seen)
    assert result.conclusion.log_evidence == pytest.approx(expected, abs=0.02)
    assert result.catastrophes is not None
    last = np.cumsum(result.catastrophes["steps"], axis=1)[:, -1]
    assert (last >= limit - 1e-3).all()
    assert result.drawn is not None
    spread = np.cumsum(result.drawn["steps"], axis=1)[:, -1]
    assert np.average(spread) == pytest.approx(mean[-1], abs=5 * math.sqrt(covariance[-1, -1] / 200))


def test_its_gradient(any_backend: str) -> None:
    """In where the walk starts, which moves what is observed and what happens."""
    lib, steps, beta, h = library(any_backend), 8, 4.0, 1e-4
    seen = np.cumsum(np.random.default_rng(1).standard_normal(steps))
    mean, covariance = posterior(seen)
    sd = math.sqrt(covariance[-1, -1])
    limit = float(mean[-1] + sd * beta)
    adversary = walk(lib, seen, {"start": lib.array(0.0)})
    problem = Problem(adversary, lambda x: x, lambda _, y: y[-1] - limit)

    def exact(start: float) -> float:
        return float(log_ndtr((start + posterior(seen - start)[0][-1] - limit) / sd))

    found = []
    for number in range(16):
        result = estimate(problem, seed=number, progress=False)
        value, slopes = gradient(any_backend, result, adversary=adversary)
        assert value == pytest.approx(result.log_prob, abs=1e-4)
        found.append(slopes["start"])
    # some 60 particles each: one is off by 14 % of a term's size, the mean of sixteen by 3.5 %
    assert np.mean(found) == pytest.approx(
        (exact(h) - exact(-h)) / (2 * h), abs=0.15 * math.exp(stats.norm.logpdf(beta) - log_ndtr(-beta)) / sd
    )


def test_what_is_not_gaussian_is_estimated_as_before() -> None:
    """A scale that is drawn: the weight is no quadratic."""
    lib = library("pyro")

    def adversary() -> Any:
        x = lib.sample("x", lib.dist.Normal(lib.xp.zeros(3), 1.0).to_event(1))
        lib.sample("seen", lib.dist.Normal(x[0], lib.xp.exp(x[1] / 2)), obs=lib.array(1.0))
        return x

    result = estimate(Problem(adversary, lambda x: x, lambda _, y: y[2] - 2.0), budget=20_000, progress=False)
    assert abs(result.log_prob - log_ndtr(-2.0)) < 4 * result.std_error + 0.1
    assert any(line.method == "tempering" for line in result.ledger)


def test_earlier_catastrophes_say_where_to_look() -> None:
    lib = library("pyro")
    seen = np.cumsum(np.random.default_rng(3).standard_normal(6))
    mean, covariance = posterior(seen)
    limit = float(mean[-1] + math.sqrt(covariance[-1, -1]) * 4.0)
    problem = Problem(walk(lib, seen), lambda x: x, lambda _, y: y[-1] - limit)
    first = estimate(problem, progress=False)
    again = estimate(problem, warm_start=first, seed=1, progress=False)
    assert abs(again.log_prob - log_ndtr(-4.0)) < 0.1
