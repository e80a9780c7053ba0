"""The descent: particles step on the catastrophes of the present model, the model steps away from them."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import numpy as np

from probest.backends.base import Backend, PyTree, Trainer
from probest.estimate import Estimate, estimate
from probest.estimators.tempering import Tempering
from probest.problem import Problem
from probest.report.progress import Progress
from probest.seeds import child_seed, generator
from probest.training.checkpoint import Step, TrainingState, save
from probest.training.walkers import Walkers

__all__ = ["Descent", "Options", "Stream", "batch_of", "level", "number"]

FINAL_RATE = 0.1
SLACK = 3.0
CALLS_A_PARTICLE = 150  # what tempering spends on each, on the way to an event of P = 1e-9 or so


class Stream(IntEnum):
    """Names of the seeds of a training run."""

    BEFORE = 0
    CHECK = 1
    AFTER = 2
    AUDIT = 3
    WALK = 4
    BATCH = 5


@dataclass(frozen=True)
class Options:
    """What a descent goes by; see the arguments of :func:`probest.train`.

    target: log P below which there is no more pressure. rows: of the data. path: of the checkpoint, or None.
    """

    target: float
    steps: int
    weight: float
    batch_size: int
    particles: int
    check_every: int
    check_budget: int
    rows: int
    path: Path | None


@dataclass
class Descent:
    """The loop of :func:`probest.train`: everything it needs, and what changes (``state`` and ``walkers``)."""

    problem: Problem
    trainer: Trainer
    data: PyTree
    options: Options
    root: np.random.SeedSequence
    line: Progress
    state: TrainingState
    walkers: Walkers | None

    def run(self) -> str:
        """Descend until the target is reached and held, or the steps are over. Returns why it stopped early, or ''."""
        good = self.trainer.arrays()
        began = time.perf_counter() - self.state.seconds
        try:
            while self.state.step < self.options.steps and not self._done():
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
                self.line.update(self.state.step, self.options.steps, f"log P {followed:.1f}, task loss {loss:.3g}")
                if self.state.step % self.options.check_every == 0:
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
            rng = generator(child_seed(self.root, Stream.WALK, state.step + 1))
            state.calls += walkers.advance(event.replaced(model=self.trainer.model), rng)
        shuffle = generator(child_seed(self.root, Stream.BATCH, state.step))
        chosen = shuffle.choice(self.options.rows, min(self.options.batch_size, self.options.rows), replace=False)
        z = np.empty((0, event.dim)) if walkers is None else walkers.z
        noise = 1.0 if walkers is None else walkers.noise
        batch = batch_of(event.backend, self.data, chosen)
        loss, pressure = self.trainer.step(batch, z, noise, self._weight(), self._rate())
        state.calls += 3 * len(z)
        state.task_calls += 3 * len(chosen)
        state.step += 1
        return loss, pressure, noise

    def _weight(self) -> float:
        """The weight of log P; nothing from ``SLACK`` nats below the target on, lest the task pay for no gain."""
        log_prob = self.state.log_prob if self.walkers is None else self.walkers.log_prob
        return self.options.weight * min(max((log_prob - self.options.target) / SLACK + 1, 0.0), 1.0)

    def _rate(self) -> float:
        """Share of the learning rate: a cosine over the steps, and a quicker one once the target has been reached."""
        state = self.state
        rate = _cosine(state.step / self.options.steps)
        if state.reached is not None:
            rate *= _cosine((state.step - state.reached) / self.options.check_every)
        return rate

    def _done(self) -> bool:
        """Whether log P was below the target at a check and still is after as many steps at a falling rate."""
        reached = self.state.reached
        return reached is not None and self.state.step >= reached + self.options.check_every

    def _is_checked(self) -> bool:
        state = self.state
        if state.reached is not None:
            return state.step == state.reached + self.options.check_every
        return state.step % self.options.check_every == 0 or state.step == self.options.steps

    def _check(self) -> None:
        """A fresh look for catastrophes; its particles replace the warm ones."""
        state = self.state
        look = estimate(
            self.problem.replaced(model=self.trainer.model),
            budget=self.options.check_budget,
            estimator=Tempering(particles=max(256, self.options.check_budget // CALLS_A_PARTICLE)),
            seed=number(self.root, Stream.CHECK, state.step),
            progress=False,
        )
        state.calls += look.calls
        state.log_prob = level(look)
        if state.log_prob >= self.options.target:
            state.reached = None
        elif state.reached is None:
            state.reached = state.step
        found = look.conclusion.particles
        if found is None or not math.isfinite(look.log_prob):
            return
        rng = generator(child_seed(self.root, Stream.WALK, state.step, Stream.CHECK))
        if self.walkers is None:
            self.walkers = Walkers.seeded(found, look.log_prob, self.options.particles, rng)
        else:
            self.walkers.reseed(found, look.log_prob, rng)

    def _save(self) -> None:
        if self.options.path is not None:
            save(self.options.path, self.trainer, self.walkers, self.state)


def _cosine(share: float) -> float:
    """From 1 at 0 down to ``FINAL_RATE`` at 1."""
    return FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * min(max(share, 0.0), 1.0)))


def level(found: Estimate) -> float:
    """log P, or the upper bound when no catastrophe was found: not finding any is no reason to stop training."""
    return found.log_prob if math.isfinite(found.log_prob) else found.upper


def batch_of(backend: Backend, data: PyTree, rows: np.ndarray) -> PyTree:
    """These rows of every array."""
    return backend.tree_map(lambda leaf: leaf[rows], data)


def number(root: np.random.SeedSequence, *key: int) -> int:
    """A seed for estimate() from a key, different for each purpose and step."""
    return int(child_seed(root, *key).generate_state(1, np.uint64)[0] >> np.uint64(1))
