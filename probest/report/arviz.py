"""Catastrophes as ArviZ data.

ArviZ summaries know nothing of weights, so the group ``posterior`` holds draws of equal weight, resampled from the
particles (systematically, hence without chance), and ``sample_stats`` their severity; ``prior`` holds draws of D
itself, ``observed_data`` the values of observed sites. The group ``catastrophes`` holds the particles as they are, with
their weights. The numbers of the estimate and what makes it reproducible are attributes of each group.

Dimensions are those of plates where a site lies in one, and ``site_dim_0`` otherwise, or as ``dims`` names them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from probest.diagnostics import even_rows
from probest.report.extras import extra
from probest.report.record import estimate_record
from probest.report.trees import leaves
from probest.result import Result, Sample

if TYPE_CHECKING:
    import xarray

__all__ = ["Naming", "datasets", "particles", "to_arviz"]

Dims = Mapping[str, Sequence[str]]


class Naming(NamedTuple):
    """What axes are called, and the labels along them. plates: as of :class:`probest.result.Result`."""

    plates: Mapping[str, Sequence[str | None]]
    dims: Dims
    coords: Mapping[str, Any]

    @classmethod
    def of(cls, estimate: Result, dims: Dims | None, coords: Mapping[str, Any] | None) -> Naming:
        return cls(estimate.plates, dims or {}, coords or {})

    def __call__(self, name: str, axes: int) -> tuple[str, ...]:
        """Names of so many axes of a site's value. Raises ValueError where ``dims`` has another number of them."""
        given = self.dims.get(name)
        if given is not None and len(given) != axes:
            raise ValueError(f"dims[{name!r}] names {len(given)} axes, and its values have {axes}: give one name each")
        plates = [*self.plates.get(name, ()), *[None] * axes][:axes]
        return tuple(given or (plate or f"{_plain(name)}_dim_{axis}" for axis, plate in enumerate(plates)))


def to_arviz(estimate: Result, *, dims: Dims | None = None, coords: Mapping[str, Any] | None = None) -> Any:
    """An ``InferenceData`` (ArviZ before 1.0) or a ``DataTree`` (since), with the groups described above.

    Raises:
        ValueError: the estimate has no catastrophes to export, or ``dims`` or ``coords`` do not fit.
    """
    arviz = extra("arviz", "ArviZ data")
    naming = Naming.of(estimate, dims, coords)
    caught = estimate.catastrophes
    if caught is None or not len(caught.weights):
        raise ValueError("no catastrophe was found, so there is none to export: give estimate() a larger budget")
    groups = {**datasets(estimate, naming), "catastrophes": particles(estimate, caught, naming)}
    if int(arviz.__version__.partition(".")[0]) < 1:
        return arviz.InferenceData(warn_on_custom_groups=False, **groups)
    xarray = extra("xarray", "ArviZ data")
    return xarray.DataTree.from_dict({f"/{name}": group for name, group in groups.items()})


def datasets(estimate: Result, naming: Naming) -> dict[str, xarray.Dataset]:
    """The groups of a fixed size: all but ``catastrophes``. Those of catastrophes only where there are some."""
    caught, attributes = estimate.catastrophes, _attributes(estimate)
    groups: dict[str, dict[str, Any]] = {}
    if caught is not None and len(caught.weights):
        equal = even_rows(caught.weights, len(caught.weights))
        groups["posterior"] = _draws(dict(_variables(caught)), naming, equal)
        groups["sample_stats"] = _draws({"severity": np.asarray(caught.severity)}, naming, equal)
    if estimate.drawn is not None:
        own = {**dict(_variables(estimate.drawn)), "severity": np.asarray(estimate.drawn.severity)}
        groups["prior"] = _draws(own, naming, np.arange(len(estimate.drawn.weights)))
    seen = {name: at for name, at in estimate.observed.items() if np.size(at.value)}
    if seen:
        along = Naming({name: at.plates for name, at in seen.items()}, naming.dims, naming.coords)
        groups["observed_data"] = {
            _plain(name): (along(name, np.ndim(at.value)), np.asarray(at.value)) for name, at in seen.items()
        }
    return {name: _labelled(group, naming).assign_attrs(attributes) for name, group in groups.items()}


def particles(estimate: Result, caught: Sample | None, naming: Naming) -> xarray.Dataset:
    """The group ``catastrophes`` of these, or of a block of them, with severities and weights; empty without any."""
    if caught is None:
        return _labelled({}, naming).assign_attrs(_attributes(estimate))
    arrays = {**dict(_variables(caught)), "severity": np.asarray(caught.severity), "weight": np.asarray(caught.weights)}
    variables = {
        _plain(name): (("particle", *naming(name, values.ndim - 1)), values) for name, values in arrays.items()
    }
    return _labelled(variables, naming).assign_attrs(_attributes(estimate))


def _plain(name: str) -> str:
    """A name that netCDF accepts: it reads a slash as a group."""
    return name.replace("/", ".")


def _variables(sample: Sample) -> Iterator[tuple[str, np.ndarray]]:
    """Observation, action and sites."""
    for what in ("observation", "action"):
        for name, leaf in leaves(getattr(sample, what), what):
            yield name, np.asarray(leaf)
    for name in sample:
        yield name, np.asarray(sample[name])


def _draws(arrays: Mapping[str, np.ndarray], naming: Naming, rows: np.ndarray) -> dict[str, Any]:
    """Arrays ``(n, ...)`` as variables with dimensions ``(chain=1, draw=len(rows), ...)``."""
    return {
        _plain(name): (("chain", "draw", *naming(name, values.ndim - 1)), values[rows][None])
        for name, values in arrays.items()
    }


def _labelled(variables: Mapping[str, Any], naming: Naming) -> xarray.Dataset:
    """A dataset with labels along its dimensions: those of ``coords``, and numbers along plates, chains and draws."""
    found: xarray.Dataset = extra("xarray", "netCDF files").Dataset(dict(variables))
    named = {plate for plates in naming.plates.values() for plate in plates if plate}
    labels = {
        str(name): naming.coords.get(str(name), np.arange(size))
        for name, size in found.sizes.items()
        if name in naming.coords or name in named or name in ("chain", "draw")
    }
    for name, values in labels.items():
        if len(values) != found.sizes[name]:
            raise ValueError(
                f"coords[{name!r}] has {len(values)} labels, and {name} has {found.sizes[name]} entries: give one each"
            )
    return found.assign_coords(labels)


def _attributes(estimate: Result) -> dict[str, Any]:
    """The numbers of the estimate, as types that netCDF can hold."""
    record = estimate_record(estimate)
    return {
        "log_prob": float(estimate.log_prob),
        "std_error": float(estimate.std_error),
        "lower": float(estimate.lower),
        "upper": float(estimate.upper),
        "log_evidence": float(estimate.conclusion.log_evidence),
        "converged": int(estimate.converged),
        "calls": record["calls"],
        "seconds": record["seconds"],
        "advice": json.dumps(record["advice"]),
        "settings": json.dumps(record["settings"]),
        "ledger": json.dumps(record["ledger"]),
        "inference_library": "probest",
        "inference_library_version": str(record["settings"].get("versions", {}).get("probest", "unknown")),
    }
