"""torch functions and modules as traces: graphs of aten operations, by ``make_fx`` after functionalisation."""

from __future__ import annotations

import contextlib
import functools
import math
import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from probest.backends import special_torch
from probest.moments.patterns import with_normalisation
from probest.moments.pointwise import Random
from probest.moments.rules import Propagation
from probest.moments.steps import MomentError, Name, Place, Rule, Step, Trace, Unknown, leaves, linear

__all__ = ["RULES", "TorchLibrary", "rule_for", "steps_of", "trace"]

Array = Any


class TorchLibrary:
    """See :class:`~probest.moments.core.Library`."""

    special = special_torch

    def value(self, x: Any) -> Any:
        return x

    def result(self, x: Array) -> Array:
        return x

    def batched(self, call: Callable[..., Array], which: Sequence[bool]) -> Callable[..., Array]:
        mapped = torch.func.vmap(call, in_dims=tuple(0 if batched else None for batched in which))
        # a transposed argument would make of one matrix product as many as there are rows
        return lambda *args: mapped(*(a.contiguous() if batched else a for a, batched in zip(args, which, strict=True)))

    def derivative(self, fn: Callable[..., Array], points: Sequence[Array]) -> Callable[..., Array]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`torch.jit.script", DeprecationWarning)
            torch.func.jvp(torch.sin, (points[0],), (points[0],))  # loads what warns
        at = tuple(points)
        return lambda *tangents: torch.func.jvp(fn, at, tangents)[1]

    def transposed(self, act: Callable[..., Array], sizes: Sequence[int]) -> Callable[[Array], Sequence[Array]]:
        def back(rows: Array) -> Sequence[Array]:
            zeros = [rows.new_zeros((rows.shape[0], size)) for size in sizes]
            pulled: Sequence[Array] = torch.func.vjp(lambda *x: act(x), *zeros)[1](rows)
            return pulled

        return back


def library(trace: Trace, *inputs: Any) -> TorchLibrary:
    """The library in which a trace is read."""
    return TorchLibrary()


@contextlib.contextmanager
def _plain() -> Iterator[None]:
    """Attention and encoder layers in the operations they are made of, not in fused ones."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def trace(fn: Callable[[Array], Any], example: Array) -> Trace:
    """``fn`` as steps. Its parameters are constants of the trace, through which gradients pass."""
    found = steps_of(fn, example)
    with torch.no_grad():
        return with_normalisation(replace(found, input=found.input[0]), example.detach(), _detached)


def steps_of(fn: Callable[..., Any], *examples: Array) -> Trace:
    """``fn`` of one or several arrays as steps, just as they are."""
    given = [example.detach() for example in examples]

    def forward(*x: Array) -> Any:
        return fn(*x)

    def graph(**options: Any) -> Any:
        with _plain(), torch.random.fork_rng(devices=[]):
            try:
                return make_fx(torch.func.functionalize(forward), _decompositions(), **options)(*given)
            except RuntimeError as error:
                if "custom_function_call" not in str(error):
                    raise
                # An autograd.Function cannot be functionalised; a function that has one may not write in place.
                return make_fx(forward, _decompositions(), **options)(*given)

    @functools.cache
    def places() -> dict[str, str]:
        with _whole_stacks():
            return {node.name: _place(node) for node in graph(record_stack_traces=True).graph.nodes}

    module = graph()
    constants: dict[Any, Any] = {}
    steps: list[Step] = []
    sources: list[Any] = []
    result = None
    for node in module.graph.nodes:
        if node.op == "placeholder":
            sources.append(node.name)
        elif node.op == "get_attr":
            constants[node.name] = _attribute(module, node.target)
        elif node.op == "output":
            result = _named(node.args[0])
        else:
            target = node.target
            op = getattr(target, "__name__", str(target)) if target is operator.getitem else str(target)
            if torch.Tag.nondeterministic_seeded in getattr(target, "tags", ()):
                raise MomentError(
                    f"moments: the function draws random numbers ({op}): put its modules in evaluation mode, or make "
                    "what is random a part of the input"
                )
            place = Place(lambda name=node.name: places().get(name, ""))  # type: ignore[misc]
            args, params = _named(tuple(node.args)), _named(dict(node.kwargs))
            steps.append(Step(op, target, args, params, (node.name,), False, place))
    return Trace(tuple(sources), constants, steps, result)


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else value


@functools.cache
def _decompositions() -> dict[Any, Any]:
    """Operations that torch itself can write in those that have rules."""
    aten = torch.ops.aten
    return dict(torch._decomp.get_decompositions([getattr(aten, name) for name in _DECOMPOSED if hasattr(aten, name)]))


_DECOMPOSED = (
    "glu", "mse_loss", "huber_loss", "smooth_l1_loss", "soft_margin_loss", "nll_loss_forward", "nll_loss2d_forward",
    "binary_cross_entropy", "addcmul", "addcdiv", "lerp", "log_sigmoid_forward", "std_mean", "var_mean", "unsafe_split",
    "unsafe_chunk", "margin_ranking_loss", "multi_margin_loss", "norm",
)  # fmt: skip


def _attribute(module: Any, target: str) -> Any:
    for part in target.split("."):
        module = getattr(module, part)
    return module


def _named(tree: Any) -> Any:
    if isinstance(tree, torch.fx.Node):
        return Name(tree.name)
    if isinstance(tree, tuple | list):
        return type(tree)(map(_named, tree)) if type(tree) in (tuple, list) else list(map(_named, tree))
    if isinstance(tree, dict):
        return {key: _named(value) for key, value in tree.items()}
    return tree


@contextlib.contextmanager
def _whole_stacks() -> Iterator[None]:
    """Nodes remember every frame of the stack, where torch would keep those of modules alone."""
    tracer: Any = torch.fx.proxy.TracerBase
    kept = tracer._filter_traceback_frames
    tracer._filter_traceback_frames = lambda self, frames: frames
    try:
        yield
    finally:
        tracer._filter_traceback_frames = kept


def _place(node: Any) -> str:
    """The user's line: the innermost one outside torch."""
    lines = (node.meta.get("stack_trace") or "").splitlines()
    places = [line.strip() for line in lines if line.strip().startswith("File ")]
    inside = [k for k, place in enumerate(places) if place.endswith("in forward") and "moments/fx.py" in place]
    own = [place for place in places[inside[-1] + 1 :] if "/torch/" not in place] if inside else []
    if not own:
        return ""
    return own[-1].replace("File ", "", 1).replace('"', "").split(", in ")[0].replace(", line ", ":")


RULES: dict[str, Rule] = {}
"""By operation: ``aten.name.overload`` first, then ``aten.name``."""


def rule_for(step: Step) -> Rule | None:
    """The rule of a step, if there is one."""
    packet = step.op.rsplit(".", 1)[0] if step.op.count(".") == 2 else step.op
    found = RULES.get(step.op) or RULES.get(packet) or RULES.get(packet.removesuffix("_"))
    pointwise = torch.Tag.pointwise in getattr(step.call, "tags", ())
    if found is None and (pointwise or (step.op.startswith("aten.") and step.kind in _BENDS)):
        return _pointwise
    return found


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        RULES.update({name if name == "getitem" or "probest" in name else f"aten.{name}": rule for name in names})
        return rule

    return register


# Linear operations. Those of the first list keep what is ≥ 0 so.


@_rule(
    "sum", "mean", "select", "slice", "index", "gather", "index_select", "cat", "stack", "split", "split_with_sizes",
    "unbind", "diagonal", "flip", "roll", "expand", "permute", "transpose", "t", "avg_pool1d", "avg_pool2d",
    "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "upsample_nearest1d", "upsample_nearest2d",
    "cumsum", "repeat", "pixel_shuffle", "pixel_unshuffle", "unfold", "im2col", "col2im", "tril", "triu", "diag_embed",
    "trace", "chunk", "as_strided", "channel_shuffle", "movedim", "reflection_pad1d", "reflection_pad2d",
    "replication_pad1d", "replication_pad2d", "upsample_bilinear2d",
)  # fmt: skip
def _monotone_linear(p: Propagation, step: Step, *args: Any, **params: Any) -> Any:
    randoms = [r for r in leaves((args, params)) if isinstance(r, Random)]
    nonnegative = all(r.expression.nonnegative for r in randoms)
    constants = [a for a in leaves((args, params)) if isinstance(a, torch.Tensor) and a.is_floating_point()]
    return linear(p, step, args, params, nonnegative=nonnegative and not constants)


@_rule("constant_pad_nd", "select_scatter", "index_put", "scatter", "scatter_add", "diff")
def _linear(p: Propagation, step: Step, *args: Any, **params: Any) -> Any:
    return linear(p, step, args, params)


@_rule(
    "view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "clone", "detach", "contiguous", "_to_copy", "alias",
    "lift_fresh_copy", "flatten", "_reshape_alias", "copy", "to", "dropout", "unsqueeze_copy", "view_copy", "positive",
)  # fmt: skip
def _same_entries(p: Propagation, step: Step, value: Any, *args: Any, **params: Any) -> Any:
    if step.op.startswith("aten.copy"):
        return args[0]
    if params.get("dtype") is not None and not params["dtype"].is_floating_point:
        return NotImplemented
    return p.reshaped(value, tuple(step.call(_like(p, value), *args, **params).shape))


def _like(p: Propagation, value: Random) -> Array:
    return value.expression.source.mean.detach().new_zeros(()).expand(value.shape)


@_rule("mm", "bmm", "mv", "dot", "matmul", "linear")
def _matmul(p: Propagation, step: Step, a: Any, b: Any, *rest: Any) -> Any:
    if not (isinstance(a, Random) and isinstance(b, Random)):
        found = None if rest else _by_constant(p, step.kind, a, b)
        return linear(p, step, (a, b, *rest), {}) if found is None else found
    if rest or step.op.startswith(("aten.matmul", "aten.linear")):
        return NotImplemented
    name = step.kind
    if name == "bmm":
        return p.matmul(a, b)
    shapes = {"mm": (a.shape, b.shape), "mv": (a.shape, (*b.shape, 1)), "dot": ((1, *a.shape), (*b.shape, 1))}[name]
    wide = [p.reshaped(v, (1, *s)) for v, s in zip((a, b), shapes, strict=True)]
    out = {"mm": (a.shape[0], b.shape[-1]), "mv": (a.shape[0],), "dot": ()}[name]
    return p.reshaped(p.matmul(*wide), out)


def _by_constant(p: Propagation, kind: str, a: Any, b: Any, bias: Any = 0.0) -> Random | None:
    """A matrix product of which one side is constant, many at once without `vmap`, plus a constant; None for others."""
    if kind in ("mm", "bmm", "mv") and isinstance(a, Random):
        x = a

        def product(v: Array) -> Array:
            return v.contiguous() @ b

        def adjoint(v: Array) -> Array:
            return v[..., None] * b if kind == "mv" else v @ b.mT

    elif kind == "mv":
        x = b

        def product(v: Array) -> Array:
            return v.contiguous() @ a.mT

        def adjoint(v: Array) -> Array:
            return v @ a

    else:
        return None
    return p.affine(lambda v: product(v) + bias, x, native=False, tangent=product, adjoint=adjoint)


@_rule("addmm", "baddbmm", "addmv")
def _add_matmul(p: Propagation, step: Step, bias: Any, a: Any, b: Any, **params: Any) -> Any:
    if not (isinstance(a, Random) and isinstance(b, Random)):
        kind = step.kind.replace("add", "")
        found = None if params or isinstance(bias, Random) else _by_constant(p, kind, a, b, bias)
        return linear(p, step, (bias, a, b), params) if found is None else found
    if params:
        return NotImplemented
    name = {"aten.addmm": "mm", "aten.baddbmm": "bmm", "aten.addmv": "mv"}[step.op.rsplit(".", 1)[0]]
    inner = Step(f"aten.{name}.default", getattr(torch.ops.aten, name).default, (), {}, (), False, step.place)
    return p.add(_matmul(p, inner, a, b), bias)


@_rule("convolution")
def _convolution(p: Propagation, step: Step, x: Any, weight: Any, bias: Any, *rest: Any) -> Any:
    if isinstance(weight, Random) and isinstance(x, Random):
        return NotImplemented
    return linear(p, step, (x, weight, bias, *rest), {})


@_rule("_native_batch_norm_legit_no_training", "native_batch_norm", "cudnn_batch_norm", "_native_batch_norm_legit")
def _batch_norm(p: Propagation, step: Step, x: Any, weight: Any, bias: Any, mean: Any, var: Any, *rest: Any) -> Any:
    if len(rest) == 3 and rest[0]:
        if any(isinstance(v, Random) for v in (weight, bias)):
            return NotImplemented
        found = p.normalise(x, [i for i in range(len(x.shape)) if i != 1], rest[-1])
        shape = (1, -1, *(1 for _ in x.shape[2:]))
        scale = 1.0 if weight is None else weight.reshape(shape)
        shift = 0.0 if bias is None else bias.reshape(shape)
        return [p.affine(lambda v: v * scale + shift, found), Unknown(step.place), Unknown(step.place)]
    if any(isinstance(v, Random) for v in (weight, bias, mean, var)):
        return NotImplemented
    shape = (1, -1, *(1 for _ in x.shape[2:]))
    scale = torch.rsqrt(var + rest[-1]) * (1.0 if weight is None else weight)
    shift = (0.0 if bias is None else bias) - mean * scale
    return [p.affine(lambda x: x * scale.reshape(shape) + shift.reshape(shape), x), mean, var]


@_rule("new_zeros", "new_ones", "new_full", "new_empty", "zeros_like", "ones_like", "full_like", "empty_like")
def _constant(p: Propagation, step: Step, value: Any, *args: Any, **params: Any) -> Any:
    return step.call(_like(p, value), *args, **params)


@_rule("getitem")
def _getitem(p: Propagation, step: Step, values: Any, index: Any) -> Any:
    return values[index]


# Entry by entry


def _pointwise(p: Propagation, step: Step, *args: Any, **params: Any) -> Any:
    """Any elementwise aten operation of one source."""
    if any(isinstance(v, Random) for v in params.values()):
        return NotImplemented
    if not p.shared(*args):
        return NotImplemented
    name = step.kind
    values = _BENDS[name](*args[1:], **params) if name in _BENDS else ()
    bends = [(args[0], value) for value in values]
    if name in _COMPARISONS:
        bends = [(args[0], args[1])]
    return p.elementwise(lambda *x: step.call(*x, **params), *args, bends=bends, nonnegative=name in _NONNEGATIVE)


_COMPARISONS = {"gt", "ge", "lt", "le", "eq", "ne"}
_NONNEGATIVE = {
    "relu", "abs", "sigmoid", "softplus", "hardsigmoid", "erfc", "cosh", "exp2", "relu6", "sqrt", "rsqrt", "heaviside",
}  # fmt: skip


def _either(*values: Any) -> list[Any]:
    return [v for v in values if v is not None]


_BENDS: dict[str, Any] = {
    "relu": lambda: (0.0,),
    "abs": lambda: (0.0,),
    "sign": lambda: (0.0,),
    "sgn": lambda: (0.0,),
    "heaviside": lambda values: (0.0,),
    "leaky_relu": lambda slope=0.01: (0.0,),
    "prelu": lambda weight: (0.0,),
    "_prelu_kernel": lambda weight: (0.0,),
    "rrelu": lambda *a: (0.0,),
    "elu": lambda *a: (0.0,),
    "celu": lambda *a: (0.0,),
    "hardtanh": lambda low=-1.0, high=1.0: (low, high),
    "relu6": lambda: (0.0, 6.0),
    "hardswish": lambda: (-3.0, 3.0),
    "hardsigmoid": lambda: (-3.0, 3.0),
    "softshrink": lambda by=0.5: (-by, by),
    "hardshrink": lambda by=0.5: (-by, by),
    "threshold": lambda at, value: (at,),
    "softplus": lambda *a: (),
    "mish": lambda: (),
    "clamp": lambda low=None, high=None, **k: _either(low, high, k.get("min"), k.get("max")),
    "clamp_min": lambda low: (low,),
    "clamp_max": lambda high: (high,),
    "log_sigmoid_forward": lambda: (),
}


@_rule("add", "sub", "rsub")
def _add(p: Propagation, step: Step, a: Any, b: Any, *, alpha: Any = 1) -> Any:
    def call(x: Array, y: Array) -> Array:
        if name == "add":
            return x + alpha * y
        return x - alpha * y if name == "sub" else y - alpha * x

    name = step.kind
    return p.add(a, b) if name == "add" and alpha == 1 else p.subtract(a, b, call)


@_rule("mul")
def _mul(p: Propagation, step: Step, a: Any, b: Any) -> Any:
    if isinstance(a, Random) and isinstance(b, Random):
        return p.multiply(a, b)
    known, constant = (a, b) if isinstance(a, Random) else (b, a)
    return p.scaled(known, lambda x: x * constant, constant)


@_rule("div", "true_divide")
def _div(p: Propagation, step: Step, a: Any, b: Any, **params: Any) -> Any:
    return NotImplemented if params.get("rounding_mode") else p.divide(a, b)


@_rule("neg")
def _neg(p: Propagation, step: Step, a: Any) -> Any:
    return p.elementwise(lambda x: -x, a, native=False, affine=True)


@_rule("maximum", "fmax")
def _maximum(p: Propagation, step: Step, a: Any, b: Any) -> Any:
    return p.maximum(a, b)


@_rule("minimum", "fmin")
def _minimum(p: Propagation, step: Step, a: Any, b: Any) -> Any:
    return p.maximum(a, b, sign=-1.0)


@_rule("exp")
def _exp(p: Propagation, step: Step, a: Any) -> Any:
    return p.exp(a)


@_rule("log")
def _log(p: Propagation, step: Step, a: Any) -> Any:
    return p.log(a)


@_rule("sqrt", "rsqrt", "reciprocal", "square")
def _root(p: Propagation, step: Step, a: Any) -> Any:
    power = {"sqrt": 0.5, "rsqrt": -0.5, "reciprocal": -1.0, "square": 2.0}[step.op.split(".")[1]]
    return p.power(a, power, step.call)


@_rule("pow")
def _pow(p: Propagation, step: Step, a: Any, b: Any) -> Any:
    if isinstance(b, Random):
        return (
            NotImplemented
            if not isinstance(a, Random) and p.shared(a, b) is False
            else (p.exp(p.multiply(b, p.log(a) if isinstance(a, Random) else _logarithm(p, a, b))))
        )
    if isinstance(b, torch.Tensor):
        if b.ndim:
            return NotImplemented
        b = float(b)
    return p.power(a, float(b), lambda x: step.call(x, b))


def _logarithm(p: Propagation, constant: Any, like: Random) -> Any:
    return torch.log(torch.as_tensor(constant, dtype=like.expression.source.mean.dtype))


@_rule("logaddexp")
def _logaddexp(p: Propagation, step: Step, a: Any, b: Any) -> Any:
    return p.logaddexp(a, b)


@_rule("where")
def _where(p: Propagation, step: Step, which: Any, yes: Any, no: Any) -> Any:
    return p.select(which, yes, no)


@_rule("masked_fill")
def _masked_fill(p: Propagation, step: Step, value: Any, mask: Any, fill: Any) -> Any:
    return p.select(mask, torch.as_tensor(fill, dtype=value.expression.source.mean.dtype), value)


@_rule("bitwise_and", "logical_and", "bitwise_or", "logical_or", "bitwise_xor", "logical_xor")
def _logical(p: Propagation, step: Step, a: Any, b: Any) -> Any:
    if p.shared(a, b) and p.are_truths(a, b):
        return _pointwise(p, step, a, b)
    return {"and": p.both, "or": p.either, "xor": p.exclusive}[step.kind.rsplit("_", 1)[-1]](a, b)


@_rule("bitwise_not", "logical_not")
def _not(p: Propagation, step: Step, a: Any) -> Any:
    return _pointwise(p, step, a) if p.are_truths(a) else p.inverse(a)


@_rule("any", "all")
def _any(p: Propagation, step: Step, a: Any, dim: Any = None, keepdim: bool = False) -> Any:
    return (p.some if step.kind == "any" else p.every)(a, _axes(dim, len(a.shape)), keepdim)


@_rule("slice_scatter")
def _slice_scatter(
    p: Propagation, step: Step, into: Any, part: Any, dim: int = 0, start: Any = None, end: Any = None, by: int = 1
) -> Any:  # fmt: skip
    size = into.shape[dim]
    first, last, _ = slice(start, end, by).indices(size)
    return linear(p, step, (into, part, dim, first, last, by), {})


@_rule("gt", "ge", "lt", "le", "eq", "ne")
def _compare(p: Propagation, step: Step, a: Any, b: Any) -> Any:
    if p.shared(a, b):
        return _pointwise(p, step, a, b)
    return _pointwise(p, step, p.subtract(a, b), 0.0)


# Along axes, and what is made of these


def _axes(dim: Any, rank: int) -> list[int]:
    if dim is None or (isinstance(dim, list | tuple) and not dim):
        return list(range(rank))
    return [int(d) for d in dim] if isinstance(dim, list | tuple) else [int(dim)]


@_rule("amax", "amin", "max", "min")
def _max(p: Propagation, step: Step, a: Any, dim: Any = None, keepdim: bool = False) -> Any:
    name = step.kind
    if isinstance(dim, Random):
        return p.maximum(a, dim, sign=1.0 if name.endswith("max") else -1.0)
    found = p.max(a, _axes(dim, len(a.shape)), keepdim, 1.0 if name.endswith("max") else -1.0)
    return [found, Unknown(step.place)] if ".dim" in step.op else found


@_rule("max_pool1d", "max_pool2d_with_indices", "max_pool3d_with_indices", "max_pool2d")
def _max_pool(
    p: Propagation, step: Step, x: Any, size: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1,
    ceil_mode: bool = False,
) -> Any:  # fmt: skip
    if ceil_mode:
        return NotImplemented
    rank = len(size)
    stride = [*stride] or [*size]
    padding, dilation = ([v] * rank if isinstance(v, int) else [*v] for v in (padding, dilation))
    if any(padding):
        sides = [side for pad in reversed(padding) for side in (pad, pad)]
        low = float((p.mean(x) - 40 * p.gaussian(x).cov.diagonal().max().sqrt()).detach().min()) - 200.0
        x = p.affine(lambda v: torch.constant_pad_nd(v, sides, low), x)
    found = p.pooled(x, size, stride, dilation)
    return [found, Unknown(step.place)] if "with_indices" in step.op else found


@_rule("var", "std")
def _variance(
    p: Propagation, step: Step, x: Any, dim: Any = None, *rest: Any, correction: Any = 1, keepdim: bool = False
) -> Any:
    if rest or isinstance(dim, bool):
        return NotImplemented
    axes = _axes(dim, len(x.shape))
    count = math.prod(x.shape[axis] for axis in axes)
    centred = p.affine(lambda v: v - v.mean(dim=axes, keepdim=True), x)
    by = 1.0 / max(count - (1 if correction is None else correction), 0)
    found = p.sum(p.multiply(centred, centred), lambda v: by * v.sum(dim=axes, keepdim=keepdim))
    return p.power(found, 0.5) if step.kind == "std" else found


@_rule("logsumexp")
def _logsumexp(p: Propagation, step: Step, a: Any, dim: Any, keepdim: bool = False) -> Any:
    return p.logsumexp(a, _axes(dim, len(a.shape)), keepdim)


@_rule("special_log_ndtr")
def _log_ndtr(p: Propagation, step: Step, a: Any) -> Any:
    return p.elementwise(torch.special.log_ndtr, a, native=False)


@_rule("_softmax", "softmax", "_safe_softmax")
def _softmax(p: Propagation, step: Step, a: Any, dim: int, *rest: Any, **params: Any) -> Any:
    return p.softmax(a, dim)


@_rule("_log_softmax", "log_softmax")
def _log_softmax(p: Propagation, step: Step, a: Any, dim: int, *rest: Any, **params: Any) -> Any:
    return p.softmax(a, dim, log=True)


@_rule("probest_normalise")
def _normalise(p: Propagation, step: Step, a: Any, times: Any, guess: Any) -> Any:
    return p.multiply(p.normalise(a, guess.axes, guess.eps, centre=guess.centre), guess.factor * times)


@_rule("native_layer_norm")
def _layer_norm(p: Propagation, step: Step, x: Any, shape: Any, weight: Any, bias: Any, eps: float) -> Any:
    rank = len(x.shape)
    found = p.normalise(x, range(rank - len(shape), rank), eps)
    if weight is not None or bias is not None:
        scale, shift = (1.0 if weight is None else weight), (0.0 if bias is None else bias)
        found = p.affine(lambda y: y * scale + shift, found)
    return [found, Unknown(step.place), Unknown(step.place)]


@_rule("native_group_norm")
def _group_norm(
    p: Propagation, step: Step, x: Any, weight: Any, bias: Any, n: int, c: int, hw: int, group: int, eps: float
) -> Any:
    grouped = p.affine(lambda v: v.reshape((n, group, (c // group) * hw)), x)
    found = p.normalise(grouped, (2,), eps)
    shape = (1, c, *(1 for _ in x.shape[2:]))
    scale = 1.0 if weight is None else weight.reshape(shape)
    shift = 0.0 if bias is None else bias.reshape(shape)
    return [p.affine(lambda v: v.reshape(x.shape) * scale + shift, found), Unknown(step.place), Unknown(step.place)]


@_rule("linalg_vector_norm", "norm")
def _norm(
    p: Propagation, step: Step, x: Any, order: Any = 2, dim: Any = None, keepdim: bool = False, **params: Any
) -> Any:
    axes = _axes(dim, len(x.shape))
    order = 2 if order is None else order
    if params.get("dtype") is not None or order not in (1, 2, float("inf")):
        return NotImplemented
    if order == 2:
        size = p.sum(p.multiply(x, x), lambda v: torch.sum(v, dim=axes, keepdim=keepdim))
        return p.power(size, 0.5)
    absolute = p.elementwise(torch.abs, x, bends=[(x, 0.0)], nonnegative=True)
    if order == 1:
        return p.sum(absolute, lambda v: torch.sum(v, dim=axes, keepdim=keepdim))
    return p.max(absolute, axes, keepdim)
