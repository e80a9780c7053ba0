"""Numbers as people read them.

A catastrophe probability is often below the smallest float, so everything here starts from its logarithm:
``format_prob(-1000.0)`` is ``5.1e-435``.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "format_count",
    "format_interval",
    "format_log",
    "format_prob",
    "format_seconds",
    "format_short",
    "format_values",
    "in_words",
]

_LN10 = math.log(10.0)


def format_prob(log_prob: float, digits: int = 2) -> str:
    """``exp(log_prob)`` with ``digits`` significant figures, right however small it is."""
    if math.isnan(log_prob):
        return "?"
    if log_prob == -math.inf:
        return "0"
    if log_prob >= 0.0:
        return "1"
    if log_prob > math.log(1e-3):
        return f"{math.exp(log_prob):.{digits}g}"
    exponent = math.floor(log_prob / _LN10)
    mantissa = f"{math.exp(log_prob - exponent * _LN10):.{digits - 1}f}"
    if mantissa.startswith("10"):  # 9.96 rounds to 10.0: carry it into the exponent
        mantissa, exponent = f"{1.0:.{digits - 1}f}", exponent + 1
    return f"{mantissa}e{exponent:+03d}"


def in_words(log_prob: float) -> str:
    """``One in about 3.5 million``; ``One in about 10^20`` where there is no word for it."""
    if log_prob >= -math.log(1.5):
        return "Most"
    exponent = -log_prob / _LN10
    if exponent >= 15.0:
        return f"One in about 10^{exponent:.0f}"
    count = float(f"{math.exp(-log_prob):.2g}")
    for size, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if count >= size:
            return f"One in about {count / size:.4g} {word}"
    return f"One in about {count:,.0f}"


def format_interval(interval: tuple[float, float], digits: int = 2) -> str:
    """An interval of log P as one of P, ``[2.8e-07, 3.4e-07]``."""
    lower, upper = interval
    return f"[{format_prob(lower, digits)}, {format_prob(upper, digits)}]"


def format_log(value: float, digits: int = 2) -> str:
    """A log-probability or a number of nats, with a true minus sign and ``∞`` where it is infinite."""
    if math.isnan(value):
        return "?"
    sign = "−" if value < 0 else ""
    return sign + ("∞" if math.isinf(value) else f"{abs(value):.{digits}f}")


def format_count(count: float) -> str:
    """``12,500``."""
    return f"{count:,.0f}"


def format_seconds(seconds: float) -> str:
    """``0.4 s``, ``12 s``, ``3 min 05 s``."""
    if seconds < 10.0:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def format_short(value: float) -> str:
    """``0.0341``; whole numbers from a thousand on as ``12,500``."""
    return (
        format_count(value) if math.isfinite(value) and value == round(value) and abs(value) >= 1e3 else f"{value:.3g}"
    )


def format_values(values: NDArray[Any]) -> str:
    """An array in a few words: its numbers where there are few, else its shape, range and norm."""
    flat = np.asarray(values, dtype=np.float64).reshape(-1)
    if flat.size == 1:
        return format_short(float(flat[0]))
    if flat.size <= 8:
        return "[" + ", ".join(format_short(x) for x in flat.tolist()) + "]"
    low, high, norm = (format_short(float(x)) for x in (flat.min(), flat.max(), np.linalg.norm(flat)))
    return f"{tuple(values.shape)}, from {low} to {high}, norm {norm}"
