"""``estimate()``: the one verb, and :class:`Estimate`, what it returns."""

from __future__ import annotations

import math
import numbers
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import scipy
from scipy.special import ndtri

from probest.backends.base import Array, PyTree
from probest.estimators.base import Estimator, check_needs
from probest.estimators.combined import Combined
from probest.estimators.importance import Importance
from probest.estimators.stratified import Stratified
from probest.evidence import Code, Evidence, Floats, Note, Run
from probest.gradient.log_prob_at import GradientError, Weigher
from probest.guides.program import ProgramGuide
from probest.problem import Problem
from probest.programs.event import Event
from probest.programs.strata import MOST
from probest.report.progress import Progress

if TYPE_CHECKING:
    import os
    from pathlib import Path

__all__ = ["Case", "Catastrophes", "Estimate", "GradientError", "estimate"]

MAX_DECODED = 4_000
GRADIENT_LINES = 400
PRECISION = 0.05


def estimate(
    problem: Problem,
    *,
    budget: int = 50_000,
    checker_budget: int | None = None,
    precision: float | None = None,
    seed: int = 0,
    estimator: Estimator | None = None,
    guide: Callable[[], Any] | ProgramGuide | None = None,
    max_strata: int = MOST,
    warm_start: Estimate | Evidence | None = None,
    progress: bool = True,
) -> Estimate:
    """Estimate log P, the log-probability of a catastrophe.

    Args:
        problem: the adversary, the model and the checker.
        budget: model calls to spend at most (a forward pass is 1, a forward pass with its gradient 3).
        checker_budget: cases that the checker may judge at most; None for as many as the model calls. A case is judged
            for each forward pass and each gradient, so this also bounds the model calls.
        precision: standard error of log P, in nats, at which to stop early; 0.05 unless said otherwise.
        seed: the same seed gives the same estimate.
        estimator: a single method instead of the default combination. Its precision is one of its own fields.
        guide: a program that draws the adversary's sites from another law, for importance sampling in place of the
            default combination; a share of the samples still comes from the adversary itself (see ``ProgramGuide``).
        max_strata: combinations of values of discrete sites that are held and estimated apart, at most; 1 holds none.
            ``infer={"enumerate": False}`` at a site leaves that site out.
        warm_start: an earlier estimate of this problem or of one that changed a little, such as before some training
            steps. Its catastrophes say where to look; the new estimate does not rest on them.
        progress: show a progress line (only ever in a terminal or notebook).

    Returns:
        The estimate. Look at ``converged`` and ``advice`` before believing ``log_prob``. Interrupted by Ctrl-C, it
        holds the evidence gathered until then and is not converged.

    Raises:
        ProblemError, SiteError, SeverityError: the problem cannot be estimated as written.
        UnmetNeedError: the estimator needs what the problem does not have, such as a gradient.
        ValueError: an argument is out of range, or two exclude each other.
    """
    if not isinstance(problem, Problem):
        raise TypeError(f"problem is a {type(problem).__name__}: expected Problem(adversary, model, checker)")
    check_whole("budget", budget, least=1, unit=" of model calls")
    if checker_budget is not None:
        check_whole("checker_budget", checker_budget, least=1, unit=" of checker calls")
    calls = int(budget if checker_budget is None else min(budget, checker_budget))
    if precision is not None and not (math.isfinite(precision) and precision > 0):
        raise ValueError(f"precision={precision!r}: expected a positive number of nats, such as 0.05")
    if precision is not None and estimator is not None:
        raise ValueError(
            f"precision={precision!r}: an estimator has a precision of its own; give it there, as in "
            f"estimator={type(estimator).__name__}(precision={precision!r}) where it has that field"
        )
    check_whole("seed", seed, least=0)
    check_whole("max_strata", max_strata, least=1)
    if guide is not None and estimator is not None:
        raise ValueError("guide and estimator exclude each other: pass estimator=Importance(guide=ProgramGuide(...))")
    event = problem.event.replaced()
    wanted = PRECISION if precision is None else precision
    method: Estimator = estimator or _default(event, wanted, max_strata)
    if guide is not None:
        method = Importance(precision=wanted, guide=guide if isinstance(guide, ProgramGuide) else ProgramGuide(guide))
    if warm_start is not None:
        method = _warmed(method, warm_start)
    check_needs(method, event)
    start = time.perf_counter()
    with Progress("estimate", enabled=progress) as line:
        event.on_calls = lambda spent: line.update(spent, calls, method.name)
        run = method.run(event, budget=calls, seed=np.random.SeedSequence(int(seed)))
    event.on_calls = None
    if not isinstance(run, Run):
        raise TypeError(
            f"estimator: {method.name}.run returned a {type(run).__name__}; expected a probest.evidence.Run"
        )
    ledger = list(run.ledger)
    if calls < budget and not ledger[-1].converged:
        note = Note(
            Code.CHECKER_BUDGET_SPENT, f"checker_budget={checker_budget} left no more cases to judge: raise it."
        )
        ledger[-1] = replace(ledger[-1], notes=(*ledger[-1].notes, note))
    return Estimate(problem, event, tuple(ledger), seed=int(seed), seconds=time.perf_counter() - start)


def _default(event: Event, precision: float, max_strata: int) -> Estimator:
    """The default strategy; over the strata of discrete sites, where there are some."""
    inner = Combined(precision=precision)
    if max_strata < 2 or not any(site.choices for site in event.sites):
        return inner
    return Stratified(precision=precision, inner=inner, max_strata=max_strata)


def _warmed(method: Any, before: Estimate | Evidence) -> Estimator:
    """The method with the catastrophes of an earlier estimate to start from; as it is where that found none."""
    if not isinstance(before, Estimate | Evidence):
        raise TypeError(f"warm_start is a {type(before).__name__}: expected an Estimate or an Evidence")
    if isinstance(
        method, Stratified
    ):  # every stratum is looked at afresh; where there are none, it is the inner method
        return replace(method, inner=cast(Combined, _warmed(method.inner, before)))
    if "warm_start" not in getattr(method, "__dataclass_fields__", ()):
        raise ValueError(f"warm_start: {method.name} does not start from particles; use Tempering or the default")
    evidence = before.conclusion if isinstance(before, Estimate) else before
    warmed = method if evidence.particles is None else replace(method, warm_start=evidence.particles)
    return cast(Estimator, warmed)


def check_whole(name: str, value: Any, *, least: int, unit: str = "") -> None:
    """Raise ValueError unless ``value`` is a whole number (not a bool) of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or int(value) < least:
        raise ValueError(f"{name}={value!r}: expected a whole number{unit}, {least} or more")


class Estimate:
    """How likely a catastrophe is, and how far to believe it.

    The ledger holds the evidence in the order in which it was gathered; the last line is the conclusion. All
    log-probabilities are natural logarithms; intervals are intervals of log P.
    """

    def __init__(
        self, problem: Problem, event: Event, ledger: tuple[Evidence, ...], *, seed: int, seconds: float
    ) -> None:
        self.problem = problem
        self.ledger = ledger
        self.seed = seed
        self.seconds = seconds
        self.calls = event.model_calls
        self.checker_calls = event.checker_calls
        self._event = event

    @property
    def conclusion(self) -> Evidence:
        """The last line of the ledger."""
        return self.ledger[-1]

    @property
    def log_prob(self) -> float:
        """log P; ``-inf`` when no catastrophe was found (then ``upper`` says how likely it can still be)."""
        return self.conclusion.log_prob

    @property
    def prob(self) -> float:
        """P; 0 if it underflows."""
        return math.exp(self.log_prob)

    @property
    def std_error(self) -> float:
        """Standard error of ``log_prob`` in nats (about the relative error of P)."""
        return self.conclusion.std_error

    @property
    def converged(self) -> bool:
        """Whether the methods agree and their diagnostics hold. If not, ``advice`` says what to do."""
        return self.conclusion.converged

    @property
    def advice(self) -> tuple[str, ...]:
        """What was wrong and what to do about it; empty when there is nothing to say."""
        return self.conclusion.notes

    @property
    def lower(self) -> float:
        """Lower end of the 95 % interval of log P; ``-inf`` when nothing bounds it from below."""
        return self.conclusion.interval[0]

    @property
    def upper(self) -> float:
        """Upper end of the 95 % interval of log P."""
        return self.conclusion.interval[1]

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Interval of log P at a confidence ``level`` in (0, 1), rescaled from the 95 % one."""
        if not 0 < level < 1:
            raise ValueError(f"level={level!r}: expected a number between 0 and 1, such as 0.95")
        lower, upper = self.conclusion.interval
        if not math.isfinite(self.log_prob):
            # No hits: (1 - u)^n = alpha at the exact binomial bound u.
            miss = -math.expm1(upper) if upper < 0 else 0.0
            power = math.log1p(-level) / math.log(0.05)
            return lower, math.log(-math.expm1(power * math.log(miss))) if 0 < miss < 1 else upper
        factor = float(ndtri(0.5 + level / 2) / ndtri(0.975))
        return self.log_prob + factor * (lower - self.log_prob), min(
            self.log_prob + factor * (upper - self.log_prob), 0.0
        )

    @cached_property
    def catastrophes(self) -> Catastrophes | None:
        """A weighted sample of catastrophes with their named sites, or None if none was found."""
        particles = self.conclusion.particles
        if particles is None or not len(particles.z):
            return None
        best = np.sort(np.argsort(-particles.log_weight, kind="stable")[:MAX_DECODED])
        cases = self._event.decode(particles.z[best])
        weights = np.exp(particles.log_weight[best] - particles.log_weight.max())
        return Catastrophes(
            cases.sites, weights / weights.sum(), particles.severity[best], cases.observation, cases.action
        )

    @cached_property
    def nearest(self) -> Case | None:
        """The catastrophe nearest to the middle of the adversary that was seen, or, where there was none, the case of
        greatest severity: what comes nearest to one. None if every case that was tried is impossible.
        """
        found = self._event.nearest
        if found is None:
            return None
        cases = self._event.decode(found.z[None], found.held)

        def first(leaf: Any) -> Any:
            return leaf[0]

        observation, action = (self._event.backend.tree_map(first, tree) for tree in (cases.observation, cases.action))
        sites = {name: value[0] for name, value in {**found.held, **cases.sites}.items()}
        return Case(sites, found.severity, observation, action)

    def worst_case(self, kl: float) -> float:
        """The largest probability of a catastrophe under any adversary q with KL(q ‖ D) ≤ ``kl`` nats.

        Closed form: it solves kl_bin(q ‖ P) = kl, by the data-processing inequality; tilting D towards the catastrophes
        attains it. 1 when ``kl`` ≥ −log P.
        """
        if not kl >= 0:
            raise ValueError(f"kl={kl!r}: expected a number of nats, 0 or more")
        log_p = self.log_prob
        if not math.isfinite(log_p):
            raise ValueError("no catastrophe was found, so only a bound is known: estimate again with a larger budget")
        if kl >= -log_p:
            return 1.0
        log_safe = math.log1p(-math.exp(log_p))

        def excess(log_q: float) -> float:
            q = math.exp(log_q)
            rest = 0.0 if q >= 1 else (1 - q) * (math.log1p(-q) - log_safe)
            return q * (log_q - log_p) + rest - kl

        return 1.0 if excess(0.0) < 0 else math.exp(float(scipy.optimize.brentq(excess, log_p, 0.0, xtol=1e-14)))

    def log_prob_at(
        self,
        *,
        model: Any = None,
        adversary: Any = None,
        params: Mapping[str, Array] | None = None,
    ) -> Array:
        """log P as a function of the parameters: a scalar of torch or jax to differentiate.

        With torch, call it and ``backward()``: gradients reach the parameters of ``model`` and ``adversary`` (by
        default those of the problem) and whatever tensors they close over. With jax, differentiate a function that
        passes a ``model``, an ``adversary`` (a pytree such as ``Partial(program, params)``, or a closure), or values of
        ``numpyro.param`` sites in ``params``. Parts must have the structure of the problem's own.

        The value at the problem's own parameters is ``log_prob``; the gradient there has no smoothing bias. The value
        elsewhere is a reweighting of the same particles: trust it for changes of a nat or so.

        Raises GradientError if there is no gradient: no catastrophes found; a boolean checker and a ``model``.
        """
        if not self._event.differentiable and model is not None:
            event = self._event
            reason = "the severity is piecewise constant"
            if event.boolean or event.composition.black_boxes:
                reason = "the checker returns a bool" if event.boolean else "the checker is a black_box"
            raise GradientError(
                f"model: log P has no gradient in the model that can be estimated, because {reason}. Return a real "
                "severity (how far the case is from a catastrophe). Gradients in the adversary's parameters exist"
            )
        event = self._weigher.event
        return self._weigher(event.replaced(model=model, adversary=adversary, params=params).parts)

    @cached_property
    def _weigher(self) -> Weigher:
        seed = np.random.SeedSequence([self.seed, 0x6772_6164])
        return Weigher.at(self._event.replaced(), self.conclusion, lines=GRADIENT_LINES, seed=seed)

    def to_arviz(self) -> Any:
        """Catastrophes as ArviZ data: equally weighted draws in ``posterior``, weighted ones in ``catastrophes``."""
        from probest.report.arviz import to_arviz

        return to_arviz(self)

    def to_netcdf(self, path: str | os.PathLike[str]) -> Path:
        """Write the catastrophes and the numbers of the estimate to a netCDF file."""
        from probest.report.arviz import to_netcdf

        return to_netcdf(self, path)

    def plot(self, **options: Any) -> Any:
        """The ledger as a forest plot (a matplotlib Axes)."""
        from probest.report.plots import plot_estimate

        return plot_estimate(self, **options)

    def __rich__(self) -> Any:
        from probest.report.tables import estimate_table

        return estimate_table(self)

    def __str__(self) -> str:
        from probest.report.tables import estimate_text

        return estimate_text(self)

    def _repr_html_(self) -> str:
        from probest.report.html import estimate_html

        return estimate_html(self)

    def __repr__(self) -> str:
        return (
            f"Estimate(log_prob={self.log_prob:.4g}, std_error={self.std_error:.2g}, "
            f"interval=({self.lower:.4g}, {self.upper:.4g}), converged={self.converged}, calls={self.calls})"
        )


@dataclass(frozen=True)
class Case:
    """One case: values of its sites by name, what M saw and did (pytrees of arrays), and its severity, at least 0 for a
    catastrophe.
    """

    sites: dict[str, np.ndarray]
    severity: float
    observation: PyTree
    action: PyTree


class Catastrophes(Mapping[str, np.ndarray]):
    """Weighted catastrophes: a mapping from site names to arrays ``(n, ...)``.

    weights: ``(n,)``, summing to 1. severity: ``(n,)``, at least 0. observation, action: pytrees of ``(n, ...)``
    arrays.
    """

    def __init__(
        self, sites: dict[str, np.ndarray], weights: Floats, severity: Floats, observation: PyTree, action: PyTree
    ) -> None:
        self._sites = sites
        self.weights = weights
        self.severity = severity
        self.observation = observation
        self.action = action

    def __getitem__(self, name: str, /) -> np.ndarray:
        return self._sites[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)

    def __repr__(self) -> str:
        return f"Catastrophes({len(self.weights)} cases of {', '.join(self._sites)})"
