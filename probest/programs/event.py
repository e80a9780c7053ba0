"""A problem compiled to functions of a batch of standard-normal coordinates.

:class:`Composition` is the problem as a function of one z; it is hashable by value, so that a backend compiles it
once for all problems of the same shape. :class:`Event` is what estimators read (NumPy in, NumPy out), what decodes z
to named sites, and what evaluates severities differentiably in the parameters of the model and the adversary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from scipy import stats

from probest import checkers
from probest.backends.base import Array, Backend, Parts, PyTree, chunks
from probest.budget import FORWARD_CALLS, GRADIENT_CALLS
from probest.checkers import BlackBox, SeverityError
from probest.evidence import Evaluation, Floats
from probest.programs.base import Frontend, Observed, Run, Site
from probest.seeds import generator

if TYPE_CHECKING:
    from probest.moments.kinds import Kinds

__all__ = ["Batching", "Cases", "Composition", "Event", "ProblemError", "SeverityError", "compose"]

Batching = Literal["vmap", "model", "loop"]
TEXT = "TokenSequences"  # name of the law of a site of text

LARGE_SEVERITY = 1e30
_KIND = "probest: kind"  # held beside sites
UNREACHED = -230.0
"""log of a probability that no estimate comes near: what D does beyond, rounding decides."""


class ProblemError(ValueError):
    """A problem that cannot be estimated as written; the message says which part and what to do."""


class Cases(NamedTuple):
    """Decoded draws. sites: each ``(n, ...)``; observation, action: pytrees of arrays ``(n, ...)``."""

    sites: dict[str, np.ndarray]
    observation: PyTree
    action: PyTree


class Nearest(NamedTuple):
    """The catastrophe nearest to the middle of D that was seen, or, without any, the case of greatest severity.

    z ``(dim,)``; held: values of sites that were held, each ``(1, ...)``; severity: of this case.
    """

    z: Floats
    held: dict[str, np.ndarray]
    severity: float

    @property
    def rank(self) -> tuple[bool, float]:
        """Greater for a case that is nearer."""
        return _rank(self.severity, self.z)


def _rank(severity: float, z: Floats) -> tuple[bool, float]:
    return (True, -float(z @ z)) if severity >= 0.0 else (False, severity)


@dataclass(frozen=True)
class Composition:
    """Adversary, model and checker as one function of z. Equal compositions share compiled code.

    late: whether the model or the checker draws sites too.

    Black boxes among the checkers cannot be part of it: they are asked on the host, by :class:`Event`, and the severity
    here is then 0.
    """

    frontend: Frontend
    checker: Any
    closed_loop: bool
    batching: Batching
    sites: tuple[Site, ...]
    late: bool = False

    @property
    def interleaved(self) -> bool:
        """Whether sites cannot be had without the model: a closed loop, or sites that the model or checker draws."""
        return self.closed_loop or self.late

    @property
    def compiled(self) -> bool:
        return self.batching != "loop"

    @cached_property
    def black_boxes(self) -> tuple[BlackBox, ...]:
        return tuple(leaf for leaf in checkers.leaves(self.checker) if isinstance(leaf, BlackBox))

    def judge(self, observation: PyTree, action: PyTree) -> Any:
        """The severity of one case; where there are black boxes, a tuple of those of all other parts of the checker."""
        return self.native(observation, action) if self.black_boxes else self.checker(observation, action)

    def native(self, observation: PyTree, action: PyTree) -> tuple[Any, ...]:
        """The severities of one case of all leaves of the checker but black boxes."""
        leaves = (leaf for leaf in checkers.leaves(self.checker) if not isinstance(leaf, BlackBox))
        return tuple(leaf(observation, action) for leaf in leaves)

    def judge_on_host(self, observation: PyTree, action: PyTree, native: tuple[np.ndarray, ...], n: int) -> np.ndarray:
        """Severities ``(n,)`` of a batch of NumPy pytrees: float or bool, from :meth:`judge` and the boxes."""
        tree_map, others = self.frontend.backend.tree_map, iter(native)
        severities = (
            leaf.rows(tree_map, observation, action, n) if isinstance(leaf, BlackBox) else next(others)
            for leaf in checkers.leaves(self.checker)
        )
        return np.asarray(checkers.join(self.checker, severities))

    def in_program(self, boolean: bool) -> Any:
        """The checker as part of a program of the library, black boxes included. boolean: whether they return bools."""

        def checker(observation: PyTree, action: PyTree) -> Any:
            severities = (
                self._ask(leaf, observation, action, boolean)
                if isinstance(leaf, BlackBox)
                else leaf(observation, action)
                for leaf in checkers.leaves(self.checker)
            )
            return checkers.join(self.checker, severities)

        return checker

    def _ask(self, box: BlackBox, observation: PyTree, action: PyTree, boolean: bool) -> Array:
        backend = self.frontend.backend

        def one(*case: PyTree) -> np.ndarray:
            observation, action = (backend.tree_map(lambda leaf: leaf[None], tree) for tree in case)
            return box.rows(backend.tree_map, observation, action, 1).reshape(())

        return backend.call_host(one, observation, action, boolean=boolean)

    def __call__(self, parts: Parts, z: Array, held: dict[str, Array]) -> tuple[Array, Array]:
        """Severity and log-weight, each ``(n,)``, for z of shape ``(n, dim)`` and held site values ``(n, ...)``."""
        backend = self.frontend.backend
        if self.batching == "model":
            observation, log_weight = backend.rows(self._observe, parts, z, held)
            action = parts.model(observation)
            return backend.rows(self._judge, parts, (observation, action), {}), log_weight
        across = backend.loop if self.batching == "loop" else backend.rows
        severity, log_weight = across(self._score, parts, z, held)
        return severity, log_weight

    def run(self, parts: Parts, z: Array, held: Mapping[str, Array]) -> Run:
        """One case. The run's value is ``(observation, action, severity)``."""
        with self.frontend.recording(self._source(z), held, parts.params) as recording:
            value = self.followed(parts.adversary, parts.model)()
        return recording.finish(value)

    def followed(self, adversary: Any, model: Any) -> Any:
        """The program ``() -> (observation, action, severity)`` of these parts."""
        return compose(self.frontend, self.closed_loop, adversary, model, self.judge)

    def replay(self, parts: Parts, z: Array, *model: Any, held: Mapping[str, Array] | None = None) -> PyTree:
        """What the adversary returns at z, inside another program, which sees none of its sites.

        held: values of sites that replace what z says.
        """
        with self.frontend.hidden(), self.frontend.recording(self._source(z), held or {}, parts.params):
            return parts.adversary(*model)

    def _score(self, parts: Parts, z: Array, held: dict[str, Array]) -> tuple[Array, Array]:
        run = self.run(parts, z, held)
        return self._as_severity(run.value[2]), run.log_weight

    def _apart(self, parts: Parts, z: Array, held: dict[str, Array]) -> Array:
        """The severities of all leaves of the checker, ``(J,)``."""
        with self.frontend.recording(self._source(z), held, parts.params):
            value = compose(self.frontend, self.closed_loop, parts.adversary, parts.model, self.native)()
        return self.frontend.backend.special.xp.stack([self._as_severity(one) for one in value[2]])

    def _observe(self, parts: Parts, z: Array, held: dict[str, Array]) -> tuple[PyTree, Array]:
        with self.frontend.recording(self._source(z), held, parts.params) as recording:
            observation = parts.adversary()
        return observation, recording.finish(None).log_weight

    def _judge(self, parts: Parts, case: tuple[PyTree, PyTree], held: dict[str, Array]) -> Array:
        return self._as_severity(self.judge(*case))

    def _as_severity(self, severity: Any) -> Array:
        xp = self.frontend.backend.special.xp
        if self.black_boxes:
            return xp.zeros(())
        severity = self.frontend.backend.as_array(severity)
        if severity.dtype == xp.bool:
            return xp.where(severity, 1.0, -1.0)
        return severity * 1.0

    def _source(self, z: Array) -> Any:
        slices = self.slices

        def source(name: str, shape: tuple[int, ...]) -> Array:
            if name not in slices:
                raise ProblemError(
                    f"site {name!r} appears in some runs of the adversary and not in others. probest needs the same "
                    "sites in every run: draw them always, and choose with where()"
                )
            return z[slices[name]].reshape(shape)

        return source

    @cached_property
    def slices(self) -> dict[str, slice]:
        ends = np.cumsum([0, *(site.size for site in self.sites)])
        return {site.name: slice(int(a), int(b)) for site, a, b in zip(self.sites, ends, ends[1:], strict=False)}


@dataclass(frozen=True)
class _Decoder:
    """A composition's sites, observation and action, instead of its severity."""

    composition: Composition

    @property
    def compiled(self) -> bool:
        return self.composition.batching == "vmap"

    def __call__(self, parts: Parts, z: Array, held: dict[str, Array]) -> tuple[dict[str, Array], PyTree, PyTree]:
        backend = self.composition.frontend.backend
        across = backend.rows if self.composition.batching == "vmap" else backend.loop
        sites, observation, action = across(self._case, parts, z, held)
        return sites, observation, action

    def _case(self, parts: Parts, z: Array, held: dict[str, Array]) -> tuple[dict[str, Array], PyTree, PyTree]:
        backend = self.composition.frontend.backend
        run = self.composition.run(parts, z, held)
        observation, action = (backend.tree_map(backend.as_array, tree) for tree in run.value[:2])
        return run.sites, observation, action


@dataclass(frozen=True)
class _OpenLoop:
    """What the adversary of an open loop says in each case; neither model nor checker runs."""

    composition: Composition

    @property
    def compiled(self) -> bool:
        return self.composition.compiled

    def __call__(self, parts: Parts, z: Array, held: dict[str, Array]) -> Array:
        backend = self.composition.frontend.backend
        across = backend.loop if self.composition.batching == "loop" else backend.rows
        return across(self._case, parts, z, held)

    def _case(self, parts: Parts, z: Array, held: dict[str, Array]) -> Array:
        raise NotImplementedError


class _Discrete(_OpenLoop):
    """The codes of the values of the discrete sites, as one array."""

    def _case(self, parts: Parts, z: Array, held: dict[str, Array]) -> Array:
        whole = self.composition
        xp = whole.frontend.backend.special.xp
        with whole.frontend.recording(whole._source(z), held, parts.params) as recording:
            parts.adversary()
        sites = recording.finish(None).sites
        return xp.concat([_codes(xp, site, sites[site.name], z) for site in whole.sites if site.discrete])


def _codes(xp: Any, site: Site, value: Array, z: Array) -> Array:
    """As :meth:`Site.coded`, of one case, in the type of z."""
    return xp.astype(xp.reshape(xp.argmax(value, axis=-1) if site.one_hot else value, (-1,)), z.dtype)


class _Weight(_OpenLoop):
    """The log-weight: the log-density of held sites, and that of observed ones."""

    def _case(self, parts: Parts, z: Array, held: dict[str, Array]) -> Array:
        return self.composition._observe(parts, z, held)[1]


@dataclass(frozen=True)
class _Unjudged:
    """What black boxes are asked about: observation, action, the severities of the other checkers, the log-weight."""

    composition: Composition

    @property
    def compiled(self) -> bool:
        return self.composition.compiled

    def __call__(self, parts: Parts, z: Array, held: dict[str, Array]) -> tuple[PyTree, PyTree, PyTree, Array]:
        whole = self.composition
        backend = whole.frontend.backend
        if whole.batching == "model":
            observation, log_weight = backend.rows(whole._observe, parts, z, held)
            action = parts.model(observation)
            return observation, action, backend.rows(self._native, parts, (observation, action), {}), log_weight
        across = backend.loop if whole.batching == "loop" else backend.rows
        observation, action, native, log_weight = across(self._case, parts, z, held)
        return observation, action, native, log_weight

    def _case(self, parts: Parts, z: Array, held: dict[str, Array]) -> tuple[PyTree, PyTree, PyTree, Array]:
        backend = self.composition.frontend.backend
        run = self.composition.run(parts, z, held)
        observation, action, native = (backend.tree_map(backend.as_array, tree) for tree in run.value)
        return observation, action, native, run.log_weight

    def _native(self, parts: Parts, case: tuple[PyTree, PyTree], held: dict[str, Array]) -> PyTree:
        backend = self.composition.frontend.backend
        return backend.tree_map(backend.as_array, self.composition.judge(*case))


@dataclass(frozen=True)
class _Apart:
    """Severity, log-weight, and what the checker and all its kinds say, ``(n, 1 + K)``.

    The severity is the checker's own, or that of the kind whose number is held as ``_KIND``: so one compiled function
    serves all kinds.
    """

    composition: Composition
    kinds: Kinds
    single: bool

    @property
    def compiled(self) -> bool:
        return self.composition.compiled

    def __call__(self, parts: Parts, z: Array, held: dict[str, Array]) -> tuple[Array, Array, Array]:
        whole = self.composition
        backend, xp = whole.frontend.backend, whole.frontend.backend.special.xp
        which, held = held.get(_KIND), {name: value for name, value in held.items() if name != _KIND}
        if whole.batching == "model":
            observation, log_weight = backend.rows(whole._observe, parts, z, held)
            said = backend.rows(self._judge, parts, (observation, parts.model(observation)), {})
        else:
            across = backend.loop if whole.batching == "loop" else backend.rows
            said, log_weight = across(self._case, parts, z, held)
        if not self.single:  # no gradient passes through kinds, which may have none where they are not the largest
            return said[:, 0], log_weight, said
        assert which is not None
        asked = which[:, None] + 1 == backend.from_host(np.arange(said.shape[1]))
        return xp.sum(xp.where(asked, said, 0.0), axis=1), log_weight, said

    def _judge(self, parts: Parts, case: tuple[PyTree, PyTree], held: dict[str, Array]) -> Array:
        whole = self.composition
        severity = whole.frontend.backend.special.xp.reshape(whole._as_severity(whole.judge(*case)), (1,))
        kinds = self.kinds(*case)
        kinds = kinds if self.single else whole.frontend.backend.constant(kinds)
        return whole.frontend.backend.special.xp.concat([severity, kinds])

    def _case(self, parts: Parts, z: Array, held: dict[str, Array]) -> tuple[Array, Array]:
        run = self.composition.run(parts, z, held)
        return self._judge(parts, run.value[:2], {}), run.log_weight


def _same(observation: PyTree) -> PyTree:
    return observation


def _judged(_: PyTree, case: PyTree) -> Any:
    """The severity of what :func:`compose` returned."""
    return case[2]


def compose(
    frontend: Frontend, closed_loop: bool, adversary: Any, model: Any, checker: Any, *, record: bool = False
) -> Any:
    """The composed program ``() -> (observation, action, severity)``, with deterministic sites when ``record``."""

    def program() -> tuple[PyTree, PyTree, Array]:
        if closed_loop:
            observation, action = adversary(model)
        else:
            observation = adversary()
            action = model(observation)
        severity = checker(observation, action)
        if record:
            xp = frontend.backend.special.xp
            leaves = [frontend.backend.as_array(leaf) for leaf in frontend.backend.leaves(action)]
            for i, leaf in enumerate(leaves):
                frontend.deterministic("action" if len(leaves) == 1 else f"action_{i}", leaf)
            level = frontend.backend.as_array(severity)
            frontend.deterministic("severity", level)
            frontend.deterministic("catastrophe", level if level.dtype == xp.bool else level >= 0)
        return observation, action, severity

    return program


@dataclass
class Event:
    """A problem in standard-normal coordinates; satisfies :class:`~probest.evidence.EventLike`.

    ``model_calls`` and ``checker_calls`` count what has been spent (a forward pass 1, a gradient 3 model calls);
    ``on_calls`` is told after each chunk; ``nearest`` is the case nearest to a likely catastrophe that was evaluated.
    observed: values of observed sites and factors, with their plates. coarseness: how far apart neighbouring floats are
    at the middle of continuous sites, in standard deviations, where that is not 0. differentiable: whether the severity
    has a gradient in z. trainable: whether training can follow its catastrophes: it has, or it is of text. undefined:
    how many cases so far out that D does not give them had no severity, and were taken for no catastrophe.
    """

    composition: Composition
    parts: Parts
    boolean: bool
    weighted: bool
    differentiable: bool
    chunk_size: int
    model_calls: int = 0
    checker_calls: int = 0
    undefined: int = 0
    on_calls: Callable[[int], None] | None = None
    nearest: Nearest | None = None
    observed: Mapping[str, Observed] = field(default_factory=dict)
    coarseness: Mapping[str, float] = field(default_factory=dict)
    trainable: bool = False

    @property
    def dim(self) -> int:
        return sum(site.size for site in self.composition.sites)

    @property
    def sites(self) -> tuple[Site, ...]:
        return self.composition.sites

    @property
    def backend(self) -> Backend:
        return self.composition.frontend.backend

    @property
    def discrete_sites(self) -> tuple[str, ...]:
        """Names of latent sites whose value is piecewise constant in z."""
        return tuple(site.name for site in self.sites if site.discrete)

    @property
    def is_text(self) -> bool:
        """Whether all that the adversary draws is text (:mod:`probest.adversaries.language`), token by token."""
        return all(site.distribution == TEXT for site in self.sites)

    @cached_property
    def answers_in_text(self) -> bool:
        """Whether all is text, and what the model does is what it draws: then log P depends on its parameters by the
        probabilities of its text alone. Runs the model on a few cases.
        """
        if not (self.is_text and self.composition.late and not self.composition.closed_loop):
            return False
        cases = self.decode(generator(np.random.SeedSequence(0)).standard_normal((8, self.dim)))
        drawn = [value for name, value in cases.sites.items() if name in {site.name for site in self.sites}]
        leaves = self.backend.leaves(cases.action)
        return all(any(np.array_equal(leaf, value) for value in drawn) for leaf in leaves)

    @cached_property
    def coarse(self) -> dict[str, Floats]:
        """``coarseness`` by site, ``(dim,)``: at its coordinates, and 0 elsewhere."""
        out = {}
        for name, apart in self.coarseness.items():
            out[name] = np.zeros(self.dim)
            out[name][self.composition.slices[name]] = apart
        return out

    @property
    def blocks(self) -> list[np.ndarray]:
        """The coordinates of each site, ``(dim,)`` bool."""
        out = []
        for part in self.composition.slices.values():
            out.append(np.zeros(self.dim, dtype=bool))
            out[-1][part] = True
        return out

    @property
    def discrete_coordinates(self) -> np.ndarray:
        """``(dim,)`` bool: coordinates along which the severity is piecewise constant."""
        return np.repeat([site.discrete for site in self.sites], [site.size for site in self.sites])

    def evaluate(
        self, z: Floats, *, gradient: bool = False, held: Mapping[str, np.ndarray] | None = None
    ) -> Evaluation:
        """Severity and log-weight (and gradients) at z of shape ``(n, dim)``.

        held: site values ``(n, ...)`` that replace what z says and add their log-density to the log-weight.
        Raises SeverityError if the checker returns NaN, but for cases farther out than D has a probability of e^-230 to
        give; ProblemError for the gradient of a black box.
        """
        z = np.asarray(z, dtype=np.float64)
        if z.ndim != 2 or z.shape[1] != self.dim:
            raise ValueError(f"z has shape {z.shape}; expected (n, {self.dim}): one row of coordinates a case")
        if gradient and self.composition.black_boxes:
            raise ProblemError(f"checker {self.composition.black_boxes[0].name!r} is a black_box: it has no gradient")
        return self._evaluated(self._scored, z, gradient, held or {})[0]

    def evaluate_kinds(
        self,
        z: Floats,
        which: int | np.ndarray | None = None,
        *,
        gradient: bool = False,
        held: Mapping[str, np.ndarray] | None = None,
    ) -> tuple[Evaluation, Floats, Floats]:
        """As :meth:`evaluate`, the severity ``(n,)``, and those of all :attr:`kinds`, ``(n, K)``.

        which: a kind, or one for each row, whose severity is evaluated in place of the checker's. Raises ValueError for
        a checker that has no kinds.
        """
        if self.kinds is None:
            raise ValueError("the checker's severity is not the largest of several: there are no kinds to evaluate")
        held = {**(held or {}), **({} if which is None else {_KIND: np.full(len(z), which)})}
        found, said = self._evaluated(_Apart(self.composition, self.kinds, which is not None), z, gradient, held)
        if which is not None and found.severity_grad is not None:
            found = found._replace(severity_grad=np.nan_to_num(found.severity_grad))
        said = said if len(z) else np.empty((0, 1 + self.kinds.count))
        return found, said[:, 0], said[:, 1:]

    def _evaluated(
        self, fn: Any, z: Floats, gradient: bool, held: Mapping[str, np.ndarray]
    ) -> tuple[Evaluation, Floats]:
        """What ``fn`` says: severity and log-weight, and what else it says of each case."""
        outputs, grads, others = [], [], []
        with self._evaluating(self.parts):
            for rows in chunks(len(z), self.chunk_size):
                kept = {name: value[rows] for name, value in held.items()}
                values, gradients = self.backend.on_host(fn, self.parts, z[rows], kept, gradient=gradient)
                if self.composition.black_boxes:
                    values = self._asked(*values)
                self.model_calls += len(z[rows]) * (GRADIENT_CALLS if gradient else FORWARD_CALLS)
                self.checker_calls += len(z[rows])
                if self.on_calls is not None:
                    self.on_calls(self.model_calls)
                others.append(values[2] if len(values) > 2 else np.empty((len(z[rows]), 0)))
                values, gradients = self._without_far(values[:2], gradients, z[rows])
                outputs.append(self._checked(values, z[rows]))
                self._remember(*outputs[-1], z[rows], {name: kept[name] for name in kept if name != _KIND})
                grads.append(gradients)
        more = np.concatenate(others) if others else np.empty((0, 0))
        severity, log_weight = (
            (np.concatenate(column) for column in zip(*outputs, strict=True)) if outputs else (np.empty(0),) * 2
        )
        if not gradient:
            return Evaluation(severity, log_weight), more
        severity_grad, weight_grad = (
            (np.concatenate(column) for column in zip(*grads, strict=True)) if grads else (np.empty((0, self.dim)),) * 2
        )
        return Evaluation(severity, log_weight, severity_grad, weight_grad if self.weighted else None), more

    @cached_property
    def kinds(self) -> Kinds | None:
        """The severities that the checker's is the largest of, if it is that. Runs the model on one case."""
        from probest.moments.kinds import kinds_of

        whole = self.composition
        if self.boolean or whole.black_boxes or whole.late:
            return None
        case = self.decode(generator(np.random.SeedSequence(0)).standard_normal((1, self.dim)))
        first = (self.backend.tree_map(lambda leaf: self.backend.from_host(leaf[0]), tree) for tree in case[1:])
        return kinds_of(self.backend, whole.checker, *first)

    def _remember(self, severity: Floats, log_weight: Floats, z: Floats, held: Mapping[str, np.ndarray]) -> None:
        """Keep the nearest of these cases, if it is nearer than what was seen before. Impossible ones do not count."""
        possible = np.isfinite(log_weight) & ~np.isnan(severity)
        caught = possible & (severity >= 0.0)
        if caught.any():
            row = int(np.argmin(np.where(caught, np.einsum("ij,ij->i", z, z), np.inf)))
        elif possible.any():
            row = int(np.argmax(np.where(possible, severity, -np.inf)))
        else:
            return
        if self.nearest is None or _rank(float(severity[row]), z[row]) > self.nearest.rank:
            kept = {name: value[row : row + 1].copy() for name, value in held.items()}
            self.nearest = Nearest(z[row].copy(), kept, float(severity[row]))

    @property
    def program(self) -> Any:
        """A program without arguments that draws every site: the adversary, or all three where others draw too."""
        whole, parts = self.composition, self.parts
        return whole.followed(parts.adversary, parts.model) if whole.interleaved else parts.adversary

    def opened(self) -> Event:
        """The same event with all sites drawn by the adversary: itself, unless they are interleaved with the model.

        Then the adversary runs the model and the checker too, and counters are apart.
        """
        if not self.composition.interleaved:
            return self
        composition = replace(self.composition, checker=_judged, closed_loop=False, late=False)
        return replace(
            self,
            composition=composition,
            parts=Parts(self.program, _same, self.parts.params),
            model_calls=0,
            checker_calls=0,
            on_calls=None,
            nearest=None,
        )

    def severity(self, z: Floats) -> Floats:
        """Severity at each row of z, ``(n,)``."""
        return self.evaluate(z).severity

    def log_weight(self, z: Floats) -> Floats:
        """Log-weight of observed sites and factors at each row of z, ``(n,)``."""
        return self.evaluate(z).log_weight

    @property
    def branches(self) -> tuple[checkers.Branch, ...]:
        """Which leaves of the checker make a catastrophe together; none where there are too many such sets."""
        return checkers.branches(self.composition.checker)

    def function(
        self,
        parts: Parts | None = None,
        held: Mapping[str, np.ndarray] | None = None,
        *,
        apart: bool = False,
    ) -> Callable[[Array], Array]:
        """The severity of one case, ``(dim,) -> ()``, an operation of the library that can be traced.

        held: values of discrete sites, by name; they are not read from z then. apart: the severities of all leaves of
        the checker, ``(dim,) -> (J,)``.
        """
        whole, given = self.composition, self.parts if parts is None else parts
        values = {name: self.backend.from_host(value) for name, value in (held or {}).items()}

        def severity(z: Array) -> Array:
            with self._evaluating(given):
                return whole._apart(given, z, values) if apart else whole._score(given, z, values)[0]

        return severity

    def scores(self, z: Array, held: dict[str, Array], parts: Parts) -> tuple[Array, Array]:
        """Severity and log-weight at native z, differentiable in ``parts`` by the library's own autograd.

        The severity is 0 where black boxes decide: those are asked by :meth:`evaluate` alone.
        """
        with self._evaluating(parts):
            return self.composition(parts, z, held)

    def site_values(self, z: Floats, names: tuple[str, ...] | None = None) -> dict[str, np.ndarray]:
        """Values of latent and deterministic sites (all, or those in ``names``), each ``(n, ...)``."""
        return {k: v for k, v in self.decode(z).sites.items() if names is None or k in names}

    def discrete_values(self, z: Floats) -> Floats:
        """Codes of discrete sites' values at each row of z, ``(n, k)``, at no model call; k = 0 in a closed loop."""
        if self.composition.interleaved or not self.discrete_sites:
            return np.empty((len(z), 0))
        return self.discrete_draws(z)

    def discrete_draws(self, z: Floats) -> Floats:
        """Codes of the discrete sites' values at each row of z, ``(n, k)``; interleaved ones take a run each."""
        if self.composition.interleaved:
            found = self.site_values(z, self.discrete_sites)
            return np.concatenate([site.coded(found[site.name]) for site in self.sites if site.discrete], axis=1)
        return self._of_adversary(_Discrete(self.composition), z, {})

    def log_density(self, z: Floats, held: Mapping[str, np.ndarray]) -> Floats:
        """The log-weight with sites held ``(n, ...)``, ``(n,)``: at no model call, unless they are interleaved."""
        if self.composition.interleaved:
            return self.evaluate(z, held=held).log_weight
        return self._of_adversary(_Weight(self.composition), z, held)

    def _of_adversary(self, fn: _OpenLoop, z: Floats, held: Mapping[str, np.ndarray]) -> Floats:
        pieces = [
            self.backend.on_host(fn, self.parts, z[rows], {name: value[rows] for name, value in held.items()})[0]
            for rows in chunks(len(z), self.chunk_size)
        ]
        return np.asarray(np.concatenate(pieces), dtype=np.float64)

    def observe(self, z: Floats) -> PyTree:
        """Observations alone at each row of z, as arrays of the backend: neither model nor checker runs.

        Raises ProblemError for a closed loop, whose observations depend on the model's actions: :meth:`decode` them.
        """
        if self.composition.closed_loop:
            raise ProblemError(
                "observe: the adversary runs the closed loop itself, so there is no observation without the model. "
                "Use decode(z).observation, which runs both"
            )
        with self.backend.no_gradient():
            return self.backend.rows(self.composition._observe, self.parts, self.backend.from_host(z), {})[0]

    def decode(self, z: Floats, held: Mapping[str, np.ndarray] | None = None) -> Cases:
        """The named sites, observation and action at each row of z, as NumPy arrays; held as in :meth:`evaluate`."""
        held = held or {}
        decoder = _Decoder(self.composition)
        with self._evaluating(self.parts):
            pieces = [
                self.backend.on_host(
                    decoder,
                    self.parts,
                    np.asarray(z[rows], dtype=np.float64),
                    {name: value[rows] for name, value in held.items()},
                )[0]
                for rows in chunks(len(z), self.chunk_size)
            ]
        return Cases(*self.backend.tree_map(lambda *leaves: np.concatenate(leaves), *pieces))

    def replaced(self, *, model: Any = None, adversary: Any = None, params: Mapping[str, Array] | None = None) -> Event:
        """The same event with other parts of the same structure; counters start at zero."""
        parts = self.parts._replace(
            model=self.parts.model if model is None else model,
            adversary=self.parts.adversary if adversary is None else adversary,
            params={**self.parts.params, **(params or {})},
        )
        for part in parts[:2]:
            self.composition.frontend.adopt(part)
        return replace(self, parts=parts, model_calls=0, checker_calls=0, undefined=0, nearest=None)

    @cached_property
    def _scored(self) -> Composition | _Unjudged:
        return _Unjudged(self.composition) if self.composition.black_boxes else self.composition

    def _asked(self, observation: PyTree, action: PyTree, native: PyTree, log_weight: Floats) -> tuple[Floats, Floats]:
        """The severities that black boxes give, and the log-weights."""
        found = self.composition.judge_on_host(observation, action, native, len(log_weight))
        return (np.where(found, 1.0, -1.0) if found.dtype.kind == "b" else found), log_weight

    def _evaluating(self, parts: Parts) -> AbstractContextManager[None]:
        return self.backend.evaluating(*parts[:2], *checkers.modules(self.composition.checker))

    def _without_far(
        self, values: tuple[np.ndarray, ...], gradients: list[np.ndarray] | None, z: Floats
    ) -> tuple[tuple[np.ndarray, ...], list[np.ndarray] | None]:
        """The same with no catastrophe where a severity is NaN and D does not get: there floats overflow (∞ · 0), and
        walks do get there. Observations may lead a conditioned adversary anywhere.
        """
        severity, log_weight = values
        unknown = np.isnan(severity)
        if self.weighted or not unknown.any():
            return values, gradients
        far = unknown & (stats.chi.logsf(np.linalg.norm(z, axis=1), self.dim) < UNREACHED)
        self.undefined += int(far.sum())
        if gradients is not None:
            gradients = [np.where(far[:, None], 0.0, part) for part in gradients]
        return (np.where(far, -LARGE_SEVERITY, severity), log_weight), gradients

    def _checked(self, values: tuple[np.ndarray, ...], z: Floats) -> tuple[Floats, Floats]:
        severity, log_weight = values
        for label, value in (("severity", severity), ("log-weight", log_weight)):
            bad = np.isnan(value)
            if bad.any():
                case = self.decode(z[bad][:1])
                raise SeverityError(
                    f"{label} is NaN in {int(bad.sum())} of {len(value)} cases{_first_nan(self.backend, case)}. "
                    "Make the checker return a number for every observation and action (large and negative when safe)"
                )
        return np.clip(severity, -LARGE_SEVERITY, LARGE_SEVERITY), log_weight


def _first_nan(backend: Backend, case: Cases) -> str:
    for label, tree in ((f"site {k!r}", v) for k, v in case.sites.items()):
        if np.isnan(tree).any():
            return f"; {label} is NaN in the first of them"
    for label, tree in (("the observation", case.observation), ("the action", case.action)):
        if any(np.isnan(np.asarray(leaf, dtype=float)).any() for leaf in backend.leaves(tree)):
            return f"; {label} is NaN in the first of them"
    return ""
