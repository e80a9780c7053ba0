"""Contracts of evidence, and what is concluded from it: made-up ledgers with known answers."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from probest.evidence import Code, Evidence, Note, Particles, Run
from probest.seeds import child_seed, generator
from probest.verdict import agree, bounded, contradicts, judge, or_learned, refuted, rounded, settle, with_room

INF = math.inf


def line(log_prob: float, error: float = 0.05, *, converged: bool = True, **rest: Any) -> Evidence:
    interval = (log_prob - 2 * error, min(0.0, log_prob + 2 * error)) if math.isfinite(log_prob) else (-INF, -7.0)
    defaults: dict[str, Any] = {"interval": interval, "claim": "consistent", "calls": 10, "seconds": 0.1}
    return Evidence("made up", log_prob, std_error=error, converged=converged, **(defaults | rest))


def test_a_note_is_a_sentence_with_a_code_that_survives_copying() -> None:
    note = Note(Code.FLAT, "the severity is flat.")
    assert note == "the severity is flat."
    for other in (note, pickle.loads(pickle.dumps(note)), copy.deepcopy(note)):
        assert other.code is Code.FLAT
    assert line(-3.0, notes=(note, "a plain sentence")).codes == {Code.FLAT}


def test_a_conclusion_below_what_samples_show_is_refuted() -> None:
    many = line(-9.0, 0.05, batches=tuple(np.full(16, -9.0)))
    few = line(-9.0, 0.9)
    assert bounded(line(-9.3), [many]) == line(-9.3)
    low = bounded(line(-20.0), [few, many])
    assert not low.converged
    assert low.codes == {Code.DISAGREE}
    assert low.interval[1] >= -8.9
    assert bounded(line(-20.0), [few]).converged  # no sample: lines, say
    assert bounded(line(-INF, INF), [many]).log_prob == -INF


def test_a_conclusion_above_what_plain_draws_show_is_refuted() -> None:
    draws = line(-INF, INF, claim="unbiased", diagnostics={"hits": 0.0, "samples": 10_000.0})
    draws = replace(draws, method="monte carlo")
    assert bounded(line(-9.0), [draws]) == line(-9.0)
    high = bounded(line(-5.0), [draws])
    assert not high.converged
    assert high.codes == {Code.DISAGREE}
    assert high.interval[0] == -INF


def test_rounding_moves_log_p_by_the_mean_of_its_catastrophes() -> None:
    z = np.array([[5.0, 0.0], [5.4, 1.0]])
    found = line(-15.0, 0.02, particles=Particles(z, np.log([0.5, 0.5]), np.zeros(2)))
    assert rounded(found, {}, 0.05) is found
    assert rounded(found, {"x": np.array([1e-5, 0.0])}, 0.05) is found
    one = rounded(found, {"x": np.array([0.03, 0.0]), "y": np.array([0.0, 0.03])}, 0.05)
    most = 0.03 * math.hypot(5.2, 0.5)
    assert one.std_error == pytest.approx(math.hypot(0.02, most / 2))
    assert one.interval == pytest.approx((-15.04 - most, -14.96 + most))
    assert one.converged
    two = rounded(found, {"x": np.array([0.1, 0.0])}, 0.05)
    assert not two.converged
    assert two.codes == {Code.ROUNDED}
    assert "'x'" in two.notes[0]


def test_a_run_has_a_conclusion() -> None:
    one = line(-3.0)
    run = Run.of(one)
    assert (run.conclusion, run.calls, run.population, run.counts) == (one, 10, None, None)
    with pytest.raises(ValueError, match="ledger is empty"):
        Run((), 0)


def test_seeds_are_named_and_left_alone() -> None:
    seed = np.random.SeedSequence(5)
    draws = [generator(child_seed(seed, *key)).random() for key in ((), (1,), (1,), (2,), (1, 2))]
    assert draws[1] == draws[2]
    assert len(set(draws)) == 4
    generator(seed).spawn(3)
    assert seed.n_children_spawned == 0


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (line(-10.0), line(-10.2), True),
        (line(-10.0), line(-10.5), False),
        (line(-10.0, 0.4), line(-11.0, 0.4), True),
        (line(-10.0, 5.0), line(-14.0, 5.0), False),  # what would agree with anything confirms nothing
        (line(-10.0), line(-INF, INF), True),  # nothing found, with an upper bound above
        (line(-3.0), line(-INF, INF), False),
        (line(-INF, INF), line(-INF, INF), True),
    ],
)
def test_estimates_agree_within_their_errors(one: Evidence, other: Evidence, same: bool) -> None:
    assert agree(one, other) is agree(other, one) is same


def test_only_what_is_converged_contradicts() -> None:
    assert contradicts(line(-10.0), line(-12.0))
    assert not contradicts(line(-10.0, converged=False), line(-12.0))
    assert not contradicts(None, line(-12.0))


WANTED = 0.3
CRUDE = line(-INF, INF, converged=False, claim="unbiased", notes=("no hits",))


def test_tempering_alone_concludes_if_it_is_precise() -> None:
    assert judge(CRUDE, line(-10.0, 0.2), [], [], None, WANTED).converged
    vague = judge(CRUDE, line(-10.0, 0.4), [], [], None, WANTED)
    assert not vague.converged
    assert vague.codes == {Code.IMPRECISE}


def test_few_ancestors_do_not_bound_from_above() -> None:
    few = line(-50.0, 1.4, converged=False, notes=(Note(Code.FEW_ANCESTORS, "few ancestors"),))
    assert judge(CRUDE, few, [], [], None, WANTED).interval == (few.interval[0], CRUDE.interval[1])


def test_a_sample_that_passed_and_disagrees_is_reported_not_averaged() -> None:
    judged = judge(CRUDE, line(-12.0, 0.1), [], [line(-10.0)], None, WANTED)
    assert not judged.converged
    assert Code.DISAGREE in judged.codes
    assert judged.interval[0] <= -12.2
    assert judged.interval[1] >= -10.0


def test_a_sample_that_did_not_pass_leaves_tempering_as_second_choice() -> None:
    judged = judge(CRUDE, line(-12.0, 0.1), [], [line(-14.0, converged=False)], None, WANTED)
    assert judged.log_prob == -12.0
    assert Code.SECOND_CHOICE in judged.codes


def test_lines_that_agree_and_are_sharper_conclude() -> None:
    lined = line(-10.0, 0.05)
    assert judge(CRUDE, line(-10.1, 0.2), [], [], lined, WANTED) is lined
    against = judge(CRUDE, line(-12.0, 0.1), [], [], lined, WANTED)
    assert not against.converged
    assert Code.DISAGREE in against.codes


def test_without_tempering_lines_bound_from_below_by_markov() -> None:
    judged = judge(CRUDE, None, [], [], line(-10.0, 0.05, converged=False), WANTED)
    assert not judged.converged
    assert judged.interval == (pytest.approx(-10.0 - math.log(40.0)), -7.0)


def test_without_anything_there_is_an_upper_bound_and_the_reason() -> None:
    failed = line(-INF, INF, converged=False, notes=(Note(Code.UNREACHED, "not reached."),))
    judged = judge(CRUDE, None, [failed], [], None, WANTED)
    assert (judged.log_prob, judged.claim, judged.interval) == (-INF, "upper", (-INF, -7.0))
    assert judged.codes == {Code.UNREACHED}
    hits = judge(line(-5.0, 0.5, converged=False), None, [failed], [], None, WANTED)
    assert hits.log_prob == -5.0
    assert not hits.converged
    assert Code.UNREACHED in hits.codes


def test_where_nothing_passed_the_interval_spans_all() -> None:
    heavy = (Note(Code.HEAVY_TAILS, "heavy-tailed weights"),)
    worse, better = line(-12.0, 0.8, converged=False), line(-10.0, 0.6, converged=False, notes=heavy)
    settled = settle(worse, better, None)
    assert settled.log_prob == -10.0
    assert not settled.converged
    assert settled.interval == (worse.interval[0], better.interval[1])
    passed = line(-12.0)
    assert settle(passed, better) is passed


def test_one_that_lacks_only_precision_stands_for_itself() -> None:
    vague = (Note(Code.IMPRECISE, "imprecise"),)
    low, fair = line(-12.0, 1.5, converged=False), line(-10.0, 0.3, converged=False, notes=vague)
    assert settle(low, fair).interval == fair.interval
    above = line(-9.5, 0.4, converged=False)
    assert settle(above, fair).interval == (fair.interval[0], above.interval[1])
    assert settle(line(-12.0, 0.05, converged=False), fair).notes


def test_a_higher_estimate_refutes_a_lower_one_however_precise_that_says_it_is() -> None:
    precise, higher = line(-24.0, 0.01, converged=False), line(-5.0, 0.2, converged=False)
    assert settle(precise, higher).log_prob == -5.0
    assert settle(precise, line(-5.0, 3.0, converged=False)).log_prob == -24.0
    assert settle(precise, line(-24.1, 0.005, converged=False)).log_prob == -24.1


def test_a_vague_estimate_with_mean_p_refutes_what_is_below_markovs_bound() -> None:
    """An estimate with mean P is once in 40 times 40 times too high, and e^19 times too high almost never."""
    low, vague = line(-24.0, 0.01, converged=False), line(-5.0, 1.4, converged=False)
    for found in ({"samples": 500.0}, {"island_ess": 1.0}):
        assert settle(low, replace(vague, diagnostics=found)).log_prob == -5.0
        assert settle(low, replace(vague, log_prob=-20.5, diagnostics=found)).log_prob == -24.0
    assert settle(low, replace(vague, std_error=3.0)).log_prob == -24.0


def test_room_for_what_no_search_came_upon_makes_no_estimate_vague() -> None:
    """It lies above: samples with an error of their own of .1 refute a vague tempering five nats below."""
    tempered = replace(line(-19.5, 1.5, converged=False), diagnostics={"island_ess": 1.0, "left_out": 0.5})
    sampled = replace(line(-14.3, 1.57, converged=False), diagnostics={"samples": 500.0, "left_out": 1.566})
    assert settle(tempered, sampled).log_prob == -14.3
    nearer = replace(tempered, log_prob=-15.5)
    assert settle(nearer, sampled).log_prob == -14.3
    assert settle(nearer, sampled).std_error == 1.57
    sure = replace(tempered, log_prob=-14.6, std_error=0.5, diagnostics={"island_ess": 5.0, "left_out": 0.2})
    told = settle(sure, sampled)
    assert told.log_prob == -14.3
    assert told.std_error == pytest.approx(math.hypot(0.5, 0.3))
    own = math.sqrt(1.57**2 - 1.566**2)
    assert math.hypot(own, told.diagnostics["left_out"]) == pytest.approx(told.std_error)


def test_a_higher_estimate_that_disagrees_refutes_and_a_lower_one_does_not() -> None:
    assert not refuted(line(-10.0), [])
    assert not refuted(line(-10.0), [line(-10.1), line(-9.9)])
    assert not refuted(line(-10.0), [line(-12.0)])
    assert refuted(line(-10.0), [line(-10.1), line(-8.0)])


def test_room_for_what_no_search_came_upon() -> None:
    """The share that is unknown after n draws without a newcomer: Jeffreys' posterior of none in n, by quadrature."""
    one = line(-10.0, 0.05)
    for independent, new in ((4.0, 0.0), (12.0, 0.0), (12.0, 3.0)):
        roomy = with_room(one, independent, new, 0.05)
        share = np.linspace(0.0, 1.0, 2_000_001)[1:-1] ** 2  # dense where the density is
        density = share ** (new - 0.5) * (1.0 - share) ** (independent - new - 0.5)
        mass = np.concatenate([[0.0], np.cumsum(0.5 * (density[1:] + density[:-1]) * np.diff(share))])
        usual = math.sqrt(float(np.trapezoid(share**2 * density, share) / mass[-1]))
        most = float(np.interp(0.975 * mass[-1], mass, share))
        assert math.isclose(roomy.std_error, math.hypot(0.05, -math.log1p(-usual)), rel_tol=0.02)
        assert math.isclose(roomy.interval[1] - one.interval[1], -math.log1p(-most), rel_tol=0.02)
        assert roomy.interval[0] == one.interval[0]
        assert roomy.log_prob == one.log_prob


def test_so_much_room_that_the_precision_is_missed_is_not_converged() -> None:
    assert with_room(line(-10.0), 12.0, 0.0, 0.05).converged
    vague = with_room(line(-10.0), 3.0, 0.0, 0.05)
    assert not vague.converged
    assert Code.IMPRECISE in vague.codes
    assert with_room(line(-10.0), 3.0, 0.0, 0.2).converged
    assert with_room(line(-INF, INF), 3.0, 0.0, 0.05) == line(-INF, INF)


def test_a_learned_severity_speaks_where_there_is_only_a_bound() -> None:
    learned = line(-10.0, 0.3, converged=False)
    assert or_learned(line(-9.0), learned).log_prob == -9.0
    spoken = or_learned(CRUDE, learned)
    assert spoken.log_prob == -10.0
    assert spoken.interval[1] == -7.0
    assert or_learned(CRUDE, None) is CRUDE
