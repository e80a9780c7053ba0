"""Reports, on fakes: what an estimate and a training run look like, without a backend."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal, localcontext
from html.parser import HTMLParser
from io import StringIO
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from probest.evidence import Evidence, Level
from probest.report import arviz as report_arviz
from probest.report import netcdf, plots
from probest.report.comparison import Candidate, comparison_table
from probest.report.document import write_report, write_run_report
from probest.report.html import estimate_html, run_html, search_html
from probest.report.progress import Progress
from probest.report.tables import estimate_table, estimate_text, ledger_rows, verdict
from probest.report.text import format_interval, format_log, format_prob, format_seconds, in_words
from probest.result import Case


class Catastrophes(Mapping[str, Any]):
    """Five cases of a program with a scalar site, a vector site and a nested observation."""

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
    drawn: Any = field(default_factory=Catastrophes)
    settings: Any = field(default_factory=lambda: {"seed": 3, "versions": {"probest": "1"}})
    nearest: Any = None
    plates: Any = field(default_factory=dict)
    observed: Any = field(default_factory=dict)
    calls: int = 25_000
    seconds: float = 130.4

    def blocks(self, rows: int) -> Iterator[Any]:
        if self.catastrophes is not None:
            yield self.catastrophes

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


def naming(estimate: Any, **options: Any) -> Any:
    return report_arviz.Naming.of(estimate, options.get("dims"), options.get("coords"))


def test_catastrophes_become_equal_draws_and_weighted_particles(estimate: Estimate) -> None:
    pytest.importorskip("xarray")
    groups = report_arviz.datasets(estimate, naming(estimate))
    posterior = groups["posterior"]
    assert dict(posterior.sizes)["draw"] == 5
    # Weights 1/2, 1/4, 1/4: of five draws, each particle has n·w to within one, and those of weight 0 have none.
    counts = np.bincount(posterior["start"].values[0].astype(int), minlength=5)
    assert np.all(np.abs(counts - 5 * Catastrophes.weights) < 1)
    assert counts[0] == counts[4] == 0
    assert posterior["outer.wind"].dims == ("chain", "draw", "outer.wind_dim_0")
    assert posterior["observation.0.image"].shape == (1, 5, 4, 4)
    particles = report_arviz.particles(estimate, estimate.catastrophes, naming(estimate))
    np.testing.assert_array_equal(particles["weight"], Catastrophes.weights)


def test_dimensions_are_named_by_the_user(estimate: Estimate) -> None:
    pytest.importorskip("xarray")
    named = naming(estimate, dims={"outer/wind": ["when"]}, coords={"when": ["dawn", "noon", "dusk"]})
    posterior = report_arviz.datasets(estimate, named)["posterior"]
    assert posterior["outer.wind"].dims == ("chain", "draw", "when")
    assert list(posterior["when"].values) == ["dawn", "noon", "dusk"]
    with pytest.raises(ValueError, match=r"dims\['outer/wind'\] names 2 axes"):
        report_arviz.datasets(estimate, naming(estimate, dims={"outer/wind": ["a", "b"]}))
    two = naming(estimate, dims={"outer/wind": ["when"]}, coords={"when": [1, 2]})
    with pytest.raises(ValueError, match=r"coords\['when'\] has 2 labels"):
        report_arviz.datasets(estimate, two)


def test_to_arviz(estimate: Estimate) -> None:
    arviz = pytest.importorskip("arviz")
    data = report_arviz.to_arviz(estimate)
    assert type(data).__name__ == ("InferenceData" if arviz.__version__ < "1" else "DataTree")
    assert data["posterior"].attrs["log_prob"] == -15.0
    np.testing.assert_array_equal(data["sample_stats"]["severity"].values[0], data["posterior"]["start"].values[0])
    np.testing.assert_array_equal(data["catastrophes"]["weight"].values, Catastrophes.weights)


@pytest.mark.parametrize("engine", ["netCDF4", "h5netcdf"])
def test_netcdf_there_and_back(estimate: Estimate, engine: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    xarray = pytest.importorskip("xarray")
    pytest.importorskip(engine)
    find = netcdf.importlib.util.find_spec
    monkeypatch.setattr(netcdf.importlib.util, "find_spec", lambda name: find(name) if name == engine else None)
    path = netcdf.to_netcdf(estimate, tmp_path / "catastrophes.nc")
    with xarray.open_dataset(path, group="catastrophes", engine=engine.lower()) as particles:
        np.testing.assert_array_equal(particles["outer.wind"], Catastrophes.sites["outer/wind"])
        np.testing.assert_array_equal(particles["action"].astype(bool), Catastrophes.action)
        assert particles.encoding["unlimited_dims"] == {"particle"}
    back = netcdf.load(path)
    assert back.ledger == estimate.ledger
    assert (back.log_prob, back.converged, back.calls, back.seconds) == (-15.0, True, 25_000, 130.4)
    np.testing.assert_array_equal(back.catastrophes["start"], Catastrophes.sites["start"])
    np.testing.assert_array_equal(back.catastrophes.weights, Catastrophes.weights)
    np.testing.assert_array_equal(back.catastrophes.observation["0.image"], Catastrophes.observation[0]["image"])
    np.testing.assert_array_equal(back.catastrophes.action, Catastrophes.action)
    assert back.interval(0.95) == pytest.approx(IMPORTANCE.interval)
    assert str(back) == estimate_text(estimate)


def test_netcdf_needs_a_writer(estimate: Estimate, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(netcdf.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"probest\[report\]"):
        netcdf.to_netcdf(estimate, tmp_path / "catastrophes.nc")


def test_loading_what_is_none(tmp_path: Any) -> None:
    xarray = pytest.importorskip("xarray")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.nc"):
        netcdf.load(tmp_path / "nowhere.nc")
    (tmp_path / "text.nc").write_text("no")
    with pytest.raises(ValueError, match=r"text\.nc"):
        netcdf.load(tmp_path / "text.nc")
    xarray.Dataset({"x": ("i", [1.0])}).to_netcdf(tmp_path / "other.nc", engine="h5netcdf")
    with pytest.raises(ValueError, match="holds no estimate"):
        netcdf.load(tmp_path / "other.nc")


def test_nothing_found_is_kept_too(nothing_found: Estimate, tmp_path: Any) -> None:
    pytest.importorskip("arviz")
    pytest.importorskip("netCDF4")
    with pytest.raises(ValueError, match="larger budget"):
        report_arviz.to_arviz(nothing_found)
    nothing_found.advice = NO_HITS.notes
    for drawn in (Catastrophes(), None):
        nothing_found.drawn = drawn
        back = netcdf.load(netcdf.to_netcdf(nothing_found, tmp_path / "nothing.nc"))
        assert back.catastrophes is None
        assert (back.drawn is None) == (drawn is None)
        assert str(back) == estimate_text(nothing_found)


LEVELS = tuple(Level((i - 6.0, i - 5.0, i - 4.0, i - 3.0, i - 2.0), -3.0 * i, 500, 0.5) for i in range(5))


def history(step: int) -> SimpleNamespace:
    look = {2: -8.0, 4: -math.inf}.get(step)
    return SimpleNamespace(step=step, task_loss=0.1, taught_loss=math.nan, log_prob=-5.0 - step, look=look)


@pytest.fixture
def run(estimate: Estimate, nothing_found: Estimate) -> SimpleNamespace:
    cost = SimpleNamespace(calls=1_000, seconds=2.5)
    return SimpleNamespace(
        history=[history(i) for i in range(5)], before=estimate, after=estimate, audit=nothing_found, believed=estimate,
        converged=False, advice=("train <longer>",), costs=SimpleNamespace(parts={"steps": cost, "audit": cost}),
    )  # fmt: skip


@pytest.mark.parametrize("style", ["default", "grayscale", "arviz"])
def test_plots_fit_their_figures(estimate: Estimate, nothing_found: Estimate, run: SimpleNamespace, style: str) -> None:
    plt = pytest.importorskip("matplotlib.pyplot")
    if style == "arviz":
        arviz = pytest.importorskip("arviz")
        style = "arviz-whitegrid" if arviz.__version__ < "1" else "arviz-vibrant"
    tempered = replace(TEMPERING, levels=LEVELS, diagnostics={"island_ess": 12.0})
    sampled = replace(IMPORTANCE, diagnostics={"ess": 800.0, "khat": 0.3})
    parts = (replace(TEMPERING, stratum="switch=0"), replace(NO_HITS, stratum="switch=1"))
    full = Estimate((NO_HITS, tempered, BOUND, replace(tempered, converged=False), sampled), sampled)
    stratified = Estimate((*parts, IMPORTANCE), IMPORTANCE)
    backend = plt.get_backend()
    plt.switch_backend("agg")
    try:
        with plt.style.context(style):
            drawn = {
                "ledger": plots.plot_ledger(full),
                "nothing": plots.plot_ledger(nothing_found),
                "strata": plots.plot_intervals(stratified),
                "several": plots.plot_intervals({"2 layers": full, "none": nothing_found}, exact=-15.2),
                "path": plots.plot_path(full),
                "pairs": plots.plot_pairs(full),
                "cases": plots.plot_cases(full),
                "diagnostics": plots.plot_diagnostics(full),
                "history": plots.plot_history(run),
                "costs": plots.plot_costs(run),
            }
            for name, axes in drawn.items():
                figure = np.ravel(axes)[0].figure
                figure.canvas.draw()
                outside = figure.get_tightbbox(figure.canvas.get_renderer()).padded(-0.02).extents
                assert np.all(outside[:2] >= -0.05), name
                assert np.all(outside[2:] <= figure.get_size_inches() + 0.05), name
                plt.close(figure)
        assert len(drawn["ledger"].get_yticklabels()) == 5
        assert drawn["strata"].get_yticklabels()[0].get_text().startswith("switch=0")
        assert drawn["several"].get_yticklabels()[0].get_text().startswith("2 layers")
        assert drawn["pairs"].shape == (4, 4)
    finally:
        plt.close("all")
        plt.switch_backend(backend)


def test_plots_say_what_is_missing(estimate: Estimate, nothing_found: Estimate, run: SimpleNamespace) -> None:
    pytest.importorskip("matplotlib")
    for kind, message in {
        "path": "no method of the ledger tempered",
        "pairs": "no catastrophe was found",
        "cases": "no catastrophe was found",
        "diagnostics": "no method of the ledger drew",
        "pie": "expected one of 'ledger'",
    }.items():
        with pytest.raises(ValueError, match=message):
            plots.plot_result(nothing_found, kind)
    with pytest.raises(ValueError, match="expected one of 'history', 'costs', 'ledger'"):
        plots.plot_run(run, "pie")
    with pytest.raises(ValueError, match="exact has 3 values for 1 results"):
        plots.plot_intervals({"one": estimate}, exact=[1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="'gusts' is not a coordinate; there are"):
        plots.plot_pairs(estimate, names=["gusts"])


def test_what_is_not_installed_is_asked_for(estimate: Estimate, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    for name in ("matplotlib", "matplotlib.pyplot", "arviz"):
        monkeypatch.setitem(sys.modules, name, None)
    for work in (
        lambda: plots.plot_ledger(estimate),
        lambda: write_report(estimate, tmp_path / "out.html"),
        lambda: report_arviz.to_arviz(estimate),
    ):
        with pytest.raises(ImportError, match=r'pip install "probest\[report\]"'):
            work()


def test_a_case_is_drawn_by_the_user(estimate: Estimate) -> None:
    plt = pytest.importorskip("matplotlib.pyplot")
    shown: list[Case] = []
    plots.plot_cases(estimate, show=lambda ax, case: shown.append(case), rows=1, columns=3)
    plt.close("all")
    assert [case.severity for case in shown] == [1.0, 2.0, 3.0]  # those with weight
    assert shown[0].observation[0]["image"].shape == (4, 4)
    assert shown[0].sites["outer/wind"].tolist() == [3.0, 4.0, 5.0]


@pytest.mark.parametrize("found", [True, False])
def test_a_report_stands_alone(estimate: Estimate, nothing_found: Estimate, found: bool, tmp_path: Any) -> None:
    pytest.importorskip("matplotlib")
    one = estimate if found else nothing_found
    one.advice = ("try <b>more</b>",)
    text = write_report(one, tmp_path / "out.html", title="a <title>").read_text()
    assert "a &lt;title&gt;" in text
    assert "&lt;b&gt;more" in text
    assert "<script" not in text
    assert "http" not in text.replace("data:image", "")
    assert ("One in about 3.3 million" in text) == found
    assert ("P ≤ 3.4e-04" in text) == (not found)
    parse(text)


def test_a_report_of_a_run_stands_alone(run: SimpleNamespace, tmp_path: Any) -> None:
    pytest.importorskip("matplotlib")
    text = write_run_report(run, tmp_path / "out.html").read_text()
    assert text.count("data:image/png") >= 3
    parse(text)


def parse(text: str) -> None:
    """Every element that is opened is closed, in order."""

    class Checker(HTMLParser):
        open: list[str] = []  # noqa: RUF012

        def handle_starttag(self, tag: str, attrs: Any) -> None:
            if tag not in ("meta", "img"):
                self.open.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert self.open.pop() == tag

    checker = Checker()
    checker.open = []
    checker.feed(text)
    assert checker.open == []


def test_runs_and_searches_as_html(run: SimpleNamespace, estimate: Estimate) -> None:
    text = run_html(run)
    assert "train &lt;longer&gt;" in text
    parse(text)
    search = SimpleNamespace(
        base=estimate, log_prob=-9.0, interval=(-9.2, -8.8), kl=3.0, worst_case=-8.9, efficiency=0.9, converged=True,
        advice=(), history=np.array([[-15.0, 0.0, 1.0], [-9.1, 3.0, 1.0]]),
    )  # fmt: skip
    parse(search_html(search))
    plt = pytest.importorskip("matplotlib.pyplot")
    plots.plot_search(search)
    plt.close("all")


@pytest.mark.parametrize(
    ("log_prob", "text"),
    [
        (0.0, "Most"),
        (-math.log(250), "One in about 250"),
        (-math.log(81_802), "One in about 82,000"),
        (-15.065, "One in about 3.5 million"),
        (-math.log(2e14), "One in about 200 trillion"),
        (-1000.0, "One in about 10^434"),
    ],
)
def test_probabilities_in_words(log_prob: float, text: str) -> None:
    assert in_words(log_prob) == text


def test_a_stratum_moves_nothing() -> None:
    part = replace(TEMPERING, method="switch=0", stratum="switch=0")
    rows = ledger_rows(Estimate((part, TEMPERING, replace(part, log_prob=-30.0), IMPORTANCE), IMPORTANCE))
    assert [row.cells[-1] for row in rows] == ["", "", "", "+0.10"]


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
