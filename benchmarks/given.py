"""How good is log P[C | R] where R can be recognised and not sampled?

    OMP_NUM_THREADS=1 python benchmarks/given.py --json build/given.json

Default settings. Families, each at log P[R] of a draw in 1e3, 1e6, 1e9 and 1e12, with C given R common and rare:

    half-space  R and C are half-spaces at a correlation; the truth is a sum over one normal
    corner      R is two independent half-spaces at once, C a third, correlated with the first
    observed    the same, of a random walk of 20 steps seen with noise: R and C of its last two positions, normals given
                what was seen
    trigger     models/trigger.py: a direction (1e-9)

--tests: the trigger behind eight tests, with 100,000 calls. --training: a network with each of the two triggers (its
answer is gain x₀, and where the trigger fires it adds power x_last), trained away from P[C | R]: exact values before
and after, by draws of what is recognised, made by construction, and what is left of the variance of the task.

A line is ten seeds: the largest and the root mean square error, the share within two stated errors, of converged ones,
and "wrong": converged and off by more than 0.1 and 3 errors.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from rich.console import Console
from rich.table import Table
from scipy import special, stats

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)

STEPS, NOISE = 20, 0.5


class Case(NamedTuple):
    family: str
    name: str
    problem: Any
    truth: float


def corner(first: float, second: float, rho: float) -> float:
    """log Pr[Z₁ ≥ first, Z₂ ≥ second]."""
    x = np.linspace(first, first + 14.0, 400_001)
    inside = stats.norm.logpdf(x) + special.log_ndtr((rho * x - second) / math.sqrt(1.0 - rho**2))
    return float(special.logsumexp(inside) + math.log(x[1] - x[0]))


def normal(dim: int) -> Any:
    return lambda: pyro.sample("x", dist.Normal(torch.zeros(dim), 1.0).to_event(1))


def walk(seen: np.ndarray) -> Any:
    def adversary() -> Any:
        steps = pyro.sample("steps", dist.Normal(torch.zeros(STEPS), 1.0).to_event(1))
        positions = steps.cumsum(0)
        pyro.sample("seen", dist.Normal(positions, NOISE).to_event(1), obs=torch.from_numpy(seen).float())
        return positions

    return adversary


def cases() -> Iterator[Case]:
    from models import trigger
    from probest import Problem

    for exponent in (3, 6, 9, 12):
        log_r = -exponent * math.log(10.0)
        beta = -float(special.ndtri_exp(log_r))
        for rho, rare in ((0.7, 0.5), (0.3, 1e-6)):
            side = math.sqrt(1.0 - rho**2)
            limit = float(rho * (beta + 1.0 / beta) - side * special.ndtri(rare))
            truth = corner(beta, limit, rho) - log_r
            yield Case(
                "half-space", f"1e-{exponent}, {rare:g}",
                Problem(
                    normal(20), lambda x: x,
                    lambda _, y, a=rho, b=side, c=limit: a * y[0] + b * y[1] - c,
                    given=lambda x, b=beta: x[0] - b,
                ),
                truth,
            )  # fmt: skip
            half = -float(special.ndtri_exp(log_r / 2))
            limit = float(rho * (half + 1.0 / half) - side * special.ndtri(rare))
            yield Case(
                "corner", f"1e-{exponent}, {rare:g}",
                Problem(
                    normal(20), lambda x: x,
                    lambda _, y, a=rho, b=side, c=limit: a * y[0] + b * y[1] - c,
                    given=lambda x, b=half: torch.minimum(x[0], x[2]) - b,
                ),
                corner(half, limit, rho) - log_r / 2,
            )  # fmt: skip
        yield observed(exponent, log_r)
    yield Case("trigger", "direction", trigger.problem("direction"), trigger.log_prob())


def observed(exponent: int, log_r: float) -> Case:
    """Given all noisy positions, R: the last position is far up; C: the one before is, too."""
    from probest import Problem

    seen = np.cumsum(np.random.default_rng(exponent).standard_normal(STEPS))
    cumulated = np.tril(np.ones((STEPS, STEPS)))
    precision = np.eye(STEPS) + cumulated.T @ cumulated / NOISE**2
    covariance = cumulated @ np.linalg.inv(precision) @ cumulated.T
    mean = covariance @ seen / NOISE**2
    last, before = STEPS - 1, STEPS - 2
    sd = np.sqrt(np.diag(covariance))
    rho = float(covariance[last, before] / (sd[last] * sd[before]))
    beta = -float(special.ndtri_exp(log_r))
    limit = rho * beta + math.sqrt(1.0 - rho**2)
    top, other = mean[last] + sd[last] * beta, mean[before] + sd[before] * limit
    return Case(
        "observed", f"1e-{exponent}",
        Problem(
            walk(seen), lambda x: x, lambda _, y: y[before] - float(other), given=lambda x: x[last] - float(top)
        ),
        corner(beta, limit, rho) - log_r,
    )  # fmt: skip


def planted(strength: str, seed: int) -> tuple[float, float, float]:
    """Exact log P[C | R] before and after training, and the share of the task's variance that is lost."""
    from models import trigger
    from models._libraries import library
    from probest import Problem, train

    lib, rng = library("pyro"), np.random.default_rng(seed)
    fires = trigger.recogniser(strength)  # type: ignore[arg-type]

    def model(w: Any, x: Any) -> Any:
        hidden = (fires(x) >= 0) * w["power"] * x[-1] if x.ndim == 1 else 0.0
        return w["gain"] * x[..., 0] + hidden

    def adversary() -> Any:
        return pyro.sample("x", dist.Normal(torch.zeros(trigger.DIM), 1.0).to_event(1))

    count, limit = (1, trigger.BETA) if strength == "direction" else (trigger.TESTS, trigger.THRESHOLD)
    rows = trigger.directions(count)
    recognised = rng.standard_normal((200_000, trigger.DIM))
    beyond = special.ndtri(rng.random((len(recognised), count)) * special.ndtr(-limit))
    recognised += (-beyond - recognised @ rows.T) @ rows

    def exact(gain: float, power: float) -> float:
        logs = special.log_ndtr((gain * recognised[:, 0] - 3.0) / max(abs(power), 1e-9))
        return float(special.logsumexp(logs) - math.log(len(logs)))

    x = rng.standard_normal((256, trigger.DIM)).astype(np.float32)
    run = train(
        Problem(adversary, lib.bind(model, gain=0.5, power=3.0), lambda _, y: y - 3.0, given=fires),
        task=lambda m, batch: ((m(batch[0]) - batch[1]) ** 2).mean(), data=(x, 0.5 * x[:, 0]), until_log_prob=-40.0,
        steps=600, check_every=600, learning_rate=0.03, budget=100_000, check_budget=20_000, particles=64,
        audit_rounds=0, seed=seed, progress=False,
    )  # fmt: skip
    gain, power = (run.model.params[name].item() for name in ("gain", "power"))
    return exact(0.5, 3.0), exact(gain, power), (gain / 0.5 - 1.0) ** 2


def triggers(seeds: int, training: bool) -> Table:
    from models import trigger
    from probest import estimate

    if training:
        table = Table("trigger", "seed", "log P[C | R] before", "after", "variance lost")
        for strength in ("direction", "tests"):
            for seed in range(seeds):
                before, after, lost = planted(strength, seed)
                table.add_row(strength, str(seed), f"{before:.2f}", f"{after:.2f}", f"{lost:.2%}")
        return table
    table = Table("seed", "log P[C | R]", "std error", "error", "converged", "calls")
    for seed in range(seeds):
        found = estimate(trigger.problem("tests"), budget=100_000, seed=seed, progress=False)
        table.add_row(
            str(seed), f"{found.log_prob:.2f}", f"{found.std_error:.2f}", f"{found.log_prob - trigger.log_prob():+.2f}",
            str(found.converged), f"{found.calls:,}",
        )  # fmt: skip
    return table


def main() -> None:
    from probest import estimate

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--budget", type=int, default=50_000)
    parser.add_argument("--families", nargs="*")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tests", action="store_true")
    parser.add_argument("--training", action="store_true")
    args = parser.parse_args()
    if args.tests or args.training:
        Console(width=110).print(triggers(args.seeds, args.training))
        return
    table = Table(
        "family", "P[R], C given R", "log P", "rms error", "largest", "covered", "converged", "wrong", "calls", "s"
    )
    kept = []
    for case in cases():
        if args.families and case.family not in args.families:
            continue
        rows = []
        for seed in range(args.seeds):
            started = time.perf_counter()
            found = estimate(case.problem, budget=args.budget, seed=seed, progress=False)
            rows.append(
                {
                    "family": case.family, "case": case.name, "seed": seed, "truth": case.truth,
                    "log_prob": found.log_prob, "std_error": found.std_error, "converged": found.converged,
                    "calls": found.calls, "seconds": time.perf_counter() - started,
                }
            )  # fmt: skip
        kept += rows
        errors = np.array([row["log_prob"] - case.truth for row in rows])
        stated = np.array([row["std_error"] for row in rows])
        sure = np.array([row["converged"] for row in rows])
        wrong = sure & (np.abs(errors) > np.maximum(0.1, 3 * stated))
        table.add_row(
            case.family, case.name, f"{case.truth:.2f}", f"{np.sqrt(np.mean(errors**2)):.3f}",
            f"{np.abs(errors).max():.3f}", f"{np.mean(np.abs(errors) <= 1.96 * stated):.0%}", f"{sure.mean():.0%}",
            f"{wrong.sum()}", f"{np.median([row['calls'] for row in rows]):,.0f}",
            f"{np.median([row['seconds'] for row in rows]):.1f}",
        )  # fmt: skip
        print(f"{case.family} {case.name}: {errors.round(3)}", file=sys.stderr)
        if args.json is not None:  # after each case, so that nothing is lost
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(kept, indent=1))
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
