"""What a trace says in several steps and has one rule: log Σ exp, softmax and log softmax as JAX writes them out.

Two things stand in the way. The largest entry is taken off first, behind ``stop_gradient``, so that exp cannot
overflow: whether the result depends on it is tried, and where it does not a constant takes its place. And the steps
that nothing needs any more are dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from probest.moments.steps import Name, Step, Trace, leaves, rebuilt

__all__ = ["simplified"]

Array = Any
_VIEWS = ("broadcast_in_dim", "reshape", "squeeze", "expand_dims")


def simplified(trace: Trace, example: Array) -> Trace:
    """The same function in fewer steps, of inputs near ``example``."""
    trace = _without_shifts(trace, example)
    made = {name: step for step in trace.steps for name in step.outputs}
    constants = trace.constants
    steps = [_softmax(step, made, constants) or _logsumexp(step, made) or step for step in trace.steps]
    return _needed(replace(trace, steps=steps))


def _without_shifts(trace: Trace, example: Array) -> Trace:
    places = [step.outputs[0] for step in trace.steps if step.op == "stop_gradient"]
    if not places:
        return trace
    plain, values = _evaluated(trace, example, {})
    constants = dict(trace.constants)
    for place in places:
        moved, _ = _evaluated(trace, example, {place: values[place] + 0.37})
        if _same(plain, moved):
            constants[place] = values[place]
    steps = [step for step in trace.steps if not (step.op == "stop_gradient" and step.outputs[0] in constants)]
    return replace(trace, constants=constants, steps=steps)


def _evaluated(trace: Trace, x: Array, instead: Mapping[Any, Array]) -> tuple[list[Any], dict[Any, Any]]:
    values = {**trace.constants, trace.input: x}

    def known(leaf: Any) -> Any:
        return values[leaf.id] if isinstance(leaf, Name) else leaf

    for step in trace.steps:
        found = step.call(*rebuilt(step.args, known))
        values.update(zip(step.outputs, found if step.parts else [found], strict=True))
        values.update({name: instead[name] for name in step.outputs if name in instead})
    return [known(leaf) for leaf in leaves(trace.result)], values


def _same(left: list[Any], right: list[Any]) -> bool:
    for a, b in zip(left, right, strict=True):
        a, b = np.asarray(a, float), np.asarray(b, float)
        if not np.allclose(a, b, rtol=1e-4, atol=1e-5 * (1 + np.abs(a[np.isfinite(a)]).max(initial=0))):
            return False
    return True


def _needed(trace: Trace) -> Trace:
    wanted = {leaf.id for leaf in leaves(trace.result) if isinstance(leaf, Name)}
    kept = []
    for step in reversed(trace.steps):
        if any(name in wanted for name in step.outputs):
            kept.append(step)
            wanted |= {leaf.id for leaf in leaves((step.args, step.params)) if isinstance(leaf, Name)}
    return replace(trace, steps=kept[::-1])


def _behind(value: Any, made: Mapping[Any, Step], ops: tuple[str, ...]) -> Step | None:
    """The step that made ``value``, looking through ``ops``."""
    while isinstance(value, Name) and value.id in made:
        step = made[value.id]
        if step.op not in ops:
            return step
        value = step.args[0]
    return None


def _sum_of_exp(value: Any, made: Mapping[Any, Step]) -> tuple[Any, Any, tuple[int, ...]] | None:
    """u, exp u and the axes, where ``value`` is Σ exp u in a shape of its own."""
    total = _behind(value, made, (*_VIEWS, "abs"))
    if total is None or total.op != "reduce_sum":
        return None
    (inner,) = total.args
    power = made.get(inner.id) if isinstance(inner, Name) else None
    if power is None or power.op != "exp":
        return None
    return power.args[0], inner, tuple(total.params["axes"])


def _softmax(step: Step, made: Mapping[Any, Step], constants: Mapping[Any, Any]) -> Step | None:
    if step.op not in ("div", "sub"):
        return None
    above, below = step.args
    if step.op == "sub":
        logarithm = _behind(below, made, _VIEWS)
        if logarithm is None or logarithm.op != "log":
            return None
        below = logarithm.args[0]
    found = _sum_of_exp(below, made)
    if found is None or above != (found[1] if step.op == "div" else found[0]) or len(found[2]) != 1:
        return None
    op = "probest_softmax" if step.op == "div" else "probest_log_softmax"
    return _replaced(step, op, _unshifted(found[0], found[2][0], made, constants), found[2])


def _unshifted(value: Any, axis: int, made: Mapping[Any, Step], constants: Mapping[Any, Any]) -> Any:
    """What a constant along ``axis`` was taken off, which softmax does not see."""
    step = made.get(value.id) if isinstance(value, Name) else None
    if step is None or step.op != "sub":
        return value
    shift = step.args[1]
    shift = constants.get(shift.id) if isinstance(shift, Name) else shift
    if shift is None or (np.ndim(shift) > axis and np.shape(shift)[axis] != 1):
        return value
    return step.args[0]


def _logsumexp(step: Step, made: Mapping[Any, Step]) -> Step | None:
    """log Σ exp u, where the sum is in the shape in which it was taken."""
    if step.op != "log":
        return None
    total = _behind(step.args[0], made, ("abs",))
    found = _sum_of_exp(step.args[0], made)
    if total is None or total.op != "reduce_sum" or found is None:
        return None
    return _replaced(step, "probest_logsumexp", found[0], found[2])


def _replaced(step: Step, op: str, value: Any, axes: tuple[int, ...]) -> Step:
    return replace(step, op=op, call=_CALLS[op](axes), args=(value,), params={"axes": axes})


def _library(x: Array) -> Any:
    return x.__array_namespace__()


def _logsumexp_of(x: Array, axes: tuple[int, ...], keepdims: bool = False) -> Array:
    xp = _library(x)
    largest = xp.max(x, axis=axes, keepdims=True)
    found = largest + xp.log(xp.sum(xp.exp(x - largest), axis=axes, keepdims=True))
    return found if keepdims else xp.squeeze(found, axis=axes)


_CALLS: dict[str, Callable[[tuple[int, ...]], Callable[..., Array]]] = {
    "probest_logsumexp": lambda axes: lambda x, **_: _logsumexp_of(x, axes),
    "probest_softmax": lambda axes: lambda x, **_: _library(x).exp(x - _logsumexp_of(x, axes, True)),
    "probest_log_softmax": lambda axes: lambda x, **_: x - _logsumexp_of(x, axes, True),
}
