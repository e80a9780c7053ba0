"""A line that says how far the work has come: in a terminal or a notebook, and nowhere else.

    with Progress("estimate") as progress:
        progress.update(done=12_000, total=50_000, text="tempering, level 4")

It writes to standard error, so that output can be piped. Only the outermost of nested lines is shown, because
`train` calls `estimate`.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any, ClassVar, Protocol

__all__ = ["Progress", "Told"]

Told = Callable[[float, float | None, str], None]
"""``callback(done, total, text)``: how much is done, of how much (None: not known), and what is being done."""


class Progress:
    """A progress line, silent unless someone is there to read it.

    Args:
        title: what is being done.
        enabled: False for silence; True leaves it to the output: a terminal or a notebook shows the line.
        callback: told whatever the line would show, wherever it runs.

    Raises TypeError if the callback cannot be called.
    """

    _shown: ClassVar[int] = 0

    def __init__(self, title: str, enabled: bool = True, callback: Told | None = None) -> None:
        if callback is not None and not callable(callback):
            raise TypeError(f"callback is a {type(callback).__name__}: expected callback(done, total, text)")
        self.title = title
        self.enabled = enabled
        self.callback = callback
        self._line: _Line | None = None

    def __enter__(self) -> Progress:
        if self.enabled and Progress._shown == 0:
            self._line = _line(self.title)
        Progress._shown += self._line is not None
        return self

    def update(self, done: float, total: float | None = None, text: str = "") -> None:
        """Show that ``done`` of ``total`` is done (no total: a moving bar), and ``text`` after it."""
        if self._line is not None:
            self._line.update(done, total, text)
        if self.callback is not None:
            self.callback(done, total, text)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._line is not None:
            line, self._line = self._line, None
            Progress._shown -= 1
            line.close()


class _Line(Protocol):
    def update(self, done: float, total: float | None, text: str) -> None: ...

    def close(self) -> None: ...


def _line(title: str) -> _Line | None:
    if _in_notebook():
        return _NotebookLine(title)
    return _TerminalLine(title) if sys.stderr.isatty() else None


def _in_notebook() -> bool:
    """Whether a Jupyter kernel runs this; IPython in a terminal is a terminal."""
    if "IPython" not in sys.modules or importlib.util.find_spec("ipykernel") is None:
        return False
    from IPython import get_ipython

    return type(get_ipython()).__name__ == "ZMQInteractiveShell"


class _TerminalLine:
    """A bar drawn by rich, which goes away when the work is done."""

    def __init__(self, title: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        note = TextColumn("{task.fields[note]}", markup=False)
        self._bars = Bars(*columns, note, console=Console(stderr=True), transient=True, refresh_per_second=4)
        self._task = self._bars.add_task(title, total=None, note="")
        self._bars.start()

    def update(self, done: float, total: float | None, text: str) -> None:
        # MofN prints whole numbers.
        self._bars.update(self._task, completed=int(done), total=None if total is None else int(total), note=text)

    def close(self) -> None:
        self._bars.stop()


class _NotebookLine:
    """A line of text that is replaced in place: it needs no widgets, and a saved notebook keeps only the last."""

    def __init__(self, title: str) -> None:
        from IPython.display import display

        self._title = title
        self._handle: Any = display({"text/plain": title}, raw=True, display_id=True)

    def update(self, done: float, total: float | None, text: str) -> None:
        of = "" if total is None else f" of {total:,.0f}"
        self._handle.update({"text/plain": f"{self._title}: {done:,.0f}{of}  {text}"}, raw=True)

    def close(self) -> None:
        self._handle.update({"text/plain": "", "text/html": ""}, raw=True)  # shown as HTML, nothing takes no room
