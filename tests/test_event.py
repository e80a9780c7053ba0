"""Programs as events: sites, layouts, batching, modules, and agreement of the two backends."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest
from library import library
from scipy import stats
from scipy.special import log_ndtr

from probest import Problem, ProblemError, SeverityError, Tempering, estimate
from probest.backends.base import BatchingError
from probest.evidence import Code
from probest.testing import FAILURE_RATE

QUIET: dict[str, Any] = {"progress": False}


def everything(lib: Any) -> Any:
    """A program with plates, a mixture, discrete and conditioned sites, and a dictionary as observation."""
    d = lib.dist

    def inner(scale: Any) -> Any:
        return lib.sample("inner", d.LogNormal(0.0, scale))

    def adversary() -> Any:
        kind = lib.sample("kind", d.Categorical(lib.array([0.2, 0.3, 0.5])))
        count = lib.sample("count", d.Poisson(3.0))
        with lib.plate("rows", 3):
            wind = lib.sample("wind", d.Normal(lib.array([0.0, 1.0, 2.0]), 1.0))
        share = lib.sample("share", d.Beta(2.0, 3.0))
        parts = lib.sample("parts", d.Dirichlet(lib.array([1.0, 2.0, 3.0])))
        mixed = lib.sample(
            "mixed",
            d.MixtureSameFamily(
                d.Categorical(lib.array([0.3, 0.7])), d.Normal(lib.array([-2.0, 2.0]), lib.array([1.0, 0.5]))
            ),
        )
        size = inner(0.5)
        lib.sample("seen", d.Normal(size, 1.0), obs=lib.array(1.5))
        lib.factor("liked", -0.5 * share)
        return {"kind": kind, "wind": wind, "rest": (count, share, parts, mixed, size)}

    return adversary


def summary(lib: Any, x: Any) -> Any:
    count, share, parts, mixed, size = x["rest"]
    return x["wind"].sum() + 1.0 * x["kind"] + 1.0 * count + share + parts[0] + mixed + size


@functools.cache  # compiled once for all tests
def of_everything(backend: str) -> Problem:
    lib = library(backend)
    return Problem(everything(lib), functools.partial(summary, lib), lambda x, y: y - 20.0)


def test_layout_and_decoding(backend: str) -> None:
    event = of_everything(backend).event
    names = [site.name for site in event.sites]
    assert names == ["kind", "count", "wind", "share", "parts", "mixed_component", "mixed", "inner"]
    assert event.dim == 1 + 1 + 3 + 2 + 3 + 1 + 1 + 1
    assert event.weighted
    assert event.discrete_sites == ("kind", "count", "mixed_component")
    z = np.random.default_rng(0).standard_normal((5, event.dim))
    cases = event.decode(z)
    assert cases.sites["wind"].shape == (5, 3)
    assert cases.observation["rest"][2].shape == (5, 3)
    np.testing.assert_allclose(cases.sites["wind"], z[:, 2:5] + [0, 1, 2], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(cases.sites["parts"].sum(1), 1.0, rtol=1e-5)
    at = event.evaluate(z)
    expected = stats.norm.logpdf(1.5, cases.sites["inner"], 1.0) - 0.5 * cases.sites["share"]
    np.testing.assert_allclose(at.log_weight, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(at.severity, cases.action - 20.0, rtol=1e-4, atol=1e-4)


def test_held_sites_add_their_density(backend: str) -> None:
    event = of_everything(backend).event
    z = np.random.default_rng(1).standard_normal((4, event.dim))
    held = event.site_values(z, ("kind", "wind"))
    free, kept = event.evaluate(z), event.evaluate(np.zeros_like(z) + z, held=held)
    extra = np.log(np.array([0.2, 0.3, 0.5])[held["kind"].astype(int)])
    extra = extra + stats.norm.logpdf(held["wind"], [0, 1, 2]).sum(1)
    np.testing.assert_allclose(kept.log_weight - free.log_weight, extra, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(kept.severity, free.severity, rtol=1e-4, atol=1e-4)


def test_the_same_program_in_both_libraries() -> None:
    """Same z, same severities and gradients; and, of a small program, the same estimates from the same seed."""
    found, results = {}, {}
    z = np.random.default_rng(2).standard_normal((50, 13))
    for name in ("pyro", "numpyro"):
        pytest.importorskip(name)
        lib = library(name)
        event = of_everything(name).event
        found[name] = event.evaluate(z, gradient=True)

        def small(lib: Any = lib) -> Any:
            return lib.sample("x", lib.dist.Normal(lib.xp.zeros(2), 1.0).to_event(1)).sum() + lib.sample(
                "g", lib.dist.Gumbel(0.0, 1.0)
            )

        problem = Problem(small, lambda x: x, lambda x, y: y - 9.0)
        results[name] = estimate(problem, estimator=Tempering(particles=256), **QUIET)
    one, two = found["pyro"], found["numpyro"]
    np.testing.assert_allclose(one.severity, two.severity, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(one.severity_grad, two.severity_grad, rtol=2e-3, atol=2e-3)
    first, second = results["pyro"], results["numpyro"]
    assert first.lower <= second.upper
    assert second.lower <= first.upper


@pytest.mark.parametrize("batching", ["vmap", "model", "loop"])
def test_batching_does_not_change_the_numbers(backend: str, batching: Any) -> None:
    lib = library(backend)

    def adversary() -> Any:
        return lib.sample("x", lib.dist.Normal(lib.xp.zeros(3), 1.0).to_event(1))

    problem = Problem(adversary, lambda x: 2.0 * x, lambda x, y: y[..., 0] - 1.0 + 0.0 * x[..., 0], batching=batching)
    z = np.random.default_rng(3).standard_normal((2, 3))
    at = problem.event.evaluate(z, gradient=True)
    np.testing.assert_allclose(at.severity, 2 * z[:, 0] - 1.0, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(at.severity_grad, np.tile([2.0, 0.0, 0.0], (2, 1)), atol=1e-6)
    assert problem.event.model_calls == 6


def test_chunks_do_not_change_the_numbers(backend: str) -> None:
    lib = library(backend)

    def adversary() -> Any:
        return lib.sample("x", lib.dist.Normal(lib.xp.zeros(3), 1.0).to_event(1))

    whole, pieces = (
        estimate(Problem(adversary, lambda x: x, lambda x, y: y[0] + y[1] - 5.0, chunk_size=size), **QUIET)
        for size in (10_000, 64)
    )
    assert whole.log_prob == pytest.approx(pieces.log_prob, abs=1e-6)
    assert whole.calls == pieces.calls


@pytest.mark.parametrize(("scale", "fine"), [(1e-2, True), (1e-4, True), (1e-5, False)])
@pytest.mark.parametrize("relative", [False, True])
def test_a_location_far_above_its_scale_is_in_the_error(backend: str, scale: float, fine: bool, relative: bool) -> None:
    """Floats near 10 are 1e-6 apart; also where the location is itself drawn."""
    lib = library(backend)

    def adversary() -> Any:
        base = lib.sample("base", lib.dist.Normal(lib.array(np.float32(10.0)), 0.1)) if relative else 10.0
        return base, lib.sample("x", lib.dist.Normal(base + lib.array(np.float32(0.0)), lib.array(np.float32(scale))))

    problem = Problem(adversary, lambda x: x, lambda _, y: (y[1] - y[0]) / scale - 5.0)
    result = estimate(problem, budget=20_000, seed=0, progress=False)
    truth = stats.norm.logsf(5.0)
    assert result.lower <= truth <= result.upper
    assert result.converged == fine
    assert (Code.ROUNDED in result.conclusion.codes) != fine
    if scale < 1e-3:
        assert result.std_error > 0.02


def test_same_seed_same_result(backend: str) -> None:
    lib = library(backend)
    problem = Problem(lambda: lib.sample("x", lib.dist.Normal(0.0, 1.0)), lambda x: x, lambda x, y: y - 4.0)
    first, again, other = (estimate(problem, seed=seed, **QUIET) for seed in (3, 3, 4))
    assert first.log_prob == again.log_prob
    assert first.log_prob != other.log_prob
    error = math.hypot(first.std_error, other.std_error)
    assert abs(first.log_prob - other.log_prob) < stats.norm.isf(FAILURE_RATE / 2) * max(error, 0.02)


def test_the_composed_program_is_an_ordinary_program(backend: str) -> None:
    lib = library(backend)

    def adversary() -> Any:
        return lib.sample("x", lib.dist.Exponential(1.0))

    problem = Problem(adversary, lambda x: {"a": x, "b": 2 * x}, lambda x, y: y["a"] - 1.0)
    if backend == "pyro":
        import pyro
        import torch

        with torch.random.fork_rng(devices=[]):
            plain = pyro.poutine.trace(problem.program).get_trace()
            mapped = pyro.poutine.trace(problem.gaussianized).get_trace()
        sites = {
            name: mapped.nodes[name]["value"].item() for name in ("x", "x_base", "severity", "catastrophe", "action_1")
        }
        assert plain.nodes["catastrophe"]["value"].item() == (plain.nodes["x"]["value"].item() >= 1)
        assert type(mapped.nodes["x_base"]["fn"]).__name__ in {"Normal", "Independent"}
    else:
        from numpyro import handlers

        plain = handlers.trace(handlers.seed(problem.program, 0)).get_trace()
        mapped = handlers.trace(handlers.seed(problem.gaussianized, 0)).get_trace()
        sites = {name: mapped[name]["value"].item() for name in ("x", "x_base", "severity", "catastrophe", "action_1")}
        assert plain["catastrophe"]["type"] == mapped["x"]["type"] == "deterministic"
        assert mapped["x_base"]["type"] == "sample"
    assert sites["x"] == pytest.approx(-log_ndtr(-sites["x_base"]), rel=1e-4)
    assert sites["severity"] == pytest.approx(sites["x"] - 1.0, rel=1e-4, abs=1e-6)
    assert sites["action_1"] == pytest.approx(2 * sites["x"], rel=1e-5)


def test_closed_loop(backend: str) -> None:
    """The adversary runs the model itself: a sum of four pushes through a linear controller."""
    lib = library(backend)

    def adversary(model: Any) -> Any:
        state, pushes = lib.xp.zeros(()), []
        for i in range(4):
            push = lib.sample(f"push_{i}", lib.dist.Normal(0.0, 1.0))
            state = state + push - model(state)
            pushes.append(push)
        return lib.xp.stack(pushes), state

    problem = Problem(adversary, lib.module(lambda w, s: w["gain"] * s, {"gain": 0.0}), lambda x, y: y - 8.0)
    result = estimate(problem, **QUIET)
    assert result.lower <= log_ndtr(-4.0) <= result.upper
    assert set(result.catastrophes) >= {f"push_{i}" for i in range(4)}


def test_modules_of_jax() -> None:
    jax = pytest.importorskip("jax")
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    def adversary() -> Any:
        return numpyro.sample("x", dist.Normal(jnp.zeros(4), 1.0).to_event(1))

    def check(model: Any) -> None:
        result = estimate(Problem(adversary, model, lambda x, y: y[0] - 1.5 + x[0]), **QUIET)
        value, grads = jax.value_and_grad(lambda m: result.log_prob_at(model=m), allow_int=True)(model)
        assert float(value) == pytest.approx(result.log_prob, abs=1e-3)
        sizes = [float(jnp.abs(g).max()) for g in jax.tree.leaves(grads) if jnp.issubdtype(g.dtype, jnp.floating)]
        assert max(sizes) > 0

    equinox = pytest.importorskip("equinox")
    linear = equinox.nn.Linear(4, 1, key=jax.random.key(0))
    result = estimate(Problem(adversary, linear, lambda x, y: y[0] - 1.5 + x[0]), **QUIET)
    grads = equinox.filter_grad(lambda m: result.log_prob_at(model=m))(linear)
    assert float(jnp.abs(grads.weight).max()) > 0

    pytest.importorskip("flax")
    from flax import linen, nnx

    dense = linen.Dense(1)
    check(jax.tree_util.Partial(dense.apply, dense.init(jax.random.key(1), jnp.zeros(4))))

    layer = nnx.Linear(4, 1, rngs=nnx.Rngs(0))
    result = estimate(Problem(adversary, layer, lambda x, y: y[0] - 1.5 + x[0]), **QUIET)
    grads = nnx.grad(lambda m: result.log_prob_at(model=m))(layer)
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads)) > 0


def test_modules_of_torch_keep_their_mode() -> None:
    torch = pytest.importorskip("torch")
    import pyro
    import pyro.distributions as dist

    with torch.random.fork_rng(devices=[]):
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
    model[0].eval()
    modes = [m.training for m in model.modules()]
    problem = Problem(
        lambda: pyro.sample("x", dist.Normal(torch.zeros(4), 1.0).to_event(1)), model, lambda x, y: y[0] + x[0] - 3.0
    )
    result = estimate(problem, estimator=Tempering(particles=64), **QUIET)
    assert [m.training for m in model.modules()] == modes
    result.log_prob_at().backward()
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is not None for p in model.parameters())


def test_param_sites_can_be_differentiated(backend: str) -> None:
    lib = library(backend)

    def adversary() -> Any:
        shift = lib.param("shift", lib.array(0.5))
        return lib.sample("x", lib.dist.Normal(shift, 1.0))

    problem = Problem(adversary, lambda x: x, lambda x, y: y - 4.0)
    try:
        result = estimate(problem, **QUIET)
        hazard = math.exp(stats.norm.logpdf(3.5) - log_ndtr(-3.5))
        if backend == "pyro":
            import torch

            shift = torch.tensor(0.5, requires_grad=True)
            result.log_prob_at(params={"shift": shift}).backward()
            slope = shift.grad.item()
        else:
            import jax
            import jax.numpy as jnp

            slope = float(jax.grad(lambda s: result.log_prob_at(params={"shift": s}))(jnp.array(0.5)))
        assert slope == pytest.approx(hazard, rel=0.03)
    finally:
        if backend == "pyro":
            import pyro

            pyro.clear_param_store()


def test_pyro_modules_as_adversaries() -> None:
    """PyroParam and PyroSample inside a PyroModule: gradients must not be silently zero."""
    torch = pytest.importorskip("torch")
    import pyro
    import pyro.distributions as dist
    from pyro.nn import PyroModule, PyroParam, PyroSample

    class Adversary(PyroModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.shift = PyroParam(torch.tensor(0.5))
            self.noise = PyroSample(dist.Normal(0.0, 1.0))

        def forward(self) -> Any:
            return self.shift + self.noise

    before = dict(pyro.settings.get())
    adversary = Adversary()
    result = estimate(Problem(adversary, lambda x: x, lambda x, y: y - 4.0), **QUIET)
    result.log_prob_at().backward()
    hazard = math.exp(stats.norm.logpdf(3.5) - log_ndtr(-3.5))
    assert (
        adversary.shift_unconstrained.grad.item() == pytest.approx(hazard, rel=0.03)
        if hasattr(adversary, "shift_unconstrained")
        else True
    )
    grads = [p.grad for p in adversary.parameters()]
    assert any(g is not None and abs(g.item()) > 1.0 for g in grads)
    assert dict(pyro.settings.get()) == before


def test_interval_and_worst_case(backend: str) -> None:
    lib = library(backend)
    problem = Problem(lambda: lib.sample("x", lib.dist.Normal(0.0, 1.0)), lambda x: x, lambda x, y: y - 3.0)
    result = estimate(problem, **QUIET)
    low, high = result.interval(0.5)
    assert result.lower < low < result.log_prob < high < result.upper
    assert result.interval(0.95) == pytest.approx((result.lower, result.upper))
    p = result.prob
    for kl in (0.1, 1.0, 4.0):
        q = result.worst_case(kl=kl)
        assert q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p)) == pytest.approx(kl, rel=1e-6)
    assert result.worst_case(kl=0.0) == pytest.approx(p)
    assert result.worst_case(kl=-result.log_prob + 1) == 1.0


def test_observations_without_the_model(backend: str) -> None:
    lib = library(backend)

    def open_loop() -> Any:
        return lib.sample("x", lib.dist.Normal(lib.xp.zeros(2), 1.0).to_event(1))

    z = np.random.default_rng(0).standard_normal((4, 2))
    event = Problem(open_loop, lambda x: x.sum(), lambda x, y: y - 3.0).event
    np.testing.assert_allclose(np.asarray(event.observe(z)), z, rtol=1e-6)

    def closed_loop(model: Any) -> Any:
        x = open_loop()
        return x, model(x)

    event = Problem(closed_loop, lambda x: x.sum(), lambda x, y: y - 3.0).event
    with pytest.raises(ProblemError, match=r"closed loop.*decode"):
        event.observe(z)


@pytest.mark.parametrize("layer", ["LSTM", "GRU"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_models_without_a_batching_rule_are_called_on_whole_batches(layer: str, batch_first: bool) -> None:
    """If that gives the numbers of single runs: where the batch is not first, stacked cases are another case."""
    lib = library("pyro")
    torch = pytest.importorskip("torch")

    class Recurrent(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            with torch.random.fork_rng():
                torch.manual_seed(0)
                self.recurrent = getattr(torch.nn, layer)(3, 8, batch_first=batch_first)

        def forward(self, x: Any) -> Any:
            return self.recurrent(x)[0][..., -1, 0]

    model = Recurrent()
    built = Problem(
        lambda: lib.sample("x", lib.dist.Normal(lib.xp.zeros((5, 3)), 1.0).to_event(2)), model, lambda x, y: y - 0.4
    )
    if not batch_first:
        with pytest.raises(BatchingError, match="batching='loop'"):
            _ = built.event
        return
    assert built.event.composition.batching == "model"
    z = np.random.default_rng(0).standard_normal((6, 15))
    x = lib.array(built.event.site_values(z, ("x",))["x"].astype(np.float32))
    single = [model(one).item() - 0.4 for one in x]
    assert built.event.severity(z) == pytest.approx(single, abs=1e-5)


def far_nan(lib: Any, limit: float, both: bool = False) -> Problem:
    """x₁ ≥ limit (or |x₁|), of two standard normal values; NaN beyond 21.8, where floats of a wilder model overflow."""

    def adversary() -> Any:
        return lib.sample("x", lib.dist.Normal(lib.xp.zeros(2), 1.0).to_event(1))

    def checker(x: Any, y: Any) -> Any:
        size = lib.xp.abs(x[0]) if both else x[0]
        return lib.xp.where(x[0] > 21.8, float("nan"), size) - limit

    return Problem(adversary, lambda x: x, checker)


def test_a_nan_where_the_adversary_never_gets_is_no_catastrophe(backend: str) -> None:
    event = far_nan(library(backend), 3.0).event
    found = event.evaluate(np.array([[25.0, 0.0], [4.0, 0.0]]), gradient=True)
    assert found.severity_grad is not None
    assert found.severity[0] < -1e20
    assert found.severity[1] == pytest.approx(1.0)
    np.testing.assert_array_equal(found.severity_grad[0], 0.0)
    assert event.undefined == 1
    result = estimate(far_nan(library(backend), 3.0), budget=5_000, seed=0, **QUIET)
    assert result.converged
    assert result.log_prob == pytest.approx(float(log_ndtr(-3.0)), abs=4 * result.std_error + 1e-3)


def test_a_nan_where_it_may_get_is_an_error(backend: str) -> None:
    nan_at_three = Problem(
        far_nan(library(backend), 3.0).adversary,
        lambda x: x,
        lambda x, y: library(backend).xp.where(y[0] > 2.9, float("nan"), y[0]) - 3.0,
    )
    with pytest.raises(SeverityError, match="NaN"):
        estimate(nan_at_three, budget=5_000, seed=0, **QUIET)


def test_an_answer_about_as_unlikely_as_a_nan_is_not_believed(backend: str) -> None:
    result = estimate(far_nan(library(backend), 22.0, both=True), budget=5_000, seed=0, **QUIET)
    assert not result.converged
    assert Code.UNDEFINED in result.conclusion.codes
