"""``train()``: step a model down the gradient of log P until catastrophes are vanishingly unlikely, then audit it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from probest.backends.base import Backend, PyTree
from probest.estimate import Estimate, check_whole, estimate
from probest.estimators.base import Estimator
from probest.estimators.tempering import Tempering
from probest.problem import Problem
from probest.report.progress import Progress
from probest.seeds import child_seed, generator
from probest.training.checkpoint import Step, TrainingState, resume
from probest.training.descent import Descent, Options, Stream, batch_of, level, number
from probest.training.walkers import Walkers
from probest.verdict import agree

if TYPE_CHECKING:
    import os

__all__ = ["Step", "TrainingRun", "train"]


@dataclass(frozen=True)
class TrainingRun:
    """A trained model and the evidence about it.

    model: the trained model (the problem's own is unchanged). adversary: that of the problem. problem: the problem with
    the trained model. before, after: estimates by the same method. audit: an estimate by another method and seed, None
    if training was interrupted. converged: log P is below the target, audited. advice: what is missing. calls: model
    calls of everything together, the calls on the task's own data apart (``task_calls``).
    """

    model: Any
    adversary: Any
    problem: Problem
    history: tuple[Step, ...]
    before: Estimate
    after: Estimate
    audit: Estimate | None
    converged: bool
    advice: tuple[str, ...]
    calls: int
    task_calls: int
    seconds: float

    def __repr__(self) -> str:
        return (
            f"TrainingRun(log P {self.before.log_prob:.4g} -> {self.after.log_prob:.4g}, steps={len(self.history)}, "
            f"converged={self.converged}, calls={self.calls})"
        )

    def plot(self, **options: Any) -> Any:
        """Task loss and log P over the steps (a matplotlib Axes)."""
        from probest.report.plots import plot_history

        return plot_history(self, **options)


def train(
    problem: Problem,
    *,
    task: Callable[[Any, PyTree], Any],
    data: PyTree,
    until_log_prob: float = -25.0,
    steps: int = 1_000,
    weight: float = 1.0,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    optimizer: Any = None,
    max_norm: float = 1.0,
    particles: int = 128,
    check_every: int = 50,
    budget: int = 50_000,
    check_budget: int = 20_000,
    audit: Estimator | None = None,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> TrainingRun:
    """Train the model on ``task(model, batch) + weight · log P`` and audit the result.

    Each step moves a population of warm particles on the catastrophes of the present model and steps down the
    gradient of their log-probability (smoothed, so that near catastrophes count too). Every ``check_every`` steps a
    fresh tempering run looks for catastrophes anew, wherever they are by then. Once it finds log P below the target,
    the learning rate falls for another ``check_every`` steps; training ends if log P is still below, or after
    ``steps``. Then log P is estimated afresh, and audited by another method from another seed.

    Args:
        problem: its model is trained: a torch ``nn.Module`` or a jax pytree with floating-point arrays.
        task: ``task(model, batch) -> scalar`` loss to keep low.
        data: pytree of arrays with a common leading axis; minibatches are rows of it.
        until_log_prob: stop when log P is below this (natural logarithm).
        steps: optimisation steps at most.
        weight: nats of task loss that one nat of log P is worth, down to a few nats below the target and no further.
        batch_size: rows of ``data`` a step.
        learning_rate: of Adam, falling to a tenth over ``steps`` by a cosine; unless ``optimizer`` is given.
        optimizer: torch: a function of the parameters to a ``torch.optim.Optimizer``; jax: an optax transformation.
        max_norm: the gradient's norm is clipped to this.
        particles: size of the warm population.
        check_every: steps between fresh looks.
        budget: model calls of each full estimate (before, after).
        check_budget: model calls of each fresh look.
        audit: method of the audit; by default tempering with more particles than the checks use.
        seed: the same seed gives the same run.
        checkpoint: a file to write at every check, and to resume from if it exists.
        progress: show a progress line (only ever in a terminal or notebook).

    Returns:
        The run. After Ctrl-C it holds the model and history so far, without an audit, and is not converged.

    Raises:
        ValueError: an argument is out of range, the data are empty or ragged, the task loss is not a finite scalar, or
            the checker gives no gradient (a bool).
    """
    counts = {
        "steps": steps, "batch_size": batch_size, "particles": particles, "check_every": check_every,
        "budget": budget, "check_budget": check_budget,
    }  # fmt: skip
    for name, count in counts.items():
        check_whole(name, count, least=1)
    check_whole("seed", seed, least=0)
    if not until_log_prob < 0:
        raise ValueError(f"until_log_prob={until_log_prob!r}: it is the log of a probability, so it must be below 0")
    for name, value in (("weight", weight), ("learning_rate", learning_rate), ("max_norm", max_norm)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}={value!r}: expected a positive number")
    event = problem.event
    if not event.differentiable:
        raise ValueError(
            "checker: training needs a real severity with a gradient, and this checker returns a bool or integer, "
            "or is a black_box"
        )
    backend = event.backend
    if not backend.parameters(problem.model):
        raise ValueError(
            "model has no parameters to train: pass a torch nn.Module, an equinox or nnx module, or "
            "jax.tree_util.Partial(fn, params)"
        )
    rows = _count_rows(backend, data)
    data = backend.tree_map(lambda leaf: leaf if backend.owns(leaf) else backend.from_host(np.asarray(leaf)), data)
    composition = event.composition
    trainer = backend.trainer(
        event.parts, composition, task, optimizer=optimizer, learning_rate=learning_rate, max_norm=max_norm
    )
    loss = trainer.task_loss(batch_of(backend, data, np.arange(min(batch_size, rows))))
    if not math.isfinite(loss):
        raise ValueError(f"task: the loss of the untrained model is {loss}: expected a finite scalar")

    root = np.random.SeedSequence(seed)
    start = time.perf_counter()
    path = None if checkpoint is None else Path(checkpoint)
    with Progress("train", enabled=progress) as line:
        line.update(0, steps, "estimating log P before training")
        before = estimate(problem, budget=budget, seed=number(root, Stream.BEFORE), progress=False)
        state = TrainingState(calls=before.calls, log_prob=level(before))
        walkers = _walkers(before, particles, generator(child_seed(root, Stream.WALK)))
        if path is not None and path.exists():
            state, walkers = resume(path, trainer)
        options = Options(
            target=until_log_prob, steps=steps, weight=weight, batch_size=batch_size, particles=particles,
            check_every=check_every, check_budget=check_budget, rows=rows, path=path,
        )  # fmt: skip
        descent = Descent(problem, trainer, data, options, root, line, state, walkers)
        stopped = descent.run()
        trained = problem.replaced(model=trainer.model)
        line.update(state.step, steps, "estimating log P after training")
        after = estimate(
            trained, budget=check_budget if stopped else budget, seed=number(root, Stream.AFTER), progress=False
        )
        checked = None
        if not stopped:
            line.update(state.step, steps, "auditing")
            method = audit or Tempering(particles=max(1024, budget // 100))
            checked = estimate(
                trained, budget=4 * budget, estimator=method, seed=number(root, Stream.AUDIT), progress=False
            )
    advice = _verdict(after, checked, until_log_prob, stopped)
    return TrainingRun(
        model=trainer.model,
        adversary=problem.adversary,
        problem=trained,
        history=tuple(state.history),
        before=before,
        after=after,
        audit=checked,
        converged=not advice,
        advice=advice,
        calls=state.calls + after.calls + (checked.calls if checked else 0),
        task_calls=state.task_calls,
        seconds=time.perf_counter() - start,
    )


def _verdict(after: Estimate, audit: Estimate | None, target: float, stopped: str) -> tuple[str, ...]:
    """What stands between the run and its promise; empty when it is kept."""
    advice = []
    if after.upper > target:
        advice.append(
            f"log P is not known to be below {target:g} (upper end {after.upper:.4g}): train for more steps, raise "
            "weight or learning_rate, or give the estimate a larger budget"
        )
    if not after.converged:
        advice.append("the estimate after training has not converged: " + "; ".join(after.advice))
    if audit is None:
        advice.append(
            f"there is no audit, because {stopped}. Resume from the checkpoint, or audit run.problem yourself"
        )
    elif not agree(after.conclusion, audit.conclusion):
        advice.append(
            f"the audit disagrees: {audit.log_prob:.4g} [{audit.lower:.4g}, {audit.upper:.4g}] against "
            f"{after.log_prob:.4g} [{after.lower:.4g}, {after.upper:.4g}]. Believe neither; estimate again with "
            "larger budgets"
        )
    elif not audit.converged:
        advice.append("the audit has not converged: " + "; ".join(audit.advice))
    return tuple(advice)


def _walkers(found: Estimate, count: int, rng: np.random.Generator) -> Walkers | None:
    """Warm particles from an estimate; None if it found no catastrophe (the checks may find some later)."""
    particles = found.conclusion.particles
    if particles is None or not len(particles.z):
        return None
    return Walkers.seeded(particles, found.log_prob, count, rng)


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
