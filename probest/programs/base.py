"""What a program front end gives: one run of a probabilistic program with its randomness supplied from outside.

A front end (``programs/numpyro.py``, ``programs/pyro.py``) is a reparameterising effect handler of its own
library. Every latent site ``name`` becomes ``name_base ~ Normal(0, 1)`` and a deterministic ``name``; observed
sites and factors become a log-weight. Nothing else of the program changes, so the library's own samplers and
guides run on the reparameterised program too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from math import prod
from typing import Any, NamedTuple, Protocol

import numpy as np

from probest.backends.base import Array, Backend, PyTree

__all__ = [
    "BASE",
    "COARSENESS",
    "COMPONENT",
    "BaseSource",
    "Frontend",
    "Observed",
    "Posterior",
    "Recording",
    "Run",
    "Site",
    "SiteError",
    "places_of",
    "plates_of",
]

BASE = "_base"
COMPONENT = "_component"
COARSENESS = "_coarseness"


class SiteError(TypeError):
    """A site of the program that cannot be handled; the message names the site and its distribution."""


class Site(NamedTuple):
    """A latent site as the program declares it.

    base_shape: shape of its standard-normal coordinates. discrete: whether its value is piecewise constant in
    them. distribution: class name. parent: the mixture site that this site chooses the component of, or None.
    choices: the values of each element where they can be listed, else empty; complete: whether these are all; one_hot:
    whether an element is a vector that says which by a 1. plates: for each leading axis of its value the name of the
    plate that it lies along, or None. value_shape: of its value.

    The values of a listed site have a code a number for each element: the value itself, or where the 1 stands.
    """

    name: str
    base_shape: tuple[int, ...]
    discrete: bool
    distribution: str
    parent: str | None = None
    choices: tuple[int, ...] = ()
    complete: bool = True
    one_hot: bool = False
    plates: tuple[str | None, ...] = ()
    value_shape: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """Number of coordinates."""
        return prod(self.base_shape)

    @property
    def elements(self) -> int:
        """Number of elements, each with a code and with equally many coordinates, of which the last one decides it."""
        return prod(self.value_shape[:-1] if self.one_hot else self.value_shape)

    def coded(self, values: np.ndarray) -> np.ndarray:
        """Codes ``(n, elements)`` of values ``(n, *value_shape)``."""
        if self.one_hot:
            values = np.argmax(values, axis=-1)
        return np.reshape(values, (len(values), self.elements)).astype(np.float64)

    def decoded(self, codes: np.ndarray, dtype: Any) -> np.ndarray:
        """Values ``(n, *value_shape)`` of codes ``(n, elements)``."""
        if self.one_hot:
            codes = np.eye(len(self.choices))[np.asarray(codes, dtype=np.intp)]
        return np.reshape(codes, (len(codes), *self.value_shape)).astype(dtype)


class Observed(NamedTuple):
    """The value of an observed site (empty for a factor), and its plates as in :class:`Site`."""

    value: Any
    plates: tuple[str | None, ...]


def plates_of(frames: Iterable[Any], batch_shape: Sequence[int]) -> tuple[str | None, ...]:
    """For each axis of a site's batch shape the plate along it. frames: ``cond_indep_stack`` of the site's message."""
    names: list[str | None] = [None] * len(batch_shape)
    for frame in frames:
        if frame.dim is not None and -frame.dim <= len(names):
            names[frame.dim] = frame.name
    return tuple(names)


class Run(NamedTuple):
    """One run of a program.

    value: what it returned. log_weight: scalar; observed sites, factors and held sites. sites: value of every latent
    and deterministic site. layout: the latent sites in order. params: value of every ``param`` site. observed:
    observed sites and factors. coarseness: of a rehearsal, of continuous sites: how far apart neighbouring floats are
    where the site's law has its middle, in standard deviations. own: of a rehearsal, how many of the sites the
    adversary drew; the others the model or the checker.
    """

    value: PyTree
    log_weight: Array
    sites: dict[str, Array]
    layout: tuple[Site, ...]
    params: dict[str, Array]
    observed: dict[str, Observed]
    coarseness: dict[str, Array]
    own: int = 0


BaseSource = Callable[[str, tuple[int, ...]], Array]
"""``source(site name, base shape)`` gives the standard-normal coordinates of a site."""


class Posterior(NamedTuple):
    """The law of an autoguide, over one vector. places: by site, where its elements stand in it.

    ``sample(n, seed)`` gives ``(n, d)``, ``log_prob(vectors)`` ``(n,)``, both of NumPy.
    """

    places: dict[str, np.ndarray]
    sample: Callable[[int, int], np.ndarray]
    log_prob: Callable[[np.ndarray], np.ndarray]


def places_of(shapes: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    """Where the elements of each site stand in a vector of all of them, one site after the other."""
    ends = np.cumsum([0, *(prod(shape) for shape in shapes.values())])
    return {
        name: np.arange(a, b).reshape(tuple(shape))
        for (name, shape), a, b in zip(shapes.items(), ends, ends[1:], strict=False)
    }


class Recording(Protocol):
    """Open while the program runs; afterwards ``finish(value)`` gives the :class:`Run`."""

    def finish(self, value: PyTree) -> Run: ...

    def densities(self, names: Sequence[str]) -> dict[str, tuple[Array, Array]]:
        """Log-density of each held site, summed over its elements, and whether its value is in the support: scalars."""

    @property
    def layout(self) -> list[Site]: ...


class Frontend(Protocol):
    """A probabilistic-programming library, as far as probest needs one."""

    name: str
    backend: Backend

    def recording(
        self, source: BaseSource, held: Mapping[str, Array], params: Mapping[str, Array], *, seeded: bool = False
    ) -> AbstractContextManager[Recording]:
        """Handlers under which a program's latent sites take their base from ``source``.

        Sites in ``held`` take that value instead and add their log-density to the log-weight. ``params``
        overrides ``param`` sites. ``seeded`` is for a rehearsal, outside any batching: the program may draw keys (to
        initialise modules), and the library validates as the user has set it.
        """

    def adopt(self, part: Any) -> None:
        """Make an adversary or model ready to run under ``recording``."""

    def deterministic(self, name: str, value: Array) -> None:
        """Record a deterministic site."""

    def factor(self, name: str, value: Array) -> None:
        """Multiply the program's density by the exponential of a value."""

    def sample(self, name: str, law: str, *parameters: Any, event_dims: int = 0) -> Array:
        """Draw a site of the library's distribution ``law``, whose last ``event_dims`` axes are one event."""

    def hidden(self) -> AbstractContextManager[Any]:
        """What is drawn inside is not seen by handlers outside."""

    def values(self, program: Callable[..., Any], params: Mapping[str, Array]) -> dict[str, Array]:
        """Run a program inside another, with these values of ``param`` sites; the values of its sites."""

    def scoped(self, program: Callable[..., Any], prefix: str) -> Callable[..., Any]:
        """The program with ``prefix/`` before the names of its sites."""

    def posterior(self, guide: Any, params: Mapping[str, Array]) -> Posterior:
        """The law of an autoguide of the library over the sites that it draws."""

    def gaussianize(self, program: Callable[..., Any]) -> Callable[..., Any]:
        """The program with every latent site reparameterised; an ordinary program of the library."""
