"""How good is `estimate(problem)`, with default settings, on networks? Against references of millions of calls.

    python benchmarks/networks.py --seeds 10 --out networks.json
    python benchmarks/networks.py --problems digits --seeds 5
    python benchmarks/networks.py --problems drawn --budget 400000 --seeds 5
    python benchmarks/networks.py --make-reference --problems "digits ordinary" --calls 20000000

Networks: models/digits.py with the class held, trained the ordinary way, by `train()` and on labelled hard cases, ten
classes each, and with the class drawn ("drawn": ten strata, for the budget of ten); random ReLU, GELU and tanh networks
of 10 to 200 inputs and 1 to 4 layers; models/pendulum.py before and after training.

The random networks' limits are chosen by their own draws, so that P lies between about 1e-4 and 1e-14; networks whose
limit no search reaches are left out.

There is no closed form for any of them. A reference is the mean of several importance samples, whose guides come from
as many independent searches of four temperings each (``--searches``; ``--calls`` are those of the samples and of the
lessons of their students together), and its error is the larger of the samples' own and that of their spread. They are
kept in networks_reference.json beside this file. An importance sample errs low, seldom high: a search that missed a
mode shows as a sample that lies below the others by more than the errors, and the spread, kept too, tells. A network
that is no longer the one of its reference (by its severities at a few points) is left out with a word.

The columns are those of reliability.py. Intervals are judged with room for three errors of the reference.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from scipy import stats

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from reliability import Case, chosen, of_problem, told  # noqa: E402

from models import digits, pendulum  # noqa: E402
from models._libraries import Backend, library  # noqa: E402
from probest import Problem, diagnostics, train  # noqa: E402
from probest.estimators.importance import Importance, importance_sample  # noqa: E402
from probest.estimators.tempering import Tempering  # noqa: E402
from probest.evidence import EventLike  # noqa: E402
from probest.guides.fit import CHEAP, DISTILLED  # noqa: E402
from probest.guides.memory import Memory  # noqa: E402
from probest.surrogates.watched import Watched  # noqa: E402

TABLE = Path(__file__).with_name("networks_reference.json")
TRAINING_CALLS = 1_000_000
REFERENCE = 0.015  # nats: precision of each sample of a reference


# The networks ---------------------------------------------------------------------------------------------------------


@cache
def digits_network(training: str) -> Any:
    ordinary = digits.train_model()
    if training == "labelled":
        return digits.adversarial_baseline(ordinary, TRAINING_CALLS)
    if training == "trained":
        options = {"seed": 3, "progress": False} | digits.TRAINING  # as in the demo
        return train(digits.problem(ordinary), task=digits.task_loss, data=digits.load_data()[0], **options).model
    return ordinary


@cache
def pendulum_network(training: str) -> Any:
    ordinary = pendulum.train_model()
    if training == "labelled":
        return pendulum.adversarial_baseline(ordinary, TRAINING_CALLS)
    return ordinary


class Random(NamedTuple):
    """A random network and a limit that its output seldom exceeds."""

    name: str
    dim: int
    activation: str
    layers: tuple[tuple[np.ndarray, np.ndarray], ...]
    outputs: int
    limit: float


ACTIVATIONS = ("relu", "gelu", "tanh")


def random_networks(count: int = 12) -> Iterator[Random]:
    for i in range(count):
        rng = np.random.default_rng((20_261_126, i))
        dim, depth = int(rng.choice([10, 20, 50, 100, 200])), int(rng.integers(1, 5))
        activation, outputs = ACTIVATIONS[i % 3], int(rng.choice([1, 3]))
        widths = [dim, *rng.integers(20, 65, depth), outputs]
        gain = {"relu": 2.0, "gelu": 2.0, "tanh": 1.5}[activation]
        layers = tuple(
            (rng.standard_normal((m, n)) * math.sqrt(gain / n), 0.3 * rng.standard_normal(m))
            for n, m in itertools.pairwise(widths)
        )
        net = Random("", dim, activation, layers, outputs, 0.0)
        sample = output(np, net, layers, rng.standard_normal((dim, 200_000)))
        # the index, linear between one draw in a hundred and one in ten thousand, goes on as a straight line
        near, far = np.quantile(sample, [0.99, 0.9999])
        index = stats.norm.isf([0.01, 0.0001])
        limit = float(far + (far - near) * (rng.uniform(3.9, 7.4) - index[1]) / (index[1] - index[0]))
        yield net._replace(name=f"random {activation} {i} d={dim} layers={depth} outputs={outputs}", limit=limit)


def output(xp: Any, net: Random, layers: Any, x: Any) -> Any:
    """The first output, or what it exceeds the others by: x ``(dim, ...)``, result ``(...)``."""
    for k, (weights, bias) in enumerate(layers):
        x = weights @ x + bias[(..., *(None,) * (x.ndim - 1))]
        if k < len(layers) - 1:
            x = activated(xp, net.activation, x)
    return x[0] if net.outputs == 1 else x[0] - xp.amax(x[1:], 0)


def activated(xp: Any, name: str, x: Any) -> Any:
    if name == "relu":
        return xp.where(x > 0, x, 0.0 * x)
    bent = xp.tanh(x) if name == "tanh" else xp.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3))
    return bent if name == "tanh" else 0.5 * x * (1.0 + bent)


def random_problem(net: Random, backend: Backend) -> Problem:
    lib = library(backend)

    def adversary() -> Any:
        return lib.sample("x", lib.dist.Normal(lib.xp.zeros(net.dim), 1.0).to_event(1))

    def model(params: dict[str, Any], x: Any) -> Any:
        layers = [(params[f"W{k}"], params[f"b{k}"]) for k in range(len(net.layers))]
        return output(lib.xp, net, layers, x) - net.limit

    def checker(x: Any, y: Any) -> Any:  # noqa: ARG001
        return y

    weights = {f"{kind}{k}": array for k, pair in enumerate(net.layers) for kind, array in zip("Wb", pair, strict=True)}
    return Problem(adversary, lib.bind(model, **weights), checker)


def problems(options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Problem]]]:
    """Names and what makes each problem, when it is its turn."""
    for training in ("ordinary", "trained", "labelled"):
        for held in range(digits.CLASSES):
            yield f"digits {training} {held}", lambda t=training, h=held: digits.problem(digits_network(t), held=h)
        yield f"digits {training} drawn", lambda t=training: digits.problem(digits_network(t))
    for net in random_networks(options.random):
        yield net.name, lambda net=net: random_problem(net, options.backend)
    for training in ("ordinary", "labelled"):
        yield f"pendulum {training}", lambda t=training: pendulum.problem(pendulum_network(t))


# References -----------------------------------------------------------------------------------------------------------


class Search(NamedTuple):
    """One importance sample of a guide of its own."""

    log_prob: float
    std_error: float
    khat: float


def searched(event: EventLike, calls: int, seed: np.random.SeedSequence) -> Search:
    """Four temperings, a guide for all of them, fitted or learned by a student of all answers; ``calls`` for both."""
    *seeds, own = seed.spawn(5)
    watched = Watched(event, most=100_000_000)
    memory = Memory()
    for each in seeds:
        run = Tempering(particles=512, max_moves=8).run(watched, budget=2_000_000, seed=each)
        if run.population is not None:
            memory.add(run.population, run.conclusion.log_prob)
    if not memory.looks:
        return Search(-math.inf, math.inf, math.inf)
    method = Importance(precision=REFERENCE, guides=(*CHEAP, DISTILLED))
    found = importance_sample(method, watched, memory, None, budget=calls, seed=own)
    return Search(found.log_prob, found.std_error, found.diagnostics["khat"])


def probed(event: EventLike) -> list[float]:
    """Severities at a few points, by which a network is recognised."""
    z = np.random.default_rng(20_261_126).standard_normal((8, event.dim))
    return [round(float(s), 3) for s in event.evaluate(z).severity]


def reference(event: EventLike, options: argparse.Namespace) -> dict[str, Any]:
    seeds = np.random.SeedSequence(20_261_126).spawn(options.searches)
    found = [searched(event, options.calls // options.searches, seed) for seed in seeds]
    log_p = np.array([search.log_prob for search in found])
    mean = diagnostics.log_sum_exp(log_p) - math.log(len(log_p))
    share = np.exp(log_p - mean)
    own = math.sqrt(float(np.sum((share * [search.std_error for search in found]) ** 2))) / len(found)
    spread = float(np.std(share, ddof=1)) / math.sqrt(len(found))
    return {
        "log_prob": round(mean, 4),
        "std_error": round(max(own, spread), 4),
        "lowest": round(float(log_p.min()), 4),
        "highest": round(float(log_p.max()), 4),
        "khat": round(max(search.khat for search in found), 2),
        "calls": options.calls,
        "searches": options.searches,
        "severities": probed(event),
    }


def known_references() -> dict[str, dict[str, Any]]:
    return json.loads(TABLE.read_text()) if TABLE.exists() else {}


def summed(known: dict[str, dict[str, Any]], options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """References with the class drawn: the mean of P over classes. These are recognised as their first class is."""
    found = {}
    for name, _ in problems(options):
        of = name.removesuffix("drawn")
        classes = [known[one] for one in (f"{of}{held}" for held in range(digits.CLASSES)) if one in known]
        if of != name and len(classes) == digits.CLASSES:
            log_p, error = (np.array([one[key] for one in classes]) for key in ("log_prob", "std_error"))
            total = diagnostics.log_sum_exp(log_p)
            own = math.hypot(*(np.exp(log_p - total) * error))
            found[name] = {"log_prob": total - math.log(len(classes)), "std_error": own}
    return found


def make_references(options: argparse.Namespace, console: Console) -> None:
    every = [(name, problem) for name, problem in problems(options) if not name.endswith("drawn")]
    names = chosen([name for name, _ in every], options)
    for name, problem in every:
        if name in names:
            found = reference(problem().event, options)
            console.print(name, found, highlight=False)
            if not math.isfinite(found["log_prob"]):
                continue
            TABLE.write_text(json.dumps(known_references() | {name: found}, indent=1) + "\n")


def cases(options: argparse.Namespace) -> Iterator[Case]:
    kept = known_references()
    known, every = kept | summed(kept, options), dict(problems(options))
    names = chosen([name for name in every if name in known], options)
    for name, problem in every.items():
        if name not in names:
            continue
        made, entry = problem(), known[name]
        first = name.replace("drawn", "0")
        probe = made if first == name else every[first]()
        if np.allclose(probed(probe.event), kept[first]["severities"], rtol=0.02, atol=0.02):
            yield of_problem(name, entry["log_prob"], made, options, entry["std_error"])
        else:
            print(f"{name} is another network than that of its reference: --make-reference", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--problems", default="", help="comma-separated names, or parts of names; all when empty")
    parser.add_argument("--random", type=int, default=12, help="how many random networks there are")
    parser.add_argument("--backend", choices=("pyro", "numpyro"), default="pyro", help="of the random networks")
    parser.add_argument("--budget", type=int, default=50_000)
    parser.add_argument("--precision", type=float, default=0.05)
    parser.add_argument("--out", type=Path, help="write rows and settings as JSON here, after each problem")
    parser.add_argument("--make-reference", action="store_true", help="find the references instead, and keep them")
    parser.add_argument("--searches", type=int, default=10)
    parser.add_argument("--calls", type=int, default=20_000_000)
    parser.set_defaults(estimator=None, peers=False)
    options = parser.parse_args(argv)
    if options.make_reference:
        make_references(options, Console(width=150))
        return 0
    return told(cases(options), options)


if __name__ == "__main__":
    raise SystemExit(main())
