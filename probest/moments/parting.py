r"""Maxima and minima at the end of a function, taken apart.

A severity that ends in a maximum is a union of events, one in a minimum an intersection, whoever wrote it: the checker
with ``any_of`` and ``all_of``, or ``y.max()`` in its code. In layers (:mod:`probest.moments.layers`) such an end is a
last layer of few entries whose functions bend once,

.. math:: s = r + c\, f(x), \qquad f(x) = v + \max(\alpha (x - a), \beta (x - a)),

which is the larger of its two affine sides for c > 0 and the smaller for c < 0. Each side is a function of the layers
before it, and may end in a maximum again.

Where it ends in a monotone function, as ``sigmoid(y.max()) - 0.9`` does, only the place matters where that crosses the
limit: s ≥ 0 is x ≥ x₀, or x ≤ x₀.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize

from probest.checkers import Branch, alternatives
from probest.moments.layers import Base, Layer, Layers, Linear, reached

__all__ = ["parted"]

Array = Any
_NARROW = 4  # entries of a layer that may be an end, at most: a hidden layer has more
_GRID = np.concatenate([-np.geomspace(1e-3, 1e3, 60)[::-1], [0.0], np.geomspace(1e-3, 1e3, 60)])  # of x
_LEAVES = 32  # at most: deep narrow networks have as many as sides of all their bends together


class _Side(NamedTuple):
    """One side of a bend: what is affine about ``at``, with the value ``value`` there; all may depend on parameters."""

    slope: Array
    at: Array
    value: Array


class _Node(NamedTuple):
    """A union or an intersection of parts, or the number of a leaf."""

    union: bool
    parts: tuple[_Node, ...]
    leaf: int = -1


def parted(net: Layers, host: Callable[[Array], Any] = np.asarray, most: int = 8) -> Layers:
    """The same event with more outputs and ``branches``, where it ends in maxima or minima of few parts, and straight
    where it ends in a monotone function.

    host: an array of the network's library in NumPy. most: branches.
    """
    found = _Parting(net, host)
    nodes = [found.node(_row(net.output, j)) for j in range(net.output.size)]
    if len(found.leaves) > _LEAVES or not (found.signs or any(node.parts for node in nodes)):
        return net
    branches: list[Branch] = []
    for branch in net.branches:
        some = alternatives(False, [_branches(nodes[j], sign, most) for j, sign in branch], most)
        if not some:
            return net
        branches += some
    if len(branches) > most or not all(leaf.terms for leaf in found.leaves):
        return net
    kept, output = reached(net.layers, _stacked(net, found.leaves, host))
    return replace(net, layers=kept, output=output, branches=tuple(branches), parted=True, signs=found.signs)


class _Parting:
    """The leaves so far. signs: whether only their signs are those of what ends in them."""

    def __init__(self, net: Layers, host: Callable[[Array], Any]) -> None:
        self.net, self.host = net, host
        self.leaves: list[Linear] = []
        self.signs = False

    def node(self, one: Linear) -> _Node:
        """What one output ``(1,)`` comes to. Nothing more is taken apart once there are too many leaves."""
        one = self._plain(one)
        for k in reversed(range(len(self.net.layers) if len(self.leaves) <= _LEAVES else 0)):
            base, layer = ("y", k), self.net.layers[k]
            if base not in one.terms:
                continue
            row = np.asarray(self.host(one.terms[base]), dtype=np.float64)[0]
            i = int(np.argmax(np.abs(row)))
            straight = self._straightened(one, k, i) if np.count_nonzero(row) == 1 else None
            if straight is not None:
                self.signs = True
                return self.node(straight)
            sides = self._sides(layer, i) if layer.linear.size <= _NARROW else None
            if sides is None:
                continue
            left, right = (float(self.host(side.slope)) for side in sides)
            larger = row[i] * (right - left) > 0.0
            return _Node(larger, tuple(self.node(self._on(one, k, i, side)) for side in sides))
        self.leaves.append(one)
        return _Node(False, (), len(self.leaves) - 1)

    def _plain(self, one: Linear) -> Linear:
        """Without what is zero, and with what narrow layers are applied to in its own terms."""
        terms, shift = dict(one.terms), one.shift
        for k in reversed(range(len(self.net.layers))):
            inner = self.net.layers[k].linear
            if ("x", k) in terms and inner.size <= _NARROW:
                matrix = terms.pop(("x", k))
                shift = shift + matrix @ inner.shift
                for base, own in inner.terms.items():
                    terms[base] = terms[base] + matrix @ own if base in terms else matrix @ own
        size = max((float(np.abs(self.host(m)).max()) for m in terms.values()), default=0.0)
        least = 1e-6 * size  # what cancels leaves rounding, in single precision
        return Linear({b: m for b, m in terms.items() if np.abs(self.host(m)).max() > least}, shift)

    def _straightened(self, one: Linear, k: int, i: int) -> Linear | None:
        """x − x₀, or x₀ − x, with the sign of an output that is a monotone function of one entry x of a layer alone.

        None for another, and where it does not cross the limit.
        """
        base, layer, s = ("y", k), self.net.layers[k], self.net.special
        if set(one.terms) != {base} or len(layer.breaks):
            return None
        inner, by = layer.linear, one.terms[base][0, i]

        def said(x: np.ndarray) -> np.ndarray:
            asked = s.array(np.repeat(x[:, None], inner.size, axis=1), inner.shift)
            with np.errstate(all="ignore"):
                return np.asarray(self.host(one.shift[0] + by * layer.function(asked)[:, i]), dtype=np.float64)

        values = said(_GRID)
        inside = values >= 0.0
        rises, falls = (values[1:] >= values[:-1]).all(), (values[1:] <= values[:-1]).all()
        if not (rises or falls) or inside.all() or not inside.any():
            return None
        at = int(np.flatnonzero(inside[1:] != inside[:-1])[0])
        crossing = float(optimize.bisect(lambda x: said(np.array([x]))[0], _GRID[at], _GRID[at + 1]))
        width = 1e-3 * (1.0 + abs(crossing))
        below, above = said(np.array([crossing - width, crossing + width]))
        slope = (above - below) / (2.0 * width)
        if not abs(slope) > 0.0:
            return None
        # a step of Newton's: x₀ follows the parameters
        here = s.array(np.full((1, inner.size), crossing), inner.shift)
        place = crossing - (one.shift[0] + by * layer.function(here)[0, i]) / float(slope)
        sign = math.copysign(1.0, slope)
        return Linear(
            {b: sign * own[i : i + 1] for b, own in inner.terms.items()}, sign * (inner.shift[i : i + 1] - place)
        )

    def _on(self, one: Linear, k: int, i: int, side: _Side) -> Linear:
        """One output with the i-th entry of a layer on one side of its bend."""
        inner, base = self.net.layers[k].linear, ("y", k)
        by = one.terms[base][:, i : i + 1]
        terms = dict(one.terms)
        keep = self.net.special.array(np.arange(inner.size) != i, by) * 1.0
        terms[base] = one.terms[base] * keep
        for other, own in inner.terms.items():
            added = side.slope * (by @ own[i : i + 1])
            terms[other] = terms[other] + added if other in terms else added
        shift = one.shift + by[:, 0] * (side.value + side.slope * (inner.shift[i] - side.at))
        return Linear(terms, shift)

    def _sides(self, layer: Layer, i: int) -> tuple[_Side, _Side] | None:
        """Both sides of a function that bends once and is affine on either; None for another."""
        if len(layer.breaks) != 1:
            return None
        at = layer.breaks[0]
        asked = at + self.net.special.array(np.array([-2.0, -1.0, 0.0, 1.0, 2.0])[:, None], at)
        values = layer.function(asked)[:, i]
        said = np.asarray(self.host(values), dtype=np.float64)
        slopes = np.diff(said)
        close = 1e-4 * max(float(np.abs(slopes).max()), 1e-300)
        if not (np.isfinite(slopes).all() and np.abs(slopes[[0, 2]] - slopes[[1, 3]]).max() < close):
            return None
        if abs(slopes[3] - slopes[0]) < close:
            return None
        left, right = values[2] - values[1], values[3] - values[2]
        return _Side(left, at[i], values[2]), _Side(right, at[i], values[2])


def _branches(node: _Node, sign: float, most: int) -> list[Branch]:
    """How it comes to a catastrophe, or, for a negative sign, does not; none where there are too many ways."""
    if not node.parts:
        return [((node.leaf, sign),)]
    return alternatives(node.union == (sign > 0.0), [_branches(part, sign, most) for part in node.parts], most)


def _row(output: Linear, j: int) -> Linear:
    return Linear({base: matrix[j : j + 1] for base, matrix in output.terms.items()}, output.shift[j : j + 1])


def _stacked(net: Layers, leaves: list[Linear], host: Callable[[Array], Any]) -> Linear:
    xp = net.special.xp
    bases: list[Base] = list(dict.fromkeys(itertools.chain(*(leaf.terms for leaf in leaves))))
    terms = {}
    for base in bases:
        like = next(leaf.terms[base] for leaf in leaves if base in leaf.terms)
        none = net.special.array(np.zeros(np.shape(host(like))), like)
        terms[base] = xp.concat([leaf.terms.get(base, none) for leaf in leaves])
    return Linear(terms, xp.concat([leaf.shift for leaf in leaves]))
