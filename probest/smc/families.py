r"""One estimate from the families of one or several tempering runs, and an interval that owns up to their skew.

A run that starts from k islands of particles ends with k families; each family's share of the final population, times
k, times the run's :math:`\hat P`, is an estimate of P, and their mean is :math:`\hat P`. Runs are pooled by their
sizes, which were fixed before they ran: the mean of unbiased estimates is unbiased, whereas weights that follow the
runs' own errors favour runs that missed a mode, since these look precise. For a conditioned adversary numerator and
evidence are pooled apart, and divided last.

The mean of a few heavy-tailed numbers is mostly too low and sometimes far too high. So the interval has the few degrees
of freedom that the shares' kurtosis leaves, and reaches further up than down. Where several runs differ by more than
their families do, the runs' difference is the error.

It fails where every run lacks the same mode: then the interval is too low, and nothing here can tell.

References: Chan & Lai (2013), A general theory of particle filters in hidden Markov models and some applications;
Lee & Whiteley (2018), Variance estimation in the particle filter; Johnson (1978), Modified t tests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from probest import diagnostics
from probest.evidence import Code, Evidence, Families, Floats, Note, Particles, Run

__all__ = ["Pooled", "combine", "complaints", "pool"]

_OWN = {Code.FEW_ANCESTORS, Code.IMPRECISE}


class Pooled(NamedTuple):
    """log P, its standard error and interval, how many families it hangs on, and each run's part in it (sum 1)."""

    log_prob: float
    error: float
    interval: tuple[float, float]
    effective: float
    parts: Floats


def complaints(verdict: Pooled) -> tuple[Note, ...]:
    """What is wrong with an estimate that rests on these families, and what to do."""
    if verdict.effective < 4.0:
        sentence = "the particles descend from a few first ones: raise the particles, max_moves or the budget."
        return (Note(Code.FEW_ANCESTORS, sentence),)
    if verdict.error > 0.5:
        sentence = f"the standard error is {verdict.error:.2f}: raise the particles or the budget."
        return (Note(Code.IMPRECISE, sentence),)
    return ()


def combine(runs: Sequence[Families]) -> Pooled:
    """Pool the runs by size."""
    share = np.array([run.size for run in runs], dtype=np.float64)
    share /= share.sum()
    above, log_z = _relative([run.log_z for run in runs], share)
    log_prob = log_z
    if not math.isfinite(log_z):
        return Pooled(log_z, math.inf, (-math.inf, 0.0), 0.0, share)
    parts = np.array([float(part.sum()) for part in above])
    effective = 1.0 / float(sum(np.sum(part**2) for part in above))
    terms = above
    if all(run.log_prior is not None for run in runs):
        below, log_prior = _relative([run.log_prior for run in runs if run.log_prior is not None], share)
        log_prob -= log_prior
        terms = [a - b for a, b in zip(above, below, strict=True)]
    n = sum(len(part) for part in terms)
    deviation = n * np.concatenate([part - part.mean() for part in terms])
    error, _ = diagnostics.deviation_error(deviation)
    lower, upper = diagnostics.deviation_interval(log_prob, deviation)
    if len(runs) > 1 and error > 0.0:
        sums = np.array([float(part.sum()) for part in terms]) - (share if terms is above else 0.0)
        between = math.sqrt(len(runs) / (len(runs) - 1.0) * float(np.sum(sums**2)))
        stretch = max(1.0, between / error)
        error *= stretch
        lower, upper = log_prob + stretch * (lower - log_prob), log_prob + stretch * (upper - log_prob)
    upper += 0.5 * error**2 * max(1.0, (upper - log_prob) / max(error, 1e-300))
    return Pooled(log_prob, error, (lower, min(0.0, upper)), effective, parts)


def _relative(logs: Sequence[Floats], share: Floats) -> tuple[list[Floats], float]:
    """What each family of each run adds to the pooled estimate, relative to it; and its logarithm."""
    parts = [log_z + math.log(a / len(log_z)) for log_z, a in zip(logs, share, strict=True)]
    whole = diagnostics.log_sum_exp(np.concatenate(parts))
    return [np.exp(part - whole) if math.isfinite(whole) else np.zeros_like(part) for part in parts], whole


def pool(runs: Sequence[Run]) -> Evidence:
    """Finished tempering runs as one, with the particles of all: relatives lie next to each other, run after run."""
    if len(runs) == 1:
        return runs[0].conclusion
    lines = [run.conclusion for run in runs]
    families = [run.families for run in runs if run.families is not None]
    verdict = combine(families)
    sizes = np.array([one.size for one in families])
    largest = lines[int(np.argmax(sizes))]
    log_evidence = np.array([line.log_evidence for line in lines]) + np.log(sizes / sizes.sum())
    own = [note for line in lines for note in line.notes if getattr(note, "code", None) not in _OWN]
    notes = (*dict.fromkeys(own), *complaints(verdict))
    both = zip(lines, verdict.parts, strict=True)
    sets = [(line.particles, part) for line, part in both if line.particles is not None]
    particles = Particles(
        np.concatenate([found.z for found, _ in sets]),
        np.concatenate([found.log_weight + math.log(max(part, 1e-300)) for found, part in sets]),
        np.concatenate([found.severity for found, _ in sets]),
    )
    return replace(
        largest,
        log_prob=min(verdict.log_prob, 0.0),
        std_error=verdict.error,
        interval=verdict.interval,
        particles=particles._replace(log_weight=particles.log_weight - diagnostics.log_sum_exp(particles.log_weight)),
        log_evidence=diagnostics.log_sum_exp(log_evidence),
        converged=not notes,
        diagnostics={**largest.diagnostics, "island_ess": verdict.effective, "runs": float(len(runs))},
        notes=notes,
    )
