r"""``search()``: the adversary within so many nats of the given one under which the model is at its worst.

*What is looked for.* Of all D with KL(D ‖ D₀) ≤ B the worst has the probability p of catastrophe that solves
kl(p ‖ P) = B (:meth:`probest.Estimate.worst_case`): it is D₀, with some share of draws from D₀ given a catastrophe. So
the adversary that is learnt is one such share,

.. math:: D = (1 - \alpha) D_0 + \alpha\, q_\theta ,

with q_θ a law of a family (:mod:`probest.adversaries`) or a program of the user's.

*How.* Catastrophes of D₀ are found once (z_i of equal weight, by :func:`probest.estimate`). With
:math:`r_\theta = q_\theta / p_0` the gain :math:`\log P_D - \log P = \log \mathbb{E}[1 - \alpha + \alpha
r_\theta(z_i)]` costs no call of the model. What θ climbs first is Jensen's bound of it, the mean of :math:`\log(1 -
\alpha + \alpha r_\theta(z_i))`, whose gradient is Fisher's identity with the weights of D₀: it is as high only at the
optimum, and low for a law that lacks a mode, where the gain itself, estimated from particles, is highest for a law that
sits on a few of them (seen: a union of four, from 0.93 of the optimum down to 0.6, with a mode lost). A law could learn
the particles by heart: what is kept is what does best on the half that it is not shown. Then θ climbs :math:`\log P_D`
itself, by fresh draws of q that the model and the checker judge: Fisher's identity on the catastrophes among them.

KL(D ‖ D₀) is the mean of log D/D₀ over fresh draws of D, and its gradient their covariance with :math:`\nabla \log D`.
For each θ the share α is the one that spends the budget exactly; the multiplier λ of the dual is then the exchange rate
of gain for KL through the share, and θ climbs gain − λ KL.

*What is believed.* Nothing of that. P under D is P under q_θ by plain sampling, at a model call a draw, with its exact
interval; KL is estimated from fresh draws; both are set against the closed form.

*When it fails.* Catastrophes that the estimate of D₀ did not find are not searched for: its warnings apply.

References: Fisher (1925), Theory of statistical estimation; Donsker & Varadhan (1975) for the budget; Williams (1992),
Simple statistical gradient-following algorithms (the gradient of KL, with a baseline).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy import optimize
from scipy.spatial import cKDTree

from probest.adversaries import Learnable, Tilt
from probest.adversaries.base import Family, Law, Points, ratio_of
from probest.adversaries.tilts import subspace
from probest.backends.base import Array, Backend, Parts
from probest.budget import Meter
from probest.diagnostics import binomial_interval, systematic_resample
from probest.estimate import Estimate, check_whole, estimate
from probest.evidence import Floats, Particles
from probest.problem import Problem
from probest.report.progress import Progress, Told
from probest.seeds import child_seed, generator
from probest.smc.resample_move import cost, thicken
from probest.tuning import tuned

__all__ = ["Search", "SearchTuning", "search"]

_BY = "benchmarks/adversaries.py"
_SWEEPS = 4  # rounds of moves that make as many catastrophes as are learnt from, where the estimate left fewer


@dataclass(frozen=True)
class SearchTuning:
    """How an adversary is learnt."""

    particles: int = tuned(1024, "catastrophes, half of which it learns from, and half of which judge it", _BY)
    draws: int = tuned(512, "fresh draws of q and of D₀ a step", _BY)
    final: int = tuned(16_384, "fresh draws of each for the share that spends the budget, and for KL", _BY)
    judge_every: int = tuned(10, "steps between which what is learnt is judged", _BY)
    patience: int = tuned(10, "judgements without progress after which it ends", _BY)
    alike: float = tuned(0.7, "cosine in the informed subspace from which on two catastrophes are of one mode", _BY)


@dataclass(frozen=True)
class Search:
    """The worst adversary that was found.

    base: the estimate under the given adversary. adversary: the one that was found, a program of the same library,
    which is q with probability ``share`` and the given one otherwise. parts, law: q with its learnt parameters.
    kl, kl_error: KL(adversary ‖ given) in nats, estimated from fresh draws, and its standard error. log_prob,
    interval: log P under it, and the 95 % interval, by plain sampling. modes: for each mode of catastrophes its share
    under the given adversary and under the found one. history: ``(steps, 3)`` of log P, KL, λ. calls: model calls.
    """

    base: Estimate
    problem: Problem
    law: Law
    parts: Parts
    share: float
    kl: float
    kl_error: float
    log_prob: float
    interval: tuple[float, float]
    modes: Floats
    history: Floats
    converged: bool
    advice: tuple[str, ...]
    calls: int
    seconds: float

    @property
    def adversary(self) -> Callable[..., Any]:
        return self.problem.adversary

    @cached_property
    def worst_case(self) -> float:
        """log of the largest P within ``kl``, by the closed form from the estimate under the given adversary."""
        return math.log(self.base.worst_case(max(self.kl, 0.0)))

    @property
    def efficiency(self) -> float:
        """P under the found adversary over the largest that its KL allows."""
        return math.exp(self.log_prob - self.worst_case)

    @property
    def coverage(self) -> float:
        """The share, under the given adversary, of modes of catastrophe that keep at least half their share."""
        given, found = self.modes.T
        return float(given[found >= 0.5 * given].sum())

    def plot(self, **options: Any) -> Any:
        """log P, as it is learnt, with the KL that it spends (a matplotlib Axes)."""
        from probest.report.plots import plot_search

        return plot_search(self, **options)

    def _repr_html_(self) -> str:
        from probest.report.html import search_html

        return search_html(self)

    def __repr__(self) -> str:
        return (
            f"Search(log P {self.base.log_prob:.4g} -> {self.log_prob:.4g} for {self.kl:.3g} nats, "
            f"efficiency={self.efficiency:.2f}, coverage={self.coverage:.2f}, converged={self.converged})"
        )


def search(
    problem: Problem,
    adversary: Family | Callable[[], Any] | None = None,
    *,
    kl: float,
    base: Estimate | None = None,
    budget: int = 50_000,
    judge: int = 4_000,
    steps: int = 400,
    refine: int = 100,
    learning_rate: float = 0.02,
    seed: int = 0,
    callback: Told | None = None,
    progress: bool = True,
    tuning: SearchTuning | None = None,
) -> Search:
    """Find the adversary within ``kl`` nats of the problem's own under which a catastrophe is likeliest.

    Args:
        problem: its adversary is the one to stay near.
        adversary: what is learnt: a family such as :class:`probest.adversaries.Tilt` (the default), or a program with
            parameters that draws the sites of the problem's adversary (:class:`probest.adversaries.Learnable`).
        kl: the budget, KL(found ‖ given) in nats, above 0.
        base: an estimate of the problem, if there is one already; else one is made, of ``budget`` calls.
        budget: model calls of that estimate.
        judge: model calls of the plain sampling that says what the found adversary can do.
        steps: of the learning, at most; it ends when nothing more is gained on catastrophes that it is not shown.
        refine: further steps on fresh draws that the model and the checker judge, 512 model calls each; 0 for none.
        learning_rate: of Adam; a quarter of it while refining.
        seed: the same seed gives the same adversary.
        callback: ``callback(done, total, text)`` is told of steps as they are taken.
        progress: show a progress line (only ever in a terminal or notebook).
        tuning: how it learns, where not as usual, or as a family that has a ``tuning`` of its own says.

    Returns:
        The search. ``found.problem`` is the problem under the adversary found. After Ctrl-C it holds what was best.

    Raises:
        ValueError: an argument is out of range, the problem's adversary is conditioned, or the estimate has no
            catastrophes to learn from.
        ProblemError: the program draws other sites than the problem's adversary, or has no parameters.
    """
    if not isinstance(problem, Problem):
        raise TypeError(f"problem is a {type(problem).__name__}: expected Problem(adversary, model, checker)")
    if not (math.isfinite(kl) and kl > 0.0):
        raise ValueError(f"kl={kl!r}: expected a positive number of nats")
    for name, count in {"budget": budget, "judge": judge, "steps": steps}.items():
        check_whole(name, count, least=1)
    for name, count in {"seed": seed, "refine": refine}.items():
        check_whole(name, count, least=0)
    if not (math.isfinite(learning_rate) and learning_rate > 0):
        raise ValueError(f"learning_rate={learning_rate!r}: expected a positive number")
    if problem.event.weighted:
        raise ValueError(
            "problem: its adversary is conditioned on observations, so it cannot be drawn from, and nothing says how "
            "far another is from it. Search from the program without them"
        )
    family = Tilt() if adversary is None else adversary
    if not hasattr(family, "build"):
        if not callable(family):
            raise TypeError(f"adversary is a {type(family).__name__}: expected a family or a program")
        family = Learnable(family)
    tuning = tuning or getattr(family, "tuning", None) or SearchTuning()
    began = time.perf_counter()
    root = np.random.SeedSequence(seed)
    with Progress("search", enabled=progress, callback=callback) as line:
        line.update(0, steps, "estimating log P under the given adversary")
        own = base is None
        if base is None:
            base = estimate(problem, budget=budget, seed=seed, progress=False)
        particles = base.conclusion.particles
        if particles is None or not len(particles.z) or not math.isfinite(base.log_prob):
            raise ValueError(
                "the estimate under the given adversary has no catastrophes, so there is nothing to learn from: raise "
                "budget, or pass a base that found some"
            )
        event = problem.event.replaced()
        particles = thicken(
            Meter(event, cost(tuning.particles, _SWEEPS)), particles, tuning.particles,
            seed=child_seed(root, 4), sweeps=_SWEEPS,
        )  # fmt: skip
        law = family.build(event, particles, generator(child_seed(root, 0)))
        learner = _Learner(event.backend, law, particles, kl, base.log_prob, tuning, root)
        interrupted = False
        try:
            learner.run(steps, learning_rate, line)
            learner.refine(refine, 0.25 * learning_rate, line)
        except KeyboardInterrupt:
            interrupted = True
        return _judged(problem, base, law, learner, event, judge, own, interrupted, began)


class _Learner:
    """The climb of θ, and what was best."""

    def __init__(
        self,
        backend: Backend,
        law: Law,
        particles: Particles,
        kl: float,
        log_prob: float,
        tuning: SearchTuning,
        root: np.random.SeedSequence,
    ) -> None:
        self.backend, self.law, self.kl, self.log_prob, self.tuning, self.root = (
            backend, law, kl, log_prob, tuning, root,
        )  # fmt: skip
        rng = generator(child_seed(root, 1))
        half = len(particles.z) // 2
        order = rng.permutation(len(particles.z))
        halves = (order[:half] if half else order, order[half:])
        self.z = [particles.z[self._chosen(particles, rows, rng)] for rows in halves]
        self.shown, self.unseen = (law.points(z) for z in self.z)
        self.parts = law.parts
        self.history: list[tuple[float, float, float]] = []

    def _chosen(self, particles: Particles, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Equally weighted rows of these."""
        weight = particles.log_weight[rows]
        if not np.isfinite(weight).any():
            weight = np.zeros(len(rows))
        return rows[systematic_resample(weight, self.tuning.particles // 2, rng)]

    def run(self, steps: int, learning_rate: float, line: Progress) -> None:
        tuning = self.tuning
        minimizer = self.backend.minimizer(self.law.parts, self._loss, learning_rate=learning_rate)
        best, kept, since = -math.inf, minimizer.arrays(), 0
        try:
            for step in range(steps + 1):
                rng = generator(child_seed(self.root, 2, step))
                parts = minimizer.parts
                plain, drawn = self.law.plain(tuning.draws, rng), self.law.draw(parts, tuning.draws, rng)
                ratios = [self._ratio(parts, points) for points in (plain, drawn, self.shown)]
                share, spent = _share(self.kl, *ratios[:2])
                gain, rate = _gain(share, ratios[2]), _exchange_rate(share, *ratios)
                self.history.append((self.log_prob + gain, spent, rate))
                if step % tuning.judge_every == 0:
                    judged = _gain(share, self._ratio(parts, self.unseen))
                    line.update(step, steps, f"log P {self.log_prob + judged:.2f} for {spent:.2f} nats")
                    since += 1
                    if judged > best + 1e-3:
                        best, kept, since = judged, minimizer.arrays(), 0
                    if since > tuning.patience:
                        break
                if step < steps:
                    by = np.array([share, rate, spent])
                    minimizer.step(self.shown, plain, drawn, by)
        finally:
            minimizer.restore(kept)
            self.parts = minimizer.parts

    def refine(self, steps: int, learning_rate: float, line: Progress) -> None:
        """Climb log P under D itself, by draws of q that the model and the checker judge."""
        tuning = self.tuning
        minimizer = self.backend.minimizer(self.parts, self._judged_loss, learning_rate=learning_rate)
        best, kept, recent = -math.inf, minimizer.arrays(), []
        try:
            for step in range(steps):
                rng = generator(child_seed(self.root, 5, step))
                parts = minimizer.parts
                plain, drawn = self.law.plain(tuning.draws, rng), self.law.draw(parts, tuning.draws, rng)
                hit = (self.law.severity(drawn) >= 0.0).astype(np.float64)
                ratios = [self._ratio(parts, points) for points in (plain, drawn)]
                share, spent = _share(self.kl, *ratios)
                given, q = math.exp(self.log_prob), float(hit.mean())
                under = (1.0 - share) * given + share * q
                paid = _price(share, *ratios)
                rate = (q - given) / (under * paid) if paid > 0.0 and under > 0.0 else 0.0
                recent.append(math.log(under) if under > 0.0 else -math.inf)
                self.history.append((recent[-1], spent, rate))
                if len(recent) == tuning.judge_every:
                    mean = math.fsum(recent) / len(recent)
                    line.update(step, steps, f"log P {mean:.2f} for {spent:.2f} nats, by draws")
                    if mean > best:
                        best, kept = mean, minimizer.arrays()
                    recent = []
                by = np.array([share, rate, spent, q, max(under, 1e-300)])
                minimizer.step(plain, drawn, hit, by)
        finally:
            minimizer.restore(kept)
            self.parts = minimizer.parts

    def _judged_loss(
        self, parts: Parts, plain: dict[str, Array], drawn: dict[str, Array], hit: Array, by: Array
    ) -> Array:
        """As :meth:`_loss`, with the gain of D itself: Fisher's identity on the catastrophes among its draws."""
        share, rate, spent, q, under = by[0], by[1], by[2], by[3], by[4]
        gain = share * ((hit - q) * self.law.log_ratio(parts, drawn)).mean() / under
        return rate * self._cost(parts, plain, drawn, share, spent) - gain

    def _loss(
        self, parts: Parts, shown: dict[str, Array], plain: dict[str, Array], drawn: dict[str, Array], by: Array
    ) -> Array:
        """What is stepped down: λ KL, by a function with its gradient, less the gain."""
        share, rate, spent = by[0], by[1], by[2]
        return rate * self._cost(parts, plain, drawn, share, spent) - self._log_mixed(parts, shown, share).mean()

    def _cost(
        self, parts: Parts, plain: dict[str, Array], drawn: dict[str, Array], share: Array, spent: Array
    ) -> Array:
        """A function with the gradient of KL: a covariance, with what is spent as the baseline."""
        cost = 0.0
        for points, weight in ((plain, 1.0 - share), (drawn, share)):
            ratio = self._log_mixed(parts, points, share)
            cost = cost + weight * ((self.backend.constant(ratio) - spent) * ratio).mean()
        return cost

    def _log_mixed(self, parts: Parts, points: dict[str, Array], share: Array) -> Array:
        """log D − log D₀."""
        xp = self.backend.special.xp
        return xp.logaddexp(xp.log1p(-share), xp.log(share) + self.law.log_ratio(parts, points))

    def _ratio(self, parts: Parts, points: Points) -> Floats:
        """log q − log p on the host."""
        return ratio_of(self.backend, self.law, parts, points)


def _mixed(share: float, log_ratio: Floats) -> Floats:
    with np.errstate(divide="ignore"):
        return np.asarray(np.logaddexp(np.log1p(-share), np.log(share) + log_ratio), dtype=np.float64)


def _spent(share: float, plain: Floats, drawn: Floats) -> float:
    """KL of the mixture, from log-ratios at draws of D₀ and of q."""
    parts = (1.0 - share) * _mixed(share, plain).mean(), share * _mixed(share, drawn).mean()
    return float(sum(parts))


def _gain(share: float, shown: Floats) -> float:
    """log P_D − log P, at least: the mean of log D/D₀ over catastrophes of D₀."""
    return float(_mixed(share, shown).mean())


def _share(kl: float, plain: Floats, drawn: Floats) -> tuple[float, float]:
    """The share of q that spends the budget, at most all but one in a thousand, and what it spends."""
    most = 0.999
    if _spent(most, plain, drawn) <= kl:
        return most, _spent(most, plain, drawn)
    least = 1e-9
    if not _spent(least, plain, drawn) < kl:  # a law that has gone astray
        return least, _spent(least, plain, drawn)
    share = float(optimize.brentq(lambda a: _spent(a, plain, drawn) - kl, least, most, xtol=1e-10))
    return share, _spent(share, plain, drawn)


def _around(share: float) -> tuple[float, float]:
    """Shares a little below and above, for differences."""
    return 0.98 * share, min(1.02 * share, 0.9999)


def _price(share: float, plain: Floats, drawn: Floats) -> float:
    """KL by the share: its derivative."""
    low, high = _around(share)
    return (_spent(high, plain, drawn) - _spent(low, plain, drawn)) / (high - low)


def _exchange_rate(share: float, plain: Floats, drawn: Floats, shown: Floats) -> float:
    """Nats of log P that a nat of KL buys, through the share."""
    low, high = _around(share)
    bought = (_gain(high, shown) - _gain(low, shown)) / (high - low)
    paid = _price(share, plain, drawn)
    return max(bought, 0.0) / paid if paid > 0.0 else 0.0


def _judged(
    problem: Problem, base: Estimate, law: Law, learner: _Learner, event: Any, judge: int, own: bool, interrupted: bool,
    began: float,
) -> Search:  # fmt: skip
    """What the learnt law can do, by fresh draws alone."""
    tuning, backend, parts = learner.tuning, learner.backend, learner.parts
    rng = generator(child_seed(learner.root, 3))
    plain, drawn = law.plain(tuning.final, rng), law.draw(parts, tuning.final, rng)
    ratios = [ratio_of(backend, law, parts, points) for points in (plain, drawn)]
    share, _ = _share(learner.kl, *ratios)
    # the share was chosen by those draws: others say what is spent
    plain, drawn = law.plain(tuning.final, rng), law.draw(parts, tuning.final, rng)
    ratios = [_mixed(share, ratio_of(backend, law, parts, points)) for points in (plain, drawn)]
    kl = float((1.0 - share) * ratios[0].mean() + share * ratios[1].mean())
    error = math.hypot((1.0 - share) * ratios[0].std(), share * ratios[1].std()) / math.sqrt(tuning.final)
    tried = law.draw(parts, judge, rng)
    caught = law.severity(tried) >= 0.0
    hits = int(caught.sum())
    low, high = binomial_interval(hits, judge)
    given = math.exp(base.log_prob)

    def under(q: float) -> float:
        p = (1.0 - share) * given + share * q
        return math.log(p) if p > 0.0 else -math.inf

    seen = {name: value[caught] for name, value in tried.items()}
    modes = _modes(_owners(event, learner.z[1], tuning.alike), law.features(learner.unseen), law.features(seen))
    calls = event.model_calls + (base.calls if own else 0)
    notes = []
    if interrupted:
        notes.append("the search was interrupted: this is the best until then.")
    if not base.converged:
        notes.append("the estimate under the given adversary has not converged: modes that it missed are not searched.")
    if hits < 30:
        notes.append(
            f"only {hits} of {judge} draws of the learnt law are catastrophes: raise judge, steps or the rank."
        )
    found = problem.replaced(adversary=law.program(parts, share))
    return Search(
        base=base, problem=found, law=law, parts=parts, share=share, kl=kl, kl_error=error,
        log_prob=under(hits / judge), interval=(under(math.exp(low)), under(math.exp(high))), modes=modes,
        history=np.array(learner.history).reshape(-1, 3), converged=not notes, advice=tuple(notes), calls=calls,
        seconds=time.perf_counter() - began,
    )  # fmt: skip


def _owners(event: Any, z: Floats, alike: float) -> np.ndarray:
    """The mode of each catastrophe z ``(n, dim)``: what lies one way in the subspace of the severity's gradients."""
    u = z @ subspace(event, z, threshold=0.15, asked=128)
    u = u / np.maximum(np.linalg.norm(u, axis=1, keepdims=True), 1e-300)
    owner, left, count = np.full(len(u), -1), np.arange(len(u)), 0
    while len(left):
        near = u[left] @ u[left].T > alike
        leader = int(near.sum(axis=1).argmax())
        owner[left[near[leader]]] = count
        left, count = left[~near[leader]], count + 1
    return owner


def _modes(owner: np.ndarray, known: Floats, hits: Floats) -> Floats:
    """``(k, 2)``: the share of each mode among catastrophes of equal weight, and among hits, by the nearest."""
    count = int(owner.max()) + 1
    given = np.bincount(owner, minlength=count) / len(owner)
    if not len(hits):
        return np.column_stack([given, np.zeros(count)])
    nearest = owner[cKDTree(known).query(hits)[1]]
    return np.column_stack([given, np.bincount(nearest, minlength=count) / len(hits)])
