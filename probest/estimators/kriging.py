r"""Kriging: programs whose randomness is discrete, with too many combinations of values to ask about each.

The combinations v can be listed, with their exact probabilities p(v), and what the model does at most of them follows
from what it does at some: a Gaussian process over the sites' values (:mod:`probest.surrogates.kriging`) predicts the
severity of all. With h(v) the probability, by it, that v is a catastrophe,

1. *Explore*: the likeliest combinations, and others chosen ever more evenly.
2. *Learn*: ask where p h and where h alone are large, fit again, and so on, until Σ p h over all that were not asked is
   a small part of what was found, or three quarters of the budget are spent. How wrong predictions are is seen from the
   cases asked, each predicted without itself; a Student law of these errors gives h.
3. *Weigh*: of all others each is asked with a probability π(v) ∝ p √h, up to 1, and

   .. math:: \hat P = \sum_{\text{asked before}} p \, \mathbf 1_C + \sum_{\text{asked now}} \frac{p}{\pi} \mathbf 1_C

   has mean P whatever the process is worth (Horvitz & Thompson 1952). Its error is the larger of what the sample shows
   and of what the process expects of those that were not asked.

What was found is a bound from below without any doubt, and with all that was not asked it is one from above. Where the
process predicts badly, its own estimate of what is left is large, and the answer is not converged. It fails where
catastrophes are isolated: combinations whose neighbours say nothing of them.

References: Horvitz & Thompson (1952), A generalization of sampling without replacement from a finite universe; Echard,
Gayton & Lemaire (2011), AK-MCS: an active learning reliability method combining Kriging and Monte Carlo simulation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import IntEnum
from typing import ClassVar

import numpy as np
from scipy import stats

from probest import diagnostics
from probest.budget import Meter, UndefinedError
from probest.estimators.base import Need, check_least, check_needs, check_precision
from probest.evidence import Code, EventLike, Evidence, Floats, Note, Particles, Run
from probest.programs.event import Event
from probest.programs.strata import Strata, placed, strata_of
from probest.seeds import child_seed, generator
from probest.surrogates.kriging import Grid, Law, fit_law, krige
from probest.tuning import tuned
from probest.verdict import imprecise, wanted_error

__all__ = ["Kriging", "KrigingTuning", "combinations"]

_ENUMERABLE = "enumerable.py"
_CATEGORIES = ("Bernoulli", "Categorical", "OneHotCategorical")


class Stream(IntEnum):
    """Names of the seeds of a run."""

    LEARN = 0
    WEIGH = 1
    PLACE = 2


@dataclass(frozen=True)
class KrigingTuning:
    """How combinations are chosen. Set by hand on two networks of benchmarks/enumerable.py."""

    explored: float = tuned(0.1, "of the budget, for exploring", _ENUMERABLE)
    powers: tuple[float, ...] = tuned((1.0, 0.5, 0.2, 0.0), "of p, by which each part of that is chosen", _ENUMERABLE)
    learned: float = tuned(0.75, "of the budget, at most, for exploring and learning", _ENUMERABLE)
    rounds: int = tuned(6, "of learning, at most", _ENUMERABLE)
    likely: float = tuned(0.5, "of a round, that goes by p h; a power of p for the others", _ENUMERABLE)
    power: float = tuned(0.3, "of p, there", _ENUMERABLE)
    fitted: int = tuned(400, "cases from which the law of the process is learned", _ENUMERABLE)
    searched: int = tuned(12, "rounds of that search", _ENUMERABLE)
    known: int = tuned(3_000, "cases that predictions are made from, at most: their cube is the time", _ENUMERABLE)
    telling: float = tuned(0.5, "of these, with the largest predictions, whose errors are looked at", _ENUMERABLE)
    left: float = tuned(0.2, "times the precision, as a share of P, that may be left to weigh", _ENUMERABLE)
    least: float = tuned(1e-9, "h of any combination, where it is chosen", _ENUMERABLE)
    checked: int = tuned(500, "combinations that are asked in the last step, at least", _ENUMERABLE)
    surprised: float = tuned(4.0, "standard deviations beyond the hits expected of them, that refute", _ENUMERABLE)
    particles: int = tuned(400, "catastrophes that are kept", "memory")


@dataclass(frozen=True)
class Kriging:
    """Ask where a Gaussian process over discrete sites expects catastrophes.

    precision: wanted standard error of log P; None spends the budget. most: combinations that are listed, at most.
    tuning: how they are chosen.
    """

    precision: float | None = 0.05
    most: int = 2**20
    tuning: KrigingTuning = field(default_factory=KrigingTuning, repr=False)
    needs: ClassVar[frozenset[Need]] = frozenset({"unconditioned"})

    def __post_init__(self) -> None:
        check_precision(self.precision)
        check_least(self, most=2)

    @property
    def name(self) -> str:
        return "kriging"

    def run(self, event: EventLike, *, budget: int, seed: np.random.SeedSequence) -> Run:
        """Explore, learn, weigh.

        Raises ValueError where the event is no program, or has other randomness than discrete sites whose values are
        all listed, or more than ``most`` combinations of these, or probabilities that a closed loop decides.
        """
        check_needs(self, event)
        meter = Meter(event, budget)
        count = combinations(event)
        if not isinstance(event, Event) or not 2 <= count <= self.most:
            raise ValueError(
                "Kriging needs a program of discrete sites alone, whose values can be listed, with at most "
                f"most={self.most} combinations: use the default estimator"
            )
        before = event.model_calls
        strata = strata_of(event, self.most)
        meter.charge(event.model_calls - before)
        if strata is None or len(strata.free):
            raise ValueError("Kriging: the combinations of values cannot be listed: use the default estimator")
        return Run.of(_Campaign(self, event, strata, meter, seed).run())


def combinations(event: EventLike) -> int:
    """How many combinations of values a program of discrete sites alone has; 0 where they cannot be listed."""
    if not isinstance(event, Event) or event.composition.interleaved:
        return 0
    if not all(site.choices and site.complete for site in event.sites):
        return 0
    return math.prod(len(site.choices) ** site.elements for site in event.sites)


@dataclass
class _Campaign:
    """One run. Combinations are in the order of the strata, the likeliest first."""

    method: Kriging
    event: Event
    strata: Strata
    meter: Meter
    seed: np.random.SeedSequence

    def __post_init__(self) -> None:
        self.tuning = self.method.tuning
        self.log_p = self.strata.log_prob
        elements = [site for site in self.strata.sites for _ in range(site.elements)]
        self.grid = Grid(
            tuple(tuple(site.choices) for site in elements),
            tuple(
                site.distribution.removesuffix("Probs").removesuffix("Logits") not in _CATEGORIES for site in elements
            ),
        )
        columns = [site.coded(self.strata.values[site.name]) for site in self.strata.sites]
        values = np.concatenate(columns, axis=1).astype(np.int64).T
        self.v = np.stack(
            [np.searchsorted(listed, column) for listed, column in zip(self.grid.values, values, strict=True)], axis=1
        )
        self.at = np.ravel_multi_index(tuple(self.v.T), tuple(len(listed) for listed in self.grid.values))
        self.asked = np.zeros(len(self.log_p), dtype=np.bool_)
        self.severity = np.full(len(self.log_p), -np.inf)
        self.law: Law | None = None
        self.log_h = np.zeros(len(self.log_p))

    def run(self) -> Evidence:
        rng = generator(child_seed(self.seed, Stream.LEARN))
        if self.meter.left >= len(self.log_p):
            self._ask(np.arange(len(self.log_p)))
            return self._conclude(np.ones(len(self.log_p)), [])
        self._explore(rng)
        self._learn(rng)
        return self._weigh(generator(child_seed(self.seed, Stream.WEIGH)))

    # --- asking ----------------------------------------------------------------------------------------------------

    def _ask(self, k: np.ndarray) -> None:
        self.meter.charge(len(k))
        found = self.event.evaluate(np.zeros((len(k), self.event.dim)), held=self.strata.held(k)).severity
        if np.isnan(found).any():
            raise UndefinedError("the severity is NaN: return a number, or -inf where there can be no catastrophe")
        self.severity[k], self.asked[k] = found, True

    def _choose(self, log_weight: Floats, n: int, rng: np.random.Generator) -> None:
        """Ask about n more, one after the other with probabilities in proportion to the weights of what is left."""
        left = np.flatnonzero(~self.asked)
        n = min(n, len(left), self.meter.left)
        if n < 1:
            return
        keys = log_weight[left] + rng.gumbel(size=len(left))
        self._ask(left[np.argpartition(-keys, n - 1)[:n]])

    def _explore(self, rng: np.random.Generator) -> None:
        powers = self.tuning.powers
        n = max(1, int(self.tuning.explored * self.meter.budget / len(powers)))
        for power in powers:
            self._choose(power * self.log_p, n, rng)

    def _learn(self, rng: np.random.Generator) -> None:
        tuning = self.tuning
        each = int((tuning.learned - tuning.explored) * self.meter.budget / tuning.rounds)
        for i in range(tuning.rounds + 1):
            self._predict(rng)
            if i == tuning.rounds or self._settled or each < 2:
                return
            likely = int(tuning.likely * each)
            self._choose(self.log_p + self.log_h, likely, rng)
            self._choose(tuning.power * self.log_p + self.log_h, each - likely, rng)

    @property
    def _settled(self) -> bool:
        """Whether what the process expects of all that was not asked is too little to matter."""
        if self.method.precision is None:
            return False
        return self._expected < math.log(self.tuning.left * self.method.precision) + self._found

    @property
    def _found(self) -> float:
        """log of the probability of all catastrophes found."""
        hits = self.severity >= 0.0
        return diagnostics.log_sum_exp(self.log_p[hits]) if hits.any() else -math.inf

    @property
    def _expected(self) -> float:
        """log of the probability of catastrophes among those that were not asked, by the process."""
        left = ~self.asked
        return diagnostics.log_sum_exp((self.log_p + self.log_h)[left]) if left.any() else -math.inf

    # --- predicting ------------------------------------------------------------------------------------------------

    def _predict(self, rng: np.random.Generator) -> None:
        """Fit the process to what was asked, and set ``log_h``."""
        tuning = self.tuning
        asked = np.flatnonzero(self.asked)
        y = self._scaled(self.severity[asked])
        if np.ptp(y) == 0.0:
            return
        rows = np.arange(len(y))
        if len(y) > tuning.known:  # the nearest to the limit, and others
            order = np.argsort(np.abs(y), kind="stable")
            half = tuning.known // 2
            rows = np.concatenate([order[:half], rng.choice(order[half:], tuning.known - half, replace=False)])
        few = rng.choice(rows, min(len(rows), tuning.fitted), replace=False)
        v = self.v[asked]
        self.law = fit_law(self.grid, v[few], y[few] - y[few].mean(), self.law, tuning.searched)
        kriged = krige(self.grid, self.law, v[rows], y[rows])
        error = y[rows] - kriged.left_out
        top = kriged.left_out >= np.quantile(kriged.left_out, 1.0 - tuning.telling)
        freedom, scale = _student(error[top])
        self.log_h = stats.t.logcdf(kriged.mean[self.at] / scale, freedom)

    def _scaled(self, severity: Floats) -> Floats:
        """Severities on a scale on which the far ones count for less; the limit stays 0."""
        finite = severity[np.isfinite(severity)]
        near = float(np.median(np.abs(finite))) if len(finite) else 1.0
        scaled = np.arcsinh(severity / max(near, 1e-300))
        return np.clip(scaled, -50.0, 50.0)

    # --- weighing --------------------------------------------------------------------------------------------------

    def _weigh(self, rng: np.random.Generator) -> Evidence:
        left = np.flatnonzero(~self.asked)
        weight = np.exp(self.log_p[left] + 0.5 * np.maximum(self.log_h[left], math.log(self.tuning.least)))
        chance = self._chances(weight, left)
        taken = rng.random(len(left)) < chance
        taken[np.flatnonzero(taken)[self.meter.left :]] = False  # seldom, and few: the sum of chances leaves room
        fresh = left[taken]
        self._ask(fresh)
        whole = np.ones(len(self.log_p))
        whole[left] = chance
        surprised = self._surprised(fresh)
        self._predict(rng)
        return self._conclude(whole, surprised)

    def _chances(self, weight: Floats, left: np.ndarray) -> Floats:
        """Of each to be asked: as few as the precision takes, by the process."""
        room = self.meter.left - 3.0 * math.sqrt(self.meter.left)
        most = _capped(weight, max(1.0, room))
        precision = self.method.precision
        if precision is None or not math.isfinite(self._found):
            return most
        size = min(room, float(self.tuning.checked))
        h, p = np.exp(self.log_h[left]), np.exp(self.log_p[left] - self._found)
        while size < room:
            chance = _capped(weight, size)
            if math.sqrt(_variance(h, p, chance)) <= 0.5 * precision:
                return chance
            size *= 1.5
        return most

    def _conclude(self, chance: Floats, notes: list[Note]) -> Evidence:
        hits = np.flatnonzero((self.severity >= 0.0) & self.asked)
        weight = self.log_p[hits] - np.log(chance[hits])
        left = np.flatnonzero(~self.asked)
        rest = diagnostics.log_sum_exp(self.log_p[left]) if len(left) else -math.inf
        rest = float(np.logaddexp(rest, self.strata.left_out))
        log_prob = diagnostics.log_sum_exp(weight) if len(hits) else -math.inf
        expected = self._expected
        figures = {
            "asked": float(self.asked.sum()),
            "combinations": float(len(self.log_p)),
            "hits": float(len(hits)),
            "found": self._found,
            "expected": expected,
        }
        if not len(hits):
            note = Note(Code.NO_HITS, "no catastrophe was found: raise the budget.")
            return Evidence.nothing(
                self.method.name,
                note,
                calls=self.meter.calls,
                seconds=self.meter.seconds,
                upper=min(rest, 0.0),
                diagnostics=figures,
            )
        shown = float(np.sum(np.exp(2.0 * (weight - log_prob)) * (1.0 - chance[hits])))
        drawn = np.flatnonzero(chance < 1.0)
        h, p = np.exp(self.log_h[drawn]), np.exp(self.log_p[drawn] - log_prob)
        by_process = _variance(h, p, chance[drawn])
        error = math.sqrt(max(shown, by_process))
        notes = [*notes, *imprecise(error, wanted_error(self.method.precision))]
        width = 1.96 * error
        return Evidence(
            method=self.method.name,
            log_prob=min(log_prob, 0.0),
            std_error=error,
            interval=(
                max(log_prob + math.log1p(-width) if width < 1.0 else -math.inf, self._found),
                min(max(log_prob + math.log1p(width), self._found), float(np.logaddexp(self._found, rest)), 0.0),
            ),
            claim="unbiased",
            calls=self.meter.calls,
            seconds=self.meter.seconds,
            converged=not notes,
            particles=self._particles(hits, weight - log_prob),
            diagnostics=figures,
            notes=tuple(notes),
            floor=self._found,
        )

    def _surprised(self, fresh: np.ndarray) -> list[Note]:
        """A note where more of what was asked last are catastrophes than the process said."""
        h = np.exp(self.log_h[fresh])
        hits, expected = float((self.severity[fresh] >= 0.0).sum()), float(h.sum())
        if hits <= expected + self.tuning.surprised * math.sqrt(float((h * (1.0 - h)).sum()) + 1.0):
            return []
        sentence = f"{hits:.0f} of the last asked are catastrophes and {expected:.1f} were foreseen: raise the budget."
        return [Note(Code.DISAGREE, sentence)]

    def _particles(self, hits: np.ndarray, log_w: Floats) -> Particles | None:
        rng = generator(child_seed(self.seed, Stream.PLACE))
        chosen, share = diagnostics.thinned(np.exp(log_w), self.tuning.particles)
        rows, log_w = hits[chosen], np.log(share)
        z = np.zeros((len(rows), self.event.dim))
        z, kept = placed(self.event, self.strata.sites, self.strata.held(rows), z, rng, varies=False)
        if not kept.any():
            return None
        return Particles(z[kept], log_w[kept] - diagnostics.log_sum_exp(log_w[kept]), self.severity[rows][kept])


def _student(error: Floats) -> tuple[float, float]:
    """Degrees of freedom and scale of a Student law of errors around 0."""
    typical = max(float(np.median(np.abs(error))), 1e-9)
    freedom, _, scale = stats.t.fit(error / typical, floc=0.0)
    return float(np.clip(freedom, 1.0, 30.0)), float(scale) * typical


def _variance(h: Floats, p: Floats, chance: Floats) -> float:
    """Expected variance of Σ p 1/π over those asked, where each is a catastrophe with probability h."""
    return float(np.sum(h * p**2 * (1.0 - chance) / chance))


def _capped(weight: Floats, total: float) -> Floats:
    """Probabilities in proportion to weights, at most 1, that sum to ``total``."""
    if total >= len(weight):
        return np.ones(len(weight))
    order = np.argsort(-weight, kind="stable")
    ordered = weight[order]
    tail = np.cumsum(ordered[::-1])[::-1]
    sure = np.arange(len(weight))
    with np.errstate(divide="ignore"):
        factor = (total - sure) / tail
    fits = np.flatnonzero(factor * ordered <= 1.0)  # the first that need not be sure
    k = int(fits[0]) if len(fits) else len(weight) - 1
    return np.asarray(np.minimum(1.0, np.maximum(factor[k] * weight, 1e-300)))
