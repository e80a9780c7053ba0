"""Laws of several coordinates, and laws made of others: ``fn, special -> GaussianMap``."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from probest.backends import special as shared
from probest.programs.maps.base import (
    RULES,
    Array,
    Flattened,
    GaussianMap,
    MixtureMap,
    UnsupportedDistribution,
    built,
    cast,
    find_rule,
    flattened,
    gaussian_map,
    of_a_library,
)
from probest.programs.maps.choices import choices
from probest.programs.maps.pieces import (
    at_least,
    binomial_count,
    category,
    log_masses,
    log_odds,
    log_softplus,
    log_student,
    logit,
    multinomial_counts,
    positive,
    trials,
    truncated_score,
    two_log_gammas,
    unit_open,
)

__all__ = ["mixture_map"]

LOG_2 = math.log(2.0)


def mixture_map(fn: Any, special: Any) -> MixtureMap | None:
    """The map for a mixture given the index of its component, so that the index can be a site; None for others."""
    name = next(
        (cls.__name__ for cls in type(fn).__mro__ if cls.__name__ in ("MixtureSameFamily", "MixtureGeneral")), ""
    )
    if not name or not of_a_library(type(fn)):
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
        parts = [flattened(part, s) for part in fn.component_distributions]
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


def _student(fn: Any, s: Any) -> GaussianMap:
    return built(fn, s, (2,), lambda z: fn.loc + fn.scale * z[..., 0] * s.xp.exp(log_student(s, fn.df, z[..., 1])))


def _beta(fn: Any, s: Any) -> GaussianMap:
    def transform(base: Array) -> Array:
        logit = two_log_gammas(s, fn.concentration1, fn.concentration0, base)
        return unit_open(s, s.xp.exp(-log_softplus(s, -logit)))

    return built(fn, s, (2,), transform)


def _fisher(fn: Any, s: Any) -> GaussianMap:
    def transform(base: Array) -> Array:
        return positive(s, two_log_gammas(s, 0.5 * fn.df1, 0.5 * fn.df2, base) + s.xp.log(fn.df2 / fn.df1))

    return built(fn, s, (2,), transform)


def _log_dirichlet(s: Any, concentration: Any, base: Array) -> Array:
    log_g = s.gamma_log_quantile(s.array(concentration, base), base)
    return log_g - s.cumulative_logsumexp(log_g)[..., -1:]


def _dirichlet(fn: Any, s: Any) -> GaussianMap:
    return built(fn, s, tuple(fn.event_shape), lambda base: positive(s, _log_dirichlet(s, fn.concentration, base)))


def _scale_tril(fn: Any) -> Array:
    tril = getattr(fn, "_unbroadcasted_scale_tril", None)
    return fn.scale_tril if tril is None else tril


def _times(matrix: Array, vector: Array) -> Array:
    return (matrix @ vector[..., None])[..., 0]


def _multivariate_normal(fn: Any, s: Any) -> GaussianMap:
    return built(fn, s, tuple(fn.event_shape), lambda z: fn.loc + _times(_scale_tril(fn), z))


def _multivariate_student(fn: Any, s: Any) -> GaussianMap:
    def transform(z: Array) -> Array:
        return fn.loc + _times(_scale_tril(fn), z[..., :-1]) * s.xp.exp(log_student(s, fn.df, z[..., -1]))[..., None]

    return built(fn, s, (fn.event_shape[0] + 1,), transform)


def _low_rank_normal(fn: Any, s: Any) -> GaussianMap:
    factor = getattr(fn, "_unbroadcasted_cov_factor", None)
    factor = fn.cov_factor if factor is None else factor
    diagonal = getattr(fn, "_unbroadcasted_cov_diag", None)
    diagonal = fn.cov_diag if diagonal is None else diagonal
    rank = factor.shape[-1]
    return built(
        fn,
        s,
        (rank + fn.event_shape[0],),
        lambda z: fn.loc + _times(factor, z[..., :rank]) + s.xp.sqrt(diagonal) * z[..., rank:],
    )


def _matrix_normal(fn: Any, s: Any) -> GaussianMap:
    def transform(z: Array) -> Array:
        return fn.loc + fn.scale_tril_row @ z @ s.xp.matrix_transpose(fn.scale_tril_column)

    return built(fn, s, tuple(fn.event_shape), transform)


def _car(fn: Any, s: Any) -> GaussianMap:
    def transform(z: Array) -> Array:
        tril = s.xp.linalg.cholesky(fn.precision_matrix)
        return fn.mean + s.xp.linalg.solve(s.xp.matrix_transpose(tril), z[..., None])[..., 0]

    return built(fn, s, tuple(fn.event_shape), transform)


def _random_walk(fn: Any, s: Any) -> GaussianMap:
    def transform(z: Array) -> Array:
        return s.xp.cumulative_sum(z, axis=-1) * s.array(fn.scale, z)[..., None]

    return built(fn, s, tuple(fn.event_shape), transform)


def _projected_normal(fn: Any, s: Any) -> GaussianMap:
    def transform(z: Array) -> Array:
        x = fn.concentration + z
        return x / s.xp.sqrt(s.xp.sum(x * x, axis=-1, keepdims=True))

    return built(fn, s, tuple(fn.event_shape), transform)


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

    return built(fn, s, (p * (p + 1) // 2,), transform)


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

    return built(fn, s, ((p - 1) * (p + 2) // 2,), transform)


def _soft_asymmetric_laplace(fn: Any, s: Any) -> GaussianMap:
    def transform(z: Array) -> Array:
        normal = fn.loc + fn.soft_scale * z[..., 0]
        return normal + fn.left_scale * s.log_ndtr(z[..., 1]) - fn.right_scale * s.log_ndtr(-z[..., 2])

    return built(fn, s, (3,), transform)


def _relaxed_categorical(fn: Any, s: Any) -> GaussianMap:
    def transform(z: Array) -> Array:
        scores = (log_masses(fn._categorical, s, z) - shared.log_neg_log_ndtr(s, z)) / fn.temperature
        return scores - s.cumulative_logsumexp(scores)[..., -1:]

    return built(fn, s, tuple(fn.event_shape), transform)


def _one_hot(fn: Any, s: Any) -> GaussianMap:
    size = fn.event_shape[-1]
    return built(fn, s, (), lambda z: s.one_hot(category(s, z, log_masses(fn._categorical, s, z)), size), discrete=True)


def _multinomial_map(fn: Any, s: Any) -> GaussianMap:
    total = trials(fn)
    categorical = getattr(fn, "_categorical", fn)
    return built(
        fn,
        s,
        (int(total.max(initial=0)),),
        lambda z: multinomial_counts(s, z, total, log_masses(categorical, s, z)),
        discrete=True,
    )


def _dirichlet_multinomial(fn: Any, s: Any) -> GaussianMap:
    total, classes = trials(fn), fn.event_shape[-1]

    def transform(z: Array) -> Array:
        return multinomial_counts(s, z[..., classes:], total, _log_dirichlet(s, fn.concentration, z[..., :classes]))

    return built(fn, s, (classes + int(total.max(initial=0)),), transform, discrete=True)


def _beta_binomial(fn: Any, s: Any) -> GaussianMap:
    total = trials(fn)

    def transform(z: Array) -> Array:
        logit = two_log_gammas(s, fn.concentration1, fn.concentration0, z[..., :2])
        return binomial_count(s, z[..., 2], total, -log_softplus(s, -logit), -log_softplus(s, logit))

    return built(fn, s, (3,), transform, discrete=True)


def _gamma_poisson(fn: Any, s: Any) -> GaussianMap:
    """GammaPoisson of both libraries, with NumPyro's negative binomials, which are subclasses of it."""

    def transform(z: Array) -> Array:
        log_g = s.gamma_log_quantile(s.array(fn.concentration, z), z[..., 0])
        return s.poisson_quantile(positive(s, log_g - s.xp.log(s.array(fn.rate, z))), z[..., 1])

    return built(fn, s, (2,), transform, discrete=True)


def _negative_binomial(fn: Any, s: Any) -> GaussianMap:
    def transform(z: Array) -> Array:
        log_g = s.gamma_log_quantile(s.array(fn.total_count, z), z[..., 0])
        return s.poisson_quantile(positive(s, log_g + logit(fn, s, z)), z[..., 1])

    return built(fn, s, (2,), transform, discrete=True)


def _beta_negative_binomial(fn: Any, s: Any) -> GaussianMap:
    def transform(z: Array) -> Array:
        logit = two_log_gammas(s, fn.concentration1, fn.concentration0, z[..., :2])
        log_g = s.gamma_log_quantile(s.array(fn.n, z), z[..., 2])
        return s.poisson_quantile(positive(s, log_g + logit), z[..., 3])

    return built(fn, s, (4,), transform, discrete=True)


def _gated(fn: Any, s: Any, inner: Flattened) -> GaussianMap:
    """Zero with probability `gate`, else `inner`; the first coordinate is the gate's, low for zero."""

    def transform(base: Array) -> Array:
        like = cast(fn, s, base)
        log_zero, log_not = log_odds(fn, s, like, "gate", "gate_logits")
        value = inner.transform(base[..., 1:])
        return s.xp.where(at_least(s, like[..., 0], log_not, log_zero), value, s.xp.zeros_like(value))

    return GaussianMap((*tuple(fn.batch_shape), 1 + inner.size), transform, inner.discrete)


def _zero_inflated(fn: Any, s: Any) -> GaussianMap:
    """Of a count, the count's own coordinate is also the gate's: what lies above the gate is a level of the count."""
    inner, counts = gaussian_map(fn.base_dist, s), choices(fn.base_dist)
    if counts.choices[:1] != (0,) or counts.one_hot:
        return _gated(fn, s, flattened(fn.base_dist, s))
    several = len(inner.base_shape) > len(fn.base_dist.batch_shape)

    def transform(base: Array) -> Array:
        like = cast(fn, s, base)
        z = like[..., -1] if several else like
        log_zero, log_not = log_odds(fn, s, z, "gate", "gate_logits")
        upper = s.clip(s.log_ndtr(-z) - log_not, None, -float(s.xp.finfo(z.dtype).tiny))
        lower = shared.log1mexp(s, upper)
        level = s.xp.where(lower < upper, s.ndtri_exp(lower), -s.ndtri_exp(upper))
        value = inner.transform(s.xp.concat([like[..., :-1], level[..., None]], axis=-1) if several else level)
        return s.xp.where(at_least(s, z, log_not, log_zero), value, s.xp.zeros_like(value))

    return inner._replace(transform=transform)


def _hurdle(fn: Any, s: Any) -> GaussianMap:
    inner = flattened(fn.base_dist, s)
    if not inner.discrete:
        return _gated(fn, s, inner)
    if inner.size != 1 or tuple(gaussian_map(fn.base_dist, s).base_shape) != tuple(fn.base_dist.batch_shape):
        raise UnsupportedDistribution(
            f"{type(fn).__name__} of {type(fn.base_dist).__name__} has no exact map from standard normals"
        )

    def above_zero(base: Array) -> Array:
        z = cast(fn, s, base)
        at_zero = fn.base_dist.log_prob(s.xp.zeros_like(z[..., 0]))[..., None]
        return inner.transform(truncated_score(s, z, (at_zero, shared.log1mexp(s, at_zero)), None))

    return _gated(fn, s, inner._replace(transform=above_zero))


def _copula(fn: Any, s: Any) -> GaussianMap:
    """Correlated normals through the marginal's own map, which must be of one coordinate each."""
    _, name = find_rule(fn.marginal_dist)
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


RULES |= {
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
