"""Do bounds hold, and how far apart are they?

    OMP_NUM_THREADS=1 python benchmarks/bounds.py --json build/bounds.json
    OMP_NUM_THREADS=1 python benchmarks/bounds.py --seeds 20 --parts bounds,certain
    OMP_NUM_THREADS=1 python benchmarks/bounds.py --parts gradients,training,nuts

First, `Bounds()` on the exact problems of probest.testing: the mean of each bound over all seeds, less the truth, in
standard errors of that mean ("lower" should not be far above 0, "upper" not far below), the mean gap, and the share of
runs whose bounds are less than half a nat apart. Then `lower_bound(0.95)` of fresh importance samples and of plain
draws: how often it is above the truth ("violated"), and by how much it is below on average.

"gradients": of the evidence lower bound of a softened half-space in its guide, against quadrature, and their standard
deviation a draw, by each estimator; and of log P in the limit, by the weights of a guide that has climbed. "training":
`train(objective="lower_bound")` on a half-space that a model can turn away from, and on the pendulum. "nuts": the
No-U-Turn sampler of Pyro and NumPyro on conditioned programs, the digits (class held) and the pendulum.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy import integrate, special, stats

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from probest import Bounds, Importance, MonteCarlo, Problem, Tempering, train  # noqa: E402
from probest.budget import Meter  # noqa: E402
from probest.guides.fit import fit_guide  # noqa: E402
from probest.guides.variational import Adam, GaussianGuide, bound_gradient, informed  # noqa: E402
from probest.markov import lower_bound  # noqa: E402
from probest.smc.softening import Noise  # noqa: E402
from probest.testing import EXACT_EVENTS  # noqa: E402
from probest.testing.events import half_space  # noqa: E402

PARTS = ("bounds", "certain", "gradients", "training", "nuts")


def bounds(event: Any, seeds: int, budget: int) -> dict[str, Any] | None:
    lower, upper, errors, gaps = [], [], [], []
    for i in range(seeds):
        run = Bounds().run(event, budget=budget, seed=np.random.SeedSequence(i))
        named = {line.method: line for line in run.ledger}
        if "upper bound" not in named:
            continue
        one, other = named["lower bound"], named["upper bound"]
        lower.append(one.log_prob - event.log_prob)
        upper.append(other.log_prob - event.log_prob)
        errors.append((one.std_error, other.std_error))
        gaps.append(other.log_prob - one.log_prob)
    if len(gaps) < 2:
        return None
    deviation = [float(np.mean(v) / max(np.std(v) / math.sqrt(len(v)), 1e-9)) for v in (lower, upper)]
    means = [float(np.mean(v)) for v in (lower, upper)]
    return {
        "event": event.name,
        "lower": means[0],
        "lower_in_errors": deviation[0],
        "upper": means[1],
        "upper_in_errors": deviation[1],
        "gap": float(np.mean(gaps)),
        "close": float(np.mean(np.array(gaps) < 0.5)),
        "runs": len(gaps),
    }


def certain(event: Any, runs: int, method: Any, budget: int) -> dict[str, Any]:
    below = []
    for i in range(runs):
        run = method.run(event, budget=budget, seed=np.random.SeedSequence([7, i]))
        below.append(lower_bound(run.ledger, 0.95) - event.log_prob)
    found = np.array(below)
    some = found[np.isfinite(found)]
    mean = float(some.mean()) if len(some) else math.nan
    return {"event": event.name, "method": method.name, "violated": float(np.mean(found > 0)), "mean": mean}


def gradients(dim: int, beta: float, width: float = 0.7) -> list[dict[str, Any]]:
    """At a guide half of the way, so that there is a gradient; and in the limit once it has climbed."""
    event, rng, soft = half_space(dim, beta), np.random.default_rng(0), Noise(1.0 / width)
    slope = event.evaluate(np.zeros((1, dim)), gradient=True).severity_grad
    assert slope is not None
    normal, spread, mean = slope[0], 0.7, 0.5 * beta
    basis = np.column_stack([normal, np.linalg.svd(normal[None])[2][1]])
    guide = GaussianGuide(mean * normal, basis, np.diag([spread, 1.0]))

    def exact(mean: float) -> float:
        def inside(u: float) -> float:
            return float(stats.norm.pdf(u) * special.log_ndtr((mean + spread * u - beta) / width))

        return float(integrate.quad(inside, -12.0, 12.0)[0]) - 0.5 * (mean**2 + spread**2 - 1.0) + math.log(spread)

    truth = (exact(mean + 1e-4) - exact(mean - 1e-4)) / 2e-4
    rows: list[dict[str, Any]] = []
    for kind, draws in itertools.product(("total", "sticking", "doubly"), (1, 16)):
        if kind == "sticking" and draws > 1:
            continue
        found = [
            bound_gradient(
                Meter(event, 10**9), guide, rng.standard_normal((draws * 64, dim)), soft, draws=draws,
                alpha=1.0 if draws == 1 else 0.0, kind=kind,
            ).guide.mean @ normal
            for _ in range(2000)
        ]  # fmt: skip
        ratio = float(np.mean(found)) / truth if draws == 1 else math.nan
        rows.append({"dim": dim, "beta": beta, "kind": kind, "draws": draws, "mean / exact": ratio,
                     "deviation": float(np.std(found) * math.sqrt(64))})  # fmt: skip
    guide = GaussianGuide.standard(np.zeros(dim), informed(np.repeat(slope, 4, axis=0), 4))
    adam = Adam.of(guide)
    for i in range(400):
        noise = rng.standard_normal((64, dim))
        found_ = bound_gradient(Meter(event, 10**9), guide, noise, soft, draws=16)
        guide = adam.step(guide, found_.guide, share=1.0 - i / 400)
    at = bound_gradient(Meter(event, 10**9), guide, rng.standard_normal((64_000, dim)), soft, draws=16)
    distance, scale = beta / math.hypot(1.0, width), math.hypot(1.0, width)
    truth = -math.exp(stats.norm.logpdf(distance) - special.log_ndtr(-distance)) / scale
    ratio = -float(at.weight @ soft.slope(at.severity)) / truth
    gap = float(special.log_ndtr(-distance)) - at.value
    rows.append({"dim": dim, "beta": beta, "kind": f"in the limit; gap {gap:.4f}", "draws": 16,
                 "mean / exact": ratio, "deviation": math.nan})  # fmt: skip
    return rows


def training(seeds: int) -> list[dict[str, Any]]:
    """A half-space whose normal is the model's own, and the pendulum."""
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from jax.tree_util import Partial

    from models import pendulum

    def adversary() -> Any:
        return numpyro.sample("x", dist.Normal(jnp.zeros(10), 1.0).to_event(1))

    def model(weights: Any, x: Any) -> Any:
        return weights["gain"] * x[..., 0] + weights["bias"] * x[..., 1]

    inputs = np.random.default_rng(0).standard_normal((256, 10))
    inputs[:, 1] = 0.0
    gain = Partial(model, {"gain": jnp.asarray(0.5), "bias": jnp.asarray(1.0)})
    problems: dict[str, Any] = {
        "half-space": (
            Problem(adversary, gain, lambda _, y: y - 5.0),
            {
                "task": lambda m, batch: ((m(batch[0]) - batch[1]) ** 2).mean(),
                "data": (inputs, 0.5 * inputs[:, 0]),
                "until_log_prob": -25.0, "steps": 150, "check_every": 30, "learning_rate": 0.02,
            },
        ),
        "pendulum": (
            pendulum.problem(pendulum.train_model()),
            {"task": pendulum.task_loss, "data": pendulum.load_data()[0], **pendulum.TRAINING},
        ),
    }  # fmt: skip
    rows = []
    for name, (problem, options) in problems.items():
        for objective, seed in itertools.product(("lower_bound", "log_prob"), range(seeds)):
            run = train(problem, **options, objective=objective, seed=seed, progress=False)
            assert run.audit is not None
            rows.append({
                "problem": name, "objective": objective, "seed": seed, "before": run.before.log_prob,
                "after": run.after.log_prob, "audit": run.audit.estimate.log_prob, "converged": run.converged,
                "steps": len(run.history), "calls": run.calls, "seconds": run.costs.steps.seconds,
                "task": run.history[-1].task_loss,
            })  # fmt: skip
    return rows


def nuts(samples: int) -> list[dict[str, Any]]:
    """Two chains on the softened catastrophe, in standard-normal coordinates; severities against tempering's."""
    import jax
    import numpyro.diagnostics
    import pyro
    import torch
    from numpyro.infer import MCMC, NUTS
    from pyro import infer

    from models import digits, pendulum

    rows = []
    for name, problem, temperature in (
        ("digits, class 2", digits.problem(held=2), 2.0),
        ("pendulum", pendulum.problem(pendulum.train_model()), 0.05),
    ):
        program = problem.conditioned(temperature, gaussianized=True)
        names = [site.name + "_base" for site in problem.event.sites]
        if name.startswith("digits"):
            pyro.set_rng_seed(0)
            mcmc = infer.MCMC(
                infer.NUTS(program, max_tree_depth=6), num_samples=samples, warmup_steps=samples // 2, num_chains=1,
                disable_progbar=True,
            )  # fmt: skip
            chains = []
            for i in range(2):
                torch.manual_seed(i)
                mcmc.run()
                found = mcmc.get_samples()
                chains.append(np.concatenate([found[n].reshape(samples, -1).numpy() for n in names], axis=1))
            z = np.stack(chains).astype(np.float64)
        else:
            sampler = MCMC(NUTS(program), num_warmup=samples, num_samples=samples, num_chains=2, progress_bar=False,
                           chain_method="sequential")  # fmt: skip
            sampler.run(jax.random.key(0))
            kept = sampler.get_samples(group_by_chain=True)
            z = np.concatenate([np.asarray(kept[n]).reshape(2, samples, -1) for n in names], axis=2).astype(np.float64)
        severity = problem.event.severity(z.reshape(2 * samples, -1)).reshape(2, samples)
        rhat = float(numpyro.diagnostics.split_gelman_rubin(severity))
        size = float(numpyro.diagnostics.effective_sample_size(severity))
        rows.append({"problem": name, "temperature": temperature, "R-hat": rhat, "effective": size,
                     "severity": float(severity.mean()), "catastrophes": float(np.mean(severity >= 0.0)),
                     "ours": _softened_severity(problem, temperature)})  # fmt: skip
    return rows


def _softened_severity(problem: Any, temperature: float) -> float:
    """The mean severity under the same softened law, by an importance sample of a guide fitted to catastrophes."""
    event = problem.event
    rng, method = np.random.default_rng(1), Tempering(particles=1024)
    runs = [method.run(event, budget=200_000, seed=np.random.SeedSequence(i)) for i in (0, 1)]
    z = np.concatenate([run.conclusion.particles.z for run in runs if run.conclusion.particles is not None])
    guide = fit_guide(z, np.zeros(len(z)), rng).guide
    fresh = guide.sample(60_000, rng)
    severity = event.severity(fresh)
    log_w = guide.log_ratio(fresh) + special.log_ndtr(severity / temperature)
    weight = np.exp(log_w - log_w.max())
    return float(weight @ severity / weight.sum())


def show(console: Console, title: str, rows: list[dict[str, Any]]) -> None:
    table = Table(title=title)
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--budget", type=int, default=20_000)
    parser.add_argument("--parts", default="bounds,certain", help=f"some of {','.join(PARTS)}")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    console, parts = Console(), options.parts.split(",")
    others: dict[str, Any] = {}
    if "gradients" in parts:
        others["gradients"] = [row for dim, beta in ((5, 4.0), (50, 6.0)) for row in gradients(dim, beta)]
        show(console, "gradients of variational bounds", others["gradients"])
    if "training" in parts:
        others["training"] = training(min(options.seeds, 3))
        show(console, "training on a lower bound alone", others["training"])
    if "nuts" in parts:
        others["nuts"] = nuts(400)
        show(console, "NUTS on softened catastrophes", others["nuts"])
    events = [event for event in EXACT_EVENTS if not event.weighted and not event.boolean]
    first = Table(title=f"bounds, {options.seeds} seeds, {options.budget:,} calls")
    for column in ("event", "lower", "in errors", "upper", "in errors", "gap", "close", "runs"):
        first.add_column(column)
    rows = []
    for event in events if "bounds" in parts else ():
        row = bounds(event, options.seeds, options.budget)
        if row is None:
            console.print(f"{event.name}: no upper bound")
            continue
        rows.append(row)
        figures = (f"{value:.3g}" for value in list(row.values())[1:])
        first.add_row(row["event"], *figures)
    if rows:
        console.print(first)
    second, sure = Table(title=f"lower_bound(0.95), {options.runs} runs"), []
    for column in ("event", "method", "violated", "mean below"):
        second.add_column(column)
    small = Importance(find=Tempering(particles=64, max_moves=3), first_batch=100, precision=0.3)
    for event in events[:6] if options.runs and "certain" in parts else ():
        for method, budget in ((small, 4_000), (MonteCarlo(), 3_000)):
            row = certain(event, options.runs, method, budget)
            sure.append(row)
            second.add_row(row["event"], row["method"], f"{row['violated']:.3f}", f"{row['mean']:.2f}")
    if sure:
        console.print(second)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"bounds": rows, "certain": sure, **others}, indent=1))


if __name__ == "__main__":
    main()
