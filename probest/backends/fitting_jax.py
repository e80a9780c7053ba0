"""Fitting the parameters of a jax adversary: see :class:`~probest.backends.base.Minimizer`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from probest.backends.base import Array, Backend, Parts, PyTree

__all__ = ["JaxMinimizer"]

_EVERY_TIME = np.iinfo(np.int32).max


class JaxMinimizer:
    """Fits the floating-point arrays of the adversary and of ``params``."""

    def __init__(
        self, backend: Backend, parts: Parts, loss: Callable[..., Any], *, learning_rate: float, max_norm: float = 10.0
    ) -> None:
        self.given = parts
        self.backend = backend
        learnt, self.fixed = eqx.partition((parts.adversary, parts.params), eqx.is_inexact_array)
        self.weights = jax.tree.map(jnp.asarray, learnt)
        clipped = optax.chain(optax.clip_by_global_norm(max_norm), optax.adam(learning_rate))
        optimizer = optax.apply_if_finite(clipped, _EVERY_TIME)
        self.state = optimizer.init(self.weights)

        def step(weights: PyTree, state: Any, *arrays: PyTree) -> tuple[PyTree, Any, Array]:
            value, grads = jax.value_and_grad(lambda weights: loss(self._with(weights), *arrays))(weights)
            updates, state = optimizer.update(grads, state, weights)
            return optax.apply_updates(weights, updates), state, value

        self._step = jax.jit(step)

    def _with(self, weights: PyTree) -> Parts:
        adversary, params = eqx.combine(weights, self.fixed)
        return self.given._replace(adversary=adversary, params=params)

    @property
    def parts(self) -> Parts:
        return self._with(self.weights)

    def step(self, *arrays: PyTree) -> float:
        given = jax.tree.map(self.backend.from_host, arrays)
        self.weights, self.state, value = self._step(self.weights, self.state, *given)
        return float(value)

    def arrays(self) -> dict[str, np.ndarray]:
        return {str(i): np.array(leaf) for i, leaf in enumerate(jax.tree.leaves(self.weights))}

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        leaves, treedef = jax.tree.flatten(self.weights)
        self.weights = jax.tree.unflatten(treedef, [jnp.asarray(arrays[str(i)]) for i in range(len(leaves))])
