r"""A small network that learns a severity from values and gradients.

.. math:: \hat s(x) = \max_k\; c_k + a_k^\top x + w_k^\top \phi(W_2\, \phi(W_1 x + b_1) + b_2),
          \qquad \phi(t) = \tfrac12\left(t + \sqrt{t^2 + 1}\right),

with one output for most severities, and one for each kind of catastrophe where they are the largest of several. It is
fitted to both, :math:`(\hat s - s)^2` and :math:`|\nabla \hat s - \nabla s|^2` (Sobolev training), by Adam. One
gradient says as much as dim values, so that some thousand cases teach a function of a hundred coordinates. φ is smooth
and takes one square root, so the network costs little more than its two matrix products; it is written in NumPy,
because events are, whichever library the model is of.

References: Czarnecki et al. (2017), Sobolev training for neural networks; Kingma & Ba (2015), Adam; Carlile et al.
(2017), Improving deep learning by inverse square root linear units, and Barron (2021), Squareplus (φ).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from probest.evidence import Floats

__all__ = ["Lesson", "Network", "taught"]

Singles = NDArray[Any]  # float32; the stubs make products of it float64
_BLOCK = 2048


class Lesson(NamedTuple):
    """What a network is taught. x: ``(n, dim)``; value: ``(n, K)``, of each output; slope: ``(n, dim)``, of the largest
    of them, NaN in rows without a gradient; weight: ``(n,)``, how much each case counts, and counts: ``(n, K)``, how
    much each of its values does.
    """

    x: Floats
    value: Floats
    slope: Floats
    weight: Floats
    counts: Floats


class Network(NamedTuple):
    """Two hidden layers beside a linear part: a ``(K, dim)``, c ``(K,)``, w1 ``(width, dim)``, w2 ``(width, width)``,
    w3 ``(K, width)``, b1 and b2 ``(width,)``. Its value is the largest of K outputs.
    """

    a: Singles
    c: Singles
    w1: Singles
    b1: Singles
    w2: Singles
    b2: Singles
    w3: Singles

    @classmethod
    def drawn(cls, dim: int, width: int, rng: np.random.Generator, outputs: int = 1) -> Network:
        """With random weights, of a size that keeps values of order one."""

        def normal(*shape: int) -> Singles:
            return (rng.standard_normal(shape) / math.sqrt(shape[-1])).astype(np.float32)

        zero = np.zeros(width, dtype=np.float32)
        return cls(np.zeros((outputs, dim), np.float32), np.zeros(outputs, np.float32), normal(width, dim), zero,
                   normal(width, width), zero, normal(outputs, width))  # fmt: skip

    def value(self, x: Floats) -> Floats:
        """``(n,)`` at x ``(n, dim)``."""
        return np.concatenate([_value(self, part).max(axis=1) for part in _blocks(x)]).astype(np.float64)

    def value_and_slope(self, x: Floats) -> tuple[Floats, Floats]:
        """``(n,)`` and ``(n, dim)`` at x ``(n, dim)``."""
        values, slopes = [], []
        for part in _blocks(x):
            value, inner = _forward(self, part)
            values.append(value.max(axis=1))
            slopes.append(inner.slope)
        return np.concatenate(values).astype(np.float64), np.concatenate(slopes).astype(np.float64)


class _Inner(NamedTuple):
    """What a forward pass leaves: of both layers φ, φ' and φ'', and the gradient of output which on its way back."""

    h1: Singles
    d1: Singles
    e1: Singles
    h2: Singles
    d2: Singles
    e2: Singles
    back2: Singles
    back1: Singles
    slope1: Singles
    slope: Singles
    which: Singles


def _blocks(x: Floats) -> Iterator[Singles]:
    for start in range(0, max(len(x), 1), _BLOCK):
        yield x[start : start + _BLOCK].astype(np.float32)


def _bent(t: Singles) -> tuple[Singles, Singles, Singles]:
    """φ, φ' and φ''."""
    root = np.sqrt(t * t + np.float32(1.0))
    half = np.float32(0.5) / root
    return np.float32(0.5) * (t + root), t * half + np.float32(0.5), half / (root * root)


def _value(net: Network, x: Singles) -> Singles:
    h = x
    for weights, bias in ((net.w1, net.b1), (net.w2, net.b2)):
        t = h @ weights.T + bias
        h = np.float32(0.5) * (t + np.sqrt(t * t + np.float32(1.0)))
    out: Singles = h @ net.w3.T + x @ net.a.T + net.c
    return out


def _forward(net: Network, x: Singles, which: Singles | None = None) -> tuple[Singles, _Inner]:
    """All outputs ``(n, K)``, and the gradient of those chosen, or of the largest."""
    h1, d1, e1 = _bent(x @ net.w1.T + net.b1)
    h2, d2, e2 = _bent(h1 @ net.w2.T + net.b2)
    out = h2 @ net.w3.T + x @ net.a.T + net.c
    which = out.argmax(axis=1) if which is None else which
    back2 = d2 * net.w3[which]
    slope1 = back2 @ net.w2
    back1 = d1 * slope1
    slope = back1 @ net.w1 + net.a[which]
    return out, _Inner(h1, d1, e1, h2, d2, e2, back2, back1, slope1, slope, which)


def _pulled(net: Network, x: Singles, inner: _Inner, by_value: Singles, by_slope: Singles) -> Network:
    """The gradient in the weights of a loss, from its derivatives in outputs ``(n, K)`` and slopes ``(n, dim)``."""
    h1, d1, e1, h2, d2, e2, back2, back1, slope1, _, which = inner
    chosen = (which[:, None] == np.arange(len(net.c))).astype(x.dtype).T
    # down the gradient's own way: slope = a + back1 w1, back1 = d1 (back2 w2), back2 = d2 w3
    to1 = by_slope @ net.w1.T
    to_slope1 = to1 * d1
    to2 = to_slope1 @ net.w2.T
    at1 = to1 * slope1 * e1
    at2 = to2 * e2 * net.w3[which] + d2 * (by_value @ net.w3)
    # and the value's
    at1 += (at2 @ net.w2) * d1
    return Network(
        chosen @ by_slope + by_value.T @ x,
        by_value.sum(0),
        back1.T @ by_slope + at1.T @ x,
        at1.sum(0),
        back2.T @ to_slope1 + at2.T @ h1,
        at2.sum(0),
        chosen @ (to2 * d2) + by_value.T @ h2,
    )


def taught(
    net: Network,
    lesson: Lesson,
    rng: np.random.Generator,
    *,
    steps: int,
    batch: int,
    rate: float,
    slopes: float,
) -> Network:
    """The network after so many steps of Adam; the rate rises over the first tenth of them and falls to nothing.

    slopes: what the squared error of gradients, in units of the gradients' mean square, counts beside that of values.
    """
    x, value, slope = (part.astype(np.float32) for part in lesson[:3])
    counts, which = lesson.counts.astype(np.float32), lesson.value.argmax(axis=1)
    known = ~np.isnan(slope[:, 0])
    slope[~known] = 0.0
    weight = lesson.weight / lesson.weight.sum()
    square = float(weight[known] @ np.einsum("ij,ij->i", slope[known], slope[known]))
    usual = square / max(float(weight[known].sum()), 1e-300)
    factor = np.float32(2.0 * slopes / usual) if usual > 0.0 else np.float32(0.0)
    order = rng.choice(len(x), size=(steps, batch), p=weight)
    first = [np.zeros_like(part) for part in net]
    second = [np.zeros_like(part) for part in net]
    weights = [part.copy() for part in net]
    rise = max(1, steps // 10)
    for step, rows in enumerate(order, start=1):
        now = Network(*weights)
        said, inner = _forward(now, x[rows], which[rows])
        here = known[rows].astype(np.float32)
        by_slope = (inner.slope - slope[rows]) * (here * (factor / max(float(here.sum()), 1.0)))[:, None]
        by_value = (said - value[rows]) * counts[rows] * np.float32(2.0 / batch)
        pull = _pulled(now, x[rows], inner, by_value, by_slope)
        pace = rate * (step / rise if step < rise else 0.5 + 0.5 * math.cos(math.pi * (step - rise) / (steps - rise)))
        for part, one, two, gradient in zip(weights, first, second, pull, strict=True):
            one += 0.1 * (gradient - one)
            two += 0.001 * (gradient * gradient - two)
            size = pace * math.sqrt(1.0 - 0.999**step) / (1.0 - 0.9**step)
            part -= np.float32(size) * one / (np.sqrt(two) + np.float32(1e-8))
    return Network(*weights)
