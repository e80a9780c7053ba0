"""Crude Monte Carlo: draw from the adversary, count the catastrophes.

The estimate P̂ = hits / n is unbiased and its binomial interval exact: nothing can go wrong except that it
costs about 1 / (P ε²) calls for a relative error ε. So it is the judge where P is large, and where P is small
it still gives an upper bound that needs no assumption: with no hit in n draws, P ≤ 1 − 0.05^{1/n} ≈ 3/n at 95 %.

For a conditioned adversary with log-weights ℓ, P = E[e^ℓ 1_C] / E[e^ℓ], self-normalised, with the interval of
the delta method, and log E[e^ℓ] is the adversary's own evidence. This is consistent, not unbiased, and it
fails when few draws carry the weight; the effective sample size shows that.

Reference: Clopper & Pearson (1934), The use of confidence or fiducial limits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import special

from probest import diagnostics
from probest.budget import Meter
from probest.estimators.base import check_least, check_precision
from probest.evidence import Code, Counts, EventLike, Evidence, Floats, Note, Particles, Run
from probest.seeds import generator

__all__ = ["MonteCarlo"]

_BLOCK = 2_000_000  # numbers of z alive at once
_Z95 = 1.959963984540054


class State(NamedTuple):
    """What is kept of the draws so far: counts, log-weights of all, z of the catastrophes (first ``keep``)."""

    n: int
    hits: int
    log_weight: list[Floats]
    hit: list[Floats]
    z: list[Floats]
    severity: list[Floats]


@dataclass(frozen=True)
class MonteCarlo:
    """Crude sampling from the adversary.

    max_samples: at most this many draws (the budget is a ceiling in any case).
    precision: stop when the standard error of log P is below this; None draws ``max_samples``.
    first_batch: size of the first batch; each further batch doubles the draws, so stopping looks are few.
    hits: stop once this many catastrophes were seen; None does not look.
    keep: at most this many catastrophes are kept as particles.
    """

    max_samples: int = 1_000_000
    precision: float | None = None
    first_batch: int = 500
    hits: int | None = None
    keep: int = 10_000

    def __post_init__(self) -> None:
        check_least(self, max_samples=1, first_batch=1, keep=1)
        check_precision(self.precision)

    @property
    def name(self) -> str:
        return "monte carlo"

    def run(self, event: EventLike, *, budget: int, seed: np.random.SeedSequence) -> Run:
        """Draw until the precision, the hits, ``max_samples`` or the budget is reached.

        Unbiased if not weighted and if the number of draws was fixed beforehand; else consistent.
        """
        meter = Meter(event, budget)
        rng = generator(seed)
        total = min(self.max_samples, meter.budget)
        state = State(0, 0, [], [], [], [])
        while state.n < total:
            state = step(state, meter, rng, min(max(self.first_batch, state.n), total - state.n), self.keep)
            if self.precision is not None and _log_error(state, event.weighted) <= self.precision:
                break
            if self.hits is not None and state.hits >= self.hits:
                break
        return _conclude(self, state, meter)


def step(state: State, meter: Meter, rng: np.random.Generator, n: int, keep: int) -> State:
    """Draw ``n`` more points, in blocks of rows that bound memory, and keep what is a catastrophe."""
    dim = meter.event.dim
    hits = state.hits
    rows = max(1, _BLOCK // dim)
    for start in range(0, n, rows):
        z = rng.standard_normal((min(rows, n - start), dim))
        result = meter.evaluate(z)
        hit = result.severity >= 0.0
        room = max(0, keep - hits)
        kept = np.flatnonzero(hit)[:room]
        hits += int(hit.sum())
        state.z.append(z[kept])
        state.severity.append(result.severity[kept])
        if meter.event.weighted:
            state.log_weight.append(result.log_weight)
            state.hit.append(hit.astype(np.float64))
    return state._replace(n=state.n + n, hits=hits)


def _log_error(state: State, weighted: bool) -> float:
    if state.hits == 0:
        return math.inf
    if not weighted:
        return math.sqrt((1.0 - state.hits / state.n) / state.hits) if state.hits < state.n else 1.0 / state.n
    return _ratio(np.concatenate(state.log_weight), np.concatenate(state.hit))[1]


def _ratio(log_w: Floats, hit: Floats) -> tuple[float, float]:
    """log of Σ w hit / Σ w and its standard error by the delta method."""
    total = diagnostics.log_sum_exp(log_w)
    if not math.isfinite(total):
        return -math.inf, math.inf
    share = np.exp(log_w - total)
    p = min(float(share @ hit), 1.0)
    if p <= 0.0:
        return -math.inf, math.inf
    return math.log(p), float(np.sqrt(np.sum((share * (hit - p)) ** 2))) / p


def _particles(state: State, log_weight: Floats | None) -> Particles | None:
    z = np.concatenate(state.z)
    if len(z) == 0:
        return None
    log_w = np.zeros(len(z)) if log_weight is None else log_weight[: len(z)]
    return Particles(z, log_w - diagnostics.log_sum_exp(log_w), np.concatenate(state.severity))


def _advice(event: EventLike, n: int, upper: float) -> Note:
    bound = f"no catastrophe in {n} draws: log P is below {upper:.2f} (95 %)."
    if event.boolean:
        return Note(
            Code.NO_HITS,
            f"{bound} This checker says only yes or no, so nothing can climb towards a catastrophe: return a severity "
            "(how far from the limit; at least 0 is a catastrophe), or raise the budget.",
        )
    return Note(Code.NO_HITS, f"{bound} Use tempering, which climbs the severity, or raise the budget.")


def _conclude(method: MonteCarlo, state: State, meter: Meter) -> Run:
    weighted = meter.event.weighted
    log_w = np.concatenate(state.log_weight) if weighted else np.zeros(0)
    hit = np.concatenate(state.hit) > 0.0 if weighted else np.zeros(0, dtype=np.bool_)
    wanted = method.precision if method.precision is not None else 0.5
    found = {"hits": float(state.hits), "samples": float(state.n)}
    notes: list[Note] = []
    log_evidence, ess, worth = 0.0, math.inf, math.inf  # of draws and of catastrophes, by weight
    log_prob = math.log(state.hits / state.n) if state.hits else -math.inf
    error = _log_error(state, weighted)
    if weighted:
        log_evidence, found["log_evidence_error"] = diagnostics.log_mean_exp(log_w)
        ess = found["ess"] = diagnostics.effective_sample_size(log_w)
        log_prob, error = _ratio(log_w, hit.astype(np.float64))
        worth = diagnostics.effective_sample_size(np.where(hit, log_w, -np.inf))
    if not weighted:
        interval = diagnostics.binomial_interval(state.hits, state.n)
    elif math.isfinite(log_prob):
        # as many pseudo-draws as the effective sample size: keeps the upper end honest when hits are few
        t = _t95(max(1.0, worth - 1.0))
        interval = (log_prob - t * error, min(0.0, log_prob + t * error))
    else:
        interval = (-math.inf, diagnostics.binomial_interval(0, max(1, int(ess)))[1])
    stops_by_result = method.precision is not None or method.hits is not None
    converged = error <= wanted and ess >= 50.0 and worth >= 4.0
    if not math.isfinite(log_prob):
        notes.append(_advice(meter.event, state.n, interval[1]))
    elif not converged and ess >= 50.0:
        by_weight = f", worth {worth:.1f} by weight" if weighted else f" in {state.n} draws"
        notes.append(Note(Code.FEW_HITS, f"{state.hits} catastrophes{by_weight}: raise the budget, or use tempering."))
    if ess < 50.0:
        notes.append(
            Note(
                Code.FEW_COUNT,
                f"the observed sites leave {ess:.0f} effective draws of {state.n}: use tempering, "
                "which conditions gradually.",
            )
        )
    evidence = Evidence(
        method=method.name,
        log_prob=log_prob,
        std_error=error,
        interval=interval,
        claim="consistent" if weighted or stops_by_result else "unbiased",
        calls=meter.calls,
        seconds=meter.seconds,
        converged=converged,
        particles=_particles(state, log_w[hit] if weighted else None),
        log_evidence=log_evidence,
        diagnostics=found,
        notes=tuple(notes),
    )
    return Run.of(evidence, counts=Counts(state.hits, state.n))


def _t95(dof: float) -> float:
    return max(_Z95, float(special.stdtrit(dof, 0.975)))
