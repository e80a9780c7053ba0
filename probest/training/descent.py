"""The descent: a ladder of particles follows the catastrophes of the present model, which steps away from them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

import numpy as np

from probest.backends.base import Backend, Losses, Pull, PyTree, Trainer
from probest.estimate import Estimate, estimate
from probest.problem import Problem
from probest.programs.event import Event, SeverityError
from probest.report.progress import Progress
from probest.search import search
from probest.seeds import child_seed, generator, number
from probest.training.callbacks import Callback, Control
from probest.training.checkpoint import Kept, Step, TrainingState, save
from probest.training.follower import Cases, Follower
from probest.training.memory import Memory
from probest.training.opponents import QUICK, Opponents, Pool
from probest.training.teacher import Teacher, as_batch
from probest.tuning import tuned
from probest.verdict import SHARE

__all__ = ["Descent", "DescentTuning", "Options", "Stream", "batch_of", "worth"]

_BY = "benchmarks/below_one_over_n.py"


@dataclass(frozen=True)
class DescentTuning:
    """What the loop goes by."""

    final_rate: float = tuned(0.1, "of the learning rate that is left at the end", _BY)
    later_rate: float = tuned(0.5, "of the learning rate with which a later round begins", _BY)
    slack: float = tuned(3.0, "nats below the target at which the pressure is gone, lest the task pay for no gain", _BY)
    shuffles: int = tuned(99, "of the weights, whose median loss says what the task is worth", _BY)
    look_share: float = tuned(0.1, "of the calls, for looks before the ladder says that the target is near", _BY)
    reverts: float = tuned(5, "times that steps are taken back, at half the learning rate each, before giving up", _BY)


class Stream(IntEnum):
    """Names of the seeds of a training run."""

    BEFORE = 0
    CHECK = 1
    AFTER = 2
    AUDIT = 3
    WALK = 4
    BATCH = 5
    REPLAY = 6
    OPPONENTS = 7
    WORTH = 8


@dataclass(frozen=True)
class Options:
    """What a descent goes by; see the arguments of :func:`probest.train`.

    target: log P below which there is no more pressure. limits: norms that gradients are clipped to. schedule: share of
    the learning rate at each step, or None for a cosine. rows: of the data. path: of the checkpoint, or None.
    recognised: log P[R] of a problem with a recogniser, 0 of others: what the ladder follows is P[R and C].
    """

    target: float
    weight: float
    teacher_weight: float
    limits: tuple[float, float]
    batch_size: int
    replay: int
    check_every: int
    check_budget: int
    schedule: Callable[[int], float] | None
    rows: int
    path: Path | None
    recognised: float = 0.0
    tuning: DescentTuning = field(default_factory=DescentTuning)


@dataclass
class Descent:
    """The loop of :func:`probest.train`: everything it needs, and what changes (``state``, ``ladder``, ``memory``)."""

    problem: Problem
    trainer: Trainer
    data: PyTree
    teacher: Teacher | None
    options: Options
    root: np.random.SeedSequence
    line: Progress
    state: TrainingState
    ladder: Follower
    memory: Memory
    pool: Pool | None = None
    opponents: Opponents | None = None
    callbacks: Sequence[Callback] = ()
    control: Control = field(default_factory=Control)

    @property
    def parts(self) -> dict[str, Kept]:
        """What a checkpoint holds."""
        kept: dict[str, Kept] = {"trainer": self.trainer, "ladder": self.ladder}
        if self.teacher is not None:
            kept["memory"] = self.memory
        if self.opponents is not None:
            kept["opponents"] = self.opponents
        return kept

    @property
    def event(self) -> Event:
        """That of the present model, with counters at zero."""
        return self.problem.event.replaced(model=self.trainer.model)

    def run(self) -> str:
        """Descend until the target is reached and held, or the steps are over. Returns why it stopped early, or ''."""
        good = self.trainer.arrays()
        self._tell("on_train_begin")
        stopped = ""
        try:
            while not self._done() and not stopped:
                began = time.perf_counter()
                try:
                    losses = self._step()
                except SeverityError:
                    if self.state.reverts >= self.options.tuning.reverts:
                        raise
                    losses = None
                self.state.costs.steps.seconds += time.perf_counter() - began
                if losses is None or not math.isfinite(losses.task):
                    stopped = self._revert(good)
                    continue
                due = self.state.step % self.options.check_every == 0
                look = self._look() if self._is_looked_at() else None
                if self.pool is not None and self.state.step % self.pool.every == 0:
                    self._search()
                self._record(losses, look)
                if due or self.control.should_save:
                    good = self.trainer.arrays() if due else good
                    self._save()
                if self.control.should_training_stop:
                    stopped = self.control.reason
        except KeyboardInterrupt:
            self._save()
            return "training was interrupted"
        except Exception:
            self._save()
            raise
        self._tell("on_train_end")
        return stopped

    def go_on(self, steps: int) -> None:
        """Begin another round, of so many steps at most."""
        state = self.state
        state.round, state.began, state.last, state.reached = state.round + 1, state.step, state.step + steps, None

    @property
    def _followed(self) -> float:
        """log P, or log P[C | R], as it is followed; NaN before the first step."""
        return min(self.ladder.log_prob - self.options.recognised, 0.0)

    # One step ---------------------------------------------------------------------------------------------------------

    def _step(self) -> Losses:
        """Move the ladder on the present model, then the model."""
        state, options, event = self.state, self.options, self.event
        self.ladder.advance(event, generator(child_seed(self.root, Stream.WALK, state.step + 1)))
        cases = self.ladder.cases()
        if self.opponents is not None:
            rng = generator(child_seed(self.root, Stream.OPPONENTS, state.step))
            count = max(1, len(cases.z) // 2)
            cases = joined(cases, self.opponents.cases(event, self.ladder, count, rng))
        need = self._need()
        taught = None if self.teacher is None else self._taught(event, self.teacher, cases)
        hard = self.ladder.pressure(event, cases) if options.weight else None
        shuffle = generator(child_seed(self.root, Stream.BATCH, state.step))
        chosen = shuffle.choice(options.rows, min(options.batch_size, options.rows), replace=False)
        by = Pull(need * options.teacher_weight, need * options.weight, self._rate(), *options.limits)
        losses = self.trainer.step(batch_of(event.backend, self.data, chosen), taught, hard, by)
        count = len(cases.z) * (hard is not None)
        count += (len(cases.z) + options.replay) * (taught is not None)
        state.costs.steps.calls += event.model_calls + 3 * count
        state.costs.task_calls += 3 * len(chosen)
        state.step += 1
        return losses

    def _taught(self, event: Event, teacher: Teacher, cases: Cases) -> PyTree:
        """The present cases and some from memory, with the teacher's answers, as a batch of the task."""
        rows = teacher.rows(event, cases)
        self.state.costs.answers += len(cases.z)
        if event.composition.closed_loop:
            event.model_calls += len(cases.z)
        rng = generator(child_seed(self.root, Stream.REPLAY, self.state.step))
        count = self.options.replay
        if count:
            if len(self.memory):
                chosen = self.memory.choose(count, rng)
                self.memory.severity[chosen] = self.ladder.severity_of(
                    event, self.memory.z[chosen], self.memory.group[chosen]
                )
                replayed = [leaf[chosen] for leaf in self.memory.rows]
            else:
                replayed = [leaf[rng.integers(len(leaf), size=count)] for leaf in rows]
            self.memory.add(cases, rows, self.state.step)
            rows = [np.concatenate(pair) for pair in zip(rows, replayed, strict=True)]
        return as_batch(event.backend, rows, self.data)

    def _need(self) -> float:
        """Share of the pressure: nothing from ``slack`` nats below the target on."""
        followed, look = self._followed, self.state.look
        worst = max((p for p in (followed, look) if p is not None and not math.isnan(p)), default=0.0)
        if worst == -math.inf:
            return 0.0
        return min(max((worst - self.options.target) / self.options.tuning.slack + 1.0, 0.0), 1.0)

    def _rate(self) -> float:
        """Share of the learning rate: a cosine over the steps, and a quicker one once the target has been reached."""
        state, options = self.state, self.options
        if options.schedule is not None:
            return state.rate * float(options.schedule(state.step))
        final = options.tuning.final_rate
        rate = state.rate * cosine((state.step - state.began) / max(1, state.last - state.began), final)
        if state.round:
            rate *= options.tuning.later_rate
        if state.reached is not None:
            rate *= cosine((state.step - state.reached) / options.check_every, final)
        return rate

    def _revert(self, good: dict[str, np.ndarray]) -> str:
        """Back to the last good weights, at half the learning rate; why to give up, or ''."""
        self.trainer.restore(good)
        state = self.state
        state.reverts += 1
        state.rate *= 0.5
        state.step += 1  # another batch and other draws: the same would end the same
        if state.reverts > self.options.tuning.reverts:
            return f"the loss was not finite {state.reverts} times, at step {state.step} again: lower learning_rate"
        return ""

    def _record(self, losses: Losses, look: float | None) -> None:
        steps, looks = self.state.costs.steps, self.state.costs.looks
        step = Step(
            step=self.state.step, task_loss=losses.task, taught_loss=losses.taught, log_prob=self._followed,
            pressure=losses.pressure, look=look, calls=steps.calls + looks.calls, seconds=steps.seconds + looks.seconds,
        )  # fmt: skip
        self.state.history.append(step)
        self._tell("on_step_end", step)
        told = f"log P {step.log_prob:.1f}, task loss {step.task_loss:.3g}"
        self.line.update(self.state.step, self.state.last, told)

    # Looks ------------------------------------------------------------------------------------------------------------

    def _done(self) -> bool:
        """Whether the steps are over, or log P was below the target and still is some steps later."""
        reached = self.state.reached
        if self.state.step >= self.state.last:
            return True
        return reached is not None and self.state.step >= reached + self.options.check_every

    def _is_looked_at(self) -> bool:
        state, options = self.state, self.options
        if self.control.should_evaluate or state.step == state.last:
            return True
        if state.reached is not None:
            return state.step == state.reached + options.check_every
        if state.step % options.check_every:
            return False
        spent = state.costs
        near = self._followed <= options.target
        return near or spent.looks.calls + options.check_budget <= options.tuning.look_share * spent.steps.calls

    def _look(self) -> float:
        """A fresh look for catastrophes; what it finds joins the ladder."""
        state = self.state
        began = time.perf_counter()
        look = estimate(
            self.problem.replaced(model=self.trainer.model),
            budget=self.options.check_budget,
            seed=number(self.root, Stream.CHECK, state.step),
            progress=False,
        )
        state.costs.looks.add(look.calls, time.perf_counter() - began)
        state.look = look.log_prob
        if max(look.log_prob, self._followed) >= self.options.target:
            state.reached = None
        elif state.reached is None:
            state.reached = state.step
        self.welcome(look, state.step, Stream.CHECK)
        self._tell("on_evaluate", look)
        return look.log_prob

    def _search(self) -> None:
        """Look for another opponent: by turns from the catastrophes of a fresh look, and from random places."""
        assert self.pool is not None
        assert self.opponents is not None
        state, began = self.state, time.perf_counter()
        problem = self.problem.replaced(model=self.trainer.model)
        seed = number(self.root, Stream.OPPONENTS, state.step, 1)
        base = estimate(problem, budget=self.options.check_budget, seed=seed, progress=False)
        self.welcome(base, state.step, Stream.OPPONENTS)
        calls, turn = base.calls, state.step // self.pool.every
        if math.isfinite(base.log_prob) and base.conclusion.particles is not None:
            family = self.pool.family.turned(turn)
            found = search(
                problem, family, kl=self.pool.kl, base=base, steps=self.pool.steps, refine=0, judge=512, seed=seed,
                progress=False, tuning=getattr(family, "tuning", QUICK),
            )  # fmt: skip
            calls += found.calls
            self.opponents.add(found, generator(child_seed(self.root, Stream.OPPONENTS, state.step, 2)))
        state.costs.looks.add(calls, time.perf_counter() - began)

    def welcome(self, found: Estimate, *key: int) -> None:
        """Let the catastrophes of an estimate onto the ladder: where what was recognised was moved, those among it."""
        moved = [line.particles for line in found.ledger if line.method == SHARE and line.particles is not None]
        particles = moved[-1] if moved else found.conclusion.particles
        if particles is not None and len(particles.z) and math.isfinite(found.log_prob):
            self.ladder.welcome(particles, generator(child_seed(self.root, Stream.WALK, *key)))

    def _save(self) -> None:
        if self.options.path is not None:
            save(self.options.path, self.parts, self.state)
            self._tell("on_save")

    def _tell(self, name: str, *what: object) -> None:
        if name == "on_step_end":
            self.control.should_evaluate = self.control.should_save = False
        for callback in self.callbacks:
            getattr(callback, name)(self.state, self.control, *what)


def joined(one: Cases, other: Cases) -> Cases:
    """Both, each with half of the gradient."""
    held = {name: np.concatenate([value, other.held[name]]) for name, value in one.held.items()}
    z, severity, noise, group = (
        np.concatenate(pair)
        for pair in (
            (one.z, other.z),
            (one.severity, other.severity),
            (one.noise, other.noise),
            (one.group, other.group),
        )
    )
    return Cases(z, held, severity, noise, np.concatenate([0.5 * one.share, 0.5 * other.share]), group)


def worth(
    trainer: Trainer, backend: Backend, data: PyTree, rows: int, batch_size: int, rng: np.random.Generator
) -> float:
    """By how much the task's loss changes when the model's weights are shuffled: the unit of what gradients may be.

    It is in the units of the loss, so that what is given up for safety does not depend on them. 0 where shuffling
    changes nothing; the loss itself where every shuffle makes it infinite.
    """
    chosen = rng.choice(rows, min(batch_size, rows), replace=False)
    batch = batch_of(backend, data, chosen)
    loss = trainer.task_loss(batch)
    changes = np.array([trainer.shuffled_loss(batch, rng) - loss for _ in range(DescentTuning().shuffles)])
    changes = np.abs(changes[np.isfinite(changes)])
    return float(np.median(changes)) if changes.size else abs(loss) or 1.0


def cosine(share: float, final: float) -> float:
    """From 1 at 0 down to ``final`` at 1."""
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(max(share, 0.0), 1.0)))


def batch_of(backend: Backend, data: PyTree, rows: np.ndarray) -> PyTree:
    """These rows of every array."""
    return backend.tree_map(lambda leaf: leaf[rows], data)
