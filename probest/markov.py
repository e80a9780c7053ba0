r"""Bounds of log P at a stated confidence, from nothing but the means of estimates.

For an estimate :math:`\hat P \ge 0` of mean P, :math:`\Pr(\hat P \ge P / \delta) \le \delta` (Markov), so that
:math:`\log \hat P + \log \delta` is below log P with probability 1 − δ, however heavy the tail of :math:`\hat P` and
whatever it missed. Of k independent ones, j or more are above P/q with a probability of at most
:math:`I_q(j, k - j + 1)`, so the j-th largest gives a bound too, and a far better one where they agree. Hits among
draws of a number fixed beforehand have the bound of Clopper and Pearson. The i-th estimate of a ledger gets a share
δ / (i (i + 1)), and these sum to δ however many there will be.

Means of a growing sample are a reverse martingale, for whose supremum the same inequality holds (Doob): looking at a
sample and then going on with it does not spoil the bound.

From above only plain draws say something, by Clopper and Pearson: what has the mean P may have missed all that matters.

References: Clopper & Pearson (1934); Doob (1953), Stochastic processes; Gomes, Hoffmann, Sabharwal & Selman (2007),
From sampling to model counting (the least of several estimates).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import special

from probest.evidence import Evidence

__all__ = ["lower_bound", "upper_bound"]

_MEANS = ("unbiased", "consistent")


def lower_bound(ledger: Sequence[Evidence], level: float) -> float:
    """What log P is above with probability ``level``, by all estimates of mean P in a ledger; ``-inf`` for none.

    Lines of strata, bounds and heuristics do not count. What was listed is certain, whatever the level.
    """
    bounds = [line.floor for line in ledger if line.stratum is None]
    seen: list[float] = []
    for line in ledger:
        if line.stratum is None and line.claim in _MEANS and math.isfinite(line.log_prob) and line.log_prob not in seen:
            seen.append(line.log_prob)
            bounds.append(_of(line, (1.0 - level) / (len(seen) * (len(seen) + 1.0))))
    return min(0.0, max(bounds, default=-math.inf))


def upper_bound(ledger: Sequence[Evidence], level: float) -> float:
    """What log P is below with probability ``level``, by all plain draws of a number fixed beforehand; 0 for none."""
    draws = [line for line in ledger if line.stratum is None and _plain(line) is not None]
    bounds = [0.0]
    for i, line in enumerate(draws, start=1):
        hits, size = _plain(line) or (0.0, 0.0)
        share = (1.0 - level) / (i * (i + 1.0))
        if hits < size:
            bounds.append(math.log(float(special.betainccinv(hits + 1.0, size - hits, share))))
    return min(bounds)


def _plain(line: Evidence) -> tuple[float, float] | None:
    """Hits and draws of an estimate that is plain draws of a number fixed beforehand."""
    figures = line.diagnostics
    if line.method == "monte carlo" and line.claim == "unbiased" and {"hits", "samples"} <= set(figures):
        return figures["hits"], figures["samples"]
    return None


def _of(line: Evidence, share: float) -> float:
    """The best bound that one estimate gives, wrong with a probability of at most ``share``."""
    plain = _plain(line)
    if plain is not None:
        hits, draws = plain
        return math.log(float(special.betaincinv(hits, draws - hits + 1.0, share)))
    count = len(line.batches)
    if count < 2:
        return line.log_prob + math.log(share)
    ordered = np.sort(np.asarray(line.batches))[::-1]
    places = sorted({(count + 1) // 2, count})
    each = share / (1 + len(places))
    bounds = [line.log_prob + math.log(each)]
    bounds += [float(ordered[j - 1]) + math.log(float(special.betaincinv(j, count - j + 1.0, each))) for j in places]
    return max(bounds)
