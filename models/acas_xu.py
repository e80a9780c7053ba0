"""A collision-avoidance network that calls the right advisory the worst: property 2 of ACAS Xu.

D draws the encounter: distance (ft), bearing and heading of the intruder (rad), own speed and intruder's (ft/s), a
distant and slower intruder. M is one of 45 networks of six layers of 50 ReLUs, which gives each of five advisories a
cost: clear of conflict (COC), weak left, weak right, strong left, strong right. Katz et al. (2017, Reluplex) ask that
COC never cost the most there; C measures by how much it does. D is uniform on the property's box, or normal about its
centre with a standard deviation of a third of its half-widths, inputs beyond a network's range being clipped.

The networks (Stanford, CC BY 4.0) are not shipped: :func:`load` reads them from a NumPy archive with the arrays
``n{i}_{j}_W{k}``, ``n{i}_{j}_b{k}``, ``n{i}_{j}_mins``, ``_maxs``, ``_means`` and ``_ranges``.
Reference values: none in closed form; sampling gives P = 1.9e-2 for network 2_8 and 1.4e-3 for 4_9, D uniform.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from ._libraries import Backend, library

if TYPE_CHECKING:
    from probest import Problem

LAYERS = 7
LOW = np.array([55947.691, -3.141593, -3.141593, 1145.0, 0.0])
HIGH = np.array([60760.0, 3.141593, 3.141593, 1200.0, 60.0])

Law = Literal["uniform", "normal"]


class Network(NamedTuple):
    """weights, biases of the layers; mins, maxs, means, ranges of the five inputs, each ``(5,)``."""

    weights: tuple[np.ndarray, ...]
    biases: tuple[np.ndarray, ...]
    mins: np.ndarray
    maxs: np.ndarray
    means: np.ndarray
    ranges: np.ndarray


def load(path: str | Path, name: str = "2_9") -> Network:
    """Network ``name`` (previous advisory, time to loss of separation) of the archive at ``path``.

    Raises FileNotFoundError if there is no archive, KeyError if it has no such network.
    """
    with np.load(path) as archive:
        weights, biases = (tuple(archive[f"n{name}_{kind}{k}"] for k in range(LAYERS)) for kind in "Wb")
        bounds = (archive[f"n{name}_{kind}"][:5] for kind in ("mins", "maxs", "means", "ranges"))
        return Network(weights, biases, *bounds)


def severity(xp: Any, network: Network, x: Any) -> Any:
    """Cost of COC less the largest of the others, in normalised units: x ``(5, ...)``, result ``(...)``.

    The fields of ``network`` and x are arrays of the namespace ``xp``.
    """
    columns = (..., *(None,) * (x.ndim - 1))
    x = xp.maximum(xp.minimum(x, network.maxs[columns]), network.mins[columns])
    hidden = (x - network.means[columns]) / network.ranges[columns]
    for k, (weights, bias) in enumerate(zip(network.weights, network.biases, strict=True)):
        hidden = weights @ hidden + bias[columns]
        if k < LAYERS - 1:
            hidden = xp.where(hidden > 0, hidden, 0.0)
    return hidden[0] - xp.amax(hidden[1:], 0)


def parameters(law: Law) -> tuple[np.ndarray, np.ndarray]:
    """The parameters of D's law: low and high of the uniform, mean and standard deviation of the normal."""
    return (LOW, HIGH) if law == "uniform" else ((LOW + HIGH) / 2, (HIGH - LOW) / 6)


def problem(backend: Backend, network: Network, *, law: Law = "uniform") -> Problem:
    """Property 2 on ``network``, which M owns the weights of."""
    from probest import Problem

    lib = library(backend)

    def array(values: np.ndarray) -> Any:
        return lib.xp.asarray(values, dtype=lib.xp.float32)

    family = lib.dist.Uniform if law == "uniform" else lib.dist.Normal
    bounds = [array(values) for values in network[2:]]

    def adversary() -> Any:
        return lib.sample("encounter", family(*map(array, parameters(law))).to_event(1))

    def model(params: dict[str, Any], x: Any) -> Any:
        layers = (tuple(params[f"{kind}{k}"] for k in range(LAYERS)) for kind in "Wb")
        return severity(lib.xp, Network(*layers, *bounds), x)

    def checker(x: Any, y: Any) -> Any:  # noqa: ARG001
        return y

    layers = {f"{kind}{k}": row for kind, rows in zip("Wb", network[:2], strict=True) for k, row in enumerate(rows)}
    return Problem(adversary, lib.bind(model, **layers), checker)
