"""One optimisation step of a torch model against log P: see :class:`~probest.backends.base.Trainer`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from probest.backends.base import Backend, Parts, PyTree, RowFunction

__all__ = ["TorchTrainer"]


class TorchTrainer:
    """Trains a copy of the model in place; the problem's own model is left as it is."""

    def __init__(
        self,
        backend: Backend,
        parts: Parts,
        scores: Callable[..., Any],
        task: Callable[..., Any],
        *,
        optimizer: Callable[..., Any] | None,
        learning_rate: float,
        max_norm: float,
    ) -> None:
        self.backend = backend
        self.model = copy.deepcopy(parts.model)
        self.parts = parts._replace(model=self.model)
        self.scores: RowFunction = scores
        self.task = task
        self.max_norm = max_norm
        self.weights = backend.parameters(self.model)
        self.rate = None if optimizer else learning_rate
        self.optimizer = (optimizer or torch.optim.Adam)(self.weights)

    def task_loss(self, batch: PyTree) -> float:
        with torch.no_grad():
            return _scalar(self.task(self.model, batch))

    def step(self, batch: PyTree, z: np.ndarray, noise: float, weight: float, decay: float) -> tuple[float, float]:
        if self.rate is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate * decay
        self.optimizer.zero_grad()
        loss = self.task(self.model, batch)
        pressure = torch.zeros(())
        if len(z):
            with self.backend.evaluating(*self.parts[:2]):
                severity, _ = self.scores(self.parts, self.backend.from_host(z), {})
            pressure = self.backend.special.log_ndtr(severity / noise).mean()
        (loss + weight * pressure).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.weights, self.max_norm)
        if torch.isfinite(norm):  # else a step would ruin the weights
            self.optimizer.step()
        return _scalar(loss), float(pressure.detach())

    def arrays(self) -> dict[str, np.ndarray]:
        saved = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for index, entries in self.optimizer.state_dict()["state"].items():
            saved |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in entries.items()}
        return {name: value.detach().cpu().numpy().copy() for name, value in saved.items()}

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        tensors = {name: torch.as_tensor(value) for name, value in arrays.items()}
        self.model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
        state: dict[int, dict[str, Any]] = {}
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, index, entry = name.split(".", 2)
                state.setdefault(int(index), {})[entry] = value
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state})


def _scalar(loss: Any) -> float:
    return float(loss.detach()) if isinstance(loss, torch.Tensor) else float(loss)
