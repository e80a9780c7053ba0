"""JAX functions as traces: the equations of a jaxpr, with nested calls inlined and loops of known length unrolled."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal

from probest.backends import special_jax, special_numpy
from probest.moments.patterns import simplified
from probest.moments.pointwise import Random, evaluate
from probest.moments.rules import Propagation
from probest.moments.steps import Name, Place, Rule, Step, Trace, linear

__all__ = ["RULES", "JaxLibrary", "rule_for", "steps_of", "trace"]

Array = Any


class JaxLibrary:
    """See :class:`~probest.moments.core.Library`.

    Without a gradient the rules compute in NumPy and only the user's operations are JAX: of the many small ones that
    the rules are made of, XLA would compile each anew for every shape.
    """

    def __init__(self, *, traced: bool) -> None:
        self.special = special_jax if traced else special_numpy
        self._traced = traced

    def value(self, x: Any) -> Any:
        return x if self._traced else jax.tree.map(_on_host, x)

    def result(self, x: Array) -> Array:
        return jnp.asarray(x)

    def batched(self, call: Callable[..., Array], which: Sequence[bool]) -> Callable[..., Array]:
        mapped = jax.vmap(call, in_axes=tuple(0 if batched else None for batched in which))
        if self._traced:
            return mapped

        def on_host(*args: Any) -> Any:
            rows = next(a.shape[0] for a, batched in zip(args, which, strict=True) if batched)
            filled = [_filled(a, _rounded(rows)) if batched else a for a, batched in zip(args, which, strict=True)]
            return np.asarray(mapped(*filled))[:rows]

        return on_host

    def derivative(self, call: Callable[..., Array], points: Sequence[Array]) -> Callable[..., Array]:
        found: Callable[..., Array] = jax.linearize(call, *points)[1]
        return found

    def transposed(self, act: Callable[..., Array], sizes: Sequence[int]) -> None:
        return None  # XLA would compile each for itself


def _rounded(rows: int) -> int:
    """Up to a size with three leading bits: XLA compiles anew for every one, and few are met this way."""
    step = 1 << max(rows.bit_length() - 3, 0)
    return -(-rows // step) * step


def _filled(x: Any, rows: int) -> Any:
    filling = np.zeros((rows - x.shape[0], *x.shape[1:]), x.dtype)
    return np.concatenate([x, filling]) if len(filling) else x


def _on_host(x: Any) -> Any:
    known = isinstance(x, jax.Array) and not jnp.issubdtype(x.dtype, jax.dtypes.extended)
    return np.asarray(x) if known else x


def library(trace: Trace, *inputs: Any) -> JaxLibrary:
    """The library in which a trace is read: in JAX where something is differentiated, else on the host."""
    values = [*inputs, *trace.constants.values()]
    return JaxLibrary(traced=any(isinstance(value, jax.core.Tracer) for value in values))


def trace(fn: Callable[[Array], Any], example: Array) -> Trace:
    """``fn`` as steps. What it closes over are constants of the trace, through which gradients pass."""
    found = steps_of(fn, example)
    return simplified(replace(found, input=found.input[0]), jax.lax.stop_gradient(example), _detached)


def steps_of(fn: Callable[..., Any], *examples: Array) -> Trace:
    """``fn`` of one or several arrays as steps, just as they are."""
    closed, shape = jax.make_jaxpr(fn, return_shape=True)(*examples)
    flat = _Flattening()
    inputs = [flat.new() for _ in closed.jaxpr.invars]
    outputs = flat.inline(closed.jaxpr, [flat.constant(c) for c in closed.consts], inputs)
    result: Any = outputs
    if jax.tree.leaves(shape) == [shape]:
        result = outputs[0]
    return Trace(tuple(name.id for name in inputs), flat.constants, flat.steps, result)


def _detached(value: Any) -> Any:
    return jax.lax.stop_gradient(value) if isinstance(value, jax.Array) else value


_TURNS = 10_000
"""The most turns of a loop that are unrolled."""


class _Flattening:
    """The equations of nested jaxprs in one list."""

    def __init__(self) -> None:
        self.constants: dict[int, Any] = {}
        self.steps: list[Step] = []
        self._numbers = itertools.count()
        self._around: list[Any] = []  # the equations whose calls are being inlined

    def new(self) -> Name:
        return Name(next(self._numbers))

    def constant(self, value: Any) -> Name:
        name = self.new()
        self.constants[name.id] = value
        return name

    def _constants(self, args: Sequence[Any]) -> list[Any] | None:
        """The values of the arguments, None where one of them depends on the input."""
        if any(isinstance(a, Name) and a.id not in self.constants for a in args):
            return None
        return [self.constants[a.id] if isinstance(a, Name) else a for a in args]

    def inline(self, jaxpr: Any, consts: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
        """Adds the steps of a jaxpr; returns its outputs, as names or constants."""
        env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, inputs, strict=True))

        def known(atom: Any) -> Any:
            return atom.val if isinstance(atom, Literal) else env[atom]

        for equation in jaxpr.eqns:
            arguments = [known(atom) for atom in equation.invars]
            env.update(zip(equation.outvars, self._equation(equation, arguments), strict=True))
        return [known(atom) for atom in jaxpr.outvars]

    def _equation(self, equation: Any, args: Sequence[Any]) -> Sequence[Any]:
        name, params = equation.primitive.name, equation.params
        for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
            if key in params and name not in ("scan", "while", "cond", "pallas_call"):
                inner = params[key]
                closed = isinstance(inner, ClosedJaxpr)
                consts = [self.constant(c) for c in inner.consts] if closed else []
                self._around.append(equation)
                found = self.inline(inner.jaxpr if closed else inner, consts, args)
                self._around.pop()
                return found
        if name == "scan":
            return self._scan(equation, params, args)
        if name == "while":
            return self._while(equation, params, args)
        which = self._constants(args[:1]) if name == "cond" else None
        if which is not None:
            branch = params["branches"][int(which[0])]
            return self.inline(branch.jaxpr, [self.constant(c) for c in branch.consts], args[1:])
        return self._step(equation, name, args)

    def _step(self, equation: Any, name: str, args: Sequence[Any]) -> list[Name]:
        """One step; done at once where all it needs are constants."""
        primitive = equation.primitive
        bind = primitive.get_bind_params(equation.params)
        subfuns, bind = bind if isinstance(bind, tuple) else ((), bind)  # a tuple before jax 0.10
        outputs = [self.new() for _ in equation.outvars]

        def call(*values: Any, **_: Any) -> Any:
            return primitive.bind(*subfuns, *values, **bind)

        constants = self._constants(args)
        if constants is not None:
            found = call(*constants)
            return [self.constant(value) for value in (found if primitive.multiple_results else [found])]
        names = tuple(output.id for output in outputs)
        self.steps.append(
            Step(
                name,
                call,
                tuple(args),
                _Params(equation.params),
                names,
                primitive.multiple_results,
                _place(equation, *self._around[::-1]),
            )
        )
        return outputs

    def _scan(self, equation: Any, params: Any, args: Sequence[Any]) -> list[Any]:
        """Turn after turn, the slices and the stacking as steps of their own."""
        inner, length = params["jaxpr"], params["length"]
        fixed, carried = params["num_consts"], params["num_carry"]
        consts, carry, over = list(args[:fixed]), list(args[fixed : fixed + carried]), args[fixed + carried :]
        collected: list[list[Any]] = []
        order = range(length - 1, -1, -1) if params["reverse"] else range(length)
        place = _place(equation, *self._around[::-1])
        for turn in order:
            sliced = [self._call("probest_take", lambda x, i=turn: x[i], (x,), place) for x in over]
            inside = [self.constant(c) for c in inner.consts]
            found = self.inline(inner.jaxpr, inside, [*consts, *carry, *sliced])
            carry = found[:carried]
            collected.append(found[carried:])
        if params["reverse"]:
            collected.reverse()
        stacked: list[Any] = [
            self._call("probest_stack", lambda *x: jnp.stack(x), tuple(column), place)
            for column in zip(*collected, strict=True)
        ]
        if not length:
            shapes = [variable.aval for variable in equation.outvars[carried:]]
            stacked = [jnp.zeros(aval.shape, aval.dtype) for aval in shapes]
        return [*carry, *stacked]

    def _while(self, equation: Any, params: Any, args: Sequence[Any]) -> Sequence[Any]:
        """Turn after turn, as long as the condition follows from constants alone."""
        test, body = params["cond_jaxpr"], params["body_jaxpr"]
        first, second = params["cond_nconsts"], params["body_nconsts"]
        of_test, of_body, carry = args[:first], args[first : first + second], list(args[first + second :])
        for _ in range(_TURNS):
            inside = [self.constant(c) for c in test.consts]
            goes_on = self._constants(self.inline(test.jaxpr, inside, [*of_test, *carry]))
            if goes_on is None:
                break
            if not bool(goes_on[0]):
                return carry
            inside = [self.constant(c) for c in body.consts]
            carry = self.inline(body.jaxpr, inside, [*of_body, *carry])
        return self._step(equation, "while", args)

    def _call(self, op: str, call: Callable[..., Any], args: tuple[Any, ...], place: Place) -> Name:
        output = self.new()
        self.steps.append(Step(op, lambda *values, **_: call(*values), args, _Params({}), (output.id,), False, place))
        return output


class _Params(dict[str, Any]):
    """Parameters of an equation: static, so that nothing in them is looked for."""


def _place(*equations: Any) -> Place:
    """The user's line: of the first equation that has one."""
    from jax._src import source_info_util

    def look() -> str:
        for equation in equations:
            frame = source_info_util.user_frame(equation.source_info.traceback)
            if frame is not None and "/probest/moments/" not in frame.file_name:
                return f"{frame.file_name}:{frame.start_line}"
        return ""

    return Place(look)


RULES: dict[str, Rule] = {}
"""By the name of the primitive."""


def rule_for(step: Step) -> Rule | None:
    """The rule of a step, if there is one."""
    return RULES.get(step.op)


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, rule))
        return rule

    return register


@_rule(
    "reduce_sum", "transpose", "slice", "concatenate", "rev", "broadcast_in_dim", "cumsum", "gather", "dynamic_slice",
    "probest_take", "probest_stack", "split", "reduce_window_sum", "expand_dims", "stack", "unstack", "tile",
)  # fmt: skip
def _monotone_linear(p: Propagation, step: Step, *args: Any, **params: Any) -> Any:
    randoms = [a for a in args if isinstance(a, Random)]
    if step.op in ("gather", "dynamic_slice") and any(isinstance(a, Random) for a in args[1:]):
        return NotImplemented
    constants = [a for a in args if not isinstance(a, Random) and jnp.issubdtype(jnp.result_type(a), jnp.floating)]
    if step.op == "broadcast_in_dim" and int(np.prod(params["shape"])) == int(np.prod(randoms[0].shape)):
        return _same_entries(p, step, *args, **params)
    nonnegative = all(r.expression.nonnegative for r in randoms) and not constants
    return linear(p, step, args, {}, nonnegative=nonnegative)


@_rule("pad", "scatter", "scatter_add", "scatter-add", "dynamic_update_slice")
def _linear(p: Propagation, step: Step, *args: Any, **params: Any) -> Any:
    if step.op == "dynamic_update_slice" and any(isinstance(a, Random) for a in args[2:]):
        return NotImplemented
    return linear(p, step, args, {})


@_rule(
    "reshape",
    "squeeze",
    "convert_element_type",
    "copy",
    "stop_gradient",
    "reduce_precision",
    "copy_p",
    "optimization_barrier",
)
def _same_entries(p: Propagation, step: Step, value: Any, *args: Any, **params: Any) -> Any:
    if step.op == "convert_element_type":
        if not jnp.issubdtype(params["new_dtype"], jnp.floating):
            return NotImplemented
        source = value.expression.source.mean
        if evaluate(value.expression, p.s.stop_gradient(source)[None]).dtype != bool:
            return value
        return p.indicator(value)
    shape = tuple(params.get("new_sizes", params.get("shape", value.shape)))
    if step.op == "squeeze":
        shape = tuple(n for i, n in enumerate(value.shape) if i not in params["dimensions"])
    return p.reshaped(value, shape)


@_rule("dot_general")
def _dot_general(p: Propagation, step: Step, a: Any, b: Any, **params: Any) -> Any:
    if not (isinstance(a, Random) and isinstance(b, Random)):
        return linear(p, step, (a, b), {})
    (contract_a, contract_b), (batch_a, batch_b) = params["dimension_numbers"]

    def arranged(x: Random, batch: Any, contract: Any, last: bool) -> tuple[Random, list[int]]:
        free = [i for i in range(len(x.shape)) if i not in batch and i not in contract]
        order = [*batch, *contract, *free] if last else [*batch, *free, *contract]
        size = [int(np.prod([x.shape[i] for i in axes])) for axes in (batch, contract, free)]
        shape = (size[0], size[1], size[2]) if last else (size[0], size[2], size[1])
        return p.affine(lambda v: v.transpose(order).reshape(shape), x), [x.shape[i] for i in free]

    left, rows = arranged(a, batch_a, contract_a, False)
    right, columns = arranged(b, batch_b, contract_b, True)
    shape = tuple([a.shape[i] for i in batch_a] + rows + columns)
    return p.reshaped(p.matmul(left, right), shape)


@_rule("conv_general_dilated")
def _convolution(p: Propagation, step: Step, x: Any, weight: Any, **params: Any) -> Any:
    if isinstance(x, Random) and isinstance(weight, Random):
        return NotImplemented
    return linear(p, step, (x, weight), {})


# Entry by entry

_BENDS = {"abs": (0.0,), "sign": (0.0,)}
_NONNEGATIVE = {"abs", "logistic", "erfc", "cosh", "exp2"}


@_rule(
    "abs", "sign", "tanh", "logistic", "sin", "cos", "tan", "erf", "erfc", "erf_inv", "log1p", "expm1", "asin", "acos",
    "atan", "sinh", "cosh", "asinh", "acosh", "atanh", "exp2", "cbrt", "is_finite", "lgamma", "digamma",
    "xor", "atan2", "bessel_i0e", "bessel_i1e",
)  # fmt: skip
def _pointwise(p: Propagation, step: Step, *args: Any, **params: Any) -> Any:
    if not p.shared(*args):
        return NotImplemented
    bends = [(args[0], value) for value in _BENDS.get(step.op, ())]
    return p.elementwise(step.call, *args, bends=bends, nonnegative=step.op in _NONNEGATIVE)


@_rule("add", "add_any")
def _add(p: Propagation, step: Step, a: Any, b: Any, **params: Any) -> Any:
    return p.add(a, b)


@_rule("sub")
def _sub(p: Propagation, step: Step, a: Any, b: Any, **params: Any) -> Any:
    return p.subtract(a, b)


@_rule("neg")
def _neg(p: Propagation, step: Step, a: Any, **params: Any) -> Any:
    return p.elementwise(lambda x: -x, a, native=False, affine=True)


@_rule("mul")
def _mul(p: Propagation, step: Step, a: Any, b: Any, **params: Any) -> Any:
    if isinstance(a, Random) and isinstance(b, Random):
        return p.multiply(a, b)
    known, constant = (a, b) if isinstance(a, Random) else (b, a)
    return p.scaled(known, lambda x: x * constant, constant)


@_rule("div")
def _div(p: Propagation, step: Step, a: Any, b: Any, **params: Any) -> Any:
    return p.divide(a, b)


@_rule("max")
def _maximum(p: Propagation, step: Step, a: Any, b: Any, **params: Any) -> Any:
    other = b if isinstance(a, Random) else a
    if not isinstance(other, Random) and bool(np.all(np.isneginf(np.asarray(jax.lax.stop_gradient(other))))):
        return a if isinstance(a, Random) else b
    return p.maximum(a, b)


@_rule("min")
def _minimum(p: Propagation, step: Step, a: Any, b: Any, **params: Any) -> Any:
    return p.maximum(a, b, sign=-1.0)


@_rule("clamp")
def _clamp(p: Propagation, step: Step, low: Any, x: Any, high: Any, **params: Any) -> Any:
    if not p.shared(low, x, high):
        return NotImplemented
    return p.elementwise(step.call, low, x, high, bends=[(x, low), (x, high)])


@_rule("select_n")
def _select(p: Propagation, step: Step, which: Any, *cases: Any, **params: Any) -> Any:
    if len(cases) != 2:
        return NotImplemented
    if not isinstance(which, Random) and np.asarray(which).dtype != bool:
        which = which != 0
    return p.select(which, cases[1], cases[0])


@_rule("exp")
def _exp(p: Propagation, step: Step, a: Any, **params: Any) -> Any:
    return p.exp(a)


@_rule("log")
def _log(p: Propagation, step: Step, a: Any, **params: Any) -> Any:
    return p.log(a)


@_rule("sqrt", "rsqrt", "square", "integer_pow")
def _power(p: Propagation, step: Step, a: Any, **params: Any) -> Any:
    power = params["y"] if step.op == "integer_pow" else {"sqrt": 0.5, "rsqrt": -0.5, "square": 2.0}[step.op]
    return p.power(a, power, step.call)


@_rule("pow")
def _pow(p: Propagation, step: Step, a: Any, b: Any, **params: Any) -> Any:
    if not isinstance(b, Random):
        powers = np.unique(np.asarray(jax.lax.stop_gradient(b)))
        if isinstance(a, Random) and len(powers) == 1:
            return p.power(a, float(powers[0]), lambda x: step.call(x, b))
        return p.elementwise(step.call, a, b) if p.shared(a, b) else NotImplemented
    return p.exp(p.multiply(b, p.log(a) if isinstance(a, Random) else p.xp.log(a)))


@_rule("and", "or", "xor")
def _logical(p: Propagation, step: Step, a: Any, b: Any, **params: Any) -> Any:
    if p.shared(a, b) and p.are_truths(a, b):
        return _pointwise(p, step, a, b)
    return {"and": p.both, "or": p.either, "xor": p.exclusive}[step.op](a, b)


@_rule("not")
def _not(p: Propagation, step: Step, a: Any, **params: Any) -> Any:
    return _pointwise(p, step, a) if p.are_truths(a) else p.inverse(a)


@_rule("reduce_and", "reduce_or")
def _any(p: Propagation, step: Step, a: Any, **params: Any) -> Any:
    return (p.some if step.op == "reduce_or" else p.every)(a, params["axes"], False)


@_rule("gt", "ge", "lt", "le", "eq", "ne")
def _compare(p: Propagation, step: Step, a: Any, b: Any, **params: Any) -> Any:
    if not p.shared(a, b):
        a = p.subtract(a, b)
        b = jnp.zeros(a.shape, a.expression.source.mean.dtype)
    return p.elementwise(step.call, a, b, bends=[(a, b)])


# Along axes


@_rule("probest_softmax")
def _softmax(p: Propagation, step: Step, a: Any, **params: Any) -> Any:
    return p.softmax(a, params["axes"][0])


@_rule("probest_log_softmax")
def _log_softmax(p: Propagation, step: Step, a: Any, **params: Any) -> Any:
    return p.softmax(a, params["axes"][0], log=True)


@_rule("probest_normalise")
def _normalise(p: Propagation, step: Step, a: Any, times: Any, guess: Any) -> Any:
    return p.multiply(p.normalise(a, guess.axes, guess.eps, centre=guess.centre), guess.factor * times)


@_rule("probest_logsumexp")
def _logsumexp(p: Propagation, step: Step, a: Any, **params: Any) -> Any:
    return p.logsumexp(a, params["axes"], False)


@_rule("logaddexp")
def _logaddexp(p: Propagation, step: Step, a: Any, b: Any, **params: Any) -> Any:
    return p.logaddexp(a, b)


@_rule("reduce_window_max", "reduce_window_min")
def _window(p: Propagation, step: Step, x: Any, **params: Any) -> Any:
    sign = 1.0 if step.op.endswith("max") else -1.0
    if any(d != 1 for d in params["base_dilation"]):
        return NotImplemented
    sides = params["padding"]
    if any(any(side) for side in sides):
        return NotImplemented
    sizes, strides, dilation = params["window_dimensions"], params["window_strides"], params["window_dilation"]
    return p.pooled(x, sizes, strides, dilation, sign)


@_rule("reduce_max", "reduce_min")
def _max(p: Propagation, step: Step, a: Any, **params: Any) -> Any:
    return p.max(a, params["axes"], False, 1.0 if step.op == "reduce_max" else -1.0)
