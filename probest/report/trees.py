"""Pytrees of dicts, tuples and lists, for reports that know no backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

__all__ = ["leaves", "mapped"]


def leaves(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The arrays of a pytree, each with a dotted name such as ``observation.wind``."""
    if tree is None:
        return
    if isinstance(tree, Mapping):
        items = list(tree.items())
    elif isinstance(tree, tuple) and hasattr(tree, "_fields"):
        items = list(zip(tree._fields, tree, strict=True))
    elif isinstance(tree, tuple | list):
        items = list(enumerate(tree))
    else:
        yield name, tree
        return
    for key, value in items:
        yield from leaves(value, f"{name}.{key}" if name else str(key))


def mapped(fn: Callable[[Any], Any], tree: Any) -> Any:
    """The same tree with ``fn`` of each array."""
    if tree is None:
        return None
    if isinstance(tree, Mapping):
        return {key: mapped(fn, value) for key, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(mapped(fn, value) for value in tree))
    if isinstance(tree, tuple | list):
        return type(tree)(mapped(fn, value) for value in tree)
    return fn(tree)
