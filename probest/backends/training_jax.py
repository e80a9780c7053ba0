"""One optimisation step of a jax model against log P: see :class:`~probest.backends.base.Trainer`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from probest.backends.base import Array, Backend, Parts, PyTree

__all__ = ["JaxTrainer"]

_EVERY_TIME = np.iinfo(np.int32).max


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
        self.weights, self.fixed = eqx.partition(parts.model, eqx.is_inexact_array)
        self.weights = jax.tree.map(jnp.asarray, self.weights)
        decays = optimizer is None
        inner = optimizer or optax.inject_hyperparams(optax.adam)(learning_rate=learning_rate)
        # a gradient that is not finite would ruin the weights: they and the optimizer stay as they are, however often
        self.optimizer = optax.apply_if_finite(optax.chain(optax.clip_by_global_norm(max_norm), inner), _EVERY_TIME)
        self.state = self.optimizer.init(self.weights)
        self.backend = backend
        self.task = task

        def loss(
            weights: PyTree, batch: PyTree, z: Array, noise: Array, weight: Array
        ) -> tuple[Array, tuple[Array, Array]]:
            model = eqx.combine(weights, self.fixed)
            fit = task(model, batch)
            severity, _ = scores(parts._replace(model=model), z, {})
            pressure = jnp.mean(backend.special.log_ndtr(severity / noise)) if len(z) else jnp.zeros(())
            return fit + weight * pressure, (fit, pressure)

        def step(weights: PyTree, state: Any, decay: Array, *rest: Any) -> Any:
            grads, parts_of_loss = jax.grad(loss, has_aux=True)(weights, *rest)
            if decays:
                state = optax.tree.set(state, learning_rate=decay * learning_rate)
            updates, state = self.optimizer.update(grads, state, weights)
            return optax.apply_updates(weights, updates), state, parts_of_loss

        self._step = jax.jit(step)

    @property
    def model(self) -> Any:
        return eqx.combine(self.weights, self.fixed)

    def task_loss(self, batch: PyTree) -> float:
        return float(self.task(self.model, batch))

    def step(self, batch: PyTree, z: np.ndarray, noise: float, weight: float, decay: float) -> tuple[float, float]:
        rest = (batch, self.backend.from_host(z), jnp.asarray(noise), jnp.asarray(weight))
        self.weights, self.state, (fit, pressure) = self._step(self.weights, self.state, jnp.asarray(decay), *rest)
        return float(fit), float(pressure)

    def arrays(self) -> dict[str, np.ndarray]:
        kept = {"model": self.weights, "optimizer": self.state}
        return {
            f"{name}.{i}": np.array(leaf) for name, tree in kept.items() for i, leaf in enumerate(jax.tree.leaves(tree))
        }

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        self.weights = _filled("model", self.weights, arrays)
        self.state = _filled("optimizer", self.state, arrays)


def _filled(name: str, tree: PyTree, arrays: dict[str, np.ndarray]) -> PyTree:
    """The tree with its leaves from ``arrays``."""
    leaves, treedef = jax.tree.flatten(tree)
    return jax.tree.unflatten(treedef, [jnp.asarray(arrays[f"{name}.{i}"]) for i in range(len(leaves))])
