r"""Catastrophes that lie far out in many directions at once, which lines along a few directions do not come near to.

Where every direction has its catastrophes, none of them is likely to first order, and together they may be most of P: a
limit on ‖z‖ beside one on z₁. For coordinates S (all, those of a site, those that one kind of catastrophe depends on),

.. math:: P\{C,\ \|z_S\| > \rho\} = E_{u, z_{-S}} \int_{r > \rho} 1\{(r u, z_{-S}) \in C\}\, \chi_{|S|}(r)\, dr,

u a uniform direction: directional sampling in S, plain sampling in the rest. ρ is how far the lines' own offsets reach;
what lies on lines with such offsets, or is explained by their models, is left to them, so that nothing counts twice. A
few rays ask at the radius that is exceeded as rarely as would matter. Where some meet the event, it is entered by
bisection, and random points beyond the entry say how much of what is there is a catastrophe (as on lines).

It fails where catastrophes fill a small part of the directions (these are for gradients to find), or shells that end.

Reference: Bjerager (1988), Probability integration by directional simulation.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, field

import numpy as np

from probest import diagnostics
from probest.budget import Meter, UndefinedError
from probest.evidence import Floats, Particles
from probest.lines.along import Chi, between
from probest.lines.modes import Model, Modes
from probest.lines.tuning import LineTuning

__all__ = ["Shells", "joined"]


@dataclass(frozen=True)
class _Rays:
    """Of each ray, the log of the mass of the event on it that is new ``(n,)``; and points there, each with the log of
    what it stands for.
    """

    log_mass: Floats
    z: Floats
    log_w: Floats
    severity: Floats
    overlap: float = 0.0  # of what was met, the share that lines have already


@dataclass
class Shells:
    """The parts of an event that lie beyond the lines, relative to what the lines say (``log_prob``).

    share: of all of them together; error: its standard error. unmeasured: whether there are some that the budget did
    not allow to measure, of which the share is a rough guess. unasked: whether it did not allow to ask in every block.
    """

    meter: Meter
    modes: Modes
    models: list[Model | None]
    rng: np.random.Generator
    tuning: LineTuning
    log_prob: float
    share: float = 0.0
    error: float = 0.0
    unmeasured: bool = False
    unasked: bool = False
    _taken: list[tuple[np.ndarray, float]] = field(default_factory=list)
    _found: list[_Rays] = field(default_factory=list)

    def look(self, blocks: list[np.ndarray], precision: float) -> None:
        """Ask in every block, and measure those that count until their error is ``precision`` (relative to P).

        blocks: the coordinates of each, in the order in which they are asked.
        """
        with contextlib.suppress(UndefinedError):  # so far out the model need not be defined
            while blocks:
                shares: list[float] = []
                for block in blocks:
                    if self.meter.left < self.tuning.rays:
                        self.unasked = True
                        return
                    shares.append(self._share(self._cast(block, self.tuning.rays)))
                most = int(np.argmax(shares))
                if shares[most] < self.tuning.tenuous:
                    return
                self._measure(blocks[most], shares[most], precision)
                blocks = blocks[:most] + blocks[most + 1 :]

    def particles(self) -> Particles | None:
        """Catastrophes of shells, with weights relative to the lines' P; None without any."""
        if not self._found:
            return None
        parts = [np.concatenate(part) for part in zip(*((r.z, r.log_w, r.severity) for r in self._found), strict=True)]
        return Particles(parts[0], parts[1] - self.log_prob, parts[2]) if len(parts[0]) else None

    @property
    def _price(self) -> int:
        """Calls of a ray that meets the event."""
        return 1 + self.tuning.ray_halvings + self.tuning.ray_points

    def _share(self, rays: _Rays) -> float:
        return float(np.mean(np.exp(rays.log_mass - self.log_prob)))

    def _measure(self, block: np.ndarray, share: float, precision: float) -> None:
        """Fresh rays, by turns, until their error is small enough or the budget does not allow more."""
        parts: list[_Rays] = []
        while self.meter.left >= 2 * self.tuning.rays * self._price:
            parts.append(self._cast(block, 2 * self.tuning.rays))
            mass = np.exp(np.concatenate([part.log_mass for part in parts]) - self.log_prob)
            error = float(np.std(mass)) / math.sqrt(len(mass))
            if error < precision * (1.0 + self.share + float(mass.mean())) and len(mass) >= self.tuning.least_rays:
                break
        if not parts:
            self.share, self.unmeasured = self.share + share, True
            return
        overlap = float(np.mean([part.overlap for part in parts]))
        mean = float(mass.mean())
        self.share += mean
        self.error = math.hypot(self.error, error, 0.5 * overlap * mean)
        self._taken.append((block, self._reach(block)))
        count = math.log(sum(len(part.log_mass) for part in parts))
        self._found += [_Rays(p.log_mass, p.z, p.log_w - count, p.severity) for p in parts]

    def _reach(self, block: np.ndarray) -> float:
        """How far out lines have been in these coordinates."""
        rounds = [r for mode in self.modes for r in mode.rounds]
        return max(float(np.linalg.norm(r.lines.offset[:, block], axis=1).max()) for r in rounds)

    def _outside(self, z: Floats, block: np.ndarray, reach: float) -> np.ndarray:
        """Which rows of z lie on no line that has an offset of ``reach`` or less in these coordinates, of any mode."""
        out = np.ones(len(z), dtype=np.bool_)
        for mode in self.modes:
            assert mode.direction is not None
            offset = z[:, block] - (z @ mode.direction)[:, None] * mode.direction[block]
            out &= np.linalg.norm(offset, axis=1) > reach
        return out

    def _cast(self, block: np.ndarray, n: int) -> _Rays:
        """``n`` rays in a block."""
        law, tuning = Chi(len(block)), self.tuning
        z = self.rng.standard_normal((n, self.meter.event.dim))
        z[:, block] /= np.linalg.norm(z[:, block], axis=1, keepdims=True)
        reach = self._reach(block)
        far = float(law.isf(np.array([self.log_prob + math.log(tuning.tenuous)]))[0])
        out = np.full(n, -np.inf)
        nothing = _Rays(out, z[:0], np.empty(0), np.empty(0))
        if not reach < far < math.inf:
            return nothing
        met = np.flatnonzero(self.meter.evaluate(_at(z, block, np.full(n, far))).severity >= 0.0)
        if not len(met):
            return nothing
        if self.meter.left < len(met) * (self._price - 1):
            self.unmeasured = True
            return nothing
        inside, outside, z = np.full(len(met), far), np.full(len(met), reach), z[met]
        for _ in range(tuning.ray_halvings):
            middle = 0.5 * (inside + outside)
            caught = self.meter.evaluate(_at(z, block, middle)).severity >= 0.0
            inside, outside = np.where(caught, middle, inside), np.where(caught, outside, middle)
        log_mass = law.log_sf(outside)
        owner = np.repeat(np.arange(len(met)), tuning.ray_points)
        r = between(law, outside[owner], np.full(len(owner), np.inf), self.rng.random(len(owner)))
        at = _at(z[owner], block, r)
        severity = self.meter.evaluate(at).severity
        caught = severity >= 0.0
        known = self.modes.explained(at, self.models) | ~self._outside(at, block, reach)
        for other, beyond in self._taken:
            known |= self._outside(at, other, beyond)
        new = caught & ~known
        share = np.bincount(owner[new], minlength=len(met)) / tuning.ray_points
        with np.errstate(divide="ignore"):
            out[met] = log_mass + np.log(share)
        overlap = float(np.mean(known[caught])) if caught.any() else 0.0
        return _Rays(out, at[new], (log_mass - math.log(tuning.ray_points))[owner[new]], severity[new], overlap)


def _at(z: Floats, block: np.ndarray, radius: Floats) -> Floats:
    out = z.copy()
    out[:, block] *= radius[:, None]
    return out


def joined(lines: Particles | None, shells: Particles | None) -> Particles | None:
    """Particles of both, where those of shells have weights relative to what the lines' sum up to."""
    if lines is None or shells is None:
        return lines
    log_w = np.concatenate([lines.log_weight, shells.log_weight])
    return Particles(
        np.concatenate([lines.z, shells.z]),
        log_w - diagnostics.log_sum_exp(log_w),
        np.concatenate([lines.severity, shells.severity]),
    )
