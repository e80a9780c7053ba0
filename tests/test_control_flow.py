"""Sites inside NumPyro's scan and cond, against Gaussian closed forms and enumeration."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.contrib.control_flow import cond, scan
from scipy import special, stats

from probest import Problem, estimate
from probest.programs.base import SiteError

STEPS = 8
READINGS = np.linspace(0.0, 2.0, STEPS)
MOVE = np.array([[0.95, 0.05], [0.3, 0.7]])


def problem(adversary: Callable[[], Any], checker: Callable[[Any], Any]) -> Problem:
    return Problem(adversary, lambda x: x, lambda x, y: checker(y))


def walk() -> tuple[Problem, float]:
    """A site within, a site outside and a deterministic one."""

    def step(x: Any, _: Any) -> Any:
        x = 0.9 * x + numpyro.sample("gust", dist.Normal(0.0, 1.0))
        return x, numpyro.deterministic("place", x)

    def adversary() -> Any:
        return scan(step, numpyro.sample("start", dist.Normal(0.0, 1.0)), jnp.arange(STEPS))[1]

    variance = 1.0
    for _ in range(STEPS):
        variance = 0.81 * variance + 1.0
    return problem(adversary, lambda y: y[-1] - 10.0), float(stats.norm.logsf(10.0 / math.sqrt(variance)))


def _filtered() -> tuple[float, float]:
    mean, variance = 0.0, 0.0
    for y in READINGS:
        mean, variance = 0.9 * mean, 0.81 * variance + 1.0
        gain = variance / (variance + 0.25)
        mean, variance = mean + gain * (y - mean), (1.0 - gain) * variance
    return mean, variance


def readings(conditioned: bool) -> tuple[Problem, float]:
    """A state space with observations, by obs= or by a handler around the program; no xs but a length."""

    def step(carry: Any, y: Any) -> Any:
        x = numpyro.sample("x", dist.Normal(0.9 * carry, 1.0))
        numpyro.sample("y", dist.Normal(x, 0.5), obs=y)
        return x, x

    def adversary() -> Any:
        xs = None if conditioned else jnp.asarray(READINGS)
        return scan(step, 0.0, xs, length=STEPS)[1]

    program = handlers.condition(adversary, data={"y": READINGS}) if conditioned else adversary
    mean, variance = _filtered()
    return problem(program, lambda y: y[-1] - 4.0), float(stats.norm.logsf((4.0 - mean) / math.sqrt(variance)))


def hidden_chain() -> tuple[Problem, float]:
    """A chain of switches, each of which depends on the one before."""

    def step(state: Any, _: Any) -> Any:
        state = numpyro.sample("state", dist.Categorical(jnp.asarray(MOVE)[state]))
        return state, numpyro.sample("reading", dist.Normal(2.0 * state, 1.0))

    law = {(0, 0): 1.0}
    for _ in range(STEPS):
        after: dict[tuple[int, int], float] = {}
        for (state, visits), p in law.items():
            for to in (0, 1):
                key = to, visits + to
                after[key] = after.get(key, 0.0) + p * MOVE[state, to]
        law = after
    terms = [math.log(p) + stats.norm.logsf((20.0 - 2.0 * k) / math.sqrt(STEPS)) for (_, k), p in law.items()]
    return problem(lambda: scan(step, 0, jnp.arange(STEPS))[1], lambda y: y.sum() - 20.0), special.logsumexp(terms)


def branches() -> tuple[Problem, float]:
    """A rare switch chooses the law of a site."""

    def adversary() -> Any:
        s = numpyro.sample("s", dist.Bernoulli(1e-4))
        near = lambda _: numpyro.sample("x", dist.Normal(4.0, 1.0))  # noqa: E731
        far = lambda _: numpyro.sample("x", dist.Laplace(0.0, 0.2))  # noqa: E731
        return cond(s == 1, near, far, None)

    terms = math.log(1e-4) + stats.norm.logsf(1.0), math.log1p(-1e-4) + stats.laplace.logsf(5.0, scale=0.2)
    return problem(adversary, lambda y: y - 5.0), float(np.logaddexp(*terms))


def switches_in_branches() -> tuple[Problem, float]:
    """A rare switch chooses how rare another is."""

    def adversary() -> Any:
        s = numpyro.sample("s", dist.Bernoulli(1e-4))
        often = lambda _: numpyro.sample("k", dist.Bernoulli(0.5))  # noqa: E731
        seldom = lambda _: numpyro.sample("k", dist.Bernoulli(1e-6))  # noqa: E731
        return cond(s == 1, often, seldom, None)

    return problem(adversary, lambda y: y - 1.0), math.log(1e-4 * 0.5 + (1.0 - 1e-4) * 1e-6)


def nested() -> tuple[Problem, float]:
    """A scan of scans, backwards, with a plate and a choice within."""

    def inner(x: Any, _: Any) -> Any:
        with numpyro.plate("twins", 2):
            x = x + numpyro.sample("gust", dist.Normal(jnp.zeros(2), 1.0))
        return x, None

    def outer(x: Any, t: Any) -> Any:
        x, _ = scan(inner, x, jnp.arange(2))
        jump = cond(
            t > 0,
            lambda _: numpyro.sample("jump", dist.Normal(0.0, 1.0)),
            lambda _: numpyro.sample("jump", dist.Normal(0.0, 2.0)),
            None,
        )
        return x + jump, x

    def adversary() -> Any:
        return scan(outer, jnp.zeros(2), jnp.arange(3), reverse=True)[0]

    deviation = math.sqrt(12.0 + 24.0)  # of the sum of both: 12 gusts, and twice each of three jumps
    return problem(adversary, lambda y: y.sum() - 24.0), float(stats.norm.logsf(24.0 / deviation))


CASES: dict[str, Callable[[], tuple[Problem, float]]] = {
    "walk": walk,
    "readings": lambda: readings(False),
    "conditioned": lambda: readings(True),
    "hidden chain": hidden_chain,
    "branches": branches,
    "switches in branches": switches_in_branches,
    "nested": nested,
}


@pytest.mark.parametrize("case", CASES)
def test_the_estimate_is_that_of_the_closed_form(case: str) -> None:
    built, truth = CASES[case]()
    result = estimate(built, budget=20_000, seed=0, progress=False)
    assert result.converged, str(result)
    assert result.lower <= truth <= result.upper
    assert result.log_prob == pytest.approx(truth, abs=0.1)


def test_sites_within_are_sites_of_the_program() -> None:
    built, _ = walk()
    assert {site.name: site.base_shape for site in built.event.sites} == {"start": (), "gust": (STEPS,)}
    z = np.random.default_rng(0).standard_normal((3, built.event.dim))
    cases = built.event.decode(z)
    place = z[:, 0]
    for t in range(STEPS):
        place = 0.9 * place + z[:, 1 + t]
        np.testing.assert_allclose(cases.sites["place"][:, t], place, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(cases.sites["gust"], z[:, 1:], rtol=1e-6)


def test_held_sites_within_add_their_density() -> None:
    built, _ = hidden_chain()
    paths = np.array(list(itertools.product((0, 1), repeat=STEPS)))
    before = np.concatenate([np.zeros((len(paths), 1), dtype=int), paths[:, :-1]], axis=1)
    log_p = built.event.log_density(np.zeros((len(paths), built.event.dim)), {"state": paths.astype(np.int32)})
    np.testing.assert_allclose(log_p, np.log(MOVE[before, paths]).sum(axis=1), rtol=1e-5, atol=1e-5)


def test_catastrophes_come_with_the_values_of_every_step() -> None:
    """Catastrophes of the hidden chain have the visits that enumeration says."""
    built, _ = hidden_chain()
    result = estimate(built, budget=20_000, seed=0, progress=False)
    found = result.catastrophes
    assert found is not None
    assert found["state"].shape[1:] == found["reading"].shape[1:] == (STEPS,)
    assert (found["reading"].sum(axis=1) >= 20.0 - 1e-4).all()
    visits = float(found.weights @ found["state"].sum(axis=1))
    assert visits > 6.0  # where 8 of 8 would be most and D has 1.2 on average


def test_the_gaussianized_program_is_an_ordinary_program() -> None:
    built, _ = readings(False)
    seen = handlers.trace(handlers.seed(built.gaussianized, 0)).get_trace()
    assert seen["x_base"]["value"].shape == (STEPS,)
    assert seen["x"]["type"] == "deterministic"
    assert seen["y"]["is_observed"]
    z = seen["x_base"]["value"]
    x, total = 0.0, 0.0
    for t in range(STEPS):
        x = 0.9 * x + z[t]
        total += stats.norm.logpdf(READINGS[t], x, 0.5)
    log_p, _ = numpyro.infer.util.log_density(handlers.seed(built.gaussianized, 0), (), {}, {"x_base": z})
    assert float(log_p) == pytest.approx(total + stats.norm.logpdf(z).sum(), rel=1e-5)


def _with_param() -> Any:
    def step(x: Any, _: Any) -> Any:
        return x + numpyro.param("scale", 1.0) * numpyro.sample("gust", dist.Normal(0.0, 1.0)), None

    return scan(step, 0.0, jnp.arange(3))[0]


def _different_branches() -> Any:
    s = numpyro.sample("s", dist.Normal())
    return cond(s > 0, lambda _: numpyro.sample("x", dist.Normal()), lambda _: numpyro.sample("y", dist.Normal()), None)


def _substituted() -> Any:
    return handlers.substitute(walk()[0].adversary, data={"gust": jnp.zeros(STEPS)})()


def _named_twice() -> Any:
    def step(x: Any, _: Any) -> Any:
        return x + numpyro.sample("x", dist.Normal()), numpyro.sample("x", dist.Normal())

    return scan(step, 0.0, jnp.arange(3))[0]


@pytest.mark.parametrize(
    ("adversary", "words"),
    [
        (_with_param, "'scale' stands inside numpyro's scan"),
        (_different_branches, "'x', 'y' are not the same in both branches"),
        (_substituted, "substitutes or replays sites inside numpyro's scan"),
        (_named_twice, "'x' is named twice"),
    ],
)
def test_what_cannot_be_done_is_said(adversary: Callable[[], Any], words: str) -> None:
    with pytest.raises(SiteError, match=words):
        problem(adversary, lambda y: y).event  # noqa: B018


def test_gradients_go_through_a_scan() -> None:
    built, _ = walk()
    z = np.random.default_rng(1).standard_normal((2, built.event.dim))
    found = built.event.evaluate(z, gradient=True)
    assert found.severity_grad is not None
    powers = 0.9 ** np.array([STEPS, *range(STEPS - 1, -1, -1)])
    np.testing.assert_allclose(found.severity_grad, np.tile(powers, (2, 1)), rtol=1e-5)
