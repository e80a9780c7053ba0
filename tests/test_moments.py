"""Elementwise functions of Gaussians against closed forms, two-dimensional quadrature and central differences."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from scipy import integrate, stats
from scipy.special import erf, ndtr

from probest.backends.load import load_backend
from probest.moments.hermite import Quadrature, covariance, expand, hermite
from probest.moments.statistics import statistics

density = stats.norm.pdf
MEANS, STDS = np.array([-8.0, -1.5, 0.0, 0.3, 2.0, 8.0]), np.array([1.0, 2.0, 0.7, 1.0, 3.0, 1.0])


@contextlib.contextmanager
def special(backend: str) -> Iterator[Any]:
    """The special functions of a backend, in float64."""
    if backend == "pyro":
        yield load_backend("torch").special
        return
    import jax

    with jax.enable_x64(True):
        yield load_backend("jax").special


def arrays(s: Any, *values: Any) -> list[Any]:
    return [s.xp.asarray(np.asarray(value, float)) for value in values]


def relu(s: Any) -> Any:
    return lambda x: s.clip(x, 0.0, None)


def smoothed(name: str, a: Any, b: float) -> Any:
    """E f(a + b η), η standard normal: what f(y) is on average once x is known."""
    if name == "tanh":
        e = np.linspace(-9, 9, 1801)
        return np.tanh(a + b * e) @ density(e) * (e[1] - e[0])
    step, ramp = ndtr(a / b), a * ndtr(a / b) + b * density(a / b)
    return {"relu": ramp, "abs": 2 * ramp - a, "step": step}[name]


def reference(name: str, f: Any, m: tuple[float, float], sd: tuple[float, float], rho: float) -> float:
    """Cov(f(x), f(y)): y given x in closed form (tanh: the trapezoidal rule, exact here), x by adaptive quadrature."""
    rest = sd[1] * math.sqrt(1 - rho * rho)

    def mean_of(g: Any) -> float:
        kinks = [-m[0] / sd[0], float(np.clip(-m[1] / (sd[1] * rho), -8, 8))]
        options = {"points": kinks, "limit": 400, "epsabs": 1e-12, "epsrel": 1e-11}
        return float(integrate.quad(lambda e: g(e) * density(e), -9, 9, **options)[0])

    both = mean_of(lambda e: f(m[0] + sd[0] * e) * smoothed(name, m[1] + sd[1] * rho * e, rest))
    return both - smoothed(name, m[0], sd[0]) * smoothed(name, m[1], sd[1])


def test_relu_matches_its_closed_forms(backend: str) -> None:
    with special(backend) as s:
        o = expand(s, relu(s), *arrays(s, MEANS, STDS), breaks=(0.0,))
        found = {name: np.asarray(value) for name, value in statistics(s, o)._asdict().items()}
    t, v = MEANS / STDS, STDS**2
    p, d, upper = density(t), STDS, ndtr(t)
    mean = MEANS * upper + d * p
    variance = (MEANS**2 + v) * upper + MEANS * d * p - mean**2
    f2, f3 = p / d, -t * p / v
    expected = {
        "mean": mean, "variance": variance, "D": upper, "f2": f2, "f3": f3,
        "q": mean * (1 - upper), "dv": upper - mean * f2,
        "nu": 2 * (upper - upper**2 - mean * f2 - upper * f3 * v), "kappa": 2 * (mean * (1 - upper) - upper * f2 * v),
    }  # fmt: skip
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-9, atol=1e-12 * np.max(np.abs(value)), err_msg=name)


@pytest.mark.parametrize("name", ["exp", "sin", "square", "erf"])
def test_smooth_functions_match_their_closed_forms(backend: str, name: str) -> None:
    m, sd = np.array([-1.0, 0.0, 0.4]), np.array([0.5, 1.0, 1.3])
    v = sd**2
    closed = {
        "exp": (np.exp(m + v / 2), np.exp(2 * m + v) * np.expm1(v), np.exp(m + v / 2)),
        "sin": (
            np.sin(m) * np.exp(-v / 2),
            (1 - np.cos(2 * m) * np.exp(-2 * v)) / 2 - np.sin(m) ** 2 * np.exp(-v),
            np.cos(m) * np.exp(-v / 2),
        ),
        "square": (m * m + v, 2 * v * v + 4 * m * m * v, 2 * m),
        "erf": (erf(m / np.sqrt(1 + 2 * v)), None, 2 / np.sqrt(np.pi * (1 + 2 * v)) * np.exp(-m * m / (1 + 2 * v))),
    }[name]
    with special(backend) as s:

        def erf_of(x: Any) -> Any:
            return 2 * s.xp.exp(s.log_ndtr(x * 2**0.5)) - 1

        f = {"square": lambda x: x * x, "erf": erf_of}.get(name) or getattr(s.xp, name)
        found = statistics(s, expand(s, f, *arrays(s, m, sd)))
        for value, expected in zip((found.mean, found.variance, found.D), closed, strict=True):
            if expected is not None:
                np.testing.assert_allclose(np.asarray(value), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["relu", "tanh", "abs", "step"])
@pytest.mark.parametrize("rho", [-0.999, -0.5, 0.3, 0.9, 0.999])
def test_covariances_lie_within_the_stated_error(backend: str, name: str, rho: float) -> None:
    functions = {"relu": lambda x: np.maximum(x, 0), "tanh": np.tanh, "abs": np.abs, "step": lambda x: (x > 0) * 1.0}
    m, sd = (0.4, -1.1), (1.0, 2.0)
    with special(backend) as s:

        def step(x: Any) -> Any:
            return s.xp.where(x > 0, 1.0, 0.0) + 0.0 * x

        f = {"relu": relu(s), "tanh": s.xp.tanh, "abs": s.xp.abs, "step": step}[name]
        o = expand(s, f, *arrays(s, m, sd), breaks=() if name == "tanh" else (0.0,))
        found, bound = covariance(s, o, o, arrays(s, [[0.0, rho], [rho, 0.0]])[0])
        off = float(found[0, 1])
        scale = float(s.xp.max(o.variance))
    exact = reference(name, functions[name], m, sd, rho)
    assert abs(off - exact) <= (bound + 1e-9) * scale
    if name != "step":  # whose series converges too slowly near ±1: there the bound says so
        assert abs(off - exact) <= 1e-4 * scale


def test_two_functions_of_one_variable_keep_their_cancellation(backend: str) -> None:
    """x and f(x) on the same nodes: the covariance of the two is E[x f] − E x E f, and x − relu(x) is −relu(−x)."""
    with special(backend) as s:
        m, sd = arrays(s, [8.0], [1.0])
        difference = expand(s, lambda x: x - s.clip(x, 0.0, None), m, sd, breaks=(0.0,))
        mirrored = expand(s, relu(s), -m, sd, breaks=(0.0,))
        np.testing.assert_allclose(float(difference.mean[0]), -float(mirrored.mean[0]), rtol=1e-9)
        np.testing.assert_allclose(float(difference.variance[0]), float(mirrored.variance[0]), rtol=1e-9)
        cross, _ = covariance(s, expand(s, lambda x: x, m, sd), mirrored, arrays(s, [[-1.0]])[0])
        exact = integrate.quad(lambda e: e * max(-8 - e, 0) * density(e), -20, -8, epsabs=0)[0]
        np.testing.assert_allclose(float(cross[0, 0]), exact, rtol=1e-8)


def test_cumulants_of_the_residual_and_steep_functions(backend: str) -> None:
    """tanh(30 x) needs more nodes than at first; its residual's cumulants by adaptive quadrature in SciPy."""
    with special(backend) as s:
        o = expand(s, lambda x: s.xp.tanh(30 * x), *arrays(s, [0.2], [1.0]))
        found = statistics(s, o)
        assert o.error <= Quadrature().tolerance
        assert o.nodes.shape[0] > Quadrature().nodes + 1

    def moment(g: Any) -> float:
        ends = {"points": (-0.4, -0.2, 0.0), "limit": 400}
        return integrate.quad(lambda e: g(e, math.tanh(30 * (0.2 + e))) * density(e), -12, 12, **ends)[0]

    mean = moment(lambda e, f: f)
    slope = moment(lambda e, f: f * e)
    third, fourth, second = (moment(lambda e, f, k=k: (f - mean - slope * e) ** k) for k in (3, 4, 2))
    np.testing.assert_allclose(float(found.kappa3[0]), third, rtol=1e-6)
    np.testing.assert_allclose(float(found.kappa4[0]), fourth - 3 * second**2, rtol=1e-6)


def test_gradients_match_central_differences(backend: str) -> None:
    """Of E f and of the covariance, in the mean and standard deviation, through quadrature with a kink."""

    def total(s: Any, m: Any, sd: Any) -> Any:
        f = lambda x: s.xp.where(x > 0.3, x, 0.1 * x * x)  # noqa: E731
        o = expand(s, f, m, sd, breaks=(0.3,))
        matrix, _ = covariance(s, o, o, s.array([[0.0, 0.4], [0.4, 0.0]], m))
        return s.xp.sum(o.mean) + s.xp.sum(o.variance) + 3.0 * s.xp.sum(matrix)

    at, step = (np.array([0.1, -0.7]), np.array([1.2, 0.6])), 1e-5
    with special(backend) as s:
        if s.__name__.endswith("torch"):
            inputs = [x.requires_grad_() for x in arrays(s, *at)]
            total(s, *inputs).backward()
            slopes = [x.grad.numpy() for x in inputs]
        else:
            import jax

            slopes = [np.asarray(g) for g in jax.grad(lambda m, sd: total(s, m, sd), argnums=(0, 1))(*arrays(s, *at))]
        for which in (0, 1):
            for i in (0, 1):
                moved = [[x.copy() for x in at] for _ in range(2)]
                moved[0][which][i] += step
                moved[1][which][i] -= step
                up, down = (float(total(s, *arrays(s, *x))) for x in moved)
                np.testing.assert_allclose(slopes[which][i], (up - down) / (2 * step), rtol=1e-6, atol=1e-8)


def test_constants_and_bad_functions(backend: str) -> None:
    with special(backend) as s:
        m, sd = arrays(s, [0.5, -1.0], [0.0, 1.0])
        still = statistics(s, expand(s, relu(s), m, sd, breaks=(0.0,)))
        assert float(still.mean[0]) == pytest.approx(0.5)
        assert [float(value[0]) for value in still[2:]] == [0.0] * len(still[2:])
        with pytest.raises(ValueError, match="not finite within 12 standard deviations"):
            expand(s, lambda x: x / (x - x), m, sd)
        with pytest.raises(ValueError, match="entry by entry"):
            expand(s, lambda x: x[:1], m, sd)
        with pytest.raises(ValueError, match="counted from 1"):
            hermite(s, expand(s, relu(s), m, sd), 0)
    with pytest.raises(ValueError, match="nodes=0"):
        Quadrature(nodes=0)
