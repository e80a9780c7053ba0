r"""Kriging over lists of values: what is known of a severity at some combinations says of all others.

A Gaussian process over the elements e of discrete sites, with covariance

.. math:: \operatorname{Cov}(s(v), s(w)) = \sigma^2 \prod_e \rho_e^{d_e(v_e, w_e)},

d_e the distance of two values: 0 or 1 for categories, the difference for counts. A ρ near 1 is an element that hardly
matters; products of all orders are there, the lower ones with more weight. The ρ and the share of noise are those of
the highest likelihood. On a grid the mean at all combinations is one product of two matrices, one for each half of the
elements.

References: Kondor & Lafferty (2002), Diffusion kernels on graphs and other discrete structures; Rasmussen & Williams
(2006), Gaussian processes for machine learning, § 5.4.2 (errors when each case is left out in turn).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import linalg, optimize

from probest.evidence import Floats

__all__ = ["Grid", "Kriged", "Law", "fit_law", "krige"]

_LEAST_NOISE, _FIRST_NOISE = -9.0, -3.0  # log of the share of noise
_STEEP = 6.0  # logit of ρ, at most


class Grid(NamedTuple):
    """All combinations of the elements' values. values: those of each element, increasing. counted: whether an
    element's values are counts, a distance apart, and not categories.
    """

    values: tuple[tuple[int, ...], ...]
    counted: tuple[bool, ...]

    def distance(self, e: int, a: np.ndarray, b: np.ndarray) -> Floats:
        """Of places ``(n,)`` and ``(m,)`` in the list of element e: ``(n, m)``."""
        if not self.counted[e]:
            return np.asarray(a[:, None] != b[None], dtype=np.float64)
        at = np.asarray(self.values[e], dtype=np.float64)
        return np.asarray(np.abs(at[a][:, None] - at[b][None]))

    def log_correlation(self, log_rho: Floats, a: np.ndarray, b: np.ndarray, elements: Sequence[int]) -> Floats:
        """Of places ``(n, len(elements))`` and ``(m, len(elements))``: ``(n, m)``."""
        out = np.zeros((len(a), len(b)))
        for j, e in enumerate(elements):
            out += log_rho[e] * self.distance(e, a[:, j], b[:, j])
        return out

    def halves(self) -> tuple[list[int], list[int]]:
        """The first elements and the others, with about as many combinations each."""
        logs = np.cumsum(np.log([len(values) for values in self.values]))
        cut = 1 + int(np.argmin(np.abs(logs - 0.5 * logs[-1])))
        return list(range(cut)), list(range(cut, len(self.values)))

    def places(self, elements: Sequence[int]) -> np.ndarray:
        """All combinations of some elements, ``(m, len(elements))``, the last one running fastest."""
        if not elements:
            return np.zeros((1, 0), dtype=np.intp)
        axes = [np.arange(len(self.values[e])) for e in elements]
        return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(axes))


class Law(NamedTuple):
    """Of the process. log_rho: ``(elements,)``; noise: variance of it, in units of σ²."""

    log_rho: Floats
    noise: float


def fit_law(grid: Grid, v: np.ndarray, y: Floats, before: Law | None, rounds: int) -> Law:
    """The law of the highest likelihood of values y ``(n,)``, of mean 0, at places v ``(n, elements)``.

    before: where to start. rounds: of the search, at most.
    """
    n, count = v.shape
    apart = np.stack([grid.distance(e, v[:, e], v[:, e]) for e in range(count)])

    def loss(at: Floats) -> tuple[float, Floats]:
        rho, noise = 1.0 / (1.0 + np.exp(-at[:count])), np.exp(at[count])
        c = np.exp(np.tensordot(np.log(rho), apart, axes=1))
        factor = linalg.cho_factor(c + noise * np.eye(n), lower=True, check_finite=False)
        weights = linalg.cho_solve(factor, y, check_finite=False)
        variance = max(float(y @ weights) / n, 1e-300)
        inverse = linalg.cho_solve(factor, np.eye(n), check_finite=False)
        value = 0.5 * n * np.log(variance) + float(np.log(np.diag(factor[0])).sum())
        pull = inverse - np.outer(weights, weights) / variance
        slope = 0.5 * np.einsum("ij,eij->e", pull * c, apart, optimize=True) * (1.0 - rho)
        return value, np.append(slope, 0.5 * np.trace(pull) * noise)

    start = np.append(np.ones(count), _FIRST_NOISE)
    if before is not None:
        rho = np.clip(np.exp(before.log_rho), 1e-3, 1.0 - 1e-3)
        start = np.append(np.log(rho / (1.0 - rho)), np.log(before.noise))
    bounds = [(-_STEEP, _STEEP)] * count + [(_LEAST_NOISE, 0.0)]
    found = optimize.minimize(
        loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": rounds, "maxfun": 2 * rounds}
    ).x
    return Law(-np.logaddexp(0.0, -found[:count]), float(np.exp(found[count])))


class Kriged(NamedTuple):
    """What the process says. mean: ``(combinations,)``, the last element running fastest. left_out: ``(n,)`` what each
    of the cases that it was given would have been predicted as without it.
    """

    mean: Floats
    left_out: Floats


def krige(grid: Grid, law: Law, v: np.ndarray, y: Floats) -> Kriged:
    """The mean at all combinations, given values y ``(n,)`` at places v ``(n, elements)``."""
    every = range(v.shape[1])
    middle = float(np.mean(y))
    c = np.exp(grid.log_correlation(law.log_rho, v, v, every))
    c[np.diag_indices(len(c))] += law.noise
    lower = linalg.cholesky(c, lower=True, overwrite_a=True, check_finite=False)
    weights = linalg.cho_solve((lower, True), y - middle, check_finite=False)
    inverse = linalg.solve_triangular(lower, np.eye(len(y)), lower=True, check_finite=False)
    diagonal = np.einsum("ij,ij->j", inverse, inverse)
    one, two = (
        np.exp(grid.log_correlation(law.log_rho, grid.places(half), v[:, half], half)) for half in grid.halves()
    )
    return Kriged(((one * weights) @ two.T).ravel() + middle, y - weights / diagonal)
