"""The functions of `special_jax` that moment propagation uses, for NumPy arrays on the host."""

import sys
from typing import Any

import numpy as np
from scipy import special

__all__ = [
    "array",
    "clip",
    "filled_diagonal",
    "in_units",
    "log_ndtr",
    "ndtri_exp",
    "nested",
    "on_host",
    "put",
    "stop_gradient",
    "with_diagonal",
    "xp",
]

Array = Any
xp = np
_here = sys.modules[__name__]


def array(values: Any, like: Array) -> Array:
    """`values`, which may be Python numbers, as an array of the dtype of `like`."""
    return np.asarray(values, like.dtype)


def clip(x: Array, low: Any, high: Any) -> Array:
    """x between two bounds, either of which may be None."""
    return np.clip(x, low, high)


def log_ndtr(x: Array) -> Array:
    """log Φ(x)."""
    return special.log_ndtr(x)


def ndtri_exp(log_p: Array) -> Array:
    """Φ⁻¹ of the exponential."""
    return special.ndtri_exp(log_p)


def on_host(*arrays: Array) -> tuple[Any, tuple[Array, ...]]:
    """The functions here, and the arrays as they are."""
    return _here, arrays


def put(x: Array, rows: Any, columns: Any, values: Array) -> Array:
    """The matrix x with `values` at the given places."""
    found = x.copy()
    found[rows, columns] = values
    return found


def with_diagonal(x: Array, values: Any) -> Array:
    """The matrix x with `values` on its diagonal."""
    found = x.copy()
    np.fill_diagonal(found, values)
    return found


# What follows may write into its first argument


def nested(total: Array, left: Array, right: Array, factor: Array) -> Array:
    """factor ∘ (total + left rightᵀ)."""
    total += left[:, None] * right[None, :]
    total *= factor
    return total


def filled_diagonal(x: Array, values: Any) -> Array:
    """`with_diagonal`."""
    np.fill_diagonal(x, values)
    return x


def in_units(x: Array, rows: Array, columns: Array) -> Array:
    """rows_i x_ij columns_j within ±1; x is left as it is."""
    x = rows[:, None] * x
    x *= columns
    return np.clip(x, -1.0, 1.0, out=x)


def stop_gradient(x: Array) -> Array:
    """x: there are no gradients here."""
    return x
