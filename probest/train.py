"""``train()``: step a model down the gradient of log P until catastrophes are vanishingly unlikely, then audit it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from probest.backends.base import Backend, PyTree, Trainer
from probest.estimate import Estimate, check_whole, estimate
from probest.estimators.base import Estimator
from probest.estimators.tempering import Tempering
from probest.problem import Problem
from probest.report.progress import Progress
from probest.seeds import child_seed, generator
from probest.training.walkers import Walkers

if TYPE_CHECKING:
    import os

__all__ = ["Step", "TrainingRun", "train"]

BEFORE, CHECK, AFTER, AUDIT, WALK, BATCH = range(6)
AGREEMENT = 3.0
FINAL_RATE = 0.1
SLACK = 3.0
CALLS_A_PARTICLE = 150  # what tempering spends on each, on the way to an event of P = 1e-9 or so


@dataclass(frozen=True)
class Step:
    """One recorded step.

    task_loss: on its minibatch. log_prob: log P as the warm particles follow it since the last fresh look, in nats.
    pressure: mean of log Φ(severity / noise) over the warm particles, what was stepped down. calls: model calls so far.
    """

    step: int
    task_loss: float
    log_prob: float
    pressure: float
    noise: float
    calls: int
    seconds: float


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


@dataclass
class _Progress:
    """What a checkpoint holds beside the trainer's arrays and the particles."""

    step: int = 0
    calls: int = 0
    task_calls: int = 0
    seconds: float = 0.0
    log_prob: float = math.nan
    reached: int | None = None
    history: list[Step] = field(default_factory=list)


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
    loss = trainer.task_loss(_batch(backend, data, np.arange(min(batch_size, rows))))
    if not math.isfinite(loss):
        raise ValueError(f"task: the loss of the untrained model is {loss}: expected a finite scalar")

    root = np.random.SeedSequence(seed)
    start = time.perf_counter()
    path = None if checkpoint is None else Path(checkpoint)
    with Progress("train", enabled=progress) as line:
        line.update(0, steps, "estimating log P before training")
        before = estimate(problem, budget=budget, seed=_number(root, BEFORE), progress=False)
        state = _Progress(calls=before.calls, log_prob=_level(before))
        walkers = _walkers(before, particles, generator(child_seed(root, WALK)))
        if path is not None and path.exists():
            state, walkers = _resume(path, trainer)
        descent = _Descent(
            problem, trainer, data, rows, until_log_prob, steps, weight, batch_size, particles, check_every,
            check_budget, root, path, line, state, walkers,
        )  # fmt: skip
        stopped = descent.run()
        trained = problem.replaced(model=trainer.model)
        line.update(state.step, steps, "estimating log P after training")
        after = estimate(trained, budget=check_budget if stopped else budget, seed=_number(root, AFTER), progress=False)
        checked = None
        if not stopped:
            line.update(state.step, steps, "auditing")
            method = audit or Tempering(particles=max(1024, budget // 100))
            checked = estimate(trained, budget=4 * budget, estimator=method, seed=_number(root, AUDIT), progress=False)
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


@dataclass
class _Descent:
    """The loop of :func:`train`: everything it needs, and what changes (``state`` and ``walkers``)."""

    problem: Problem
    trainer: Trainer
    data: PyTree
    rows: int
    target: float
    steps: int
    weight: float
    batch_size: int
    particles: int
    check_every: int
    check_budget: int
    root: np.random.SeedSequence
    path: Path | None
    line: Progress
    state: _Progress
    walkers: Walkers | None

    def run(self) -> str:
        """Descend until the target is reached and held, or the steps are over. Returns why it stopped early, or ''."""
        good = self.trainer.arrays()
        began = time.perf_counter() - self.state.seconds
        try:
            while self.state.step < self.steps and not self._done():
                loss, pressure, noise = self._step()
                if not math.isfinite(loss + pressure):
                    self.trainer.restore(good)
                    return f"the loss was not finite at step {self.state.step}: lower learning_rate or weight"
                self.state.seconds = time.perf_counter() - began
                if self._is_checked():
                    self._check()
                    good = self.trainer.arrays()
                followed = self.state.log_prob if self.walkers is None else self.walkers.log_prob
                self.state.history.append(
                    Step(self.state.step, loss, followed, pressure, noise, self.state.calls, self.state.seconds)
                )
                self.line.update(self.state.step, self.steps, f"log P {followed:.1f}, task loss {loss:.3g}")
                if self.state.step % self.check_every == 0:
                    self._save()
        except KeyboardInterrupt:
            self._save()
            return "training was interrupted"
        except Exception:
            self._save()
            raise
        return ""

    def _step(self) -> tuple[float, float, float]:
        """Move the particles on the present model, then the model; returns task loss, pressure and noise."""
        state, walkers, event = self.state, self.walkers, self.problem.event
        if walkers is not None:
            rng = generator(child_seed(self.root, WALK, state.step + 1))
            state.calls += walkers.advance(event.replaced(model=self.trainer.model), rng)
        shuffle = generator(child_seed(self.root, BATCH, state.step))
        chosen = shuffle.choice(self.rows, min(self.batch_size, self.rows), replace=False)
        z = np.empty((0, event.dim)) if walkers is None else walkers.z
        noise = 1.0 if walkers is None else walkers.noise
        batch = _batch(event.backend, self.data, chosen)
        loss, pressure = self.trainer.step(batch, z, noise, self._weight(), self._rate())
        state.calls += 3 * len(z)
        state.task_calls += 3 * len(chosen)
        state.step += 1
        return loss, pressure, noise

    def _weight(self) -> float:
        """The weight of log P; nothing from ``SLACK`` nats below the target on, lest the task pay for no gain."""
        log_prob = self.state.log_prob if self.walkers is None else self.walkers.log_prob
        return self.weight * min(max((log_prob - self.target) / SLACK + 1, 0.0), 1.0)

    def _rate(self) -> float:
        """Share of the learning rate: a cosine over the steps, and a quicker one once the target has been reached."""
        state = self.state
        rate = _cosine(state.step / self.steps)
        if state.reached is not None:
            rate *= _cosine((state.step - state.reached) / self.check_every)
        return rate

    def _done(self) -> bool:
        """Whether log P was below the target at a check and still is after as many steps at a falling rate."""
        reached = self.state.reached
        return reached is not None and self.state.step >= reached + self.check_every

    def _is_checked(self) -> bool:
        state = self.state
        if state.reached is not None:
            return state.step == state.reached + self.check_every
        return state.step % self.check_every == 0 or state.step == self.steps

    def _check(self) -> None:
        """A fresh look for catastrophes; its particles replace the warm ones."""
        state = self.state
        look = estimate(
            self.problem.replaced(model=self.trainer.model),
            budget=self.check_budget,
            estimator=Tempering(particles=max(256, self.check_budget // CALLS_A_PARTICLE)),
            seed=_number(self.root, CHECK, state.step),
            progress=False,
        )
        state.calls += look.calls
        state.log_prob = _level(look)
        if state.log_prob >= self.target:
            state.reached = None
        elif state.reached is None:
            state.reached = state.step
        found = look.conclusion.particles
        if found is None or not math.isfinite(look.log_prob):
            return
        rng = generator(child_seed(self.root, WALK, state.step, CHECK))
        if self.walkers is None:
            self.walkers = Walkers.seeded(found, look.log_prob, self.particles, rng)
        else:
            self.walkers.reseed(found, look.log_prob, rng)

    def _save(self) -> None:
        if self.path is not None:
            _save(self.path, self.trainer, self.walkers, self.state)


def _cosine(share: float) -> float:
    """From 1 at 0 down to ``FINAL_RATE`` at 1."""
    return FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * min(max(share, 0.0), 1.0)))


def agree(one: Estimate, other: Estimate) -> bool:
    """Whether two estimates tell the same story: their difference is within 3 of its standard errors."""
    if not (math.isfinite(one.log_prob) and math.isfinite(other.log_prob)):
        return one.lower <= other.upper and other.lower <= one.upper
    error = math.hypot(one.std_error, other.std_error)
    return abs(one.log_prob - other.log_prob) <= AGREEMENT * error or (
        one.lower <= other.upper and other.lower <= one.upper
    )


def _level(found: Estimate) -> float:
    """log P, or the upper bound when no catastrophe was found: not finding any is no reason to stop training."""
    return found.log_prob if math.isfinite(found.log_prob) else found.upper


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
    elif not agree(after, audit):
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


class _Saved(NamedTuple):
    log_prob: float
    noise: float
    angle: float


def _save(path: Path, trainer: Trainer, walkers: Walkers | None, state: _Progress) -> None:
    """Arrays as safetensors, the rest as its metadata; written beside and moved, so a crash leaves the old file."""
    from safetensors.numpy import save_file

    arrays = {name: np.array(value, order="C") for name, value in trainer.arrays().items()}
    metadata = {"state": json.dumps(asdict(state))}
    if walkers is not None:
        arrays["walkers"] = walkers.z
        saved = _Saved(walkers.log_prob, walkers.noise, walkers.angle)
        if walkers.severity is not None:
            arrays["severity"] = walkers.severity
        metadata["walkers"] = json.dumps(saved._asdict())
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    save_file(arrays, beside, metadata=metadata)
    beside.replace(path)


def _resume(path: Path, trainer: Trainer) -> tuple[_Progress, Walkers | None]:
    from safetensors import safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata()
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        z, severity = arrays.pop("walkers", None), arrays.pop("severity", None)
        trainer.restore(arrays)
        record = json.loads(metadata["state"])
    except Exception as error:
        raise ValueError(
            f"checkpoint={str(path)!r} is not a checkpoint of this model and optimizer ({type(error).__name__}: "
            f"{error}). Name another file, or remove it to start again"
        ) from error
    state = _Progress(**{**record, "history": [Step(**step) for step in record["history"]]})
    if z is None:
        return state, None
    return state, Walkers(z, severity=severity, **json.loads(metadata["walkers"]))


def _batch(backend: Backend, data: PyTree, rows: np.ndarray) -> PyTree:
    return backend.tree_map(lambda leaf: leaf[rows], data)


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


def _number(root: np.random.SeedSequence, *key: int) -> int:
    """A seed for estimate() from a key, different for each purpose and step."""
    return int(child_seed(root, *key).generate_state(1, np.uint64)[0] >> np.uint64(1))
