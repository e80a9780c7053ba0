"""Where lines meet the event: by few calls where a line is simple, on a grid where it is not.

A line is expected to enter the event once. Newton's method (with the slope of the mode) and then secants find where;
one random point beyond, drawn from the law of catastrophes there, has to be a catastrophe. If it is not, if the
severity rose and fell without a root, or on request, the line is looked at on a grid and all its roots are refined.
All lines advance together, so that each step is one batch.

It fails where an island is thinner than the grid, and the short way missed it too.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from probest.budget import GRADIENT_CALLS, Meter
from probest.evidence import Floats
from probest.lines.along import Position, between, log_mass
from probest.lines.tuning import LineTuning

__all__ = ["Crossings", "Intervals", "Pencil", "between_roots", "find_crossings", "summed"]


class Pencil(NamedTuple):
    """Lines ``offset + r · direction``, r with law ``law``. offset, direction: ``(n, dim)``."""

    offset: Floats
    direction: Floats
    law: Position

    def at(self, line: np.ndarray, r: Floats) -> Floats:
        return np.asarray(self.offset[line] + r[:, None] * self.direction[line], dtype=np.float64)

    def take(self, lines: np.ndarray) -> Pencil:
        return Pencil(self.offset[lines], self.direction[lines], self.law)


class Intervals(NamedTuple):
    """Parts of lines that lie in the event, sorted along each line: ``low < r < high`` on line ``owner``."""

    owner: np.ndarray
    low: Floats
    high: Floats

    def of(self, lines: np.ndarray) -> Intervals:
        """Those on the lines where ``lines`` (a mask) is true."""
        return Intervals(*(value[lines[self.owner]] for value in self))

    def join(self, other: Intervals, shift: int = 0) -> Intervals:
        moved = other._replace(owner=other.owner + shift)
        return Intervals(*(np.concatenate(pair) for pair in zip(self, moved, strict=True)))


def between_roots(inside: np.ndarray, line: np.ndarray, root: Floats, start: Floats) -> Intervals:
    """The event on lines that begin at ``start`` ``(n,)``, ``inside`` it or not, and cross its boundary at each root.

    line, root: ``(m,)``. What is still inside after a line's last root stays so.
    """
    whole = np.flatnonzero(inside)
    count = np.bincount(line, minlength=len(inside)) + inside
    open_ = np.flatnonzero(count % 2)
    owner = np.concatenate([whole, line, open_])
    ends = np.concatenate([start[whole], root, np.full(len(open_), np.inf)])
    order = np.lexsort((ends, owner))
    owner, ends = owner[order], ends[order]
    return Intervals(owner[::2], ends[::2], ends[1::2])


def summed(log_mass: Floats, owner: np.ndarray, n: int) -> Floats:
    """log of the sum over each owner's intervals, ``(n,)``."""
    total = np.full(n, -np.inf)
    np.logaddexp.at(total, owner, log_mass)
    return total


class Crossings(NamedTuple):
    """What was found on ``n`` lines.

    intervals: of the event. on, at, severity: one catastrophe on each line that has any, drawn from its intervals: its
    line, z and severity. root: ``(n,)`` where each line first enters the event, nan where it does not.
    gradient: ``(n, dim)`` of the severity at the root, nan where not asked for. slip: ``(n,)`` nats that are uncertain
    since the root is. rough: ``(n,)`` whether the short way does not do for the line: it leaves the event again, or
    enters it elsewhere first. complete: False if the calls did not suffice to look at all lines that needed it.
    """

    intervals: Intervals
    on: np.ndarray
    at: Floats
    severity: Floats
    root: Floats
    gradient: Floats
    slip: Floats
    rough: np.ndarray
    complete: bool


class _Entries(NamedTuple):
    root: Floats
    slip: Floats
    doubtful: np.ndarray


def find_crossings(
    meter: Meter,
    lines: Pencil,
    rng: np.random.Generator,
    *,
    guess: Floats,
    slope: float,
    rate: float,
    near: float,
    far: float,
    gradient: bool,
    scan: np.ndarray,
    tuning: LineTuning,
) -> Crossings:
    """Find the event on each line.

    guess: ``(n,)`` where each line may enter. slope: rise of the severity along lines there. rate: nats that the mass
    beyond loses per unit of r. near: where the mode begins; far: beyond this nothing counts. gradient: evaluate
    gradients at the roots. scan: ``(n,)`` lines that get a grid in any case.
    """
    n = len(lines.offset)
    found = _enter(meter, lines, guess, slope, far, tuning)
    root = found.root
    rooted = np.flatnonzero(np.isfinite(root))
    intervals = Intervals(rooted, root[rooted], np.full(len(rooted), np.inf))
    on, at, severity = _draw(meter, lines, intervals, rng)
    rough = np.zeros(n, dtype=np.bool_)
    gap = np.sum((at - lines.offset[on]) * lines.direction[on], axis=1) - root[on]
    rough[on[(severity < 0.0) & (gap > 3.0 * tuning.tolerance / rate)]] = True  # nearer, the root is not that exact
    doubt = scan | found.doubtful | rough
    complete = True
    if doubt.any():
        rows = np.flatnonzero(doubt)
        inside = np.where(np.isfinite(root), root + 0.3 / rate, guess)
        looked = _scan(meter, lines.take(rows), np.column_stack([guess, inside])[rows], near, far, tuning)
        complete = looked is not None
        seen = looked or Intervals(np.empty(0, dtype=np.intp), np.empty(0), np.empty(0))
        seen = seen._replace(owner=rows[seen.owner])
        intervals = intervals.of(~doubt).join(seen)
        order = np.lexsort((intervals.low, intervals.owner))
        intervals = Intervals(*(value[order] for value in intervals))
        rough[seen.owner[np.isfinite(seen.high) & (seen.high > 0.0)]] = True
        root = np.full(n, np.nan)
        root[intervals.owner[::-1]] = intervals.low[::-1]
        rough |= doubt & (root < found.root - 2.0 * tuning.tolerance / rate) & (root > lines.law.low)
        kept = ~doubt[on]
        anew = _draw(meter, lines, seen, rng)
        on, at, severity = (np.concatenate([a[kept], b]) for a, b in zip((on, at, severity), anew, strict=True))
    hit = severity >= 0.0
    slopes = _gradients(meter, lines, root) if gradient else np.full(lines.offset.shape, np.nan)
    return Crossings(intervals, on[hit], at[hit], severity[hit], root, slopes, found.slip, rough, complete)


def _gradients(meter: Meter, lines: Pencil, root: Floats) -> Floats:
    """Gradients of the severity where lines enter the event; nan where they do not, or the calls do not suffice."""
    rows = np.flatnonzero(np.isfinite(root))[: meter.left // GRADIENT_CALLS]
    out = np.full(lines.offset.shape, np.nan)
    if len(rows):
        gradient = meter.evaluate(lines.at(rows, root[rows]), gradient=True).severity_grad
        assert gradient is not None
        out[rows] = gradient
    return out


def _enter(meter: Meter, lines: Pencil, guess: Floats, slope: float, far: float, tuning: LineTuning) -> _Entries:
    """One root a line, where there is one that Newton's method and secants reach."""
    n = len(lines.offset)
    law = lines.law
    start = max(law.low, -far)
    r = np.clip(guess, start, far)
    severity = meter.evaluate(lines.at(np.arange(n), r)).severity
    rise = np.full(n, slope)
    below, above = np.full(n, -np.inf), np.full(n, np.inf)
    root, slip = np.full(n, np.nan), np.zeros(n)
    fell = np.zeros(n, dtype=np.bool_)
    active = np.ones(n, dtype=np.bool_)
    for step in range(tuning.root_steps):
        below = np.where(active & (severity < 0.0), np.maximum(below, r), below)
        above = np.where(active & (severity >= 0.0), np.minimum(above, r), above)
        with np.errstate(all="ignore"):
            ahead = r - severity / rise
        bracketed = np.isfinite(below) & np.isfinite(above)
        outside = ~((ahead > below) & (ahead < above))
        ahead = np.where(bracketed & outside, 0.5 * (below + above), ahead)
        ahead = np.where(np.isnan(ahead), r, ahead)
        ahead = np.clip(np.clip(ahead, r - tuning.longest, r + tuning.longest), start, far)
        change = _apart(law, ahead, r)
        reached = active & (change <= tuning.tolerance) & ~((r >= far) & (severity < 0.0))
        root[reached], slip[reached] = ahead[reached], 0.25 * change[reached]
        everything = active & (r <= start) & (severity >= 0.0)  # no entry: the line is inside from its beginning
        absent = active & (r >= far) & (severity < 0.0)
        active &= ~reached & ~absent & ~everything
        fell |= everything
        rows = np.flatnonzero(active)
        if not len(rows) or step == tuning.root_steps - 1 or meter.left < len(rows):
            break
        now = severity.copy()
        now[rows] = meter.evaluate(lines.at(rows, ahead[rows])).severity
        with np.errstate(all="ignore"):
            secant = (now - severity) / (ahead - r)
        good = active & np.isfinite(secant) & (secant > 0.0)
        fell |= active & (secant <= 0.0)
        rise = np.where(good, secant, rise)
        r, severity = np.where(active, ahead, r), np.where(active, now, severity)
    return _Entries(root, slip, active | (fell & ~np.isfinite(root)))


def _apart(law: Position, a: Floats, b: Floats) -> Floats:
    """Nats by which the mass above or below changes between a and b, whichever is more."""
    with np.errstate(invalid="ignore"):
        change = np.maximum(np.abs(law.log_sf(a) - law.log_sf(b)), np.abs(law.log_cdf(a) - law.log_cdf(b)))
    return np.asarray(np.nan_to_num(change, nan=0.0, posinf=np.inf), dtype=np.float64)


def _scan(meter: Meter, lines: Pencil, known: Floats, near: float, far: float, tuning: LineTuning) -> Intervals | None:
    """All intervals of each line that a grid and known points ``(n, m)`` reveal, their ends refined.

    None if the calls that are left do not suffice.
    """
    n = len(lines.offset)
    start = max(lines.law.low, -far)
    close = max(near - tuning.grid_before, start)  # beyond is the mode; before it only what other modes left over
    common = np.concatenate(
        [
            np.linspace(start, close, max(2, math.ceil((close - start) / tuning.coarse)))[:-1],
            np.linspace(close, far, math.ceil((far - close) / tuning.fine) + 1),
        ]
    )
    grid = np.sort(np.column_stack([np.tile(common, (n, 1)), np.clip(known, start, far)]), axis=1)
    points = grid.shape[1]
    if meter.left < n * (points + tuning.refinements + 1):
        return None
    severity = meter.evaluate(lines.at(np.repeat(np.arange(n), points), grid.ravel())).severity.reshape(n, points)
    inside = severity >= 0.0
    line, cell = np.nonzero(inside[:, 1:] != inside[:, :-1])
    left, right = (line, cell), (line, cell + 1)
    ends = _refine(meter, lines, line, grid[left], grid[right], severity[left], severity[right], tuning)
    return between_roots(inside[:, 0], line, ends, np.full(n, lines.law.low))


def _refine(
    meter: Meter,
    lines: Pencil,
    line: np.ndarray,
    a: Floats,
    b: Floats,
    at_a: Floats,
    at_b: Floats,
    tuning: LineTuning,
) -> Floats:
    """Roots between a and b, where the severity changes sign: bracketed until the ends are within the tolerance.

    Secants, each aimed a little beyond the root so that the other end of the bracket comes in too; bisection where
    that does not shrink it. A jump of the severity is bracketed like a root.
    """
    a, b, at_a, at_b = a.copy(), b.copy(), at_a.copy(), at_b.copy()
    law, side = lines.law, np.zeros(len(a))
    for step in range(tuning.refinements):
        with np.errstate(all="ignore"):
            root = a - at_a * (b - a) / (at_b - at_a)
        root = np.where(np.isfinite(root) & (root > a) & (root < b), root, 0.5 * (a + b))
        rows = np.flatnonzero(_apart(law, a, b) > tuning.tolerance)
        if not len(rows) or meter.left < len(rows):
            break
        pace = np.maximum(_apart(law, root, root + 1e-4), 1e-5) / 1e-4
        ahead = np.clip(root + 0.5 * side * tuning.tolerance / pace, a + 0.01 * (b - a), b - 0.01 * (b - a))
        ahead = np.where(step % 3 == 2, 0.5 * (a + b), ahead)[rows]
        value = meter.evaluate(lines.at(line[rows], ahead)).severity
        left = (value >= 0.0) == (at_a[rows] >= 0.0)  # the root lies to the right of this point
        moved_a, moved_b = rows[left], rows[~left]
        a[moved_a], at_a[moved_a], side[moved_a] = ahead[left], value[left], 1.0
        b[moved_b], at_b[moved_b], side[moved_b] = ahead[~left], value[~left], -1.0
    with np.errstate(all="ignore"):
        share = np.abs(at_a) / (np.abs(at_a) + np.abs(at_b))
    smooth = (share > 0.02) & (share < 0.98)  # else the severity jumps, and no point of the bracket is better
    return np.asarray(a + np.where(smooth, share, 0.5) * (b - a))


def _draw(
    meter: Meter, lines: Pencil, intervals: Intervals, rng: np.random.Generator
) -> tuple[np.ndarray, Floats, Floats]:
    """One point on each line that has intervals, from the law of r given that it lies in them; and its severity."""
    owner, low, high = intervals
    keys = log_mass(lines.law, low, high) + rng.gumbel(
        size=len(owner)
    )  # the largest is drawn in proportion to its mass
    order = np.lexsort((keys, owner))
    last = order[np.append(owner[order][1:] != owner[order][:-1], True)] if len(order) else order
    last = last[np.isfinite(keys[last])][: max(meter.left, 0)]
    r = between(lines.law, low[last], high[last], rng.random(len(last)))
    at = lines.at(owner[last], r)
    severity = meter.evaluate(at).severity if len(at) else np.empty(0)
    return owner[last], at, severity
