"""What a trace says in several steps and has one rule: log Σ exp, softmax and its logarithm as JAX writes them out, and
layer and RMS normalisation in any form.

Normalisation is written in many ways; so a product with a reciprocal root is taken for one where it is one by the
numbers, on random inputs. To softmax two things stand in the way. The largest entry is taken off first, behind
``stop_gradient``, so that exp cannot overflow: whether the result depends on it is tried, and where it does not a
constant takes its place. And the steps that nothing needs any more are dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace

from probest.moments.steps import Name, Step, Trace, leaves, rebuilt

__all__ = ["simplified", "with_normalisation"]

Array = Any
_VIEWS = ("broadcast_in_dim", "reshape", "squeeze", "expand_dims", "expand", "view", "unsqueeze", "expand_as")
_ON_THE_WAY = {
    *_VIEWS,
    "mul",
    "div",
    "max",
    "sub",
    "clamp_min",
    "square",
    "pow",
    "integer_pow",
    "add",
    "clip",
    "select_n",
    "where",
}


def simplified(trace: Trace, example: Array, detached: Callable[[Any], Any]) -> Trace:
    """The same function in fewer steps, of inputs near ``example``; ``detached`` takes gradients off a constant."""
    trace = _without_shifts(trace, example, detached)
    made = {name: step for step in trace.steps for name in step.outputs}
    constants = trace.constants
    steps = [_softmax(step, made, constants) or _logsumexp(step, made) or step for step in trace.steps]
    return _needed(with_normalisation(replace(trace, steps=steps), example, detached))


def with_normalisation(trace: Trace, example: Array, detached: Callable[[Any], Any]) -> Trace:
    """x ↦ factor · (x − mean) / √(variance + eps), or without the mean, as one step ``probest_normalise``."""
    made = {name: step for step in trace.steps for name in step.outputs}
    plain = _plain(trace, detached)
    example = _moved(example, 1.0, np.random.default_rng(0))  # at the mean itself, too much may be 0
    steps: list[Step] = []
    for step in trace.steps:
        guesses = [g for g in _guesses(step, made) if isinstance(g.x, Name) and g.x.id not in trace.constants]
        found = next((c for g in guesses if (c := _confirmed(plain, example, step, g)) is not None), None)
        steps.append(step if found is None else _normalising(step, found))
    return replace(trace, steps=steps)


class Guess(NamedTuple):
    """What a step may be: factor · times · normalise(x) along ``axes``; ``times`` is a value of the trace."""

    x: Any
    axes: tuple[int, ...]
    eps: float
    centre: bool
    times: Any = 1.0
    factor: float = 1.0


def _guesses(step: Step, made: Mapping[Any, Step]) -> list[Guess]:
    if step.kind not in ("mul", "div") or len(step.args) != 2:
        return []
    found = []
    for value, by in (step.args, step.args[::-1]) if step.kind == "mul" else (step.args,):
        root, times = _behind(by, made, _VIEWS), 1.0
        if root is not None and root.kind == "mul":
            for inner, other in (root.args, root.args[::-1]):
                behind = _behind(inner, made, _VIEWS)
                if behind is not None and _is_root(behind):
                    root, times = behind, other
                    break
        inverse = root is not None and root.kind == "div" and not isinstance(root.args[0], Name)
        if root is not None and (inverse or root.kind == "reciprocal"):
            root = _behind(root.args[-1], made, _VIEWS)
        if root is None or not (_is_root(root) or root.kind in ("linalg_vector_norm", "clamp_min", "max")):
            continue
        if root.kind in ("clamp_min", "max"):
            root = next((r for a in root.args if (r := _behind(a, made, _VIEWS)) is not None), root)
        inside = made.get(root.args[0].id) if isinstance(root.args[0], Name) else None
        eps = 0.0
        if inside is not None and inside.kind == "add" and root.kind != "linalg_vector_norm":
            numbers = [a for a in inside.args if np.ndim(a) == 0 and not isinstance(a, Name)]
            eps = float(numbers[0]) if numbers else 0.0
        axes = _axes_of_mean(root, made)
        above = made.get(value.id) if isinstance(value, Name) else None
        if axes is None:
            continue
        found.append(Guess(value, axes, eps, False, times))
        if above is not None and above.kind == "sub":
            found.insert(0, Guess(above.args[0], axes, eps, True, times))
    return found


def _is_root(step: Step) -> bool:
    """A square root or its reciprocal."""
    power = step.args[1] if step.kind == "pow" and len(step.args) > 1 else step.params.get("y", 0)
    power = None if isinstance(power, Name) or np.ndim(power) else abs(float(power))
    return step.kind in ("rsqrt", "sqrt") or (step.kind == "pow" and power == 0.5)


def _axes_of_mean(root: Step, made: Mapping[Any, Step]) -> tuple[int, ...] | None:
    """Over which axes the squares below a root are summed; () for all."""
    waiting = [root]
    while waiting:
        step = waiting.pop(0)
        kind = step.kind
        if kind == "reduce_sum":
            return tuple(step.params["axes"])
        if kind in ("mean", "sum"):
            return tuple(step.args[1]) if len(step.args) > 1 else ()
        if kind == "linalg_vector_norm" and len(step.args) > 2:
            return tuple(step.args[2])
        if step is root or kind in _ON_THE_WAY:
            waiting += [made[a.id] for a in step.args if isinstance(a, Name) and a.id in made]
    return None


def _confirmed(trace: Trace, example: Array, step: Step, guess: Guess) -> Guess | None:
    """The guess with its factor, where it gives the step's values for three random x; else None."""
    _, values = _evaluated(trace, example, {})
    x, out = values[guess.x.id], values[step.outputs[0]]
    if not hasattr(x, "shape") or tuple(x.shape) != tuple(out.shape) or math.prod(x.shape) < 2:
        return None
    guess = guess if guess.axes else guess._replace(axes=tuple(range(x.ndim)))
    rng = np.random.default_rng(1)
    factor: float | None = None
    for scale in (1.0, 1.0, 3.0):
        instead = _moved(0.0 * x + 0.5, scale, rng)
        _, values = _evaluated(trace, example, {guess.x.id: instead})
        times = values[guess.times.id] if isinstance(guess.times, Name) else guess.times
        expected = np.asarray(normalised(instead, times, guess), float)
        found = np.asarray(values[step.outputs[0]], float)
        if factor is None:
            factor = float((found * expected).sum() / (expected**2).sum())
        if factor == 0.0 or not _same([factor * expected], [found]):
            return None
    assert factor is not None
    return guess._replace(factor=1.0 if abs(factor - 1.0) < 1e-6 else factor)


def _moved(x: Array, scale: float, rng: np.random.Generator) -> Array:
    return x + array_namespace(x).asarray(scale * rng.normal(size=tuple(x.shape)), dtype=x.dtype)


def normalised(x: Array, times: Any, guess: Guess) -> Array:
    """What the guess stands for."""
    xp = array_namespace(x)
    if guess.centre:
        x = x - xp.mean(x, axis=guess.axes, keepdims=True)
    return guess.factor * x / xp.sqrt(xp.mean(x * x, axis=guess.axes, keepdims=True) + guess.eps) * times


def _normalising(step: Step, guess: Guess) -> Step:
    def call(x: Array, times: Any, **_: Any) -> Array:
        return normalised(x, times, guess)

    args = (guess.x, guess.times)
    return replace(step, op="probest_normalise", call=call, args=args, params={"guess": guess})


def _plain(trace: Trace, detached: Callable[[Any], Any]) -> Trace:
    return replace(trace, constants={name: detached(value) for name, value in trace.constants.items()})


def _without_shifts(trace: Trace, example: Array, detached: Callable[[Any], Any]) -> Trace:
    places = [step.outputs[0] for step in trace.steps if step.op == "stop_gradient"]
    if not places:
        return trace
    tried = _plain(trace, detached)
    elsewhere = _moved(example, 1.0, np.random.default_rng(0))
    plain, values = _evaluated(tried, elsewhere, {})
    _, here = _evaluated(tried, example, {})
    constants = dict(trace.constants)
    for place in places:
        moved, _ = _evaluated(tried, elsewhere, {place: values[place] + 0.37})
        if _same(plain, moved):
            constants[place] = here[place]
    steps = [step for step in trace.steps if not (step.op == "stop_gradient" and step.outputs[0] in constants)]
    return replace(trace, constants=constants, steps=steps)


def _evaluated(trace: Trace, x: Array, instead: Mapping[Any, Array]) -> tuple[list[Any], dict[Any, Any]]:
    values = {**trace.constants, trace.input: instead.get(trace.input, x)}

    def known(leaf: Any) -> Any:
        return values[leaf.id] if isinstance(leaf, Name) else leaf

    for step in trace.steps:
        if step.outputs[0] in instead:
            values[step.outputs[0]] = instead[step.outputs[0]]
            continue
        found = step.call(*rebuilt(step.args, known), **rebuilt(step.params, known))
        values.update(zip(step.outputs, found if step.parts else [found], strict=True))
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
        if step.kind not in ops:
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


def _logsumexp_of(x: Array, axes: tuple[int, ...], keepdims: bool = False) -> Array:
    xp = array_namespace(x)
    largest = xp.max(x, axis=axes, keepdims=True)
    found = largest + xp.log(xp.sum(xp.exp(x - largest), axis=axes, keepdims=True))
    return found if keepdims else xp.squeeze(found, axis=axes)


_CALLS: dict[str, Callable[[tuple[int, ...]], Callable[..., Array]]] = {
    "probest_logsumexp": lambda axes: lambda x, **_: _logsumexp_of(x, axes),
    "probest_softmax": lambda axes: lambda x, **_: array_namespace(x).exp(x - _logsumexp_of(x, axes, True)),
    "probest_log_softmax": lambda axes: lambda x, **_: x - _logsumexp_of(x, axes, True),
}
