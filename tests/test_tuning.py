"""Constants that decide something: each has a meaning and a source, and another value is really another method."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import numpy as np
import pytest

from probest.estimators import (
    Bounds,
    Combined,
    Importance,
    Kriging,
    LearnedProposal,
    LineSampling,
    MomentPropagation,
    Splitting,
    Stratified,
    Surrogate,
    Tempering,
    Whitened,
)
from probest.gradient.surface import SurfaceTuning
from probest.guides.variational import AdamTuning
from probest.search import SearchTuning
from probest.testing.events import half_space, union
from probest.training.descent import DescentTuning
from probest.training.ladder import LadderTuning
from probest.training.memory import MemoryTuning
from probest.training.opponents import OpponentsTuning
from probest.training.pursuit import PursuitTuning
from probest.tuning import meanings
from probest.verdict import Rules

METHODS: tuple[Any, ...] = (
    Bounds(),
    Combined(),
    Importance(),
    Kriging(),
    LearnedProposal(),
    LineSampling(),
    MomentPropagation(),
    Splitting(),
    Stratified(),
    Surrogate(),
    Tempering(),
    Whitened(Combined()),
)
TRAINING = (
    LadderTuning(),
    PursuitTuning(),
    AdamTuning(),
    DescentTuning(),
    MemoryTuning(),
    OpponentsTuning(),
    SearchTuning(),
)
TUNINGS: tuple[Any, ...] = (*(method.tuning for method in METHODS), SurfaceTuning(), *TRAINING, Rules())


@pytest.mark.parametrize("tuning", TUNINGS, ids=lambda tuning: type(tuning).__name__)
def test_every_constant_has_a_meaning_and_a_source_and_stays(tuning: Any) -> None:
    found = meanings(tuning)
    assert set(found) == {field.name for field in fields(tuning)}
    for name, (value, meaning, by) in found.items():
        assert value == getattr(type(tuning)(), name)
        assert len(meaning) > 3, name
        assert len(by) > 3, name
    with pytest.raises(FrozenInstanceError):
        setattr(tuning, next(iter(found)), 0)


def test_another_value_is_another_method() -> None:
    seed = np.random.SeedSequence(0)
    lines = LineSampling()
    event = union(5, (4.0, 4.0, 4.0, 4.0))
    usual = lines.run(event, budget=5_000, seed=seed)
    looser = replace(lines, tuning=replace(lines.tuning, floor=0.05))
    assert looser.run(event, budget=5_000, seed=seed).conclusion.std_error > usual.conclusion.std_error
    tempering = Tempering(particles=128)
    fewer = replace(tempering, tuning=replace(tempering.tuning, first_wide=1))
    plain = half_space(5, 4.0)
    runs = [method.run(plain, budget=20_000, seed=seed) for method in (tempering, fewer)]
    assert runs[0].conclusion.log_prob != runs[1].conclusion.log_prob
