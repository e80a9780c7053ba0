"""Estimates as netCDF files, written block by block: a million particles take no more memory than some thousand.

``arviz.from_netcdf`` and ``xarray.open_datatree`` read them too; the groups are those of :mod:`probest.report.arviz`,
with every particle in ``catastrophes``.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from probest.diagnostics import thinned
from probest.evidence import Evidence
from probest.programs.base import Observed
from probest.report.arviz import Naming, datasets, particles
from probest.report.extras import extra
from probest.report.record import evidence_of
from probest.result import Catastrophes, Result, Sample

if TYPE_CHECKING:
    import os

__all__ = ["Saved", "load", "to_netcdf"]

BLOCK = 4_000
"""Particles that are decoded and written at once, and the most that :func:`load` keeps in memory."""

Engine = Literal["netcdf4", "h5netcdf"]


class Saved(Result):
    """An estimate that was read from a file: all but its problem and its nearest case, and so without a gradient."""

    def __init__(
        self,
        ledger: tuple[Evidence, ...],
        caught: Catastrophes | None,
        drawn: Sample | None,
        observed: Mapping[str, Observed],
        plates: Mapping[str, Sequence[str]],
        *,
        calls: int,
        seconds: float,
        settings: Mapping[str, Any],
    ) -> None:
        self.ledger = ledger
        self.calls = calls
        self.seconds = seconds
        self.settings = settings
        self._caught = caught
        self._drawn = drawn
        self._observed = observed
        self._plates = plates

    @property
    def catastrophes(self) -> Catastrophes | None:
        return self._caught

    @property
    def drawn(self) -> Sample | None:
        return self._drawn

    @property
    def nearest(self) -> None:
        return None

    @property
    def plates(self) -> Mapping[str, Sequence[str]]:
        return self._plates

    @property
    def observed(self) -> Mapping[str, Observed]:
        return self._observed


def to_netcdf(
    estimate: Result,
    path: str | os.PathLike[str],
    *,
    dims: Mapping[str, Sequence[str]] | None = None,
    coords: Mapping[str, Any] | None = None,
) -> Path:
    """Write the groups of :func:`~probest.report.arviz.to_arviz`, and every particle; :func:`load` reads them.

    Where no catastrophe was found, the file says that, and what the methods say of log P nevertheless.

    Raises:
        ImportError: neither netCDF4 nor h5netcdf is installed.
        ValueError: ``dims`` or ``coords`` do not fit.
    """
    engine, path, naming = _engine(), Path(path), Naming.of(estimate, dims, coords)
    mode: Literal["w", "a"] = "w"
    for label, group in datasets(estimate, naming).items():
        group.to_netcdf(path, mode=mode, group=label, engine=engine, encoding=_packed(group))
        mode = "a"
    blocks = estimate.blocks(BLOCK)
    first = next(blocks, None)
    group = particles(estimate, first, naming)
    along = [] if first is None else ["particle"]
    group.to_netcdf(path, mode=mode, group="catastrophes", engine=engine, encoding=_packed(group), unlimited_dims=along)
    rest = next(blocks, None)
    if first is not None and rest is not None:
        with _opened(path, engine) as file:
            at, into = len(first.weights), file.groups["catastrophes"]
            for block in chain([rest], blocks):
                ends = at, at + len(block.weights)
                if engine == "h5netcdf":
                    into.resize_dimension("particle", ends[1])
                for name, variable in particles(estimate, block, naming).data_vars.items():
                    target = into.variables[name]
                    target[slice(*ends)] = np.asarray(variable.values, dtype=target.dtype)
                at = ends[1]
    return path


def load(path: str | os.PathLike[str]) -> Saved:
    """An estimate from a file that :meth:`probest.Estimate.to_netcdf` wrote: to show, to plot, to report, to compare.

    Where it holds many particles, some thousand of them are drawn, by their weights.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: neither netCDF4 nor h5netcdf is installed.
        ValueError: it is another kind of file.
    """
    path, engine, xarray = Path(path), _engine(), extra("xarray", "netCDF files")
    if not path.is_file():
        raise FileNotFoundError(f"path={str(path)!r}: there is no such file")
    try:
        groups = {str(name).strip("/"): group for name, group in xarray.open_groups(path, engine=engine).items()}
    except OSError as error:
        raise ValueError(f"path={str(path)!r} is not a netCDF file: {error}") from error
    try:
        group = groups.get("catastrophes")
        if group is None or "ledger" not in group.attrs:
            raise ValueError(f"path={str(path)!r} holds no estimate: expected a file that to_netcdf wrote")
        attributes = group.attrs
        caught, plates = _caught(group) if "weight" in group else (None, {})
        prior, seen = groups.get("prior"), groups.get("observed_data")
        own = None if prior is None else _sample(prior.isel(chain=0).load(), "draw")
        return Saved(
            tuple(map(evidence_of, json.loads(attributes["ledger"]))),
            caught,
            None if own is None else Sample(*own.parts(np.full(own.size, 1.0 / own.size))),
            {} if seen is None else {str(k): Observed(v.values, tuple(map(str, v.dims))) for k, v in seen.items()},
            plates,
            calls=int(attributes["calls"]),
            seconds=float(attributes["seconds"]),
            settings=json.loads(attributes["settings"]),
        )
    finally:
        for group in groups.values():
            group.close()


def _caught(group: Any) -> tuple[Catastrophes, dict[str, tuple[str, ...]]]:
    """The catastrophes of a file, or ``BLOCK`` of them by their weights; and names of the axes of their sites."""
    rows, shares = thinned(np.asarray(group["weight"].values, dtype=np.float64), BLOCK)
    read = _sample(group.isel(particle=rows).load(), "particle")
    plates = {str(name): tuple(map(str, value.dims[1:])) for name, value in read.sites.items()}
    return Catastrophes(*read.parts(shares)), plates


@dataclass(frozen=True)
class _Read:
    """Cases of a group: their sites, and the rest."""

    sites: Mapping[str, Any]
    seen: Mapping[str, Any]
    severity: np.ndarray
    size: int

    def parts(self, weights: np.ndarray) -> tuple[Any, ...]:
        """What a sample is made of."""
        trees = (_tree(self.seen, what) for what in ("observation", "action"))
        return {str(name): value.values for name, value in self.sites.items()}, weights, self.severity, *trees


def _sample(group: Any, along: str) -> _Read:
    variables = {str(name): value for name, value in group.data_vars.items()}
    severity = np.asarray(variables.pop("severity").values, dtype=np.float64)
    variables.pop("weight", None)
    seen = {name for name in variables if name.partition(".")[0] in ("observation", "action")}
    sites = {name: value for name, value in variables.items() if name not in seen}
    return _Read(sites, {name: variables[name] for name in seen}, severity, int(group.sizes[along]))


def _tree(variables: Mapping[str, Any], what: str) -> Any:
    """The array itself, or a dict of dotted names to arrays."""
    found = {name: value.values for name, value in variables.items() if name.partition(".")[0] == what}
    if set(found) == {what}:
        return found[what]
    return {name.partition(".")[2]: value for name, value in sorted(found.items())} or None


def _engine() -> Engine:
    if importlib.util.find_spec("netCDF4"):
        return "netcdf4"
    if importlib.util.find_spec("h5netcdf"):
        return "h5netcdf"
    raise ImportError('netCDF files need netCDF4 or h5netcdf: pip install "probest[report]"')


def _opened(path: Path, engine: Engine) -> Any:
    """The file to append to; both libraries have the same interface."""
    return importlib.import_module("netCDF4" if engine == "netcdf4" else "h5netcdf.legacyapi").Dataset(path, "a")


def _packed(group: Any) -> dict[str, dict[str, Any]]:
    return {name: {"zlib": True, "complevel": 1} for name, v in group.data_vars.items() if v.dtype.kind in "fiu"}
