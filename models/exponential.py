r"""A sum of waiting times that is too long: sites that are not Gaussian.

D draws ``terms`` independent times from an exponential law of the given ``rate``; C calls a sum of at least ``limit`` a
catastrophe. The sum has a Gamma law, so

.. math:: P = Q(n, \lambda t)

with Q the regularised upper incomplete gamma function. In Gaussian coordinates the event is curved.
Reference value: :math:`\log P = -14.5513` for 20 terms of rate 1 and the limit 50.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from scipy.stats import gamma

from ._libraries import Backend, library

if TYPE_CHECKING:
    from probest import Problem


def problem(backend: Backend = "pyro", *, terms: int = 20, rate: float = 1.0, limit: float = 50.0) -> Problem:
    """The sum of ``terms`` exponentials, divided by their number; severity is in the same unit."""
    from probest import Problem

    lib = library(backend)

    def adversary() -> Any:
        return lib.sample("times", lib.dist.Exponential(rate * lib.xp.ones(terms)).to_event(1))

    def model(params: dict[str, Any], times: Any) -> Any:
        return (times.sum() - params["limit"]) / terms

    def checker(times: Any, excess: Any) -> Any:  # noqa: ARG001
        return excess

    return Problem(adversary, lib.bind(model, limit=limit), checker)


def log_prob(*, terms: int = 20, rate: float = 1.0, limit: float = 50.0) -> float:
    """The exact log P."""
    return float(gamma.logsf(limit, terms, scale=1 / rate))
