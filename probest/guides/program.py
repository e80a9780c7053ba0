r"""A guide written by the user: a Pyro or NumPyro program that draws the adversary's sites from another law.

As the guides of variational inference, it draws every latent site of the adversary under the same name (and may do so
in another order and with other distributions). Weights are formed from native site values x,

.. math:: \frac{p(x)}{(1 - \alpha)\, q(x) + \alpha\, p(x)},

with p the adversary's density, q the guide's and α the share of samples that the adversary itself draws: no weight is
above 1/α, whatever the guide leaves out (Hesterberg 1995). Both densities are the library's own, at the same values, so
that nothing needs to be inverted; the guide's randomness enters through the same reparameterisation as the adversary's,
so that the same seed gives the same samples in both libraries.

It fails where the guide lacks a mode: then the estimate is low and its error does not show it. The particles that
tempering finds are therefore weighed under the guide as well (see :mod:`probest.estimators.importance`).

Reference: Hesterberg (1995), Weighted average importance sampling and defensive mixture distributions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from probest.backends.base import Array, Parts, PyTree, chunks
from probest.budget import Meter
from probest.evidence import Floats
from probest.guides.base import allocate
from probest.programs.base import Frontend, Run, Site
from probest.programs.event import Event, ProblemError

__all__ = ["BoundProgram", "ProgramGuide"]

_REHEARSALS = 64
Values = dict[str, np.ndarray]


@dataclass(frozen=True)
class ProgramGuide:
    """A program as a guide: ``Importance(guide=ProgramGuide(program))``, or ``estimate(problem, guide=program)``.

    program: takes no argument and draws every latent site of the adversary; what it returns is ignored.
    prior: share of samples drawn from the adversary itself, between 0 and 1.
    params: values of ``param`` sites by name, such as SVI returns them for NumPyro; others keep the program's own.
    """

    program: Callable[[], Any]
    prior: float = 0.1
    params: Mapping[str, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not callable(self.program):
            raise TypeError(f"program is a {type(self.program).__name__}: it must be callable without arguments")
        if not 0.0 < self.prior < 1.0:
            raise ValueError(f"prior must be between 0 and 1 (a share of the samples), got {self.prior}")

    def bind(self, event: object) -> BoundProgram:
        """The guide of this event, after a rehearsal.

        Raises ProblemError, naming the site, where the guide lacks or adds one, gives it another shape, or draws values
        that the adversary cannot; and for events that are no programs, or whose adversary runs the closed loop.
        """
        if not isinstance(event, Event):
            raise ProblemError("a program can only guide a problem that is a program: build it with Problem(...)")
        if event.composition.interleaved:
            raise ProblemError(
                "guide: the adversary runs the model itself, or the model or the checker draws sites: densities would "
                "cost model calls. Use the default estimator, or draw all sites in an adversary without arguments"
            )
        frontend = event.composition.frontend
        frontend.adopt(self.program)
        run = _rehearse(frontend, self)
        _check_sites(event, run, frontend.name)
        params = {**(run.params if frontend.name == "numpyro" else {}), **self.params}
        bound = BoundProgram(event, self.prior, Parts(self.program, event.parts.model, params), run.layout)
        _check_draws(bound)
        return bound


@dataclass(frozen=True)
class BoundProgram:
    """A program that guides one event: a proposal in native site values. Build it with :meth:`ProgramGuide.bind`."""

    event: Event
    prior: float
    parts: Parts
    sites: tuple[Site, ...]

    @property
    def dim(self) -> int:
        return self.event.dim

    def draw(self, meter: Meter, n: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
        """Log-weights and severities of ``n`` samples, each ``(n,)``, at one call each.

        What the guide draws outside the adversary's support has weight 0 (``-inf``) and is not evaluated.
        """
        own, other = (int(m) for m in allocate(n, (1.0 - self.prior, self.prior), rng))
        size = sum(site.size for site in self.sites)
        drawn = self.values(self.parts, self.sites, rng.standard_normal((own, size)))
        plain = self.values(self.event.parts, self.event.sites, rng.standard_normal((other, self.dim)))
        order = rng.permutation(n)
        values = {name: np.concatenate([drawn[name], plain[name]])[order] for name in drawn}
        log_p, inside = self.density(self.event.parts, values)
        possible = np.flatnonzero(inside | (order >= own))  # the adversary's own may be on the edge by rounding
        kept = {name: value[possible] for name, value in values.items()}
        meter.charge(len(possible))
        at = self.event.evaluate(np.zeros((len(possible), self.dim)), held=kept)
        log_w, severity = np.full(n, -np.inf), np.full(n, -np.inf)
        log_w[possible] = at.log_weight - self._log_mixture(log_p[possible], kept)
        severity[possible] = at.severity
        return log_w, severity

    def log_ratio(self, z: Floats) -> Floats:
        """log of the adversary's density over the proposal's at the sites that z stands for, ``(n,)``."""
        values = self.values(self.event.parts, self.event.sites, z)
        log_p, _ = self.density(self.event.parts, values)
        return log_p - self._log_mixture(log_p, values)

    def _log_mixture(self, log_p: Floats, values: Values) -> Floats:
        log_q, inside = self.density(self.parts, values)
        log_q = np.where(inside, log_q, -np.inf)
        mixed = np.logaddexp(np.log1p(-self.prior) + log_q, np.log(self.prior) + log_p)
        return np.asarray(mixed, dtype=np.float64)

    def values(self, parts: Parts, sites: tuple[Site, ...], z: Floats) -> Values:
        """Native values of the named sites, each ``(n, ...)``."""
        values: Values = self._run(_Draw(self.event.composition.frontend, sites), parts, z, {})
        return values

    def density(self, parts: Parts, values: Values) -> tuple[Floats, np.ndarray]:
        """Log-density of all sites together, ``(n,)``, and whether each value is in the support."""
        terms = self.densities(parts, values)
        log_density = np.sum([log for log, _ in terms.values()], axis=0)
        inside = np.all([ok for _, ok in terms.values()], axis=0)
        return np.asarray(log_density, dtype=np.float64), np.asarray(inside, dtype=np.bool_)

    def log_density(self, parts: Parts, values: dict[str, Array]) -> Array:
        """Log-density of all sites together at values of the library ``(n, ...)``, ``(n,)``: differentiable."""
        backend = self.event.backend
        n = len(next(iter(values.values())))
        rows = _Density(self.event.composition.frontend, tuple(values))(
            parts, backend.from_host(np.zeros((n, 1))), values
        )
        terms = [log for log, _ in rows.values()]
        return sum(terms[1:], start=terms[0])

    def draws(self, parts: Parts, scope: str) -> dict[str, Array]:
        """One draw of the guide's sites, inside another program of the library, where they are ``scope/…``."""
        frontend = self.event.composition.frontend
        drawn = frontend.scoped(lambda: frontend.values(parts.adversary, parts.params), scope)()
        names = {site.name for site in self.sites if site.parent is None}
        plain = {name.removeprefix(f"{scope}/"): value for name, value in drawn.items()}
        return {name: value for name, value in plain.items() if name in names}

    def densities(self, parts: Parts, values: Values) -> dict[str, tuple[Floats, np.ndarray]]:
        """Log-density ``(n,)`` of each site, and whether its value is in the support."""
        n = len(next(iter(values.values())))
        names = tuple(values)
        found: dict[str, tuple[Floats, np.ndarray]] = self._run(
            _Density(self.event.composition.frontend, names), parts, np.zeros((n, 1)), values
        )
        return found

    def _run(self, fn: _Draw | _Density, parts: Parts, z: Floats, held: Values) -> Any:
        backend = self.event.backend
        pieces = []
        with backend.evaluating(parts.adversary):
            for rows in chunks(max(len(z), 1), self.event.chunk_size):
                kept = {name: value[rows] for name, value in held.items()}
                # no rows: one, thrown away again, for the shapes of the sites
                at = z[rows] if len(z) else np.zeros((1, z.shape[1]))
                piece = backend.on_host(fn, parts, at, kept)[0]
                pieces.append(backend.tree_map(lambda leaf: leaf[: len(z)], piece))
        return backend.tree_map(lambda *leaves: np.concatenate(leaves), *pieces)


@dataclass(frozen=True)
class _Draw:
    """A program's latent sites as functions of standard-normal coordinates."""

    frontend: Frontend
    sites: tuple[Site, ...]

    def __call__(self, parts: Parts, z: Array, held: dict[str, Array]) -> PyTree:
        return self.frontend.backend.rows(self._one, parts, z, held)

    def _one(self, parts: Parts, z: Array, held: dict[str, Array]) -> dict[str, Array]:
        ends = np.cumsum([0, *(site.size for site in self.sites)])
        base = {site.name: z[int(a) : int(b)] for site, a, b in zip(self.sites, ends, ends[1:], strict=False)}
        with self.frontend.recording(lambda name, shape: base[name].reshape(shape), held, parts.params) as recording:
            parts.adversary()
        run = recording.finish(None)
        return {site.name: run.sites[site.name] for site in self.sites if site.parent is None}


@dataclass(frozen=True)
class _Density:
    """Log-density and support of a program's named sites at given values."""

    frontend: Frontend
    names: tuple[str, ...]

    def __call__(self, parts: Parts, z: Array, held: dict[str, Array]) -> PyTree:
        return self.frontend.backend.rows(self._one, parts, z, held)

    def _one(self, parts: Parts, z: Array, held: dict[str, Array]) -> dict[str, tuple[Array, Array]]:
        with self.frontend.recording(_no_base, held, parts.params) as recording:
            parts.adversary()
        return recording.densities(self.names)


def _no_base(name: str, shape: tuple[int, ...]) -> Array:  # noqa: ARG001 - all sites are held
    raise ProblemError(
        f"site {name!r} appears in some runs and not in others: draw all sites in every run, and choose with where()"
    )


def _rehearse(frontend: Frontend, guide: ProgramGuide) -> Run:
    """One run of the guide on coordinates that are all zero."""

    def source(name: str, shape: tuple[int, ...]) -> Array:  # noqa: ARG001 - sites are all alike here
        return frontend.backend.from_host(np.zeros(shape))

    with (
        frontend.backend.evaluating(guide.program),
        frontend.backend.no_gradient(),
        frontend.recording(source, {}, guide.params, seeded=True) as recording,
    ):
        guide.program()
    return recording.finish(None)


def _names(sites: tuple[Site, ...]) -> list[str]:
    return [site.name for site in sites if site.parent is None]


def _check_sites(event: Event, run: Run, library: str) -> None:
    wanted, given = _names(event.sites), _names(run.layout)
    if not given:
        raise ProblemError(f"guide draws no site: it must draw the adversary's sites with {library}.sample")
    if run.observed:
        raise ProblemError(
            f"guide has observed sites or factors ({', '.join(map(repr, run.observed))}): it only draws the "
            "adversary's latent sites"
        )
    for label, names in (
        ("lacks", sorted(set(wanted) - set(given))),
        ("draws what the adversary does not:", sorted(set(given) - set(wanted))),
    ):
        if names:
            raise ProblemError(
                f"guide {label} site(s) {', '.join(map(repr, names))}. It must draw exactly the adversary's latent "
                f"sites: {', '.join(map(repr, wanted))}"
            )
    at = event.site_values(np.zeros((1, event.dim)))
    for name in wanted:
        theirs, ours = tuple(run.sites[name].shape), at[name].shape[1:]
        if theirs != ours:
            raise ProblemError(f"guide draws site {name!r} of shape {theirs}; the adversary's has shape {ours}")


def _check_draws(bound: BoundProgram) -> None:
    """The guide's values must be possible for the adversary, and have a density under both."""
    rng = np.random.default_rng(0)
    size = sum(site.size for site in bound.sites)
    values = bound.values(bound.parts, bound.sites, rng.standard_normal((_REHEARSALS, size)))
    laws = {site.name: site.distribution for site in bound.event.sites}
    theirs = bound.densities(bound.event.parts, values)
    for name, (log_q, _) in bound.densities(bound.parts, values).items():
        log_p, inside = theirs[name]
        if not inside.all():
            value = np.ravel(values[name][~inside][0])[:4]
            raise ProblemError(
                f"guide draws site {name!r} outside the support of the adversary's {laws[name]} in "
                f"{int((~inside).sum())} of {_REHEARSALS} draws (such as {np.array2string(value, precision=4)}): give "
                "the guide a distribution with the same support"
            )
        if np.isnan(log_q).any() or np.isnan(log_p).any():
            raise ProblemError(f"guide: the log-density of site {name!r} is NaN")
