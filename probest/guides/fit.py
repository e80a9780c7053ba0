"""From weighted particles to a guide: candidates are fitted to one half, judged on the other, the best refitted.

The judge is the mean of log q − log φ over held-out particles (cross-entropy to the target); the winner always
gets widened copies of itself and the prior as defensive parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from probest import diagnostics
from probest.diagnostics import Ints
from probest.evidence import Floats
from probest.guides.base import Guide, Law
from probest.guides.cylinder import fit_cylinder
from probest.guides.directional import fit_directional
from probest.guides.flow import FLOWS, fit_flow
from probest.guides.mixture import fit_mixture
from probest.guides.program import BoundProgram
from probest.guides.radial import fit_radial
from probest.guides.subspace import informed_basis, with_mean

__all__ = ["CHEAP", "DISTILLED", "KINDS", "VARIATIONAL", "Fitted", "fit_guide", "ranked_guides", "refit_guide"]

CHEAP = ("mixture", "radial", "directional", "cylinder")
VARIATIONAL = "variational"  # climbs its bound on the event itself (probest.estimators.importance)
DISTILLED = "distilled"  # what a network knows that was taught the severity (probest.estimators.distilling)
KINDS = (*CHEAP, *FLOWS, VARIATIONAL, DISTILLED)

_ALIKE = 5  # coordinates, from which on a few directions may matter and the others be alike
_JUDGED = 400  # particles of each half that candidates are compared on


@dataclass(frozen=True)
class Fitted:
    """A guide ready for use, and what it was made of. basis is None where the guide has no subspace.

    error: of the logarithm of its density, where that is an estimate itself.
    """

    guide: Guide | BoundProgram
    kind: str
    basis: Floats | None
    components: int
    error: float = 0.0


class _Candidate(NamedTuple):
    """A kind of law, in the subspace of eigenvalues above ``threshold`` (0: all of it; None: it has none).

    mean: whether the subspace has to hold the mean too.
    """

    kind: str
    threshold: float | None
    mean: bool = False


def _candidates(kinds: Sequence[str], n: int, dim: int) -> list[_Candidate]:
    found: list[_Candidate] = []
    for kind in kinds:
        if kind == "mixture":
            found.append(_Candidate(kind, 1.0))
            if dim >= 3:
                found += [_Candidate(kind, 0.15), _Candidate(kind, 0.15, mean=True)]
            if 2 < dim <= 12 and n > 12 * dim:
                found.append(_Candidate(kind, 0.0))
        elif kind == "cylinder":
            if dim >= _ALIKE:
                found += [_Candidate(kind, 1.0), _Candidate(kind, 0.15), _Candidate(kind, 1.0, mean=True)]
        elif kind in FLOWS or dim >= 3:
            found.append(_Candidate(kind, None if kind == "radial" else 0.15))
    return found or [_Candidate("mixture", 1.0)]


def fit_guide(
    z: Floats,
    log_w: Floats,
    rng: np.random.Generator,
    *,
    rows: Floats | None = None,
    effective: float | None = None,
    kinds: Sequence[str] = CHEAP,
) -> Fitted:
    """The candidate (laws of ``kinds``, in subspaces of several sizes) that predicts held-out particles best.

    z ``(n, dim)``, log_w ``(n,)``; rows: see :func:`probest.guides.subspace.informed_basis`. effective: how many
    independent points the particles are worth, where less than their effective sample size.
    """
    return next(ranked_guides(z, log_w, rng, rows=rows, effective=effective, kinds=kinds))


def ranked_guides(
    z: Floats,
    log_w: Floats,
    rng: np.random.Generator,
    *,
    rows: Floats | None = None,
    effective: float | None = None,
    kinds: Sequence[str] = CHEAP,
) -> Iterator[Fitted]:
    """The candidates of :func:`fit_guide`, the best first; of a kind and a size of subspace one. Each is fitted when it
    is asked for.
    """
    alive = np.isfinite(log_w)
    candidates = _candidates(kinds, *z.shape)
    scores = _scores(candidates, z, log_w, rng, rows, effective) if len(candidates) > 1 else np.zeros(1)
    told: set[tuple[str, int]] = set()
    for i in np.argsort(-scores, kind="stable"):
        kind = candidates[i].kind
        basis = _basis(candidates[i], z[alive], log_w[alive], rows, effective)
        key = kind, _rank(basis)
        if key not in told:
            told.add(key)
            yield _fitted(kind, _fit(kind, z[alive], log_w[alive], basis, rng, effective), basis)


def _scores(
    candidates: Sequence[_Candidate],
    z: Floats,
    log_w: Floats,
    rng: np.random.Generator,
    rows: Floats | None,
    effective: float | None,
) -> Floats:
    """How well each predicts one half of the particles when fitted to the other."""
    n = len(z)
    alive = np.isfinite(log_w)
    half = np.arange(n) < n // 2
    scores = np.zeros(len(candidates))
    for first in (True, False):
        # the subspace is part of the fit: found from the training half alone, or it would recognise the other
        whole = np.flatnonzero((half if first else ~half) & alive)
        train, test = _thin(whole), _thin(np.flatnonzero((half if not first else ~half) & alive))
        if len(train) < 8 or len(test) < 1:
            continue
        middle = 0 if rows is None else len(rows) // 2
        part_rows = None if rows is None else rows[:middle] if first else rows[middle:]
        if part_rows is not None:
            part_rows = part_rows * np.sqrt(2.0)
        enough = None if effective is None else 0.5 * effective * len(train) / len(whole)
        w = np.exp(log_w[test] - diagnostics.log_sum_exp(log_w[test]))
        known: dict[tuple[str, int], float] = {}
        for i, candidate in enumerate(candidates):
            basis = _basis(candidate, z[train], log_w[train], part_rows, enough)
            key = candidate.kind, _rank(basis)
            if key not in known:
                law = _fit(candidate.kind, z[train], log_w[train], basis, rng, enough, starts=1)
                known[key] = float(w @ law.defended().log_ratio(z[test]))
            scores[i] -= known[key]
    return scores


def _rank(basis: Floats | None) -> int:
    return -1 if basis is None else basis.shape[1]


def refit_guide(fitted: Fitted, z: Floats, log_w: Floats, rng: np.random.Generator, *, moments: bool = False) -> Fitted:
    """The same kind of guide, in the same subspace, fitted to another sample (cross-entropy step).

    moments: find the subspace anew from the sample's moments (where there never were gradients).
    """
    basis = fitted.basis
    if moments and basis is not None and z.shape[1] > 2:
        basis = informed_basis(z, log_w)
    return _fitted(fitted.kind, _fit(fitted.kind, z, log_w, basis, rng, None), basis)


def _thin(rows: Ints) -> Ints:
    """As many as ``_JUDGED`` of the rows, evenly spaced: relatives lie next to each other."""
    if len(rows) <= _JUDGED:
        return rows
    return rows[np.arange(_JUDGED) * len(rows) // _JUDGED]


def _basis(
    candidate: _Candidate, z: Floats, log_w: Floats, rows: Floats | None, effective: float | None
) -> Floats | None:
    if candidate.threshold is None:
        return None
    if candidate.threshold == 0.0:
        return np.eye(z.shape[1])
    basis = informed_basis(z, log_w, rows, threshold=candidate.threshold)
    return with_mean(basis, z, log_w, effective) if candidate.mean else basis


def _fit(
    kind: str,
    z: Floats,
    log_w: Floats,
    basis: Floats | None,
    rng: np.random.Generator,
    effective: float | None,
    *,
    starts: int = 2,
) -> Law:
    if basis is None:
        return fit_radial(z, log_w)
    if kind in FLOWS:
        return fit_flow(kind, z, log_w, basis, rng, effective=effective)
    if kind == "cylinder" and z.shape[1] - basis.shape[1] > 1:
        return fit_cylinder(z, log_w, basis, rng, effective=effective, starts=starts)
    if kind == "directional":
        return fit_directional(z, log_w, basis, rng, effective=effective)
    return fit_mixture(z, log_w, basis, rng, effective=effective, starts=starts)


def _fitted(kind: str, law: Law, basis: Floats | None) -> Fitted:
    return Fitted(law.defended(), kind, basis, law.components)
