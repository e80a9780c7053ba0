"""The command line: ``probest estimate``, ``train``, ``audit``, ``report``, ``demo`` and ``models``.

Problems are named ``FILE.py:problem``. Exit codes: 0 when the result converged, 2 for input that cannot be used, 3 when
the result did not converge. Results go to standard output, progress and errors to standard error.

Settings that are not given come from ``[tool.probest]`` of the nearest pyproject.toml, or of the file that ``--config``
names: those of a table ``[tool.probest.COMMAND]``, then those above it, by the names of the options.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import inspect
import json
import math
import sys
import time
import tomllib
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from rich.console import Console

from probest.report.comparison import Candidate, comparison_table
from probest.report.record import estimate_record

if TYPE_CHECKING:
    from probest import Problem, TrainingRun
    from probest.estimators.base import Estimator
    from probest.result import Result

    Show = Callable[..., None]

__all__ = ["InputError", "main"]

CONVERGED, BAD_INPUT, NOT_CONVERGED = 0, 2, 3
DEMOS = ("digits", "pendulum", "language")
DEMO_NATS = 12.0  # how much less likely the demo makes the catastrophe
DEMO_STEPS = 400
DEMO_AUDIT = 2  # times an estimate's budget, for each audit
DEMO_QUICK = {"steps": 50, "budget": 10_000, "check_budget": 10_000}


class InputError(Exception):
    """Something on the command line, or in a file that it names, cannot be used."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    parser, commands = _parser()
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    command = next((word for word in arguments if word in commands), "")
    try:
        if command:
            _configure(commands, command, arguments)
        options = parser.parse_args(arguments)
        return int(options.run(options))
    except InputError as error:
        text = f"probest {command}: {error}"
        Console(stderr=True, soft_wrap=True).print(text, markup=False, style="red", highlight=False)
        return BAD_INPUT


# estimate, audit, report and train ------------------------------------------------------------------------------------


def _estimate(options: argparse.Namespace) -> int:
    result, show = _estimated(options)
    _done(result, options, show)
    return CONVERGED if result.converged else NOT_CONVERGED


def _estimated(options: argparse.Namespace) -> tuple[Result, Show | None]:
    """An estimate of the problem that the options name, and the function that draws its cases, if the file has one."""
    from probest import estimate

    file, problem = load_problem(options.problem)
    with _problem_errors(options.problem):
        result = estimate(
            problem,
            budget=options.budget,
            checker_budget=options.checker_budget,
            precision=options.precision if options.estimator is None else None,
            estimator=options.estimator,
            seed=options.seed,
        )
    return result, getattr(file, "show", None)


def _audit(options: argparse.Namespace) -> int:
    from probest import audit

    file, problem = load_problem(options.problem)
    with _problem_errors(options.problem):
        result = audit(problem, methods=options.estimator or None, budget=options.budget, seed=options.seed)
    _done(result, options, getattr(file, "show", None))
    return CONVERGED if result.converged else NOT_CONVERGED


def _report(options: argparse.Namespace) -> int:
    """An HTML report of an estimate that was saved, or that is made now."""
    from probest import load

    result: Result
    show: Show | None = None
    if Path(options.problem).suffix in (".nc", ".netcdf"):
        try:
            result = load(options.problem)
        except (FileNotFoundError, ImportError, ValueError) as error:
            raise InputError(str(error)) from error
    else:
        result, show = _estimated(options)
    options.out = options.out or [Path("report.html")]
    _done(result, options, show)
    return CONVERGED if result.converged else NOT_CONVERGED


def _train(options: argparse.Namespace) -> int:
    from probest import train

    file, problem = load_problem(options.problem)
    task = _attribute(file, ("task", "task_loss"), "the loss of the ordinary task, task(model, batch)")
    data = _attribute(file, ("data", "load_data"), "the arrays that batches are drawn from")
    if inspect.isfunction(data) or hasattr(data, "cache_info"):
        data = data()[0]
    with _problem_errors(options.problem):
        run = train(
            problem,
            task=task,
            data=data,
            teacher=getattr(file, "teacher", None),
            until_log_prob=options.until,
            steps=options.steps,
            budget=options.budget,
            max_pressure=options.max_pressure,
            learning_rate=options.learning_rate,
            seed=options.seed,
            checkpoint=options.checkpoint,
        )
    for line in run.advice:
        Console(stderr=True).print(f"• {line}", markup=False, soft_wrap=True)
    _done(run.believed, options, getattr(file, "show", None), run)
    return CONVERGED if run.converged else NOT_CONVERGED


def _done(
    result: Result,
    options: argparse.Namespace,
    show: Show | None = None,
    run: TrainingRun | None = None,
) -> None:
    """Print a result, and write it to the files that were asked for. The report is that of the run, if there is one."""
    if options.json:
        print(json.dumps(estimate_record(result), indent=2))  # noqa: T201
    else:
        Console().print(result)
    for path in options.out or []:
        try:
            _write(result, path, show, run)
        except (ImportError, ValueError, OSError) as error:
            raise InputError(f"{path} was not written: {error}") from error
        Console(stderr=True).print(f"wrote {path}", markup=False, soft_wrap=True, highlight=False)


def _write(result: Result, path: Path, show: Show | None, run: TrainingRun | None) -> None:
    if path.suffix == ".json":
        path.write_text(json.dumps(estimate_record(result), indent=2) + "\n", encoding="utf-8")
    elif path.suffix == ".html":
        (run or result).report(path, show=show)
    elif path.suffix == ".nc":
        result.to_netcdf(path)
    else:
        from probest.report.plots.axes import figure_of

        figure_of((run or result).plot()).savefig(path, dpi=150)


def _models(options: argparse.Namespace) -> int:
    """The ready problems, as their modules' first sentences have them."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    folder = _models_folder()
    found = {}
    for path in sorted(folder.glob("[a-z]*.py")):
        said = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        found[path.stem] = " ".join(said.partition("\n\n")[0].split())
    if options.json:
        print(json.dumps(found, indent=2))  # noqa: T201
        return CONVERGED
    table = Table("name", "what it is", box=SIMPLE_HEAD, pad_edge=False)
    for name, said in found.items():
        table.add_row(name, said)
    console = Console()
    console.print(table)
    console.print(
        "probest demo --model NAME shows digits, pendulum and language; models/README.md has numbers.", highlight=False
    )
    return CONVERGED


def _models_folder() -> Path:
    """Where the ready problems are: within an installed probest, or beside it in a checkout."""
    package = Path(__file__).parent
    return package / "models" if (package / "models").is_dir() else package.parent / "models"


# FILE.py:name ---------------------------------------------------------------------------------------------------------


def load_problem(spec: str) -> tuple[ModuleType, Problem]:
    """The module and the problem that ``FILE.py:name`` names.

    ``name`` may be a :class:`~probest.Problem` or a function that returns one; without ``:name`` it is ``problem``.
    """
    from probest import Problem

    file, _, name = spec.rpartition(":") if spec.rpartition(":")[0] else (spec, "", "problem")
    module = _run_file(Path(file))
    if not hasattr(module, name):
        candidates = [key for key, value in vars(module).items() if isinstance(value, Problem)]
        hint = f"it has the problem {', '.join(candidates)}" if candidates else f"add {name} = Problem(D, M, C)"
        raise InputError(f"{file} has no {name!r}: {hint}")
    found = getattr(module, name)
    if inspect.isfunction(found):
        with _file_errors(Path(file)), _problem_errors(spec):
            found = found()
    if not isinstance(found, Problem):
        raise InputError(f"{name!r} in {file} is a {type(found).__name__}: expected a probest.Problem")
    return module, found


def _run_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise InputError(f"{path} is not a file: expected FILE.py:problem")
    if path.suffix != ".py":
        raise InputError(f"{path} is not a Python file: expected FILE.py:problem")
    spec = importlib.util.spec_from_file_location(path.stem, path.resolve())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # so that its functions and dataclasses can be found by name
    sys.path.insert(0, str(path.resolve().parent))  # its neighbours, as for `python FILE.py`
    try:
        with _file_errors(path):
            spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.resolve().parent))
    return module


def _attribute(module: ModuleType, names: tuple[str, ...], meaning: str) -> Any:
    for name in names:
        if hasattr(module, name):
            return getattr(module, name)
    raise InputError(
        f"{module.__file__} has no {names[0]!r} ({meaning}): `probest train` needs problem, task and data in one file"
    )


@contextmanager
def _file_errors(path: Path) -> Iterator[None]:
    """What goes wrong in the user's file is reported with its line there, not with ours."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path.resolve())]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        where = f"{path}:{line}" if line else str(path)
        raise InputError(f"{where}: {type(error).__name__}: {error}") from error


@contextmanager
def _problem_errors(spec: str) -> Iterator[None]:
    """What probest refuses, it says what to change about, without a traceback; errors of other code keep theirs."""
    from probest import SiteError
    from probest.backends.base import BatchingError

    try:
        yield
    except (BatchingError, SiteError) as error:
        raise InputError(f"{spec}: {error}") from error
    except ValueError as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
        if Path(__file__).resolve().parent not in raised_in.parents:
            raise
        raise InputError(f"{spec}: {error}") from error


# demo -----------------------------------------------------------------------------------------------------------------


def _demo(options: argparse.Namespace) -> int:
    """Train M the ordinary way, on sampled adversarial examples, and with probest: the three side by side."""
    from probest import audit, estimate, train

    console = Console()
    module = _ready_problem(options.model)
    settings: dict[str, Any] = {"budget": 50_000, "steps": DEMO_STEPS} | getattr(module, "TRAINING", {})
    if options.quick:
        settings |= DEMO_QUICK
    budget = settings["budget"]

    def judged(name: str, model: Any, calls: int, seconds: float) -> Candidate:
        """An estimate of ``model``, and an audit of it as train() makes its own."""
        problem = module.problem(model)
        found = estimate(problem, budget=budget, seed=1)
        checked = audit(problem, budget=DEMO_AUDIT * budget, seed=2)
        return Candidate(name, module.accuracy(model), found, checked, calls, seconds)

    console.print(f"Training M ({options.model}) the ordinary way")
    model, seconds = _timed(module.train_model)
    ordinary = judged("ordinary", model, 0, seconds)
    console.print(ordinary.estimate)
    if not math.isfinite(ordinary.estimate.log_prob):
        console.print("There is nothing to train against: a larger budget may find a catastrophe.")
        return NOT_CONVERGED

    console.print("Training M against its catastrophes")
    run: TrainingRun = train(
        module.problem(model),
        task=module.task_loss,
        data=module.load_data()[0],
        seed=3,
        audit_budget=DEMO_AUDIT * budget,
        **({"until_log_prob": ordinary.estimate.log_prob - DEMO_NATS} | settings),
    )
    console.print(run.after)
    spent = run.costs.steps.calls + run.costs.looks.calls, run.costs.steps.seconds + run.costs.looks.seconds
    trained = Candidate("probest", module.accuracy(run.model), run.after, run.audit or run.after, *spent)

    console.print("Training M on catastrophes found by sampling, for as many model calls")
    sampled, seconds = _timed(lambda: module.adversarial_baseline(model, spent[0], 4))
    baseline = judged("sampled adversarial", sampled, spent[0], seconds)

    console.print(comparison_table(f"{options.model}, before and after", [ordinary, baseline, trained]))
    for line in run.advice:
        console.print(f"• {line}", markup=False, soft_wrap=True)
    for path in _save_demo(module, ordinary.estimate, run, options.out):
        console.print(f"wrote {path}")
    return CONVERGED  # the demo did its job; whether the run converged is in its table


def _save_demo(module: ModuleType, before: Result, run: TrainingRun, folder: Path) -> list[Path]:
    name = module.__name__.rpartition(".")[2]
    folder.mkdir(parents=True, exist_ok=True)
    show = getattr(module, "show", None)
    found = [
        before.report(folder / f"{name}-before.html", title=f"{name}: the model as it is", show=show),
        run.report(folder / f"{name}-trained.html", title=f"{name}: trained", show=show),
    ]
    return [*found, before.to_netcdf(folder / f"{name}.nc")]


def _ready_problem(name: str) -> ModuleType:
    """``probest.models.NAME`` where probest is installed, ``models/NAME.py`` beside ``probest/`` in a checkout."""
    folder = _models_folder()
    if folder.parent == Path(__file__).parent:
        return importlib.import_module(f"probest.models.{name}")
    if str(folder.parent) not in sys.path:
        sys.path.append(str(folder.parent))
    try:
        return importlib.import_module(f"models.{name}")
    except ImportError as error:
        raise InputError(
            f'the demo cannot be imported ({error}): pip install "probest[pyro,numpyro,report,models]"'
        ) from error


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    return work(), time.perf_counter() - start


# Arguments ------------------------------------------------------------------------------------------------------------


def _parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser, and those of its commands."""
    parser = argparse.ArgumentParser(
        prog="probest",
        description="How likely is a catastrophe, and how to train it away.",
        epilog="Exit codes: 0 the result converged, 2 bad input, 3 the result did not converge.",
    )
    parser.add_argument("--version", action=_Version)
    commands = parser.add_subparsers(dest="command", required=True)

    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("problem", metavar="FILE.py:problem", help="a Problem, or a function that returns one")
    shared.add_argument("--seed", type=_at_least(0), default=0)
    shared.add_argument("--json", action="store_true", help="print JSON instead of a table")
    shared.add_argument(
        "--out",
        type=_target,
        action="append",
        metavar="PATH",
        help="write it there too: .html a report, .nc all particles, .json, .png or .svg a picture; may be repeated",
    )

    config = argparse.ArgumentParser(add_help=False)
    config.add_argument("--config", type=Path, metavar="FILE.toml", help="settings, in place of pyproject.toml's")

    estimating = argparse.ArgumentParser(add_help=False)
    estimating.add_argument("--budget", type=_at_least(1), default=50_000, metavar="CALLS", help="model calls (50,000)")
    estimating.add_argument(
        "--checker-budget", type=_at_least(1), metavar="CASES", help="cases that the checker judges (as many as calls)"
    )
    estimating.add_argument(
        "--precision", type=_positive, default=0.05, metavar="NATS", help="standard error to aim for (0.05)"
    )
    estimating.add_argument(
        "--estimator",
        type=_estimator,
        metavar="NAME",
        help="one method instead of the default ones, such as tempering, or 'Tempering(particles=2000)'",
    )

    estimate = commands.add_parser("estimate", parents=[shared, estimating, config], help="estimate log P")
    estimate.set_defaults(run=_estimate)

    audit = commands.add_parser("audit", parents=[shared, config], help="estimate log P by several means")
    audit.add_argument("--budget", type=_at_least(1), default=200_000, metavar="CALLS", help="of all (200,000)")
    audit.add_argument(
        "--estimator", type=_estimator, action="append", metavar="NAME", help="a method; may be repeated"
    )
    audit.set_defaults(run=_audit, seed=1)

    report = commands.add_parser(
        "report",
        parents=[shared, estimating, config],
        help="write an HTML report, of a problem or of a file that estimate --out FILE.nc wrote",
    )
    report.set_defaults(run=_report)

    train = commands.add_parser(
        "train",
        parents=[shared, config],
        help="train M until log P is low enough; FILE.py has problem, task and data, and perhaps a teacher",
    )
    train.add_argument("--until", type=float, metavar="LOG_P", help="stop when log P is below this", default=-25.0)
    train.add_argument("--steps", type=_at_least(1), default=1_000, help="at most (1,000)")
    train.add_argument("--budget", type=_at_least(1), default=50_000, metavar="CALLS", help="of each estimate (50,000)")
    train.add_argument(
        "--max-pressure",
        type=_positive,
        default=0.06,
        help="gradient of safety, at most, in units of what the task is worth (0.06)",
    )
    train.add_argument("--learning-rate", type=_positive, default=1e-3, help="of Adam (0.001)")
    train.add_argument("--checkpoint", type=Path, metavar="PATH", help="where to save, and to resume from")
    train.set_defaults(run=_train)

    demo = commands.add_parser("demo", help="estimate a rare catastrophe, train it away, audit the result")
    demo.add_argument("--model", choices=DEMOS, default="digits")
    demo.add_argument(
        "--out", type=Path, default=Path("demo-out"), metavar="DIR", help="for the reports and the netCDF file"
    )
    demo.add_argument("--quick", action="store_true", help="fewer steps and smaller budgets")
    demo.set_defaults(run=_demo)

    models = commands.add_parser("models", help="list the ready problems")
    models.add_argument("--json", action="store_true", help="print JSON instead of a table")
    models.set_defaults(run=_models)
    return parser, dict(commands.choices)


class _Version(argparse.Action):
    """Print the version, looked up only when it is asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="print the version")

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from probest import __version__

        print(f"probest {__version__}")  # noqa: T201
        parser.exit()


def _configure(commands: Mapping[str, argparse.ArgumentParser], command: str, arguments: Sequence[str]) -> None:
    """Make the settings of the configuration file the defaults of a command. Raises InputError for what it lacks."""
    parser = commands[command]
    options = {
        action.dest: action for action in parser._actions if action.option_strings and action.dest not in _NOT_SETTINGS
    }
    given, _ = _config_of().parse_known_args(arguments)
    if "config" not in {action.dest for action in parser._actions}:
        return
    path, table = _settings(given.config)
    own = table.get(command, {})
    if not isinstance(own, Mapping):
        raise InputError(f"{path}: {command} is a {type(own).__name__}: expected a table of the command's settings")
    everywhere = {name: value for name, value in table.items() if not isinstance(value, Mapping)}
    known = {action.dest for other in commands.values() for action in other._actions}
    for name, value in {**everywhere, **own}.items():
        dest = name.replace("-", "_")
        if dest not in (options if name in own else known) or dest in _NOT_SETTINGS:
            have = ", ".join(option.replace("_", "-") for option in options)
            raise InputError(f"{path}: {name!r} is not a setting of {command}: it has {have}")
        if dest in options and not _is_given(options[dest], arguments):
            parser.set_defaults(**{dest: _setting(path, name, value, options[dest])})


def _is_given(option: argparse.Action, arguments: Sequence[str]) -> bool:
    """Whether an option is on the command line: one that may be repeated would be added to its setting."""
    return any(word.partition("=")[0] in option.option_strings for word in arguments)


_NOT_SETTINGS = frozenset({"help", "config", "version"})


def _config_of() -> argparse.ArgumentParser:
    only = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    only.add_argument("--config", type=Path)
    return only


def _settings(path: Path | None) -> tuple[Path | None, Mapping[str, Any]]:
    """The table of settings, and the file that it is from; an empty one where there is no file."""
    found = path
    if found is None:
        here = Path.cwd()
        found = next((p for p in (folder / "pyproject.toml" for folder in (here, *here.parents)) if p.is_file()), None)
    if found is None:
        return None, {}
    try:
        read = tomllib.loads(found.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{found} cannot be read: {error}") from error
    tool = read.get("tool", {}).get("probest")
    if tool is None:
        tool = {} if path is None or "tool" in read else read
    if not isinstance(tool, Mapping):
        raise InputError(f"{found}: tool.probest is a {type(tool).__name__}: expected a table")
    return found, tool


def _setting(path: Path | None, name: str, value: Any, option: argparse.Action) -> Any:
    """A setting as the option's own type has it."""
    if isinstance(option.const, bool):
        if not isinstance(value, bool):
            raise InputError(f"{path}: {name} = {value!r}: expected true or false")
        return value
    many, read = isinstance(option, argparse._AppendAction), option.type
    assert callable(read)
    try:
        values = [read(str(v)) for v in (value if many and isinstance(value, list) else [value])]
    except (argparse.ArgumentTypeError, ValueError) as error:
        raise InputError(f"{path}: {name} = {value!r}: {error}") from error
    return values if many else values[0]


def _target(text: str) -> Path:
    path = Path(text)
    if path.suffix not in (".html", ".nc", ".json", ".png", ".svg", ".pdf"):
        raise argparse.ArgumentTypeError(f"{text} should end in .html, .nc, .json, .png, .svg or .pdf")
    return path


def _estimator(text: str) -> Estimator:
    """An estimator by its class, whose name may be written in small letters with dashes, and arguments that are plain
    numbers, strings or truth values.
    """
    import probest

    try:
        call = ast.parse(text.replace("-", "_"), mode="eval").body
        name = call.func if isinstance(call, ast.Call) else call
        options = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords} if isinstance(call, ast.Call) else {}
        wanted = name.id.replace("_", "").lower() if isinstance(name, ast.Name) else ""
    except (SyntaxError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no estimator: write it as Tempering(particles=2000)") from error
    public = {known: getattr(probest, known) for known in probest.__all__}
    methods = {known: one for known, one in public.items() if isinstance(one, type) and hasattr(one, "run")}
    found = {known.lower(): one for known, one in methods.items()}
    if wanted not in found:
        raise argparse.ArgumentTypeError(f"{text!r} is no estimator: there are {', '.join(methods)}")
    try:
        built: Estimator = found[wanted](**options)
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from error
    return built


def _at_least(least: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} must be at least {least}")
        return value

    return integer


def _positive(text: str) -> float:
    value = float(text)
    if not 0.0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be a positive number")
    return value


if __name__ == "__main__":
    sys.exit(main())
