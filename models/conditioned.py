r"""An adversary that is conditioned on what a recogniser read: P given an observation.

D draws x from :math:`N(0, I)` and a sensor reads :math:`r = x_1 + N(0, \tau^2)`, which came out as ``reading``. M is
:math:`y = \rho x_1 + \sqrt{1 - \rho^2}\, x_2` and C calls :math:`y \ge \beta` a catastrophe. All is Gaussian, so

.. math::
    y \mid r \sim N\Bigl(\frac{\rho r}{1 + \tau^2},\; 1 - \frac{\rho^2}{1 + \tau^2}\Bigr), \qquad
    r \sim N(0, 1 + \tau^2).

With ``reading`` far out, or ``noise`` small, D itself cannot be sampled efficiently.
Reference values at the defaults: :math:`\log P = -11.3084`, log evidence :math:`-4.6305`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from scipy.stats import norm

from ._libraries import Backend, library

if TYPE_CHECKING:
    from probest import Problem


def problem(
    backend: Backend = "pyro",
    *,
    dim: int = 20,
    beta: float = 5.0,
    reading: float = 3.0,
    noise: float = 0.5,
    correlation: float = 0.6,
) -> Problem:
    """The conditioned half-space in ``dim >= 2`` dimensions; ``noise`` is the sensor's standard deviation."""
    from probest import Problem

    lib = library(backend)

    def adversary() -> Any:
        x = lib.sample("x", lib.dist.Normal(lib.xp.zeros(dim), 1.0).to_event(1))
        lib.sample("reading", lib.dist.Normal(x[0], noise), obs=lib.xp.asarray(reading, dtype=lib.xp.float32))
        return x

    def model(params: dict[str, Any], x: Any) -> Any:
        rho = params["correlation"]
        return rho * x[0] + lib.xp.sqrt(1 - rho**2) * x[1] - params["beta"]

    def checker(x: Any, y: Any) -> Any:  # noqa: ARG001
        return y

    return Problem(adversary, lib.bind(model, beta=beta, correlation=correlation), checker)


def log_prob(*, beta: float = 5.0, reading: float = 3.0, noise: float = 0.5, correlation: float = 0.6) -> float:
    """The exact log P given the reading, the same in every dimension."""
    total = 1 + noise**2
    mean, scale = correlation * reading / total, math.sqrt(1 - correlation**2 / total)
    return float(norm.logsf((beta - mean) / scale))


def log_evidence(*, reading: float = 3.0, noise: float = 0.5) -> float:
    """The exact log-density of the reading under D."""
    return float(norm.logpdf(reading, scale=math.sqrt(1 + noise**2)))
