"""Maps from standard normals, against scipy in both tails, in both libraries and precisions."""

import contextlib
import functools
import importlib
import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
from scipy import integrate, optimize, special, stats

from probest.programs.maps import GaussianMap, UnsupportedDistribution, gaussian_map, mixture_map
from probest.programs.maps.base import find_rule
from probest.testing import FAILURE_RATE

for module in ("pyro.distributions", "numpyro.distributions"):  # here, as some draw random numbers when imported
    with contextlib.suppress(ImportError), warnings.catch_warnings():
        importlib.import_module(module)

DRAWS = 5_000
Z = np.array([-8.0, -5.0, -3.0, -1.0, 0.0, 1.0, 3.0, 5.0, 8.0])
TOLERANCE = {"float32": 1e-4, "float64": 2e-9}
LIBRARIES = ("torch", "jax")
PRECISIONS = ("float32", "float64")


class Library(NamedTuple):
    """What the tests need of torch and Pyro, or of JAX and NumPyro."""

    name: str
    dist: Any
    special: Any
    array: Callable[..., Any]  # numpy -> array of the precision under test
    differentiated: Callable[..., Any]  # fn of lists of arguments -> (values, derivatives of their sum), as numpy
    vmap: Callable[..., Any]
    compiled: Callable[..., Any]


@contextlib.contextmanager
def using(name: str, precision: str) -> Iterator[Library]:
    if name == "torch":
        torch = pytest.importorskip("torch")
        dist = pytest.importorskip("pyro.distributions")
        from probest.backends import special_torch

        dtype = getattr(torch, precision)

        def differentiated(fn: Any) -> Any:
            def run(args: Any) -> tuple[Any, Any]:
                args = [[array(a).requires_grad_() for a in group] for group in args]
                values = fn(args)
                slopes = torch.autograd.grad(sum(v.sum() for v in values), [a for group in args for a in group])
                flat = iter(slopes)
                return [numpy_of(v) for v in values], [[next(flat).numpy() for _ in group] for group in args]

            return run

        def array(x: Any) -> Any:
            return torch.as_tensor(x, dtype=dtype)

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield Library(name, dist, special_torch, array, differentiated, torch.func.vmap, lambda fn: fn)
        finally:
            torch.set_num_threads(threads)
    else:
        jax = pytest.importorskip("jax")
        dist = pytest.importorskip("numpyro.distributions")
        from probest.backends import special_jax

        quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

        def jax_array(x: Any) -> Any:
            return jax.numpy.asarray(x, precision)

        def jax_differentiated(fn: Any) -> Any:
            def run(args: Any) -> Any:
                values, pull = jax.vjp(fn, args)
                return values, pull(jax.tree.map(jax.numpy.ones_like, values))[0]

            compiled = quick(run)
            return lambda args: jax.tree.map(np.asarray, compiled(jax.tree.map(jax_array, args)))

        with jax.enable_x64(precision == "float64"):
            yield Library(name, dist, special_jax, jax_array, jax_differentiated, jax.vmap, quick)


def numpy_of(x: Any) -> np.ndarray:
    return np.asarray(x.detach() if hasattr(x, "detach") else x)


def make(library: Library, name: str, parameters: dict[str, Any]) -> Any:
    """The distribution, with float parameters as arrays of the precision under test, integers as they are."""
    cls = functools.reduce(getattr, name.split("."), library.dist)
    return cls(**{k: v if isinstance(v, int) else library.array(v) for k, v in parameters.items()}, validate_args=False)


def mapped(library: Library, fn: Any) -> GaussianMap:
    return gaussian_map(fn, library.special)


# --- laws on the line -----------------------------------------------------------------------------------------------


class Line(NamedTuple):
    name: str
    parameters: dict[str, float]
    law: Any  # scipy's, or a function of (log Φ(z), log Φ(-z)) in float64
    libraries: tuple[str, ...] = LIBRARIES


def von_mises(kappa: float, low: np.ndarray, up: np.ndarray) -> np.ndarray:
    """Quantiles about 1 by adaptive quadrature and bracketing, in the distance from ±π: scipy's own lose the tails."""

    def tail(eta: float) -> float:
        cut = max(0.0, eta - 14.0 / np.sqrt(kappa))
        return integrate.quad(
            lambda u: np.exp(-2.0 * kappa * np.cos(0.5 * u) ** 2), cut, eta, epsabs=0.0, epsrel=1e-12
        )[0]

    def angle(log_share: float) -> float:
        def gap(log_eta: float) -> float:
            return float(np.log(tail(np.exp(log_eta)) / (2.0 * tail(np.pi))) - log_share)

        least = max(1e-20, np.pi - 12.0 / np.sqrt(kappa))
        return np.pi - float(np.exp(optimize.brentq(gap, np.log(least), np.log(np.pi), xtol=1e-15, rtol=1e-14)))

    least = np.minimum(low, up)
    size = np.array([angle(share) if share < np.log(0.5) - 1e-12 else 0.0 for share in least.ravel()])
    angle_of = 1.0 + np.where(low < up, -1.0, 1.0) * size.reshape(low.shape)
    return angle_of - 2.0 * np.pi * np.floor((angle_of + np.pi) / (2.0 * np.pi))  # so far from ±π that none is near it


JAX, TORCH = ("jax",), ("torch",)
LINE = [
    Line("Normal", {"loc": 1.0, "scale": 2.0}, stats.norm(1, 2)),
    Line("Exponential", {"rate": 2.0}, stats.expon(scale=0.5)),
    Line("Laplace", {"loc": 0.5, "scale": 2.0}, stats.laplace(0.5, 2)),
    Line("Cauchy", {"loc": 0.0, "scale": 2.0}, stats.cauchy(0, 2)),
    Line("Logistic", {"loc": 0.5, "scale": 2.0}, stats.logistic(0.5, 2)),
    Line("Gumbel", {"loc": 0.5, "scale": 2.0}, stats.gumbel_r(0.5, 2)),
    Line(
        "HalfNormal",
        {"scale": 2.0},
        lambda low, up: 2 * np.where(low < up, special.erfinv(np.exp(low)) * 2**0.5, -special.ndtri(np.exp(up) / 2)),
    ),
    Line("HalfCauchy", {"scale": 2.0}, stats.halfcauchy(scale=2)),
    Line("LogNormal", {"loc": 0.5, "scale": 0.5}, stats.lognorm(0.5, scale=np.exp(0.5))),
    Line("Uniform", {"low": 0.0, "high": 3.0}, stats.uniform(0, 3)),
    Line("Pareto", {"scale": 2.0, "alpha": 3.0}, stats.pareto(3, scale=2)),
    Line("Weibull", {"scale": 2.0, "concentration": 1.5}, stats.weibull_min(1.5, scale=2)),
    *(Line("Gamma", {"concentration": a, "rate": 2.0}, stats.gamma(a, scale=0.5)) for a in (0.3, 2.5, 1e4)),
    *(
        Line("VonMises", {"loc": 1.0, "concentration": kappa}, functools.partial(von_mises, kappa))
        for kappa in (0.05, 2.0, 300.0)
    ),
    Line("Chi2", {"df": 3.0}, stats.chi2(3)),
    Line("InverseGamma", {"concentration": 2.5, "rate": 2.0}, stats.invgamma(2.5, scale=2)),
    Line(
        "Kumaraswamy",
        {"concentration1": 2.0, "concentration0": 3.0},
        lambda low, up: np.sqrt(-np.expm1(up / 3)),
    ),
    Line("AsymmetricLaplace", {"loc": 0.5, "scale": 2.0, "asymmetry": 1.5}, stats.laplace_asymmetric(1.5, 0.5, 2)),
    Line(
        "SoftLaplace",
        {"loc": 0.0, "scale": 2.0},
        lambda low, up: 2 * np.log(np.tan(np.pi / 2 * np.exp(np.minimum(low, up)))) * np.where(low < up, 1, -1),
    ),
    Line("Levy", {"loc": 0.5, "scale": 2.0}, stats.levy(0.5, 2), JAX),
    Line("Gompertz", {"concentration": 2.0, "rate": 0.5}, stats.gompertz(2.0, scale=2.0), JAX),
    Line(
        "Dagum",
        {"concentration": 2.0, "sharpness": 3.0, "scale": 1.5},
        lambda low, up: 1.5 * np.expm1(-low / 2) ** (-1 / 3),
        JAX,
    ),
    Line("LogUniform", {"low": 0.5, "high": 4.0}, stats.loguniform(0.5, 4.0), JAX),
    Line("LowerTruncatedPowerLaw", {"alpha": -4.0, "low": 2.0}, stats.pareto(3, scale=2), JAX),
    Line("DoublyTruncatedPowerLaw", {"alpha": -1.0, "low": 0.5, "high": 4.0}, stats.loguniform(0.5, 4.0), JAX),
    Line(
        "DoublyTruncatedPowerLaw",
        {"alpha": 1.0, "low": 0.0 + 1e-3, "high": 1.0},
        lambda low, up: np.sqrt(1e-6 + np.exp(low) * (1 - 1e-6)),
        JAX,
    ),
    Line("GeneralizedPareto", {"loc": 0.5, "scale": 2.0, "concentration": 0.3}, stats.genpareto(0.3, 0.5, 2), TORCH),
    Line("ContinuousBernoulli", {"logits": -2.0}, stats.truncexpon(2.0, scale=0.5), TORCH),
    Line(
        "SkewLogistic",
        {"loc": 0.5, "scale": 2.0, "asymmetry": 1.5},
        lambda low, up: 0.5 - 2 * np.log(np.expm1(-low / 1.5)),
        TORCH,
    ),
]


def quantile(law: Any, z: np.ndarray) -> np.ndarray:
    """scipy's quantile at Φ(z), by ppf below the median and isf above it."""
    if callable(getattr(law, "ppf", None)):
        return np.where(z <= 0, law.ppf(special.ndtr(np.minimum(z, 0))), law.isf(special.ndtr(-np.maximum(z, 0))))
    return law(special.log_ndtr(z), special.log_ndtr(-z))


def label(case: Any) -> str:
    return case.name + "".join(f"-{v}" for v in case.parameters.values())


on_each_library = pytest.mark.parametrize("name", LIBRARIES)
on_each_precision = pytest.mark.parametrize("precision", PRECISIONS)


class Mapped(NamedTuple):
    """A law's map at Z: values, their slopes in z and in each parameter, and the same by differences (float64)."""

    value: np.ndarray
    slopes: list[np.ndarray]
    differences: list[np.ndarray]


@functools.cache
def lines(name: str, precision: str) -> dict[str, Mapped]:
    """All of LINE at once, which is compiled once."""
    cases = [case for case in LINE if name in case.libraries]
    with using(name, precision) as library:

        def value(case: Line, z: Any, *parameters: Any) -> Any:
            fn = make(library, case.name, dict(zip(case.parameters, parameters, strict=True)))
            line = mapped(library, fn)
            assert line.base_shape == tuple(fn.batch_shape)
            assert not line.discrete
            return line.transform(z)

        run = library.differentiated(lambda args: [value(c, *a) for c, a in zip(cases, args, strict=True)])
        args = [[Z, *(np.full_like(Z, v) for v in case.parameters.values())] for case in cases]
        values, slopes = run(args)
        differences: list[list[np.ndarray]] = [[] for _ in cases]
        for i in range(max(map(len, args)) if precision == "float64" else 0):
            around = [
                run([[a + k * step_of(a) if i == j else a for j, a in enumerate(group)] for group in args])[0]
                for k in (-2, -1, 1, 2)
            ]
            for group, found, a, b, c, d in zip(args, differences, *around, strict=True):
                if i < len(group):
                    found.append((a - 8 * b + 8 * c - d) / (12 * step_of(group[i])))
        return {label(c): Mapped(*found) for c, *found in zip(cases, values, slopes, differences, strict=True)}


def step_of(x: np.ndarray) -> np.ndarray:
    return 1e-4 * np.maximum(0.1, np.abs(x))


@on_each_precision
@on_each_library
@pytest.mark.parametrize("case", LINE, ids=label)
def test_line(case: Line, name: str, precision: str) -> None:
    if name not in case.libraries:
        pytest.skip(f"not in {name}'s library")
    x, slopes, differences = lines(name, precision)[label(case)]
    assert x.dtype == precision

    # Relative, also next to the end of a support at 0; near the middle of a law about 0, relative to its scale.
    expected = np.maximum(quantile(case.law, Z), np.finfo(precision).tiny if (x > 0).all() else -np.inf)
    scale = np.abs(expected[Z == 1] - expected[Z == 0])
    size = np.where(np.abs(Z) < 2, np.maximum(np.abs(expected), scale), np.abs(expected))
    assert (np.abs(x - expected) <= TOLERANCE[precision] * size).all(), (x, expected)

    assert all(np.isfinite(slope).all() for slope in slopes)
    assert (slopes[0] >= 0).all()
    assert (slopes[0][np.abs(Z) < 2] > 0).all()
    arguments = [Z, *(np.full_like(Z, v) for v in case.parameters.values())]
    for slope, difference, argument in zip(slopes, differences, arguments, strict=False):
        smooth = (Z != 0) | (case.name != "Laplace")  # which has a corner there
        error = np.abs(difference - slope) - 1e-5 * np.abs(slope) - 1e-11 * size / step_of(argument)
        assert (error[smooth] <= 0).all(), (difference, slope)


TRUNCATED = [  # NumPyro's truncations of a scipy law, with low and high
    ("Normal", stats.norm(), None, -1.0),
    ("Normal", stats.norm(), 10.0, None),
    ("Normal", stats.norm(), -1.0, 2.0),
    ("Normal", stats.norm(), 4.0, 6.0),
    ("Cauchy", stats.cauchy(), 3.0, None),
    ("Laplace", stats.laplace(), -20.0, -1.0),
    ("Logistic", stats.logistic(), 5.0, 30.0),
]


@on_each_precision
def test_truncated(precision: str) -> None:
    with using("jax", precision) as library:

        def value(base: str, low: float | None, high: float | None, z: Any) -> Any:
            ends = {k: v for k, v in (("low", low), ("high", high)) if v is not None}
            side = "TwoSided" if len(ends) == 2 else "Left" if low is not None else "Right"
            base_dist = make(library, base, {"loc": 0.0, "scale": 1.0})
            cls = getattr(library.dist, f"{side}TruncatedDistribution")
            return mapped(library, cls(base_dist, **ends, validate_args=False)).transform(z)

        def values(args: Any) -> Any:
            return [value(b, low, high, z) for (b, _, low, high), (z,) in zip(TRUNCATED, args, strict=True)]

        found = zip(*library.differentiated(values)([[Z]] * len(TRUNCATED)), strict=True)
        p, q = special.ndtr(Z), special.ndtr(-Z)
        for (base, law, low, high), (x, (slope,)) in zip(TRUNCATED, found, strict=True):
            if high is None or (low is not None and low > 0):
                expected = law.isf(law.sf(low) * q + (0 if high is None else law.sf(high) * p))
            else:
                expected = law.ppf((0 if low is None else law.cdf(low)) * q + law.cdf(high) * p)
            close = np.allclose(x, expected, rtol=TOLERANCE[precision], atol=1e-6 if precision == "float32" else 1e-12)
            assert close, (base, low, high, x, expected)
            assert np.isfinite(slope).all()
            assert low is None or (x >= low).all()
            assert high is None or (x <= high).all()


# --- discrete laws of one coordinate --------------------------------------------------------------------------------

MASSES = np.array([1e-20, 0.3, 0.0, 0.7 - 2e-9, 2e-9, 1e-15])
CUTS = np.array([-40.0, -1.0, 0.5, 35.0])


def masses_to_tails(masses: np.ndarray) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    lower, upper = np.cumsum(masses), np.append(np.cumsum(masses[::-1])[::-1][1:], 0.0)
    return (lambda k: np.where(k < 0, 0.0, lower[np.maximum(k, 0)])), (
        lambda k: np.where(k < 0, 1.0, upper[np.maximum(k, 0)])
    )


def tails_of(law: Any) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    return masses_to_tails(law) if isinstance(law, np.ndarray) else (law.cdf, law.sf)


CUT_TAILS = np.diff(np.concatenate([[0], special.expit(CUTS), [1]]))
CUT_TAILS[-1] = special.expit(-CUTS[-1])
DISCRETE = [
    ("Bernoulli", {"probs": 0.3}, stats.bernoulli(0.3)),
    ("Bernoulli", {"probs": 1e-12}, np.array([1.0, 1e-12])),
    ("Bernoulli", {"logits": 30.0}, np.array([special.expit(-30), special.expit(30)])),
    ("Binomial", {"total_count": 20, "probs": 0.3}, stats.binom(20, 0.3)),
    ("Binomial", {"total_count": 20, "logits": -7.0}, stats.binom(20, special.expit(-7))),
    ("Categorical", {"probs": MASSES}, MASSES),
    ("Categorical", {"logits": np.log(MASSES + 1e-40)}, MASSES + 1e-40),
    ("Geometric", {"probs": 0.3}, stats.geom(0.3, -1)),
    ("Poisson", {"rate": 0.01}, stats.poisson(0.01)),
    ("Poisson", {"rate": 40.0}, stats.poisson(40)),
    ("OrderedLogistic", {"predictor": 0.0, "cutpoints": CUTS}, CUT_TAILS),
    ("DiscreteUniform", {"low": 2, "high": 8}, stats.randint(2, 9)),
]


@on_each_precision
@on_each_library
@pytest.mark.parametrize(("case", "parameters", "law"), DISCRETE, ids=lambda v: v if isinstance(v, str) else "")
def test_thresholds(case: str, parameters: dict[str, Any], law: Any, name: str, precision: str) -> None:
    with using(name, precision) as library:
        if not hasattr(library.dist, case):
            pytest.skip(f"{name}'s library has no {case}")
        fn = make(library, case, parameters)
        line = mapped(library, fn)
        assert line.discrete
        assert line.base_shape == ()
        z = np.linspace(-9, 9, 401) + 1e-3
        k = numpy_of(library.compiled(line.transform)(library.array(z))).astype(int)
        assert (np.diff(k) >= 0).all()
        # The smallest k with F(k) >= Φ(z), by whichever tail is the smaller, up to rounding.
        lower, upper = tails_of(law)
        slack = 10 * TOLERANCE[precision]
        p, q, below = special.ndtr(z), special.ndtr(-z), z < 0
        reached = np.where(below, lower(k) >= p * (1 - slack), upper(k) <= q * (1 + slack))
        needed = np.where(below, lower(k - 1) < p * (1 + slack), upper(k - 1) > q * (1 - slack))
        assert reached.all(), (z[~reached], k[~reached])
        assert needed.all(), (z[~needed], k[~needed])


# --- laws of several coordinates ------------------------------------------------------------------------------------

MATRIX = np.array([[2.0, 0.5, 0.3], [0.5, 1.0, -0.2], [0.3, -0.2, 1.5]])
TRIL = np.linalg.cholesky(MATRIX)
PRECISION = np.linalg.inv(MATRIX)
LOC = np.array([0.5, -1.0, 2.0])
A = np.array([1.0, -2.0, 0.5])
ALONG = stats.norm(A @ LOC, np.sqrt(A @ MATRIX @ A))
GRAPH = np.array([[0.0, 1, 1], [1, 0, 0], [1, 0, 0]])
CAR_COVARIANCE = np.linalg.inv(2.0 * (np.diag(GRAPH.sum(-1)) - 0.3 * GRAPH))


def along(x: np.ndarray) -> np.ndarray:
    return x @ A


def first(x: np.ndarray) -> np.ndarray:
    return x[..., 0]


def quadratic(x: np.ndarray) -> np.ndarray:
    return np.einsum("i,...ij,j", A, x, A) / (A @ MATRIX @ A)


def inverse_quadratic(x: np.ndarray) -> np.ndarray:
    return np.einsum("i,...ij,j", A, np.linalg.inv(x), A) / (A @ PRECISION @ A)


# ruff: noqa: E501
LAWS = [
    ("StudentT", {"df": 3.0, "loc": 0.5, "scale": 2.0}, np.asarray, stats.t(3, 0.5, 2)),
    ("Beta", {"concentration1": 0.5, "concentration0": 2.0}, np.asarray, stats.beta(0.5, 2)),
    ("BetaProportion", {"mean": 0.2, "concentration": 2.5}, np.asarray, stats.beta(0.5, 2)),
    ("FisherSnedecor", {"df1": 3.0, "df2": 5.0}, np.asarray, stats.f(3, 5)),
    ("Dirichlet", {"concentration": [0.5, 1.0, 2.5]}, first, stats.beta(0.5, 3.5)),
    ("MultivariateNormal", {"loc": LOC, "covariance_matrix": MATRIX}, along, ALONG),
    ("MultivariateNormal", {"loc": LOC, "precision_matrix": PRECISION}, along, ALONG),
    ("MultivariateNormal", {"loc": LOC, "scale_tril": TRIL}, along, ALONG),
    ("LowRankMultivariateNormal", {"loc": LOC, "cov_factor": TRIL[:, :2], "cov_diag": LOC**2}, along,
     stats.norm(A @ LOC, np.sqrt(A @ (TRIL[:, :2] @ TRIL[:, :2].T + np.diag(LOC**2)) @ A))),
    ("MultivariateStudentT", {"df": 3.0, "loc": LOC, "scale_tril": TRIL}, along, stats.t(3, *ALONG.args)),
    ("Wishart", {"df": 4.5, "covariance_matrix": MATRIX}, quadratic, stats.chi2(4.5)),
    ("Wishart", {"concentration": 4.5, "scale_matrix": MATRIX}, quadratic, stats.chi2(4.5)),
    ("InverseWishart", {"concentration": 4.5, "scale_matrix": MATRIX}, inverse_quadratic, stats.chi2(2.5 + 2)),
    ("LKJCholesky", {"dim": 3, "concentration": 1.5}, lambda x: x[:, 1] @ np.array([1.0, 0, 0]), stats.beta(2, 2, -1, 2)),
    ("LKJCholesky", {"dim": 3, "concentration": 1.5}, lambda x: (x[:, 1] * x[:, 2]).sum(-1), stats.beta(2, 2, -1, 2)),
    ("LKJCholesky", {"dimension": 3, "concentration": 1.5}, lambda x: (x[:, 1] * x[:, 2]).sum(-1), stats.beta(2, 2, -1, 2)),
    ("ProjectedNormal", {"concentration": [0.0, 0.0]}, lambda x: np.arctan2(x[:, 1], x[:, 0]), stats.uniform(-np.pi, 2 * np.pi)),
    ("GaussianRandomWalk", {"scale": 2.0, "num_steps": 3}, lambda x: x[..., 2], stats.norm(0, 12**0.5)),
    ("CAR", {"loc": LOC, "correlation": 0.3, "conditional_precision": 2.0, "adj_matrix": GRAPH}, along,
     stats.norm(A @ LOC, np.sqrt(A @ CAR_COVARIANCE @ A))),
    ("MatrixNormal", {"loc": 0 * MATRIX, "scale_tril_row": TRIL, "scale_tril_column": TRIL}, lambda x: x[..., 0, 2],
     stats.norm(0, np.sqrt(2 * 1.5))),
    ("RelaxedBernoulli", {"temperature": 2.0, "probs": 0.3}, lambda x: 2 * special.logit(x), stats.logistic(special.logit(0.3))),
    ("RelaxedOneHotCategorical", {"temperature": 2.0, "probs": [0.2, 0.3, 0.5]},
     lambda x: 2 * (np.log(x[..., 0]) - np.log(x[..., 2])), stats.logistic(np.log(0.2 / 0.5))),
    ("FoldedDistribution", {"base_dist": ("Normal", {"loc": 0.0, "scale": 2.0})}, np.asarray, stats.halfnorm(scale=2)),
    ("GaussianCopula", {"marginal_dist": ("Exponential", {"rate": 2.0}), "correlation_matrix": [[1.0, 0.5], [0.5, 1.0]]},
     lambda x: x[..., 1], stats.expon(scale=0.5)),
]  # fmt: skip


def make_nested(library: Library, name: str, parameters: dict[str, Any]) -> Any:
    """`make`, where a parameter may be a distribution: (name, parameters)."""
    if name == "FoldedDistribution" or any(isinstance(v, tuple) for v in parameters.values()):
        made = {k: make(library, *v) if isinstance(v, tuple) else library.array(v) for k, v in parameters.items()}
        return getattr(library.dist, name)(*made.values())
    return make(library, name, parameters)


def accepts(cls: Any, parameters: dict[str, Any]) -> bool:
    return parameters.keys() <= inspect.signature(cls).parameters.keys()


def draws_of_each(library: Library, fns: list[Any], count: int) -> list[np.ndarray]:
    """Values of each at `count` independent bases, under vmap."""
    maps, rng = [mapped(library, fn) for fn in fns], np.random.default_rng(0)
    bases = [library.array(rng.standard_normal((count, *gaussian.base_shape))) for gaussian in maps]
    values = library.compiled(
        lambda bases: [library.vmap(gaussian.transform)(base) for gaussian, base in zip(maps, bases, strict=True)]
    )
    return [numpy_of(value) for value in values(bases)]


def draws(library: Library, fn: Any, count: int) -> np.ndarray:
    return draws_of_each(library, [fn], count)[0]


@on_each_library
@pytest.mark.parametrize(
    ("case", "parameters", "statistic", "law"), LAWS, ids=lambda v: v if isinstance(v, str) else ""
)
def test_law(case: str, parameters: dict[str, Any], statistic: Any, law: Any, name: str) -> None:
    with using(name, "float32") as library:
        cls = getattr(library.dist, case, None)
        if cls is None or not accepts(cls, parameters):
            pytest.skip(f"{name}'s library has no such {case}")
        fn = make_nested(library, case, parameters)
        values = draws(library, fn, DRAWS).astype(np.float64)
        assert values.shape[1:] == tuple(fn.batch_shape) + tuple(fn.event_shape)
        assert stats.kstest(statistic(values), law.cdf).pvalue > FAILURE_RATE


COMPOUND = [
    ("NegativeBinomial", {"total_count": 2.5, "probs": 0.4}),
    ("GammaPoisson", {"concentration": 2.5, "rate": 1.5}),
    ("BetaBinomial", {"concentration1": 0.5, "concentration0": 2.0, "total_count": np.array(7)}),
    ("BetaNegativeBinomial", {"concentration1": 3.5, "concentration0": 2.0, "n": 3.0}),
    ("ZeroInflatedPoisson", {"gate": 0.3, "rate": 2.0}),
    ("ZeroInflatedNegativeBinomial", {"total_count": 2.5, "probs": 0.4, "gate": 0.3}),
    ("HurdlePoisson", {"gate": 0.3, "rate": 2.0}),
]


@on_each_library
@pytest.mark.parametrize(("case", "parameters"), COMPOUND, ids=lambda v: v if isinstance(v, str) else "")
def test_compound(case: str, parameters: dict[str, Any], name: str) -> None:
    with using(name, "float32") as library:
        cls = getattr(library.dist, case, None)
        if cls is None:
            pytest.skip(f"{name}'s library has no {case}")
        if name == "jax":
            parameters = {k: int(v) if isinstance(v, np.ndarray) else v for k, v in parameters.items()}
        fn = make(library, case, parameters)
        assert mapped(library, fn).discrete
        values = draws(library, fn, DRAWS).astype(int)
        size = 8
        support = np.arange(size)
        probs = np.exp(np.array([numpy_of(fn.log_prob(library.array(float(k)))) for k in support], np.float64))
        counts = np.append(np.bincount(values, minlength=size)[:size], (values >= size).sum())
        expected = np.append(probs, max(1 - probs.sum(), 1e-300)) * DRAWS
        enough = expected > 5
        counts, expected = (np.append(v[enough], v[~enough].sum()) for v in (counts, expected))
        statistic = ((counts - expected) ** 2 / np.maximum(expected, 1)).sum()
        assert stats.chi2(enough.sum() - 1).sf(statistic) > FAILURE_RATE, (counts, expected)


# --- every class of both libraries ----------------------------------------------------------------------------------

NORMAL = ("Normal", {"loc": 0.5, "scale": 2.0})
EXAMPLES: dict[str, list[dict[str, Any]]] = {
    **{name: [] for name in [case.name for case in LINE] + [c[0] for c in (*DISCRETE, *LAWS, *COMPOUND)]},
    "AVFMultivariateNormal": [{"loc": LOC, "scale_tril": TRIL, "control_var": np.ones((2, 1, 3))}],
    "AffineBeta": [{"concentration1": 0.5, "concentration0": 2.0, "loc": 1.0, "scale": 2.0}],
    "AsymmetricLaplaceQuantile": [{"loc": 0.5, "scale": 2.0, "quantile": 0.3}],
    "BernoulliLogits": [{"logits": 0.3}],
    "BernoulliProbs": [{"probs": 0.3}],
    "BinomialLogits": [{"total_count": 5, "logits": 0.3}],
    "BinomialProbs": [{"total_count": 5, "probs": 0.3}],
    "CategoricalLogits": [{"logits": [0.3, 0.2]}],
    "CategoricalProbs": [{"probs": [0.3, 0.7]}],
    "CirculantNormal": [{"loc": LOC, "covariance_row": [2.0, 0.5, 0.5]}],
    "Delta": [{"v": 2.0}],
    "DirichletMultinomial": [{"concentration": [0.5, 1.0], "total_count": 5}],
    "ExpandedDistribution": [{"base_dist": NORMAL, "batch_shape": (2, 3)}],
    "ExtendedBetaBinomial": [{"concentration1": 0.5, "concentration0": 2.0, "total_count": np.array(7)}],
    "ExtendedBinomial": [{"total_count": 5, "probs": 0.3}],
    "GaussianCopulaBeta": [],
    "GaussianStateSpace": [{"num_steps": 4, "transition_matrix": 0.5 * np.eye(3), "scale_tril": TRIL}],
    "GeometricLogits": [{"logits": 0.3}],
    "GeometricProbs": [{"probs": 0.3}],
    "HurdleGamma": [{"gate": 0.3, "concentration": 2.0, "rate": 1.0}],
    "HurdleLogNormal": [{"gate": 0.3, "loc": 0.5, "scale": 1.0}],
    "HurdleLogits": [{"base_dist": ("Poisson", {"rate": 2.0}), "gate_logits": -0.5}],
    "HurdleProbs": [{"base_dist": ("Geometric", {"probs": 0.3}), "gate": 0.3}],
    "Independent": [],
    "InverseWishartCholesky": [{"concentration": 4.5, "scale_tril": TRIL}],
    "LKJ": [{"dim": 3, "concentration": 1.5}, {"dimension": 3, "concentration": 1.5}],
    "LKJCorrCholesky": [{"d": 3, "eta": 1.5}],
    "LogisticNormal": [{"loc": LOC, "scale": LOC**2}],
    "MaskedDistribution": [{"base_dist": NORMAL, "mask": True}],
    "MixtureGeneral": [],
    "MixtureSameFamily": [],
    "Multinomial": [{"total_count": 5, "probs": [0.3, 0.7]}],
    "MultinomialLogits": [{"total_count": 5, "logits": [0.3, 0.7]}],
    "MultinomialProbs": [{"total_count": 5, "probs": [0.3, 0.7]}],
    "NanMaskedMultivariateNormal": [{"loc": LOC, "scale_tril": TRIL}],
    "NanMaskedNormal": [{"loc": 0.5, "scale": 2.0}],
    "NegativeBinomial2": [{"mean": 2.0, "concentration": 1.5}],
    "NegativeBinomialLogits": [{"total_count": 2.5, "logits": -0.5}],
    "NegativeBinomialProbs": [{"total_count": 2.5, "probs": 0.4}],
    "OMTMultivariateNormal": [{"loc": LOC, "scale_tril": TRIL}],
    "OneHotCategorical": [{"probs": [0.3, 0.7]}],
    "OneHotCategoricalStraightThrough": [{"probs": [0.3, 0.7]}],
    "RelaxedBernoulliLogits": [{"temperature": 2.0, "logits": 0.3}],
    "SoftAsymmetricLaplace": [{"loc": 0.5, "scale": 2.0, "asymmetry": 1.5, "softness": 0.7}],
    "TransformedDistribution": [],
    "Unit": [{"log_factor": 0.5}],
    "WishartCholesky": [{"concentration": 4.5, "scale_tril": TRIL}],
    "ZeroInflatedDistribution": [{"base_dist": ("Geometric", {"probs": 0.3}), "gate": 0.3}],
    "ZeroInflatedLogits": [{"base_dist": ("Geometric", {"probs": 0.3}), "gate_logits": -0.3}],
    "ZeroInflatedProbs": [{"base_dist": ("Geometric", {"probs": 0.3}), "gate": 0.3}],
    "ZeroSumNormal": [{"scale": 2.0, "event_shape": (4,)}],
    **{key: [] for key in ("LeftTruncatedDistribution", "RightTruncatedDistribution", "TwoSidedTruncatedDistribution")},
}  # fmt: skip
for case_name, case_parameters, *_ in [*LINE, *DISCRETE, *LAWS, *COMPOUND]:
    EXAMPLES[case_name] = [*EXAMPLES[case_name], case_parameters]


def examples(library: Library, cls: Any) -> Iterator[Any]:
    for parameters in EXAMPLES[cls.__name__]:
        if accepts(cls, parameters):
            made = {
                k: make(library, *v) if isinstance(v, tuple) and isinstance(v[0], str)
                else v if isinstance(v, int | tuple) or k == "adj_matrix"
                else int(v) if k == "total_count" and library.name == "jax"
                else library.array(v)
                for k, v in parameters.items()
            }  # fmt: skip
            yield cls(**made)


def distributions(library: Library) -> list[Any]:
    root = (
        library.dist.Distribution
        if library.name == "jax"
        else importlib.import_module("torch").distributions.Distribution
    )
    return [
        c for n, c in vars(library.dist).items() if inspect.isclass(c) and issubclass(c, root) and not n.startswith("_")
    ]


def check_shape_and_type(library: Library, fn: Any) -> None:
    """Under vmap over the base; JAX traces it only."""
    gaussian = mapped(library, fn)
    assert gaussian.base_shape[: len(fn.batch_shape)] == tuple(fn.batch_shape)
    shape = (2, *fn.batch_shape, *fn.event_shape)
    if library.name == "jax":
        jax = importlib.import_module("jax")
        base = jax.ShapeDtypeStruct((2, *gaussian.base_shape), "float32")
        value = jax.eval_shape(library.vmap(gaussian.transform), base)
        sample = jax.eval_shape(fn.sample, jax.random.key(0))
    else:
        torch = importlib.import_module("torch")
        base = torch.as_tensor(np.random.default_rng(0).standard_normal((2, *gaussian.base_shape)), dtype=torch.float32)
        value = library.vmap(gaussian.transform)(base)
        sample = fn.sample()
        assert torch.isfinite(value).all()
    assert tuple(value.shape) == shape, (fn, value.shape)
    assert value.dtype == sample.dtype, (fn, value.dtype, sample.dtype)


@pytest.mark.global_rng
@pytest.mark.filterwarnings("ignore:class LKJCorrCholesky", "ignore:Singular sample")
@on_each_library
def test_every_class(name: str) -> None:
    """Mapped, with the shape and dtype of the library's own samples, or unsupported; and no other exception."""
    with using(name, "float32") as library:
        unsupported, supported, tried = [], [], set()
        for cls in distributions(library):
            try:
                find_rule(cls.__new__(cls))
            except UnsupportedDistribution as error:
                unsupported.append(cls.__name__ if cls.__name__ in str(error) else error)
                continue
            supported.append(cls.__name__)
            assert cls.__name__ in EXAMPLES, f"no example of {cls.__name__}"
            for fn in examples(library, cls):
                tried.add(cls.__name__)
                check_shape_and_type(library, fn)
        print(f"{name}: {len(supported)} mapped; unsupported:", *sorted(unsupported))  # noqa: T201
        elsewhere = {
            "GaussianCopulaBeta",
            "Independent",
            "MixtureGeneral",
            "MixtureSameFamily",
            "TransformedDistribution",
        }
        assert {c for c in supported if "Truncated" not in c or "PowerLaw" in c} - tried <= elsewhere


@on_each_library
def test_wrappers(name: str) -> None:
    with using(name, "float32") as library:
        d = library.dist
        column = library.array(np.ones((3, 1)))
        mixing = d.Categorical(probs=library.array([0.2, 0.3, 0.5]))
        fns = [
            d.Normal(column, column).expand((2, 3, 4)).to_event(1),
            d.Beta(column, column).expand((2, 3, 4)),
            d.Gamma(column, column).to_event(2),
            d.Dirichlet(library.array(np.ones((3, 1, 2)))).expand((2, 3, 4)),
            d.MultivariateNormal(library.array(LOC), library.array(MATRIX)).expand((3, 4)).mask(False),
            d.Poisson(column).expand((3, 2)),
            d.TransformedDistribution(d.Normal(column, column).to_event(1), [d.transforms.ExpTransform()]).expand(
                (2, 3)
            ),
            d.Delta(column).expand((2, 3, 1)).to_event(1),
            d.MixtureSameFamily(mixing, d.Normal(library.array([0.0, 1, 2]), 1.0)).expand((4,)),
            d.MixtureSameFamily(mixing, d.Dirichlet(library.array(np.ones((3, 2))))).expand((4,)),
            d.MixtureSameFamily(mixing, d.Poisson(library.array([1.0, 2, 3]))).to_event(0),
        ]
        for fn, values in zip(fns, draws_of_each(library, fns, 2), strict=True):
            gaussian = mapped(library, fn)
            assert values.shape == (2, *fn.batch_shape, *fn.event_shape), fn
            if not gaussian.discrete and gaussian.base_shape[-1] > 0 and values[0].size > 1:
                assert np.unique(values).size == values.size, "expanded copies are independent"


@on_each_library
def test_mixture(name: str) -> None:
    with using(name, "float32") as library:
        d, weights = library.dist, np.array([0.2, 0.3, 0.5])
        mixing = d.Categorical(probs=library.array(weights))
        locs = np.array([-1.0, 0.0, 4.0])
        fns = [d.MixtureSameFamily(mixing, d.Normal(library.array(locs), library.array(np.ones(3))))]
        if name == "jax":
            fns.append(d.MixtureGeneral(mixing, [d.Normal(library.array(m), 1.0) for m in locs]))
        assert mixture_map(d.Normal(library.array(0.0), library.array(1.0)), library.special) is None
        for fn in fns:
            mixture = mixture_map(fn, library.special)
            assert tuple(mixture.index.batch_shape) == ()
            assert not mixture.discrete
            base = library.array(np.full(mixture.base_shape, 0.25))
            for k, loc in enumerate(locs):
                value = mixture.transform(
                    library.special.array(k, mapped(library, mixing).transform(library.array(0.0))), base
                )
                assert numpy_of(value) == pytest.approx(loc + 0.25)
            law = lambda x: (weights * stats.norm(locs).cdf(np.asarray(x)[..., None])).sum(-1)  # noqa: E731
            assert stats.kstest(draws(library, fn, DRAWS), law).pvalue > FAILURE_RATE


@on_each_library
def test_own_sampler_is_not_trusted(name: str) -> None:
    with using(name, "float32") as library:

        class Renamed(library.dist.Gamma):
            pass

        class Odd(library.dist.Gamma):
            def sample(self, *args: Any) -> Any:
                return 2 * super().sample(*args)

        one = library.array(1.0)
        assert mapped(library, Renamed(one, one)).base_shape == ()
        with pytest.raises(UnsupportedDistribution, match="Odd"):
            mapped(library, Odd(one, one))
        with pytest.raises(UnsupportedDistribution, match=r"ImproperUniform.*proper prior"):
            mapped(library, library.dist.ImproperUniform(library.dist.constraints.real, (), ()))


@on_each_library
def test_gamma_batching_and_gradients(name: str) -> None:
    """Batched base, batched concentration or both, gradient inside and outside of vmap."""
    with using(name, "float64") as library:
        quantile = library.special.gamma_log_quantile
        a, z = library.array([0.01, 0.5, 3.0, 1e4]), library.array([[-8.0, -1, 2, 8], [5, 3, 0, -5]])
        grad = importlib.import_module("torch").func.grad if name == "torch" else importlib.import_module("jax").grad

        def everything(a: Any, z: Any) -> Any:
            rows = library.vmap(lambda row: quantile(a, row))
            return (
                quantile(a, z),
                rows(z),
                library.vmap(library.vmap(quantile), in_dims=(None, 0))(a, z) if name == "torch" else rows(z),
                grad(lambda a: library.vmap(lambda row: quantile(a, row))(z).sum())(a),
                library.vmap(grad(lambda a, z: quantile(a, z).sum()), (None, 0))(a, z).sum(0),
            )

        step = 1e-6
        run = library.compiled(everything)
        together, rows, each, outside, inside = map(numpy_of, run(a, z))
        scaled = [numpy_of(run(a * (1 + k * step), z)[0]).sum(0) for k in (-1, 1)]
        assert np.allclose(rows, together, rtol=1e-12)
        assert np.allclose(each, together, rtol=1e-12)
        assert np.allclose(outside, inside, rtol=1e-9)
        assert np.allclose((scaled[1] - scaled[0]) / (2 * step * numpy_of(a)), outside, rtol=1e-5)


@on_each_library
@pytest.mark.parametrize("precision", PRECISIONS)
def test_slope_of_log_ndtr_far_below(name: str, precision: str) -> None:
    """φ/Φ by erfcx, from the far tail, where z²/2 and log Φ(z) cancel, to where Φ is 1."""
    z = np.concatenate([-np.geomspace(1e30, 40.0, 60), np.linspace(-40.0, 10.0, 201)]).astype(precision)
    truth = np.sqrt(2.0 / np.pi) / special.erfcx(-z.astype(np.float64) / np.sqrt(2.0))
    with using(name, precision) as library, np.errstate(over="ignore"):
        slope = library.differentiated(lambda args: [library.special.log_ndtr(args[0][0])])
        (_, [[found]]) = slope([[z]])
        np.testing.assert_allclose(found, truth, rtol=2e-5 if precision == "float32" else 1e-12)
        (_, [[ends]]) = slope([[np.array([-np.inf, np.inf])]])
        assert list(ends) == [np.inf, 0.0]
        once = importlib.import_module("torch").func.grad if name == "torch" else importlib.import_module("jax").grad
        twice = once(once(library.special.log_ndtr))
        bend = [float(twice(library.array(x))) for x in (-1e6, -20.0, -1.0)]
        mills = np.sqrt(2.0 / np.pi) / special.erfcx(np.array([1e6, 20.0, 1.0]) / np.sqrt(2.0))
        exact = [-1.0, float(-mills[1] * (mills[1] - 20.0)), float(-mills[2] * (mills[2] - 1.0))]
        assert bend == pytest.approx(exact, rel=1e-3)
