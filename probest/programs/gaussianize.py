"""From standard-normal coordinates to any distribution, exactly, however far out.

`gaussian_map(fn, special)` finds a transform of iid standard normals that has the law of the Pyro, torch or NumPyro
distribution `fn`. A law on the line is a monotone map of one coordinate z: its quantile at Φ(z), written in log Φ(z)
and log Φ(-z), never in Φ(z) itself, which in float32 is 1 from z = 5.42. What has no quantile in closed form is made
of those that do, with more coordinates (Beta, Dirichlet, Student's t and Wishart of Gammas and normals; compounds of
their parts). Discrete laws compare z with log-probabilities, from below in the lower half and from above in the upper.

Each rule is a small function in one of three tables, by class name, so the two libraries share them and neither is
imported. The class is looked for along the MRO of `fn`; a subclass that draws in a way of its own is not trusted to
have the law of its parent. A rule reads the parameters as they stand in `fn` and broadcasts over axes to the left of
its base, so it works under `vmap` and in expanded distributions.

A GaussianMap's transform is differentiable in the base and in the distribution's parameters, except where the value
is discrete. Larger z gives a larger value for laws on the line (but folded ones, whose quantile is not at hand).

References: Devroye, Non-Uniform Random Variate Generation (1986); NIST DLMF 7 and 8; Lewandowski, Kurowicka and Joe,
J. Multivariate Analysis 100 (2009), for LKJ; Bartlett, Proc. R. Soc. Edinburgh 53 (1933), for Wishart.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from probest.backends import special as shared

Array = Any
LOG_2 = math.log(2.0)


class UnsupportedDistribution(TypeError):  # noqa: N818
    """There is no exact map from normals to this distribution here; the message says what to do instead."""


class GaussianMap(NamedTuple):
    """A distribution as a function of standard normals."""

    base_shape: tuple[int, ...]  # of the iid standard-normal base: fn.batch_shape, then what one draw needs
    transform: Callable[[Array], Array]  # base -> value of shape fn.batch_shape + fn.event_shape
    discrete: bool  # piecewise constant in the base


class MixtureMap(NamedTuple):
    """A mixture as an index and, given it, a function of standard normals."""

    index: Any  # a categorical distribution of the same library over components, of batch shape fn.batch_shape
    base_shape: tuple[int, ...]
    transform: Callable[[Array, Array], Array]  # (index, base) -> value
    discrete: bool  # whether the components are


def gaussian_map(fn: Any, special: Any) -> GaussianMap:
    """The map for `fn`; `special` is `probest.backends.special_torch` or `special_jax`, as `fn` needs.

    Raises UnsupportedDistribution, naming the class.
    """
    rule, name = _find(fn)
    if name in RULES:
        mapped: GaussianMap = rule(fn, special)
        return mapped
    if name in CHECKS:
        CHECKS[name](fn)
    transform = functools.partial(_cast_and_apply, rule, fn, special, discrete=name in COUNTS)
    return GaussianMap(tuple(fn.batch_shape), transform, name in COUNTS)


def mixture_map(fn: Any, special: Any) -> MixtureMap | None:
    """The map for a mixture given the index of its component, so that the index can be a site; None for others."""
    name = next(
        (cls.__name__ for cls in type(fn).__mro__ if cls.__name__ in ("MixtureSameFamily", "MixtureGeneral")), ""
    )
    if not name or not _of_a_library(type(fn)):
        return None
    s, batch, event = special, tuple(fn.batch_shape), tuple(fn.event_shape)
    index = fn.mixture_distribution if hasattr(fn, "mixture_distribution") else fn.mixing_distribution
    if tuple(index.batch_shape) != batch:
        index = index.expand(batch)

    if name == "MixtureSameFamily":
        inner = gaussian_map(fn.component_distribution, s)
        extra = inner.base_shape[len(fn.component_distribution.batch_shape) :]
        size = fn.component_distribution.batch_shape[-1]
        base_shape, discrete = batch + extra, inner.discrete

        def components(base: Array) -> Array:
            lead = base.shape[: base.ndim - len(extra)]
            base = base.reshape((*lead, 1, *extra))
            return inner.transform(s.xp.broadcast_to(base, (*lead, size, *extra)))

    else:
        parts = [_flat(part, s) for part in fn.component_distributions]
        base_shape, discrete = (*batch, max(part.size for part in parts)), all(part.discrete for part in parts)

        def components(base: Array) -> Array:
            values = [part.transform(base[..., : part.size]) for part in parts]
            return s.xp.stack([s.xp.broadcast_to(v, base.shape[:-1] + event) for v in values], axis=-1 - len(event))

    def transform(index: Array, base: Array) -> Array:
        values, axis = components(base), -1 - len(event)
        index = index.reshape(tuple(index.shape) + (1,) * (1 + len(event)))
        lead = values.shape[: values.ndim + axis]
        index = s.xp.broadcast_to(index, (*lead, 1, *event))
        return s.xp.take_along_axis(values, index, axis=axis).reshape(lead + event)

    return MixtureMap(index, base_shape, transform, discrete)


# --- finding the rule -----------------------------------------------------------------------------------------------


def _of_a_library(cls: type) -> bool:
    return cls.__module__.partition(".")[0] in ("torch", "pyro", "numpyro")


def _find(fn: Any) -> tuple[Callable[..., Any], str]:
    """The rule for the first class of `fn`'s MRO that has one, and that class's name."""
    own = type(fn).__name__
    for cls in type(fn).__mro__:
        name = cls.__name__
        if _of_a_library(cls):
            for table in (RULES, QUANTILES, COUNTS):
                if name in table:
                    return table[name], name
            if name in ADVICE:
                raise UnsupportedDistribution(f"{own} has no exact map from standard normals: {ADVICE[name]}")
        if {"sample", "rsample"} & vars(cls).keys():
            break
    raise UnsupportedDistribution(
        f"{own} has no exact map from standard normals. Write it as a transform of distributions that have one "
        "(TransformedDistribution, or a deterministic function of several sites)"
    )


def _cast(fn: Any, s: Any, base: Array) -> Array:
    """The base in the precision of the distribution's parameters."""
    dtype = s.parameter_dtype(fn)
    return base if dtype is None else s.xp.astype(base, dtype)


def _cast_and_apply(rule: Callable[..., Array], fn: Any, s: Any, base: Array, discrete: bool) -> Array:
    value = rule(fn, s, _cast(fn, s, base))
    return _as_sample(fn, s, value) if discrete else value


def _as_sample(fn: Any, s: Any, value: Array) -> Array:
    """A discrete value with the dtype that the library's own sample has."""
    dtype = s.sample_dtype(fn)
    return s.stop_gradient(value if dtype is None else s.xp.astype(value, dtype))


def _built(
    fn: Any, s: Any, extra: tuple[int, ...], transform: Callable[[Array], Array], discrete: bool = False
) -> GaussianMap:
    """The map of a rule whose base is batch_shape + extra."""

    def of_base(base: Array) -> Array:
        value = transform(_cast(fn, s, base))
        return _as_sample(fn, s, value) if discrete else value

    return GaussianMap(tuple(fn.batch_shape) + extra, of_base, discrete)


class _Flat(NamedTuple):
    size: int
    transform: Callable[[Array], Array]  # (..., size) -> value
    discrete: bool


def _flat(fn: Any, s: Any) -> _Flat:
    """The map of `fn` on a base whose coordinates for one draw are one trailing axis."""
    inner = gaussian_map(fn, s)
    extra = inner.base_shape[len(fn.batch_shape) :]

    def transform(base: Array) -> Array:
        return inner.transform(base.reshape(base.shape[:-1] + extra))

    return _Flat(math.prod(extra), transform, inner.discrete)


# --- helpers for rules ----------------------------------------------------------------------------------------------


def _within(s: Any, x: Array, low: Any, high: Any) -> Array:
    """x clipped to [low, high], with the gradient of x: only rounding takes it outside."""
    return x + s.stop_gradient(s.clip(x, low, high) - x)


def _unit_open(s: Any, x: Array) -> Array:
    info = s.xp.finfo(x.dtype)
    return _within(s, x, float(info.tiny), 1 - float(info.eps) / 2)


def _positive(s: Any, log_x: Array) -> Array:
    """exp, kept inside the floats: a Gamma of small concentration has quantiles below them."""
    info = s.xp.finfo(log_x.dtype)
    least, largest = math.log(float(info.tiny)), math.log(float(info.max))
    return s.xp.exp(s.clip(log_x, least * (1 - 1e-6), largest * (1 - 1e-6)))


def _lower_upper(s: Any, z: Array) -> tuple[Array, Array]:
    return s.log_ndtr(z), s.log_ndtr(-z)


def _symmetric(s: Any, z: Array, magnitude: Callable[[Array], Array]) -> Array:
    """A symmetric law from `magnitude`, which maps the log of the smaller tail's probability to |x|."""
    size = magnitude(s.log_ndtr(s.xp.where(z < 0, z, -z)))
    return s.xp.where(z < 0, -size, size)


def _log_softplus(s: Any, x: Array) -> Array:
    return s.xp.logaddexp(x, s.xp.zeros_like(x))


def _log_tan(s: Any, log_p: Array) -> Array:
    """log tan(½π p), for log p <= log ½, finite where p underflows."""
    p = s.xp.exp(s.clip(log_p, -20.0, None))
    small = log_p + math.log(math.pi / 2)
    return s.xp.where(log_p < -19.0, small, s.xp.log(s.xp.tan(0.5 * math.pi * p)))


def _two_log_gammas(s: Any, first: Any, second: Any, base: Array) -> Array:
    """log G1 - log G2 of two Gammas from base (..., 2), larger with both coordinates; the logit of a Beta."""
    x, y = base[..., 0], base[..., 1]
    return s.gamma_log_quantile(s.array(first, x), x) - s.gamma_log_quantile(s.array(second, y), -y)


def _log_student(s: Any, df: Any, z: Array) -> Array:
    """log √(df / χ²(df))."""
    half = 0.5 * s.array(df, z)
    return 0.5 * (s.xp.log(half) - s.gamma_log_quantile(half, -z))


def _parameter(fn: Any, probs: str, logits: str) -> str:
    """Which of the two the user gave; the other is derived, lazily and after clamping."""
    if type(fn).__name__.endswith("Logits"):
        return logits
    if getattr(fn, "_param", None) is not None and vars(fn).get(logits) is fn._param:
        return logits
    return next((name for name in vars(fn) if name in (probs, logits)), logits)


def _log_odds(fn: Any, s: Any, like: Array, probs: str = "probs", logits: str = "logits") -> tuple[Array, Array]:
    """(log p, log(1 - p)) of a Bernoulli parameter."""
    name = _parameter(fn, probs, logits)
    value = s.array(getattr(fn, name), like)
    if name == probs:
        return s.xp.log(value), s.xp.log1p(-value)
    return -_log_softplus(s, -value), -_log_softplus(s, value)


def _log_masses(fn: Any, s: Any, like: Array) -> Array:
    """Normalised log-probabilities (..., classes) of a categorical parameter."""
    name = _parameter(fn, "probs", "logits")
    value = s.array(getattr(fn, name), like)
    value = s.xp.log(value) if name == "probs" else value
    return value - s.cumulative_logsumexp(value)[..., -1:]


def _count(fn: Any, name: str = "total_count") -> np.ndarray:
    """A number of trials, which decides shapes and so must be known."""
    try:
        return np.asarray(getattr(fn, name)).astype(np.int64)
    except Exception as error:
        raise UnsupportedDistribution(
            f"{type(fn).__name__} needs a {name} that is a plain number (it decides how many coordinates there are), "
            "not one computed from other sites or a traced argument"
        ) from error


def _exceeds(s: Any, z: Array, log_lower: Array, log_upper: Array) -> Array:
    """Whether Φ(z) > F, given log F and log(1 - F): compared in the smaller tail."""
    lower, upper = _lower_upper(s, z)
    return s.xp.where(log_lower < log_upper, lower > log_lower, upper < log_upper)


def _at_least(s: Any, z: Array, log_p: Array, log_not: Array) -> Array:
    """Whether Φ(z) lies in the upper fraction p: a Bernoulli."""
    return _exceeds(s, z, log_not, log_p)


def _class(s: Any, z: Array, log_masses: Array) -> Array:
    """The class, an integer, from log masses (..., classes): the number of cumulative sums below Φ(z)."""
    lower = s.cumulative_logsumexp(log_masses)[..., :-1]
    upper = s.xp.flip(s.cumulative_logsumexp(s.xp.flip(log_masses, axis=-1)), axis=-1)[..., 1:]
    return s.xp.sum(s.xp.astype(_exceeds(s, z[..., None], lower, upper), s.xp.int32), axis=-1)


def _binomial(s: Any, z: Array, total: np.ndarray, log_p: Array, log_not: Array) -> Array:
    largest = int(total.max(initial=0))
    k = np.arange(largest + 1)
    n = total[..., None]
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, largest + 1)))])
    choose = np.where(k <= n, log_factorial[n] - log_factorial[k] - log_factorial[np.maximum(n - k, 0)], -np.inf)
    heads, tails = s.array(k, z), s.array(np.maximum(n - k, 0), z)
    floor = math.log(float(s.xp.finfo(z.dtype).tiny)) * 1e6  # so that 0 · log 0 is 0
    log_p, log_not = s.clip(log_p, floor, None)[..., None], s.clip(log_not, floor, None)[..., None]
    return _class(s, z, s.array(choose, z) + heads * log_p + tails * log_not)


def _multinomial(s: Any, base: Array, total: np.ndarray, log_masses: Array) -> Array:
    """Counts (..., classes) of the classes of base (..., trials), the first `total` of them."""
    classes = log_masses.shape[-1]
    drawn = s.one_hot(_class(s, base, log_masses[..., None, :]), classes)
    used = s.array(np.arange(base.shape[-1]) < total[..., None], base)
    return s.xp.sum(s.xp.astype(drawn, base.dtype) * used[..., None], axis=-2)


def _truncated_score(
    s: Any, z: Array, at_low: tuple[Array, Array] | None, at_high: tuple[Array, Array] | None
) -> Array:
    """The normal score of the law given that it lies between two points, from (log F, log(1 - F)) at each.

    F = F(low) (1 - u) + F(high) u at level u, and the same for 1 - F: sums of positive terms, so exact in logs.
    """
    lower, upper = _lower_upper(s, z)
    log_f = lower if at_high is None else lower + at_high[0]
    log_not = upper if at_low is None else upper + at_low[1]
    if at_low is not None:
        log_f = s.xp.logaddexp(log_f, upper + at_low[0])
    if at_high is not None:
        log_not = s.xp.logaddexp(log_not, lower + at_high[1])
    below = log_f < log_not
    score = s.ndtri_exp(s.xp.where(below, log_f, log_not))
    return s.xp.where(below, score, -score)


# --- laws on the line: fn, special, z -> value ----------------------------------------------------------------------


def _uniform(fn: Any, s: Any, z: Array) -> Array:
    low, high = s.array(fn.low, z), s.array(fn.high, z)
    share = s.xp.exp(s.log_ndtr(s.xp.where(z < 0, z, -z))) * (high - low)
    return _within(s, s.xp.where(z < 0, low + share, high - share), low, s.below(s.stop_gradient(high)))


def _asymmetric_laplace(fn: Any, s: Any, z: Array) -> Array:
    asymmetry = s.array(fn.asymmetry, z)
    lower, upper = _lower_upper(s, z)
    left = lower + s.xp.log1p(asymmetry**-2)
    right = -upper - s.xp.log1p(asymmetry**2)
    return fn.loc + fn.scale * s.xp.where(left < 0, left * asymmetry, right / asymmetry)


def _cauchy(fn: Any, s: Any, z: Array) -> Array:
    def magnitude(log_tail: Array) -> Array:
        tiny = math.log(float(s.xp.finfo(z.dtype).tiny)) + 4
        return 1 / s.xp.tan(s.xp.exp(s.clip(log_tail, tiny, None)) * math.pi)

    return fn.loc + fn.scale * _symmetric(s, z, magnitude)


def _half_cauchy(fn: Any, s: Any, z: Array) -> Array:
    return fn.scale * s.xp.exp(_soft_laplace_score(s, z))


def _soft_laplace_score(s: Any, z: Array) -> Array:
    return _symmetric(s, z, lambda log_tail: -_log_tan(s, log_tail))


def _exponentially_tilted(s: Any, z: Array, tilt: Array) -> Array:
    """The quantile on (0, 1) of the density e^(tilt x): log1p(u expm1(tilt)) / tilt, from the end where it is small."""
    flat = abs(tilt) < 1e-4
    t = -abs(s.xp.where(flat, 1.0, tilt))  # decaying: from 0 for a negative tilt, from 1 for a positive one
    up = s.xp.where(tilt > 0, -z, z)
    lower, upper = _lower_upper(s, up)
    near = s.xp.log1p(s.xp.exp(lower) * s.xp.expm1(t)) / t
    far = s.xp.logaddexp(t + lower, upper) / t
    x = s.xp.where(lower < upper, near, far)
    u = s.xp.exp(lower)
    x = s.xp.where(flat, u * (1 - 0.5 * abs(tilt) * (u - 1)), x)
    return s.xp.where(tilt > 0, 1 - x, x)


def _power_law(fn: Any, s: Any, z: Array) -> Array:
    log_low = s.xp.log(s.array(fn.low, z))
    span = s.xp.log(s.array(fn.high, z)) - log_low
    value = s.xp.exp(log_low + span * _exponentially_tilted(s, z, (fn.alpha + 1) * span))
    return _within(s, value, fn.low, fn.high)


def _generalized_pareto(fn: Any, s: Any, z: Array) -> Array:
    zero = fn.concentration == 0
    k, upper = s.xp.where(zero, 1.0, fn.concentration), s.log_ndtr(-z)
    return fn.loc + fn.scale * s.xp.where(zero, -upper, s.xp.expm1(-k * upper) / k)


def _kumaraswamy(fn: Any, s: Any, z: Array) -> Array:
    log_y = shared.log_neg_log_ndtr(s, -z) - s.xp.log(s.array(fn.concentration0, z))
    return _unit_open(s, s.xp.exp(_log1mexp_exp(s, log_y) / fn.concentration1))


def _dagum(fn: Any, s: Any, z: Array) -> Array:
    log_y = shared.log_neg_log_ndtr(s, z) - s.xp.log(s.array(fn.concentration, z))
    log_expm1 = s.xp.exp(log_y) + _log1mexp_exp(s, log_y)
    return fn.scale * s.xp.exp(-log_expm1 / fn.sharpness)


def _log1mexp_exp(s: Any, log_y: Array) -> Array:
    """log(1 - exp(-y)), finite where y underflows."""
    y = s.xp.exp(s.clip(log_y, -17.0, None))
    return s.xp.where(log_y < -17.0, log_y, s.xp.log(-s.xp.expm1(-y)))


def _skew_logistic(fn: Any, s: Any, z: Array) -> Array:
    log_y = shared.log_neg_log_ndtr(s, z) - s.xp.log(s.array(fn.asymmetry, z))
    return fn.loc - fn.scale * (s.xp.exp(log_y) + _log1mexp_exp(s, log_y))


def _gamma(fn: Any, s: Any, z: Array) -> Array:
    rate = s.array(fn.rate, z)
    return _positive(s, s.gamma_log_quantile(s.array(fn.concentration, z), z) - s.xp.log(rate))


def _inverse_gamma(fn: Any, s: Any, z: Array) -> Array:
    gamma = fn.base_dist
    return _positive(s, s.xp.log(s.array(gamma.rate, z)) - s.gamma_log_quantile(s.array(gamma.concentration, z), -z))


def _gompertz(fn: Any, s: Any, z: Array) -> Array:
    return s.xp.log1p(-s.log_ndtr(-z) / fn.concentration) / fn.rate


def _weibull(fn: Any, s: Any, z: Array) -> Array:
    return fn.scale * s.xp.exp(shared.log_neg_log_ndtr(s, -z) / fn.concentration)


def _lower_power_law(fn: Any, s: Any, z: Array) -> Array:
    return fn.low * s.xp.exp(s.log_ndtr(-z) / (1 + fn.alpha))


def _truncated_law(fn: Any) -> str:
    _, name = _find(fn.base_dist)
    if name not in LOG_CDFS:
        raise UnsupportedDistribution(
            f"{type(fn).__name__} of {name} has no exact map from standard normals; "
            f"{', '.join(LOG_CDFS)} can be truncated"
        )
    return name


def _truncated(fn: Any, s: Any, z: Array) -> Array:
    """NumPyro's LeftTruncated, RightTruncated and TwoSidedTruncated distributions of a location-scale law."""
    base, name = fn.base_dist, _truncated_law(fn)

    def tails(x: Any) -> tuple[Array, Array]:
        y = (s.array(x, z) - base.loc) / base.scale
        return LOG_CDFS[name](s, y), LOG_CDFS[name](s, -y)

    low, high = getattr(fn, "low", None), getattr(fn, "high", None)
    at_low, at_high = (None if x is None else tails(x) for x in (low, high))
    return _within(s, QUANTILES[name](base, s, _truncated_score(s, z, at_low, at_high)), low, high)


LOG_CDFS: dict[str, Callable[[Any, Array], Array]] = {  # of the standard law; each is symmetric
    "Normal": lambda s, y: s.log_ndtr(y),
    "Cauchy": lambda s, y: s.xp.log(s.xp.atan2(s.xp.ones_like(y), -y) / math.pi),
    "Laplace": lambda s, y: s.xp.where(y < 0, y - LOG_2, s.xp.log1p(-0.5 * s.xp.exp(-s.clip(y, 0.0, None)))),
    "Logistic": lambda s, y: -_log_softplus(s, -y),
    "SoftLaplace": lambda s, y: (
        s.xp.where(y < -20, y, s.xp.log(s.xp.atan(s.xp.exp(s.clip(y, -20.0, 80.0))))) + math.log(2 / math.pi)
    ),
}

Quantile = Callable[[Any, Any, Array], Array]

QUANTILES: dict[str, Quantile] = {
    "AsymmetricLaplace": _asymmetric_laplace,
    "AsymmetricLaplaceQuantile": lambda fn, s, z: _asymmetric_laplace(fn._ald, s, z),
    "Cauchy": _cauchy,
    "ContinuousBernoulli": lambda fn, s, z: _exponentially_tilted(s, z, fn.logits),
    "Dagum": _dagum,
    "DoublyTruncatedPowerLaw": _power_law,
    "Exponential": lambda fn, s, z: -s.log_ndtr(-z) / fn.rate,
    "Gamma": _gamma,
    "GeneralizedPareto": _generalized_pareto,
    "Gompertz": _gompertz,
    "Gumbel": lambda fn, s, z: fn.loc - fn.scale * shared.log_neg_log_ndtr(s, z),
    "HalfCauchy": _half_cauchy,
    "HalfNormal": lambda fn, s, z: fn.scale * s.xp.exp(shared.log_half_normal(s, z)),
    "InverseGamma": _inverse_gamma,
    "Kumaraswamy": _kumaraswamy,
    "Laplace": lambda fn, s, z: fn.loc + fn.scale * _symmetric(s, z, lambda log_tail: -(log_tail + LOG_2)),
    "LeftTruncatedDistribution": _truncated,
    "Levy": lambda fn, s, z: fn.loc + fn.scale * s.xp.exp(-2 * shared.log_half_normal(s, -z)),
    "Logistic": lambda fn, s, z: fn.loc + fn.scale * (s.log_ndtr(z) - s.log_ndtr(-z)),
    "LogitRelaxedBernoulli": lambda fn, s, z: (s.log_ndtr(z) - s.log_ndtr(-z) + _logit(fn, s, z)) / fn.temperature,
    "LowerTruncatedPowerLaw": _lower_power_law,
    "Normal": lambda fn, _, z: fn.loc + fn.scale * z,
    "RightTruncatedDistribution": _truncated,
    "SkewLogistic": _skew_logistic,
    "SoftLaplace": lambda fn, s, z: fn.loc + fn.scale * _soft_laplace_score(s, z),
    "TwoSidedTruncatedDistribution": _truncated,
    "Uniform": _uniform,
    "Weibull": _weibull,
}


def _logit(fn: Any, s: Any, z: Array) -> Array:
    log_p, log_not = _log_odds(fn, s, z)
    return log_p - log_not


# --- counts and classes from one coordinate: fn, special, z -> value ------------------------------------------------


def _discrete_uniform(fn: Any, s: Any, z: Array) -> Array:
    low, high = s.array(fn.low, z), s.array(fn.high, z)
    size = s.xp.astype(high - low + 1, z.dtype)
    lower, upper = _lower_upper(s, z)
    rank = s.xp.where(z < 0, s.xp.ceil(size * s.xp.exp(lower)) - 1, size - 1 - s.xp.floor(size * s.xp.exp(upper)))
    return low + s.clip(s.maximum(rank, s.xp.zeros_like(rank)), None, size - 1)


def _geometric(fn: Any, s: Any, z: Array) -> Array:
    _, log_not = _log_odds(fn, s, z)
    return s.clip(s.xp.ceil(s.log_ndtr(-z) / log_not) - 1, 0.0, None)


def _ordered_logistic(fn: Any, s: Any, z: Array) -> Array:
    latent = s.array(fn.predictor, z) + s.log_ndtr(z) - s.log_ndtr(-z)
    return s.xp.sum(s.xp.astype(latent[..., None] > fn.cutpoints, s.xp.int32), axis=-1)


COUNTS: dict[str, Quantile] = {
    **dict.fromkeys(
        ("Bernoulli", "BernoulliLogits", "BernoulliProbs"), lambda fn, s, z: _at_least(s, z, *_log_odds(fn, s, z))
    ),
    **dict.fromkeys(
        ("Binomial", "BinomialLogits", "BinomialProbs"),
        lambda fn, s, z: _binomial(s, z, _count(fn), *_log_odds(fn, s, z)),
    ),
    **dict.fromkeys(
        ("Categorical", "CategoricalLogits", "CategoricalProbs"), lambda fn, s, z: _class(s, z, _log_masses(fn, s, z))
    ),
    **dict.fromkeys(("Geometric", "GeometricLogits", "GeometricProbs"), _geometric),
    "DiscreteUniform": _discrete_uniform,
    "OrderedLogistic": _ordered_logistic,
    "Poisson": lambda fn, s, z: s.poisson_quantile(s.array(fn.rate, z), z),
}


CHECKS: dict[str, Callable[[Any], Any]] = {  # what is refused before anything runs
    **dict.fromkeys(("Binomial", "BinomialLogits", "BinomialProbs"), _count),
    **dict.fromkeys(
        ("LeftTruncatedDistribution", "RightTruncatedDistribution", "TwoSidedTruncatedDistribution"), _truncated_law
    ),
}


# --- laws of several coordinates, and laws made of others: fn, special -> GaussianMap -------------------------------


def _student(fn: Any, s: Any) -> GaussianMap:
    return _built(fn, s, (2,), lambda z: fn.loc + fn.scale * z[..., 0] * s.xp.exp(_log_student(s, fn.df, z[..., 1])))


def _beta(fn: Any, s: Any) -> GaussianMap:
    def transform(base: Array) -> Array:
        logit = _two_log_gammas(s, fn.concentration1, fn.concentration0, base)
        return _unit_open(s, s.xp.exp(-_log_softplus(s, -logit)))

    return _built(fn, s, (2,), transform)


def _fisher(fn: Any, s: Any) -> GaussianMap:
    def transform(base: Array) -> Array:
        return _positive(s, _two_log_gammas(s, 0.5 * fn.df1, 0.5 * fn.df2, base) + s.xp.log(fn.df2 / fn.df1))

    return _built(fn, s, (2,), transform)


def _log_dirichlet(s: Any, concentration: Any, base: Array) -> Array:
    log_g = s.gamma_log_quantile(s.array(concentration, base), base)
    return log_g - s.cumulative_logsumexp(log_g)[..., -1:]


def _dirichlet(fn: Any, s: Any) -> GaussianMap:
    return _built(fn, s, tuple(fn.event_shape), lambda base: _positive(s, _log_dirichlet(s, fn.concentration, base)))


def _scale_tril(fn: Any) -> Array:
    tril = getattr(fn, "_unbroadcasted_scale_tril", None)
    return fn.scale_tril if tril is None else tril


def _times(matrix: Array, vector: Array) -> Array:
    return (matrix @ vector[..., None])[..., 0]


def _multivariate_normal(fn: Any, s: Any) -> GaussianMap:
    return _built(fn, s, tuple(fn.event_shape), lambda z: fn.loc + _times(_scale_tril(fn), z))


def _multivariate_student(fn: Any, s: Any) -> GaussianMap:
    def transform(z: Array) -> Array:
        return fn.loc + _times(_scale_tril(fn), z[..., :-1]) * s.xp.exp(_log_student(s, fn.df, z[..., -1]))[..., None]

    return _built(fn, s, (fn.event_shape[0] + 1,), transform)


def _low_rank_normal(fn: Any, s: Any) -> GaussianMap:
    factor = getattr(fn, "_unbroadcasted_cov_factor", None)
    factor = fn.cov_factor if factor is None else factor
    diagonal = getattr(fn, "_unbroadcasted_cov_diag", None)
    diagonal = fn.cov_diag if diagonal is None else diagonal
    rank = factor.shape[-1]
    return _built(
        fn,
        s,
        (rank + fn.event_shape[0],),
        lambda z: fn.loc + _times(factor, z[..., :rank]) + s.xp.sqrt(diagonal) * z[..., rank:],
    )


def _matrix_normal(fn: Any, s: Any) -> GaussianMap:
    def transform(z: Array) -> Array:
        return fn.loc + fn.scale_tril_row @ z @ s.xp.matrix_transpose(fn.scale_tril_column)

    return _built(fn, s, tuple(fn.event_shape), transform)


def _car(fn: Any, s: Any) -> GaussianMap:
    def transform(z: Array) -> Array:
        tril = s.xp.linalg.cholesky(fn.precision_matrix)
        return fn.mean + s.xp.linalg.solve(s.xp.matrix_transpose(tril), z[..., None])[..., 0]

    return _built(fn, s, tuple(fn.event_shape), transform)


def _random_walk(fn: Any, s: Any) -> GaussianMap:
    def transform(z: Array) -> Array:
        return s.xp.cumulative_sum(z, axis=-1) * s.array(fn.scale, z)[..., None]

    return _built(fn, s, tuple(fn.event_shape), transform)


def _projected_normal(fn: Any, s: Any) -> GaussianMap:
    def transform(z: Array) -> Array:
        x = fn.concentration + z
        return x / s.xp.sqrt(s.xp.sum(x * x, axis=-1, keepdims=True))

    return _built(fn, s, tuple(fn.event_shape), transform)


def _lower_triangle(s: Any, diagonal: Array, below: Array) -> Array:
    """(..., p) and (..., p (p - 1) / 2) -> lower-triangular (..., p, p), by rows."""
    p = diagonal.shape[-1]
    place = np.full((p, p), p + below.shape[-1])
    place[np.diag_indices(p)] = np.arange(p)
    place[np.tril_indices(p, -1)] = p + np.arange(below.shape[-1])
    entries = s.xp.concat([diagonal, below, s.xp.zeros_like(diagonal[..., :1])], axis=-1)
    return s.pick(entries, place.reshape(-1)).reshape((*tuple(diagonal.shape), p))


def _bartlett(s: Any, df: Array, z: Array) -> Array:
    """Cholesky factor (..., p, p) of a standard Wishart: √χ²(df) on the diagonal, df (..., p); normals below it."""
    p = df.shape[-1]
    diagonal = s.xp.exp(0.5 * (s.gamma_log_quantile(0.5 * df, z[..., :p]) + LOG_2))
    return _lower_triangle(s, diagonal, z[..., p:])


def _wishart(fn: Any, s: Any, inverse: bool = False) -> GaussianMap:
    """Wishart of torch (a covariance), WishartCholesky and InverseWishartCholesky of NumPyro (Cholesky factors)."""
    if hasattr(fn, "transforms"):  # NumPyro's Wishart
        return _transformed(fn, s)
    p = fn.event_shape[-1]
    steps = np.arange(p) - (p - 1) if inverse else -np.arange(p)

    def transform(z: Array) -> Array:
        df = s.array(fn.df if hasattr(fn, "df") else fn.concentration, z)
        standard = _bartlett(s, df[..., None] + s.array(steps, z), z)
        if inverse:
            standard = s.xp.linalg.inv(standard)
        factor = _scale_tril(fn) @ standard
        return factor @ s.xp.matrix_transpose(factor) if hasattr(fn, "df") else factor

    return _built(fn, s, (p * (p + 1) // 2,), transform)


def _lkj_cholesky(fn: Any, s: Any) -> GaussianMap:
    """Row i of the factor is (w, v) / √(|w|² + v²) with w normal in R^i and v² = 2 Gamma(b): |w|²/(|w|² + v²) is then
    Beta(i/2, b), the onion of Lewandowski et al., and the map is smooth.
    """
    p = fn.event_shape[-1]
    rows = np.arange(1, p)

    def transform(z: Array) -> Array:
        concentration = s.array(fn.concentration, z)[..., None] + s.array(0.5 * (p - 1 - rows), z)
        v = s.xp.exp(0.5 * (s.gamma_log_quantile(concentration, z[..., : p - 1]) + LOG_2))
        v = s.xp.concat([s.xp.ones_like(v[..., :1]), v], axis=-1)
        rows_of_z = _lower_triangle(s, v, z[..., p - 1 :])
        return rows_of_z / s.xp.sqrt(s.xp.sum(rows_of_z * rows_of_z, axis=-1, keepdims=True))

    return _built(fn, s, ((p - 1) * (p + 2) // 2,), transform)


def _soft_asymmetric_laplace(fn: Any, s: Any) -> GaussianMap:
    def transform(z: Array) -> Array:
        normal = fn.loc + fn.soft_scale * z[..., 0]
        return normal + fn.left_scale * s.log_ndtr(z[..., 1]) - fn.right_scale * s.log_ndtr(-z[..., 2])

    return _built(fn, s, (3,), transform)


def _relaxed_categorical(fn: Any, s: Any) -> GaussianMap:
    def transform(z: Array) -> Array:
        scores = (_log_masses(fn._categorical, s, z) - shared.log_neg_log_ndtr(s, z)) / fn.temperature
        return scores - s.cumulative_logsumexp(scores)[..., -1:]

    return _built(fn, s, tuple(fn.event_shape), transform)


def _one_hot(fn: Any, s: Any) -> GaussianMap:
    size = fn.event_shape[-1]
    return _built(fn, s, (), lambda z: s.one_hot(_class(s, z, _log_masses(fn._categorical, s, z)), size), discrete=True)


def _multinomial_map(fn: Any, s: Any) -> GaussianMap:
    total = _count(fn)
    categorical = getattr(fn, "_categorical", fn)
    return _built(
        fn,
        s,
        (int(total.max(initial=0)),),
        lambda z: _multinomial(s, z, total, _log_masses(categorical, s, z)),
        discrete=True,
    )


def _dirichlet_multinomial(fn: Any, s: Any) -> GaussianMap:
    total, classes = _count(fn), fn.event_shape[-1]

    def transform(z: Array) -> Array:
        return _multinomial(s, z[..., classes:], total, _log_dirichlet(s, fn.concentration, z[..., :classes]))

    return _built(fn, s, (classes + int(total.max(initial=0)),), transform, discrete=True)


def _beta_binomial(fn: Any, s: Any) -> GaussianMap:
    total = _count(fn)

    def transform(z: Array) -> Array:
        logit = _two_log_gammas(s, fn.concentration1, fn.concentration0, z[..., :2])
        return _binomial(s, z[..., 2], total, -_log_softplus(s, -logit), -_log_softplus(s, logit))

    return _built(fn, s, (3,), transform, discrete=True)


def _gamma_poisson(fn: Any, s: Any) -> GaussianMap:
    """GammaPoisson of both libraries, with NumPyro's negative binomials, which are subclasses of it."""

    def transform(z: Array) -> Array:
        log_g = s.gamma_log_quantile(s.array(fn.concentration, z), z[..., 0])
        return s.poisson_quantile(_positive(s, log_g - s.xp.log(s.array(fn.rate, z))), z[..., 1])

    return _built(fn, s, (2,), transform, discrete=True)


def _negative_binomial(fn: Any, s: Any) -> GaussianMap:
    def transform(z: Array) -> Array:
        log_g = s.gamma_log_quantile(s.array(fn.total_count, z), z[..., 0])
        return s.poisson_quantile(_positive(s, log_g + _logit(fn, s, z)), z[..., 1])

    return _built(fn, s, (2,), transform, discrete=True)


def _beta_negative_binomial(fn: Any, s: Any) -> GaussianMap:
    def transform(z: Array) -> Array:
        logit = _two_log_gammas(s, fn.concentration1, fn.concentration0, z[..., :2])
        log_g = s.gamma_log_quantile(s.array(fn.n, z), z[..., 2])
        return s.poisson_quantile(_positive(s, log_g + logit), z[..., 3])

    return _built(fn, s, (4,), transform, discrete=True)


def _gated(fn: Any, s: Any, inner: _Flat) -> GaussianMap:
    """Zero with probability `gate`, else `inner`; the first coordinate is the gate's, low for zero."""

    def transform(base: Array) -> Array:
        like = _cast(fn, s, base)
        log_zero, log_not = _log_odds(fn, s, like, "gate", "gate_logits")
        value = inner.transform(base[..., 1:])
        return s.xp.where(_at_least(s, like[..., 0], log_not, log_zero), value, s.xp.zeros_like(value))

    return GaussianMap((*tuple(fn.batch_shape), 1 + inner.size), transform, inner.discrete)


def _zero_inflated(fn: Any, s: Any) -> GaussianMap:
    return _gated(fn, s, _flat(fn.base_dist, s))


def _hurdle(fn: Any, s: Any) -> GaussianMap:
    inner = _flat(fn.base_dist, s)
    if not inner.discrete:
        return _gated(fn, s, inner)
    if inner.size != 1 or tuple(gaussian_map(fn.base_dist, s).base_shape) != tuple(fn.base_dist.batch_shape):
        raise UnsupportedDistribution(
            f"{type(fn).__name__} of {type(fn.base_dist).__name__} has no exact map from standard normals"
        )

    def above_zero(base: Array) -> Array:
        z = _cast(fn, s, base)
        at_zero = fn.base_dist.log_prob(s.xp.zeros_like(z[..., 0]))[..., None]
        return inner.transform(_truncated_score(s, z, (at_zero, shared.log1mexp(s, at_zero)), None))

    return _gated(fn, s, inner._replace(transform=above_zero))


def _copula(fn: Any, s: Any) -> GaussianMap:
    """Correlated normals through the marginal's own map, which must be of one coordinate each."""
    _, name = _find(fn.marginal_dist)
    marginal = gaussian_map(fn.marginal_dist, s)
    if marginal.base_shape != tuple(fn.marginal_dist.batch_shape):
        raise UnsupportedDistribution(
            f"{type(fn).__name__} of {name} needs a marginal that is a map of one coordinate, and {name} takes several"
        )
    normals = gaussian_map(fn.base_dist, s)
    return GaussianMap(
        tuple(fn.batch_shape) + tuple(fn.event_shape),
        lambda base: marginal.transform(normals.transform(base)),
        marginal.discrete,
    )


def _transformed(fn: Any, s: Any) -> GaussianMap:
    inner = gaussian_map(fn.base_dist, s)

    def transform(base: Array) -> Array:
        value = inner.transform(base)
        for part in fn.transforms:
            value = part(value)
        return value

    return inner._replace(transform=transform)


def _expanded(fn: Any, s: Any) -> GaussianMap:
    inner = gaussian_map(fn.base_dist, s)
    return inner._replace(base_shape=tuple(fn.batch_shape) + inner.base_shape[len(fn.base_dist.batch_shape) :])


def _wrapped(fn: Any, s: Any) -> GaussianMap:
    return gaussian_map(fn.base_dist, s)


def _delta(fn: Any, s: Any) -> GaussianMap:
    """A base with no coordinates, whose shape says how far the value is expanded."""

    def transform(base: Array) -> Array:
        value = fn.v if hasattr(fn.v, "dtype") else s.array(fn.v, base)
        return s.xp.broadcast_to(s.xp.asarray(value), tuple(base.shape[:-1]) + tuple(fn.event_shape))

    return GaussianMap((*tuple(fn.batch_shape), 0), transform, False)


def _mixture(fn: Any, s: Any) -> GaussianMap:
    """The index from a first coordinate, the component from the rest. Not continuous in the first."""
    mixture = mixture_map(fn, s)
    assert mixture is not None
    extra = mixture.base_shape[len(fn.batch_shape) :]
    index = gaussian_map(mixture.index, s).transform

    def transform(base: Array) -> Array:
        return mixture.transform(index(base[..., 0]), base[..., 1:].reshape(base.shape[:-1] + extra))

    return GaussianMap((*tuple(fn.batch_shape), 1 + math.prod(extra)), transform, mixture.discrete)


Rule = Callable[[Any, Any], GaussianMap]

RULES: dict[str, Rule] = {
    **dict.fromkeys(("AffineBeta", "TransformedDistribution"), _transformed),
    **dict.fromkeys(("AVFMultivariateNormal", "MultivariateNormal", "OMTMultivariateNormal"), _multivariate_normal),
    **dict.fromkeys(("GaussianCopula", "GaussianCopulaBeta"), _copula),
    **dict.fromkeys(("Independent", "MaskedDistribution"), _wrapped),
    **dict.fromkeys(("LKJCholesky", "LKJCorrCholesky"), _lkj_cholesky),
    **dict.fromkeys(("MixtureGeneral", "MixtureSameFamily"), _mixture),
    **dict.fromkeys(("Multinomial", "MultinomialLogits", "MultinomialProbs"), _multinomial_map),
    **dict.fromkeys(("OneHotCategorical", "OneHotCategoricalStraightThrough"), _one_hot),
    **dict.fromkeys(("Wishart", "WishartCholesky"), _wishart),
    **dict.fromkeys(("ZeroInflatedDistribution", "ZeroInflatedProbs"), _zero_inflated),
    "Beta": _beta,
    "BetaBinomial": _beta_binomial,
    "BetaNegativeBinomial": _beta_negative_binomial,
    "CAR": _car,
    "Delta": _delta,
    "Dirichlet": _dirichlet,
    "DirichletMultinomial": _dirichlet_multinomial,
    "ExpRelaxedCategorical": _relaxed_categorical,
    "ExpandedDistribution": _expanded,
    "FisherSnedecor": _fisher,
    "GammaPoisson": _gamma_poisson,
    "GaussianRandomWalk": _random_walk,
    "HurdleProbs": _hurdle,
    "InverseWishartCholesky": functools.partial(_wishart, inverse=True),
    "LowRankMultivariateNormal": _low_rank_normal,
    "MatrixNormal": _matrix_normal,
    "MultivariateStudentT": _multivariate_student,
    "NegativeBinomial": _negative_binomial,
    "ProjectedNormal": _projected_normal,
    "SoftAsymmetricLaplace": _soft_asymmetric_laplace,
    "StudentT": _student,
    "Unit": lambda fn, _: GaussianMap((*fn.batch_shape, 0), lambda base: base, False),
}

ADVICE = {
    "ImproperUniform": "it is not a probability distribution; give the site a proper prior",
    "Empirical": "index the samples with a Categorical site instead",
    "VonMises": "use ProjectedNormal, or an angle that is a function of normals",
    "Stable": "write it as a function of Uniform and Exponential sites (Chambers, Mallows and Stuck)",
    "MaskedMixture": "sample both components and choose with where(mask, ...)",
}
