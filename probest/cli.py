"""The command line: ``probest demo``, ``probest estimate FILE.py:problem``, ``probest train FILE.py:problem``.

Exit codes: 0 when the result converged, 2 for input that cannot be used, 3 when the result did not converge.
Results go to standard output, progress and errors to standard error.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from rich.console import Console

from probest.report.comparison import Candidate, comparison_table
from probest.report.record import estimate_record

if TYPE_CHECKING:
    from probest import Estimate, Problem, TrainingRun
    from probest.report.protocols import EstimateLike

__all__ = ["InputError", "main"]

CONVERGED, BAD_INPUT, NOT_CONVERGED = 0, 2, 3
DEMOS = ("digits", "pendulum")
DEMO_NATS = 12.0  # how much less likely the demo makes the catastrophe
DEMO_STEPS = 400
DEMO_QUICK = {"steps": 50, "budget": 10_000, "check_budget": 10_000}


class InputError(Exception):
    """Something on the command line, or in the file that it names, cannot be used."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except InputError as error:
        Console(stderr=True, soft_wrap=True).print(f"probest {options.command}: {error}", markup=False, style="red")
        return BAD_INPUT


# estimate and train ---------------------------------------------------------------------------------------------------


def _estimate(options: argparse.Namespace) -> int:
    from probest import estimate

    _, problem = load_problem(options.problem)
    with _problem_errors(options.problem):
        result = estimate(
            problem,
            budget=options.budget,
            checker_budget=options.checker_budget,
            precision=options.precision,
            seed=options.seed,
        )
    _show(result, as_json=options.json)
    _save(result, options.netcdf)
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
    result = run.believed
    _show(result, as_json=options.json)
    for line in run.advice:
        Console(stderr=True).print(f"• {line}", markup=False, soft_wrap=True)
    _save(result, options.netcdf)
    return CONVERGED if run.converged else NOT_CONVERGED


def _show(result: Estimate, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(estimate_record(result), indent=2))  # noqa: T201
    else:
        Console().print(result)


def _save(result: Estimate, path: Path | None) -> None:
    if path is None:
        return
    try:
        result.to_netcdf(path)
    except (ImportError, ValueError) as error:
        raise InputError(f"{path} was not written: {error}") from error


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
        """An estimate of ``model``, and an audit of it by the methods and budget that train() uses for its own."""
        problem = module.problem(model)
        found = estimate(problem, budget=budget, seed=1)
        checked = audit(problem, budget=4 * budget, seed=2)
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


def _save_demo(module: ModuleType, before: EstimateLike, run: TrainingRun, folder: Path) -> list[Path]:
    from matplotlib.figure import Figure

    from probest.report.arviz import to_netcdf
    from probest.report.plots import plot_catastrophes, plot_estimate, plot_history

    name = module.__name__.rpartition(".")[2]
    folder.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(15.0, 4.5), layout="constrained")
    catastrophes, ledger, history = figure.subplots(1, 3, width_ratios=(1.2, 1.0, 1.0))
    side = getattr(module, "SIDE", None)
    netcdf = []
    if before.catastrophes is not None:
        plot_catastrophes(before.catastrophes, catastrophes, shape=(side, side) if side else None)
        netcdf.append(to_netcdf(before, folder / f"{name}.nc"))
    plot_estimate(before, ledger)
    plot_history(run, history)
    picture = folder / f"{name}.png"
    figure.savefig(picture, dpi=120)
    return [picture, *netcdf]


def _ready_problem(name: str) -> ModuleType:
    """``probest.models.NAME`` where probest is installed, ``models/NAME.py`` beside ``probest/`` in a checkout."""
    package = Path(__file__).parent
    if (package / "models").is_dir():
        return importlib.import_module(f"probest.models.{name}")
    if str(package.parent) not in sys.path:
        sys.path.append(str(package.parent))
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="probest",
        description="How likely is a catastrophe, and how to train it away.",
        epilog="Exit codes: 0 the result converged, 2 bad input, 3 the result did not converge.",
    )
    parser.add_argument("--version", action=_Version)
    commands = parser.add_subparsers(dest="command", required=True)

    demo = commands.add_parser("demo", help="estimate a rare catastrophe, train it away, audit the result")
    demo.add_argument("--model", choices=DEMOS, default="digits")
    demo.add_argument(
        "--out", type=Path, default=Path("demo-out"), metavar="DIR", help="for the picture and the netCDF file"
    )
    demo.add_argument("--quick", action="store_true", help="fewer steps and smaller budgets")
    demo.set_defaults(run=_demo)

    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("problem", metavar="FILE.py:problem", help="a Problem, or a function that returns one")
    shared.add_argument("--seed", type=_at_least(0), default=0)
    shared.add_argument("--json", action="store_true", help="print JSON instead of a table")
    shared.add_argument("--netcdf", type=Path, metavar="PATH", help="write the catastrophes there")

    estimate = commands.add_parser("estimate", parents=[shared], help="estimate log P")
    estimate.add_argument("--budget", type=_at_least(1), default=50_000, metavar="CALLS", help="model calls (50,000)")
    estimate.add_argument(
        "--checker-budget", type=_at_least(1), metavar="CASES", help="cases that the checker judges (as many as calls)"
    )
    estimate.add_argument(
        "--precision", type=_positive, default=0.05, metavar="NATS", help="standard error to aim for (0.05)"
    )
    estimate.set_defaults(run=_estimate)

    train = commands.add_parser(
        "train",
        parents=[shared],
        help="train M until log P is low enough; FILE.py has problem, task and data, and perhaps a teacher",
    )
    train.add_argument("--until", type=float, required=True, metavar="LOG_P", help="stop when log P is below this")
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
    return parser


class _Version(argparse.Action):
    """Print the version, looked up only when it is asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="print the version")

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from probest import __version__

        print(f"probest {__version__}")  # noqa: T201
        parser.exit()


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
