"""Constants that decide something: fields of a frozen dataclass of their method, each with its meaning and its source.

Whoever wants another value passes another object, ``LineSampling(tuning=LineTuning(tolerance=0.01))``; whoever wants to
know what a value is worth asks ``benchmarks/tuning.py``, which halves and doubles every one.
"""

from __future__ import annotations

from dataclasses import field, fields
from typing import Any, TypeVar

__all__ = ["meanings", "tuned"]

T = TypeVar("T")


def tuned(value: T, meaning: str, by: str) -> T:
    """A field of a tuning dataclass: its default, what it means with its unit, and the benchmark that chose it.

    by: a file of ``benchmarks/`` and what is asked of it, or where else the value comes from.
    """
    found: Any = field(default=value, metadata={"meaning": meaning, "by": by})
    return found  # type: ignore[no-any-return]


def meanings(tuning: Any) -> dict[str, tuple[Any, str, str]]:
    """Of each field: its value, its meaning, and the benchmark that chose it."""
    return {
        one.name: (getattr(tuning, one.name), one.metadata["meaning"], one.metadata["by"]) for one in fields(tuning)
    }
