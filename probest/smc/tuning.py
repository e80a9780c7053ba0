"""The constants of tempering, its moves and its scouts."""

from __future__ import annotations

from dataclasses import dataclass

from probest.tuning import tuned

__all__ = ["TemperingTuning"]

_EXACT = "reliability.py --exact --estimator tempering"
_HIDDEN = "reliability.py --variants (steep branches that flatter ones hide)"
_MEMORY = "memory.py"


@dataclass(frozen=True)
class TemperingTuning:
    """What tempering goes by, beside its own fields.

    Set by hand on the exact events, where they were looked at together and not one by one;
    ``benchmarks/tuning.py --of tempering`` says what each is worth by itself.
    """

    # the first draws
    first_share: float = tuned(0.12, "of the budget, at most, for the first draws", _EXACT)
    first_wide: int = tuned(8, "times as many first draws as particles, where the budget allows", _EXACT)
    most_numbers: int = tuned(20_000_000, "of z that more draws than particles may take", _MEMORY)
    # levels
    max_levels: int = tuned(400, "levels, at most", _EXACT)
    floor: float = tuned(-2000.0, "log P below which the event counts as impossible", _EXACT)
    conditioning: float = tuned(12.0, "levels that are expected where nothing is known yet", _EXACT)
    edge: float = tuned(4.0, "levels from a softening as steep as the event is far to the event", _EXACT)
    sized_for: float = tuned(0.9, "of the budget that is left: what a population is sized for", _EXACT)
    hastiest: float = tuned(0.1, "conditional ESS that a step may leave where the budget is short", _EXACT)
    # moves
    unmoved: float = tuned(0.35, "of the particles that may stay where they are at a level of guided moves", _EXACT)
    walkers: float = tuned(0.2, "of the particles that take a local step instead of a guided one", _EXACT)
    resting: int = tuned(2, "levels without guided moves after some that did not do", _EXACT)
    refused: float = tuned(0.12, "acceptance of guided moves below which they are left for a while", _EXACT)
    mixed: float = tuned(0.7, "rank correlation with the level's start at which guided moves have done enough", _EXACT)
    stuck: float = tuned(0.9, "rank correlation inside the event at which it says that particles hardly move", _EXACT)
    sketched: int = tuned(16, "steps on what a student knows, for each of the model's answers", "networks.py")
    lesson: int = tuned(48, "particles of each level whose gradients a student is taught", "networks.py")
    lesson_share: float = tuned(0.4, "of a student's usual steps, for such a lesson", "networks.py")
    accept_climb: float = tuned(0.55, "acceptance that gradient steps aim at (Roberts & Rosenthal 1998: 0.574)", _EXACT)
    accept_walk: float = tuned(0.35, "acceptance that steps without a gradient aim at", _EXACT)
    tails_share: float = tuned(0.4, "of the law of guided moves that is widened", _EXACT)
    tails_factor: float = tuned(2.0, "by this much", _EXACT)
    radial_tails_share: float = tuned(0.5, "of a radial law of guided moves that is widened", _EXACT)
    radial_tails_factor: float = tuned(3.0, "by this much", _EXACT)
    threshold: float = tuned(0.07, "eigenvalue that makes a direction one of the few that matter", _EXACT)
    rank: int = tuned(12, "directions that are few", _EXACT)
    components: int = tuned(5, "of the mixture of guided moves, at most", _EXACT)
    # scouts
    scouts: int = tuned(48, "searches from far out", _HIDDEN)
    scout_steps: int = tuned(2, "Newton-like steps of each", _HIDDEN)
    scouts_near: float = tuned(2.0, "scale of the nearest start, in standard deviations", _HIDDEN)
    scouts_far: float = tuned(5.0, "scale of the farthest", _HIDDEN)
    places: int = tuned(6, "that scouts may agree on: more are no few directions", _HIDDEN)
    scouts_share: float = tuned(0.2, "of guided moves that go to them", _HIDDEN)
    scouts_reach: tuple[float, ...] = tuned(
        (0.5, 0.7, 0.85, 1.0), "of the way to a place: where its mode is while the event is soft", _HIDDEN
    )
