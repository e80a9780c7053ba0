r"""Importance sampling of text from the adversary with a learned twist: the default for language models.

With p the law of the adversary's text and q that with a twist (:mod:`probest.adversaries.twists`),

.. math:: P = E_q\!\left[\mathbf 1_C(x) \, \frac{p(x)}{q(x)}\right].

1. *Look*: plain draws. Where these suffice, that is all.
2. *Foresee*: learn from them where severities end, prefix by prefix, and draw with levels further and further out.
3. *Learn* (the cross-entropy method): fit log q - log p to what it has to be on all that was drawn, where the severity
   is among the highest; draw; again, until the level is 0 and enough of the weights count.
4. *Look again*: the same from the start with other draws. What the second search finds where the first hardly ever
   draws is new, and leaves room for what neither found (:func:`probest.verdict.with_room`).
5. *Weigh*: fresh draws of the best of both, fixed now, with a share of the adversary itself, so that no weight is
   above one over that share. Their number is fixed beforehand (Stein 1945), and enlarged once where that was far off.
   All draws of the searches, each search as one mixture, estimate P a second time: that may not be higher. (It is a
   little low, since twists know single texts that they were fitted to, and weigh them less.)

Both searches follow the same severity: what is isolated from everything that is nearly a catastrophe is found by
neither. It fails where a small network cannot learn from so many texts what catastrophes have in common; few weights
count then, and it says so.

References: Zhao et al. (2024), Probabilistic inference in language models via twisted sequential Monte Carlo;
Rubinstein & Kroese (2004), The cross-entropy method; Hesterberg (1995), Weighted average importance sampling and
defensive mixture distributions; Stein (1945).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
from scipy.special import ndtri
from scipy.stats import rankdata

from probest import diagnostics
from probest.budget import Meter, UndefinedError
from probest.estimators.base import Need, UnmetNeedError, check_least, check_needs, check_precision
from probest.estimators.weighing import Trust, weighed
from probest.evidence import Code, EventLike, Evidence, Floats, Note, Particles, Run
from probest.guides.base import allocate
from probest.guides.program import BoundProgram, ProgramGuide
from probest.programs.event import Event
from probest.seeds import child_seed, generator
from probest.tuning import tuned
from probest.verdict import with_room

if TYPE_CHECKING:
    from probest.adversaries.language import LanguageAdversary
    from probest.adversaries.twists import Texts

__all__ = ["LearnedProposal", "obstacle", "searched"]

_LANGUAGE = "language.py"
MOST = 2_000_000_000
"""Numbers that are kept of texts, at most, four bytes each: a log-probability of each token at each place."""
Values = dict[str, np.ndarray]
Guides = Sequence["LanguageAdversary | None"]
"""Laws to draw from; None is the adversary itself."""


def obstacle(event: EventLike, budget: int) -> str:
    """Why this event cannot be estimated so, with what to do instead; empty where it can."""
    from probest.adversaries.language import LanguageModelError, models_of

    if not isinstance(event, Event) or not event.is_text:
        return (
            "the learned proposal needs an adversary that draws text alone, from a CausalLM, and a model that draws "
            "nothing else. Use Tempering, or Splitting"
        )
    if event.composition.interleaved and event.composition.batching != "vmap":
        return "the learned proposal needs a model that can be batched, where that draws text too. Use Splitting"
    try:
        found = models_of(event.program)
    except LanguageModelError as error:
        return f"{error}. Or use Splitting"
    if budget * sum(site.size * found[site.name].vocabulary for site in event.sites) > MOST:
        return (
            f"the learned proposal would keep more than {MOST:,} log-probabilities (budget times tokens times "
            "vocabulary). Use Splitting, or a smaller budget"
        )
    return ""


class Stream(IntEnum):
    """Names of the seeds of a run."""

    LEARN = 0
    AGAIN = 1
    WEIGH = 2
    PLACE = 3
    BATCHES = 4


@dataclass(frozen=True)
class LearnedTuning:
    """How a proposal is learned. Set by hand on the problems of benchmarks/language.py."""

    look: float = tuned(0.05, "of the budget, for the plain draws that a search begins with", _LANGUAGE)
    levels: tuple[float, ...] = tuned((2.0, 3.0, 4.0), "standard deviations, that are aimed at first", _LANGUAGE)
    batch: float = tuned(0.03, "of the budget, for a round", _LANGUAGE)
    share: float = tuned(0.6, "of the budget, at most, for both searches", _LANGUAGE)
    elite: float = tuned(0.1, "of a round, whose severities make the next level", _LANGUAGE)
    hits: int = tuned(30, "catastrophes from which on the level is 0", _LANGUAGE)
    steep: float = tuned(5.0, "slope of log q over the upper quarter of a round, in nats", _LANGUAGE)
    high: float = tuned(0.5, "of what is learned from, that is at the level", _LANGUAGE)
    prior: float = tuned(0.1, "share of draws that the adversary itself makes", _LANGUAGE)
    more: tuple[float, ...] = tuned((0.3, 0.6, 1.0), "other shares, where little was learned", _LANGUAGE)
    seen: float = tuned(20.0, "draws of a search for each catastrophe of a kind, from which on it is known", _LANGUAGE)
    enough: float = tuned(100.0, "effective draws of a search, before which it does not end", _LANGUAGE)
    far_off: float = tuned(1.5, "times the precision, at which the concluding sample is enlarged, once", _LANGUAGE)
    heavy: float = tuned(0.7, "Pareto shape of weights without a variance to speak of", "Vehtari et al. (2024)")
    largest: float = tuned(0.02, "share of one weight below which their shape tells nothing", _LANGUAGE)
    few: float = tuned(50.0, "effective draws that are too few to conclude from", _LANGUAGE)
    kept: int = tuned(4_000, "catastrophes, at most", "memory")


@dataclass(frozen=True)
class LearnedProposal:
    """Importance sampling of text from the adversary with a learned twist.

    precision: wanted standard error of log P; None spends the budget. rounds: of learning in a search, at most.
    """

    precision: float | None = 0.05
    rounds: int = 8
    tuning: LearnedTuning = field(default_factory=LearnedTuning, repr=False)
    needs: ClassVar[frozenset[Need]] = frozenset({"unconditioned"})

    def __post_init__(self) -> None:
        check_precision(self.precision)
        check_least(self, rounds=1)

    @property
    def name(self) -> str:
        return "learned proposal"

    def run(self, event: EventLike, *, budget: int, seed: np.random.SeedSequence) -> Run:
        """Look, learn twice, weigh. Raises UnmetNeedError where the adversary draws anything but text."""
        check_needs(self, event)
        why = obstacle(event, budget)
        if why:
            raise UnmetNeedError(why)
        assert isinstance(event, Event)
        return Run.of(_Campaign(self, event, Meter(event, budget), seed).run())


class _Pool(NamedTuple):
    """Draws of several guides, judged. log_q ``(n, guides)``; counts ``(guides,)``: draws of each."""

    values: Values
    texts: Texts
    severity: Floats
    log_q: Floats
    counts: np.ndarray

    @property
    def mixed(self) -> Floats:
        """log-density of all guides as one mixture."""
        return _mixed(self.log_q, self.counts / self.counts.sum())

    @property
    def log_w(self) -> Floats:
        """log-weight of each draw, ``-inf`` where it is no catastrophe."""
        return np.where(self.severity >= 0.0, self.texts.own - self.mixed, -np.inf)

    def plus(self, other: _Pool) -> _Pool:
        """Both, of the same guides."""
        return _Pool(
            {name: np.concatenate([value, other.values[name]]) for name, value in self.values.items()},
            self.texts.plus(other.texts),
            np.concatenate([self.severity, other.severity]),
            np.concatenate([self.log_q, other.log_q]),
            self.counts + other.counts,
        )

    def under(self, guide: LanguageAdversary) -> _Pool:
        """With one guide more, which has not drawn yet."""
        column = self.texts.density(guide)[:, None]
        return self._replace(log_q=np.concatenate([self.log_q, column], axis=1), counts=np.append(self.counts, 0))


def searched(event: Event, adversary: LanguageAdversary, budget: int, rng: np.random.Generator) -> LanguageAdversary:
    """An adversary whose twists do nothing yet, after a search for catastrophes of so many model calls."""
    method, meter = LearnedProposal(), Meter(event, budget)
    campaign = _Campaign(method, event, meter, np.random.SeedSequence(int(rng.integers(2**63))), adversary)
    plain = campaign._drawn((None,), [max(50, int(method.tuning.look * budget))], rng)
    search = _Search(campaign, plain, rng).run(0.0)
    return search.best_for(search.pool) or adversary


@dataclass
class _Campaign:
    """One run. given: the program with twists that do nothing yet; None makes one."""

    method: LearnedProposal
    event: Event
    meter: Meter
    seed: np.random.SeedSequence
    given: LanguageAdversary | None = None

    def __post_init__(self) -> None:
        from probest.adversaries import twists  # torch and pyro, which no import of probest should wait for

        self.twists = twists
        self.fit = twists.Fit()
        self.open = self.event.opened()
        self.untwisted = self.given or twists.untwisted(self.open.parts.adversary)
        self.searches: list[_Search] = []
        self.bound: BoundProgram = ProgramGuide(self.untwisted, params=self.event.parts.params).bind(self.open)

    def run(self) -> Evidence:
        """The estimate; after Ctrl-C what all draws of the searches until then say."""
        try:
            return self._estimated()
        except KeyboardInterrupt:
            note = Note(Code.INTERRUPTED, "interrupted: this is the evidence gathered until then.")
            pools = [search.pool for search in self.searches]
            if not any(np.any(pool.severity >= 0.0) for pool in pools):
                return self._nothing(note)
            found = self._weighed(np.concatenate([pool.log_w for pool in pools]), pools, pools)
            return replace(found, converged=False, notes=(*found.notes, note))

    def _estimated(self) -> Evidence:
        tuning, meter = self.method.tuning, self.meter
        size = int(tuning.look * meter.budget)
        if size < 50:
            return self._nothing(Note(Code.BUDGET_SPENT, "the budget does not reach to look: give some thousands."))
        rng = generator(child_seed(self.seed, Stream.LEARN))
        plain = self._drawn((None,), [size], rng)
        wanted = self._plain(plain)
        if wanted is not None:
            fresh = self._drawn((None,), [wanted], rng)
            return self._conclude(fresh, [plain])
        first = _Search(self, plain, rng).run((1.0 - 0.5 * tuning.share) * meter.budget)
        rng = generator(child_seed(self.seed, Stream.AGAIN))
        plain = self._drawn((None,), [size], rng)
        second = _Search(self, plain, rng).run((1.0 - tuning.share) * meter.budget)
        if not any(np.any(one.pool.severity >= 0.0) for one in (first, second)):
            return self._in_vain([first.pool, second.pool])
        rng = generator(child_seed(self.seed, Stream.WEIGH))
        guides = (None, first.best_for(second.pool), second.best_for(first.pool))
        shares, wanted = self._shares([first, second], guides)
        fresh = self._drawn(guides, allocate(wanted, shares, rng), rng)
        more = self._missing(fresh)
        if more:
            fresh = fresh.plus(self._drawn(guides, allocate(more, shares, rng), rng))
        evidence = self._conclude(fresh, [first.pool, second.pool])
        return self._second_look(evidence, first, second)

    # --- draws -------------------------------------------------------------------------------------------------------

    def _drawn(self, guides: Guides, counts: Any, rng: np.random.Generator) -> _Pool:
        """So many draws of each guide (None is the adversary itself), judged, a call each."""
        counts = np.asarray(counts, dtype=np.intp)
        drawn = []
        for guide, n in zip(guides, counts.tolist(), strict=True):
            if n:
                parts = self.open.parts if guide is None else self.bound.parts._replace(adversary=guide)
                z = rng.standard_normal((n, self.event.dim))
                drawn.append(self.bound.values(parts, self.event.sites, z))
        values = {name: np.concatenate([part[name] for part in drawn]) for name in drawn[0]}
        n = int(counts.sum())
        self.meter.charge(n)
        severity = self.event.evaluate(np.zeros((n, self.event.dim)), held=values).severity
        if np.isnan(severity).any():
            raise UndefinedError("the severity is NaN: return a number, or -inf where there can be no catastrophe")
        texts = self.twists.Texts.of(self.untwisted, values)
        log_q = _densities(guides, texts)
        return _Pool(values, texts, severity, log_q, counts)

    def _plain(self, pool: _Pool) -> int | None:
        """How many plain draws reach the precision, where the budget has them: then nothing needs to be learned."""
        hits, n, precision = int(np.count_nonzero(pool.severity >= 0.0)), len(pool.severity), self.method.precision
        if hits < 10 or precision is None:
            return None
        wanted = math.ceil(1.3 * (n / hits - 1.0) / precision**2) + 100
        return max(wanted, n) if wanted <= self.meter.left else None

    def _in_vain(self, pools: list[_Pool]) -> Evidence:
        """What is left of the budget, as plain draws: a bound, where these find nothing either."""
        rng = generator(child_seed(self.seed, Stream.WEIGH))
        rest = self._drawn((None,), [max(self.meter.left, 1)], rng)
        if np.any(rest.severity >= 0.0):
            return self._conclude(rest, pools)
        plain = sum(int(pool.counts[0]) for pool in (*pools, rest))
        note = Note(Code.NO_HITS, "no catastrophe was found: raise the budget.")
        return self._nothing(note, upper=diagnostics.binomial_interval(0, plain)[1])

    # --- weighing ----------------------------------------------------------------------------------------------------

    def _shares(self, searches: list[_Search], guides: Guides) -> tuple[Floats, int]:
        """Which share of the fresh draws each guide makes, and how many reach the precision.

        By the second moment of their weights on what each search found: where little was learned, the adversary itself
        makes more of them, or all.
        """
        left, precision, tuning = self.meter.left, self.method.precision, self.method.tuning
        every = [found for search in searches if (found := _Found.of(search.pool)) is not None]
        log_q = [_densities(guides, found.texts) for found in every]
        best, least = np.array([tuning.prior, *([0.5 * (1.0 - tuning.prior)] * 2)]), math.inf
        for prior in (tuning.prior, *tuning.more):
            shares = np.array([prior, *([0.5 * (1.0 - prior)] * 2)])
            most = max(found.moment(_mixed(one, shares)) for found, one in zip(every, log_q, strict=True))
            if most < least:
                best, least = shares, most
        if precision is None or len(every) < len(searches):
            return best, left
        return best, int(min(left, max(1_000.0, 1.3 * least / precision**2)))

    def _missing(self, fresh: _Pool) -> int:
        """How many draws more, once, where those that were to do are far from the precision."""
        precision, n = self.method.precision, len(fresh.severity)
        if precision is None:
            return 0
        error = diagnostics.log_mean_exp(fresh.log_w)[1]
        if error <= self.method.tuning.far_off * precision:
            return 0
        wanted = n * (error / precision) ** 2 if math.isfinite(error) else math.inf
        return int(min(self.meter.left, wanted))

    def _conclude(self, fresh: _Pool, pools: list[_Pool]) -> Evidence:
        return self._weighed(fresh.log_w, pools, [fresh] if np.any(fresh.severity >= 0.0) else pools)

    def _weighed(self, log_w: Floats, pools: list[_Pool], shown: list[_Pool]) -> Evidence:
        """The estimate from log-weights of draws, beside those of the searches; catastrophes are of ``shown``."""
        tuning = self.method.tuning
        return weighed(
            self.method.name, log_w, np.concatenate([pool.log_w for pool in pools]),
            trust=Trust(tuning.heavy, tuning.largest, tuning.few, learned_by_heart=True),
            precision=self.method.precision, particles=self._particles(shown), calls=self.meter.calls,
            seconds=self.meter.seconds, rng=generator(child_seed(self.seed, Stream.BATCHES)),
        )  # fmt: skip

    def _second_look(self, evidence: Evidence, first: _Search, second: _Search) -> Evidence:
        """The estimate with room for what neither search found."""
        if not math.isfinite(evidence.log_prob):
            return evidence
        found, share = _Found.of(second.pool), 1.0
        if found is not None:
            expected = first.density(found.texts) - (found.texts.own - evidence.log_prob)
            expected += math.log(first.pool.counts.sum())
            share = float(found.share[expected < math.log(self.method.tuning.seen)].sum())
        worth = diagnostics.effective_sample_size(second.pool.log_w)
        whole = with_room(evidence, worth, share * worth, self.method.precision)
        return replace(whole, diagnostics={**whole.diagnostics, "new": share, "looked": worth})

    def _particles(self, pools: list[_Pool]) -> Particles | None:
        """Catastrophes of all pools, each pool weighing by how many of its draws count."""
        rng = generator(child_seed(self.seed, Stream.PLACE))
        log_w = []
        for pool in pools:
            own = pool.log_w
            worth = diagnostics.effective_sample_size(own) if np.isfinite(own).any() else 0.0
            log_w.append(own - diagnostics.log_sum_exp(own) + math.log(worth) if worth else own)
        weight = np.exp(np.concatenate(log_w))
        hits = np.flatnonzero(weight)
        if not len(hits):
            return None
        rows, share = diagnostics.thinned(weight[hits], self.method.tuning.kept)
        rows = hits[rows]
        values = {name: np.concatenate([pool.values[name] for pool in pools])[rows] for name in pools[0].values}
        z, right = self.twists.placed(self.event, self.untwisted, values, np.zeros((len(rows), self.event.dim)), rng)
        if not right.any():
            return None
        severity = np.concatenate([pool.severity for pool in pools])[rows]
        return Particles(z[right], np.log(share[right] / share[right].sum()), severity[right])

    def _nothing(self, note: Note, upper: float = 0.0) -> Evidence:
        calls, seconds = self.meter.calls, self.meter.seconds
        return Evidence.nothing(self.method.name, note, upper=upper, calls=calls, seconds=seconds)


class _Found(NamedTuple):
    """Catastrophes with weights of sum 1, log P as they have it, and their density under the pool's own guides."""

    texts: Texts
    share: Floats
    log_prob: float
    log_q: Floats

    @classmethod
    def of(cls, pool: _Pool) -> _Found | None:
        """Those of a pool; None where there are none."""
        log_w = pool.log_w
        hits = np.flatnonzero(np.isfinite(log_w))
        if not len(hits):
            return None
        share = np.exp(log_w[hits] - diagnostics.log_sum_exp(log_w[hits]))
        return cls(pool.texts.at(hits), share, diagnostics.log_mean_exp(log_w)[0], pool.log_q[hits])

    def moment(self, log_q: Floats) -> float:
        """The second moment of the weights of draws of q, over their squared mean; log_q: of these catastrophes.

        By these, not by the draws' own weights: those of a law that sits on a few texts are all alike, and tiny.
        """
        return float(self.share @ np.exp(np.minimum(self.texts.own - log_q - self.log_prob, 50.0)))


def _densities(guides: Guides, texts: Texts) -> Floats:
    """log-density ``(n, guides)`` of texts under each guide."""
    return np.stack([texts.own if guide is None else texts.density(guide) for guide in guides], axis=1)


def _mixed(log_q: Floats, shares: Floats) -> Floats:
    """log-density ``(n,)`` of a mixture, from those of its guides ``(n, guides)``."""
    given = shares > 0.0
    return np.asarray(np.logaddexp.reduce(log_q[:, given] + np.log(shares[given]), axis=1))


class _Search:
    """A search: its guides (the first is the adversary itself), and all that it drew."""

    def __init__(self, campaign: _Campaign, plain: _Pool, rng: np.random.Generator) -> None:
        self.campaign, self.pool, self.rng = campaign, plain, rng
        campaign.searches.append(self)
        self.method, self.meter = campaign.method, campaign.meter
        self.guides: list[LanguageAdversary | None] = [None]
        self.recent = plain.severity

    def run(self, floor: float) -> _Search:
        """Foresee and learn, until that is enough or calls left are down to ``floor``."""
        tuning, meter = self.method.tuning, self.meter
        size = int(tuning.batch * meter.budget)
        score = ndtri((rankdata(self.recent) - 0.5) / len(self.recent))
        guide = self.campaign.fit.foresee(self.campaign.untwisted, self.pool.texts, score, self.rng)
        for level in tuning.levels:
            self._draw(self.campaign.twists.at_level(guide, level), max(20, size // len(tuning.levels)))
        guide = self.best_for(self.pool) or guide
        for _ in range(self.method.rounds):
            if meter.left - size < floor or self._enough(floor):
                break
            slope, weight = self._aim()
            guide = self.campaign.fit.flatten(guide, self.pool.texts, slope, weight, self.rng)
            self._draw(guide, size)
        return self

    def best_for(self, pool: _Pool) -> LanguageAdversary | None:
        """The guide whose weights are the most even on the catastrophes of a pool; the last, where it has none."""
        found = _Found.of(pool)
        if found is None:
            return self.guides[-1]
        log_q = found.log_q if pool is self.pool else _densities(self.guides, found.texts)
        return self.guides[1 + int(np.argmin(self._moments(found, log_q)))]

    def _moments(self, found: _Found, log_q: Floats) -> list[float]:
        """The second moment of each learned guide's weights, a share of the adversary's own draws among them."""
        shares = np.array([self.method.tuning.prior, 1.0 - self.method.tuning.prior])
        return [found.moment(_mixed(log_q[:, [0, k]], shares)) for k in range(1, log_q.shape[1])]

    def _enough(self, left: float) -> bool:
        """Whether what is left will do, drawn from the best guide."""
        precision, found = self.method.precision, _Found.of(self.pool)
        if precision is None or found is None:
            return False
        if diagnostics.effective_sample_size(self.pool.log_w) < self.method.tuning.enough:
            return False
        return min(self._moments(found, found.log_q)) < 0.5 * left * precision**2

    def _draw(self, guide: LanguageAdversary, n: int) -> None:
        """Draws of a guide, and some of the adversary itself, join the pool."""
        few = math.ceil(self.method.tuning.prior * n)
        self.guides.append(guide)
        pool = self.pool.under(guide)
        counts = np.zeros(len(self.guides), dtype=np.intp)
        counts[[0, -1]] = few, n - few
        fresh = self.campaign._drawn(self.guides, counts, self.rng)
        self.pool, self.recent = pool.plus(fresh), fresh.severity

    def _aim(self) -> tuple[Floats, Floats]:
        """What log q - log p should be, up to a constant, and what each draw counts in learning it."""
        tuning, severity = self.method.tuning, self.pool.severity
        level = min(0.0, float(np.quantile(self.recent, 1.0 - tuning.elite)))
        if np.count_nonzero(severity >= 0.0) >= tuning.hits:
            level = 0.0
        below = severity[severity < level]
        scale = level - float(np.quantile(below, 0.75)) if len(below) else 0.0
        floor = self.campaign.fit.floor
        steep = tuning.steep / scale if scale > 0.0 and math.isfinite(scale) else math.inf
        with np.errstate(invalid="ignore"):
            slope = np.where(severity >= level, 0.0, np.maximum(steep * (severity - level), -floor))
        high = severity >= level
        weight = np.where(high, tuning.high / max(high.sum(), 1), (1.0 - tuning.high) / max((~high).sum(), 1))
        return slope, weight

    def density(self, texts: Texts) -> Floats:
        """log-density ``(n,)`` of all that the search drew from, as one mixture."""
        counts = self.pool.counts
        return _mixed(_densities(self.guides, texts), counts / counts.sum())
