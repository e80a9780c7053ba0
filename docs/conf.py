"""How the documentation is built: ``make docs``, into build/docs. Notebooks are run on the way."""

from __future__ import annotations

import os
import re
import shutil
import sys
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

# Notebooks are sources of the documentation, and live beside it: they are copied in before Sphinx looks.
NOTEBOOKS = HERE / "notebooks"
NOTEBOOKS.mkdir(exist_ok=True)
for path in sorted((HERE.parent / "notebooks").glob("*.py")):
    shutil.copyfile(path, NOTEBOOKS / path.name)

project = "probest"
author = "The probest authors"
copyright = f"2026, {author}"  # noqa: A001 - Sphinx's name
release = version = version_of("probest")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["conf.py", "figures.py"]  # Python files count as notebooks
html_theme = "furo"
html_title = "probest"
html_static_path = ["_static"]
html_theme_options = {"source_directory": "docs/", "navigation_with_keys": True}
suppress_warnings = ["mystnb.unknown_mime_type"]  # widgets, of progress lines

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_custom_formats = {".py": ["jupytext.reads", {"fmt": "py:percent"}]}
nb_execution_mode = "force"  # a cache would not see that probest has changed
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_merge_streams = True
os.environ.setdefault("OMP_NUM_THREADS", "1")

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # signatures have them
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True, "show-inheritance": False}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

_FIELD = re.compile(r"^[A-Za-z_][\w, ]*: \S")


def fields_as_lists(app: Any, what: str, name: str, of: Any, options: Any, lines: list[str]) -> None:  # noqa: ARG001
    """A paragraph of ``name: what it is`` as a list of these; lines that go on are indented, or not."""
    blocks, found = "\n".join(lines).split("\n\n"), []
    for block in blocks:
        rows = block.split("\n")
        first = next((row for row in rows if row.strip()), "")
        if _FIELD.match(first):
            rows = [f"* {row}" if _FIELD.match(row) else f"  {row.strip()}" if row.strip() else row for row in rows]
        found.append("\n".join(rows))
    lines[:] = "\n\n".join(found).split("\n")


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", fields_as_lists, priority=900)  # after napoleon
