r"""log Pr[x ≥ 0] of a Gaussian vector x, all entries of it, and what a shift of its mean does to that.

One entry after the other is drawn from what those before leave of its half-line, on a fixed lattice (separation of
variables), so that the number is a smooth function of mean and covariance. One entry alone is exact.

Reference: Genz (1992), Numerical computation of multivariate normal probabilities.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

__all__ = ["Orthant", "log_orthant", "orthant"]

Array = Any

_POINTS = 4_096  # of the lattice
_JITTER = 1e-9  # of the variances, so that entries may be copies of each other
_STEP = 0.15  # of a shift, in units in which the probability changes by a nat or the vector by a deviation
_STENCIL = np.arange(-3, 4)
_WEIGHTS = np.array(  # of central differences over seven points: second, third and fourth derivative
    [
        [1 / 90, -3 / 20, 3 / 2, -49 / 18, 3 / 2, -3 / 20, 1 / 90],
        [1 / 8, -1.0, 13 / 8, 0.0, -13 / 8, 1.0, -1 / 8],
        [-1 / 6, 2.0, -13 / 2, 28 / 3, -13 / 2, 2.0, -1 / 6],
    ]
)


class Orthant(NamedTuple):
    """log Pr[x ≥ 0], and its derivatives.

    weights ``(J,)``: where the mean's gain is, with sum 1; slope: the gradient of the log-probability along the vector
    whose product with ``weights`` is 1 and which covariance makes of them; sd: the standard deviation of weights·x.
    second, third, fourth: derivatives of the probability along that vector, over the probability.
    """

    log_prob: Array
    weights: Array
    slope: Array
    sd: Array
    second: Array
    third: Array
    fourth: Array


def orthant(s: Any, mean: Array, cov: Array) -> Orthant:
    """Of x with this mean ``(J,)`` and covariance ``(J, J)``, J ≥ 2."""
    xp, size = s.xp, mean.shape[0]
    sds = xp.sqrt(xp.linalg.diagonal(cov))
    step = 1e-3 * sds
    shifts = s.array(np.concatenate([np.eye(size), -np.eye(size)]), mean) * step
    sides = log_orthant(s, mean + shifts, cov)
    gradient = s.clip((sides[:size] - sides[size:]) / (2.0 * step), 0.0, None)
    slope = xp.sum(gradient)
    weights = gradient / slope
    spread = cov @ weights
    variance = xp.sum(weights * spread)
    sd = xp.sqrt(variance)
    towards = spread / variance
    by = _STEP / (1.0 / sd + slope)
    values = log_orthant(s, mean + (s.array(_STENCIL, mean) * by)[:, None] * towards, cov)
    middle = values[len(_STENCIL) // 2]
    ratios = xp.exp(values - middle)
    second, third, fourth = (xp.sum(s.array(w, mean) * ratios) / by**k for k, w in enumerate(_WEIGHTS, 2))
    return Orthant(middle, weights, slope, sd, second, third, fourth)


def log_orthant(s: Any, mean: Array, cov: Array) -> Array:
    """log Pr[x ≥ 0] for means ``(B, J)``, ``(B,)``."""
    xp, size = s.xp, mean.shape[1]
    diagonal = xp.linalg.diagonal(cov)
    jitter = max(_JITTER, 10.0 * float(xp.finfo(cov.dtype).eps))
    factor = xp.linalg.cholesky(s.with_diagonal(cov, diagonal * (1.0 + jitter)))
    log_u = s.array(np.log(_lattice(size - 1)), mean)
    total = 0.0 * mean[:, :1] + 0.0 * log_u[:, 0]
    drawn: list[Array] = []
    for j in range(size):
        known = mean[:, j : j + 1]
        for k, y in enumerate(drawn):
            known = known + factor[j, k] * y
        log_p = s.log_ndtr(known / factor[j, j])
        total = total + log_p
        if j < size - 1:
            drawn.append(-s.ndtri_exp(log_p + log_u[:, j]))
    top = xp.max(total, axis=1)
    found: Array = top + xp.log(xp.mean(xp.exp(total - top[:, None]), axis=1))
    return found


def _lattice(dim: int) -> np.ndarray:
    """Points within the unit cube, ``(n, dim)``: Richtmyer's, and their mirror images."""
    primes = np.array([2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53])
    if dim > len(primes):
        raise ValueError(f"at most {len(primes) + 1} entries together, not {dim + 1}")
    at = (np.arange(_POINTS // 2)[:, None] + 0.5) * np.sqrt(primes[:dim]) % 1.0
    at = np.abs(2.0 * at - 1.0)  # so that the integrand repeats itself smoothly
    found: np.ndarray = np.clip(np.concatenate([at, 1.0 - at]), 1e-12, 1.0 - 1e-12)
    return found
