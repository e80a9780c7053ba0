"""`moments` on whole functions, in both libraries, against exact moments and the other library."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from scipy.stats import norm

from probest.moments import MomentError, Quadrature, moments, register_rule, traced

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
            self.logsumexp = lambda x: torch.logsumexp(x, -1, keepdim=True)
            self.max, self.cumsum = torch.amax, lambda x: torch.cumsum(x, 0)
            self.array, self.xp = lambda x: torch.tensor(np.asarray(x)), torch
        else:
            import jax
            import jax.numpy as jnp

            self.relu, self.exp, self.tanh, self.where = jax.nn.relu, jnp.exp, jnp.tanh, jnp.where
            self.softmax = jax.nn.softmax
            self.maximum, self.sigmoid, self.abs, self.concat = jnp.maximum, jax.nn.sigmoid, jnp.abs, jnp.concatenate
            self.logsumexp = lambda x: jax.nn.logsumexp(x, axis=-1, keepdims=True)
            self.max, self.cumsum = jnp.max, jnp.cumsum
            self.array, self.xp = jnp.asarray, jnp

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


def composed(library: Library) -> dict[str, Any]:
    """Functions that users compose, of eight numbers."""
    a = library.array(np.random.default_rng(3).normal(size=(8, 8)) / 3)
    if library.name == "torch":
        import torch
        import torch.nn.functional as F

        names = (
            "relu leaky_relu elu selu celu gelu silu mish softplus softsign tanhshrink hardtanh relu6 hardswish "
            "hardsigmoid logsigmoid softshrink hardshrink tanh sigmoid"
        )
        found = {name: getattr(F, name) for name in names.split()}
        nn = torch.nn
        return found | {
            "threshold": lambda x: F.threshold(x, 0.1, -1.0),
            "glu": lambda x: F.glu(a @ x),
            "softmax": nn.Softmax(0),
            "log_softmax": nn.LogSoftmax(0),
            "tanh gelu": nn.GELU("tanh"),
            "mlp": lambda x: a @ torch.tanh(a @ x),
            "conv": lambda x: F.conv1d(x.reshape(1, 2, 4), a.reshape(4, 2, 8)[:, :, :3], padding=1),
            "transposed": lambda x: F.conv_transpose1d(x.reshape(1, 2, 4), a.reshape(2, 4, 8)[:, :, :3]),
            "max pool": lambda x: F.max_pool1d(x.reshape(1, 1, 8), 2),
            "average pool": lambda x: F.avg_pool1d(x.reshape(1, 1, 8), 2),
            "batch norm": nn.BatchNorm1d(4).double().eval().requires_grad_(False),
            "maximum": lambda x: x.max(),
            "margin": lambda x: x[0] - x[1:].max(),
            "logsumexp": lambda x: x.logsumexp(0),
            "clamp": lambda x: x.clamp(-0.5, 0.5),
            "mse": lambda x: F.mse_loss(x, a[0]),
            "cross entropy": lambda x: F.cross_entropy(x[None], torch.tensor([2])),
            "cumsum": lambda x: x.cumsum(0),
            "einsum": lambda x: torch.einsum("ij,j->i", a, x),
            "where": lambda x: torch.where(x > 0, x, x.exp() - 1),
            "layer norm": nn.LayerNorm(8).double().requires_grad_(False),
            "rms norm": nn.RMSNorm(8).double().requires_grad_(False),
            "normalize": lambda x: F.normalize(x, dim=0),
            "relu, then max pool": lambda x: F.max_pool1d(F.relu(x.reshape(1, 1, 8)), 2),
            "variance": lambda x: x.var(),
            "huber": lambda x: F.huber_loss(x, a[0], reduction="none"),
        }
    import jax
    import jax.numpy as jnp
    from jax import lax, nn

    names = (
        "relu relu6 sigmoid softplus sparse_plus soft_sign silu log_sigmoid leaky_relu hard_sigmoid hard_silu "
        "hard_tanh elu celu selu gelu squareplus mish softmax log_softmax logsumexp identity"
    )
    found = {name: getattr(nn, name) for name in names.split()}
    return found | {
        "glu": lambda x: nn.glu(a @ x),
        "standardize": nn.standardize,
        "layer norm": lambda x: (x - x.mean()) / jnp.sqrt(jnp.var(x) + 1e-5) * a[0] + a[1],
        "rms norm": lambda x: x * (lax.rsqrt(jnp.mean(x**2) + 1e-6) * a[0]),
        "exact gelu": lambda x: nn.gelu(x, approximate=False),
        "mlp": lambda x: a @ jnp.tanh(a @ x),
        "maximum": jnp.max,
        "margin": lambda x: x[0] - jnp.max(x[1:]),
        "where": lambda x: jnp.where(x > 0, x, jnp.exp(x) - 1),
        "clip": lambda x: jnp.clip(x, -0.5, 0.5),
        "var": jnp.var,
        "conv": lambda x: lax.conv(x.reshape(1, 2, 4), a.reshape(4, 2, 8)[:, :, :3], (1,), "SAME"),
        "max pool": lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (2,), (2,), "VALID"),
        "average pool": lambda x: lax.reduce_window(x, 0.0, lax.add, (2,), (2,), "VALID"),
        "cumsum": jnp.cumsum,
        "scan": lambda x: lax.scan(lambda c, t: (jnp.sin(c + t), c[0]), x, jnp.arange(2.0))[0],
        "loop": lambda x: lax.fori_loop(0, 2, lambda i, c: jnp.sin(c) + i, x),
        "while": lambda x: lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, jnp.sin(s[1])), (0, x))[1],
        "cond": lambda x: lax.cond(jnp.array(1) > 0, lambda y: 2 * y, lambda y: y, x),
        "einsum": lambda x: jnp.einsum("ij,j->i", a, x),
        "checkpoint": jax.checkpoint(lambda x: jnp.sin(a @ x)),
        "at": lambda x: x.at[2].set(1.0)[:3],
    }


def test_what_users_compose_needs_no_registration(library: Library) -> None:
    """Means and standard deviations of some forty functions against 20,000 draws; the bound is what moments neglect."""
    functions = composed(library)
    assert len(functions) >= 30
    mean = np.full(8, 0.3)
    draws = mean + np.random.default_rng(1).normal(size=(20_000, 8))
    for name, fn in functions.items():
        shaped = (lambda x, fn=fn: fn(x.reshape((2, 4)))) if name == "batch norm" else fn
        found, cov, _ = library.moments(shaped, mean, None)
        if library.name == "torch":
            import torch

            values = torch.func.vmap(shaped)(library.array(draws)).detach().numpy()
        else:
            import jax

            values = np.asarray(jax.vmap(shaped)(library.array(draws)))
        values = values.reshape(len(draws), -1)
        std = np.sqrt(np.diag(cov.reshape(values.shape[1], -1)))
        spread = values.std(0)
        assert np.abs(found.reshape(-1) - values.mean(0)).max() < 0.05 * spread.max() + 1e-9, name
        np.testing.assert_allclose(std, spread, rtol=0.1, atol=1e-9, err_msg=name)


def network(library: Library, parameters: Any) -> Any:
    a, b = parameters

    def fn(x: Any) -> Any:
        h = library.tanh(a @ library.relu(a @ x) + x)
        c = h - h.mean()
        return b @ (c * ((c * c).mean() + 0.01) ** -0.5 * a[0])

    return fn


def test_gradients_match_central_differences(library: Library) -> None:
    """Of a sum of means and variances in the weights, through an identity branch, a bend and a smooth function."""
    rng = np.random.default_rng(5)
    start = [rng.normal(size=(4, 4)) / 2, rng.normal(size=(2, 4))]
    direction = [rng.normal(size=s.shape) for s in start]

    def objective(parameters: Any) -> Any:
        fn, coarse = network(library, parameters), Quadrature(per_piece=24)
        found = moments(fn, library.array(MEAN[:4]), library.array(COV[:4, :4]), settings=coarse)
        return found.mean.sum() + found.variance.sum()

    if library.name == "torch":
        leaves = [library.array(s).requires_grad_() for s in start]
        objective(leaves).backward()
        slopes = [leaf.grad.numpy() for leaf in leaves]
    else:
        import jax

        slopes = [np.asarray(g) for g in jax.grad(objective)([library.array(s) for s in start])]
    step = 1e-5
    ends = [
        float(objective([library.array(s + sign * step * d) for s, d in zip(start, direction, strict=True)]))
        for sign in (1, -1)
    ]
    expected = (ends[0] - ends[1]) / (2 * step)
    found = sum(float((g * d).sum()) for g, d in zip(slopes, direction, strict=True))
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("case", ["leaky", "two bends", "jump", "steps of steps"])
def test_what_is_affine_in_pieces_is_as_by_quadrature(library: Library, case: str) -> None:
    """Closed forms against nodes, which a term that is not affine brings on."""
    slope, where = library.array(np.linspace(0.1, 2.0, 6)), library.where
    one, zero = library.array(1.0), library.array(0.0)
    fn = {
        "leaky": lambda x: where(x > 0, x, slope * x),
        "two bends": lambda x: library.maximum(library.relu(x + 1.0) - 0.5, 2.0 * x - 1.0),
        "jump": lambda x: where(x > 0.3, 2.0 * x + 1.0, -x),
        "steps of steps": lambda x: where(library.relu(x) - 0.5 > 0, one, zero) + where(x > 1.0, one, zero),
    }[case]
    mean, cov, cross = library.moments(fn)
    curved = library.moments(lambda x: fn(x) + 1e-9 * library.tanh(x))
    for found, by_nodes in zip((mean, cov, cross), curved, strict=True):
        close(found, by_nodes, 3e-7)


def test_covariances_found_backwards_are_the_same(library: Library) -> None:
    """Of a short output with a wide input, and their gradient: by pulling rows back, and as a whole."""
    rng = np.random.default_rng(3)
    start = [rng.normal(size=(12, 90)) / 9, rng.normal(size=12), rng.normal(size=(2, 12)), rng.normal(size=(90, 2))]

    def cross(arrays: Any, settings: Quadrature) -> Any:
        first, shift, last, _ = arrays
        fn = lambda x: last @ library.tanh(library.relu(first @ x + shift) + x[:12])  # noqa: E731
        return moments(fn, 0.0 * first[0], settings=settings).cross

    ways = [Quadrature(), Quadrature(backwards=1000)]
    if library.name == "torch":
        found, slopes = [], []
        for settings in ways:
            arrays = [library.array(x).requires_grad_() for x in start]
            value = cross(arrays, settings)
            (value * arrays[3]).sum().backward()
            found.append(value.detach().numpy())
            slopes.append(arrays[0].grad.numpy())
        close(slopes[0], slopes[1], 1e-10)
    else:
        found = [np.asarray(cross([library.array(x) for x in start], settings)) for settings in ways]
    close(found[0], found[1], 1e-12)


def test_a_traced_function_is_read_again_without_tracing(library: Library) -> None:
    calls = 0

    def fn(x: Any) -> Any:
        nonlocal calls
        calls += 1
        return library.tanh(library.array(W) @ x)

    once = traced(fn, library.array(MEAN))
    seen = calls
    for mean, cov in ((MEAN, COV), (2 * MEAN, 0.5 * COV)):
        again, plain = (
            library.moments(once, mean, cov),
            library.moments(lambda x: library.tanh(library.array(W) @ x), mean, cov),
        )
        for found, expected in zip(again, plain, strict=True):
            close(found, expected, 1e-12)
    assert calls == seen
    close(np.asarray(once(library.array(MEAN))), np.tanh(W @ MEAN))
    with pytest.raises(ValueError, match=r"traced on \(6,\)"):
        moments(once, library.array(MEAN[:5]))
    with pytest.raises(TypeError, match="traced"):
        traced(3.0, library.array(MEAN))  # type: ignore[arg-type]


def test_a_traced_module_sees_what_is_written_into_its_parameters() -> None:
    torch = pytest.importorskip("torch")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = torch.nn.Linear(6, 2).double()
    mean = torch.as_tensor(MEAN)
    once = traced(net, mean)
    with torch.no_grad():
        net.weight.mul_(3.0)
    close(moments(once, mean).mean.detach(), net(mean).detach())


def test_the_libraries_agree_and_so_does_single_precision() -> None:
    pytest.importorskip("torch")
    jax = pytest.importorskip("jax")
    rng = np.random.default_rng(7)
    w, v = rng.normal(size=(12, 12)) / 3, rng.normal(size=(3, 12)) / 3
    found = {}
    with jax.enable_x64(True):
        for name in ("torch", "jax"):
            library = Library(name)
            for kind in (np.float64, np.float32):
                a, b = library.array(w.astype(kind)), library.array(v.astype(kind))

                def fn(x: Any, a: Any = a, b: Any = b, library: Library = library) -> Any:
                    h = library.relu(a @ x)
                    return b @ (library.softmax(h) * 3.0 + library.tanh(h))

                result = library.moments(fn, np.full(12, 0.2, kind), None)
                assert all(part.dtype == kind for part in result)
                found[name, kind] = result
    for part in range(3):
        np.testing.assert_allclose(found["torch", np.float64][part], found["jax", np.float64][part], atol=1e-8)
        for name in ("torch", "jax"):
            np.testing.assert_allclose(found[name, np.float32][part], found[name, np.float64][part], atol=1e-3)


def test_rules_can_be_registered() -> None:
    torch = pytest.importorskip("torch")
    from probest.moments import fx

    before = dict(fx.RULES)
    try:
        mean = torch.tensor([0.5, -0.5], dtype=torch.float64)
        register_rule("aten.special_bessel_j0", elementwise=True)
        elementwise = moments(torch.special.bessel_j0, mean)
        register_rule("aten.special_bessel_j0", lambda p, step, x: p.multiply(x, 2.0))
        doubled = moments(torch.special.bessel_j0, mean)
    finally:
        fx.RULES.clear()
        fx.RULES.update(before)
    e = np.linspace(-12, 12, 100_001)
    from scipy.special import j0

    close(elementwise.mean[0], (norm.pdf(e) * j0(0.5 + e)).sum() * (e[1] - e[0]), 1e-8)
    close(doubled.mean, 2 * mean)


@pytest.mark.parametrize("rho", [-0.999, -0.99, -0.5, 0.9, 0.99, 0.999, 1.0])
def test_covariances_are_exact_up_to_collinear_arguments(library: Library, rho: float) -> None:
    """ReLU, abs and a step at six pairs of means, against integrals whose inner one is in closed form."""
    a, b = np.array([-4.0, -0.5, 0.0, 0.3, 1.0, 4.0]), np.array([3.0, 0.4, 0.0, -1.0, -0.7, 5.0])
    cov = np.block([[np.eye(6), rho * np.eye(6)], [rho * np.eye(6), np.eye(6)]])
    step = lambda x: library.where(x > 0, library.array(1.0), library.array(0.0))  # noqa: E731
    e, w = np.polynomial.legendre.leggauss(300)
    for name, fn in {"relu": library.relu, "abs": library.abs, "step": step}.items():
        _, found, _ = library.moments(fn, np.concatenate([a, b]), cov)
        for i in range(6):
            if rho == 1.0:
                cut = sorted({-9.0, 9.0, *np.clip([-a[i], -b[i]], -9, 9).tolist()})
            else:
                turn = -b[i] / rho
                near = 8 * np.sqrt(1 - rho * rho) / abs(rho)
                cut = sorted({-9.0, 9.0, *np.clip([-a[i], turn - near, turn, turn + near], -9, 9).tolist()})
            both = 0.0
            for low, high in itertools.pairwise(cut):
                x = low + (high - low) * (e + 1) / 2
                outer = a[i] + x
                f = {"relu": np.maximum(outer, 0), "abs": np.abs(outer), "step": (outer > 0) * 1.0}[name]
                m, sd = b[i] + rho * x, np.sqrt(1 - rho * rho) + 1e-15
                up, ramp = norm.cdf(m / sd), m * norm.cdf(m / sd) + sd * norm.pdf(m / sd)
                g = {"relu": ramp, "abs": 2 * ramp - m, "step": up}[name]
                both += (w * norm.pdf(x) * f * g).sum() * (high - low) / 2
            each = [
                {
                    "relu": m * norm.cdf(m) + norm.pdf(m),
                    "abs": m * (2 * norm.cdf(m) - 1) + 2 * norm.pdf(m),
                    "step": norm.cdf(m),
                }[name]
                for m in (a[i], b[i])
            ]
            assert found[i, 6 + i] == pytest.approx(both - each[0] * each[1], abs=1e-6), (name, i)


def test_an_error_names_the_users_line(library: Library) -> None:
    def fn(x: Any) -> Any:
        y = 2.0 * x
        if library.name == "torch":
            import torch

            return torch.sort(y).values
        import jax.numpy as jnp

        return jnp.sort(y)

    with pytest.raises(MomentError, match=r"test_moments_traced\.py:\d+"):
        library.moments(fn)


def test_truth_values_are_their_indicators(library: Library) -> None:
    """P(x_0 > 0), P(both > 0) of two independent and of two that are not, and how many are above 0."""
    mean, cov = np.array([0.5, -1.0, 2.0]), np.diag([1.0, 4.0, 1.0])
    p = norm.cdf(mean / np.sqrt(np.diag(cov)))
    found, spread, _ = library.moments(lambda x: x > 0, mean, cov)
    close(found, p, 1e-8)
    close(np.diag(spread), p * (1 - p), 1e-7)
    found, _, _ = library.moments(lambda x: (x[:1] > 0) & (x[1:2] > 0), mean, cov)
    close(found, [p[0] * p[1]], 1e-7)
    found, _, _ = library.moments(lambda x: (x[:1] > 0) | (x[1:2] > 0), mean, cov)
    close(found, [p[0] + p[1] - p[0] * p[1]], 1e-7)


@pytest.mark.parametrize("case", ["xor", "not", "any", "all", "chosen", "moved", "half adder"])
def test_circuits_of_independent_values_are_exact(library: Library, case: str) -> None:
    """Against all 2^5 combinations of the signs of five independent values; gates whose inputs share no value."""
    mean = np.array([0.5, -1.0, 2.0, 0.0, -0.3])
    xp = library.xp
    fn = {
        "xor": lambda b: (b[:1] ^ b[1:2]) ^ b[2:3],
        "not": lambda b: ~((b[:1] & b[1:2]) | b[2:3]),
        "any": lambda b: (b[:2] ^ b[2:4]).any()[None],
        "all": lambda b: b.all()[None],
        "chosen": lambda b: xp.where(b[:1] & b[1:2], b[2:3], b[3:4]) & b[4:],
        "moved": lambda b: xp.roll(b, 2)[:2] & xp.roll(b, 1)[1:3],
        "half adder": lambda b: library.concat([b[:2] ^ b[2:4], b[:2] & b[2:4]]),
    }[case]
    p = norm.cdf(mean)
    bits = np.array(list(itertools.product([False, True], repeat=5)))
    weights = np.prod(np.where(bits, p, 1 - p), axis=1)
    values = np.stack([np.asarray(fn(library.array(row)), float) for row in bits])
    found, cov, _ = library.moments(lambda x: xp.where(fn(x > 0), 1.0, 0.0), mean, None)
    expected = weights @ values
    close(found, expected, 1e-7)
    if case != "half adder":  # two gates of the same inputs: their covariance is of third order
        close(cov, (weights[:, None] * values).T @ values - np.outer(expected, expected), 1e-6)


def test_a_rare_gate_is_no_sum_over_points(library: Library) -> None:
    """All of 12 independent values beyond 1.5: 5e-15, in a row short enough for a sum over points."""
    found, _, _ = library.moments(lambda x: library.xp.where((x > 1.5).all()[None], 1.0, 0.0), np.zeros(12), None)
    assert math.log(found[0]) == pytest.approx(12 * norm.logsf(1.5), abs=1e-6)


def test_normalisation_is_exact_within_a_row(library: Library) -> None:
    """x / √mean x² of four independent N(0, 1): mean 0, covariance the identity; of a mean far out, by quadrature."""
    fn = lambda x: x * ((x * x).mean() + 0.0) ** -0.5  # noqa: E731
    mean, cov, _ = library.moments(fn, np.zeros(4), None)
    close(mean, np.zeros(4), 1e-9)
    close(cov, np.eye(4), 1e-6)
    mean, cov, cross = library.moments(fn, np.array([2.0, -1.0]), None)
    e, w = np.polynomial.hermite_e.hermegauss(200)
    x, y = 2.0 + e[:, None], -1.0 + e[None, :]
    u = x / np.sqrt((x * x + y * y) / 2)
    weights = w[:, None] * w[None, :] / (2 * np.pi)
    close(mean[0], (weights * u).sum(), 2e-3)  # the integrand jumps at the origin: that is the quadrature's error
    close(cov[0, 0], (weights * u**2).sum() - mean[0] ** 2, 2e-3)
    close(cross[0, 0], (weights * u * e[:, None]).sum(), 2e-3)


def test_largest_of_increasing_functions_is_that_of_the_largest(library: Library) -> None:
    """max(relu(x), relu(y)) of independent N(0, 1): the mean is that of max(x, y, 0), by quadrature."""
    mean, _, _ = library.moments(lambda x: library.max(library.relu(x)), np.zeros(2), None)
    e = np.linspace(-9, 9, 20_001)
    density = 2 * norm.pdf(e) * norm.cdf(e) * (e[1] - e[0])
    assert float(mean) == pytest.approx((density * np.maximum(e, 0)).sum(), rel=0.02)


def test_what_draws_random_numbers_is_refused() -> None:
    torch = pytest.importorskip("torch")
    mean = torch.zeros(3, dtype=torch.float64)
    with pytest.raises(MomentError, match="random numbers"):
        moments(lambda x: torch.nn.functional.dropout(x, 0.5), mean)
    dropout = torch.nn.Dropout(0.5)
    close(moments(dropout, mean).mean, np.zeros(3))
    assert dropout.training
    with pytest.raises(MomentError, match="could not be traced"):
        moments(lambda x: x if x[0] > 0 else -x, mean)


def test_functions_of_a_softmax(library: Library) -> None:
    """Σ p is 1 whatever x; entropy and Σ p² against a grid in three dimensions (their sums over points: 1e-2)."""
    exp, softmax = library.exp, library.softmax
    mean, root = np.array([0.3, -0.2, 0.5]), np.array([[1.0, 0.0, 0.0], [0.4, 0.8, 0.0], [-0.3, 0.5, 0.9]])
    total = library.moments(lambda x: softmax(x).sum(-1), mean, root @ root.T)
    close(total[0], 1.0, 1e-12)
    assert np.abs(total[1]).max() < 1e-12
    assert np.abs(total[2]).max() < 1e-12

    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    grid = np.stack([g.ravel() for g in np.meshgrid(nodes, nodes, nodes)], axis=1)
    weight = np.prod(np.stack([g.ravel() for g in np.meshgrid(weights, weights, weights)]), axis=0)
    weight = weight / weight.sum()
    x = mean + grid @ root.T
    raised = np.exp(x)
    p = raised / raised.sum(1, keepdims=True)

    def log_softmax(x: Any) -> Any:
        return x - library.logsumexp(x)

    cases = [
        (lambda x: softmax(x), p),
        (lambda x: -(softmax(x) * log_softmax(x)).sum(-1, keepdims=True), -(p * np.log(p)).sum(1, keepdims=True)),
        (lambda x: (softmax(x) ** 2).sum(-1, keepdims=True), (p * p).sum(1, keepdims=True)),
        (lambda x: (exp(x) / exp(x).sum(-1, keepdims=True))[..., :1], p[:, :1]),
        (lambda x: (x * x).sum(-1, keepdims=True) ** 0.5, np.sqrt((x * x).sum(1, keepdims=True))),
        (library.logsumexp, np.log(raised.sum(1, keepdims=True))),
        (lambda x: library.max(x, -1)[None], x.max(1, keepdims=True)),
    ]
    for fn, values in cases:
        average = weight @ values
        cov = (weight[:, None] * (values - average)).T @ (values - average)
        cross = (weight[:, None] * (x - mean)).T @ (values - average)
        found = library.moments(fn, mean, root @ root.T)
        std = np.sqrt(np.diag(cov)).max()
        close(found[0], average, 1e-2 * std)
        close(found[1], cov, 2e-2 * std**2)
        close(found[2], cross, 2e-2 * std)


def test_under_jit_it_says_that_it_cannot_be_compiled() -> None:
    jax = pytest.importorskip("jax")
    mean = jax.numpy.zeros(3)
    for fn in (lambda scale: moments(lambda x: scale * x, mean).mean, lambda at: moments(lambda x: 2.0 * x, at).mean):
        with pytest.raises(MomentError, match=r"outside of jax\.jit"):
            jax.jit(fn)(mean)
    slope = jax.grad(lambda scale: moments(lambda x: scale * x, mean).variance.sum())(mean + 2.0)
    np.testing.assert_allclose(slope, 4.0, rtol=1e-6)
