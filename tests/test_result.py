"""What estimates hold beside their numbers: names of axes, draws of D, the way there, settings; and files of them."""

from __future__ import annotations

import math
import tracemalloc
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from library import library
from scipy.stats import norm

import probest
from probest import Estimate, Evidence, MonteCarlo, Problem, Tempering, audit, estimate
from probest.evidence import Particles

TIMES, SITES = 4, 3


@pytest.fixture
def gusts(backend: str) -> Problem:
    """A program with plates (one within another), a vector within a plate, a scoped name, and something observed."""
    lib = library(backend)

    def adversary() -> Any:
        mood = lib.sample("world/mood", lib.dist.Normal(0.0, 1.0))
        with lib.plate("time", TIMES, dim=-1), lib.plate("site", SITES, dim=-2):
            wind = lib.sample("wind", lib.dist.Normal(mood, 1.0))
        with lib.plate("time", TIMES, dim=-1):
            push = lib.sample("push", lib.dist.Normal(lib.xp.zeros(2), 1.0).to_event(1))
            lib.sample("report", lib.dist.Normal(push[..., 0], 1.0), obs=lib.xp.arange(TIMES) * 0.1)
        return {"wind": wind, "push": push}

    return Problem(adversary, lambda x: x["wind"].sum() + x["push"].sum(), lambda x, y: y - 15.0)


def test_axes_have_the_names_of_plates(gusts: Problem) -> None:
    pytest.importorskip("arviz")
    found = estimate(gusts, budget=4_000, estimator=Tempering(particles=128))
    data = found.to_arviz(dims={"push": ["time", "axis"]}, coords={"time": list("abcd"), "axis": ["x", "y"]})
    posterior = data["posterior"]
    assert posterior["wind"].dims == ("chain", "draw", "site", "time")
    assert posterior["push"].dims == ("chain", "draw", "time", "axis")
    assert posterior["world.mood"].dims == ("chain", "draw")
    assert list(posterior["time"].values) == list("abcd")
    assert list(posterior["site"].values) == [0, 1, 2]
    assert data["observed_data"]["report"].dims == ("time",)
    np.testing.assert_allclose(data["observed_data"]["report"].values, [0.0, 0.1, 0.2, 0.3], rtol=1e-6)
    assert posterior.attrs["log_prob"] == found.log_prob
    assert posterior.attrs["log_evidence"] == found.conclusion.log_evidence != 0.0
    assert (data["prior"]["severity"].values < 0.0).any()
    both = {**posterior.attrs}
    assert '"seed": 0' in both["settings"]
    assert '"budget": 4000' in both["settings"]
    assert '"numpy": ' in both["settings"]


def test_draws_of_the_adversary_are_its_own(backend: str) -> None:
    lib = library(backend)
    problem = Problem(lambda: lib.sample("x", lib.dist.Normal(2.0, 3.0)), lambda x: x, lambda x, y: y - 11.0)
    found = estimate(problem, budget=2_000)
    calls, nearest = found.calls, found.nearest
    drawn = found.drawn
    assert drawn is not None
    n = len(drawn.weights)
    # mean and spread of n draws, at five standard errors
    assert abs(drawn["x"].mean() - 2.0) < 5 * 3.0 / math.sqrt(n)
    assert abs(drawn["x"].std() / 3.0 - 1.0) < 5 / math.sqrt(2 * n)
    np.testing.assert_allclose(drawn.severity, drawn["x"] - 11.0, atol=1e-4)
    assert found.calls == calls
    assert found.nearest is nearest


def test_the_path_climbs_from_the_adversary_to_the_event(gusts: Problem) -> None:
    found = estimate(gusts, budget=8_000, estimator=Tempering(particles=256))
    levels = found.conclusion.levels
    assert levels[0].log_prob == 0.0
    assert any(level.conditioning for level in levels)
    assert not levels[-1].conditioning
    way = [level for level in levels[1:] if not level.conditioning]
    masses = [level.log_prob for level in way]
    assert all(after < before + 0.5 for before, after in pairwise(masses))
    assert masses[-1] == pytest.approx(found.log_prob, abs=0.05)
    assert way[-1].severity[0] >= 0.0  # all of them catastrophes
    assert all(list(level.severity) == sorted(level.severity) for level in levels)


def test_settings_make_a_run_again(backend: str) -> None:
    lib = library(backend)
    problem = Problem(lambda: lib.sample("x", lib.dist.Normal(0.0, 1.0)), lambda x: x, lambda x, y: y - 4.0)
    one = estimate(problem, budget=3_000, seed=11)
    again = estimate(problem, budget=one.settings["budget"], seed=one.settings["seed"])
    assert one.log_prob == again.log_prob
    assert one.settings["versions"]["probest"] == probest.__version__
    several = audit(problem, methods=[Tempering(), MonteCarlo()], budget=6_000)
    assert set(several.settings["audited by"]) == {"tempering", "monte carlo"}
    assert several.nearest is not None
    twice = audit(problem, methods=[MonteCarlo(), MonteCarlo()], budget=2_000)
    assert len(twice.settings["audited by"]) == 2
    told: list[str] = []
    audit(problem, methods=[Tempering(), MonteCarlo()], budget=6_000, callback=lambda *news: told.append(news[2]))
    assert set(told) == {"tempering", "monte carlo"}


def wide(problem: Problem, n: int) -> Estimate:
    """An estimate with n particles, as a method with such a budget would leave."""
    event = problem.event
    z = np.abs(np.random.default_rng(0).standard_normal((n, event.dim)))
    weights = np.linspace(0.0, 1.0, n)
    particles = Particles(z, np.log(np.maximum(weights, 1e-300)), np.ones(n))
    line = Evidence("made up", -9.0, 0.1, (-9.2, -8.8), "consistent", n, 1.0, True, particles=particles)
    return Estimate(problem, event, (line,), seed=0, seconds=1.0)


def test_many_particles_take_no_more_memory_than_some_thousand(any_backend: str, tmp_path: Path) -> None:
    pytest.importorskip("netCDF4")
    lib = library(any_backend)
    problem = Problem(
        lambda: lib.sample("x", lib.dist.Normal(lib.xp.zeros(4), 1.0).to_event(1)), lambda x: x[0], lambda x, y: y
    )
    n, peaks = 100_000, []
    for size in (20_000, n):
        found = wide(problem, size)
        tracemalloc.start()
        path = found.to_netcdf(tmp_path / f"{size}.nc")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        back = probest.load(path)
        assert len(back.catastrophes.weights) <= 4_000
        assert back.catastrophes.weights.sum() == pytest.approx(1.0)
        # weights grow linearly, so that the mean place among the particles is at two thirds; x is independent of it
        expected = math.sqrt(2.0 / math.pi)
        spread = math.sqrt((1.0 - 2.0 / math.pi) / len(back.catastrophes.weights))
        assert abs(back.catastrophes.weights @ back.catastrophes["x"][:, 0] - expected) < 6 * spread
    # what grows is a few arrays of weights, not the cases: these are 14 numbers each
    assert peaks[1] < peaks[0] + 7 * 8 * n
    xarray = pytest.importorskip("xarray")
    with xarray.open_dataset(path, group="catastrophes") as group:
        assert group.sizes["particle"] == n
        assert float(group["weight"].sum()) == pytest.approx(1.0)
        np.testing.assert_allclose(group["x"][-3:], found.conclusion.particles.z[-3:], rtol=1e-6)  # type: ignore[union-attr]


def test_many_catastrophes_are_thinned_by_their_weights(any_backend: str) -> None:
    lib = library(any_backend)
    problem = Problem(lambda: lib.sample("x", lib.dist.Normal(0.0, 1.0)), lambda x: x, lambda x, y: y)
    found = wide(problem, 50_000)
    kept = found.catastrophes
    assert kept is not None
    assert len(kept.weights) <= 4_000
    assert kept.weights.sum() == pytest.approx(1.0)
    blocks = list(found.blocks(7_000))
    assert sum(len(block.weights) for block in blocks) == 50_000
    assert sum(block.weights.sum() for block in blocks) == pytest.approx(1.0)
    mean = sum(float(block.weights @ block["x"]) for block in blocks)
    assert float(kept.weights @ kept["x"]) == pytest.approx(mean, abs=6 * 0.6 / math.sqrt(4_000))


def test_a_saved_estimate_is_shown_like_the_original(any_backend: str, tmp_path: Path) -> None:
    pytest.importorskip("netCDF4")
    plt = pytest.importorskip("matplotlib.pyplot")
    lib = library(any_backend)
    problem = Problem(
        lambda: lib.sample("x", lib.dist.Normal(lib.xp.zeros(3), 1.0).to_event(1)),
        lambda x: x.sum(),
        lambda x, y: y - 7,
    )
    found = estimate(problem, budget=6_000, estimator=Tempering(particles=256))
    back = probest.load(found.to_netcdf(tmp_path / "found.nc"))
    assert str(back) == str(found)
    assert back._repr_html_() == found._repr_html_()
    assert back.conclusion == replace(found.conclusion, particles=None)
    assert back.worst_case(2.0) == found.worst_case(2.0)
    assert back.settings == found.settings
    assert back.nearest is None
    assert found.nearest is not None
    for kind in ("ledger", "intervals", "path", "pairs", "cases", "diagnostics"):
        back.plot(kind)
        plt.close("all")
    for one in (back, found):
        assert one.report(tmp_path / "out.html").stat().st_size > 10_000
    assert "The likeliest catastrophe" in (tmp_path / "out.html").read_text()
    assert "severity=" in repr(found.nearest)
    assert "A catastrophe: severity" in found.nearest._repr_html_()
    assert (back.to_netcdf(tmp_path / "again.nc")).stat().st_size > 0


def test_a_callback_hears_of_calls_and_may_stop(backend: str) -> None:
    lib = library(backend)
    problem = Problem(lambda: lib.sample("x", lib.dist.Normal(0.0, 1.0)), lambda x: x, lambda x, y: y - 4.0)
    told: list[tuple[float, float | None, str]] = []
    found = estimate(problem, budget=3_000, callback=lambda *news: told.append(news))
    assert told[-1][:2] == (found.calls, 3_000)
    assert [done for done, *_ in told] == sorted(done for done, *_ in told)

    def enough(done: float, total: float | None, text: str) -> None:
        if done > 100:
            raise KeyboardInterrupt

    stopped = estimate(problem, budget=50_000, precision=1e-3, callback=enough)
    assert not stopped.converged
    assert stopped.calls < 50_000
    with pytest.raises(TypeError, match="callback is a int"):
        estimate(problem, callback=3)  # type: ignore[arg-type]


def test_the_interval_of_half_a_normal_law() -> None:
    """Rescaled intervals are those of a normal law."""
    line = Evidence("made up", -9.0, 0.1, (-9.196, -8.804), "consistent", 1, 1.0, True)
    one = object.__new__(Estimate)
    one.ledger = (line,)
    low, high = one.interval(0.8)
    assert (low, high) == pytest.approx((-9.0 - 0.1 * norm.ppf(0.9), -9.0 + 0.1 * norm.ppf(0.9)), abs=1e-3)
