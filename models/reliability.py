r"""Problems of structural reliability: independent loads and resistances, a limit state, and log P by quadrature.

A limit state g maps the random variables x to a margin and the structure fails where :math:`g(x) < 0`. D draws x from
native sites, M is g, and the severity is -g. :data:`NAMES` are 27 such problems: those numbered RP are from the
reliability challenge of Rózsás and Slobbe (2019, "Repository and black-box reliability challenge 2019", TNO), as in
the otbenchmark collection; the leaf is from Gao et al. (2023, NOFIS); the others are textbook examples.

The families :func:`half_space`, :func:`union`, :func:`parabola`, :func:`sphere`, :func:`band` and :func:`islands` have
an exact log P for every threshold and dimension, and each can be turned by a random rotation, which leaves log P as it
is. Margins are written once, on an array namespace; x has shape ``(dim, ...)`` there.
Reference values: :func:`log_prob`, all by quadrature or in closed form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from scipy import stats
from scipy.special import log_ndtr, logsumexp

from . import sphere as outside
from ._libraries import Backend, library

if TYPE_CHECKING:
    from probest import Problem

Margin = Callable[[Any, Any], Any]
"""``(xp, x) -> g``: the limit state on the namespace ``xp``, for x of shape ``(dim, ...)``."""

SQRT2 = math.sqrt(2)


class Site(NamedTuple):
    """A vector of independent variables of one family; ``params`` in the order of the libraries, each ``(size,)``."""

    name: str
    family: Literal["Normal", "LogNormal", "Uniform", "Gumbel", "Exponential"]
    params: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Reliability:
    """A reliability problem. ``solve`` computes log P; ``rotation`` is the seed of a random rotation of x, if any."""

    name: str
    sites: tuple[Site, ...]
    margin: Margin
    solve: Callable[[], float]
    rotation: int | None = None

    @property
    def dim(self) -> int:
        """The number of variables."""
        return sum(len(site.params[0]) for site in self.sites)

    @cached_property
    def log_prob(self) -> float:
        """log P, in closed form or by quadrature (relative error of P below 1e-4)."""
        return float(self.solve())

    def rotated(self, seed: int) -> Reliability:
        """The same problem in coordinates turned by a random rotation: log P is unchanged.

        Raises ValueError unless x is standard normal.
        """
        if self.sites != (_standard(self.dim),):
            raise ValueError(f"{self.name}: only problems of one standard-normal site can be rotated")
        return replace(self, name=f"{self.name}_rotated{seed}", rotation=seed)

    def problem(self, backend: Backend = "pyro") -> Problem:
        """D, M and C, in Pyro or NumPyro."""
        from probest import Problem

        lib = library(backend)

        def array(values: Any) -> Any:
            return lib.xp.asarray(values, dtype=lib.xp.zeros(()).dtype)

        def draw(params: dict[str, Any]) -> Any:
            draws = []
            for name, family, values in self.sites:
                law = getattr(lib.dist, family)(*map(array, values))
                draws.append(lib.sample(name, law.to_event(1)))
            x = lib.xp.concatenate(draws)
            return params["rotation"] @ x if params else x

        turned = {} if self.rotation is None else {"rotation": _rotation(self.dim, self.rotation)}
        adversary = lib.bind(draw, **turned)

        def model(x: Any) -> Any:
            return self.margin(lib.xp, x)

        def checker(x: Any, margin: Any) -> Any:  # noqa: ARG001
            return -margin

        return Problem(adversary, model, checker)


def problem(backend: Backend = "pyro", *, name: str = "RP22") -> Problem:
    """The reliability problem called ``name``, one of :data:`NAMES`."""
    return case(name).problem(backend)


def log_prob(name: str = "RP22") -> float:
    """The reference value of the problem called ``name``."""
    return case(name).log_prob


def case(name: str) -> Reliability:
    """The problem called ``name`` with its sites, its margin and its log P."""
    if name not in CASES:
        raise ValueError(f"name={name!r}: expected one of {', '.join(CASES)}")
    return CASES[name]


# Families of standard-normal problems ---------------------------------------------------------------------------------


def half_space(dim: int, beta: float) -> Reliability:
    """Beyond a plane at distance ``beta``: the mean of ``dim`` variables, scaled to variance 1, reaches it."""
    return Reliability(
        f"half_space_d{dim}_b{beta:.4g}",
        (_standard(dim),),
        lambda xp, x: beta - x.sum(0) / math.sqrt(dim),  # noqa: ARG005
        lambda: log_ndtr(-beta),
    )


def union(
    dim: int, betas: Sequence[float], *, scales: Sequence[float] | None = None, two_sided: bool = True
) -> Reliability:
    """Several ways to fail: coordinate i, or its absolute value if ``two_sided``, reaches its own threshold.

    Severity is the largest of ``scales[i] * (x[i] - betas[i])``. The scales (1 if None) change where it leads, not P.
    """
    scales = (1.0,) * len(betas) if scales is None else scales
    if not len(scales) == len(betas) <= dim:
        raise ValueError(f"betas has {len(betas)} entries, scales {len(scales)}, dim={dim}: one scale a threshold")

    def margin(xp: Any, x: Any) -> Any:
        y = abs(x) if two_sided else x
        return reduce(
            xp.minimum, [scale * (beta - y[i]) for i, (beta, scale) in enumerate(zip(betas, scales, strict=True))]
        )

    def solve() -> float:
        fails = np.exp(log_ndtr(-np.asarray(betas, dtype=float))) * (2 if two_sided else 1)
        return float(np.log(-np.expm1(np.log1p(-fails).sum())))

    label = "x".join(f"{beta:.4g}" for beta in betas) + ("_scaled" if len(set(scales)) > 1 else "")
    return Reliability(f"union_d{dim}_b{label}" + "_one_sided" * (not two_sided), (_standard(dim),), margin, solve)


def parabola(dim: int, beta: float, kappa: float) -> Reliability:
    """Beyond a paraboloid of one curved direction: ``x[1] >= beta + kappa * x[0]**2``."""
    return Reliability(
        f"parabola_d{dim}_b{beta:.4g}_k{kappa:.3g}",
        (_standard(dim),),
        lambda xp, x: beta + kappa * x[0] ** 2 - x[1],  # noqa: ARG005
        lambda: _log_mean(lambda x: log_ndtr(-beta - kappa * x**2)),
    )


def sphere(dim: int, radius: float) -> Reliability:
    """Further than ``radius`` from the origin, in any direction."""
    return Reliability(
        f"sphere_d{dim}_r{radius:.5g}",
        (_standard(dim),),
        lambda xp, x: radius - xp.sqrt((x**2).sum(0)),
        lambda: outside.log_prob(dim=dim, radius=radius),
    )


def band(dim: int, low: float, high: float) -> Reliability:
    """Between two planes, ``0 <= low < high``: severity rises, then falls again."""

    def solve() -> float:
        near, far = log_ndtr(-low), log_ndtr(-high)
        return float(near + math.log(-math.expm1(far - near)))

    return Reliability(
        f"band_d{dim}_{low:.4g}to{high:.4g}",
        (_standard(dim),),
        lambda xp, x: xp.maximum(low - x[0], x[0] - high),
        solve,
    )


def islands(dim: int, distance: float) -> Reliability:
    """Within 1 of either of two points (cylinders if ``dim > 2``), ``distance`` from the origin each."""
    offset = distance / SQRT2
    return Reliability(
        f"islands_d{dim}_{distance:.4g}",
        (_standard(dim),),
        lambda xp, x: xp.minimum(*(((x[:2] - centre) ** 2).sum(0) - 1 for centre in (offset, -offset))),
        lambda: math.log(2) + stats.ncx2.logcdf(1.0, 2, distance**2),
    )


# Limit states ---------------------------------------------------------------------------------------------------------


def _rp8(xp: Any, x: Any) -> Any:  # noqa: ARG001
    return x[0] + 2 * x[1] + 2 * x[2] + x[3] - 5 * x[4] - 5 * x[5]


def _rp14(xp: Any, x: Any) -> Any:
    return x[0] - 32 / (math.pi * x[1] ** 3) * xp.sqrt((x[2] * x[3] / 4) ** 2 + x[4] ** 2)


def _rp22(xp: Any, x: Any) -> Any:  # noqa: ARG001
    return 2.5 - (x[0] + x[1]) / SQRT2 + 0.1 * (x[0] - x[1]) ** 2


def _rp33(xp: Any, x: Any) -> Any:
    return xp.minimum(3 * math.sqrt(3) - x.sum(0), 3 - x[2])


def _rp35(xp: Any, x: Any) -> Any:
    return xp.minimum(2 - x[1] + xp.exp(-0.1 * x[0] ** 2) + (0.2 * x[0]) ** 4, 4.5 - x[0] * x[1])


def _rp38(xp: Any, x: Any) -> Any:  # noqa: ARG001
    return 15.59e4 - _rp38_load(x[0], x[1], x[3:]) / x[2] ** 3


def _rp38_load(x1: Any, x2: Any, rest: Any) -> Any:
    """What the cube of the third variable of RP38 is held against; ``rest`` are x4 to x7."""
    a, b, c, d = rest
    top = a**2 - 4 * b * c * d**2 + a * (c + 4 * b + 2 * c * d)
    return x1 * x2**3 / 2 * top / (a * b * (a + c + 2 * c * d))


def _rp54(xp: Any, x: Any) -> Any:  # noqa: ARG001
    return x.sum(0) - 8.951


def _rp55(xp: Any, x: Any) -> Any:
    gap = abs(x[0] - x[1])
    return xp.minimum(0.2 + 0.6 * gap**4 - gap / SQRT2, 5 / SQRT2 - 2.2 - gap)


def _rp60(xp: Any, x: Any) -> Any:
    a, b, c, d, load = x
    three = reduce(xp.minimum, (b, c, d)) - load / 2
    fewer = xp.maximum(d, xp.minimum(b, c)) - load
    return xp.minimum(a - load, xp.maximum(three, fewer))


def _rp75(xp: Any, x: Any) -> Any:  # noqa: ARG001
    return 3 - x[0] * x[1]


def _rp89(xp: Any, x: Any) -> Any:
    return xp.minimum(8 - x[0] ** 2, 6 - x[0] / 5) - x[1]


def _rp107(xp: Any, x: Any) -> Any:  # noqa: ARG001
    return 5 * math.sqrt(10) - x.sum(0)


def _four_branches(xp: Any, x: Any) -> Any:
    apart = abs(x[0] - x[1])
    return xp.minimum(3 + 0.1 * apart**2 - abs(x[0] + x[1]) / SQRT2, 7 / SQRT2 - apart)


def _resistance_less_load(xp: Any, x: Any) -> Any:  # noqa: ARG001
    return x[0] - x[1]


def _axial_beam(xp: Any, x: Any) -> Any:  # noqa: ARG001
    return x[0] - x[1] / (100 * math.pi)


# Their log P ----------------------------------------------------------------------------------------------------------


def _log_mean(log_p: Callable[[np.ndarray], np.ndarray], low: float = -40.0, high: float = 40.0) -> float:
    """log of the integral of exp(log_p(x)) times the normal density from ``low`` to ``high``: 4,000 Gauss panels."""
    nodes, weights = np.polynomial.legendre.leggauss(8)
    edges = np.linspace(low, high, 4_001)
    half = np.diff(edges)[:, None] / 2
    x = (edges[:-1, None] + half * (nodes + 1)).ravel()
    with np.errstate(divide="ignore"):
        return float(logsumexp(log_p(x) - x**2 / 2 + np.log((half * weights).ravel())) - math.log(2 * math.pi) / 2)


def _normal_nodes(dims: int, nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """A tensor Gauss-Hermite rule: standard-normal points ``(dims, nodes**dims)`` and their weights."""
    x, w = np.polynomial.hermite_e.hermegauss(nodes)
    points = np.stack([axis.ravel() for axis in np.meshgrid(*[x] * dims, indexing="ij")])
    weights = reduce(np.multiply.outer, [w / w.sum()] * dims).ravel()
    return points, weights


def _solve_rp8() -> float:
    """Given the other five, failure is that the fifth variable, a load, exceeds what they leave."""
    mean, sd = map(np.array, CASES["RP8"].sites[0].params)
    z, weights = _normal_nodes(5, 12)
    rest = np.r_[0:4, 5]
    a, b, c, d, load = np.exp(mean[rest, None] + sd[rest, None] * z)
    left = np.maximum((a + 2 * b + 2 * c + d - 5 * load) / 5, 0)
    return math.log(weights @ stats.lognorm.sf(left, sd[4], scale=math.exp(mean[4])))


def _solve_rp14() -> float:
    """The bending moment is integrated out exactly, the others by Gauss rules: x3 = (4 m / x4) sin(t) is smooth."""
    diameter, torque, arm, bending = CASES["RP14"].sites[1:]
    z, weights = _normal_nodes(2, 5)
    x2, x4 = (site.params[0][0] + site.params[1][0] * row for site, row in ((diameter, z[0]), (arm, z[1])))
    u, w = np.polynomial.legendre.leggauss(20)
    v, w_angle = np.polynomial.legendre.leggauss(300)
    angle = v * math.pi / 2
    capacity = (75 + 5 * u)[:, None, None] * (math.pi * x2**3 / 32)[:, None]
    limit = 4 * capacity / x4[:, None]
    law, moment = (stats.gumbel_r(*np.ravel(torque.params)), stats.norm(*np.ravel(bending.params)))
    needed = capacity * np.cos(angle)
    beyond = moment.sf(needed) + moment.cdf(-needed)
    inside = (law.pdf(limit * np.sin(angle)) * limit * np.cos(angle) * beyond) @ w_angle * math.pi / 2
    return math.log(w / 2 @ (inside + law.sf(limit[..., 0])) @ weights)


def _solve_rp38() -> float:
    """Given the other six, failure is that the third variable falls below a bound."""
    mean, sd = map(np.array, CASES["RP38"].sites[0].params)
    z, weights = _normal_nodes(6, 7)
    rest = np.r_[0, 1, 3:7]
    x1, x2, *others = mean[rest, None] + sd[rest, None] * z
    bound = np.cbrt(_rp38_load(x1, x2, others) / 15.59e4)
    return math.log(weights @ stats.norm.cdf(bound, mean[2], sd[2]))


def _solve_rp60() -> float:
    """Given the load, by inclusion and exclusion over the ways to carry it."""
    means, sds = CASES["RP60"].sites[0].params
    a, b, c, d = (stats.lognorm(sd, scale=math.exp(mean)) for mean, sd in zip(means[:4], sds, strict=False))

    def log_fails(z: np.ndarray) -> np.ndarray:
        x = np.exp(means[4] + sds[4] * z)
        half_b, half_c, half_d = (law.sf(x / 2) for law in (b, c, d))
        both, single = b.sf(x) * c.sf(x), d.sf(x)
        carried = half_b * half_c * (half_d - single) + single + both * (1 - half_d)
        return np.log(1 - a.sf(x) * carried)

    return _log_mean(log_fails)


def _solve_rp33() -> float:
    """Two planes at 3 with correlation 1/√3: given x3, a normal tail."""
    rho = 1 / math.sqrt(3)
    before = _log_mean(lambda x: log_ndtr((rho * x - 3) / math.sqrt(1 - rho**2)), high=3.0)
    return float(np.logaddexp(log_ndtr(-3.0), before))


def _solve_rp35() -> float:
    """Given x1, the failing x2 are an upper tail and, for negative x1, a lower one too."""

    def bend(x: np.ndarray) -> np.ndarray:
        return 2 + np.exp(-0.1 * x**2) + (0.2 * x) ** 4

    right = _log_mean(lambda x: log_ndtr(-np.minimum(bend(x), 4.5 / x)), low=0.0)
    left = _log_mean(lambda x: np.logaddexp(log_ndtr(-bend(x)), log_ndtr(4.5 / x)), high=0.0)
    return float(np.logaddexp(right, left))


def _solve_rp55() -> float:
    """Only the difference matters, whose absolute value d has the distribution function d − d²/4 on [0, 2]."""
    near, far = sorted(r.real for r in np.roots([0.6, 0, 0, -1 / SQRT2, 0.2]) if abs(r.imag) < 1e-12)

    def cdf(d: float) -> float:
        return d - d**2 / 4

    return math.log(cdf(far) - cdf(near) + 1 - cdf(5 / SQRT2 - 2.2))


def _solve_four_branches() -> float:
    """In coordinates along the diagonals: two parabolas up to |v| = 3.5, everything beyond."""
    curved = _log_mean(lambda v: math.log(2) + log_ndtr(-3 - 0.2 * v**2), low=-3.5, high=3.5)
    return float(np.logaddexp(curved, math.log(2) + log_ndtr(-3.5)))


def _solve_axial_beam() -> float:
    (mean,), (sd,) = CASES["AxialBeam"].sites[0].params

    def log_fails(z: np.ndarray) -> np.ndarray:
        load = np.maximum((75e3 + 5e3 * z) / (100 * math.pi), 1e-300)
        return np.asarray(log_ndtr((np.log(load) - mean) / sd))

    return _log_mean(log_fails)


# The problems ---------------------------------------------------------------------------------------------------------


def _standard(dim: int) -> Site:
    return Site("x", "Normal", ((0.0,) * dim, (1.0,) * dim))


def _rotation(dim: int, seed: int) -> np.ndarray:
    """An orthogonal matrix, uniform over all of them."""
    q, r = np.linalg.qr(np.random.default_rng(seed).standard_normal((dim, dim)))
    return np.asarray(q * np.sign(np.diag(r)))


def _single(name: str, family: Any, *params: float) -> Site:
    return Site(name, family, tuple((value,) for value in params))


def _many(name: str, family: Any, *params: Sequence[float]) -> Site:
    """Independent variables; ``params`` are pairs, one a variable."""
    return Site(name, family, tuple(zip(*params, strict=True)))


def _named(name: str, case: Reliability) -> Reliability:
    return replace(case, name=name)


_STRENGTH, _LOAD_SD = (4.782516577355461, 0.09975134511959267), 0.19804220043536505

CASES: dict[str, Reliability] = {
    case.name: case
    for case in (
        Reliability(
            "RP8",
            (_many("x", "LogNormal", *[_STRENGTH] * 4, (3.892412648851505, _LOAD_SD), (3.6692690975372955, _LOAD_SD)),),
            _rp8,
            _solve_rp8,
        ),
        Reliability(
            "RP14",
            (
                _single("strength", "Uniform", 70.0, 80.0),
                _single("diameter", "Normal", 39.0, 0.1),
                _single("force", "Gumbel", 1342.481377359007, 272.8938804317866),
                _single("arm", "Normal", 400.0, 0.1),
                _single("moment", "Normal", 250e3, 35e3),
            ),
            _rp14,
            _solve_rp14,
        ),
        Reliability("RP22", (_standard(2),), _rp22, parabola(2, 2.5, 0.2).solve),  # a parabola along the diagonals
        Reliability("RP33", (_standard(3),), _rp33, _solve_rp33),
        Reliability("RP35", (_standard(2),), _rp35, _solve_rp35),
        Reliability(
            "RP38",
            (
                _many(
                    "x",
                    "Normal",
                    (350.0, 35.0),
                    (50.8, 5.08),
                    (3.81, 0.381),
                    (173.0, 17.3),
                    (9.38, 0.938),
                    (33.1, 3.31),
                    (0.036, 0.0036),
                ),
            ),
            _rp38,
            _solve_rp38,
        ),
        Reliability("RP55", (_many("x", "Uniform", *[(-1.0, 1.0)] * 2),), _rp55, _solve_rp55),
        Reliability("RP54", (_many("x", "Exponential", *[(1.0,)] * 20),), _rp54, lambda: stats.gamma.logcdf(8.951, 20)),
        Reliability("RP75", (_standard(2),), _rp75, lambda: _log_mean(lambda x: log_ndtr(-3 / abs(x)))),
        Reliability(
            "RP89",
            (_standard(2),),
            _rp89,
            lambda: _log_mean(lambda x: log_ndtr(-np.minimum(8 - x**2, 6 - x / 5))),
        ),
        Reliability("RP107", (_standard(10),), _rp107, lambda: log_ndtr(-5.0)),
        Reliability(
            "RP60",
            (
                _many(
                    "x",
                    "LogNormal",
                    (7.691237473919823, 0.09975134511959267),
                    (7.64471745828493, 0.09975134511959267),
                    (7.735689236490656, 0.09975134511959267),
                    (7.595927294115498, 0.09975134511959267),
                    (7.015866833216955, 0.38525317015992655),
                ),
            ),
            _rp60,
            _solve_rp60,
        ),
        Reliability("FourBranch", (_standard(2),), _four_branches, _solve_four_branches),
        Reliability(
            "R-S",
            (_single("resistance", "Normal", 4.0, 1.0), _single("load", "Normal", 2.0, 1.0)),
            _resistance_less_load,
            lambda: log_ndtr(-SQRT2),
        ),
        Reliability(
            "AxialBeam",
            (
                _single("resistance", "LogNormal", 5.6988073092296165, 0.09975134511959267),
                _single("force", "Normal", 75e3, 5e3),
            ),
            _axial_beam,
            _solve_axial_beam,
        ),
        *(
            _named(f"lin_d{dim}_b{beta}", half_space(dim, float(beta)))
            for dim, beta in ((2, 5), (2, 8), (10, 5), (10, 8), (100, 5), (1000, 5), (1000, 8))
        ),
        _named("sphere_d100", sphere(100, 14.4678125059)),
        _named("union4_d2", union(2, (5.0, 5.0))),
        _named("union4_d50", union(50, (5.0, 5.0))),
        _named("parab_d2_b5_k0.5", parabola(2, 5.0, 0.5)),
        _named("nofis_Leaf", islands(2, 3.8 * SQRT2)),
    )
}
NAMES = tuple(CASES)
