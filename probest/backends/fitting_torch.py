"""Fitting the parameters of a torch adversary: see :class:`~probest.backends.base.Minimizer`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from probest.backends.base import Backend, Parts, PyTree

__all__ = ["Bound", "TorchMinimizer"]


class Bound(torch.nn.Module):
    """A function with parameters of its own."""

    def __init__(self, function: Callable[..., Any], params: Mapping[str, np.ndarray]) -> None:
        super().__init__()
        self.function = function
        dtype = torch.get_default_dtype()
        self.params = torch.nn.ParameterDict({k: torch.as_tensor(v, dtype=dtype) for k, v in params.items()})

    def forward(self, *args: Any) -> Any:
        return self.function(dict(self.params.items()), *args)


class TorchMinimizer:
    """Fits a copy of the adversary in place."""

    def __init__(
        self, backend: Backend, parts: Parts, loss: Callable[..., Any], *, learning_rate: float, max_norm: float = 10.0
    ) -> None:
        params = {k: torch.as_tensor(v).detach().clone().requires_grad_(True) for k, v in parts.params.items()}
        self.parts = parts._replace(adversary=copy.deepcopy(parts.adversary), params=params)
        self.backend, self.loss, self.max_norm = backend, loss, max_norm
        self.leaves: dict[str, torch.Tensor] = {f"param.{name}": value for name, value in params.items()}
        if isinstance(self.parts.adversary, torch.nn.Module):
            self.leaves |= {f"module.{n}": p for n, p in self.parts.adversary.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.Adam(list(self.leaves.values()), lr=learning_rate)

    def step(self, *arrays: PyTree) -> float:
        given = (self.backend.tree_map(self.backend.from_host, tree) for tree in arrays)
        self.optimizer.zero_grad()
        loss = self.loss(self.parts, *given)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(list(self.leaves.values()), self.max_norm)
        if torch.isfinite(norm):
            self.optimizer.step()
        return float(loss.detach())

    def arrays(self) -> dict[str, np.ndarray]:
        return {name: value.detach().cpu().numpy().copy() for name, value in self.leaves.items()}

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        with torch.no_grad():
            for name, value in self.leaves.items():
                value.copy_(torch.as_tensor(arrays[name]))
