"""The functions of `special_jax` that moment propagation uses, for NumPy arrays on the host."""

from typing import Any

import numpy as np
from scipy import special

__all__ = ["array", "clip", "log_ndtr", "put", "stop_gradient", "with_diagonal", "xp"]

Array = Any
xp = np


def array(values: Any, like: Array) -> Array:
    """`values`, which may be Python numbers, as an array of the dtype of `like`."""
    return np.asarray(values, like.dtype)


def clip(x: Array, low: Any, high: Any) -> Array:
    """x between two bounds, either of which may be None."""
    return np.clip(x, low, high)


def log_ndtr(x: Array) -> Array:
    """log Φ(x)."""
    return special.log_ndtr(x)


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


def stop_gradient(x: Array) -> Array:
    """x: there are no gradients here."""
    return x
