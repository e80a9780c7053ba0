"""Which evidence to believe: where estimates agree, and what is concluded where they do not.

An estimate with mean P errs low, seldom high (Markov): it is too low whenever a mode was missed, and then its stated
error is too small as well. So agreement is judged with room for what errors leave out, and disagreement is reported,
never averaged away.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from probest import diagnostics
from probest.evidence import Code, Evidence, Floats, Note, Particles
from probest.markov import lower_bound, upper_bound
from probest.tuning import tuned

__all__ = [
    "PARTS",
    "RULES",
    "SHARE",
    "agree",
    "bounded",
    "conditional",
    "contradicts",
    "effective",
    "imprecise",
    "judge",
    "or_learned",
    "reach",
    "refuted",
    "room_left",
    "rounded",
    "settle",
    "shared",
    "wanted_error",
    "with_room",
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
    rounding: float = tuned(1e-3, "nats that rounding of sites may move log P by, unsaid", "by its meaning")
    sure: float = tuned(0.999, "of an interval that an answer outside is refuted by", "by its meaning")
    seldom: float = tuned(40.0, "times too high, an estimate with mean P is once in so many (Markov)", "by its meaning")


RULES = Rules()

SHARE = "share of the recognised"
"""The method of the line that says which share of what was recognised is catastrophic."""

PARTS = (", P[R]", ", P[R, C]")
"""What the names of lines end in that are of one part of a conditional probability."""


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


def refuted(one: Evidence, others: Sequence[Evidence]) -> bool:
    """Whether one of the others is higher and disagrees: what is missing makes an estimate too low, seldom too high."""
    return any(other.log_prob > one.log_prob and not agree(one, other) for other in others)


def room_left(independent: float, new: float) -> float:
    """Nats by which log P may be too low after such searches (:func:`with_room`), by the share's root mean square."""
    found, whole = 0.5 + new, 1.0 + independent
    square = found * (found + 1.0) / (whole * (whole + 1.0))
    return -math.log1p(-min(math.sqrt(square), 0.999))


def with_room(one: Evidence, independent: float, new: float, precision: float | None) -> Evidence:
    """The estimate with room for what no search came upon.

    independent: how many independent catastrophes all searches together are worth. new: how many of them, of the last
    search, lay where nothing that was known before led to. The share that is still unknown then has a
    Beta(½ + new, ½ + independent − new) law (Jeffreys' prior; the newcomers stand for what was seen once: Good 1953).
    Its root mean square adds to the standard error, its upper 97.5 % quantile to the interval's upper end.
    """
    if not math.isfinite(one.log_prob):
        return one
    law = stats.beta(0.5 + new, max(0.5 + independent - new, 1e-6))
    room = room_left(independent, new)
    error = math.hypot(one.std_error, room)
    upper = min(0.0, one.interval[1] - math.log1p(-min(float(law.ppf(0.975)), 1.0 - 1e-9)))
    vague = () if Code.IMPRECISE in one.codes else imprecise(error, wanted_error(precision))
    return replace(
        one,
        std_error=error,
        interval=(one.interval[0], upper),
        converged=one.converged and not vague,
        diagnostics={**one.diagnostics, "left_out": room},
        notes=(*one.notes, *vague),
    )


def bounded(one: Evidence, ledger: Sequence[Evidence]) -> Evidence:
    """The conclusion, refuted where it is beyond a bound that samples in the ledger give almost surely.

    From below by samples of a guide and plain draws alone: lines may claim what is not there, and tempering's mean is
    only nearly P. From above by plain draws.
    """
    if not math.isfinite(one.log_prob):
        return one
    sampled = [line for line in ledger if line.batches or "samples" in line.diagnostics]
    least, most = lower_bound(sampled, RULES.sure), upper_bound(sampled, RULES.sure)
    if one.log_prob < least:
        sentence = f"samples show that log P is at least {least:.4g}, almost surely: raise the budget."
        interval = (one.interval[0], max(one.interval[1], *(line.interval[1] for line in sampled)))
    elif one.log_prob > most:
        sentence = f"plain draws show that log P is at most {most:.4g}, almost surely: raise the budget."
        interval = (min(one.interval[0], *(line.interval[0] for line in sampled)), one.interval[1])
    else:
        return one
    return replace(one, converged=False, interval=interval, notes=(*one.notes, Note(Code.DISAGREE, sentence)))


def rounded(one: Evidence, apart: Mapping[str, Floats], precision: float | None) -> Evidence:
    """The estimate with room for the rounding of sites' values.

    apart: by site, ``(dim,)``, how far apart neighbouring floats are in each coordinate z, 0 in those of other sites. A
    value is rounded by half of that at most, and a limit that it is compared with by as much; where z moves by δ, log P
    moves by δ·E[z | C] to first order. Half of this is taken as the standard error, all of it is added to the interval.
    """
    found = one.particles
    if not (apart and math.isfinite(one.log_prob)) or found is None or not len(found.z):
        return one
    mean = np.exp(found.log_weight - diagnostics.log_sum_exp(found.log_weight)) @ found.z
    moved = {name: float(np.linalg.norm(width * mean)) for name, width in apart.items()}
    most = math.hypot(*moved.values())
    if most < RULES.rounding:
        return one
    error, wanted = math.hypot(one.std_error, 0.5 * most), wanted_error(precision)
    notes = one.notes
    if error > wanted and (one.std_error <= wanted or 0.5 * most > one.std_error):  # it is rounding that matters
        worst = max(moved, key=lambda name: moved[name])
        sentence = (
            f"site {worst!r} lies so far from 0, by its own spread, that its values are rounded by up to "
            f"{0.5 * float(apart[worst].max()):.2g} standard deviations: draw it around 0 and add its location in the "
            "model, or use double precision."
        )
        notes = (*notes, Note(Code.ROUNDED, sentence))
    return replace(
        one,
        std_error=error,
        interval=(one.interval[0] - most, min(one.interval[1] + most, 0.0)),
        converged=one.converged and notes is one.notes,
        diagnostics={**one.diagnostics, "rounding": most},
        notes=notes,
    )


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
            if not notes:
                notes = (Note(Code.BUDGET_SPENT, "the budget left nothing to search with: raise it."),)
            return replace(crude, converged=False, notes=notes)
        last = failed[-1] if failed else crude
        return replace(last, interval=(-math.inf, upper), claim="upper", converged=False)
    found = [line for line in weighed if math.isfinite(line.log_prob)]
    advice: list[str] = list(tempered.notes)
    lower, top = tempered.interval
    if Code.FEW_ANCESTORS in tempered.codes:  # all of them may be in a small mode
        top = max(top, upper)
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
    """Where nothing passed: that of the least error of its own which none refutes, and an interval that spans all.

    What is missing makes an estimate too low, and its error too small: so a higher one refutes a lower one that it does
    not agree with, however precise that says it is. A vague one does only where it is higher by more than Markov's
    bound; the room for what no search came upon makes none vague, since that only lies above.
    """
    found = [line for line in (judged, *others) if line is not None and math.isfinite(line.log_prob)]
    if judged.converged or len(found) < 2:
        return judged
    sharp = [line for line in found if _sampled_error(line) <= RULES.vaguest]
    stand = [line for line in found if not (refuted(line, sharp) or _far_below(line, found))]
    best = min(stand, key=_sampled_error)
    # another that agrees, and whose looks leave less room, says how far this one may be off
    error = min(math.hypot(line.std_error, best.log_prob - line.log_prob) for line in stand)
    # one that lacks only precision has room for what it may lack; what is vague adds nothing to that
    passed = best.codes <= {Code.IMPRECISE}
    spread = [line for line in stand if line.std_error <= RULES.vaguest] if passed else found
    lower = min((best if passed else line).interval[0] for line in stand)
    upper = max(line.interval[1] for line in (best, *spread))
    notes = best.notes
    if best is not judged and Code.DISAGREE in judged.codes:
        notes = (*notes, *(note for note in judged.notes if isinstance(note, Note) and note.code is Code.DISAGREE))
    if not notes:
        notes = (Note(Code.UNCHECKED, "no other look confirms this: raise the budget."),)
    known = best.diagnostics
    if "left_out" in known:  # the room that is left of it
        known = {**known, "left_out": math.sqrt(max(error**2 - _sampled_error(best) ** 2, 0.0))}
    notes = tuple(dict.fromkeys(notes))
    return replace(best, std_error=error, converged=False, interval=(lower, upper), diagnostics=known, notes=notes)


def _sampled_error(one: Evidence) -> float:
    """The standard error without the room for what no search came upon, by which an estimate is too low at most."""
    return math.sqrt(max(one.std_error**2 - one.diagnostics.get("left_out", 0.0) ** 2, 0.0))


def _far_below(one: Evidence, others: Sequence[Evidence]) -> bool:
    """Whether another, however vague, is so much higher that it would have to be ``seldom`` times too high.

    Of those whose mean is P, nearly at least: samples of a guide and tempering. Lines may claim what is not there.
    """
    room = math.log(RULES.seldom) + reach(_sampled_error(one))
    fair = [other for other in others if other.batches or {"samples", "island_ess"} & other.diagnostics.keys()]
    return any(other.log_prob - room > one.log_prob for other in fair)


def or_learned(bound: Evidence, learned: Evidence | None) -> Evidence:
    """The learned severity's estimate, unconverged as it is, where there is only a bound besides."""
    if learned is None or math.isfinite(bound.log_prob) or not math.isfinite(learned.log_prob):
        return bound
    return replace(learned, interval=(learned.interval[0], max(learned.interval[1], bound.interval[1])))


def effective(one: Evidence) -> float:
    """How many independent catastrophes its particles are worth, at most."""
    if one.particles is None or not len(one.particles.z):
        return 0.0
    apart = diagnostics.effective_sample_size(one.particles.log_weight)
    return min(apart, one.diagnostics.get("island_ess", math.inf))


def shared(
    share: float, independent: float, *, calls: int, seconds: float, particles: Particles | None = None
) -> Evidence:
    """Of so many independent recognised cases the share that is catastrophic, as evidence of log P[C | R].

    particles: those that are.
    """
    n = max(1, int(independent))
    hits = min(n, round(share * n))
    return Evidence(
        method=SHARE,
        log_prob=math.log(share) if share > 0.0 else -math.inf,
        std_error=math.sqrt((1.0 - share) / (share * n)) if share > 0.0 else math.inf,
        interval=diagnostics.binomial_interval(hits, n),
        claim="consistent",
        calls=calls,
        seconds=seconds,
        converged=False,
        particles=particles,
        diagnostics={"hits": float(hits), "samples": float(n)},
        notes=(Note(Code.TRIAL, "a look at what the difference of the two estimates should come to."),),
    )


def conditional(joint: Evidence, below: Evidence, share: Evidence | None, wanted: float) -> Evidence:
    """log P[C | R] from log P[R, C], log P[R] and the share of catastrophes among what was recognised.

    wanted: standard error that a converged answer may have.

    The two estimates are independent, so errors add as squares. What nobody recognised says nothing: the bound is 1
    then, in words. Where the share refutes the difference, one of the two has missed something, and which one is not
    known: the higher value stands, not converged, and the interval spans both. A whole below its part, log P[R] below
    log P[R, C] beyond their errors, has missed something too: the bound is 1. Where the two agree, what was recognised
    is an importance sample (independent draws: nothing else says how many they are worth), and the share is the more
    precise, it is the answer.
    """
    calls = joint.calls + below.calls + (0 if share is None else share.calls)
    seconds = joint.seconds + below.seconds
    if not math.isfinite(below.log_prob):
        note = Note(
            Code.UNREACHED,
            "cannot tell: nothing was found that is recognised, so nothing is known of what the model does there.",
        )
        nothing = Evidence.nothing("conditional", note, calls=calls, seconds=seconds)
        return replace(nothing, notes=(note, *below.notes))
    notes = [Note(n.code, f"P[R]: {n}") for n in below.notes if isinstance(n, Note)]
    notes += [Note(n.code, f"P[R, C]: {n}") for n in joint.notes if isinstance(n, Note)]
    value = min(joint.log_prob - below.log_prob, 0.0)
    error = math.hypot(joint.std_error, below.std_error)
    lower = joint.log_prob - below.log_prob - math.hypot(joint.log_prob - joint.interval[0], _above(below))
    upper = joint.interval[1] - below.interval[0]
    if math.isfinite(value):
        upper = value + math.hypot(_above(joint), below.log_prob - below.interval[0])
    else:
        lower = -math.inf
    converged = joint.converged and below.converged
    contradicted = joint.log_prob > below.log_prob + reach(error)
    if contradicted:
        sentence = "it is below P[R, C], which is a part of it: what is recognised was found in part. Raise the budget."
        notes.append(Note(Code.DISAGREE, f"P[R]: {sentence}"))
        lower, upper, converged = -math.inf, 0.0, False
    if share is not None:
        n = int(share.diagnostics["samples"])
        low, high = diagnostics.binomial_interval(int(share.diagnostics["hits"]), n, RULES.sure)
        room = reach(error) if math.isfinite(value) else 0.0
        drawn = "coverage" in below.diagnostics and math.isfinite(share.log_prob)
        if low > value + room or high < value - room:
            sentence = (
                f"of what was recognised a share of {math.exp(share.log_prob):.2g} is catastrophic (of {n} independent "
                "cases), which the two estimates contradict: one of them has missed something. Raise the budget."
            )
            notes.append(Note(Code.DISAGREE, sentence))
            lower, upper, converged = min(lower, share.interval[0]), max(upper, share.interval[1]), False
            if share.log_prob > value:
                value, error = share.log_prob, share.std_error
        elif below.codes <= {Code.IMPRECISE} and not contradicted and drawn and share.std_error < error:
            value, error, (lower, upper) = share.log_prob, share.std_error, share.interval
            notes, converged = [n for n in notes if n.code is not Code.IMPRECISE], joint.codes <= {Code.IMPRECISE}
    if converged:
        vague = imprecise(error, wanted)
        notes, converged = [*notes, *vague], not vague
    return replace(
        joint,
        method="conditional",
        log_prob=value,
        std_error=error,
        interval=(min(lower, value), max(min(upper, 0.0), value)),
        claim="heuristic" if "heuristic" in (joint.claim, below.claim) else "consistent",
        calls=calls,
        seconds=seconds,
        converged=converged and math.isfinite(value),
        prior_particles=below.particles,
        log_evidence=below.log_prob,
        diagnostics={"joint": joint.log_prob, "recognised": below.log_prob},
        notes=tuple(notes),
    )


def _above(one: Evidence) -> float:
    return one.interval[1] - one.log_prob
