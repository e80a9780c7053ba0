"""The kit that users check their own parts with: it passes what is sound and names what is not."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from library import library

from probest import Problem
from probest.estimators import Counts, Evidence, Meter, MonteCarlo, Note, Run, generator
from probest.evidence import Code, EventLike
from probest.testing import (
    CheckError,
    ExactEvent,
    check_checker,
    check_estimator,
    check_evidence,
    check_model,
    check_program,
    check_run,
)
from probest.testing.events import half_space


def problem(backend: str, model: Any = None, checker: Any = None) -> Problem:
    lib = library(backend)

    def adversary() -> Any:
        kind = lib.sample("kind", lib.dist.Bernoulli(lib.array(0.3)))
        rate = lib.sample("rate", lib.dist.Gamma(lib.array(2.0), lib.array(1.0)))
        return lib.xp.stack([kind * 1.0, rate, lib.sample("shift", lib.dist.Normal(lib.array(0.0), lib.array(1.0)))])

    return Problem(adversary, model or (lambda x: 2.0 * x), checker or (lambda x, y: y.sum() - 9.0))


def test_a_sound_problem_passes_and_is_described(backend: str) -> None:
    sound = problem(backend)
    for check in (check_program, check_model, check_checker):
        seen = check(sound)
        assert seen.sites == ("kind", "rate", "shift")
        assert seen.discrete == ("kind",)
        assert (seen.dim, seen.differentiable, seen.boolean, seen.weighted) == (3, True, False, False)
        assert seen.severity[0] < seen.severity[1]


def test_a_program_is_checked_without_model_and_checker(backend: str) -> None:
    seen = check_program(problem(backend).adversary)
    assert seen.sites == ("kind", "rate", "shift")


def test_a_program_that_overflows_far_out_is_named(backend: str) -> None:
    lib = library(backend)

    def adversary() -> Any:
        x = lib.sample("x", lib.dist.Normal(lib.array(0.0), lib.array(1.0)))
        return lib.sample("far", lib.dist.LogNormal(15.0 * x, lib.array(1.0)))

    with pytest.raises(CheckError, match="'far' is not finite at draws at ±8"):
        check_program(adversary)


def test_a_model_that_is_not_finite_is_named(backend: str) -> None:
    lib = library(backend)
    with pytest.raises(CheckError, match="an action is not finite"):
        check_model(
            problem(backend, model=lambda x: x / (x[0] * lib.array(0.0) + lib.array(0.0)), checker=lambda x, y: x[2])
        )


def test_a_severity_that_leads_nowhere_is_named(backend: str) -> None:
    with pytest.raises(CheckError, match="leads nowhere"):
        check_checker(problem(backend, checker=lambda x, y: 0.0 * y.sum() - 1.0))


def test_a_gradient_that_is_cut_is_named(backend: str) -> None:
    cut = {"pyro": lambda y: y.detach(), "numpyro": lambda y: __import__("jax").lax.stop_gradient(y)}[backend]
    with pytest.raises(CheckError, match="differs from central differences"):
        check_checker(problem(backend, checker=lambda x, y: cut(y).sum() - 9.0 + 0.0 * y.sum()))


@dataclass(frozen=True)
class Plain:
    """A user's own estimator: plain sampling."""

    n: int = 2_000

    @property
    def name(self) -> str:
        return "plain"

    def run(self, event: EventLike, *, budget: int, seed: np.random.SeedSequence) -> Run:
        meter = Meter(event, budget)
        n = min(self.n, meter.budget)
        hits = int(np.count_nonzero(meter.evaluate(generator(seed).standard_normal((n, event.dim))).severity >= 0.0))
        p = hits / n
        error = math.sqrt((1 - p) / hits) if 0 < hits < n else math.inf
        notes = () if error < 0.3 else (Note(Code.FEW_HITS, "raise n."),)
        log_prob = math.log(p) if hits else -math.inf
        interval = (max(-math.inf, log_prob - 2 * error) if hits else -math.inf, 0.0)
        return Run.of(
            Evidence(
                self.name, log_prob, error, interval, "unbiased", meter.calls, meter.seconds, not notes, notes=notes
            ),
            counts=Counts(hits, n),
        )


EVENTS = (half_space(2, 0.0), half_space(2, 2.0), half_space(10, 5.0))


def test_an_estimator_of_ones_own_passes() -> None:
    outcomes = check_estimator(Plain(), EVENTS)
    assert [outcome.run is not None for outcome in outcomes] == [True] * 3
    assert abs(outcomes[0].error) < 0.1
    assert outcomes[2].run is not None
    assert outcomes[2].run.conclusion.log_prob == -math.inf


@dataclass(frozen=True)
class Broken(Plain):
    """A defect by name."""

    defect: str = ""

    def run(self, event: EventLike, *, budget: int, seed: np.random.SeedSequence) -> Any:
        if self.defect == "budget":
            return Plain(self.n).run(event, budget=max(budget, 10), seed=seed)
        if self.defect == "seed":
            seed.spawn(1)
            seed = np.random.SeedSequence(seed.n_children_spawned)
        run = Plain(self.n).run(event, budget=budget, seed=seed)
        line = run.conclusion
        if self.defect == "evidence":
            return line
        if self.defect == "silent":
            line = replace(line, converged=False, notes=())
        if self.defect == "overconfident" and line.converged:
            line = replace(line, std_error=1e-6)
        return replace(run, ledger=(line,))


@pytest.mark.parametrize(
    ("defect", "message"),
    [
        ("budget", "calls: 10 of a budget of 1"),
        ("seed", "the same seed gave"),
        ("evidence", r"run\(\) returned Evidence"),
        ("silent", "no note says why"),
        ("overconfident", "from the truth"),
    ],
)
def test_a_defect_of_an_estimator_is_named(defect: str, message: str) -> None:
    with pytest.raises(CheckError, match=message):
        check_estimator(Broken(defect=defect), EVENTS)


def test_events_that_lack_what_an_estimator_needs_are_skipped() -> None:
    @dataclass(frozen=True)
    class Greedy(Plain):
        needs = frozenset({"gradient"})

        def run(self, event: EventLike, *, budget: int, seed: np.random.SeedSequence) -> Run:
            assert event.differentiable
            return Plain(self.n).run(event, budget=budget, seed=seed)

    flat = ExactEvent("no gradient", 2, math.log(0.5), lambda z: z[:, 0])
    assert [outcome.run is None for outcome in check_estimator(Greedy(), [flat, EVENTS[0]])] == [True, False]


def test_evidence_that_contradicts_itself_is_named() -> None:
    event = half_space(2, 2.0)
    line = MonteCarlo(max_samples=1_000).run(event, budget=1_000, seed=np.random.SeedSequence(0)).conclusion
    check_evidence(line, event, 1_000)
    assert line.particles is not None
    for change, message in (
        ({"calls": 1_001}, "calls"),
        ({"std_error": math.nan}, "NaN"),
        ({"interval": (line.log_prob + 0.1, 0.0)}, "log_prob"),
        ({"interval": (line.log_prob - 0.1, 0.1)}, "interval"),
        ({"particles": line.particles._replace(severity=line.particles.severity + 1.0)}, "severity"),
        ({"particles": line.particles._replace(log_weight=line.particles.log_weight + 1.0)}, "log_weight"),
    ):
        with pytest.raises(CheckError, match=message):
            check_run(Run.of(replace(line, **change)), event, 1_000)
