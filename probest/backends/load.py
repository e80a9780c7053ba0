"""The backends by name, each imported when it is first asked for: a JAX user needs no torch, and the reverse."""

from __future__ import annotations

from probest.backends.base import Backend

__all__ = ["load_backend"]


def load_backend(name: str) -> Backend:
    """The backend called ``name`` (``torch`` or ``jax``), imported only now."""
    if name == "torch":
        from probest.backends.torch import TorchBackend

        return TorchBackend()
    if name == "jax":
        from probest.backends.jax import JaxBackend

        return JaxBackend()
    raise ValueError(f"backend={name!r} is not known: choose 'torch' (Pyro) or 'jax' (NumPyro)")
