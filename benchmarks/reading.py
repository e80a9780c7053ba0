"""How good is log P when it is read from the weights, and does the stated error cover?

    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python benchmarks/reading.py --json build/reading.json

Networks are random: weights N(0, gain² / fan-in), gain √2 (ReLU), 1.5 (GELU), 1.2 (tanh), biases N(0, 0.3²). Of each
output the threshold is a quantile of plain draws, and log P is that of as many fresh ones, plain again (families
"wide", "narrow"); far out ("far") of an importance sample about the tilt; of the reference neurons ("neurons") the
refined values beside them, where --reference says where they lie. Lines, a family each: relative errors of P, of

    ours        moment propagation
    layerwise   its tilt without corrections
    plain       the tilt of the input alone
    untilted    Gaussian propagation of the adversary itself
    sampling    what Monte Carlo would miss (one standard error) with as many forward passes as ours took CPU time

then the share of errors that the stated one covers (two standard errors of the truth allowed), how many were
converged, and the largest error of those, in nats.

--parts N: instead, N random networks of two to four outputs, of which any, or all, or the first or all others, have to
pass limits, with correlations up to .95 between them: moment propagation and plain draws. --by-hand: the checker is one
function with maxima and minima in its code, instead of `any_of` and `all_of`.

--shares N: instead, N random classifiers of two to ten classes, whose share of the first may not exceed a limit.

--training: `train(objective="reading")` instead, on the output of random networks at 3.2 of its standard deviations, 30
steps: log P by the default estimate before and after, as it was read last, and the audit, which reads nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)

ACTIVATIONS: dict[str, tuple[type[nn.Module], float]] = {
    "ReLU": (nn.ReLU, math.sqrt(2)),
    "GELU": (nn.GELU, 1.5),
    "tanh": (nn.Tanh, 1.2),
}


@dataclass
class Case:
    """A network in float64, ``(dim,) -> (J,)``, severities; log P of each and its standard error."""

    family: str
    name: str
    net: nn.Module
    dim: int
    truth: list[tuple[float, float]]


def network(kind: str, dim: int, width: int, depth: int, outputs: int, rng: np.random.Generator) -> nn.Sequential:
    activation, gain = ACTIVATIONS[kind]
    sizes, chain = [dim] + [width] * depth, list[nn.Module]()
    for a, b in itertools.pairwise(sizes):
        chain += [linear(rng.normal(size=(b, a)) * gain / math.sqrt(a), 0.3 * rng.normal(size=b)), activation()]
    return nn.Sequential(*chain, linear(rng.normal(size=(outputs, width)) / math.sqrt(width), np.zeros(outputs)))


def linear(weight: np.ndarray, bias: np.ndarray) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weight))
        layer.bias.copy_(torch.from_numpy(bias))
    return layer


def draws(net: nn.Module, dim: int, count: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _ in range(count // 50_000):
            yield net(torch.randn(50_000, dim, generator=generator))


def sampled(family: str, kind: str, dim: int, width: int, depth: int, outputs: int, count: int, seed: int) -> Case:
    """Thresholds at P from 10^-2.5 to 10^-4 by draws, and P by fresh ones."""
    rng = np.random.default_rng(seed)
    net = network(kind, dim, width, depth, outputs, rng)
    quick = network(kind, dim, width, depth, outputs, np.random.default_rng(seed)).float()
    first = torch.cat(list(draws(quick, dim, count, seed + 1))).numpy()
    shares = 10 ** -rng.uniform(2.5, 4.0, size=outputs)
    levels = np.array([np.quantile(first[:, j], 1 - share) for j, share in enumerate(shares)])
    hits = sum((y.numpy() >= levels).sum(0) for y in draws(quick, dim, count, seed + 2))
    with torch.no_grad():
        net[-1].bias.copy_(torch.from_numpy(-levels.astype(np.float64)))  # type: ignore[union-attr]
    truth = [(math.log(h / count), 1 / math.sqrt(h)) for h in hits]
    return Case(family, f"{kind} {dim}, {width}/{depth}", net, dim, truth)


def far(count: int, seed: int) -> Case:
    """d = 200, ReLU 256/3, at 3, 5, 7, 9 standard deviations: importance sampling about the tilted input."""
    from probest.moments.tilt import tilted

    rng = np.random.default_rng(seed)
    net = network("ReLU", 200, 256, 3, 1, rng)
    with torch.no_grad():
        y = torch.cat([net(torch.from_numpy(rng.standard_normal((20_000, 200)))) for _ in range(5)]).squeeze(1)
        levels = [float(y.mean() + k * y.std()) for k in (3, 5, 7, 9)]
        net[-1] = linear(net[-1].weight.numpy().repeat(4, axis=0), -np.array(levels))  # type: ignore[operator, union-attr]
    truth = []
    for j in range(4):
        m = torch.from_numpy(np.asarray(tilted(layered(net, 200), which=j).tilt.input))
        weights = []
        with torch.no_grad():
            for _ in range(count // 20_000):
                z = torch.from_numpy(rng.standard_normal((20_000, 200))) + m
                weights.append((net(z)[:, j] >= 0).double() * torch.exp(0.5 * m @ m - z @ m))
        w = torch.cat(weights)
        truth.append((float(w.mean().log()), float(w.std() / w.mean() / len(w) ** 0.5)))
    return Case("far", "ReLU 200, 256/3 at 3, 5, 7, 9 σ", net, 200, truth)


def neurons(reference: Path) -> Case | None:
    weights, refined = reference / "reference/wide_mlp_256.npz", reference / "prototypes/tilted_moments"
    if not weights.exists():
        print(f"no reference neurons: {weights.name} is not in --reference", file=sys.stderr)
        return None
    W = np.load(weights)["weights"].astype(np.float64)
    known = json.loads((refined / "wide_mlp_256_log_prob.json").read_text())
    hidden = [part for w in W[:3] for part in (linear(w, np.zeros(256)), nn.ReLU())]
    net = nn.Sequential(*hidden, linear(W[3][[int(n) for n in known]], np.full(len(known), -3.0)))
    return Case("neurons", "ReLU 256, 256/3, no biases", net, 256, [tuple(value) for value in known.values()])


def cases(args: argparse.Namespace) -> Iterator[Case]:
    if args.reference is not None and (found := neurons(args.reference)) is not None:
        yield found
    for seed in range(args.seeds):
        for kind in ACTIVATIONS:
            for width in (128, 256):
                for depth in (2, 3, 4):
                    yield sampled("wide", kind, width, width, depth, 6, args.samples, 10 * seed)
            for width, depth in ((16, 2), (32, 2), (64, 3), (64, 1)):
                yield sampled("narrow", kind, 10, width, depth, 6, args.samples, 10 * seed)
    yield far(args.samples // 10, 0)


def parts(count: int, samples: int, by_hand: bool, console: Console) -> None:
    """Combined checkers: errors in nats beside what is stated and the truth's own."""
    import pyro
    import pyro.distributions as dist

    from probest import MomentPropagation, Problem, estimate
    from probest.checkers import all_of, any_of

    table = Table(
        "network", "outputs", "correlation", "of them", "log P", "±", "error", "stated", "converged", "passes"
    )
    rows = []
    for seed in range(count):
        rng = np.random.default_rng([seed, 11])
        kind, width, depth = list(ACTIVATIONS)[seed % 3], int(rng.choice([64, 128, 256])), int(rng.integers(1, 4))
        dim, outputs, mix = int(rng.choice([32, 64, 128])), int(rng.integers(2, 5)), float(rng.choice([0.0, 0.7, 0.95]))
        way = ("any", "all", "first or all others")[int(rng.integers(3))]
        net = network(kind, dim, width, depth, outputs, rng).float()
        with torch.no_grad():
            common = torch.as_tensor(rng.normal(size=width) / math.sqrt(width), dtype=torch.float32)
            net[-1].weight.mul_(math.sqrt(1.0 - mix)).add_(math.sqrt(mix) * common)  # type: ignore[union-attr]
            plain = torch.cat(list(draws(net, dim, 200_000, seed)))
        low, high = (2.6, 3.4) if way == "any" else (2.0, 2.8) if mix else (0.8, 1.6)
        level = torch.as_tensor(rng.uniform(low, high, outputs), dtype=torch.float32)
        if way == "first or all others":
            level[0] = 3.0
        limits = plain.mean(0) + level * plain.std(0)

        def caught(y: Tensor, way: str = way, limits: Tensor = limits) -> Tensor:
            beyond = y >= limits
            if way == "first or all others":
                return beyond[:, 0] | beyond[:, 1:].all(1)
            return beyond.any(1) if way == "any" else beyond.all(1)

        hits = sum(int(caught(y).sum()) for y in draws(net, dim, samples, seed + 1_000))
        leaves = [lambda x, y, j=j, limits=limits: y[j] - limits[j] for j in range(outputs)]  # noqa: ARG005
        checker = {
            "any": lambda leaves=leaves: any_of(*leaves),
            "all": lambda leaves=leaves: all_of(*leaves),
            "first or all others": lambda leaves=leaves: any_of(leaves[0], all_of(*leaves[1:])),
        }[way]()
        if by_hand:
            checker = {
                "any": lambda x, y, limits=limits: (y - limits).amax(),  # noqa: ARG005
                "all": lambda x, y, limits=limits: (y - limits).amin(),  # noqa: ARG005
                "first or all others": lambda x, y, limits=limits: torch.maximum(  # noqa: ARG005
                    y[0] - limits[0], (y - limits)[1:].amin()
                ),
            }[way]
        problem = Problem(
            lambda dim=dim: pyro.sample("x", dist.Normal(torch.zeros(dim), 1.0).to_event(1)), net, checker
        )
        z = torch.randn(2_000, dim)
        with torch.no_grad():
            started = time.process_time()
            net.double()(z.double())
            one = (time.process_time() - started) / len(z)
            net.float()
        started = time.process_time()
        found = estimate(problem, estimator=MomentPropagation(look=0), budget=1, progress=False).conclusion
        passes = (time.process_time() - started) / one
        done = estimate(problem, estimator=MomentPropagation(), budget=2_000, progress=False)
        rows.append(Judged.of(found, hits, samples, done.converged))
        table.add_row(
            f"{kind} {dim}, {width}/{depth}", str(outputs), f"{mix:g}", way, *rows[-1].cells, f"{passes:,.0f}",
        )  # fmt: skip
    console.print(table)
    summed_up(rows, console)


class Judged(NamedTuple):
    """A reading beside plain draws: the true log P with its own error, and what the reading is off by and states."""

    log_prob: float
    own: float
    error: float
    stated: float
    converged: bool

    @classmethod
    def of(cls, found: Any, hits: int, samples: int, converged: bool) -> Judged:
        truth = math.log(hits / samples)
        return cls(truth, 1.0 / math.sqrt(hits), found.log_prob - truth, found.std_error, converged)

    @property
    def cells(self) -> tuple[str, ...]:
        """Of a table."""
        return (*(f"{x:.3f}" for x in self[:2]), f"{self.error:+.3f}", f"{self.stated:.3f}", str(self.converged))


def summed_up(rows: list[Judged], console: Console) -> None:
    errors = [abs(row.error) for row in rows]
    covered = [abs(row.error) <= row.stated + 2.0 * row.own for row in rows]
    worst = max((abs(row.error) for row in rows if row.converged), default=math.nan)
    console.print(
        f"median |error| {np.median(errors):.3f}, largest {max(errors):.3f}, of the converged {worst:.3f} nats"
    )
    console.print(f"covered {np.mean(covered):.2f}, converged {np.mean([row.converged for row in rows]):.2f}")


def shares(count: int, samples: int, console: Console) -> None:
    """Classifiers that may not be surer of the first class than one draw in a thousand makes them."""
    import pyro
    import pyro.distributions as dist

    from probest import MomentPropagation, Problem, estimate

    table = Table("network", "classes", "share", "log P", "±", "error", "stated", "converged")
    rows = []
    for seed in range(count):
        rng = np.random.default_rng([seed, 12])
        kind, width, depth = list(ACTIVATIONS)[seed % 3], int(rng.choice([64, 128, 256])), int(rng.integers(1, 4))
        dim, classes = int(rng.choice([32, 64, 128])), int(rng.integers(2, 11))
        net = network(kind, dim, width, depth, classes, rng).float()
        plain = torch.cat([y.softmax(1)[:, 0] for y in draws(net, dim, 200_000, seed)])
        limit = float(plain.quantile(0.999))
        hits = sum(int((y.softmax(1)[:, 0] >= limit).sum()) for y in draws(net, dim, samples, seed + 1_000))
        found = estimate(
            Problem(
                lambda dim=dim: pyro.sample("x", dist.Normal(torch.zeros(dim), 1.0).to_event(1)),
                net,
                lambda x, y, limit=limit: y.softmax(0)[0] - limit,  # noqa: ARG005
            ),
            estimator=MomentPropagation(), budget=2_000, progress=False,
        )  # fmt: skip
        rows.append(Judged.of(found, hits, samples, found.converged))
        table.add_row(f"{kind} {dim}, {width}/{depth}", str(classes), f"{limit:.3f}", *rows[-1].cells)
    console.print(table)
    summed_up(rows, console)


def layered(net: nn.Module, dim: int) -> Any:
    from probest.backends.load import load_backend
    from probest.moments.layers import layers

    return layers(net, torch.zeros(dim, dtype=torch.float64)).on_host(load_backend("torch"))


def measured(case: Case) -> list[dict[str, Any]]:
    from probest.estimators import MomentPropagation
    from probest.moments.tilt import Tilting, tilted

    read, method = layered(case.net, case.dim), MomentPropagation()
    z = torch.randn(2000, case.dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    seconds = math.inf
    with torch.no_grad():
        for _ in range(3):
            started = time.process_time()
            case.net(z)
            seconds = min(seconds, (time.process_time() - started) / len(z))
    only_input = Tilting(noises=False)
    found = []
    for j, (truth, error) in enumerate(case.truth):
        started = time.process_time()
        modes = method.modes(read, np.random.SeedSequence(0), which=j)
        passes = (time.process_time() - started) / seconds
        ours, stated, doubts = method.concluded(modes)
        untilted = tilted(read, which=j, settings=replace(only_input, rounds=1, most_rounds=1))
        values = {
            "ours": ours,
            "layerwise": float(modes[0].gaussian),
            "plain": float(tilted(read, which=j, settings=only_input).gaussian),
            "untilted": float(untilted.gaussian),
        }
        found.append(
            {
                "family": case.family, "case": case.name, "log_prob": truth, "std_error": error, "stated": stated,
                "converged": not doubts, "passes": passes, "modes": len(modes),
                "sampling": math.exp(-0.5 * (truth + math.log(passes))),
                **{name: value - truth for name, value in values.items()},
            }
        )  # fmt: skip
    return found


KINDS, DIM = (("ReLU", 64, 2), ("ReLU", 256, 3), ("tanh", 128, 2)), 50


def training(seeds: int, console: Console) -> None:
    """Down log P as it is read. The task: to be the network that it was."""
    import pyro
    import pyro.distributions as dist

    from probest import Problem, train

    table = Table("network", "before", "read last", "after", "audit", "task loss / variance", "seconds")
    for (kind, width, depth), seed in itertools.product(KINDS, range(seeds)):
        rng = np.random.default_rng([seed, 9])
        net = network(kind, DIM, width, depth, 1, rng).float()
        x = torch.as_tensor(rng.standard_normal((4_000, DIM)), dtype=torch.float32)
        with torch.no_grad():
            y = net(x).squeeze(-1)
        limit = float(y.mean() + 3.2 * y.std())

        def adversary() -> Any:
            return pyro.sample("x", dist.Normal(torch.zeros(DIM), 1.0).to_event(1))

        def task(model: Any, batch: Any) -> Any:
            return ((model(batch[0]).squeeze(-1) - batch[1]) ** 2).mean()

        run = train(
            Problem(adversary, net.requires_grad_(True), lambda _, y, limit=limit: y[0] - limit), task=task,
            data=(x[:1000], y[:1000]), objective="reading", steps=30, until_log_prob=-30.0, learning_rate=2e-3,
            check_every=30, budget=20_000, check_budget=5_000, audit_rounds=0, max_pressure=0.3, seed=seed,
            progress=False,
        )  # fmt: skip
        with torch.no_grad():
            fit = float(((run.model(x[1000:]).squeeze(-1) - y[1000:]) ** 2).mean() / y.var())
        assert run.audit is not None
        table.add_row(
            f"{kind} {width}/{depth}", f"{run.before.log_prob:.2f}", f"{run.history[-1].log_prob:.2f}",
            f"{run.after.log_prob:.2f}", f"{run.audit.estimate.log_prob:.2f}", f"{fit:.3f}",
            f"{run.costs.steps.seconds:.0f}",
        )  # fmt: skip
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2_000_000, help="draws behind each true value")
    parser.add_argument("--seeds", type=int, default=1, help="networks of each kind")
    parser.add_argument("--reference", type=Path, help="a folder with reference/ and prototypes/")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--training", action="store_true")
    parser.add_argument("--parts", type=int, default=0, help="networks with combined checkers, instead")
    parser.add_argument("--shares", type=int, default=0, help="classifiers with a limit to a share, instead")
    parser.add_argument("--by-hand", action="store_true", help="these checkers as one function")
    args = parser.parse_args()
    if args.parts:
        parts(args.parts, args.samples, args.by_hand, Console(width=120))
        return
    if args.shares:
        shares(args.shares, args.samples, Console(width=120))
        return
    if args.training:
        training(args.seeds, Console(width=120))
        return
    results: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for case in cases(args):
        results.setdefault((case.family, case.name), []).extend(measured(case))
        print(f"{case.family}: {case.name}", file=sys.stderr)
        if args.json is not None:  # after each case, so that nothing is lost
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps([row for rows in results.values() for row in rows], indent=1))
    names = ("ours", "layerwise", "plain", "untilted")
    table = Table("family", "case", "log P", *names, "sampling", "covered", "converged", "worst", "passes")
    for (family, name), rows in results.items():
        errors = {key: np.array([row[key] for row in rows]) for key in (*names, "std_error", "stated", "sampling")}
        relative = {key: np.abs(np.expm1(np.minimum(errors[key], 50.0))) for key in names}
        sure = np.array([row["converged"] for row in rows])
        covered = np.abs(errors["ours"]) <= errors["stated"] + 2 * errors["std_error"]
        truths = [row["log_prob"] for row in rows]
        table.add_row(
            family, name, f"{min(truths):.1f} to {max(truths):.1f}",
            *(f"{np.median(relative[key]):.1%} ({relative[key].max():.0%})" for key in names),
            f"{np.median(errors['sampling']):.0%}", f"{covered.mean():.0%} of {len(rows)}", f"{sure.mean():.0%}",
            f"{np.abs(errors['ours'][sure]).max():.2f}" if sure.any() else "",
            f"{np.median([row['passes'] for row in rows]):,.0f}",
        )  # fmt: skip
    everything = [row for rows in results.values() for row in rows]
    covered = [abs(row["ours"]) <= row["stated"] + 2 * row["std_error"] for row in everything]
    console = Console(width=170)
    console.print(table)
    console.print(f"errors covered: {np.mean(covered):.1%} of {len(covered)}; median (largest) relative errors of P")


if __name__ == "__main__":
    main()
