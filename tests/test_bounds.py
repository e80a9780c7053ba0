"""Bounds of log P: variational ones, Markov's, worst cases, and programs conditioned on a softened catastrophe."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from library import library
from scipy import special, stats

from probest import Autoguide, Bounds, Importance, MonteCarlo, Problem, ProgramGuide, estimate
from probest.estimators import UnmetNeedError
from probest.estimators.bounds import renyi_bound
from probest.evidence import Code, Evidence, Note
from probest.markov import lower_bound, upper_bound
from probest.problem import ProblemError
from probest.testing import check_run
from probest.testing.events import ExactEvent, half_space, sphere, union

QUIET: dict[str, Any] = {"progress": False}
SIGMAS = 4.0  # of a mean over seeds: wrong once in 30,000


def seed(value: int) -> np.random.SeedSequence:
    return np.random.SeedSequence(value)


def line(run: Any, method: str) -> Evidence:
    return next(one for one in run.ledger if one.method == method)


@pytest.mark.parametrize(
    "event", [half_space(2, 4.0), half_space(40, 6.0), union(5, (4.0,) * 4), sphere(10, 6.5)], ids=lambda e: e.name
)
def test_bounds_hold_in_expectation_and_are_close(event: ExactEvent) -> None:
    lower, upper = [], []
    for i in range(6):
        run = Bounds().run(event, budget=12_000, seed=seed(i))
        lower.append(line(run, "lower bound"))
        upper.append(line(run, "upper bound"))
        assert lower[-1].claim == "lower"
        assert upper[-1].claim == "upper"
    for bounds, side in ((lower, -1.0), (upper, 1.0)):
        error = math.sqrt(np.mean([bound.std_error**2 for bound in bounds]) / len(bounds))
        assert side * (np.mean([bound.log_prob for bound in bounds]) - event.log_prob) > -SIGMAS * error
    assert np.mean([u.log_prob - v.log_prob for u, v in zip(upper, lower, strict=True)]) < 0.1


def test_more_draws_are_tighter() -> None:
    event = union(5, (4.0,) * 4)
    gaps = [
        np.mean([Bounds(draws=k).run(event, budget=12_000, seed=seed(i)).conclusion.diagnostics["gap"] for i in (0, 1)])
        for k in (1, 64)
    ]
    assert gaps[1] < 0.3 * gaps[0]


def test_a_run_is_a_run_and_needs_an_unconditioned_adversary() -> None:
    event = half_space(3, 3.0)
    run = Bounds().run(event, budget=8_000, seed=seed(0))
    check_run(run, event, 8_000)
    assert run.conclusion.converged
    assert run.conclusion.interval[0] < event.log_prob < run.conclusion.interval[1]
    for budget in (1, 50, 700):
        check_run(Bounds().run(event, budget=budget, seed=seed(0)), event, budget)
    weighted = replace(event, log_weight=lambda z: -(z[:, 0] ** 2))
    with pytest.raises(UnmetNeedError, match="without observed sites"):
        Bounds().run(weighted, budget=8_000, seed=seed(0))


def test_a_guide_that_misses_a_mode_shows_in_the_gap() -> None:
    class Shifted:
        dim = 5

        def sample(self, n: int, rng: np.random.Generator) -> np.ndarray:
            z = rng.standard_normal((n, 5))
            z[:, 0] += 4.2
            return z

        def log_ratio(self, z: np.ndarray) -> np.ndarray:
            return np.asarray(0.5 * (z[:, 0] - 4.2) ** 2 - 0.5 * z[:, 0] ** 2)

    run = Bounds(guide=Shifted()).run(union(5, (4.0,) * 4), budget=12_000, seed=seed(0))
    assert not run.conclusion.converged
    assert Code.IMPRECISE in run.conclusion.codes
    assert line(run, "lower bound").log_prob < union(5, (4.0,) * 4).log_prob < line(run, "upper bound").log_prob


def test_renyi_bounds_are_in_order() -> None:
    log_w = stats.norm.rvs(-10.0, 1.0, size=200_000, random_state=0)  # lognormal: log of the mean is -9.5
    values = [renyi_bound(log_w, alpha) for alpha in (1.0, 0.5, 0.0, -1.0)]
    assert values == sorted(values)
    for value, alpha in zip(values, (1.0, 0.5, 0.0, -1.0), strict=True):
        assert value == pytest.approx(-10.0 + 0.5 * (1.0 - alpha), abs=0.15)
    with pytest.raises(ValueError, match="alpha=2"):
        renyi_bound(log_w, 2)
    with pytest.raises(ValueError, match="some weights are 0"):
        renyi_bound(np.array([-np.inf, 0.0]), 1.0)


# Markov ---------------------------------------------------------------------------------------------------------------


def evidence(log_prob: float, **rest: Any) -> Evidence:
    return Evidence(
        **{
            "method": "importance sampling", "log_prob": log_prob, "std_error": 0.1, "interval": (-99.0, 0.0),
            "claim": "unbiased", "calls": 1, "seconds": 0.0, "converged": True, **rest,
        }
    )  # fmt: skip


def test_what_one_estimate_bounds() -> None:
    assert lower_bound([], 0.95) == -math.inf
    assert lower_bound([evidence(-9.0)], 0.95) == pytest.approx(-9.0 + math.log(0.025))
    assert lower_bound([evidence(-9.0), evidence(-9.0)], 0.95) == pytest.approx(-9.0 + math.log(0.025)), "said twice"
    for line in (evidence(-3.0, claim="heuristic"), evidence(-3.0, stratum="k=1"), evidence(-3.0, claim="upper")):
        assert lower_bound([line], 0.95) == -math.inf
    assert lower_bound([evidence(-9.0, floor=-9.01)], 0.999) == -9.01
    draws = evidence(math.log(0.1), method="monte carlo", diagnostics={"hits": 10.0, "samples": 100.0})
    assert stats.binom.sf(9, 100, math.exp(lower_bound([draws], 0.9))) == pytest.approx(0.05)
    assert stats.binom.cdf(10, 100, math.exp(upper_bound([draws], 0.9))) == pytest.approx(0.05)
    assert upper_bound([draws, evidence(-9.0, batches=(-9.0,) * 16)], 0.9) == upper_bound([draws], 0.9)
    assert upper_bound([evidence(-9.0)], 0.9) == 0.0
    close = evidence(-9.0, batches=(-9.0,) * 16)
    assert -9.5 < lower_bound([close], 0.99) < -9.0


@pytest.mark.parametrize("spread", [0.5, 2.0, 4.0])
def test_bounds_of_heavy_tailed_estimates_are_violated_no_more_often_than_stated(spread: float) -> None:
    """Lognormal weights of mean 1; with 2 in 10 allowed, 600 ledgers of two lines. Fails falsely once in 1e4."""
    rng, level, wrong = np.random.default_rng(0), 0.8, 0
    for _ in range(600):
        lines = []
        for _ in range(2):
            batches = np.log(np.exp(spread * rng.standard_normal((16, 8)) - 0.5 * spread**2).mean(axis=1))
            whole = float(special.logsumexp(batches) - math.log(16.0))
            lines.append(evidence(whole, batches=tuple(batches)))
        wrong += lower_bound(lines, level) > 1e-12
    assert stats.binom.sf(wrong - 1, 600, 1.0 - level) > 1e-4


def test_every_estimate_has_a_lower_bound() -> None:
    lib = library("pyro")
    problem = Problem(lambda: lib.sample("x", lib.dist.Normal(0.0, 1.0)), lambda x: x, lambda x, y: y - 3.0)
    truth = float(special.log_ndtr(-3.0))
    for method, room in ((None, 6.0), (MonteCarlo(max_samples=20_000, precision=None), 0.7), (Importance(), 0.7)):
        result = estimate(problem, budget=20_000, estimator=method, **QUIET)
        bounds = [result.lower_bound(level) for level in (0.5, 0.95, 0.999)]
        assert bounds == sorted(bounds, reverse=True)
        assert truth - room < result.lower_bound(0.99) < truth
        assert truth < result.upper_bound(0.999)
    with pytest.raises(ValueError, match="level=1"):
        result.lower_bound(1)


def test_a_conditioned_adversary_has_no_lower_bound() -> None:
    lib = library("pyro")

    def adversary() -> Any:
        x = lib.sample("x", lib.dist.Normal(0.0, 1.0))
        lib.sample("seen", lib.dist.Normal(x, 1.0), obs=lib.array(1.0))
        return x

    assert estimate(Problem(adversary, lambda x: x, lambda x, y: y - 2.0), **QUIET).lower_bound() == -math.inf
    recognised = Problem(lambda: lib.sample("x", lib.dist.Normal(0.0, 1.0)), lambda x: x, lambda x, y: y - 2.0,
                         given=lambda x: x - 1.0)  # fmt: skip
    assert estimate(recognised, **QUIET).lower_bound() == -math.inf


# Worst cases ----------------------------------------------------------------------------------------------------------


def test_worst_cases_have_intervals_and_a_curve() -> None:
    lib = library("pyro")
    problem = Problem(lambda: lib.sample("x", lib.dist.Normal(0.0, 1.0)), lambda x: x, lambda x, y: y - 4.0)
    result = estimate(problem, estimator=Importance(precision=0.2, first_batch=100), budget=4_000, **QUIET)
    worst = result.worst_case(3.0)
    assert worst.interval[0] < worst < worst.interval[1]
    for value, log_p in zip((*worst.interval, worst), (result.lower, result.upper, result.log_prob), strict=True):
        p = math.exp(log_p)
        kl = value * math.log(value / p) + (1 - value) * math.log((1 - value) / (1 - p))
        assert kl == pytest.approx(3.0, rel=1e-6)
    wide, narrow = (result.worst_case(3.0, level=level).interval for level in (0.99, 0.5))
    assert wide[0] < narrow[0] < narrow[1] < wide[1]
    curve = result.worst_case_curve()
    assert curve.prob[0] == pytest.approx(result.prob)
    assert curve.upper[-1] == 1.0
    assert (np.diff(curve.prob) >= 0.0).all()
    assert ((curve.lower <= curve.prob) & (curve.prob <= curve.upper)).all()
    assert result.worst_case_curve([1.0, 2.0]).kl.tolist() == [1.0, 2.0]
    ax = result.plot("worst_case")
    assert ax.get_yscale() == "log"


# Conditioned programs -------------------------------------------------------------------------------------------------

BETA, TEMPERATURE = 3.0, 0.5


def softened(backend: Any) -> Problem:
    lib = library(backend)
    axis = lib.array(np.full(4, 0.5, dtype=np.float32))
    return Problem(
        lambda: lib.sample("x", lib.dist.Normal(lib.xp.zeros(4), 1.0).to_event(1)),
        lambda x: (axis * x).sum(),
        lambda x, y: y - BETA,
    )


def mean_severity() -> float:
    """Of N(0, 1) − β with a factor Φ(severity / T)."""
    scale = math.hypot(1.0, TEMPERATURE)
    return float(stats.norm.pdf(BETA / scale) / (scale * stats.norm.sf(BETA / scale)) - BETA)


def test_nuts_of_numpyro_finds_catastrophes() -> None:
    import jax
    from numpyro.diagnostics import summary
    from numpyro.infer import MCMC, NUTS

    program = softened("numpyro").conditioned(TEMPERATURE)
    mcmc = MCMC(
        NUTS(program), num_warmup=300, num_samples=500, num_chains=2, chain_method="vectorized", progress_bar=False
    )
    mcmc.run(jax.random.PRNGKey(0))
    found = summary({"severity": mcmc.get_samples(group_by_chain=True)["severity"]})["severity"]
    assert found["r_hat"] < 1.05
    assert found["mean"] == pytest.approx(mean_severity(), abs=float(5.0 * found["std"] / math.sqrt(found["n_eff"])))


@pytest.mark.global_rng
def test_nuts_of_pyro_finds_catastrophes() -> None:
    import pyro
    import torch
    from pyro.infer import MCMC, NUTS

    with torch.random.fork_rng():
        pyro.set_rng_seed(0)
        program = softened("pyro").conditioned(TEMPERATURE, gaussianized=True)
        mcmc = MCMC(NUTS(program), num_samples=150, warmup_steps=100, disable_progbar=True)
        mcmc.run()
    x = mcmc.get_samples()["x_base"]
    severity = 0.5 * x.sum(-1).numpy() - BETA
    assert severity.mean() == pytest.approx(mean_severity(), abs=float(5.0 * severity.std() / math.sqrt(40.0)))


def test_svi_of_numpyro_trains_a_guide_that_the_estimate_uses() -> None:
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from numpyro.infer import SVI, Trace_ELBO
    from numpyro.optim import Adam

    problem = softened("numpyro")

    def guide() -> Any:
        at = numpyro.param("at", jnp.full(4, 0.5))
        return numpyro.sample("x", dist.Normal(at, 1.0).to_event(1))

    svi = SVI(problem.conditioned(0.3), guide, Adam(0.02), Trace_ELBO(num_particles=16))
    fitted = svi.run(jax.random.PRNGKey(0), 400, progress_bar=False)
    given = ProgramGuide(guide, params=fitted.params)
    result = estimate(problem, guide=given, budget=20_000, **QUIET)
    truth = float(special.log_ndtr(-BETA))
    assert result.converged
    assert abs(result.log_prob - truth) < 4.0 * result.std_error
    run = Bounds(guide=given).run(problem.event, budget=12_000, seed=seed(0))
    assert run.conclusion.converged
    assert line(run, "lower bound").log_prob < truth + 0.1
    assert line(run, "upper bound").log_prob > truth - 0.1


def fitted_autoguide(
    backend: str, problem: Problem, kind: str, temperature: float = 0.5, steps: int = 250
) -> Autoguide:
    """A library's own autoguide, trained by its own SVI and optimiser."""
    softened_program = problem.conditioned(temperature, gaussianized=True)
    if backend == "pyro":
        import pyro
        import torch
        from pyro.infer import SVI, Trace_ELBO, autoguide

        pyro.clear_param_store()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            auto = getattr(autoguide, kind)(softened_program)
            svi = SVI(softened_program, auto, pyro.optim.Adam({"lr": 0.03}), Trace_ELBO(8))
            for _ in range(steps):
                svi.step()
        pyro.clear_param_store()
        return Autoguide(auto)
    import jax
    import numpyro
    from numpyro.infer import SVI, Trace_ELBO, autoguide

    auto = getattr(autoguide, kind)(softened_program)
    found = SVI(softened_program, auto, numpyro.optim.Adam(0.03), Trace_ELBO(8)).run(
        jax.random.key(0), 3 * steps, progress_bar=False
    )
    return Autoguide(auto, found.params)


def test_autoguides_are_proposals(backend: str) -> None:
    lib = library(backend)

    def adversary() -> Any:
        x = lib.sample("x", lib.dist.Normal(lib.xp.zeros(3), 1.0).to_event(1))
        return x, lib.sample("a", lib.dist.Normal(0.0, 2.0))  # by name before the other, in the program after it

    problem = Problem(adversary, lambda x: x, lambda _, y: (y[0].sum() + 2.0 * y[1]) / 19.0**0.5 - 4.0)
    truth = float(special.log_ndtr(-4.0))
    given = fitted_autoguide(backend, problem, "AutoMultivariateNormal")
    result = estimate(problem, guide=given, budget=20_000, **QUIET)
    assert result.converged, result.advice
    assert abs(result.log_prob - truth) < 4.0 * result.std_error
    run = Bounds(guide=given).run(problem.event, budget=12_000, seed=seed(0))
    assert line(run, "lower bound").log_prob < truth + 0.1
    other = Problem(adversary, lambda x: x, lambda _, y: y[0].sum() - 3.0)
    with pytest.raises(ProblemError, match="make it of"):
        _native(backend, other).bind(other.event)
    if backend == "pyro":
        import pyro

        pyro.clear_param_store()


def test_an_autoguide_of_widths_alone_need_not_suffice(backend: str) -> None:
    lib = library(backend)
    problem = Problem(
        lambda: lib.sample("x", lib.dist.Normal(lib.xp.zeros(3), 1.0).to_event(1)),
        lambda x: x,
        lambda _, y: y.sum() / 3.0**0.5 - 4.0,
    )
    bound = fitted_autoguide(backend, problem, "AutoNormal", steps=120).bind(problem.event)
    assert problem.event.severity(bound.parts[0].sample(4_000, np.random.default_rng(0))).mean() > -2.0


def _native(backend: str, problem: Problem) -> Autoguide:
    """An autoguide of the program as it is written, whose vector is not that of the coordinates."""
    program = problem.conditioned(0.5)
    if backend == "pyro":
        import torch
        from pyro.infer import autoguide

        with torch.random.fork_rng():
            auto = autoguide.AutoMultivariateNormal(program)
            auto()
        return Autoguide(auto)
    import jax
    import numpyro
    from numpyro.infer import SVI, Trace_ELBO, autoguide

    other = autoguide.AutoMultivariateNormal(program)
    svi = SVI(program, other, numpyro.optim.Adam(0.03), Trace_ELBO())
    return Autoguide(other, svi.get_params(svi.init(jax.random.key(0))))


@pytest.mark.parametrize("backend", ["pyro", "numpyro"])
def test_what_cannot_be_softened_is_refused(backend: Any) -> None:
    problem = softened(backend)
    for temperature in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ProblemError, match="temperature="):
            problem.conditioned(temperature)
    yes = Problem(problem.adversary, problem.model, lambda x, y: y > 3.0)
    with pytest.raises(ProblemError, match="the checker returns a bool"):
        yes.conditioned(1.0)


def test_notes_say_why_nothing_was_bounded() -> None:
    run = Bounds().run(half_space(3, 30.0), budget=100, seed=seed(0))
    assert isinstance(run.conclusion.notes[0], Note)
    assert run.conclusion.log_prob == -math.inf
