"""PyTorch behind the :class:`~probest.backends.base.Backend` protocol.

Batching is ``torch.func.vmap``. Parameters live in modules and tensors that the user holds, so ordinary autograd
reaches them through whatever is evaluated here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch.utils import _pytree as pytree

from probest.backends import special_torch
from probest.backends.base import Array, BatchingError, Parts, PyTree, RowFunction
from probest.backends.fitting_torch import Bound, TorchMinimizer
from probest.backends.training_torch import TorchTrainer

__all__ = ["TorchBackend"]


class TorchBackend:
    """See :class:`~probest.backends.base.Backend`."""

    name: Literal["torch", "jax"] = "torch"
    special = special_torch

    def owns(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor)

    def as_array(self, value: Any) -> Array:
        return torch.as_tensor(value)

    def from_host(self, array: np.ndarray) -> Array:
        array = np.asarray(array)
        return torch.as_tensor(array, dtype=torch.get_default_dtype() if array.dtype.kind == "f" else None)

    def to_host(self, array: Array) -> np.ndarray:
        host = torch.as_tensor(array).detach().cpu()
        return (host.double() if host.is_floating_point() else host).numpy().copy()

    def leaves(self, tree: PyTree) -> list[Any]:
        return [leaf for leaf in pytree.tree_leaves(tree) if leaf is not None]

    def tree_map(self, fn: Callable[..., Any], *trees: PyTree) -> PyTree:
        return pytree.tree_map(fn, *trees)

    def parameters(self, part: Any) -> list[Array]:
        if isinstance(part, torch.nn.Module):
            return [p for p in part.parameters() if p.requires_grad]
        return []

    def foreign(self, part: Any) -> str | None:
        is_jax = any(c.__module__.split(".")[0] in {"jax", "jaxlib", "equinox", "flax"} for c in type(part).__mro__)
        return "jax" if is_jax else None

    def rows(self, fn: RowFunction, parts: Parts, z: Array, held: dict[str, Array]) -> PyTree:
        try:
            return torch.func.vmap(lambda row, kept: fn(parts, row, kept))(z, held)
        except RuntimeError as error:
            if not any(word in str(error) for word in ("vmap", "functorch", "Batching rule")):
                raise
            raise BatchingError(
                "the program, model or checker cannot be batched by torch.func.vmap (BatchNorm in training mode, "
                ".item(), branching on a tensor's value and in-place writes cannot). Write it without these; or pass "
                "batching='model' to Problem if only the model is at fault, or batching='loop', which runs one case "
                f"at a time.\n{type(error).__name__}: {str(error).splitlines()[0]}"
            ) from error

    def loop(self, fn: RowFunction, parts: Parts, z: Array, held: dict[str, Array]) -> PyTree:
        outputs = [fn(parts, row, {name: value[i] for name, value in held.items()}) for i, row in enumerate(z)]
        return pytree.tree_map(lambda *values: torch.stack([torch.as_tensor(v) for v in values]), *outputs)

    def on_host(
        self,
        fn: Callable[[Parts, Array, dict[str, Array]], PyTree],
        parts: Parts,
        z: np.ndarray,
        held: dict[str, np.ndarray],
        *,
        gradient: bool = False,
    ) -> tuple[PyTree, list[np.ndarray] | None]:
        kept = {name: self.from_host(value) for name, value in held.items()}
        at = self.from_host(z)
        if not gradient:
            with torch.no_grad():
                return self.tree_map(self.to_host, fn(parts, at, kept)), None
        with torch.enable_grad():
            at = at.requires_grad_()
            values = fn(parts, at, kept)
            grads = [_gradient(value, at) for value in values if value.ndim == 1]
        return self.tree_map(self.to_host, values), [self.to_host(grad) for grad in grads]

    def call_host(self, fn: Callable[..., np.ndarray], *trees: PyTree, boolean: bool) -> Array:
        found = fn(*(self.tree_map(self.to_host, tree) for tree in trees))
        return torch.as_tensor(found, dtype=torch.bool if boolean else torch.get_default_dtype())

    def rehearse(self, fn: Callable[[], PyTree], *, values: bool = True) -> PyTree:
        return fn()

    def snapshot(self, leaf: Any) -> Any:
        return self.to_host(leaf) if self.owns(leaf) else leaf

    def trainer(
        self, parts: Parts, scores: Callable[..., Any], task: Callable[..., Any], **options: Any
    ) -> TorchTrainer:
        return TorchTrainer(self, parts, scores, task, **options)

    def minimizer(self, parts: Parts, loss: Callable[..., Any], *, learning_rate: float) -> TorchMinimizer:
        return TorchMinimizer(self, parts, loss, learning_rate=learning_rate)

    def bind(self, function: Callable[..., Any], params: dict[str, np.ndarray]) -> Any:
        return Bound(function, params)

    def constant(self, value: Array) -> Array:
        return value.detach()

    def compiling(self) -> bool:
        return torch.compiler.is_compiling()

    def no_gradient(self) -> AbstractContextManager[Any]:
        return torch.no_grad()

    @contextmanager
    def evaluating(self, *parts: Any) -> Iterator[None]:
        modules = [m for part in parts if isinstance(part, torch.nn.Module) for m in part.modules()]
        training = [m for m in modules if m.training]
        try:
            for module in training:
                module.training = False
            yield
        finally:
            for module in training:
                module.training = True


def _gradient(value: Array, at: Array) -> Array:
    """Gradient of each row of ``value`` in its own row of ``at``; zero where it does not depend on it."""
    if not value.requires_grad:
        return torch.zeros_like(at)
    (grad,) = torch.autograd.grad(value.sum(), at, retain_graph=True, allow_unused=True)
    return torch.zeros_like(at) if grad is None else grad
