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
from scipy import special, stats

from probest.programs.gaussianize import GaussianMap, UnsupportedDistribution, gaussian_map, mixture_map

for module in ("pyro.distributions", "numpyro.distributions"):  # here, as some draw random numbers when imported
    with contextlib.suppress(ImportError), warnings.catch_warnings():
        importlib.import_module(module)

TEST_FAILURE_RATE = 1e-6  # of each statistical test
DRAWS = 20_000
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
    differentiated: Callable[..., Any]  # fn -> (value, derivatives of its sum by each argument), in and out as numpy
    vmap: Callable[..., Any]


@contextlib.contextmanager
def using(name: str, precision: str) -> Iterator[Library]:
    if name == "torch":
        torch = pytest.importorskip("torch")
        dist = pytest.importorskip("pyro.distributions")
        from probest.backends import special_torch

        dtype = getattr(torch, precision)

        def differentiated(fn: Any) -> Any:
            def run(*args: Any) -> tuple[np.ndarray, list[np.ndarray]]:
                args = tuple(array(a).requires_grad_() for a in args)
                value = fn(*args)
                return numpy_of(value), [g.numpy() for g in torch.autograd.grad(value.sum(), args)]

            return run

        def array(x: Any) -> Any:
            return torch.as_tensor(x, dtype=dtype)

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield Library(name, dist, special_torch, array, differentiated, torch.func.vmap)
        finally:
            torch.set_num_threads(threads)
    else:
        jax = pytest.importorskip("jax")
        dist = pytest.importorskip("numpyro.distributions")
        from probest.backends import special_jax

        def jax_array(x: Any) -> Any:
            return jax.numpy.asarray(x, precision)

        def jax_differentiated(fn: Any) -> Any:
            def run(*args: Any) -> Any:
                value, pull = jax.vjp(fn, *args)
                return value, pull(jax.numpy.ones_like(value))

            compiled = jax.jit(run)
            return lambda *args: jax.tree.map(np.asarray, compiled(*map(jax_array, args)))

        with jax.enable_x64(precision == "float64"):
            yield Library(name, dist, special_jax, jax_array, jax_differentiated, jax.vmap)


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
    *(
        Line("Gamma", {"concentration": a, "rate": 2.0}, stats.gamma(a, scale=0.5))
        for a in (0.3, 2.5, 1e4)
    ),
    Line("Chi2", {"df": 3.0}, stats.chi2(3)),
    Line("InverseGamma", {"concentration": 2.5, "rate": 2.0}, stats.invgamma(2.5, scale=2)),
    Line(
        "Kumaraswamy",
        {"concentration1": 2.0, "concentration0": 3.0},
        lambda low, up: np.sqrt(-np.expm1(up / 3)),
    ),
    Line("AsymmetricLaplace", {"loc": 0.5, "scale": 2.0, "asymmetry": 1.5}, stats.laplace_asymmetric(1.5, 0.5, 2)),
    Line("SoftLaplace", {"loc": 0.0, "scale": 2.0}, lambda low, up: 2 * np.log(np.tan(np.pi / 2 * np.exp(np.minimum(low, up)))) * np.where(low < up, 1, -1)),
    Line("Levy", {"loc": 0.5, "scale": 2.0}, stats.levy(0.5, 2), JAX),
    Line("Gompertz", {"concentration": 2.0, "rate": 0.5}, stats.gompertz(2.0, scale=2.0), JAX),
    Line("Dagum", {"concentration": 2.0, "sharpness": 3.0, "scale": 1.5}, lambda low, up: 1.5 * np.expm1(-low / 2) ** (-1 / 3), JAX),
    Line("LogUniform", {"low": 0.5, "high": 4.0}, stats.loguniform(0.5, 4.0), JAX),
    Line("LowerTruncatedPowerLaw", {"alpha": -4.0, "low": 2.0}, stats.pareto(3, scale=2), JAX),
    Line("DoublyTruncatedPowerLaw", {"alpha": -1.0, "low": 0.5, "high": 4.0}, stats.loguniform(0.5, 4.0), JAX),
    Line("DoublyTruncatedPowerLaw", {"alpha": 1.0, "low": 0.0 + 1e-3, "high": 1.0}, lambda low, up: np.sqrt(1e-6 + np.exp(low) * (1 - 1e-6)), JAX),
    Line("GeneralizedPareto", {"loc": 0.5, "scale": 2.0, "concentration": 0.3}, stats.genpareto(0.3, 0.5, 2), TORCH),
    Line("ContinuousBernoulli", {"logits": -2.0}, stats.truncexpon(2.0, scale=0.5), TORCH),
    Line("SkewLogistic", {"loc": 0.5, "scale": 2.0, "asymmetry": 1.5}, lambda low, up: 0.5 - 2 * np.log(np.expm1(-low / 1.5)), TORCH),
    Line("InverseGamma", {"concentration": 0.5, "rate": 1.0}, stats.levy(0, 2)),
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


@on_each_precision
@on_each_library
@pytest.mark.parametrize("case", LINE, ids=label)
def test_line(case: Line, name: str, precision: str) -> None:
    if name not in case.libraries:
        pytest.skip(f"not in {name}'s library")
    with using(name, precision) as library:

        def value(z: Any, *parameters: Any) -> Any:
            fn = make(library, case.name, dict(zip(case.parameters, parameters, strict=True)))
            line = mapped(library, fn)
            assert line.base_shape == tuple(fn.batch_shape)
            assert not line.discrete
            return line.transform(z)

        run = library.differentiated(value)
        args = [Z, *(np.full_like(Z, v) for v in case.parameters.values())]
        x, slopes = run(*args)
        assert x.dtype == precision

        # Relative, also next to the end of a support at 0; near the middle of a law about 0, relative to its scale.
        expected = np.maximum(quantile(case.law, Z), np.finfo(precision).tiny if (x > 0).all() else -np.inf)
        scale = np.abs(expected[Z == 1] - expected[Z == 0])
        size = np.where(np.abs(Z) < 2, np.maximum(np.abs(expected), scale), np.abs(expected))
        assert (np.abs(x - expected) <= TOLERANCE[precision] * size).all(), (x, expected)

        assert all(np.isfinite(slope).all() for slope in slopes)
        assert (slopes[0] >= 0).all()
        assert (slopes[0][np.abs(Z) < 2] > 0).all()
        if precision == "float64":
            for i, slope in enumerate(slopes):
                step = 1e-4 * np.maximum(0.1, np.abs(args[i]))
                around = [[a + k * step if i == j else a for j, a in enumerate(args)] for k in (-2, -1, 1, 2)]
                a, b, c, d = (run(*point)[0] for point in around)
                difference = (a - 8 * b + 8 * c - d) / (12 * step)
                away = (Z != 0) | (case.name != "Laplace")  # which has a corner there
                error = np.abs(difference - slope) - 1e-5 * np.abs(slope) - 1e-11 * size / step
                assert (error[away] <= 0).all(), (i, difference, slope)
