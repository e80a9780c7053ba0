"""A traced function in layers: linear maps between nonlinearities that are applied entry by entry.

    x_k = c_k + Σ_b M_kb b        y_k = f_k(x_k)        s = c + Σ_b M_b b

where b runs over the input z, earlier y and, for residual streams, earlier x. Whatever `moments` can trace has this
form: a b = ((a + b)² − (a − b)²) / 4, max(a, b) = a + max(b − a, 0), log(e^a + e^b) = a + softplus(b − a), softmax_i =
exp(x_i − log Σ exp x). It holds whatever the law of z, so one reading serves every tilt.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from probest.backends import special_numpy
from probest.backends.base import Backend
from probest.checkers import Branch
from probest.moments.core import Library
from probest.moments.gaussian import Gaussian
from probest.moments.hermite import QUADRATURE, Quadrature
from probest.moments.pointwise import Expression, Random, numbers
from probest.moments.propagate import interpret
from probest.moments.rules import Propagation
from probest.moments.steps import MomentError

__all__ = ["INPUT", "Base", "Layer", "Layers", "Linear", "layers", "reached"]

Array = Any
Call = Callable[..., Array]
Base = tuple[str, int]
"""``("z", 0)``, ``("x", k)`` or ``("y", k)``."""
_CLASSES = 16  # of one softmax, at most, whose shares are each written against the others
INPUT: Base = ("z", 0)


@dataclass(frozen=True)
class Linear:
    """Σ_b M_b b + shift: ``terms[b]`` is ``(n, size of b)``, ``shift`` ``(n,)``."""

    terms: Mapping[Base, Array]
    shift: Array

    @property
    def size(self) -> int:
        return int(self.shift.shape[0])


@dataclass(frozen=True)
class Layer:
    """y = function(x), entry by entry, ``(Q, n) -> (Q, n)``, which may bend or jump at ``breaks``, each ``(n,)``."""

    linear: Linear
    function: Callable[[Array], Array]
    breaks: tuple[Array, ...]


@dataclass(frozen=True)
class Layers:
    """A function ``(dim,) -> (J,)`` in layers. special: the functions of the library its arrays are of.

    branches: which of the outputs have to be positive together, in one of which ways. parted: whether its end was taken
    apart (:mod:`probest.moments.parting`). signs: whether only the signs of its severities are the function's.
    """

    dim: int
    layers: tuple[Layer, ...]
    output: Linear
    special: Any
    branches: tuple[Branch, ...] = (((0, 1.0),),)
    parted: bool = False
    signs: bool = False

    def __call__(self, z: Array) -> Array:
        """``(N, dim) -> (N, J)``, to compare with the function that was read."""
        values: dict[Base, Array] = {INPUT: z}
        for k, layer in enumerate(self.layers):
            values["x", k] = _applied(layer.linear, values)
            values["y", k] = layer.function(values["x", k])
        return _applied(self.output, values)

    def on_host(self, backend: Backend) -> Layers:
        """The same in NumPy and float64; functions are still computed by the library, in its own precision."""

        def host(x: Array) -> Array:
            return np.asarray(backend.to_host(backend.constant(x)), np.float64)

        def linear(one: Linear) -> Linear:
            return Linear({b: host(m) for b, m in one.terms.items()}, host(one.shift))

        def function(layer: Layer) -> Callable[[Array], Array]:
            like, native = layer.linear.shift, self.special

            def call(x: Array) -> Array:
                with backend.no_gradient():
                    return host(layer.function(native.array(x, like)))

            return call

        found = (Layer(linear(one.linear), function(one), tuple(map(host, one.breaks))) for one in self.layers)
        return replace(self, layers=tuple(found), output=linear(self.output), special=special_numpy)

    def shifted(self, by: Array) -> Layers:
        """The same of z + by."""

        def linear(one: Linear) -> Linear:
            matrix = one.terms.get(INPUT)
            return one if matrix is None else Linear(one.terms, one.shift + matrix @ by)

        moved = (Layer(linear(one.linear), one.function, one.breaks) for one in self.layers)
        return replace(self, layers=tuple(moved), output=linear(self.output))

    def severity(self, values: Array) -> Array:
        """Of outputs ``(N, J)``, ``(N,)``: the largest of the branches."""
        return self.special.xp.max(self.special.xp.stack([self.branch(one, values) for one in self.branches]), axis=0)

    def branch(self, which: Branch, values: Array) -> Array:
        """Of outputs ``(N, J)``, ``(N,)``: the least of those of a branch."""
        return self.special.xp.min(self.special.xp.stack([sign * values[:, j] for j, sign in which]), axis=0)

    def used_later(self, k: int) -> set[Base]:
        """What the layers after k, or the output, are made of."""
        later = itertools.chain(*(layer.linear.terms for layer in self.layers[k + 1 :]), self.output.terms)
        return set(later)


def layers(fn: Callable[[Array], Array], mean: Array, most: int | None = None) -> Layers:
    """``fn`` of one array, whose entries are standard normal, in layers.

    Args:
        fn: as for `moments`.
        mean: an array of fn's input, about which it is traced: its type and shape count.
        most: layers, at most; None for as many as there are.

    Raises:
        MomentError: there are more layers; and, with TypeError and ValueError, as `moments`.
    """
    p, _, found = interpret(fn, mean, rules=partial(_Reading, most=most))
    assert isinstance(p, _Reading)
    kept, output = reached(p.layers, p.linear(p.gaussian(found)))
    return Layers(math.prod(mean.shape), kept, output, p.s)


def reached(found: Sequence[Layer], output: Linear) -> tuple[tuple[Layer, ...], Linear]:
    """The layers whose functions the output depends on, renumbered. What else is computed, as log-probabilities are, is
    left out; where the linear part of such a layer is used, it is put in.
    """
    linear = [layer.linear for layer in found]
    kept: list[int] = []
    for k in reversed(range(len(found))):
        if any(("y", k) in one.terms for one in (output, *(linear[later] for later in kept))):
            kept.insert(0, k)
            continue
        output = _with(output, ("x", k), linear[k])
        for later in kept:
            linear[later] = _with(linear[later], ("x", k), linear[k])
    number = {k: i for i, k in enumerate(kept)}

    def renamed(one: Linear) -> Linear:
        return Linear({b if b == INPUT else (b[0], number[b[1]]): m for b, m in one.terms.items()}, one.shift)

    return tuple(Layer(renamed(linear[k]), found[k].function, found[k].breaks) for k in kept), renamed(output)


def _with(one: Linear, base: Base, value: Linear) -> Linear:
    """The same with what ``base`` is in its place."""
    if base not in one.terms:
        return one
    matrix = one.terms[base]
    terms = {b: m for b, m in one.terms.items() if b != base}
    for b, m in value.terms.items():
        terms[b] = matrix @ m + terms[b] if b in terms else matrix @ m
    return Linear(terms, one.shift + matrix @ value.shift)


def _applied(linear: Linear, values: Mapping[Base, Array]) -> Array:
    total = linear.shift
    for base, matrix in linear.terms.items():
        total = total + values[base] @ matrix.T
    return total


class _Reading(Propagation):
    """The rules, every one in terms of affine and of elementwise operations, with a record of both."""

    def __init__(self, library: Library, settings: Quadrature = QUADRATURE, most: int | None = None) -> None:
        super().__init__(library, settings)
        self.most = most
        self.layers: list[Layer] = []
        self._terms: weakref.WeakKeyDictionary[Gaussian, dict[Base, Array]] = weakref.WeakKeyDictionary()
        self._means: dict[Base, Array] = {}

    def begin(self, source: Gaussian) -> None:
        self._is(source, INPUT)

    def linear(self, vector: Gaussian) -> Linear:
        terms = self._terms.get(vector, {})
        shift = vector.mean
        for base, matrix in terms.items():
            shift = shift - matrix @ self._means[base]
        return Linear(dict(terms), shift)

    def _is(self, vector: Gaussian, base: Base) -> None:
        self._terms[vector] = {base: self.s.array(np.eye(vector.size), vector.mean)}
        self._means[base] = vector.mean

    def _made(self, new: Gaussian, sources: Sequence[Gaussian], act: Callable[[Sequence[Array]], Array]) -> None:
        found: dict[Base, Array] = {}
        for base in dict.fromkeys(itertools.chain(*(self._terms.get(source, {}) for source in sources))):
            size = self._means[base].shape[0]
            rows = []
            for source in sources:
                known = self._terms.get(source, {}).get(base)
                rows.append(self.s.array(np.zeros((size, source.size)), new.mean) if known is None else known.T)
            found[base] = act(rows).T
        self._terms[new] = found

    def _expanded(self, expression: Expression) -> Gaussian:
        """A function entry by entry, by its value at one point: moments do not matter here, and may not exist."""
        source, k = expression.source, len(self.layers)
        if k == self.most:
            raise MomentError(f"moments: the function has more than {self.most} layers")

        def function(x: Array) -> Array:
            return numbers(self.s, expression, x)

        value = function(source.mean[None])[0]
        value = self.xp.where(self.xp.isfinite(value), value, 0.0)
        blocks = {v: self.s.array(np.zeros((source.size, v.size)), source.mean) for v in self.joint.alive()}
        spread = self.s.array(np.eye(source.size), source.mean)  # so that bends are searched for about the point
        new = self.joint.add(value, spread, blocks, positive=expression.nonnegative)
        self.layers.append(Layer(self.linear(source), function, expression.breaks))
        self._is(source, ("x", k))
        self._is(new, ("y", k))
        return new

    def _is_variance(self, value: Random) -> bool:
        return False

    # What has rules of its own there, out of simpler parts

    def _kept_in_rows(self, *args: Any) -> None:
        return None

    def positive(self, value: Random, *, surely: bool = False) -> Random:
        return value

    def multiply(self, a: Any, b: Any) -> Any:
        if not (isinstance(a, Random) and isinstance(b, Random)) or self.shared(a, b):
            return super().multiply(a, b)
        logarithm = self._log_of_product(a, b)
        if logarithm is not None:
            return self.exp(logarithm)
        self._spread(a, b)
        nonnegative = self._nonnegative(a) and self._nonnegative(b)
        both = (self.affine(lambda x, y, sign=sign: x + sign * y, a, b, native=False) for sign in (1.0, -1.0))
        return self.affine(lambda x, y: (x - y) / 4, *map(self._squared, both), native=False, nonnegative=nonnegative)

    def matmul(self, a: Random, b: Random) -> Random:
        xp = self.xp
        (batch, rows, inner), columns = a.shape, b.shape[2]
        shape = (batch, rows, inner, columns)
        left = self.affine(lambda x: xp.broadcast_to(x[..., None], (x.shape[0], *shape)), a, native=False)
        right = self.affine(lambda x: xp.broadcast_to(x[:, :, None], (x.shape[0], *shape)), b, native=False)
        return self.affine(lambda x: xp.sum(x, axis=-2), self.multiply(left, right), native=False)

    def logsumexp(self, a: Random, axes: Sequence[int], keepdims: bool) -> Random:
        flat, restore = self.rows(a, axes)
        return restore(self._tournament(self._floored(flat), self.logaddexp), keepdims)

    def softmax(self, a: Random, axis: int, *, log: bool = False) -> Random:
        flat, restore = self.rows(a, (axis,))
        if flat.shape[1] == 2:
            return super().softmax(a, axis, log=log)
        flat = self._floored(flat)
        if flat.shape[0] == 1 and flat.shape[1] <= _CLASSES:
            return restore(self._against_others(flat, log))
        total = self._tournament(flat, self.logaddexp)
        logarithm = self.affine(lambda x, y: x - y, flat, total, native=False)
        return restore(logarithm if log else self.exp(logarithm))

    def _against_others(self, flat: Random, log: bool) -> Random:
        """log softmax_k = -softplus(log Σ_{j≠k} exp(x_j − x_k)): a monotone function of one value, that of a margin."""
        n = flat.shape[1]
        others = np.array([[j for j in range(n) if j != k] for k in range(n)])
        margins = self.affine(lambda x: x[:, 0, :][:, others] - x[:, 0, :, None], flat, native=False)
        total = self.reshaped(self._tournament(margins, self.logaddexp), (1, n))
        if log:
            return self.elementwise(lambda x: -self._softplus(x), total, native=False)
        return self.elementwise(lambda x: self.xp.exp(-self._softplus(x)), total, native=False, nonnegative=True)

    def normalise(self, a: Random, axes: Sequence[int], eps: float, *, centre: bool = True) -> Random:
        xp = self.xp
        flat, restore = self.rows(a, axes)
        if centre:
            flat = self.affine(lambda x: x - xp.mean(x, axis=-1, keepdims=True), flat, native=False)
        size = self.affine(lambda x: xp.mean(x, axis=-1, keepdims=True) + eps, self._squared(flat), native=False)
        scale = self.elementwise(lambda x: 1 / xp.sqrt(xp.where(x > 0, x, float("inf"))), size, native=False)
        return restore(self.multiply(flat, scale))

    def _largest(self, flat: Random, sign: float) -> Random:
        return self._tournament(flat, lambda x, y: self.maximum(x, y, sign))

    def _squared(self, a: Random) -> Random:
        return self.elementwise(lambda x: x * x, a, native=False, nonnegative=True)

    def _tournament(self, flat: Random, play: Callable[[Random, Random], Random]) -> Random:
        while (size := flat.shape[1]) > 1:
            parts = [
                self.affine(lambda x, i=i, j=j: x[..., i:j], flat, native=False)
                for i, j in itertools.pairwise((0, size // 2, 2 * (size // 2), size))
                if i < j
            ]
            flat = play(parts[0], parts[1])
            if len(parts) == 3:
                flat = self.affine(lambda x, y: self.xp.concat([x, y], axis=-1), flat, parts[2], native=False)
        return flat

    def _floored(self, flat: Random, sign: float = 1.0) -> Random:
        source = self.gaussian(flat)
        found = super()._floored(flat, sign)
        lowered = self.gaussian(found)
        if lowered is not source:
            self._terms[lowered] = self._terms.get(source, {})
        return found
