"""Events with known answers, and checks for parts of your own: programs, models, checkers, estimators."""

from probest.testing.checks import (
    FAILURE_RATE,
    Checked,
    CheckError,
    Outcome,
    check_checker,
    check_estimator,
    check_evidence,
    check_model,
    check_program,
    check_run,
    check_truth,
)
from probest.testing.events import EXACT_EVENTS, ExactEvent

__all__ = [
    "EXACT_EVENTS",
    "FAILURE_RATE",
    "CheckError",
    "Checked",
    "ExactEvent",
    "Outcome",
    "check_checker",
    "check_estimator",
    "check_evidence",
    "check_model",
    "check_program",
    "check_run",
    "check_truth",
]
