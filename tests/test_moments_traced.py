"""`moments` on whole functions, in both libraries, against exact moments and the other library."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from scipy.stats import norm

from probest.moments import MomentError, moments, register_rule

RNG = np.random.default_rng(0)
W, V, MEAN = RNG.normal(size=(5, 6)) / 2, RNG.normal(size=(3, 5)), RNG.normal(size=6)
ROOT = RNG.normal(size=(6, 6)) / 3
COV = ROOT @ ROOT.T + 0.1 * np.eye(6)


class Library:
    """What a function under test is written in."""

    def __init__(self, name: str) -> None:
        self.name = name
        if name == "torch":
            import torch

            self.relu, self.exp, self.tanh, self.where = torch.relu, torch.exp, torch.tanh, torch.where
            self.softmax = lambda x: torch.softmax(x, -1)
            self.maximum, self.sigmoid, self.abs, self.concat = torch.maximum, torch.sigmoid, torch.abs, torch.cat
            self.max, self.cumsum = torch.amax, lambda x: torch.cumsum(x, 0)
            self.array = lambda x: torch.tensor(np.asarray(x))
        else:
            import jax
            import jax.numpy as jnp

            self.relu, self.exp, self.tanh, self.where = jax.nn.relu, jnp.exp, jnp.tanh, jnp.where
            self.softmax = jax.nn.softmax
            self.maximum, self.sigmoid, self.abs, self.concat = jnp.maximum, jax.nn.sigmoid, jnp.abs, jnp.concatenate
            self.max, self.cumsum = jnp.max, jnp.cumsum
            self.array = jnp.asarray

    def moments(self, fn: Any, mean: Any = MEAN, cov: Any = COV, **options: Any) -> tuple[Any, Any, Any]:
        found = moments(fn, self.array(mean), None if cov is None else self.array(cov), **options)
        return np.asarray(found.mean), np.asarray(found.cov), np.asarray(found.cross)


@pytest.fixture
def library(backend: str) -> Iterator[Library]:
    with contextlib.ExitStack() as stack:
        if backend == "numpyro":
            import jax

            stack.enter_context(jax.enable_x64(True))
        yield Library("torch" if backend == "pyro" else "jax")


def close(found: Any, expected: Any, tolerance: float = 1e-9) -> None:
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


def test_affine_functions_are_exact(library: Library) -> None:
    w, v = library.array(W), library.array(V)

    def fn(x: Any) -> Any:
        h = w @ x + 1.0
        y = v @ (h.reshape((5, 1)) * 2.0).reshape((5,)) - 0.5
        return library.concat([y, library.cumsum(x[1:3])])

    matrix = np.concatenate([2 * V @ W, [[0, 1, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0]]])
    mean, cov, cross = library.moments(fn)
    close(mean, np.concatenate([2 * V @ (W @ MEAN + 1) - 0.5, [MEAN[1], MEAN[1] + MEAN[2]]]))
    close(cov, matrix @ COV @ matrix.T)
    close(cross, COV @ matrix.T)


def test_one_hidden_layer_of_relu_is_exact(library: Library) -> None:
    """E relu(h) and Cov(relu(h), x) in closed form; what the output's variance is, from the covariance of two relu."""
    mean, _, cross = library.moments(lambda x: library.relu(library.array(W) @ x))
    h, sd = W @ MEAN, np.sqrt(np.diag(W @ COV @ W.T))
    close(mean, h * norm.cdf(h / sd) + sd * norm.pdf(h / sd), 1e-8)
    close(cross, COV @ W.T * norm.cdf(h / sd), 1e-8)


@pytest.mark.parametrize("case", ["rest", "swish", "branches", "product", "twice"])
def test_what_is_written_in_pieces_is_one_function(library: Library, case: str) -> None:
    """Against quadrature over the one entry that matters: E and Var of f(x_0), f from several operations."""
    wide = np.array([0.3, -1.0, 8.0])
    functions = {
        "rest": (lambda x: x - library.relu(x), lambda x: np.minimum(x, 0)),
        "swish": (lambda x: x * library.sigmoid(x), lambda x: x / (1 + np.exp(-x))),
        "branches": (lambda x: library.where(x > 1, x, library.exp(x) - 1), lambda x: np.where(x > 1, x, np.expm1(x))),
        "product": (lambda x: library.exp(-x) * library.exp(0.5 * x), lambda x: np.exp(-0.5 * x)),
        "twice": (lambda x: library.relu(library.relu(x) ** 2 - 1), lambda x: np.maximum(np.maximum(x, 0) ** 2 - 1, 0)),
    }  # fmt: skip
    written, f = functions[case]
    mean, cov, cross = library.moments(written, wide, np.array([1.0, 4.0, 1.0]))
    e = np.linspace(-12, 12, 2_000_001)
    w = norm.pdf(e) * (e[1] - e[0])
    for i, (m, sd) in enumerate(zip(wide, (1.0, 2.0, 1.0), strict=True)):
        y = f(m + sd * e)
        first = w @ y
        close(mean[i], first, 1e-6)
        close(cov[i, i], w @ (y - first) ** 2, 2e-6)
        close(cross[i, i], sd * (w @ (y * e)), 1e-6)


def test_bilinear_forms_are_exact(library: Library) -> None:
    a = library.array(W[:, :5])
    mean, cov, _ = library.moments(lambda x: x[:5] @ (a @ x[:5]))
    A, S, m = (W[:, :5] + W[:, :5].T) / 2, COV[:5, :5], MEAN[:5]
    close(mean, np.trace(A @ S) + m @ A @ m)
    close(cov, 2 * np.trace(A @ S @ A @ S) + 4 * m @ A @ S @ A @ m)


def test_the_larger_of_two_is_clarks(library: Library) -> None:
    mean, cov, cross = library.moments(lambda x: library.maximum(x[:1], x[1:2]))
    theta = np.sqrt(COV[0, 0] + COV[1, 1] - 2 * COV[0, 1])
    a = (MEAN[0] - MEAN[1]) / theta
    first = MEAN[0] * norm.cdf(a) + MEAN[1] * norm.cdf(-a) + theta * norm.pdf(a)
    second = (
        (MEAN[0] ** 2 + COV[0, 0]) * norm.cdf(a) + (MEAN[1] ** 2 + COV[1, 1]) * norm.cdf(-a)
        + (MEAN[0] + MEAN[1]) * theta * norm.pdf(a)
    )  # fmt: skip
    close(mean, [first], 1e-8)
    close(cov, [[second - first**2]], 1e-6)
    close(cross[:, 0], COV[0] * norm.cdf(a) + COV[1] * norm.cdf(-a), 1e-8)


def test_an_operation_without_a_rule_is_named_and_can_be_linearised(library: Library) -> None:
    if library.name == "torch":
        import torch

        sort, op = (lambda x: torch.sort(x).values), "aten.sort"
    else:
        import jax.numpy as jnp

        sort, op = jnp.sort, "sort"
    with pytest.raises(MomentError, match=op):
        library.moments(sort)
    with pytest.warns(UserWarning, match=op):
        mean, _, _ = library.moments(sort, linearize=True)
    close(mean, np.sort(MEAN))


def test_input_is_checked(library: Library) -> None:
    for cov, message in [
        (np.eye(5), "shape"), (np.full((6, 6), np.nan), "finite"), (-np.eye(6), "eigenvalues"), (ROOT, "symmetric"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            library.moments(lambda x: x, cov=cov)
    with pytest.raises(ValueError, match="finite"):
        library.moments(lambda x: x, np.array([np.inf]), None)
    with pytest.raises(TypeError, match="torch tensor or a JAX array"):
        moments(lambda x: x, np.zeros(3))
    with pytest.raises(TypeError, match="several arrays"):
        library.moments(lambda x: (x, x))
    with pytest.raises(ValueError, match="exactly one"):
        register_rule("aten.sort", linear=True, elementwise=True)
