"""What "tilt, propagate, correct" needs to know of each neuron, from quadrature of its nonlinearity alone.

With pre-activation x ~ N(h, v), ε standard normal, f̃ = f − E f, and Gaussian integration by parts:

    D = E f' = E[f̃ ε] / √v            f₂ = E f'' = E[f̃ He₂] / v            f₃ = E f''' = E[f̃ He₃] / v^1.5
    q = Cov(f, f') = E[f̃² ε] / (2√v)   dv = ∂ Var f / ∂v = E[f̃² He₂] / (2v)
    ν = 2 (dv − D² − D f₃ v)           κ' = 2 (q − D f₂ v)
    κ₃, κ₄: cumulants of the residual f̃ − D (x − h);  κ₃₁: their third's response to a shift of h

so that no derivative of f is ever taken, and kinks and jumps need nothing of their own. f is centred first: near a
constant the raw sums would lose all digits.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from probest.moments.hermite import Expansion, coefficients

__all__ = ["Statistics", "statistics"]

Array = Any


class Statistics(NamedTuple):
    """Each ``(n,)``, one entry per neuron, named as in the module's formulas; all but the mean are 0 where v = 0."""

    mean: Array
    variance: Array
    D: Array
    f2: Array
    f3: Array
    q: Array
    dv: Array
    nu: Array
    kappa: Array
    kappa3: Array
    kappa4: Array
    k31: Array


def statistics(s: Any, expansion: Expansion) -> Statistics:
    """The statistics of the neurons whose nonlinearity was expanded; ``s``: the backend's special functions."""
    xp = s.xp
    x, f, w = expansion.nodes, expansion.centred, expansion.weights
    live = expansion.std > 0
    std = xp.where(live, expansion.std, 1.0)
    square, v = f * f, std * std

    def mean_of(values: Array) -> Array:
        return xp.where(live, xp.sum(w * values, axis=0), 0.0)

    D, f2, f3 = (
        math.sqrt(math.factorial(k)) * xp.where(live, c, 0.0) / std**k
        for k, c in enumerate(coefficients(s, expansion, 3), start=1)
    )
    q, dv = mean_of(square * x) / (2 * std), mean_of(square * (x * x - 1)) / (2 * v)
    residual = f - D * std * x
    return Statistics(
        mean=expansion.mean,
        variance=expansion.variance,
        D=D,
        f2=f2,
        f3=f3,
        q=q,
        dv=dv,
        nu=2 * (dv - D * D - D * f3 * v),
        kappa=2 * (q - D * f2 * v),
        kappa3=mean_of(residual**3),
        kappa4=mean_of(residual**4) - 3 * mean_of(residual**2) ** 2,
        k31=mean_of(residual**3 * x) / std,
    )
