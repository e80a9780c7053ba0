"""How far to believe a weighted sample: NumPy float64, log weights in, honest numbers out.

Everything here keeps the normaliser. Log-weights are never shifted to sum to one, since their mean *is* the
estimate of P; a smoothing that renormalises would destroy it.

References: Vehtari, Simpson, Gelman, Yao & Gabry (2024), Pareto smoothed importance sampling, JMLR 25;
Zhang & Stephens (2009), A new and efficient estimation method for the generalized Pareto distribution;
Clopper & Pearson (1934); Zhou, Johansen & Aston (2016), Toward automatic model comparison (conditional ESS).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import scipy
from numpy.typing import NDArray
from scipy import special

__all__ = [
    "batch_means",
    "binomial_interval",
    "conditional_ess",
    "deviation_error",
    "deviation_interval",
    "effective_sample_size",
    "even_rows",
    "log_mean_exp",
    "log_sum_exp",
    "mean_interval",
    "next_temperature",
    "pareto_khat",
    "pareto_smooth",
    "stratified_resample",
    "systematic_resample",
    "thinned",
]

Floats = NDArray[np.float64]
Ints = NDArray[np.intp]

_MIN_TAIL = 5


def log_sum_exp(log_w: Floats) -> float:
    """log Σ exp(log_w); ``-inf`` for an empty or an all ``-inf`` array."""
    return float(special.logsumexp(log_w)) if log_w.size else -math.inf


def log_mean_exp(log_w: Floats) -> tuple[float, float]:
    """log of the mean of ``exp(log_w)`` and its standard error in log space (delta method).

    The second number is sd(w) / (mean(w) √n): ``inf`` when every weight is zero or there is only one.
    """
    n = log_w.size
    total = log_sum_exp(log_w)
    if n == 0 or not math.isfinite(total):
        return total, math.inf
    mean = total - math.log(n)
    if n == 1:
        return mean, math.inf
    ratio = np.exp(log_w - mean)
    return mean, float(np.sqrt(np.sum((ratio - 1.0) ** 2) / (n * (n - 1.0))))


def batch_means(log_w: Floats, count: int = 16) -> tuple[float, ...]:
    """Logs of the means of ``count`` parts of independent weights, dealt out in turn; none where weights are few."""
    if len(log_w) < 4 * count:
        return ()
    return tuple(log_mean_exp(log_w[i::count])[0] for i in range(count))


def effective_sample_size(log_w: Floats) -> float:
    """(Σw)² / Σw², Kong's effective sample size; 0 when every weight is zero."""
    top = float(np.max(log_w, initial=-math.inf))
    if not math.isfinite(top):
        return 0.0
    w = np.exp(log_w - top)
    return float(np.sum(w) ** 2 / np.sum(w * w))


def conditional_ess(log_w: Floats, log_increment: Floats) -> float:
    """Share (0 to 1) of the sample that survives an increment: (Σ W v)² / Σ W v², with W normalised."""
    top, most = (float(np.max(values, initial=-math.inf)) for values in (log_increment, log_w))
    if not (math.isfinite(top) and math.isfinite(most)):
        return 0.0
    # sums and not their logarithms: this is asked some dozens of times a level
    weight, increment = np.exp(log_w - most), np.exp(log_increment - top)
    first = float(weight @ increment)
    second = float(weight @ increment**2)
    return min(1.0, first * first / (float(weight.sum()) * second)) if first > 0.0 else 0.0


def next_temperature(
    log_w: Floats, increment: Callable[[float], Floats], *, easy: float, hard: float, target: float
) -> float:
    """The parameter closest to ``hard`` whose conditional ESS is at least ``target``, by bisection.

    ``increment(x)`` gives log incremental weights at parameter x; x moves from ``easy`` (share 1) to ``hard``.
    """
    if conditional_ess(log_w, increment(hard)) >= target:
        return hard
    for _ in range(60):
        middle = 0.5 * (easy + hard)
        if conditional_ess(log_w, increment(middle)) >= target:
            easy = middle
        else:
            hard = middle
        if abs(easy - hard) <= 1e-6 * (1.0 + abs(easy)):
            break
    return 0.5 * (easy + hard)


def _fit_generalized_pareto(excess: Floats) -> tuple[float, float]:
    """Shape k and scale of a generalised Pareto law fitted to sorted positive excesses (Zhang & Stephens)."""
    n = excess.size
    prior_weight = 10.0
    grid = 30 + int(math.sqrt(n))
    quartile = excess[int(n / 4 + 0.5) - 1]
    b = 1.0 - np.sqrt(grid / (np.arange(1, grid + 1) - 0.5))
    b = b / (3.0 * quartile) + 1.0 / excess[-1]
    k = np.mean(np.log1p(-b[:, None] * excess), axis=1)
    profile = n * (np.log(-b / k) - k - 1.0)
    weight = 1.0 / np.sum(np.exp(np.clip(profile - profile[:, None], None, 700.0)), axis=1)
    keep = weight >= 10.0 * np.finfo(np.float64).eps
    b_mean = float(np.sum(b[keep] * weight[keep]) / np.sum(weight[keep]))
    shape = float(np.mean(np.log1p(-b_mean * excess)))
    scale = -shape / b_mean
    return (n * shape + prior_weight * 0.5) / (n + prior_weight), scale


def pareto_smooth(log_w: Floats) -> tuple[Floats, float]:
    """Log-weights with their largest values replaced by expected order statistics, and the shape k̂.

    Unnormalised: the scale of the weights is kept, so ``log_mean_exp`` of the result still estimates log P.
    The tail is min(n/5, 3√n) weights among those above zero (Vehtari et al. 2024); k̂ is ``-inf`` when the tail
    is constant, ``inf`` when there are too few positive weights to say.
    """
    smoothed = np.array(log_w, dtype=np.float64)
    positive = np.flatnonzero(np.isfinite(smoothed))
    tail = int(min(positive.size / 5.0, 3.0 * math.sqrt(positive.size)))
    if tail < _MIN_TAIL:
        return smoothed, math.inf
    order = positive[np.argsort(smoothed[positive], kind="stable")]
    top = smoothed[order[-1]]
    members = order[-tail:]
    cutoff = max(smoothed[order[-tail - 1]], top - 700.0)
    excess = np.exp(smoothed[members] - top) - math.exp(cutoff - top)
    excess = excess[excess > 0.0]
    if excess.size < _MIN_TAIL or excess[-1] <= 1e-12:
        return smoothed, -math.inf
    excess = np.sort(excess)
    if excess[int(excess.size / 4 + 0.5) - 1] <= 0.0:
        return smoothed, math.inf
    with np.errstate(all="ignore"):
        shape, scale = _fit_generalized_pareto(excess)
    if not math.isfinite(shape):
        return smoothed, math.inf
    p = (np.arange(excess.size) + 0.5) / excess.size
    quantile = -scale * np.log1p(-p) if abs(shape) < 1e-12 else scale * np.expm1(-shape * np.log1p(-p)) / shape
    replaced = top + np.log(quantile + math.exp(cutoff - top))
    smoothed[members[-excess.size :]] = np.minimum(replaced, top)
    return smoothed, shape


def pareto_khat(log_w: Floats) -> float:
    """k̂ alone: below 0.5 the variance is finite, above 0.7 the error bars of the mean are not to be believed."""
    return pareto_smooth(log_w)[1]


def binomial_interval(hits: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Exact (Clopper–Pearson) interval of a binomial proportion in log space: ``(-inf, log u)`` at zero hits.

    At zero hits (or at ``n`` hits) the whole error probability goes to the one open end.
    """
    if not 0 <= hits <= n or n < 1:
        raise ValueError(f"hits must be between 0 and n, and n at least 1; got hits={hits}, n={n}")
    tail = 0.5 * (1.0 - level)
    if hits == 0:
        return -math.inf, math.log(-math.expm1(math.log(2.0 * tail) / n))
    if hits == n:
        return math.log(2.0 * tail) / n, 0.0
    lower = float(scipy.stats.beta.ppf(tail, hits, n - hits + 1))
    upper = float(scipy.stats.beta.ppf(1.0 - tail, hits + 1, n - hits))
    return math.log(lower), math.log(upper)


def mean_interval(log_w: Floats, level: float = 0.95) -> tuple[float, float]:
    """An interval of log E[w] from independent weights, in log space, wider and further up for skewed weights.

    Johnson's (1978) skewness-corrected t on the scale of the weights, with degrees of freedom from the
    effective number of weights that carry the variance; a heavy tail therefore widens it by itself.
    """
    mean, error = log_mean_exp(log_w)
    if not math.isfinite(error):
        return -math.inf, math.inf
    if error == 0.0:
        return mean, mean
    return deviation_interval(mean, np.exp(log_w - mean) - 1.0, level)


def deviation_error(deviation: Floats) -> tuple[float, float]:
    """Standard error of a mean from relative deviations of its terms, and the degrees of freedom behind it.

    The variance is itself estimated, from few terms where a few of them carry it: allow it one standard error upwards.
    """
    n = deviation.size
    second = float(np.mean(deviation**2))
    if second == 0.0:
        return 0.0, n - 1.0
    kurtosis = float(np.mean(deviation**4)) / second**2
    dof = max(2.0, min(n - 1.0, 2.0 * n / max(kurtosis - 1.0, 1e-9)))
    return math.sqrt(second / (n - 1.0)) * (1.0 + 0.5 * math.sqrt(max(kurtosis - 1.0, 0.0) / n)), dof


def deviation_interval(log_mean: float, deviation: Floats, level: float = 0.95) -> tuple[float, float]:
    """The interval of :func:`mean_interval`, from the logarithm of a mean and relative deviations of its terms."""
    error, dof = deviation_error(deviation)
    if error == 0.0:
        return log_mean, log_mean
    n = deviation.size
    second = float(np.mean(deviation**2))
    third = float(np.mean(deviation**3))
    t = float(special.stdtrit(dof, 0.5 + 0.5 * level))
    # a heavy upper tail moves the centre up: Johnson's first term and the first correction in the quadratic one
    shift = min(third / (6.0 * second * n), error)
    shift += min(third / (3.0 * second**2) * (error**2), error) if third > 0.0 else 0.0
    lower = log_mean - t * error
    return lower, max(log_mean + t * error + shift, lower)


def systematic_resample(log_w: Floats, n: int, rng: np.random.Generator | None = None) -> Ints:
    """``n`` indices with expected counts proportional to the weights, from one uniform number (O(n)).

    Without ``rng`` that number is 1/2: no chance is in it, and each count is right to within one.
    """
    return _invert(log_w, (np.arange(n) + (0.5 if rng is None else rng.random())) / n)


def even_rows(weights: Floats, n: int) -> Ints:
    """``n`` rows in which each occurs as often as its weight says, to within one; without chance."""
    with np.errstate(divide="ignore"):
        return systematic_resample(np.log(weights), n)


def thinned(weights: Floats, most: int) -> tuple[Ints, Floats]:
    """At most so many rows that stand for all, and their weights, which sum to 1: even rows where there are more."""
    if len(weights) <= most:
        return np.arange(len(weights)), weights / np.sum(weights)
    rows, times = np.unique(even_rows(weights, most), return_counts=True)
    return rows, times / times.sum()


def stratified_resample(log_w: Floats, n: int, rng: np.random.Generator) -> Ints:
    """As :func:`systematic_resample` with one uniform number a stratum."""
    return _invert(log_w, (np.arange(n) + rng.random(n)) / n)


def _invert(log_w: Floats, points: Floats) -> Ints:
    total = log_sum_exp(log_w)
    if not math.isfinite(total):
        raise ValueError("log_w must hold at least one finite weight to resample from")
    cumulative = np.cumsum(np.exp(log_w - total))
    cumulative /= cumulative[-1]
    return np.minimum(np.searchsorted(cumulative, points, side="right"), log_w.size - 1)
