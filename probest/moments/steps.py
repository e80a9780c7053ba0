"""A traced function as a list of steps, and how it is read: the same for jaxpr and fx graphs."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from probest.moments.pointwise import Random
from probest.moments.rules import Propagation

__all__ = ["MomentError", "Name", "Place", "Rule", "Step", "Trace", "Unknown", "leaves", "linear", "read", "rebuilt"]

Rule = Callable[..., Any]
"""``rule(p, step, *args, **params)`` -> the step's value; random arguments are :class:`Random`, ``p`` has the rules."""


class MomentError(RuntimeError):
    """The moments of an operation are not known; the message names it and its place."""


@dataclass(frozen=True)
class Name:
    """A value that another step computes."""

    id: Any


@dataclass(frozen=True)
class Place:
    """A line of the user's code, looked up only where a message names it."""

    look: Callable[[], str]

    def __str__(self) -> str:
        return self.look() or "place unknown"


@dataclass(frozen=True)
class Step:
    """One operation. ``call(*args, **params)`` computes it; args and params are nested and may hold :class:`Name`.

    op: what rules are looked up by. outputs: one name for the value, or one for each part of a tuple (``parts``).
    """

    op: str
    call: Callable[..., Any]
    args: tuple[Any, ...]
    params: Mapping[str, Any]
    outputs: tuple[Any, ...]
    parts: bool
    place: Place

    @property
    def kind(self) -> str:
        """The operation without its library and overload, in place or not: ``add`` for ``aten.add_.Tensor``."""
        return self.op.removeprefix("aten.").split(".")[0].removesuffix("_")


@dataclass(frozen=True)
class Unknown:
    """Random, but not a number that has moments: which entry is the largest, for instance."""

    place: Place


@dataclass(frozen=True)
class Trace:
    """A function of one array. constants: values by name. result: nested, of names and constants.

    input: its name; of a function of several arrays, their names.
    """

    input: Any
    constants: Mapping[Any, Any]
    steps: Sequence[Step]
    result: Any


def leaves(tree: Any) -> list[Any]:
    """What lies in nested tuples, lists and dictionaries; those of other types are leaves."""
    if type(tree) in (tuple, list):
        return [leaf for branch in tree for leaf in leaves(branch)]
    if type(tree) is dict:
        return [leaf for branch in tree.values() for leaf in leaves(branch)]
    return [tree]


def rebuilt(tree: Any, change: Callable[[Any], Any]) -> Any:
    """The same nesting with every leaf changed."""
    if type(tree) in (tuple, list):
        return type(tree)(rebuilt(branch, change) for branch in tree)
    if type(tree) is dict:
        return {key: rebuilt(branch, change) for key, branch in tree.items()}
    return change(tree)


def read(trace: Trace, p: Propagation, rules: Callable[[Step], Rule | None], value: Random, *, linearize: bool) -> Any:
    """The result of the trace where its input is ``value``. A value is forgotten after the last step that needs it."""
    needed: dict[Any, int] = {}
    for number, step in enumerate(trace.steps):
        for leaf in leaves((step.args, step.params)):
            if isinstance(leaf, Name):
                needed[leaf.id] = number
    for leaf in leaves(trace.result):
        if isinstance(leaf, Name):
            needed[leaf.id] = len(trace.steps)
    values = {name: p.library.value(constant) for name, constant in trace.constants.items()}
    values[trace.input] = value
    del value

    def known(leaf: Any) -> Any:
        return values[leaf.id] if isinstance(leaf, Name) else leaf

    for number, step in enumerate(trace.steps):
        args, params = rebuilt(step.args, known), rebuilt(step.params, known)
        for leaf in leaves((step.args, step.params)):
            if isinstance(leaf, Name) and needed[leaf.id] == number:
                values.pop(leaf.id, None)
        found = _value(step, p, rules, args, params, linearize)
        if step.parts:
            values.update(zip(step.outputs, found, strict=True))
        else:
            values[step.outputs[0]] = found
        for name in step.outputs:
            if name not in needed:
                values.pop(name, None)
        del args, params, found
    return rebuilt(trace.result, known)


def _value(
    step: Step, p: Propagation, rules: Callable[[Step], Rule | None], args: Any, params: Any, linearize: bool
) -> Any:
    inputs = leaves((args, params))
    if not any(isinstance(leaf, Random) for leaf in inputs):
        unknown = next((leaf for leaf in inputs if isinstance(leaf, Unknown)), None)
        return p.library.value(step.call(*args, **params)) if unknown is None or step.op == "getitem" else unknown
    rule = rules(step)
    if rule is not None:
        try:
            found = rule(p, step, *args, **params)
        except MomentError:
            raise
        except Exception as error:
            raise MomentError(f"moments: {step.op} ({step.place}): {error}") from error
        if found is not NotImplemented:
            return found
    if not linearize:
        raise MomentError(
            f"moments: there is no rule for {step.op} {'' if rule is None else 'with these arguments '}"
            f"({step.place}). Register one with probest.moments.register_rule({step.op!r}, ...), or pass "
            "linearize=True to replace it by its derivative at the mean"
        )
    warnings.warn(
        f"moments: {step.op} ({step.place}) has no rule and is replaced by its derivative at the mean",
        stacklevel=_outside(),
    )
    return linear(p, step, args, params, derivative=True)


def linear(
    p: Propagation, step: Step, args: Any, params: Any, *, nonnegative: bool = False, derivative: bool = False
) -> Any:
    """The step as an affine operation in all its random arguments; or, not being one, replaced by its derivative."""
    randoms: list[Random] = []
    for leaf in leaves((args, params)):
        if isinstance(leaf, Random) and not any(leaf is r for r in randoms):
            randoms.append(leaf)

    for r in randoms:
        if p.are_truths(r):  # moved about, they are numbers, each by itself: a sum over points would lose rare ones
            r.expression = p.indicator(r).expression
            p.gaussian(r)

    def call(*found: Any) -> Any:
        def filled(leaf: Any) -> Any:
            for r, value in zip(randoms, found, strict=True):
                if leaf is r:
                    return value
            return leaf

        return step.call(*rebuilt(args, filled), **rebuilt(params, filled))

    points = [p.mean(r) if derivative else p.point(r) for r in randoms]
    value = call(*points)

    def part(call: Any) -> Random:
        tangent = p.library.derivative(call, points) if derivative else None
        return p.affine(call, *randoms, nonnegative=nonnegative, tangent=tangent)

    if isinstance(value, tuple | list):
        return [
            part(lambda *x, k=k: call(*x)[k]) if "float" in str(one.dtype) else Unknown(step.place)
            for k, one in enumerate(value)
        ]
    return part(call)


def _outside() -> int:
    """How far up the stack the caller of the package is."""
    for depth, frame in enumerate(reversed(traceback.extract_stack()), start=1):
        if "probest/moments" not in frame.filename.replace("\\", "/"):
            return depth - 1
    return 2
