r"""A guide that a student knows: the adversary, weighed by how likely the student holds a catastrophe to be.

.. math:: q(z) = \varphi(z)\, \Phi(\hat s(U^\top z)/\hat\sigma) \,/\, Z

Its draws come from a pool of particles that tempering on the student left, which costs no model calls, with fresh
coordinates in the directions that the student does not see.

Reference: Dubourg, Sudret & Deheeger (2013), Metamodel-based importance sampling for structural reliability analysis.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from probest.evidence import Floats
from probest.surrogates.student import Distilled

__all__ = ["DistilledGuide"]


@dataclass
class DistilledGuide:
    """learned: what the student knows. log_mass: log Z, known to ``error`` nats.

    more: gives another pool of particles ``(n, r)``, in random order; each of them is drawn once.
    """

    learned: Distilled
    log_mass: float
    error: float
    more: Callable[[], Floats]
    _pool: Floats = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._pool = np.empty((0, self.learned.basis.shape[1]))

    @property
    def dim(self) -> int:
        return len(self.learned.basis)

    def sample(self, n: int, rng: np.random.Generator) -> Floats:
        while len(self._pool) < n:
            self._pool = np.concatenate([self._pool, self.more()])
        u, self._pool = self._pool[:n], self._pool[n:]
        return self.learned.whole(u, rng)

    def log_ratio(self, z: Floats) -> Floats:
        return self.log_mass - self.learned.log_chance(self.learned.inside(z))
