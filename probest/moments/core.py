"""The joint law of everything alive while a function is read, and how an operation extends it.

An *affine* operation acts on deviations by its derivative, which is the operation itself. A function applied *entry by
entry* is kept as an expression and meets `hermite` when its covariance is needed. A function of *rows* is exact in its
linear part; the rest is a quasi-Monte Carlo sum over the row's Gaussian. What is ≥ 0 and a Gaussian for now, a sum of
squares or of exponentials, is carried by its logarithm once a function of it is taken (Fenton 1960).
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from probest.moments.gaussian import Block, Gaussian, Joint, Origin
from probest.moments.hermite import (
    QUADRATURE,
    Expansion,
    Quadrature,
    correlations,
    covariance,
    expand,
    normal_points,
    slope,
)
from probest.moments.pairs import with_close_pairs
from probest.moments.pointwise import Expression, Random, evaluate, leaf, numbers

__all__ = ["Library", "Values"]

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

    def transposed(self, act: Call, sizes: Sequence[int]) -> Call | None:
        """The transpose of a linear ``act``, from rows ``(N, n_k)`` of each of ``sizes`` to rows of its result: from
        such rows to a list of rows of each. None where that is no cheaper than ``act`` itself.
        """


class Values:
    """The joint law of everything alive, and the three kinds of operation that extend it.

    error: the largest error that an integral may have had so far, in units of the largest standard deviation in it.
    """

    def __init__(self, library: Library, settings: Quadrature = QUADRATURE) -> None:
        self.library, self.settings, self.joint = library, settings, Joint()
        self.s = library.special
        self.xp = self.s.xp
        self.error = 0.0

    def begin(self, source: Gaussian) -> None:
        """Told of the input, before anything else."""

    # Values and their moments

    def random(self, source: Gaussian, shape: Sequence[int]) -> Random:
        return Random(leaf(source, tuple(shape)))

    def gaussian(self, value: Random) -> Gaussian:
        """The value as a vector of the joint law; from now on the value stands for that vector."""
        expression = value.expression
        if expression.call is not None:
            if expression.own is not None:
                found = expression.own()
            elif expression.rows:
                found = self._by_rows(expression)
            else:
                found = self._scaled(expression) if expression.affine else self._expanded(expression)
            value.expression = expression = leaf(found, expression.shape)
        return expression.source

    def mean(self, value: Random) -> Array:
        return self.gaussian(value).mean.reshape(value.shape)

    def point(self, value: Random) -> Array:
        """Some value that it may take, without a look at its moments."""
        return evaluate(value.expression, value.expression.source.mean[None])[0]

    # The three kinds

    def affine(
        self,
        call: Call,
        *operands: Random,
        native: bool = True,
        nonnegative: bool = False,
        tangent: Call | None = None,
        adjoint: Call | None = None,
        shift: Array | None = None,
        extra: Array | None = None,
    ) -> Random:
        """An operation that is affine in all its operands together.

        native: whether ``call`` is an operation of the user's, on arrays of the operands' shapes; else it is written in
        ``xp`` and takes arrays with a further first axis, too. tangent: what acts on deviations, where it is not
        ``call`` itself. adjoint: its transpose, of a single operand, where it is known; then ``call`` is exact for
        arrays of any first axis. shift: added to the mean, of the result's shape. extra ``(n, n)``: added to the
        result's own covariance.
        """
        if len(operands) == 1 and (tangent is None or adjoint is not None) and shift is None and extra is None:
            kept = self._kept_in_rows(call, operands[0], native, nonnegative)
            if kept is not None:
                return kept
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
        act = self._linear_part(many, [o.shape for o in operands], sources[0].mean)
        blocks = {v: self._acted(act, sources, v, shape, adjoint) for v in others}
        cov = act([blocks[g].value for g in sources])
        if extra is not None:
            cov = cov + extra
        if shift is not None:
            mean = mean + shift
        found = self.joint.add(mean.reshape(-1), cov, blocks, positive=nonnegative)
        self._made(found, sources, act)
        return self.random(found, shape)

    def _acted(
        self,
        act: Callable[..., Array],
        sources: Sequence[Gaussian],
        other: Gaussian,
        shape: tuple[int, ...],
        adjoint: Call | None,
    ) -> Block:
        """The covariance ``(n, n_other)`` of what ``act`` makes of ``sources``, of ``shape``, with another vector.

        Where that has fewer rows than columns, ``act`` is pulled back along them: what lies behind may then never be
        computed as a whole.
        """
        inner = [self.joint.block(g, other) for g in sources]
        sizes, columns, like, size = [g.size for g in sources], other.size, sources[0].mean, math.prod(shape)
        if adjoint is not None:

            def back(rows: Array) -> Sequence[Array]:
                return [adjoint(rows.reshape((-1, *shape))).reshape((-1, *sizes))]

            transposed: Call | None = back
        else:
            transposed = self.library.transposed(act, sizes)

        def below(rows: Array) -> Array:
            assert transposed is not None
            return sum(b.below(pulled) for b, pulled in zip(inner, transposed(rows), strict=True))

        def make() -> Array:
            few = size + self.settings.backwards <= columns and not all(b.known for b in inner)
            if few and transposed is not None:
                return below(self.s.array(np.eye(size), like))
            return act([b.transposed for b in inner]).T

        return Block(make, None if transposed is None else below)

    def _made(self, new: Gaussian, sources: Sequence[Gaussian], act: Callable[[Sequence[Array]], Array]) -> None:
        """Told of every vector that is affine in others; ``act`` takes rows of deviations of each."""

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
        rows = max(part.rows for part in parts)
        breaks: list[Array] = []
        if not rows:
            breaks += [b for part in parts for b in part.breaks]
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
                rows=rows,
            )
        )

    def shared(self, *args: Any) -> bool:
        """Whether the random ones among the arguments are functions of one source, of the same size; or in rows."""
        randoms = [a for a in args if isinstance(a, Random)]
        shape = self._shape(args)
        sizes = {math.prod(r.shape) for r in randoms} | {math.prod(shape)}
        counts = {r.expression.rows for r in randoms} - {0}
        if counts and (len(counts) > 1 or not self._aligned(randoms, shape, *counts)):
            return False
        return len({id(r.expression.source) for r in randoms}) == 1 and (
            len(sizes) == 1 or len(randoms) == 1 or bool(counts)
        )

    def _aligned(self, randoms: Sequence[Random], shape: tuple[int, ...], rows: int) -> bool:
        """Whether a function of these, of this shape, is one row by row, and of rows that are not too long."""
        source = randoms[0].expression.source
        if source.size > rows * self.settings.together or math.prod(shape) % rows:
            return False
        same = math.prod(shape)
        for r in randoms:
            if math.prod(r.shape) == same:
                continue
            wide = r.expression.rows and len(r.shape) == len(shape) and r.shape[:-1] == shape[:-1]
            if not wide or math.prod(shape[:-1]) % rows:
                return False
        return True

    def _kept_in_rows(self, call: Call, value: Random, native: bool, nonnegative: bool) -> Random | None:
        """A linear operation on a function of rows that stays within them, as such; else None.

        So is a sum over short rows of a function applied entry by entry: its square root, say, is far from a function
        of a Gaussian.
        """
        old = value.expression
        rows = old.rows
        if not rows:
            short = old.call is not None and not old.affine and len(old.shape) and old.shape[-1] <= self.settings.short
            rows = old.source.size // old.shape[-1] if short and old.shape[-1] > 1 else 0
            if not rows:
                return None
        like = old.source.mean
        many = self.library.batched(call, [True]) if native else call
        shape = tuple(many(self.s.array(np.zeros((1, *old.shape)), like)).shape[1:])
        size = math.prod(shape)
        if size % rows or (not old.rows and size != rows):
            return None
        width = math.prod(old.shape) // rows
        numbers = np.sin(1.0 + np.arange(rows * width)).reshape((rows, width))
        probes = np.eye(rows)[:, :, None] * numbers  # one row at a time
        act = self._linear_part(many, [old.shape], like)
        found = np.asarray(self.s.stop_gradient(act([self.s.array(probes.reshape((rows, -1)), like)])))
        found = found.reshape((rows, rows, -1))
        if np.abs(found * (1 - np.eye(rows))[:, :, None]).max(initial=0) > 0:
            return None

        def own() -> Gaussian:
            now = value.expression  # what the value stands for may have changed: by its moments, or in shape
            same = now is old or (now.call is None and now.shape == old.shape)
            known = Random(leaf(self.gaussian(value if same else Random(old)), old.shape))
            return self.gaussian(self.affine(call, known, native=native, nonnegative=nonnegative))

        better = own if old.own is not None or not old.rows else None
        return Random(Expression(old.source, shape, many, (old,), nonnegative=nonnegative, rows=rows, own=better))

    def _along_rows(self, flat: Random, call: Callable[[Array], tuple[Array, Array]]) -> Random:
        """A function of each row of K by a quasi-Monte Carlo sum over its Gaussian: ``settings.lattice`` points and
        their opposites. What is linear in the row is exact, and the sum is over the rest.

        call: from points ``(R, N, K)`` the values ``(R, N, J)`` and the mean derivative ``(R, J, K)``.
        """
        xp, s = self.xp, self.s
        mean, cov = self._row_moments(flat)
        size = mean.shape[1]
        scale = xp.linalg.diagonal(s.stop_gradient(cov))
        scale = xp.max(scale, axis=1) * 1e3 * float(xp.finfo(mean.dtype).eps) + float(xp.finfo(mean.dtype).tiny) ** 0.5
        root = xp.linalg.cholesky(cov + scale[:, None, None] * s.array(np.eye(size), mean))
        points = s.array(normal_points(size, self.settings.lattice), mean)
        deviations = points[None] @ xp.permute_dims(root, (0, 2, 1))
        values, derivative = call(mean[:, None, :] + deviations)
        centre = xp.mean(values, axis=1)
        rest = values - centre[:, None, :] - deviations @ xp.permute_dims(derivative, (0, 2, 1))
        found = self._row_function(flat, centre, derivative, xp.permute_dims(rest, (0, 2, 1)) @ rest / points.shape[0])
        half = s.stop_gradient(xp.mean(rest[:, ::2], axis=1))
        spread = self._std(self.gaussian(found)).reshape(half.shape)
        self.error = max(self.error, float(xp.max(xp.abs(half)) / xp.max(s.stop_gradient(spread) + scale[:, None])))
        return found

    def _by_rows(self, expression: Expression) -> Gaussian:
        """By sums over points, derivatives by central differences: calls cannot always be differentiated."""
        xp, s, source, rows = self.xp, self.s, expression.source, expression.rows
        size = source.size // rows
        step = float(xp.finfo(source.mean.dtype).eps) ** (1 / 3)
        std = s.stop_gradient(self._std(source)).reshape((rows, size))
        steps = step * xp.where(std > 0, std, 1.0)

        def f(x: Array) -> Array:  # (R, N, K) -> (R, N, J)
            points = xp.permute_dims(x, (1, 0, 2)).reshape((x.shape[1], -1))
            found = evaluate(expression, points).reshape((x.shape[1], rows, -1))
            return xp.permute_dims(s.array(1.0, x) * found, (1, 0, 2))

        def call(x: Array) -> tuple[Array, Array]:
            columns = []
            for k in range(size):
                ahead = s.array(np.eye(size)[k], x) * steps[:, k, None]
                difference = f(x + ahead[:, None, :]) - f(x - ahead[:, None, :])
                columns.append(xp.mean(difference, axis=1) / (2 * steps[:, k, None]))
            return f(x), xp.stack(columns, axis=-1)

        flat = self.random(source, (rows, size))
        found = self._along_rows(flat, call)
        found.expression.source.positive = expression.nonnegative
        return self.gaussian(found)

    def _row_moments(self, flat: Random) -> tuple[Array, Array]:
        """Mean ``(R, K)`` and covariance ``(R, K, K)`` of each row of ``(R, K)``."""
        source, xp = self.gaussian(flat), self.xp
        rows, size = flat.shape
        cov = source.cov.reshape((rows, size, rows, size))
        within = xp.permute_dims(xp.linalg.diagonal(xp.permute_dims(cov, (1, 3, 0, 2))), (2, 0, 1))
        return source.mean.reshape((rows, size)), within

    def _row_function(self, flat: Random, mean: Array, derivative: Array, rest: Array) -> Random:
        """A function of each row of K, with values of size J, by its moments.

        To other values, the other rows included, the mean derivative carries covariances (for Gaussian x exactly:
        Stein). Within a row ``rest`` is added: the covariance of what is not linear.

        Args:
            flat: ``(R, K)``.
            mean: ``(R, J)``.
            derivative: ``(R, J, K)``.
            rest: ``(R, J, J)``.
        """
        xp = self.xp
        rows, size = mean.shape
        back = xp.permute_dims(derivative, (0, 2, 1))
        within = self.s.array(np.eye(rows), mean)[:, None, :, None] * rest[:, :, None, :]

        def moved(x: Array) -> Array:
            return xp.permute_dims(xp.permute_dims(x, (1, 0, 2)) @ back, (1, 0, 2))

        return self.affine(
            lambda x: mean[None] + 0.0 * x[..., :1],
            flat,
            native=False,
            tangent=moved,
            extra=within.reshape((rows * size, rows * size)),
        )

    # Values of another form

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

    def _variance(self, source: Gaussian) -> Array:
        return self.xp.linalg.diagonal(source.cov)

    def _std(self, source: Gaussian) -> Array:
        """√variance, with the gradient 0 where it is 0."""
        variance = self._variance(source)
        return self.xp.where(variance > 0, self.xp.sqrt(self.xp.where(variance > 0, variance, 1.0)), 0.0)

    def _like(self, *values: Any) -> Array:
        return next(v.expression.source.mean for v in values if isinstance(v, Random))

    # What these are made of

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
        scale = _scale(xp, s.stop_gradient(known)) if math.prod(constant.shape) else 1.0
        whole = bool(xp.all(finite))
        plain = whole and not bool(xp.any(known))

        def act(rows: Sequence[Array]) -> Array:
            rows = rows if scale == 1 else [scale * r for r in rows]
            found = many(*(r.reshape((r.shape[0], *shape)) for r, shape in zip(rows, shapes, strict=True)))
            if not plain:
                found = found - known if whole else xp.where(finite, found - known, 0.0)
            found = found.reshape((rows[0].shape[0], -1))
            return found if scale == 1 else found / scale

        return act

    def _scaled(self, expression: Expression) -> Gaussian:
        factor, shift = self._line(expression)
        source = expression.source
        blocks = {v: self._times(factor, source, v) for v in self.joint.alive()}
        cov = factor[:, None] * source.cov * factor[None, :]
        mean = self.xp.where(factor == 0, shift, factor * source.mean + shift)
        found = self.joint.add(mean, cov, blocks, positive=expression.nonnegative)
        self._made(found, [source], lambda rows: rows[0] * factor)
        return found

    def _expanded(self, expression: Expression) -> Gaussian:
        source = expression.source

        def f(x: Array) -> Array:
            return numbers(self.s, expression, x)

        expansion = expand(self.s, f, source.mean, self._std(source), expression.breaks, self.settings, closed=True)
        if expansion.error > self.settings.refused:
            raise ValueError(
                f"its moments did not settle (they moved by {expansion.error:.1g} when the nodes were doubled): it has "
                "a pole or a jump that is not known of"
            )
        self.error = max(self.error, expansion.error)
        carried = slope(self.s, expansion)
        blocks: dict[Gaussian, Array | Block] = {}
        for v in self.joint.alive():
            other = None if v.origin is None else v.origin.source()
            if other is None or v.origin is None or v is source:
                blocks[v] = self._times(carried, source, v)
            else:
                blocks[v] = self._series(expansion, v.origin.expansion, self.joint.between(source, other))
        cov = self._series(expansion, expansion, source.cov)
        origin = Origin(weakref.ref(source), expansion._replace(function=None, breaks=()))
        return self.joint.add(expansion.mean, cov, blocks, origin=origin, positive=expression.nonnegative)

    def _series(self, left: Expansion, right: Expansion, cov: Array) -> Array:
        correlation = correlations(self.s, left, right, cov)
        if left is not right:
            found, missing = covariance(self.s, left, right, correlation, self.settings)
            self.error = max(self.error, missing)
            return found
        correlation = self.s.filled_diagonal(correlation, 0.0)
        found, missing = covariance(self.s, left, left, correlation, self.settings)
        if missing > self.settings.covariance:
            found, done = with_close_pairs(self.s, left, correlation, found, self.settings)
            missing = self.settings.covariance if done else missing
        self.error = max(self.error, missing)
        return self.s.filled_diagonal(found, left.variance)

    def _line(self, expression: Expression) -> tuple[Array, Array]:
        """Slope and shift ``(n,)`` of an affine expression."""
        mean = expression.source.mean
        if expression.call is None:
            return 0.0 * mean + 1.0, 0.0 * mean

        def f(value: float) -> Array:
            return evaluate(expression, self.s.array(np.full((1, mean.shape[0]), value), mean)).reshape(-1)

        shift = f(0.0)
        finite = self.xp.isfinite(shift)
        known = self.xp.where(finite, shift, 0.0)
        scale = _scale(self.xp, self.s.stop_gradient(known))
        return self.xp.where(finite, (f(scale) - known) / scale, 0.0), shift

    def _times(self, factor: Array, source: Gaussian, other: Gaussian) -> Block:
        """Cov(factor · source, other), factor ``(n,)``."""
        inner = self.joint.block(source, other)
        return Block(lambda: factor[:, None] * inner.value, lambda rows: inner.below(rows * factor))

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


def _scale(xp: Any, shift: Array) -> float:
    """A power of 2, at least 1 and the largest of ``shift``: at this scale a slope beside it keeps its digits."""
    largest = float(xp.max(xp.abs(shift)))
    return 2.0 ** max(math.ceil(math.log2(largest)), 0) if largest > 0 else 1.0


def _distinct(s: Any, breaks: Sequence[Array]) -> list[Array]:
    kept: list[Array] = []
    for b in breaks:
        value = s.stop_gradient(b)
        if not any(bool(s.xp.all(value == s.stop_gradient(k))) for k in kept):
            kept.append(b)
    return kept
