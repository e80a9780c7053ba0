"""One optimisation step of a jax model against log P: see :class:`~probest.backends.base.Trainer`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from probest.backends.base import Array, Backend, Parts, PyTree

__all__ = ["JaxTrainer"]


class JaxTrainer:
    """Trains the floating-point arrays of the model, a pytree; everything else of it stays as it is."""

    def __init__(
        self,
        backend: Backend,
        parts: Parts,
        scores: Callable[..., Any],
        task: Callable[..., Any],
        *,
        optimizer: optax.GradientTransformation | None,
        learning_rate: float,
        max_norm: float,
    ) -> None:
        leaves, self.treedef = jax.tree.flatten(parts.model)
        self.fixed = [None if _trainable(leaf) else leaf for leaf in leaves]
        self.weights: list[Array] = [jnp.asarray(leaf) for leaf in leaves if _trainable(leaf)]
        clip = optax.clip_by_global_norm(max_norm)
        self.optimizer = optax.chain(clip, optimizer or optax.adam(learning_rate))
        decays = optimizer is None
        self.state = self.optimizer.init(self.weights)
        self.backend = backend
        self.task = task

        def loss(
            weights: list[Array], batch: PyTree, z: Array, noise: Array, weight: Array
        ) -> tuple[Array, tuple[Array, Array]]:
            model = self._merge(weights)
            fit = task(model, batch)
            severity, _ = scores(parts._replace(model=model), z, {})
            pressure = jnp.mean(backend.special.log_ndtr(severity / noise)) if len(z) else jnp.zeros(())
            return fit + weight * pressure, (fit, pressure)

        def step(weights: list[Array], state: Any, decay: Array, *rest: Any) -> Any:
            grads, parts_of_loss = jax.grad(loss, has_aux=True)(weights, *rest)
            finite = jnp.isfinite(optax.tree.norm(grads))
            updates, moved = self.optimizer.update(grads, state, weights)
            # A gradient that is not finite would ruin the weights: leave them and the optimizer as they are.
            state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), moved, state)
            updates = jax.tree.map(lambda update: jnp.where(finite, update, 0.0), updates)
            if decays:  # Adam's step is proportional to its rate
                updates = jax.tree.map(lambda update: decay * update, updates)
            return optax.apply_updates(weights, updates), state, parts_of_loss

        self._step = jax.jit(step)

    @property
    def model(self) -> Any:
        return self._merge(self.weights)

    def task_loss(self, batch: PyTree) -> float:
        return float(self.task(self.model, batch))

    def step(self, batch: PyTree, z: np.ndarray, noise: float, weight: float, decay: float) -> tuple[float, float]:
        rest = (batch, self.backend.from_host(z), jnp.asarray(noise), jnp.asarray(weight))
        self.weights, self.state, (fit, pressure) = self._step(self.weights, self.state, jnp.asarray(decay), *rest)
        return float(fit), float(pressure)

    def arrays(self) -> dict[str, np.ndarray]:
        saved = {f"model.{i}": leaf for i, leaf in enumerate(self.weights)}
        saved |= {f"optimizer.{i}": leaf for i, leaf in enumerate(jax.tree.leaves(self.state))}
        return {name: np.array(value) for name, value in saved.items()}

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        self.weights = [jnp.asarray(arrays[f"model.{i}"]) for i in range(len(self.weights))]
        leaves, treedef = jax.tree.flatten(self.state)
        self.state = jax.tree.unflatten(treedef, [jnp.asarray(arrays[f"optimizer.{i}"]) for i in range(len(leaves))])

    def _merge(self, weights: list[Array]) -> Any:
        given = iter(weights)
        return jax.tree.unflatten(self.treedef, [next(given) if leaf is None else leaf for leaf in self.fixed])


def _trainable(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray) and jnp.issubdtype(leaf.dtype, jnp.floating)
