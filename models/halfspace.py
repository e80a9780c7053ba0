r"""A half-space of a Gaussian: the problem whose answer, and whose every gradient, is known exactly.

D draws x from :math:`N(\ell e_1, I)` in ``dim`` dimensions. M is linear, :math:`y = a \cdot x - \beta`, with
:math:`a = \cos(\alpha) e_1 + \sin(\alpha) e_2`. C calls :math:`y \ge 0` a catastrophe. Then

.. math:: \log P = \log \Phi(-m), \qquad m = \beta - \ell \cos \alpha.

Parameters of M: ``beta``, ``angle`` (:math:`\alpha`). Parameter of D: ``location`` (:math:`\ell`).
Reference value: :math:`\log P = -15.0650` at the defaults, beta 5, location 0, in every dimension.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from scipy.stats import norm

from ._libraries import Backend, library

if TYPE_CHECKING:
    from probest import Problem


def problem(
    backend: Backend = "pyro", *, dim: int = 100, beta: float = 5.0, angle: float = 0.0, location: float = 0.0
) -> Problem:
    """The half-space in ``dim >= 2`` dimensions. Model and adversary own their parameters."""
    from probest import Problem

    lib = library(backend)

    def adversary(params: dict[str, Any]) -> Any:
        centre = lib.xp.concatenate([params["location"].reshape(1), lib.xp.zeros(dim - 1)])
        return lib.sample("x", lib.dist.Normal(centre, 1.0).to_event(1))

    def model(params: dict[str, Any], x: Any) -> Any:
        return lib.xp.cos(params["angle"]) * x[0] + lib.xp.sin(params["angle"]) * x[1] - params["beta"]

    def checker(x: Any, y: Any) -> Any:  # noqa: ARG001
        return y

    return Problem(lib.bind(adversary, location=location), lib.bind(model, beta=beta, angle=angle), checker)


def log_prob(*, beta: float = 5.0, angle: float = 0.0, location: float = 0.0) -> float:
    """The exact log P, the same in every dimension."""
    return float(norm.logsf(beta - location * math.cos(angle)))


def gradient(*, beta: float = 5.0, angle: float = 0.0, location: float = 0.0) -> dict[str, float]:
    """The exact derivative of log P in each parameter."""
    margin = beta - location * math.cos(angle)
    hazard = math.exp(norm.logpdf(margin) - norm.logsf(margin))
    return {
        "beta": -hazard,
        "angle": -hazard * location * math.sin(angle),
        "location": hazard * math.cos(angle),
    }
