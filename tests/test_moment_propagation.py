"""Moment propagation against closed forms, enumeration over modes and plain sampling, in both libraries."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
from scipy import stats
from scipy.special import log_ndtr

from probest import MomentPropagation, Problem, estimate
from probest.backends.load import load_backend
from probest.checkers import all_of, any_of, negate
from probest.estimators import Combined, UnmetNeedError
from probest.estimators.moments import advance, elsewhere
from probest.estimators.moments import read as event_layers
from probest.evidence import Code, Population
from probest.moments.layers import layers
from probest.moments.parting import parted
from probest.moments.tilt import Tilting
from tests.library import gradient, library

QUIET: dict[str, Any] = {"progress": False, "budget": 5_000}


def normal(lib: Any, dim: int) -> Any:
    return lambda: lib.sample("x", lib.dist.Normal(lib.xp.zeros(dim), 1.0).to_event(1))


def read(adversary: Any, model: Any, checker: Any, **options: Any) -> Any:
    return estimate(Problem(adversary, model, checker), estimator=MomentPropagation(**options), **QUIET)


def test_a_half_space_is_exact(backend: str) -> None:
    lib = library(backend)
    result = read(normal(lib, 5), lambda x: x, lambda x, y: y.sum() - 30.0)
    assert result.converged
    assert result.log_prob == pytest.approx(log_ndtr(-30 / np.sqrt(5)), rel=1e-5)
    assert result.std_error < 1e-6


def test_two_half_spaces_are_joined_without_counting_twice(backend: str) -> None:
    lib = library(backend)
    result = read(normal(lib, 2), lambda x: x, lambda x, y: lib.xp.maximum(y[0] - 3.0, -y[0] - 2.9))
    assert result.conclusion.diagnostics["modes"] == 2
    assert result.log_prob == pytest.approx(np.log(stats.norm.sf(3.0) + stats.norm.sf(2.9)), abs=0.02)


@pytest.mark.parametrize("written", ["combined", "by hand", "monotone"])
@pytest.mark.parametrize("kind", ["any", "all", "both"])
def test_the_parts_of_a_checker_are_read_apart(backend: str, kind: str, written: str) -> None:
    """Half-spaces, correlated: against the multivariate normal law.

    By hand: maxima and minima in a checker's code; monotone: a function of them that has the same sign.
    """
    lib = library(backend)
    rows = np.array([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0], [-0.6, 0.0, 0.8]])
    limits = {"any": (3.0, 2.8, 3.1), "all": (0.9, 1.4, 0.2), "both": (3.5, 0.5, 0.9)}[kind]
    cov = rows @ rows.T
    if kind == "any":
        none = stats.multivariate_normal(cov=cov, abseps=1e-9, releps=1e-9, seed=0).cdf(np.array(limits))
        expected = np.log1p(-none)
    else:

        def together(*which: int, sign: Any = (1.0, 1.0, 1.0)) -> float:
            at, flip = list(which), np.asarray(sign)[list(which)]
            law = stats.multivariate_normal(cov=cov[np.ix_(at, at)] * np.outer(flip, flip), abseps=1e-10, seed=0)
            return float(law.cdf(-flip * np.array(limits)[at]))

        expected = np.log(together(0, 1, 2))
        if kind == "both":  # the first, or the second without the third
            other = (1.0, 1.0, -1.0)
            expected = np.log(stats.norm.sf(limits[0]) + together(1, 2, sign=other) - together(0, 1, 2, sign=other))
    arrays = lib.xp.asarray(np.asarray(rows, np.float32))

    def beyond(j: int) -> Any:
        return lambda x, y: y[j] - limits[j]

    parts = [beyond(j) for j in range(3)]
    checker = {
        "any": lambda: any_of(*parts),
        "all": lambda: all_of(*parts),
        "both": lambda: any_of(parts[0], all_of(parts[1], negate(parts[2]))),
    }[kind]()
    if written != "combined":
        ends = lib.xp.asarray(np.asarray(limits, np.float32))
        checker = {
            "any": lambda x, y: (y - ends).max(),
            "all": lambda x, y: (y - ends).min(),
            "both": lambda x, y: lib.xp.maximum(y[0] - ends[0], lib.xp.minimum(y[1] - ends[1], ends[2] - y[2])),
        }[kind]
    if written == "monotone":
        plain = checker
        checker = {
            "any": lambda x, y: lib.xp.tanh(0.5 * plain(x, y) - 0.7) + math.tanh(0.7),
            "all": lambda x, y: 3.0 - 3.0 * lib.xp.exp(-2.0 * plain(x, y)),
            "both": lambda x, y: lib.xp.tanh(lib.xp.exp(plain(x, y))) - math.tanh(1.0),
        }[kind]
    result = read(normal(lib, 3), lambda x: arrays @ x, checker)
    assert result.converged, result.advice
    assert result.log_prob == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("kind", ["any", "all"])
def test_parts_of_a_wide_network_against_sampling(any_backend: str, kind: str) -> None:
    """Two outputs of one network, whose severities have a layer in common: 4e5 draws, as above."""
    lib, rng = library(any_backend), np.random.default_rng(5)
    W, w = rng.normal(size=(128, 40)) / np.sqrt(40), rng.normal(size=(2, 128)) / np.sqrt(128)
    z = rng.standard_normal((400_000, 40))
    s = np.concatenate([np.maximum(part @ W.T, 0.0) @ w.T for part in np.array_split(z, 20)])
    limits = s.mean(axis=0) + (3.0 if kind == "any" else 1.3) * s.std(axis=0)
    hits = int((s >= limits).any(axis=1).sum() if kind == "any" else (s >= limits).all(axis=1).sum())
    arrays = [lib.xp.asarray(np.asarray(a, np.float32)) for a in (W, w)]

    def model(x: Any) -> Any:
        h = arrays[0] @ x
        return arrays[1] @ lib.xp.maximum(h, 0 * h)

    parts = [lambda x, y, j=j: y[j] - float(limits[j]) for j in range(2)]
    result = read(normal(lib, 40), model, any_of(*parts) if kind == "any" else all_of(*parts))
    assert result.converged, result.advice
    assert result.std_error < 0.1
    assert abs(result.log_prob - np.log(hits / len(s))) <= result.std_error + 4 / np.sqrt(hits)


def test_each_part_is_what_it_is_alone(backend: str) -> None:
    lib, rng = library(backend), np.random.default_rng(6)
    W, w = rng.normal(size=(64, 20)) / np.sqrt(20), rng.normal(size=(3, 64)) / 8.0
    arrays = [lib.xp.asarray(np.asarray(a, np.float32)) for a in (W, w)]
    parts = [lambda x, y, j=j: y[j] - 1.5 for j in range(3)]

    def model(x: Any) -> Any:
        return arrays[1] @ lib.xp.tanh(arrays[0] @ x)

    event = Problem(normal(lib, 20), model, any_of(*parts)).event
    every = MomentPropagation().each(event, budget=1_000, seed=np.random.SeedSequence(0))
    assert sum(line.calls for line in every) <= 1_000
    for part, line in zip(parts, every, strict=True):
        alone = read(normal(lib, 20), model, part).conclusion
        assert line.log_prob == pytest.approx(alone.log_prob, abs=1e-6)
        assert line.std_error == pytest.approx(alone.std_error, abs=1e-6)
        assert line.converged
    switched = Problem(lambda: lib.sample("k", lib.dist.Bernoulli(0.5)), lambda x: x, lambda x, y: 1.0 * y - 3.0)
    with pytest.raises(UnmetNeedError, match=r"discrete sites|gradient"):
        MomentPropagation().each(switched.event, budget=10, seed=np.random.SeedSequence(0))


@pytest.mark.parametrize("backend", ["pyro"], indirect=True)  # in JAX nothing of it is compiled: half a minute
def test_the_gradient_of_parts_is_that_of_the_number(backend: str) -> None:
    """In the limits of two half-spaces, together and apart, against differences of the same reading."""
    lib = library(backend)

    def problem(shift: float, combine: Any) -> tuple[Problem, Any]:
        model = lib.module(
            lambda p, x: (x[0] + p["shift"], 0.6 * x[0] + 0.8 * x[1], p["shift"]), {"shift": lib.array(shift)}
        )
        parts = [lambda x, y: y[0] - 1.0, lambda x, y: y[1] - 1.5]
        return Problem(normal(lib, 3), model, combine(*parts)), model

    def larger(one: Any, other: Any) -> Any:
        return lambda x, y: lib.xp.maximum(one(x, y), 2.0 * other(x, y))

    def likelier(one: Any, other: Any) -> Any:  # the modes are of the first parts alone
        return any_of(larger(one, other), lambda x, y: y[0] - 30.0)

    def monotone(one: Any, other: Any) -> Any:
        return lambda x, y: lib.xp.tanh(larger(one, other)(x, y)) - lib.xp.tanh(1.7 * y[2])

    for combine in (all_of, any_of, larger, likelier, monotone):
        there, model = problem(0.2, combine)
        result = estimate(there, estimator=MomentPropagation(), **QUIET)
        value, slopes = gradient(backend, result, model=model)
        assert value == pytest.approx(result.log_prob, rel=1e-5)
        ends = [
            float(estimate(problem(at, combine)[0], estimator=MomentPropagation(), **QUIET).log_prob)
            for at in (0.25, 0.15)
        ]
        assert slopes["shift"] == pytest.approx((ends[0] - ends[1]) / 0.1, rel=5e-3)


@pytest.mark.parametrize("case", ["square", "sphere", "flat"])
def test_what_is_far_from_linear_is_not_converged(backend: str, case: str) -> None:
    lib = library(backend)
    severity = {
        "square": lambda x, y: y[0] ** 2 - 16.0,
        "sphere": lambda x, y: (y**2).sum() - 40.0,
        "flat": lambda x, y: lib.xp.tanh(30 * (y[0] - 3)) + 0.2 * lib.xp.sin(9 * y[1]),
    }[case]
    result = read(normal(lib, 4), lambda x: x, severity)
    assert not result.converged
    assert result.log_prob < 0
    assert result.conclusion.notes


@pytest.mark.parametrize("slope", [0.3, 1.5])
def test_a_share_is_read_as_a_margin(backend: str, slope: float) -> None:
    """softmax(x₁, b x₂, 0)₁ ≥ p: x₁ ≥ log(exp(b x₂) + 1) + logit p, against a sum over x₂."""
    lib, (softmax, _) = library(backend), _softmaxes(backend)
    grid = np.linspace(-9.0, 9.0, 4001)
    beyond = np.logaddexp(slope * grid, 0.0) + np.log(0.9 / 0.1)
    expected = float(np.log(np.trapezoid(stats.norm.pdf(grid) * stats.norm.sf(beyond), grid)))
    scales = lib.array([1.0, slope, 0.0])
    result = read(
        normal(lib, 2), lambda x: softmax(scales * lib.xp.stack([x[0], x[1], 0.0 * x[0]])), lambda x, y: y[0] - 0.9
    )
    assert abs(result.log_prob - expected) <= result.std_error + 1e-3
    assert abs(result.log_prob - expected) < 0.05


def test_a_weak_curvature_is_put_back(backend: str) -> None:
    """x₁ + c |x|² ≥ t, against Imhof's form of it: a noncentral chi-square."""
    lib, dim, c, t = library(backend), 20, 0.05, 5.0
    result = read(normal(lib, dim), lambda x: x, lambda x, y: y[0] + c * (y**2).sum() - t)
    expected = stats.ncx2(dim, 1 / (2 * c) ** 2).logsf((t + 1 / (4 * c)) / c)
    plain, corrected = (line.log_prob for line in result.ledger)
    assert result.converged
    assert abs(corrected - expected) <= result.std_error
    assert abs(corrected - expected) < 0.5 * abs(plain - expected)


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_a_wide_network_against_sampling(backend: str, activation: str) -> None:
    """128 wide, P about 1e-3: 4e5 draws of an independent forward pass, 4 standard errors and what is stated."""
    lib, rng = library(backend), np.random.default_rng(3)
    W = [rng.normal(size=(128, 40)) / np.sqrt(40), rng.normal(size=(128, 128)) / np.sqrt(128)]
    w, b = rng.normal(size=128) / np.sqrt(128), rng.normal(size=128) / 3
    f = {"relu": lambda x: np.maximum(x, 0), "tanh": np.tanh}[activation]
    z = rng.standard_normal((400_000, 40))
    s = np.concatenate([f(f(part @ W[0].T + b) @ W[1].T) @ w for part in np.array_split(z, 20)])
    threshold = float(np.quantile(s, 0.999))
    hits = int((s >= threshold).sum())
    arrays = [lib.xp.asarray(np.asarray(a, np.float32)) for a in (*W, w, b)]

    def model(x: Any) -> Any:
        g = {"relu": lambda x: lib.xp.maximum(x, 0 * x), "tanh": lib.xp.tanh}[activation]
        return arrays[2] @ g(arrays[1] @ g(arrays[0] @ x + arrays[3]))

    result = read(normal(lib, 40), model, lambda x, y: y - threshold)
    assert result.converged, result.conclusion.notes
    assert result.std_error < 0.2
    assert abs(result.log_prob - np.log(hits / len(s))) <= result.std_error + 4 / np.sqrt(hits)


def test_both_libraries_read_the_same_number() -> None:
    """Of two parts, whose severities have a layer in common, behind a switch."""
    rng = np.random.default_rng(12)
    W, w = rng.normal(size=(16, 6)) / np.sqrt(6), rng.normal(size=(2, 16)) / 4
    found = []
    for name in ("pyro", "numpyro"):
        pytest.importorskip(name)
        lib = library(name)
        arrays = [lib.xp.asarray(np.asarray(a, np.float32)) for a in (W, w)]

        def adversary(lib: Any = lib) -> Any:
            return lib.sample("s", lib.dist.Bernoulli(0.01)), lib.sample(
                "x", lib.dist.Normal(lib.xp.zeros(6), 1.0).to_event(1)
            )

        def model(case: Any, lib: Any = lib, arrays: Any = arrays) -> Any:
            return arrays[1] @ lib.xp.tanh(arrays[0] @ case[1]) + 0.5 * case[0]

        found.append(read(adversary, model, any_of(lambda x, y: y[0] - 2.5, lambda x, y: y[1] - 2.7)).log_prob)
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_what_cannot_be_read_is_refused(backend: str) -> None:
    lib = library(backend)

    def switched() -> Any:
        return lib.sample("x", lib.dist.Normal(0.0, 1.0)) + lib.sample("k", lib.dist.Bernoulli(0.5))

    with pytest.raises(UnmetNeedError, match=r"discrete sites.*max_strata.*k cannot be held"):
        read(switched, lambda x: x, lambda x, y: y - 3.0, max_strata=1)
    with pytest.raises(UnmetNeedError, match="gradient"):
        read(normal(lib, 2), lambda x: x, lambda x, y: y.sum() > 3.0)


def test_the_look_sees_what_is_neglected(backend: str) -> None:
    """Saturating severities, of two inputs alone: more draws about the tilt are catastrophes than foreseen."""
    lib = library(backend)
    tanh = lib.xp.tanh
    result = read(normal(lib, 3), lambda x: x, lambda x, y: tanh(3 * y[0]) + tanh(3 * y[1]) - 1.7)
    assert not result.converged
    assert Code.DISAGREE in result.conclusion.codes
    linear = read(normal(lib, 3), lambda x: x, lambda x, y: y.sum() - 6.0)
    assert Code.DISAGREE not in linear.conclusion.codes


def test_without_a_look_nothing_is_converged(backend: str) -> None:
    lib = library(backend)
    result = read(normal(lib, 3), lambda x: x, lambda x, y: y.sum() - 6.0, look=0)
    assert not result.converged
    assert result.calls == 0


def test_the_gradient_is_that_of_the_number(backend: str) -> None:
    """Of log P in a shift and a scale of a hidden layer's weights, against differences of the same reading."""
    lib, rng = library(backend), np.random.default_rng(4)
    W, w = rng.normal(size=(48, 8)) / np.sqrt(8), rng.normal(size=48) / np.sqrt(48)
    arrays = [lib.xp.asarray(np.asarray(a, np.float32)) for a in (W, w)]

    def problem(scale: float, shift: float) -> tuple[Problem, Any]:
        def act(p: Any, x: Any) -> Any:
            return arrays[1] @ lib.xp.tanh(p["scale"] * (arrays[0] @ x) + p["shift"])

        model = lib.module(act, {"scale": lib.array(scale), "shift": lib.array(shift)})
        return Problem(normal(lib, 8), model, lambda x, y: y - 1.5), model

    def log_prob(scale: float, shift: float) -> float:
        tuning = Tilting(rounds=6, close=1e-6)
        return float(estimate(problem(scale, shift)[0], estimator=MomentPropagation(tuning=tuning), **QUIET).log_prob)

    there, model = problem(1.0, 0.1)
    result = estimate(there, estimator=MomentPropagation(), **QUIET)
    value, slopes = gradient(backend, result, model=model)
    assert value == pytest.approx(result.log_prob, rel=1e-5)
    step = 2e-2
    expected = {
        "scale": (log_prob(1 + step, 0.1) - log_prob(1 - step, 0.1)) / (2 * step),
        "shift": (log_prob(1.0, 0.1 + step) - log_prob(1.0, 0.1 - step)) / (2 * step),
    }
    for name, slope in expected.items():
        assert float(slopes[name]) == pytest.approx(slope, rel=1e-2)  # single precision


@pytest.mark.parametrize("case", ["residual", "softmax", "product", "largest", "normalised"])
def test_layers_are_the_function(backend: str, case: str) -> None:
    """Whatever is read, brought into layers, gives the function's own values."""
    lib, rng = library(backend), np.random.default_rng(8)
    xp = lib.xp
    A, B, C = (xp.asarray(np.asarray(rng.normal(size=shape) / 2, np.float32)) for shape in ((6, 5), (5, 6), (4, 5)))

    def softmax(x: Any) -> Any:
        raised = xp.exp(x)
        return raised / raised.sum()

    def normalised(x: Any) -> Any:
        centred = x - x.mean()
        return centred / xp.sqrt((centred**2).mean() + 1e-2)

    functions = {
        "residual": lambda x: C @ (x + B @ xp.tanh(A @ x)) ** 3,
        "softmax": lambda x: xp.log(softmax(C @ x)) * 0.5 + softmax(A @ x)[:4],
        "product": lambda x: (C @ x) * (C @ xp.sin(x)) - (C @ x) @ (C @ xp.cos(x)),
        "largest": lambda x: xp.maximum(C @ x, C @ xp.tanh(x)) + (A @ x).max(),
        "normalised": lambda x: C @ normalised(x) + xp.abs(C @ x),
    }
    fn = functions[case]
    z = rng.standard_normal((20, 5))
    inside = load_backend("torch" if backend == "pyro" else "jax")
    found = layers(fn, inside.from_host(np.zeros(5))).on_host(inside)(z)
    expected = np.stack([np.asarray(inside.to_host(fn(inside.from_host(row)))) for row in z])
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-4)


def _softmaxes(backend: str) -> tuple[Any, Any]:
    """Softmax and its logarithm of a vector."""
    if backend == "pyro":
        import torch

        return partial(torch.softmax, dim=0), partial(torch.log_softmax, dim=0)
    import jax

    return jax.nn.softmax, jax.nn.log_softmax


@pytest.mark.parametrize(
    ("case", "branches", "together"),
    [
        ("sum", 4, 1),
        ("range", 4, 1),
        ("least", 2, 4),
        ("smooth", 1, 1),
        ("narrow", 4, 1),
        ("many", 1, 1),
        ("slope", 2, 1),
        ("deep", 1, 1),
        ("share", 1, 1),
        ("log-share", 1, 1),
        ("largest share", 3, 1),
        ("sigmoid", 2, 1),
    ],
)
def test_ends_of_functions_are_taken_apart(backend: str, case: str, branches: int, together: int) -> None:
    """The largest of the branches is the function's own value at random points, or has its sign."""
    lib, rng = library(backend), np.random.default_rng(9)
    xp = lib.xp
    softmax, log_softmax = _softmaxes(backend)
    A, B = (xp.asarray(np.asarray(rng.normal(size=shape) / 2, np.float32)) for shape in ((4, 5), (9, 5)))
    functions = {
        "sum": lambda x: xp.maximum(x[0], x[1]) + xp.abs(xp.tanh(A @ x)[2] - 0.3),
        "range": lambda x: 2.0 * (A @ xp.tanh(x)).max() - 1.0,
        "least": lambda x: xp.maximum(xp.minimum(x[0], x[1]), (A @ x)[2:].min() - xp.abs(x[4])) - 0.1,
        "smooth": lambda x: xp.tanh(A @ x).sum(),
        "narrow": lambda x: (xp.maximum(A[:2] @ x, 0.0 * x[:2])).sum() + x[0],
        "many": lambda x: (B @ x).max(),
        "slope": lambda x: xp.maximum(0.1 * x[0], 3.0 * x[0]) + x[1],
        "share": lambda x: softmax(A @ x)[1] - 0.4,
        "log-share": lambda x: log_softmax(B @ x)[7] + 2.0,
        "largest share": lambda x: softmax(A[:3] @ x).max() - 0.5,
        "sigmoid": lambda x: 1.0 / (1.0 + xp.exp(-(A @ x)[:2].max())) - 0.6,
    }

    def deep(x: Any) -> Any:  # 2^16 sides, taken one by one
        for _ in range(8):
            x = xp.maximum(A[:, :4] @ x[:4], 0.0 * x[:4]) - 0.1
        return x.sum()

    fn = (functions | {"deep": deep})[case]
    z = rng.standard_normal((20, 5))
    inside = load_backend("torch" if backend == "pyro" else "jax")
    found = parted(layers(fn, inside.from_host(np.zeros(5))).on_host(inside))
    assert len(found.branches) == branches
    assert max(len(branch) for branch in found.branches) >= together
    expected = np.stack([np.asarray(inside.to_host(fn(inside.from_host(row)))) for row in z])
    told = found.severity(found(z))
    if found.signs:
        assert 0 < (expected >= 0).sum() < len(z)
        np.testing.assert_array_equal(told >= 0, expected >= 0)
    else:
        np.testing.assert_allclose(told, expected, rtol=2e-3, atol=2e-4)


def test_the_default_reads_a_wide_network_and_another_search_bears_it_out(any_backend: str) -> None:
    """96 wide, P about 1e-4: 1e6 draws of an independent forward pass, 4 standard errors and what is stated."""
    lib, rng = library(any_backend), np.random.default_rng(7)
    W, w, b = rng.normal(size=(96, 40)) / np.sqrt(40), rng.normal(size=96) / np.sqrt(96), rng.normal(size=96) / 3

    def drawn() -> np.ndarray:
        return np.concatenate([np.maximum(rng.standard_normal((50_000, 40)) @ W.T + b, 0) @ w for _ in range(20)])

    threshold = float(np.quantile(drawn(), 0.9999))
    share = float(np.mean(drawn() > threshold))
    W_, w_, b_ = (lib.array(part.astype(np.float32)) for part in (W, w, b))

    def model(x: Any) -> Any:
        h = W_ @ x + b_
        return lib.xp.maximum(h, 0 * h) @ w_

    problem = Problem(normal(lib, 40), model, lambda _, y: y - threshold)
    result = estimate(problem, progress=False, budget=50_000, seed=0)
    assert result.converged
    assert result.conclusion.claim == "heuristic"
    assert abs(result.conclusion.diagnostics["elsewhere"]) < 0.3
    assert result.calls < 25_000
    assert abs(result.log_prob - np.log(share)) < result.std_error + 4 / np.sqrt(share * 1e6)
    assert len(result.catastrophes["x"]) >= 100
    without = estimate(problem, estimator=Combined(read=False), progress=False, budget=5_000, seed=0)
    assert all(line.method != "moment propagation" for line in without.ledger)


def test_the_mean_of_catastrophes_is_foreseen() -> None:
    """x₁ + c |x|² ≥ t: E[x₁ | C] is how log P of a noncentral chi-square moves with a shift of x₁."""
    lib, dim, c, t = library("pyro"), 20, 0.05, 5.0
    problem = Problem(normal(lib, dim), lambda x: x, lambda _, y: y[0] + c * (y**2).sum() - t)
    result = estimate(problem, estimator=MomentPropagation(starts=0), **QUIET)
    above, below = (stats.ncx2(dim, (1 / (2 * c) + d) ** 2).logsf((t + 1 / (4 * c)) / c) for d in (1e-3, -1e-3))
    length = float(np.linalg.norm(result.conclusion.weigher.tilts[0].input))
    ours = advance(event_layers(problem.event), result.conclusion) * length
    assert ours == pytest.approx((above - below) / 2e-3, rel=0.02)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_catastrophes_elsewhere_are_seen(share: float) -> None:
    """Two half-spaces, rounded off where they meet, one of which a reading from the middle alone does not know of."""
    lib, rng = library("pyro"), np.random.default_rng(0)

    def larger(_: Any, y: Any) -> Any:
        one, other = y[0] - 3.0, y[1] - 3.5
        return 0.5 * (one + other + lib.xp.sqrt((one - other) ** 2 + 1e-2))

    problem = Problem(normal(lib, 3), lambda x: x, larger)
    reading = estimate(problem, estimator=MomentPropagation(starts=0), **QUIET).conclusion
    z = rng.standard_normal((2000, 3))
    known = np.abs(reading.weigher.tilts[0].input[:2]).argmax()
    other = rng.random(2000) < share
    z[np.arange(2000), np.where(other, 1 - known, known)] = stats.truncnorm.rvs(
        3.0, np.inf, size=2000, random_state=rng
    )
    zeros = np.zeros(2000)
    found, error = elsewhere(reading, 1.0, Population(z, zeros, zeros, None, 2000.0), 2000.0)
    assert abs(found - share) < 0.1 + 4 * error


def test_what_the_output_does_not_depend_on_is_left_out(backend: str) -> None:
    """The log-probability of an observed site is computed beside the severity, and is no layer of it."""
    lib = library(backend)

    def adversary() -> Any:
        x = lib.sample("x", lib.dist.Normal(lib.xp.zeros(40), 1.0).to_event(1))
        lib.sample("seen", lib.dist.Normal(x, 0.5).to_event(1), obs=lib.xp.zeros(40))
        return x

    net = event_layers(Problem(adversary, lambda x: lib.xp.tanh(x[:3]), lambda _, y: y.sum() - 2.0).event)
    assert [layer.linear.size for layer in net.layers] == [3]
    z = np.random.default_rng(0).standard_normal((5, 40))
    assert net(z)[:, 0] == pytest.approx(np.tanh(z[:, :3]).sum(1) - 2.0, abs=1e-5)


def test_strata_are_added_up(any_backend: str) -> None:
    """A rare switch and three half-spaces: Σ p_k Φ(−β_k)."""
    lib, rng = library(any_backend), np.random.default_rng(0)
    direction, far = rng.normal(size=(3, 15)).astype(np.float32), np.linspace(4.2, 6.8, 3)
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    A, betas = lib.array(direction), lib.array(far.astype(np.float32))

    def adversary() -> Any:
        s = lib.sample("s", lib.dist.Bernoulli(3e-4))
        k = lib.sample("k", lib.dist.Categorical(lib.array(np.full(3, 1 / 3, np.float32))))
        return s, k, lib.sample("x", lib.dist.Normal(lib.xp.zeros(15), 1.0).to_event(1))

    def checker(case: Any, y: Any) -> Any:
        s, k, _ = case
        return (A[k] * y).sum() - lib.xp.where(s == 1, 1.0, betas[k])

    result = read(adversary, lambda case: case[2], checker)
    seldom, mostly = log_ndtr(-1.0), np.logaddexp.reduce(log_ndtr(-far) - np.log(3))
    expected = np.logaddexp(np.log(3e-4) + seldom, np.log1p(-3e-4) + mostly)
    assert result.converged
    assert result.log_prob == pytest.approx(expected, abs=1e-4)
    assert len(result.ledger) == 2 * 6 + 1
    assert result.calls <= 5_000


def test_the_gradient_goes_through_the_probabilities_of_strata(backend: str) -> None:
    """P = p Φ(−2) + (1 − p) Φ(−4), in the logit of p."""
    lib = library(backend)

    def switched(params: Any) -> Any:
        s = lib.sample("s", lib.dist.Bernoulli(logits=params["logit"]))
        return s, lib.sample("x", lib.dist.Normal(lib.xp.zeros(4), 1.0).to_event(1))

    adversary = lib.module(switched, {"logit": lib.array(-4.0)})
    problem = Problem(adversary, lambda case: case[1], lambda case, y: y[0] - lib.xp.where(case[0] == 1, 2.0, 4.0))
    result = estimate(problem, estimator=MomentPropagation(), **QUIET)
    value, slopes = gradient(backend, result, adversary=adversary)
    p, a, b = 1 / (1 + np.exp(4.0)), np.exp(log_ndtr(-2.0)), np.exp(log_ndtr(-4.0))
    assert value == pytest.approx(np.log(p * a + (1 - p) * b), abs=1e-4)
    assert slopes["logit"] == pytest.approx(p * (1 - p) * (a - b) / (p * a + (1 - p) * b), rel=1e-3)
