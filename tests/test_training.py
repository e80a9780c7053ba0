"""What training is made of: the ladder on events with closed forms, the memory, teachers, callbacks."""

from __future__ import annotations

import functools
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from library import library, parameters
from scipy import stats
from scipy.special import log_ndtr

import probest
from probest import Pool, Problem, Tempering, audit, estimate, search, train
from probest.audit import Audit
from probest.backends.base import Losses
from probest.budget import Meter
from probest.evidence import Evidence, Run
from probest.testing import FAILURE_RATE
from probest.training.callbacks import Callback, Control, EarlyStopping
from probest.training.checkpoint import Step, TrainingState
from probest.training.descent import Descent
from probest.training.follower import Cases
from probest.training.ladder import Ladder
from probest.training.memory import Memory
from probest.training.opponents import Opponents
from probest.training.pursuit import Pursuit
from probest.training.teacher import Teacher, TeacherError, as_batch

BETA = 4.0
DIM = 6


@functools.cache  # compiled once for all tests
def half_space(backend: str, *, switch: float | None = None, seen: float | None = None) -> Problem:
    """x·a ≥ BETA; with a switch of that probability, only where it is on; with an observation of the first axis."""
    lib = library(backend)

    def adversary() -> Any:
        on = lib.xp.ones(()) if switch is None else lib.sample("on", lib.dist.Bernoulli(switch))
        x = lib.sample("x", lib.dist.Normal(lib.xp.zeros(DIM), 1.0).to_event(1))
        if seen is not None:
            lib.sample("y", lib.dist.Normal(x[1], 0.5), obs=lib.array(seen))
        return on, x

    def checker(case: Any, y: Any) -> Any:
        on, _ = case
        return y - lib.xp.where(on == 1, BETA, 2.0 * BETA)

    return Problem(adversary, lambda case: case[1].sum() / DIM**0.5, checker)


def climbed(problem: Problem, steps: int, **options: Any) -> tuple[Ladder, list[np.ndarray], list[np.ndarray]]:
    """A ladder after some steps, its severities and its averaged ratios after each."""
    rng = np.random.default_rng(0)
    ladder = Ladder.built(problem.event, problem.strata, 64, rng, **options)
    severity, ratio = [], []
    for _ in range(steps):
        ladder.advance(problem.event, rng)
        severity.append(ladder.severity.copy())
        ratio.append(ladder.ratio.copy())
    return ladder, severity, ratio


def batch_error(series: np.ndarray, batches: int = 10) -> np.ndarray:
    """Standard error of the mean of a correlated series, by the means of batches of it."""
    means = np.array([part.mean(axis=0) for part in np.array_split(series, batches)])
    return np.asarray(means.std(axis=0, ddof=1) / math.sqrt(batches))


def test_rungs_follow_their_laws(any_backend: str) -> None:
    ladder, severity, ratio = climbed(half_space(any_backend), 400)
    width = ladder.cases().noise[: ladder.z.shape[1]]
    found = np.array(severity)[100:].mean(axis=1)  # (steps, rungs)
    scale = np.sqrt(1.0 + width**2)
    hazard = np.exp(stats.norm.logpdf(BETA / scale) - log_ndtr(-BETA / scale))
    exact = hazard / scale - BETA
    allowed = stats.t.isf(FAILURE_RATE / 2 / len(width), 9) * batch_error(found)
    assert (np.abs(found.mean(axis=0) - exact) < allowed).all()
    # and the product of their ratios is the probability of the last
    joint = np.log(np.array(ratio)[100:, 0].mean(axis=0)).sum()
    assert joint == pytest.approx(float(log_ndtr(-BETA / scale[-1])), abs=0.5)
    assert ladder.log_prob == pytest.approx(float(log_ndtr(-BETA)), abs=1.0)


def test_equal_widths_are_equal_steps_of_log_p(any_backend: str) -> None:
    ladder, _, _ = climbed(half_space(any_backend), 1)
    width = ladder.cases().noise[: ladder.z.shape[1]]
    distance = 8.0
    level = -0.5 * distance**2 / (1.0 + width**2)
    assert np.diff(level) == pytest.approx(np.full(len(width) - 1, level[0]), rel=1e-6)


def test_every_stratum_has_a_column_and_the_rare_one_most_of_the_weight(any_backend: str) -> None:
    problem = half_space(any_backend, switch=1e-3)
    ladder, _, _ = climbed(problem, 60)
    assert problem.strata is not None
    on = [int(np.asarray(problem.strata.values["on"])[k]) for k in range(2)].index(1)
    counts = np.bincount(ladder.group, minlength=2)
    assert counts.min() >= 1
    assert counts[on] >= len(ladder.group) // 2
    cases = ladder.cases()
    assert cases.share.sum() == pytest.approx(1.0)
    assert cases.share[cases.group == on].sum() == pytest.approx(0.75, abs=0.01)
    held = np.asarray(cases.held["on"])
    assert (held == (cases.group == on)).all()
    assert ladder.log_prob == pytest.approx(math.log(1e-3) + float(log_ndtr(-BETA)), abs=1.0)


def test_observations_count(backend: str) -> None:
    """x₁ observed at 3 with noise 1/2: x₁ | y ~ N(2.4, 0.2), so a·x ~ N(2.4/√6, (5 + 0.2)/6)."""
    problem = half_space(backend, seen=3.0)
    evidence = float(stats.norm(0.0, math.sqrt(1.25)).logpdf(3.0))
    ladder, severity, _ = climbed(problem, 200, log_evidence=evidence)
    exact = float(log_ndtr(-(BETA - 2.4 / math.sqrt(6)) / math.sqrt(5.2 / 6)))
    assert ladder.log_prob == pytest.approx(exact, abs=1.0)
    assert np.median(np.array(severity)[50:, :, -1]) > -1.0


def test_a_ladder_is_restored_as_it_was(backend: str) -> None:
    problem = half_space(backend, switch=0.1)
    ladder, _, _ = climbed(problem, 5)
    other = Ladder.built(problem.event, problem.strata, 64, np.random.default_rng(9))
    other.restore(ladder.arrays())
    for one in (ladder, other):
        one.advance(problem.event, np.random.default_rng(1))
    assert np.array_equal(ladder.z, other.z)
    smaller = Ladder.built(problem.event, problem.strata, 16, np.random.default_rng(9))
    with pytest.raises(ValueError, match="shape"):
        smaller.restore(ladder.arrays())


# Pursuit --------------------------------------------------------------------------------------------------------------


def pursued(problem: Problem, steps: int, **options: Any) -> tuple[Pursuit, list[float]]:
    rng = np.random.default_rng(0)
    guides = Pursuit.built(problem.event, problem.strata, 64, rng, **options)
    followed = []
    for _ in range(steps):
        guides.advance(problem.event, rng)
        followed.append(guides.log_prob)
    return guides, followed


def test_guides_reach_the_half_space_from_below(backend: str) -> None:
    guides, followed = pursued(half_space(backend), 120)
    assert followed[-1] == pytest.approx(float(log_ndtr(-BETA)), abs=0.3)
    assert np.mean(followed[-40:]) < float(log_ndtr(-BETA)) + 0.1
    cases = guides.cases()
    assert cases.share.sum() == pytest.approx(1.0)
    assert np.median(cases.severity[cases.share > 1e-3]) > -1.0
    np.testing.assert_allclose(cases.noise, 0.3, rtol=0.01)


def test_guides_in_strata_and_with_observations(backend: str) -> None:
    guides, followed = pursued(half_space(backend, switch=1e-3), 120)
    assert followed[-1] == pytest.approx(math.log(1e-3) + float(log_ndtr(-BETA)), abs=1.0)
    cases = guides.cases()
    assert cases.share[np.asarray(cases.held["on"]) == 1].sum() > 0.9
    evidence = float(stats.norm(0.0, math.sqrt(1.25)).logpdf(3.0))
    _, followed = pursued(half_space(backend, seen=3.0), 120, log_evidence=evidence)
    exact = float(log_ndtr(-(BETA - 2.4 / math.sqrt(6)) / math.sqrt(5.2 / 6)))
    assert followed[-1] == pytest.approx(exact, abs=1.0)


# Memory ---------------------------------------------------------------------------------------------------------------


def cases_at(z: np.ndarray, severity: float) -> Cases:
    n = len(z)
    return Cases(z, {}, np.full(n, severity), np.ones(n), np.full(n, 1 / n), np.zeros(n, dtype=np.intp))


def test_memory_keeps_what_is_new_and_near() -> None:
    memory, z = Memory(10), np.eye(4)
    rows = [np.arange(4.0)[:, None]]
    memory.add(cases_at(z, -5.0), rows, 1)
    assert len(memory) == 0  # far from a catastrophe
    memory.add(cases_at(z, 0.5), rows, 2)
    memory.add(cases_at(z * 1.01, 0.5), rows, 3)
    assert len(memory) == 4  # the same again
    assert memory.rows[0].ravel().tolist() == [0.0, 1.0, 2.0, 3.0]


def test_memory_forgets_the_oldest_that_is_solved_first() -> None:
    memory = Memory(3)
    for step in range(3):
        memory.add(cases_at(np.eye(5)[[step]], 0.5), [np.full((1, 1), float(step))], step)
    memory.severity[1] = -10.0
    memory.add(cases_at(np.eye(5)[[3]], 0.5), [np.full((1, 1), 3.0)], 3)
    assert memory.rows[0].ravel().tolist() == [0.0, 2.0, 3.0]
    memory.add(cases_at(np.eye(5)[[4]], 0.5), [np.full((1, 1), 4.0)], 4)
    assert memory.rows[0].ravel().tolist() == [2.0, 3.0, 4.0]
    chosen = memory.choose(200, np.random.default_rng(0))
    assert set(chosen) == {0, 1, 2}
    again = Memory(3)
    again.restore(memory.arrays())
    assert again.rows[0].tolist() == memory.rows[0].tolist()
    assert again.added.tolist() == [2, 3, 4]


# Teachers -------------------------------------------------------------------------------------------------------------


def taught(backend: str) -> tuple[Problem, Any]:
    lib = library(backend)

    def adversary() -> Any:
        return lib.sample("x", lib.dist.Normal(lib.xp.zeros(3), 1.0).to_event(1))

    model = lib.module(lambda w, x: w["a"] * x[..., 0], {"a": 1.0})
    problem = Problem(adversary, model, lambda x, y: y - 3.0)
    return problem, lib


def test_a_teacher_may_be_written_in_any_way(backend: str) -> None:
    problem, lib = taught(backend)
    data = (np.zeros((4, 3), np.float32), np.zeros(4, np.float32))
    z = np.random.default_rng(1).standard_normal((5, 3))
    cases = cases_at(z, 0.0)
    ways = {
        "of the library": lambda x: 2.0 * x[0] + x[1] ** 2,
        "one by one": lambda x: lib.array(2.0 * float(x[0]) + float(x[1]) ** 2),
        "of numpy": lambda x: np.add(2.0 * np.asarray(x)[0], np.asarray(x)[1] ** 2),
        "a whole row": lambda x: (x, 2.0 * x[0] + x[1] ** 2),
    }
    for teacher in ways.values():
        rows = Teacher(teacher, problem.event, data).rows(problem.event, cases)
        assert [leaf.shape for leaf in rows] == [(5, 3), (5,)]
        assert rows[0] == pytest.approx(z, abs=1e-6)
        assert rows[1] == pytest.approx(2 * z[:, 0] + z[:, 1] ** 2, abs=1e-5)
        batch = as_batch(problem.event.backend, rows, data)
        assert isinstance(batch, tuple)


def test_what_a_teacher_may_not_say(backend: str) -> None:
    problem, lib = taught(backend)
    data = (np.zeros((4, 3), np.float32), np.zeros(4, np.float32))
    with pytest.raises(TeacherError, match="row of data"):
        Teacher(lambda x: x, problem.event, data)
    with pytest.raises(TeacherError, match="KeyError"):
        Teacher(lambda x: {}["answer"], problem.event, data)
    silent = Teacher(lambda x: lib.xp.where(x[0] > 0, x[0], lib.xp.nan), problem.event, data)
    with pytest.raises(TeacherError, match="not finite at 1 of 2"):
        silent.rows(problem.event, cases_at(np.array([[1.0, 0, 0], [-1.0, 0, 0]]), 0.0))


# The run as a whole ---------------------------------------------------------------------------------------------------


@functools.cache  # compiled once for all tests
def regression(backend: str) -> tuple[Problem, dict[str, Any]]:
    """M: y = gain · x₀ + bias · x₁, catastrophe |y| ≥ 5; the data say nothing of the bias, the teacher that it is 0."""
    lib = library(backend)

    def adversary() -> Any:
        return lib.sample("x", lib.dist.Normal(lib.xp.zeros(4), 1.0).to_event(1))

    def task(m: Any, batch: Any) -> Any:
        inputs, targets = batch
        return ((m(inputs) - targets) ** 2).mean()

    model = lib.module(lambda w, x: w["gain"] * x[..., 0] + w["bias"] * x[..., 1], {"gain": 0.5, "bias": 1.0})
    inputs = np.random.default_rng(0).standard_normal((64, 4))
    inputs[:, 1] = 0.0
    problem = Problem(adversary, model, lambda x, y: lib.xp.abs(y) - 5.0)
    return problem, {"task": task, "data": (inputs, 0.5 * inputs[:, 0])}


QUICK: dict[str, Any] = {
    "until_log_prob": -1e6, "steps": 30, "check_every": 10, "check_budget": 500, "learning_rate": 0.05,
    "budget": 2_000, "particles": 32, "audit_rounds": 0, "audit_budget": 2_000, "progress": False,
}  # fmt: skip


def weight(model: Any, name: str) -> float:
    return float(parameters(model)[name].item())


def test_a_teacher_teaches_what_the_data_do_not_say(backend: str) -> None:
    problem, data = regression(backend)
    run = train(problem, **data, teacher=lambda x: 0.5 * x[0], **(QUICK | {"steps": 60}))
    assert abs(weight(run.model, "bias")) < 0.15
    assert weight(run.model, "gain") == pytest.approx(0.5, abs=0.1)
    assert run.costs.answers == 60 * 32
    assert run.history[-1].taught_loss < 0.1 * run.history[0].taught_loss
    assert math.isnan(run.history[0].pressure)  # with a teacher log P has no weight of its own


def test_costs_add_up(backend: str) -> None:
    problem, data = regression(backend)
    run = train(problem, **data, **QUICK)
    assert run.calls == sum(part.calls for part in run.costs.parts.values())
    assert run.audit is not None
    assert run.costs.audit.calls == run.audit.calls == sum(found.calls for found in run.audit.estimates)
    assert run.costs.estimates.calls == run.before.calls + run.after.calls
    assert run.history[-1].calls == run.costs.steps.calls + run.costs.looks.calls
    assert run.costs.steps.calls == 30 * 32 * (3 + 3 + 3) + 30 * 4 * 16
    assert run.costs.looks.calls <= 0.1 * run.costs.steps.calls + 500  # and one at the end


def test_steps_of_a_run_compile_nothing_after_the_third() -> None:
    pytest.importorskip("numpyro")
    import jax

    problem, data = regression("numpyro")
    compiled: list[int] = []
    steps: list[int] = [0]

    class Count(Callback):
        def on_step_end(self, state: TrainingState, control: Control, step: Step) -> None:
            steps[0] = state.step

    def listen(event: str, *_: Any, **__: Any) -> None:
        if "backend_compile" in event:
            compiled.append(steps[0])

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        train(
            problem,
            **data,
            **(QUICK | {"check_every": 30, "teacher": lambda x: 0.5 * x[0], "weight": 1.0}),
            callbacks=[Count()],
        )
    finally:
        jax.monitoring.clear_event_listeners()
    assert compiled
    assert not [step for step in compiled if 3 <= step < 29]  # then the look after the last step compiles its own


def test_callbacks_are_told_and_asked(backend: str, tmp_path: Path) -> None:
    problem, data = regression(backend)
    told: list[str] = []

    class Listener(Callback):
        def on_train_begin(self, state: TrainingState, control: Control) -> None:
            told.append("begin")

        def on_step_end(self, state: TrainingState, control: Control, step: Step) -> None:
            told.append("step")
            control.should_evaluate = step.step == 3
            control.should_save = step.step == 4
            control.should_training_stop = step.step == 7

        def on_evaluate(self, state: TrainingState, control: Control, look: Any) -> None:
            told.append("look")

        def on_save(self, state: TrainingState, control: Control) -> None:
            told.append("save")

        def on_train_end(self, state: TrainingState, control: Control) -> None:
            told.append("end")

    run = train(problem, **data, **QUICK, callbacks=[Listener()], checkpoint=tmp_path / "run")
    assert told == ["begin", "step", "step", "step", "look", "step", "save", "step", "step", "step", "end"]
    assert len(run.history) == 7
    assert not run.converged
    assert any("a callback asked" in line for line in run.advice)


def test_early_stopping(backend: str) -> None:
    problem, data = regression(backend)
    run = train(problem, **data, **QUICK, callbacks=[EarlyStopping(max_task_loss=1e-9, patience=5)])
    assert len(run.history) == 5
    assert any("task loss" in line for line in run.advice)


def test_a_schedule_is_followed(backend: str) -> None:
    problem, data = regression(backend)
    run = train(problem, **data, **(QUICK | {"steps": 5}), schedule=lambda step: 0.0)
    assert weight(run.model, "gain") == weight(problem.model, "gain")


def test_steps_are_taken_back_where_the_loss_is_not_finite(backend: str) -> None:
    problem, data = regression(backend)
    lib = library(backend)

    def task(m: Any, batch: Any) -> Any:
        loss = data["task"](m, batch)
        return lib.xp.where(parameters(m)["bias"] < 0.7, lib.xp.nan, loss)

    run = train(problem, task=task, data=data["data"], **QUICK)
    assert weight(run.model, "bias") >= 0.7
    assert math.isfinite(run.after.log_prob)
    assert len(run.history) < 30  # the steps that were taken back


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from test_training import QUICK, Callback, regression, train, weight

class Kill(Callback):
    def on_step_end(self, state, control, step):
        if step.step == int(sys.argv[4]):
            os.kill(os.getpid(), signal.SIGKILL)

problem, data = regression(sys.argv[2])
train(problem, **data, **QUICK, teacher=lambda x: 0.5 * x[0], weight=1.0, checkpoint=sys.argv[3], callbacks=[Kill()])
"""


def test_a_run_that_was_killed_ends_where_it_would_have(backend: str, tmp_path: Path) -> None:
    problem, data = regression(backend)
    options = QUICK | {"teacher": lambda x: 0.5 * x[0], "weight": 1.0}
    whole = train(problem, **data, **options)
    path, at = tmp_path / "run", str(np.random.default_rng(os.getpid()).integers(11, 30))
    here = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLED, here, backend, str(path), at], capture_output=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    assert path.exists()
    rest = train(problem, **data, **options, checkpoint=path)
    assert [step.step for step in rest.history] == list(range(1, 31))
    for name in ("gain", "bias"):
        assert weight(rest.model, name) == pytest.approx(weight(whole.model, name), abs=1e-6)


# Audits ---------------------------------------------------------------------------------------------------------------


class Fooled:
    """An estimator that training has fooled: it says, and states with confidence, what it would be told."""

    name = "fooled"
    needs: frozenset[str] = frozenset()

    def __init__(self, log_prob: float = -60.0) -> None:
        self.log_prob = log_prob

    def run(self, event: Any, *, budget: int, seed: np.random.SeedSequence) -> Run:
        meter = Meter(event, budget)
        meter.evaluate(np.zeros((1, event.dim)))
        low, high = self.log_prob - 0.1, self.log_prob + 0.1
        return Run.of(Evidence(self.name, self.log_prob, 0.05, (low, high), "unbiased", meter.calls, 0.0, True))


def test_an_audit_believes_the_higher(backend: str) -> None:
    problem = half_space(backend)
    found = audit(problem, methods=[Fooled(), Tempering(particles=512), Fooled(-70.0)], budget=60_000, progress=False)
    assert found.estimate.conclusion.method == "tempering"
    assert found.log_prob == pytest.approx(float(log_ndtr(-BETA)), abs=5 * found.std_error)
    assert found.calls == sum(one.calls for one in found.estimates)
    assert "fooled" in repr(found)


def test_an_audit_of_its_own_methods(backend: str) -> None:
    found = audit(half_space(backend), budget=20_000, progress=False)
    assert [one.conclusion.method for one in found.estimates][1:] == ["tempering", "monte carlo"]
    assert found.converged
    assert found.lower <= float(log_ndtr(-BETA)) <= found.upper
    with pytest.raises(ValueError, match="no methods"):
        audit(half_space(backend), methods=[])


def test_where_training_has_fooled_an_estimator_the_audit_says_so(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The estimate after training is made to say what training wants to hear; training then goes on from the audit."""
    problem, data = regression(backend)
    honest = probest.train.__globals__["estimate"]

    def fooled(problem: Problem, **options: Any) -> Any:
        return (
            honest(problem, **options, estimator=Fooled()) if "estimator" not in options else honest(problem, **options)
        )

    monkeypatch.setitem(probest.train.__globals__, "estimate", fooled)
    options = QUICK | {"until_log_prob": -50.0, "audit_rounds": 1, "learning_rate": 1e-4}
    run = train(problem, **data, **options, audit=Tempering(particles=512))
    assert run.after.log_prob == -60.0
    assert run.after.converged
    assert not run.converged
    assert run.believed is run.audit.estimate  # type: ignore[union-attr]
    gap, low, high = run.audit_gap
    assert low <= gap <= high
    assert high < -10.0
    assert any("not known to be below" in line for line in run.advice)
    assert any("fooled says" in line for line in run.advice)
    assert len(run.history) == 30 + 10  # a further round, from what the audit found


@pytest.mark.parametrize(
    ("lines", "chosen"),
    [
        (((-11.8, 0.06, False), (-10.8, 1.0, False)), 0),  # one hit, by chance
        (((-41.8, 0.2, False), (-34.2, 1.4, False)), 1),  # not by chance
        (((-11.8, 0.06, False), (-10.8, 0.9, True)), 0),
        (((-11.8, 0.06, True), (-11.0, 0.2, False)), 1),  # refuted
        (((-11.8, 0.06, True), (-11.7, 0.02, False)), 0),
        (((-11.8, 1.2, False), (-11.0, 1.0, False), (-math.inf, math.inf, False)), 1),
    ],
)
def test_whom_an_audit_believes(lines: tuple[tuple[float, float, bool], ...], chosen: int) -> None:
    """log P, its standard error, and whether it has converged."""
    estimates = [
        SimpleNamespace(
            log_prob=log_prob, std_error=error, converged=converged, upper=log_prob + 2.0 * error,
            conclusion=Evidence(
                "made up", log_prob, error, (log_prob - 2.0 * error, min(log_prob + 2.0 * error, 0.0))
                if math.isfinite(error) else (-math.inf, -9.0), "consistent", 1, 0.0, converged,
            ),
        )
        for log_prob, error, converged in lines
    ]  # fmt: skip
    assert Audit(tuple(estimates), 0.0).estimate is estimates[chosen]  # type: ignore[arg-type]


# Opponents ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["pyro"], indirect=True)  # the host's part; compiling takes a minute
def test_opponents_are_searched_for_kept_and_played_against(backend: str, tmp_path: Path) -> None:
    problem, data = regression(backend)
    options = QUICK | {"adversaries": Pool(kl=2.0, every=10, most=2), "check_budget": 4_000}
    run = train(problem, **data, **options)
    assert 1 <= len(run.adversaries) <= 2
    given = estimate(problem, budget=4_000, progress=False)
    under = estimate(problem.replaced(adversary=run.adversaries[-1]), budget=4_000, progress=False)
    assert under.log_prob > given.log_prob + 3.0  # what was found against a later model is bad for the first, too
    assert abs(weight(run.model, "bias")) < 0.95

    def stop(self: Descent) -> Losses:
        if self.state.step == 20:
            raise KeyboardInterrupt
        return step(self)

    step, path = Descent._step, tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Descent, "_step", stop)
        train(problem, **data, **options, checkpoint=path)
    rest = train(problem, **data, **options, checkpoint=path)
    for name in ("gain", "bias"):
        assert weight(rest.model, name) == pytest.approx(weight(run.model, name), abs=1e-5)


def test_an_opponent_replaces_the_one_that_it_resembles(backend: str) -> None:
    problem = half_space(backend)
    rng = np.random.default_rng(0)
    opponents = Opponents(problem.event, Pool(most=2))
    found = [search(problem, kl=2.0, steps=5, refine=0, seed=seed, progress=False) for seed in range(2)]
    for one in found:
        opponents.add(one, rng)
    assert len(opponents) == 1
    ladder = Ladder.built(problem.event, None, 32, rng)
    ladder.advance(problem.event, rng)
    cases = opponents.cases(problem.event, ladder, 64, rng)
    assert cases.share.sum() == pytest.approx(1.0)
    assert (cases.severity > -2.0).mean() > 0.9  # all but catastrophes, where draws of the adversary are at -4
    again = Opponents(problem.event, Pool(most=2))
    again.restore(opponents.arrays())
    drawn = [one.laws[0].draw(one.laws[0].parts, 5, np.random.default_rng(1))["z"] for one in (opponents, again)]
    assert drawn[0] == pytest.approx(drawn[1], abs=1e-5)


def test_what_a_pool_may_not_be() -> None:
    for words, change in (
        ("kl=", {"kl": 0.0}),
        ("every=", {"every": 0}),
        ("steps=", {"steps": 0}),
        ("family", {"family": "worse"}),
    ):
        with pytest.raises(ValueError, match=words):
            Pool(**change)  # type: ignore[arg-type]


def test_the_units_of_the_loss_do_not_matter(any_backend: str) -> None:
    problem, data = regression(any_backend)
    runs = []
    for unit in (1.0, 1e-4):

        def task(m: Any, batch: Any, unit: float = unit) -> Any:
            return unit * data["task"](m, batch)

        runs.append(train(problem, task=task, data=data["data"], **QUICK))
    for name in ("gain", "bias"):
        assert weight(runs[0].model, name) == pytest.approx(weight(runs[1].model, name), abs=0.02)
