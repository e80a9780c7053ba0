"""From three callables to an :class:`~probest.programs.event.Event`: run them, check all that can be checked.

Whatever is wrong with a program, model or checker is found here, before any budget is spent, and the error names the
part or the site.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np

from probest.backends.base import Array, Backend, BatchingError, Parts, PyTree
from probest.checkers import BlackBox, SeverityError, leaves, modules
from probest.programs.base import BaseSource, Frontend, Recording, Run, Site
from probest.programs.event import Batching, Composition, Event, ProblemError

__all__ = ["compile_event", "load_frontend"]

FRONTENDS = {
    "pyro": ("probest.programs.pyro", "PyroFrontend"),
    "numpyro": ("probest.programs.numpyro", "NumPyroFrontend"),
}
BACKEND_OF = {"torch": "pyro", "jax": "numpyro", "pyro": "pyro", "numpyro": "numpyro"}
DEFAULT_CHUNK_BYTES = 2.5e8
ACTIVATIONS_PER_NUMBER = 64
NO_SITE = (
    "adversary has no sample site: it must draw its randomness with pyro.sample or numpyro.sample "
    "(an adversary without randomness has probability 0 or 1; call the checker instead)"
)


def compile_event(
    adversary: Any,
    model: Any,
    checker: Any,
    *,
    backend: str | None = None,
    batching: Batching | None = None,
    chunk_size: int | None = None,
) -> Event:
    """Run the program a few times, check everything that can be checked, and compile it to an :class:`Event`.

    Raises ProblemError, SiteError or SeverityError, naming the part or site at fault.
    """
    closed_loop = _takes_model(adversary)
    frontend = _find_frontend(adversary, model, closed_loop, backend)
    _check_foreign(frontend, ("adversary", adversary), ("model", model), *(("checker", m) for m in modules(checker)))
    for part in (adversary, model):
        frontend.adopt(part)
    rng = np.random.default_rng(0)
    parts = Parts(adversary, model, {})
    composition = Composition(frontend, checker, closed_loop, batching or "vmap", ())
    with frontend.backend.evaluating(adversary, model, *modules(checker)), frontend.backend.no_gradient():
        first = _rehearse(composition, parts, rng)
        if frontend.name == "numpyro":
            # Parameters become arguments. A second run with them given may draw no key: that would be hidden
            # randomness.
            parts = parts._replace(params=first.params)
        second = _rehearse(composition, parts, rng, values=False)
    sites = _ordered_sites(first, second)
    composition = replace(composition, sites=sites, late=first.own < len(sites))
    severity = frontend.backend.as_array(first.value[2])
    boolean = severity.dtype == frontend.backend.special.xp.bool
    smooth = any(not site.discrete for site in sites)
    graded = not composition.black_boxes and str(severity.dtype).split(".")[-1].startswith(("float", "bfloat"))
    event = Event(
        composition=composition,
        parts=parts,
        boolean=boolean,
        weighted=bool(first.observed),
        differentiable=smooth and graded,
        chunk_size=chunk_size or _default_chunk(frontend.backend, sites, first.value),
        observed=first.observed,
        coarseness={name: apart for name, apart in first.coarseness.items() if apart > 0.0},
    )
    try:
        _check_repeatable(event, rng)
    except BatchingError:
        other = None if batching or closed_loop else _model_batched(event, rng)
        if other is None:
            raise
        event = other
        _check_repeatable(event, rng)
    event.differentiable = event.differentiable and _has_gradient(event, rng)
    event.trainable = event.differentiable or (graded and event.is_text)
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
        call: Callable[[], Any] = partial(_once, adversary, *((model,) if closed_loop else ()))
        for frontend in candidates:
            call = partial(frontend.backend.rehearse, call, values=False)
        try:
            call()
        except Exception as error:
            failure = error
    used = [frontend for frontend in candidates if recordings[frontend.name].layout]
    if len(used) == 1:
        return used[0]
    if failure is not None:
        raise failure
    if not used:
        raise ProblemError(NO_SITE)
    raise ProblemError("adversary samples from both Pyro and NumPyro: write it in one of them")


def _once(program: Callable[..., Any], *arguments: Any) -> tuple[()]:
    """Run a program for what its sites show, and return nothing."""
    program(*arguments)
    return ()


def _source(backend: Backend, draw: Callable[[tuple[int, ...]], Any]) -> BaseSource:
    """Base coordinates from ``draw(shape)``, whatever the site."""

    def source(name: str, shape: tuple[int, ...]) -> Array:  # noqa: ARG001 - sites are all alike here
        return backend.from_host(np.asarray(draw(shape), dtype=np.float64))

    return source


def _check_foreign(frontend: Frontend, *parts: tuple[str, Any]) -> None:
    for name, part in parts:
        other = frontend.backend.foreign(part)
        if other is not None:
            raise ProblemError(
                f"{name} is a {other} object, but the adversary is a {frontend.name} program "
                f"({frontend.backend.name}). Write the adversary in {'Pyro' if other == 'torch' else 'NumPyro'}, or "
                f"the {name} in {frontend.backend.name}"
            )


def _rehearse(composition: Composition, parts: Parts, rng: np.random.Generator, *, values: bool = True) -> Run:
    """One run on fresh coordinates, with every check that needs no batch; for its sites alone without ``values``."""
    kept: list[Run] = []

    def arrays() -> tuple[Any, ...]:
        run = _run_checked(composition, parts, rng)
        kept.append(run)
        seen = {name: one.value for name, one in run.observed.items()}
        return run.value, run.log_weight, run.sites, run.params, seen, run.coarseness

    backend = composition.frontend.backend
    outputs = arrays() if composition.batching == "loop" else backend.rehearse(arrays, values=values)
    if not values:
        return kept[-1]
    value, log_weight, sites, params, said, coarseness = outputs
    if composition.black_boxes:
        value = (*value[:2], _ask(composition, *value))
    if np.isnan(backend.to_host(backend.as_array(value[2])).astype(float)):
        raise SeverityError("severity is NaN: the checker must return a number for every observation and action")
    if np.isnan(backend.to_host(log_weight)):
        raise ProblemError(f"the log-density of the observed sites ({', '.join(said)}) is NaN")
    observed = {
        name: seen._replace(value=backend.to_host(backend.as_array(said[name])))
        for name, seen in kept[-1].observed.items()
    }
    coarse = {name: float(backend.to_host(apart)) for name, apart in coarseness.items()}
    return Run(value, log_weight, sites, kept[-1].layout, params, observed, coarse, kept[-1].own)


def _run_checked(composition: Composition, parts: Parts, rng: np.random.Generator) -> Run:
    """The program, part by part, with a look at what each returns and at what it leaves untouched."""
    frontend = composition.frontend
    backend = frontend.backend
    source = _source(backend, rng.standard_normal)
    with frontend.recording(source, {}, parts.params, seeded=not parts.params) as recording:
        if composition.closed_loop:
            pair = parts.adversary(parts.model)
            if not (isinstance(pair, tuple) and len(pair) == 2):
                raise ProblemError(
                    "adversary takes the model, so it must return the pair (observation, action); "
                    f"it returned {type(pair).__name__}"
                )
            observation, action = pair
            drawn = len(recording.layout)
            _check_tree(backend, "adversary", "an observation", observation)
        else:
            observation = parts.adversary()
            drawn = len(recording.layout)
            _check_tree(backend, "adversary", "an observation", observation)
            before = _snapshot(backend, observation)
            action = parts.model(observation)
            _check_same(backend, "model", "the observation", before, observation)
        _check_tree(backend, "model", "an action", action)
        before = _snapshot(backend, (observation, action))
        severity = composition.judge(observation, action)
        _check_same(backend, "checker", "its arguments", before, (observation, action))
    if not recording.layout:
        raise ProblemError(NO_SITE)
    if composition.batching == "model" and (composition.closed_loop or len(recording.layout) > drawn):
        raise ProblemError(
            "batching='model' calls the model once for a whole batch, outside the program; that cannot be done when "
            "the model runs inside the adversary, or when the model or the checker has sample sites. Use "
            "batching='loop'"
        )
    if composition.black_boxes:
        native = (leaf for leaf in leaves(composition.checker) if not isinstance(leaf, BlackBox))
        for leaf, part in zip(native, severity, strict=True):
            _check_severity(backend, f"checker {getattr(leaf, '__name__', type(leaf).__name__)!r}", part)
    else:
        _check_severity(backend, "checker", severity)
    return recording.finish((observation, action, severity))._replace(own=drawn)


def _ask(composition: Composition, *value: PyTree) -> np.ndarray:
    """The severity of one case whose ``value`` is the observation, the action and what other checkers say."""
    backend = composition.frontend.backend
    observation, action, native = (
        backend.tree_map(lambda leaf: backend.to_host(backend.as_array(leaf))[None], tree) for tree in value
    )
    return composition.judge_on_host(observation, action, native, 1).reshape(())


def _ordered_sites(first: Run, second: Run) -> tuple[Site, ...]:
    different = set(first.layout) ^ set(second.layout)
    if different:
        names = sorted({site.name for site in different})
        raise ProblemError(
            f"site(s) {', '.join(map(repr, names))} are not the same in two runs of the adversary. probest needs the "
            "same sites with the same shapes in every run: draw them always, and choose with where()"
        )
    return first.layout


def _check_severity(backend: Backend, who: str, severity: Any) -> None:
    if severity is None:
        raise SeverityError(f"{who} returned None: return the severity, a number that is at least 0 for a catastrophe")
    try:
        value = backend.as_array(severity)
    except (TypeError, ValueError) as error:
        raise SeverityError(
            f"{who} returned {type(severity).__name__}: return a scalar severity, at least 0 for a catastrophe"
        ) from error
    if tuple(value.shape) != ():
        raise SeverityError(
            f"{who} returned shape {tuple(value.shape)}; severity is one number a case, shape (). Programs and "
            "checkers are written for one observation: reduce with max(), or index"
        )
    if "complex" in str(value.dtype):
        raise SeverityError(f"{who} returned a complex number: severity is real")


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


def _snapshot(backend: Backend, tree: PyTree) -> list[Any]:
    """What the leaves are now: copies of what can be written to, the very objects of what cannot."""
    return [np.array(leaf) if isinstance(leaf, np.ndarray) else backend.snapshot(leaf) for leaf in backend.leaves(tree)]


def _check_same(backend: Backend, who: str, what: str, before: list[Any], tree: PyTree) -> None:
    after = _snapshot(backend, tree)
    if len(before) != len(after) or not all(_same(a, b) for a, b in zip(before, after, strict=True)):
        raise ProblemError(f"{who} changes {what} in place: return a new value instead (copy before writing)")


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return np.array_equal(one, other, equal_nan=one.dtype.kind in "fc")
    return one is other or (isinstance(one, bool | int | float) and one == other)


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


def _model_batched(event: Event, rng: np.random.Generator) -> Event | None:
    """The event with its model called on whole batches, if single runs give the same numbers; else None."""
    z = rng.standard_normal((3, event.dim))
    batched, single = (
        replace(event, composition=replace(event.composition, batching=how)) for how in ("model", "loop")
    )
    try:
        one, two = batched.evaluate(z), single.evaluate(z)
    except Exception:  # the model's own, whatever it makes of a batch
        return None
    return batched if np.allclose(one.severity, two.severity, rtol=1e-3, atol=1e-5) else None


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
    numbers = sum(site.size for site in sites) + sum(int(np.prod(np.shape(leaf))) for leaf in backend.leaves(value))
    return int(np.clip(DEFAULT_CHUNK_BYTES / (4 * ACTIVATIONS_PER_NUMBER * max(numbers, 1)), 64, 16_384))
