"""Opponents: adversaries that were searched for during training, kept and played against beside the given one.

Every so often the adversary within a KL budget of the given one is searched for under which the present model is worst
(:func:`probest.search`, by turns from the catastrophes that were found and from random places). A new one replaces the
old one that it resembles; of too many, the least dangerous leaves. Each step draws from all of them, the more the
likelier a catastrophe is under them (a soft maximum of log P over the pool), and trains on what is drawn: within an
opponent the cases weigh by Φ(severity/σ), which makes the gradient that of its own smoothed log P (Fisher's identity).

Half of the gradient stays with the given adversary's own ladder: opponents are trained too, and miss modes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from scipy.special import log_ndtr

from probest.adversaries.base import Opponent, Playable
from probest.adversaries.tilts import Tilt
from probest.diagnostics import log_sum_exp
from probest.evidence import Floats
from probest.guides.base import allocate
from probest.programs.event import Event
from probest.search import Search, SearchTuning
from probest.training.follower import Cases, Follower
from probest.tuning import tuned

__all__ = ["Opponents", "OpponentsTuning", "Pool"]

_BY = "by hand, on the regression of tests/test_training.py"
QUICK = SearchTuning(particles=512, draws=256, final=4_096)
"""How opponents are searched for: several in a run, and none of them is reported."""


@dataclass(frozen=True)
class Pool:
    """What ``train(adversaries=Pool(kl=3.0))`` plays against.

    kl: nats that an opponent may be away from the given adversary. every: steps of training between searches. steps: of
    each search, at most. most: opponents that are kept. family: a tilt, or a language adversary
    (:class:`probest.adversaries.language.LanguageAdversary`).
    """

    kl: float = 3.0
    every: int = 200
    steps: int = 200
    most: int = 4
    family: Playable = field(default_factory=Tilt)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.kl) and self.kl > 0.0):
            raise ValueError(f"kl={self.kl!r}: expected a positive number of nats")
        for name in ("every", "steps", "most"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected a whole number of at least 1")
        if not hasattr(self.family, "check_playable"):
            kind = type(self.family).__name__
            raise ValueError(f"family is a {kind}: opponents in training are tilts, or language adversaries")


@dataclass(frozen=True)
class OpponentsTuning:
    """How opponents are kept."""

    alike: float = tuned(1.0, "nats from a new opponent to an old one, within which it replaces it", _BY)
    least: float = tuned(0.1, "of the draws that go to opponents however harmless", _BY)
    memory: float = tuned(0.9, "of yesterday's average that stays at each step", _BY)


@dataclass
class Opponents:
    """laws: the opponents. level: log of the running mean of Φ(severity/σ) under each."""

    event: Event
    pool: Pool
    laws: list[Opponent] = field(default_factory=list)
    level: list[float] = field(default_factory=list)
    tuning: OpponentsTuning = field(default_factory=OpponentsTuning)

    def __len__(self) -> int:
        return len(self.laws)

    def add(self, found: Search, rng: np.random.Generator) -> None:
        """Keep an opponent; the one that it resembles, or the least dangerous of too many, leaves."""
        law = self.pool.family.opponent(self.event, found.law, found.parts)
        for i, old in enumerate(self.laws):
            if law.distance(old, rng) < self.tuning.alike:
                self.laws[i], self.level[i] = law, 0.0
                return
        self.laws.append(law)
        self.level.append(0.0)
        if len(self.laws) > self.pool.most:
            weakest = int(np.argmin(self.level[:-1]))
            del self.laws[weakest], self.level[weakest]

    def cases(self, event: Event, ladder: Follower, count: int, rng: np.random.Generator) -> Cases:
        """``count`` draws of all opponents; of the given adversary where there are none. A call each."""
        weight = np.exp(np.array(self.level) - log_sum_exp(np.array(self.level))) if self.laws else np.empty(0)
        weight = self.tuning.least / max(len(weight), 1) + (1.0 - self.tuning.least) * weight
        counts = allocate(count, weight, rng) if self.laws else ()
        drawn = [(i, *self.laws[i].cases(event, int(n), rng)) for i, n in enumerate(counts) if n]
        if not any(len(z) for _, z, _ in drawn):
            drawn = [(-1, rng.standard_normal((count, event.dim)), None)]
        owner = np.repeat([i for i, _, _ in drawn], [len(z) for _, z, _ in drawn])
        group = np.concatenate([self._group(k, z, ladder) for _, z, k in drawn])
        return self._judged(event, ladder, np.concatenate([z for _, z, _ in drawn]), group, owner)

    def _group(self, k: np.ndarray | None, z: Floats, ladder: Follower) -> np.ndarray:
        if k is not None or ladder.strata is None:
            return np.zeros(len(z), dtype=np.intp) if k is None else np.asarray(k, dtype=np.intp)
        return np.asarray(np.maximum(ladder.strata.index_of(z), 0))

    def _judged(self, event: Event, ladder: Follower, z: Floats, group: np.ndarray, owner: np.ndarray) -> Cases:
        severity = ladder.severity_of(event, z, group)
        noise = ladder.noise_of(group)
        log_soft = log_ndtr(severity / noise)
        share = np.zeros(len(z))
        for i in np.unique(owner):
            mine = owner == i
            soft = log_soft[mine]
            total = log_sum_exp(soft)
            share[mine] = mine.mean() * (np.exp(soft - total) if math.isfinite(total) else 1.0 / mine.sum())
            if i >= 0:
                keep, mean = self.tuning.memory, math.exp(total) / mine.sum()
                self.level[i] = math.log(max(keep * math.exp(self.level[i]) + (1.0 - keep) * mean, 1e-300))
        held = {} if ladder.strata is None else ladder.strata.held(group)
        return Cases(z, held, severity, noise, share, group)

    def arrays(self) -> dict[str, np.ndarray]:
        """All of it, by name, for a checkpoint."""
        kept = {"level": np.array(self.level, dtype=np.float64)}
        for i, law in enumerate(self.laws):
            kept |= {f"{i}.{name}": value for name, value in law.arrays().items()}
        return kept

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        self.level = [float(level) for level in arrays["level"]]
        own = [
            {n.removeprefix(f"{i}."): v for n, v in arrays.items() if n.startswith(f"{i}.")}
            for i in range(len(self.level))
        ]
        self.laws = [self.pool.family.restored(self.event, each) for each in own]
