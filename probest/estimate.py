"""``estimate()``: the one verb, and :class:`Estimate`, what it returns."""

from __future__ import annotations

import math
import numbers
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, cast

import numpy as np

from probest.backends.base import Array, Parts, chunks
from probest.budget import Meter
from probest.diagnostics import systematic_resample, thinned
from probest.estimators.base import Estimator, check_needs
from probest.estimators.combined import Combined
from probest.estimators.importance import Importance
from probest.estimators.learned import LearnedProposal, obstacle
from probest.estimators.splitting import Splitting
from probest.estimators.stratified import Stratified
from probest.estimators.whitened import Whitened
from probest.evidence import Code, Evidence, Floats, Note, Particles, Run
from probest.gradient.log_prob_at import GradientError, Weigher
from probest.guides.autoguide import Autoguide
from probest.guides.program import ProgramGuide
from probest.problem import Problem
from probest.programs.base import Observed
from probest.programs.event import UNREACHED, Event
from probest.programs.strata import MOST
from probest.report.progress import Progress, Told
from probest.report.record import versions
from probest.result import Case, Catastrophes, Result, Sample
from probest.seeds import child_seed, generator, number
from probest.smc.resample_move import cost, thicken
from probest.verdict import PARTS, bounded, conditional, effective, rounded, shared

__all__ = ["Case", "Catastrophes", "Estimate", "GradientError", "Sample", "estimate"]

MAX_DECODED = 4_000
MAX_SHARED = 2_000
SHARED_STARTS, SHARED_EACH, SHARED_SWEEPS, SHARED_LEAST = 64, 8, 16, 20
DRAWN = 500
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
    guide: Callable[[], Any] | ProgramGuide | Autoguide | None = None,
    max_strata: int = MOST,
    warm_start: Estimate | Evidence | None = None,
    callback: Told | None = None,
    progress: bool = True,
) -> Estimate:
    """Estimate log P, the log-probability of a catastrophe.

    With a recogniser (``Problem(..., given=)``), log P[catastrophe | recognised]: two estimates, of half of the budget
    each at most, that of what is recognised in ``Estimate.given``.

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
            Or a trained autoguide of the library (``Autoguide``).
        max_strata: combinations of values of discrete sites that are held and estimated apart, at most; 1 holds none.
            ``infer={"enumerate": False}`` at a site leaves that site out.
        warm_start: an earlier estimate of this problem or of one that changed a little, such as before some training
            steps. Its catastrophes say where to look; the new estimate does not rest on them.
        callback: ``callback(done, total, text)`` is told of model calls as they are spent, for a progress line of your
            own. What it raises ends the estimate; a ``KeyboardInterrupt`` ends it as Ctrl-C does.
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
    if problem.given is not None:
        options = {"estimator": estimator, "guide": guide, "max_strata": max_strata, "callback": callback}
        options["progress"] = progress
        return _conditional(problem, int(budget), checker_budget, precision, int(seed), warm_start, options)
    event = problem.event.replaced()
    wanted = PRECISION if precision is None else precision
    method: Estimator = estimator or _default(event, budget, wanted, max_strata)
    if guide is not None:
        method = Importance(precision=wanted, guide=_bindable(guide))
    if warm_start is not None:
        method = _warmed(method, warm_start)
    check_needs(method, event)
    start = time.perf_counter()
    with Progress("estimate", enabled=progress, callback=callback) as line:
        event.on_calls = lambda spent: line.update(spent, calls, method.name)
        run = method.run(event, budget=calls, seed=np.random.SeedSequence(int(seed)))
    event.on_calls = None
    if not isinstance(run, Run):
        raise TypeError(
            f"estimator: {method.name}.run returned a {type(run).__name__}; expected a probest.evidence.Run"
        )
    ledger = list(run.ledger)
    ledger[-1] = bounded(ledger[-1], ledger[:-1])
    ledger[-1] = rounded(ledger[-1], event.coarse, getattr(method, "precision", wanted))
    if event.undefined and ledger[-1].log_prob < UNREACHED:
        sentence = (
            f"the severity is NaN in {event.undefined} cases about as likely: make the model return numbers there."
        )
        note = Note(Code.UNDEFINED, sentence)
        ledger[-1] = replace(ledger[-1], converged=False, notes=(*ledger[-1].notes, note))
    if calls < budget and not ledger[-1].converged:
        note = Note(
            Code.CHECKER_BUDGET_SPENT, f"checker_budget={checker_budget} left no more cases to judge: raise it."
        )
        ledger[-1] = replace(ledger[-1], notes=(*ledger[-1].notes, note))
    settings = {"budget": budget, "checker_budget": checker_budget, "estimator": repr(method)}
    seconds = time.perf_counter() - start
    return Estimate(problem, event, tuple(ledger), seed=int(seed), seconds=seconds, settings=settings)


def _conditional(
    problem: Problem,
    budget: int,
    checker_budget: int | None,
    precision: float | None,
    seed: int,
    warm_start: Any,
    options: dict[str, Any],
) -> Estimate:
    """log P[C | R] = log P[R and C] − log P[R], each estimated by itself with half of the budget or what is left.

    Catastrophes among what was recognised are counted too: their share has to agree with the difference.
    """
    for name, value in (("budget", budget), ("checker_budget", checker_budget)):
        if value is not None and value < 2:
            raise ValueError(f"{name}={value!r}: a problem with given= takes two estimates, so at least 2 calls")
    start = time.perf_counter()
    wanted = PRECISION if precision is None else precision
    if options["estimator"] is None:
        options["precision"] = wanted / math.sqrt(2.0)
    own = np.random.SeedSequence([seed, 0x6769_7665])
    before = warm_start.given if isinstance(warm_start, Estimate) else None
    half = None if checker_budget is None else checker_budget // 2
    below = estimate(
        problem.recognised, budget=budget // 2, checker_budget=half, seed=seed, warm_start=before, **options
    )
    rest = budget - below.calls
    left = None if checker_budget is None else checker_budget - below.checker_calls
    kept = looked = 0
    if Code.INTERRUPTED in below.conclusion.codes:  # whoever stopped this does not want the rest
        rest, left = 1, None if left is None else 1
    elif left is None:
        kept, looked = _reserve(problem, below, budget, own)
    rest -= looked
    joint = estimate(
        problem.joint, budget=rest - kept, checker_budget=left, seed=number(own), warm_start=warm_start, **options
    )
    joint._event.model_calls += looked
    rest -= joint.calls
    if kept and not joint.converged and Code.INTERRUPTED not in joint.conclusion.codes:
        share = _moved_share(joint, below, kept, own)
        below.calls = below._event.model_calls
    else:
        share = _share(joint, below, rest if left is None else min(rest, left - joint.checker_calls), own)
    lines = [
        replace(line, method=line.method + part)
        for part, one in zip(PARTS, (below, joint), strict=True)
        for line in one.ledger
    ]
    lines += [] if share is None else [share]
    concluded = conditional(joint.conclusion, below.conclusion, share, wanted)
    settings = {**joint._asked, "budget": budget, "checker_budget": checker_budget}
    seconds = time.perf_counter() - start
    ledger = (*lines, concluded)
    return Estimate(problem, joint._event, ledger, seed=seed, seconds=seconds, settings=settings, given=below)


def _share(joint: Estimate, below: Estimate, left: int, seed: np.random.SeedSequence) -> Evidence | None:
    """Of what was recognised, the share that is catastrophic; None where nothing was, or no calls are left to ask."""
    found, event = below.conclusion.particles, joint._event
    count = min(MAX_SHARED, left)
    if found is None or not len(found.z) or count < 1:
        return None
    start = time.perf_counter()
    rows, counts = np.unique(systematic_resample(found.log_weight, count, generator(seed)), return_counts=True)
    hits = event.severity(found.z[rows]) >= 0.0
    independent = min(effective(below.conclusion), len(rows))
    seconds = time.perf_counter() - start
    return shared(float(counts @ hits) / count, independent, calls=len(rows), seconds=seconds)


def _reserve(problem: Problem, below: Estimate, budget: int, seed: np.random.SeedSequence) -> tuple[int, int]:
    """Calls that are kept for moving what was recognised, should P[R and C] be hard, and calls spent on asking.

    None are kept where that would be worth little: few independent cases, or no catastrophe among some of them.
    """
    event, size, found = below._event, SHARED_STARTS * SHARED_EACH, below.conclusion.particles
    sweeps = min(SHARED_SWEEPS, (budget // 4 - size) // cost(size, 1))
    if found is None or effective(below.conclusion) < SHARED_LEAST or sweeps < 4 or event.weighted or event.is_text:
        return 0, 0
    rows = np.unique(systematic_resample(found.log_weight, SHARED_STARTS, generator(child_seed(seed, 2))))
    common = (problem.joint.event.replaced().severity(found.z[rows]) >= 0.0).any()
    return size + cost(size, sweeps) if common else 0, len(rows)


def _moved_share(joint: Estimate, below: Estimate, calls: int, seed: np.random.SeedSequence) -> Evidence | None:
    """As :func:`_share` with so many calls, of many cases made from a few by moves within what is recognised.

    How precise it is follows from how much the descendants of each first case differ.
    """
    start, found = time.perf_counter(), below.conclusion.particles
    if found is None:
        return None
    chosen = systematic_resample(found.log_weight, SHARED_STARTS, generator(seed))
    first = Particles(found.z[chosen], np.zeros(len(chosen)), found.severity[chosen])
    size = SHARED_STARTS * SHARED_EACH
    meter = Meter(below._event, calls - size)
    sweeps = (calls - size) // cost(size, 1)
    many = thicken(meter, first, size, seed=child_seed(seed, 1), sweeps=sweeps)
    severity = joint._event.severity(many.z)
    hits = severity >= 0.0
    kin, kind = np.unique(chosen, return_inverse=True)
    of_each = np.repeat(kind, len(many.z) // len(chosen))
    counts = np.bincount(of_each, minlength=len(kin))
    means, parts = np.bincount(of_each, hits, len(kin)) / counts, counts / len(of_each)
    share = float(parts @ means)
    error = math.sqrt(float(parts**2 @ (means - share) ** 2) * len(kin) / max(len(kin) - 1, 1))
    # worth as many independent cases as a binomial of that error, no fewer than it began with
    least = min(effective(below.conclusion), len(kin))
    worth = share * (1.0 - share) / error**2 if error > 0.0 else least
    independent = min(max(worth, least), len(many.z))
    spent = meter.calls + len(many.z)
    found = Particles(many.z[hits], np.zeros(int(hits.sum())), severity[hits]) if hits.any() else None
    return shared(share, independent, calls=spent, seconds=time.perf_counter() - start, particles=found)


def _default(event: Event, budget: int, precision: float, max_strata: int) -> Estimator:
    """The default strategy; over the strata of discrete sites, where there are some; a learned twist, for text."""
    if not event.weighted and event.is_text:
        refused = obstacle(event, budget)
        return Splitting(precision=precision) if refused else LearnedProposal(precision=precision)
    inner = Combined(precision=precision)
    if event.weighted and event.differentiable and not event.discrete_sites:
        return Whitened(inner)
    if max_strata < 2 or not any(site.choices for site in event.sites):
        return inner
    return Stratified(precision=precision, inner=inner, max_strata=max_strata)


def _bindable(guide: Callable[[], Any] | ProgramGuide | Autoguide) -> ProgramGuide | Autoguide:
    return guide if isinstance(guide, ProgramGuide | Autoguide) else ProgramGuide(guide)


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


class Estimate(Result):
    """What :func:`estimate` returns: a :class:`~probest.result.Result` that knows its problem, and has a gradient."""

    def __init__(
        self,
        problem: Problem,
        event: Event,
        ledger: tuple[Evidence, ...],
        *,
        seed: int,
        seconds: float,
        settings: Mapping[str, Any] | None = None,
        given: Estimate | None = None,
    ) -> None:
        self.problem = problem
        self.ledger = ledger
        self.seed = seed
        self.seconds = seconds
        self._asked = {"seed": seed, **(settings or {})}
        self.given = given
        """Of a problem with a recogniser: the estimate of log P[recognised]."""
        self.calls = event.model_calls + (given.calls if given else 0)
        self.checker_calls: int = event.checker_calls + (given.checker_calls if given else 0)
        self._event = event

    @cached_property
    def settings(self) -> Mapping[str, Any]:  # type: ignore[override]
        composition = self._event.composition
        versioned = versions(composition.frontend.name, composition.frontend.backend.name)
        return {**self._asked, "problem": repr(self.problem), "dim": self._event.dim, "versions": versioned}

    @cached_property
    def catastrophes(self) -> Catastrophes | None:
        """A weighted sample of catastrophes with their named sites, at most ``MAX_DECODED``; None if none was found."""
        particles = self.conclusion.particles
        if particles is None or not len(particles.z):
            return None
        rows, weights = thinned(np.exp(particles.log_weight - particles.log_weight.max()), MAX_DECODED)
        return self._decoded(particles.z[rows], particles.severity[rows], weights)

    def blocks(self, rows: int) -> Iterator[Catastrophes]:
        particles = self.conclusion.particles
        if particles is None or not len(particles.z):
            return
        top = float(particles.log_weight.max())
        total = float(np.exp(particles.log_weight - top).sum())
        for part in chunks(len(particles.z), rows):
            weights = np.exp(particles.log_weight[part] - top) / total
            yield self._decoded(particles.z[part], particles.severity[part], weights)

    def _decoded(self, z: Floats, severity: Floats, weights: Floats) -> Catastrophes:
        cases = self._event.decode(z)
        return Catastrophes(cases.sites, weights, severity, cases.observation, cases.action)

    @cached_property
    def drawn(self) -> Sample | None:
        """``DRAWN`` draws of the adversary itself, with what the model did; None where it cannot be drawn from.

        Of a conditioned adversary these are particles, where the method left some. Neither budget nor calls count them.
        """
        event, conclusion = self._event.replaced(), self.conclusion
        if event.weighted:
            given = conclusion.prior_particles
            if given is None or not len(given.z):
                return None
            z = given.z[systematic_resample(given.log_weight, DRAWN)]
        else:
            seed = np.random.SeedSequence([self.seed, 0x6472_6177])
            z = generator(seed).standard_normal((DRAWN, event.dim))
        cases = event.decode(z)
        return Sample(cases.sites, np.full(len(z), 1.0 / len(z)), event.severity(z), cases.observation, cases.action)

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

    @property
    def plates(self) -> Mapping[str, Sequence[str | None]]:
        return {site.name: site.plates for site in self._event.sites}

    @property
    def observed(self) -> Mapping[str, Observed]:
        return self._event.observed

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

        Raises GradientError if there is no gradient: no catastrophes found; a boolean checker and a ``model`` (unless
        all that the model does is text that it draws).
        """
        if not self._event.differentiable and model is not None and not self._event.answers_in_text:
            event = self._event
            reason = "the severity is piecewise constant"
            if event.boolean or event.composition.black_boxes:
                reason = "the checker returns a bool" if event.boolean else "the checker is a black_box"
            raise GradientError(
                f"model: log P has no gradient in the model that can be estimated, because {reason}. Return a real "
                "severity (how far the case is from a catastrophe). Gradients in the adversary's parameters exist"
            )
        value = self._weigher(self._event.replaced(model=model, adversary=adversary, params=params).parts)
        if self.given is None:
            return value
        own = model if self.problem.model_recognises else None
        below = self.given.log_prob_at(model=own, adversary=adversary, params=params)
        return value - (below - self.given.log_prob)

    @cached_property
    def _weigher(self) -> Callable[[Parts], Array]:
        if self.conclusion.weigher is not None:
            return cast(Callable[[Parts], Array], self.conclusion.weigher(self._event.replaced()))
        seed = np.random.SeedSequence([self.seed, 0x6772_6164])
        return Weigher.at(self._event.replaced(), self.conclusion, lines=GRADIENT_LINES, seed=seed)
