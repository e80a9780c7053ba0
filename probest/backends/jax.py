"""JAX behind the :class:`~probest.backends.base.Backend` protocol.

Compilation is shared between problems: the compiled function takes the arrays of the model and adversary as
arguments, and everything else about them (structure, functions, Python numbers) as a hashable static key. So a
training step, or another estimate of the same shape, does not compile again. Batches are padded to a few sizes
for the same reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from probest.backends import special_jax
from probest.backends.base import Array, BatchingError, Parts, PyTree, RowFunction
from probest.backends.fitting_jax import JaxMinimizer
from probest.backends.training_jax import JaxTrainer

__all__ = ["JaxBackend"]

UNTRACEABLE = (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError)
BATCH_SIZES = tuple(4**k for k in range(3, 13))


class JaxBackend:
    """See :class:`~probest.backends.base.Backend`."""

    name: Literal["torch", "jax"] = "jax"
    special = special_jax

    def owns(self, value: Any) -> bool:
        return isinstance(value, jax.Array)

    def as_array(self, value: Any) -> Array:
        return jnp.asarray(value)

    def from_host(self, array: np.ndarray) -> Array:
        array = np.asarray(array)
        return jnp.asarray(array, dtype=jnp.result_type(float) if array.dtype.kind == "f" else None)

    def to_host(self, array: Array) -> np.ndarray:
        host = np.asarray(array)
        return host.astype(np.float64) if host.dtype.kind in "fV" else host

    def leaves(self, tree: PyTree) -> list[Any]:
        return jax.tree.leaves(tree)

    def tree_map(self, fn: Callable[..., Any], *trees: PyTree) -> PyTree:
        return jax.tree.map(fn, *trees)

    def parameters(self, part: Any) -> list[Array]:
        return [leaf for leaf in jax.tree.leaves(part) if _is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)]

    def foreign(self, part: Any) -> str | None:
        return "torch" if any(c.__module__.startswith("torch.") for c in type(part).__mro__) else None

    def rows(self, fn: RowFunction, parts: Parts, z: Array, held: dict[str, Array]) -> PyTree:
        try:
            return jax.vmap(lambda row, kept: fn(parts, row, kept))(z, held)
        except UNTRACEABLE as error:
            raise _cannot_batch(error) from error

    def loop(self, fn: RowFunction, parts: Parts, z: Array, held: dict[str, Array]) -> PyTree:
        outputs = [fn(parts, row, {name: value[i] for name, value in held.items()}) for i, row in enumerate(z)]
        return jax.tree.map(lambda *values: jnp.stack(values), *outputs)

    def on_host(
        self,
        fn: Callable[[Parts, Array, dict[str, Array]], PyTree],
        parts: Parts,
        z: np.ndarray,
        held: dict[str, np.ndarray],
        *,
        gradient: bool = False,
    ) -> tuple[PyTree, list[np.ndarray] | None]:
        if self.compiling():
            # Under somebody's jit, what happens on the host still happens now: tracing is a state of the thread.
            with ThreadPoolExecutor(1) as thread:
                return thread.submit(self._now, fn, parts, z, held, gradient).result()
        return self._now(fn, parts, z, held, gradient)

    def _now(
        self, fn: Any, parts: Parts, z: np.ndarray, held: dict[str, np.ndarray], gradient: bool
    ) -> tuple[PyTree, list[np.ndarray] | None]:
        n = len(z)
        size = next((size for size in BATCH_SIZES if size >= n), n)
        run = _compiled_run if getattr(fn, "compiled", True) else _run
        arrays, static = _split(parts)
        rows = [self.from_host(np.concatenate([a, np.repeat(a[:1], size - n, axis=0)])) for a in (z, *held.values())]
        values, grads = run(fn, static, gradient, arrays, rows[0], dict(zip(held, rows[1:], strict=True)))
        trimmed = jax.tree.map(lambda value: self.to_host(value)[:n], values)
        return trimmed, None if grads is None else [self.to_host(grad)[:n] for grad in grads]

    def call_host(self, fn: Callable[..., np.ndarray], *trees: PyTree, boolean: bool) -> Array:
        scalar = jax.eval_shape(lambda: jnp.zeros((), bool if boolean else float))

        def call(*trees: PyTree) -> np.ndarray:
            return np.asarray(fn(*jax.tree.map(self.to_host, trees)), scalar.dtype)

        constants = jax.lax.stop_gradient(jax.tree.map(jnp.asarray, trees))
        return jax.pure_callback(call, scalar, *constants, vmap_method="sequential")

    def rehearse(self, fn: Callable[[], PyTree], *, values: bool = True) -> PyTree:
        # Step by step, every operation of the program would be compiled on its own.
        try:
            return jax.jit(fn)() if values else jax.eval_shape(fn)
        except UNTRACEABLE as error:
            raise _cannot_batch(error) from error

    def snapshot(self, leaf: Any) -> Any:
        return leaf

    def trainer(self, parts: Parts, scores: Callable[..., Any], task: Callable[..., Any], **options: Any) -> JaxTrainer:
        return JaxTrainer(self, parts, scores, task, **options)

    def minimizer(self, parts: Parts, loss: Callable[..., Any], *, learning_rate: float) -> JaxMinimizer:
        return JaxMinimizer(self, parts, loss, learning_rate=learning_rate)

    def bind(self, function: Callable[..., Any], params: dict[str, np.ndarray]) -> Any:
        arrays = {name: jnp.asarray(value, dtype=float) for name, value in params.items()}
        return jax.tree_util.Partial(function, arrays)  # type: ignore[no-untyped-call]

    def constant(self, value: Array) -> Array:
        return jax.lax.stop_gradient(value)

    def compiling(self) -> bool:
        return isinstance(jnp.zeros(()), jax.core.Tracer)

    def no_gradient(self) -> AbstractContextManager[Any]:
        return nullcontext()

    @contextmanager
    def evaluating(self, *parts: Any) -> Iterator[None]:
        """Equinox and nnx modules carry their mode as data; it is theirs to set."""
        yield


def _run(
    fn: Callable[[Parts, Array, dict[str, Array]], PyTree],
    static: _Static,
    gradient: bool,
    arrays: list[Array],
    z: Array,
    held: dict[str, Array],
) -> tuple[PyTree, tuple[Array, ...] | None]:
    parts = _merge(arrays, static)
    if not gradient:
        return fn(parts, z, held), None
    values, pullback = jax.vjp(lambda z: fn(parts, z, held), z)
    zeros = tuple(jnp.zeros_like(value) for value in values)
    # Each output row depends on its own row of z alone, so one pullback of ones per output is the whole gradient.
    grads = tuple(
        pullback((*zeros[:i], jnp.ones_like(value), *zeros[i + 1 :]))[0]
        for i, value in enumerate(values)
        if value.ndim == 1
    )
    return values, grads


_compiled_run = jax.jit(_run, static_argnums=(0, 1, 2))


class _Static(NamedTuple):
    treedef: Any
    leaves: tuple[Any, ...]


class _Identity:
    """A static leaf that cannot be hashed, compared by identity."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and other.value is self.value


def _cannot_batch(error: Exception) -> BatchingError:
    return BatchingError(
        "the program, model or checker cannot be traced by jax.vmap. Replace Python control flow on values by "
        "jax.numpy.where or jax.lax, and NumPy functions by jax.numpy; or pass batching='loop' to Problem, "
        f"which runs one case at a time.\n{type(error).__name__}: {str(error).splitlines()[0]}"
    )


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray)


def _split(tree: PyTree) -> tuple[list[Array], _Static]:
    leaves, treedef = jax.tree.flatten(tree)
    rest = tuple(None if _is_array(leaf) else _hashable(leaf) for leaf in leaves)
    return [leaf for leaf in leaves if _is_array(leaf)], _Static(treedef, rest)


def _merge(arrays: list[Array], static: _Static) -> Any:
    given = iter(arrays)
    leaves = [next(given) if leaf is None else _plain(leaf) for leaf in static.leaves]
    return jax.tree.unflatten(static.treedef, leaves)


def _hashable(leaf: Any) -> Any:
    try:
        hash(leaf)
    except TypeError:
        return _Identity(leaf)
    return leaf


def _plain(leaf: Any) -> Any:
    return leaf.value if isinstance(leaf, _Identity) else leaf
