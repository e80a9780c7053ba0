"""The conclusion of methods that learn a guide by rounds of draws.

Fresh draws of the last guide estimate P. All draws, those of learning among them, are weighed as draws of one mixture
(Veach & Guibas 1995) and estimate it a second time, and the two have to agree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from probest import diagnostics
from probest.evidence import Code, Evidence, Floats, Note, Particles
from probest.verdict import imprecise, reach, wanted_error

__all__ = ["Trust", "weighed"]


@dataclass(frozen=True)
class Trust:
    """When the weights of fresh draws are believed.

    heavy: Pareto shape of weights without a variance to speak of. largest: share of one weight below which their shape
    tells nothing. few: effective draws that are too few to conclude from. learned_by_heart: guides may know single
    draws that they were fitted to, which makes all draws as one mixture too low: then that is no objection.
    """

    heavy: float
    largest: float
    few: float
    learned_by_heart: bool = False

    def complaints(self, log_w: Floats, pooled: Floats, precision: float | None) -> list[Note]:
        """What is against an estimate from fresh draws ``log_w``, beside all draws as one mixture, ``pooled``."""
        log_prob, error = diagnostics.log_mean_exp(log_w)
        second, second_error = diagnostics.log_mean_exp(pooled)
        ess, khat = diagnostics.effective_sample_size(log_w), diagnostics.pareto_khat(log_w)
        notes: list[Note] = []
        hits = int(np.count_nonzero(np.isfinite(log_w)))
        if not hits:
            return [Note(Code.NO_HITS, "no fresh draw of the guide was a catastrophe: raise the budget.")]
        largest = float(np.exp(np.max(log_w) - diagnostics.log_sum_exp(log_w)))
        if khat > self.heavy and largest > self.largest and ess < 0.4 * hits:
            notes.append(Note(Code.HEAVY_TAILS, f"the weights are heavy-tailed (k̂ = {khat:.2f}): raise the budget."))
        if ess < self.few:
            notes.append(Note(Code.FEW_COUNT, f"only {ess:.0f} effective samples: raise the budget."))
        apart = second - log_prob
        if (apart if self.learned_by_heart else abs(apart)) > reach(error, second_error):
            sentence = "fresh draws and all draws as one disagree: the guide misses catastrophes; raise the budget."
            notes.append(Note(Code.DISAGREE, sentence))
        return [*notes, *imprecise(error, wanted_error(precision))]


def weighed(
    method: str,
    log_w: Floats,
    pooled: Floats,
    *,
    trust: Trust,
    precision: float | None,
    particles: Particles | None,
    calls: int,
    seconds: float,
    rng: np.random.Generator,
) -> Evidence:
    """The estimate from fresh draws of a fixed guide. log_w: ``-inf`` where a draw is no catastrophe."""
    log_prob, error = diagnostics.log_mean_exp(log_w)
    second, second_error = diagnostics.log_mean_exp(pooled)
    notes = trust.complaints(log_w, pooled, precision)
    if not math.isfinite(log_prob):
        return Evidence.nothing(method, notes[0], calls=calls, seconds=seconds)
    lower, upper = diagnostics.mean_interval(log_w)
    if second > log_prob + reach(error, second_error):
        upper = max(upper, second + 2.0 * min(second_error, 1.0))
    return Evidence(
        method=method,
        log_prob=min(log_prob, 0.0),
        std_error=error,
        interval=(lower, min(upper, 0.0)),
        claim="consistent",
        calls=calls,
        seconds=seconds,
        converged=not notes,
        particles=particles,
        diagnostics={
            "ess": diagnostics.effective_sample_size(log_w),
            "khat": diagnostics.pareto_khat(log_w),
            "pooled": second,
            "samples": float(len(log_w)),
        },
        notes=tuple(notes),
        batches=diagnostics.batch_means(rng.permutation(log_w)),
    )
