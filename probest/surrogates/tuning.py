"""The constants of learned severities."""

from __future__ import annotations

from dataclasses import dataclass

from probest.tuning import tuned

__all__ = ["SurrogateTuning"]

_EXACT = "reliability.py --exact --problems bool,nograd"


@dataclass(frozen=True)
class SurrogateTuning:
    """How a severity is learned. Set by hand; ``benchmarks/tuning.py --of surrogate`` tries each."""

    # looking
    scales: tuple[float, ...] = tuned(
        (1.0, 1.5, 2.0, 3.0, 4.0, 6.0), "standard deviations at which catastrophes are looked for", _EXACT
    )
    known: int = tuned(30, "catastrophes that end the search", _EXACT)
    # features
    products: int = tuned(24, "dimensions up to which all products of coordinates are features", _EXACT)
    radial: int = tuned(6, "directions up to which there are radial functions", _EXACT)
    centres: int = tuned(120, "radial functions", _EXACT)
    widths: tuple[float, ...] = tuned((1.5, 0.7), "their widths, for one direction", _EXACT)
    penalties: tuple[float, ...] = tuned(
        (1.0, 1e-2, 1e-4), "of the regressions, which held-out cases choose from", _EXACT
    )
    simpler: float = tuned(0.9, "of the loss of simpler features, that richer ones have to stay below", _EXACT)
    far: float = tuned(
        100.0, "times the scale of severities near the limit, beyond which how far does not matter", _EXACT
    )
    # learning and weighing
    good: float = tuned(0.5, "effective share of the particles at which it has learned enough", _EXACT)
    first_particles: int = tuned(512, "of the temperings while it learns, which cost no model calls", _EXACT)
    free: int = tuned(400, "evaluations of the surrogate a particle: they cost no model calls either", _EXACT)
    judged: int = tuned(600, "particles of the last tempering that are judged, at most", _EXACT)
    give_up: float = tuned(0.25, "standard error that a guide has to promise to be worth its samples", _EXACT)
