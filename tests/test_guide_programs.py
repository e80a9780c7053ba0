"""Guides that are programs: closed forms, both libraries, and errors that name the site."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from library import library
from scipy import special, stats

from probest import Importance, Problem, ProblemError, ProgramGuide, estimate
from probest.budget import Meter
from probest.testing import FAILURE_RATE

REACH = stats.norm.isf(FAILURE_RATE / 2)
QUIET: dict[str, Any] = {"progress": False}


def normal_tail(lib: Any, beta: float) -> tuple[Problem, Any, float]:
    """Ten standard normals whose scaled sum exceeds beta, and the guide that is moved to the boundary."""
    root = math.sqrt(10.0)

    def adversary() -> Any:
        return lib.sample("x", lib.dist.Normal(lib.xp.zeros(10), 1.0).to_event(1))

    def guide() -> Any:
        lib.sample("x", lib.dist.Normal(lib.xp.zeros(10) + beta / root, 1.0).to_event(1))

    problem = Problem(adversary, lambda x: x.sum() / root, lambda x, y: y - beta)
    return problem, guide, float(special.log_ndtr(-beta))


def conjugate(lib: Any) -> tuple[Problem, Any, float, float]:
    """mean ~ N(0, 1), seen ~ N(mean, 1/2) at 1: P(mean > 3 | seen) and the evidence, both normal in closed form."""

    def adversary() -> Any:
        mean = lib.sample("mean", lib.dist.Normal(0.0, 1.0))
        lib.sample("seen", lib.dist.Normal(mean, 0.5), obs=lib.array(1.0))
        return mean

    def guide() -> Any:
        lib.sample("mean", lib.dist.Normal(3.1, 0.4))

    precision = 1.0 + 4.0
    log_prob = float(special.log_ndtr(-(3.0 - 4.0 / precision) * math.sqrt(precision)))
    return (
        Problem(adversary, lambda x: x, lambda x, y: y - 3.0),
        guide,
        log_prob,
        float(stats.norm.logpdf(1.0, 0.0, math.sqrt(1.25))),
    )


def test_a_moved_normal_finds_the_tail(backend: str) -> None:
    problem, guide, truth = normal_tail(library(backend), 5.0)
    result = estimate(problem, guide=guide, **QUIET)
    assert result.converged, result.advice
    assert result.calls <= 50_000
    assert abs(result.log_prob - truth) < REACH * result.std_error
    assert result.catastrophes is not None


def test_a_conjugate_problem(backend: str) -> None:
    problem, guide, truth, evidence = conjugate(library(backend))
    result = estimate(problem, guide=guide, **QUIET)
    assert result.converged, result.advice
    assert abs(result.log_prob - truth) < REACH * result.std_error
    assert abs(result.conclusion.log_evidence - evidence) < 0.2


def test_an_amortised_guide_serves_every_observation(backend: str) -> None:
    """One encoder of what was seen, trained by maximum likelihood on simulated catastrophes: here in closed form, the
    least squares of x given x > 2 on what was seen and its square.
    """
    lib, rng = library(backend), np.random.default_rng(0)
    x = stats.norm.isf(rng.random(20_000) * stats.norm.sf(2.0))
    seen = x + 0.5 * rng.standard_normal(len(x))
    design = np.stack([np.ones_like(seen), seen, seen**2], axis=1)
    weights, rest, *_ = np.linalg.lstsq(design, x, rcond=None)
    width = 1.5 * math.sqrt(float(rest[0]) / len(x))

    def encoded(params: Any, at: float) -> Any:
        return params["w"] @ lib.array([1.0, at, at**2]), lib.array(width)

    encoder = lib.module(encoded, {"w": weights})
    for at in (0.5, 1.5, 2.5):

        def adversary(at: float = at) -> Any:
            x = lib.sample("x", lib.dist.Normal(0.0, 1.0))
            lib.sample("seen", lib.dist.Normal(x, 0.5), obs=lib.array(at))
            return x

        def guide(at: float = at) -> Any:
            lib.sample("x", lib.dist.Normal(*encoder(at)))

        result = estimate(Problem(adversary, lambda x: x, lambda x, y: y - 2.0), guide=guide, budget=20_000, **QUIET)
        truth = float(special.log_ndtr(-(2.0 - 0.8 * at) * math.sqrt(5.0)))
        assert result.converged, result.advice
        assert abs(result.log_prob - truth) < REACH * result.std_error


def test_sites_of_several_kinds(backend: str) -> None:
    # independent sites; the guide draws them in another order
    lib = library(backend)
    d = lib.dist

    def adversary() -> Any:
        kind = lib.sample("kind", d.Categorical(lib.array([0.7, 0.2, 0.1])))
        size = lib.sample("size", d.LogNormal(0.0, 0.25))
        wait = lib.sample("wait", d.Exponential(1.0))
        return kind, size, wait

    def guide() -> Any:
        lib.sample("wait", d.Exponential(0.3))
        lib.sample("size", d.LogNormal(0.6, 0.25))
        lib.sample("kind", d.Categorical(lib.array([0.2, 0.2, 0.6])))

    def checker(x: Any, y: Any) -> Any:
        kind, size, wait = x
        return lib.xp.where(kind == 2, 1.0, 0.0) * lib.xp.where(size > 1.5, 1.0, 0.0) * (wait > 3.0) - 0.5

    problem = Problem(adversary, lambda x: x[1], checker)
    truth = math.log(0.1 * stats.norm.sf(math.log(1.5) / 0.25) * math.exp(-3.0))
    bound = ProgramGuide(guide, prior=0.2).bind(problem.event)
    log_w, severity = bound.draw(Meter(problem.event, 5000), 5000, np.random.default_rng(0))
    w = np.exp(np.where(severity >= 0.0, log_w, -np.inf) - truth)
    assert w.max() <= 1.0 / 0.2 / math.exp(truth)
    assert abs(w.mean() - 1.0) < REACH * w.std() / math.sqrt(len(w))
    # all weights together are the density of the adversary: they have mean 1
    whole = np.exp(log_w)
    assert abs(whole.mean() - 1.0) < REACH * whole.std() / math.sqrt(len(whole))


def test_weights_are_the_ratio_of_the_densities(backend: str) -> None:
    lib = library(backend)
    problem, guide, _ = normal_tail(lib, 4.0)
    bound = ProgramGuide(guide, prior=0.3).bind(problem.event)
    z = np.random.default_rng(1).standard_normal((7, 10)) + 1.0
    log_q = stats.norm.logpdf(z, 4.0 / math.sqrt(10.0)).sum(axis=1)
    log_p = stats.norm.logpdf(z).sum(axis=1)
    expected = log_p - np.logaddexp(math.log(0.7) + log_q, math.log(0.3) + log_p)
    np.testing.assert_allclose(bound.log_ratio(z), expected, rtol=1e-4, atol=1e-4)


def test_a_guide_that_lacks_a_mode_is_not_believed(backend: str) -> None:
    lib = library(backend)
    root = math.sqrt(10.0)

    def adversary() -> Any:
        return lib.sample("x", lib.dist.Normal(lib.xp.zeros(10), 1.0).to_event(1))

    def one_side() -> Any:
        lib.sample("x", lib.dist.Normal(lib.xp.zeros(10) + 5.0 / root, 1.0).to_event(1))

    problem = Problem(adversary, lambda x: x.sum() / root, lambda x, y: abs(y) - 5.0)
    result = estimate(problem, guide=one_side, **QUIET)
    assert not result.converged
    assert result.advice


def test_parameters_of_a_numpyro_guide_can_be_given() -> None:
    numpyro = pytest.importorskip("numpyro")
    lib = library("numpyro")
    problem, _, truth = normal_tail(lib, 4.0)

    def guide() -> Any:
        shift = numpyro.param("shift", 0.0)
        lib.sample("x", lib.dist.Normal(lib.xp.zeros(10) + shift, 1.0).to_event(1))

    given = ProgramGuide(guide, params={"shift": lib.xp.asarray(4.0 / math.sqrt(10.0))})
    result = estimate(problem, guide=given, **QUIET)
    assert result.converged, result.advice
    assert abs(result.log_prob - truth) < REACH * result.std_error


def test_same_seed_same_estimate(backend: str) -> None:
    problem, guide, _ = normal_tail(library(backend), 3.0)
    one, two = (estimate(problem, guide=guide, budget=5000, seed=3, **QUIET) for _ in range(2))
    assert one.log_prob == two.log_prob
    assert one.calls <= 5000


def test_wrong_guides_are_named_before_work_starts(backend: str) -> None:
    lib = library(backend)
    d = lib.dist

    def adversary() -> Any:
        return lib.sample("speed", d.LogNormal(0.0, 1.0)) + lib.sample(
            "wind", d.Normal(lib.xp.zeros(2), 1.0).to_event(1)
        )

    def site(name: str, law: Any) -> None:
        lib.sample(name, law)

    def wind(n: int = 2) -> None:
        site("wind", d.Normal(lib.xp.zeros(n), 1.0).to_event(1))

    def seen() -> None:
        site("speed", d.LogNormal(0.0, 1.0))
        wind()
        lib.sample("seen", d.Normal(0.0, 1.0), obs=lib.array(0.0))

    problem = Problem(adversary, lambda x: x, lambda x, y: y.sum() - 30.0)
    wrong = {
        "lacks.*'speed'": wind,
        "does not: site\\(s\\) 'extra'": lambda: (
            site("speed", d.LogNormal(0.0, 1.0)),
            wind(),
            site("extra", d.Normal(0.0, 1.0)),
        ),
        "'wind' of shape \\(3,\\)": lambda: (site("speed", d.LogNormal(0.0, 1.0)), wind(3)),
        "'speed' outside the support": lambda: (site("speed", d.Normal(0.0, 1.0)), wind()),
        "draws no site": lambda: None,
        "observed sites": seen,
    }
    for message, guide in wrong.items():
        with pytest.raises(ProblemError, match=message):
            estimate(problem, guide=guide, **QUIET)
    assert problem.event.model_calls == 0
    with pytest.raises(ValueError, match="estimator"):
        estimate(problem, guide=wind, estimator=Importance(), **QUIET)
    with pytest.raises(ValueError, match="prior"):
        ProgramGuide(wind, prior=0.0)
    with pytest.raises(TypeError, match="program"):
        ProgramGuide(3)  # type: ignore[arg-type]
