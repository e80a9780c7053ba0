"""The optimizer's curse: by how much does an estimator err on a model that was trained against it?

    python benchmarks/optimizers_curse.py --seeds 5 --out curse.json

No network has an exact answer at every step, so the model here is linear: y = w·x
in 20 dimensions, catastrophe |y| ≥ 5, log P = log 2Φ(−5/|w|), at every step of training. Two games:

- `train()`, which steps down log P as its ladder follows it, and reports estimates that it did not train on;
- "chosen": of ``TRIES`` candidates, all much alike, each is estimated with a small budget, and the one whose estimate
  is lowest is taken: what a search over models does.

The table has log P̂ − log P of the ladder during training, of the estimates before and after, of the audit, and of the
chosen candidate by the estimator that chose it and by an audit. Below 0 is too low.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.special import log_ndtr

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from models._libraries import Backend, library  # noqa: E402
from probest import Importance, MonteCarlo, Problem, Tempering, audit, estimate, train  # noqa: E402
from probest.estimators import Estimator  # noqa: E402

DIM, LIMIT, TRIES = 20, 5.0, 16
SMALL = 2_000  # calls of the estimates that choose


def game(backend: Backend, seed: int, scale: float = 1.0) -> tuple[Problem, dict[str, Any]]:
    lib = library(backend)
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal(DIM)
    weights *= scale * 1.2 / np.linalg.norm(weights)

    def adversary() -> Any:
        return lib.sample("x", lib.dist.Normal(lib.xp.zeros(DIM), 1.0).to_event(1))

    def task(model: Any, batch: Any) -> Any:
        inputs, targets = batch
        return ((model(inputs) - targets) ** 2).mean()

    model = lib.bind(lambda params, x: x @ params["w"], w=weights)
    inputs = rng.standard_normal((256, DIM))
    problem = Problem(adversary, model, lambda _, y: lib.xp.abs(y) - LIMIT)
    return problem, {"task": task, "data": (inputs.astype(np.float32), (inputs @ weights).astype(np.float32))}


def exact(model: Any) -> float:
    owned = dict(model.params.items()) if hasattr(model, "params") else model.args[0]
    w = owned["w"]
    length = float(np.linalg.norm(np.asarray(w.detach() if hasattr(w, "detach") else w)))
    return math.log(2.0) + float(log_ndtr(-LIMIT / length))


def trained(backend: Backend, seed: int) -> dict[str, float]:
    problem, data = game(backend, seed)
    run = train(
        problem, **data, until_log_prob=-30.0, steps=200, learning_rate=0.01, check_every=50, check_budget=2_000,
        budget=5_000, seed=seed, progress=False,
    )  # fmt: skip
    truth = exact(run.model)
    gaps = {
        "train(): ladder at the end": run.history[-1].log_prob - truth,
        "train(): estimate before": run.before.log_prob - exact(problem.model),
        "train(): estimate after": run.after.log_prob - truth,
        "train(): believed": run.believed.log_prob - truth,
    }
    if run.audit is not None:
        gaps["train(): audit"] = run.audit.log_prob - truth
    return gaps


def chosen(backend: Backend, seed: int, name: str, method: Estimator | None) -> dict[str, float]:
    """The best of some candidates, all of much the same P, by a small estimate of each."""
    rng = np.random.default_rng((seed, 1))
    candidates = [game(backend, seed, scale)[0] for scale in rng.uniform(0.98, 1.02, TRIES)]
    found = [
        estimate(problem, budget=SMALL, estimator=method, seed=i, progress=False)
        for i, problem in enumerate(candidates)
    ]
    best = int(np.argmin([one.log_prob for one in found]))
    truth = exact(candidates[best].model)
    again = audit(candidates[best], budget=20_000, seed=seed + 99, progress=False)
    gap = found[best].log_prob - truth
    return {
        f"chosen by {name}": gap if math.isfinite(gap) else -math.inf,
        f"  its audit ({name})": again.log_prob - truth,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--backends", nargs="+", choices=("pyro", "numpyro"), default=["pyro"])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    choosing: dict[str, Callable[[], Estimator | None]] = {
        "the default strategy": lambda: None,
        "tempering": lambda: Tempering(particles=64),
        "importance": lambda: Importance(),
        "plain sampling": lambda: MonteCarlo(),
    }
    table, records = Table("estimate", "log P̂ − log P, median", "from", "to"), []
    for backend in options.backends:
        gaps: dict[str, list[float]] = {}
        for seed in range(options.seeds):
            found = trained(backend, seed)
            for name, method in choosing.items():
                found |= chosen(backend, seed, name, method())
            for name, gap in found.items():
                gaps.setdefault(name, []).append(gap)
        for name, values in gaps.items():
            table.add_row(
                f"{name} ({backend})", f"{statistics.median(values):+.2f}", f"{min(values):+.2f}", f"{max(values):+.2f}"
            )
        records.append({"backend": backend, "gaps": gaps})
        if options.out:
            options.out.write_text(json.dumps(records, indent=1))
    Console().print(table)


if __name__ == "__main__":
    main()
