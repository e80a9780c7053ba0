r"""Far out in no direction at all: the outside of a sphere.

D draws x from :math:`N(0, I)` in ``dim`` dimensions, C calls :math:`|x| \ge r` a catastrophe, and
:math:`|x|^2` has a chi-squared law:

.. math:: P = Q_{\chi^2_d}(r^2).

No single direction leads to the event, so methods that look for the nearest point, or fit a few Gaussians, fail.
Reference value: the default radius, 14.4678 in 100 dimensions, is where P is 1e-9.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from scipy.stats import chi2

from ._libraries import Backend, library

if TYPE_CHECKING:
    from probest import Problem

LOG_PROB = math.log(1e-9)


def radius_at(log_prob: float = LOG_PROB, *, dim: int = 100) -> float:
    """The radius at which log P is ``log_prob`` (above -700, what a float64 probability can hold)."""
    return math.sqrt(chi2.isf(math.exp(log_prob), dim))


def problem(backend: Backend = "pyro", *, dim: int = 100, radius: float | None = None) -> Problem:
    """The sphere in ``dim`` dimensions, by default with the radius where P is 1e-9."""
    from probest import Problem

    lib = library(backend)

    def adversary() -> Any:
        return lib.sample("x", lib.dist.Normal(lib.xp.zeros(dim), 1.0).to_event(1))

    def model(params: dict[str, Any], x: Any) -> Any:
        return lib.xp.sqrt((x**2).sum()) - params["radius"]

    def checker(x: Any, y: Any) -> Any:  # noqa: ARG001
        return y

    return Problem(adversary, lib.bind(model, radius=radius_at(dim=dim) if radius is None else radius), checker)


def log_prob(*, dim: int = 100, radius: float | None = None) -> float:
    """The exact log P."""
    return LOG_PROB if radius is None else float(chi2.logsf(radius**2, dim))
