"""Checkpoints of training: arrays as safetensors, the rest as JSON in their metadata."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

__all__ = ["Cost", "Costs", "Kept", "Step", "TrainingState", "resume", "save"]


@dataclass
class Cost:
    """Model calls (a forward pass 1, a gradient 3) and seconds."""

    calls: int = 0
    seconds: float = 0.0

    def add(self, calls: int, seconds: float) -> None:
        self.calls += calls
        self.seconds += seconds


@dataclass
class Costs:
    """What a run has spent: on training steps, fresh looks during training, estimates before and after, and the audit.

    task_calls: on the task's own data, not in ``calls``. answers: of the teacher.
    """

    steps: Cost = field(default_factory=Cost)
    looks: Cost = field(default_factory=Cost)
    estimates: Cost = field(default_factory=Cost)
    audit: Cost = field(default_factory=Cost)
    task_calls: int = 0
    answers: int = 0

    @property
    def parts(self) -> dict[str, Cost]:
        return {"steps": self.steps, "looks": self.looks, "estimates": self.estimates, "audit": self.audit}

    @property
    def calls(self) -> int:
        """Model calls of everything together."""
        return sum(part.calls for part in self.parts.values())

    @property
    def seconds(self) -> float:
        return math.fsum(part.seconds for part in self.parts.values())

    @classmethod
    def of(cls, record: Mapping[str, object]) -> Costs:
        """From ``asdict``."""
        return cls(**{name: Cost(**v) if isinstance(v, dict) else v for name, v in record.items()})  # type: ignore[arg-type]


@dataclass(frozen=True)
class Step:
    """One recorded step.

    task_loss: on its minibatch. taught_loss: on hard cases with the teacher's answers, NaN without a teacher. log_prob:
    log P as the ladder follows it, in nats. pressure: mean of log Φ(severity / noise) over its particles. look: what a
    fresh look after this step says of log P (``-inf`` where it found nothing), or None. calls: model calls on
    steps and looks so far. seconds: likewise.
    """

    step: int
    task_loss: float
    taught_loss: float
    log_prob: float
    pressure: float
    look: float | None
    calls: int
    seconds: float


@dataclass
class TrainingState:
    """What a checkpoint holds beside arrays.

    reached: the step at which a look found log P below the target, None before. look: what the last look said.
    rate: share of the learning rate that is left after steps had to be taken back; reverts: how often that was.
    round: of training, counted from 0. began, last: its first step and, at most, its last.
    """

    last: int
    step: int = 0
    look: float | None = None
    reached: int | None = None
    rate: float = 1.0
    reverts: int = 0
    round: int = 0
    began: int = 0
    costs: Costs = field(default_factory=Costs)
    history: list[Step] = field(default_factory=list)


class Kept(Protocol):
    """A part of a run that is saved: named arrays that it gives and takes back."""

    def arrays(self) -> dict[str, np.ndarray]: ...

    def restore(self, arrays: dict[str, np.ndarray]) -> None: ...


def save(path: Path, parts: Mapping[str, Kept], state: TrainingState) -> None:
    """Arrays as safetensors, the rest as its metadata; written beside and moved, so a crash leaves the old file."""
    from safetensors.numpy import save_file

    arrays = {
        f"{part}/{name}": np.array(value, order="C")
        for part, kept in parts.items()
        for name, value in kept.arrays().items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    save_file(arrays, beside, metadata={"state": json.dumps(asdict(state))})
    beside.replace(path)


def resume(path: Path, parts: Mapping[str, Kept]) -> TrainingState:
    """What :func:`save` wrote, the parts' arrays restored. Raises ValueError for any other file."""
    from safetensors import safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata()
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        for part, kept in parts.items():
            mine = {name.removeprefix(f"{part}/"): v for name, v in arrays.items() if name.startswith(f"{part}/")}
            if not mine:
                raise KeyError(part)
            kept.restore(mine)
        record = json.loads(metadata["state"])
        record["history"] = [Step(**step) for step in record["history"]]
        record["costs"] = Costs.of(record["costs"])
        return TrainingState(**record)
    except Exception as error:
        raise ValueError(
            f"checkpoint={str(path)!r} is not a checkpoint of this model and optimizer ({type(error).__name__}: "
            f"{error}). Name another file, or remove it to start again"
        ) from error
