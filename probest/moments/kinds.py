r"""Checkers whose severity is the largest of several, taken apart: a catastrophe of one kind or another.

The largest of many severities is a union of events, whoever wrote it: ``any_of``, ``eventually``, ``margins.max()``, or

.. math:: s = h\big(\max_k v_k\big), \qquad h \text{ monotone},

such as the log-odds of the worst of all pairs of classes. Each kind by itself, :math:`s_k = h(v_k)`, is a simpler event
than all of them together: modes of one kind come into reach together, those of another may be a thousandth of all draws
until just before the limit, where they hold half of P.

The checker is traced as a function of an observation and an action. From its result back, the first value that
everything hangs on and that is a maximum (or a minimum, of which h falls) is what it is the largest of. That is tried:
the largest of the kinds has to be the severity wherever it is asked.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from probest.backends.base import Array, Backend, Parts, PyTree
from probest.moments.propagate import front_of
from probest.moments.steps import Name, Step, Trace, leaves, rebuilt

__all__ = ["Kinds", "kinds_of"]

_LARGEST = {"amax", "max", "maximum", "reduce_max"}
_LEAST = {"amin", "min", "minimum", "reduce_min"}
_SAME = {
    "view", "reshape", "squeeze", "unsqueeze", "clone", "alias", "expand", "broadcast_in_dim", "expand_dims", "copy",
    "convert_element_type", "to_copy", "permute", "transpose", "flatten",
}  # fmt: skip
"""Operations that leave the entries of an array as they are, perhaps more than once."""
_NOTHING = Parts(None, None, {})
_TOGETHER = {"stack", "cat", "concatenate"}


class _Tail(NamedTuple):
    """A function of one number: what follows the value ``source`` of a trace, up to ``result``."""

    source: Any
    steps: tuple[Step, ...]
    result: Any
    shape: tuple[int, ...]


class _Leaf(NamedTuple):
    """An array of a trace, and what makes severities of its entries, one after the other."""

    name: Name
    tails: tuple[_Tail, ...]


@dataclass(frozen=True, eq=False)
class Kinds:
    """A checker in place of the given one: severities ``(K,)`` of one case, of which its own is the largest."""

    backend: Backend
    trace: Trace
    steps: tuple[Step, ...]
    leaves: tuple[_Leaf, ...]
    count: int

    def __call__(self, observation: PyTree, action: PyTree) -> Array:
        values = _run(self.steps, _start(self.trace, _arrays(self.backend, observation, action)))
        xp = self.backend.special.xp
        return xp.concat([self._entries(leaf, values[leaf.name.id]) for leaf in self.leaves])

    def _entries(self, leaf: _Leaf, value: Array) -> Array:
        xp = self.backend.special.xp
        entries = xp.reshape(value, (-1,))
        for tail in leaf.tails:
            if tail.steps:
                entries = self.backend.rows(partial(self._after, tail), _NOTHING, entries, {})
        return entries

    def _after(self, tail: _Tail, parts: Parts, entry: Array, held: dict[str, Array]) -> Array:
        xp = self.backend.special.xp
        values = _run(tail.steps, {**self.trace.constants, tail.source: xp.reshape(entry, tail.shape)})
        return xp.reshape(values[tail.result], ())


def kinds_of(backend: Backend, checker: Any, observation: PyTree, action: PyTree, most: int = 1_000) -> Kinds | None:
    """The kinds of catastrophe of a checker, from one case; None where it is not the largest of 2 to ``most`` numbers.

    Whatever cannot be traced has none.
    """
    arrays = _arrays(backend, observation, action)

    def severity(*values: Array) -> Array:
        given = iter(values)
        seen, done = backend.tree_map(lambda leaf: None if leaf is None else next(given), (observation, action))
        return backend.special.xp.reshape(backend.as_array(checker(seen, done)) * 1.0, ())

    try:
        trace = front_of(backend.name).steps_of(severity, *arrays)
        if not any(step.kind in _LARGEST | _LEAST for step in trace.steps):
            return None
        kinds = _Search(backend, trace, arrays).kinds()
        if kinds is None or not 2 <= kinds.count <= most:
            return None
        both = backend.rehearse(lambda: (kinds(observation, action), severity(*arrays)))
        said, truth = map(backend.to_host, both)
    except Exception:  # whatever a checker does when it is traced: it can still be asked
        return None
    return kinds if np.allclose(np.nanmax(said), truth, rtol=1e-3, atol=1e-4) else None


class _Search:
    """What a severity is the largest of."""

    def __init__(self, backend: Backend, trace: Trace, arrays: Sequence[Array]) -> None:
        self.backend, self.trace = backend, trace
        random = set(trace.input)
        for step in trace.steps:
            if any(name.id in random for name in _names(step)):
                random.update(step.outputs)
        self.random = random
        self.made = {name: step for step in trace.steps for name in step.outputs}
        self.values = backend.rehearse(lambda: _run(trace.steps, _start(trace, arrays)))
        # what hangs on no input is a constant of whatever follows
        fixed = {name: value for name, value in self.values.items() if name not in random}
        self.trace = Trace(trace.input, {**trace.constants, **fixed}, trace.steps, trace.result)

    def kinds(self) -> Kinds | None:
        result = self.trace.result
        if not isinstance(result, Name) or result.id not in self.random:
            return None
        parts = self._parts(result, ())
        if parts is None:
            return None
        steps = self._needed({part.name.id for part in parts})
        count = sum(math.prod(np.shape(self.values[part.name.id])) for part in parts)
        return Kinds(self.backend, self.trace, steps, tuple(parts), count)

    def _parts(self, one: Name, after: tuple[_Tail, ...]) -> list[_Leaf] | None:
        """The arrays that a number is the largest of; itself, if of none. None where a constant is a catastrophe."""
        found = self._gate(one)
        if found is None:
            return [_Leaf(one, after)]
        step, tail = found
        tails = (tail, *after)
        rises = self._rises(tails)
        if rises is None or rises != (step.kind in _LARGEST):
            return [_Leaf(one, after)]
        own = _LARGEST if rises else _LEAST
        parts: list[_Leaf] = []
        for each in self._expanded(_arguments(step), own):
            if not isinstance(each, Name) or each.id not in self.random:
                value = self.trace.constants[each.id] if isinstance(each, Name) else each
                if self._severities(tails, value).max() >= 0.0:
                    return None
            elif math.prod(np.shape(self.values[each.id])) == 1 and each.id in self.made:
                deeper = self._parts(each, tails)
                if deeper is None:
                    return None
                parts += deeper
            else:
                parts.append(_Leaf(each, tails))
        return parts

    def _gate(self, one: Name) -> tuple[Step, _Tail] | None:
        """The last maximum or minimum that alone decides a number, and what follows it."""
        waiting: set[Any] = {one.id}
        after: list[Step] = []
        for step in reversed(self.trace.steps):
            if not waiting.intersection(step.outputs):
                continue
            if len(waiting) == 1 and (chosen := self._reduction(step)) is not None:
                (name,) = waiting
                return chosen, _Tail(name, tuple(reversed(after)), one.id, tuple(np.shape(self.values[name])))
            waiting.difference_update(step.outputs)
            waiting.update(name.id for name in _names(step) if name.id in self.random)
            after.append(step)
        return None

    def _reduction(self, step: Step) -> Step | None:
        """The step that took the largest or the least, where this one gives it, as a single number."""
        if step.kind == "getitem" and step.args[1] == 0 and isinstance(step.args[0], Name):
            step = self.made.get(step.args[0].id, step)
        elif step.parts:
            return None
        name = step.outputs[0]
        value = self.values[name]
        single = math.prod(np.shape(value[0] if isinstance(value, tuple | list) else value)) == 1
        return step if step.kind in _LARGEST | _LEAST and single else None

    def _expanded(self, names: Iterable[Any], own: set[str]) -> list[Any]:
        """What these are the largest of, as long as they are; constants as they are."""
        found: list[Any] = []
        for name in names:
            step = self.made.get(name.id) if isinstance(name, Name) else None
            if step is not None and step.kind == "getitem" and step.args[1] == 0 and isinstance(step.args[0], Name):
                inner = self.made.get(step.args[0].id)
                step = inner if inner is not None and inner.kind in own else None
            if step is None or not isinstance(name, Name) or name.id not in self.random:
                found.append(name)
            elif step.kind in own or step.kind in _TOGETHER:
                found += self._expanded(_arguments(step), own)
            elif step.kind.removeprefix("_") in _SAME:
                found += self._expanded(step.args[:1], own)
            else:
                found.append(name)
        return found

    def _rises(self, tails: tuple[_Tail, ...]) -> bool | None:
        """Whether severities rise with the number that the first of the tails follows; None if that cannot be told."""
        here = np.asarray(self.backend.to_host(self.values[tails[0].source])).reshape(())
        if not np.isfinite(here):
            return None
        width = 0.1 + 0.1 * abs(float(here))
        below, above = self._severities(tails, np.array([here - width, here + width]))
        return None if not abs(above - below) > 0.0 else bool(above > below)

    def _severities(self, tails: tuple[_Tail, ...], values: Any) -> np.ndarray:
        plain = Kinds(self.backend, self.trace, (), (), 0)
        like = self.backend.as_array(self.values[tails[0].source])
        entries = self.backend.special.array(np.asarray(self.backend.to_host(self.backend.as_array(values))), like)
        return np.asarray(self.backend.to_host(plain._entries(_Leaf(Name(None), tails), entries)))

    def _needed(self, names: set[Any]) -> tuple[Step, ...]:
        """The steps that lead to these values."""
        steps = []
        for step in reversed(self.trace.steps):
            if names.intersection(step.outputs) and self.random.intersection(step.outputs):
                names |= {name.id for name in _names(step)}
                steps.append(step)
        return tuple(reversed(steps))


def _names(step: Step) -> list[Name]:
    return [leaf for leaf in leaves((step.args, step.params)) if isinstance(leaf, Name)]


def _arguments(step: Step) -> list[Any]:
    """The arrays of a maximum or of what puts arrays together: of a reduction or a list, what it is of."""
    first = step.args[0]
    if isinstance(first, tuple | list):
        return list(first)
    if step.kind in ("amax", "amin", "reduce_max", "reduce_min"):
        return [first]
    return [argument for argument in step.args if isinstance(argument, Name) or hasattr(argument, "shape")] or [first]


def _arrays(backend: Backend, observation: PyTree, action: PyTree) -> list[Array]:
    return [backend.as_array(leaf) for leaf in backend.leaves((observation, action))]


def _start(trace: Trace, arrays: Sequence[Array]) -> dict[Any, Any]:
    return {**trace.constants, **dict(zip(trace.input, arrays, strict=True))}


def _run(steps: Iterable[Step], values: dict[Any, Any]) -> dict[Any, Any]:
    """The values by name, and those of the steps."""

    def known(leaf: Any) -> Any:
        return values[leaf.id] if isinstance(leaf, Name) else leaf

    for step in steps:
        found = step.call(*rebuilt(step.args, known), **rebuilt(step.params, known))
        values.update(zip(step.outputs, found, strict=True) if step.parts else [(step.outputs[0], found)])
    return values
