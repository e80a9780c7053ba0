"""The population that tempering walks: what is known of it, how it is weighed by a new target, and resampled."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from probest import diagnostics
from probest.evidence import Floats, Level
from probest.smc.softening import ADVERSARY, EVENT, Softening
from probest.smc.tuning import TemperingTuning

__all__ = ["State", "interleave", "is_flat", "log_target", "minus", "resampled", "reweight", "slow", "total"]


@dataclass
class State:
    """The population: equal weights, ``family`` the island each particle's first ancestor was drawn in.

    ``log_z`` ``(k,)`` is what each family alone says of the running log-evidence: their mean is the estimate. Particles
    are in the order of their ancestors, so that relatives lie next to each other.

    z ``(n, dim)`` and gradients ``(n, dim)`` or None (not known now), in float32 where they are large; rows: gradient
    information for a subspace; ``soft``: the softening of the target, ``drift`` the one that gradient moves follow;
    ``power`` of the log-weight; size: worth of the run when it is pooled with others, known before it started;
    places: where scouts say that modes may be, ``(k, dim)`` or None;
    rest: levels until guided moves are tried again; cost: model calls a particle that a level takes;
    conditioned: running log-evidence when the observed sites were all in; path: the levels so far.
    """

    z: Floats
    severity: Floats
    log_weight: Floats
    severity_grad: Floats | None
    weight_grad: Floats | None
    log_z: Floats
    power: float = 0.0
    soft: Softening = ADVERSARY
    drift: Softening = ADVERSARY
    angle: float = 1.0
    side_angle: float = 1.2
    walk_angle: float = 1.0
    sketch_angle: float = 0.5
    portion: float = 0.5
    refresh_angle: float = 0.5 * math.pi
    rows: Floats | None = None
    rest: int = 0
    family: NDArray[np.intp] | None = None
    places: Floats | None = None
    size: float = 0.0
    cost: float = 1.5
    first_hits: int = 0
    levels: int = 0
    moves: int = 0
    acceptance: float = 1.0
    correlation: float = 0.0
    conditioned: float = 0.0
    path: list[Level] = field(default_factory=list, repr=False)
    tuning: TemperingTuning = field(default_factory=TemperingTuning, repr=False)

    @property
    def started(self) -> bool:
        """Whether the target is a softened event already; before, the adversary is conditioned."""
        return self.soft is not ADVERSARY

    def record(self) -> None:
        """Note down where the population is now."""
        done = total(self) - self.conditioned
        self.path.append(
            Level.of(self.severity, done, self.acceptance, conditioning=not self.started and self.power > 0)
        )


def log_target(state: State, severity: Floats, log_weight: Floats) -> Floats:
    """The state's log-target without φ at these severities and log-weights."""
    softened = state.soft.log(severity)
    return softened + state.power * log_weight if state.power > 0.0 else softened


def total(state: State) -> float:
    """Running log-evidence over all families."""
    return diagnostics.log_sum_exp(state.log_z) - math.log(len(state.log_z))


def slow(state: State) -> Floats:
    """What moves have to decorrelate: the severity, or the log-weight while conditioning."""
    return state.severity if state.started else state.log_weight


def is_flat(severity: Floats, least: int) -> bool:
    """Whether fewer than ``least`` draws rise above the lowest severity: too few to climb from."""
    low = max(float(severity.min()), -1e300)
    return bool(np.count_nonzero(severity > low + 1e-12 * (1.0 + abs(low))) < least)


def interleave(old: Floats, new: Floats, k: int) -> Floats:
    """Append ``new`` to ``old`` island by island."""
    shape = old.shape[1:]
    joined = np.concatenate([old.reshape(k, -1, *shape), new.reshape(k, -1, *shape)], axis=1)
    return joined.reshape(-1, *shape)


def minus(a: Floats, b: Floats) -> Floats:
    """a − b with −inf where a is −inf (b is finite wherever a particle survived)."""
    out = np.full_like(a, -np.inf)
    np.subtract(a, b, out=out, where=a > -np.inf)
    return out


def reweight(state: State, islands: int, rng: np.random.Generator, keep: int, power: float, soft: Softening) -> bool:
    """Weigh by the new target, resample, and count each family's share of the evidence. False when all died."""
    old = log_target(state, state.severity, state.log_weight)
    state.power, state.soft = power, soft
    increment = minus(log_target(state, state.severity, state.log_weight), old)
    gain = diagnostics.log_mean_exp(increment)[0]
    if not math.isfinite(gain):
        return False
    if soft is not EVENT:
        state.drift = soft
    k, n = islands, len(increment)
    family = np.repeat(np.arange(k), n // k) if state.family is None else state.family
    overall = total(state) + gain
    index = diagnostics.systematic_resample(increment, keep, rng)
    for name in ("z", "severity_grad", "weight_grad"):
        value = getattr(state, name)
        if value is not None:
            setattr(state, name, resampled(value, index))
    state.severity = state.severity[index]
    state.log_weight = state.log_weight[index]
    state.family = family[index]
    with np.errstate(divide="ignore"):
        state.log_z = overall + np.log(np.bincount(state.family, minlength=k) * (k / keep))
    state.levels += 1
    return True


def resampled(value: Floats, index: NDArray[np.intp]) -> Floats:
    """``value[index]`` for a nondecreasing ``index`` no longer than ``value``, in place and in blocks.

    Rows that come from further up move first to last, rows from further down last to first: then none is overwritten
    before it is read.
    """
    keep = len(index)
    blocks = np.array_split(np.arange(keep), math.ceil(keep * value.shape[1] / 1_000_000))
    for rows in blocks:
        down = rows[index[rows] > rows]
        value[down] = value[index[down]]
    for rows in reversed(blocks):
        up = rows[index[rows] < rows]
        value[up] = value[index[up]]
    return value if keep == len(value) else value[:keep].copy()
