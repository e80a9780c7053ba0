"""One optimisation step of a torch model against log P: see :class:`~probest.backends.base.Trainer`."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from probest.backends.base import Backend, Hard, Losses, Parts, Pull, PyTree, RowFunction

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
    ) -> None:
        self.backend = backend
        self.model = copy.deepcopy(parts.model)
        self.parts = parts._replace(model=self.model)
        self.scores: RowFunction = scores
        self.task = task
        self.weights = backend.parameters(self.model)
        self.optimizer = optimizer(self.weights) if optimizer else torch.optim.Adam(self.weights, lr=learning_rate)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]

    def task_loss(self, batch: PyTree) -> float:
        with torch.no_grad():
            return _scalar(self.task(self.model, batch))

    def shuffled_loss(self, batch: PyTree, rng: np.random.Generator) -> float:
        kept = [weight.detach().clone() for weight in self.weights]
        with torch.no_grad():
            for weight in self.weights:
                order = torch.as_tensor(rng.permutation(weight.numel()), device=weight.device)
                weight.copy_((weight.reshape(-1)[order] if weight.numel() > 1 else -weight).reshape(weight.shape))
            loss = _scalar(self.task(self.model, batch))
            for weight, value in zip(self.weights, kept, strict=True):
                weight.copy_(value)
        return loss

    def step(
        self, batch: PyTree, taught: PyTree | None, hard: Hard | Callable[[Parts], Tensor] | None, by: Pull
    ) -> Losses:
        for group, full in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = full * by.rate
        task = self.task(self.model, batch)
        learnt = None if taught is None else self.task(self.model, taught)
        pressed = None if hard is None else self._pressure(hard)
        grads = self._clipped(task, by.most)
        for loss, weight in ((learnt, by.lesson), (pressed, by.pressure)):
            if loss is not None:
                grads = [a + b for a, b in zip(grads, self._clipped(weight * loss, by.most_hard), strict=True)]
        losses = Losses(_scalar(task), _scalar(learnt), _scalar(pressed))
        if all(bool(torch.isfinite(grad).all()) for grad in grads):
            for weight, grad in zip(self.weights, grads, strict=True):
                weight.grad = grad
            self.optimizer.step()
            self.optimizer.zero_grad()
        return losses

    def _pressure(self, hard: Hard | Callable[[Parts], Tensor]) -> Tensor:
        if not isinstance(hard, Hard):
            with self.backend.evaluating(*self.parts[:2]):
                return hard(self.parts)
        held = {name: torch.as_tensor(value) for name, value in hard.held.items()}
        with self.backend.evaluating(*self.parts[:2]):
            severity, log_weight = self.scores(self.parts, self.backend.from_host(hard.z), held)
        noise, share, score = (self.backend.from_host(value) for value in (hard.noise, hard.share, hard.score))
        log_weight = torch.where(log_weight.isfinite(), log_weight, 0.0)
        total: Tensor = (share * self.backend.special.log_ndtr(severity / noise)).sum()
        scored: Tensor = (score * (log_weight - log_weight.detach())).sum()
        return total + scored

    def _clipped(self, loss: Tensor, most: float) -> Sequence[Tensor]:
        """The gradient, its norm at most ``most``."""
        found = torch.autograd.grad(loss, self.weights, allow_unused=True)
        grads = [torch.zeros_like(w) if g is None else g for w, g in zip(self.weights, found, strict=True)]
        norm = torch.stack([g.double().square().sum() for g in grads]).sum().sqrt()
        return [g * (most / norm.clamp(min=most)).to(g.dtype) for g in grads]

    def arrays(self) -> dict[str, np.ndarray]:
        saved = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for index, entries in self.optimizer.state_dict()["state"].items():
            saved |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in entries.items()}
        return {name: value.detach().cpu().numpy().copy() for name, value in saved.items()}

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        tensors = {name: torch.as_tensor(value.copy()) for name, value in arrays.items()}
        self.model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
        state: dict[int, dict[str, Any]] = {}
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, index, entry = name.split(".", 2)
                state.setdefault(int(index), {})[entry] = value
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state})


def _scalar(loss: Any) -> float:
    if loss is None:
        return math.nan
    return float(loss.detach()) if isinstance(loss, Tensor) else float(loss)
