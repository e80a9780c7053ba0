"""Checkers out of checkers: severities combined, and plain Python functions that nothing can see into.

A checker is ``severity = checker(observation, action)``, at least 0 for a catastrophe. Combinations are checkers
themselves: they nest, they work in both libraries, and gradients pass through them. The severity of a combination is
the usual robustness of temporal logic: the minimum for "and", the maximum for "or".

    crash = any_of(hits_wall, all_of(fast, negate(braking)))
    stuck = always(lambda x, y: 0.1 - abs(y.speed))     # the severity at each time, shape (T,)
    judged = black_box(run_the_simulator)               # NumPy in, a float or a bool out

Reference: Donzé & Maler (2010), Robust satisfaction of temporal logic over real-valued signals.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal

import array_api_compat
import numpy as np

__all__ = [
    "BlackBox",
    "Checker",
    "Combination",
    "OverTime",
    "SeverityError",
    "all_of",
    "always",
    "any_of",
    "black_box",
    "eventually",
    "negate",
]

Checker = Callable[[Any, Any], Any]
"""``severity = checker(observation, action)``."""
Branch = tuple[tuple[int, float], ...]
"""Parts of a severity that have to be catastrophes together: the number of each, and a sign."""


class SeverityError(ValueError):
    """The checker returned something that is not a severity."""


def all_of(*checkers: Checker) -> Combination:
    """A catastrophe when all are: the least severity; of bools, ``and``.

    Raises TypeError for what is not callable, ValueError for no checkers; SeverityError, when it is called, where some
    return bools and others numbers.
    """
    return Combination("all_of", _callables("all_of", checkers))


def any_of(*checkers: Checker) -> Combination:
    """A catastrophe when one of them is: the largest severity; of bools, ``or``. Raises as :func:`all_of` does."""
    return Combination("any_of", _callables("any_of", checkers))


def negate(checker: Checker) -> Combination:
    """A catastrophe when ``checker`` sees none: minus its severity; of a bool, ``not``.

    A severity of exactly 0 is a catastrophe on both sides. Raises as :func:`all_of` does.
    """
    return Combination("negate", _callables("negate", (checker,)))


def always(checker: Checker) -> OverTime:
    """A catastrophe when there is one at all times. ``checker`` returns a trajectory: time is its last axis.

    Raises TypeError for what is not callable, and for a :func:`black_box`, which has no time axis.
    """
    return OverTime("always", _trajectory("always", checker))


def eventually(checker: Checker) -> OverTime:
    """A catastrophe when there is one at some time. See :func:`always`."""
    return OverTime("eventually", _trajectory("eventually", checker))


def black_box(fn: Callable[..., Any], *, batched: bool = False, name: str | None = None) -> BlackBox:
    """A checker that is an ordinary function of NumPy arrays: a simulator, a rule base, a compiled program.

    It has no gradient, its calls are counted apart (``Estimate.checker_calls``) and can be bounded apart
    (``estimate(..., checker_budget=...)``). It must depend on its arguments alone and leave them as they are (they are
    read-only). A problem asks it a few times on trial before work starts.

    Args:
        fn: ``fn(observation, action)``, pytrees of NumPy arrays without a batch axis; returns a float (at least 0 for a
            catastrophe) or a bool.
        batched: ``fn`` gets whole batches instead: leaves ``(n, ...)`` in, ``(n,)`` out.
        name: what to call it in errors; the function's own name by default.

    Raises TypeError if ``fn`` is not callable; SeverityError, when it is called, for what is not a severity.
    """
    (fn,) = _callables("black_box", (fn,))
    return BlackBox(fn, batched, getattr(fn, "__name__", type(fn).__name__) if name is None else name)


@dataclass(frozen=True)
class Combination:
    """See :func:`all_of`, :func:`any_of` and :func:`negate`."""

    kind: Literal["all_of", "any_of", "negate"]
    parts: tuple[Checker, ...]

    @property
    def __name__(self) -> str:
        return f"{self.kind}({', '.join(map(_name, self.parts))})"

    def __call__(self, observation: Any, action: Any) -> Any:
        return self.join([part(observation, action) for part in self.parts])

    def join(self, severities: Sequence[Any]) -> Any:
        """The severity from those of the parts."""
        xp = _namespace(severities)
        arrays = [
            _array(
                xp, f"{self.kind}: {_name(part)}", value, "the severity, a number that is at least 0 for a catastrophe"
            )
            for part, value in zip(self.parts, severities, strict=True)
        ]
        bools = [array.dtype == xp.bool for array in arrays]
        if all(bools):
            if self.kind == "negate":
                return xp.logical_not(arrays[0])
            return reduce(xp.logical_and if self.kind == "all_of" else xp.logical_or, arrays)
        if any(bools):
            yes_or_no = ", ".join(_name(part) for part, is_bool in zip(self.parts, bools, strict=True) if is_bool)
            raise SeverityError(
                f"{self.kind}: {yes_or_no} returned a bool and the others a number, which cannot be compared. Return "
                "how far from the limit (at least 0 is a catastrophe) from every part; or, from every part, a bool "
                "(severity >= 0), which leads the search less well"
            )
        if self.kind == "negate":
            return -arrays[0]
        return reduce(xp.minimum if self.kind == "all_of" else xp.maximum, arrays)


@dataclass(frozen=True)
class OverTime:
    """See :func:`always` and :func:`eventually`."""

    kind: Literal["always", "eventually"]
    part: Checker

    @property
    def __name__(self) -> str:
        return f"{self.kind}({_name(self.part)})"

    def __call__(self, observation: Any, action: Any) -> Any:
        trajectory = self.part(observation, action)
        xp = _namespace([trajectory])
        who = f"{self.kind}: {_name(self.part)}"
        trajectory = _array(xp, who, trajectory, "the severity at each time, an array of shape (T,)")
        if trajectory.ndim == 0 or trajectory.shape[-1] == 0:
            raise SeverityError(
                f"{who} returned shape {tuple(trajectory.shape)}: return the severity at each time, shape (T,) with T "
                f"at least 1. For a single time leave {self.kind} out"
            )
        if trajectory.dtype == xp.bool:
            return (xp.all if self.kind == "always" else xp.any)(trajectory, axis=-1)
        return (xp.min if self.kind == "always" else xp.max)(trajectory, axis=-1)


@dataclass(frozen=True)
class BlackBox:
    """See :func:`black_box`."""

    fn: Callable[..., Any]
    batched: bool
    name: str

    @property
    def __name__(self) -> str:
        return self.name

    def __call__(self, observation: Any, action: Any) -> Any:
        """The severity of one case, a NumPy scalar."""
        if self.batched:
            raise SeverityError(f"{self.name} is a batched black_box: a Problem calls it, with whole batches")
        return self._checked(self._asked(observation, action), ())

    def rows(self, tree_map: Callable[..., Any], observation: Any, action: Any, n: int) -> np.ndarray:
        """Severities ``(n,)``, float64 or bool, of a batch of NumPy pytrees; tree_map is the library's."""
        batch = tuple(tree_map(_read_only, tree) for tree in (observation, action))
        if self.batched:
            return self._checked(self._asked(*batch), (n,))
        cases = (tuple(tree_map(lambda leaf, i=i: leaf[i], tree) for tree in batch) for i in range(n))
        found = [self._checked(self._asked(*case), ()) for case in cases]
        if len({value.dtype for value in found}) > 1:
            raise SeverityError(
                f"checker {self.name!r} returned a bool for some cases and a number for others: return one kind"
            )
        return np.stack(found)

    def _asked(self, observation: Any, action: Any) -> Any:
        try:
            return self.fn(observation, action)
        except Exception as error:
            error.add_note(
                f"raised by black_box checker {self.name!r}; its arguments are read-only NumPy arrays, "
                f"{'with' if self.batched else 'without'} a batch axis (batched={self.batched})"
            )
            raise

    def _checked(self, value: Any, shape: tuple[int, ...]) -> np.ndarray:
        """``value`` as float64 or bool; raises SeverityError unless it is a severity of this shape."""
        at_fault = f"checker {self.name!r} returned"
        wanted = "a float, at least 0 for a catastrophe, or a bool"
        if value is None:
            raise SeverityError(f"{at_fault} None: return the severity, {wanted}")
        try:
            found = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
        except (TypeError, ValueError) as error:
            raise SeverityError(f"{at_fault} {type(value).__name__}: return the severity, {wanted}") from error
        if found.dtype.kind == "c":
            raise SeverityError(f"{at_fault} a complex number: severity is real")
        if found.dtype.kind not in "bfiu":
            raise SeverityError(f"{at_fault} {type(value).__name__}: return the severity, {wanted}")
        if found.shape != shape:
            hint = (
                f"with batched=True it is given {shape[0]} cases at once and returns one severity a case, {shape}"
                if shape
                else "severity is one number a case, shape (): reduce with max(), or index; batched=True gives it "
                "whole batches"
            )
            raise SeverityError(f"{at_fault} shape {found.shape}: {hint}")
        if found.dtype.kind == "b":
            return found
        if np.isnan(found).any():
            raise SeverityError(
                f"{at_fault} NaN: return a number for every observation and action (large and negative when safe)"
            )
        return found.astype(np.float64)


def leaves(checker: Any) -> tuple[Any, ...]:
    """The checkers that a combination is made of, in order; black boxes are always among them."""
    if isinstance(checker, Combination):
        return tuple(leaf for part in checker.parts for leaf in leaves(part))
    return (checker,)


def join(checker: Any, severities: Iterator[Any]) -> Any:
    """The severity of a checker from those of its :func:`leaves`, in order."""
    if isinstance(checker, Combination):
        return checker.join([join(part, severities) for part in checker.parts])
    return next(severities)


def branches(checker: Any, most: int = 8) -> tuple[Branch, ...]:
    """How a combination comes to a catastrophe: one of these sets of :func:`leaves` together, each by its number and
    its sign, -1 where it must not be one. No set at all where there would be more than ``most``.
    """
    numbers = itertools.count()

    def of(part: Any, sign: float) -> list[Branch]:
        if not isinstance(part, Combination):
            return [((next(numbers), sign),)]
        if part.kind == "negate":
            return of(part.parts[0], -sign)
        return alternatives((part.kind == "any_of") == (sign > 0.0), [of(each, sign) for each in part.parts], most)

    found = of(checker, 1.0)
    return tuple(found) if len(found) <= most else ()


def alternatives(union: bool, parts: Sequence[Sequence[Branch]], most: int) -> list[Branch]:
    """The branches of a union of parts, or of their intersection: one of each together.

    None at all for more than ``most``, and where a part has none for that reason.
    """
    count = sum(map(len, parts)) if union else math.prod(map(len, parts))
    if count > most or not all(parts):
        return []
    if union:
        return [branch for part in parts for branch in part]
    return [tuple(itertools.chain(*together)) for together in itertools.product(*parts)]


def modules(checker: Any) -> tuple[Any, ...]:
    """The functions a checker is made of, black boxes left out: what may be a module of torch or JAX."""
    if isinstance(checker, BlackBox):
        return ()
    parts = (
        checker.parts if isinstance(checker, Combination) else (checker.part,) if isinstance(checker, OverTime) else ()
    )
    return tuple(module for part in parts for module in modules(part)) if parts else (checker,)


def _callables(name: str, checkers: tuple[Any, ...]) -> tuple[Any, ...]:
    if not checkers:
        raise ValueError(f"{name}: give at least one checker")
    for i, checker in enumerate(checkers, 1):
        if not callable(checker):
            what = f"argument {i} is a {type(checker).__name__}"
            raise TypeError(f"{name}: {what}: expected a function of (observation, action)")
    return checkers


def _trajectory(name: str, checker: Any) -> Any:
    (checker,) = _callables(name, (checker,))
    boxes = [leaf for leaf in leaves(checker) if isinstance(leaf, BlackBox)]
    if boxes:
        raise TypeError(
            f"{name}: {boxes[0].name} is a black_box, which gives one severity a case and not one a time: reduce over "
            f"time inside it, and leave {name} out"
        )
    return checker


def _namespace(values: Sequence[Any]) -> Any:
    """The array library of the values: torch's or JAX's, or NumPy where there is neither."""
    arrays = [value for value in values if array_api_compat.is_array_api_obj(value)]
    native = [value for value in arrays if not isinstance(value, np.ndarray | np.generic)]
    return array_api_compat.array_namespace(*native) if native else array_api_compat.array_namespace(np.empty(0))


def _array(xp: Any, who: str, value: Any, wanted: str) -> Any:
    """``value`` as an array of numbers or bools."""
    complaint = f"{who} returned {'None' if value is None else type(value).__name__}: return {wanted}, or a bool"
    if value is None or isinstance(value, str):
        raise SeverityError(complaint)
    try:
        return xp.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise SeverityError(complaint) from error


def _read_only(leaf: np.ndarray) -> np.ndarray:
    view = leaf.view()
    view.flags.writeable = False
    return view


def _name(checker: Any) -> str:
    return str(getattr(checker, "__name__", type(checker).__name__))
