"""A problem compiled to functions of a batch of standard-normal coordinates.

:class:`Composition` is the problem as a function of one z; it is hashable by value, so that a backend compiles it
once for all problems of the same shape. :class:`Event` is what estimators read (NumPy in, NumPy out), what decodes z
to named sites, and what evaluates severities differentiably in the parameters of the model and the adversary.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any, Literal, NamedTuple

import numpy as np

from probest.backends.base import Array, Backend, Parts, PyTree, chunks
from probest.estimators.base import FORWARD_CALLS, GRADIENT_CALLS, Evaluation, Floats
from probest.programs.base import BaseSource, Frontend, Recording, Run, Site

__all__ = ["Batching", "Cases", "Composition", "Event", "ProblemError", "SeverityError", "compile_event"]

Batching = Literal["vmap", "model", "loop"]

FRONTENDS = {
    "pyro": ("probest.programs.pyro", "PyroFrontend"),
    "numpyro": ("probest.programs.numpyro", "NumPyroFrontend"),
}
BACKEND_OF = {"torch": "pyro", "jax": "numpyro", "pyro": "pyro", "numpyro": "numpyro"}
LARGE_SEVERITY = 1e30
DEFAULT_CHUNK_BYTES = 2.5e8
ACTIVATIONS_PER_NUMBER = 64


class ProblemError(ValueError):
    """A problem that cannot be estimated as written; the message says which part and what to do."""


class SeverityError(ValueError):
    """The checker returned something that is not a severity."""


class Cases(NamedTuple):
    """Decoded draws. sites: each ``(n, ...)``; observation, action: pytrees of arrays ``(n, ...)``."""

    sites: dict[str, np.ndarray]
    observation: PyTree
    action: PyTree


@dataclass(frozen=True)
class Composition:
    """Adversary, model and checker as one function of z. Equal compositions share compiled code."""

    frontend: Frontend
    checker: Any
    closed_loop: bool
    batching: Batching
    sites: tuple[Site, ...]

    @property
    def compiled(self) -> bool:
        return self.batching != "loop"

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
            value = compose(self.frontend, self.closed_loop, parts.adversary, parts.model, self.checker)()
        return recording.finish(value)

    def _score(self, parts: Parts, z: Array, held: dict[str, Array]) -> tuple[Array, Array]:
        run = self.run(parts, z, held)
        return self._as_severity(run.value[2]), run.log_weight

    def _observe(self, parts: Parts, z: Array, held: dict[str, Array]) -> tuple[PyTree, Array]:
        with self.frontend.recording(self._source(z), held, parts.params) as recording:
            observation = parts.adversary()
        return observation, recording.finish(None).log_weight

    def _judge(self, parts: Parts, case: tuple[PyTree, PyTree], held: dict[str, Array]) -> Array:
        return self._as_severity(self.checker(*case))

    def _as_severity(self, severity: Any) -> Array:
        xp = self.frontend.backend.special.xp
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
    """A problem in standard-normal coordinates; satisfies :class:`~probest.estimators.base.EventLike`.

    ``model_calls`` and ``checker_calls`` count what has been spent (a forward pass 1, a gradient 3 model calls);
    ``on_calls`` is told after each chunk.
    """

    composition: Composition
    parts: Parts
    boolean: bool
    weighted: bool
    differentiable: bool
    chunk_size: int
    model_calls: int = 0
    checker_calls: int = 0
    on_calls: Callable[[int], None] | None = None

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
    def discrete_coordinates(self) -> np.ndarray:
        """``(dim,)`` bool: coordinates along which the severity is piecewise constant."""
        return np.repeat([site.discrete for site in self.sites], [site.size for site in self.sites])

    def evaluate(
        self, z: Floats, *, gradient: bool = False, held: Mapping[str, np.ndarray] | None = None
    ) -> Evaluation:
        """Severity and log-weight (and gradients) at z of shape ``(n, dim)``.

        held: site values ``(n, ...)`` that replace what z says and add their log-density to the log-weight.
        Raises SeverityError if the checker returns NaN.
        """
        z = np.asarray(z, dtype=np.float64)
        if z.ndim != 2 or z.shape[1] != self.dim:
            raise ValueError(f"z has shape {z.shape}; expected (n, {self.dim}): one row of coordinates a case")
        held = held or {}
        outputs, grads = [], []
        with self.backend.evaluating(*self.parts[:2], self.composition.checker):
            for rows in chunks(len(z), self.chunk_size):
                kept = {name: value[rows] for name, value in held.items()}
                values, gradients = self.backend.on_host(self.composition, self.parts, z[rows], kept, gradient=gradient)
                self.model_calls += len(z[rows]) * (GRADIENT_CALLS if gradient else FORWARD_CALLS)
                self.checker_calls += len(z[rows])
                if self.on_calls is not None:
                    self.on_calls(self.model_calls)
                outputs.append(self._checked(values, z[rows]))
                grads.append(gradients)
        severity, log_weight = (
            (np.concatenate(column) for column in zip(*outputs, strict=True)) if outputs else (np.empty(0),) * 2
        )
        if not gradient:
            return Evaluation(severity, log_weight)
        severity_grad, weight_grad = (
            (np.concatenate(column) for column in zip(*grads, strict=True)) if grads else (np.empty((0, self.dim)),) * 2
        )
        return Evaluation(severity, log_weight, severity_grad, weight_grad if self.weighted else None)

    def severity(self, z: Floats) -> Floats:
        """Severity at each row of z, ``(n,)``."""
        return self.evaluate(z).severity

    def log_weight(self, z: Floats) -> Floats:
        """Log-weight of observed sites and factors at each row of z, ``(n,)``."""
        return self.evaluate(z).log_weight

    def scores(self, z: Array, held: dict[str, Array], parts: Parts) -> tuple[Array, Array]:
        """Severity and log-weight at native z, differentiable in ``parts`` by the library's own autograd."""
        with self.backend.evaluating(*parts[:2], self.composition.checker):
            return self.composition(parts, z, held)

    def site_values(self, z: Floats, names: tuple[str, ...] | None = None) -> dict[str, np.ndarray]:
        """Values of latent and deterministic sites (all, or those in ``names``), each ``(n, ...)``."""
        return {k: v for k, v in self.decode(z).sites.items() if names is None or k in names}

    def decode(self, z: Floats) -> Cases:
        """The named sites, observation and action at each row of z, as NumPy arrays."""

        def case(parts: Parts, row: Array, held: dict[str, Array]) -> tuple[Any, Any, Any]:
            run = self.composition.run(parts, row, held)
            observation, action, _ = run.value
            return run.sites, *(self.backend.tree_map(self.backend.as_array, tree) for tree in (observation, action))

        backend = self.backend
        across = backend.rows if self.composition.batching == "vmap" else backend.loop
        with backend.evaluating(*self.parts[:2], self.composition.checker), backend.no_gradient():
            pieces = [
                across(case, self.parts, backend.from_host(z[rows]), {}) for rows in chunks(len(z), self.chunk_size)
            ]
        hosted = [backend.tree_map(backend.to_host, piece) for piece in pieces]
        return Cases(*backend.tree_map(lambda *leaves: np.concatenate(leaves), *hosted))

    def replaced(self, *, model: Any = None, adversary: Any = None, params: Mapping[str, Array] | None = None) -> Event:
        """The same event with other parts of the same structure; counters start at zero."""
        parts = self.parts._replace(
            model=self.parts.model if model is None else model,
            adversary=self.parts.adversary if adversary is None else adversary,
            params={**self.parts.params, **(params or {})},
        )
        for part in parts[:2]:
            self.composition.frontend.adopt(part)
        return replace(self, parts=parts, model_calls=0, checker_calls=0)

    def _checked(self, values: list[np.ndarray], z: Floats) -> tuple[Floats, Floats]:
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


def compile_event(
    adversary: Any,
    model: Any,
    checker: Any,
    *,
    backend: str | None = None,
    batching: Batching = "vmap",
    chunk_size: int | None = None,
) -> Event:
    """Run the program a few times, check everything that can be checked, and compile it to an :class:`Event`.

    Raises ProblemError, SiteError or SeverityError, naming the part or site at fault.
    """
    closed_loop = _takes_model(adversary)
    frontend = _find_frontend(adversary, model, closed_loop, backend)
    _check_foreign(frontend, adversary=adversary, model=model, checker=checker)
    for part in (adversary, model):
        frontend.adopt(part)
    rng = np.random.default_rng(0)
    parts = Parts(adversary, model, {})
    composition = Composition(frontend, checker, closed_loop, batching, ())
    with frontend.backend.evaluating(adversary, model, checker), frontend.backend.no_gradient():
        first = _rehearse(composition, parts, rng)
        if frontend.name == "numpyro":
            # Parameters become arguments. A second run with them given may draw no key: that would be hidden
            # randomness.
            parts = parts._replace(params=first.params)
        second = _rehearse(composition, parts, rng)
    sites = _ordered_sites(first, second)
    composition = replace(composition, sites=sites)
    severity = frontend.backend.as_array(first.value[2])
    boolean = severity.dtype == frontend.backend.special.xp.bool
    smooth = any(not site.discrete for site in sites)
    event = Event(
        composition=composition,
        parts=parts,
        boolean=boolean,
        weighted=bool(first.conditioned),
        differentiable=not boolean and smooth and str(severity.dtype).split(".")[-1].startswith(("float", "bfloat")),
        chunk_size=chunk_size or _default_chunk(frontend.backend, sites, first.value),
    )
    _check_repeatable(event, rng)
    event.differentiable = event.differentiable and _has_gradient(event, rng)
    return event


def _takes_model(adversary: Any) -> bool:
    """Whether the adversary is a closed loop ``adversary(model)``."""
    target = adversary.forward if hasattr(adversary, "forward") else adversary
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):
        return False
    required = [
        p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if len(required) > 1:
        raise ProblemError(
            f"adversary takes {len(required)} required arguments ({', '.join(p.name for p in required)}). It must "
            "take none, or one: the model, when it runs the closed loop itself and returns (observation, action). "
            "Bind the others with functools.partial"
        )
    return len(required) == 1


@cache
def load_frontend(name: str) -> Frontend:
    """The front end of ``pyro`` or ``numpyro``, one object for the whole process."""
    module, attribute = FRONTENDS[name]
    try:
        frontend: Frontend = getattr(importlib.import_module(module), attribute)()
    except ModuleNotFoundError as error:
        raise ProblemError(f"the {name} backend needs {error.name}: pip install 'probest[{name}]'") from error
    return frontend


def _find_frontend(adversary: Any, model: Any, closed_loop: bool, backend: str | None) -> Frontend:
    if backend is not None:
        if backend not in BACKEND_OF:
            raise ProblemError(f"backend={backend!r} is not known: choose 'torch' (Pyro) or 'jax' (NumPyro)")
        return load_frontend(BACKEND_OF[backend])
    candidates = [load_frontend(name) for name in FRONTENDS if name in sys.modules]
    if not candidates:
        raise ProblemError(
            "neither pyro nor numpyro has been imported: write the adversary as a program of one of them"
        )
    recordings: dict[str, Recording] = {}
    failure: Exception | None = None
    with ExitStack() as stack:
        for frontend in candidates:
            for part in (adversary, model):
                frontend.adopt(part)
            source = _source(frontend.backend, np.zeros)
            recordings[frontend.name] = stack.enter_context(frontend.recording(source, {}, {}, seeded=True))
            stack.enter_context(frontend.backend.evaluating(adversary, model))
        try:
            adversary(model) if closed_loop else adversary()
        except Exception as error:
            failure = error
    used = [frontend for frontend in candidates if recordings[frontend.name].layout]
    if len(used) == 1:
        return used[0]
    if failure is not None:
        raise failure
    if not used:
        raise ProblemError(
            "adversary has no sample site: it must draw its randomness with pyro.sample or numpyro.sample "
            "(an adversary without randomness has probability 0 or 1; call the checker instead)"
        )
    raise ProblemError("adversary samples from both Pyro and NumPyro: write it in one of them")


def _source(backend: Backend, draw: Callable[[tuple[int, ...]], Any]) -> BaseSource:
    """Base coordinates from ``draw(shape)``, whatever the site."""

    def source(name: str, shape: tuple[int, ...]) -> Array:  # noqa: ARG001 - sites are all alike here
        return backend.from_host(np.asarray(draw(shape), dtype=np.float64))

    return source


def _check_foreign(frontend: Frontend, **parts: Any) -> None:
    for name, part in parts.items():
        other = frontend.backend.foreign(part)
        if other is not None:
            raise ProblemError(
                f"{name} is a {other} object, but the adversary is a {frontend.name} program "
                f"({frontend.backend.name}). Write the adversary in {'Pyro' if other == 'torch' else 'NumPyro'}, or "
                f"the {name} in {frontend.backend.name}"
            )


def _rehearse(composition: Composition, parts: Parts, rng: np.random.Generator) -> Run:
    """One run on fresh coordinates, with every check that needs no batch."""
    frontend, checker = composition.frontend, composition.checker
    backend = frontend.backend
    source = _source(backend, rng.standard_normal)
    seeded = not parts.params
    with frontend.recording(source, {}, parts.params, seeded=seeded) as recording:
        if composition.closed_loop:
            pair = parts.adversary(parts.model)
            if not (isinstance(pair, tuple) and len(pair) == 2):
                raise ProblemError(
                    "adversary takes the model, so it must return the pair (observation, action); "
                    f"it returned {type(pair).__name__}"
                )
            observation, action = pair
        else:
            observation = parts.adversary()
            _check_tree(backend, "adversary", "an observation", observation)
            before = _snapshot(backend, observation)
            action = parts.model(observation)
            _check_same(backend, "model", "the observation", before, observation)
        drawn = len(recording.layout)
        _check_tree(backend, "adversary", "an observation", observation)
        _check_tree(backend, "model", "an action", action)
        before = _snapshot(backend, (observation, action))
        severity = checker(observation, action)
        _check_same(backend, "checker", "its arguments", before, (observation, action))
    if not recording.layout:
        raise ProblemError(
            "adversary has no sample site: it must draw its randomness with pyro.sample or numpyro.sample"
        )
    if composition.batching == "model" and (composition.closed_loop or len(recording.layout) > drawn):
        raise ProblemError(
            "batching='model' calls the model once for a whole batch, outside the program; that cannot be done when "
            "the model runs inside the adversary, or when the checker has sample sites. Use batching='loop'"
        )
    _check_severity(backend, severity)
    run = recording.finish((observation, action, severity))
    weight = backend.to_host(run.log_weight)
    if np.isnan(weight):
        raise ProblemError(f"the log-density of the observed sites ({', '.join(run.conditioned)}) is NaN")
    return run


def _ordered_sites(first: Run, second: Run) -> tuple[Site, ...]:
    different = set(first.layout) ^ set(second.layout)
    if different:
        names = sorted({site.name for site in different})
        raise ProblemError(
            f"site(s) {', '.join(map(repr, names))} are not the same in two runs of the adversary. probest needs the "
            "same sites with the same shapes in every run: draw them always, and choose with where()"
        )
    return first.layout


def _check_severity(backend: Backend, severity: Any) -> None:
    if severity is None:
        raise SeverityError("checker returned None: return the severity, a number that is at least 0 for a catastrophe")
    try:
        value = backend.as_array(severity)
    except (TypeError, ValueError) as error:
        raise SeverityError(
            f"checker returned {type(severity).__name__}: return a scalar severity, at least 0 for a catastrophe"
        ) from error
    if tuple(value.shape) != ():
        raise SeverityError(
            f"checker returned shape {tuple(value.shape)}; severity is one number a case, shape (). Programs and "
            "checkers are written for one observation: reduce with max(), or index"
        )
    if "complex" in str(value.dtype):
        raise SeverityError("checker returned a complex number: severity is real")
    if np.isnan(float(backend.to_host(value))):
        raise SeverityError("severity is NaN: the checker must return a number for every observation and action")


def _check_tree(backend: Backend, who: str, what: str, tree: PyTree) -> None:
    if tree is None:
        raise ProblemError(f"{who} returned None: return {what}")
    leaves = backend.leaves(tree)
    if not leaves:
        raise ProblemError(f"{who} returned an empty {type(tree).__name__}: return {what}, a pytree of arrays")
    for leaf in leaves:
        if not (backend.owns(leaf) or isinstance(leaf, bool | int | float | np.ndarray | np.generic)):
            raise ProblemError(
                f"{who} returned a pytree with a leaf of type {type(leaf).__name__}: {what} is a pytree of "
                f"{backend.name} arrays"
            )


def _snapshot(backend: Backend, tree: PyTree) -> list[np.ndarray]:
    return [backend.to_host(leaf) if backend.owns(leaf) else np.array(leaf) for leaf in backend.leaves(tree)]


def _check_same(backend: Backend, who: str, what: str, before: list[np.ndarray], tree: PyTree) -> None:
    after = _snapshot(backend, tree)
    same = len(before) == len(after) and all(
        np.array_equal(a, b, equal_nan=a.dtype.kind == "f") for a, b in zip(before, after, strict=True)
    )
    if not same:
        raise ProblemError(f"{who} changes {what} in place: return a new value instead (copy before writing)")


def _check_repeatable(event: Event, rng: np.random.Generator) -> None:
    """The batched program must give the same numbers twice, and the numbers that single runs give."""
    z = rng.standard_normal((3, event.dim))
    one, two = event.evaluate(z), event.evaluate(z)
    if not (np.array_equal(one.severity, two.severity) and np.array_equal(one.log_weight, two.log_weight)):
        raise ProblemError(
            "severity differs between two evaluations of the same draw: the model or checker uses randomness of its "
            "own (dropout, a random generator, a key). Put it into evaluation mode, or draw it at a sample site"
        )
    event.model_calls = event.checker_calls = 0


def _has_gradient(event: Event, rng: np.random.Generator) -> bool:
    """Whether the severity can be differentiated at all: what passes through NumPy, say, cannot."""
    try:
        event.evaluate(rng.standard_normal((1, event.dim)), gradient=True)
    except (RuntimeError, TypeError):
        return False
    finally:
        event.model_calls = event.checker_calls = 0
    return True


def _default_chunk(backend: Backend, sites: tuple[Site, ...], value: PyTree) -> int:
    numbers = sum(site.size for site in sites) + sum(int(np.size(leaf)) for leaf in _snapshot(backend, value))
    return int(np.clip(DEFAULT_CHUNK_BYTES / (4 * ACTIVATIONS_PER_NUMBER * max(numbers, 1)), 64, 16_384))


def _first_nan(backend: Backend, case: Cases) -> str:
    for label, tree in ((f"site {k!r}", v) for k, v in case.sites.items()):
        if np.isnan(tree).any():
            return f"; {label} is NaN in the first of them"
    for label, tree in (("the observation", case.observation), ("the action", case.action)):
        if any(np.isnan(np.asarray(leaf, dtype=float)).any() for leaf in backend.leaves(tree)):
            return f"; {label} is NaN in the first of them"
    return ""
