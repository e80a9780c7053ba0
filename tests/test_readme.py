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
