"""The programs of the guide run, page by page, as they are printed; what they assert holds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGES = {
    page.stem: programs
    for page in sorted((DOCS / "guide").glob("*.md"))
    if (programs := re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL))
}


@pytest.mark.parametrize("page", PAGES)
def test_the_programs_of_a_page(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    for module in ("numpyro", "matplotlib", "arviz", "netCDF4"):
        pytest.importorskip(module)
    import matplotlib.pyplot as plt

    backend = plt.get_backend()
    plt.switch_backend("agg")
    names: dict[str, Any] = {"__name__": "guide"}
    try:
        for program in PAGES[page]:
            exec(compile(program, f"{page}.md", "exec"), names)
    finally:
        plt.close("all")
        plt.switch_backend(backend)
    capsys.readouterr()


def test_every_page_is_in_the_contents() -> None:
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    for page in (DOCS / "guide").glob("*.md"):
        assert f"guide/{page.stem}" in index
    for notebook in (DOCS.parent / "notebooks").glob("*.py"):
        assert f"notebooks/{notebook.stem}" in index
