"""The rules of moment propagation, once for both libraries: what an operation does to a joint Gaussian law.

Here are those along an axis, on top of `core` and `arithmetic`. Softmax, log Σ exp, the largest of several and what is
made of them are functions of a row of values; layer normalisation is an integral in one dimension.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np

from probest.moments.arithmetic import Arithmetic
from probest.moments.core import Library
from probest.moments.gaussian import Gaussian
from probest.moments.hermite import (
    QUADRATURE,
    Quadrature,
    legendre,
)
from probest.moments.pointwise import Expression, Random, evaluate, leaf

__all__ = ["Propagation"]

Array = Any
Call = Callable[..., Array]


class Propagation(Arithmetic):
    """All the rules."""

    def __init__(self, library: Library, settings: Quadrature = QUADRATURE) -> None:
        super().__init__(library, settings)
        self._shares: weakref.WeakKeyDictionary[Gaussian, dict[Any, weakref.ref[Gaussian]]]
        self._shares = weakref.WeakKeyDictionary()

    def sum(self, a: Random, call: Call) -> Random:
        """A sum or mean over some axes, ``call``, an operation of the user's."""
        return self.affine(call, a, nonnegative=self._nonnegative(a))

    def rows(self, a: Random, axes: Sequence[int]) -> tuple[Random, Callable[..., Random]]:
        """a with ``axes`` last and flattened into one, ``(R, K)``, and what puts ``(R, 1)`` or ``(R, K)`` back."""
        rank = len(a.shape)
        axes = sorted(axis % rank for axis in axes)
        kept = [axis for axis in range(rank) if axis not in axes]
        order = kept + axes
        outer, inner = [a.shape[i] for i in kept], [a.shape[i] for i in axes]
        size = math.prod(inner)
        moved = order != list(range(rank))

        def permuted(x: Array, order: Sequence[int]) -> Array:
            return self.xp.permute_dims(x, (0, *(1 + int(i) for i in order)))

        flat = self.affine(lambda x: permuted(x, order), a, native=False) if moved else a
        flat = self.reshaped(flat, (math.prod(outer), size))
        ones = tuple(1 if axis in axes else a.shape[axis] for axis in range(rank))

        def restore(value: Random, keepdims: bool = True) -> Random:
            if value.shape[1] == 1 and size > 1:
                return self.reshaped(value, ones if keepdims else tuple(outer))
            value = self.reshaped(value, (*outer, *inner))
            value = (
                self.affine(lambda x: permuted(x, np.argsort(order).tolist()), value, native=False) if moved else value
            )
            return value if keepdims else self.reshaped(value, tuple(outer))

        return flat, restore

    def every(self, a: Random, axes: Sequence[int], keepdims: bool) -> Random:
        """Whether all along ``axes`` hold, as 1 or 0: products of two, of these, and so on."""
        rest, restore = self.rows(self._indicated(a), axes)
        while rest.shape[1] > 1:
            half, odd = divmod(rest.shape[1], 2)
            parts = [slice(half), slice(half, 2 * half), *[slice(2 * half, None)] * odd]
            left, right, *last = (self.affine(lambda x, part=part: x[:, :, part], rest, native=False) for part in parts)
            rest = cast(Random, self.multiply(left, right))
            if last:
                rest = self.affine(lambda x, y: self.xp.concat([x, y], axis=2), rest, *last, native=False)
        return restore(rest, keepdims)

    def some(self, a: Random, axes: Sequence[int], keepdims: bool) -> Random:
        """Whether any along ``axes`` holds, as 1 or 0."""
        found: Random = self.inverse(self.every(self.inverse(a), axes, keepdims))
        return found

    def max(self, a: Random, axes: Sequence[int], keepdims: bool, sign: float = 1.0) -> Random:
        """The largest (sign −1: smallest) entry along ``axes``."""
        if self._increasing(a):
            return self._applied(a, self.max(self.random(a.expression.source, a.shape), axes, keepdims, sign))
        flat, restore = self.rows(a, axes)
        return restore(self._largest(self._floored(flat, sign), sign), keepdims)

    def pooled(
        self, a: Random, sizes: Sequence[int], strides: Sequence[int], dilations: Sequence[int], sign: float = 1.0
    ) -> Random:
        """The largest (sign −1: smallest) entry of each window, over the last ``len(sizes)`` axes."""
        if self._increasing(a):
            source = self.random(a.expression.source, a.shape)
            return self._applied(a, self.pooled(source, sizes, strides, dilations, sign))
        settings = list(zip(a.shape[len(a.shape) - len(sizes) :], sizes, strides, dilations, strict=True))
        counts = [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in settings]
        windows = [
            tuple(
                slice(o * d, o * d + s * (count - 1) + 1, s)
                for o, (_, _, s, d), count in zip(offsets, settings, counts, strict=True)
            )
            for offsets in itertools.product(*(range(k) for k in sizes))
        ]

        def gathered(x: Array) -> Array:
            return self.xp.stack([x[(..., *window)] for window in windows], axis=-1)

        both = self.affine(gathered, a, native=False)
        flat = self.reshaped(both, (math.prod(both.shape[:-1]), len(windows)))
        return self.reshaped(self._largest(flat, sign), both.shape[:-1])

    def logsumexp(self, a: Random, axes: Sequence[int], keepdims: bool) -> Random:
        flat, restore = self.rows(a, axes)
        if flat.shape[1] == 2:
            return restore(self.logaddexp(*self._columns(flat)), keepdims)
        return restore(self._softmax(flat)[1], keepdims)

    def softmax(self, a: Random, axis: int, *, log: bool = False) -> Random:
        """exp x_i / Σ_j exp x_j along an axis, or with ``log`` its logarithm."""
        self.gaussian(a)
        flat, restore = self.rows(a, (axis,))
        if flat.shape[1] == 2:
            margin = self._margin(flat)
            if log:
                return restore(self.elementwise(lambda d: -self._softplus(-d), margin, native=False))
            share = self.elementwise(lambda d: self.xp.exp(-self._softplus(-d)), margin, native=False, nonnegative=True)
            return restore(share)
        share, total = self._softmax(flat)
        return restore(self._log_softmax(flat, total) if log else share)

    def normalise(self, a: Random, axes: Sequence[int], eps: float, *, centre: bool = True) -> Random:
        """(x − mean) / √(variance + eps) along ``axes``; centre False: x / √(mean x² + eps).

        With x ~ N(m, S) one row of K, y = x r, r = (Q + eps)^−½ and Q = xᵀx / K, the mean and covariance of y within a
        row and E ∂y/∂x are integrals over the powers of r, r^2a = ∫ τ^(a−1) e^(−τ(Q + eps)) dτ / Γ(a): under the
        exponential x is Gaussian with covariance (S⁻¹ + 2τ/K)⁻¹. To other values, the other rows included, the
        derivative carries covariances (exactly, for Gaussian x: Stein).
        """
        xp, s = self.xp, self.s
        flat, restore = self.rows(a, axes)
        if centre:
            flat = self.affine(lambda x: x - xp.mean(x, axis=-1, keepdims=True), flat, native=False)
        size = flat.shape[1]
        m, S = self._row_moments(flat)
        eye = s.array(np.eye(size), m)
        power = (xp.linalg.trace(S) + xp.sum(m * m, axis=1)) / size + eps
        unit = 1 / xp.sqrt(s.clip(s.stop_gradient(power), float(xp.finfo(m.dtype).tiny) ** 0.5, None))
        both = xp.concat([S, m[:, :, None]], axis=2)
        scale: Any = 0.0
        mean = second = third = scale
        points, weights = legendre(self.settings.per_piece)
        for u, w in zip((points + 1) / 2, weights / 2, strict=True):  # t = √τ from 0 to ∞
            t, dt = unit * float(u / (1 - u)), unit * float(w / (1 - u) ** 2)
            matrix = eye + (2 / size) * (t * t)[:, None, None] * S
            solved = xp.linalg.solve(matrix, both)
            inner, at = solved[:, :, :size], solved[:, :, size]
            exponent = -0.5 * xp.linalg.slogdet(matrix)[1] - t * t * (xp.sum(m * at, axis=1) / size + eps)
            mass = dt * xp.exp(exponent)
            outer = mass[:, None, None] * (inner + at[:, :, None] * at[:, None, :])
            scale = scale + mass
            mean = mean + mass[:, None] * at
            second = second + t[:, None, None] * outer
            third = third + (t * t)[:, None, None] * outer
        root = math.pi**0.5
        mean = (2 / root) * mean
        derivative = (2 / root) * scale[:, None, None] * eye - (4 / root / size) * third
        back = xp.permute_dims(derivative, (0, 2, 1))
        rest = 2 * second - mean[:, :, None] * mean[:, None, :] - derivative @ S @ back
        return restore(self._row_function(flat, mean, derivative, rest))

    # What these are made of

    def _margin(self, flat: Random) -> Random:
        """x_1 − x_2 and x_2 − x_1, of which softmax and its logarithm are functions; kept while it is in use."""

        def made() -> Random:
            return self.affine(lambda x: x - self.xp.flip(x, axis=-1), flat, native=False)

        return self.random(self._kept(self.gaussian(flat), ("margin", flat.shape), made), flat.shape)

    def _kept(self, source: Gaussian, key: Any, make: Callable[[], Random]) -> Gaussian:
        """A vector that is made of the source once, and again only where the first is no longer in use."""
        known = self._shares.setdefault(source, {})
        found = known.get(key, lambda: None)()
        if found is None:
            found = self.gaussian(make())
            known[key] = weakref.ref(found)
        return found

    def _softmax(self, flat: Random) -> tuple[Random, Random]:
        """Softmax ``(R, K)`` and log Σ exp ``(R, 1)``, with their joint law; kept while either is in use."""
        xp, (rows, size), whole = self.xp, flat.shape, flat
        source = self._kept(self.gaussian(flat), ("floored", flat.shape), lambda: self._floored(whole))
        flat = self.random(source, flat.shape)

        def pair(x: Array) -> Array:
            largest = xp.max(self.s.stop_gradient(x), axis=-1, keepdims=True)
            raised = xp.exp(x - largest)
            total = xp.sum(raised, axis=-1, keepdims=True)
            return xp.concat([raised / total, largest + xp.log(total)], axis=-1)

        def call(x: Array) -> tuple[Array, Array]:
            values = pair(x)
            share = values[..., :size]
            mean = xp.mean(share, axis=1)
            both = xp.permute_dims(share, (0, 2, 1)) @ share / share.shape[1]
            own = self.s.array(np.eye(size), mean) * mean[:, None, :]
            derivative = xp.concat([own - both, mean[:, None, :]], axis=1)
            return values, derivative

        def own(part: slice, nonnegative: bool) -> Callable[[], Gaussian]:
            def found() -> Gaussian:
                joint = self._kept(source, ("softmax", flat.shape), lambda: self._along_rows(flat, call))
                both = self.random(joint, (rows, size + 1))
                return self.gaussian(self.affine(lambda x: x[..., part], both, native=False, nonnegative=nonnegative))

            return found

        inner = leaf(source, flat.shape)
        share, total = (
            Random(
                Expression(
                    inner.source,
                    (rows, width),
                    lambda x, part=part: pair(x)[..., part],
                    (inner,),
                    nonnegative=nonnegative,
                    rows=rows,
                    own=own(part, nonnegative),
                )
            )
            for part, width, nonnegative in ((slice(0, size), size, True), (slice(size, size + 1), 1, False))
        )
        return share, total

    def _log_softmax(self, flat: Random, total: Random) -> Random:
        """x − log Σ exp x, of rows."""
        flat = self.random(total.expression.source, flat.shape)  # what the sum is of
        parts = (leaf(total.expression.source, flat.shape), total.expression)

        def own() -> Gaussian:
            return self.gaussian(self.affine(lambda x, y: x - y, flat, Random(total.expression), native=False))

        return Random(Expression(parts[0].source, flat.shape, lambda x, y: x - y, parts, rows=flat.shape[0], own=own))

    def _largest(self, flat: Random, sign: float) -> Random:
        """``(R, 1)``: Clark's formulas for two, sums over points beyond."""
        xp, size = self.xp, flat.shape[1]
        if size == 1:
            return flat
        if size == 2:
            first, second = self._columns(flat)
            return cast(Random, self.maximum(first, second, sign))

        def call(x: Array) -> tuple[Array, Array]:
            at = xp.argmax(sign * self.s.stop_gradient(x), axis=-1)
            which = self.s.array(1.0, x) * (at[:, :, None] == self.s.array(np.arange(size), x))
            return xp.sum(which * x, axis=-1, keepdims=True), xp.mean(which, axis=1)[:, None, :]

        return self._along_rows(flat, call)

    def _columns(self, flat: Random) -> list[Random]:
        return [self.affine(lambda x, i=i: x[..., i : i + 1], flat, native=False) for i in range(flat.shape[1])]

    def _increasing(self, value: Random) -> bool:
        """Whether it is one and the same function that nowhere falls, of every entry: then the largest value of it is
        its value at the largest entry, whose law is nearer to a Gaussian's. It is looked at within reach.
        """
        expression = value.expression
        if expression.affine or expression.rows:
            return False
        source, s = expression.source, self.s
        mean, far = s.stop_gradient(source.mean), self.settings.reach * s.stop_gradient(self._std(source))
        low, high = float(self.xp.min(mean - far)), float(self.xp.max(mean + far))
        grid = s.array(np.linspace(low, high, 4 * self.settings.nodes + 1), mean)[:, None] + 0.0 * mean
        values = np.asarray(s.stop_gradient(evaluate(expression, grid).reshape(grid.shape)))
        slack = 1e-6 * np.abs(values).max(initial=0)
        return bool(np.ptp(values, axis=1).max() <= slack and np.diff(values[:, 0]).min() >= -slack)

    def _applied(self, function: Random, value: Random) -> Random:
        """The function that ``function`` is of each entry of its source, of ``value``."""
        old = function.expression
        size = old.source.size

        def call(x: Array) -> Array:
            flat = x.reshape(-1)
            rows = -(-flat.shape[0] // size)
            filling = self.xp.broadcast_to(flat[:1], (rows * size - flat.shape[0],))
            found = evaluate(old, self.xp.concat([flat, filling]).reshape((rows, size)))
            return found.reshape(-1)[: flat.shape[0]].reshape(x.shape)

        bends = [(value, b[0]) for b in old.breaks]
        return self.elementwise(call, value, native=False, bends=bends, nonnegative=old.nonnegative)

    def _floored(self, flat: Random, sign: float = 1.0) -> Random:
        """``(R, K)`` with entries that cannot matter (−∞, or a mask's −1e9) brought near."""
        source, xp = self.gaussian(flat), self.xp
        mean = sign * source.mean.reshape(flat.shape)
        largest = xp.max(self.s.stop_gradient(mean), axis=1, keepdims=True)
        spread = float(xp.max(self.s.stop_gradient(self._std(source))))
        floor = largest - 200.0 - 40.0 * spread
        if bool(xp.any(mean < floor)):
            blocks = {v: self.joint.between(source, v) for v in self.joint.alive()}
            lowered = sign * xp.where(mean < floor, floor, mean)
            flat = self.random(self.joint.add(lowered.reshape(-1), source.cov, blocks), flat.shape)
        return flat
