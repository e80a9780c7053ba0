"""How good is `estimate(problem)`, with default settings, where log P is known? Five modes and one for estimators.

    python benchmarks/reliability.py --seeds 20 --out reliability.json
    python benchmarks/reliability.py --calls-to-accuracy --seeds 10 --reference ../shared/reference
    python benchmarks/reliability.py --scaling
    python benchmarks/reliability.py --acas --reference ../shared/reference
    python benchmarks/reliability.py --variants --seeds 10
    python benchmarks/reliability.py --exact --estimator tempering --budget 50000

The default mode runs 27 reliability problems, with OpenTURNS on the same functions beside it (`pip install openturns`;
`--no-peers` without). Errors are |error of log P| in nats; `covered` is the share of 95 % intervals that hold the
truth; `wrong` counts runs that are converged and yet off by more than 0.1 + 3 standard errors; `seconds` is the median
from the second run on, when everything is compiled. Ratios compare calls and seconds with the cheapest peer that
states an interval and whose median error is no larger than ours or 0.05, whichever is more: below 1, probest is
cheaper; `inf` where only a peer came within 0.1, `-` where no peer is as accurate. `--calls-to-accuracy` asks for a
precision of 0.05, `--scaling` goes to P = 1e-30 and 1,000 dimensions, `--acas` compares networks with counts of plain
sampling, `--variants` turns, shifts and rescales the problems, `--exact` runs a single estimator on the NumPy events
of the tests.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.optimize import brentq

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from models import acas_xu, reliability  # noqa: E402
from models.reliability import Reliability, band, half_space, islands, parabola, sphere, union  # noqa: E402
from probest import Problem, estimate  # noqa: E402
from probest.estimators.combined import Combined  # noqa: E402
from probest.estimators.importance import Importance  # noqa: E402
from probest.estimators.line_sampling import LineSampling  # noqa: E402
from probest.estimators.surrogate import Surrogate  # noqa: E402
from probest.estimators.tempering import Tempering  # noqa: E402
from probest.evidence import EventLike, Floats  # noqa: E402

OURS = "probest"
ESTIMATORS: dict[str, Any] = {
    "combined": Combined,
    "importance": Importance,
    "lines": LineSampling,
    "surrogate": Surrogate,
    "tempering": Tempering,
}
MARGIN = 0.1  # an error above this and 3 standard errors, of a converged run, is confidently wrong
EQUAL = 0.05  # errors below this count as equal when costs are compared

ONE_SMOOTH_MODE = {"RP8", "RP14", "RP22", "RP38", "RP54", "RP107", "R-S", "AxialBeam", "parab_d2_b5_k0.5"} | {
    name for name in reliability.NAMES if name.startswith("lin_")
}
ALL_AROUND = {"sphere_d100"}
CALLS_ONE_MODE, CALLS_SEVERAL = 300, 2_000


class Run(NamedTuple):
    """One answer and its cost. An interval of NaN: none stated."""

    log_prob: float
    lower: float
    upper: float
    std_error: float
    converged: bool
    calls: int
    seconds: float


@dataclass(frozen=True)
class Case:
    """Something with a known log P. ``tolerance`` is the standard error of that knowledge."""

    name: str
    log_prob: float
    run: Callable[[int], Run]
    event: Callable[[], EventLike]
    tolerance: float = 0.0


@dataclass(frozen=True)
class Row:
    """One method on one case, over the seeds."""

    problem: str
    method: str
    log_prob: float
    calls: float
    median_error: float
    p90_error: float
    covered: float
    converged: float
    wrong: int
    seconds: float
    seeds: int
    calls_ratio: float | None = None
    seconds_ratio: float | None = None
    cheapest_peer: str = ""


# Running --------------------------------------------------------------------------------------------------------------


def of_problem(name: str, log_prob: float, problem: Problem, options: argparse.Namespace, tolerance: float = 0) -> Case:
    """The whole way: `estimate(problem)`."""

    def run(seed: int) -> Run:
        started = time.perf_counter()
        found = estimate(
            problem,
            budget=options.budget,
            precision=options.precision if options.estimator is None else None,
            seed=seed,
            estimator=None if options.estimator is None else ESTIMATORS[options.estimator](),
            progress=False,
        )
        seconds = time.perf_counter() - started
        return Run(found.log_prob, found.lower, found.upper, found.std_error, found.converged, found.calls, seconds)

    return Case(name, log_prob, run, lambda: problem.event, tolerance)


def of_limit_state(case: Reliability, options: argparse.Namespace) -> Case:
    return of_problem(case.name, case.log_prob, case.problem(options.backend), options)


def of_exact_event(event: Any, options: argparse.Namespace) -> Case:
    """An estimator alone, on an event of the tests."""
    method = ESTIMATORS[options.estimator or "combined"]()

    def run(seed: int) -> Run:
        started = time.perf_counter()
        found = method.run(event, budget=options.budget, seed=np.random.SeedSequence(seed)).conclusion
        seconds = time.perf_counter() - started
        return Run(found.log_prob, *found.interval, found.std_error, found.converged, found.calls, seconds)

    return Case(event.name, event.log_prob, run, lambda: event)


def summary(case: Case, method: str, runs: Sequence[Run]) -> Row:
    """What the runs say together. A run that failed (NaN) is infinitely wrong."""
    errors = np.array([_error(run.log_prob, case.log_prob) for run in runs])
    slack = 3 * case.tolerance
    wrong = (run.converged and e > MARGIN + 3 * run.std_error + slack for run, e in zip(runs, errors, strict=True))
    return Row(
        case.name,
        method,
        case.log_prob,
        float(np.median([run.calls for run in runs])),
        float(np.median(errors)),
        float(np.quantile(errors, 0.9, method="higher")),
        float(np.mean([run.lower - slack <= case.log_prob <= run.upper + slack for run in runs])),
        float(np.mean([run.converged for run in runs])),
        int(sum(wrong)),
        float(np.median([run.seconds for run in runs[1:] or runs])),
        len(runs),
    )


def _error(log_prob: float, truth: float) -> float:
    if log_prob == truth:
        return 0.0  # two impossibilities too
    return math.inf if math.isnan(log_prob) else abs(log_prob - truth)


def peer_runs(case: Case, seeds: range) -> Iterator[Row]:
    """OpenTURNS, every method at every sample size. It has no verdict of its own, so it is never 'converged'."""
    import peers

    event = case.event()
    for name in peers.names(event.dim):
        answers = [peers.run(name, event, seed) for seed in seeds]
        runs = [Run(a.log_prob, *a.interval, math.nan, False, a.calls, a.seconds) for a in answers]
        yield summary(case, name, runs)


def with_ratios(ours: Row, others: Sequence[Row]) -> Row:
    """``ours`` against the cheapest of the others that is as accurate and states an interval.

    The ratios are infinite if only others came within ``MARGIN``, and None if none of them is accurate enough.
    """
    target = min(max(ours.median_error, EQUAL), MARGIN)
    equal = [row for row in others if row.median_error <= target and not row.method.startswith("FORM/")]
    if not equal:
        return ours
    fewest = min(equal, key=lambda row: row.calls)
    lost = ours.median_error > MARGIN
    return replace(
        ours,
        calls_ratio=math.inf if lost else ours.calls / fewest.calls,
        seconds_ratio=math.inf if lost else ours.seconds / min(row.seconds for row in equal),
        cheapest_peer=fewest.method,
    )


def assess(cases: Iterable[Case], options: argparse.Namespace) -> tuple[list[Row], list[str]]:
    """A row for each case and method, and what no run may ever do: NaN, a probability above 1, too many calls."""
    rows: list[Row] = []
    broken: list[str] = []
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    for case in cases:
        runs = [case.run(seed) for seed in seeds]
        for seed, run in zip(seeds, runs, strict=True):
            if any(map(math.isnan, (run.log_prob, run.lower, run.upper, run.std_error))):
                broken.append(f"{case.name}, seed {seed}: NaN in {run}")
            if run.log_prob > 0 or run.upper > 0:
                broken.append(f"{case.name}, seed {seed}: a probability above 1 in {run}")
            if run.calls > options.budget:
                broken.append(f"{case.name}, seed {seed}: {run.calls} calls of {options.budget}")
        ours = summary(case, OURS, runs)
        others = list(peer_runs(case, seeds)) if options.peers else []
        rows += [with_ratios(ours, others), *others]
        print(rows[-1 - len(others)], file=sys.stderr, flush=True)
        if options.out is not None:
            write(options.out, rows, broken, options)
    return rows, broken


def write(path: Path, rows: Sequence[Row], broken: Sequence[str], options: argparse.Namespace) -> None:
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    finite = [{k: str(v) if v in (math.inf, -math.inf) else v for k, v in asdict(row).items()} for row in rows]
    path.write_text(json.dumps({"settings": settings, "rows": finite, "broken": list(broken)}, indent=1) + "\n")


# The cases of each mode -----------------------------------------------------------------------------------------------


def reference_problems(options: argparse.Namespace) -> Iterator[Case]:
    for name in chosen(reliability.NAMES, options):
        yield of_limit_state(reliability.case(name), options)


def at_log_prob(family: Callable[[float], Reliability], target: float, low: float, high: float) -> Reliability:
    """The member of a family whose log P is ``target``; its parameter lies between ``low`` and ``high``."""
    return family(brentq(lambda beta: family(beta).log_prob - target, low, high, xtol=1e-10))


def scaling(options: argparse.Namespace) -> Iterator[Case]:
    families: dict[str, Callable[[int, float], Reliability]] = {
        "half-space": half_space,
        "union": lambda dim, beta: union(dim, (beta, beta)),
        "parabola": lambda dim, beta: parabola(dim, beta, 0.5),
        "sphere": sphere,
    }
    cases = [
        (f"{name} d={dim} P=1e-{digits}", family, dim, digits)
        for name, family in families.items()
        for dim in (2, 10, 100, 1_000)
        for digits in (2, 4, 6, 9, 12, 20, 30)
    ]
    names = chosen([name for name, *_ in cases], options)
    for name, family, dim, digits in cases:
        if name in names:
            centre = math.sqrt(dim) if family is sphere else 0.5
            case = at_log_prob(lambda b, f=family, d=dim: f(d, b), -digits * math.log(10), centre, centre + 15)
            yield of_limit_state(replace(case, name=name), options)


def variants(options: argparse.Namespace) -> Iterator[Case]:
    turned = [
        *(half_space(dim, beta) for dim, beta in ((2, 5.0), (20, 6.5), (200, 4.0))),
        *(union(dim, (beta, beta)) for dim, beta in ((2, 4.5), (50, 5.0))),
        *(parabola(dim, beta, kappa) for dim, beta, kappa in ((2, 5.0, 0.5), (30, 4.0, 0.2), (10, 5.0, -0.08))),
        band(10, 4.0, 4.5),
        islands(2, 4.5),
        islands(10, 3.8),
        *(reliability.case(name) for name in ("RP22", "RP33", "RP35", "RP75", "RP89", "FourBranch")),
    ]
    cases = [
        *(case.rotated(seed) for seed, case in enumerate(turned)),
        union(2, (4.0, 4.3), scales=(10.0, 1.0), two_sided=False),
        union(2, (4.3, 4.0), scales=(10.0, 1.0), two_sided=False),
        union(2, (4.0, 4.3), scales=(100.0, 0.1)),
        union(50, (5.0, 5.2), scales=(1.0, 30.0)),
        union(20, (4.0, 4.2, 4.4, 4.6), scales=(1.0, 3.0, 10.0, 30.0), two_sided=False),
        union(20, (5.0, 5.5, 4.8), two_sided=True),
        union(2, (3.0, 6.0)),
        *(half_space(dim, beta) for dim, beta in ((2, 2.5), (3, 6.0), (300, 7.0))),
        *(parabola(dim, beta, kappa) for dim, beta, kappa in ((2, 3.0, 1.0), (2, 7.0, 0.3), (100, 5.0, 0.5))),
        *(sphere(dim, radius) for dim, radius in ((2, 5.0), (10, 7.0), (300, 21.5))),
        band(2, 3.0, 3.2),
        band(100, 5.0, 5.5),
        islands(2, 3.0),
        islands(2, 6.0),
    ]
    names = chosen([case.name for case in cases], options)
    yield from (of_limit_state(case, options) for case in cases if case.name in names)


def exact(options: argparse.Namespace) -> Iterator[Case]:
    from probest.testing.events import EXACT_EVENTS, HIDDEN_EVENTS

    events = (*EXACT_EVENTS, *HIDDEN_EVENTS)

    names = chosen([event.name for event in events], options)
    yield from (of_exact_event(event, options) for event in events if event.name in names)


UNIFORM_DRAWS = 10_000_000
UNIFORM_HITS = {
    "2": (76040, 134800, 176895, 91300, 183489, 121202, 265104, 194563, 28810),
    "4": (42628, 0, 142096, 98212, 177353, 225369, 183453, 185648, 14447),
}
"""Violations of property 2 in ``UNIFORM_DRAWS`` draws from its box, networks 2_1 to 2_9 and 4_1 to 4_9."""


def acas(options: argparse.Namespace) -> Iterator[Case]:
    path = needed(options.reference / "acas_xu.npz")
    counted = [f"{i}_{j}" for i, hits in UNIFORM_HITS.items() for j in range(1, len(hits) + 1)]
    for name in options.nets.split(","):
        if name not in counted:
            raise SystemExit(f"--nets {name}: violations are known for {', '.join(counted)}")
        network = acas_xu.load(path, name)
        laws: tuple[acas_xu.Law, ...] = ("uniform", "normal")
        for law in laws:
            if not chosen([f"acas {name} {law}"], options):
                continue
            if law == "uniform":
                hits, draws = UNIFORM_HITS[name[0]][int(name[2]) - 1], UNIFORM_DRAWS
            else:
                hits, draws = sampled_hits(network, options.draws), options.draws
            log_prob = math.log(hits / draws) if hits else -math.inf
            spread = math.sqrt((1 - hits / draws) / hits) if hits else math.inf
            label = f"acas {name} {law} ({hits} of {draws:.0e})"
            yield of_problem(label, log_prob, acas_xu.problem(options.backend, network, law=law), options, spread)


def sampled_hits(network: acas_xu.Network, draws: int, chunk: int = 100_000) -> int:
    """Violations in ``draws`` plain draws of the normal law, in NumPy and float64."""
    rng, (mean, sd) = np.random.default_rng(20_261_124), acas_xu.parameters("normal")
    hits = 0
    for start in range(0, draws, chunk):
        x: Floats = mean[:, None] + sd[:, None] * rng.standard_normal((5, min(chunk, draws - start)))
        hits += int((acas_xu.severity(np, network, x) >= 0).sum())
    return hits


def chosen(names: Sequence[str], options: argparse.Namespace) -> list[str]:
    """Those that hold one of the parts in ``--problems``; a whole name selects itself alone."""
    parts = [part for part in options.problems.split(",") if part]
    return [name for name in names if not parts or any(p == name or (p in name and p not in names) for p in parts)]


def needed(path: Path) -> Path:
    if not path.exists():
        raise SystemExit(f"--reference: {path} is not there; give the folder of the reference data")
    return path


# Telling --------------------------------------------------------------------------------------------------------------


def table(title: str, columns: Sequence[str], lines: Iterable[Sequence[Any]]) -> Table:
    out = Table(title=title)
    for column in columns:
        out.add_column(column, justify="left" if column in ("problem", "method", "cheapest peer") else "right")
    for line in lines:
        out.add_row(*(_cell(value) for value in line))
    return out


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e3 and math.isfinite(value) else f"{value:.3g}"
    return str(value)


def tell(console: Console, rows: Sequence[Row], options: argparse.Namespace) -> None:
    ours = [row for row in rows if row.method == OURS]
    if options.peers:
        columns = ("problem", "calls ÷ peer", "seconds ÷ peer", "cheapest peer", "median |err|", "calls", "seconds")
        lines = [
            (r.problem, r.calls_ratio, r.seconds_ratio, r.cheapest_peer or None, r.median_error, r.calls, r.seconds)
            for r in ours
        ]
        console.print(table("Against the cheapest peer at equal accuracy", columns, lines))
    columns = ("problem", "method", "log P", "calls", "median |err|", "p90", "covered", "converged", "wrong", "seconds")
    lines = [
        (r.problem, r.method, r.log_prob, r.calls, r.median_error, r.p90_error, r.covered, r.converged, r.wrong,
         r.seconds)
        for r in rows
    ]  # fmt: skip
    console.print(table(f"{options.seeds} seeds, budget {options.budget:,}", columns, lines))
    console.print("\n".join(acceptance(ours)))


def acceptance(rows: Sequence[Row]) -> list[str]:
    """The numbers by which a release is judged."""

    def count(holds: Callable[[Row], bool]) -> str:
        return f"{sum(map(holds, rows))} of {len(rows)}"

    def covered(among: Sequence[Row]) -> str:
        runs = sum(row.seeds for row in among)
        return f"{sum(row.covered * row.seeds for row in among) / runs:.3f} of {runs} runs" if runs else "no runs"

    runs = sum(row.seeds for row in rows)
    wrong = sum(row.wrong for row in rows)
    lines = [
        f"median |error| <= 0.1: {count(lambda r: r.median_error <= 0.1)}",
        f"median |error| <= 0.05: {count(lambda r: r.median_error <= 0.05)}",
        f"p90 |error| <= 0.25: {count(lambda r: r.p90_error <= 0.25)}",
        f"covered: {covered(rows)}",
        f"covered where P < 1e-4: {covered([row for row in rows if row.log_prob < math.log(1e-4)])}",
        f"confidently wrong: {wrong} of {runs} runs",
        f"converged: {sum(row.converged * row.seeds for row in rows) / max(1, runs):.3f} of {runs} runs",
    ]
    for label, ratios in (
        ("calls", [row.calls_ratio for row in rows if row.calls_ratio is not None]),
        ("seconds", [row.seconds_ratio for row in rows if row.seconds_ratio is not None]),
    ):
        if ratios:
            cheaper = sum(ratio <= 1 for ratio in ratios)
            lines.append(
                f"{label} ÷ best peer's: median {np.median(ratios):.2f}, at most 1 on {cheaper} of {len(ratios)}"
            )
    return lines


def tell_calls(console: Console, rows: Sequence[Row], options: argparse.Namespace) -> None:
    """Calls until done against half of the best peer's and against fixed limits."""
    with needed(options.reference / "reliability_best_peer.csv").open() as file:
        best = {line["problem"]: line for line in csv.DictReader(file)}
    lines = []
    for row in rows:
        half = float(best[row.problem]["calls"]) / 2 if best[row.problem]["calls"] else None
        limit = None if row.problem in ALL_AROUND else _limit(row.problem)
        accurate = row.median_error <= MARGIN
        within = accurate and limit is not None and row.calls <= limit
        cheaper = accurate and (half is None or row.calls <= half)
        lines.append((row.problem, row.calls, half, limit, row.median_error, row.converged, cheaper, within))
    columns = ("problem", "calls", "half best peer", "limit", "median |err|", "converged", "<= half peer", "<= limit")
    console.print(table(f"Calls until done at precision {options.precision}", columns, lines))
    console.print(f"at most half the best peer's calls: {sum(line[6] for line in lines)} of {len(lines)}")
    for limit in (CALLS_ONE_MODE, CALLS_SEVERAL):
        among = [line for line in lines if line[3] == limit]
        console.print(f"at most {limit} calls: {sum(line[7] for line in among)} of {len(among)}")
    console.print("\n".join(acceptance(rows)))


def _limit(name: str) -> int:
    return CALLS_ONE_MODE if name in ONE_SMOOTH_MODE else CALLS_SEVERAL


MODES: dict[str, Callable[[argparse.Namespace], Iterator[Case]]] = {
    "reference": reference_problems,
    "calls_to_accuracy": reference_problems,
    "scaling": scaling,
    "acas": acas,
    "variants": variants,
    "exact": exact,
}
BUDGETS = {"calls_to_accuracy": 50_000, "scaling": 50_000, "acas": 50_000}
PRECISIONS = {"acas": 0.02}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_mutually_exclusive_group()
    for mode in list(MODES)[1:]:
        modes.add_argument(f"--{mode.replace('_', '-')}", dest="mode", action="store_const", const=mode)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--problems", default="", help="comma-separated names, or parts of names; all when empty")
    parser.add_argument("--backend", choices=("pyro", "numpyro"), default="numpyro")
    parser.add_argument("--budget", type=int, help="default 10,000; 50,000 with --calls-to-accuracy, --scaling, --acas")
    parser.add_argument("--precision", type=float, help="default 0.05; 0.02 with --acas")
    parser.add_argument("--estimator", choices=sorted(ESTIMATORS), help="a single estimator; default: what users get")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, help="default: in the first mode only")
    parser.add_argument("--reference", type=Path, default=ROOT.parent / "shared" / "reference", help="a folder")
    parser.add_argument("--nets", default="2_9,4_9", help="with --acas: comma-separated networks")
    parser.add_argument("--draws", type=int, default=10_000_000, help="with --acas: plain draws of the normal law")
    parser.add_argument("--out", type=Path, help="write rows and settings as JSON here, after each problem")
    parser.set_defaults(mode="reference")
    options = parser.parse_args(argv)
    options.budget = options.budget or BUDGETS.get(options.mode, 10_000)
    options.precision = options.precision or PRECISIONS.get(options.mode, 0.05)
    options.peers = options.mode == "reference" if options.peers is None else options.peers
    return options


def told(cases: Iterable[Case], options: argparse.Namespace) -> int:
    """Run and print them; 1 if a run broke a promise (NaN, a probability above 1, more calls than the budget)."""
    console = Console(width=150)
    rows, broken = assess(cases, options)
    if not rows:
        raise SystemExit("nothing to run: no problem (with a reference) has such a name, or --members is 0")
    calls = getattr(options, "mode", "") == "calls_to_accuracy"
    (tell_calls if calls else tell)(console, rows, options)
    console.print(f"broken promises: {len(broken)}", *broken, sep="\n", highlight=False)
    return int(bool(broken))


def add_members(parser: argparse.ArgumentParser, families: Iterable[str], *, seeds: int) -> None:
    """Arguments of a benchmark of families whose members are drawn at random."""
    parser.add_argument("--families", default=",".join(families))
    parser.add_argument("--members", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--budget", type=int, default=10_000)
    parser.add_argument("--estimator", default=None, help="a single estimator; default: what users get")
    parser.add_argument("--peers", action="store_true", help="OpenTURNS beside it")
    parser.add_argument("--out", type=Path, help="write rows and settings as JSON here, after each problem")


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    return told(MODES[options.mode](options), options)


if __name__ == "__main__":
    raise SystemExit(main())
