"""How likely is a model to do something catastrophic, and how to train it until that is vanishingly unlikely."""

from probest import checkers
from probest.estimate import Catastrophes, Estimate, GradientError, estimate
from probest.estimators.combined import Combined
from probest.estimators.importance import Importance
from probest.estimators.monte_carlo import MonteCarlo
from probest.estimators.surrogate import Surrogate
from probest.estimators.tempering import Tempering
from probest.evidence import Evidence
from probest.guides.program import ProgramGuide
from probest.problem import Problem
from probest.programs.base import SiteError
from probest.programs.event import ProblemError, SeverityError
from probest.train import TrainingRun, train

__all__ = [
    "Catastrophes",
    "Combined",
    "Estimate",
    "Evidence",
    "GradientError",
    "Importance",
    "MonteCarlo",
    "Problem",
    "ProblemError",
    "ProgramGuide",
    "SeverityError",
    "SiteError",
    "Surrogate",
    "Tempering",
    "TrainingRun",
    "checkers",
    "estimate",
    "train",
]
