"""Training against catastrophes: log P falls, the task survives, the audit agrees, checkpoints resume exactly."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from library import library, parameters
from scipy import stats
from scipy.special import log_ndtr

from probest import MonteCarlo, Pool, Problem, Tempering, estimate, train
from probest.backends.base import Losses
from probest.training.descent import Descent
from probest.verdict import agree

DIM = 10
TRUE = 0.5


@functools.cache  # compiled once for all tests
def regression(backend: str) -> tuple[Problem, dict[str, Any]]:
    """M: y = gain · x₀ + bias · x₁ with data on y = TRUE · x₀, and catastrophe |y| ≥ 5: log P = log 2Φ(−5/|w|)."""
    lib = library(backend)

    def adversary() -> Any:
        return lib.sample("x", lib.dist.Normal(lib.xp.zeros(DIM), 1.0).to_event(1))

    def model(weights: Any, x: Any) -> Any:
        return weights["gain"] * x[..., 0] + weights["bias"] * x[..., 1]

    def task(m: Any, batch: Any) -> Any:
        inputs, targets = batch
        return ((m(inputs) - targets) ** 2).mean()

    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((256, DIM))
    inputs[:, 1] = 0.0  # the data say nothing of the second weight: only log P does
    problem = Problem(adversary, lib.module(model, {"gain": TRUE, "bias": 1.0}), lambda x, y: lib.xp.abs(y) - 5.0)
    return problem, {"task": task, "data": (inputs, TRUE * inputs[:, 0])}


def exact(gain: float, bias: float) -> float:
    return math.log(2) + float(log_ndtr(-5.0 / math.hypot(gain, bias)))


def weights(model: Any) -> dict[str, float]:
    return {name: value.item() for name, value in parameters(model).items()}


OPTIONS: dict[str, Any] = {
    "until_log_prob": -22.0,
    "steps": 120,
    "check_every": 30,
    "learning_rate": 0.02,
    "budget": 20_000,
    "particles": 64,
    "weight": 0.002,
    "progress": False,
}


def test_log_prob_falls_and_the_audit_agrees(backend: str) -> None:
    problem, data = regression(backend)
    before = weights(problem.model)
    run = train(problem, **data, **OPTIONS)
    assert weights(problem.model) == before
    after = weights(run.model)
    assert run.before.lower <= exact(**before) <= run.before.upper
    assert run.after.log_prob < run.before.log_prob - 5
    assert abs(run.after.log_prob - exact(**after)) < 5 * run.after.std_error + 0.05
    assert run.audit is not None
    assert agree(run.after.conclusion, run.audit.estimate.conclusion)
    assert after["gain"] == pytest.approx(TRUE, abs=0.15)
    assert run.history[-1].calls <= run.calls
    # what the warm particles follow stays near the truth of the end
    assert run.history[-1].log_prob == pytest.approx(run.after.log_prob, abs=2.0)


def test_a_lower_bound_is_loss_enough(backend: str) -> None:
    """Nothing but the bound of a few guides drives the catastrophes away; the audit knows nothing of them."""
    problem, data = regression(backend)
    run = train(problem, **data, **(OPTIONS | {"objective": "lower_bound"}))
    after = weights(run.model)
    assert run.converged, run.advice
    assert run.audit is not None
    assert exact(**after) < run.before.log_prob - 10.0
    assert run.audit.estimate.log_prob == pytest.approx(exact(**after), abs=5.0 * run.audit.estimate.std_error + 0.05)
    assert after["gain"] == pytest.approx(TRUE, abs=0.15)
    with pytest.raises(ValueError, match="objective='likelihood': expected one of 'log_prob', 'lower_bound'"):
        train(problem, **data, **(OPTIONS | {"objective": "likelihood"}))


def test_what_a_model_draws_is_trained_by_its_probability(backend: str) -> None:
    """A model that chooses by chance: its choice has no gradient, and the probability of it has."""
    lib = library(backend)
    start = {"risk": np.array(-3.0), "gain": np.array(1.0)}

    def model(weights: Any, x: Any) -> Any:
        bold = lib.sample("bold", lib.dist.Bernoulli(logits=weights["risk"]))
        return lib.xp.where(bold == 1, 3.0, 0.0) + weights["gain"] * x[0]

    problem = Problem(
        lambda: lib.sample("x", lib.dist.Normal(lib.xp.zeros(DIM), 1.0).to_event(1)),
        lib.module(model, start),
        lambda x, y: y - 4.5 + 0.0 * x[0],
    )

    def exact(risk: float, gain: float) -> float:
        bold, shy = -math.log1p(math.exp(-risk)), -math.log1p(math.exp(risk))
        return float(np.logaddexp(bold + stats.norm.logsf(1.5 / abs(gain)), shy + stats.norm.logsf(4.5 / abs(gain))))

    def task(model: Any, batch: Any) -> Any:
        """The gain is to stay 1; the task does not know of the risk."""
        own = parameters(model)
        return ((own["gain"] - batch) ** 2).mean() + 0.0 * own["risk"]

    run = train(
        problem, task=task, data=np.ones(64), until_log_prob=-30.0, steps=20, learning_rate=0.1, max_pressure=0.1,
        particles=64, budget=2_000, check_budget=500, check_every=20, audit=MonteCarlo(),
        audit_budget=3_000, audit_rounds=0, progress=False,
    )  # fmt: skip
    assert run.audit is not None
    assert run.audit.calls <= 3_000
    after = weights(run.model)
    assert after["risk"] < -3.7
    assert after["gain"] == pytest.approx(1.0, abs=0.5)
    assert run.before.log_prob == pytest.approx(exact(-3.0, 1.0), abs=0.1)
    assert run.after.log_prob == pytest.approx(exact(**after), abs=0.2)


def test_a_reading_of_a_linear_model_is_exact(backend: str) -> None:
    """And trains it: log Φ(−5 / |w|), at each step. Through layers, JAX takes half a minute: tested by itself."""
    problem, data = regression(backend)
    one = Problem(problem.adversary, problem.model, lambda x, y: y - 5.0)
    options = OPTIONS | {"objective": "reading", "steps": 5, "check_every": 5, "weight": 1.0, "audit": MonteCarlo()}
    options |= {"budget": 500, "check_budget": 500, "audit_budget": 500, "audit_rounds": 0}
    run = train(one, **data, **options)
    first, after = run.history[0], weights(run.model)
    assert first.log_prob == pytest.approx(float(log_ndtr(-5.0 / math.hypot(TRUE, 1.0))), abs=1e-4)
    assert first.pressure == pytest.approx(first.log_prob, abs=1e-4)
    assert math.hypot(*after.values()) < 0.95 * math.hypot(TRUE, 1.0)


def test_a_reading_is_loss_enough(any_backend: str) -> None:
    """A wide network, whose log P is read from its weights at each step; the audit samples."""
    lib, rng, width = library(any_backend), np.random.default_rng(1), 64
    start = {
        "first": rng.standard_normal((DIM, width)) * math.sqrt(2.0 / DIM),
        "shift": 0.1 * rng.standard_normal(width),
        "last": rng.standard_normal(width) / math.sqrt(width),
    }

    def model(weights: Any, x: Any) -> Any:
        return (lib.xp.maximum(x @ weights["first"] + weights["shift"], 0.0 * weights["shift"])) @ weights["last"]

    inputs = rng.standard_normal((1_000, DIM))
    answers = np.maximum(inputs @ start["first"] + start["shift"], 0.0) @ start["last"]
    limit = float(answers.mean() + 3.0 * answers.std())
    _, data = regression(any_backend)
    problem = Problem(
        lambda: lib.sample("x", lib.dist.Normal(lib.xp.zeros(DIM), 1.0).to_event(1)),
        lib.module(model, start),
        lambda x, y: y - limit,
    )
    options: dict[str, Any] = {
        "steps": 16, "check_every": 16, "learning_rate": 4e-3, "budget": 20_000, "check_budget": 5_000,
        "objective": "reading", "max_pressure": 0.5, "until_log_prob": -60.0, "audit": Tempering(particles=256),
        "audit_rounds": 0, "progress": False,
    }  # fmt: skip
    data = data | {"data": (inputs, answers)}
    run = train(problem, **data, **options)
    read = run.history[0]
    assert read.pressure == pytest.approx(read.log_prob, abs=0.02)
    assert abs(run.before.log_prob - read.log_prob) < 0.3
    assert run.audit is not None
    assert run.audit.estimate.log_prob < run.before.log_prob - 10.0
    with pytest.raises(ValueError, match="audit_budget"):
        train(problem, **data, **(options | {"audit_budget": 0}))
    with pytest.raises(ValueError, match="adversaries: a reading"):
        train(problem, **data, **(options | {"adversaries": Pool()}))

    def seen() -> Any:
        x = problem.adversary()
        lib.sample("seen", lib.dist.Normal(x[0], 1.0), obs=lib.array(1.0))
        return x

    with pytest.raises(ValueError, match=r"objective='reading': .* needs an adversary without observed sites"):
        train(Problem(seen, problem.model, problem.checker), **data, **options)


@pytest.mark.parametrize("objective", ["log_prob", "lower_bound"])
def test_a_checkpoint_resumes_where_it_was(
    backend: str, objective: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem, data = regression(backend)
    options = OPTIONS | {"steps": 24, "check_every": 8, "until_log_prob": -300.0, "audit_rounds": 0}
    options |= {"objective": objective, "budget": 5_000, "audit": MonteCarlo(), "audit_budget": 1_000}
    whole = train(problem, **data, **options)
    path = tmp_path / "run.safetensors"
    step = Descent._step

    def interrupted(self: Descent) -> Losses:
        if self.state.step == 12:
            raise KeyboardInterrupt
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Descent, "_step", interrupted)
        half = train(problem, **data, **options, checkpoint=path)
    assert path.exists()
    assert len(half.history) == 12
    rest = train(problem, **data, **options, checkpoint=path)
    assert [step.step for step in rest.history] == list(range(1, 25))
    assert [s.task_loss for s in rest.history[:12]] == [s.task_loss for s in half.history]
    for name, value in weights(whole.model).items():
        assert weights(rest.model)[name] == pytest.approx(value, abs=1e-6)


def test_a_checkpoint_of_another_model_is_refused(backend: str, tmp_path: Path) -> None:
    problem, data = regression(backend)
    path = tmp_path / "run.safetensors"
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="is not a checkpoint"):
        train(problem, **data, **(OPTIONS | {"steps": 1, "budget": 2_000}), checkpoint=path)


def test_interruption_keeps_what_was_done(backend: str, tmp_path: Path) -> None:
    problem, data = regression(backend)
    seen = {"calls": 0}

    def task(m: Any, batch: Any) -> Any:
        seen["calls"] += 1
        if seen["calls"] > 120:  # to see what the task is worth, then steps
            raise KeyboardInterrupt
        return data["task"](m, batch)

    options = OPTIONS | {"steps": 20}
    if backend == "numpyro":
        pytest.skip("jax compiles the task: it runs as Python only once")
    run = train(problem, task=task, data=data["data"], **options, checkpoint=tmp_path / "run")
    assert 0 < len(run.history) < 20
    assert run.audit is None
    assert not run.converged
    assert any("interrupted" in line for line in run.advice)
    assert (tmp_path / "run").exists()


def test_estimate_interrupted() -> None:
    pytest.importorskip("pyro")
    lib = library("pyro")
    seen = {"calls": 0}

    def checker(x: Any, y: Any) -> Any:
        seen["calls"] += 1
        if seen["calls"] > 12:
            raise KeyboardInterrupt
        return y - 6.0

    problem = Problem(lambda: lib.sample("x", lib.dist.Normal(0.0, 1.0)), lambda x: x, checker)
    result = estimate(problem, progress=False)
    assert not result.converged
    assert any("interrupted" in line for line in result.advice)
    assert result.ledger


def test_catastrophes_that_no_action_avoids_are_named_as_such(backend: str) -> None:
    problem, options = regression(backend)
    out_of_its_hands = Problem(problem.adversary, problem.model, lambda x, y: x[..., 2] - 4.0 + 0.0 * y)
    run = train(out_of_its_hands, **{**OPTIONS, **options, "steps": 30, "budget": 4_000})
    assert not run.converged
    assert any("nothing that M could do avoids these" in line for line in run.advice)
