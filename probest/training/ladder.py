r"""A ladder of particles that follows the catastrophes, and what leads to them, while a model changes.

*Idea.* Training moves the event a little at each step, so its catastrophes need not be found anew. On rung j = 1..J of
the ladder a particle follows

.. math:: \pi_j \propto \varphi(z)\, w(z)^{j/J}\, \Phi(s(z)/\sigma_j), \qquad
          \sigma_j = g \sqrt{J (1 + b^2)/j - 1},

g what the severity changes over one standard deviation of z, b the *breadth* of the last rung. For a half-space at any
distance these widths are equal steps of :math:`\log P_j`: its rung j has :math:`\log P_j \approx (j/J) \log P_J`, and
:math:`\log P_J \approx \log P / (1 + b^2)`. So the first rungs hold what one draw in ten or so reaches and the last
ones what is all but a catastrophe, and a model that is trained on all of them is not chased from one mode to the next.

*Moves.* Every particle takes a preconditioned Crank–Nicolson Langevin step on its own rung; fresh draws of the
adversary are offered to the first rung, which they replace almost altogether; particles of neighbouring rungs change
places (parallel tempering). A mode that opens anywhere thus reaches the last rung by itself, without a search: all of
it leaves π_j as it is. What this costs is two gradients a particle and one call a fresh draw, at every step alike.

*Strata.* A *column* has one particle on each rung and, where the program has discrete sites, the values of one stratum.
Columns are given to strata in proportion to a share, half of it p_k P_k / P, the other half the same for all: a stratum
in which nothing happens today is where it happens next. Where there are more strata than columns, columns are lent.

*What it says.* The product of the mean weights from rung to rung, each averaged over recent steps, is :math:`P_j`.
With :math:`x_j = j / (J (1 + b^2))`, the index :math:`-\Phi^{-1}(P_j)` over :math:`\sqrt{x_j}` is the distance of a
half-space, and nearly linear in x elsewhere: the last rungs, continued to x = 1, are what the run shows as log P. It is
at most log 2P_J, since Φ(s/σ) is a half or more on the event. It follows, it does not estimate: what is reported is
never taken from here.

*When it fails.* A severity that is flat where draws fall gives nothing to climb, and a narrow mode that no fresh draw
leads to is met only by a fresh look or an audit, whose catastrophes join the last rungs (:meth:`Ladder.welcome`).

*Text* has no gradient in z. There a move draws anew all tokens from a random one on, or that one alone (as
:class:`probest.Splitting` does), and g is the standard deviation of fresh draws' severities.

References: Geyer (1991), Markov chain Monte Carlo maximum likelihood (parallel tempering); Cotter, Roberts, Stuart &
White (2013), MCMC methods for functions (pCNL); Tieleman (2008), Training restricted Boltzmann machines using
approximations to the likelihood gradient (particles that persist from step to step).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from scipy.special import log_ndtr, ndtri_exp

from probest.backends.base import Hard
from probest.diagnostics import log_sum_exp, systematic_resample
from probest.evidence import Evaluation, Floats, Particles
from probest.programs.event import Event
from probest.programs.strata import Strata
from probest.smc.moves import rewritten
from probest.smc.softening import Noise
from probest.training.follower import Cases, averaged, hard, in_strata, learn_spread, spread_of
from probest.tuning import tuned

__all__ = ["Ladder", "LadderTuning"]

_BY = "benchmarks/below_one_over_n.py, digits, 1.0M calls"
_HALF_PI = 0.5 * math.pi


@dataclass(frozen=True)
class LadderTuning:
    """How a ladder is built and moved."""

    rungs: int = tuned(8, "rungs", _BY)
    breadth: float = tuned(0.3, "b: width of the last rung, of what the severity changes over a deviation of z", _BY)
    fresh: int = tuned(16, "fresh draws a column and step", _BY)
    even: float = tuned(0.5, "of the columns that strata have whatever their probability of catastrophe", _BY)
    acceptance: float = tuned(0.55, "that steps aim at (Roberts & Rosenthal 1998: 0.574)", _BY)
    memory: float = tuned(0.9, "of yesterday's averages that stays at each step", _BY)
    continued: int = tuned(3, "rungs, the last, that are continued to the event for log P", _BY)
    rewrites: int = tuned(4, "moves of a text a step, for the calls that gradients take elsewhere", "language.py")
    lend_every: int = tuned(10, "steps between which columns keep their stratum", _BY)


@dataclass
class Ladder:
    """``z`` is ``(columns, rungs, dim)``.

    strata: None where no sites are held. weighted: whether log-weights count; log_evidence: then, of the adversary's
    observations. group ``(columns,)``: the stratum of each column. share ``(columns,)``: its part of the gradient.
    angle ``(rungs,)``: of the steps. spread ``(strata,)``: g of each, NaN where no column has been. ratio ``(strata,
    rungs)``: mean weights from the rung before. severity, log_weight ``(columns, rungs)``: at the last step.
    """

    strata: Strata | None
    weighted: bool
    log_evidence: float
    z: Floats
    group: np.ndarray
    share: Floats
    angle: Floats
    spread: Floats
    ratio: Floats
    severity: Floats
    log_weight: Floats
    steps: int = 0
    tuning: LadderTuning = field(default_factory=LadderTuning)

    @classmethod
    def built(
        cls,
        event: Event,
        strata: Strata | None,
        particles: int,
        rng: np.random.Generator,
        *,
        log_evidence: float = 0.0,
        tuning: LadderTuning | None = None,
    ) -> Ladder:
        """A ladder of about ``particles`` draws of the adversary, still to be moved.

        log_evidence: of the adversary's observations, where it has any and no strata.
        """
        tuning = tuning or LadderTuning()
        rungs = min(tuning.rungs, particles)
        columns, groups = max(1, particles // rungs), 1 if strata is None else len(strata)
        ladder = cls(
            strata=strata,
            weighted=event.weighted or (strata is not None and strata.varies),
            log_evidence=log_evidence if strata is None else strata.log_evidence,
            z=rng.standard_normal((columns, rungs, event.dim)),
            group=np.zeros(columns, dtype=np.intp),
            share=np.full(columns, 1.0 / columns),
            angle=np.full(rungs, 0.3),
            spread=np.full(groups, math.nan),
            ratio=np.full((groups, rungs), math.nan),
            severity=np.full((columns, rungs), math.nan),
            log_weight=np.zeros((columns, rungs)),
            tuning=tuning,
        )
        ladder._lend(rng)
        return ladder

    @property
    def log_prob(self) -> float:
        """log P as the ladder follows it; NaN before its first step."""
        level = self._levels()
        if np.isnan(level).all():
            return math.nan
        known = np.where(np.isnan(level), -math.inf, level)
        return min(log_sum_exp(self._log_share() + known), 0.0)

    def cases(self) -> Cases:
        """The particles of all rungs, with what training on them takes."""
        rungs, dim = self.z.shape[1:]
        group = np.repeat(self.group, rungs)
        return Cases(
            self.z.reshape(-1, dim).copy(),
            {} if self.strata is None else self.strata.held(group),
            self.severity.reshape(-1).copy(),
            self._width().reshape(-1),
            np.repeat(self.share, rungs) / rungs,
            group,
        )

    def pressure(self, event: Event, cases: Cases) -> Hard:
        """All of them."""
        return hard(event, cases)

    def advance(self, event: Event, rng: np.random.Generator) -> None:
        """Move every particle on the event as it is now, and let fresh draws in."""
        rungs, dim = self.z.shape[1:]
        group = np.repeat(self.group, rungs)
        at = self._evaluate(event, self.z.reshape(-1, dim), group, gradient=not event.is_text)
        if event.is_text:
            self._rewrite(event, at, group, rng)
        else:
            self._learn_spread(at)
            self._climb(event, at, group, self._width(), rng)
        width = self._width()
        first = self._welcome_draws(event, width, rng)
        self._learn_ratio(first, width)
        self._exchange(width, rng)
        self.steps += 1
        if self.steps % self.tuning.lend_every == 0:
            self._lend(rng)

    def severity_of(self, event: Event, z: Floats, group: np.ndarray) -> Floats:
        """Severities ``(n,)`` at z ``(n, dim)`` in the strata ``group`` ``(n,)``, a call each."""
        return self._evaluate(event, z, group, gradient=False).severity

    def noise_of(self, group: np.ndarray) -> Floats:
        """σ of the last rung in the strata ``group`` ``(n,)``; the usual one where no column has been."""
        return self.tuning.breadth * spread_of(self.spread, group)

    def welcome(self, particles: Particles, rng: np.random.Generator) -> None:
        """Put catastrophes that another search found on the last rung, as many as there are columns at most."""
        columns = len(self.z)
        chosen = systematic_resample(particles.log_weight, columns, rng)
        z = particles.z[chosen]
        if self.strata is None:
            self.z[:, -1] = z
            return
        group = self.strata.index_of(z)
        for k in np.unique(group[group >= 0]):
            mine, found = np.flatnonzero(self.group == k), z[group == k]
            if len(mine):
                kept = min(len(mine), len(found))
                self.z[mine[:kept], -1] = found[:kept]

    # State ------------------------------------------------------------------------------------------------------------

    def arrays(self) -> dict[str, np.ndarray]:
        """All that changes, by name, for a checkpoint."""
        names = ("z", "group", "share", "angle", "spread", "ratio", "severity", "log_weight")
        return {name: getattr(self, name) for name in names} | {"steps": np.array(self.steps)}

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Raises ValueError if these are of another ladder."""
        if arrays["z"].shape != self.z.shape or arrays["spread"].shape != self.spread.shape:
            raise ValueError(f"the particles have shape {arrays['z'].shape}; this run has {self.z.shape}")
        for name, value in arrays.items():
            setattr(self, name, int(value) if name == "steps" else value)

    # Parts of a step --------------------------------------------------------------------------------------------------

    def _evaluate(self, event: Event, z: Floats, group: np.ndarray, *, gradient: bool) -> Evaluation:
        return in_strata(event, self.strata, self.weighted, z, group, gradient=gradient)

    def _learn_spread(self, at: Evaluation) -> None:
        """g of each stratum that has columns: the median slope on the further half of the rungs."""
        columns, rungs, _ = self.z.shape
        assert at.severity_grad is not None
        slope = np.linalg.norm(at.severity_grad, axis=1).reshape(columns, rungs)[:, rungs // 2 :]
        learn_spread(self.spread, slope.ravel(), np.repeat(self.group, slope.shape[1]), self._keep)

    def _learn_usual(self, severity: Floats) -> None:
        """g, from severities of draws of the adversary: their standard deviation."""
        usual = severity[np.abs(severity) < 1e100]
        if usual.size > 1 and usual.std() > 0.0:
            self.spread[:] = [averaged(old, float(usual.std()), self._keep) for old in self.spread]
        elif np.isnan(self.spread).any():
            self.spread[:] = 1.0

    def _width(self) -> Floats:
        """σ, ``(columns, rungs)``."""
        rungs, breadth = self.z.shape[1], self.tuning.breadth
        steps = np.sqrt(rungs * (1.0 + breadth**2) / np.arange(1, rungs + 1) - 1.0)
        return np.asarray(self.spread[self.group][:, None] * steps)

    def _power(self) -> Floats:
        rungs = self.z.shape[1]
        return np.asarray(np.arange(1, rungs + 1) / rungs)

    def _target(self, severity: Floats, log_weight: Floats, width: Floats) -> Floats:
        """log π without φ at severities and log-weights ``(columns, rungs)``; width says on which rung."""
        with np.errstate(invalid="ignore"):
            value = log_ndtr(severity / width) + self._power() * log_weight
        return np.asarray(np.where(np.isnan(value), -math.inf, value))

    def _drift(self, at: Evaluation, width: Floats) -> Floats:
        """Gradient of :meth:`_target` in z, its length capped: a function of the point alone, so moves stay exact."""
        assert at.severity_grad is not None
        shape = self.z.shape
        slope = Noise(1.0 / width).slope(at.severity.reshape(shape[:2]))
        with np.errstate(all="ignore"):
            drift = at.severity_grad.reshape(shape) * slope[..., None]
            if at.log_weight_grad is not None:
                drift += self._power()[:, None] * at.log_weight_grad.reshape(shape)
            cap = 1.5 * (math.sqrt(max(0.0, -2.0 * self._level())) + 1.0)
            norm = np.linalg.norm(drift, axis=2, keepdims=True)
            drift *= np.minimum(1.0, cap / np.maximum(norm, 1e-300))
        return np.asarray(np.where(np.isfinite(norm), drift, 0.0))

    def _level(self) -> float:
        """How far the catastrophe is, as a log-probability, for the longest drift that is believed."""
        log_prob = self.log_prob
        return log_prob if math.isfinite(log_prob) else -12.0

    def _climb(self, event: Event, at: Evaluation, group: np.ndarray, width: Floats, rng: np.random.Generator) -> None:
        """A preconditioned Crank–Nicolson Langevin step of every particle on its own rung."""
        columns, rungs, dim = self.z.shape
        angle = np.minimum(self.angle * (0.5 + rng.random((columns, rungs))), _HALF_PI)
        rho, sigma = np.cos(angle), np.sin(angle)
        drift = self._drift(at, width)
        proposal = sigma[..., None] * rng.standard_normal(self.z.shape)
        proposal += (1.0 - rho)[..., None] * drift + rho[..., None] * self.z
        there = self._evaluate(event, proposal.reshape(-1, dim), group, gradient=True)
        back = self._drift(there, width)
        share, half = (1.0 - rho) / sigma**2, 0.5 * (1.0 - rho)
        ahead = _dot(drift, proposal) - rho * _dot(drift, self.z) - half * _dot(drift, drift)
        behind = _dot(back, self.z) - rho * _dot(back, proposal) - half * _dot(back, back)
        severity, log_weight = at.severity.reshape(columns, rungs), at.log_weight.reshape(columns, rungs)
        new, new_weight = there.severity.reshape(columns, rungs), there.log_weight.reshape(columns, rungs)
        before = np.maximum(self._target(severity, log_weight, width), -1e300)
        log_ratio = self._target(new, new_weight, width) - before + share * (behind - ahead)
        accepted = self._accept(proposal, log_ratio, (severity, log_weight), (new, new_weight), rng)
        self.angle = np.clip(self.angle * np.exp(accepted - self.tuning.acceptance), 1e-3, _HALF_PI)

    def _rewrite(self, event: Event, at: Evaluation, group: np.ndarray, rng: np.random.Generator) -> None:
        """Every particle draws anew what follows a random place, or that place alone."""
        columns, rungs, dim = self.z.shape
        if self.steps == 0:
            self._learn_usual(at.severity)  # they are draws still
        width = self._width()
        old = at.severity.reshape(columns, rungs), at.log_weight.reshape(columns, rungs)
        for _ in range(self.tuning.rewrites):
            proposal = rewritten(self.z, rng)
            there = self._evaluate(event, proposal.reshape(-1, dim), group, gradient=False)
            new = there.severity.reshape(columns, rungs), there.log_weight.reshape(columns, rungs)
            log_ratio = self._target(*new, width) - np.maximum(self._target(*old, width), -1e300)
            self._accept(proposal, log_ratio, old, new, rng)
            old = self.severity, self.log_weight

    def _accept(
        self, proposal: Floats, log_ratio: Floats, old: tuple[Floats, Floats], new: tuple[Floats, Floats],
        rng: np.random.Generator,
    ) -> Floats:  # fmt: skip
        """Metropolis' rule, from severities and log-weights to others; the mean acceptance of each rung."""
        log_ratio = np.where(np.isnan(log_ratio), -math.inf, log_ratio)
        taken = np.log(rng.random(log_ratio.shape)) < log_ratio
        self.z[taken] = proposal[taken]
        self.severity, self.log_weight = (np.where(taken, a, b) for a, b in zip(new, old, strict=True))
        return np.asarray(np.exp(np.minimum(log_ratio, 0.0)).mean(axis=0))

    def _welcome_draws(self, event: Event, width: Floats, rng: np.random.Generator) -> Floats:
        """Offer fresh draws to the first rung, one after the other; returns the log of each column's mean weight."""
        columns, rungs, dim = self.z.shape
        count = self.tuning.fresh
        z = rng.standard_normal((columns, count, dim))
        found = self._evaluate(event, z.reshape(-1, dim), np.repeat(self.group, count), gradient=False)
        severity, log_weight = found.severity.reshape(columns, count), found.log_weight.reshape(columns, count)
        if event.is_text:
            self._learn_usual(severity)
        with np.errstate(invalid="ignore"):
            target = log_ndtr(severity / width[:, :1]) + log_weight / rungs
            here = log_ndtr(self.severity[:, 0] / width[:, 0]) + self.log_weight[:, 0] / rungs
        target, here = (np.where(np.isnan(value), -math.inf, value) for value in (target, here))
        log_u = np.log(rng.random((columns, count)))
        for j in range(count):
            taken = log_u[:, j] < target[:, j] - np.maximum(here, -1e300)
            self.z[taken, 0] = z[taken, j]
            self.severity[taken, 0], self.log_weight[taken, 0] = severity[taken, j], log_weight[taken, j]
            here = np.where(taken, target[:, j], here)
        return np.asarray(np.logaddexp.reduce(target, axis=1) - math.log(count))

    def _learn_ratio(self, first: Floats, width: Floats) -> None:
        """Average the mean weights from rung to rung, and from fresh draws to the first."""
        rungs = self.z.shape[1]
        with np.errstate(invalid="ignore"):
            ahead = log_ndtr(self.severity[:, :-1] / width[:, 1:]) - log_ndtr(self.severity[:, :-1] / width[:, :-1])
            ahead = ahead + self.log_weight[:, :-1] / rungs
        weight = np.exp(np.column_stack([first, np.where(np.isnan(ahead), -math.inf, ahead)]))
        for k in np.unique(self.group):
            new = weight[self.group == k].mean(axis=0)
            self.ratio[k] = [
                averaged(old, float(value), self._keep) for old, value in zip(self.ratio[k], new, strict=True)
            ]

    def _exchange(self, width: Floats, rng: np.random.Generator) -> None:
        """Particles of neighbouring rungs change places, in sweeps over even and odd pairs; no call is spent."""
        columns, rungs, _ = self.z.shape
        inverse, power = 1.0 / width, self._power()
        for sweep in range(2 * rungs):
            for j in range(sweep % 2, rungs - 1, 2):
                a, b = self.severity[:, j], self.severity[:, j + 1]
                with np.errstate(invalid="ignore"):
                    log_ratio = (
                        log_ndtr(b * inverse[:, j]) + log_ndtr(a * inverse[:, j + 1])
                        - log_ndtr(a * inverse[:, j]) - log_ndtr(b * inverse[:, j + 1])
                        + (power[j + 1] - power[j]) * (self.log_weight[:, j] - self.log_weight[:, j + 1])
                    )  # fmt: skip
                swap = np.log(rng.random(columns)) < np.where(np.isnan(log_ratio), -math.inf, log_ratio)
                for values in (self.z, self.severity, self.log_weight):
                    values[swap, j], values[swap, j + 1] = values[swap, j + 1].copy(), values[swap, j].copy()

    # Strata -----------------------------------------------------------------------------------------------------------

    def _lend(self, rng: np.random.Generator) -> None:
        """Give columns to strata, and each its share of the gradient."""
        if self.strata is None:
            return
        columns = len(self.z)
        count = len(self.strata)
        level = self._levels()
        worst = 0.0 if np.isnan(level).all() else float(np.nanmax(level))
        likely = self._log_share() + np.where(np.isnan(level), worst, level)
        share = np.exp(likely - log_sum_exp(likely))
        share = self.tuning.even / count + (1.0 - self.tuning.even) * share
        least = 1 if count <= columns else 0
        wanted = np.full(count, least)
        spare = columns - least * count
        if spare:
            beyond = np.maximum(share * columns - least, 0.0)
            with np.errstate(divide="ignore"):
                rows = systematic_resample(np.log(beyond), spare, rng)
            wanted += np.bincount(rows, minlength=count)
        have = np.bincount(self.group, minlength=count)
        if self.steps == 0:
            self.group = np.repeat(np.arange(count), wanted)
        else:
            self._move_columns(have - wanted, rng)
        self.share = share[self.group] / np.bincount(self.group, minlength=count)[self.group]
        self.share /= self.share.sum()

    def _move_columns(self, excess: np.ndarray, rng: np.random.Generator) -> None:
        """Columns of strata with too many become copies of one in a stratum with too few, or draws."""
        donors = [rng.permutation(np.flatnonzero(self.group == k))[: excess[k]] for k in np.flatnonzero(excess > 0)]
        free = list(np.concatenate(donors)) if donors else []
        for k in np.flatnonzero(excess < 0):
            sources = np.flatnonzero(self.group == k)
            for _ in range(-excess[k]):
                column = free.pop()
                if len(sources):
                    self.z[column] = self.z[rng.choice(sources)]
                else:
                    self.z[column] = rng.standard_normal(self.z.shape[1:])
                self.group[column] = k

    def _log_share(self) -> Floats:
        """log p_k of the strata, given the observations."""
        return np.zeros(1) if self.strata is None else self.strata.log_prob

    def _levels(self) -> Floats:
        """log P_k of each stratum, NaN where no column has been."""
        with np.errstate(divide="ignore"):
            joint = np.cumsum(np.log(self.ratio), axis=1)
        rungs = self.z.shape[1]
        x = np.arange(1, rungs + 1) / (rungs * (1.0 + self.tuning.breadth**2))
        last = slice(max(0, rungs - self.tuning.continued), rungs)
        if self.weighted:  # the rungs have the evidence to the power of j/J: only the last has all of it
            joint = joint - self.log_evidence - self._log_share()[:, None]
            last = slice(rungs - 1, rungs)
        basis = np.column_stack([np.ones(rungs), x])[last, : min(2, last.stop - last.start)]
        onwards = np.linalg.pinv(basis).T @ np.ones(basis.shape[1])
        with np.errstate(invalid="ignore"):
            distance = -ndtri_exp(np.minimum(joint[:, last], -1e-12)) / np.sqrt(x[last])
            level = log_ndtr(-(distance @ onwards))
        return np.asarray(np.minimum(np.minimum(level, joint[:, -1] + math.log(2.0)), 0.0))

    @property
    def _keep(self) -> float:
        """Of yesterday's averages: all steps count alike at first."""
        return min(self.tuning.memory, self.steps / (self.steps + 1.0))


def _dot(a: Floats, b: Floats) -> Floats:
    return np.asarray(np.einsum("ijk,ijk->ij", a, b), dtype=np.float64)
