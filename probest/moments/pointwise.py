"""Functions of a Gaussian vector, applied entry by entry or row by row, kept as expressions until their moments are
needed.

``x * sigmoid(x)``, ``where(x > 0, x, exp(x) - 1)``, ``x - relu(x)`` reach the quadrature as one function of x, whatever
operations they were written in. An expression knows where it may bend or jump, whether it is affine in its source, and
whether it is an exponential.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from probest.moments.gaussian import Gaussian

__all__ = ["Expression", "Random", "evaluate", "leaf", "numbers"]

Array = Any


@dataclass(frozen=True, eq=False)
class Expression:
    """A function of ``source``, entry by entry or row by row; entries in the order of flattened arrays.

    call, args: what computes it from other expressions of the same source, along a first axis of samples, and from
    constants; call None: the source itself, with this ``shape``. breaks ``(n,)`` each: where it may bend or jump, in
    units of the source. affine: whether it is a x + b. nonnegative: whether it can only be ≥ 0. log: an affine
    expression whose exponential it is. rows: 0 for entry by entry; else the number of rows that source and result are
    cut into, each row of the result a function of that row of the source. own: how its Gaussian is found, where there
    is something better than a sum over points.
    """

    source: Gaussian
    shape: tuple[int, ...]
    call: Callable[..., Array] | None = None
    args: tuple[Any, ...] = ()
    breaks: tuple[Array, ...] = ()
    affine: bool = False
    nonnegative: bool = False
    log: Expression | None = None
    rows: int = 0
    own: Callable[[], Gaussian] | None = None


@dataclass(eq=False)
class Random:
    """A random value of the function that is being read. Its expression changes when its moments are taken."""

    expression: Expression

    @property
    def shape(self) -> tuple[int, ...]:
        return self.expression.shape


def leaf(source: Gaussian, shape: tuple[int, ...]) -> Expression:
    """The source itself."""
    return Expression(source, shape, affine=True, nonnegative=source.positive)


def evaluate(expression: Expression, x: Array, memo: dict[Expression, Array] | None = None) -> Array:
    """The expression, ``(Q, *shape)``, for values ``x``, ``(Q, n)``, of its source; each part is computed once."""
    memo = {} if memo is None else memo
    if expression not in memo:
        if expression.call is None:
            memo[expression] = x.reshape((x.shape[0], *expression.shape))
        else:
            values = [evaluate(a, x, memo) if isinstance(a, Expression) else a for a in expression.args]
            memo[expression] = expression.call(*values)
    return memo[expression]


def numbers(s: Any, expression: Expression, x: Array) -> Array:
    """An expression entry by entry, ``(Q, n)`` like ``x``; truth values as 1 and 0. s: the special functions."""
    found = evaluate(expression, x).reshape(x.shape)
    return s.xp.where(found, s.array(1.0, x), 0.0 * x) if "bool" in str(found.dtype) else found
