"""``train()``: step a model away from its catastrophes until they are vanishingly unlikely, then audit it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from probest.audit import PRECISE, Audit, believed, panel, refutes, run_panel, settles
from probest.backends.base import Backend, PyTree
from probest.estimate import Estimate, check_whole, estimate
from probest.estimators.base import Estimator
from probest.problem import Problem
from probest.report.progress import Progress
from probest.seeds import child_seed, generator, number
from probest.training.callbacks import Callback
from probest.training.checkpoint import Cost, Costs, Step, TrainingState, resume
from probest.training.descent import Descent, Options, Stream, batch_of, worth
from probest.training.follower import Follower
from probest.training.ladder import Ladder
from probest.training.memory import Memory
from probest.training.opponents import Opponents, Pool
from probest.training.pursuit import Pursuit
from probest.training.reader import Reader
from probest.training.teacher import Teacher
from probest.verdict import agree

if TYPE_CHECKING:
    import os

__all__ = ["Cost", "Costs", "Pool", "Step", "TrainingRun", "train"]

FOLLOWERS: dict[str, Callable[..., Follower]] = {
    "log_prob": Ladder.built,
    "lower_bound": Pursuit.built,
    "reading": lambda event, _, particles, rng, **__: Reader.built(event, particles, rng),
}

UNMOVED = 0.3
"""Nats: by less than this, training has changed nothing that is worth its name."""


@dataclass(frozen=True)
class TrainingRun:
    """A trained model and the evidence about it.

    model: the trained model (the problem's own is unchanged). adversary: that of the problem. problem: the problem with
    the trained model. before, after: estimates by the same method. audit: estimates by other methods and seeds, None if
    training was interrupted. converged: log P is below the target, audited. advice: what is missing. costs: model
    calls and seconds, by what they were spent on. adversaries: those that were searched for and kept, as programs.
    """

    model: Any
    adversary: Any
    problem: Problem
    history: tuple[Step, ...]
    before: Estimate
    after: Estimate
    audit: Audit | None
    converged: bool
    advice: tuple[str, ...]
    costs: Costs
    adversaries: tuple[Callable[..., Any], ...] = ()

    @property
    def audit_gap(self) -> tuple[float, float, float]:
        """By how many nats the estimate after training is above the audit, and the 95 % interval of that.

        Below 0 the audit found more than the estimate knows of. NaN, and as wide as they come, where either found no
        catastrophe.
        """
        if self.audit is None or not (math.isfinite(self.audit.log_prob) and math.isfinite(self.after.log_prob)):
            return math.nan, -math.inf, math.inf
        after, audit = self.after, self.audit.estimate
        gap = after.log_prob - audit.log_prob
        below = math.hypot(after.log_prob - after.lower, audit.upper - audit.log_prob)
        above = math.hypot(after.upper - after.log_prob, audit.log_prob - audit.lower)
        return gap, gap - below, gap + above

    @property
    def believed(self) -> Estimate:
        """Of the estimate after training and those of the audit, the one to believe (:class:`probest.Audit`)."""
        return self.after if self.audit is None else believed((self.after, *self.audit.estimates))

    @property
    def calls(self) -> int:
        """Model calls of everything together, the calls on the task's own data apart (``costs.task_calls``)."""
        return self.costs.calls

    @property
    def seconds(self) -> float:
        return self.costs.seconds

    def __repr__(self) -> str:
        return (
            f"TrainingRun(log P {self.before.log_prob:.4g} -> {self.believed.log_prob:.4g}, steps={len(self.history)}, "
            f"converged={self.converged}, calls={self.calls})"
        )

    def plot(self, kind: str = "history", **options: Any) -> Any:
        """A picture, in matplotlib.

        Args:
            kind: ``"history"``: log P and the task's loss over training, with looks, estimates and audit.
                ``"costs"``: what calls and seconds were spent on. Or a kind of :meth:`probest.result.Result.plot`, of
                the estimate to believe.
            options: of the function in :mod:`probest.report.plots` that draws it.
        """
        from probest.report.plots import plot_run

        return plot_run(self, kind, **options)

    def report(self, path: str | os.PathLike[str], *, title: str = "", show: Callable[..., None] | None = None) -> Path:
        """Write an HTML file that stands alone, as :meth:`probest.result.Result.report` does of an estimate."""
        from probest.report.document import write_run_report

        return write_run_report(self, path, title=title, show=show)

    def _repr_html_(self) -> str:
        from probest.report.html import run_html

        return run_html(self)


def train(
    problem: Problem,
    *,
    task: Callable[[Any, PyTree], Any],
    data: PyTree,
    teacher: Callable[[PyTree], PyTree] | None = None,
    until_log_prob: float = -25.0,
    steps: int = 1_000,
    weight: float | None = None,
    teacher_weight: float = 1.0,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    optimizer: Any = None,
    schedule: Callable[[int], float] | None = None,
    max_norm: float = 0.2,
    max_pressure: float = 0.06,
    particles: int = 128,
    memory: int = 1_024,
    replay: int = 32,
    check_every: int = 50,
    budget: int = 50_000,
    check_budget: int = 20_000,
    audit: Estimator | Sequence[Estimator] | None = None,
    audit_budget: int | None = None,
    audit_rounds: int = 1,
    adversaries: Pool | None = None,
    objective: Literal["log_prob", "lower_bound", "reading"] = "log_prob",
    callbacks: Sequence[Callback] = (),
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> TrainingRun:
    """Train the model on its task and away from its catastrophes, and audit the result.

    A ladder of particles follows the catastrophes of the present model and what leads to them, from what one draw in
    ten reaches to the event itself. With a ``teacher``, the task is also learnt on these cases, with the teacher's
    answers; what is nearly a catastrophe is remembered and replayed. Without one, log P, smoothed at each of these
    widths, is stepped down. Once the ladder has log P below the target and a fresh look finds nothing above it, the
    learning rate falls for another ``check_every`` steps; training ends if that still holds, or after ``steps``. Then
    log P is estimated afresh, and audited by other methods from other seeds; if the audit finds more, above the target,
    training goes on from there.

    Args:
        problem: its model is trained: a torch ``nn.Module`` or a jax pytree with floating-point arrays.
        task: ``task(model, batch) -> scalar`` loss to keep low.
        data: pytree of arrays with a common leading axis; minibatches are rows of it.
        teacher: ``teacher(x)`` says of one observation what the model should do there: a label, a target, an action.
            It may be slow. The pair (x, answer) has to be like a row of ``data``, or the answer itself a whole row (the
            observation itself, where the task needs no answers).
        until_log_prob: stop when log P is below this (natural logarithm).
        steps: optimisation steps at most, in the first round.
        weight: of log P in the loss, down to a few nats below the target and no further; 1 without a teacher, 0 with
            one unless said otherwise. Its gradient is clipped, so large values do not differ.
        teacher_weight: of the task's loss on hard cases, beside its loss on a minibatch.
        batch_size: rows of ``data`` a step.
        learning_rate: of Adam; unless ``optimizer`` is given.
        optimizer: torch: a function of the parameters to a ``torch.optim.Optimizer``; jax: an optax transformation.
        schedule: share of the learning rate at each step, from 0 on, such as ``optax.cosine_decay_schedule(1.0, 900)``;
            by default a cosine down to a tenth over ``steps``, and a quicker one once the target has been reached.
        max_norm: the norm of the task's gradient is clipped to so many times what the task is worth: by how much its
            loss changes, on a minibatch, when the model's weights are shuffled. So train M on its task beforehand.
        max_pressure: the gradients of log P and of the lessons are clipped to so many times that, apart from the
            task's: it bounds how much of the task is given up for safety, whatever the units of its loss.
        particles: size of the ladder.
        memory: cases that are remembered with the teacher's answers, at most.
        replay: cases from memory a step.
        check_every: steps between fresh looks, where they are due.
        budget: model calls of each full estimate (before, after).
        check_budget: model calls of each fresh look.
        audit: a method, or several, which share ``audit_budget``. By default what ``estimate`` does by itself,
            tempering with many particles, and plain sampling.
        audit_budget: model calls of each audit; four times ``budget`` by default.
        audit_rounds: how often training goes on from what an audit found, for a quarter of ``steps`` each, at most.
        adversaries: adversaries to search for during training and to play against beside the given one; None for none.
        objective: ``"log_prob"``: the ladder. ``"lower_bound"``: what the model steps down is a variational lower bound
            of log P, smoothed, that a few Gaussian guides give which climb it meanwhile
            (:mod:`probest.training.pursuit`): for problems with few modes. ``"reading"``: log P as it is read from the
            weights (:class:`probest.MomentPropagation`), without a case drawn for it: for wide networks. In JAX its
            gradient is not compiled, and takes seconds a step.
        callbacks: told of each step, look and checkpoint; see :class:`probest.training.callbacks.Callback`.
        seed: the same seed gives the same run.
        checkpoint: a file to write every ``check_every`` steps, and to resume from if it exists.
        progress: show a progress line (only ever in a terminal or notebook).

    Returns:
        The run. After Ctrl-C it holds the model and history so far, without an audit, and is not converged.

    Raises:
        ValueError: an argument is out of range, the data are empty or ragged, the task loss is not a finite scalar, the
            checker gives no gradient (a bool), or what the teacher says does not fit the data.
    """
    counts = {
        "steps": steps, "batch_size": batch_size, "particles": particles, "check_every": check_every,
        "budget": budget, "check_budget": check_budget,
    }  # fmt: skip
    for name, count in counts.items():
        check_whole(name, count, least=1)
    for name, count in {"seed": seed, "memory": memory, "replay": replay, "audit_rounds": audit_rounds}.items():
        check_whole(name, count, least=0)
    if not until_log_prob < 0:
        raise ValueError(f"until_log_prob={until_log_prob!r}: it is the log of a probability, so it must be below 0")
    weight = (1.0 if teacher is None else 0.0) if weight is None else weight
    rates = {"learning_rate": learning_rate, "max_norm": max_norm, "max_pressure": max_pressure}
    for name, value in rates.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}={value!r}: expected a positive number")
    for name, value in {"weight": weight, "teacher_weight": teacher_weight}.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}={value!r}: expected a number of at least 0")
    if weight == 0.0 and (teacher is None or teacher_weight == 0.0):
        raise ValueError("weight=0 without a teacher that counts: nothing would drive the catastrophes away")
    if teacher is not None and not callable(teacher):
        raise ValueError(f"teacher is a {type(teacher).__name__}: expected a function of one observation")
    if objective not in FOLLOWERS:
        raise ValueError(f"objective={objective!r}: expected one of {', '.join(map(repr, FOLLOWERS))}")
    if audit_budget is not None:
        check_whole("audit_budget", audit_budget, least=1)
    audits = panel(audit, audit_budget or 4 * budget)
    event = problem.event
    if not event.trainable:
        raise ValueError(
            "checker: training needs a real severity with a gradient, and this checker returns a bool or integer, "
            "or is a black_box"
        )
    if objective == "lower_bound" and event.is_text:
        raise ValueError("objective='lower_bound': text has no gradient that a guide could climb; use 'log_prob'")
    if adversaries is not None and event.weighted:
        raise ValueError(
            "adversaries: the problem's own is conditioned on observations, so none can be searched for within nats of "
            "it. Leave them out"
        )
    if adversaries is not None:
        adversaries.family.check_playable(event)
    if objective == "reading" and adversaries is not None:
        raise ValueError("adversaries: a reading is of the problem's own adversary alone; use objective='log_prob'")
    backend = event.backend
    if not backend.parameters(problem.model):
        raise ValueError(
            "model has no parameters to train: pass a torch nn.Module, an equinox or nnx module, or "
            "jax.tree_util.Partial(fn, params)"
        )
    if objective == "reading":
        Reader.built(event, particles, generator(np.random.SeedSequence(seed)))  # or it says why not
    rows = _count_rows(backend, data)
    data = backend.tree_map(lambda leaf: leaf if backend.owns(leaf) else backend.from_host(np.asarray(leaf)), data)
    taught = None if teacher is None else Teacher(teacher, event, data)
    trainer = backend.trainer(
        event.parts, event.composition, task,
        optimizer=optimizer, learning_rate=learning_rate,
    )  # fmt: skip
    loss = trainer.task_loss(batch_of(backend, data, np.arange(min(batch_size, rows))))
    if not math.isfinite(loss):
        raise ValueError(f"task: the loss of the untrained model is {loss}: expected a finite scalar")
    if schedule is None and optimizer is not None:
        schedule = _as_it_is

    root = np.random.SeedSequence(seed)
    unit = worth(trainer, backend, data, rows, batch_size, generator(child_seed(root, Stream.WORTH)))
    if unit == 0.0:
        raise ValueError(
            "task: its loss does not change when the model's weights are shuffled, so it does not depend on them. Give "
            "a loss of the model that is passed to it"
        )
    with Progress("train", enabled=progress) as line:
        line.update(0, steps, "estimating log P before training")
        costs = Costs()
        before = _timed(costs.estimates, problem, budget=budget, seed=number(root, Stream.BEFORE))
        rng = generator(child_seed(root, Stream.WALK))
        evidence = before.conclusion.log_evidence
        ladder = FOLLOWERS[objective](event, problem.strata, particles, rng, log_evidence=evidence)
        options = Options(
            target=until_log_prob, weight=weight, teacher_weight=teacher_weight,
            limits=(max_norm * unit, max_pressure * unit), batch_size=batch_size,
            replay=replay if memory else 0, check_every=check_every, check_budget=check_budget, schedule=schedule,
            rows=rows, path=None if checkpoint is None else Path(checkpoint), recognised=_recognised(before),
        )  # fmt: skip
        state = TrainingState(last=steps, costs=costs)
        opponents = None if adversaries is None else Opponents(event, adversaries)
        descent = Descent(
            problem, trainer, data, taught, options, root, line, state, ladder, Memory(memory), adversaries, opponents,
            tuple(callbacks),
        )  # fmt: skip
        descent.welcome(before, 0)
        if options.path is not None and options.path.exists():
            descent.state = resume(options.path, descent.parts)
        while True:
            stopped = descent.run()
            state = descent.state
            trained = problem.replaced(model=trainer.model)
            line.update(state.step, state.last, "estimating log P after training")
            spend = check_budget if stopped else budget
            after = _timed(state.costs.estimates, trained, budget=spend, seed=number(root, Stream.AFTER, state.round))
            audited = None
            if stopped:
                break
            line.update(state.step, state.last, "auditing")
            audited = run_panel(trained, audits, partial(number, root, Stream.AUDIT, state.round))
            state.costs.audit.add(audited.calls, audited.seconds)
            higher = max(audited.estimates, key=lambda found: found.log_prob)
            below = after.log_prob <= until_log_prob or refutes((higher,), after)
            if not (below and higher.log_prob > until_log_prob) or state.round >= audit_rounds:
                break
            descent.go_on(max(check_every, steps // 4))
            descent.welcome(higher, state.step, Stream.AUDIT)
    advice = _verdict(before, after, audited, until_log_prob, stopped)
    return TrainingRun(
        model=trainer.model,
        adversary=problem.adversary,
        problem=trained,
        history=tuple(state.history),
        before=before,
        after=after,
        audit=audited,
        converged=not advice,
        advice=advice,
        costs=state.costs,
        adversaries=() if opponents is None else tuple(law.played() for law in opponents.laws),
    )


def _recognised(before: Estimate) -> float:
    """log P[R], where there is a recogniser and something was recognised; else 0."""
    found = 0.0 if before.given is None else before.given.log_prob
    return found if math.isfinite(found) else 0.0


def _timed(cost: Cost, problem: Problem, **options: Any) -> Estimate:
    began = time.perf_counter()
    found = estimate(problem, progress=False, **options)
    cost.add(found.calls, time.perf_counter() - began)
    return found


def _as_it_is(step: int) -> float:  # noqa: ARG001
    """The learning rate of an optimizer that the user brought."""
    return 1.0


def _verdict(before: Estimate, after: Estimate, audit: Audit | None, target: float, stopped: str) -> tuple[str, ...]:
    """What stands between the run and its promise; empty when it is kept.

    It is kept if an estimate has converged, is precise and below the target with its upper end, and all others agree.
    """
    if audit is None:
        return (f"there is no audit, because {stopped}. Resume from the checkpoint, or audit run.problem yourself",)
    every = (after, *audit.estimates)
    best, advice = believed(every), []
    if best.upper > target:
        advice.append(
            f"log P is not known to be below {target:g} (upper end {best.upper:.4g}): train for more steps, raise "
            "max_pressure or learning_rate, or give the estimates a larger budget"
        )
        if settles(before) and settles(best) and best.log_prob > before.log_prob - UNMOVED:
            advice.append(
                f"log P is where it was ({before.log_prob:.4g}, now {best.log_prob:.4g}): perhaps nothing that M could "
                'do avoids these catastrophes. Look at some: run.plot("cases")'
            )
    if not settles(best):
        why = "; ".join(best.advice) or f"the standard error is {best.std_error:.2f}"
        advice.append(f"no estimate that stands has converged to {PRECISE:g}: {why}")
    advice += [
        f"{one.conclusion.method} says {one.log_prob:.4g} [{one.lower:.4g}, {one.upper:.4g}] and "
        f"{best.conclusion.method} {best.log_prob:.4g} [{best.lower:.4g}, {best.upper:.4g}]: believe the higher, and "
        "estimate again with larger budgets"
        for one in every
        if one is not best and math.isfinite(one.log_prob) and not agree(one.conclusion, best.conclusion)
    ]
    return tuple(advice)


def _count_rows(backend: Backend, data: PyTree) -> int:
    leaves = backend.leaves(data)
    sizes = {int(np.shape(leaf)[0]) if np.ndim(leaf) else 0 for leaf in leaves}
    if not leaves or sizes == {0}:
        raise ValueError(
            "data is empty: expected a pytree of arrays with a common leading axis, such as (inputs, targets)"
        )
    if len(sizes) > 1:
        raise ValueError(f"data: the arrays have different lengths {sorted(sizes)}; they need a common leading axis")
    return sizes.pop()
