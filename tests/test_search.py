"""Searching for the worst adversary within a budget: against closed forms, plain sampling and independent densities."""

from __future__ import annotations

import functools
import importlib.util
import math
from typing import Any

import numpy as np
import pytest
from library import library
from scipy import stats
from scipy.special import log_ndtr

from probest import MonteCarlo, Problem, ProblemError, Tempering, estimate, search
from probest.adversaries import Flow, Learnable, Tilt
from probest.adversaries.base import ratio_of
from probest.adversaries.tilts import TiltLaw
from probest.estimators.base import Estimator
from probest.guides.mixture import Mixture
from probest.testing import FAILURE_RATE

DIM = 6
LIMITS = (3.9, 3.8, 3.7, 3.6)
QUICK: dict[str, Any] = {"kl": 4.0, "steps": 60, "refine": 30, "progress": False}


def normals(backend: str) -> tuple[Any, Any]:
    lib = library(backend)
    return lib, lambda: lib.sample("x", lib.dist.Normal(lib.xp.zeros(DIM), 1.0).to_event(1))


@functools.cache  # compiled once for all tests
def half_space(backend: str) -> Problem:
    _, adversary = normals(backend)
    return Problem(adversary, lambda x: x.sum() / DIM**0.5, lambda x, y: y - 4.5)


@functools.cache  # compiled once for all tests
def union(backend: str) -> Problem:
    lib, adversary = normals(backend)
    signs = lib.array([1.0, 1.0, -1.0, 1.0])
    return Problem(adversary, lambda x: signs * x[:4], lambda x, y: (y - lib.array(LIMITS)).max())


def worst(log_p: float, kl: float) -> float:
    """log of the p with kl(p ‖ P) = kl, on a grid: independent of :meth:`Estimate.worst_case`."""
    p = np.exp(np.linspace(log_p, -1e-6, 200_001))
    spent = p * (np.log(p) - log_p) + (1 - p) * (np.log1p(-p) - math.log1p(-math.exp(log_p)))
    return float(np.log(p[np.searchsorted(spent, kl)]))


def check(found: Any, exact: float, kl: float, estimator: Estimator | None = None) -> None:
    assert found.kl == pytest.approx(kl, abs=0.02 * kl + 5 * found.kl_error)
    assert found.interval[0] <= found.log_prob <= found.interval[1]
    assert found.interval[0] <= worst(exact, kl) + 0.02  # nothing can do better
    assert found.worst_case == pytest.approx(worst(exact, found.kl), abs=0.1)
    assert found.efficiency > 0.5
    # the adversary as a program, estimated like any other
    again = estimate(found.problem, budget=20_000, estimator=estimator, progress=False)
    assert again.log_prob == pytest.approx(found.log_prob, abs=5 * again.std_error + 0.05)


def test_a_half_space(backend: str) -> None:
    found = search(half_space(backend), **QUICK)
    check(found, float(log_ndtr(-4.5)), 4.0)
    assert found.efficiency > 0.8
    assert found.coverage == 1.0
    assert found.converged
    assert "->" in repr(found)


@pytest.mark.parametrize("backend", ["pyro"], indirect=True)  # the host's part; compiling takes a minute
def test_all_modes_of_a_union_are_kept(backend: str) -> None:
    found = search(union(backend), **QUICK)
    exact = math.log(-math.expm1(sum(float(np.log1p(-stats.norm.sf(limit))) for limit in LIMITS)))
    check(found, exact, 4.0)
    assert found.coverage > 0.99
    # the modes of its catastrophes, by the union itself
    points = found.law.draw(found.parts, 4_000, np.random.default_rng(0))
    beyond = np.array([1.0, 1.0, -1.0, 1.0]) * points["z"][:, :4] - LIMITS
    caught = beyond.max(axis=1) >= 0.0
    kept = np.bincount(beyond[caught].argmax(axis=1), minlength=4) / caught.sum()
    share = stats.norm.sf(LIMITS) / stats.norm.sf(LIMITS).sum()
    assert (kept >= 0.5 * share).all()


@pytest.mark.parametrize("backend", ["pyro"], indirect=True)  # the host's part; compiling takes a minute
def test_from_random_places(backend: str) -> None:
    found = search(union(backend), Tilt(components=6, from_particles=False), **(QUICK | {"steps": 300}))
    assert found.efficiency > 0.5
    assert found.coverage > 0.7


@pytest.mark.parametrize("backend", ["pyro"], indirect=True)  # the host's part; compiling takes half a minute
def test_a_rare_switch(backend: str) -> None:
    lib, normal = normals(backend)
    problem = Problem(
        lambda: (lib.sample("on", lib.dist.Bernoulli(1e-3)), normal()),
        lambda case: case[1].sum() / DIM**0.5,
        lambda case, y: y - lib.xp.where(case[0] == 1, 2.0, 6.0),
    )
    found = search(problem, **QUICK)
    p = 1e-3 * stats.norm.sf(2.0) + 0.999 * stats.norm.sf(6.0)
    check(found, math.log(p), 4.0)
    assert found.efficiency > 0.9


def test_a_program_with_parameters(backend: str) -> None:
    lib, _ = normals(backend)

    def program(w: Any) -> Any:
        return lib.sample("x", lib.dist.Normal(w["mean"], lib.xp.exp(w["log_scale"])).to_event(1))

    learnt = lib.module(program, {"mean": lib.xp.zeros(DIM), "log_scale": lib.xp.zeros(DIM)})
    found = search(half_space(backend), learnt, **(QUICK | {"steps": 150, "learning_rate": 0.05}))
    check(found, float(log_ndtr(-4.5)), 4.0)
    # its density relative to the given adversary, by scipy
    points = found.law.draw(found.parts, 50, np.random.default_rng(0))
    owned = found.parts.adversary
    values = dict(owned.params.items()) if hasattr(owned, "params") else owned.args[0]
    mean, scale = (problem_array(values[name]) for name in ("mean", "log_scale"))
    exact = stats.norm(mean, np.exp(scale)).logpdf(points["x"]).sum(1) - stats.norm.logpdf(points["x"]).sum(1)
    backend_ = found.problem.event.backend
    own = found.law.log_ratio(found.parts, {name: backend_.from_host(v) for name, v in points.items()})
    assert backend_.to_host(own) == pytest.approx(exact, abs=1e-3)


def problem_array(value: Any) -> np.ndarray:
    return np.asarray(value.detach() if hasattr(value, "detach") else value, dtype=np.float64)


def test_param_sites_are_parameters(backend: str) -> None:
    lib, _ = normals(backend)

    def program() -> Any:
        mean = lib.param("mean", lib.xp.zeros(DIM))
        return lib.sample("x", lib.dist.Normal(mean, 1.0).to_event(1))

    params = {"mean": lib.xp.zeros(DIM)}
    found = search(half_space(backend), Learnable(program, params), **(QUICK | {"steps": 100, "learning_rate": 0.05}))
    mean = problem_array(found.parts.params["mean"])
    assert mean.mean() > 0.8  # towards (4.5 + a little) / √6
    assert found.log_prob > -6.0


def test_a_tilt_has_the_density_of_its_mixture(backend: str) -> None:
    problem = half_space(backend)
    base = estimate(problem, budget=20_000, estimator=Tempering(), progress=False)  # not the few points of lines
    law = Tilt(components=3).build(problem.event, base.conclusion.particles, np.random.default_rng(0))  # type: ignore[arg-type]
    assert isinstance(law, TiltLaw)
    weights, means, factors, _ = law._mixture(law.parts)
    other = Mixture(law.basis, weights, means, factors)
    points = law.draw(law.parts, 2_000, np.random.default_rng(1))
    put = problem.event.backend.from_host
    own = problem.event.backend.to_host(law.log_ratio(law.parts, {name: put(v) for name, v in points.items()}))
    assert own == pytest.approx(-other.log_ratio(points["z"]), abs=2e-3)
    drawn = other.sample(2_000, np.random.default_rng(2)) @ law.basis
    tails = [stats.ks_2samp(points["u"][:, j], drawn[:, j]).pvalue for j in range(drawn.shape[1])]
    assert min(tails) > FAILURE_RATE / len(tails)


def test_a_flow_bends_where_one_gaussian_cannot(backend: str) -> None:
    """A parabola, whose P is an integral in one dimension; draws and densities of the law belong together."""
    if importlib.util.find_spec("zuko" if backend == "pyro" else "flowjax") is None:
        pytest.skip("the library of flows is not installed")
    _, adversary = normals(backend)
    problem = Problem(adversary, lambda x: x[1] + 0.3 * x[0] ** 2, lambda _, y: y - 6.0)
    grid = np.linspace(-10, 10, 20_001)
    exact = math.log((stats.norm.pdf(grid) * stats.norm.sf(6.0 - 0.3 * grid**2)).sum() * (grid[1] - grid[0]))
    base = estimate(problem, budget=20_000, progress=False)
    found = search(problem, Flow(), **QUICK | {"kl": 3.0, "base": base, "steps": 8, "refine": 3})
    # all that the default tries takes half a minute to compile
    check(found, exact, 3.0, MonteCarlo() if backend == "numpyro" else None)
    assert found.efficiency > 0.75  # one Gaussian: .47
    # the density is that of the draws: what pushing standard normals does to a volume, by central differences
    learnt, rank = found.parts.adversary, found.law.basis.shape[1]
    noise = np.random.default_rng(1).standard_normal((200, rank))
    slopes = [(learnt.push(noise + d) - learnt.push(noise - d)) / 0.02 for d in 0.01 * np.eye(rank)]
    volume = np.abs(np.linalg.det(np.stack(slopes, axis=-1)))
    u = learnt.push(noise)
    one = problem.event.backend.from_host(noise[0])
    assert problem.event.backend.to_host(learnt.pushed(one)) == pytest.approx(u[0], abs=1e-4)  # as programs have it
    log_q = ratio_of(problem.event.backend, found.law, found.parts, {"u": u}) + stats.norm.logpdf(u).sum(axis=1)
    assert np.median(np.abs(log_q - stats.norm.logpdf(noise).sum(axis=1) + np.log(volume))) < 0.01


def test_a_closed_loop(backend: str) -> None:
    _, normal = normals(backend)
    problem = Problem(
        lambda model: (lambda x: (x, model(x)))(normal()), lambda x: x.sum() / DIM**0.5, lambda x, y: y - 4.0
    )
    found = search(problem, **QUICK)
    check(found, float(log_ndtr(-4.0)), 4.0)


def test_what_cannot_be_searched(backend: str) -> None:
    problem = half_space(backend)
    lib, normal = normals(backend)
    with pytest.raises(ValueError, match="kl="):
        search(problem, kl=0.0)
    with pytest.raises(ValueError, match="steps="):
        search(problem, kl=1.0, steps=0)
    with pytest.raises(ValueError, match="learning_rate="):
        search(problem, kl=1.0, learning_rate=math.nan)
    with pytest.raises(TypeError, match="expected Problem"):
        search(normal, kl=1.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="adversary is a str"):
        search(problem, "worse", kl=1.0, progress=False)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="components="):
        Tilt(components=0)
    with pytest.raises(ValueError, match="rank="):
        Flow(rank=0)
    switched = Problem(
        lambda: (lib.sample("on", lib.dist.Bernoulli(0.1)), normal()), lambda c: c[1].sum(), lambda c, y: y + c[0] - 9.0
    )
    with pytest.raises(ProblemError, match=r"discrete ones \(on\)"):
        search(switched, Flow(), kl=1.0, progress=False)
    base = estimate(problem, budget=5_000, progress=False)
    with pytest.raises(ProblemError, match="no parameters"):
        search(problem, normal, kl=1.0, base=base, progress=False)
    other = lib.module(lambda w: lib.sample("y", lib.dist.Normal(w["m"], 1.0)), {"m": 0.0})
    with pytest.raises(ProblemError, match="x"):
        search(problem, other, kl=1.0, base=base, progress=False)
    seen = Problem(
        lambda: (lambda x: (lib.sample("y", lib.dist.Normal(x[0], 1.0), obs=lib.array(1.0)), x)[1])(normal()),
        lambda x: x.sum(),
        lambda x, y: y - 9.0,
    )
    with pytest.raises(ValueError, match="conditioned"):
        search(seen, kl=1.0, progress=False)
    safe = Problem(normal, lambda x: x.sum(), lambda x, y: y * 0.0 - 1.0)
    with pytest.raises(ValueError, match="no catastrophes"):
        search(safe, kl=1.0, budget=500, progress=False)
