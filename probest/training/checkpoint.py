"""Checkpoints of training: arrays as safetensors, the rest as JSON in their metadata."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from probest.backends.base import Trainer
from probest.training.walkers import Walkers

__all__ = ["Step", "TrainingState", "resume", "save"]


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


@dataclass
class TrainingState:
    """What a checkpoint holds beside the trainer's arrays and the particles."""

    step: int = 0
    calls: int = 0
    task_calls: int = 0
    seconds: float = 0.0
    log_prob: float = math.nan
    reached: int | None = None
    history: list[Step] = field(default_factory=list)


class _Saved(NamedTuple):
    log_prob: float
    noise: float
    angle: float


def save(path: Path, trainer: Trainer, walkers: Walkers | None, state: TrainingState) -> None:
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


def resume(path: Path, trainer: Trainer) -> tuple[TrainingState, Walkers | None]:
    """What :func:`save` wrote, the trainer's arrays restored. Raises ValueError for any other file."""
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
    state = TrainingState(**{**record, "history": [Step(**step) for step in record["history"]]})
    if z is None:
        return state, None
    return state, Walkers(z, severity=severity, **json.loads(metadata["walkers"]))
