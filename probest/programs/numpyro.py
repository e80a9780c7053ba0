"""NumPyro programs: see :mod:`probest.programs.base`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.infer.reparam import Reparam

from probest.backends.base import Array, Backend, PyTree
from probest.backends.load import load_backend
from probest.programs.base import BASE, COMPONENT, BaseSource, Observed, Run, Site, SiteError, plates_of
from probest.programs.maps import UnsupportedDistribution, choices, gaussian_map, mixture_map

__all__ = ["NumPyroFrontend"]


class NumPyroFrontend:
    """See :class:`~probest.programs.base.Frontend`."""

    name = "numpyro"

    def __init__(self) -> None:
        self.backend: Backend = load_backend("jax")

    @contextmanager
    def recording(
        self, source: BaseSource, held: Mapping[str, Array], params: Mapping[str, Array], *, seeded: bool = False
    ) -> Iterator[NumPyroRecording]:
        gaussian = _Gaussianize(self.backend, held)

        def supply(message: dict[str, Any]) -> Array | None:
            if message["type"] == "param":
                return params.get(message["name"])
            of = message.get("infer", {}).get("probest_base")
            return None if of is None else source(of, message["fn"].shape())

        with ExitStack() as stack:
            if not seeded:  # a rehearsal keeps the user's setting; evaluation need not check the same again
                stack.enter_context(numpyro.validation_enabled(False))
            trace = stack.enter_context(_Trace())
            if seeded:
                stack.enter_context(handlers.seed(rng_seed=0))
            stack.enter_context(handlers.substitute(substitute_fn=supply))
            stack.enter_context(handlers.reparam(config=gaussian))
            yield NumPyroRecording(trace, gaussian.layout)

    def adopt(self, part: Any) -> None:
        """Nothing to do: modules of jax are plain data."""

    def deterministic(self, name: str, value: Array) -> None:
        numpyro.deterministic(name, value)

    def factor(self, name: str, value: Array) -> None:
        numpyro.factor(name, value)

    def sample(self, name: str, law: str, *parameters: Any, event_dims: int = 0) -> Array:
        return numpyro.sample(name, getattr(dist, law)(*parameters).to_event(event_dims))

    def hidden(self) -> AbstractContextManager[Any]:
        return handlers.block()  # type: ignore[no-any-return]

    def values(self, program: Callable[..., Any], params: Mapping[str, Array]) -> dict[str, Array]:
        with handlers.trace() as seen, handlers.substitute(data=dict(params)):
            program()
        return {name: site["value"] for name, site in seen.items() if site["type"] in {"sample", "deterministic"}}

    def scoped(self, program: Callable[..., Any], prefix: str) -> Callable[..., Any]:
        return handlers.scope(program, prefix=prefix)  # type: ignore[no-any-return]

    def gaussianize(self, program: Callable[..., Any]) -> Callable[..., Any]:
        gaussianized: Callable[..., Any] = handlers.reparam(program, config=_Gaussianize(self.backend, {}))
        return gaussianized


class NumPyroRecording:
    """See :class:`~probest.programs.base.Recording`."""

    def __init__(self, trace: Mapping[str, Any], layout: list[Site]) -> None:
        self.trace = trace
        self.layout = layout

    def finish(self, value: PyTree) -> Run:
        log_weight = jnp.zeros(())
        sites, params, observed = {}, {}, {}
        for name, site in self.trace.items():
            if site["type"] == "param":
                params[name] = site["value"]
            elif site["type"] == "deterministic":
                sites[name] = site["value"]
            elif site["type"] == "sample" and site["is_observed"]:
                term = site["fn"].log_prob(site["value"])
                log_weight = log_weight + jnp.sum(term if site["scale"] is None else site["scale"] * term)
                observed[name] = Observed(site["value"], plates_of(site["cond_indep_stack"], site["fn"].batch_shape))
        return Run(value, log_weight, sites, tuple(self.layout), params, observed)

    def densities(self, names: Sequence[str]) -> dict[str, tuple[Array, Array]]:
        found = {}
        for name in names:
            law, value = self.trace[name]["fn"], self.trace[name]["value"]
            found[name] = jnp.sum(law.log_prob(value)), jnp.all(law.support(value))
        return found


class _Trace(handlers.trace):
    """A trace that names the site when a name is used twice."""

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] in {"sample", "deterministic"} and msg.get("name") in self.trace:
            name = msg.get("infer", {}).get("probest_base", msg["name"])
            raise SiteError(f"site {name!r} is named twice; give every site of the program a name of its own")
        super().postprocess_message(msg)


class _Gaussianize:
    """``config`` of NumPyro's reparam handler; also keeps the layout in the order of the program."""

    def __init__(self, backend: Backend, held: Mapping[str, Array]) -> None:
        self.backend = backend
        self.held = held
        self.layout: list[Site] = []

    def __call__(self, message: dict[str, Any]) -> Reparam | None:
        if message["is_observed"] or message.get("infer", {}).get("probest_base") is not None:
            return None
        if message["name"] in self.held:
            return _Hold(self.held[message["name"]])
        _check(message)
        return _ToGaussian(self, message)


class _Hold(Reparam):
    def __init__(self, value: Array) -> None:
        self.value = value

    def __call__(self, name: str, fn: Any, obs: Any) -> tuple[Any, Any]:
        return fn, self.value


class _ToGaussian(Reparam):
    def __init__(self, owner: _Gaussianize, message: dict[str, Any]) -> None:
        self.owner = owner
        self.sample_shape = tuple(message.get("kwargs", {}).get("sample_shape", ()))
        infer = message.get("infer", {})
        self.parent = infer.get("probest_component")
        self.listed = infer.get("enumerate") is not False
        self.frames = tuple(message["cond_indep_stack"])

    def __call__(self, name: str, fn: Any, obs: Any) -> tuple[Any, Any]:
        if self.sample_shape:
            fn = fn.expand(self.sample_shape + fn.batch_shape)
        try:
            mixture = mixture_map(fn, self.owner.backend.special)
            if mixture is not None:
                index = numpyro.sample(name + COMPONENT, mixture.index, infer={"probest_component": name})
                base = self._base(name, fn, mixture.base_shape, mixture.discrete)
                return None, mixture.transform(index, base)
            mapped = gaussian_map(fn, self.owner.backend.special)
        except UnsupportedDistribution as error:
            raise SiteError(f"site {name!r}: {error}") from error
        base = self._base(name, fn, mapped.base_shape, mapped.discrete)
        return None, mapped.transform(base)

    def _base(self, name: str, fn: Any, shape: tuple[int, ...], discrete: bool) -> Array:
        listed = choices(fn) if discrete and self.listed else ((), True)
        plates = plates_of(self.frames, fn.batch_shape)
        self.owner.layout.append(Site(name, shape, discrete, type(fn).__name__, self.parent, *listed, plates))
        normal = dist.Normal(jnp.zeros(shape), 1.0).to_event(len(shape) - len(fn.batch_shape))
        return numpyro.sample(name + BASE, normal, infer={"probest_base": name})


def _check(message: dict[str, Any]) -> None:
    name = message["name"]
    if message["value"] is not None:
        raise SiteError(
            f"site {name!r} is not observed and yet has a value already: it is inside numpyro's scan, or a handler has "
            "substituted it. Draw all steps at one site before a jax.lax.scan, and fix values with handlers.condition"
        )
    if message.get("scale") is not None:
        raise SiteError(
            f"site {name!r} is scaled or subsampled (handlers.scale, or plate with subsample_size): its law is then "
            "not a probability distribution. Remove the scale from latent sites"
        )
