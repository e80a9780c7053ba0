"""Checkers whose severity is the largest of several: their kinds, and looks at them one by one, in both libraries."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from library import assert_same_event, library
from scipy import special, stats

from probest import Problem, estimate
from probest.checkers import all_of, any_of, eventually, negate
from probest.estimators.by_kinds import look_by_kinds, promised
from probest.estimators.line_sampling import LineSampling
from probest.estimators.tempering import Tempering
from probest.surrogates.watched import OneKind, Watched
from probest.testing.events import ExactEvent, half_space, half_space_or_sphere

DIM = 3
Z = np.random.default_rng(0).standard_normal((60, DIM))
Y = 2.0 * Z


def softened(values: np.ndarray) -> np.ndarray:
    return values + np.tanh(values) - 1.0


def pairs(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """All sums of an entry of x and another of y, ``(n, 9)``; −inf for the same entry of both."""
    return np.where(np.eye(DIM, dtype=bool), -np.inf, x[:, :, None] + y[:, None, :]).reshape(len(x), -1)


def checkers_of(xp: Any) -> dict[str, tuple[Callable[[Any, Any], Any], np.ndarray]]:
    """Each with the severities of its kinds, in any order."""

    def first(x: Any, y: Any) -> Any:
        return x[0] - 0.5

    def second(x: Any, y: Any) -> Any:
        return y[1] + 0.2

    def twice(x: Any, y: Any) -> Any:
        worst = xp.max(y)
        return worst + xp.tanh(worst) - 1.0

    a, b = Z[:, 0] - 0.5, Y[:, 1] + 0.2
    return {
        "largest": (lambda x, y: xp.max(y) - 3.0, Y - 3.0),
        "largest, along an axis": (lambda x, y: xp.amax(xp.reshape(y, (1, DIM)), axis=1)[0] - 3.0, Y - 3.0),
        "any_of": (any_of(first, second), np.stack([a, b], axis=1)),
        "not all": (negate(all_of(first, second)), -np.stack([a, b], axis=1)),
        "eventually": (eventually(lambda x, y: x - 1.0), Z - 1.0),
        "what falls with the least": (lambda x, y: xp.exp(-xp.min(y)) - 2.0, np.exp(-Y) - 2.0),
        "used twice": (twice, softened(Y)),
        "nested": (
            any_of(lambda x, y: xp.max(y) - 3.0, lambda x, y: xp.exp(xp.max(x)) - 2.0),
            np.concatenate([Y - 3.0, np.exp(Z) - 2.0], axis=1),
        ),
        "at least a constant": (lambda x, y: xp.maximum(xp.max(y), 0.0 * y[0] - 1.0) - 3.0, None),
        "without a gradient elsewhere": (
            lambda x, y: xp.log(xp.max(xp.stack([xp.exp(y[0]), 0.0 * y[1]]))) - 1.0,
            np.stack([Y[:, 0] - 1.0, np.full(len(Y), -np.inf)], axis=1),
        ),
        "pairs": (
            lambda x, y: xp.max(xp.where(xp.eye(DIM) > 0.0, -xp.inf, x[:, None] + y[None, :])) - 2.0,
            pairs(Z, Y) - 2.0,
        ),
    }  # type: ignore[return-value]


NAMES = list(checkers_of(np))


def problem(lib: Any, checker: Any, **options: Any) -> Problem:
    return Problem(
        lambda: lib.sample("x", lib.dist.Normal(lib.xp.zeros(DIM), 1.0).to_event(1)),
        lambda x: 2.0 * x,
        checker,
        **options,
    )


@pytest.mark.parametrize("batching", ["vmap", "model"])
@pytest.mark.parametrize("name", NAMES)
def test_a_severity_is_taken_apart(name: str, batching: str, backend: str) -> None:
    lib = library(backend)
    if batching == "model" and name not in NAMES[:2]:
        return
    checker, wanted = checkers_of(lib.xp)[name]
    event = problem(lib, checker, batching=batching).event
    assert event.kinds is not None
    found, severity, kinds = event.evaluate_kinds(Z, gradient=True)
    plain = event.evaluate(Z, gradient=True)
    np.testing.assert_allclose(found.severity, plain.severity, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(severity, plain.severity, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.severity_grad, plain.severity_grad, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(kinds.max(axis=1), plain.severity, rtol=1e-4, atol=1e-4)
    if wanted is not None:
        possible = kinds[:, kinds.max(axis=0) > -1e29]
        expected = wanted[:, np.isfinite(wanted).any(axis=0)]
        np.testing.assert_allclose(np.sort(possible, axis=1), np.sort(expected, axis=1), rtol=1e-4, atol=1e-4)
    if name == "without a gradient elsewhere":
        return
    # one of them, with its gradient by central differences
    one, _, known = event.evaluate_kinds(Z, 1, gradient=True)
    np.testing.assert_allclose(one.severity, known[:, 1], rtol=1e-5, atol=1e-5)
    step = 1e-2 * np.eye(DIM)
    ends = [[event.evaluate_kinds(Z + side * row)[2][:, 1] for side in (1.0, -1.0)] for row in step]
    slope = np.stack([(above - below) / 2e-2 for above, below in ends], axis=1)
    assert one.severity_grad is not None
    np.testing.assert_allclose(one.severity_grad, slope, atol=2e-2 * (1.0 + np.abs(slope).max()))


def test_calls_of_kinds_are_counted(backend: str) -> None:
    lib = library(backend)
    event = problem(lib, lambda x, y: lib.xp.max(y) - 3.0).event
    assert event.kinds is not None
    before = event.model_calls
    event.evaluate_kinds(Z)
    event.evaluate_kinds(Z, 2, gradient=True)
    nothing, severity, kinds = event.evaluate_kinds(Z[:0], gradient=True)
    assert nothing.severity.shape == severity.shape == (0,)
    assert kinds.shape == (0, DIM)
    assert event.model_calls - before == 4 * len(Z)


def test_what_is_no_union_has_no_kinds(backend: str) -> None:
    lib = library(backend)
    xp = lib.xp
    for checker in (
        lambda x, y: xp.sum(y) - 1.0,
        all_of(lambda x, y: x[0] - 0.5, lambda x, y: y[1] + 0.2),
        lambda x, y: xp.max(y) + 0.1 * y[0],
        lambda x, y: xp.max(y) > 1.0,
        lambda x, y: xp.maximum(xp.max(y), xp.sum(0.0 * y) + 1.0) if False else xp.min(y) - 1.0,
    ):
        event = problem(lib, checker).event
        assert event.kinds is None
        with pytest.raises(ValueError, match="there are no kinds"):
            event.evaluate_kinds(Z)


def late(lib: Any, dim: int = 24) -> tuple[Problem, float]:
    """A half-space that comes into reach at once, and a steep one, which is four fifths of P and a hundredth of what is
    near the limit.
    """
    near, far = 4.9, 4.5

    def checker(x: Any, y: Any) -> Any:
        return lib.xp.max(lib.xp.stack([y[0] - near, 5.0 * (y[1] - far)]))

    def model(x: Any) -> Any:
        return lib.xp.stack([x[: dim // 2].sum(), x[dim // 2 :].sum()]) / (dim / 2.0) ** 0.5

    built = Problem(lambda: lib.sample("x", lib.dist.Normal(lib.xp.zeros(dim), 1.0).to_event(1)), model, checker)
    a, b = (float(special.log_ndtr(-limit)) for limit in (near, far))
    return built, float(np.logaddexp(a, b) + math.log1p(-math.exp(a + b - np.logaddexp(a, b))))


def test_a_kind_that_a_look_lacks_is_found(any_backend: str) -> None:
    built, truth = late(library(any_backend))
    method = Tempering(particles=64, islands=8, max_moves=2, target=0.5)
    watched, seed = Watched(built.event), np.random.SeedSequence([3, 0])
    first = method.run(OneKind(watched, 0), budget=40_000, seed=seed)  # the flat one alone
    tried: set[int] = set()
    assert promised(watched, tried, truth, seed=seed) > 0.1
    run, short = look_by_kinds(watched, first, method, tried, budget=40_000, seed=seed)
    assert run is not None
    assert not short
    assert tried == {1}
    assert run.calls <= 40_000
    last = run.conclusion
    assert last.particles is not None
    assert (last.particles.severity >= 0.0).all()
    assert abs(last.log_prob - truth) < 4.4 * last.std_error
    assert look_by_kinds(watched, run, method, tried, budget=40_000, seed=seed) == (None, False)  # nothing is missing
    assert promised(watched, tried, truth, seed=seed) == 0.0
    assert look_by_kinds(watched, run, method, set(), budget=1_000, seed=seed).short


def test_the_default_knows_of_kinds(any_backend: str) -> None:
    built, truth = late(library(any_backend))
    result = estimate(built, budget=20_000, progress=False)
    assert result.lower - 0.1 <= truth <= result.upper + 0.1


def crossing(lib: Any, steps: int = 12, limit: float = 12.0) -> tuple[Problem, float]:
    """A random walk that comes to -limit at some step: as many half-spaces as steps, neighbours 17 degrees apart."""
    built = Problem(
        lambda: lib.sample("x", lib.dist.Normal(lib.xp.zeros(steps), 1.0).to_event(1)),
        lambda x: lib.xp.cumsum(x, 0),
        lambda x, y: -lib.xp.amin(y) - limit,
    )
    at = np.linspace(-limit, limit + 8.0, 4_001)
    kernel = stats.norm.pdf(at[:, None] - at) * (at[1] - at[0])
    kernel[:, [0, -1]] *= 0.5
    alive = stats.norm.pdf(at)
    for _ in range(steps - 1):
        alive = kernel @ alive
    return built, math.log1p(-float(np.trapezoid(alive, at)))


def test_lines_walk_to_each_kind(any_backend: str) -> None:
    built, truth = crossing(library(any_backend))
    runs = [LineSampling().run(built.event, budget=4_000, seed=np.random.SeedSequence([5, n])) for n in range(3)]
    assert all(run.conclusion.converged for run in runs)
    for run in runs:
        assert abs(run.conclusion.log_prob - truth) < 0.02 + 4.4 * run.conclusion.std_error  # 1e-5


def test_lines_through_many_modes_that_overlap_vary_little(any_backend: str) -> None:
    """46 limits, neighbours within 19 degrees: lines that run into another mode's part may not carry the estimate."""
    built, truth = crossing(library(any_backend), 46, 24.0)
    for number in range(2):
        last = LineSampling().run(built.event, budget=4_000, seed=np.random.SeedSequence([8, number])).conclusion
        assert last.converged
        assert last.diagnostics["largest"] < 0.02
        assert abs(last.log_prob - truth) < 0.02 + 4.4 * last.std_error  # 1e-5


def far_out_everywhere(lib: Any, dim: int, rest: int) -> tuple[Problem, float, float]:
    """A half-space beside a limit on a site's norm, which to first order is nothing: a third and two thirds of P."""
    log_a, log_b = -9.5, -9.0
    beta, radius = float(-special.ndtri_exp(log_a)), float(stats.chi.isf(math.exp(log_b), dim))

    def adversary() -> Any:
        gusts = lib.sample("gusts", lib.dist.Normal(lib.xp.zeros(dim), 1.0).to_event(1))
        return gusts, lib.sample("rest", lib.dist.Normal(lib.xp.zeros(rest), 1.0).to_event(1))

    def checker(x: Any, y: Any) -> Any:
        gusts, others = x
        return lib.xp.max(lib.xp.stack([gusts[0] + 0.0 * others[0] - beta, (gusts**2).sum() / radius - radius]))

    return Problem(adversary, lambda x: x, checker), half_space_or_sphere(dim, log_a, log_b).log_prob, radius


@pytest.mark.parametrize("dims", [(30, 1), (12, 20)])
def test_what_is_far_out_in_all_directions_is_measured(dims: tuple[int, int], any_backend: str) -> None:
    built, truth, radius = far_out_everywhere(library(any_backend), *dims)
    for number in range(2):
        last = LineSampling().run(built.event, budget=4_000, seed=np.random.SeedSequence([6, number])).conclusion
        assert last.converged
        assert abs(last.log_prob - truth) < 0.02 + 4.4 * last.std_error  # 1e-5
        assert last.particles is not None
        far = np.linalg.norm(last.particles.z[:, : dims[0]], axis=1) > radius
        assert 0.4 < np.exp(last.particles.log_weight[far]).sum() < 0.9
    # too few calls to measure it: that there is something is said
    last = LineSampling().run(built.event, budget=2_100, seed=np.random.SeedSequence([6, 0])).conclusion
    assert not last.converged or abs(last.log_prob - truth) < 0.02 + 4.4 * last.std_error


@pytest.mark.parametrize("family", [late, crossing, functools.partial(far_out_everywhere, dim=12, rest=20)])
def test_they_are_the_same_events_in_both_libraries(family: Any) -> None:
    assert_same_event(lambda lib: family(lib)[0])


class Unruly(ExactEvent):
    """Its kinds cannot be evaluated."""

    kinds = True

    def evaluate_kinds(self, z: Any, which: int | None = None, *, gradient: bool = False) -> Any:
        raise RuntimeError("no")


def test_kinds_that_cannot_be_evaluated_are_none() -> None:
    plain = half_space(3, 2.0)
    watched = Watched(Unruly("unruly", 3, plain.log_prob, plain.severity, plain.gradient))
    np.testing.assert_allclose(watched.evaluate(Z).severity, plain.severity(Z))
    assert watched.kinds is None
    assert watched.cases().kinds.shape == (len(Z), 0)
