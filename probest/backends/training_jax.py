"""One optimisation step of a jax model against log P: see :class:`~probest.backends.base.Trainer`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from probest.backends.base import Array, Backend, Hard, Losses, Parts, Pull, PyTree

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
    ) -> None:
        self.weights, self.fixed = eqx.partition(parts.model, eqx.is_inexact_array)
        self.weights = jax.tree.map(jnp.asarray, self.weights)
        # a gradient that is not finite would ruin the weights: they and the optimizer stay as they are, however often
        self.optimizer = optax.apply_if_finite(optimizer or optax.adam(learning_rate), _EVERY_TIME)
        self.state = self.optimizer.init(self.weights)
        self.backend = backend
        self.task = task

        def of_task(weights: PyTree, batch: PyTree, by: Array | float) -> tuple[Array, Array]:
            loss = task(eqx.combine(weights, self.fixed), batch)
            return by * loss, loss

        def of_event(weights: PyTree, hard: Hard, by: Array) -> tuple[Array, Array]:
            model = eqx.combine(weights, self.fixed)
            severity, log_weight = scores(parts._replace(model=model), hard.z, hard.held)
            log_weight = jnp.where(jnp.isfinite(log_weight), log_weight, 0.0)
            pressed = jnp.sum(hard.share * backend.special.log_ndtr(severity / hard.noise))
            pressed += jnp.sum(hard.score * (log_weight - jax.lax.stop_gradient(log_weight)))
            return by * pressed, pressed

        def of_reading(weights: PyTree, hard: Callable[[Parts], Array]) -> Array:
            return hard(parts._replace(model=eqx.combine(weights, self.fixed)))

        def step(
            weights: PyTree, state: Any, batch: PyTree, taught: PyTree | None, hard: Hard | None, read: PyTree | None,
            by: Array,
        ) -> Any:  # fmt: skip
            lesson, pressure, rate, most, most_pressure = by
            grads, loss = jax.grad(of_task, has_aux=True)(weights, batch, 1.0)
            grads, losses = _clipped(grads, most), [loss]
            for part, hardest, weight in ((of_task, taught, lesson), (of_event, hard, pressure)):
                found: Array | float = jnp.nan
                if hardest is not None:
                    steeper, found = jax.grad(part, has_aux=True)(weights, hardest, weight)
                    grads = jax.tree.map(jnp.add, grads, _clipped(steeper, most_pressure))
                losses.append(found)
            if read is not None:
                steeper, losses[-1] = read
                steeper = jax.tree.map(lambda grad: pressure * grad, steeper)
                grads = jax.tree.map(jnp.add, grads, _clipped(steeper, most_pressure))
            updates, state = self.optimizer.update(grads, state, weights)
            updates = jax.tree.map(lambda update: (rate * update).astype(update.dtype), updates)
            return optax.apply_updates(weights, updates), state, jnp.stack(losses)

        self._step = jax.jit(step)
        self._reading = jax.value_and_grad(of_reading)
        self._loss = jax.jit(lambda weights, batch: of_task(weights, batch, 1.0)[1])

    @property
    def model(self) -> Any:
        return eqx.combine(self.weights, self.fixed)

    def task_loss(self, batch: PyTree) -> float:
        return float(self.task(self.model, batch))

    def shuffled_loss(self, batch: PyTree, rng: np.random.Generator) -> float:
        def shuffled(weight: Array) -> Array:
            entries = rng.permutation(np.asarray(weight).ravel()) if weight.size > 1 else -np.asarray(weight)
            return jnp.asarray(entries.reshape(weight.shape), weight.dtype)

        return float(self._loss(jax.tree.map(shuffled, self.weights), batch))

    def step(
        self, batch: PyTree, taught: PyTree | None, hard: Hard | Callable[[Parts], Array] | None, by: Pull
    ) -> Losses:
        read = None
        if isinstance(hard, Hard):
            hard = jax.tree.map(self.backend.from_host, hard)
        elif hard is not None:  # it decides by values on the way, so it is not compiled
            value, slope = self._reading(self.weights, hard)
            hard, read = None, (slope, value)
        self.weights, self.state, losses = self._step(
            self.weights, self.state, batch, taught, hard, read, jnp.asarray(by)
        )
        return Losses(*(float(loss) for loss in losses))

    def arrays(self) -> dict[str, np.ndarray]:
        kept = {"model": self.weights, "optimizer": self.state}
        return {
            f"{name}.{i}": np.array(leaf) for name, tree in kept.items() for i, leaf in enumerate(jax.tree.leaves(tree))
        }

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        self.weights = _filled("model", self.weights, arrays)
        self.state = _filled("optimizer", self.state, arrays)


def _clipped(grads: PyTree, most: Array) -> PyTree:
    """The gradient, its norm at most ``most``."""
    scale = most / jnp.maximum(optax.tree.norm(grads), most)
    return jax.tree.map(lambda grad: grad * scale, grads)


def _filled(name: str, tree: PyTree, arrays: dict[str, np.ndarray]) -> PyTree:
    """The tree with its leaves from ``arrays``."""
    leaves, treedef = jax.tree.flatten(tree)
    return jax.tree.unflatten(treedef, [jnp.asarray(arrays[f"{name}.{i}"]) for i in range(len(leaves))])
