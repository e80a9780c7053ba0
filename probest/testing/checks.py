"""The checks that this project runs on its own parts, for yours: a program, a model, a checker, an estimator.

Each raises :class:`CheckError` (an ``AssertionError``) that names what is wrong, and returns what it saw, so that it
can be used in a test as it is::

    from probest.testing import check_estimator, check_program

    def test_my_program():
        check_program(adversary)

    def test_my_estimator():
        check_estimator(MyEstimator())
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import scipy

from probest.budget import UndefinedError
from probest.estimators.base import Estimator, UnmetNeedError, check_needs
from probest.evidence import Evaluation, EventLike, Evidence, Floats, Run
from probest.problem import Problem
from probest.programs.event import Event
from probest.testing.events import EXACT_EVENTS, ExactEvent, union

__all__ = [
    "FAILURE_RATE",
    "CheckError",
    "Checked",
    "Outcome",
    "check_checker",
    "check_estimator",
    "check_evidence",
    "check_model",
    "check_program",
    "check_run",
    "check_truth",
]

FAILURE_RATE = 1e-5
"""How often a correct part may fail one statistical check by chance; tolerances follow from it. Seeds are fixed, so
what passes once passes always."""

_FAR = 8.0  # standard deviations at which maps have to be exact
_POINTS = 64
_STEP = 1e-3  # of central differences, in standard deviations: float32 leaves three digits
_SLOPE_ERROR = 0.05


class CheckError(AssertionError):
    """A part does not keep its contract; the message says which clause and what was seen."""


class Checked(NamedTuple):
    """What a check saw of a problem.

    sites: names of the latent sites, in order. discrete: those whose value is piecewise constant. dim: standard-normal
    coordinates. differentiable, boolean, weighted: see :class:`~probest.evidence.EventLike`. severity: its least and
    largest value at draws of the adversary.
    """

    sites: tuple[str, ...]
    discrete: tuple[str, ...]
    dim: int
    differentiable: bool
    boolean: bool
    weighted: bool
    severity: tuple[float, float]


class Outcome(NamedTuple):
    """What an estimator did on one exact event; run is None where it was refused for what it needs."""

    event: ExactEvent
    run: Run | None

    @property
    def error(self) -> float:
        """log P̂ − log P."""
        return math.nan if self.run is None else self.run.conclusion.log_prob - self.event.log_prob


def check_program(program: Callable[..., Any] | Problem, *, backend: str | None = None, seed: int = 0) -> Checked:
    """Check that a program can be an adversary: its sites have maps, which hold far out, and it repeats itself.

    program: an adversary that takes no argument, or a :class:`~probest.Problem` (for one that runs the closed loop).
    backend: as for ``Problem``. Raises what ``Problem.event`` raises for a program that cannot be used, and CheckError
    for one that gives NaN or infinite values at coordinates of up to eight standard deviations.
    """
    problem = program
    if not isinstance(problem, Problem):
        problem = Problem(problem, _observed, _size, backend=backend)
    event = problem.event
    rng = np.random.Generator(np.random.Philox(seed))
    near = rng.standard_normal((_POINTS, event.dim))
    far = _FAR * rng.choice([-1.0, 1.0], (_POINTS, event.dim))
    for label, z in (("ordinary draws", near), (f"draws at ±{_FAR:g} standard deviations", far)):
        for name, values in event.site_values(z).items():
            _require(
                bool(np.isfinite(np.asarray(values, dtype=np.float64)).all()), f"site {name!r} is not finite at {label}"
            )
        weight = event.evaluate(z).log_weight
        _require(not np.isnan(weight).any(), f"the log-weight of observed sites is NaN at {label}")
    _check_rows(event, near)
    return _seen(event, near)


def check_model(problem: Problem, *, seed: int = 0) -> Checked:
    """Check a problem's model: the same action for the same observation, alone or in a batch, and finite.

    Raises what ``Problem.event`` raises, and CheckError.
    """
    event = problem.event
    z = np.random.Generator(np.random.Philox(seed)).standard_normal((_POINTS, event.dim))
    leaves = event.backend.leaves
    whole = leaves(event.decode(z).action)
    for leaf in whole:
        _require(bool(np.isfinite(np.asarray(leaf, dtype=np.float64)).all()), "model: an action is not finite")
    for row in range(3):
        alone = leaves(event.decode(z[row : row + 1]).action)
        same = all(_alike(one[0], all_[row]) for one, all_ in zip(alone, whole, strict=True))
        _require(same, "model: an action differs between a batch and its row alone (batch statistics? randomness?)")
    return _seen(event, z)


def check_checker(problem: Problem, *, seed: int = 0) -> Checked:
    """Check a problem's checker: a severity that is a number, that leads somewhere, with a gradient that is its own.

    Raises what ``Problem.event`` raises, and CheckError: where all severities are equal although they are real numbers,
    or where the gradient along random directions is not what central differences say at most points.
    """
    event = problem.event
    z = np.random.Generator(np.random.Philox(seed)).standard_normal((_POINTS, event.dim))
    seen = _seen(event, z)
    if not event.boolean:
        level = seen.severity[0]
        _require(
            seen.severity[0] < seen.severity[1], f"checker: the severity is {level:g} at every draw: it leads nowhere"
        )
    if event.differentiable:
        _check_gradient(event, z, seed)
    return seen


def check_evidence(evidence: Evidence, event: EventLike, budget: int) -> None:
    """Check what holds of every evidence, whatever the event. Raises CheckError."""
    lower, upper = evidence.interval
    numbers = (evidence.log_prob, evidence.std_error, lower, upper, evidence.log_evidence)
    _require(0 <= evidence.calls <= budget, f"calls: {evidence.calls} of a budget of {budget}")
    _require(not any(map(math.isnan, numbers)), f"a number is NaN: {numbers}")
    _require(lower <= evidence.log_prob <= 0.0, f"log_prob={evidence.log_prob} with an interval that starts at {lower}")
    _require(lower <= upper <= 0.0, f"interval=({lower}, {upper})")
    silent = not (evidence.converged or evidence.notes or evidence.claim == "heuristic")
    _require(not silent, "not converged, and no note says why")
    if evidence.log_prob == -math.inf:
        _require(not evidence.converged, "converged without a catastrophe")
        _require(lower == -math.inf, "a lower bound without a catastrophe")
    if evidence.particles is not None:
        z, log_weight, severity = evidence.particles
        _require(z.shape == (len(severity), event.dim), f"particles.z has shape {z.shape}")
        _require(float(severity.min()) >= 0.0, "a particle is no catastrophe")
        total = float(scipy.special.logsumexp(log_weight))
        _require(abs(total) < 1e-9, f"particles.log_weight sums to exp({total}), not 1")
        again = event.evaluate(z).severity
        _require(
            bool(np.allclose(again, severity, rtol=1e-4, atol=1e-4)), "particles.severity is not that of particles.z"
        )


def check_run(run: Run, event: EventLike, budget: int) -> None:
    """Check every line of a run, and that they keep to its budget together. Raises CheckError."""
    _require(isinstance(run, Run), f"run() returned {type(run).__name__}; expected probest.evidence.Run")
    _require(0 <= run.calls <= budget, f"calls: {run.calls} of a budget of {budget}")
    for line in run.ledger:
        check_evidence(line, event, budget)


def check_estimator(
    method: Estimator,
    events: Iterable[ExactEvent] = EXACT_EVENTS,
    *,
    budget: int = 20_000,
    seed: int = 1,
    failure_rate: float = FAILURE_RATE,
) -> tuple[Outcome, ...]:
    """Run an estimator on events with known answers, and check that it keeps the contract.

    On every event: the budget is a ceiling, the evidence is sound (:func:`check_evidence`), and where it is converged
    the truth lies within ``failure_rate`` of its standard error. On one of them: the same seed gives the same run,
    however the event is chunked; tiny budgets are kept to; bad budgets and NaN severities are refused (ValueError).
    Events that lack what the method ``needs`` are skipped: ``estimate`` refuses it there before it runs.

    Returns what it did on each. Raises CheckError.
    """
    outcomes = []
    for event in events:
        try:
            check_needs(method, event)
        except UnmetNeedError:
            outcomes.append(Outcome(event, None))
            continue
        run = method.run(event, budget=budget, seed=np.random.SeedSequence(seed))
        with _named(method, event):
            check_run(run, event, budget)
            check_truth(run.conclusion, event, failure_rate)
        outcomes.append(Outcome(event, run))
    plain = union(3, (2.0, 2.5, 3.0, 3.0))  # of comparisons alone: rounding does not depend on the chunks
    with _named(method, plain):
        _check_repeats(method, plain, seed)
        _check_budgets(method, plain)
    return tuple(outcomes)


def check_truth(evidence: Evidence, event: ExactEvent, failure_rate: float = FAILURE_RATE) -> None:
    """Check that a converged evidence is as near to the truth as it says. Raises CheckError.

    Errors of log P are judged by Student's t, with half the freedom of the families where those gave the error.
    """
    if not evidence.converged:
        return
    freedom = 7 if evidence.method == "tempering" or "island_ess" in evidence.diagnostics else 60
    reach = float(scipy.special.stdtrit(freedom, 1.0 - failure_rate / 2)) * evidence.std_error
    away = evidence.log_prob - event.log_prob
    _require(
        abs(away) < reach,
        f"converged on {evidence.log_prob:.4f} ± {evidence.std_error:.4f}, which is {away:+.4f} from the truth",
    )


@dataclass
class _named:  # noqa: N801 - a context
    """Says of which method and event an error is."""

    method: Estimator
    event: ExactEvent

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, CheckError):
            raise CheckError(f"{self.method.name} on {self.event.name}: {error}") from error


class _Chunked(ExactEvent):
    """An event that is evaluated in seven parts."""

    def evaluate(self, z: Floats, *, gradient: bool = False) -> Evaluation:
        parts = [ExactEvent.evaluate(self, part, gradient=gradient) for part in np.array_split(z, 7) if len(part)]
        grads = [part.severity_grad for part in parts if part.severity_grad is not None]
        return Evaluation(
            np.concatenate([part.severity for part in parts]),
            np.concatenate([part.log_weight for part in parts]),
            np.concatenate(grads) if grads else None,
        )


def _check_repeats(method: Estimator, event: ExactEvent, seed: int) -> None:
    source = np.random.SeedSequence(seed)
    chunked = _Chunked(event.name, event.dim, event.log_prob, event.severity, event.gradient)
    one = method.run(event, budget=5_000, seed=source)
    # the same object again: running leaves no trace in the seed
    two = method.run(chunked, budget=5_000, seed=source)
    first, second = ((run.conclusion.log_prob, run.conclusion.std_error, run.calls) for run in (one, two))
    _require(first == second, f"the same seed gave {first} and, chunked, {second}")


def _check_budgets(method: Estimator, event: ExactEvent) -> None:
    for budget in (1, 7, 40, 300):
        check_run(method.run(event, budget=budget, seed=np.random.SeedSequence(0)), event, budget)
    for wrong in (0, -5):
        _refuses(method, event, wrong, "budget")
    broken = replace(event, severity=lambda z: np.full(len(z), np.nan))
    try:
        run = method.run(broken, budget=1_000, seed=np.random.SeedSequence(0))
    except UndefinedError:
        return
    _require(not run.conclusion.converged, "converged on severities that are NaN")


def _refuses(method: Estimator, event: ExactEvent, budget: int, name: str) -> None:
    try:
        method.run(event, budget=budget, seed=np.random.SeedSequence(0))
    except ValueError as error:
        _require(name in str(error), f"{name}={budget} was refused without naming {name}: {error}")
        return
    raise CheckError(f"{name}={budget} was accepted")


def _check_rows(event: Event, z: Floats) -> None:
    """A row alone gives what it gives in a batch."""
    whole = event.evaluate(z)
    for row in range(3):
        alone = event.evaluate(z[row : row + 1])
        same = _alike(alone.severity[0], whole.severity[row]) and _alike(alone.log_weight[0], whole.log_weight[row])
        _require(same, "program: a draw differs between a batch and its row alone")


def _check_gradient(event: Event, z: Floats, seed: int) -> None:
    rng = np.random.Generator(np.random.Philox([seed, 1]))
    smooth = ~event.discrete_coordinates
    direction = rng.standard_normal(z.shape) * smooth
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    gradient = event.evaluate(z, gradient=True).severity_grad
    assert gradient is not None
    _require(bool(np.isfinite(gradient[:, smooth]).all()), "checker: the gradient of the severity is not finite")
    slope = np.sum(np.where(smooth, gradient, 0.0) * direction, axis=1)
    rise = event.evaluate(z + _STEP * direction).severity - event.evaluate(z - _STEP * direction).severity
    scale = np.abs(slope) + np.abs(rise / (2.0 * _STEP)) + np.linalg.norm(np.where(smooth, gradient, 0.0), axis=1)
    off = np.abs(rise / (2.0 * _STEP) - slope) > _SLOPE_ERROR * scale + 1e-5 / _STEP * np.abs(
        event.evaluate(z).severity
    )
    share = float(off.mean())  # kinks are few; a gradient that is cut (detach, NumPy inside) is wrong everywhere
    _require(share < 0.5, f"checker: the gradient differs from central differences at {share:.0%} of the points")


def _observed(observation: Any) -> Any:
    return observation


def _size(observation: Any, _: Any) -> Any:
    """Any severity: the program alone is checked."""
    leaf: Any = observation
    while isinstance(leaf, tuple | list | dict):
        leaf = next(iter(leaf.values() if isinstance(leaf, dict) else leaf))
    return (leaf * 1.0).sum() - 1.0


def _seen(event: Event, z: Floats) -> Checked:
    severity = event.evaluate(z).severity
    return Checked(
        sites=tuple(site.name for site in event.sites),
        discrete=event.discrete_sites,
        dim=event.dim,
        differentiable=event.differentiable,
        boolean=event.boolean,
        weighted=event.weighted,
        severity=(float(severity.min()), float(severity.max())),
    )


def _alike(one: Any, other: Any) -> bool:
    one, other = np.asarray(one, dtype=np.float64), np.asarray(other, dtype=np.float64)
    return one.shape == other.shape and bool(np.allclose(one, other, rtol=1e-4, atol=1e-4, equal_nan=True))


def _require(kept: bool, message: str) -> None:
    if not kept:
        raise CheckError(message)
