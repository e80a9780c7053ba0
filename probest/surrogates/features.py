"""What a learned severity is linear in, and the event that it makes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import scipy
from scipy import special

from probest.evidence import Evaluation, Floats

__all__ = ["Decode", "Features", "Knows", "Learned", "Softened"]

Decode = Callable[[Floats], Floats]


class Features(NamedTuple):
    """What the surrogate is linear in: 1, z, and products and radial functions in directions ``basis`` ``(dim, r)``.

    centres: ``(m, r)`` of radial functions of one ``width``; None for none. decode: z to the values of discrete sites
    ``(n, k)``, or None; with them the surrogate has no gradient.
    """

    basis: Floats
    products: bool = False
    centres: Floats | None = None
    width: float = 1.0
    decode: Decode | None = None

    def __call__(self, z: Floats) -> Floats:
        columns = [np.ones((len(z), 1)), z]
        if self.decode is not None:
            columns.append(self.decode(z))
        u = z @ self.basis
        if self.products:
            i, j = np.triu_indices(u.shape[1])
            columns.append(u[:, i] * u[:, j])
        if self.centres is not None:
            columns.append(self._radial(u, self.centres))
        return np.concatenate(columns, axis=1)

    def slope(self, z: Floats, coefficients: Floats) -> Floats:
        """Gradient in z, ``(n, dim)``, of the combination with these coefficients."""
        u = z @ self.basis
        inner = np.zeros_like(u)
        at = z.shape[1] + 1
        if self.products:
            i, j = np.triu_indices(u.shape[1])
            form = np.zeros((u.shape[1], u.shape[1]))
            form[i, j] = coefficients[at : at + len(i)]
            inner += u @ (form + form.T)
            at += len(i)
        if self.centres is not None:
            pull = self._radial(u, self.centres) * (coefficients[at:] / self.width**2)
            inner += pull @ self.centres - u * pull.sum(axis=1, keepdims=True)
        return np.asarray(coefficients[1 : z.shape[1] + 1] + inner @ self.basis.T, dtype=np.float64)

    def _radial(self, u: Floats, centres: Floats) -> Floats:
        square = scipy.spatial.distance.cdist(u, centres, "sqeuclidean")
        return np.asarray(np.exp(-0.5 * square / self.width**2), dtype=np.float64)


class Knows(Protocol):
    """A surrogate severity, and the standard deviation of its error."""

    @property
    def noise(self) -> float: ...

    @property
    def differentiable(self) -> bool: ...

    def severity(self, z: Floats) -> Floats: ...

    def severity_and_slope(self, z: Floats) -> tuple[Floats, Floats]: ...


class Learned(NamedTuple):
    """A fitted surrogate and the standard deviation of its error."""

    features: Features
    coefficients: Floats
    noise: float

    @property
    def differentiable(self) -> bool:
        return self.features.decode is None

    def severity(self, z: Floats) -> Floats:
        return np.asarray(self.features(z) @ self.coefficients, dtype=np.float64)

    def severity_and_slope(self, z: Floats) -> tuple[Floats, Floats]:
        return self.severity(z), self.features.slope(z, self.coefficients)

    def log_chance(self, z: Floats) -> Floats:
        """log Φ(ŝ/σ̂): how likely a catastrophe is, as far as the surrogate can tell."""
        return np.asarray(special.log_ndtr(self.severity(z) / self.noise), dtype=np.float64)


@dataclass(frozen=True)
class Softened:
    """The surrogate with its error as one more coordinate e: the event ŝ(z) + σ̂ e ≥ 0 has probability E[Φ(ŝ/σ̂)]."""

    learned: Knows
    dim: int
    boolean: bool = False
    weighted: bool = False

    @property
    def differentiable(self) -> bool:
        return self.learned.differentiable

    def evaluate(self, z: Floats, *, gradient: bool = False) -> Evaluation:
        inner, weight = z[:, :-1], np.zeros(len(z))
        noise = self.learned.noise
        if not gradient:
            return Evaluation(self.learned.severity(inner) + noise * z[:, -1], weight)
        severity, slope = self.learned.severity_and_slope(inner)
        return Evaluation(severity + noise * z[:, -1], weight, np.column_stack([slope, np.full(len(z), noise)]))
