"""The numerical pieces that rules are made of: all in the logarithms of both tails, exact however far out."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from probest.programs.maps.base import Array, UnsupportedDistribution

__all__ = [
    "at_least",
    "binomial_count",
    "category",
    "exceeds",
    "given_parameter",
    "log_masses",
    "log_odds",
    "log_softplus",
    "log_student",
    "log_tan",
    "logit",
    "lower_upper",
    "multinomial_counts",
    "positive",
    "symmetric",
    "trials",
    "truncated_score",
    "two_log_gammas",
    "unit_open",
    "within",
]


def within(s: Any, x: Array, low: Any, high: Any) -> Array:
    """x clipped to [low, high], with the gradient of x: only rounding takes it outside."""
    return x + s.stop_gradient(s.clip(x, low, high) - x)


def unit_open(s: Any, x: Array) -> Array:
    """x clipped to the open unit interval, with the gradient of x."""
    info = s.xp.finfo(x.dtype)
    return within(s, x, float(info.tiny), 1 - float(info.eps) / 2)


def positive(s: Any, log_x: Array) -> Array:
    """exp, kept inside the floats: a Gamma of small concentration has quantiles below them."""
    info = s.xp.finfo(log_x.dtype)
    least, largest = math.log(float(info.tiny)), math.log(float(info.max))
    return s.xp.exp(s.clip(log_x, least * (1 - 1e-6), largest * (1 - 1e-6)))


def lower_upper(s: Any, z: Array) -> tuple[Array, Array]:
    """(log Φ(z), log Φ(−z))."""
    return s.log_ndtr(z), s.log_ndtr(-z)


def symmetric(s: Any, z: Array, magnitude: Callable[[Array], Array]) -> Array:
    """A symmetric law from `magnitude`, which maps the log of the smaller tail's probability to |x|."""
    size = magnitude(s.log_ndtr(s.xp.where(z < 0, z, -z)))
    return s.xp.where(z < 0, -size, size)


def log_softplus(s: Any, x: Array) -> Array:
    """log(1 + e^x)."""
    return s.xp.logaddexp(x, s.xp.zeros_like(x))


def log_tan(s: Any, log_p: Array) -> Array:
    """log tan(½π p), for log p <= log ½, finite where p underflows."""
    p = s.xp.exp(s.clip(log_p, -20.0, None))
    small = log_p + math.log(math.pi / 2)
    return s.xp.where(log_p < -19.0, small, s.xp.log(s.xp.tan(0.5 * math.pi * p)))


def two_log_gammas(s: Any, first: Any, second: Any, base: Array) -> Array:
    """log G1 - log G2 of two Gammas from base (..., 2), larger with both coordinates; the logit of a Beta."""
    x, y = base[..., 0], base[..., 1]
    return s.gamma_log_quantile(s.array(first, x), x) - s.gamma_log_quantile(s.array(second, y), -y)


def log_student(s: Any, df: Any, z: Array) -> Array:
    """log √(df / χ²(df))."""
    half = 0.5 * s.array(df, z)
    return 0.5 * (s.xp.log(half) - s.gamma_log_quantile(half, -z))


def given_parameter(fn: Any, probs: str, logits: str) -> str:
    """Which of the two the user gave; the other is derived, lazily and after clamping."""
    if type(fn).__name__.endswith("Logits"):
        return logits
    if getattr(fn, "_param", None) is not None and vars(fn).get(logits) is fn._param:
        return logits
    return next((name for name in vars(fn) if name in (probs, logits)), logits)


def log_odds(fn: Any, s: Any, like: Array, probs: str = "probs", logits: str = "logits") -> tuple[Array, Array]:
    """(log p, log(1 - p)) of a Bernoulli parameter."""
    name = given_parameter(fn, probs, logits)
    value = s.array(getattr(fn, name), like)
    if name == probs:
        return s.xp.log(value), s.xp.log1p(-value)
    return -log_softplus(s, -value), -log_softplus(s, value)


def log_masses(fn: Any, s: Any, like: Array) -> Array:
    """Normalised log-probabilities (..., classes) of a categorical parameter."""
    name = given_parameter(fn, "probs", "logits")
    value = s.array(getattr(fn, name), like)
    value = s.xp.log(value) if name == "probs" else value
    return value - s.cumulative_logsumexp(value)[..., -1:]


def trials(fn: Any, name: str = "total_count") -> np.ndarray:
    """A number of trials, which decides shapes and so must be known."""
    try:
        return np.asarray(getattr(fn, name)).astype(np.int64)
    except Exception as error:
        raise UnsupportedDistribution(
            f"{type(fn).__name__} needs a {name} that is a plain number (it decides how many coordinates there are), "
            "not one computed from other sites or a traced argument"
        ) from error


def logit(fn: Any, s: Any, z: Array) -> Array:
    """log p − log(1 − p) of a Bernoulli parameter."""
    log_p, log_not = log_odds(fn, s, z)
    return log_p - log_not


def exceeds(s: Any, z: Array, log_lower: Array, log_upper: Array) -> Array:
    """Whether Φ(z) > F, given log F and log(1 - F): compared in the smaller tail."""
    lower, upper = lower_upper(s, z)
    return s.xp.where(log_lower < log_upper, lower > log_lower, upper < log_upper)


def at_least(s: Any, z: Array, log_p: Array, log_not: Array) -> Array:
    """Whether Φ(z) lies in the upper fraction p: a Bernoulli."""
    return exceeds(s, z, log_not, log_p)


def category(s: Any, z: Array, log_masses: Array) -> Array:
    """The class, an integer, from log masses (..., classes): the number of cumulative sums below Φ(z)."""
    lower = s.cumulative_logsumexp(log_masses)[..., :-1]
    upper = s.xp.flip(s.cumulative_logsumexp(s.xp.flip(log_masses, axis=-1)), axis=-1)[..., 1:]
    return s.xp.sum(s.xp.astype(exceeds(s, z[..., None], lower, upper), s.xp.int32), axis=-1)


def binomial_count(s: Any, z: Array, total: np.ndarray, log_p: Array, log_not: Array) -> Array:
    """The number of successes in `total` trials, at level Φ(z)."""
    largest = int(total.max(initial=0))
    k = np.arange(largest + 1)
    n = total[..., None]
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, largest + 1)))])
    choose = np.where(k <= n, log_factorial[n] - log_factorial[k] - log_factorial[np.maximum(n - k, 0)], -np.inf)
    heads, tails = s.array(k, z), s.array(np.maximum(n - k, 0), z)
    floor = math.log(float(s.xp.finfo(z.dtype).tiny)) * 1e6  # so that 0 · log 0 is 0
    log_p, log_not = s.clip(log_p, floor, None)[..., None], s.clip(log_not, floor, None)[..., None]
    return category(s, z, s.array(choose, z) + heads * log_p + tails * log_not)


def multinomial_counts(s: Any, base: Array, total: np.ndarray, log_masses: Array) -> Array:
    """Counts (..., classes) of the classes of base (..., trials), the first `total` of them."""
    classes = log_masses.shape[-1]
    drawn = s.one_hot(category(s, base, log_masses[..., None, :]), classes)
    used = s.array(np.arange(base.shape[-1]) < total[..., None], base)
    return s.xp.sum(s.xp.astype(drawn, base.dtype) * used[..., None], axis=-2)


def truncated_score(s: Any, z: Array, at_low: tuple[Array, Array] | None, at_high: tuple[Array, Array] | None) -> Array:
    """The normal score of the law given that it lies between two points, from (log F, log(1 - F)) at each.

    F = F(low) (1 - u) + F(high) u at level u, and the same for 1 - F: sums of positive terms, so exact in logs.
    """
    lower, upper = lower_upper(s, z)
    log_f = lower if at_high is None else lower + at_high[0]
    log_not = upper if at_low is None else upper + at_low[1]
    if at_low is not None:
        log_f = s.xp.logaddexp(log_f, upper + at_low[0])
    if at_high is not None:
        log_not = s.xp.logaddexp(log_not, lower + at_high[1])
    below = log_f < log_not
    score = s.ndtri_exp(s.xp.where(below, log_f, log_not))
    return s.xp.where(below, score, -score)
