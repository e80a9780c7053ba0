"""The command line on small files: what it prints, and its exit codes 0, 2 and 3."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import probest
from probest import cli

pytest.importorskip("numpyro")

HALFSPACE = """
import numpyro
import numpyro.distributions as dist
from probest import Problem

LIMIT = 4.0

def adversary():
    return numpyro.sample("x", dist.Normal(0.0, 1.0).expand([3]).to_event(1))

def checker(x, y):
    return y - LIMIT

problem = Problem(adversary, lambda x: x.sum() / 3**0.5, checker)

def make():
    return Problem(adversary, lambda x: x[0], checker)

number = 3
"""


# A gain k is trained to leave little of a disturbance; the task wants it near 1. P = Φ(−3 / |1 − k / 2|).
CART = """
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax.tree_util import Partial
from probest import Problem

def adversary():
    return numpyro.sample("push", dist.Normal(0.0, 1.0))

def left(params, push):
    return push - params["gain"] * push / 2

def task(model, batch):
    (push,) = batch
    return 0.01 * jnp.mean((model(push) - 0.5 * push) ** 2)

problem = Problem(adversary, Partial(left, {"gain": jnp.array(0.5)}), lambda push, rest: rest - 3.0)
data = (jnp.linspace(-2.0, 2.0, 64),)
"""


@pytest.fixture(autouse=True)
def no_trace_of_the_file() -> Iterator[None]:
    """The command line runs once in a process; a test runs it many times."""
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and "pytest-of" in str(sys.modules[name].__file__):
            del sys.modules[name]


@pytest.fixture
def halfspace(tmp_path: Path) -> Path:
    path = tmp_path / "halfspace_problem.py"
    path.write_text(HALFSPACE)
    return path


@pytest.mark.parametrize("name", ["problem", "make"])
def test_estimate_prints_json(halfspace: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.main(["estimate", f"{halfspace}:{name}", "--json", "--budget", "20000", "--precision", "0.2"])
    record = json.loads(capsys.readouterr().out)
    exact = math.log(0.5 * math.erfc(4.0 / math.sqrt(2.0)))
    assert code == 0
    assert record["converged"]
    assert abs(record["log_prob"] - exact) < 0.5
    assert record["calls"] <= 20_000


def test_estimate_prints_the_ledger_and_saves(halfspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = [halfspace.with_name(f"found{suffix}") for suffix in (".nc", ".html", ".json", ".png")]
    wanted = [word for path in written for word in ("--out", str(path))]
    assert cli.main(["estimate", str(halfspace), "--precision", "0.2", *wanted]) == 0
    assert "Converged" in capsys.readouterr().out
    assert json.loads(written[2].read_text())["converged"]
    report = halfspace.with_name("again.html")
    assert cli.main(["report", str(written[0]), "--out", str(report)]) == 0
    for path in (*written, report):
        assert path.stat().st_size > 1_000


def test_a_method_by_its_name(halfspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("tempering", "Tempering(particles=256)", "line-sampling"):
        cli.main(["estimate", str(halfspace), "--json", "--budget", "5000", "--estimator", name])
        row = json.loads(capsys.readouterr().out)["ledger"][-1]
        assert row["method"] == name.partition("(")[0].replace("-", " ").lower()


def test_an_audit_has_a_row_for_each_method(halfspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    methods = ["--estimator", "line-sampling", "--estimator", "tempering"]
    assert cli.main(["audit", str(halfspace), "--json", "--budget", "20000", *methods]) == 0
    record = json.loads(capsys.readouterr().out)
    assert [row["method"] for row in record["ledger"]] == ["line sampling", "tempering"]
    exact = math.log(0.5 * math.erfc(4.0 / math.sqrt(2.0)))
    assert abs(record["log_prob"] - exact) < 0.5


CONFIG = """
[tool.probest]
seed = 5
steps = 3  # of train, and no concern of estimate

[tool.probest.estimate]
budget = 7_000
estimator = "Tempering(particles=256)"
json = true
"""


@pytest.mark.parametrize("by", ["pyproject", "option"])
def test_settings_come_from_a_file(
    halfspace: Path, by: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inner = halfspace.parent / "inner"
    inner.mkdir()
    monkeypatch.chdir(inner)
    text = CONFIG if by == "pyproject" else CONFIG.replace("[tool.probest]", "").replace("tool.probest.", "")
    path = halfspace.with_name("pyproject.toml" if by == "pyproject" else "own.toml")
    path.write_text(text)
    extra = [] if by == "pyproject" else ["--config", str(path)]
    cli.main(["estimate", str(halfspace), *extra])
    settings = json.loads(capsys.readouterr().out)["settings"]
    assert (settings["seed"], settings["budget"]) == (5, 7_000)
    assert settings["estimator"].startswith("Tempering(particles=256")
    cli.main(["estimate", str(halfspace), *extra, "--seed", "6", "--budget", "6000"])  # what is given wins
    settings = json.loads(capsys.readouterr().out)["settings"]
    assert (settings["seed"], settings["budget"]) == (6, 6_000)


def test_what_may_be_repeated_is_not_added_to_a_setting(
    halfspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(halfspace.parent)
    halfspace.with_name("pyproject.toml").write_text('[tool.probest.audit]\nestimator = ["tempering"]\nbudget = 5000\n')
    for extra, methods in (([], ["tempering"]), (["--estimator", "line-sampling"], ["line sampling"])):
        cli.main(["audit", str(halfspace), "--json", *extra])
        record = json.loads(capsys.readouterr().out)
        assert [row["method"] for row in record["ledger"]] == methods


def test_a_file_runs_once_and_draws_its_cases(halfspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawn = halfspace.with_name("drawn.txt")
    note = f"""
def note(word):
    with open({str(drawn)!r}, "a") as file:
        file.write(word)

note("run ")

def show(ax, case):
    note("case ")
"""
    halfspace.write_text(HALFSPACE + note)
    assert cli.main(["report", str(halfspace), "--out", str(halfspace.with_name("out.html"))]) == 0
    assert drawn.read_text().count("run") == 1
    assert drawn.read_text().count("case") > 1
    capsys.readouterr()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[tool.probest]\nbudgets = 3", "'budgets' is not a setting of estimate: it has seed, json, out, budget"),
        ("[tool.probest.estimate]\nsteps = 3", "'steps' is not a setting of estimate"),
        ("[tool.probest]\nbudget = 0", "budget = 0: 0 must be at least 1"),
        ("[tool.probest]\njson = 1", "json = 1: expected true or false"),
        ("[tool.probest]\nestimate = 1", "'estimate' is not a setting|estimate is a int"),
        ("[tool.probest", "cannot be read"),
    ],
)
def test_bad_settings(
    halfspace: Path, text: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(halfspace.parent)
    halfspace.with_name("pyproject.toml").write_text(text)
    assert cli.main(["estimate", str(halfspace)]) == 2
    assert re.search(message, capsys.readouterr().err.replace("\n", " "))


def test_the_ready_problems_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"digits", "halfspace", "pendulum"} <= set(found)
    assert all(found.values())


def test_a_result_that_did_not_converge_is_exit_code_3(halfspace: Path) -> None:
    halfspace.write_text(HALFSPACE.replace("y - LIMIT", "y > 30.0"))
    assert cli.main(["estimate", str(halfspace), "--budget", "500"]) == 3


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("nothing", {}, "has no 'nothing': it has the problem problem"),
        ("number", {}, "'number' in .* is a int: expected a probest.Problem"),
        ("problem", {"number = 3": "number = 1 / 0"}, r"halfspace_problem.py:19: ZeroDivisionError: division by zero"),
        ("problem", {"number = 3": "number = = 3"}, r"halfspace_problem.py:19: SyntaxError"),
        ("problem", {"number = 3": "import nowhere_to_be_found"}, "ModuleNotFoundError"),
        ("problem", {"Problem(adversary,": "Problem(3,"}, "adversary is a int"),
        ("problem", {"return y - LIMIT": "return x"}, "severity|scalar"),
    ],
)
def test_bad_files(
    halfspace: Path, name: str, change: dict[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = HALFSPACE
    for old, new in change.items():
        text = text.replace(old, new)
    halfspace.write_text(text)
    assert cli.main(["estimate", f"{halfspace}:{name}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("probest estimate: ")
    assert re.search(message, error)
    assert "Traceback" not in error


def test_missing_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["estimate", f"{tmp_path / 'nowhere.py'}:problem"]) == 2
    assert "is not a file: expected FILE.py:problem" in capsys.readouterr().err
    (tmp_path / "notes.txt").write_text("")
    assert cli.main(["estimate", f"{tmp_path / 'notes.txt'}:problem"]) == 2
    assert "is not a Python file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["guess"],
        ["estimate"],
        ["estimate", "f.py", "--budget", "0"],
        ["estimate", "f.py", "--precision", "-1"],
        ["estimate", "f.py", "--out", "catastrophes.txt"],
        ["estimate", "f.py", "--estimator", "guessing"],
        ["estimate", "f.py", "--estimator", "Tempering(particles=2)"],
        ["estimate", "f.py", "--estimator", "Tempering(particles=print(1))"],
    ],
)
def test_bad_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "usage: probest" in capsys.readouterr().err


def test_train_says_what_the_file_must_have(halfspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", str(halfspace), "--until", "-20"]) == 2
    assert "has no 'task'" in capsys.readouterr().err
    halfspace.write_text(HALFSPACE + "\ndef task(model, batch): return 0.0\n")
    assert cli.main(["train", str(halfspace), "--until", "-20"]) == 2
    assert "has no 'data'" in capsys.readouterr().err


@pytest.mark.parametrize(("converged", "code"), [(True, 0), (False, 3)])
def test_train_passes_everything_on(
    halfspace: Path, converged: bool, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: dict[str, Any] = {}

    def train(problem: Any, **options: Any) -> Any:
        seen.update(options)
        return SimpleNamespace(converged=converged, believed="the estimate", advice=("train on",))

    monkeypatch.setattr(probest, "train", train)
    halfspace.write_text(HALFSPACE + "\ntask = len\ndata = (1, 2)\n")
    assert cli.main(["train", str(halfspace), "--until", "-20", "--steps", "7", "--seed", "3"]) == code
    expected = {"task": len, "data": (1, 2), "until_log_prob": -20.0, "steps": 7, "seed": 3, "checkpoint": None}
    assert expected.items() <= seen.items()
    output = capsys.readouterr()
    assert output.out == "the estimate\n"
    assert output.err == "• train on\n"


def test_training_without_a_gradient_is_bad_input(halfspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = HALFSPACE.replace("y - LIMIT", "y > LIMIT") + "\nimport numpy as np\ntask = len\ndata = (np.ones(3),)\n"
    halfspace.write_text(text)
    assert cli.main(["train", str(halfspace), "--until", "-20"]) == 2
    assert "gradient" in capsys.readouterr().err


@pytest.mark.slow
def test_train_for_real(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("optax")
    path = tmp_path / "cart.py"
    path.write_text(CART)
    checkpoint = tmp_path / "cart.safetensors"
    stop = ["--until", "-15", "--steps", "300", "--learning-rate", "0.01"]
    written = [tmp_path / f"run{suffix}" for suffix in (".html", ".png", ".nc")]
    outs = [word for file in written for word in ("--out", str(file))]
    arguments = [*stop, "--checkpoint", str(checkpoint), "--json", *outs]
    assert cli.main(["train", str(path), *arguments]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["upper"] < -14.5
    assert checkpoint.is_file()
    assert all(file.stat().st_size > 1_000 for file in written)
