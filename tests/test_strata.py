"""Discrete sites that are held: exact answers by enumeration, on both libraries."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from library import assert_same_event, gradient, library, parameters
from scipy import integrate, special, stats

from probest import Combined, CrossEntropy, Problem, Stratified, Tempering, estimate
from probest.estimators.combined import Campaign
from probest.evidence import Code, Evidence, Run
from probest.programs.strata import strata_of
from probest.testing import check_run

QUIET: dict[str, Any] = {"progress": False}


def seed(value: int) -> np.random.SeedSequence:
    return np.random.SeedSequence(value)


def floats(lib: Any, values: Any) -> Any:
    return lib.array(np.asarray(values, dtype=np.float32))


def normals(lib: Any, n: int) -> Any:
    return lib.sample("x", lib.dist.Normal(lib.xp.zeros(n), 1.0).to_event(1))


def problem(adversary: Callable[[], Any], checker: Callable[[Any], Any], **rest: Any) -> Problem:
    return Problem(adversary, lambda x: x, lambda x, y: checker(y), **rest)


def switch(lib: Any, rate: float = 3e-4, **rest: Any) -> tuple[Problem, float]:
    """A rare switch brings the limit from 6.5 to 0.5 standard deviations."""
    axis = floats(lib, np.ones(15) / math.sqrt(15.0))

    def adversary() -> Any:
        return lib.sample("s", lib.dist.Bernoulli(floats(lib, rate)), **rest), normals(lib, 15)

    def checker(y: Any) -> Any:
        return lib.xp.sum(axis * y[1]) - lib.xp.where(y[0] == 1, floats(lib, 0.5), floats(lib, 6.5))

    truth = math.log(rate * stats.norm.sf(0.5) + (1.0 - rate) * stats.norm.sf(6.5))
    return problem(adversary, checker), truth


def half_spaces(lib: Any, count: int = 8, dim: int = 40) -> tuple[Problem, float]:
    rng = np.random.default_rng(0)
    normal = rng.standard_normal((count, dim))
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    betas = np.linspace(4.2, 6.8, count)

    def adversary() -> Any:
        return lib.sample("k", lib.dist.Categorical(floats(lib, np.full(count, 1.0 / count)))), normals(lib, dim)

    def checker(y: Any) -> Any:
        return lib.xp.sum(floats(lib, normal)[y[0]] * y[1]) - floats(lib, betas)[y[0]]

    return problem(adversary, checker), math.log(np.mean(stats.norm.sf(betas)))


def failures(lib: Any, *, boolean: bool = False, n: int = 10, rate: float = 1e-3) -> tuple[Problem, float]:
    def adversary() -> Any:
        return lib.sample("b", lib.dist.Bernoulli(floats(lib, np.full(n, rate))).to_event(1))

    def checker(y: Any) -> Any:
        return (1.0 * y).sum() >= 2 if boolean else (1.0 * y).sum() - 2.0

    return problem(adversary, checker), float(stats.binom.logsf(1, n, rate))


def nested(lib: Any) -> tuple[Problem, float]:
    """A second switch whose rate depends on the first; catastrophes almost only where both are on."""
    rates, limits = np.array([1e-4, 0.2]), np.array([[7.0, 5.5], [4.5, 1.0]])

    def adversary() -> Any:
        first = lib.sample("first", lib.dist.Bernoulli(floats(lib, 1e-3)))
        index = first if lib.name == "numpyro" else first.long()
        second = lib.sample("second", lib.dist.Bernoulli(floats(lib, rates)[index]))
        return first, second, normals(lib, 5)

    def checker(y: Any) -> Any:
        first, second = (lib.xp.where(value == 1, floats(lib, 1.0), floats(lib, 0.0)) for value in y[:2])
        a, b, c, d = (float(value) for value in limits.ravel())
        limit = (1 - first) * ((1 - second) * a + second * b) + first * ((1 - second) * c + second * d)
        return y[2][0] - limit

    p = np.array([[0.999 * (1 - rates[0]), 0.999 * rates[0]], [1e-3 * (1 - rates[1]), 1e-3 * rates[1]]])
    return problem(adversary, checker), math.log(np.sum(p * stats.norm.sf(limits)))


def closed_loop(lib: Any) -> tuple[Problem, float]:
    """The adversary runs the model itself; a rare fault makes its action worthless."""

    def adversary(model: Any) -> Any:
        fault = lib.sample("fault", lib.dist.Bernoulli(floats(lib, 1e-4)))
        wind = normals(lib, 4)
        return wind, lib.xp.where(fault == 1, floats(lib, 0.0), floats(lib, 1.0)) * model(wind)

    truth = math.log(1e-4 * stats.norm.sf(1.0) + (1.0 - 1e-4) * stats.norm.sf(6.0))
    built = Problem(adversary, lambda x: 0.0 * x.sum() + 5.0, lambda x, y: x[0] - 1.0 - y)
    return built, truth


def random_model(lib: Any) -> tuple[Problem, float]:
    """The model draws a rare fault of its own, which makes its action worthless."""

    def model(x: Any) -> Any:
        return lib.xp.where(lib.sample("fault", lib.dist.Bernoulli(floats(lib, 1e-4))) == 1, 0.0, 5.0) + 0.0 * x[0]

    truth = math.log(1e-4 * stats.norm.sf(1.0) + (1.0 - 1e-4) * stats.norm.sf(6.0))
    return Problem(lambda: normals(lib, 4), model, lambda x, y: x[0] - 1.0 - y), truth


def icy_loop(lib: Any) -> tuple[Problem, float]:
    """A closed loop, and the rarer the fault the warmer."""

    def adversary(model: Any) -> Any:
        t = lib.sample("t", lib.dist.Normal(floats(lib, 0.0), 1.0))
        fault = lib.sample("fault", lib.dist.Bernoulli(sigmoid(lib, -9.0 - t)))
        wind = normals(lib, 4)
        return wind, lib.xp.where(fault == 1, floats(lib, 0.0), floats(lib, 1.0)) * model(wind)

    fault = integrate.quad(lambda t: stats.norm.pdf(t) * special.expit(-9.0 - t), -12.0, 12.0)[0]
    truth = math.log(fault * stats.norm.sf(1.0) + (1.0 - fault) * stats.norm.sf(6.0))
    return Problem(adversary, lambda x: 0.0 * x.sum() + 5.0, lambda x, y: x[0] - 1.0 - y), truth


def component(lib: Any) -> tuple[Problem, float]:
    """A mixture whose rare component lies far out."""
    weights = np.array([1.0 - 1e-5, 1e-5])

    def adversary() -> Any:
        parts = lib.dist.Normal(floats(lib, [0.0, 12.0]), floats(lib, [1.0, 1.0]))
        return lib.sample("x", lib.dist.MixtureSameFamily(lib.dist.Categorical(floats(lib, weights)), parts))

    truth = math.log(weights @ stats.norm.sf([9.0, 9.0 - 12.0]))
    return problem(adversary, lambda y: y - 9.0), truth


def counts(lib: Any) -> tuple[Problem, float]:
    """Poisson arrivals, each of which lowers the limit."""

    def adversary() -> Any:
        return lib.sample("n", lib.dist.Poisson(floats(lib, 0.05))), normals(lib, 3)

    k = np.arange(30)
    truth = special.logsumexp(stats.poisson.logpmf(k, 0.05) + stats.norm.logsf(7.0 - 1.5 * k))
    return problem(adversary, lambda y: y[1][0] - (7.0 - 1.5 * y[0])), float(truth)


def negative_binomial(lib: Any) -> tuple[Problem, float]:
    """Arrivals at a rate that varies, two coordinates; the switch behind it has a column of its own."""

    def adversary() -> Any:
        law = lib.dist.GammaPoisson(floats(lib, 1.5), floats(lib, 20.0))
        n = lib.sample("n", law)
        return n, lib.sample("s", lib.dist.Bernoulli(floats(lib, 0.01))), normals(lib, 3)

    k = np.arange(300)
    terms = stats.nbinom.logpmf(k, 1.5, 20.0 / 21.0) + np.log(
        0.99 * stats.norm.sf(7.0 - 1.5 * k) + 0.01 * stats.norm.sf(5.0 - 1.5 * k)
    )
    return problem(adversary, lambda y: y[2][0] - (7.0 - 1.5 * y[0] - 2.0 * y[1])), float(special.logsumexp(terms))


def beta_binomial(lib: Any) -> tuple[Problem, float]:
    """Failures of parts from one batch, good or bad."""

    def adversary() -> Any:
        return lib.sample("n", lib.dist.BetaBinomial(floats(lib, 0.5), floats(lib, 50.0), total_count=20)), normals(
            lib, 2
        )

    k = np.arange(21)
    truth = special.logsumexp(stats.betabinom.logpmf(k, 20, 0.5, 50.0) + stats.norm.logsf(8.0 - k))
    return problem(adversary, lambda y: y[1][0] - (8.0 - y[0])), float(truth)


def zero_inflated(lib: Any) -> tuple[Problem, float]:
    """Mostly nothing comes; where something does, its count lowers the limit."""

    def adversary() -> Any:
        given = {"gate": floats(lib, 0.99), "rate": floats(lib, 1.0)}
        return lib.sample("n", lib.dist.ZeroInflatedPoisson(**given)), normals(lib, 2)

    k = np.arange(60)
    p = 0.01 * stats.poisson.pmf(k, 1.0) + 0.99 * (k == 0)
    return problem(adversary, lambda y: y[1][0] - (7.0 - y[0])), float(np.log(p @ stats.norm.sf(7.0 - k)))


def one_hot(lib: Any) -> tuple[Problem, float]:
    """A choice that comes as a vector; the switch behind it has a column of its own."""
    weights, limits = np.array([0.9, 0.0999, 1e-4]), np.array([6.0, 5.0, 1.0])

    def adversary() -> Any:
        kind = lib.sample("kind", lib.dist.OneHotCategorical(floats(lib, weights)))
        return kind, lib.sample("s", lib.dist.Bernoulli(floats(lib, 1e-3))), normals(lib, 3)

    def checker(y: Any) -> Any:
        return y[2][0] - lib.xp.sum(floats(lib, limits) * y[0]) + 2.0 * y[1]

    truth = math.log(weights @ (0.999 * stats.norm.sf(limits) + 1e-3 * stats.norm.sf(limits - 2.0)))
    return problem(adversary, checker), truth


def trigger(lib: Any, *, boolean: bool = False) -> tuple[Problem, float]:
    """Without the rare switch there is no catastrophe, and nothing varies."""

    def adversary() -> Any:
        return lib.sample("s", lib.dist.Bernoulli(floats(lib, 1e-4))), normals(lib, 8)

    def checker(y: Any) -> Any:
        if boolean:
            return (y[0] == 1) & (y[1][0] >= 3.0)
        return lib.xp.where(y[0] == 1, y[1][0] - 3.0, floats(lib, -1.0))

    return problem(adversary, checker), math.log(1e-4 * stats.norm.sf(3.0))


def unequal_failures(lib: Any) -> tuple[Problem, float]:
    """One failure and a gust, yes or no; after the failure of the last part, a weaker gust."""
    n, rate = 8, 3e-4

    def adversary() -> Any:
        return lib.sample("b", lib.dist.Bernoulli(floats(lib, np.full(n, rate))).to_event(1)), normals(lib, 2)

    def checker(y: Any) -> Any:
        failed, gust = 1.0 * y[0], y[1][0]
        return (failed.sum() >= 2) | ((failed.sum() >= 1) & (gust >= 3.0 - 0.7 * failed[n - 1]))

    one = rate * (1.0 - rate) ** (n - 1)
    single = one * ((n - 1) * stats.norm.sf(3.0) + stats.norm.sf(2.3))
    return problem(adversary, checker), math.log(single + stats.binom.sf(1, n, rate))


def sigmoid(lib: Any, x: Any) -> Any:
    return 1.0 / (1.0 + lib.xp.exp(-x))


def icy(lib: Any) -> tuple[Problem, float]:
    """The rarer the warmer: the probability of the switch depends on another draw, and so does the limit."""

    def adversary() -> Any:
        t = lib.sample("t", lib.dist.Normal(floats(lib, 0.0), 1.0))
        return t, lib.sample("ice", lib.dist.Bernoulli(sigmoid(lib, -6.0 - t))), normals(lib, 4)

    def joint(t: float) -> float:
        ice = special.expit(-6.0 - t)
        with_, without = stats.norm.sf(1.5 - 0.3 * t), stats.norm.sf(5.0 - 0.3 * t)
        return float(stats.norm.pdf(t) * (ice * with_ + (1.0 - ice) * without))

    truth = math.log(integrate.quad(joint, -10.0, 10.0, epsabs=0.0)[0])
    return problem(
        adversary, lambda y: y[2][0] + 0.3 * y[0] - lib.xp.where(y[1] == 1, floats(lib, 1.5), floats(lib, 5.0))
    ), truth


def read(lib: Any, weights: Any = (0.6, 0.399, 0.001)) -> tuple[Problem, float]:
    """A hidden class of which a noisy reading was observed."""
    right, limits = np.array([[0.9, 0.05, 0.05], [0.1, 0.8, 0.1], [0.02, 0.03, 0.95]]), np.array([5.0, 4.5, 2.0])

    def adversary() -> Any:
        k = lib.sample("k", lib.dist.Categorical(floats(lib, weights)))
        lib.sample("reading", lib.dist.Categorical(floats(lib, right)[k]), obs=lib.array(np.asarray(1)))
        return floats(lib, limits)[k], normals(lib, 3)

    joint = np.asarray(weights) * right[:, 1]
    return problem(adversary, lambda y: y[1][0] - y[0]), math.log(joint @ stats.norm.sf(limits) / joint.sum())


def measured(lib: Any) -> tuple[Problem, float]:
    """A hidden class, and a measurement of another draw that depends on it."""
    weights, limits, noise = np.array([0.7, 0.299, 0.001]), np.array([4.0, 3.5, 2.0]), 0.7

    def adversary() -> Any:
        k = lib.sample("k", lib.dist.Categorical(floats(lib, weights)))
        x = normals(lib, 2)
        lib.sample("reading", lib.dist.Normal(x[0] + 1.0 * k, noise), obs=floats(lib, 1.0))
        return floats(lib, limits)[k], x

    k, variance = np.arange(3), 1.0 + noise**2
    evidence = weights * stats.norm.pdf(1.0 - k, 0.0, math.sqrt(variance))
    mean, sd = (1.0 - k) / variance, math.sqrt(1.0 - 1.0 / variance)
    return problem(adversary, lambda y: y[1][0] - y[0]), math.log(
        evidence @ stats.norm.sf((limits - mean) / sd) / evidence.sum()
    )


def many_failures(lib: Any, *, n: int = 200, rate: float = 1e-5) -> tuple[Problem, float]:
    """Far more combinations than can be listed, none of which shows in any first look."""

    def adversary() -> Any:
        return lib.sample("b", lib.dist.Bernoulli(floats(lib, np.full(n, rate))).to_event(1))

    return problem(adversary, lambda y: (1.0 * y).sum() - 1.5), float(stats.binom.logsf(1, n, rate))


def long_chain(lib: Any, length: int = 9) -> tuple[Problem, float]:
    """Each state depends on the one before; each visit of the last brings the limit nearer."""
    move, start = np.array([[0.9, 0.09, 0.01], [0.3, 0.6, 0.1], [0.2, 0.3, 0.5]]), np.array([0.9, 0.09, 0.01])

    def adversary() -> Any:
        state = lib.sample("k0", lib.dist.Categorical(floats(lib, start)))
        visits = 1.0 * (state == 2)
        for i in range(1, length):
            state = lib.sample(f"k{i}", lib.dist.Categorical(floats(lib, move)[state]))
            visits = visits + 1.0 * (state == 2)
        return visits, normals(lib, 3)

    law = np.zeros((3, length + 1))  # of the state and the visits so far
    law[[0, 1, 2], [0, 0, 1]] = start
    for _ in range(1, length):
        law = move.T @ law
        law[2] = np.concatenate([[0.0], law[2, :-1]])
    truth = math.log(law.sum(axis=0) @ stats.norm.sf(7.0 - 0.8 * np.arange(length + 1)))
    return problem(adversary, lambda y: y[1][0] - 7.0 + 0.8 * y[0]), truth


@pytest.mark.parametrize("family", [many_failures, long_chain])
def test_combinations_too_many_to_list_are_guided(any_backend: str, family: Any) -> None:
    built, truth = family(library(any_backend))
    result = estimate(built, seed=0, **QUIET)
    assert result.ledger[-1].method == "cross-entropy"
    assert result.converged, result.advice
    assert abs(result.log_prob - truth) < 0.05 + 4.5 * result.std_error
    check_run(CrossEntropy().run(built.event, budget=20_000, seed=seed(2)), built.event, 20_000)


def test_the_guides_catastrophes_have_the_weights_of_the_adversary() -> None:
    """How often each of 16 elements is on, in catastrophes: by particles, and by the recursion of Poisson binomials."""
    lib = library("pyro")
    p = np.geomspace(1e-4, 0.1, 16)

    def upper_tail(p: np.ndarray, least: int) -> float:
        law = np.ones(1)
        for one in p:
            law = np.convolve(law, [1.0 - one, one])
        return float(law[least:].sum())

    exact = np.array([p[i] * upper_tail(np.delete(p, i), 2) for i in range(len(p))]) / upper_tail(p, 3)
    built = problem(lambda: lib.sample("b", lib.dist.Bernoulli(floats(lib, p)).to_event(1)), lambda y: y.sum() - 2.5)
    evidence = CrossEntropy().run(built.event, budget=30_000, seed=seed(0)).conclusion
    assert evidence.particles is not None
    on = built.event.site_values(evidence.particles.z)["b"]
    found = np.exp(evidence.particles.log_weight) @ on / np.exp(evidence.particles.log_weight).sum()
    assert np.abs(found - exact).max() < 0.08  # some 200 particles are worth an error of 0.03


@pytest.mark.parametrize("budget", [1, 50, 700, 3_000])
def test_the_guides_budget_is_a_ceiling(any_backend: str, budget: int) -> None:
    event = many_failures(library(any_backend))[0].event.replaced()
    run = CrossEntropy().run(event, budget=budget, seed=seed(0))
    assert run.calls == event.model_calls <= budget


def test_a_guide_over_discrete_sites_needs_some(any_backend: str) -> None:
    lib = library(any_backend)
    with pytest.raises(ValueError, match="CrossEntropy needs a program with discrete sites"):
        CrossEntropy().run(problem(lambda: normals(lib, 2), lambda y: y[0] - 3.0).event, budget=1_000, seed=seed(0))


FAMILIES = {
    "switch": switch,
    "icy": icy,
    "read": read,
    "measured": measured,
    "trigger": trigger,
    "trigger_boolean": lambda lib: trigger(lib, boolean=True),
    "unequal_failures": unequal_failures,
    "half_spaces": half_spaces,
    "failures": failures,
    "failures_boolean": lambda lib: failures(lib, boolean=True),
    "nested": nested,
    "closed_loop": closed_loop,
    "icy_loop": icy_loop,
    "random_model": random_model,
    "component": component,
    "counts": counts,
    "negative_binomial": negative_binomial,
    "beta_binomial": beta_binomial,
    "zero_inflated": zero_inflated,
    "one_hot": one_hot,
}


def test_the_nearest_case_comes_decoded_whether_or_not_it_is_a_catastrophe(backend: str) -> None:
    lib = library(backend)
    found, _ = switch(lib)
    nearest = estimate(found, budget=5_000, **QUIET).nearest
    assert nearest is not None
    assert nearest.severity >= 0.0
    assert float(nearest.sites["s"]) == 1.0  # with the switch the limit is at half a standard deviation
    along = float(np.sum(nearest.sites["x"])) / math.sqrt(15.0)
    assert 0.5 - 1e-5 <= along <= 1.0
    np.testing.assert_array_equal(nearest.observation[1], nearest.sites["x"])

    def never(y: Any) -> Any:
        return -1.0 - lib.xp.sum(y[1] ** 2) - 0.001 * y[0]

    safe = estimate(problem(found.adversary, never), budget=2_000, **QUIET).nearest
    assert safe is not None
    assert -1.5 < safe.severity < 0.0
    assert math.isclose(
        -1.0 - float(np.sum(safe.sites["x"] ** 2)) - 0.001 * float(safe.sites["s"]), safe.severity, rel_tol=1e-4
    )


IN_BOTH = ["switch", "half_spaces", "closed_loop", "counts"]


def made(lib: Any, family: str) -> tuple[Problem, float]:
    if family == "one_hot" and lib.name == "numpyro":
        pytest.skip("NumPyro has no OneHotCategorical")
    return FAMILIES[family](lib)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_same_event_in_both_libraries(family: str) -> None:
    assert_same_event(lambda lib: made(lib, family)[0])


@pytest.mark.parametrize(
    ("backend", "family"),
    [("pyro", family) for family in FAMILIES] + [("numpyro", family) for family in IN_BOTH],
    indirect=["backend"],
)
def test_a_rare_value_cannot_hide(backend: str, family: str) -> None:
    """In NumPyro for each sort of program; of the others, the estimator is handed the same numbers (above)."""
    built, truth = made(library(backend), family)
    result = estimate(built, seed=1, **QUIET)
    assert result.ledger[-1].method == "stratified"
    assert result.converged, result.advice
    assert abs(result.log_prob - truth) < 0.05 + 4.5 * result.std_error
    dear = built.event.boolean or family in ("icy", "icy_loop")
    most = {"measured": 50_000, "negative_binomial": 10_000}.get(family, 45_000 if dear else 5_000)
    assert result.calls <= most
    check_run(Run(tuple(result.ledger), result.calls), built.event, most)


def many_kinds(lib: Any, count: int = 5_000) -> tuple[Problem, float]:
    """One of thousands of kinds is bad: more than strata usually are."""

    def adversary() -> Any:
        return lib.sample("k", lib.dist.Categorical(floats(lib, np.full(count, 1.0 / count)))), normals(lib, 3)

    truth = math.log(stats.norm.sf(0.5) / count + (1.0 - 1.0 / count) * stats.norm.sf(6.5))
    limit = lambda k: lib.xp.where(k == 4321, floats(lib, 0.5), floats(lib, 6.5))  # noqa: E731
    return problem(adversary, lambda y: y[1][0] - limit(y[0])), truth


def wide_count(lib: Any) -> tuple[Problem, float]:
    """A count that takes thousands of values is nearly continuous, and held by no strata."""

    def adversary() -> Any:
        law = (
            lib.dist.Geometric(floats(lib, 0.01)) if lib.name == "pyro" else lib.dist.GeometricProbs(floats(lib, 0.01))
        )
        return lib.sample("n", law), normals(lib, 3)

    n = np.arange(6_000)
    truth = special.logsumexp(stats.geom.logpmf(n + 1, 0.01) + stats.norm.logsf(9.0 - 0.01 * n))
    return problem(adversary, lambda y: y[1][0] - 9.0 + 0.01 * y[0]), float(truth)


def late_switch(lib: Any) -> tuple[Problem, float]:
    """The checker draws the switch."""

    def checker(x: Any, y: Any) -> Any:
        del x
        return y[0] - 6.5 + 6.0 * lib.sample("late", lib.dist.Bernoulli(floats(lib, 1e-4)))

    truth = math.log(1e-4 * stats.norm.sf(0.5) + (1.0 - 1e-4) * stats.norm.sf(6.5))
    return Problem(lambda: normals(lib, 3), lambda x: x, checker), truth


@pytest.mark.parametrize("family", [many_kinds, wide_count, late_switch, many_failures])
def test_larger_ones_are_the_same_events_in_both_libraries(family: Any) -> None:
    assert_same_event(lambda lib: family(lib)[0])


@pytest.mark.parametrize("family", [many_kinds, wide_count, late_switch])
def test_nothing_hides_where_strata_are_not_the_usual_ones(any_backend: str, family: Any) -> None:
    built, truth = family(library(any_backend))
    result = estimate(built, seed=0, **QUIET)
    assert result.converged, result.advice
    assert abs(result.log_prob - truth) < 0.05 + 4.5 * result.std_error


def test_values_that_no_stratum_holds_are_looked_at_once(any_backend: str) -> None:
    """Thirteen switches beside an observation: too many for strata, and no guide learns conditioned ones."""
    lib = library(any_backend)
    rates = np.append(np.full(12, 0.3), 1e-5)

    def adversary() -> Any:
        x = normals(lib, 3)
        lib.sample("reading", lib.dist.Normal(x[1], 1.0), obs=floats(lib, 0.5))
        return lib.sample("b", lib.dist.Bernoulli(floats(lib, rates)).to_event(1)), x

    built = problem(adversary, lambda y: y[1][0] - 6.5 + 6.0 * y[0][12])
    truth = math.log(1e-5 * stats.norm.sf(0.5) + (1.0 - 1e-5) * stats.norm.sf(6.5))
    for i in range(2):
        result = estimate(built, budget=20_000, seed=i, **QUIET)
        right = abs(result.log_prob - truth) < 0.1 + 3.0 * result.std_error
        assert right or not result.converged
        assert result.lower <= truth <= result.upper
        assert result.calls <= 20_000
    few = estimate(built, budget=100, seed=0, **QUIET)
    assert not few.converged


def test_strata_are_shown_with_their_exact_probabilities(backend: str) -> None:
    strata = nested(library(backend))[0].strata
    assert strata is not None
    assert len(strata) == 4
    expected = {(0, 0): 0.999 * (1 - 1e-4), (0, 1): 0.999 * 1e-4, (1, 0): 1e-3 * 0.8, (1, 1): 1e-3 * 0.2}
    for k in range(4):
        values, log_prob = strata[k]
        key = int(values["first"]), int(values["second"])
        assert math.exp(log_prob) == pytest.approx(expected[key], rel=1e-5)
    assert "first=" in repr(strata)
    assert list(strata.free) == [2, 3, 4, 5, 6]


def test_counts_without_an_end_have_a_bounded_tail(backend: str) -> None:
    strata = counts(library(backend))[0].strata
    assert strata is not None
    assert strata.left_out < -100.0
    assert special.logsumexp(strata.log_prob) == pytest.approx(0.0, abs=1e-5)


def test_catastrophes_come_out_with_their_discrete_values(backend: str) -> None:
    built, _ = nested(library(backend))
    result = estimate(built, seed=0, **QUIET)
    found = result.catastrophes
    assert found is not None
    assert (found.severity >= 0.0).all()
    both = (np.asarray(found["first"]) == 1) & (np.asarray(found["second"]) == 1)
    share = float(found.weights @ both)
    limits = np.array([[7.0, 5.5], [4.5, 1.0]])
    p = np.array([[0.999 * (1 - 1e-4), 0.999 * 1e-4], [1e-3 * 0.8, 1e-3 * 0.2]]) * stats.norm.sf(limits)
    assert share == pytest.approx(p[1, 1] / p.sum(), abs=0.02)


@pytest.mark.parametrize("family", ["negative_binomial", "one_hot"])
def test_sites_of_other_shapes_come_out_with_their_values(backend: str, family: str) -> None:
    """A count of two coordinates and a choice that is a vector, and a switch after either."""
    built, truth = made(library(backend), family)
    result = estimate(built, seed=0, **QUIET)
    found = result.catastrophes
    assert found is not None
    assert (found.severity >= 0.0).all()
    with_switch = float(found.weights @ (np.asarray(found["s"]) == 1))
    if family == "one_hot":
        first, p = np.asarray(found["kind"])[:, 2], np.array([0.9, 0.0999, 1e-4])
        exact = (
            1e-3 * p @ stats.norm.sf([4.0, 3.0, -1.0]),
            1e-4 * (0.999 * stats.norm.sf(1.0) + 1e-3 * stats.norm.sf(-1.0)),
        )
        assert float(found.weights @ first) == pytest.approx(exact[1] / math.exp(truth), abs=0.03)
        assert with_switch == pytest.approx(exact[0] / math.exp(truth), abs=0.03)
    else:
        k = np.arange(300)
        law = stats.nbinom.pmf(k, 1.5, 20.0 / 21.0)
        joint = law * (0.99 * stats.norm.sf(7.0 - 1.5 * k) + 0.01 * stats.norm.sf(5.0 - 1.5 * k)) / math.exp(truth)
        assert float(found.weights @ np.asarray(found["n"])) == pytest.approx(joint @ k, abs=0.15)
        assert with_switch == pytest.approx(0.01 * law @ stats.norm.sf(5.0 - 1.5 * k) / math.exp(truth), abs=0.03)


def test_the_gradient_reaches_the_probability_of_a_switch(backend: str) -> None:
    lib = library(backend)

    def program(params: Any) -> Any:
        s = lib.sample("s", lib.dist.Bernoulli(params["rate"]))
        return s, normals(lib, 3)

    adversary = lib.module(program, {"rate": floats(lib, 0.01)})
    built = problem(
        adversary,
        lambda y: y[1][0] - lib.xp.where(y[0] == 1, floats(lib, 2.0), floats(lib, 5.0)),
    )
    result = estimate(built, seed=0, **QUIET)
    on, off = stats.norm.sf(2.0), stats.norm.sf(5.0)
    truth = (on - off) / (0.01 * on + 0.99 * off)
    _, slopes = gradient(backend, result, adversary=adversary)
    assert slopes["rate"] == pytest.approx(truth, rel=0.02)
    assert set(parameters(adversary)) == {"rate"}


@pytest.mark.parametrize("observed", [False, True])
def test_the_gradient_reaches_the_probabilities_of_a_choice(backend: str, observed: bool) -> None:
    """With a reading of it that was observed, too: log P is then a difference of two logarithms."""
    lib = library(backend)
    p, limits, reading = np.array([0.6, 0.39, 0.01]), np.array([4.5, 4.0, 2.0]), np.array([0.5, 0.2, 0.9])

    def program(params: Any) -> Any:
        k = lib.sample("k", lib.dist.Categorical(logits=params["logits"]))
        if observed:
            lib.sample("reading", lib.dist.Bernoulli(floats(lib, reading)[k]), obs=floats(lib, 1.0))
        return k, normals(lib, 3)

    adversary = lib.module(program, {"logits": floats(lib, np.log(p))})
    result = estimate(problem(adversary, lambda y: y[1][0] - floats(lib, limits)[y[0]]), seed=0, **QUIET)
    assert result.converged, result.advice
    _, slopes = gradient(backend, result, adversary=adversary)

    def share(weight: np.ndarray) -> np.ndarray:
        return np.asarray(weight / weight.sum())

    given = share(p * reading) if observed else p
    truth = share(given * stats.norm.sf(limits)) - given
    assert slopes["logits"] == pytest.approx(truth, abs=0.02 * np.abs(truth).max())


def test_a_site_can_be_left_out(any_backend: str) -> None:
    lib = library(any_backend)
    assert switch(lib, infer={"enumerate": False})[0].strata is None
    ledger = estimate(switch(lib, rate=0.3)[0], max_strata=1, seed=0, **QUIET).ledger
    assert ledger[-1].method == "combined"


def test_programs_without_strata_are_as_before(any_backend: str) -> None:
    lib = library(any_backend)

    built = Problem(lambda: normals(lib, 2), lambda x: x[1], lambda x, y: y - 3.0)
    assert built.strata is None
    run = Stratified().run(built.event, budget=5_000, seed=seed(0))
    assert run.conclusion.method == "combined"
    left = 5_000 - (run.calls - run.conclusion.calls)
    assert Combined().run(built.event, budget=left, seed=seed(0)).conclusion.log_prob == run.conclusion.log_prob


def test_more_sites_than_can_be_listed_are_held_as_far_as_they_go(any_backend: str) -> None:
    lib = library(any_backend)

    def adversary() -> Any:
        many = lib.sample("many", lib.dist.Bernoulli(floats(lib, np.full(40, 0.1))).to_event(1))
        return lib.sample("s", lib.dist.Bernoulli(floats(lib, 1e-4))), many, normals(lib, 4)

    built = problem(adversary, lambda y: y[2][0] + 0.01 * (1.0 * y[1]).sum() - 6.0 + 5.5 * y[0])
    strata = built.strata
    assert strata is not None
    assert [site.name for site in strata.sites] == ["s"]
    k = np.arange(41)
    mixed = [
        special.logsumexp(stats.binom.logpmf(k, 40, 0.1) + stats.norm.logsf(limit - 0.01 * k)) for limit in (6.0, 0.5)
    ]
    truth = special.logsumexp([math.log(1 - 1e-4) + mixed[0], math.log(1e-4) + mixed[1]])
    result = estimate(built, seed=0, budget=20_000, **QUIET)
    assert abs(result.log_prob - truth) < 0.05 + 4.5 * result.std_error


def test_what_the_budget_does_not_reach_is_in_the_interval(any_backend: str) -> None:
    lib = library(any_backend)
    built, truth = half_spaces(lib, count=64, dim=5)
    run = Stratified().run(built.event, budget=1_000, seed=seed(0))
    check_run(run, built.event, 1_000)
    conclusion = run.conclusion
    assert not conclusion.converged
    assert conclusion.interval[1] >= truth
    assert conclusion.codes & {Code.UNSEEN, Code.NO_HITS, Code.UNREACHED}


@pytest.mark.parametrize(("top", "converged"), [(-9.5, True), (-4.0, False)])
def test_a_stratum_that_is_not_converged_counts_with_all_that_it_may_hold(
    any_backend: str, monkeypatch: pytest.MonkeyPatch, top: float, converged: bool
) -> None:
    """Both are as likely; the second seems to hold a thousandth of P, and may hold a hundredth, or more than all."""
    built, _ = half_spaces(library(any_backend), count=2, dim=4)

    def spend(self: Campaign, budget: int) -> Run:
        sure = self.source.k == 0
        low, log_prob, high = (-5.1, -5.0, -4.9) if sure else (-14.0, -12.0, top)
        found = Evidence("made up", log_prob, 0.05 if sure else 0.8, (low, high), "consistent", budget, 0.0, sure)
        return Run((found,), budget)

    monkeypatch.setattr(Campaign, "spend", spend)
    conclusion = Stratified().run(built.event, budget=4_000, seed=seed(0)).conclusion
    assert conclusion.log_prob == pytest.approx(np.logaddexp(-5.0, -12.0) + math.log(0.5), abs=1e-6)
    assert conclusion.std_error == pytest.approx(0.05, abs=0.002)
    assert conclusion.converged == converged
    assert (Code.UNREACHED in conclusion.codes) != converged
    assert converged or conclusion.interval[1] >= math.log(0.5) + top - 0.1


@pytest.mark.parametrize(("budget", "taught"), [(4_000, False), (80_000, True)])
def test_strata_that_are_worth_it_are_taught(
    any_backend: str, monkeypatch: pytest.MonkeyPatch, budget: int, taught: bool
) -> None:
    """A student takes seconds; what it learns from is kept for all strata together."""
    built, _ = half_spaces(library(any_backend), count=2, dim=4)
    seen = []

    def spend(self: Campaign, budget: int) -> Run:
        seen.append((self.method.taught, self._watched, self.event.most))  # type: ignore[attr-defined]
        return Run((Evidence("made up", -5.0, 0.01, (-5.02, -4.98), "consistent", budget, 0.0, True),), budget)

    monkeypatch.setattr(Campaign, "spend", spend)
    Stratified().run(built.event, budget=budget, seed=seed(0))
    most = Combined().tuning.most_kept
    assert seen == [(taught, taught, most)] * 2


def test_other_methods_work_within_strata(any_backend: str) -> None:
    built, truth = half_spaces(library(any_backend), count=3, dim=4)
    method = Stratified(precision=None, inner=Combined())
    assert Tempering().run(built.event, budget=20_000, seed=seed(0)).conclusion.method == "tempering"
    conclusion = method.run(built.event, budget=6_000, seed=seed(0)).conclusion
    assert abs(conclusion.log_prob - truth) < 0.1


def test_an_interrupted_run_keeps_its_strata(any_backend: str) -> None:
    built, _ = half_spaces(library(any_backend), count=8, dim=5)
    event = built.event.replaced()

    def stop(calls: int) -> None:
        if calls > 500:
            raise KeyboardInterrupt

    event.on_calls = stop
    conclusion = Stratified().run(event, budget=20_000, seed=seed(0)).conclusion
    assert Code.INTERRUPTED in conclusion.codes
    assert not conclusion.converged
    assert math.isfinite(conclusion.log_prob)


@pytest.mark.parametrize(("field", "value"), [("precision", 0.0), ("max_strata", 1)])
def test_settings_are_checked(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        Stratified(**{field: value})


@pytest.mark.parametrize("budget", [1, 2, 3, 4, 7, 40, 300])
def test_the_budget_is_a_ceiling(any_backend: str, budget: int) -> None:
    event = switch(library(any_backend))[0].event.replaced()
    check_run(Stratified().run(event, budget=budget, seed=seed(0)), event, budget)


def test_listing_the_strata_of_a_closed_loop_is_paid_for_even_in_vain(any_backend: str) -> None:
    lib = library(any_backend)

    def adversary(model: Any) -> Any:  # few draws agree with what was observed, so that there are no strata
        x = normals(lib, 2)
        lib.sample("reading", lib.dist.Normal(x[0], 1e-3), obs=floats(lib, 3.0))
        return x, model(x) + lib.sample("s", lib.dist.Bernoulli(sigmoid(lib, x[0])))

    event = Problem(adversary, lambda x: x[1], lambda x, y: y - 3.5).event.replaced()
    run = Stratified().run(event, budget=3_000, seed=seed(0))
    assert strata_of(event.replaced()) is None
    assert run.conclusion.method == "combined"
    assert run.calls == event.model_calls <= 3_000


def test_a_warm_start_reaches_the_inner_method_where_there_are_no_strata(any_backend: str) -> None:
    lib = library(any_backend)

    def adversary() -> Any:  # a measurement so precise that no draw of the adversary meets it
        k = lib.sample("k", lib.dist.Bernoulli(floats(lib, 0.3)))
        x = normals(lib, 3)
        lib.sample("seen", lib.dist.Normal(x, 0.02).to_event(1), obs=floats(lib, [0.5, 0.5, 0.5]))
        return k, x

    built = problem(adversary, lambda y: y[1][0] + 0.5 * y[0] - 0.9)
    first = estimate(built, budget=6_000, seed=0, **QUIET)
    cold, warm = (estimate(built, budget=6_000, seed=1, warm_start=start, **QUIET) for start in (None, first))
    assert warm.ledger[-1].method == "combined"
    assert warm.log_prob != cold.log_prob
