"""NumPyro programs: see :mod:`probest.programs.base`.

Sites inside NumPyro's ``scan`` and ``cond`` are sites of the whole program: the base of a scanned site has one row for
each step and is drawn before the scan, the base of a site in a branch before the branch is chosen. Within them the
program runs under a reparameterisation of its own that takes its bases from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.contrib.control_flow.cond import cond_wrapper
from numpyro.contrib.control_flow.scan import scan_wrapper
from numpyro.infer.reparam import Reparam
from numpyro.primitives import Messenger
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
        gaussian = _Gaussianize(self.backend, held, rehearsal=seeded)

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
            stack.enter_context(_ControlFlow(config=gaussian))
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

    def posterior(self, guide: Any, params: Mapping[str, Array]) -> Posterior:
        if hasattr(guide, "get_posterior"):
            law, size = guide.get_posterior(params), guide.latent_dim
            places = {
                name: np.asarray(at, dtype=np.intp) for name, at in guide._unpack_latent(jnp.arange(size)).items()
            }
        else:
            ends = guide.quantiles(params, [0.5, ndtr(1.0)])
            known = {name: at for name, at in ends.items() if name.endswith(BASE)}  # not what follows from them
            law, places = _normals({name: (at[0], at[1] - at[0]) for name, at in known.items()})
        return Posterior(
            places,
            lambda n, seed: self.backend.to_host(law.sample(jax.random.key(seed), (n,))),
            lambda vectors: self.backend.to_host(law.log_prob(self.backend.from_host(vectors))),
        )

    def gaussianize(self, program: Callable[..., Any]) -> Callable[..., Any]:
        config = _Gaussianize(self.backend, {})
        gaussianized: Callable[..., Any] = handlers.reparam(_ControlFlow(program, config=config), config=config)
        return gaussianized


class NumPyroRecording:
    """See :class:`~probest.programs.base.Recording`."""

    def __init__(self, trace: Mapping[str, Any], layout: list[Site]) -> None:
        self.trace = trace
        self.layout = layout

    def finish(self, value: PyTree) -> Run:
        log_weight = jnp.zeros(())
        sites, params, observed, coarse = {}, {}, {}, {}
        for name, site in self.trace.items():
            if site["type"] == "param":
                params[name] = site["value"]
            elif site["type"] == "sample" and COARSENESS in site["infer"]:
                coarse[site["infer"][COARSENESS]] = jnp.max(site["value"])
            elif site["type"] == "deterministic":
                sites[name] = site["value"]
            elif site["type"] == "sample" and site["is_observed"]:
                term = site["fn"].log_prob(site["value"])
                log_weight = log_weight + jnp.sum(term if site["scale"] is None else site["scale"] * term)
                observed[name] = Observed(site["value"], plates_of(site["cond_indep_stack"], site["fn"].batch_shape))
        return Run(value, log_weight, sites, tuple(self.layout), params, observed, coarse)

    def densities(self, names: Sequence[str]) -> dict[str, tuple[Array, Array]]:
        found = {}
        for name in names:
            law, value = self.trace[name]["fn"], self.trace[name]["value"]
            found[name] = jnp.sum(law.log_prob(value)), jnp.all(law.support(value))
        return found


def _normals(found: Mapping[str, tuple[Array, Array]]) -> tuple[Any, dict[str, np.ndarray]]:
    """Independent normal laws of sites as one over a vector, and where each site stands in it."""
    mean, scale = (jnp.concatenate([jnp.ravel(pair[i]) for pair in found.values()]) for i in (0, 1))
    return dist.Normal(mean, scale).to_event(1), places_of({name: np.shape(pair[0]) for name, pair in found.items()})


class _Trace(handlers.trace):
    """A trace that names the site when a name is used twice."""

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] in {"sample", "deterministic"} and msg.get("name") in self.trace:
            infer = msg.get("infer", {})
            name = infer.get("probest_base", infer.get(COARSENESS, msg["name"]))
            raise SiteError(f"site {name!r} is named twice; give every site of the program a name of its own")
        super().postprocess_message(msg)


class _Gaussianize:
    """``config`` of NumPyro's reparam handler; also keeps the layout in the order of the program.

    bases: where a base comes from, by the site's name and base shape; without it, bases are sites of the program.
    rehearsal: whether to record how coarse the values of sites are.
    """

    def __init__(
        self,
        backend: Backend,
        held: Mapping[str, Array],
        bases: Callable[[str, tuple[int, ...]], Array] | None = None,
        *,
        rehearsal: bool = False,
    ) -> None:
        self.backend = backend
        self.held = held
        self.bases = bases
        self.rehearsal = rehearsal
        self.layout: list[Site] = []

    def __call__(self, message: dict[str, Any]) -> Reparam | None:
        if message["is_observed"] or message.get("infer", {}).get("probest_base") is not None:
            return None
        if message["name"] in self.held:
            return _Hold(self.held[message["name"]])
        _check(message)
        return _ToGaussian(self, message)

    def base(self, site: Site, normal: dist.Distribution) -> Array:
        """Enter a site into the layout; its base, which has the law ``normal``."""
        self.layout.append(site)
        if self.bases is not None:
            return self.bases(site.name, site.base_shape)
        return numpyro.sample(site.name + BASE, normal, infer={"probest_base": site.name})


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
            apart = coarseness(fn, self.owner.backend.special) if self.owner.rehearsal and not mapped.discrete else None
            if apart is not None:
                numpyro.sample(name + COARSENESS, dist.Delta(apart), obs=apart, infer={COARSENESS: name})
        except UnsupportedDistribution as error:
            raise SiteError(f"site {name!r}: {error}") from error
        base = self._base(name, fn, mapped.base_shape, mapped.discrete)
        return None, mapped.transform(base)

    def _base(self, name: str, fn: Any, shape: tuple[int, ...], discrete: bool) -> Array:
        listed = choices(fn) if discrete and self.listed else Listed()
        plates = plates_of(self.frames, fn.batch_shape)
        value_shape = tuple(fn.batch_shape) + tuple(fn.event_shape)
        site = Site(name, shape, discrete, type(fn).__name__, self.parent, *listed, plates, value_shape)
        return self.owner.base(site, dist.Normal(jnp.zeros(shape), 1.0).to_event(len(shape) - len(fn.batch_shape)))


class _ControlFlow(Messenger):
    """Runs the bodies of ``scan`` and the branches of ``cond`` with bases and held values from outside."""

    def __init__(self, fn: Callable[..., Any] | None = None, *, config: _Gaussianize) -> None:
        self.config = config
        super().__init__(fn)

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] != "control_flow":
            return
        given = msg["kwargs"]["substitute_stack"]
        if any(kind != "condition" for kind, _ in given):
            raise SiteError(
                "a handler substitutes or replays sites inside numpyro's scan or cond: fix values with "
                "handlers.condition, or with obs="
            )
        conditions = [data for _, data in given]
        if msg["fn"] is scan_wrapper:
            msg["value"] = self._scan(conditions, *msg["args"])
        elif msg["fn"] is cond_wrapper:
            msg["value"] = self._cond(conditions, *msg["args"])

    def _scan(self, conditions: list[Any], f: Any, init: Any, xs: Any, length: int | None, reverse: bool) -> Any:
        steps = jax.tree.leaves(xs)[0].shape[0] if length is None else length
        first = jax.tree.map(lambda x: x[0], xs)
        layout = self._layout(conditions, f, init, first)
        bases = {site.name: self._base(site, (steps,)) for site in layout}
        held = {site.name: self.config.held[site.name] for site in layout if site.name in self.config.held}
        # observations of a whole series are taken step by step
        series = [_series(data, steps) for data in conditions]

        def body(carry: Any, x: Any) -> Any:
            inner, base, value, given = x
            fixed = [
                {**data, **now} if isinstance(data, dict) else data for data, now in zip(conditions, given, strict=True)
            ]
            return self._under(base, value, fixed, f)(carry, inner)

        return scan_wrapper(body, init, (xs, bases, held, series), steps, reverse)

    def _cond(self, conditions: list[Any], pred: Any, true_fun: Any, false_fun: Any, operand: Any) -> Any:
        branches = [self._layout(conditions, branch, operand) for branch in (true_fun, false_fun)]
        one, other = ({site.name: site for site in layout} for layout in branches)
        differing = [
            name for name in one | other if name not in one or name not in other or not _alike(one[name], other[name])
        ]
        if differing:
            raise SiteError(
                f"site(s) {', '.join(map(repr, sorted(differing)))} are not the same in both branches of numpyro's "
                "cond. Give both branches the same sites with the same shapes and choices, or draw before the cond"
            )
        bases = {name: self._base(site, ()) for name, site in one.items()}
        held = {name: self.config.held[name] for name in one if name in self.config.held}
        both = [self._under(bases, held, conditions, branch) for branch in (true_fun, false_fun)]
        return cond_wrapper(pred, *both, operand)

    def _layout(self, conditions: list[Any], f: Callable[..., Any], *arguments: Any) -> list[Site]:
        """The latent sites of one run of a body."""
        seen: dict[str, Any] = {}
        config = _Gaussianize(self.config.backend, {}, lambda _, shape: jnp.zeros(shape))

        def run(*arguments: Any) -> tuple[()]:
            with handlers.block(), handlers.seed(rng_seed=0), _Trace() as trace:
                _reparameterised(config, conditions, f)(*arguments)
            seen.update(trace)
            return ()

        jax.eval_shape(run, *arguments)
        declared = [name for name, site in seen.items() if site["type"] == "param"]
        if declared:
            raise SiteError(
                f"numpyro.param {declared[0]!r} stands inside numpyro's scan or cond, where NumPyro does not see it: "
                "declare it before"
            )
        return config.layout

    def _base(self, site: Site, steps: tuple[int, ...]) -> Array:
        """The base of a site within, drawn outside; ``steps`` leads its shape."""
        plates = (None,) * len(steps) + site.plates
        shapes = {name: steps + getattr(site, name) for name in ("base_shape", "value_shape")}
        whole = site._replace(plates=plates, **shapes)
        if site.name in self.config.held:
            return jnp.zeros(whole.base_shape)
        return self.config.base(whole, dist.Normal(jnp.zeros(whole.base_shape), 1.0).to_event(len(whole.base_shape)))

    def _under(
        self, bases: Mapping[str, Array], held: Mapping[str, Array], conditions: list[Any], f: Callable[..., Any]
    ) -> Callable[..., Any]:
        inner = _Gaussianize(self.config.backend, held, lambda name, _: bases[name], rehearsal=self.config.rehearsal)
        return _reparameterised(inner, conditions, f)


def _reparameterised(config: _Gaussianize, conditions: list[Any], f: Callable[..., Any]) -> Callable[..., Any]:
    """A body, under the conditions that stand around it."""
    for data in conditions:
        f = handlers.condition(f, **({"data": data} if isinstance(data, dict) else {"condition_fn": data}))
    reparameterised: Callable[..., Any] = handlers.reparam(_ControlFlow(f, config=config), config=config)
    return reparameterised


def _series(data: Any, steps: int) -> dict[str, Array]:
    """Of the values of a condition, those that have a row for each step."""
    if not isinstance(data, dict):
        return {}
    return {name: value for name, value in data.items() if jnp.ndim(value) and jnp.shape(value)[0] == steps}


def _alike(one: Site, other: Site) -> bool:
    """Whether one base serves both: the same but for the class of their law."""
    return one._replace(distribution="") == other._replace(distribution="")


def _check(message: dict[str, Any]) -> None:
    name = message["name"]
    if message["value"] is not None:
        raise SiteError(
            f"site {name!r} is not observed and yet has a value already: a handler has substituted it. Fix values with "
            "handlers.condition, or with obs="
        )
    if message.get("scale") is not None:
        raise SiteError(
            f"site {name!r} is scaled or subsampled (handlers.scale, or plate with subsample_size): its law is then "
            "not a probability distribution. Remove the scale from latent sites"
        )
