r"""Several ways to go wrong: a union of orthogonal half-spaces.

D draws x from :math:`N(0, I)`. C calls it a catastrophe if any of the first coordinates exceeds its own limit,
:math:`\max_i (x_i - \beta_i) \ge 0`. The coordinates are independent, so inclusion and exclusion add up to

.. math:: \log P = \log\Bigl(1 - \prod_i \Phi(\beta_i)\Bigr).

An estimator that loses one of k equal modes is off by :math:`\log(k / (k-1))`: 0.29 for four.
Reference value: :math:`\log P = -13.6787` for four half-spaces at 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import log_ndtr

from ._libraries import Backend, library

if TYPE_CHECKING:
    from probest import Problem

BETAS = (5.0, 5.0, 5.0, 5.0)


def problem(backend: Backend = "pyro", *, dim: int = 50, betas: Sequence[float] = BETAS) -> Problem:
    """The union of ``len(betas) <= dim`` half-spaces in ``dim`` dimensions; M says how far x is beyond each."""
    from probest import Problem

    lib = library(backend)

    def adversary() -> Any:
        return lib.sample("x", lib.dist.Normal(lib.xp.zeros(dim), 1.0).to_event(1))

    def model(params: dict[str, Any], x: Any) -> Any:
        return x[: len(betas)] - params["betas"]

    def checker(x: Any, y: Any) -> Any:  # noqa: ARG001
        return y.max()

    return Problem(adversary, lib.bind(model, betas=list(betas)), checker)


def log_prob(*, betas: Sequence[float] = BETAS) -> float:
    """The exact log P, the same in every dimension."""
    return float(np.log(-np.expm1(log_ndtr(np.asarray(betas)).sum())))
