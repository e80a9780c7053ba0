"""Every notebook runs from top to bottom, with the smaller settings that it has for tests.

All that a worker of pytest runs share a kernel, whose names are deleted in between: to import everything eight times
would take a minute.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))
DRAWS = re.compile(r"\.plot\(|plot_intervals\(|plt\.subplots\(")
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


def test_there_are_notebooks() -> None:
    assert len(NOTEBOOKS) >= 5


@pytest.fixture(scope="module")
def kernel() -> Iterator[Any]:
    """A running kernel."""
    for module in ("torch", "pyro", "numpyro", "ipykernel", "jupytext", "nbclient"):
        pytest.importorskip(module)
    manager = pytest.importorskip("jupyter_client").KernelManager(kernel_name="python3")
    backend = "module://matplotlib_inline.backend_inline"
    manager.start_kernel(env={**os.environ, **ONE_THREAD, "PROBEST_QUICK": "1", "MPLBACKEND": backend})
    yield manager
    manager.shutdown_kernel(now=True)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path: Path, kernel: Any, tmp_path: Path) -> None:
    import jupytext
    import nbclient
    import nbformat

    notebook = jupytext.read(path)
    begin = f"%reset -f\n%cd -q {tmp_path}\nimport pyro; pyro.clear_param_store(); del pyro"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(begin))
    client = nbclient.NotebookClient(notebook, timeout=120, km=kernel)
    try:
        client.execute()  # raises CellExecutionError, which shows the cell
    finally:
        client.kc.stop_channels()
    shown = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    pictures = [cell for cell in notebook.cells if cell.cell_type == "code" and DRAWS.search(cell.source)]
    assert pictures
    for cell in pictures:
        assert any("image/png" in output.get("data", {}) for output in cell.outputs), cell.source
    texts = " ".join(str(output.get("text", "")) for output in shown)
    assert "Traceback" not in texts
    assert "Warning" not in texts
