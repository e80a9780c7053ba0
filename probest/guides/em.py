"""Expectation maximisation and the choice of the number of components, as the mixtures share them.

References: Dempster, Laird & Rubin (1977), Maximum likelihood from incomplete data via the EM algorithm; Schwarz
(1978), Estimating the dimension of a model (BIC).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

from probest.evidence import Floats

__all__ = ["expectation_maximisation", "least_bic"]

Law = TypeVar("Law")

_GAIN = 1e-3  # nats a point: a step that gains less is the last


def expectation_maximisation(
    share: Floats, step: Callable[[Floats], tuple[float, Floats, Law]], steps: int
) -> tuple[float, Law]:
    """At most ``steps`` steps from the shares of the points in the components; the mean log-likelihood and the law.

    ``step(share)`` maximises, then expects: the mean log-likelihood of the new law, the new shares, and the law.
    """
    value, share, law = step(share)
    for _ in range(steps - 1):
        last = value
        value, share, law = step(share)
        if value - last < _GAIN:
            break
    return value, law


def least_bic(
    fit: Callable[[int], tuple[float, Law]],
    size: Callable[[int], float],
    n_eff: float,
    *,
    most: int,
    points: float,
    patience: int,
) -> Law:
    """The law of 1 to ``most`` components with the least BIC.

    fit: mean log-likelihood and law of k components. size: number of parameters. points: effective points that each
    component needs. patience: so many more components may fail to help before the search ends.
    """
    value, best = fit(1)
    least, worse = _bic(value, size(1), n_eff), 0
    for k in range(2, most + 1):
        if n_eff / k < points or worse >= patience:
            break
        value, law = fit(k)
        bic = _bic(value, size(k), n_eff)
        if bic < least:
            least, best, worse = bic, law, 0
        else:
            worse += 1
    return best


def _bic(value: float, size: float, n_eff: float) -> float:
    return -2.0 * n_eff * value + size * math.log(max(n_eff, 2.0))
