"""How likely is a model to do something catastrophic, and how to train it until that is vanishingly unlikely."""

from probest import checkers
from probest.audit import Audit, audit
from probest.estimate import Catastrophes, Estimate, GradientError, estimate
from probest.estimators.base import UnmetNeedError
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
from probest.evidence import Evidence
from probest.guides.autoguide import Autoguide
from probest.guides.program import ProgramGuide
from probest.moments.hermite import Quadrature
from probest.moments.propagate import Moments, Traced, moments, register_rule, traced
from probest.moments.steps import MomentError
from probest.problem import Problem
from probest.programs.base import SiteError
from probest.programs.event import ProblemError, SeverityError
from probest.report.netcdf import Saved, load
from probest.result import Result, Sample
from probest.search import Search, search
from probest.train import Pool, TrainingRun, train

__all__ = [
    "Audit",
    "Autoguide",
    "Bounds",
    "Catastrophes",
    "Combined",
    "CrossEntropy",
    "Estimate",
    "Evidence",
    "GradientError",
    "Importance",
    "Kriging",
    "LearnedProposal",
    "LineSampling",
    "MomentError",
    "MomentPropagation",
    "Moments",
    "MonteCarlo",
    "Pool",
    "Problem",
    "ProblemError",
    "ProgramGuide",
    "Quadrature",
    "Result",
    "Sample",
    "Saved",
    "Search",
    "SeverityError",
    "SiteError",
    "Splitting",
    "Stratified",
    "Surrogate",
    "Tempering",
    "Traced",
    "TrainingRun",
    "UnmetNeedError",
    "__version__",
    "audit",
    "checkers",
    "estimate",
    "load",
    "moments",
    "register_rule",
    "search",
    "traced",
    "train",
]


def __getattr__(name: str) -> str:
    if name != "__version__":
        raise AttributeError(f"module 'probest' has no attribute {name!r}")
    from importlib.metadata import version  # 30 ms that no import of probest should wait for

    return version("probest")
