"""Kriging over the values of discrete sites: against enumeration, on both libraries."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from library import library
from scipy import special, stats

from models import transformer
from probest import Kriging, Problem, estimate
from probest.estimators.kriging import _capped, combinations
from probest.surrogates.kriging import Grid, Law, fit_law, krige
from probest.testing import check_run

LENGTH, VALUES = 7, 4
QUIET: dict[str, Any] = {"progress": False}


def seed(value: int) -> np.random.SeedSequence:
    return np.random.SeedSequence(value)


def tokens(backend: Any, rare: float = 1e-4, drawn: int = 0) -> tuple[Problem, float]:
    """Four to the seventh sequences; a score of single tokens and of neighbours has to reach a limit.

    rare: about how likely that is, where the score has several such sequences.
    """
    lib, rng = library(backend), np.random.default_rng(drawn)
    probs = rng.dirichlet(np.full(VALUES, 0.7), LENGTH).astype(np.float32)
    single, pair = rng.normal(size=(LENGTH, VALUES)), rng.normal(size=(LENGTH - 1, VALUES, VALUES))
    score = [lib.array(part.astype(np.float32)) for part in (single, pair)]
    at = lib.array(np.arange(LENGTH))

    every = np.indices((VALUES,) * LENGTH).reshape(LENGTH, -1).T
    total = single[np.arange(LENGTH), every].sum(1) + pair[np.arange(LENGTH - 1), every[:, :-1], every[:, 1:]].sum(1)
    log_p = np.log(probs / probs.sum(1, keepdims=True))[np.arange(LENGTH), every].sum(1)
    order = np.argsort(-total)
    count = max(3, int(np.searchsorted(np.logaddexp.accumulate(log_p[order]), math.log(rare))))
    limit = float(total[order[count - 1 : count + 1]].mean())

    def adversary() -> Any:
        return lib.sample("tokens", lib.dist.Categorical(lib.array(probs)).to_event(1))

    def severity(x: Any, y: Any) -> Any:
        return score[0][at, x].sum() + score[1][at[:-1], x[:-1], x[1:]].sum() - limit

    return Problem(adversary, lambda x: x, severity), float(special.logsumexp(log_p[total >= limit]))


def test_rare_sequences_are_found(any_backend: str) -> None:
    problem, truth = tokens(any_backend, 1e-7, drawn=5)
    assert truth < math.log(1e-6)
    result = estimate(problem, budget=2_000, **QUIET)
    assert result.conclusion.method == "kriging"
    assert result.calls <= 2_000
    assert abs(result.log_prob - truth) < 0.1, "45 of 16,384"
    assert result.lower <= truth + 1e-5
    assert truth <= result.upper
    assert result.catastrophes is not None
    assert (result.catastrophes.severity >= 0).all()


def test_errors_are_those_stated() -> None:
    errors = []
    for i in range(6):
        problem, truth = tokens("pyro", 1e-5, drawn=i)
        run = Kriging().run(problem.event, budget=1_500, seed=seed(i)).conclusion
        errors.append((run.log_prob - truth) / max(run.std_error, 1e-3))
        assert run.diagnostics["found"] <= truth + 1e-5, "what was found is a lower bound"
        assert not run.converged or abs(run.log_prob - truth) < 0.15
    assert np.max(np.abs(errors)) < 4.5


def test_a_budget_for_all_combinations_is_exact() -> None:
    problem, truth = tokens("pyro")
    run = Kriging().run(problem.event, budget=VALUES**LENGTH, seed=seed(0))
    check_run(run, problem.event, VALUES**LENGTH)
    assert run.conclusion.log_prob == pytest.approx(truth, abs=1e-5)
    assert run.conclusion.std_error == 0.0
    assert run.conclusion.converged


@pytest.mark.parametrize("budget", [1, 7, 150])
def test_the_budget_is_a_ceiling(budget: int) -> None:
    event = tokens("pyro")[0].event
    check_run(Kriging().run(event, budget=budget, seed=seed(0)), event, budget)


@pytest.mark.parametrize("backend", ["pyro", "numpyro"])
def test_counts_have_distances(backend: Any) -> None:
    lib = library(backend)

    def adversary() -> Any:
        return lib.sample("n", lib.dist.Binomial(5, lib.array(np.full(6, 0.03, dtype=np.float32))).to_event(1))

    problem = Problem(adversary, lambda x: x, lambda x, y: 1.0 * y.sum() - 5.5)
    result = estimate(problem, budget=4_000, **QUIET)
    truth = float(stats.binom.logsf(5, 30, 0.03))
    assert combinations(problem.event) == 6**6
    assert abs(result.log_prob - truth) < 4.0 * result.std_error + 1e-3
    assert result.converged


def test_it_needs_nothing_but_sites_that_are_listed() -> None:
    lib = library("pyro")
    normal = Problem(
        lambda: lib.sample("x", lib.dist.Normal(lib.xp.zeros(2), 1.0).to_event(1)), lambda x: x, lambda x, y: y[0] - 3.0
    )
    with pytest.raises(ValueError, match="Kriging needs a program of discrete sites alone"):
        Kriging().run(normal.event, budget=1_000, seed=seed(0))
    with pytest.raises(ValueError, match="at most most=100 combinations"):
        Kriging(most=100).run(tokens("pyro")[0].event, budget=1_000, seed=seed(0))


def test_the_mean_on_the_grid_is_that_of_the_process() -> None:
    rng = np.random.default_rng(0)
    grid = Grid(((0, 1, 2), (0, 1), (0, 1, 2, 5)), (False, False, True))
    every = np.array(list(itertools.product(range(3), range(2), range(4))))
    rows = rng.choice(24, 15, replace=False)
    y = rng.normal(size=15)
    law = Law(np.log([0.5, 0.7, 0.9]), 0.1)

    def correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        count = np.array([0, 1, 2, 5])
        d = np.stack(
            [
                a[:, None, 0] != b[None, :, 0],
                a[:, None, 1] != b[None, :, 1],
                np.abs(count[a[:, 2]][:, None] - count[b[:, 2]][None]),
            ],
            axis=-1,
        )
        return np.asarray(np.exp(d @ law.log_rho))

    def mean(at: np.ndarray, v: np.ndarray, y: np.ndarray, middle: float) -> np.ndarray:
        c = correlation(v, v) + law.noise * np.eye(len(v))
        return np.asarray(correlation(at, v) @ np.linalg.solve(c, y - middle) + middle)

    found = krige(grid, law, every[rows], y)
    np.testing.assert_allclose(found.mean, mean(every, every[rows], y, y.mean()), atol=1e-9)
    for i in range(15):
        others = np.delete(np.arange(15), i)
        left_out = mean(every[rows[i : i + 1]], every[rows[others]], y[others], float(y.mean()))
        assert found.left_out[i] == pytest.approx(left_out[0], abs=1e-9)


def test_elements_that_do_not_matter_are_told_apart() -> None:
    rng = np.random.default_rng(0)
    grid = Grid((tuple(range(5)),) * 3, (False,) * 3)
    v = rng.integers(0, 5, size=(200, 3))
    y = rng.normal(size=5)[v[:, 0]] + 0.3 * rng.normal(size=5)[v[:, 1]]
    rho = np.exp(fit_law(grid, v, y - y.mean(), None, 30).log_rho)
    assert rho[2] > 0.98
    assert rho[2] > rho[1] > rho[0]


def test_capped_probabilities_sum_to_what_is_asked() -> None:
    weight = np.random.default_rng(0).exponential(size=500) ** 6
    for total in (1.0, 37.5, 499.0):
        chance = _capped(weight, total)
        assert chance.sum() == pytest.approx(total, rel=1e-9)
        assert chance.max() <= 1.0
        low = chance < 1.0
        np.testing.assert_allclose(chance[low] / weight[low], (chance / weight)[low].max(), rtol=1e-9)
    assert (_capped(weight, 500.0) == 1.0).all()


@pytest.mark.parametrize("backend", ["pyro", "numpyro"])
def test_the_transformer_is_the_one_that_is_enumerated(backend: Any) -> None:
    rng = np.random.default_rng(0)
    event = transformer.problem(5, backend).event
    inputs, log_p = transformer.inputs()
    assert math.log(np.exp(log_p).sum()) == pytest.approx(0.0, abs=1e-9)
    rows = rng.choice(len(inputs), 200, replace=False)
    found = event.evaluate(np.zeros((200, event.dim)), held={"tokens": inputs[rows]})
    weights = transformer.network().weights
    logits = transformer.logits(weights, weights["embed"][inputs[rows]])
    lead = logits[:, 5] - np.delete(logits, 5, axis=1).max(axis=1)
    np.testing.assert_allclose(found.severity, lead, atol=1e-4)
    np.testing.assert_allclose(found.log_weight, log_p[rows], atol=1e-4)
    with pytest.raises(ValueError, match="target=64"):
        transformer.problem(64, backend)
