"""Pyro programs: see :mod:`probest.programs.base`.

Pyro's settings that would break batching (validation) or gradients (``module_local_params`` off) are changed
inside a context that restores them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.reparam.reparam import Reparam
from pyro.poutine.messenger import Messenger
from pyro.poutine.reparam_messenger import ReparamMessenger
from scipy.special import ndtr

from probest.backends.base import Array, Backend, PyTree
from probest.backends.load import load_backend
from probest.programs.base import (
    BASE,
    COARSENESS,
    COMPONENT,
    BaseSource,
    Observed,
    Posterior,
    Run,
    Site,
    SiteError,
    places_of,
    plates_of,
)
from probest.programs.maps import Listed, UnsupportedDistribution, choices, coarseness, gaussian_map, mixture_map

__all__ = ["PyroFrontend"]


class PyroFrontend:
    """See :class:`~probest.programs.base.Frontend`."""

    name = "pyro"

    def __init__(self) -> None:
        self.backend: Backend = load_backend("torch")

    @contextmanager
    def recording(
        self, source: BaseSource, held: Mapping[str, Array], params: Mapping[str, Array], *, seeded: bool = False
    ) -> Iterator[PyroRecording]:
        gaussian = _Gaussianize(self.backend, held, rehearsal=seeded)
        with ExitStack() as stack:
            # Without local parameters gradients of PyroParam are silently 0; validation breaks vmap. A rehearsal
            # keeps the user's setting of the latter.
            stack.enter_context(pyro.settings.context(module_local_params=True))
            if not seeded:
                stack.enter_context(pyro.validation_enabled(False))
            trace = stack.enter_context(_Record())
            stack.enter_context(_Supply(source, params))
            stack.enter_context(ReparamMessenger(gaussian))
            yield PyroRecording(trace, gaussian.layout)

    def adopt(self, part: Any) -> None:
        """Give PyroModules that were built without ``module_local_params`` the (empty) store that it needs."""
        for module in part.modules() if isinstance(part, torch.nn.Module) else ():
            context = getattr(module, "_pyro_context", None)
            if context is not None and not hasattr(context, "param_state"):
                context.param_state = {"params": {}, "constraints": {}}

    def deterministic(self, name: str, value: Array) -> None:
        pyro.deterministic(name, value)

    def factor(self, name: str, value: Array) -> None:
        pyro.factor(name, value)

    def sample(self, name: str, law: str, *parameters: Any, event_dims: int = 0) -> Array:
        return pyro.sample(name, getattr(dist, law)(*parameters).to_event(event_dims))

    def hidden(self) -> AbstractContextManager[Any]:
        return poutine.block()

    def values(self, program: Callable[..., Any], params: Mapping[str, Array]) -> dict[str, Array]:
        with _Values() as seen, _Params(params):
            program()
        return seen.values

    def scoped(self, program: Callable[..., Any], prefix: str) -> Callable[..., Any]:
        return _Scope(prefix)(program)

    def posterior(self, guide: Any, params: Mapping[str, Array]) -> Posterior:
        with torch.no_grad():
            if hasattr(guide, "get_posterior"):
                law = guide.get_posterior()
                size = int(law.event_shape[0])
                unpacked = guide._unpack_latent(torch.arange(size))
                places = {site["name"]: at.numpy() for site, at in unpacked}
            else:
                ends = {name: torch.stack(list(at)) for name, at in guide.quantiles([0.5, float(ndtr(1.0))]).items()}
                law, places = _normals({name: (at[0], at[1] - at[0]) for name, at in ends.items()})

        def sample(n: int, seed: int) -> np.ndarray:
            with torch.no_grad(), torch.random.fork_rng():
                torch.manual_seed(seed)
                return self.backend.to_host(law.sample((n,)))

        def log_prob(vectors: np.ndarray) -> np.ndarray:
            with torch.no_grad():
                return self.backend.to_host(law.log_prob(self.backend.from_host(vectors)))

        return Posterior(places, sample, log_prob)

    def gaussianize(self, program: Callable[..., Any]) -> Callable[..., Any]:
        return poutine.reparam(program, config=_Gaussianize(self.backend, {}))


def _normals(found: Mapping[str, tuple[Array, Array]]) -> tuple[Any, dict[str, np.ndarray]]:
    """Independent normal laws of sites as one over a vector, and where each site stands in it."""
    mean, scale = (torch.cat([pair[i].reshape(-1) for pair in found.values()]) for i in (0, 1))
    return dist.Normal(mean, scale).to_event(1), places_of({name: tuple(pair[0].shape) for name, pair in found.items()})


class _Values(Messenger):
    """Values of the sites drawn inside."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, Array] = {}

    def _pyro_post_sample(self, msg: Any) -> None:
        self.values[msg["name"]] = msg["value"]


class _Scope(Messenger):
    """Sites under the names of a scope."""

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self.prefix = prefix

    def _pyro_sample(self, msg: Any) -> None:
        msg["name"] = f"{self.prefix}/{msg['name']}"


class PyroRecording:
    """See :class:`~probest.programs.base.Recording`."""

    def __init__(self, trace: _Record, layout: list[Site]) -> None:
        self.trace = trace
        self.layout = layout

    def finish(self, value: PyTree) -> Run:
        log_weight = torch.zeros(())
        for term in self.trace.terms.values():
            log_weight = log_weight + term
        observed = {name: seen for name, (_, seen) in self.trace.observed.items()}
        return Run(
            value, log_weight, self.trace.sites, tuple(self.layout), self.trace.params, observed, self.trace.coarse
        )

    def densities(self, names: Sequence[str]) -> dict[str, tuple[Array, Array]]:
        found = {}
        for name in names:
            law, seen = self.trace.observed[name]
            found[name] = self.trace.terms[name], law.support.check(seen.value).all()
        return found


class _Record(Messenger):
    """A light trace: values of sites, log-densities of observed ones, and an error for a name used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.sites: dict[str, Array] = {}
        self.terms: dict[str, Array] = {}
        self.observed: dict[str, tuple[Any, Observed]] = {}
        self.params: dict[str, Array] = {}
        self.coarse: dict[str, Array] = {}

    def _pyro_post_param(self, msg: Any) -> None:
        self.params[msg["name"]] = msg["value"]

    def _pyro_post_sample(self, msg: Any) -> None:
        name = msg["name"]
        if type(msg["fn"]).__name__ == "_Subsample" or "probest_base" in msg["infer"]:
            return
        if COARSENESS in msg["infer"]:
            self.coarse[msg["infer"][COARSENESS]] = msg["value"]
            return
        if name in self.sites or name in self.terms:
            raise SiteError(f"site {name!r} is named twice; give every site of the program a name of its own")
        if msg["infer"].get("_deterministic") or msg["infer"].get("probest_mapped"):
            self.sites[name] = msg["value"]
        elif msg["is_observed"]:
            term = msg["fn"].log_prob(msg["value"])
            if msg["mask"] is not None:
                term = torch.where(torch.as_tensor(msg["mask"]), term, torch.zeros_like(term))
            self.terms[name] = (term * msg["scale"]).sum()
            plates = plates_of(msg["cond_indep_stack"], msg["fn"].batch_shape)
            self.observed[name] = msg["fn"], Observed(msg["value"], plates)


class _Params(Messenger):
    """Gives ``param`` sites their overriding values."""

    def __init__(self, params: Mapping[str, Array]) -> None:
        super().__init__()
        self.given = params

    def _pyro_param(self, msg: Any) -> None:
        if msg["name"] in self.given:
            msg["value"] = self.given[msg["name"]]
            msg["done"] = True


class _Supply(_Params):
    """Gives base sites their coordinates, and ``param`` sites their overriding values."""

    def __init__(self, source: BaseSource, params: Mapping[str, Array]) -> None:
        super().__init__(params)
        self.source = source

    def _pyro_sample(self, msg: Any) -> None:
        of = msg["infer"].get("probest_base")
        if of is not None:
            msg["value"] = self.source(of, tuple(msg["fn"].batch_shape + msg["fn"].event_shape))
            msg["done"] = True


class _Gaussianize:
    """``config`` of Pyro's reparam handler; also keeps the layout in the order of the program.

    rehearsal: whether to record how coarse the values of sites are.
    """

    def __init__(self, backend: Backend, held: Mapping[str, Array], *, rehearsal: bool = False) -> None:
        self.backend = backend
        self.held = held
        self.rehearsal = rehearsal
        self.layout: list[Site] = []

    def __call__(self, msg: Any) -> Reparam | None:
        if msg["is_observed"] or "probest_base" in msg["infer"]:
            return None
        if msg["name"] in self.held:
            return _Hold(self.held[msg["name"]])
        if msg["value"] is not None:
            raise SiteError(
                f"site {msg['name']!r} is not observed and yet has a value already: a handler (poutine.replay, say) "
                "has set it. Fix values with poutine.condition"
            )
        if not _is_one(msg["scale"]):
            raise SiteError(
                f"site {msg['name']!r} is scaled or subsampled (poutine.scale, or plate with subsample_size): its "
                "law is then not a probability distribution. Remove the scale from latent sites"
            )
        msg["infer"]["probest_mapped"] = True
        return _ToGaussian(self, msg)


class _Hold(Reparam):
    def __init__(self, value: Array) -> None:
        self.value = value

    def apply(self, msg: Any) -> Any:
        return {"fn": msg["fn"], "value": self.value, "is_observed": True}


class _ToGaussian(Reparam):
    def __init__(self, owner: _Gaussianize, msg: Any) -> None:
        self.owner = owner
        self.parent = msg["infer"].get("probest_component")
        self.listed = msg["infer"].get("enumerate") is not False
        self.frames = tuple(msg["cond_indep_stack"])

    def apply(self, msg: Any) -> Any:
        name, fn = msg["name"], msg["fn"]
        try:
            mixture = mixture_map(fn, self.owner.backend.special)
            if mixture is not None:
                index = pyro.sample(name + COMPONENT, mixture.index, infer=_mark("probest_component", name))
                value = mixture.transform(index, self._base(name, fn, mixture.base_shape, mixture.discrete))
            else:
                mapped = gaussian_map(fn, self.owner.backend.special)
                rehearsal = self.owner.rehearsal and not mapped.discrete
                apart = coarseness(fn, self.owner.backend.special) if rehearsal else None
                if apart is not None:
                    pyro.sample(name + COARSENESS, dist.Delta(apart), obs=apart, infer=_mark(COARSENESS, name))
                value = mapped.transform(self._base(name, fn, mapped.base_shape, mapped.discrete))
        except UnsupportedDistribution as error:
            raise SiteError(f"site {name!r}: {error}") from error
        event_dim = len(fn.event_shape)
        return {"fn": dist.Delta(value, event_dim=event_dim).mask(False), "value": value, "is_observed": True}

    def _base(self, name: str, fn: Any, shape: tuple[int, ...], discrete: bool) -> Array:
        listed = choices(fn) if discrete and self.listed else Listed()
        plates = plates_of(self.frames, fn.batch_shape)
        value_shape = tuple(fn.batch_shape) + tuple(fn.event_shape)
        site = Site(name, shape, discrete, type(fn).__name__, self.parent, *listed, plates, value_shape)
        self.owner.layout.append(site)
        normal = dist.Normal(torch.zeros(shape), 1.0).to_event(len(shape) - len(fn.batch_shape))
        return pyro.sample(name + BASE, normal, infer=_mark("probest_base", name))


def _mark(key: str, name: str) -> Any:
    """An ``infer`` dictionary of our own; Pyro's type knows only its own keys."""
    return {key: name}


def _is_one(scale: Any) -> bool:
    return not isinstance(scale, torch.Tensor) and scale == 1.0
