"""``moments(fn, mean, cov)``: the mean and covariance of a function of a Gaussian, by reading the function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from probest.backends.load import load_backend
from probest.moments.gaussian import Gaussian
from probest.moments.hermite import QUADRATURE, Quadrature
from probest.moments.pointwise import Random
from probest.moments.rules import Propagation
from probest.moments.steps import MomentError, Trace, Unknown, linear, read

__all__ = ["Moments", "Traced", "front_of", "interpret", "moments", "register_rule", "traced"]

Array = Any


@dataclass(frozen=True)
class Moments:
    """Mean and covariance of a function of a Gaussian input.

    Attributes:
        mean: of the output, of its shape ``(*O)``.
        cov: ``(*O, *O)``.
        cross: Cov(input, output), ``(*S, *O)`` for an input of shape ``(*S)``.
        error: the largest error that an integral on the way may have had, in units of the largest standard deviation in
            it. What else is neglected, that a layer's values are not Gaussian, is not in it.
    """

    mean: Array
    cov: Array
    cross: Array
    error: float

    @property
    def variance(self) -> Array:
        """Of each entry of the output, of its shape."""
        size = int(np.prod(self.mean.shape))
        return self.cov.reshape((size, size))[np.arange(size), np.arange(size)].reshape(self.mean.shape)

    @property
    def std(self) -> Array:
        """Of each entry of the output, of its shape; 0 where rounding left a variance below 0."""
        variance = self.variance
        return (variance * (variance > 0)) ** 0.5

    def __repr__(self) -> str:
        return f"Moments(mean of shape {tuple(self.mean.shape)}, input of shape {self._input}, error={self.error:.1g})"

    @property
    def _input(self) -> tuple[int, ...]:
        return tuple(self.cross.shape[: self.cross.ndim - self.mean.ndim])


@dataclass(frozen=True)
class Traced:
    """A function that `traced` read once, to be passed to `moments` in its place.

    Attributes:
        function: the function; calling this calls it.
        shape, dtype: of the array that it was traced on, and has to be asked about.
    """

    function: Callable[[Array], Array]
    shape: tuple[int, ...]
    dtype: Any
    trace: Trace = field(repr=False)

    def __call__(self, x: Array) -> Array:
        return self.function(x)


def traced(fn: Callable[[Array], Array], mean: Array) -> Traced:
    """``fn`` as a list of operations, for many calls of `moments`: tracing a small network takes longer than the rest.

    Parameters of a torch module stay what they are: values written into them count, gradients pass. Everything else
    that ``fn`` looks up (arrays it closes over in JAX, settings, its training mode) is as it was when it was traced.

    Args:
        fn: as for `moments`.
        mean: an array of the shape and type of the means it will be asked about; its values do not count.

    Raises:
        MomentError, TypeError, ValueError: as `moments`, of its function and mean.
    """
    if not callable(fn):
        raise TypeError(f"traced(fn=...) has to be a function or module, not {type(fn).__name__}")
    name = _library_of(mean)
    backend = load_backend(name)
    _check(backend, mean, None)
    with backend.evaluating(fn):
        return Traced(fn, tuple(mean.shape), mean.dtype, _trace(front_of(name), fn, mean))


def moments(
    fn: Callable[[Array], Array],
    mean: Array,
    cov: Array | None = None,
    *,
    linearize: bool = False,
    settings: Quadrature = QUADRATURE,
) -> Moments:
    """Mean and covariance of ``fn(x)`` for x ~ N(mean, cov), without a sample.

    ``fn`` is traced once and read operation by operation on a joint Gaussian law (`probest.moments.rules`): exact for
    affine operations; for functions applied entry by entry, the exact mean and covariance of a Gaussian argument. What
    is neglected is that a layer's output is not Gaussian: an error of the order of 1 / width.

    Args:
        fn: a torch module or function, or a JAX function; of one array, which may be a batch. Or what `traced` made of
            one.
        mean: of the input, ``(*S)``: a torch tensor or a JAX array.
        cov: its covariance: ``(n, n)`` or ``(*S, *S)`` with n the number of entries; or the variances alone, ``(*S)``;
            None for the identity.
        linearize: replace an operation that has no rule by its derivative at the mean, with a warning.
        settings: how finely integrals are taken.

    Returns:
        The moments, arrays of the library of ``mean``, differentiable in everything that ``fn`` is made of.

    Raises:
        MomentError: an operation has no rule; the message names it and its place in the user's code. Or it is called
            under ``jax.jit``.
        TypeError: ``mean`` is not an array of torch or JAX, or ``fn`` cannot be called or does not return one array.
        ValueError: ``mean`` or ``cov`` is not finite, or ``cov`` is not a covariance of that shape.
    """
    p, source, found = interpret(fn, mean, cov, linearize=linearize, settings=settings)
    shape = tuple(mean.shape)
    library = p.library
    try:
        vector = p.gaussian(found)
    except ValueError as error:
        raise MomentError(f"moments: the function's output: {error}") from error
    out = found.shape
    between = p.joint.between(source, vector)
    return Moments(
        library.result(vector.mean.reshape(out)),
        library.result(vector.cov.reshape(out + out)),
        library.result(between.reshape(shape + out)),
        p.error,
    )


def interpret(
    fn: Callable[[Array], Array],
    mean: Array,
    cov: Array | None = None,
    *,
    linearize: bool = False,
    settings: Quadrature = QUADRATURE,
    rules: Callable[[Any, Quadrature], Propagation] = Propagation,
) -> tuple[Propagation, Gaussian, Random]:
    """Reads ``fn`` by ``rules``: the propagation, the input's vector, the output. Arguments and errors: `moments`."""
    if not callable(fn):
        raise TypeError(f"moments(fn=...) has to be a function or module, not {type(fn).__name__}")
    name = _library_of(mean)
    backend, front = load_backend(name), front_of(name)
    if backend.compiling():
        raise MomentError(
            "moments: which nodes and orders it takes depends on values, so it cannot be compiled. Call it outside of "
            "jax.jit or torch.compile; gradients of it are no harm"
        )
    shape = tuple(mean.shape)
    _check(backend, mean, cov)
    if isinstance(fn, Traced):
        if (shape, mean.dtype) != (fn.shape, fn.dtype):
            raise ValueError(
                f"moments(mean=...) is of shape {shape} and type {mean.dtype}, fn was traced on {fn.shape} and "
                f"{fn.dtype}: trace it on such an array"
            )
        trace = fn.trace
    else:
        with backend.evaluating(fn):
            trace = _trace(front, fn, mean)
    library = front.library(trace, mean, cov)
    p = rules(library, settings)
    flat = library.value(mean).reshape(-1)
    source = p.joint.add(flat, _matrix(p, flat, shape, library.value(cov)), {})
    p.begin(source)
    found = read(trace, p, front.rule_for, p.random(source, shape), linearize=linearize)
    if isinstance(found, Unknown):
        raise MomentError(f"moments: the function returns a value that has no moments here ({found.place})")
    if isinstance(found, tuple | list) and len(found) == 1:
        (found,) = found
    if isinstance(found, tuple | list | dict):
        raise TypeError("moments(fn=...) returns several arrays: wrap fn so that it returns one, as by concatenation")
    if not isinstance(found, Random):
        if not hasattr(found, "shape"):
            raise TypeError(f"moments(fn=...) has to return an array, not {type(found).__name__}")
        found = p.random(_constant(p, flat, found), found.shape)
    return p, source, found


def register_rule(
    op: str,
    rule: Callable[..., Any] | None = None,
    *,
    linear: bool = False,
    elementwise: bool = False,
    bends: tuple[float, ...] = (),
) -> None:
    """Teaches `moments` an operation.

    Args:
        op: as the error about it names it: ``"aten.name"`` or ``"aten.name.overload"``, or a JAX primitive's name.
        rule: ``rule(p, step, *args, **params) -> value``, composed of the rules of ``p`` (`Propagation`): random
            arguments are `Random`, constants are arrays, ``step.call`` is the operation.
        linear: instead of ``rule``: the operation is affine in its random arguments together.
        elementwise: instead of ``rule``: it is applied entry by entry.
        bends: of an elementwise operation, the arguments at which it or its slope jumps.

    Raises:
        ValueError: not exactly one of ``rule``, ``linear`` and ``elementwise`` is given.
    """
    if (rule is not None) + bool(linear) + bool(elementwise) != 1:
        raise ValueError("register_rule: give exactly one of rule=, linear=True and elementwise=True")
    if rule is None:
        rule = _linear_rule if linear else _elementwise_rule(bends)
    if op.startswith("aten.") or "::" in op or "." in op:
        from probest.moments import fx

        fx.RULES[op.replace("::", ".")] = rule
    else:
        from probest.moments import jaxpr

        jaxpr.RULES[op] = rule


def _linear_rule(p: Propagation, step: Any, *args: Any, **params: Any) -> Any:
    return linear(p, step, args, params)


def _elementwise_rule(bends: tuple[float, ...]) -> Callable[..., Any]:
    def rule(p: Propagation, step: Any, *args: Any, **params: Any) -> Any:
        first = next(a for a in args if isinstance(a, Random))
        return p.elementwise(lambda *x: step.call(*x, **params), *args, bends=[(first, b) for b in bends])

    return rule


def front_of(name: str) -> Any:
    """What traces functions of that library, and knows the rules of its operations."""
    if name == "torch":
        from probest.moments import fx

        return fx
    from probest.moments import jaxpr

    return jaxpr


def _trace(front: Any, fn: Callable[[Array], Array], mean: Array) -> Trace:
    try:
        found: Trace = front.trace(fn, mean)
        return found
    except MomentError:
        raise
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else ""
        raise MomentError(
            f"moments: fn could not be traced on an array of shape {tuple(mean.shape)} and type {mean.dtype}. It may "
            "not branch on a value that depends on its input, nor read one out (.item()), and its parameters have to "
            f"be of that type. {type(error).__name__}: {reason}"
        ) from error


def _library_of(mean: Any) -> str:
    module = type(mean).__module__.split(".")[0]
    if module == "torch":
        return "torch"
    if module in ("jax", "jaxlib"):
        return "jax"
    raise TypeError(
        f"moments(mean=...) is a {type(mean).__name__}: pass a torch tensor or a JAX array, by which fn is traced"
    )


def _check(backend: Any, mean: Any, cov: Any) -> None:
    """Raises what `moments` says of ``mean`` and ``cov``."""
    host = np.asarray(backend.to_host(backend.constant(mean)))
    if host.dtype.kind != "f" or "float" not in str(mean.dtype):
        raise TypeError(f"moments(mean=...) holds {mean.dtype}: it has to be of a floating type")
    if host.size == 0:
        raise ValueError("moments(mean=...) is empty")
    if not np.isfinite(host).all():
        raise ValueError("moments(mean=...) is not finite")
    if cov is None:
        return
    shape, size, given = host.shape, host.size, tuple(np.shape(cov))
    if given not in ((size, size), shape + shape, shape):
        raise ValueError(
            f"moments(cov=...) has shape {given}: for a mean of shape {shape} it is {(size, size)}, {shape + shape}, "
            f"or {shape} for variances alone"
        )
    matrix = np.asarray(backend.to_host(backend.constant(backend.as_array(cov))))
    if not np.isfinite(matrix).all():
        raise ValueError("moments(cov=...) is not finite")
    if given == shape and given != (size, size):
        if (matrix < 0).any():
            raise ValueError("moments(cov=...) holds a negative variance")
        return
    matrix = matrix.reshape((size, size))
    diagonal = np.diag(matrix)
    if (diagonal >= 0).all() and np.count_nonzero(matrix) == np.count_nonzero(diagonal):
        return
    slack = 1e-5 * np.abs(matrix).max()
    if np.abs(matrix - matrix.T).max() > slack:
        raise ValueError("moments(cov=...) is not symmetric")
    try:
        np.linalg.cholesky(matrix + np.eye(size) * (slack + 1e-300))
    except np.linalg.LinAlgError:
        raise ValueError("moments(cov=...) has negative eigenvalues: it is not a covariance") from None


def _matrix(p: Propagation, mean: Array, shape: tuple[int, ...], cov: Any) -> Array:
    """The covariance ``(n, n)``."""
    size = mean.shape[0]
    if cov is None:
        return p.s.array(np.eye(size), mean)
    cov = p.s.array(cov, mean)
    if tuple(cov.shape) == shape and shape != (size, size):
        return p.s.array(np.eye(size), mean) * cov.reshape(-1)
    return cov.reshape((size, size))


def _constant(p: Propagation, like: Array, value: Any) -> Any:
    """A value that does not depend on the input, as a vector without variance."""
    flat = p.s.array(p.library.value(value), like).reshape(-1)
    size = flat.shape[0]
    blocks = {v: p.s.array(np.zeros((size, v.size)), like) for v in p.joint.alive()}
    return p.joint.add(flat, p.s.array(np.zeros((size, size)), like), blocks)
