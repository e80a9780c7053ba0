"""Callbacks of a training run, with the names of those of transformers' Trainer."""

from __future__ import annotations

import math
from dataclasses import dataclass

from probest.estimate import Estimate
from probest.training.checkpoint import Step, TrainingState

__all__ = ["Callback", "Control", "EarlyStopping"]


@dataclass
class Control:
    """What callbacks ask for. Each is set back once it has been seen to.

    should_training_stop: end after this step; the model is estimated and audited as it is. should_evaluate: take a
    fresh look after this step. should_save: write the checkpoint. reason: why training should stop, in words.
    """

    should_training_stop: bool = False
    should_evaluate: bool = False
    should_save: bool = False
    reason: str = "a callback asked for it"


class Callback:
    """Told what happens in a run; override what you need. ``state`` is for reading, ``control`` for asking."""

    def on_train_begin(self, state: TrainingState, control: Control) -> None:
        """Before the first step, or the first after a checkpoint."""

    def on_step_end(self, state: TrainingState, control: Control, step: Step) -> None:
        """After each step."""

    def on_evaluate(self, state: TrainingState, control: Control, look: Estimate) -> None:
        """After each fresh look."""

    def on_save(self, state: TrainingState, control: Control) -> None:
        """After each checkpoint."""

    def on_train_end(self, state: TrainingState, control: Control) -> None:
        """After the last step, before the estimates."""


@dataclass
class EarlyStopping(Callback):
    """Stop once the mean task loss of the last ``patience`` steps is above ``max_task_loss``."""

    max_task_loss: float
    patience: int = 50

    def on_step_end(self, state: TrainingState, control: Control, step: Step) -> None:
        last = [step.task_loss for step in state.history[-self.patience :]]
        if len(last) >= self.patience and math.fsum(last) / len(last) > self.max_task_loss:
            control.should_training_stop = True
            control.reason = f"the task loss has been above {self.max_task_loss:g} for {self.patience} steps"
