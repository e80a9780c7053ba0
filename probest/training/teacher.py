"""A teacher's answers: what M should do at an observation, as rows of the task's own data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from probest.backends.base import Array, Backend, Parts, PyTree
from probest.programs.event import Composition, Event
from probest.training.follower import Cases

__all__ = ["Rows", "Teacher", "TeacherError", "as_batch"]

Rows = list[np.ndarray]
"""Rows of the task's data on the host: each of its leaves, ``(n, ...)``."""


class TeacherError(ValueError):
    """What the teacher returned does not fit the data; the message says what would."""


@dataclass(frozen=True)
class _Asked:
    """The observation of each case and what the teacher says of it, in one function; equal ones share compiled code."""

    composition: Composition
    teacher: Callable[[PyTree], PyTree] | None

    @property
    def compiled(self) -> bool:
        return self.composition.batching == "vmap"

    def __call__(self, parts: Parts, z: Array, held: dict[str, Array]) -> tuple[PyTree, PyTree]:
        backend = self.composition.frontend.backend
        across = backend.rows if self.composition.batching == "vmap" else backend.loop
        observation, answer = across(self._case, parts, z, held)
        return observation, answer

    def _case(self, parts: Parts, z: Array, held: dict[str, Array]) -> tuple[PyTree, PyTree]:
        whole = self.composition
        backend = whole.frontend.backend
        observation = whole.run(parts, z, held).value[0] if whole.closed_loop else whole._observe(parts, z, held)[0]
        answer = () if self.teacher is None else self.teacher(observation)
        found: tuple[PyTree, PyTree] = backend.tree_map(backend.as_array, (observation, answer))
        return found


class Teacher:
    """``teacher(x)`` for one observation, asked for many at once.

    It is batched as adversaries are where that works, and otherwise asked case by case, with arrays of the library or,
    where it takes none, of NumPy. The pair (x, answer) has to be like a row of ``data``; where rows are not such pairs,
    the answer itself has to be one.
    """

    def __init__(self, teacher: Callable[[PyTree], PyTree], event: Event, data: PyTree) -> None:
        self.teacher = teacher
        self.wanted = [(np.shape(leaf)[1:], np.asarray(leaf[:1]).dtype) for leaf in event.backend.leaves(data)]
        self.ask = self._tried(event)

    def rows(self, event: Event, cases: Cases) -> Rows:
        """A row of data for each case. Raises TeacherError if an answer is not finite or does not fit."""
        observation, answer = self.ask(event, cases.z, cases.held)
        leaves = event.backend.leaves
        rows = self._fitting(leaves(observation), leaves(answer))
        for leaf in rows:
            if leaf.dtype.kind == "f" and not np.isfinite(leaf).all():
                bad = int((~np.isfinite(leaf.reshape(len(leaf), -1))).any(axis=1).sum())
                raise TeacherError(
                    f"teacher: its answer is not finite at {bad} of {len(leaf)} observations. It must say what the "
                    "model should do at every observation that the adversary can produce"
                )
        return rows

    def _tried(self, event: Event) -> Callable[..., tuple[PyTree, PyTree]]:
        """The quickest way of asking that works on two draws of the adversary."""
        z, first = np.random.Generator(np.random.Philox(0)).standard_normal((2, event.dim)), None
        for ask in (self._batched, self._each, self._each_on_host):
            try:
                observation, answer = ask(event, z, {})
            except Exception as error:  # whatever it is, the next way may do
                first = first or error
                continue
            leaves = event.backend.leaves
            self._fitting(leaves(observation), leaves(answer))
            return ask
        raise TeacherError(
            f"teacher: it raised {type(first).__name__} ({first}). It is called as teacher(x) with one observation, as "
            "the adversary returns it"
        ) from first

    def _batched(self, event: Event, z: np.ndarray, held: dict[str, np.ndarray]) -> tuple[PyTree, PyTree]:
        with event.backend.no_gradient():
            found = event.backend.on_host(_Asked(event.composition, self.teacher), event.parts, z, held)[0]
        return found[0], found[1]

    def _each(self, event: Event, z: np.ndarray, held: dict[str, np.ndarray], *, native: bool = True) -> Any:
        backend = event.backend
        observation = backend.on_host(_Asked(event.composition, None), event.parts, z, held)[0][0]

        def one(i: int) -> PyTree:
            case = backend.tree_map(lambda leaf: backend.from_host(leaf[i]) if native else leaf[i], observation)
            with backend.no_gradient():
                return backend.tree_map(lambda leaf: _on_host(backend, leaf), self.teacher(case))

        answers = [one(i) for i in range(len(z))]
        return observation, backend.tree_map(lambda *leaves: np.stack(leaves), *answers)

    def _each_on_host(self, event: Event, z: np.ndarray, held: dict[str, np.ndarray]) -> Any:
        return self._each(event, z, held, native=False)

    def _fitting(self, observation: Rows, answer: Rows) -> Rows:
        """Those of the leaves that make a row of data, with its types."""
        for leaves in ((*observation, *answer), answer):
            if [leaf.shape[1:] for leaf in leaves] == [shape for shape, _ in self.wanted]:
                return [leaf.astype(kind) for leaf, (_, kind) in zip(leaves, self.wanted, strict=True)]
        raise TeacherError(
            f"teacher: an observation has the shapes {_shapes(observation)} and its answer {_shapes(answer)}, but a "
            f"row of data has {[shape for shape, _ in self.wanted]}. Return the answer such that (x, answer) is like a "
            "row of data, or a whole row"
        )


def as_batch(backend: Backend, rows: Rows, data: PyTree) -> PyTree:
    """Rows as a batch with the structure of ``data``."""
    leaves: Iterator[np.ndarray] = iter(rows)
    return backend.tree_map(lambda _: backend.from_host(next(leaves)), data)


def _on_host(backend: Backend, leaf: Any) -> np.ndarray:
    return backend.to_host(leaf) if backend.owns(leaf) else np.asarray(leaf)


def _shapes(leaves: Rows) -> list[tuple[int, ...]]:
    return [leaf.shape[1:] for leaf in leaves]
