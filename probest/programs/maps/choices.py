"""The values that a discrete site can take, where they can be listed: those of one coordinate each."""

from __future__ import annotations

from typing import Any

import numpy as np

from probest.programs.maps.base import COUNTS, UnsupportedDistribution, find_rule
from probest.programs.maps.pieces import given_parameter, trials

__all__ = ["Choices", "choices"]

COUNTED = 64
"""Values of a count without an end (Poisson, Geometric) that are listed; what lies beyond is bounded."""

Choices = tuple[int, ...]


def choices(fn: Any) -> tuple[Choices, bool]:
    """The values of each element of a draw of ``fn``, increasing, and whether these are all; empty without a list.

    They are values that the site's map takes as its coordinate rises, one coordinate an element.
    """
    name = type(fn).__name__
    if name in ("Independent", "ExpandedDistribution"):
        return choices(fn.base_dist)
    try:
        _, name = find_rule(fn)
    except UnsupportedDistribution:
        return (), True
    if name not in COUNTS:
        return (), True
    if name.startswith("Bernoulli"):
        return (0, 1), True
    if name.startswith("Categorical"):
        return tuple(range(int(getattr(fn, given_parameter(fn, "probs", "logits")).shape[-1]))), True
    if name == "OrderedLogistic":
        return tuple(range(int(fn.cutpoints.shape[-1]) + 1)), True
    if name.startswith("Binomial"):
        return tuple(range(int(trials(fn).max(initial=0)) + 1)), True
    if name == "DiscreteUniform":
        try:
            low, high = int(np.min(np.asarray(fn.low))), int(np.max(np.asarray(fn.high)))
        except Exception:  # computed from other sites, or traced
            return (), True
        return tuple(range(low, high + 1)), True
    return tuple(range(COUNTED)), False
