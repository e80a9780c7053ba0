r"""Reading the network: log P without a sample, by tilting, propagating and correcting (:mod:`probest.moments.tilt`).

The severity is traced and brought into layers, the input and the noise of every layer are shifted to where the event
mostly happens, means and covariances are propagated from there, and terms of first order in 1 / width put back what a
Gaussian severity lacks. A number from the weights alone: deterministic, differentiable, as cheap at P = 1e-30 as at
1e-3, and more precise the wider the network is.

*When it fails*: narrow networks, and severities that are far from a Gaussian near the event; it states a large error
then. A mode far from the one that it settled at is looked for by settling anew from elsewhere; two modes that are far
apart and both matter are joined as a union of half-spaces.

The parts of ``any_of`` and ``all_of`` are read apart: those that have to be catastrophes together are tilted together,
by the normal law of all of them (:mod:`probest.moments.orthant`), others each to where it mostly happens.

Discrete sites are held: P = Σ p_k P_k, each stratum read by itself (:mod:`probest.programs.strata`).

*What it is worth* is told by its own error estimate, and by a look: a few calls of the model say whether it was read
right, and whether as many cases about the tilt are catastrophes as was foreseen. That look has no part in the
number. A heuristic: no other method's guarantee covers it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
from scipy import special

from probest import diagnostics
from probest.backends import special_numpy
from probest.backends.base import Array, Parts
from probest.budget import Meter, UndefinedError
from probest.checkers import Branch
from probest.estimators.base import Need, UnmetNeedError, check_least, check_needs
from probest.evidence import Code, EventLike, Evidence, Floats, Note, Population, Run
from probest.moments.layers import Layers, layers
from probest.moments.orthant import log_orthant
from probest.moments.parting import parted
from probest.moments.steps import MomentError
from probest.moments.tilt import Through, Tilt, Tilted, Tilting, resettled, tilted, untilted
from probest.programs.event import Event
from probest.programs.strata import Strata, StratumEvent, strata_of
from probest.seeds import child_seed, generator

__all__ = ["MomentPropagation", "advance", "elsewhere", "read"]

WHOLE: tuple[Branch, ...] = (((0, 1.0),),)


@dataclass(frozen=True)
class MomentPropagation:
    """Tilted moment propagation with corrections of first order in 1 / width.

    believed: the largest stated error, in nats, of a converged answer.
    look: model calls that check the reading; 0 for none, and then nothing is converged.
    starts: places from which another mode is looked for.
    max_strata: values of discrete sites together, at most; one with more is refused.
    tuning: the constants that decide the rest.
    """

    believed: float = 0.2
    look: int = 512
    starts: int = 2
    max_strata: int = 64
    tuning: Tilting = field(default_factory=Tilting, repr=False)
    needs: ClassVar[frozenset[Need]] = frozenset({"gradient", "unconditioned", "readable"})

    def __post_init__(self) -> None:
        check_least(self, believed=0.0, look=0, starts=0, max_strata=1)

    @property
    def name(self) -> str:
        return "moment propagation"

    def run(self, event: EventLike, *, budget: int, seed: np.random.SeedSequence) -> Run:
        """Read the event; ``budget`` bounds the look. The ledger has the plain tilt first, then the corrected value.

        Of a program with discrete sites: both of each stratum, then the sum.

        Raises UnmetNeedError if the event has no gradient, is conditioned, cannot be read, or has discrete sites that
        cannot be held in ``max_strata`` strata.
        """
        check_needs(self, event)
        meter = Meter(event, budget)
        if isinstance(event, Event) and event.discrete_sites:
            return self._stratified(event, meter, seed)
        return self._read(event, meter, seed)

    def _read(self, event: EventLike, meter: Meter, seed: np.random.SeedSequence) -> Run:
        try:
            net = read(event)
        except (MomentError, ValueError) as why:
            return self._unread(meter, why)
        return self.estimate(net, meter, seed)

    def _stratified(self, event: Event, meter: Meter, seed: np.random.SeedSequence) -> Run:
        """Each stratum by itself, and Σ p_k P_k."""
        strata = strata_of(event, self.max_strata)
        rest = () if strata is None else StratumEvent(strata, 0).discrete_sites
        if strata is None or rest or strata.varies or not len(strata.free):
            raise UnmetNeedError(
                f"{self.name} holds discrete sites, with {self.max_strata} values at most together (max_strata); "
                f"here {', '.join(rest or event.discrete_sites)} cannot be held. Use the default strategy"
            )
        method = replace(self, look=max(self.look // len(strata), min(self.look, self.tuning.least_look)))
        lines: list[Evidence] = []
        parts: list[Evidence] = []
        for k, log_p in enumerate(strata.log_prob):
            own = StratumEvent(strata, k)
            budget = meter.left // (len(strata) - k)
            run = method._read(own, Meter(own, budget), child_seed(seed, k)) if budget else None
            if run is None:
                note = Note(Code.BUDGET_SPENT, "the budget has less than a call for each stratum: raise it.")
                run = Run.of(Evidence.nothing(self.name, note, calls=0, seconds=0.0))
            meter.charge(run.calls)
            label = strata.label(k)
            lines += [replace(line, method=f"{line.method} ({label}: {math.exp(log_p):.3g})") for line in run.ledger]
            parts.append(run.conclusion)
        whole = self._summed(strata, parts)
        return Run((*lines, replace(whole, calls=meter.calls, seconds=meter.seconds)), meter.calls)

    def _summed(self, strata: Strata, parts: Sequence[Evidence]) -> Evidence:
        """Σ p_k P_k. A stratum of which nothing is known may be all catastrophe, and so may what no stratum holds."""
        values = strata.log_prob + np.array([one.log_prob for one in parts])
        total = float(special.logsumexp(values))
        lower = float(special.logsumexp(strata.log_prob + np.array([one.interval[0] for one in parts])))
        tops = strata.log_prob + np.array([one.interval[1] for one in parts])
        upper = float(special.logsumexp([*tops, strata.left_out]))
        shares = np.exp(values - total) if math.isfinite(total) else np.zeros(len(parts))
        known = shares > 0.0
        errors = np.array([one.std_error for one in parts])[known] + strata.std_error[known]
        error = float(shares[known] @ errors) if known.any() else math.inf
        doubts = [  # of strata that could matter
            Note(note.code, f"{strata.label(k)}: {note}")
            for k, one in enumerate(parts)
            if not one.converged and tops[k] > total + math.log(self.tuning.negligible)
            for note in one.notes
            if isinstance(note, Note)
        ]
        if strata.left_out > total + math.log(self.tuning.negligible):
            doubts.append(Note(Code.BUDGET_SPENT, "values beyond those that are listed could matter."))
        if not error <= self.believed:
            doubts.append(Note(Code.IMPRECISE, f"the stated error is {error:.2f} nats."))
        return Evidence(
            method=self.name,
            log_prob=total,
            std_error=error,
            interval=(lower, min(upper, 0.0)),
            claim="heuristic",
            calls=0,
            seconds=0.0,
            converged=not doubts and math.isfinite(total),
            diagnostics={"strata": float(len(parts))},
            notes=tuple(doubts),
            weigher=StratifiedReading(strata, tuple(one.weigher for one in parts), total, tuple(shares)),
        )

    def _unread(self, meter: Meter, why: Exception) -> Run:
        note = Note(Code.UNREADABLE, f"the event cannot be read: {why}")
        return Run.of(Evidence.nothing(self.name, note, calls=0, seconds=meter.seconds))

    def each(self, event: EventLike, *, budget: int, seed: np.random.SeedSequence) -> tuple[Evidence, ...]:
        """log P of each part of a combined checker by itself, in their order: many events of one network at once.

        Such as its output neurons, ``any_of`` them: the network is read once, the first propagation serves all, and one
        look of ``budget`` calls is shared. What the parts are together in the checker does not matter.

        Raises as :meth:`run`, and UnmetNeedError for discrete sites or an event that cannot be read.
        """
        check_needs(self, event)
        meter = Meter(event, budget)
        if getattr(event, "discrete_sites", ()):
            raise UnmetNeedError(f"{self.name}: parts are not read one by one where there are discrete sites")
        try:
            net = read(event, ends=False)
            middle = untilted(net, self.tuning)
        except (MomentError, ValueError) as why:
            raise UnmetNeedError(f"{self.name}: the event cannot be read: {why}") from why
        count = net.output.size
        method = replace(self, look=max(self.look // count, min(self.look, self.tuning.least_look)))
        found = []
        for j in range(count):
            modes = method._modes(net, ((j, 1.0),), middle, child_seed(seed, j))
            before = meter.calls
            line = method._evidence(net, modes, meter, generator(child_seed(seed, count + j)))[1]
            found.append(replace(line, calls=meter.calls - before))
        return tuple(found)

    def estimate(self, net: Layers, meter: Meter, seed: np.random.SeedSequence) -> Run:
        """As :meth:`run`, of an event that was read (:func:`read`) and has what this needs; meter: of that event."""
        try:
            found = self.modes(net, seed)
        except (MomentError, ValueError) as why:
            return self._unread(meter, why)
        return Run(self._evidence(net, found, meter, generator(seed)), meter.calls)

    def _evidence(
        self, net: Layers, found: Sequence[Tilted], meter: Meter, rng: np.random.Generator
    ) -> tuple[Evidence, Evidence]:
        """The plain tilt's and the corrected value."""
        log_prob, error, doubts = self.concluded(found)
        notes = (*self._look(meter, net, found, rng), *doubts)
        figures = {
            "modes": float(len(found)),
            "beta": float(found[0].beta),
            "kappa": max(mode.kappa for mode in found),
            "linear_share": float(found[0].share),
            "moved": max(mode.moved for mode in found),
        }
        plain = Evidence(
            method="tilted moments",
            log_prob=_union(found, corrected=False),
            std_error=math.inf,
            interval=(-math.inf, 0.0),
            claim="heuristic",
            calls=0,
            seconds=meter.seconds,
            converged=False,
            diagnostics=figures,
        )
        wide = 1.96 / 1.645 * error
        corrected = Evidence(
            method=self.name,
            log_prob=log_prob,
            std_error=error,
            interval=(log_prob - wide, min(log_prob + wide, 0.0)) if math.isfinite(error) else (-math.inf, 0.0),
            claim="heuristic",
            calls=meter.calls,
            seconds=meter.seconds,
            converged=not notes and math.isfinite(log_prob),
            diagnostics=figures,
            notes=notes,
            weigher=Reading(
                log_prob,
                _shares(found),
                _gains(found),
                tuple(mode.tilt for mode in found),
                tuple(mode.which for mode in found),
                net.parted,
                self.tuning,
            ),
        )
        return plain, corrected

    def modes(self, net: Layers, seed: np.random.SeedSequence, *, which: int | None = None) -> list[Tilted]:
        """Those of every branch, or of one output.

        Outputs that have to be catastrophes together are tilted together, others apart.
        """
        branches = net.branches if which is None else (((which, 1.0),),)
        middle = untilted(net, self.tuning)
        return [
            mode
            for k, branch in enumerate(branches)
            for mode in self._modes(net, branch, middle, child_seed(seed, k) if k else seed)
        ]

    def _modes(self, net: Layers, which: Branch, middle: Through, seed: np.random.SeedSequence) -> list[Tilted]:
        """The mode that the middle of the adversary leads to, and others that other starts lead to, of one branch."""
        first = tilted(net, which=which, settings=self.tuning, first=middle)
        length = float(np.linalg.norm(first.tilt.input))
        lost = length < self.tuning.nowhere  # a place to start from, then, and not a mode
        distance = length if length > 1.0 else self.tuning.away
        found = [] if lost else [first]
        rng = generator(seed)
        opposite = False
        for _ in range(2 * self.starts if lost else self.starts):
            towards = rng.standard_normal(net.dim)
            towards /= np.linalg.norm(towards)
            if found and not opposite:  # first of all, on the other side of the first
                towards, opposite = -found[0].direction, True
            start = Tilt(distance * towards, tuple(0.0 * n for n in first.tilt.noises))
            settled = resettled(net, first, start, which=which, settings=self.tuning)
            if not np.isfinite(settled.input).all() or any(self._same(settled, m.tilt) for m in found):
                continue
            other = tilted(net, which=which, start=settled, settings=self.tuning)
            if math.isfinite(other.log_prob) and not any(self._same(other.tilt, m.tilt) for m in found):
                found.append(other)
        return found or [first]

    def _same(self, one: Tilt, other: Tilt) -> bool:
        """Whether two tilts lead to the same mode; one without a direction leads to none of its own."""
        a, b = (float(np.linalg.norm(tilt.input)) for tilt in (one, other))
        alike = float(one.input @ other.input) > self.tuning.alike * a * b
        return alike or min(a, b) < self.tuning.nowhere

    def concluded(self, found: Sequence[Tilted]) -> tuple[float, float, tuple[Note, ...]]:
        """log P, its stated error, and what in the modes themselves speaks against them."""
        error, notes = _error(found), []
        if not error <= self.believed:  # nor where it is not a number
            sentence = f"what was put back is too large to be all: the stated error is {error:.2f} nats."
            notes.append(Note(Code.IMPRECISE, sentence))
        moved, left = max(mode.moved for mode in found), max(mode.left for mode in found)
        if not (moved <= self.tuning.settled and left <= self.tuning.near):
            far = f"its last round moved log P by {moved:.2g}, and it is {left:.2g} away."
            notes.append(Note(Code.STUCK, f"the tilt had not settled: {far}"))
        return _union(found, corrected=True), error, tuple(notes)

    def _look(self, meter: Meter, net: Layers, found: Sequence[Tilted], rng: np.random.Generator) -> tuple[Note, ...]:
        """What speaks against the reading."""
        notes = []
        each = min(self.look, meter.left) // len(found)
        if each < self.tuning.least_look:
            notes.append(Note(Code.UNCHECKED, "no model calls were left to check the reading with."))
        for mode in found if each >= self.tuning.least_look else ():
            z = mode.tilt.input + rng.standard_normal((each, net.dim))
            try:
                severity = meter.evaluate(z).severity
            except UndefinedError as error:
                return (Note(Code.UNDEFINED, f"about the tilt {error}."),)
            outputs = net(z)
            off = _misread(net, outputs, severity)
            if not off < self.tuning.misread:
                sentence = f"the model answers otherwise than it was read (by {off:.2g} standard deviations): a bug."
                return (Note(Code.UNREADABLE, sentence),)
            notes += self._compared(mode, net.branch(mode.which, outputs))
        return tuple(notes)

    def _compared(self, mode: Tilted, severity: Floats) -> list[Note]:
        """Severities of the mode's branch about the tilted input, against what was propagated: the share of hits."""
        n, hits = len(severity), int((severity >= 0).sum())
        foreseen = float(mode.foreseen)
        low, high = diagnostics.binomial_interval(hits, n, 1.0 - 2.0 * self.tuning.surprise)
        room = math.expm1(self.believed)
        if low - room <= foreseen <= min(high + room, 0.0):
            return []
        return [
            Note(
                Code.DISAGREE,
                f"{hits} of {n} draws about the tilt are catastrophes, where a share of {math.exp(foreseen):.2g} was "
                "foreseen: what is neglected matters here.",
            )
        ]


@dataclass(frozen=True)
class StratifiedReading:
    """What strata were read as. shares: of each in P."""

    strata: Strata
    readings: tuple[Reading | None, ...]
    log_prob: float
    shares: tuple[float, ...]

    def __call__(self, event: Event) -> Callable[[Parts], Array]:
        """As :class:`Reading`; the probabilities of the strata are functions of the parameters too."""
        strata, backend = replace(self.strata, event=event), event.backend
        known = [k for k, share in enumerate(self.shares) if share > 0.0 and self.readings[k] is not None]
        values = {k: self.readings[k](StratumEvent(strata, k)) for k in known}  # type: ignore[misc]
        z = backend.from_host(np.zeros((1, event.dim)))
        held = {k: {n: backend.from_host(v[None]) for n, v in strata[k].values.items()} for k in known}

        def log_prob_at(parts: Parts) -> Array:
            total = self.log_prob + 0.0 * backend.special.xp.sum(z)
            for k in known:
                own = values[k](parts) + event.scores(z, held[k], parts)[1][0]
                total = total + self.shares[k] * (own - backend.constant(own))
            return total

        return log_prob_at


@dataclass(frozen=True)
class Reading:
    """What the modes of an event were settled at, and of which branches they are: log P as a function of the
    parameters.

    shares: of each mode in the sum of all; gains: of log P by the log of each mode's probability, less for what modes
    have in common. parted: whether the end of what was read was taken apart.
    """

    log_prob: float
    shares: tuple[float, ...]
    gains: tuple[float, ...]
    tilts: tuple[Tilt, ...]
    branches: tuple[Branch, ...]
    parted: bool
    tuning: Tilting

    def __call__(self, event: Any) -> Callable[[Parts], Array]:
        """``(parts) -> log P``, differentiable: read anew, with the tilt moving on from where it was."""
        backend = event.backend
        put, zeros = backend.from_host, backend.from_host(np.zeros(event.dim))
        tuning = replace(self.tuning, rounds=3, most_rounds=3, between=self.tuning.followed, close=0.0)

        def log_prob_at(parts: Parts) -> Array:
            function, branches = _function(event, parts)
            net = replace(layers(function, zeros), branches=branches)
            if self.parted:
                net = parted(net, lambda x: backend.to_host(backend.constant(x)))
            total = 0.0 * zeros[0] + self.log_prob
            for share, tilt, branch in zip(self.gains, self.tilts, self.branches, strict=True):
                start = Tilt(put(tilt.input), tuple(map(put, tilt.noises)))
                value = tilted(net, which=branch, start=start, settings=tuning).log_prob
                total = total + share * (value - backend.constant(value))
            return total

        return log_prob_at


def advance(net: Layers, reading: Evidence) -> float:
    """Mean of z·m / |m|² over the catastrophes, m the tilt of their mode, as the reading has it: about 1.

    The mean of z given a catastrophe is the gradient of log P in a shift of z; here, half of what a shift by
    ± ``Tilting.shifted`` along the tilt makes of log P.
    """
    found, by = reading.weigher, reading.weigher.tuning.shifted
    total = 0.0
    for share, tilt, branch in zip(found.shares, found.tilts, found.branches, strict=True):
        length = max(float(np.linalg.norm(tilt.input)), found.tuning.nowhere)
        towards = by * tilt.input / length
        above, below = (
            float(tilted(net.shifted(d), which=branch, start=start, settings=found.tuning).log_prob)
            for d, start in ((d, Tilt(tilt.input - d, tilt.noises)) for d in (towards, -towards))
        )
        total += share * (above - below) / (2.0 * by * length)
    return total


def elsewhere(reading: Evidence, expected: float, found: Population, independent: float) -> tuple[float, float]:
    """The share of catastrophes that lie elsewhere than the reading says, and its standard error.

    z·m / |m|² is 0 on average at what has nothing to do with the tilt m.

    Args:
        reading: of :class:`MomentPropagation`.
        expected: what :func:`advance` says.
        found: catastrophes, found by other means.
        independent: how many independent ones they are worth.
    """
    tilts = np.stack([tilt.input for tilt in reading.weigher.tilts])
    along = (found.z @ (tilts / np.maximum(np.sum(tilts**2, axis=1, keepdims=True), 1e-12)).T).max(axis=1)
    weights = np.exp(found.log_w - special.logsumexp(found.log_w))
    mean = float(weights @ along)
    error = math.sqrt(float(weights @ (along - mean) ** 2) / max(independent, 1.0))
    return 1.0 - mean / expected, error / expected


def read(event: Any, most: int | None = None, *, ends: bool = True) -> Layers:
    """The severity of an event in layers, in NumPy: those of the parts of a combined checker, where there are not too
    many. MomentError where the layers are more than ``most``. ends: whether what it ends in is taken apart too.
    """
    function, branches = _function(event)
    found = layers(function, event.backend.from_host(np.zeros(event.dim)), most).on_host(event.backend)
    found = replace(found, branches=branches)
    return parted(found) if ends else found


def _misread(net: Layers, outputs: Floats, severity: Floats) -> float:
    """How far the model's answers are from what was read, in their standard deviations.

    Where only signs were read, how far beyond the limit it was taken to be elsewhere, in those of what was read.
    """
    known = net.severity(outputs)
    if net.signs:
        wrong = (known >= 0.0) != (severity >= 0.0)
        return float(np.abs(known[wrong]).max(initial=0.0)) / max(float(known.std()), 1e-300)
    return float(np.abs(known - severity).max()) / max(float(severity.std()), 1e-300)


def _function(event: Any, parts: Parts | None = None) -> tuple[Callable[[Array], Array], tuple[Branch, ...]]:
    """The severities to be read, and which of them are a catastrophe together."""
    branches = getattr(event, "branches", WHOLE)
    if branches and branches != WHOLE:
        return event.function(parts, apart=True), branches
    return event.function(parts), WHOLE


def _union(found: Sequence[Tilted], corrected: bool) -> float:
    """log Pr of the union of the modes' half-spaces, each of its own probability, and correlated as they are."""
    values = np.array([_value(mode) if corrected else float(mode.gaussian) for mode in found])
    return _joined(values, _correlations(found))


def _gains(found: Sequence[Tilted]) -> tuple[float, ...]:
    """The derivatives of log Pr of the union in each mode's own."""
    if len(found) == 1:
        return (1.0,)
    values, correlations, step = np.array([_value(mode) for mode in found]), _correlations(found), 1e-4
    ends = [[_joined(values + side * row, correlations) for side in (1.0, -1.0)] for row in step * np.eye(len(found))]
    return tuple((above - below) / (2.0 * step) for above, below in ends)


def _joined(values: Floats, correlations: Floats) -> float:
    means = special.ndtri_exp(np.minimum(values, -1e-300))
    parts = [float(values[0])]
    for i in range(1, len(values)):  # each without those before it
        rows = np.array([i, *range(i)])
        signs = np.where(np.arange(i + 1) == 0, 1.0, -1.0)
        cov = correlations[np.ix_(rows, rows)] * np.outer(signs, signs)
        parts.append(float(log_orthant(special_numpy, (signs * means[rows])[None], cov)[0]))
    return min(max(float(special.logsumexp(parts)), float(values.max())), 0.0)


def _correlations(found: Sequence[Tilted]) -> Floats:
    """Those of all modes: the correlation matrix nearest to one that is put together pair by pair."""
    value, basis = np.linalg.eigh(np.array([[_correlation(one, other) for other in found] for one in found]))
    found = (basis * np.maximum(value, 1e-9)) @ basis.T
    scale = np.sqrt(np.diag(found))
    return np.asarray(found / np.outer(scale, scale))


def _correlation(one: Tilted, other: Tilted) -> float:
    """Of the severities of two modes: what is linear in z, and, between branches, what layers have in common.

    The noise of a layer is taken as each of them has it, and the middle of the two.
    """
    if one is other:
        return 1.0
    linear = float(one.direction @ other.direction) * math.sqrt(float(one.share * other.share))
    if one.which == other.which:
        return linear
    noise = 0.0
    for about in (one.about, other.about):
        pairs = zip(about.layers, one.about.gains, other.about.gains, strict=True)
        noise += 0.5 * sum(float(g @ layer.N @ h) for layer, g, h in pairs)
    return float(np.clip(linear + noise / float(one.sd * other.sd), -1.0, 1.0))


def _error(found: Sequence[Tilted]) -> float:
    """Of log of a sum: errors weighted by the shares."""
    return float(sum(share * mode.error for share, mode in zip(_shares(found), found, strict=True)))


def _shares(found: Sequence[Tilted]) -> tuple[float, ...]:
    values = np.array([_value(mode) for mode in found])
    return tuple(np.exp(values - special.logsumexp(values)).tolist())


def _value(mode: Tilted) -> float:
    """The corrected value; the plain one where corrections make no probability of it."""
    corrected = float(mode.log_prob)
    return corrected if corrected < 0.0 else float(mode.gaussian)
