r"""Too many failures at once: sites without a gradient.

Each of ``parts`` fails with probability ``rate``; C calls at least ``limit`` failures a catastrophe. The number of
failures is binomial,

.. math:: P = \sum_{k \ge \text{limit}} \binom{n}{k} p^k (1-p)^{n-k}.

The program draws either every part (``law="bernoulli"``, one coordinate each) or only their number
(``law="binomial"``, a single coordinate). The severity counts in whole failures: it is piecewise constant.
Reference value: :math:`\log P = -14.0999` for 50 parts of rate 0.05 and the limit 13.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from scipy.stats import binom

from ._libraries import Backend, library

if TYPE_CHECKING:
    from probest import Problem


def problem(
    backend: Backend = "pyro",
    *,
    parts: int = 50,
    rate: float = 0.05,
    limit: int = 13,
    law: Literal["bernoulli", "binomial"] = "bernoulli",
) -> Problem:
    """At least ``limit`` failures among ``parts``."""
    from probest import Problem

    lib = library(backend)

    def adversary() -> Any:
        if law == "binomial":
            return lib.sample("failures", lib.dist.Binomial(parts, lib.xp.asarray(rate)))
        return lib.sample("failed", lib.dist.Bernoulli(rate * lib.xp.ones(parts)).to_event(1)).sum()

    def model(params: dict[str, Any], failures: Any) -> Any:
        return failures - params["limit"]

    def checker(failures: Any, excess: Any) -> Any:  # noqa: ARG001
        return excess

    return Problem(adversary, lib.bind(model, limit=limit), checker)


def log_prob(*, parts: int = 50, rate: float = 0.05, limit: int = 13) -> float:
    """The exact log P."""
    return float(binom.logsf(limit - 1, parts, rate))
