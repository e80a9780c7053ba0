"""How far below 1/n can training push a catastrophe? `train()` beside what one would do without it.

    python benchmarks/below_one_over_n.py --models digits pendulum --seeds 5 --out below.json
    python benchmarks/below_one_over_n.py --models digits --methods train teacher --calls 300000 --seeds 2
    python benchmarks/below_one_over_n.py --steps

Both models learn from n = 1,000 observations (models/digits.py, torch; models/pendulum.py, JAX). Each method starts
from the ordinarily trained network and may spend as many model calls (a forward pass is 1, a gradient 3); those on the
task's own data are free to all. Methods:

- ordinary: nothing more.
- sampled: the worst of fresh draws of D, with the right answers (``adversarial_baseline``; digits: the reader's).
- severity: the worst of fresh draws, and their severity stepped down instead.
- pgd: PGD-10 adversarial training (Madry et al. 2018): ten steps uphill in severity from fresh draws, within a ball of
  radius ``PGD_RADIUS`` in standard-normal coordinates, then the right answers.
- trades: as TRADES (Zhang et al. 2019) does, answers at the ends of such walks are held to those at their beginnings.
- train, teacher: ``train()`` without and with a teacher, to the end of the calls: no target.
- pool: ``train()`` that also plays against adversaries within 3 nats, searched for five times on the way; what searches
  cost is taken off the steps.

Every result is judged by the same: for each stratum of D, ``--judges`` estimates from fresh seeds (``--judge`` calls
each), of which the largest counts, since they err low and seldom high. The sum over strata is the best known lower
bound of log P. A stratum in which none of them met a catastrophe counts nothing, and is counted under "unmet": where
that is all of them, log P is below anything that this judge can tell. Worst D: the largest P under any D within 2 and
5 nats (closed form from log P). Time is in multiples of the sampled baseline's.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from models import digits, pendulum  # noqa: E402
from probest import Pool, Problem, estimate, train  # noqa: E402
from probest.diagnostics import log_sum_exp  # noqa: E402

MODELS: dict[str, ModuleType] = {"digits": digits, "pendulum": pendulum}
METHODS = ("ordinary", "sampled", "severity", "pgd", "trades", "train", "teacher", "pool")
DRAWN, KEPT = 1024, 128
PGD_STEPS, PGD_RADIUS = 10, 4.0
PENDULUM_WEIGHT = 0.1  # of hard cases beside recorded weather, as in its baseline
STEP_CALLS = 1_408  # of one step of train() with 128 particles: two gradients and the model's own, and 256 draws
POOL_CALLS = 64 * 4  # more with opponents: their draws, and gradients there
SEARCHES, SEARCH_CALLS = 5, 25_000
LESSON_CALLS = 32 * 4  # more with a teacher: replayed cases and their severities


# Training -------------------------------------------------------------------------------------------------------------


def walked(event: Any, z: np.ndarray) -> np.ndarray:
    """Ten steps uphill in severity within a ball around each z."""
    start = z.copy()
    for _ in range(PGD_STEPS):
        slope = event.evaluate(z, gradient=True).severity_grad
        z = z + 2.5 * PGD_RADIUS / PGD_STEPS * slope / np.maximum(np.linalg.norm(slope, axis=1, keepdims=True), 1e-12)
        away = z - start
        z = start + away * np.minimum(1.0, PGD_RADIUS / np.maximum(np.linalg.norm(away, axis=1, keepdims=True), 1e-12))
    return z


def hard_cases(event: Any, method: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Where this method trains, and where each case began."""
    if method in ("pgd", "trades"):
        start = rng.standard_normal((KEPT, event.dim))
        return walked(event, start), start
    z = rng.standard_normal((DRAWN, event.dim))
    worst = np.argsort(-event.severity(z))[:KEPT]
    return z[worst], z[worst]


def digits_peer(method: str, ordinary: Any, calls: int, seed: int) -> Any:
    import torch

    model, (data, _) = copy.deepcopy(ordinary), digits.load_data()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2)
    generator, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    event, spent = digits.problem(ordinary).event, 0
    while spent < calls:
        now = event.replaced(model=model)
        z, start = hard_cases(now, method, rng)
        images = now.observe(z)
        batch = torch.randint(len(data.images), (digits.BATCH,), generator=generator)
        loss = digits.task_loss(model, (data.images[batch], data.labels[batch]))
        if method == "severity":
            loss = loss + torch.vmap(digits.checker)(images, model(images)).mean()
        elif method == "pgd":
            loss = loss + digits.task_loss(model, (images, torch.vmap(digits.reader_log_beliefs)(images).argmax(1)))
        else:
            before = torch.softmax(model(now.observe(start)), 1)
            loss = loss + (before * (before.log() - torch.log_softmax(model(images), 1))).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        spent += now.model_calls + 3 * KEPT * (2 if method == "trades" else 1)
    return model


def pendulum_peer(method: str, ordinary: Any, calls: int, seed: int) -> Any:
    import jax
    import jax.numpy as jnp
    import optax

    data, _ = pendulum.load_data()
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    model, state = ordinary, optimizer.init(ordinary)
    rng, event, spent = np.random.default_rng(seed), pendulum.problem(ordinary).event, 0

    def weather(z: Any) -> Any:
        return pendulum.Weather(pendulum.START_SCALE * z[:, :2], pendulum.GUST_SCALE * z[:, 2:])

    def on_cases(model: Any, z: Any, start: Any) -> Any:
        if method == "pgd":
            return pendulum.task_loss(model, weather(z))
        run = jax.vmap(lambda w: pendulum.simulate(model, w))
        if method == "severity":
            return jnp.mean(jax.vmap(pendulum.checker)(weather(z), run(weather(z))))
        return jnp.mean((run(weather(z)).torques - jax.lax.stop_gradient(run(weather(start)).torques)) ** 2)

    @jax.jit
    def step(model: Any, state: Any, rows: Any, z: Any, start: Any) -> Any:
        def loss(model: Any) -> Any:
            recorded = pendulum.task_loss(model, (data.start[rows], data.gusts[rows]))
            return recorded + PENDULUM_WEIGHT * on_cases(model, z, start)

        updates, state = optimizer.update(jax.grad(loss)(model), state)
        return optax.apply_updates(model, updates), state

    while spent < calls:
        now = event.replaced(model=model)
        z, start = hard_cases(now, method, rng)
        rows = rng.integers(len(data.start), size=pendulum.BATCH)
        model, state = step(model, state, rows, z.astype(np.float32), start.astype(np.float32))
        spent += now.model_calls + 3 * KEPT * (2 if method == "trades" else 1)
    return model


def trained(name: str, method: str, ordinary: Any, calls: int, seed: int, *, only_steps: bool = False) -> Any:
    """By ``train()``, with options that leave all calls to its steps. only_steps: their seconds, not the model."""
    module = MODELS[name]
    teachers: dict[str, Callable[[Any], Any]] = {
        "digits": lambda image: digits.reader_log_beliefs(image).argmax(),
        "pendulum": lambda weather: weather,
    }
    taught, pooled = method == "teacher", method == "pool"
    each = STEP_CALLS + taught * LESSON_CALLS + pooled * POOL_CALLS
    steps = (calls - pooled * SEARCHES * SEARCH_CALLS) // each
    options = module.TRAINING | {
        "until_log_prob": -1e6, "steps": steps, "check_every": steps, "check_budget": 20_000 if pooled else 1_000,
        "budget": 1_000, "audit_rounds": 0, "adversaries": Pool(every=steps // (SEARCHES + 1)) if pooled else None,
    }  # fmt: skip
    run = train(
        module.problem(ordinary), task=module.task_loss, data=module.load_data()[0],
        teacher=teachers[name] if taught else None, seed=seed, progress=False, **options,
    )  # fmt: skip
    return run.costs.steps.seconds if only_steps else run.model


def result_of(name: str, method: str, ordinary: Any, calls: int, seed: int) -> Any:
    if method == "ordinary":
        return ordinary
    if method == "sampled":
        return MODELS[name].adversarial_baseline(ordinary, calls, seed)
    if method in ("train", "teacher", "pool"):
        return trained(name, method, ordinary, calls, seed)
    return {"digits": digits_peer, "pendulum": pendulum_peer}[name](method, ordinary, calls, seed)


# Judging --------------------------------------------------------------------------------------------------------------


class Verdict(NamedTuple):
    """log P at least; how many strata hold no known catastrophe, of how many; how many estimates converged."""

    log_prob: float
    unmet: int
    strata: int
    converged: int


def judged(name: str, model: Any, budget: int, judges: int) -> Verdict:
    held: list[Problem] = (
        [digits.problem(model, held=k) for k in range(digits.CLASSES)]
        if name == "digits"
        else [pendulum.problem(model)]
    )
    best, converged = [], 0
    for problem in held:
        found = [estimate(problem, budget=budget, seed=1_000 + seed, progress=False) for seed in range(judges)]
        best.append(max(one.log_prob for one in found))
        converged += sum(one.converged for one in found)
    values = np.array(best)
    total = log_sum_exp(values) - math.log(len(values)) if np.isfinite(values).any() else -math.inf
    return Verdict(total, int(np.isinf(values).sum()), len(values), converged)


def worst(log_p: float, kl: float) -> float:
    """Largest P under any D within ``kl`` nats, to first order in P: q with q (log q - log P) = kl, or 1."""
    if not math.isfinite(log_p) or kl >= -log_p:
        return 0.0 if not math.isfinite(log_p) else 1.0
    low, high = log_p, 0.0
    for _ in range(200):
        middle = 0.5 * (low + high)
        q = math.exp(middle)
        cost = q * (middle - log_p) + ((1 - q) * math.log1p(-q) if q < 1 else 0.0)
        low, high = (middle, high) if cost < kl else (low, middle)
    return math.exp(low)


def step_costs(console: Console, steps: int = 100) -> None:
    """Seconds of a training step of `train()` over those of PGD-10, at as many hard cases, the two in turns."""
    ordinary = digits.train_model()
    pgd_calls = KEPT * (3 * PGD_STEPS + 3)
    for warm in (10, steps):  # the first round is not counted
        seconds = {}
        for method, calls in (("pgd", pgd_calls), ("train", STEP_CALLS), ("teacher", STEP_CALLS + LESSON_CALLS)):
            start = time.perf_counter()
            if method == "pgd":
                digits_peer(method, ordinary, warm * calls, 0)
                seconds[method] = time.perf_counter() - start
            else:
                seconds[method] = trained("digits", method, ordinary, warm * calls, 0, only_steps=True)
    pgd = seconds.pop("pgd")
    console.print("a step, in steps of PGD-10: " + ", ".join(f"{m} {s / pgd:.2f}" for m, s in seconds.items()))
    console.print(f"a step of PGD-10: {1000 * pgd / steps:.0f} ms, {pgd_calls} calls")


# Table ----------------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--calls", type=int, default=1_000_000, help="model calls of each training")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--judge", type=int, default=100_000, help="calls of an estimate of a stratum")
    parser.add_argument("--judges", type=int, default=2)
    parser.add_argument("--steps", action="store_true", help="only what a step costs beside one of PGD-10")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    console, records = Console(), []
    if options.steps:
        step_costs(console)
        return
    for name in options.models:
        module = MODELS[name]
        ordinary = module.train_model()
        for seed in range(options.first, options.first + options.seeds):
            for method in options.methods:
                if method == "ordinary" and seed > options.first:
                    continue
                start = time.perf_counter()
                model = result_of(name, method, ordinary, options.calls, seed)
                seconds = time.perf_counter() - start
                verdict = judged(name, model, options.judge, options.judges)
                record = {
                    "model": name, "method": method, "seed": seed, "seconds": seconds,
                    "score": module.accuracy(model), **verdict._asdict(),
                    "within_2": worst(verdict.log_prob, 2.0), "within_5": worst(verdict.log_prob, 5.0),
                }  # fmt: skip
                records.append(record)
                console.print(record)
                if options.out:
                    options.out.write_text(json.dumps({"calls": options.calls, "results": records}, indent=1))
        console.print(table(name, [r for r in records if r["model"] == name]))


def table(name: str, records: list[dict[str, Any]]) -> Table:
    shown = Table(
        "method", "log P, median", "from", "to", "unmet", "task score", "P within 2 nats", "within 5", "time",
        title=f"{name}, by the best known lower bound of log P",
    )  # fmt: skip
    seconds = [r["seconds"] for r in records if r["method"] == "sampled"] or [math.nan]
    for method in METHODS:
        mine = [r for r in records if r["method"] == method]
        if mine:
            levels = [r["log_prob"] for r in mine]
            middle = [statistics.median(r[key] for r in mine) for key in ("score", "within_2", "within_5", "seconds")]
            shown.add_row(
                method, f"{statistics.median(levels):.1f}", f"{min(levels):.1f}", f"{max(levels):.1f}",
                f"{sum(r['unmet'] for r in mine)} of {sum(r['strata'] for r in mine)}", f"{middle[0]:.4f}",
                f"{middle[1]:.3g}", f"{middle[2]:.3g}", f"{middle[3] / statistics.median(seconds):.1f}",
            )  # fmt: skip
    return shown


if __name__ == "__main__":
    main()
