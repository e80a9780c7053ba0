"""Reports, on fakes: what an estimate and a training run look like, without a backend."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal, localcontext
from io import StringIO
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from probest.evidence import Evidence
from probest.report import arviz as report_arviz
from probest.report.comparison import Candidate, comparison_table
from probest.report.html import estimate_html
from probest.report.progress import Progress
from probest.report.tables import estimate_table, estimate_text, ledger_rows, verdict
from probest.report.text import format_interval, format_log, format_prob, format_seconds


class Catastrophes(Mapping[str, Any]):
    """Five catastrophes of a program with a scalar site, a vector site and a nested observation."""

    weights = np.array([0.0, 0.5, 0.25, 0.25, 0.0])
    severity = np.arange(5.0)
    observation = ({"image": np.arange(5 * 16.0).reshape(5, 4, 4)}, np.arange(5))
    action = np.arange(5) % 2 == 0
    sites: dict[str, np.ndarray] = {"start": np.arange(5.0), "outer/wind": np.arange(15.0).reshape(5, 3)}  # noqa: RUF012

    def __getitem__(self, name: str) -> np.ndarray:
        return self.sites[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)


def evidence(
    method: str, log_prob: float, interval: tuple[float, float], claim: Any = "unbiased", **rest: Any
) -> Evidence:
    defaults = {"std_error": 0.05, "calls": 12_500, "seconds": 65.2, "converged": True}
    return Evidence(method, log_prob, interval=interval, claim=claim, **(defaults | rest))


NO_HITS = evidence("monte carlo", -math.inf, (-math.inf, -8.0), std_error=math.inf, converged=False, notes=("no hits",))
TEMPERING = evidence("tempering", -15.1, (-15.3, -14.9), "consistent")
BOUND = evidence("guide bound", -16.0, (-16.5, math.inf), "lower")
IMPORTANCE = evidence("importance", -15.0, (-15.1, -14.9))


@dataclass
class Estimate:
    """What a report reads of an estimate."""

    ledger: tuple[Evidence, ...]
    conclusion: Evidence
    converged: bool = True
    advice: tuple[str, ...] = ()
    catastrophes: Any = field(default_factory=Catastrophes)
    calls: int = 25_000
    seconds: float = 130.4

    @property
    def log_prob(self) -> float:
        return self.conclusion.log_prob

    @property
    def std_error(self) -> float:
        return self.conclusion.std_error

    @property
    def lower(self) -> float:
        return self.conclusion.interval[0]

    @property
    def upper(self) -> float:
        return self.conclusion.interval[1]


@pytest.fixture
def estimate() -> Estimate:
    return Estimate((NO_HITS, TEMPERING, BOUND, IMPORTANCE), IMPORTANCE)


@pytest.fixture
def nothing_found() -> Estimate:
    return Estimate((NO_HITS,), NO_HITS, converged=False, catastrophes=None)


@pytest.mark.parametrize(
    "log_prob", [-0.1, -3.0, -6.9, -6.91, -15.0, -23.02585092994, -23.0258509, -745.2, -1e3, -921.034]
)
def test_probabilities_are_right_far_below_the_smallest_float(log_prob: float) -> None:
    with localcontext() as context:
        context.prec = 50
        exact = Decimal(log_prob).exp()
        assert abs(Decimal(format_prob(log_prob)) / exact - 1) <= Decimal("0.05")


@pytest.mark.parametrize(
    ("log_prob", "text"),
    [
        (-math.inf, "0"),
        (0.0, "1"),
        (1.0, "1"),
        (math.nan, "?"),
        (math.log(0.031), "0.031"),
        (math.log(9.96e-8), "1.0e-07"),
        (-400 * math.log(10), "1.0e-400"),
    ],
)
def test_probabilities_at_the_edges(log_prob: float, text: str) -> None:
    assert format_prob(log_prob) == text


def test_numbers_as_text() -> None:
    assert format_interval((math.log(2.8e-7), math.log(3.4e-7))) == "[2.8e-07, 3.4e-07]"
    assert format_interval((-math.inf, math.inf)) == "[0, 1]"
    assert [format_log(x) for x in (-1.234, 2.0, math.inf, -math.inf, math.nan)] == ["−1.23", "2.00", "∞", "−∞", "?"]
    assert [format_seconds(x) for x in (0.42, 9.99, 59.7, 185.0)] == ["0.4 s", "10.0 s", "1 min 00 s", "3 min 05 s"]


def test_the_ledger_says_what_moved(estimate: Estimate) -> None:
    moved = [row.cells[-1] for row in ledger_rows(estimate)]
    assert moved == ["", "", "", "+0.10"]  # nothing before the first number; a bound moves nothing
    assert [row.concludes for row in ledger_rows(estimate)] == [False, False, False, True]


def test_the_text_has_every_row_and_the_verdict(estimate: Estimate) -> None:
    text = estimate_text(estimate)
    for row in ledger_rows(estimate):
        for cell in row.cells:
            assert cell in text
    assert "P = 3.1e-07 [2.8e-07, 3.4e-07] (95 %), log P = −15.00 ± 0.05. Converged; 25,000 model calls" in text
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 120


def test_no_catastrophe_is_an_upper_bound_with_advice(nothing_found: Estimate) -> None:
    assert verdict(nothing_found).startswith("No catastrophe seen: P ≤ 3.4e-04 (95 %). Not converged")
    assert "• monte carlo: no hits" in estimate_text(nothing_found)


def test_own_advice_comes_first(nothing_found: Estimate) -> None:
    nothing_found.advice = ("return a severity",)
    assert "• return a severity" in estimate_text(nothing_found)
    assert "no hits" not in estimate_text(nothing_found)


def test_rich_markup_in_a_name_is_shown_as_it_is() -> None:
    odd = evidence("[red]m[/red]", -15.0, (-15.1, -14.9))
    assert "[red]m[/red]" in estimate_text(Estimate((odd,), odd))
    assert estimate_table(Estimate((odd,), odd)).renderables


def test_html_stands_alone_and_is_escaped(estimate: Estimate) -> None:
    estimate.advice = ("try <b>more</b>",)
    html = estimate_html(estimate)
    assert "&lt;b&gt;more" in html
    assert "<script" not in html
    assert "http" not in html
    for row in ledger_rows(estimate):
        assert f">{row.cells[2]}</td>" in html


def test_catastrophes_become_equal_draws_and_weighted_particles(estimate: Estimate) -> None:
    pytest.importorskip("xarray")
    groups = report_arviz.datasets(estimate)
    posterior = groups["posterior"]
    assert dict(posterior.sizes)["draw"] == 5
    # Weights 1/2, 1/4, 1/4: of five draws, each particle has n·w to within one, and those of weight 0 have none.
    counts = np.bincount(posterior["start"].values[0].astype(int), minlength=5)
    assert np.all(np.abs(counts - 5 * Catastrophes.weights) < 1)
    assert counts[0] == counts[4] == 0
    assert posterior["outer.wind"].dims == ("chain", "draw", "outer.wind_dim_0")
    assert posterior["observation.0.image"].shape == (1, 5, 4, 4)
    np.testing.assert_array_equal(groups["catastrophes"]["weight"], Catastrophes.weights)


def test_to_arviz(estimate: Estimate) -> None:
    pytest.importorskip("arviz")
    data = report_arviz.to_arviz(estimate)
    assert data["posterior"].attrs["log_prob"] == -15.0
    np.testing.assert_array_equal(data["sample_stats"]["severity"].values[0], data["posterior"]["start"].values[0])


@pytest.mark.parametrize("engine", ["netCDF4", "h5netcdf"])
def test_netcdf_there_and_back(estimate: Estimate, engine: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    xarray = pytest.importorskip("xarray")
    pytest.importorskip(engine)
    find = report_arviz.importlib.util.find_spec
    monkeypatch.setattr(report_arviz.importlib.util, "find_spec", lambda name: find(name) if name == engine else None)
    path = report_arviz.to_netcdf(estimate, tmp_path / "catastrophes.nc")
    with xarray.open_dataset(path, group="catastrophes", engine=engine.lower()) as particles:
        np.testing.assert_array_equal(particles["outer.wind"], Catastrophes.sites["outer/wind"])
        np.testing.assert_array_equal(particles["action"].astype(bool), Catastrophes.action)
        ledger = json.loads(particles.attrs["ledger"])
    assert [row["method"] for row in ledger] == ["monte carlo", "tempering", "guide bound", "importance"]
    assert ledger[0]["log_prob"] == "-inf"


def test_netcdf_needs_a_writer(estimate: Estimate, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_arviz.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"probest\[report\]"):
        report_arviz.to_netcdf(estimate, tmp_path / "catastrophes.nc")


def test_nothing_to_export_is_an_error(nothing_found: Estimate) -> None:
    pytest.importorskip("xarray")
    with pytest.raises(ValueError, match="larger budget"):
        report_arviz.datasets(nothing_found)


def test_plots(estimate: Estimate, nothing_found: Estimate) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    from probest.report.plots import plot_catastrophes, plot_estimate, plot_history

    history = [SimpleNamespace(step=i, task_loss=0.1, log_prob=-5.0 - i) for i in range(5)]
    run = SimpleNamespace(history=history, before=estimate, after=estimate, audit=nothing_found)
    figure = Figure()
    forest, empty, training, images, lines = figure.subplots(1, 5)
    assert len(plot_estimate(estimate, forest).get_yticklabels()) == 4
    plot_estimate(nothing_found, empty)
    plot_history(run, training)
    assert plot_catastrophes(Catastrophes(), images, rows=2, columns=2).get_images()[0].get_array().shape == (9, 9)
    assert len(plot_catastrophes(SimpleNamespace(weights=np.ones(3), observation=np.ones((3, 40))), lines).lines) == 3
    figure.canvas.draw()


def test_progress_is_silent_where_nobody_reads(capfd: pytest.CaptureFixture[str]) -> None:
    with Progress("estimate") as progress:
        progress.update(1, 2, "half")
    assert capfd.readouterr() == ("", "")


def test_progress_shows_the_outermost_line_only(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with Progress("train") as outer, Progress("estimate") as inner, Progress("off", enabled=False) as off:
        assert [p._line is not None for p in (outer, inner, off)] == [True, False, False]
        outer.update(1.5, 2.5, "[odd] text")
        inner.update(1)
    with Progress("again") as again:
        assert again._line is not None
    assert capfd.readouterr().out == ""


def test_a_comparison_bounds_what_was_not_found() -> None:
    nothing = SimpleNamespace(log_prob=-math.inf, lower=-math.inf, upper=-9.5, converged=False)
    found = SimpleNamespace(log_prob=-20.0, lower=-21.0, upper=-19.0, converged=True)
    one = Candidate("trained", 0.98, nothing, found, 1_000, 2.0)  # type: ignore[arg-type]
    console = Console(width=80, file=StringIO())
    console.print(comparison_table("before and after", [one]))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "≤ 7.5e-05" in text
    assert "≤ −9.5" in text.replace("-9.5", "−9.5")
    assert "20" in text
