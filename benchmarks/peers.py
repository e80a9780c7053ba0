"""OpenTURNS on a probest event, in the event's own standard-normal space, its calls counted as probest counts them.

``pip install openturns``; nothing but the benchmarks needs it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import openturns as ot
from scipy.special import log_ndtr

from probest.budget import FORWARD_CALLS, GRADIENT_CALLS
from probest.evidence import EventLike

SIZES = (300, 1_000, 3_000)
MOST_CALLS, MOST_SECONDS = 50_000, 15.0  # a run that needs more is stopped and counts as failed


class Answer(NamedTuple):
    """What a method says: log P (NaN if it failed), a 95 % interval (NaN if it states none), and what it cost."""

    log_prob: float
    interval: tuple[float, float]
    calls: int
    seconds: float


class Counted:
    """A probest event as an OpenTURNS function whose failure domain is below 0; gradients are the event's own."""

    def __init__(self, event: EventLike) -> None:
        self.event, self.calls, self.began = event, 0, time.perf_counter()
        self.function = ot.PythonFunction(event.dim, 1, self._one, func_sample=self._many, gradient=self._gradient)

    def failure(self) -> Any:
        law = ot.RandomVector(ot.JointDistribution([ot.Normal()] * self.event.dim))
        return ot.ThresholdEvent(ot.CompositeRandomVector(self.function, law), ot.Less(), 0.0)

    def _many(self, z: Any) -> np.ndarray:
        z = np.array(z)
        self._spend(FORWARD_CALLS * len(z))
        return -self.event.evaluate(z).severity[:, None]

    def _one(self, z: Any) -> list[float]:
        return list(self._many([z])[0])

    def _gradient(self, z: Any) -> list[list[float]]:
        self._spend(GRADIENT_CALLS)
        grad = self.event.evaluate(np.array([z]), gradient=True).severity_grad
        assert grad is not None
        return (-grad.T).tolist()

    def _spend(self, calls: int) -> None:
        self.calls += calls
        if self.calls > MOST_CALLS or time.perf_counter() - self.began > MOST_SECONDS:
            raise RuntimeError(f"more than {MOST_CALLS} calls or {MOST_SECONDS} seconds")


class Task(NamedTuple):
    """What a method gets: the function, how many points to draw (a level), and where to start a search."""

    counted: Counted
    size: int
    start: np.ndarray


def _design_point(task: Task) -> Any:
    """The search starts near the origin: at it, symmetric limit states have no gradient."""
    search = ot.AbdoRackwitz()
    search.setStartingPoint(task.start)
    search.setMaximumIterationNumber(100)
    for error in ("Absolute", "Relative", "Residual", "Constraint"):
        getattr(search, f"setMaximum{error}Error")(1e-3)
    form = ot.FORM(search, task.counted.failure())
    form.run()
    return form.getResult()


def _simulate(algorithm: Any, size: int, block: int | None = None) -> tuple[float, float]:
    """log P and the half-length of the 95 % interval of P."""
    block = block or size
    algorithm.setMaximumCoefficientOfVariation(0.0)
    algorithm.setBlockSize(block)
    algorithm.setMaximumOuterSampling(math.ceil(size / block))
    algorithm.run()
    result = algorithm.getResult()
    p = result.getProbabilityEstimate()
    return (math.log(p) if p > 0 else -math.inf), result.getConfidenceLength(0.95) / 2


def _form(task: Task) -> tuple[float, float]:
    found = _design_point(task)
    beta = found.getHasoferReliabilityIndex()
    return float(log_ndtr(beta if found.getIsStandardPointOriginInFailureSpace() else -beta)), math.nan


def _form_importance(task: Task) -> tuple[float, float]:
    return _simulate(ot.PostAnalyticalImportanceSampling(_design_point(task)), task.size)


def _subset(task: Task) -> tuple[float, float]:
    return _simulate(ot.SubsetSampling(task.counted.failure()), task.size)


def _nais(task: Task) -> tuple[float, float]:
    return _simulate(ot.NAIS(task.counted.failure(), 0.1), task.size)


def _cross_entropy(task: Task) -> tuple[float, float]:
    return _simulate(ot.StandardSpaceCrossEntropyImportanceSampling(task.counted.failure(), 0.1), task.size)


def _directional(task: Task) -> tuple[float, float]:
    return _simulate(ot.DirectionalSampling(task.counted.failure()), task.size, block=1)


METHODS: dict[str, tuple[Callable[[Task], tuple[float, float]], tuple[int, ...]]] = {
    "FORM": (_form, (0,)),
    "FORM-IS": (_form_importance, SIZES),
    "subset": (_subset, SIZES),
    "NAIS": (_nais, SIZES),
    "cross-entropy": (_cross_entropy, SIZES),
    "directional": (_directional, (100,)),  # a line search each, one call at a time
}


def names(dim: int) -> list[str]:
    """Every method at every sample size, ``method/size``. NAIS, cubic in ``dim``, only below 200 dimensions."""
    return [f"{name}/{size}" for name, (_, sizes) in METHODS.items() for size in sizes if dim < 200 or name != "NAIS"]


def run(name: str, event: EventLike, seed: int) -> Answer:
    """The method called ``name``, one of :func:`names`, on ``event``. A method that fails answers NaN."""
    method, _, size = name.partition("/")
    ot.Log.Show(ot.Log.NONE)
    ot.RandomGenerator.SetSeed(seed)
    start = 0.1 * np.random.default_rng(seed).standard_normal(event.dim)
    counted = Counted(event)
    try:
        log_prob, half = METHODS[method][0](Task(counted, int(size), start))
    except (RuntimeError, TypeError):  # OpenTURNS raises these for whatever went wrong
        log_prob, half = math.nan, math.nan
    seconds = time.perf_counter() - counted.began
    p = math.exp(log_prob) if math.isfinite(log_prob) else 0.0
    interval = (math.log(p - half) if p > half else -math.inf, math.log(p + half) if p + half > 0 else -math.inf)
    return Answer(log_prob, interval if math.isfinite(half) else (math.nan, math.nan), counted.calls, seconds)
