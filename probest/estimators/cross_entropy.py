r"""The cross-entropy method over discrete sites: for programs with more combinations of values than can be listed.

With v the values of the discrete sites, u the coordinates that are left, and q(v, u) a guide,

.. math:: P = E_q\!\left[\mathbf 1_C \, \frac{p(v \mid u)\, \varphi(u)}{q(v, u)}\right],

where p(v | u) is what the program says with the values held. The guide is a chain over the elements of the discrete
sites in the order of the program, each given the one before, with a shift and a scale for each other coordinate.

1. *Explore*: draws in which each element, with a chance that differs between groups of draws, is chosen among all its
   values alike: one element in all, or up to half of them. So each value of each element is held, whatever its
   probability.
2. *Learn*: fit the guide to what was drawn so far, weighted by p φ / q of all rounds as one mixture, where the severity
   is among the highest. Weights are tempered where too few of them would count, and the level rises to 0.
3. *Look again*: the same from the start with other draws. What the second search sees where the first one had hardly
   looked is new, and leaves room for what neither saw (:func:`probest.verdict.with_room`).
4. *Weigh*: fresh draws of a guide fitted to both, with a share of a wider one, estimate P. Their number is fixed by the
   last round of learning. All rounds as one mixture, the exploration among them, estimate P a second time: what was
   seen and the guide misses is in there with large weights, and the two have to agree.

It fails where elements depend on each other in ways that a chain does not show, or where modes are many: few weights
count then, and it says so.

References: Rubinstein & Kroese (2004), The cross-entropy method; Veach & Guibas (1995), Optimally combining sampling
techniques (the mixture of all rounds); Stein (1945).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import ClassVar, NamedTuple

import numpy as np
from scipy import special

from probest import diagnostics
from probest.budget import Meter, UndefinedError
from probest.estimators.base import Need, check_least, check_needs, check_precision
from probest.estimators.weighing import Trust, weighed
from probest.evidence import Code, EventLike, Evidence, Floats, Note, Particles, Run
from probest.programs.base import Site
from probest.programs.event import Event
from probest.programs.strata import columns_of, free_of, placed
from probest.seeds import child_seed, generator
from probest.tuning import tuned
from probest.verdict import room_left, wanted_error, with_room

__all__ = ["CrossEntropy", "listed_sites"]

_PROGRAMS = "programs.py"
_KEPT = 400  # catastrophes, at most
Indices = np.ndarray


def listed_sites(event: Event) -> tuple[Site, ...]:
    """The sites whose values are all listed."""
    return tuple(site for site in event.sites if site.choices and site.complete)


class Stream(IntEnum):
    """Names of the seeds of a run."""

    LEARN = 0
    WEIGH = 1
    PLACE = 2
    AGAIN = 3


@dataclass(frozen=True)
class CrossEntropyTuning:
    """How the guide is learned. Set by hand on chains and counts of benchmarks/programs.py."""

    explored: int = tuned(300, "draws of each group that explores", _PROGRAMS)
    scales: tuple[float, ...] = tuned((1.0, 1.5, 2.5), "standard deviations of the other coordinates then", _PROGRAMS)
    batch: int = tuned(1000, "draws of a round of learning", _PROGRAMS)
    share: float = tuned(0.6, "of the budget, at most, for exploring and learning", _PROGRAMS)
    elite: float = tuned(0.15, "of a round, whose severities make the next level", _PROGRAMS)
    effective: float = tuned(150.0, "weights that have to count; else they are tempered", _PROGRAMS)
    prior: float = tuned(20.0, "weights' worth of pull of a conditional probability to the marginal one", _PROGRAMS)
    chained: int = tuned(8, "values of an element up to which the next one is learned for each", _PROGRAMS)
    chance: float = tuned(1e-3, "probability by chance of a dependence that is learned", _PROGRAMS)
    spurious: float = tuned(0.2, "elements, on average, that take a value never seen in a catastrophe", _PROGRAMS)
    telling: float = tuned(3.0, "standard errors by which a mean has to differ to be followed", _PROGRAMS)
    wide: float = tuned(0.15, "of the concluding draws that come from a wider guide", _PROGRAMS)
    good: float = tuned(0.15, "effective share of a round's draws at which it has learned enough", _PROGRAMS)
    seen: float = tuned(0.01, "density relative to that of catastrophes, below which one is new", "enumerable.py")
    heavy: float = tuned(0.7, "Pareto shape of weights without a variance to speak of", "Vehtari et al. (2024)")
    largest: float = tuned(
        0.02, "share of one weight below which their shape, as of few distinct ones, tells nothing", _PROGRAMS
    )
    searches: int = tuned(16, "from scratch, at most", _PROGRAMS)
    much: float = tuned(0.1, "share of a search's catastrophes that are new, beyond which the next learns", _PROGRAMS)
    few: float = tuned(50.0, "effective draws that are too few to conclude from", _PROGRAMS)


@dataclass(frozen=True)
class CrossEntropy:
    """Importance sampling from a guide over discrete sites.

    precision: wanted standard error of log P; None spends the budget. rounds: of learning, at most.
    """

    precision: float | None = 0.05
    rounds: int = 14
    tuning: CrossEntropyTuning = field(default_factory=CrossEntropyTuning, repr=False)
    needs: ClassVar[frozenset[Need]] = frozenset({"unconditioned"})

    def __post_init__(self) -> None:
        check_precision(self.precision)
        check_least(self, rounds=1)

    @property
    def name(self) -> str:
        return "cross-entropy"

    def run(self, event: EventLike, *, budget: int, seed: np.random.SeedSequence) -> Run:
        """Explore, learn, weigh. Raises ValueError where the event has no discrete site whose values are listed."""
        check_needs(self, event)
        meter = Meter(event, budget)
        if not isinstance(event, Event) or not listed_sites(event):
            raise ValueError(
                "CrossEntropy needs a program with discrete sites whose values can be listed: use the default estimator"
            )
        return Run.of(_Campaign(self, event, meter, seed).run())


class _Drawn(NamedTuple):
    """Draws of a guide, judged. v: ``(n, elements)`` places in the lists; log_p: log of p φ."""

    v: Indices
    u: Floats
    severity: Floats
    log_p: Floats

    def plus(self, other: _Drawn) -> _Drawn:
        return _Drawn(*(np.concatenate(pair) for pair in zip(self, other, strict=True)))


@dataclass
class _Chain:
    """A law of the elements, each given the one before, and of the other coordinates.

    step: ``(elements, K, K)`` probability of each value (last axis) given the place of the element before.
    """

    step: Floats
    mean: Floats
    scale: Floats

    def sample(self, n: int, rng: np.random.Generator) -> tuple[Indices, Floats]:
        v = np.zeros((n, len(self.step)), dtype=np.intp)
        before = np.zeros(n, dtype=np.intp)
        uniform = rng.random((n, len(self.step)))
        for e, law in enumerate(np.cumsum(self.step, axis=2)):
            before = np.minimum((uniform[:, e, None] > law[before]).sum(axis=1), law.shape[1] - 1)
            v[:, e] = before
        return v, self.mean + self.scale * rng.standard_normal((n, len(self.mean)))

    def log_density(self, v: Indices, u: Floats) -> Floats:
        before = np.concatenate([np.zeros((len(v), 1), dtype=np.intp), v[:, :-1]], axis=1)
        with np.errstate(divide="ignore"):
            discrete = np.log(self.step[np.arange(len(self.step)), before, v]).sum(axis=1)
        return np.asarray(discrete + _log_normal((u - self.mean) / self.scale) - np.log(self.scale).sum())


class _Mixture(NamedTuple):
    """Guides with the numbers of draws that they gave."""

    guides: list[_Chain]
    counts: list[int]

    def log_density(self, v: Indices, u: Floats) -> Floats:
        parts = [math.log(n) + guide.log_density(v, u) for guide, n in zip(self.guides, self.counts, strict=True)]
        return np.asarray(np.logaddexp.reduce(parts, axis=0) - math.log(sum(self.counts)))


class _Found(NamedTuple):
    """What a search drew, and from what. share: of the draws of its last guide that count."""

    pool: _Drawn
    mixture: _Mixture
    share: float

    def plus(self, other: _Found) -> _Found:
        """Both as one; the share is that of the other, which came later."""
        joined = _Mixture(self.mixture.guides + other.mixture.guides, self.mixture.counts + other.mixture.counts)
        return _Found(self.pool.plus(other.pool), joined, other.share)


@dataclass
class _Campaign:
    """One run."""

    method: CrossEntropy
    event: Event
    meter: Meter
    seed: np.random.SeedSequence

    def __post_init__(self) -> None:
        self.sites = listed_sites(self.event)
        self.elements = [site for site in self.sites for _ in range(site.elements)]
        self.counts = np.array([len(site.choices) for site in self.elements])
        most = int(self.counts.max())
        self.possible = np.arange(most) < self.counts[:, None]
        self.alike = self.possible / self.counts[:, None]
        self.free = free_of(self.event, self.sites)
        types = self.event.site_values(np.zeros((1, self.event.dim)), tuple(site.name for site in self.sites))
        self.types = {name: value.dtype for name, value in types.items()}

    def run(self) -> Evidence:
        rng = generator(child_seed(self.seed, Stream.LEARN))
        found = self._search(rng, (1.0 - self.method.tuning.share) * self.meter.budget)
        if found is None:
            note = Note(Code.BUDGET_SPENT, "the budget does not reach to explore the discrete sites: raise it.")
            return self._nothing(note)
        if not np.any(found.pool.severity >= 0.0):
            return self._nothing(Note(Code.NO_HITS, "no catastrophe was found: raise the budget."))
        return self._concluded(found)

    def _concluded(self, found: _Found) -> Evidence:
        """More searches from scratch, for what the first one missed, and what all of them together come to.

        Until so little is new that what may still be unknown is below the precision, or the budget allows no more.
        Where the last one found little new, the next explores and learns nothing from it.
        """
        tuning, precision = self.method.tuning, self.method.precision
        floor, wanted = 0.5 * (1.0 - tuning.share) * self.meter.budget, wanted_error(precision)
        worth, new, share, searches = self._explored(found), 1.0, found.share, 1
        while searches < tuning.searches:
            before = self.meter.calls
            rng = generator(child_seed(self.seed, Stream.AGAIN, searches - 1))
            whole = searches == 1 or new > tuning.much
            again = self._search(rng, floor) if whole else self._explore(rng)
            if again is None:
                break
            searches += 1
            new, share = self._new(found, again), min(share, again.share) if whole else share
            worth += self._explored(again)
            found = found.plus(again)
            enough = math.hypot(precision or 0.0, room_left(worth, new * worth)) <= wanted
            if enough or self.meter.left - (self.meter.calls - before) < floor:
                break
        evidence = self._weigh(found, self._learn(found)[0], share)
        if searches == 1 or not math.isfinite(evidence.log_prob):
            return evidence
        roomy = with_room(evidence, worth, new * worth, precision)
        figures = {"new": new, "looked": worth, "searches": float(searches)}
        return replace(roomy, diagnostics={**roomy.diagnostics, **figures})

    def _new(self, found: _Found, again: _Found) -> float:
        """The share of a search's catastrophes that are new: where all draws of those before, as one mixture, have less
        than ``seen`` times the density that it has among catastrophes.

        Guides lead to what is known already, so that searches may go to the same part: what exploring came upon is all
        that counts as independent of each other.
        """
        log_w = np.where(again.pool.severity >= 0.0, self._log_w(again), -np.inf)
        hits = np.isfinite(log_w)
        if not hits.any():
            return 1.0
        both = found.plus(again)
        log_p = diagnostics.log_mean_exp(np.where(both.pool.severity >= 0.0, self._log_w(both), -np.inf))[0]
        w = np.exp(log_w[hits] - diagnostics.log_sum_exp(log_w[hits]))
        log_q = found.mixture.log_density(again.pool.v[hits], again.pool.u[hits])
        unseen = log_q - (again.pool.log_p[hits] - log_p) < math.log(self.method.tuning.seen)
        return float(w[unseen].sum())

    def _search(self, rng: np.random.Generator, floor: float) -> _Found | None:
        """Explore and learn, until that is enough or calls left are down to ``floor``; None where they are too few."""
        found = self._explore(rng)
        if found is None:
            return None
        share, guide = 0.0, None
        for _ in range(self.method.rounds):
            if self.meter.left - self.method.tuning.batch < floor and guide is not None:
                break
            size = min(self.method.tuning.batch, self.meter.left // 2)
            if size < 1:
                break
            guide, reached = self._learn(found)
            fresh = self._draw(guide, size, rng)
            log_w = np.where(fresh.severity >= 0.0, fresh.log_p - guide.log_density(fresh.v, fresh.u), -np.inf)
            share = diagnostics.effective_sample_size(log_w) / len(log_w)
            found = found.plus(_Found(fresh, _Mixture([guide], [len(fresh.v)]), share))
            steady = diagnostics.pareto_khat(log_w) < self.method.tuning.heavy
            if reached and steady and share > self.method.tuning.good:
                break
        return found._replace(share=share)

    def _explored(self, found: _Found) -> float:
        """How many independent catastrophes exploring came upon, all groups as one mixture; 1 where it was none."""
        groups = len(self._shares)
        mixture = _Mixture(found.mixture.guides[:groups], found.mixture.counts[:groups])
        first = _Drawn(*(column[: sum(mixture.counts)] for column in found.pool))
        log_w = np.where(first.severity >= 0.0, first.log_p - mixture.log_density(first.v, first.u), -np.inf)
        return max(1.0, diagnostics.effective_sample_size(log_w))

    # --- draws -----------------------------------------------------------------------------------------------------

    def _draw(self, guide: _Chain, n: int, rng: np.random.Generator) -> _Drawn:
        return self._judged(*guide.sample(n, rng))

    def _judged(self, v: Indices, u: Floats) -> _Drawn:
        z = np.zeros((len(v), self.event.dim))
        z[:, self.free] = u
        self.meter.charge(len(v))
        found = self.event.evaluate(z, held=self._held(v))
        if np.isnan(found.log_weight).any():
            raise UndefinedError("the log-density of the discrete sites is NaN")
        return _Drawn(v, u, found.severity, found.log_weight + _log_normal(u))

    def _held(self, v: Indices) -> dict[str, np.ndarray]:
        ends = np.cumsum([0, *(site.elements for site in self.sites)])
        return {
            site.name: site.decoded(np.asarray(site.choices)[v[:, a:b]], self.types[site.name])
            for site, a, b in zip(self.sites, ends, ends[1:], strict=False)
        }

    # --- exploring -------------------------------------------------------------------------------------------------

    def _usual(self, rng: np.random.Generator) -> Floats:
        """``(elements, K)`` how often each value comes up in draws of the program, which are not judged."""
        z = rng.standard_normal((1000 if not self.event.composition.interleaved else 1, self.event.dim))
        if self.event.composition.interleaved:
            self.meter.charge(len(z))
        drawn = self.event.discrete_draws(z)
        chosen = np.concatenate(columns_of(self.event, self.sites))
        out = np.zeros(self.possible.shape)
        for e, (column, site) in enumerate(zip(chosen, self.elements, strict=True)):
            out[e, : len(site.choices)] = (drawn[:, column, None] == np.asarray(site.choices)).mean(axis=0)
        return np.asarray(out / out.sum(axis=1, keepdims=True))

    @property
    def _shares(self) -> list[float]:
        """Of each group that explores: the chance of an element to be chosen among all its values alike."""
        count = len(self.elements)
        return [0.0, *(min(1.0, flips / count) for flips in 2.0 ** np.arange(max(1, math.ceil(math.log2(count)))))]

    def _explore(self, rng: np.random.Generator) -> _Found | None:
        tuning, count, shares = self.method.tuning, len(self.elements), self._shares
        usual, alike = self._usual(rng), self.alike
        n = int(min(tuning.explored, 0.5 * tuning.share * self.meter.left / len(shares)))
        if n < 30:
            return None
        found = None
        for i, share in enumerate(shares):
            law = np.maximum((1.0 - share) * usual + share * alike, 1e-3 / count * self.possible)
            scale = tuning.scales[i % len(tuning.scales)] * np.ones(len(self.free))
            guide = self._chain(law / law.sum(axis=1, keepdims=True), scale)
            drawn = _Found(self._draw(guide, n, rng), _Mixture([guide], [n]), 0.0)
            found = drawn if found is None else found.plus(drawn)
        return found

    def _chain(self, law: Floats, scale: Floats) -> _Chain:
        """Independent elements."""
        return _Chain(np.repeat(law[:, None], law.shape[1], axis=1), np.zeros(len(scale)), scale)

    # --- learning --------------------------------------------------------------------------------------------------

    def _log_w(self, found: _Found) -> Floats:
        return found.pool.log_p - found.mixture.log_density(found.pool.v, found.pool.u)

    def _learn(self, found: _Found) -> tuple[_Chain, bool]:
        """A guide for the highest of what was drawn, and whether that is the event with its own weights."""
        tuning, log_w, pool = self.method.tuning, self._log_w(found), found.pool
        recent = pool.severity[-found.mixture.counts[-1] :]
        level = min(0.0, float(np.quantile(recent, 1.0 - tuning.elite)))
        least = min(tuning.effective, 0.3 * len(recent))
        if np.count_nonzero(pool.severity >= 0.0) >= 0.2 * least:
            level = 0.0
        inside = np.flatnonzero((pool.severity >= level) & np.isfinite(log_w))
        if not len(inside):
            inside = np.flatnonzero(np.isfinite(log_w))
        high = log_w[inside]
        least = min(least, 0.5 * len(inside))
        equal, share = np.zeros(len(high)), least / len(high)
        power = diagnostics.next_temperature(equal, lambda power: power * high, easy=0.0, hard=1.0, target=share)
        weight = np.exp(power * high - diagnostics.log_sum_exp(power * high))
        return self._fit(pool.v[inside], pool.u[inside], weight), level >= 0.0 and power == 1.0

    def _fit(self, v: Indices, u: Floats, weight: Floats) -> _Chain:
        tuning, count, most = self.method.tuning, len(self.elements), self.possible.shape[1]
        effective = 1.0 / float(weight @ weight)
        rare = tuning.spurious / count * self.alike
        hot = (v[:, :, None] == np.arange(most)).astype(np.float64)
        marginal = self._evened(np.einsum("n,nek->ek", weight, hot), effective)
        marginal = (1.0 - tuning.spurious / count) * marginal + rare
        step = np.repeat(marginal[:, None], most, axis=1)
        if most <= tuning.chained and count > 1:
            pair = np.einsum("n,nej,nek->ejk", weight, hot[:, :-1], hot[:, 1:], optimize=True) * effective
            pull = tuning.prior * marginal[1:, None]
            joint = (pair + pull) / (pair.sum(axis=2, keepdims=True) + tuning.prior)
            joint = (1.0 - tuning.spurious / count) * joint + rare[1:, None]
            step[1:] = np.where(self._dependent(pair)[:, None, None], joint, step[1:])
        step = step / step.sum(axis=2, keepdims=True)
        mean = weight @ u
        deviation = np.sqrt(np.maximum(weight @ (u - mean) ** 2, 1e-6))
        noise = math.sqrt(1.0 / effective)
        mean = np.where(np.abs(mean) > tuning.telling * noise * deviation, mean, 0.0)
        moved = np.abs(np.log(deviation)) > tuning.telling * noise / math.sqrt(2.0)
        return _Chain(step, mean, np.where(moved, np.clip(1.1 * deviation, 0.2, 3.0), 1.0))

    def _evened(self, marginal: Floats, effective: float) -> Floats:
        """The mean over a site's elements for each one's own, where a likelihood-ratio test sees no difference."""
        ends = np.cumsum([0, *(site.elements for site in self.sites)])
        out = marginal.copy()
        for a, b in itertools.pairwise(ends.tolist()):
            mean = marginal[a:b].mean(axis=0)
            ratio = 2.0 * effective * float(special.rel_entr(marginal[a:b], mean).sum())
            freedom = (b - a - 1) * max(int(np.count_nonzero(mean)) - 1, 1)
            if freedom and special.chdtrc(freedom, ratio) > self.method.tuning.chance:
                out[a:b] = mean
        return out

    def _dependent(self, pair: Floats) -> np.ndarray:
        """Which elements depend on the one before, by a likelihood-ratio test on counts ``(elements, K, K)``."""
        total = pair.sum(axis=(1, 2), keepdims=True)
        apart = pair.sum(axis=2, keepdims=True) * pair.sum(axis=1, keepdims=True) / total
        ratio = 2.0 * special.rel_entr(pair, apart).sum(axis=(1, 2))
        seen = [np.maximum((pair.sum(axis=axis) > 0.0).sum(axis=1) - 1, 1) for axis in (1, 2)]
        return np.asarray(special.chdtrc(seen[0] * seen[1], ratio) < self.method.tuning.chance)

    # --- weighing --------------------------------------------------------------------------------------------------

    def _weigh(self, found: _Found, guide: _Chain, share: float) -> Evidence:
        tuning = self.method.tuning
        rng = generator(child_seed(self.seed, Stream.WEIGH))
        n = self.meter.left
        if self.method.precision is not None and share > 0.0:
            n = min(n, max(tuning.batch, int(1.3 / (share * self.method.precision**2))))
        if n < 2:
            return self._nothing(Note(Code.BUDGET_SPENT, "the budget was spent on learning: raise it."))
        wide = _Chain(_wider(guide.step, self.alike), 0.7 * guide.mean, 1.3 * guide.scale)
        few = max(1, int(tuning.wide * n))
        both = _Mixture([guide, wide], [n - few, few])
        fresh = self._draw(guide, n - few, rng).plus(self._draw(wide, few, rng))
        log_w = np.where(fresh.severity >= 0.0, fresh.log_p - both.log_density(fresh.v, fresh.u), -np.inf)
        found = found.plus(_Found(fresh, both, share))
        pooled = np.where(found.pool.severity >= 0.0, self._log_w(found), -np.inf)
        evidence = weighed(
            self.method.name, log_w, pooled,
            trust=Trust(tuning.heavy, tuning.largest, tuning.few), precision=self.method.precision,
            particles=self._particles(found.pool, pooled), calls=self.meter.calls, seconds=self.meter.seconds, rng=rng,
        )  # fmt: skip
        elements = float(len(self.elements))
        return replace(evidence, diagnostics={**evidence.diagnostics, "elements": elements})

    def _particles(self, pool: _Drawn, log_w: Floats) -> Particles | None:
        rng = generator(child_seed(self.seed, Stream.PLACE))
        hits = np.flatnonzero(np.isfinite(log_w))
        if not len(hits):
            return None
        rows, share = diagnostics.thinned(np.exp(log_w[hits] - log_w[hits].max()), _KEPT)
        rows = hits[rows]
        z = np.zeros((len(rows), self.event.dim))
        z[:, self.free] = pool.u[rows]
        z, kept = placed(self.event, self.sites, self._held(pool.v[rows]), z, rng)
        if not kept.any():
            return None
        return Particles(z[kept], np.log(share[kept] / share[kept].sum()), pool.severity[rows][kept])

    def _nothing(self, note: Note) -> Evidence:
        return Evidence.nothing(self.method.name, note, calls=self.meter.calls, seconds=self.meter.seconds)


def _log_normal(u: Floats) -> Floats:
    return np.asarray(-0.5 * np.einsum("ij,ij->i", u, u) - 0.5 * u.shape[1] * math.log(2.0 * math.pi))


def _wider(step: Floats, alike: Floats) -> Floats:
    """A tenth of each element's choice left to chance, or about one element in all where there are many."""
    loose = min(0.1, 1.5 / len(step))
    return np.asarray((1.0 - loose) * step + loose * alike[:, None])
