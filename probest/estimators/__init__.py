"""The methods of estimating log P, and what is needed to write one.

Each is a small frozen object with ``run(event, budget=..., seed=...)``, which returns a :class:`~probest.evidence.Run`.
"""

from probest.budget import Meter
from probest.estimators.base import Estimator, Need, UnmetNeedError
from probest.estimators.bounds import Bounds
from probest.estimators.combined import Combined
from probest.estimators.cross_entropy import CrossEntropy
from probest.estimators.importance import Importance
from probest.estimators.kriging import Kriging
from probest.estimators.learned import LearnedProposal
from probest.estimators.line_sampling import LineSampling
from probest.estimators.moments import MomentPropagation
from probest.estimators.monte_carlo import MonteCarlo
from probest.estimators.splitting import Splitting
from probest.estimators.stratified import Stratified
from probest.estimators.surrogate import Surrogate
from probest.estimators.tempering import Tempering
from probest.estimators.whitened import Whitened
from probest.evidence import (
    Claim,
    Code,
    Counts,
    Evaluation,
    EventLike,
    Evidence,
    Families,
    Note,
    Particles,
    Population,
    Run,
)
from probest.seeds import child_seed, generator

__all__ = [
    "Bounds",
    "Claim",
    "Code",
    "Combined",
    "Counts",
    "CrossEntropy",
    "Estimator",
    "Evaluation",
    "EventLike",
    "Evidence",
    "Families",
    "Importance",
    "Kriging",
    "LearnedProposal",
    "LineSampling",
    "Meter",
    "MomentPropagation",
    "MonteCarlo",
    "Need",
    "Note",
    "Particles",
    "Population",
    "Run",
    "Splitting",
    "Stratified",
    "Surrogate",
    "Tempering",
    "UnmetNeedError",
    "Whitened",
    "child_seed",
    "generator",
]
