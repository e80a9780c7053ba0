"""The two libraries under one set of names, so that a test writes its program once."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from models._libraries import library as of_models
from probest import Problem


def library(backend: Any) -> Any:
    """What the ready models use, and ``name``, ``factor``, ``plate``, ``param``, ``array``, ``module(fn, params)``."""
    shared, root = of_models(backend), importlib.import_module(backend)
    return SimpleNamespace(
        **shared._asdict(),
        name=backend,
        factor=root.factor,
        plate=root.plate,
        param=root.param,
        array=shared.xp.tensor if backend == "pyro" else shared.xp.array,
        module=lambda fn, params: shared.bind(fn, **params),
    )


def parameters(part: Any) -> dict[str, Any]:
    """The parameters that ``module`` gave a part, by name."""
    return dict(part.params.items()) if hasattr(part, "params") else part.args[0]


def gradient(backend: str, estimate: Any, *, model: Any = None, adversary: Any = None) -> tuple[float, dict[str, Any]]:
    """log P at the given part of an estimate and its gradient in the part's parameters, by the library's autograd."""
    part = adversary if model is None else model
    if backend == "pyro":
        part.zero_grad()
        value = estimate.log_prob_at(model=model, adversary=adversary)
        value.backward()
        grads = {k: _number(v.grad) if v.grad is not None else 0.0 for k, v in parameters(part).items()}
        return value.item(), grads
    import jax

    def at(part: Any) -> Any:
        return estimate.log_prob_at(model=part) if adversary is None else estimate.log_prob_at(adversary=part)

    value, slopes = jax.value_and_grad(at)(part)
    return float(value), {k: _number(v) for k, v in parameters(slopes).items()}


def _number(value: Any) -> Any:
    """A float, or an array where there are several."""
    return np.asarray(value) if value.ndim else float(value)


def assert_same_event(problem: Callable[[Any], Problem]) -> None:
    """One program in both libraries: the same sites, values, severities, log-weights and gradients at the same z.

    With the listed sites as z says and, where there are any, with them held at values of their lists; and the
    severities of its kinds. What an estimator does with these numbers is NumPy's, and need be tried in one library.

    problem: makes it, of what :func:`library` returns.
    """
    for name in ("numpyro", "pyro"):
        pytest.importorskip(name)
    one, other = (problem(library(name)).event for name in ("numpyro", "pyro"))
    for name in ("dim", "boolean", "weighted", "differentiable"):
        assert getattr(one, name) == getattr(other, name), name
    sites = [[site._replace(distribution="") for site in event.sites] for event in (one, other)]
    assert sites[0] == sites[1]
    rng = np.random.default_rng(0)
    z = rng.standard_normal((64, one.dim))
    codes = {site.name: rng.choice(site.choices[:40], (64, site.elements)) for site in one.sites if site.choices}
    found: list[list[np.ndarray | None]] = []
    for event in (one, other):
        values = event.decode(z).sites
        held = {
            site.name: site.decoded(codes[site.name], values[site.name].dtype) for site in event.sites if site.choices
        }
        at = [event.evaluate(z, gradient=event.differentiable, held=kept) for kept in ({}, held)[: 1 + bool(held)]]
        kinds = event.evaluate_kinds(z)[2] if event.kinds else None
        found.append([*(values[name] for name in sorted(values)), *at[0], *at[-1], kinds])
    for mine, theirs in zip(*found, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-3)
