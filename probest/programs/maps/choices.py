"""The values that a discrete site can take, where they can be listed: those of one coordinate each."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from probest.programs.maps.base import COUNTS, UnsupportedDistribution, find_rule
from probest.programs.maps.pieces import given_parameter, trials

__all__ = ["Listed", "choices"]

COUNTED = 64
"""Values of a count without an end (Poisson, NegativeBinomial) that are listed; what lies beyond is bounded."""

_COMPOUNDS = ("BetaBinomial", "GammaPoisson", "NegativeBinomial")  # whose last coordinate decides the count
_ONE_HOT = ("OneHotCategorical", "OneHotCategoricalStraightThrough")


class Listed(NamedTuple):
    """The values of each element of a draw, increasing; whether these are all; whether they say where a 1 stands."""

    choices: tuple[int, ...] = ()
    complete: bool = True
    one_hot: bool = False


def choices(fn: Any) -> Listed:
    """The values of each element of a draw of ``fn``; none where they cannot be listed.

    They are values that the site's map takes as the last coordinate of an element rises.
    """
    name = type(fn).__name__
    if name in ("Independent", "ExpandedDistribution"):
        return choices(fn.base_dist)
    try:
        _, name = find_rule(fn)
    except UnsupportedDistribution:
        return Listed()
    if name in _ONE_HOT:
        return Listed(tuple(range(int(fn.event_shape[-1]))), one_hot=True)
    if name == "ZeroInflatedDistribution" or name == "ZeroInflatedProbs":
        inner = choices(fn.base_dist)
        return inner if inner.choices[:1] == (0,) and not inner.one_hot else Listed()
    if name not in COUNTS and name not in _COMPOUNDS:
        return Listed()
    if name.startswith("Bernoulli"):
        return Listed((0, 1))
    if name.startswith("Categorical"):
        return Listed(tuple(range(int(getattr(fn, given_parameter(fn, "probs", "logits")).shape[-1]))))
    if name == "OrderedLogistic":
        return Listed(tuple(range(int(fn.cutpoints.shape[-1]) + 1)))
    if name.startswith(("Binomial", "BetaBinomial")):
        return Listed(tuple(range(int(trials(fn).max(initial=0)) + 1)))
    if name == "DiscreteUniform":
        try:
            low, high = int(np.min(np.asarray(fn.low))), int(np.max(np.asarray(fn.high)))
        except Exception:  # computed from other sites, or traced
            return Listed()
        return Listed(tuple(range(low, high + 1)))
    return Listed(tuple(range(COUNTED)), complete=False)
