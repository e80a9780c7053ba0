"""Combinators of severities and black boxes, in both libraries, against NumPy."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from library import gradient, library
from scipy.special import log_ndtr

from probest import GradientError, Problem, SeverityError, estimate, train
from probest.checkers import all_of, always, any_of, black_box, branches, eventually, leaves, modules, negate

QUIET: dict[str, Any] = {"progress": False}
Z = np.random.default_rng(0).standard_normal((50, 3))


def problem(lib: Any, checker: Any, **options: Any) -> Problem:
    """Three standard normals; the action is twice the observation."""
    return Problem(
        lambda: lib.sample("x", lib.dist.Normal(lib.xp.zeros(3), 1.0).to_event(1)),
        lambda x: 2.0 * x,
        checker,
        **options,
    )


def first(x: Any, y: Any) -> Any:
    return x[0] - 0.5


def second(x: Any, y: Any) -> Any:
    return y[1] + 0.2


def warm(x: Any, y: Any) -> Any:
    return x[0] > 0.5


def wet(x: Any, y: Any) -> Any:
    return y[1] > -0.2


def trajectory(x: Any, y: Any) -> Any:
    return x - 0.1


def nothing(x: Any, y: Any) -> None:
    return None


A, B = Z[:, 0] - 0.5, 2.0 * Z[:, 1] + 0.2
REAL: dict[str, tuple[Any, np.ndarray]] = {
    "all_of": (all_of(first, second), np.minimum(A, B)),
    "any_of": (any_of(first, second, lambda x, y: -3.0), np.maximum(A, B)),
    "negate": (negate(first), -A),
    "nested": (
        any_of(all_of(first, negate(second)), lambda x, y: x[2] - 1),
        np.maximum(np.minimum(A, -B), Z[:, 2] - 1),
    ),
    "always": (always(trajectory), Z.min(1) - 0.1),
    "eventually": (eventually(trajectory), Z.max(1) - 0.1),
    "over time, nested": (
        negate(eventually(all_of(trajectory, first))),
        -np.minimum(Z - 0.1, A[:, None]).max(1),
    ),
}
BOOL: dict[str, tuple[Any, np.ndarray]] = {
    "all_of": (all_of(warm, wet), (A > 0) & (B > 0)),
    "any_of": (any_of(warm, wet), (A > 0) | (B > 0)),
    "negate": (negate(warm), ~(A > 0)),
    "always": (always(lambda x, y: x > -1.0), (Z > -1).all(1)),
    "eventually": (eventually(lambda x, y: x > 1.0), (Z > 1).any(1)),
}


@pytest.mark.parametrize("case", REAL)
def test_real_severities(backend: str, case: str) -> None:
    checker, expected = REAL[case]
    event = problem(library(backend), checker).event
    assert event.differentiable
    assert not event.boolean
    at = event.evaluate(Z, gradient=True)
    np.testing.assert_allclose(at.severity, expected, rtol=1e-5, atol=1e-6)
    assert at.severity_grad is not None
    step = 1e-2
    along = np.ones(3)
    ahead, behind = event.severity(Z + step * along), event.severity(Z - step * along)
    smooth = np.isclose(ahead + behind, 2 * at.severity, atol=1e-4)  # no kink in between
    assert smooth.mean() > 0.8
    slope = (ahead - behind) / (2 * step)
    np.testing.assert_allclose((at.severity_grad @ along)[smooth], slope[smooth], atol=1e-2)


@pytest.mark.parametrize("case", BOOL)
def test_bools_stay_bools(backend: str, case: str) -> None:
    checker, expected = BOOL[case]
    event = problem(library(backend), checker).event
    assert event.boolean
    assert not event.differentiable
    np.testing.assert_array_equal(event.severity(Z), np.where(expected, 1.0, -1.0))


def test_plain_numbers_and_arrays() -> None:
    assert any_of(lambda x, y: 1.0, lambda x, y: -2)(None, None) == 1.0
    assert all_of(lambda x, y: True, lambda x, y: False)(None, None).dtype == bool
    assert always(lambda x, y: np.array([1.0, -3.0]))(None, None) == -3.0
    assert negate(first).__name__ == "negate(first)"
    assert any_of(first, always(trajectory)).__name__ == "any_of(first, always(trajectory))"
    assert hash(any_of(first, second)) == hash(any_of(first, second))


BAD: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "not callable": (TypeError, r"any_of: argument 2 is a float", lambda: any_of(first, 3.0)),
    "none given": (ValueError, "all_of: give at least one", lambda: all_of()),
    "no function": (TypeError, "negate: argument 1 is a NoneType", lambda: negate(None)),
    "no black box": (TypeError, "black_box: argument 1 is a str", lambda: black_box("rules.py")),
    "box over time": (TypeError, "always: first is a black_box", lambda: always(any_of(black_box(first), second))),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_combined(case: str) -> None:
    error, words, make = BAD[case]
    with pytest.raises(error, match=words):
        make()


WRONG: dict[str, tuple[str, Any]] = {
    "bool and number": (r"any_of: warm returned a bool.*severity >= 0", any_of(warm, second)),
    "box and number": (r"all_of: wet returned a bool", all_of(black_box(lambda x, y: y[1] > 0, name="wet"), first)),
    "None in a combination": (r"all_of: nothing returned None", all_of(first, nothing)),
    "None beside a box": (r"checker 'nothing' returned None", all_of(nothing, black_box(first))),
    "no time": (r"always: first returned shape \(\).*leave always out", always(first)),
    "vector": (r"shape \(3,\)", any_of(trajectory, first)),
    "box: None": (r"checker 'rules' returned None", lambda x, y: None),
    "box: vector": (r"checker 'rules' returned shape \(3,\).*reduce with max", lambda x, y: x),
    "box: NaN": (r"checker 'rules' returned NaN.*large and negative", lambda x, y: float("nan")),
    "box: complex": (r"checker 'rules' returned a complex number", lambda x, y: 1j),
    "box: text": (r"checker 'rules' returned str", lambda x, y: "unsafe"),
    "box: list": (r"checker 'rules' returned list", lambda x, y: [1.0, [2.0]]),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_severities_are_named_before_work_starts(backend: str, case: str) -> None:
    words, checker = WRONG[case]
    if case.startswith("box:"):
        checker = black_box(checker, name="rules")
    with pytest.raises(SeverityError, match=re.compile(words, re.DOTALL)):
        problem(library(backend), checker).event  # noqa: B018 - compiled when first needed


def test_wrong_batches_are_named(backend: str) -> None:
    lib = library(backend)
    with pytest.raises(SeverityError, match=r"'rules' returned shape \(\): with batched=True it is given 1 cases"):
        estimate(problem(lib, black_box(lambda x, y: 1.0, batched=True, name="rules")), **QUIET)

    def sometimes(x: Any, y: Any) -> Any:
        return True if x[0] > 1.0 else -1.0

    with pytest.raises(SeverityError, match=r"'sometimes' returned a bool for some cases and a number"):
        estimate(problem(lib, black_box(sometimes)), **QUIET)


def test_black_boxes_own_errors_pass_and_arguments_are_read_only(backend: str) -> None:
    lib = library(backend)

    def writes(x: Any, y: Any) -> float:
        x[0] = 0.0
        return 1.0

    with pytest.raises(ValueError, match="read-only") as caught:
        estimate(problem(lib, black_box(writes)), **QUIET)
    assert "black_box checker 'writes'" in caught.value.__notes__[0]

    def breaks(x: Any, y: Any) -> float:
        raise KeyError("licence")

    with pytest.raises(KeyError, match="licence"):
        estimate(problem(lib, black_box(breaks)), **QUIET)


@pytest.mark.parametrize("batching", ["vmap", "model", "loop"])
@pytest.mark.parametrize("batched", [False, True])
def test_black_boxes_see_numpy_and_decide(backend: str, batched: bool, batching: Any) -> None:
    seen: list[tuple[int, ...]] = []

    def rules(x: Any, y: Any) -> Any:
        assert type(x) is np.ndarray
        assert x.dtype == np.float64
        seen.append(x.shape)
        return y[..., 1] - x[..., 0]

    event = problem(library(backend), black_box(rules, batched=batched), batching=batching, chunk_size=32).event
    assert not event.differentiable
    assert not event.boolean
    seen.clear()
    np.testing.assert_allclose(event.severity(Z), 2 * Z[:, 1] - Z[:, 0], rtol=1e-5, atol=1e-5)
    assert (event.model_calls, event.checker_calls) == (50, 50)
    assert seen == ([(32, 3), (18, 3)] if batched else [(3,)] * 50)  # nothing is asked twice or for padding


def test_black_boxes_in_combinations(backend: str) -> None:
    """The other parts run in the library, and the box on the host."""
    lib = library(backend)
    box = black_box(lambda x, y: float(y[1] + 0.2))
    event = problem(lib, any_of(all_of(first, box), negate(box))).event
    np.testing.assert_allclose(event.severity(Z), np.maximum(np.minimum(A, B), -B), rtol=1e-5, atol=1e-5)
    yes = problem(lib, any_of(warm, black_box(lambda x, y: bool(y[1] > -0.2)))).event
    assert yes.boolean
    np.testing.assert_array_equal(yes.severity(Z), np.where((A > 0) | (B > 0), 1.0, -1.0))
    cases = event.decode(Z)
    np.testing.assert_allclose(cases.action, 2.0 * Z, rtol=1e-6)


def test_black_boxes_of_closed_loops_and_trees(backend: str) -> None:
    lib = library(backend)

    def adversary(model: Any) -> Any:
        x = lib.sample("x", lib.dist.Normal(0.0, 1.0))
        lib.factor("liked", -0.5 * x)
        return {"start": x, "steps": (x, 1)}, model(x)

    event = Problem(adversary, lambda x: 3.0 * x, black_box(lambda x, y: y - x["steps"][0] * x["steps"][1] - 1.0)).event
    z = Z[:, :1]
    at = event.evaluate(z)
    np.testing.assert_allclose(at.severity, 2.0 * z[:, 0] - 1.0, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(at.log_weight, -0.5 * z[:, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("boolean", [False, True])
def test_estimates_with_a_black_box(backend: str, boolean: bool) -> None:
    """P in closed form; what it spent is counted by the box itself."""
    asked = [0]

    def rules(x: Any, y: Any) -> Any:
        asked[0] += len(x)
        level = y.sum(1) / (2.0 * math.sqrt(3.0)) - 4.0
        return level > 0 if boolean else level

    box = problem(library(backend), black_box(rules, batched=True))
    box.event  # noqa: B018 - its trial calls
    asked[0] = 0
    result = estimate(box, budget=10_000, **QUIET)
    assert result.checker_calls == asked[0] <= 10_000
    assert result.converged
    assert abs(result.log_prob - log_ndtr(-4.0)) < 5.0 * result.std_error
    with pytest.raises(GradientError, match="returns a bool" if boolean else "black_box"):
        result.log_prob_at(model=lambda x: x)
    assert result.catastrophes is not None
    assert asked[0] == result.checker_calls  # decoding asks nothing


def test_gradient_in_the_adversary_of_a_black_box(backend: str) -> None:
    """d log P / d mean is the hazard φ/Φ, by the score of the native values."""
    lib = library(backend)
    adversary = lib.module(lambda p: lib.sample("x", lib.dist.Normal(p["mean"], 1.0)), {"mean": 0.0})
    found = Problem(adversary, lambda x: x, black_box(lambda x, y: float(y) - 3.0))
    result = estimate(found, budget=10_000, **QUIET)
    _, slopes = gradient(backend, result, adversary=adversary)
    hazard = math.exp(-4.5 - 0.5 * math.log(2 * math.pi) - log_ndtr(-3.0))
    assert slopes["mean"] == pytest.approx(hazard, rel=0.1)


@pytest.mark.parametrize("limit", [1, 30, 2_000])
def test_the_checker_budget_is_a_ceiling_and_never_an_error(backend: str, limit: int) -> None:
    asked = [0]

    def rules(x: Any, y: Any) -> bool:
        asked[0] += 1
        return bool(x[0] > 6.0)

    box = problem(library(backend), black_box(rules))
    box.event  # noqa: B018 - its trial calls
    asked[0] = 0
    result = estimate(box, checker_budget=limit, **QUIET)
    assert asked[0] == result.checker_calls <= limit
    assert not result.converged
    assert result.upper >= log_ndtr(-6.0)
    assert f"checker_budget={limit}" in result.advice[-1]
    for value in (0, 1.5, True):
        with pytest.raises(ValueError, match="checker_budget"):
            estimate(box, checker_budget=value, **QUIET)  # type: ignore[arg-type]


def test_training_on_a_black_box_is_refused(backend: str) -> None:
    with pytest.raises(ValueError, match="black_box"):
        train(
            problem(library(backend), black_box(lambda x, y: 1.0)),
            task=lambda m, b: 0.0, data=np.zeros((4, 2)), until_log_prob=-5.0, **QUIET,
        )  # fmt: skip


def test_the_program_asks_black_boxes_too() -> None:
    """The composed program runs under the library's own tools: traced, vmapped and jitted in JAX."""
    jax = pytest.importorskip("jax")
    numpyro = pytest.importorskip("numpyro")
    lib = library("numpyro")
    for box, expected in (
        (black_box(lambda x, y: x[0] - 0.5), lambda x: x[:, 0] - 0.5),
        (black_box(lambda x, y: x[:, 0] > 0.5, batched=True), lambda x: x[:, 0] > 0.5),
    ):
        program = problem(lib, box).program
        sites = numpyro.infer.Predictive(program, num_samples=5, parallel=True)(jax.random.key(0))
        np.testing.assert_allclose(sites["severity"], expected(sites["x"]), rtol=1e-6)
    torch, pyro = pytest.importorskip("torch"), pytest.importorskip("pyro")
    program = problem(library("pyro"), any_of(first, black_box(lambda x, y: float(x[1])))).program
    with torch.random.fork_rng(devices=[]):
        nodes = pyro.poutine.trace(program).get_trace().nodes
    x = nodes["x"]["value"]
    assert float(nodes["severity"]["value"]) == pytest.approx(max(float(x[0]) - 0.5, float(x[1])))


def test_what_a_checker_is_made_of() -> None:
    box = black_box(first)
    checker = any_of(all_of(first, box), always(all_of(trajectory, second)))
    assert leaves(checker) == (first, box, checker.parts[1])
    assert modules(checker) == (first, trajectory, second)


def test_modules_inside_combinations_are_evaluated() -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("pyro")

    class Dropped(torch.nn.Module):
        def forward(self, x: Any, y: Any) -> Any:
            return torch.nn.functional.dropout(x, 0.5, self.training).sum()

    module = Dropped()
    event = problem(library("pyro"), any_of(negate(module), first)).event
    np.testing.assert_allclose(event.severity(Z), np.maximum(-Z.sum(1), A), rtol=1e-5, atol=1e-5)
    assert module.training


def test_branches_say_what_a_combination_says_or_nothing() -> None:
    """Of random trees, over all signs of their leaves; a part with too many ways must not be left out of a union."""
    rng = np.random.default_rng(0)

    def leaf(k: int) -> Any:
        return lambda x, y: x[k]

    def tree(depth: int, numbers: Any) -> Any:
        kind = rng.integers(4) if depth else 0
        if kind == 0:
            return leaf(next(numbers))
        if kind == 1:
            return negate(tree(depth - 1, numbers))
        parts = [tree(depth - 1, numbers) for _ in range(rng.integers(2, 4))]
        return (any_of if kind == 2 else all_of)(*parts)

    known = 0
    for _ in range(200):
        numbers = itertools.count()
        whole = tree(3, numbers)
        count = next(numbers)
        found = branches(whole)
        if not found or count > 10:
            continue
        known += 1
        for signs in itertools.product((-1.0, 1.0), repeat=count):
            expected = float(whole(np.array(signs), None)) >= 0.0
            assert any(all(signs[j] * sign > 0 for j, sign in branch) for branch in found) == expected
    assert known > 100
    some = [leaf(0)] * 3
    assert branches(any_of(leaf(0), all_of(any_of(*some), any_of(*some)))) == ()
