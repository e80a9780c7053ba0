"""Catastrophes as ArviZ and netCDF data.

ArviZ summaries know nothing of weights, so the group ``posterior`` holds draws of equal weight, resampled from the
particles (systematically, hence without chance), and ``sample_stats`` their severity. The group ``catastrophes``
holds the particles as they are, with their weights. The numbers of the estimate are attributes of each group.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from probest.report.protocols import CatastrophesLike, EstimateLike
from probest.report.record import estimate_record

if TYPE_CHECKING:
    import os

    import xarray

__all__ = ["datasets", "leaves", "to_arviz", "to_netcdf"]


def to_arviz(estimate: EstimateLike) -> Any:
    """An ``InferenceData`` (ArviZ before 1.0) or a ``DataTree`` (since), with the groups described above."""
    import arviz

    groups = datasets(estimate)
    if hasattr(arviz, "InferenceData"):
        return arviz.InferenceData(warn_on_custom_groups=False, **groups)
    import xarray

    return xarray.DataTree.from_dict({f"/{name}": group for name, group in groups.items()})


def to_netcdf(estimate: EstimateLike, path: str | os.PathLike[str]) -> Path:
    """Write the groups to a netCDF file, which ``arviz.from_netcdf`` and ``xarray.open_datatree`` read.

    Raises:
        ImportError: neither netCDF4 nor h5netcdf is installed.
    """
    engine: Literal["netcdf4", "h5netcdf"]
    if importlib.util.find_spec("netCDF4"):
        engine = "netcdf4"
    elif importlib.util.find_spec("h5netcdf"):
        engine = "h5netcdf"
    else:
        raise ImportError('writing netCDF needs netCDF4 or h5netcdf: pip install "probest[report]"')
    path = Path(path)
    mode: Literal["w", "a"] = "w"
    for name, group in datasets(estimate).items():
        encoding = {key: {"zlib": True} for key, value in group.data_vars.items() if value.dtype.kind in "fiu"}
        group.to_netcdf(path, mode=mode, group=name, engine=engine, encoding=encoding)
        mode = "a"
    return path


def datasets(estimate: EstimateLike) -> dict[str, xarray.Dataset]:
    """The groups ``posterior``, ``sample_stats`` and ``catastrophes``.

    Raises:
        ValueError: the estimate has no catastrophes to export.
    """
    import xarray

    catastrophes = estimate.catastrophes
    if catastrophes is None or len(catastrophes.weights) == 0:
        raise ValueError("no catastrophe was found, so there is none to export: give estimate() a larger budget")
    weights = np.asarray(catastrophes.weights, dtype=np.float64)
    severity = np.asarray(catastrophes.severity, dtype=np.float64)
    sites = dict(_variables(catastrophes))
    equal = _systematic(weights)
    attributes = _attributes(estimate)
    return {
        "posterior": xarray.Dataset(_draws({k: v[equal] for k, v in sites.items()}), attrs=attributes),
        "sample_stats": xarray.Dataset(_draws({"severity": severity[equal]}), attrs=attributes),
        "catastrophes": xarray.Dataset(
            _along("particle", {**sites, "severity": severity, "weight": weights}), attrs=attributes
        ),
    }


def leaves(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The arrays of a pytree of dicts, tuples and lists, each with a dotted name such as ``observation.wind``."""
    if tree is None:
        return
    if isinstance(tree, Mapping):
        items = list(tree.items())
    elif isinstance(tree, tuple) and hasattr(tree, "_fields"):
        items = list(zip(tree._fields, tree, strict=True))
    elif isinstance(tree, tuple | list):
        items = list(enumerate(tree))
    else:
        yield name, tree
        return
    for key, value in items:
        yield from leaves(value, f"{name}.{key}" if name else str(key))


def _variables(catastrophes: CatastrophesLike) -> Iterator[tuple[str, np.ndarray]]:
    """Sites, then observation and action, under names that netCDF accepts (it reads a slash as a group)."""
    trees = {name: catastrophes[name] for name in catastrophes}
    trees = {"observation": catastrophes.observation, "action": catastrophes.action} | trees
    for name, leaf in leaves(trees):
        yield name.replace("/", "."), np.asarray(leaf)


def _draws(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Arrays ``(n, ...)`` as variables with dimensions ``(chain=1, draw=n, ...)``."""
    return {name: (("chain", *dims), values[None]) for name, (dims, values) in _along("draw", arrays).items()}


def _along(dimension: str, arrays: Mapping[str, np.ndarray]) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    return {
        name: ((dimension, *(f"{name}_dim_{axis}" for axis in range(values.ndim - 1))), values)
        for name, values in arrays.items()
    }


def _systematic(weights: np.ndarray) -> np.ndarray:
    """Indices of as many draws as there are particles, each particle n·w times to within one."""
    places = (np.arange(len(weights)) + 0.5) / len(weights)
    cumulative = np.cumsum(weights)
    return np.minimum(np.searchsorted(cumulative / cumulative[-1], places), len(weights) - 1)


def _attributes(estimate: EstimateLike) -> dict[str, Any]:
    """The numbers of the estimate, as types that netCDF can hold."""
    record = estimate_record(estimate)
    return {
        "log_prob": float(estimate.log_prob),
        "std_error": float(estimate.std_error),
        "lower": float(estimate.lower),
        "upper": float(estimate.upper),
        "converged": int(estimate.converged),
        "calls": record["calls"],
        "seconds": record["seconds"],
        "advice": json.dumps(record["advice"]),
        "ledger": json.dumps(record["ledger"]),
        "inference_library": "probest",
    }
