"""What reports take beside probest's own requirements: loaded when first needed, and asked for by name."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__all__ = ["extra"]


def extra(module: str, what: str) -> Any:
    """A module of the extra ``report``. Raises ImportError, which says what it is for and how to get it."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or module
        raise ImportError(f'{what} need {missing}: pip install "probest[report]"') from error
