"""The special functions of `special` for JAX: differentiable by custom_jvp, to any order, under vmap and jit."""

import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.numpy as xp
from jax.scipy.special import digamma, erfc, erfinv
from jax.scipy.special import gammaln as lgamma

from probest.backends import special

__all__ = ["digamma", "erfinv", "lgamma", "xp"]

Array = Any

clip, maximum, stop_gradient = jnp.clip, jnp.maximum, jax.lax.stop_gradient
_here = sys.modules[__name__]


def array(values: Any, like: Array) -> Array:
    """`values`, which may be Python numbers, as an array of the dtype of `like`."""
    return jnp.asarray(values, like.dtype)


def pick(x: Array, indices: Any) -> Array:
    """x[..., indices] for constant indices."""
    return x[..., indices]


def below(x: Array) -> Array:
    """The next smaller float."""
    return jnp.nextafter(x, -jnp.inf)


def put(x: Array, rows: Any, columns: Any, values: Array) -> Array:
    """The matrix x with `values` at the given places."""
    return x.at[rows, columns].set(values)


def with_diagonal(x: Array, values: Any) -> Array:
    """The matrix x with `values` on its diagonal."""
    return jnp.fill_diagonal(x, values, inplace=False)


def nested(total: Array, left: Array, right: Array, factor: Array) -> Array:
    """factor ∘ (total + left rightᵀ)."""
    return factor * (total + left[:, None] * right[None, :])


filled_diagonal = with_diagonal


def in_units(x: Array, rows: Array, columns: Array) -> Array:
    """rows_i x_ij columns_j within ±1."""
    return jnp.clip(rows[:, None] * x * columns, -1.0, 1.0)


def on_host(*arrays: Array) -> tuple[Any, tuple[Array, ...]]:
    """The functions here, and the arrays as they are: `special_numpy` is used where no gradient is wanted."""
    return _here, arrays


def repeat(times: int, body: Callable[[Any], Any], state: Any) -> Any:
    """`body` applied `times` times."""
    return jax.lax.fori_loop(0, times, lambda _, state: body(state), state)


def cumulative_logsumexp(x: Array) -> Array:
    """Along the last axis."""
    return jax.lax.cumlogsumexp(x, axis=x.ndim - 1)


def one_hot(index: Array, size: int) -> Array:
    """(...) of integers -> bool (..., size)."""
    return index[..., None] == jnp.arange(size)


def sample_dtype(fn: Any) -> Any:
    """The dtype that `fn.sample()` has; nothing is drawn."""
    return jax.eval_shape(fn.sample, jax.random.key(0)).dtype


def parameter_dtype(fn: Any) -> Any:
    """The floating dtype of the distribution's parameters; None where they are Python numbers."""
    leaves = [
        leaf for leaf in jax.tree.leaves(fn) if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    return jnp.result_type(*leaves) if leaves else None


@jax.custom_jvp
def log_ndtr(z: Array) -> Array:
    """log Φ(z), beyond the reach of erfc by DLMF 7.12.1. JAX's own, log(Φ(z)) up to z = 5, has one digit there."""
    size = jnp.abs(z)
    tail = 0.5 * erfc(size * 0.5**0.5)
    reach = 30.0 if z.dtype == jnp.float64 else 10.0
    r = 1 / jnp.square(jnp.maximum(size, reach))
    series = jnp.log1p(-r * (1 - r * (3 - r * (15 - r * (105 - r * 945)))))
    far = series - 0.5 * z * z - jnp.log(jnp.maximum(size, reach)) - special.LOG_SQRT_2PI
    return jnp.where(z > 0, jnp.log1p(-tail), jnp.where(size < reach, jnp.log(tail), far))


@log_ndtr.defjvp
def _log_ndtr_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    log_cdf = log_ndtr(*primals)
    return log_cdf, tangents[0] * special.log_ndtr_slope(_here, primals[0], log_cdf)


@jax.custom_jvp
def ndtri_exp(log_p: Array) -> Array:
    """The w <= 0 with log Φ(w) = log_p, for log_p <= log ½."""
    return special.ndtri_exp(_here, log_p)


@ndtri_exp.defjvp
def _ndtri_exp_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    w = ndtri_exp(*primals)
    return w, tangents[0] / special.log_ndtr_slope(_here, w, log_ndtr(w))


def gamma_log_quantile(concentration: Array, z: Array) -> Array:
    """log of the quantile of Gamma(concentration, 1) at Φ(z); arguments broadcast."""
    return _gamma_log_quantile(*jnp.broadcast_arrays(concentration, z))


@jax.custom_jvp
def _gamma_log_quantile(concentration: Array, z: Array) -> Array:
    return special.gamma_log_quantile(_here, concentration, z)


@_gamma_log_quantile.defjvp
def _gamma_log_quantile_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    log_x = _gamma_log_quantile(*primals)
    by_concentration, by_z = special.gamma_log_quantile_slopes(_here, *primals, log_x)
    return log_x, by_concentration * tangents[0] + by_z * tangents[1]


def poisson_quantile(rate: Array, z: Array) -> Array:
    """The smallest k with P(X <= k) >= Φ(z), X ~ Poisson(rate); has no gradient."""
    return special.poisson_quantile(_here, stop_gradient(rate), stop_gradient(z))
