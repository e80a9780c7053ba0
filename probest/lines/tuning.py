"""The constants of line sampling."""

from __future__ import annotations

from dataclasses import dataclass

from probest.tuning import tuned

__all__ = ["LineTuning"]

_SMOOTH = "reliability.py (27 problems and their variants, seeds 0 to 40)"
_MODES = "modes.py --families unions"
_BY_KINDS = "unions.py and networks.py"
_VARIANTS = "reliability.py --variants"


@dataclass(frozen=True)
class LineTuning:
    """What line sampling goes by, from the search for design points to the verdict.

    Set by hand on the problems of benchmarks/reliability.py and their variants, where they were looked at together and
    not one by one; ``benchmarks/tuning.py --of lines`` says what each is worth by itself.
    """

    # the search for design points
    wide: float = tuned(2.0, "scale of every other start", _VARIANTS)
    walk_steps: int = tuned(14, "gradient steps of a walk, at most", _SMOOTH)
    first_starts: int = tuned(2, "starts of the first batch: the others may meet what these find", _SMOOTH)
    sufficient: float = tuned(0.3, "share of the hoped-for fall of the merit that a step must bring", _SMOOTH)
    planes: int = tuned(8, "linearisations that a walk keeps before it shortens its step", _SMOOTH)
    near_planes: float = tuned(2.0, "linearisations further away are forgotten when a step succeeds", _SMOOTH)
    arrival: float = tuned(0.1, "a target this near counts as reached: lines need it only roughly", _SMOOTH)
    far_arrival: float = tuned(3.0, "times that, at most, far out: steps in exp(z) are 1 wherever they are", _VARIANTS)
    same_mode: float = tuned(0.35, "design points nearer (relative to their norm, plus as much) are one", _SMOOTH)
    counts: float = tuned(0.02, "as likely as this share of the likeliest, a mode counts in counting starts", _SMOOTH)
    negligible: float = tuned(1e-3, "share of the first-order estimate below which modes are left out", _SMOOTH)
    # a walk to each kind of catastrophe, where the severity is the largest of several
    kinds: int = tuned(120, "kinds, at most, that are asked for their gradients", _BY_KINDS)
    kind_walks: int = tuned(48, "of them, the likeliest to first order, that are walked to", _BY_KINDS)
    kind_batch: int = tuned(12, "at a time; where none of them arrives, the others are left", _BY_KINDS)
    kind_start: float = tuned(0.1, "scale of their starts: a kind may be even, and flat at the origin", _BY_KINDS)
    same_kind: float = tuned(
        0.3, "times the distance at which two modes are one, where they are of two kinds", _BY_KINDS
    )
    kind_share: float = tuned(0.5, "of the calls of the search, at most", _BY_KINDS)
    # looking around, for modes that flatter branches hide
    around: int = tuned(16, "points far out that are asked for modes, each time", _VARIANTS)
    looks: int = tuned(5, "times, at most", _VARIANTS)
    far_out: float = tuned(7.0, "their coordinates, at most: maps of sites are exact to 8", _VARIANTS)
    explored: int = tuned(1000, "plain draws, of which the most severe are starts", "modes.py --families bumps")
    explored_share: float = tuned(0.05, "of the budget, at most, for these", "modes.py --families bumps")
    severest: int = tuned(16, "starts from them", "modes.py --families bumps")
    climb_steps: int = tuned(60, "steps of climbing the severity from there, at most", "modes.py --families bumps")
    box: float = tuned(
        2.0, "of each coordinate to either side, that such a climb may go at once", "modes.py --families bumps"
    )
    most_summits: float = tuned(0.5, "of the climbs that may end below the limit", "modes.py --families bumps")
    covered: int = tuned(6, "dimensions in which a sphere can be covered by points", _VARIANTS)
    suspects: int = tuned(3, "starts from unexplained catastrophes at a time", _VARIANTS)
    earlier: float = tuned(
        0.9, "a catastrophe at this share of the way to the expected entry is unexplained", _VARIANTS
    )
    before: float = tuned(0.9, "of the way to a mode, at most, where every other point far out is put", "gates")
    nearly: float = tuned(0.3, "units by which a model may have a catastrophe enter late", "reliability.py")
    weighty: float = tuned(0.05, "share of P that a catastrophe outside may stand for by its distance", "gates")
    opposite: float = tuned(1.08, "as far beyond a mode's mirror image the opposite one is looked for", _VARIANTS)
    halvings: int = tuned(4, "bisections of the way to a catastrophe, to start from its boundary", _VARIANTS)
    parts: int = tuned(
        8, "points on the way of a step within the event, to see where it leaves it", "modes.py --families shy"
    )
    several: int = tuned(12, "modes, beyond which each is learnt from fewer lines", _MODES)
    each_of_many: int = tuned(4, "starts for each of them", _MODES)
    sparse: int = tuned(2, "fresh lines a mode, at least, where there are more", _MODES)
    blur: float = tuned(0.25, "width of the planes that share the event out between modes", _MODES)
    most_modes: int = tuned(150, "directions; where there are more modes, rays from the origin replace them", _MODES)
    search_calls: int = tuned(4000, "calls, at most, for the search", "networks.py")
    astray_after: int = tuned(48, "starts after which no more follow where most arrive nowhere", "networks.py")
    alone: int = tuned(30, "modes, if each was met by one start alone, that are taken for no end of them", _MODES)
    searched: float = tuned(
        1.0, "times the calls of lines, for the search for modes, at least", "modes.py --families shy"
    )
    batch: int = tuned(16, "starts at a time, where the search goes on for that", "by hand")
    most_starts: int = tuned(1000, "random starts, at most", _MODES)
    # rays, for catastrophes that are far out in many directions at once
    rays: int = tuned(12, "rays in each block of coordinates, that ask", _BY_KINDS)
    least_rays: int = tuned(48, "rays that measure what they found, at least", _BY_KINDS)
    ray_halvings: int = tuned(6, "bisections of a ray that met the event", _BY_KINDS)
    ray_points: int = tuned(2, "random points beyond its entry", _BY_KINDS)
    rays_within: int = tuned(128, "rays that ask for modes within a shell", "tests/test_lines.py")
    within: float = tuned(0.5, "nats within the shell, where they ask", "tests/test_lines.py")
    tenuous: float = tuned(0.01, "share of P below which it does not count", _BY_KINDS)
    blocks: int = tuned(6, "blocks of coordinates, at most: all, those of a site, those that a gradient has", _BY_KINDS)
    trusted: float = tuned(1.0, "nats above the first order that the first lines of one of many modes may say", _MODES)
    # roots
    tolerance: float = tuned(0.03, "nats that the last step of a root may change the mass beyond it", _SMOOTH)
    root_steps: int = tuned(6, "Newton and secant steps", _SMOOTH)
    refinements: int = tuned(9, "steps of a bracketed root", _SMOOTH)
    longest: float = tuned(2.5, "step of a root search", _SMOOTH)
    grid_before: float = tuned(1.5, "where the fine grid begins before the mode", _SMOOTH)
    fine: float = tuned(0.4, "spacing of the grid around and beyond the mode", _SMOOTH)
    coarse: float = tuned(0.9, "spacing of the grid before it", _SMOOTH)
    beyond: float = tuned(1e-4, "share of a mode's mass beyond which a line is not followed", _SMOOTH)
    # lines, and models of the boundary
    stretch: float = tuned(1.5, "width of the first lines in few dimensions: to see what bends away", _SMOOTH)
    few: int = tuned(8, "dimensions that are few", _SMOOTH)
    simple_price: int = tuned(8, "calls to keep for a line", _SMOOTH)
    grid_price: int = tuned(40, "calls to keep for a line where lines need a grid", _SMOOTH)
    slowest: float = tuned(0.5, "nats a unit that the mass beyond the boundary loses, at least", _SMOOTH)
    lightest: float = tuned(0.2, "weight in the fit of a line that hardly counts", _SMOOTH)
    coordinates: int = tuned(24, "of a boundary's model, at most", _SMOOTH)
    matters: float = tuned(0.02, "nats of slope (squared, on average) that make a direction one of them", _SMOOTH)
    ridge: float = tuned(0.3, "pull of curvatures towards the mean one", _SMOOTH)
    nearer: float = tuned(5.0, "nats by which a model may lie before the nearest root", _SMOOTH)
    cloud: int = tuned(4096, "points that integrate a model", _SMOOTH)
    coarse_cloud: int = tuned(512, "points that place its proposal, at least", _SMOOTH)
    cloud_rank: int = tuned(60, "such points a coordinate", _SMOOTH)
    # how many lines, and when to stop
    rounds: int = tuned(20, "of fresh lines, at most", _SMOOTH)
    lessons: int = tuned(4, "of the models, each with twice as many lines as the one before", _SMOOTH)
    lesson_calls: int = tuned(2000, "calls of lessons after which no further one begins", "networks.py, modes.py")
    audited: float = tuned(
        3.0,
        "over the precision: points that have to lie in the event before lines agree (rule of three)",
        "by its meaning",
    )
    inside: float = tuned(0.1, "nats inside the event's model, where these points begin", "reliability.py")
    least: int = tuned(5, "fresh lines a mode", _SMOOTH)
    curved: float = tuned(1.5, "times as many fresh lines where a boundary bends", _SMOOTH)
    poor: float = tuned(0.2, "misfit of a model, in nats, at which more lines measure it", _SMOOTH)
    many: int = tuned(32, "fresh lines where a model is poor", _SMOOTH)
    floor: float = tuned(0.005, "of the standard error, in nats: what lines that agree cannot tell", _SMOOTH)
