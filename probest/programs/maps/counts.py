"""Counts and classes from one coordinate: ``fn, special, z -> value``, piecewise constant and nondecreasing in z."""

from __future__ import annotations

from typing import Any

from probest.programs.maps.base import CHECKS, COUNTS, Array
from probest.programs.maps.pieces import at_least, binomial_count, category, log_masses, log_odds, lower_upper, trials


def _discrete_uniform(fn: Any, s: Any, z: Array) -> Array:
    low, high = s.array(fn.low, z), s.array(fn.high, z)
    size = s.xp.astype(high - low + 1, z.dtype)
    lower, upper = lower_upper(s, z)
    rank = s.xp.where(z < 0, s.xp.ceil(size * s.xp.exp(lower)) - 1, size - 1 - s.xp.floor(size * s.xp.exp(upper)))
    return low + s.clip(s.maximum(rank, s.xp.zeros_like(rank)), None, size - 1)


def _geometric(fn: Any, s: Any, z: Array) -> Array:
    _, log_not = log_odds(fn, s, z)
    return s.clip(s.xp.ceil(s.log_ndtr(-z) / log_not) - 1, 0.0, None)


def _ordered_logistic(fn: Any, s: Any, z: Array) -> Array:
    latent = s.array(fn.predictor, z) + s.log_ndtr(z) - s.log_ndtr(-z)
    return s.xp.sum(s.xp.astype(latent[..., None] > fn.cutpoints, s.xp.int32), axis=-1)


COUNTS |= {
    **dict.fromkeys(
        ("Bernoulli", "BernoulliLogits", "BernoulliProbs"), lambda fn, s, z: at_least(s, z, *log_odds(fn, s, z))
    ),
    **dict.fromkeys(
        ("Binomial", "BinomialLogits", "BinomialProbs"),
        lambda fn, s, z: binomial_count(s, z, trials(fn), *log_odds(fn, s, z)),
    ),
    **dict.fromkeys(
        ("Categorical", "CategoricalLogits", "CategoricalProbs"), lambda fn, s, z: category(s, z, log_masses(fn, s, z))
    ),
    **dict.fromkeys(("Geometric", "GeometricLogits", "GeometricProbs"), _geometric),
    "DiscreteUniform": _discrete_uniform,
    "OrderedLogistic": _ordered_logistic,
    "Poisson": lambda fn, s, z: s.poisson_quantile(s.array(fn.rate, z), z),
}

CHECKS |= dict.fromkeys(("Binomial", "BinomialLogits", "BinomialProbs"), trials)
