"""The rules of moment propagation, once for both libraries: what an operation does to a joint Gaussian law.

An *affine* operation acts on deviations by its derivative, which is the operation itself. A function applied *entry by
entry* is kept as an expression and meets `hermite` when its covariance is needed. A *bilinear* one (products, matrix
products) is its linear part about the means and a remainder of second order, whose covariance is Isserlis'. Everything
else is composed of these: max(a, b) = a + max(b − a, 0) (Clark 1961), log Σ exp pairwise with softplus in its place,
softmax_i = σ(x_i − log Σ_{j≠i} exp x_j), layer normalisation. A sum of squares or exponentials is carried by its
logarithm once a function of it is taken (Fenton 1960): it cannot be negative, and a Gaussian can.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from probest.moments.gaussian import Gaussian, Joint, Origin
from probest.moments.hermite import QUADRATURE, Expansion, Quadrature, covariance, expand, hermite
from probest.moments.pointwise import Expression, Random, evaluate, leaf

__all__ = ["Library", "Propagation"]

Array = Any
Call = Callable[..., Array]


class Library(Protocol):
    """What the rules need of an array library."""

    @property
    def special(self) -> Any:
        """Special functions and the array namespace ``special.xp``."""

    def vmap(self, fn: Call) -> Call:
        """``fn`` along a new first axis of its arguments."""

    def derivative(self, fn: Call, points: Sequence[Array]) -> Call:
        """``fn``'s derivative at ``points``, a function of tangents of their shapes."""

    def broadcast(self, x: Array, shape: tuple[int, ...]) -> Array: ...

    def is_array(self, value: Any) -> bool: ...


class Propagation:
    """The joint law of everything alive, and the rules that extend it."""

    def __init__(self, library: Library, settings: Quadrature = QUADRATURE) -> None:
        self.library, self.settings, self.joint = library, settings, Joint()
        self.s = library.special
        self.xp = self.s.xp

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
        nonnegative: bool = False,
        tangent: Call | None = None,
        shift: Array | None = None,
        extra: Array | None = None,
    ) -> Random:
        """An operation that is affine in all its operands together.

        tangent: what acts on deviations, where it is not ``call`` itself. shift: added to the mean, of the result's
        shape. extra ``(n, n)``: added to the result's own covariance.
        """
        sources = [self.gaussian(o) for o in operands]
        points = [g.mean.reshape(o.shape) for g, o in zip(sources, operands, strict=True)]
        mean = call(*points)
        shape = tuple(mean.shape)
        others = self.joint.alive()
        between = self.joint.between

        act = self._linear_part(tangent or call, [o.shape for o in operands], sources[0].mean)

        acted = act([self.xp.concat([between(v, g) for v in others]) for g in sources])
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
        bends: Sequence[tuple[Any, Any]] = (),
        affine: bool = False,
        nonnegative: bool = False,
        log: Callable[..., Random | None] | None = None,
    ) -> Random:
        """A function applied entry by entry to arguments that share one source, or are constants.

        bends: pairs of an argument and a value, or of two arguments: where they are equal the function may bend or
        jump. affine: whether it is affine in the source if all its random arguments are. log: gives, from the same
        arguments, a value whose exponential the result is, or None.
        """
        shape = self._shape(args)
        randoms = [a for a in args if isinstance(a, Random)]
        for r in randoms:
            self._spread(r, shape)
        if not affine:
            for r in randoms:
                self.positive(r)
        if len({id(r.expression.source) for r in randoms}) != 1:
            raise ValueError("these arguments are functions of different random values")
        inner = tuple(a.expression if isinstance(a, Random) else a for a in args)
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
                args=inner,
                breaks=tuple(_distinct(self.s, breaks)),
                affine=affine and all(part.affine for part in parts),
                nonnegative=nonnegative,
                log=None if logarithm is None else logarithm.expression,
            )
        )

    def positive(self, value: Random, *, surely: bool = False) -> Random:
        """A value that is ≥ 0 and a Gaussian for now becomes the exponential of one: same mean, same covariances.

        surely: what is done with it has no meaning below 0, so that a value which is affine in a Gaussian and at least
        two standard deviations above 0 is taken to be positive.
        """
        expression = value.expression
        if surely and expression.affine and not expression.nonnegative:
            source = self.gaussian(value)
            mean, std = self.s.stop_gradient(source.mean), self.s.stop_gradient(_root(self.xp, self._variance(source)))
            if bool(self.xp.all((mean > 2.0 * std) & (mean > 0))):
                value.expression = expression = replace(value.expression, nonnegative=True)
        if expression.call is None and expression.nonnegative:
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
        sizes = {int(np.prod(r.shape)) for r in randoms} | {int(np.prod(self._shape(args)))}
        return len({id(r.expression.source) for r in randoms}) == 1 and (len(sizes) == 1 or len(randoms) == 1)

    # Arithmetic

    def add(self, a: Any, b: Any, call: Call | None = None) -> Any:
        call = call or (lambda x, y: x + y)
        if not _any_random(a, b):
            return call(a, b)
        nonnegative = self._nonnegative(a) and self._nonnegative(b)
        if self.shared(a, b):
            return self.elementwise(
                call, a, b, affine=not (nonnegative and self._carried(a, b)), nonnegative=nonnegative
            )
        return self.affine(call, a, b, nonnegative=nonnegative)

    def subtract(self, a: Any, b: Any, call: Call | None = None) -> Any:
        call = call or (lambda x, y: x - y)
        if not _any_random(a, b):
            return call(a, b)
        return self.elementwise(call, a, b, affine=True) if self.shared(a, b) else self.affine(call, a, b)

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
            return self.elementwise(
                product, a, b, affine=not both, nonnegative=nonnegative or square, log=self._log_of_product
            )
        log = self._log_of_product(a, b)
        if log is not None:
            return self.exp(log)
        shape = self._shape((a, b))
        self._spread(a, shape)
        self._spread(b, shape)
        left, right = self.gaussian(a), self.gaussian(b)
        cross = self.joint.between(left, right)
        extra = left.cov * right.cov + cross * cross.T
        shift = self.xp.linalg.diagonal(cross).reshape(shape)
        tangent = self._product_rule(product, a, b)
        return self.affine(product, a, b, tangent=tangent, shift=shift, extra=extra, nonnegative=nonnegative)

    def divide(self, a: Any, b: Any) -> Any:
        if not isinstance(b, Random):
            return self.scaled(a, lambda x: x / b, b)
        if self.shared(a, b):
            nonnegative = self._nonnegative(a) and self._nonnegative(b)
            return self.elementwise(
                lambda x, y: x / y, a, b, nonnegative=nonnegative, log=lambda a, b: self._log_of_product(a, b, -1.0)
            )
        return self.multiply(a, self.power(b, -1.0))

    def scaled(self, a: Random, call: Call, by: Any) -> Random:
        """a · constant or a / constant."""
        if not self.shared(a, by):
            return self.affine(call, a, nonnegative=self._nonnegative(a) and self._nonnegative(by))
        log = None
        if a.expression.log is not None and self._nonnegative(by, strictly=True):
            log = self._plus_log_of(Random(a.expression.log), call)
        return self.elementwise(
            call,
            a,
            affine=True,
            nonnegative=self._nonnegative(a) and self._nonnegative(by),
            log=(lambda _: log) if log is not None else None,
        )

    def power(self, a: Random, exponent: float, call: Call | None = None) -> Random:
        """a to a constant power."""
        even = float(exponent).is_integer() and int(exponent) % 2 == 0
        self.positive(a, surely=exponent < 0 or not float(exponent).is_integer())
        log = a.expression.log
        call = call or (lambda x: x**exponent)
        if log is not None:
            by = Random(log)
            return self.exp(self.elementwise(lambda x: x * exponent, by, affine=True))
        return self.elementwise(call, a, nonnegative=even or self._nonnegative(a))

    def exp(self, a: Random) -> Random:
        return self.elementwise(self.xp.exp, a, nonnegative=True, log=lambda a: a if a.expression.affine else None)

    def log(self, a: Random, call: Call | None = None) -> Random:
        self.positive(a, surely=True)
        if a.expression.log is not None:
            return Random(a.expression.log)
        return self.elementwise(call or self.xp.log, a)

    def maximum(self, a: Any, b: Any, call: Call | None = None, sign: float = 1.0) -> Any:
        """max(a, b); sign −1: min(a, b)."""
        if self.shared(a, b):
            call = call or (self.xp.maximum if sign > 0 else self.xp.minimum)
            nonnegative = self._nonnegative(a) or self._nonnegative(b) if sign > 0 else False
            return self.elementwise(call, a, b, bends=[(a, b)], nonnegative=nonnegative)
        a, b = (a, b) if isinstance(a, Random) else (b, a)
        beyond = self.subtract(b, a)
        return self.add(
            a, self.elementwise(lambda d: sign * self.s.clip(sign * d, 0.0, None), beyond, bends=[(beyond, 0.0)])
        )

    def select(self, which: Any, yes: Any, no: Any, call: Call | None = None) -> Any:
        """``yes`` where ``which``, else ``no``."""
        call = call or self.xp.where
        if not isinstance(which, Random):
            if not _any_random(yes, no):
                return call(which, yes, no)
            nonnegative = self._nonnegative(yes) and self._nonnegative(no)
            if self.shared(which, yes, no):
                return self.elementwise(call, which, yes, no, affine=True, nonnegative=nonnegative)
            randoms = [a for a in (yes, no) if isinstance(a, Random)]
            return self.affine(lambda *x: call(which, *_filled((yes, no), x)), *randoms, nonnegative=nonnegative)
        if self.shared(which, yes, no):
            return self.elementwise(call, which, yes, no, nonnegative=self._nonnegative(yes) and self._nonnegative(no))
        chosen = self.elementwise(lambda p: self.xp.where(p, 1.0, 0.0), which, nonnegative=True)
        return self.add(no, self.multiply(chosen, self.subtract(yes, no)))

    def matmul(self, a: Random, b: Random) -> Random:
        """a ``(B, I, K)`` times b ``(B, K, J)``, both random."""
        (batch, rows, inner), columns = a.shape, b.shape[2]
        left, right = self.gaussian(a), self.gaussian(b)
        first, second = (batch, rows, inner), (batch, inner, columns)
        ll = left.cov.reshape(first + first)
        rr = right.cov.reshape(second + second)
        lr = self.joint.between(left, right).reshape(first + second)
        einsum = self.xp.einsum
        extra = einsum("aikbjl,akmbln->aimbjn", ll, rr)
        extra = extra + einsum("aikbln,akmbjl->aimbjn", lr, _swapped(self.xp, lr))
        size = batch * rows * columns
        shift = einsum("aikakm->aim", lr)
        product: Call = lambda x, y: x @ y  # noqa: E731
        tangent = self._product_rule(product, a, b)
        return self.affine(product, a, b, tangent=tangent, shift=shift, extra=extra.reshape((size, size)))

    # Along an axis

    def sum(self, a: Random, call: Call) -> Random:
        """A sum or mean over some axes, ``call``."""
        return self.affine(call, a, nonnegative=self._nonnegative(a))

    def rows(self, a: Random, axes: Sequence[int]) -> tuple[Random, Callable[[Random, bool], Random]]:
        """a with ``axes`` last and flattened into one, ``(R, K)``, and what puts ``(R, 1)`` or ``(R, K)`` back."""
        rank = len(a.shape)
        axes = sorted(axis % rank for axis in axes)
        kept = [axis for axis in range(rank) if axis not in axes]
        order = kept + axes
        outer, inner = [a.shape[i] for i in kept], [a.shape[i] for i in axes]
        size = int(np.prod(inner))
        flat = self.affine(lambda x: self.xp.permute_dims(x, tuple(order)).reshape((-1, size)), a)
        ones = [1 if axis in axes else a.shape[axis] for axis in range(rank)]
        back = tuple(int(i) for i in np.argsort(order))

        def restore(value: Random, keepdims: bool = True) -> Random:
            if value.shape[1] == 1:
                target = tuple(ones) if keepdims else tuple(outer)
                return self.affine(lambda x: x.reshape(target), value)
            return self.affine(lambda x: self.xp.permute_dims(x.reshape((*outer, *inner)), back), value)

        return flat, restore

    def max(self, a: Random, axes: Sequence[int], keepdims: bool, sign: float = 1.0) -> Random:
        """The largest (sign −1: smallest) entry along ``axes``."""
        flat, restore = self.rows(a, axes)
        return restore(
            self._tournament(self._floored(flat, sign), lambda x, y: self.maximum(x, y, sign=sign)), keepdims
        )

    def logsumexp(self, a: Random, axes: Sequence[int], keepdims: bool) -> Random:
        flat, restore = self.rows(a, axes)
        return restore(self._tournament(self._floored(flat), self.logaddexp), keepdims)

    def logaddexp(self, a: Any, b: Any, call: Call | None = None) -> Any:
        if self.shared(a, b):
            return self.elementwise(call or self.xp.logaddexp, a, b)
        a, b = (a, b) if isinstance(a, Random) else (b, a)
        beyond = self.subtract(b, a)
        return self.add(a, self.elementwise(lambda d: self.xp.logaddexp(d, 0.0 * d), beyond, nonnegative=True))

    def softmax(self, a: Random, axis: int, *, log: bool = False) -> Random:
        """σ(x_i − log Σ_{j≠i} exp x_j), the sums over all but one from a binary tree: two merges a level.

        log: log softmax instead.
        """
        flat, restore = self.rows(a, (axis,))
        levels = [self._floored(flat, multiple=2 ** max(flat.shape[1] - 1, 0).bit_length())]
        while levels[-1].shape[1] > 2:
            below = levels[-1]
            levels.append(self.logaddexp(self.affine(_every(0, 2), below), self.affine(_every(1, 2), below)))
        rest = None
        for level in reversed(levels):
            half = level.shape[1] // 2
            siblings = self.affine(lambda x, n=half: self._swap_pairs(x, n), level)
            if rest is not None:
                rest = self.affine(lambda x: self.xp.stack([x, x], axis=-1).reshape((x.shape[0], -1)), rest)
            rest = siblings if rest is None else self.logaddexp(rest, siblings)
        margin = self.subtract(levels[0], rest)
        del levels, rest
        size = flat.shape[1]
        margin = self.affine(lambda x: x[:, :size], margin)
        if log:
            share = self.elementwise(lambda d: -self.xp.logaddexp(-d, 0.0 * d), margin)
        else:
            share = self.elementwise(lambda d: self.xp.exp(-self.xp.logaddexp(-d, 0.0 * d)), margin, nonnegative=True)
        return restore(share, True)

    def normalise(self, a: Random, axes: Sequence[int], eps: float, *, centre: bool = True) -> Random:
        """(x − mean) / √(variance + eps) along ``axes``; centre False: x / √(mean x² + eps)."""
        flat, restore = self.rows(a, axes)
        if centre:
            flat = self.affine(lambda x: x - self.xp.mean(x, axis=1, keepdims=True), flat)
        square = self.multiply(flat, flat)
        size = self.sum(square, lambda x: self.xp.mean(x, axis=1, keepdims=True))
        scale = self.power(self.add(size, eps), -0.5)
        return restore(self.multiply(flat, scale), True)

    # What these are made of

    def _variance(self, source: Gaussian) -> Array:
        return self.xp.linalg.diagonal(source.cov)

    def _product_rule(self, product: Call, a: Random, b: Random) -> Call:
        left, right = self.mean(a), self.mean(b)
        return lambda x, y: product(x, right) + product(left, y)

    def _linear_part(self, call: Call, shapes: Sequence[tuple[int, ...]], like: Array) -> Callable[..., Array]:
        """What an affine ``call`` does to deviations, rows ``(N, n)`` of each operand -> ``(N, n of the result)``.

        Scaled up to the constant term before that is taken off: then not even −1e9, as masks have it, costs digits.
        """
        xp = self.xp
        constant = call(*(xp.zeros(shape, dtype=like.dtype, device=like.device) for shape in shapes))
        finite = xp.isfinite(constant)
        known = xp.where(finite, constant, 0.0)
        largest = float(xp.max(xp.abs(self.s.stop_gradient(known)))) if math.prod(constant.shape) else 0.0
        scale = 2.0 ** max(math.ceil(math.log2(largest)), 0) if largest > 0 else 1.0
        batched = self.library.vmap(call)

        def act(rows: Sequence[Array]) -> Array:
            tangents = [(scale * r).reshape((r.shape[0], *shape)) for r, shape in zip(rows, shapes, strict=True)]
            found = xp.where(finite, batched(*tangents) - known, 0.0) if largest > 0 else batched(*tangents)
            return found.reshape((rows[0].shape[0], -1)) / scale

        return act

    def _scaled(self, expression: Expression) -> Gaussian:
        slope, shift = self._line(expression)
        source = expression.source
        between = self.joint.between
        blocks = {v: slope[:, None] * between(source, v) for v in self.joint.alive()}
        cov = slope[:, None] * source.cov * slope[None, :]
        mean = self.xp.where(slope == 0, shift, slope * source.mean + shift)
        return self.joint.add(mean, cov, blocks, positive=expression.nonnegative)

    def _expanded(self, expression: Expression) -> Gaussian:
        source, xp = expression.source, self.xp
        variance = self._variance(source)
        std = _root(xp, variance)
        batched = self.library.vmap(lambda x: evaluate(expression, x).reshape(-1))
        expansion = expand(self.s, batched, source.mean, std, expression.breaks, self.settings)
        if expansion.error > self.settings.refused:
            raise ValueError(
                f"its moments did not settle (they moved by {expansion.error:.1g} when the nodes were doubled): it has "
                "a pole or a jump that is not known of"
            )
        slope = xp.where(std > 0, hermite(expansion, 1) / xp.where(std > 0, std, 1.0), 0.0)
        blocks = {}
        for v in self.joint.alive():
            other = None if v.origin is None else v.origin.source()
            if other is None or v.origin is None or v is source:
                blocks[v] = slope[:, None] * self.joint.between(source, v)
            else:
                blocks[v] = self._series(expansion, v.origin.expansion, self.joint.between(source, other))
        cov = self._series(expansion, expansion, source.cov)
        origin = Origin(weakref.ref(source), expansion)
        return self.joint.add(expansion.mean, cov, blocks, origin=origin, positive=expression.nonnegative)

    def _series(self, left: Expansion, right: Expansion, cov: Array) -> Array:
        xp = self.xp
        outer = left.std[:, None] * right.std[None, :]
        correlation = self.s.clip(cov / xp.where(outer > 0, outer, 1.0), -1.0, 1.0)
        if left is not right:
            return covariance(self.s, left, right, correlation, self.settings)[0]
        eye = self.s.array(np.eye(left.mean.shape[0]), left.mean)
        found, _ = covariance(self.s, left, left, correlation * (1.0 - eye), self.settings)
        return found * (1.0 - eye) + eye * left.variance

    def _line(self, expression: Expression) -> tuple[Array, Array]:
        """Slope and shift ``(n,)`` of an affine expression."""
        zero = self.xp.zeros_like(expression.source.mean)
        one = self.xp.ones_like(zero)

        def f(x: Array) -> Array:
            return self.library.broadcast(evaluate(expression, x), expression.shape).reshape(-1)

        return self._linear_part(f, [tuple(zero.shape)], zero)([one[None]])[0], f(zero)

    def _logarithm(self, source: Gaussian) -> Gaussian | None:
        """ℓ with exp ℓ of the same mean and covariances as ``source``; None where a mean is not above 0."""
        if source.logarithm is None:
            xp, mean = self.xp, source.mean
            if not bool(xp.all(self.s.stop_gradient(mean) > 0)):
                return None
            cov = self._log_of_covariance(source, source)
            blocks = {}
            for v in self.joint.alive():
                if v is source:
                    blocks[v] = cov * mean[None, :]
                else:
                    blocks[v] = self.joint.between(source, v) / mean[:, None]
            variance = xp.linalg.diagonal(cov)
            source.logarithm = self.joint.add(xp.log(mean) - variance / 2, cov, blocks)
        return source.logarithm

    def _log_of_covariance(self, a: Gaussian, b: Gaussian) -> Array:
        ratio = self.joint.between(a, b) / (a.mean[:, None] * b.mean[None, :])
        return self.xp.log1p(self.s.clip(ratio, -0.999, None))

    def _plus_log_of(self, log: Random, call: Call) -> Random:
        """log + log(call(1)), for a multiplication ``call`` by something positive."""
        shape = log.shape
        one = self.library.broadcast(self.s.array(1.0, log.expression.source.mean), shape)
        shift = self.xp.log(call(one))
        return self.elementwise(lambda x: x + shift, log, affine=True)

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
        flipped = self.elementwise(lambda x: sign * x, Random(log), affine=True)
        return self._plus_log_of(flipped, lambda one: one * constant)

    def _crossings(self, left: Any, right: Any, source: Gaussian, shape: tuple[int, ...]) -> list[Array]:
        """Where ``left`` equals ``right`` (expressions of the source, or constants), in units of the source."""
        xp, library = self.xp, self.library
        lines = []
        for side in (left, right):
            if isinstance(side, Random):
                if not side.expression.affine:
                    return self._searched(left, right, source)
                lines.append(self._line(side.expression))
            else:
                value = library.broadcast(self.s.array(side, source.mean), shape).reshape(-1)
                lines.append((0.0 * source.mean, value))
        (a, b), (c, d) = lines
        slope = a - c
        root = (d - b) / xp.where(slope == 0, 1.0, slope)
        return [xp.where((slope == 0) | ~xp.isfinite(root), source.mean, root)]

    def _searched(self, left: Any, right: Any, source: Gaussian) -> list[Array]:
        """The same by a search: changes of sign on a grid, then bisection, then a Newton step that has a gradient."""
        xp, s = self.xp, self.s
        std = _root(xp, self._variance(source))

        def gap(x: Array) -> Array:
            a, b = (evaluate(side.expression, x) if isinstance(side, Random) else side for side in (left, right))
            return (a - b).reshape(-1)

        reach, count = self.settings.reach, self.settings.nodes
        grid = s.array(np.linspace(-reach, reach, count + 1), source.mean)[:, None]
        mean, scale = s.stop_gradient(source.mean), s.stop_gradient(std)
        batched = self.library.vmap(lambda x: s.stop_gradient(gap(x)))
        at = mean + scale * grid
        above = np.asarray(batched(at) > 0)
        changes = above[1:] != above[:-1]
        roots = []
        for order in range(int(changes.sum(0).max(initial=0))):
            here = changes & (np.cumsum(changes, axis=0) == order + 1)
            found, cell = here.any(0), here.argmax(0)
            columns = np.arange(len(cell))
            low, high = at[cell, columns], at[cell + 1, columns]
            rising = s.array(np.where(above[cell + 1, columns], 1.0, -1.0), mean)
            for _ in range(50):
                middle = (low + high) / 2
                up = rising * gap(middle) > 0
                low, high = xp.where(up, low, middle), xp.where(up, middle, high)
            root = s.stop_gradient((low + high) / 2)
            step = 1e-4 * scale
            slope = s.stop_gradient(gap(root + step) - gap(root - step)) / xp.where(step > 0, 2 * step, 1.0)
            moved = root - xp.where(
                slope == 0, 0.0, (gap(root) - s.stop_gradient(gap(root))) / xp.where(slope == 0, 1.0, slope)
            )
            roots.append(xp.where(s.array(found * 1.0, mean) > 0, moved, source.mean))
        return roots

    def _spread(self, value: Any, shape: tuple[int, ...]) -> None:
        """Broadcasts a random value in place."""
        if isinstance(value, Random) and int(np.prod(value.shape)) != int(np.prod(shape)):
            wide = self.affine(
                lambda x: self.library.broadcast(x, shape), value, nonnegative=value.expression.nonnegative
            )
            value.expression = wide.expression

    def _shape(self, args: Sequence[Any]) -> tuple[int, ...]:
        return tuple(np.broadcast_shapes(*(tuple(getattr(a, "shape", ())) for a in args)))

    def _nonnegative(self, value: Any, *, strictly: bool = False) -> bool:
        if isinstance(value, Random):
            return value.expression.nonnegative
        if self.library.is_array(value):
            value = self.s.stop_gradient(value)
        return bool(
            (value > 0 if strictly else value >= 0)
            if np.ndim(value) == 0
            else self.xp.all(value > 0 if strictly else value >= 0)
        )

    def _carried(self, *args: Any) -> bool:
        """Whether one of them is a Gaussian that stands for something ≥ 0: it is the time to take its logarithm."""
        return any(isinstance(a, Random) and a.expression.call is None and a.expression.nonnegative for a in args)

    def _floored(self, flat: Random, sign: float = 1.0, multiple: int = 1) -> Random:
        """``(R, K)`` with entries that cannot matter (−∞, or a mask's −1e9) brought near, filled up to ``multiple``."""
        source, xp = self.gaussian(flat), self.xp
        rows, columns = flat.shape
        mean = sign * source.mean.reshape(flat.shape)
        largest = xp.max(self.s.stop_gradient(mean), axis=1, keepdims=True)
        spread = float(xp.max(self.s.stop_gradient(_root(xp, self._variance(source)))))
        floor = largest - 200.0 - 40.0 * spread
        lowered = xp.where(mean < floor, floor, mean)
        if bool(xp.any(mean < floor)):
            blocks = {v: self.joint.between(source, v) for v in self.joint.alive()}
            kept = self.joint.add((sign * lowered).reshape(-1), source.cov, blocks)
            flat = self.random(kept, flat.shape)
        if columns < multiple:
            filling = self.library.broadcast(sign * floor, (rows, multiple - columns))
            flat = self.affine(lambda x: xp.concat([x, filling], axis=1), flat)
        return flat

    def _tournament(self, flat: Random, play: Callable[[Random, Random], Random]) -> Random:
        while (size := flat.shape[1]) > 1:
            half = size // 2
            left = self.affine(lambda x, h=half: x[:, :h], flat)
            right = self.affine(lambda x, h=half: x[:, h : 2 * h], flat)
            rest = self.affine(lambda x, h=half: x[:, 2 * h :], flat) if size % 2 else None
            flat = play(left, right)
            if rest is not None:
                flat = self.affine(lambda x, y: self.xp.concat([x, y], axis=1), flat, rest)
        return flat

    def _swap_pairs(self, x: Array, half: int) -> Array:
        pairs = x.reshape((x.shape[0], half, 2))
        return self.xp.flip(pairs, axis=-1).reshape(x.shape)


def _every(start: int, step: int) -> Call:
    return lambda x: x[:, start::step]


def _any_random(*values: Any) -> bool:
    return any(isinstance(value, Random) for value in values)


def _filled(values: Sequence[Any], found: Sequence[Array]) -> list[Any]:
    """``values`` with the random ones replaced by ``found``, in order."""
    rest = iter(found)
    return [next(rest) if isinstance(value, Random) else value for value in values]


def _swapped(xp: Any, block: Array) -> Array:
    """Cov(a_{bik}, b_{ckm}) as Cov(b_{bkm}, a_{cik})."""
    return xp.permute_dims(block, (3, 4, 5, 0, 1, 2))


def _root(xp: Any, variance: Array) -> Array:
    """√variance, with the gradient 0 where it is 0."""
    return xp.where(variance > 0, xp.sqrt(xp.where(variance > 0, variance, 1.0)), 0.0)


def _distinct(s: Any, breaks: Sequence[Array]) -> list[Array]:
    kept: list[Array] = []
    for b in breaks:
        value = s.stop_gradient(b)
        if not any(bool(s.xp.all(value == s.stop_gradient(k))) for k in kept):
            kept.append(b)
    return kept
