"""The methods of estimating log P; each has ``run(event, budget=..., seed=...)`` and returns one Evidence."""

from probest.estimators.base import Estimator
from probest.estimators.combined import Combined
from probest.estimators.importance import Importance
from probest.estimators.monte_carlo import MonteCarlo
from probest.estimators.tempering import Tempering
from probest.evidence import Evidence, Particles

__all__ = ["Combined", "Estimator", "Evidence", "Importance", "MonteCarlo", "Particles", "Tempering"]
