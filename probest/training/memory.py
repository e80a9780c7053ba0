"""What a teacher said of catastrophes: a bounded memory that is replayed, so that what was learnt is not forgotten."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from probest.evidence import Floats
from probest.training.follower import Cases
from probest.training.teacher import Rows
from probest.tuning import tuned

__all__ = ["Memory", "MemoryTuning"]

_COLUMNS = ("z", "group", "severity", "noise", "added")
_BY = "benchmarks/below_one_over_n.py, digits, 1.0M calls"


@dataclass(frozen=True)
class MemoryTuning:
    """What is kept, and what leaves."""

    near: float = tuned(1.0, "σ of the last rung below a catastrophe at which a case is kept", _BY)
    same: float = tuned(0.95, "cosine of two cases' z from which on they are one", _BY)
    solved: float = tuned(3.0, "σ below a catastrophe from which on a case is solved", _BY)


@dataclass
class Memory:
    """At most ``capacity`` cases.

    rows: of the task's data, leaves ``(m, ...)``. z ``(m, dim)``; group ``(m,)``: strata. severity, noise ``(m,)``:
    when last looked at. added ``(m,)``: at which step.
    """

    capacity: int
    rows: Rows = field(default_factory=list)
    z: Floats = field(default_factory=lambda: np.empty((0, 0)))
    group: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.intp))
    severity: Floats = field(default_factory=lambda: np.empty(0))
    noise: Floats = field(default_factory=lambda: np.empty(0))
    added: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.intp))
    tuning: MemoryTuning = field(default_factory=MemoryTuning)

    def __len__(self) -> int:
        return len(self.added)

    def add(self, cases: Cases, rows: Rows, step: int) -> None:
        """Keep those of the cases that are catastrophes, or nearly, and like nothing that is kept already."""
        least = float(np.min(cases.noise)) if len(cases.noise) else 0.0
        near = np.flatnonzero(cases.severity > -self.tuning.near * least)
        fresh = [i for i in near if not self._knows(cases.z[i], int(cases.group[i]))]
        fresh = [i for n, i in enumerate(fresh) if not _alike(cases.z[fresh[:n]], cases.z[i], self.tuning.same).any()]
        if not fresh or not self.capacity:
            return
        new = [cases.z[fresh], cases.group[fresh], cases.severity[fresh], cases.noise[fresh]]
        old = [self.z, self.group, self.severity, self.noise]
        if len(self):
            new = [np.concatenate(pair) for pair in zip(old, new, strict=True)]
            rows = [np.concatenate([kept, leaf[fresh]]) for kept, leaf in zip(self.rows, rows, strict=True)]
        else:
            rows = [leaf[fresh] for leaf in rows]
        self.z, self.group, self.severity, self.noise = new
        self.rows = rows
        self.added = np.concatenate([self.added, np.full(len(fresh), step, dtype=np.intp)])
        self._forget()

    def choose(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Indices of ``count`` cases, with replacement, the likelier the nearer they are to a catastrophe."""
        near = np.maximum(self.severity / np.maximum(self.noise, 1e-300), -self.tuning.solved)
        weight = np.exp(np.minimum(near, 0.0))
        return rng.choice(len(self), count, p=weight / weight.sum())

    def arrays(self) -> dict[str, np.ndarray]:
        """All of it, by name, for a checkpoint."""
        rows = {f"rows.{i}": leaf for i, leaf in enumerate(self.rows)}
        return {name: getattr(self, name) for name in _COLUMNS} | rows

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        self.rows = [arrays[f"rows.{i}"] for i in range(sum(name.startswith("rows.") for name in arrays))]
        for name in _COLUMNS:
            setattr(self, name, arrays[name])

    def _knows(self, z: Floats, group: int) -> bool:
        mine = self.z[self.group == group] if len(self) else np.empty((0, len(z)))
        return bool(_alike(mine, z, self.tuning.same).any())

    def _forget(self) -> None:
        """Down to the capacity: the oldest of those solved leave first, then the oldest of all."""
        excess = len(self) - self.capacity
        if excess <= 0:
            return
        solved = self.severity < -self.tuning.solved * self.noise
        leaving = np.lexsort((self.added, ~solved))[:excess]
        kept = np.setdiff1d(np.arange(len(self)), leaving)
        self.rows = [leaf[kept] for leaf in self.rows]
        for name in _COLUMNS:
            setattr(self, name, getattr(self, name)[kept])


def _alike(known: Floats, z: Floats, same: float) -> np.ndarray:
    """Which rows of ``known`` point the way of z."""
    length = np.linalg.norm(known, axis=1) * max(math.sqrt(float(z @ z)), 1e-300)
    return np.asarray(known @ z > same * np.maximum(length, 1e-300))
