"""The README's programs run as they are printed, and find what is known to be true."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import norm

from probest.testing import check_estimator
from probest.testing.events import conditioned, half_space

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
PROGRAMS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def run(library: str) -> dict[str, Any]:
    (program,) = (text for text in PROGRAMS if f"import {library}\n" in text)
    names: dict[str, Any] = {"__name__": "readme"}
    exec(compile(program, "README.md", "exec"), names)
    return names


def test_what_it_shows_is_there() -> None:
    root = Path(__file__).parents[1]
    linked = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(linked) > 8
    for target in linked:
        assert (root / target).exists(), target


def test_showing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for module in ("numpyro", "netCDF4", "matplotlib"):
        pytest.importorskip(module)
    import matplotlib.pyplot as plt

    monkeypatch.chdir(tmp_path)
    names = run("numpyro")
    (program,) = (text for text in PROGRAMS if "to_netcdf" in text)
    exec(compile(program, "README.md", "exec"), names)
    plt.close("all")
    assert {path.name for path in tmp_path.iterdir()} == {"out.html", "out.nc"}
    capsys.readouterr()


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_first_program_has_fewer_than_20_lines(program: str) -> None:
    assert len(program.splitlines()) < 20


def test_numpyro_program(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("numpyro")
    result = run("numpyro")["result"]
    assert result.converged
    assert abs(result.log_prob - math.log(2 * norm.sf(5.0))) < 5 * result.std_error
    assert "Converged" in capsys.readouterr().out


@pytest.mark.global_rng
def test_pyro_program(capsys: pytest.CaptureFixture[str]) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("pyro")
    torch.manual_seed(0)
    names = run("pyro")
    result, model = names["result"], names["model"]
    weight, bias = model.weight.detach().double().numpy().ravel(), model.bias.item()
    length = math.sqrt(weight @ weight)
    beta = (3.0 - bias) / length
    assert result.converged
    assert abs(result.log_prob - norm.logsf(beta)) < 5 * result.std_error
    # d log P / db = λ(β) / |w|, λ the inverse Mills ratio: by the closed form, to the 3 % that the gradient claims.
    mills = math.exp(norm.logpdf(beta) - norm.logsf(beta))
    assert model.bias.grad.item() == pytest.approx(mills / length, rel=0.03)
    assert "Converged" in capsys.readouterr().out


def test_an_estimator_of_ones_own() -> None:
    (program,) = (text for text in PROGRAMS if "class Doubled" in text)
    names: dict[str, Any] = {"__name__": "readme"}
    exec(compile(program, "README.md", "exec"), names)
    outcomes = check_estimator(names["Doubled"](), [half_space(2, 3.0), conditioned(3, 2.0, 1.0, 0.5)])
    assert [outcome.run is None for outcome in outcomes] == [False, True]
    assert abs(outcomes[0].error) < 0.3


@pytest.mark.global_rng
def test_training(capsys: pytest.CaptureFixture[str]) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("pyro")
    import pyro
    import pyro.distributions as dist

    from probest import Problem

    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    inputs = torch.randn(200, 4) * torch.tensor([1.0, 0.0, 0.0, 0.0])  # the data say nothing of three weights
    names: dict[str, Any] = {
        "problem": Problem(
            lambda: pyro.sample("x", dist.Normal(torch.zeros(4), 1.0).to_event(1)),
            model,
            lambda x, y: y.squeeze(-1) - 3.0,
        ),
        "task": lambda model, batch: ((model(batch[0]).squeeze(-1) - batch[1]) ** 2).mean(),
        "inputs": inputs,
        "targets": 0.4 * inputs[:, 0],
        "teacher": lambda x: 0.4 * x[0],
    }
    (program,) = (text for text in PROGRAMS if "teacher=teacher" in text)
    exec(compile(program, "README.md", "exec"), names)
    run, worst, again = names["run"], names["worst"], names["again"]
    weight, bias = run.model.weight.detach().double().numpy().ravel(), run.model.bias.item()
    beta = (3.0 - bias) / math.sqrt(weight @ weight)
    assert abs(run.believed.log_prob - norm.logsf(beta)) < 5 * run.believed.std_error
    assert run.believed.log_prob < run.before.log_prob
    assert worst.efficiency > 0.5
    assert abs(again.log_prob - worst.log_prob) < 0.1
    capsys.readouterr()
