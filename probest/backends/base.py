"""The one seam between probest and an array library.

A problem is a function of one draw (one vector z of standard-normal coordinates). A backend batches such a
function, compiles it where it can, differentiates it, and moves numbers between host and device. Everything
that knows torch or jax is behind :class:`Backend`; everything that decides (temperatures, weights, intervals)
is NumPy float64 on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

__all__ = [
    "Array",
    "Backend",
    "BatchingError",
    "Hard",
    "Losses",
    "Minimizer",
    "Parts",
    "Pull",
    "PyTree",
    "RowFunction",
    "Trainer",
    "chunks",
]

Array = Any
PyTree = Any


class BatchingError(RuntimeError):
    """A program or model could not be batched; the message says which ``batching`` to ask for."""


class Parts(NamedTuple):
    """What may hold parameters. They travel as arguments, never as constants of a compiled function.

    adversary, model: callables, possibly modules. params: values of ``param`` sites by name; sites that are
    not named keep the program's own value.
    """

    adversary: Any
    model: Any
    params: dict[str, Array]


RowFunction = Callable[[Parts, Array, dict[str, Array]], PyTree]
"""``fn(parts, z, held) -> pytree`` for one z of shape ``(dim,)`` and held site values without a batch axis."""


class Backend(Protocol):
    """An array library, as far as probest needs one."""

    @property
    def name(self) -> Literal["torch", "jax"]: ...

    @property
    def special(self) -> ModuleType:
        """Special functions, exact in the tails, and the array namespace ``special.xp``."""

    def owns(self, value: Any) -> bool:
        """Whether ``value`` is an array of this library."""

    def as_array(self, value: Any) -> Array:
        """An array of this library, the same object if it is one already (so gradients pass)."""

    def from_host(self, array: np.ndarray) -> Array:
        """A device array; floating point becomes the library's default float type."""

    def to_host(self, array: Array) -> np.ndarray:
        """A NumPy copy, detached from any gradient; floating point becomes float64."""

    def leaves(self, tree: PyTree) -> list[Any]: ...

    def tree_map(self, fn: Callable[..., Any], *trees: PyTree) -> PyTree: ...

    def parameters(self, part: Any) -> list[Array]:
        """The arrays that ``part`` (a module or pytree) can be differentiated in."""

    def foreign(self, part: Any) -> str | None:
        """Name of the other library if ``part`` belongs to it, else None."""

    def rows(self, fn: RowFunction, parts: Parts, z: Array, held: dict[str, Array]) -> PyTree:
        """``fn`` at every row of z, as a differentiable function of ``parts``; not compiled by itself."""

    def loop(self, fn: RowFunction, parts: Parts, z: Array, held: dict[str, Array]) -> PyTree:
        """As ``rows``, one row after the other: for what cannot be batched."""

    def on_host(
        self,
        fn: Callable[[Parts, Array, dict[str, Array]], PyTree],
        parts: Parts,
        z: np.ndarray,
        held: dict[str, np.ndarray],
        *,
        gradient: bool = False,
    ) -> tuple[PyTree, list[np.ndarray] | None]:
        """A batched ``fn`` (hashable by value; ``fn.compiled`` says whether it may be) from host to host.

        Compiled once per shape. Returns the outputs, leaves of shape ``(n, ...)``; with ``gradient`` these are a tuple
        of arrays, and the gradient in z, ``(n, dim)``, of each that is of shape ``(n,)`` is returned too.
        """

    def call_host(self, fn: Callable[..., np.ndarray], *trees: PyTree, boolean: bool) -> Array:
        """``fn(*trees)``, a scalar, as an operation of a program: a constant to autograd. fn sees NumPy pytrees.

        boolean: whether it returns a bool or a float.
        """

    def rehearse(self, fn: Callable[[], PyTree], *, values: bool = True) -> PyTree:
        """``fn()``, traced where that is quicker than running it step by step; for its effects without ``values``."""

    def snapshot(self, leaf: Any) -> Any:
        """A NumPy copy of a leaf that can be written to in place, or the leaf itself if it cannot."""

    def constant(self, value: Array) -> Array:
        """The value as a constant of any gradient."""

    def compiling(self) -> bool:
        """Whether this runs while somebody's ``jit`` traces it, so that values are not known."""

    def no_gradient(self) -> AbstractContextManager[Any]:
        """No gradient is recorded inside."""

    def evaluating(self, *parts: Any) -> AbstractContextManager[None]:
        """Modules among ``parts`` in evaluation mode inside, and as they were afterwards."""

    def trainer(
        self,
        parts: Parts,
        scores: Callable[..., Any],
        task: Callable[..., Any],
        *,
        optimizer: Any,
        learning_rate: float,
    ) -> Trainer:
        """A :class:`Trainer` of ``parts.model``. ``scores(parts, z, held)`` gives severities and log-weights."""

    def minimizer(self, parts: Parts, loss: Callable[..., Any], *, learning_rate: float) -> Minimizer:
        """A :class:`Minimizer` of ``loss(parts, *arrays)`` in the adversary of ``parts`` and in its ``params``."""

    def bind(self, function: Callable[..., Any], params: dict[str, np.ndarray]) -> Any:
        """``function(params, *args)`` as a callable of ``args`` that owns ``params``, so that gradients reach them."""


class Losses(NamedTuple):
    """What a training step saw: the loss on the task's own batch, on hard cases with a teacher's answers, and the mean
    of log Φ(severity / noise) over the particles, or what stood for it; NaN where there were none.
    """

    task: float
    taught: float
    pressure: float


class Pull(NamedTuple):
    """What a training step goes by.

    lesson, pressure: weights of the two losses beside the task's. rate: share of the learning rate. most, most_hard:
    the norms to which the task's gradient and those of the two are clipped.
    """

    lesson: float
    pressure: float
    rate: float
    most: float
    most_hard: float


class Hard(NamedTuple):
    """Particles whose probability of catastrophe is stepped down.

    z ``(n, dim)``; held: site values ``(n, ...)``; noise ``(n,)``: σ of each, in units of severity; share ``(n,)``: of
    each in the mean; score ``(n,)``: of its log-weight's gradient.
    """

    z: np.ndarray
    held: dict[str, np.ndarray]
    noise: np.ndarray
    share: np.ndarray
    score: np.ndarray


class Trainer(Protocol):
    """A model being trained: on its task, on hard cases with a teacher's answers, against catastrophes.

    The gradients of the three are clipped apart, so that the last, however steep, can never drown the first.
    """

    @property
    def model(self) -> Any: ...

    def task_loss(self, batch: PyTree) -> float: ...

    def shuffled_loss(self, batch: PyTree, rng: np.random.Generator) -> float:
        """The task's loss with the entries of each array of weights in random order; a single one changes its sign."""

    def step(
        self, batch: PyTree, taught: PyTree | None, hard: Hard | Callable[[Parts], Array] | None, by: Pull
    ) -> Losses:
        """One step down ``task(batch) + lesson · task(taught) + pressure · mean log Φ(severity / noise)``, or a
        differentiable function of the parameters in place of that mean.

        A step with a loss or gradient that is not finite is left out.
        """

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything a checkpoint needs, by name."""

    def restore(self, arrays: dict[str, np.ndarray]) -> None: ...


class Minimizer(Protocol):
    """The parameters of an adversary, being fitted."""

    @property
    def parts(self) -> Parts:
        """The parts with the present parameters."""

    def step(self, *arrays: PyTree) -> float:
        """One step of Adam down ``loss(parts, *arrays)``; the loss before it. A gradient that is not finite is none."""

    def arrays(self) -> dict[str, np.ndarray]:
        """The parameters, by name."""

    def restore(self, arrays: dict[str, np.ndarray]) -> None: ...


def chunks(total: int, size: int) -> Iterator[slice]:
    """Slices that cover ``range(total)``, each of at most ``size``."""
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))
