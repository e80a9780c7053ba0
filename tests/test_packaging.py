"""What is promised about installing probest: light imports, complete metadata, pinned versions, types."""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
HEAVY = ("torch", "pyro", "jax", "numpyro", "matplotlib", "arviz", "xarray", "sklearn", "transformers", "ray")


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_requirement_is_pinned() -> None:
    pinned = {normalised(line.split("==")[0]) for line in PINS}
    extras = [requirement for group in PROJECT["optional-dependencies"].values() for requirement in group]
    names = {normalised(re.match(r"[\w.-]+", text)[0]) for text in [*PROJECT["dependencies"], *extras]}
    assert names - {"probest"} <= pinned


def test_pins_are_plain_versions() -> None:
    assert [line for line in PINS if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []


def test_all_has_every_extra_that_users_need() -> None:
    extras = PROJECT["optional-dependencies"]
    (everything,) = extras["all"]
    assert set(re.search(r"\[(.*)\]", everything)[1].split(",")) == set(extras) - {"all", "bench", "dev", "docs"}


def test_types_and_license_are_there() -> None:
    assert (ROOT / "probest" / "py.typed").is_file()
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_the_changelog_has_this_version_or_is_unreleased() -> None:
    headings = re.findall(r"^## \[(.*?)\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert headings[0] in ("Unreleased", PROJECT["version"])


def test_importing_probest_imports_no_backend() -> None:
    code = f"import sys, probest, probest.cli; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_exist_and_are_documented() -> None:
    probest = importlib.import_module("probest")
    assert {"Problem", "estimate", "train", "Estimate", "Evidence"} <= set(probest.__all__)
    undocumented = [
        name for name in probest.__all__ if callable(getattr(probest, name)) and not getattr(probest, name).__doc__
    ]
    assert undocumented == []


def test_every_module_of_the_reports_has_all() -> None:
    package = importlib.import_module("probest.report")
    for module in pkgutil.iter_modules(package.__path__, "probest.report."):
        assert importlib.import_module(module.name).__all__


def test_a_wheel_holds_the_package_its_types_and_the_ready_problems(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    from zipfile import ZipFile

    build = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)], capture_output=True, text=True, cwd=ROOT, check=True
    )
    names = set(ZipFile(tmp_path / done.stdout.split()[-1]).namelist())
    assert {"probest/cli.py", "probest/py.typed", "probest/models/__init__.py", "probest/models/digits.py"} <= names
    assert not {name.split("/")[0] for name in names} - {"probest", f"probest-{PROJECT['version']}.dist-info"}
