"""What every test shares: guards against tests that leave global state changed, and the two backends.

Guards look only at libraries that are imported already, so that a test of plain NumPy stays quick.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# Programs that JAX compiled are kept, also for the next run: most of its tests' time is compilation.
ROOT = Path(__file__).parents[1]
if os.access(ROOT, os.W_OK):
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / "build" / "jax"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

BACKENDS = {"pyro": ("torch", "pyro"), "numpyro": ("jax", "numpyro")}


@pytest.fixture(params=list(BACKENDS))
def backend(request: pytest.FixtureRequest) -> str:
    """Runs the test once for each backend that is installed: ``pyro``, ``numpyro``."""
    for module in BACKENDS[request.param]:
        pytest.importorskip(module)
    return request.param


@pytest.fixture
def any_backend() -> str:
    """A backend that is installed, for what is NumPy's alone once a program has become an event.

    That both make the same event of a program is tested point by point: ``library.assert_same_event``.
    """
    found = [name for name, modules in BACKENDS.items() if all(map(importlib.util.find_spec, modules))]
    return found[0] if found else pytest.skip("neither Pyro nor NumPyro is installed")


@pytest.fixture(autouse=True)
def settings_stay() -> Iterator[None]:
    """Fails a test after which a library's settings are not as they were before."""
    before = {name: read() for name, read in _settings().items()}
    yield
    after = {name: read() for name, read in _settings().items() if name in before}
    changed = [f"{name} ({before[name]} to {value})" for name, value in after.items() if value != before[name]]
    assert not changed, f"the test left global state changed: {', '.join(changed)}"


@pytest.fixture(autouse=True)
def randomness_stays(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a test that moved a global random state, unless it is marked ``global_rng``; restores it either way."""
    states = {name: (read(), write) for name, (read, write) in _random_states().items()}
    imported = len(sys.modules)
    yield
    moved = []
    for name, (read, write) in _random_states().items():
        if name in states and _as_bytes(states[name][0]) != _as_bytes(read()):
            moved.append(name)
            write(states[name][0])
    if set(moved) <= {"python", "numpy"} and len(sys.modules) > imported:
        return  # some libraries draw from it when they are imported first
    if request.node.get_closest_marker("global_rng") is None:
        assert not moved, (
            f"the test, or the code under it, drew from a global random state: {', '.join(moved)}. If it is the test "
            "that means to (a module's initial weights, say), mark it with pytest.mark.global_rng"
        )


def _settings() -> dict[str, Callable[[], Any]]:
    """Readers of the settings of every library that is imported."""
    readers: dict[str, Callable[[], Any]] = {}
    if torch := sys.modules.get("torch"):
        readers["torch default dtype"] = torch.get_default_dtype
        readers["torch gradient mode"] = torch.is_grad_enabled
        readers["torch deterministic algorithms"] = torch.are_deterministic_algorithms_enabled
        readers["torch distribution validation"] = lambda: torch.distributions.Distribution._validate_args
    if pyro := sys.modules.get("pyro"):
        readers["pyro settings"] = lambda: dict(pyro.settings.get())  # validation is among them
        readers["pyro parameter store"] = lambda: sorted(pyro.get_param_store().keys())
    if jax := sys.modules.get("jax"):
        readers["jax x64"] = lambda: jax.config.jax_enable_x64
        readers["jax nan debugging"] = lambda: jax.config.jax_debug_nans
    if numpyro := sys.modules.get("numpyro"):
        readers["numpyro validation"] = lambda: numpyro.distributions.Distribution._validate_args
    readers["numpy error handling"] = np.geterr
    return readers


def _random_states() -> dict[str, tuple[Callable[[], Any], Callable[[Any], None]]]:
    """How to read and to write the global random state of every library that is imported."""
    states: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {
        "python": (random.getstate, random.setstate),
        "numpy": (np.random.get_state, np.random.set_state),
    }
    if torch := sys.modules.get("torch"):
        states["torch"] = (torch.get_rng_state, torch.set_rng_state)
    return states


def _as_bytes(state: Any) -> bytes:
    return state.numpy().tobytes() if hasattr(state, "numpy") else pickle.dumps(state)
