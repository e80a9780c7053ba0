"""Every kind of bad input gets an error that names what is wrong, before work starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from library import library

from probest import (
    Importance,
    LineSampling,
    Problem,
    ProblemError,
    SeverityError,
    SiteError,
    UnmetNeedError,
    estimate,
    train,
)


def build(lib: Any, **change: Any) -> Problem:
    """A good problem with one part changed."""
    parts: dict[str, Any] = {
        "adversary": lambda: lib.sample("x", lib.dist.Normal(lib.xp.zeros(2), 1.0).to_event(1)),
        "model": lambda x: x.sum(),
        "checker": lambda x, y: y - 3.0,
    }
    return Problem(**(parts | change))


def nan_in_tail(lib: Any) -> Callable[[Any, Any], Any]:
    return lambda x, y: lib.xp.where(y > 0.5, lib.xp.sqrt(0.5 - y), y)


def mutates(x: Any, y: Any) -> Any:
    x["wind"] = x["wind"] + 1
    return x["wind"].sum() - 3


def uneven(lib: Any) -> Any:
    state = {"runs": 0}

    def adversary() -> Any:
        state["runs"] += 1
        return lib.sample(f"x_{state['runs']}", lib.dist.Normal(0.0, 1.0))

    return adversary


def twice(lib: Any) -> Any:
    def adversary() -> Any:
        return lib.sample("x", lib.dist.Normal(0.0, 1.0)) + lib.sample("x", lib.dist.Normal(0.0, 1.0))

    return adversary


def random_checker(lib: Any) -> Any:
    rng = np.random.default_rng(0)
    return lambda x, y: y - float(rng.random())


CASES: dict[str, tuple[type[Exception], str, Callable[[Any], dict[str, Any]]]] = {
    "adversary is not callable": (ProblemError, "adversary", lambda lib: {"adversary": 3}),
    "model is not callable": (ProblemError, "model", lambda lib: {"model": None}),
    "checker is not callable": (ProblemError, "checker", lambda lib: {"checker": "x"}),
    "unknown batching": (ProblemError, "batching", lambda lib: {"batching": "fast"}),
    "unknown backend": (ProblemError, "backend", lambda lib: {"backend": "tensorflow"}),
    "chunk of nothing": (ProblemError, "chunk_size", lambda lib: {"chunk_size": 0}),
    "no sample site": (ProblemError, "no sample site", lambda lib: {"adversary": lambda: lib.xp.zeros(2)}),
    "too many arguments": (ProblemError, "2 required arguments", lambda lib: {"adversary": lambda a, b: a}),
    "loop without a pair": (
        ProblemError, r"pair \(observation, action\)",
        lambda lib: {"adversary": lambda model: lib.sample("x", lib.dist.Normal(0.0, 1.0))},
    ),
    "program returns None": (
        ProblemError, "adversary returned None",
        lambda lib: {"adversary": lambda: [lib.sample("x", lib.dist.Normal(0.0, 1.0)), None][1]},
    ),
    "observation is text": (
        ProblemError, "leaf of type str",
        lambda lib: {"adversary": lambda: (lib.sample("x", lib.dist.Normal(0.0, 1.0)), "fog")},
    ),
    "model returns None": (ProblemError, "model returned None", lambda lib: {"model": lambda x: None}),
    "checker returns None": (SeverityError, "checker returned None", lambda lib: {"checker": lambda x, y: None}),
    "checker returns text": (SeverityError, "checker returned str", lambda lib: {"checker": lambda x, y: "bad"}),
    "severity is a vector": (SeverityError, r"shape \(2,\)", lambda lib: {"checker": lambda x, y: x - 3.0}),
    "severity of shape (1,)": (SeverityError, r"shape \(1,\)", lambda lib: {"checker": lambda x, y: x[:1]}),
    "severity is NaN": (SeverityError, "NaN", lambda lib: {"checker": lambda x, y: y * float("nan")}),
    "severity is NaN sometimes": (SeverityError, "NaN", lambda lib: {"checker": nan_in_tail(lib)}),
    "checker mutates": (
        ProblemError, "checker changes its arguments",
        lambda lib: {
            "adversary": lambda: {"wind": lib.sample("x", lib.dist.Normal(lib.xp.zeros(2), 1.0).to_event(1))},
            "model": lambda x: x["wind"].sum(),
            "checker": mutates,
        },
    ),
    "site named twice": (SiteError, "'x' is named twice", lambda lib: {"adversary": twice(lib)}),
    "sites that come and go": (ProblemError, "x_", lambda lib: {"adversary": uneven(lib)}),
    "scaled site": (
        SiteError, "'x' is scaled",
        lambda lib: {"adversary": scaled(lib)},
    ),
    "unsupported site": (SiteError, "'x'.*ImproperUniform|'x'.*Stable", lambda lib: {"adversary": lambda: lib.sample(
    "x", lib.dist.Stable(1.5, 0.0) if hasattr(lib.dist, "Stable") else
    lib.dist.ImproperUniform(lib.dist.constraints.real, (), ()))}),
}  # fmt: skip


def scaled(lib: Any) -> Any:
    def adversary() -> Any:
        with lib.plate("rows", 10, subsample_size=2):
            return lib.sample("x", lib.dist.Normal(0.0, 1.0))

    return adversary


@pytest.mark.global_rng
@pytest.mark.parametrize("case", CASES)
def test_problem(backend: str, case: str) -> None:
    error, words, change = CASES[case]
    lib = library(backend)
    with pytest.raises(error, match=words):
        estimate(build(lib, **change(lib)), budget=2_000, progress=False)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("budget", 0),
        ("budget", -5),
        ("budget", 2.5),
        ("precision", 0.0),
        ("precision", float("nan")),
        ("seed", -1),
        ("seed", 0.5),
    ],
)
def test_estimate_arguments(backend: str, argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=argument):
        estimate(build(library(backend)), **{argument: value})


def test_a_precision_beside_an_estimator_says_where_it_belongs(backend: str) -> None:
    with pytest.raises(ValueError, match=r"precision=0.1.*estimator=Importance\(precision=0.1\)"):
        estimate(build(library(backend)), precision=0.1, estimator=Importance())


def test_an_estimator_is_refused_before_it_runs(backend: str) -> None:
    lib = library(backend)
    yes_or_no = build(lib, checker=lambda x, y: y.sum() > 3.0)
    with pytest.raises(UnmetNeedError, match="line sampling needs a severity with a gradient"):
        estimate(yes_or_no, estimator=LineSampling(), progress=False)
    assert yes_or_no.event.model_calls == 0


def test_an_estimator_that_returns_something_else_is_named(backend: str) -> None:
    class Wrong:
        name = "wrong"

        def run(self, event: Any, *, budget: int, seed: Any) -> Any:
            return -3.0

    with pytest.raises(TypeError, match=r"wrong.run returned .*float"):
        estimate(build(library(backend)), estimator=Wrong(), progress=False)


def test_not_a_problem() -> None:
    with pytest.raises(TypeError, match="Problem"):
        estimate("half-space")  # type: ignore[arg-type]


def test_random_checker_is_noticed() -> None:
    lib = library("pyro")
    pytest.importorskip("pyro")
    with pytest.raises(ProblemError, match="differs between two evaluations"):
        estimate(build(lib, checker=random_checker(lib)), progress=False)


def test_mixed_libraries() -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("numpyro")
    with torch.random.fork_rng(devices=[]):
        model = torch.nn.Linear(2, 1)
    with pytest.raises(ProblemError, match="model is a torch object"):
        estimate(build(library("numpyro"), model=model), progress=False)
    import jax.numpy as jnp
    from jax.tree_util import Partial

    with pytest.raises(ProblemError, match="model is a jax object"):
        estimate(build(library("pyro"), model=Partial(lambda w, x: x.sum(), jnp.ones(2))), progress=False)

    torch_lib, jax_lib = library("pyro"), library("numpyro")

    def both() -> Any:
        jax_lib.sample("a", jax_lib.dist.Normal(0.0, 1.0))
        return torch_lib.sample("b", torch_lib.dist.Normal(0.0, 1.0))

    with pytest.raises(ProblemError, match="both Pyro and NumPyro"):
        estimate(build(torch_lib, adversary=both), progress=False)


def test_cannot_be_batched() -> None:
    torch = pytest.importorskip("torch")
    from probest.backends.base import BatchingError

    def model(x: Any) -> Any:
        return torch.tensor(1.0) if x.sum().item() > 0 else torch.tensor(-1.0)

    with pytest.raises(BatchingError, match="batching='loop'"):
        estimate(build(library("pyro"), model=model), progress=False)
    result = estimate(
        build(library("pyro"), model=model, checker=lambda x, y: y > 0, batching="loop"), budget=500, progress=False
    )
    assert 0.3 < result.prob < 0.7


def test_impossible_event_is_a_bound_not_an_error(backend: str) -> None:
    lib = library(backend)
    result = estimate(build(lib, checker=lambda x, y: 0.0 * y - 1.0), budget=3_000, progress=False)
    assert result.log_prob == -np.inf
    assert np.isfinite(result.upper)
    assert result.lower == -np.inf
    assert not result.converged
    assert result.advice


TRAINING: dict[str, tuple[str, dict[str, Any]]] = {
    "steps": ("steps", {"steps": 0}),
    "target": ("until_log_prob", {"until_log_prob": 5.0}),
    "rate": ("learning_rate", {"learning_rate": -1.0}),
    "weight": ("weight", {"weight": float("nan")}),
    "no data": ("data is empty", {"data": ()}),
    "ragged data": ("different lengths", {"data": (np.zeros((3, 2)), np.zeros(4))}),
    "loss is NaN": ("task", {"task": lambda model, batch: float("nan")}),
}


@pytest.mark.parametrize("case", TRAINING)
def test_training_arguments(backend: str, case: str) -> None:
    words, change = TRAINING[case]
    lib = library(backend)
    problem = build(lib, model=lib.module(lambda w, x: w["a"] * x.sum(), {"a": 1.0}))
    options: dict[str, Any] = {
        "task": lambda model, batch: model(batch[0][0]) ** 2,
        "data": (np.zeros((8, 2)), np.zeros(8)),
    }
    with pytest.raises(ValueError, match=words):
        train(problem, **(options | change), progress=False)


def test_nothing_to_train(backend: str) -> None:
    options: dict[str, Any] = {"task": lambda model, batch: 0.0, "data": np.zeros((4, 2)), "progress": False}
    with pytest.raises(ValueError, match="no parameters"):
        train(build(library(backend)), **options)
    with pytest.raises(ValueError, match="gradient"):
        train(build(library(backend), checker=lambda x, y: y > 3.0), **options)
