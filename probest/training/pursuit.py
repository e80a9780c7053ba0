r"""Guides that pursue the catastrophes of a model while it trains: their lower bound of log P is what it steps down.

*Idea.* In place of particles (:mod:`probest.training.ladder`), a few Gaussian guides follow the event softened by
noise, :math:`\Phi(s/\sigma)`, σ as on the ladder's last rung. At each step every guide draws K points, steps up its
bound (:mod:`probest.guides.variational`), and the model steps down

.. math:: L = \log \sum_k p_k \frac{1}{M_k} \sum_{m} e^{L_m},

k the strata, m the guides in each: a lower bound of log P softened, since each :math:`L_m` is. What a draw counts in
the model's gradient is its weight under the logarithm times its guide's share of L.

Guides start at draws of the adversary; the one with the lowest bound of each stratum starts again every now and then,
and catastrophes that looks find become the means of the lowest ones.

*When it fails.* A bound only sees what its guides see: a mode that none of them has met is not stepped down. A guide
has one mode, so that where they are many the bound is low, and steps from one to the next. The ladder is the better
follower there; this one is cheaper where few directions matter, and its loss is a number with a meaning.

Reference: Burda, Grosse & Salakhutdinov (2016) and Tucker, Lawson, Gu & Maddison (2019), as in the guides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from scipy.special import log_ndtr, ndtri_exp

from probest.backends.base import Hard
from probest.diagnostics import log_sum_exp, systematic_resample
from probest.evidence import Evaluation, Floats, Particles
from probest.guides.variational import Adam, GaussianGuide, gradient_at, informed
from probest.programs.event import Event
from probest.programs.strata import Strata
from probest.smc.softening import Noise
from probest.training.follower import Cases, averaged, hard, in_strata, learn_spread, spread_of
from probest.tuning import tuned

__all__ = ["Pursuit", "PursuitTuning"]

_BY = "bounds.py --parts training"


@dataclass(frozen=True)
class PursuitTuning:
    """How guides are built and moved."""

    draws: int = tuned(16, "K, of a guide a step", _BY)
    rank: int = tuned(8, "directions in which a guide has a width of its own", _BY)
    breadth: float = tuned(0.3, "σ, of what the severity changes over a deviation of z", _BY)
    memory: float = tuned(0.8, "of yesterday's bound that stays at each step", _BY)
    turned_every: int = tuned(20, "steps between which a guide keeps its directions", _BY)
    restart_every: int = tuned(25, "steps after which the lowest guide of each stratum starts again", _BY)


@dataclass
class Pursuit:
    """M guides; those of a stratum lie next to each other.

    strata, weighted, log_evidence: as in :class:`~probest.training.ladder.Ladder`. group ``(M,)``: the stratum of each
    guide. bound ``(M,)``: of each, averaged over recent steps; NaN before its first. spread ``(strata,)``: g of each.
    z, severity, weight ``(M · K, ...)``: the last draws, and their weights ũ under their guide's logarithm.
    """

    strata: Strata | None
    weighted: bool
    log_evidence: float
    guides: list[GaussianGuide]
    adams: list[Adam]
    group: np.ndarray
    bound: Floats
    spread: Floats
    z: Floats
    severity: Floats
    weight: Floats
    steps: int = 0
    tuning: PursuitTuning = field(default_factory=PursuitTuning)

    @classmethod
    def built(
        cls,
        event: Event,
        strata: Strata | None,
        particles: int,
        rng: np.random.Generator,
        *,
        log_evidence: float = 0.0,
        tuning: PursuitTuning | None = None,
    ) -> Pursuit:
        """Guides with about ``particles`` draws a step, at least one a stratum."""
        tuning = tuning or PursuitTuning()
        groups = 1 if strata is None else len(strata)
        each = max(1, particles // (tuning.draws * groups))
        group = np.repeat(np.arange(groups), each)
        basis = np.eye(event.dim)[:, : min(tuning.rank, event.dim)]
        guides = [GaussianGuide.standard(rng.standard_normal(event.dim), basis) for _ in group]
        rows = len(group) * tuning.draws
        return cls(
            strata=strata,
            weighted=event.weighted or (strata is not None and strata.varies),
            log_evidence=log_evidence if strata is None else strata.log_evidence,
            guides=guides,
            adams=[Adam.of(guide) for guide in guides],
            group=group,
            bound=np.full(len(group), math.nan),
            spread=np.full(groups, math.nan),
            z=np.zeros((rows, event.dim)),
            severity=np.full(rows, math.nan),
            weight=np.full(rows, 1.0 / tuning.draws),
            tuning=tuning,
        )

    @property
    def log_prob(self) -> float:
        """The best bound of each stratum, from the softened event to the event as for a half-space, added up.

        NaN before the first step.
        """
        if np.isnan(self.bound).all():
            return math.nan
        share = np.zeros(1) if self.strata is None else self.strata.log_prob
        known = np.where(np.isnan(self.bound), -np.inf, self.bound)
        best = np.array([known[self.group == k].max() for k in range(len(share))])
        if self.weighted:  # a conditioned stratum has its p_k in its weights
            return float(self._hard(np.array(log_sum_exp(best) - self.log_evidence)))
        return min(log_sum_exp(share + self._hard(best)), 0.0)

    def _hard(self, soft: Floats) -> Floats:
        """log Φ(−β) from log Φ(−β / √(1 + b²))."""
        distance = -ndtri_exp(np.minimum(soft, -1e-12)) * math.sqrt(1.0 + self.tuning.breadth**2)
        return np.asarray(log_ndtr(-distance))

    def cases(self) -> Cases:
        """The last draws, with what training on them takes."""
        draws = self.tuning.draws
        terms = self._terms()
        share = (
            np.exp(terms - log_sum_exp(terms)) if np.isfinite(terms).any() else np.full(len(terms), 1.0 / len(terms))
        )
        group = np.repeat(self.group, draws)
        held = {} if self.strata is None else self.strata.held(group)
        weight = np.repeat(share, draws) * self.weight
        return Cases(self.z.copy(), held, self.severity.copy(), self.noise_of(group), weight, group)

    def pressure(self, event: Event, cases: Cases) -> Hard:
        """All of them."""
        return hard(event, cases)

    def advance(self, event: Event, rng: np.random.Generator) -> None:
        """Every guide draws on the event as it is now, and steps up its bound."""
        tuning, dim = self.tuning, self.z.shape[1]
        if self.steps and self.steps % tuning.restart_every == 0:
            self._restart(rng)
        noise = rng.standard_normal((len(self.guides), tuning.draws, dim))
        self.z = np.concatenate([guide.at(own) for guide, own in zip(self.guides, noise, strict=True)])
        found = self._evaluate(event, self.z, np.repeat(self.group, tuning.draws), gradient=True)
        self._learn_spread(found)
        self.severity = found.severity
        for m, guide in enumerate(self.guides):
            rows = slice(m * tuning.draws, (m + 1) * tuning.draws)
            own = Evaluation(*(None if column is None else column[rows] for column in found))  # type: ignore[arg-type]
            soft = Noise(1.0 / float(self.noise_of(self.group[m : m + 1])[0]))
            here = gradient_at(guide, noise[m], self.z[rows], own, soft, draws=tuning.draws)
            self.weight[rows] = here.weight
            before = self.bound[m] if math.isfinite(self.bound[m]) else math.nan
            self.bound[m] = averaged(before, here.value, tuning.memory)
            self.guides[m] = self.adams[m].step(guide, here.guide)
            if self.steps % tuning.turned_every == 0 and own.severity_grad is not None:
                self.guides[m] = self.guides[m].turned(self._basis(own.severity_grad, guide))
        self.steps += 1

    def severity_of(self, event: Event, z: Floats, group: np.ndarray) -> Floats:
        """Severities ``(n,)`` at z ``(n, dim)`` in the strata ``group`` ``(n,)``, a call each."""
        return self._evaluate(event, z, group, gradient=False).severity

    def noise_of(self, group: np.ndarray) -> Floats:
        """σ in the strata ``group`` ``(n,)``; the usual one where nothing is known yet."""
        return self.tuning.breadth * spread_of(self.spread, group)

    def welcome(self, particles: Particles, rng: np.random.Generator) -> None:
        """Catastrophes that another search found become the means of the lower half of the guides of their strata."""
        z = particles.z[systematic_resample(particles.log_weight, len(self.guides), rng)]
        group = np.zeros(len(z), dtype=np.intp) if self.strata is None else self.strata.index_of(z)
        for k in np.unique(group[group >= 0]):
            mine, found = np.flatnonzero(self.group == k), z[group == k]
            low = mine[np.argsort(np.where(np.isnan(self.bound[mine]), -np.inf, self.bound[mine]))]
            for m, row in zip(low[: max(1, len(mine) // 2)], range(len(found)), strict=False):
                self._start(int(m), np.asarray(found[row]))

    # State ------------------------------------------------------------------------------------------------------------

    def arrays(self) -> dict[str, np.ndarray]:
        """All that changes, by name, for a checkpoint."""
        out = {name: getattr(self, name) for name in ("group", "bound", "spread", "z", "severity", "weight")}
        for name in ("mean", "basis", "factor"):
            out[name] = np.stack([getattr(guide, name) for guide in self.guides])
        out["adam_mean"], out["adam_square"] = (
            np.stack([getattr(a, n) for a in self.adams]) for n in ("mean", "square")
        )
        out["adam_steps"] = np.array([adam.steps for adam in self.adams])
        return out | {"steps": np.array(self.steps)}

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Raises ValueError if these are of other guides."""
        wanted = (len(self.guides), *self.guides[0].basis.shape)
        if "basis" not in arrays or arrays["basis"].shape != wanted:
            shape = arrays["basis"].shape if "basis" in arrays else None
            raise ValueError(f"the guides have shape {shape}; this run has {wanted}")
        for name in ("group", "bound", "spread", "z", "severity", "weight"):
            setattr(self, name, arrays[name].copy())
        self.guides = [
            GaussianGuide(*parts) for parts in zip(arrays["mean"], arrays["basis"], arrays["factor"], strict=True)
        ]
        states = zip(arrays["adam_mean"], arrays["adam_square"], arrays["adam_steps"], strict=True)
        self.adams = [Adam(mean, square, int(steps)) for mean, square, steps in states]
        self.steps = int(arrays["steps"])

    # Parts of a step --------------------------------------------------------------------------------------------------

    def _evaluate(self, event: Event, z: Floats, group: np.ndarray, *, gradient: bool) -> Evaluation:
        return in_strata(event, self.strata, self.weighted, z, group, gradient=gradient)

    def _learn_spread(self, found: Evaluation) -> None:
        """g of each stratum: the median slope at its guides' draws."""
        assert found.severity_grad is not None
        slope = np.linalg.norm(found.severity_grad, axis=1)
        learn_spread(self.spread, slope, np.repeat(self.group, self.tuning.draws), self.tuning.memory)

    def _basis(self, slopes: Floats, guide: GaussianGuide) -> Floats:
        """Directions of the gradients at its draws, and of its mean."""
        norm = np.linalg.norm(slopes, axis=1, keepdims=True)
        known = slopes / np.where(norm > 0.0, norm, 1.0)
        found = informed(np.concatenate([known, guide.mean[None]]), self.tuning.rank)
        missing = guide.basis.shape[1] - found.shape[1]
        if missing:
            rest = guide.basis - found @ (found.T @ guide.basis)
            found = np.column_stack([found, np.linalg.svd(rest, full_matrices=False)[0][:, :missing]])
            found = np.linalg.qr(found)[0]
        return np.asarray(found)

    def _restart(self, rng: np.random.Generator) -> None:
        """The lowest guide of each stratum that has several starts again at a draw."""
        for k in np.unique(self.group):
            mine = np.flatnonzero(self.group == k)
            if len(mine) > 1:
                lowest = int(np.argmin(np.where(np.isnan(self.bound[mine]), np.inf, self.bound[mine])))
                fresh: Floats = rng.standard_normal(self.z[0].shape)
                self._start(int(mine[lowest]), fresh)

    def _start(self, m: int, mean: Floats) -> None:
        self.guides[m] = GaussianGuide.standard(mean, self.guides[m].basis)
        self.adams[m] = Adam.of(self.guides[m])
        self.bound[m] = math.nan

    def _terms(self) -> Floats:
        """log of p_k exp(L_m) / M_k of each guide; those that have just started count nothing."""
        share = np.zeros(1) if self.strata is None else self.strata.log_prob
        log_p = np.zeros(len(share)) if self.weighted else share  # a conditioned stratum has its p_k in its weights
        counts = np.bincount(self.group, minlength=len(share))
        return np.asarray(
            log_p[self.group] - np.log(counts[self.group]) + np.where(np.isnan(self.bound), -np.inf, self.bound)
        )
