"""Arithmetic on random values: what two random arguments become, whether they are functions of one source or not.

A product is its linear part about the means and a remainder of second order, whose covariance is Isserlis'. Everything
else is composed: max(a, b) = a + max(b − a, 0) (Clark 1961), log(e^a + e^b) = a + softplus(b − a).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from probest.moments.core import Values
from probest.moments.pointwise import Random, evaluate

__all__ = ["Arithmetic"]

Array = Any
Call = Callable[..., Array]


class Arithmetic(Values):
    """`Values` that can be added, multiplied, compared."""

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

    def logaddexp(self, a: Any, b: Any) -> Any:
        if self.shared(a, b):
            return self.elementwise(self.xp.logaddexp, a, b, native=False)
        a, b = (a, b) if isinstance(a, Random) else (b, a)
        beyond = self.subtract(b, a)
        return self.add(a, self.elementwise(self._softplus, beyond, native=False, nonnegative=True))

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

    def exclusive(self, a: Any, b: Any) -> Any:
        """One of the two and not the other, as 1 or 0."""
        a, b = self._indicated(a), self._indicated(b)
        both = self.multiply(a, b)
        return self.subtract(self.subtract(self.add(a, b), both), both)

    def inverse(self, a: Any) -> Any:
        """Not a, as 1 or 0."""
        return self.subtract(1.0 + 0.0 * self._like(a)[0], self._indicated(a))

    def are_truths(self, *values: Any) -> bool:
        """Whether the random ones among the values are truth values still, and not their indicators."""
        return all("bool" in str(self.point(v).dtype) for v in values if isinstance(v, Random))

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
        if self.shared(which, yes, no) and self.are_truths(which):
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

    def _indicated(self, value: Any) -> Any:
        if isinstance(value, Random):
            middle = evaluate(value.expression, self.s.stop_gradient(self._like(value))[None])
            return self.indicator(value) if "bool" in str(middle.dtype) else value
        return self.indicator(value) if "bool" in str(getattr(value, "dtype", "bool")) else value

    def _softplus(self, x: Array) -> Array:
        return self.xp.logaddexp(x, 0.0 * x)

    def _product_rule(self, product: Call, a: Random, b: Random) -> Call:
        left, right = self.mean(a), self.mean(b)
        return lambda x, y: product(x, right) + product(left, y)

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

    def _is_variance(self, value: Random) -> bool:
        """A difference of two values ≥ 0 that is, by its moments, seldom negative."""
        expression = value.expression
        if expression.call is not None or not expression.source.difference:
            return False
        mean, std = expression.source.mean, self._std(expression.source)
        return bool(self.xp.all(self.s.stop_gradient(mean > std)))

    def _carried(self, *args: Any) -> bool:
        """Whether one of them is a Gaussian that stands for something ≥ 0: it is the time to take its logarithm."""
        return any(isinstance(a, Random) and a.expression.affine and a.expression.nonnegative for a in args)


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


def _any_random(*values: Any) -> bool:
    return any(isinstance(value, Random) for value in values)
