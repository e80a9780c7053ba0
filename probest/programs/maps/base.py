"""What a map is, and how the rule for a distribution is found: tables by class name, which the other modules fill."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

__all__ = [
    "ADVICE",
    "CHECKS",
    "COUNTS",
    "QUANTILES",
    "RULES",
    "Array",
    "Flattened",
    "GaussianMap",
    "MixtureMap",
    "Quantile",
    "Rule",
    "UnsupportedDistribution",
    "as_sample",
    "built",
    "cast",
    "coarseness",
    "find_rule",
    "flattened",
    "gaussian_map",
    "of_a_library",
]

Array = Any


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


Quantile = Callable[[Any, Any, Array], Array]
"""``rule(fn, special, z) -> value``: one coordinate, monotone."""

Rule = Callable[[Any, Any], GaussianMap]
"""``rule(fn, special) -> map``: several coordinates, or made of other laws."""

QUANTILES: dict[str, Quantile] = {}
"""Laws on the line (:mod:`probest.programs.maps.line`)."""

COUNTS: dict[str, Quantile] = {}
"""Counts and classes from one coordinate (:mod:`probest.programs.maps.counts`)."""

RULES: dict[str, Rule] = {}
"""Laws of several coordinates, and laws made of others (:mod:`probest.programs.maps.several`)."""

CHECKS: dict[str, Callable[[Any], Any]] = {}
"""What raises where a law of the first two tables cannot be mapped, before anything runs."""

ADVICE: dict[str, str] = {
    "ImproperUniform": "it is not a probability distribution; give the site a proper prior",
    "Empirical": "index the samples with a Categorical site instead",
    "Stable": "write it as a function of Uniform and Exponential sites (Chambers, Mallows and Stuck)",
    "MaskedMixture": "sample both components and choose with where(mask, ...)",
}


def gaussian_map(fn: Any, special: Any) -> GaussianMap:
    """The map for `fn`; `special` is `probest.backends.special_torch` or `special_jax`, as `fn` needs.

    A law that is not one of the libraries' may bring its own, `fn.gaussian_map() -> GaussianMap`.

    Raises UnsupportedDistribution, naming the class.
    """
    if hasattr(fn, "gaussian_map") and not of_a_library(type(fn)):
        brought: GaussianMap = fn.gaussian_map()
        return brought
    rule, name = find_rule(fn)
    if name in RULES:
        mapped: GaussianMap = rule(fn, special)
        return mapped
    if name in CHECKS:
        CHECKS[name](fn)
    transform = functools.partial(_cast_and_apply, rule, fn, special, discrete=name in COUNTS)
    return GaussianMap(tuple(fn.batch_shape), transform, name in COUNTS)


def of_a_library(cls: type) -> bool:
    """Whether a class is one of torch's, Pyro's or NumPyro's own."""
    return cls.__module__.partition(".")[0] in ("torch", "pyro", "numpyro")


def find_rule(fn: Any) -> tuple[Callable[..., Any], str]:
    """The rule for the first class of `fn`'s MRO that has one, and that class's name."""
    own = type(fn).__name__
    for cls in type(fn).__mro__:
        name = cls.__name__
        if of_a_library(cls):
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


def coarseness(fn: Any, s: Any) -> Array | None:
    """How far apart neighbouring floats are at the middle of a continuous law, in its standard deviations: a scalar.

    The largest over its elements; laws without a variance count in their scales. None where the law does not say where
    its middle is.
    """
    found = None
    law = fn
    while type(law).__name__ in ("Independent", "ExpandedDistribution", "MaskedDistribution"):
        law = law.base_dist
    for middle, width, power in (("mean", "variance", 0.5), ("loc", "scale", 1.0)):
        try:
            where, spread = getattr(law, middle), getattr(law, width)
        except (AttributeError, NotImplementedError):
            continue
        # parameters may be whole numbers, and numbers of Python
        where, spread = (
            (value if hasattr(value, "dtype") else s.array(value, s.xp.zeros(()))) * 1.0 for value in (where, spread)
        )
        apart = s.xp.finfo(where.dtype).eps * s.xp.abs(where) / spread**power
        apart = s.xp.where(s.xp.isfinite(apart), apart, s.xp.nan)
        found = apart if found is None else s.xp.where(s.xp.isnan(found), apart, found)
    return None if found is None else s.xp.max(s.xp.where(s.xp.isnan(found), 0.0, found))


def cast(fn: Any, s: Any, base: Array) -> Array:
    """The base in the precision of the distribution's parameters."""
    dtype = s.parameter_dtype(fn)
    return base if dtype is None else s.xp.astype(base, dtype)


def _cast_and_apply(rule: Callable[..., Array], fn: Any, s: Any, base: Array, discrete: bool) -> Array:
    value = rule(fn, s, cast(fn, s, base))
    return as_sample(fn, s, value) if discrete else value


def as_sample(fn: Any, s: Any, value: Array) -> Array:
    """A discrete value with the dtype that the library's own sample has."""
    dtype = s.sample_dtype(fn)
    return s.stop_gradient(value if dtype is None else s.xp.astype(value, dtype))


def built(
    fn: Any, s: Any, extra: tuple[int, ...], transform: Callable[[Array], Array], discrete: bool = False
) -> GaussianMap:
    """The map of a rule whose base is batch_shape + extra."""

    def of_base(base: Array) -> Array:
        value = transform(cast(fn, s, base))
        return as_sample(fn, s, value) if discrete else value

    return GaussianMap(tuple(fn.batch_shape) + extra, of_base, discrete)


class Flattened(NamedTuple):
    """A map whose base has one trailing axis of ``size`` coordinates for each draw."""

    size: int
    transform: Callable[[Array], Array]  # (..., size) -> value
    discrete: bool


def flattened(fn: Any, s: Any) -> Flattened:
    """The map of `fn` on a base whose coordinates for one draw are one trailing axis."""
    inner = gaussian_map(fn, s)
    extra = inner.base_shape[len(fn.batch_shape) :]

    def transform(base: Array) -> Array:
        return inner.transform(base.reshape(base.shape[:-1] + extra))

    return Flattened(math.prod(extra), transform, inner.discrete)
