"""``audit()``: several estimates of one problem by different means and seeds, and which of them to believe.

Whoever trained against an estimator, or chose a model by one, has an estimate that is too low (the optimizer's curse).
An audit asks others: the default strategy afresh, tempering of many particles, plain sampling as far as it reaches, or
methods of the user's own.

Reference: Smith & Winkler (2006), The optimizer's curse.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from probest.estimate import Estimate, check_whole, estimate
from probest.estimators.base import Estimator
from probest.estimators.monte_carlo import MonteCarlo
from probest.estimators.tempering import Tempering
from probest.evidence import Evidence
from probest.problem import Problem
from probest.programs.base import Observed
from probest.report.progress import Told
from probest.result import Case, Catastrophes, Result, Sample
from probest.seeds import number
from probest.verdict import agree, refuted

__all__ = ["Audit", "audit"]

SHARES = (0.6, 0.3, 0.1)
"""Of the budget: for the default strategy of ``estimate``, tempering of many particles, plain sampling."""

PRECISE = 0.3
"""Standard error, in nats, that an estimate may have to settle an audit.

A single method's own limit is wider: tempering calls itself converged at 0.5, and was seen 1.5 nats low.
"""

SELDOM = 3.0
"""Nats by which an estimate whose mean is P is above it in one case of twenty at most."""


@dataclass(frozen=True, repr=False)
class Audit(Result):
    """Estimates of one problem by different means, none of which knows of another. seconds: of all together."""

    estimates: tuple[Estimate, ...]
    seconds: float

    @property
    def estimate(self) -> Estimate:
        """The one to believe: the highest of those that have converged and are precise, unless another refutes it.

        One is refuted by a higher one with which it does not agree: what was missed makes an estimate too low. Where
        none stands, it is the highest of those that are not refuted and, if there are such, as precise: a vague one may
        be the highest by chance, though seldom by ``SELDOM`` nats (Markov's inequality, for a mean of P).
        """
        return believed(self.estimates)

    @property
    def conclusion(self) -> Evidence:
        """That of the estimate to believe."""
        return self.estimate.conclusion

    @property
    def converged(self) -> bool:
        """Whether one has converged to ``PRECISE`` and none refutes it."""
        return settles(self.estimate)

    @property
    def ledger(self) -> tuple[Evidence, ...]:  # type: ignore[override]
        """Conclusions of all the estimates."""
        return tuple(found.conclusion for found in self.estimates)

    @property
    def catastrophes(self) -> Catastrophes | None:
        return self.estimate.catastrophes

    def blocks(self, rows: int) -> Iterator[Catastrophes]:
        return self.estimate.blocks(rows)

    @property
    def drawn(self) -> Sample | None:
        return self.estimate.drawn

    @property
    def nearest(self) -> Case | None:
        return self.estimate.nearest

    @property
    def plates(self) -> Mapping[str, Sequence[str | None]]:
        return self.estimate.plates

    @property
    def observed(self) -> Mapping[str, Observed]:
        return self.estimate.observed

    @property
    def calls(self) -> int:  # type: ignore[override]
        """Model calls of all together."""
        return sum(found.calls for found in self.estimates)

    @property
    def settings(self) -> Mapping[str, Any]:  # type: ignore[override]
        """Those of the estimate to believe, with each one's method and seed."""
        each: dict[str, str] = {}
        for i, one in enumerate(self.estimates):
            name = one.conclusion.method
            name = f"{name} ({i + 1})" if name in each else name
            each[name] = f"budget {one.settings.get('budget')}, seed {one.seed}"
        return {**self.estimate.settings, "audited by": each}

    def __repr__(self) -> str:
        shown = ", ".join(f"{e.conclusion.method} {e.log_prob:.4g} ± {e.std_error:.2g}" for e in self.estimates)
        return f"Audit({shown}; converged={self.converged})"


def audit(
    problem: Problem,
    *,
    methods: Estimator | Sequence[Estimator] | None = None,
    budget: int = 200_000,
    seed: int = 1,
    callback: Told | None = None,
    progress: bool = True,
) -> Audit:
    """Estimate log P by several means.

    Args:
        problem: the problem.
        methods: an estimator, or several that share the budget equally; by default those of ``SHARES``.
        budget: model calls of all together.
        seed: the same seed gives the same audit. It should not be one that training used.
        callback: ``callback(done, total, text)`` is told of the model calls of each method as they are spent.
        progress: show a progress line (only ever in a terminal or notebook).

    Raises:
        ValueError: no methods, or an argument is out of range; and whatever ``estimate`` raises.
    """
    check_whole("budget", budget, least=1, unit=" of model calls")
    check_whole("seed", seed, least=0)
    root = np.random.SeedSequence(seed)
    return run_panel(problem, panel(methods, budget), lambda i: number(root, i), progress, callback)


Panel = Sequence[tuple[Estimator | None, int]]


def panel(methods: Estimator | Sequence[Estimator] | None, budget: int) -> Panel:
    """The methods (None is the default strategy), each with its part of the budget."""
    if methods is None:
        # a particle for each 150 calls or so, which reach an event of P = 1e-9
        many = Tempering(particles=max(256, int(SHARES[1] * budget) // 150))
        return [(m, max(1, int(share * budget))) for m, share in zip((None, many, MonteCarlo()), SHARES, strict=True)]
    chosen = list(methods) if isinstance(methods, Sequence) else [methods]
    if not chosen:
        raise ValueError("audit: no methods. Name an estimator, or None for the default ones")
    return [(method, max(1, budget // len(chosen))) for method in chosen]


def run_panel(
    problem: Problem,
    methods: Panel,
    seed_of: Callable[[int], int],
    progress: bool = False,
    callback: Told | None = None,
) -> Audit:
    """An audit by these methods, the i-th from the seed ``seed_of(i)``."""
    start = time.perf_counter()
    found = [
        estimate(problem, budget=budget, estimator=method, seed=seed_of(i), progress=progress, callback=callback)
        for i, (method, budget) in enumerate(methods)
    ]
    return Audit(tuple(found), time.perf_counter() - start)


def believed(estimates: Sequence[Estimate]) -> Estimate:
    """See :attr:`Audit.estimate`."""
    stand = [e for e in estimates if settles(e) and not refutes(estimates, e)]
    rest = [e for e in estimates if not refutes(estimates, e)]
    highest = max(e.log_prob for e in estimates)
    sharp = [e for e in rest if e.std_error <= PRECISE and e.log_prob > highest - SELDOM]
    return max(stand or sharp or rest or estimates, key=lambda e: (e.log_prob, -e.upper))


def settles(one: Estimate) -> bool:
    """Whether it has converged, and is precise."""
    return one.converged and one.std_error <= PRECISE


def refutes(others: Sequence[Estimate], one: Estimate) -> bool:
    """Whether one of the others is higher, and disagrees."""
    found = [e.conclusion for e in others if e is not one and math.isfinite(e.log_prob)]
    return (
        refuted(one.conclusion, found)
        if math.isfinite(one.log_prob)
        else any(not agree(one.conclusion, other) for other in found)
    )
