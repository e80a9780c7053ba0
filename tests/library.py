"""The two libraries under one set of names, so that a test writes its program once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


def library(backend: str) -> Any:
    """``sample, factor, plate, param, deterministic, dist, xp, array`` and ``module(fn, params)`` of a backend."""
    if backend == "pyro":
        import array_api_compat.torch as xp
        import pyro
        import pyro.distributions as dist
        import torch

        class Module(torch.nn.Module):
            def __init__(self, fn: Any, params: dict[str, Any]) -> None:
                super().__init__()
                self.fn = fn
                self.weights = torch.nn.ParameterDict(
                    {k: torch.nn.Parameter(torch.tensor(v)) for k, v in params.items()}
                )

            def forward(self, *args: Any) -> Any:
                return self.fn(self.weights, *args)

        return SimpleNamespace(
            sample=pyro.sample,
            factor=pyro.factor,
            plate=pyro.plate,
            param=pyro.param,
            deterministic=pyro.deterministic,
            dist=dist,
            xp=xp,
            array=torch.tensor,
            module=Module,
        )
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from jax.tree_util import Partial

    return SimpleNamespace(
        sample=numpyro.sample,
        factor=numpyro.factor,
        plate=numpyro.plate,
        param=numpyro.param,
        deterministic=numpyro.deterministic,
        dist=dist,
        xp=jnp,
        array=jnp.array,
        module=lambda fn, params: Partial(fn, {k: jnp.array(v) for k, v in params.items()}),
    )


def gradient(
    backend: str, estimate: Any, *, model: Any = None, adversary: Any = None
) -> tuple[float, dict[str, float]]:
    """log P at the given part of an estimate and its gradient in the part's parameters, by the library's autograd."""
    if backend == "pyro":
        part = adversary if model is None else model
        part.zero_grad()
        value = estimate.log_prob_at(model=model, adversary=adversary)
        value.backward()
        return value.item(), {k: v.grad.item() if v.grad is not None else 0.0 for k, v in part.weights.items()}
    import jax

    def at(part: Any) -> Any:
        return estimate.log_prob_at(model=part) if adversary is None else estimate.log_prob_at(adversary=part)

    value, grads = jax.value_and_grad(at)(adversary if model is None else model)
    return float(value), {k: float(v) for k, v in grads.args[0].items()}
