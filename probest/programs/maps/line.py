"""Laws on the line: ``fn, special, z -> value``, monotone in z."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from probest.backends import special as shared
from probest.programs.maps.base import CHECKS, QUANTILES, Array, UnsupportedDistribution, find_rule
from probest.programs.maps.pieces import (
    log_softplus,
    log_tan,
    logit,
    lower_upper,
    positive,
    symmetric,
    truncated_score,
    unit_open,
    within,
)

__all__ = ["LOG_CDFS"]

LOG_2 = math.log(2.0)
_NODES, _NODE_WEIGHTS = np.polynomial.legendre.leggauss(48)


def _uniform(fn: Any, s: Any, z: Array) -> Array:
    low, high = s.array(fn.low, z), s.array(fn.high, z)
    share = s.xp.exp(s.log_ndtr(s.xp.where(z < 0, z, -z))) * (high - low)
    return within(s, s.xp.where(z < 0, low + share, high - share), low, s.below(s.stop_gradient(high)))


def _asymmetric_laplace(fn: Any, s: Any, z: Array) -> Array:
    asymmetry = s.array(fn.asymmetry, z)
    lower, upper = lower_upper(s, z)
    left = lower + s.xp.log1p(asymmetry**-2)
    right = -upper - s.xp.log1p(asymmetry**2)
    return fn.loc + fn.scale * s.xp.where(left < 0, left * asymmetry, right / asymmetry)


def _cauchy(fn: Any, s: Any, z: Array) -> Array:
    def magnitude(log_tail: Array) -> Array:
        tiny = math.log(float(s.xp.finfo(z.dtype).tiny)) + 4
        return 1 / s.xp.tan(s.xp.exp(s.clip(log_tail, tiny, None)) * math.pi)

    return fn.loc + fn.scale * symmetric(s, z, magnitude)


def _half_cauchy(fn: Any, s: Any, z: Array) -> Array:
    return fn.scale * s.xp.exp(_soft_laplace_score(s, z))


def _soft_laplace_score(s: Any, z: Array) -> Array:
    return symmetric(s, z, lambda log_tail: -log_tan(s, log_tail))


def _exponentially_tilted(s: Any, z: Array, tilt: Array) -> Array:
    """The quantile on (0, 1) of the density e^(tilt x): log1p(u expm1(tilt)) / tilt, from the end where it is small."""
    flat = abs(tilt) < 1e-4
    t = -abs(s.xp.where(flat, 1.0, tilt))  # decaying: from 0 for a negative tilt, from 1 for a positive one
    up = s.xp.where(tilt > 0, -z, z)
    lower, upper = lower_upper(s, up)
    near = s.xp.log1p(s.xp.exp(lower) * s.xp.expm1(t)) / t
    far = s.xp.logaddexp(t + lower, upper) / t
    x = s.xp.where(lower < upper, near, far)
    u = s.xp.exp(lower)
    x = s.xp.where(flat, u * (1 - 0.5 * abs(tilt) * (u - 1)), x)
    return s.xp.where(tilt > 0, 1 - x, x)


def _power_law(fn: Any, s: Any, z: Array) -> Array:
    log_low = s.xp.log(s.array(fn.low, z))
    span = s.xp.log(s.array(fn.high, z)) - log_low
    value = s.xp.exp(log_low + span * _exponentially_tilted(s, z, (fn.alpha + 1) * span))
    return within(s, value, fn.low, fn.high)


def _generalized_pareto(fn: Any, s: Any, z: Array) -> Array:
    zero = fn.concentration == 0
    k, upper = s.xp.where(zero, 1.0, fn.concentration), s.log_ndtr(-z)
    return fn.loc + fn.scale * s.xp.where(zero, -upper, s.xp.expm1(-k * upper) / k)


def _kumaraswamy(fn: Any, s: Any, z: Array) -> Array:
    log_y = shared.log_neg_log_ndtr(s, -z) - s.xp.log(s.array(fn.concentration0, z))
    return unit_open(s, s.xp.exp(_log1mexp_exp(s, log_y) / fn.concentration1))


def _dagum(fn: Any, s: Any, z: Array) -> Array:
    log_y = shared.log_neg_log_ndtr(s, z) - s.xp.log(s.array(fn.concentration, z))
    log_expm1 = s.xp.exp(log_y) + _log1mexp_exp(s, log_y)
    return fn.scale * s.xp.exp(-log_expm1 / fn.sharpness)


def _log1mexp_exp(s: Any, log_y: Array) -> Array:
    """log(1 - exp(-y)), finite where y underflows."""
    y = s.xp.exp(s.clip(log_y, -17.0, None))
    return s.xp.where(log_y < -17.0, log_y, s.xp.log(-s.xp.expm1(-y)))


def _skew_logistic(fn: Any, s: Any, z: Array) -> Array:
    log_y = shared.log_neg_log_ndtr(s, z) - s.xp.log(s.array(fn.asymmetry, z))
    return fn.loc - fn.scale * (s.xp.exp(log_y) + _log1mexp_exp(s, log_y))


def _gamma(fn: Any, s: Any, z: Array) -> Array:
    rate = s.array(fn.rate, z)
    return positive(s, s.gamma_log_quantile(s.array(fn.concentration, z), z) - s.xp.log(rate))


def _inverse_gamma(fn: Any, s: Any, z: Array) -> Array:
    gamma = fn.base_dist
    return positive(s, s.xp.log(s.array(gamma.rate, z)) - s.gamma_log_quantile(s.array(gamma.concentration, z), -z))


def _gompertz(fn: Any, s: Any, z: Array) -> Array:
    return s.xp.log1p(-s.log_ndtr(-z) / fn.concentration) / fn.rate


def _weibull(fn: Any, s: Any, z: Array) -> Array:
    return fn.scale * s.xp.exp(shared.log_neg_log_ndtr(s, -z) / fn.concentration)


def _von_mises(fn: Any, s: Any, z: Array) -> Array:
    """loc ± (π - η), wrapped, where ∫ e^(κ (cos t - 1)) dt over the η next to ±π has the share of the smaller tail.

    Bisection, then Newton's steps in log η on the log of the integral; the last of them carries the derivatives.
    """
    xp, kappa = s.xp, s.array(fn.concentration, z) + s.xp.zeros_like(z)
    log_tail = s.log_ndtr(xp.where(z < 0, z, -z))
    nodes, weights = s.array(_NODES, z), s.array(_NODE_WEIGHTS, z)

    def log_mass(eta: Array) -> tuple[Array, Array]:
        """log of the integral, and log of the integrand at its inner end."""
        theta = math.pi - eta
        reach = xp.sqrt(theta**2 + 20.0 * math.pi**2 / kappa) - theta  # by there the integrand has fallen by e^40
        width = s.stop_gradient(xp.where(reach < eta, reach, eta))[..., None]
        step = 0.5 * width * (nodes + 1.0)
        fall = -2.0 * xp.sin(eta[..., None] - 0.5 * step) * xp.sin(0.5 * step)
        top = -2.0 * kappa * xp.cos(0.5 * eta) ** 2
        inside = xp.sum(0.5 * width * weights * xp.exp(kappa[..., None] * fall), axis=-1)
        return top + xp.log(inside), top

    whole = log_mass(xp.zeros_like(kappa) + math.pi)[0]

    def excess(eta: Array) -> tuple[Array, Array]:
        """By how much the log of the integral is too large, and how fast it rises with log η."""
        mass, top = log_mass(eta)
        return mass - whole - LOG_2 - log_tail, eta * xp.exp(top - mass)

    def halve(bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bracket
        middle = 0.5 * (low + high)
        much = excess(middle)[0] > 0
        return xp.where(much, low, middle), xp.where(much, middle, high)

    def newton(eta: Array) -> Array:
        gap, rate = excess(eta)
        return s.clip(eta * xp.exp(s.clip(-gap / rate, -12.0, 0.7)), None, math.pi)

    least = s.clip(math.pi - 14.0 / xp.sqrt(kappa), 0.0, None)
    low, high = s.repeat(12, halve, (least, xp.zeros_like(kappa) + math.pi))
    eta = s.stop_gradient(s.repeat(6, newton, 0.5 * (low + high)))
    gap, rate = excess(eta)
    eta = eta * (1.0 - gap / s.stop_gradient(rate))
    angle = fn.loc + xp.where(z < 0, eta - math.pi, math.pi - eta)
    turns = xp.floor((s.stop_gradient(angle) + math.pi) / (2.0 * math.pi))
    return angle - 2.0 * math.pi * xp.where(abs(angle) < math.pi * (1.0 + 1e-6), 0.0, turns)  # ±π, rounded, stay


def _lower_power_law(fn: Any, s: Any, z: Array) -> Array:
    return fn.low * s.xp.exp(s.log_ndtr(-z) / (1 + fn.alpha))


def _truncated_law(fn: Any) -> str:
    _, name = find_rule(fn.base_dist)
    if name not in LOG_CDFS:
        raise UnsupportedDistribution(
            f"{type(fn).__name__} of {name} has no exact map from standard normals; "
            f"{', '.join(LOG_CDFS)} can be truncated"
        )
    return name


def _truncated(fn: Any, s: Any, z: Array) -> Array:
    """NumPyro's LeftTruncated, RightTruncated and TwoSidedTruncated distributions of a location-scale law."""
    base, name = fn.base_dist, _truncated_law(fn)

    def tails(x: Any) -> tuple[Array, Array]:
        y = (s.array(x, z) - base.loc) / base.scale
        return LOG_CDFS[name](s, y), LOG_CDFS[name](s, -y)

    low, high = getattr(fn, "low", None), getattr(fn, "high", None)
    at_low, at_high = (None if x is None else tails(x) for x in (low, high))
    return within(s, QUANTILES[name](base, s, truncated_score(s, z, at_low, at_high)), low, high)


LOG_CDFS: dict[str, Callable[[Any, Array], Array]] = {  # of the standard law; each is symmetric
    "Normal": lambda s, y: s.log_ndtr(y),
    "Cauchy": lambda s, y: s.xp.log(s.xp.atan2(s.xp.ones_like(y), -y) / math.pi),
    "Laplace": lambda s, y: s.xp.where(y < 0, y - LOG_2, s.xp.log1p(-0.5 * s.xp.exp(-s.clip(y, 0.0, None)))),
    "Logistic": lambda s, y: -log_softplus(s, -y),
    "SoftLaplace": lambda s, y: (
        s.xp.where(y < -20, y, s.xp.log(s.xp.atan(s.xp.exp(s.clip(y, -20.0, 80.0))))) + math.log(2 / math.pi)
    ),
}

QUANTILES |= {
    "AsymmetricLaplace": _asymmetric_laplace,
    "AsymmetricLaplaceQuantile": lambda fn, s, z: _asymmetric_laplace(fn._ald, s, z),
    "Cauchy": _cauchy,
    "ContinuousBernoulli": lambda fn, s, z: _exponentially_tilted(s, z, fn.logits),
    "Dagum": _dagum,
    "DoublyTruncatedPowerLaw": _power_law,
    "Exponential": lambda fn, s, z: -s.log_ndtr(-z) / fn.rate,
    "Gamma": _gamma,
    "GeneralizedPareto": _generalized_pareto,
    "Gompertz": _gompertz,
    "Gumbel": lambda fn, s, z: fn.loc - fn.scale * shared.log_neg_log_ndtr(s, z),
    "HalfCauchy": _half_cauchy,
    "HalfNormal": lambda fn, s, z: fn.scale * s.xp.exp(shared.log_half_normal(s, z)),
    "InverseGamma": _inverse_gamma,
    "Kumaraswamy": _kumaraswamy,
    "Laplace": lambda fn, s, z: fn.loc + fn.scale * symmetric(s, z, lambda log_tail: -(log_tail + LOG_2)),
    "LeftTruncatedDistribution": _truncated,
    "Levy": lambda fn, s, z: fn.loc + fn.scale * s.xp.exp(-2 * shared.log_half_normal(s, -z)),
    "Logistic": lambda fn, s, z: fn.loc + fn.scale * (s.log_ndtr(z) - s.log_ndtr(-z)),
    "LogitRelaxedBernoulli": lambda fn, s, z: (s.log_ndtr(z) - s.log_ndtr(-z) + logit(fn, s, z)) / fn.temperature,
    "LowerTruncatedPowerLaw": _lower_power_law,
    "Normal": lambda fn, _, z: fn.loc + fn.scale * z,
    "RightTruncatedDistribution": _truncated,
    "SkewLogistic": _skew_logistic,
    "SoftLaplace": lambda fn, s, z: fn.loc + fn.scale * _soft_laplace_score(s, z),
    "TwoSidedTruncatedDistribution": _truncated,
    "Uniform": _uniform,
    "VonMises": _von_mises,
    "Weibull": _weibull,
}

CHECKS |= dict.fromkeys(
    ("LeftTruncatedDistribution", "RightTruncatedDistribution", "TwoSidedTruncatedDistribution"), _truncated_law
)
