"""Reports: one HTML file that stands alone, for whoever was not there when it was computed.

No scripts and no fetches: pictures are in the file. The order is that of the questions that a reader has: how likely,
is that to be believed, what happens then, and how is it done again.
"""

from __future__ import annotations

import base64
import datetime as dt
import math
from collections.abc import Callable, Iterable, Mapping
from html import escape
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probest.report.extras import extra
from probest.report.html import STATES, ledger_html
from probest.report.plots import plot_costs, plot_history, plot_result
from probest.report.plots.axes import figure_of
from probest.report.plots.ledger import KHAT
from probest.report.protocols import RunLike
from probest.report.tables import advice, case_rows, run_rows
from probest.report.text import (
    format_count,
    format_interval,
    format_log,
    format_prob,
    format_seconds,
    format_short,
    in_words,
)
from probest.result import Case, Result

if TYPE_CHECKING:
    import os

__all__ = ["write_report", "write_run_report"]

CLAIMS = {
    "unbiased": "has mean P over seeds: its number of samples was fixed beforehand",
    "consistent": "tends to P as the budget grows; it stops, or chooses, by what it has seen",
    "lower": "bounds P from below",
    "upper": "bounds P from above",
    "heuristic": "comes without a guarantee; it tells other methods where to look",
}

_STYLE = """
:root { --ink: #1c2126; --soft: #5d6770; --line: #d9dee2; --paper: #ffffff; --card: #f6f8f9; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 2.5rem 1.5rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .2rem; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .5rem; padding-top: .9rem; border-top: 1px solid var(--line); }
p { margin: .5rem 0; max-width: 46rem; }
.soft { color: var(--soft); font-size: .9rem; }
.verdict { margin: 1.4rem 0; padding: 1rem 1.2rem; background: var(--card); border-left: 5px solid var(--state); }
.verdict .number { font-size: 2rem; font-weight: 600; line-height: 1.2; font-variant-numeric: tabular-nums; }
.badge { display: inline-block; padding: 0 .55rem; border-radius: 1rem; color: #fff; background: var(--state);
  font-size: .85rem; }
figure { margin: 1rem 0; } figure img { max-width: 100%; height: auto; display: block; }
figcaption { color: var(--soft); font-size: .9rem; max-width: 46rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; margin: .6rem 0; }
th, td { padding: .25em .8em; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
td.wrap { white-space: normal; overflow-wrap: anywhere; }
code { font-size: .92em; }
"""


def write_report(
    result: Result,
    path: str | os.PathLike[str],
    *,
    title: str = "",
    show: Callable[[Any, Case], None] | None = None,
) -> Path:
    """See :meth:`probest.result.Result.report`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    title = title or "How likely is a catastrophe?"
    return _write(path, title, [_verdict(result), *_evidence(result, show), _again(result.settings)])


def write_run_report(
    run: RunLike,
    path: str | os.PathLike[str],
    *,
    title: str = "",
    show: Callable[[Any, Case], None] | None = None,
) -> Path:
    """A report of a training run: before and after, the way there, what it cost, and the estimate to believe."""
    believed = run.believed
    settings = believed.settings
    title = title or "Training catastrophes away"
    head, rows = run_rows(run)
    parts = [
        _verdict(believed, "The estimate to believe, after training"),
        _section("Before, after, and by others", _table(rows, head)),
        _section(
            "The way there",
            _picture(lambda: plot_history(run), "log P and the task's loss over training."),
            _picture(lambda: plot_costs(run), "What the model calls and the seconds were spent on."),
        ),
        *_evidence(believed, show),
        _again(settings),
    ]
    return _write(path, title, parts)


def _write(path: str | os.PathLike[str], title: str, parts: Iterable[str]) -> Path:
    now = dt.datetime.now(dt.UTC).strftime("%Y-%m-%d %H:%M UTC")
    path = Path(path)
    path.write_text(
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>"
        f'<h1>{escape(title)}</h1><p class="soft">A probest report, {now}</p>{"".join(parts)}</body></html>\n',
        encoding="utf-8",
    )
    return path


def _verdict(result: Result, what: str = "") -> str:
    state, colour = STATES[result.converged]
    if math.isfinite(result.log_prob):
        number = f"P = {format_prob(result.log_prob)}"
        between = f"95 % interval {format_interval((result.lower, result.upper))}"
        said = (
            f"{in_words(result.log_prob)} draws from the adversary D ends in a catastrophe. log P = "
            f"{format_log(result.log_prob)} ± {format_log(result.std_error)} nats."
        )
    else:
        number = f"P ≤ {format_prob(result.upper)}"
        between = "with 95 % confidence"
        said = "No catastrophe was seen; this is all that the draws which were made say."
    items = "".join(f"<li>{escape(line)}</li>" for line in advice(result))
    trust = "" if result.converged else "<p>This is the best number that there is, and not one to rely on:</p>"
    return (
        f'<div class="verdict" style="--state:{colour}"><div class="soft">{escape(what)}</div>'
        f'<div class="number">{escape(number)}</div>'
        f'<div>{escape(between)} &nbsp;<span class="badge" style="--state:{colour}">{state}</span></div>'
        f"<p>{escape(said)}</p>{trust}{f'<ul>{items}</ul>' if items else ''}"
        f'<div class="soft">{format_count(result.calls)} model calls, {format_seconds(result.seconds)}</div></div>'
    )


def _evidence(result: Result, show: Callable[[Any, Case], None] | None) -> list[str]:
    """The argument, the catastrophes, and how healthy the samples are."""
    claims = dict.fromkeys(row.claim for row in result.ledger)
    strata = any(row.stratum is not None for row in result.ledger)
    parts = [
        _section(
            "The argument",
            "<p>Every method that ran, in order, and by how many nats each moved the answer. Methods that look in "
            "different ways and come to the same number are what makes it believable.</p>",
            ledger_html(result),
            _picture(
                lambda: plot_result(result, "ledger"),
                "Hollow marks and broken lines have not converged; the band is the conclusion.",
            ),
            _picture(lambda: plot_result(result, "intervals"), "What each stratum adds to P.") if strata else "",
            _table([(claim, CLAIMS[claim]) for claim in claims], ("claim", "the number")),
        )
    ]
    if any(len(row.levels) > 1 for row in result.ledger):
        caption = "Populations of cases walk from what D draws to catastrophes; each level is a point."
        parts.append(_section("From D to the event", _picture(lambda: plot_result(result, "path"), caption)))
    if result.catastrophes is not None:
        parts.append(
            _section(
                "The catastrophes",
                _picture(
                    lambda: plot_result(result, "pairs"),
                    "Coordinates that catastrophes move furthest from where D has them: crosses are catastrophes, dots "
                    "draws of D.",
                ),
                _picture(lambda: plot_result(result, "cases", show=show), "Some of them, as the model saw them."),
            )
        )
    if result.nearest is not None:
        parts.append(_nearest(result.nearest))
    parts.append(
        _section(
            "Health",
            _picture(
                lambda: plot_result(result, "diagnostics"), f"Few effective cases, or k above {KHAT}: do not rely."
            ),
            _notes(result),
        )
    )
    return parts


def _nearest(case: Case) -> str:
    what = "The likeliest catastrophe that was met" if case.severity >= 0 else "What came nearest to a catastrophe"
    rows = [("severity", format_short(case.severity)), *case_rows(case)]
    return _section(what, _table(rows, ("", "value")))


def _notes(result: Result) -> str:
    rows = [
        (row.method, ", ".join(f"{k} {format_short(v)}" for k, v in row.diagnostics.items()), " ".join(row.notes))
        for row in result.ledger
    ]
    return f'<div class="scroll">{_table(rows, ("method", "diagnostics", "notes"))}</div>'


def _again(settings: Mapping[str, Any]) -> str:
    if not settings:
        return ""
    rows = []
    for name, value in settings.items():
        shown = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, Mapping) else str(value)
        rows.append((name.replace("_", " "), shown))
    return _section("To run it again", "<p>The same settings give the same numbers.</p>", _table(rows))


def _section(title: str, *parts: str) -> str:
    return f"<h2>{escape(title)}</h2>{''.join(parts)}"


def _table(rows: Iterable[tuple[str, ...]], head: tuple[str, ...] = ()) -> str:
    def line(cells: tuple[str, ...], tag: str) -> str:
        return "<tr>" + "".join(f'<{tag} class="wrap">{escape(cell)}</{tag}>' for cell in cells) + "</tr>"

    top = f"<thead>{line(head, 'th')}</thead>" if head else ""
    return f"<table>{top}<tbody>{''.join(line(row, 'td') for row in rows)}</tbody></table>"


def _picture(draw: Callable[[], Any], caption: str) -> str:
    """A figure as PNG within the page; the reason in its place where there is nothing to draw."""
    plt = extra("matplotlib.pyplot", "reports")
    try:
        axes = draw()
    except ValueError as error:
        return f'<p class="soft">{escape(str(error).partition(": ")[2] or str(error))}</p>'
    figure, buffer = figure_of(axes), BytesIO()
    figure.savefig(buffer, format="png", dpi=144)
    plt.close(figure)
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{escape(caption)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )
