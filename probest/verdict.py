"""Which evidence to believe: where estimates agree, and what is concluded where they do not.

An estimate with mean P errs low, seldom high (Markov): it is too low whenever a mode was missed, and then its stated
error is too small as well. So agreement is judged with room for what errors leave out, and disagreement is reported,
never averaged away.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from probest.evidence import Code, Evidence, Note
from probest.tuning import tuned

__all__ = [
    "agree",
    "confirmed",
    "contradicts",
    "imprecise",
    "judge",
    "or_learned",
    "reach",
    "settle",
    "wanted_error",
]


@dataclass(frozen=True)
class Rules:
    """What a verdict goes by. So chosen that nothing was confidently wrong on the problems of reliability.py."""

    errors: float = tuned(3.0, "standard errors of a difference within which estimates agree", "reliability.py")
    left_out: float = tuned(0.1, "nats beside them, for what errors leave out", "reliability.py")
    vaguest: float = tuned(1.0, "nats: an error beyond this agrees with no more", "reliability.py --exact")
    lenient: float = tuned(
        2.0, "times the precision asked for, that a converged answer may be off by", "by its meaning"
    )
    least: float = tuned(0.1, "nats that it may in any case", "by its meaning")
    unasked: float = tuned(0.05, "precision where none was asked for", "by its meaning")
    seldom: float = tuned(40.0, "times too high, an estimate with mean P is once in so many (Markov)", "by its meaning")


RULES = Rules()


def agree(one: Evidence, other: Evidence) -> bool:
    """Whether two estimates tell the same story: within three standard errors of their difference, and a little.

    Where one of them found nothing, whether their intervals overlap.
    """
    if not (math.isfinite(one.log_prob) and math.isfinite(other.log_prob)):
        return one.interval[0] <= other.interval[1] and other.interval[0] <= one.interval[1]
    return abs(one.log_prob - other.log_prob) <= reach(one.std_error, other.std_error)


def reach(*errors: float) -> float:
    """How far estimates with these standard errors may lie apart and still agree, in nats."""
    return RULES.errors * min(math.hypot(*errors), RULES.vaguest) + RULES.left_out


def contradicts(one: Evidence | None, other: Evidence) -> bool:
    """Whether one is converged and disagrees with the other."""
    return one is not None and one.converged and not agree(one, other)


def wanted_error(precision: float | None) -> float:
    """Standard error that a converged answer may have, where this precision was asked for."""
    return max(RULES.least, RULES.lenient * (precision or RULES.unasked))


def imprecise(error: float, wanted: float) -> tuple[Note, ...]:
    """What there is to say of a standard error, given the one that a converged answer may have."""
    if error <= wanted:
        return ()
    return (Note(Code.IMPRECISE, f"the standard error {error:.2f} is above {wanted:.2f}: raise the budget."),)


def confirmed(one: Evidence, others: Sequence[Evidence]) -> bool:
    """Whether one of the others, found independently, agrees, and none that disagrees is higher."""
    agreeing = [agree(one, other) for other in others]
    higher = any(not same and other.log_prob > one.log_prob for same, other in zip(agreeing, others, strict=True))
    return any(agreeing) and not higher


def judge(
    crude: Evidence,
    tempered: Evidence | None,
    failed: Sequence[Evidence],
    weighed: Sequence[Evidence],
    lined: Evidence | None,
    wanted: float,
) -> Evidence:
    """The conclusion where no importance sample passed its checks.

    wanted: standard error that a converged answer may have.

    tempered: all tempering runs that reached the event, as one; failed: those that did not. weighed: importance
    samples. All tempering runs as one conclude, if nothing speaks against it; without any, lines or the crude sample
    bound P.
    """
    upper = crude.interval[1]
    if tempered is None:
        if lined is not None and math.isfinite(lined.log_prob):
            # P̂ is unbiased whatever else is wrong: by Markov's inequality it is seldom 40 times too high
            lower = min(lined.interval[0], lined.log_prob - math.log(RULES.seldom))
            return replace(lined, converged=False, interval=(lower, upper))
        if math.isfinite(crude.log_prob):
            notes = (*crude.notes, *(note for line in failed for note in line.notes))
            return replace(crude, converged=False, notes=notes)
        last = failed[-1] if failed else crude
        return replace(last, interval=(-math.inf, upper), claim="upper", converged=False)
    found = [line for line in weighed if math.isfinite(line.log_prob)]
    advice: list[str] = list(tempered.notes)
    lower, top = tempered.interval
    agreed = all(agree(tempered, line) for line in found if line.converged) and lower <= upper
    if lined is not None and lined.converged and agree(tempered, lined) and lined.std_error < tempered.std_error:
        return lined
    agreed = agreed and not contradicts(lined, tempered)
    if not agreed:
        sentence = "the methods disagree beyond their errors: raise the budget, or look at the ledger's particles."
        advice.append(Note(Code.DISAGREE, sentence))
        others = [lined] if lined is not None and lined.converged else []
        seen = [line.log_prob for line in (*found, *others)]
        lower, top = min(lower, *seen, lower), max(top, *seen, top)
    if found and agreed:
        sentence = "the guide did not pass its checks (see the ledger): this is tempering's own estimate."
        advice.append(Note(Code.SECOND_CHOICE, sentence))
    vague = imprecise(tempered.std_error, wanted) if tempered.converged else ()
    advice += vague
    return replace(
        tempered,
        interval=(lower, top),
        converged=tempered.converged and agreed and not vague,
        notes=tuple(advice),
    )


def settle(judged: Evidence, *others: Evidence | None) -> Evidence:
    """Where nothing passed: the evidence with the least error that none refutes, and an interval that spans all.

    What is missing makes an estimate too low, and its error too small: so a higher one refutes a lower one that it does
    not agree with, however precise that says it is; only a vague one does not.
    """
    found = [line for line in (judged, *others) if line is not None and math.isfinite(line.log_prob)]
    if judged.converged or len(found) < 2:
        return judged
    sharp = [line for line in found if line.std_error <= RULES.vaguest]
    refuted = [any(o.log_prob > line.log_prob and not agree(o, line) for o in sharp) for line in found]
    best = min((line for line, out in zip(found, refuted, strict=True) if not out), key=lambda line: line.std_error)
    lower, upper = min(line.interval[0] for line in found), max(line.interval[1] for line in found)
    notes = tuple(dict.fromkeys((*judged.notes, *best.notes)))
    return replace(best, converged=False, interval=(lower, upper), notes=notes)


def or_learned(bound: Evidence, learned: Evidence | None) -> Evidence:
    """The learned severity's estimate, unconverged as it is, where there is only a bound besides."""
    if learned is None or math.isfinite(bound.log_prob) or not math.isfinite(learned.log_prob):
        return bound
    return replace(learned, interval=(learned.interval[0], max(learned.interval[1], bound.interval[1])))
