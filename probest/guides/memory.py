r"""One memory of where a target's mass is, of which guides are fitted: nothing that was ever found is lost.

Populations of several searches and fresh samples of several guides go in. The samples count as one sample of the
mixture of all guides that they came from, by their numbers (deterministic-mixture weights):

.. math:: w(z) = \varphi(z) \Big/ \sum_j \tfrac{n_j}{n} q_j(z),

so that a point which one guide gave by luck, and another would have given often, gets the weight that both have
earned. Each population and the samples enter with what they are worth in independent points.

These weights serve to fit the next guide. An estimate comes from fresh samples of a fixed guide alone
(:mod:`probest.estimators.importance`): a mean over samples that later guides were fitted to is mostly too low.

References: Veach & Guibas (1995), Optimally combining sampling techniques for Monte Carlo rendering (the balance
heuristic); Cornuet, Marin, Mira & Robert (2012), Adaptive multiple importance sampling.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from probest import diagnostics
from probest.evidence import Floats, Population
from probest.guides.base import Guide
from probest.guides.fit import fit_guide
from probest.guides.program import BoundProgram
from probest.guides.sample import Batch, above, clipped, kept_weights, seen

if TYPE_CHECKING:
    from probest.surrogates.student import Student

__all__ = ["Memory", "together"]


class _Sample(NamedTuple):
    """Fresh samples of a guide, and what is known of the points on target: log w without the guide's density."""

    guide: Guide
    batch: Batch
    log_weight: Floats


@dataclass
class Memory:
    """looks: populations of independent searches. log_masses: log of the target's mass as each search estimates it.
    samples: of guides, all of one target. latest: the guide that new looks are held against, and its log-weights.
    student: that was taught the severity, if one was.
    """

    looks: list[Population] = field(default_factory=list)
    log_masses: list[float] = field(default_factory=list)
    samples: list[_Sample] = field(default_factory=list)
    latest: tuple[Guide | BoundProgram, Floats] | None = None
    student: Student | None = None

    @classmethod
    def of(cls, look: Population | None) -> Memory:
        return cls() if look is None else cls([look], [0.0])

    def add(self, look: Population, log_mass: float) -> None:
        self.looks.append(look)
        self.log_masses.append(log_mass)

    def keep(self, guide: Guide | BoundProgram, batch: Batch) -> None:
        """Fresh samples of a guide. Those of a program have no z to learn from."""
        if isinstance(guide, BoundProgram) or not len(batch.z):
            return
        self.samples.append(_Sample(guide, batch, kept_weights(batch) - guide.log_ratio(batch.z)))

    def conclude(self, guide: Guide | BoundProgram, log_w: Floats) -> None:
        """What new looks will be held against: a guide and the log-weights of its samples."""
        self.latest = guide, log_w

    def novelty(self, look: Population, log_mass: float, planned: int) -> float:
        """The share of the target that a new look found where the latest guide would give none of so many samples.

        A look's mass in a region is right on average, so that one which found little altogether found little there.
        """
        if self.latest is None:
            return 1.0
        guide, log_w = self.latest
        share = seen(look, guide, log_w, planned=planned)[1]
        known = diagnostics.log_mean_exp(log_w)[0]
        return share * math.exp(min(0.0, log_mass - known)) if math.isfinite(known) else share

    def disagreement(self, look: Population, rng: np.random.Generator) -> float:
        """The share of a look that lies where a guide fitted to its other half would give none of its particles.

        The halves descend from different first particles (:class:`probest.smc.population.State`). Where there are as
        many modes as ancestors, each half has its own; nothing else tells, as long as there is one look alone.
        """
        first, second = np.split(np.arange(len(look.z)), [len(look.z) // 2])
        rows = (None, None) if look.rows is None else np.split(look.rows, [len(look.rows) // 2])
        shares = []
        for own, other, known in ((first, second, rows[0]), (second, first, rows[1])):
            fitted = fit_guide(look.z[own], look.log_w[own], rng, rows=known, effective=0.5 * look.effective)
            ours, theirs = (fitted.guide.log_ratio(look.z[part]) + look.log_weight[part] for part in (own, other))
            shares.append(above(theirs, look.log_w[other], ours))
        return float(np.mean(shares))

    def population(self) -> Population | None:
        """All looks as one sample of the target, by their masses and sizes; None without any."""
        if not self.looks:
            return None
        sizes = [math.log(len(look.z)) for look in self.looks]
        return together(self.looks, [mass + size for mass, size in zip(self.log_masses, sizes, strict=True)])

    def known(self) -> Population:
        """All looks and all samples as one to fit a guide to, each by what it is worth in independent points.

        By masses, one look that found much would hide what the others found: a guide has to go there too.
        """
        sampled = self._sampled()
        parts = self.looks if sampled is None else [*self.looks, sampled]
        return together(parts, [math.log(max(part.effective, 1.0)) for part in parts])

    def _sampled(self) -> Population | None:
        """The samples of all guides as one sample of their mixture; None without any on target."""
        if not self.samples:
            return None
        z = np.concatenate([sample.batch.z for sample in self.samples])
        log_weight = np.concatenate([sample.log_weight for sample in self.samples])
        total = sum(len(sample.batch.log_w) for sample in self.samples)
        log_q = np.full(len(z), -np.inf)
        for sample in self.samples:
            share = math.log(len(sample.batch.log_w) / total)
            log_q = np.logaddexp(log_q, share - sample.guide.log_ratio(z))
        log_w = clipped(log_weight - log_q)
        return Population(z, log_w, log_weight, None, diagnostics.effective_sample_size(log_w))


def together(parts: list[Population], log_shares: list[float]) -> Population:
    """Populations as one: the first halves of all of them before the second halves of all of them."""
    log_w = [
        part.log_w - diagnostics.log_sum_exp(part.log_w) + share for part, share in zip(parts, log_shares, strict=True)
    ]
    rows = [part.rows for part in parts if part.rows is not None]
    return Population(
        _by_halves([part.z for part in parts]),
        _by_halves(log_w),
        _by_halves([part.log_weight for part in parts]),
        _by_halves(rows) / math.sqrt(len(rows)) if rows else None,
        sum(max(part.effective, 1.0) for part in parts),
    )


def _by_halves(parts: list[Floats]) -> Floats:
    firsts = [part[: len(part) // 2] for part in parts]
    return np.concatenate([*firsts, *(part[len(part) // 2 :] for part in parts)])
