"""Pyro and NumPyro by the names they share, so that a program is written once for both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, Literal, NamedTuple

Backend = Literal["pyro", "numpyro"]


class Library(NamedTuple):
    """``sample(name, distribution, obs=)``, the module of distributions, and ``xp``: torch or jax.numpy."""

    sample: Callable[..., Any]
    dist: ModuleType
    xp: ModuleType

    def bind(self, function: Callable[..., Any], **params: Any) -> Callable[..., Any]:
        """``function(params, *args)`` as a callable of ``args`` that owns ``params``, so that gradients reach them.

        With Pyro it is a ``torch.nn.Module``, with NumPyro a ``jax.tree_util.Partial``.
        """
        arrays = {name: self.xp.asarray(value, dtype=self.xp.float32) for name, value in params.items()}
        if self.xp.__name__ == "torch":
            return _module(function, arrays)
        from jax.tree_util import Partial

        return Partial(function, arrays)  # type: ignore[no-untyped-call]


def library(backend: Backend) -> Library:
    """The library called ``backend``. Imports no other."""
    if backend == "pyro":
        import pyro
        import pyro.distributions
        import torch

        return Library(pyro.sample, pyro.distributions, torch)
    if backend == "numpyro":
        import jax.numpy as jnp
        import numpyro
        import numpyro.distributions

        return Library(numpyro.sample, numpyro.distributions, jnp)
    raise ValueError(f"backend={backend!r}: expected 'pyro' or 'numpyro'")


def _module(function: Callable[..., Any], arrays: Mapping[str, Any]) -> Callable[..., Any]:
    from torch import nn

    class Bound(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.params = nn.ParameterDict(arrays)

        def forward(self, *args: Any) -> Any:
            return function(dict(self.params.items()), *args)

    return Bound()
