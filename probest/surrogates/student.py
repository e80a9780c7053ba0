r"""A student: a small network that is taught an event's severity, where the event nearly happens.

It sees :math:`u = U^\top z`, in the few directions U along which the gradients of the severity near its limit point
(active subspace): a network of two hundred inputs and a first layer of forty units has no more. The severity is taken
in units of its change over one standard deviation of z along its gradient, drawn together where it is far from the
limit, and cases count the more the nearer they are to the limit. Where functions of single coordinates say nearly all
of it (:mod:`probest.surrogates.sums`), the student is their sum, in all coordinates, and the network learns the rest.
How far the student is from the truth is measured on cases that it picked itself and had not been taught.

References: Constantine (2015), Active subspaces; Radhakrishnan et al. (2024), Mechanism for feature learning in neural
networks (inputs stretched by the mean outer product of gradients); Hinton, Vinyals & Dean (2015), Distilling the
knowledge in a neural network.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from scipy import special

from probest.evidence import Evaluation, Floats
from probest.surrogates.network import Lesson, Network, taught
from probest.surrogates.sums import Sums, fit_sums
from probest.surrogates.watched import Cases
from probest.tuning import tuned

__all__ = ["Distilled", "Sketch", "Student", "StudentTuning"]

_BY = "networks.py"
_TRIED = 64  # coordinates that show whether a severity is a sum over them
_FAR = 4.0  # times the reach: severities beyond say nothing more


@dataclass(frozen=True)
class StudentTuning:
    """How a student is taught. Set by hand, on the first dozen random networks of the benchmark."""

    width: int = tuned(64, "units of each of its two layers", _BY)
    first_steps: int = tuned(3000, "steps of its first lessons, and of those after which it has a new subspace", _BY)
    steps: int = tuned(1000, "steps of later lessons", _BY)
    batch: int = tuned(128, "cases of each step", _BY)
    rate: float = tuned(1e-2, "of Adam, in first lessons", _BY)
    later_rate: float = tuned(5e-3, "of Adam, in later ones", _BY)
    slopes: float = tuned(4.0, "what gradients count beside values", _BY)
    near: float = tuned(0.7, "severity, in deviations of z, at which a case counts half", _BY)
    reach: float = tuned(10.0, "severity, in deviations of z, beyond which it is drawn together", _BY)
    energy: float = tuned(0.9995, "of the mean square of gradients, that its subspace holds", _BY)
    stretch: float = tuned(0.25, "power of the gradients' mean square by which its directions are stretched", _BY)
    grown: float = tuned(1.5, "times as many gradients, for a new subspace", _BY)
    doubt: float = tuned(1.2, "times its usual error, as its stated one", _BY)
    outliers: float = tuned(3.0, "usual errors, beyond which how far it was off does not matter", _BY)
    sums: float = tuned(
        0.9, "of gradients that sums of functions of single coordinates have to explain, to be part of it", "modes.py"
    )
    kind: float = tuned(0.01, "of all cases, that a kind has to be the largest in, for an output of its own", _BY)
    kinds: int = tuned(16, "outputs for kinds, at most, and one for all others", _BY)
    others: float = tuned(0.2, "of what gradients count, that other directions which it has to see count", _BY)
    first_noise: float = tuned(0.4, "its error, in deviations of z, before any is known", _BY)
    least_noise: float = tuned(0.02, "its least stated error", _BY)


class Distilled(NamedTuple):
    """What a student knows: ŝ as a function of u ``(n, r)``, and the standard deviation of its error.

    basis ``(dim, r)`` has orthonormal columns; stretch ``(r,)`` multiplies u before the network sees it. sums: what it
    adds to what the network says, of each coordinate of u by itself; None for nothing.
    """

    network: Network
    basis: Floats
    stretch: Floats
    noise: float
    sums: Sums | None = None

    @property
    def differentiable(self) -> bool:
        return True

    def only(self, output: int) -> Distilled:
        """What it knows of one of its outputs by itself."""
        rows, net = slice(output, output + 1), self.network
        return self._replace(network=net._replace(a=net.a[rows], c=net.c[rows], w3=net.w3[rows]))

    def inside(self, z: Floats) -> Floats:
        """The coordinates that it sees, ``(n, r)``."""
        return np.asarray(z @ self.basis, dtype=np.float64)

    def whole(self, u: Floats, rng: np.random.Generator) -> Floats:
        """z with these coordinates, and fresh ones that it does not see."""
        z = rng.standard_normal((len(u), len(self.basis)))
        return np.asarray(z + (u - z @ self.basis) @ self.basis.T)

    def severity(self, u: Floats) -> Floats:
        value = self.network.value(u * self.stretch)
        return value if self.sums is None else value + self.sums.value(u)

    def severity_and_slope(self, u: Floats) -> tuple[Floats, Floats]:
        value, slope = self.network.value_and_slope(u * self.stretch)
        if self.sums is None:
            return value, slope * self.stretch
        more, steeper = self.sums.value_and_slope(u)
        return value + more, slope * self.stretch + steeper

    def log_chance(self, u: Floats) -> Floats:
        """log Φ(ŝ/σ̂): how likely a catastrophe is, as far as the student can tell."""
        return np.asarray(special.log_ndtr(self.severity(u) / self.noise), dtype=np.float64)


class Sketch(NamedTuple):
    """What a student knows as an event of u ``(n, r)``, its severities in the event's own units."""

    known: Distilled
    scale: float
    reach: float

    @property
    def dim(self) -> int:
        return int(self.known.basis.shape[1])

    @property
    def differentiable(self) -> bool:
        return True

    @property
    def boolean(self) -> bool:
        return False

    @property
    def weighted(self) -> bool:
        return False

    @property
    def noise(self) -> float:
        """The standard deviation of its error, near the limit."""
        return self.known.noise * self.scale

    def evaluate(self, u: Floats, *, gradient: bool = False) -> Evaluation:
        unit, weight = self.reach * self.scale, np.zeros(len(u))
        if not gradient:
            return Evaluation(unit * np.sinh(self._bent(self.known.severity(u))), weight)
        value, slope = self.known.severity_and_slope(u)
        bent = self._bent(value)
        return Evaluation(unit * np.sinh(bent), weight, slope * (self.scale * np.cosh(bent))[:, None])

    def _bent(self, value: Floats) -> Floats:
        return np.clip(value / self.reach, -50.0, 50.0)


@dataclass
class Student:
    """What it knows, and from how many gradients its subspace comes. scale: of severities, per deviation of z.

    proven: whether some of the particles that it picked last were catastrophes. kinds: those of catastrophe that have
    outputs of their own.
    """

    tuning: StudentTuning = field(default_factory=StudentTuning)
    known: Distilled | None = None
    scale: float = 1.0
    seen: int = 0
    proven: bool = False
    kinds: tuple[int, ...] = ()

    def teach(
        self,
        cases: Cases,
        rng: np.random.Generator,
        share: float = 1.0,
        kinds: tuple[int, ...] | None = None,
        slopes: Floats | None = None,
    ) -> Distilled | None:
        """The student after lessons on all cases; None where these hold no gradient to learn from.

        share: of the usual steps, for lessons of which there will be many. kinds: those that get outputs of their own,
        in its first lessons, in place of those that matter most so far. slopes: directions ``(m, dim)`` of length 1
        that it has to see besides those of gradients.
        """
        tuning = self.tuning
        sloped = np.flatnonzero(~np.isnan(cases.slope[:, 0]))
        first = self.known is None or len(sloped) >= tuning.grown * self.seen
        if first:
            self.scale = _scale(cases, sloped)
            if not self.scale > 0.0:
                return None
        value, slope = self.told(cases)
        weight = self._nearness(value)
        if first:
            noise = tuning.first_noise if self.known is None else self.known.noise
            self.seen = len(sloped)
            rows, counts = slope[sloped], weight[sloped]
            if slopes is not None:
                rows = np.concatenate([rows, slopes])
                counts = np.concatenate([counts, np.full(len(slopes), tuning.others * counts.sum() / len(slopes))])
            basis, stretch = _directions(rows, counts, tuning)
            self.kinds = _leading(cases, weight, tuning) if kinds is None else kinds
            sums = None if self.kinds else self._sums(cases, weight)
            if sums is not None:
                basis, stretch = np.eye(cases.z.shape[1]), np.ones(cases.z.shape[1])
            network = Network.drawn(len(stretch), tuning.width, rng, max(1, len(self.kinds) + 1))
        else:
            assert self.known is not None
            network, basis, stretch, noise, sums = self.known
        if sums is not None:  # what is left of it
            more, steeper = sums.value_and_slope(cases.z)
            value, slope = value - more, slope - steeper
        values = self._of_kinds(cases, value)
        counts = self._nearness(values) / weight[:, None]
        lesson = Lesson((cases.z @ basis) * stretch, values, (slope @ basis) / stretch, weight, np.minimum(counts, 1.0))
        network = taught(
            network,
            lesson,
            rng,
            steps=max(1, int(share * (tuning.first_steps if first else tuning.steps))),
            batch=tuning.batch,
            rate=tuning.rate if first else tuning.later_rate,
            slopes=tuning.slopes,
        )
        self.known = Distilled(network, basis, stretch, noise, sums)
        return self.known

    def sums_up(self, cases: Cases) -> bool:
        """Whether it would be taught a sum of functions of single coordinates, by all that is known."""
        if self.known is not None:
            return self.known.sums is not None
        sloped = np.flatnonzero(~np.isnan(cases.slope[:, 0]))
        self.scale = _scale(cases, sloped)
        if not self.scale > 0.0 or cases.kinds.shape[1]:
            return False
        return self._sums(cases, self._nearness(self._drawn_together(cases.severity))) is not None

    def _sums(self, cases: Cases, weight: Floats) -> Sums | None:
        """Functions of single coordinates, where these are nearly all that there is to the severity."""
        sloped = np.flatnonzero(~np.isnan(cases.slope[:, 0]))
        if len(sloped) < 2:
            return None
        z, slope, counts = cases.z[sloped], cases.slope[sloped] / self.scale, weight[sloped]
        if z.shape[1] > _TRIED:  # those that vary most tell soon
            most = np.argsort(-np.var(slope, axis=0), kind="stable")[:_TRIED]
            if fit_sums(z[:, most], slope[:, most], counts)[1] < self.tuning.sums:
                return None
        found, share = fit_sums(z, slope, counts)
        if share < self.tuning.sums:
            return None
        rest = cases.severity / self.scale - found.value(cases.z)
        return found._replace(constant=float(weight @ rest) / float(weight.sum()), reach=self.tuning.reach)

    @property
    def sketch(self) -> Sketch | None:
        """What it knows as an event of its own; None before any lesson."""
        return None if self.known is None else Sketch(self.known, self.scale, self.tuning.reach)

    def told(self, cases: Cases) -> tuple[Floats, Floats]:
        """Severities and gradients in the student's units."""
        unit = self.scale * self.tuning.reach
        slope = cases.slope / (self.scale * np.sqrt(1.0 + (cases.severity / unit) ** 2))[:, None]
        return self._drawn_together(cases.severity), slope

    def _of_kinds(self, cases: Cases, value: Floats) -> Floats:
        """What each output is taught, ``(n, K)``: kinds of their own, and the largest of the others."""
        if not self.kinds:
            return value[:, None]
        others = np.delete(cases.kinds, self.kinds, axis=1).max(axis=1, initial=-np.inf, keepdims=True)
        told = self._drawn_together(np.concatenate([cases.kinds[:, self.kinds], others], axis=1))
        return np.maximum(told, -_FAR * self.tuning.reach)

    def examined(self, u: Floats, severity: Floats) -> None:
        """Learn how wrong it is, from cases ``(n, r)`` that it has not been taught."""
        assert self.known is not None
        off = np.abs(self._drawn_together(severity) - self.known.severity(u))
        off = np.minimum(off, self.tuning.outliers * 1.4826 * max(float(np.median(off)), 1e-9))
        noise = self.tuning.doubt * float(np.sqrt(np.mean(off**2)))
        self.known = self.known._replace(noise=max(noise, self.tuning.least_noise))

    def _nearness(self, value: Floats) -> Floats:
        """What cases count, by how near to the limit they are."""
        return np.asarray(1.0 / (1.0 + (value / self.tuning.near) ** 2))

    def _drawn_together(self, severity: Floats) -> Floats:
        return np.asarray(self.tuning.reach * np.arcsinh(severity / (self.scale * self.tuning.reach)))


def _scale(cases: Cases, sloped: np.ndarray) -> float:
    """The usual length of gradients at those of the cases that are nearest to the limit; 0 where there is none."""
    if not len(sloped):
        return 0.0
    near = sloped[np.argsort(np.abs(cases.severity[sloped]), kind="stable")[: max(20, len(sloped) // 4)]]
    lengths = np.linalg.norm(cases.slope[near], axis=1)
    return float(np.median(lengths[lengths > 0.0])) if (lengths > 0.0).any() else 0.0


def _leading(cases: Cases, weight: Floats, tuning: StudentTuning) -> tuple[int, ...]:
    """The kinds that are largest in some of the cases that count; none where there are not two of them."""
    if cases.kinds.shape[1] < 2:
        return ()
    share = np.bincount(cases.kinds.argmax(axis=1), weights=weight, minlength=cases.kinds.shape[1]) / weight.sum()
    found = [int(k) for k in np.argsort(-share)[: tuning.kinds] if share[k] >= tuning.kind]
    return tuple(found) if len(found) > 1 else ()


def _directions(slope: Floats, weight: Floats, tuning: StudentTuning) -> tuple[Floats, Floats]:
    """The subspace ``(dim, r)`` that holds nearly all of the gradients, and what stretches its directions ``(r,)``."""
    rows = slope * np.sqrt(weight / weight.sum())[:, None]
    square, basis = np.linalg.eigh(rows.T @ rows)
    square, basis = np.maximum(square[::-1], 0.0), basis[:, ::-1]
    share = np.cumsum(square) / max(float(square.sum()), 1e-300)
    rank = min(len(square), int(np.searchsorted(share, tuning.energy)) + 1)
    stretch = np.maximum(square[:rank], 1e-12 * square[0]) ** tuning.stretch
    return np.ascontiguousarray(basis[:, :rank]), stretch / np.sqrt(np.mean(stretch**2))
