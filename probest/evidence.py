"""What estimators read and what they leave: an event in, evidence and particles out.

An estimator sees a problem only through :class:`EventLike`: a batch of standard-normal coordinates goes in, severities
(and gradients) come out, all as NumPy float64. So estimators are written and tested once, for both backends, and can be
tested on events that are three lines of NumPy. What it leaves is a :class:`Run`: :class:`Evidence`, line by line, and
the population that it ended with, for whoever goes on from there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, NamedTuple, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "QUANTILES",
    "Claim",
    "Code",
    "Counts",
    "Evaluation",
    "EventLike",
    "Evidence",
    "Families",
    "Floats",
    "Level",
    "Note",
    "Particles",
    "Population",
    "Run",
]

Floats = NDArray[np.float64]

Claim = Literal["unbiased", "consistent", "lower", "upper", "heuristic"]


class Evaluation(NamedTuple):
    """An event at ``n`` points.

    severity: ``(n,)``; at least 0 is a catastrophe.
    log_weight: ``(n,)`` log-weight of observed sites, discrete corrections and factors; zeros when there are none.
    severity_grad: ``(n, dim)`` gradient of the severity in z, or None when it was not asked for.
    log_weight_grad: ``(n, dim)`` gradient of the log-weight, or None when not asked for or not weighted.
    """

    severity: Floats
    log_weight: Floats
    severity_grad: Floats | None = None
    log_weight_grad: Floats | None = None


@runtime_checkable
class EventLike(Protocol):
    """A problem as functions of standard-normal coordinates z of shape ``(n, dim)``."""

    @property
    def dim(self) -> int: ...

    @property
    def differentiable(self) -> bool:
        """Whether the severity has a useful gradient in z (False for a boolean checker)."""

    @property
    def boolean(self) -> bool:
        """Whether the checker says only yes or no; severity is then +1 or -1."""

    @property
    def weighted(self) -> bool:
        """Whether the adversary is conditioned, so that log-weights are not all zero."""

    def evaluate(self, z: Floats, *, gradient: bool = False) -> Evaluation:
        """Severity and log-weight at each row of z. Costs 1 call a row, 3 with the gradient."""


class Particles(NamedTuple):
    """A weighted sample of catastrophes (rows with severity >= 0), in z.

    z: ``(n, dim)``. log_weight: ``(n,)`` normalised so that its log-sum-exp is 0. severity: ``(n,)``.
    Expectations over the particles estimate expectations under the adversary given a catastrophe.
    """

    z: Floats
    log_weight: Floats
    severity: Floats


QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class Level(NamedTuple):
    """A level of a tempering run, after its moves.

    severity: ``(5,)`` quantiles of the population's severities, at the shares ``QUANTILES``. log_prob: log of what is
    left of the adversary's mass so far, in nats; the last is log P. particles: size of the population. acceptance: of
    its last move. conditioning: whether the observed sites were still being brought in.
    """

    severity: tuple[float, ...]
    log_prob: float
    particles: int
    acceptance: float
    conditioning: bool = False

    @classmethod
    def of(cls, severity: Floats, log_prob: float, acceptance: float, *, conditioning: bool = False) -> Level:
        """The level of a population with these severities ``(n,)``."""
        ends = np.quantile(severity, QUANTILES, method="inverted_cdf")  # no sum of infinities
        return cls(tuple(map(float, ends)), log_prob, len(severity), acceptance, conditioning)


class Code(StrEnum):
    """What a note is about."""

    BUDGET_SPENT = "budget spent"
    CHECKER_BUDGET_SPENT = "checker budget spent"
    DISAGREE = "disagree"
    FEW_ANCESTORS = "few ancestors"
    FEW_COUNT = "few count"
    FEW_HITS = "few hits"
    FLAT = "flat severity"
    GIVEN_UP = "given up"
    HEAVY_TAILS = "heavy tails"
    IMPRECISE = "imprecise"
    INCOMPATIBLE = "incompatible with observations"
    INTERRUPTED = "interrupted"
    NO_BOUNDARY = "no boundary"
    NO_HITS = "no hits"
    NOT_LEARNED = "not learned"
    ROUNDED = "rounded"
    ONE_CARRIES = "one carries much"
    SECOND_CHOICE = "second choice"
    STRAYED = "walks strayed"
    STUCK = "stuck"
    TRIAL = "trial"
    UNCHECKED = "unchecked"
    UNDEFINED = "undefined"
    UNREACHED = "unreached"
    UNREADABLE = "unreadable"
    UNSEEN = "unseen mass"


class Note(str):
    """A sentence that says what is wrong and what to do, with a code that programs can go by."""

    code: Code

    def __new__(cls, code: Code, sentence: str) -> Self:
        note = super().__new__(cls, sentence)
        note.code = code
        return note

    def __getnewargs__(self) -> tuple[Any, ...]:
        return self.code, str(self)


@dataclass(frozen=True)
class Evidence:
    """One line of the argument: log P or a bound on it, and how far to believe it.

    log_prob: natural log; ``-inf`` when no catastrophe was seen (then ``interval`` has a finite upper end).
    std_error: standard error of ``log_prob`` in nats; ``inf`` when unknown.
    interval: 95 % interval of log P, ``(lower, upper)``; ``(-inf, x)`` is an upper bound only.
    claim: what the number is: ``unbiased`` (P̂ has mean P), ``consistent``, a ``lower`` or ``upper`` bound,
        or ``heuristic`` (a number without a guarantee).
    calls: model calls spent (forward 1, gradient 3). seconds: wall clock.
    converged: the method's own verdict; ``notes`` say why not and what to do.
    diagnostics: named numbers (``ess``, ``khat``, ``acceptance`` ...).
    stratum: what the line is about, where it is only a part of the event; it then says what that part adds to P.
    levels: the way of a tempering run from the adversary's draws to the event; empty for other methods.
    prior_particles: for a conditioned adversary, a weighted sample of the adversary itself (not of catastrophes).
    weigher: ``weigher(event)``, of a method whose number is a function of the parameters without particles, gives
        ``(parts) -> log P``.
    log_evidence: log of the adversary's own evidence (the normaliser of its observed sites); 0 when there are none.
    floor: what log P is above without any doubt, such as the probability of catastrophes that were listed.
    batches: logs of estimates from equal, independent parts of a sample, each of mean P whatever stopped the sampling.
    """

    method: str
    log_prob: float
    std_error: float
    interval: tuple[float, float]
    claim: Claim
    calls: int
    seconds: float
    converged: bool
    particles: Particles | None = None
    prior_particles: Particles | None = None
    log_evidence: float = 0.0
    diagnostics: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    stratum: str | None = None
    levels: tuple[Level, ...] = field(default=(), repr=False)
    weigher: Any = field(default=None, repr=False, compare=False)
    floor: float = -math.inf
    batches: tuple[float, ...] = field(default=(), repr=False)

    @classmethod
    def nothing(
        cls,
        method: str,
        note: Note,
        *,
        calls: int,
        seconds: float,
        upper: float = 0.0,
        diagnostics: Mapping[str, float] | None = None,
    ) -> Evidence:
        """Nothing was found, for the reason in ``note``. upper: what log P is below nevertheless (95 %)."""
        return cls(
            method=method,
            log_prob=-math.inf,
            std_error=math.inf,
            interval=(-math.inf, upper),
            claim="upper",
            calls=calls,
            seconds=seconds,
            converged=False,
            diagnostics=diagnostics or {},
            notes=(note,),
        )

    @property
    def codes(self) -> frozenset[Code]:
        """The codes of the notes, for programs to go by."""
        return frozenset(note.code for note in self.notes if isinstance(note, Note))


class Population(NamedTuple):
    """Weighted particles of a target, with what a guide can learn from them.

    z ``(n, dim)``; log_w ``(n,)``; log_weight ``(n,)`` of observed sites; rows: gradient information
    (:func:`probest.guides.subspace.gradient_rows`) or None; effective: how many independent particles they are worth.
    """

    z: Floats
    log_w: Floats
    log_weight: Floats
    rows: Floats | None
    effective: float


class Families(NamedTuple):
    """Families of a tempering run: log-estimates ``(k,)`` of P (times evidence), of the evidence or None, and the
    run's size, which was fixed before it started.
    """

    log_z: Floats
    log_prior: Floats | None
    size: float


class Counts(NamedTuple):
    """Plain sampling: how many draws, and how many of them were catastrophes."""

    hits: int
    draws: int


@dataclass(frozen=True)
class Run:
    """What an estimator leaves.

    ledger: the evidence in the order in which it was found, the conclusion last; at least one line.
    calls: model calls of the whole run.
    population: the catastrophes with what a guide can learn from them; prior_population: the same of the conditioned
        adversary itself. None where there are none.
    families: what each family of a tempering run says of P. counts: hits and draws of plain sampling.
    """

    ledger: tuple[Evidence, ...]
    calls: int
    population: Population | None = None
    prior_population: Population | None = None
    families: Families | None = None
    counts: Counts | None = None

    def __post_init__(self) -> None:
        if not self.ledger:
            raise ValueError("ledger is empty: a run has at least one line of evidence, its conclusion")

    @property
    def conclusion(self) -> Evidence:
        """The last line of the ledger."""
        return self.ledger[-1]

    @classmethod
    def of(cls, evidence: Evidence, **found: Any) -> Run:
        """A run of one line, which spent what the line says. found: the other fields of a run."""
        return cls((evidence,), evidence.calls, **found)
