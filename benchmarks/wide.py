"""What is it worth to the default estimate that it reads wide networks first?

    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python benchmarks/wide.py --json build/wide.json

Random networks as in reading.py, P from 10^-2.5 to 10^-4 by plain draws. Of each output, at the same precision, budget
and seed: model calls with and without reading, whether it converged, and errors; one that did not converge has spent
its whole budget, so that its ratio of calls is a bound from below. "wrong" are converged ones off by more than 0.1
and 3 standard errors (the truth's own included).
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from reading import ACTIVATIONS, linear, sampled
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)

SHAPES = ((100, 64, 2), (100, 128, 3), (256, 256, 3))
"""Inputs, width and depth."""


def measured(net: nn.Sequential, j: int, dim: int, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    from probest import Problem, estimate
    from probest.estimators import Combined

    last = net[-1]
    one = linear(last.weight[[j]].detach().numpy(), last.bias[[j]].detach().numpy())  # type: ignore[operator, union-attr, index]
    model = copy.deepcopy(nn.Sequential(*net[:-1], one)).float()

    def adversary() -> Tensor:
        return pyro.sample("x", dist.Normal(torch.zeros(dim), 1.0).to_event(1))

    found: dict[str, Any] = {}
    for name, read in (("reading", True), ("without", False)):
        started = time.perf_counter()
        result = estimate(
            Problem(adversary, model, lambda _, y: y[0]),
            estimator=Combined(precision=args.precision, read=read),
            budget=args.budget,
            seed=seed,
            progress=False,
        )
        found[name] = {
            "log_prob": result.log_prob,
            "std_error": result.std_error,
            "converged": result.converged,
            "calls": result.calls,
            "seconds": time.perf_counter() - started,
            "read": "elsewhere" in result.conclusion.diagnostics,
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000, help="draws behind each true value")
    parser.add_argument("--outputs", type=int, default=2, help="of each network")
    parser.add_argument("--precision", type=float, default=0.05)
    parser.add_argument("--budget", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=100, help="of the first network")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    for number, (kind, (dim, width, depth)) in enumerate(itertools.product(ACTIVATIONS, SHAPES)):
        seed = args.seed + number
        case = sampled("wide", kind, dim, width, depth, args.outputs, args.samples, seed)
        for j, (truth, error) in enumerate(case.truth):
            assert isinstance(case.net, nn.Sequential)
            rows.append({"case": case.name, "truth": truth, "error": error, **measured(case.net, j, dim, args, seed)})
            print(rows[-1], file=sys.stderr)
        if args.json is not None:  # after each network, so that nothing is lost
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(rows, indent=1))
    table = Table("case", "log P", "fewer calls", "with: calls", "error", "", "without: calls", "error", "")
    wrong = {"reading": 0, "without": 0}
    for row in rows:
        shown = [row["case"], f"{row['truth']:.2f} ± {row['error']:.2f}"]
        shown.append(f"{row['without']['calls'] / row['reading']['calls']:.1f}")
        for name in wrong:
            one = row[name]
            off = one["log_prob"] - row["truth"]
            both = math.hypot(one["std_error"], row["error"])
            wrong[name] += one["converged"] and abs(off) > max(0.1, 3 * both)
            state = "converged" if one["converged"] else ""
            shown += [f"{one['calls']:,}", f"{off:+.2f} ± {both:.2f}", "read" if one["read"] else state]
        table.add_row(*shown)
    console = Console(width=150)
    console.print(table)
    ratios = np.array([row["without"]["calls"] / row["reading"]["calls"] for row in rows])
    for name, count in wrong.items():
        share = np.mean([row[name]["converged"] for row in rows])
        seconds = np.median([row[name]["seconds"] for row in rows])
        console.print(f"{name}: {share:.0%} converged, {count} of {len(rows)} wrong, {seconds:.1f} s (median)")
    console.print(f"fewer calls with reading: {np.median(ratios):.1f} times (median), {ratios.min():.1f} at least")


if __name__ == "__main__":
    main()
