"""The rules of moment propagation, once for both libraries: what an operation does to a joint Gaussian law.

An *affine* operation acts on deviations by its derivative, which is the operation itself. A function applied *entry by
entry* is kept as an expression and meets `hermite` when its covariance is needed. A *bilinear* one (products, matrix
products) is its linear part about the means and a remainder of second order, whose covariance is Isserlis'. Everything
else is composed of these: max(a, b) = a + max(b − a, 0) (Clark 1961), log Σ exp pairwise with softplus in its place,
softmax_i = σ(x_i − log Σ_{j≠i} exp x_j), layer normalisation. A sum of squares or exponentials is carried by its
logarithm once a function of it is taken (Fenton 1960): it cannot be negative, and a Gaussian can.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from probest.moments.gaussian import Gaussian, Joint, Origin
from probest.moments.hermite import QUADRATURE, Expansion, Quadrature, covariance, expand, hermite, legendre
from probest.moments.pairs import with_close_pairs
from probest.moments.pointwise import Expression, Random, evaluate, leaf

__all__ = ["Library", "Propagation"]

Array = Any
Call = Callable[..., Array]


class Library(Protocol):
    """What the rules need of an array library."""

    @property
    def special(self) -> Any:
        """Special functions and the array namespace ``special.xp``."""

    def value(self, x: Any) -> Array:
        """What an operation of the user's returned, as an array of ``special.xp``."""

    def result(self, x: Array) -> Array:
        """An array of ``special.xp`` as one of the user's."""

    def batched(self, call: Call, which: Sequence[bool]) -> Call:
        """An operation of the user's along a new first axis of the arguments in ``which`` and of its result."""

    def derivative(self, call: Call, points: Sequence[Array]) -> Call:
        """``call``'s derivative at ``points``, a function of tangents of their shapes."""


class Propagation:
    """The joint law of everything alive, and the rules that extend it.

    error: the largest error that an integral may have had so far, in units of the largest standard deviation in it.
    """

    def __init__(self, library: Library, settings: Quadrature = QUADRATURE) -> None:
        self.library, self.settings, self.joint = library, settings, Joint()
        self.s = library.special
        self.xp = self.s.xp
        self.error = 0.0
        self._margins: weakref.WeakKeyDictionary[Gaussian, dict[Any, weakref.ref[Gaussian]]]
        self._margins = weakref.WeakKeyDictionary()

    # Values and their moments

    def random(self, source: Gaussian, shape: Sequence[int]) -> Random:
        return Random(leaf(source, tuple(shape)))

    def gaussian(self, value: Random) -> Gaussian:
        """The value as a vector of the joint law; from now on the value stands for that vector."""
        expression = value.expression
        if expression.call is not None:
            found = self._scaled(expression) if expression.affine else self._expanded(expression)
            value.expression = expression = leaf(found, expression.shape)
        return expression.source

    def mean(self, value: Random) -> Array:
        return self.gaussian(value).mean.reshape(value.shape)

    def affine(
        self,
        call: Call,
        *operands: Random,
        native: bool = True,
        nonnegative: bool = False,
        tangent: Call | None = None,
        shift: Array | None = None,
        extra: Array | None = None,
    ) -> Random:
        """An operation that is affine in all its operands together.

        native: whether ``call`` is an operation of the user's, on arrays of the operands' shapes; else it is written in
        ``xp`` and takes arrays with a further first axis, too. tangent: what acts on deviations, where it is not
        ``call`` itself. shift: added to the mean, of the result's shape. extra ``(n, n)``: added to the result's own
        covariance.
        """
        sources = [self.gaussian(o) for o in operands]
        points = [g.mean.reshape(o.shape) for g, o in zip(sources, operands, strict=True)]
        single = tangent or call
        if native:
            mean = self.library.value(call(*points))
            many = self.library.batched(single, [True] * len(operands))
        else:
            mean, many = call(*(x[None] for x in points))[0], single
        shape = tuple(mean.shape)
        others = self.joint.alive()
        between = self.joint.between
        act = self._linear_part(many, [o.shape for o in operands], sources[0].mean)
        acted = act([_stacked(self.xp, [between(v, g) for v in others]) for g in sources])
        blocks, start = {}, 0
        for v in others:
            blocks[v] = acted[start : start + v.size].T
            start += v.size
        cov = act([blocks[g] for g in sources])
        if extra is not None:
            cov = cov + extra
        if shift is not None:
            mean = mean + shift
        return self.random(self.joint.add(mean.reshape(-1), cov, blocks, positive=nonnegative), shape)

    def elementwise(
        self,
        call: Call,
        *args: Any,
        native: bool = True,
        bends: Sequence[tuple[Any, Any]] = (),
        affine: bool = False,
        nonnegative: bool = False,
        log: Callable[..., Random | None] | None = None,
    ) -> Random:
        """A function applied entry by entry to arguments that share one source, or are constants.

        native: as for `affine`. bends: pairs of an argument and a value, or of two arguments: where they are equal the
        function may bend or jump. affine: whether it is affine in the source if all its random arguments are. log:
        gives, from the same arguments, a value whose exponential the result is, or None.
        """
        randoms = [a for a in args if isinstance(a, Random)]
        shape = self._spread(*args)
        if native:
            call = self.library.batched(call, [isinstance(a, Random) for a in args])
        if not affine:
            for r in randoms:
                self.positive(r)
        if len({id(r.expression.source) for r in randoms}) != 1:
            raise ValueError("its arguments are functions of different random values")
        parts = [r.expression for r in randoms]
        breaks = [b for part in parts for b in part.breaks]
        for left, right in bends:
            breaks += self._crossings(left, right, parts[0].source, shape)
        logarithm = log(*args) if log is not None else None
        return Random(
            Expression(
                source=parts[0].source,
                shape=shape,
                call=call,
                args=tuple(a.expression if isinstance(a, Random) else a for a in args),
                breaks=tuple(_distinct(self.s, breaks)),
                affine=affine and all(part.affine for part in parts),
                nonnegative=nonnegative,
                log=None if logarithm is None else logarithm.expression,
            )
        )

    def reshaped(self, value: Random, shape: tuple[int, ...]) -> Random:
        """The same entries in another shape."""
        old = value.expression
        if old.shape == shape:
            return value
        if old.call is None:
            return Random(leaf(old.source, shape))
        log = None if old.log is None else self.reshaped(Random(old.log), shape).expression
        return Random(replace(old, shape=shape, call=lambda x: x.reshape((x.shape[0], *shape)), args=(old,), log=log))

    def positive(self, value: Random, *, surely: bool = False) -> Random:
        """A value that is ≥ 0 and a Gaussian for now becomes the exponential of one: same mean, same covariances.

        surely: what is done with it has no meaning below 0, so that a value which is affine in a Gaussian and at least
        two standard deviations above 0 is taken to be positive.
        """
        expression = value.expression
        if surely and expression.affine and not expression.nonnegative:
            source = self.gaussian(value)
            mean, std = self.s.stop_gradient(source.mean), self.s.stop_gradient(self._std(source))
            if bool(self.xp.all((mean > 2.0 * std) & (mean > 0))):
                value.expression = expression = replace(value.expression, nonnegative=True)
        if expression.affine and expression.nonnegative:
            self.gaussian(value)
            expression = value.expression
            logarithm = self._logarithm(expression.source)
            if logarithm is not None:
                inner = leaf(logarithm, expression.shape)
                value.expression = Expression(
                    logarithm, expression.shape, self.xp.exp, (inner,), nonnegative=True, log=inner
                )
        return value

    def shared(self, *args: Any) -> bool:
        """Whether the random ones among the arguments are functions of one source, of the same size."""
        randoms = [a for a in args if isinstance(a, Random)]
        sizes = {math.prod(r.shape) for r in randoms} | {math.prod(self._shape(args))}
        return len({id(r.expression.source) for r in randoms}) == 1 and (len(sizes) == 1 or len(randoms) == 1)

    # Arithmetic

    def add(self, a: Any, b: Any) -> Any:
        def call(x: Array, y: Array) -> Array:
            return x + y

        if not _any_random(a, b):
            return call(a, b)
        nonnegative = self._nonnegative(a) and self._nonnegative(b)
        if self.shared(a, b):
            affine = not (nonnegative and self._carried(a, b))
            return self.elementwise(call, a, b, native=False, affine=affine, nonnegative=nonnegative)
        self._spread(a, b)
        return self.affine(call, a, b, native=False, nonnegative=nonnegative)

    def subtract(self, a: Any, b: Any, call: Call | None = None) -> Any:
        call = call or (lambda x, y: x - y)
        if not _any_random(a, b):
            return call(a, b)
        if self.shared(a, b):
            return self.elementwise(call, a, b, native=False, affine=True)
        self._spread(a, b)
        found = self.affine(call, a, b, native=False)
        found.expression.source.difference = self._nonnegative(a) and self._nonnegative(b)
        return found

    def multiply(self, a: Any, b: Any) -> Any:
        """a · b, entry by entry."""
        if not _any_random(a, b):
            return a * b

        def product(x: Array, y: Array) -> Array:
            return x * y

        nonnegative = self._nonnegative(a) and self._nonnegative(b)
        if self.shared(a, b):
            both = isinstance(a, Random) and isinstance(b, Random)
            square = both and a.expression is b.expression
            nonnegative = nonnegative or square
            log = self._log_of_product
            return self.elementwise(product, a, b, native=False, affine=not both, nonnegative=nonnegative, log=log)
        logarithm = self._log_of_product(a, b)
        if logarithm is not None:
            return self.exp(logarithm)
        shape = self._spread(a, b)
        left, right = self.gaussian(a), self.gaussian(b)
        cross = self.joint.between(left, right)
        return self.affine(
            product,
            a,
            b,
            native=False,
            tangent=self._product_rule(product, a, b),
            shift=self.xp.linalg.diagonal(cross).reshape(shape),
            extra=left.cov * right.cov + cross * cross.T,
            nonnegative=nonnegative,
        )

    def divide(self, a: Any, b: Any) -> Any:
        if not isinstance(b, Random):
            return self.scaled(a, lambda x: x / b, b)
        if self.shared(a, b):
            nonnegative = self._nonnegative(a) and self._nonnegative(b)

            def log(a: Any, b: Any) -> Random | None:
                return self._log_of_product(a, b, -1.0)

            return self.elementwise(lambda x, y: x / y, a, b, native=False, nonnegative=nonnegative, log=log)
        return self.multiply(a, self.power(b, -1.0))

    def scaled(self, a: Random, call: Call, by: Any) -> Random:
        """a · constant or a / constant, by ``call`` in ``xp``."""
        self._spread(a, by)
        nonnegative = self._nonnegative(a) and self._nonnegative(by)
        log = None
        if a.expression.log is not None and self._nonnegative(by, strictly=True):
            log = self._plus_log_of(Random(a.expression.log), call)
        found = self.elementwise(call, a, native=False, affine=True, nonnegative=nonnegative)
        if log is not None:
            found.expression = replace(found.expression, log=log.expression)
        return found

    def power(self, a: Random, exponent: float, call: Call | None = None) -> Random:
        """a to a constant power; ``call`` computes it, an operation of the user's."""
        even = float(exponent).is_integer() and int(exponent) % 2 == 0
        self.positive(a, surely=exponent < 0 or not float(exponent).is_integer())
        log = a.expression.log
        if log is not None:
            return self.exp(self.elementwise(lambda x: x * exponent, Random(log), native=False, affine=True))
        nonnegative = even or self._nonnegative(a)
        native = call is not None
        return self.elementwise(call or (lambda x: x**exponent), a, native=native, nonnegative=nonnegative)

    def exp(self, a: Random) -> Random:
        def log(a: Random) -> Random | None:
            return a if a.expression.affine else None

        return self.elementwise(self.xp.exp, a, native=False, nonnegative=True, log=log)

    def log(self, a: Random, call: Call | None = None) -> Random:
        """log a; ``call`` computes it, an operation of the user's."""
        self.positive(a, surely=True)
        if a.expression.log is not None:
            return Random(a.expression.log)
        return self.elementwise(call or self.xp.log, a, native=call is not None)

    def maximum(self, a: Any, b: Any, sign: float = 1.0) -> Any:
        """max(a, b); sign −1: min(a, b).

        max(mean x² − (mean x)², 0) is that difference itself, which rounding alone can make negative.
        """
        if sign > 0:
            for value, other in ((a, b), (b, a)):
                known = isinstance(value, Random) and not isinstance(other, Random)
                if (
                    known
                    and self._is_variance(value)
                    and not np.any(np.asarray(self.s.stop_gradient(self.s.array(other, self._like(value)))))
                ):
                    self._spread(value, other)
                    value.expression = replace(value.expression, nonnegative=True)
                    return value
        if self.shared(a, b):
            nonnegative = sign > 0 and (self._nonnegative(a) or self._nonnegative(b))
            call = self.xp.maximum if sign > 0 else self.xp.minimum
            if any(not isinstance(x, Random) and not hasattr(x, "shape") for x in (a, b)):
                a, b = (x if isinstance(x, Random) else self.s.array(x, self._like(a, b)) for x in (a, b))
            return self.elementwise(call, a, b, native=False, bends=[(a, b)], nonnegative=nonnegative)
        a, b = (a, b) if isinstance(a, Random) else (b, a)
        beyond = self.subtract(b, a)

        def excess(d: Array) -> Array:
            return sign * self.s.clip(sign * d, 0.0, None)

        return self.add(a, self.elementwise(excess, beyond, native=False, bends=[(beyond, 0.0)]))

    def indicator(self, value: Any) -> Any:
        """1 where a truth value holds, else 0."""
        if not isinstance(value, Random):
            return self.xp.where(value, 1.0, 0.0)
        one = self.s.array(1.0, self._like(value))
        return self.elementwise(lambda x: self.xp.where(x, one, 0.0 * one), value, native=False, nonnegative=True)

    def both(self, a: Any, b: Any) -> Any:
        """a and b, as 1 or 0: truth values or their indicators."""
        return self.multiply(self._indicated(a), self._indicated(b))

    def either(self, a: Any, b: Any) -> Any:
        """a or b, as 1 or 0."""
        a, b = self._indicated(a), self._indicated(b)
        return self.subtract(self.add(a, b), self.multiply(a, b))

    def _indicated(self, value: Any) -> Any:
        if isinstance(value, Random):
            middle = evaluate(value.expression, self.s.stop_gradient(self._like(value))[None])
            return self.indicator(value) if "bool" in str(middle.dtype) else value
        return self.indicator(value) if "bool" in str(getattr(value, "dtype", "bool")) else value

    def select(self, which: Any, yes: Any, no: Any) -> Any:
        """``yes`` where ``which``, else ``no``."""
        call = self.xp.where
        if not _any_random(which, yes, no):
            return call(which, yes, no)
        nonnegative = self._nonnegative(yes) and self._nonnegative(no)
        known = not isinstance(which, Random)
        if known and bool(self.xp.all(which) | self.xp.all(~which)):
            chosen = yes if bool(self.xp.all(which)) else no
            shape = self._shape((which, yes, no))
            if isinstance(chosen, Random):
                self._spread(chosen, which, yes, no)
                return chosen
            return self.xp.broadcast_to(self.s.array(chosen, self._like(yes, no)), shape)
        if self.shared(which, yes, no):
            return self.elementwise(call, which, yes, no, native=False, affine=known, nonnegative=nonnegative)
        if known:
            self._spread(yes, no, which)
            return self.affine(lambda x, y: call(which, x, y), yes, no, native=False, nonnegative=nonnegative)
        chosen = self._indicated(which)
        return self.add(no, self.multiply(chosen, self.subtract(yes, no)))

    def matmul(self, a: Random, b: Random) -> Random:
        """a ``(B, I, K)`` times b ``(B, K, J)``, both random."""
        (batch, rows, inner), columns = a.shape, b.shape[2]
        left, right = self.gaussian(a), self.gaussian(b)
        first, second = (batch, rows, inner), (batch, inner, columns)
        ll = left.cov.reshape(first + first)
        rr = right.cov.reshape(second + second)
        lr = self.joint.between(left, right).reshape(first + second)
        xp, size = self.xp, batch * rows * columns
        # Σ_kl of Cov(x_aik, x_bjl) Cov(y_akm, y_bln) + Cov(x_aik, y_bln) Cov(y_akm, x_bjl), as matrix products.
        same = _paired(xp, ll, (0, 3, 1, 4, 2, 5)) @ _paired(xp, rr, (0, 3, 1, 4, 2, 5))
        crossed = _paired(xp, lr, (0, 3, 1, 5, 2, 4)) @ _paired(xp, lr, (3, 0, 4, 2, 5, 1))
        same = same.reshape((batch, batch, rows, rows, columns, columns))
        crossed = crossed.reshape((batch, batch, rows, columns, columns, rows))
        extra = xp.permute_dims(same, (0, 2, 4, 1, 3, 5)) + xp.permute_dims(crossed, (0, 2, 4, 1, 5, 3))

        def product(x: Array, y: Array) -> Array:
            return x @ y

        return self.affine(
            product,
            a,
            b,
            native=False,
            tangent=self._product_rule(product, a, b),
            shift=_contracted(xp, lr),
            extra=extra.reshape((size, size)),
        )

    # Along an axis

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

    def max(self, a: Random, axes: Sequence[int], keepdims: bool, sign: float = 1.0) -> Random:
        """The largest (sign −1: smallest) entry along ``axes``."""
        if self._increasing(a):
            return self._applied(a, self.max(self.random(a.expression.source, a.shape), axes, keepdims, sign))
        flat, restore = self.rows(a, axes)
        found = self._tournament(self._floored(flat, sign), lambda x, y: self.maximum(x, y, sign=sign))
        return restore(found, keepdims)

    def pooled(
        self, a: Random, sizes: Sequence[int], strides: Sequence[int], dilations: Sequence[int], sign: float = 1.0
    ) -> Random:
        """The largest (sign −1: smallest) entry of each window, over the last ``len(sizes)`` axes."""
        if self._increasing(a):
            source = self.random(a.expression.source, a.shape)
            return self._applied(a, self.pooled(source, sizes, strides, dilations, sign))
        settings = list(zip(a.shape[len(a.shape) - len(sizes) :], sizes, strides, dilations, strict=True))
        counts = [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in settings]
        windows = []
        for offsets in itertools.product(*(range(k) for k in sizes)):
            part = tuple(
                slice(o * d, o * d + s * (count - 1) + 1, s)
                for o, (_, _, s, d), count in zip(offsets, settings, counts, strict=True)
            )
            windows.append(self.affine(lambda x, part=part: x[(..., *part)], a, native=False))
        while len(windows) > 1:
            played = [self.maximum(*pair, sign=sign) for pair in zip(windows[::2], windows[1::2], strict=False)]
            windows = played + windows[2 * len(played) :]
        return windows[0]

    def logsumexp(self, a: Random, axes: Sequence[int], keepdims: bool) -> Random:
        flat, restore = self.rows(a, axes)
        return restore(self._tournament(self._floored(flat), self.logaddexp), keepdims)

    def logaddexp(self, a: Any, b: Any) -> Any:
        if self.shared(a, b):
            return self.elementwise(self.xp.logaddexp, a, b, native=False)
        a, b = (a, b) if isinstance(a, Random) else (b, a)
        beyond = self.subtract(b, a)
        return self.add(a, self.elementwise(self._softplus, beyond, native=False, nonnegative=True))

    def softmax(self, a: Random, axis: int, *, log: bool = False) -> Random:
        """σ(x_i − log Σ_{j≠i} exp x_j), or with ``log`` its logarithm."""
        margin = self._margin(a, axis)
        if log:
            return self.elementwise(lambda d: -self._softplus(-d), margin, native=False)
        return self.elementwise(lambda d: self.xp.exp(-self._softplus(-d)), margin, native=False, nonnegative=True)

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
        source = self.gaussian(flat)
        rows, size = flat.shape
        m = source.mean.reshape((rows, size))
        cov = source.cov.reshape((rows, size, rows, size))
        S = xp.permute_dims(xp.linalg.diagonal(xp.permute_dims(cov, (1, 3, 0, 2))), (2, 0, 1))
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
        within = s.array(np.eye(rows), m)[:, None, :, None] * rest[:, :, None, :]

        def moved(x: Array) -> Array:
            return xp.permute_dims(xp.permute_dims(x, (1, 0, 2)) @ back, (1, 0, 2))

        found = self.affine(
            lambda x: mean[None] + 0.0 * x,
            flat,
            native=False,
            tangent=moved,
            extra=within.reshape((rows * size, rows * size)),
        )
        return restore(found)

    # What these are made of

    def _softplus(self, x: Array) -> Array:
        return self.xp.logaddexp(x, 0.0 * x)

    def _margin(self, a: Random, axis: int) -> Random:
        """x_i − log Σ_{j≠i} exp x_j; the sums over all but one from a binary tree, two merges a level.

        Softmax and its logarithm of the same values are functions of the same margin.
        """
        source, axis = self.gaussian(a), axis % len(a.shape)
        known = self._margins.setdefault(source, {})
        kept = known.get((a.shape, axis), lambda: None)()
        if kept is not None:
            return self.random(kept, a.shape)
        flat, restore = self.rows(a, (axis,))
        size = flat.shape[1]
        if size == 1:
            return self.elementwise(lambda x: 0.0 * x + 1e3, a, native=False, affine=True)
        levels = [self._floored(flat, multiple=2 ** (size - 1).bit_length())]
        while levels[-1].shape[1] > 2:
            even, odd = (self.affine(lambda x, i=i: x[..., i::2], levels[-1], native=False) for i in (0, 1))
            levels.append(self.logaddexp(even, odd))
        rest = None
        for level in reversed(levels):
            siblings = self.affine(self._swapped_pairs, level, native=False)
            if rest is not None:
                rest = self.logaddexp(self.affine(self._twice, rest, native=False), siblings)
            else:
                rest = siblings
        margin = self.subtract(levels[0], rest)
        margin = restore(self.affine(lambda x: x[..., :size], margin, native=False))
        known[a.shape, axis] = weakref.ref(self.gaussian(margin))
        return margin

    def _swapped_pairs(self, x: Array) -> Array:
        return self.xp.flip(x.reshape((*x.shape[:-1], x.shape[-1] // 2, 2)), axis=-1).reshape(x.shape)

    def _twice(self, x: Array) -> Array:
        return self.xp.stack([x, x], axis=-1).reshape((*x.shape[:-1], 2 * x.shape[-1]))

    def _variance(self, source: Gaussian) -> Array:
        return self.xp.linalg.diagonal(source.cov)

    def _std(self, source: Gaussian) -> Array:
        """√variance, with the gradient 0 where it is 0."""
        variance = self._variance(source)
        return self.xp.where(variance > 0, self.xp.sqrt(self.xp.where(variance > 0, variance, 1.0)), 0.0)

    def _like(self, *values: Any) -> Array:
        return next(v.expression.source.mean for v in values if isinstance(v, Random))

    def _product_rule(self, product: Call, a: Random, b: Random) -> Call:
        left, right = self.mean(a), self.mean(b)
        return lambda x, y: product(x, right) + product(left, y)

    def _linear_part(self, many: Call, shapes: Sequence[tuple[int, ...]], like: Array) -> Callable[..., Array]:
        """What an affine operation does to deviations, rows ``(N, n)`` of each operand -> ``(N, n of the result)``.

        Scaled up to the constant term before that is taken off: then not even −1e9, as masks have it, costs digits.
        """
        xp, s = self.xp, self.s
        constant = many(*(0.0 * s.stop_gradient(like[:1]) + s.array(np.zeros((1, *shape)), like) for shape in shapes))[
            0
        ]
        finite = xp.isfinite(constant)
        known = xp.where(finite, constant, 0.0)
        largest = float(xp.max(xp.abs(s.stop_gradient(known)))) if math.prod(constant.shape) else 0.0
        scale = 2.0 ** max(math.ceil(math.log2(largest)), 0) if largest > 0 else 1.0
        plain = largest == 0 and bool(xp.all(finite))

        def act(rows: Sequence[Array]) -> Array:
            rows = rows if scale == 1 else [scale * r for r in rows]
            found = many(*(r.reshape((r.shape[0], *shape)) for r, shape in zip(rows, shapes, strict=True)))
            if not plain:
                found = xp.where(finite, found - known, 0.0)
            found = found.reshape((rows[0].shape[0], -1))
            return found if scale == 1 else found / scale

        return act

    def _scaled(self, expression: Expression) -> Gaussian:
        slope, shift = self._line(expression)
        source, between = expression.source, self.joint.between
        blocks = {v: slope[:, None] * between(source, v) for v in self.joint.alive()}
        cov = slope[:, None] * source.cov * slope[None, :]
        mean = self.xp.where(slope == 0, shift, slope * source.mean + shift)
        return self.joint.add(mean, cov, blocks, positive=expression.nonnegative)

    def _expanded(self, expression: Expression) -> Gaussian:
        source, xp = expression.source, self.xp
        std = self._std(source)

        def f(x: Array) -> Array:
            found = evaluate(expression, x).reshape(x.shape)
            return xp.where(found, self.s.array(1.0, x), 0.0 * x) if "bool" in str(found.dtype) else found

        expansion = expand(self.s, f, source.mean, std, expression.breaks, self.settings)
        if expansion.error > self.settings.refused:
            raise ValueError(
                f"its moments did not settle (they moved by {expansion.error:.1g} when the nodes were doubled): it has "
                "a pole or a jump that is not known of"
            )
        self.error = max(self.error, expansion.error)
        slope = xp.where(std > 0, hermite(expansion, 1) / xp.where(std > 0, std, 1.0), 0.0)
        blocks = {}
        for v in self.joint.alive():
            other = None if v.origin is None else v.origin.source()
            if other is None or v.origin is None or v is source:
                blocks[v] = slope[:, None] * self.joint.between(source, v)
            else:
                blocks[v] = self._series(expansion, v.origin.expansion, self.joint.between(source, other))
        cov = self._series(expansion, expansion, source.cov)
        origin = Origin(weakref.ref(source), expansion._replace(function=None, breaks=()))
        return self.joint.add(expansion.mean, cov, blocks, origin=origin, positive=expression.nonnegative)

    def _series(self, left: Expansion, right: Expansion, cov: Array) -> Array:
        xp = self.xp
        scales = [xp.where(side.std > 0, 1 / xp.where(side.std > 0, side.std, 1.0), 0.0) for side in (left, right)]
        correlation = self.s.clip(scales[0][:, None] * cov * scales[1][None, :], -1.0, 1.0)
        if left is not right:
            found, missing = covariance(self.s, left, right, correlation, self.settings)
            self.error = max(self.error, missing)
            return found
        correlation = self.s.with_diagonal(correlation, 0.0)
        found, missing = covariance(self.s, left, left, correlation, self.settings)
        if missing > self.settings.covariance:
            found, done = with_close_pairs(self.s, left, correlation, found, self.settings)
            missing = self.settings.covariance if done else missing
        self.error = max(self.error, missing)
        return self.s.with_diagonal(found, left.variance)

    def _line(self, expression: Expression) -> tuple[Array, Array]:
        """Slope and shift ``(n,)`` of an affine expression."""
        mean = expression.source.mean
        zero, one = (self.s.array(np.full((1, mean.shape[0]), value), mean) for value in (0.0, 1.0))

        def f(x: Array) -> Array:
            return evaluate(expression, x).reshape(x.shape)

        return self._linear_part(f, [tuple(mean.shape)], mean)([one])[0], f(zero)[0]

    def _logarithm(self, source: Gaussian) -> Gaussian | None:
        """ℓ with exp ℓ of the same mean and covariances as ``source``; None where a mean is not above 0."""
        if source.logarithm is None:
            xp, mean = self.xp, source.mean
            if not bool(xp.all(self.s.stop_gradient(mean) > 0)):
                return None
            ratio = source.cov / (mean[:, None] * mean[None, :])
            cov = xp.log1p(self.s.clip(ratio, -0.999, None))
            blocks = {}
            for v in self.joint.alive():
                if v is source:
                    blocks[v] = cov * mean[None, :]
                else:
                    blocks[v] = self.joint.between(source, v) / mean[:, None]
            variance = xp.linalg.diagonal(cov)
            source.logarithm = self.joint.add(xp.log(mean) - variance / 2, cov, blocks)
        return source.logarithm

    def _plus_log_of(self, log: Random, call: Call) -> Random:
        """log + log(call(1)), for a multiplication ``call`` by something positive."""
        shape = log.shape
        one = self.s.array(np.ones(shape), log.expression.source.mean)
        shift = self.xp.log(call(one))
        return self.elementwise(lambda x: x + shift, log, native=False, affine=True)

    def _log_of_product(self, a: Any, b: Any, sign: float = 1.0) -> Random | None:
        """The logarithm of a · b, or of a / b, where both are exponentials or positive constants."""
        if isinstance(a, Random) and isinstance(b, Random):
            la, lb = a.expression.log, b.expression.log
            if la is None or lb is None:
                return None
            both: Random = (self.add if sign > 0 else self.subtract)(Random(la), Random(lb))
            return both
        known, constant = (a, b) if isinstance(a, Random) else (b, a)
        log = known.expression.log
        if log is None or not self._nonnegative(constant, strictly=True):
            return None
        if known is a:
            return self._plus_log_of(Random(log), lambda one: one * constant if sign > 0 else one / constant)
        flipped = self.elementwise(lambda x: sign * x, Random(log), native=False, affine=True)
        return self._plus_log_of(flipped, lambda one: one * constant)

    def _crossings(self, left: Any, right: Any, source: Gaussian, shape: tuple[int, ...]) -> list[Array]:
        """Where ``left`` equals ``right`` (expressions of the source, or constants), in units of the source."""
        xp = self.xp
        lines = []
        for side in (left, right):
            if isinstance(side, Random):
                if not side.expression.affine:
                    return self._searched(left, right, source)
                lines.append(self._line(side.expression))
            else:
                value = xp.broadcast_to(self.s.array(side, source.mean), shape).reshape(-1)
                lines.append((0.0 * source.mean, value))
        (a, b), (c, d) = lines
        slope = a - c
        root = (d - b) / xp.where(slope == 0, 1.0, slope)
        return [xp.where((slope == 0) | ~xp.isfinite(root), source.mean, root)]

    def _searched(self, left: Any, right: Any, source: Gaussian) -> list[Array]:
        """The same by a search: changes of sign on a grid, then bisection, then a Newton step that has a gradient."""
        xp, s = self.xp, self.s
        std = self._std(source)

        def gap(x: Array) -> Array:
            a, b = (evaluate(v.expression, x) if isinstance(v, Random) else v for v in (left, right))
            return (a - b).reshape(x.shape)

        reach, count = self.settings.reach, self.settings.nodes
        grid = s.array(np.linspace(-reach, reach, count + 1), source.mean)[:, None]
        mean, scale = s.stop_gradient(source.mean), s.stop_gradient(std)
        at = mean + scale * grid
        above = np.asarray(s.stop_gradient(gap(at)) > 0)
        changes = above[1:] != above[:-1]
        roots = []
        for order in range(int(changes.sum(0).max(initial=0))):
            here = changes & (np.cumsum(changes, axis=0) == order + 1)
            found, cell = here.any(0), here.argmax(0)
            columns = np.arange(len(cell))
            low, high = at[cell, columns][None], at[cell + 1, columns][None]
            rising = s.array(np.where(above[cell + 1, columns], 1.0, -1.0), mean)
            for _ in range(50):
                middle = (low + high) / 2
                up = rising * gap(middle) > 0
                low, high = xp.where(up, low, middle), xp.where(up, middle, high)
            root = s.stop_gradient((low + high) / 2)
            step = 1e-4 * scale
            slope = s.stop_gradient(gap(root + step) - gap(root - step)) / xp.where(step > 0, 2 * step, 1.0)
            change = gap(root) - s.stop_gradient(gap(root))
            moved = root - xp.where(slope == 0, 0.0, change / xp.where(slope == 0, 1.0, slope))
            roots.append(xp.where(s.array(found * 1.0, mean) > 0, moved[0], source.mean))
        return roots

    def _spread(self, *values: Any) -> tuple[int, ...]:
        """Brings the random ones among the values to the shape that all of them have together, in place."""
        shape = self._shape(values)
        for value in values:
            if not isinstance(value, Random) or value.shape == shape:
                continue
            if math.prod(value.shape) == math.prod(shape):
                value.expression = self.reshaped(value, shape).expression
                continue
            padded = (1,) * (len(shape) - len(value.shape)) + value.shape

            def wide(x: Array, padded: tuple[int, ...] = padded) -> Array:
                return self.xp.broadcast_to(x.reshape((x.shape[0], *padded)), (x.shape[0], *shape))

            nonnegative = value.expression.nonnegative
            value.expression = self.affine(wide, value, native=False, nonnegative=nonnegative).expression
        return shape

    def _shape(self, values: Sequence[Any]) -> tuple[int, ...]:
        return tuple(np.broadcast_shapes(*(tuple(getattr(v, "shape", ())) for v in values)))

    def _nonnegative(self, value: Any, *, strictly: bool = False) -> bool:
        if isinstance(value, Random):
            return value.expression.nonnegative
        if hasattr(value, "dtype"):
            value = self.s.stop_gradient(value)
        found = value > 0 if strictly else value >= 0
        return bool(self.xp.all(found)) if hasattr(found, "dtype") else bool(found)

    def _is_variance(self, value: Random) -> bool:
        """A difference of two values ≥ 0 that is, by its moments, seldom negative."""
        expression = value.expression
        if expression.call is not None or not expression.source.difference:
            return False
        mean, std = expression.source.mean, self._std(expression.source)
        return bool(self.xp.all(self.s.stop_gradient(mean > std)))

    def _increasing(self, value: Random) -> bool:
        """Whether it is one and the same function that nowhere falls, of every entry: then the largest value of it is
        its value at the largest entry, whose law is nearer to a Gaussian's. It is looked at within reach.
        """
        expression = value.expression
        if expression.affine:
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

    def _carried(self, *args: Any) -> bool:
        """Whether one of them is a Gaussian that stands for something ≥ 0: it is the time to take its logarithm."""
        return any(isinstance(a, Random) and a.expression.affine and a.expression.nonnegative for a in args)

    def _floored(self, flat: Random, sign: float = 1.0, multiple: int = 1) -> Random:
        """``(R, K)`` with entries that cannot matter (−∞, or a mask's −1e9) brought near, filled up to ``multiple``."""
        source, xp = self.gaussian(flat), self.xp
        rows, columns = flat.shape
        mean = sign * source.mean.reshape(flat.shape)
        largest = xp.max(self.s.stop_gradient(mean), axis=1, keepdims=True)
        spread = float(xp.max(self.s.stop_gradient(self._std(source))))
        floor = largest - 200.0 - 40.0 * spread
        if bool(xp.any(mean < floor)):
            blocks = {v: self.joint.between(source, v) for v in self.joint.alive()}
            lowered = sign * xp.where(mean < floor, floor, mean)
            flat = self.random(self.joint.add(lowered.reshape(-1), source.cov, blocks), flat.shape)
        if columns < multiple:
            filling = xp.broadcast_to(sign * floor, (rows, multiple - columns))

            def filled(x: Array) -> Array:
                return xp.concat([x, xp.broadcast_to(filling, (x.shape[0], *filling.shape))], axis=-1)

            flat = self.affine(filled, flat, native=False)
        return flat

    def _tournament(self, flat: Random, play: Callable[[Random, Random], Random]) -> Random:
        while (size := flat.shape[1]) > 1:
            half = size // 2
            left, right, rest = (
                self.affine(lambda x, i=i, j=j: x[..., i:j], flat, native=False) if i < j else None
                for i, j in ((0, half), (half, 2 * half), (2 * half, size))
            )
            flat = play(left, right)  # type: ignore[arg-type]
            if rest is not None:
                flat = self.affine(lambda x, y: self.xp.concat([x, y], axis=-1), flat, rest, native=False)
        return flat


def _paired(xp: Any, block: Array, order: tuple[int, ...]) -> Array:
    """A tensor of six axes as matrices ``(2, 2)``: two axes in front, two of rows, two of columns."""
    block = xp.permute_dims(block, order)
    a, b, i, j, k, m = block.shape
    return block.reshape((a, b, i * j, k * m))


def _contracted(xp: Any, block: Array) -> Array:
    """Σ_k Cov(x_aik, y_akm)."""
    diagonal = xp.linalg.diagonal(xp.permute_dims(block, (1, 2, 4, 5, 0, 3)))  # i k k m a
    diagonal = xp.linalg.diagonal(xp.permute_dims(diagonal, (0, 3, 4, 1, 2)))  # i m a k
    return xp.permute_dims(xp.sum(diagonal, axis=-1), (2, 0, 1))


def _stacked(xp: Any, blocks: Sequence[Array]) -> Array:
    return blocks[0] if len(blocks) == 1 else xp.concat(blocks)


def _any_random(*values: Any) -> bool:
    return any(isinstance(value, Random) for value in values)


def _distinct(s: Any, breaks: Sequence[Array]) -> list[Array]:
    kept: list[Array] = []
    for b in breaks:
        value = s.stop_gradient(b)
        if not any(bool(s.xp.all(value == s.stop_gradient(k))) for k in kept):
            kept.append(b)
    return kept
