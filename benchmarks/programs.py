"""Programs with discrete sites, drawn at random, with exact answers by enumeration and quadrature.

    python benchmarks/programs.py --programs 20 --seeds 5 --backends pyro,numpyro --out programs.json
    python benchmarks/programs.py --families switches,chains --programs 4 --seeds 2
    python benchmarks/programs.py --digits --seeds 3

Families: rare switches; mixtures of half-spaces; chains of dependent sites; counts; counts whose rate varies; nested
and dependent switches; observed discrete sites; discrete sites with a checker that says only yes or no; more
combinations than can be listed. `covered`: share of 95 % intervals that hold the truth. `wrong`: runs that are
converged and yet off by more than 0.1 and 3 standard errors.
`--digits` estimates models/digits.py as it stands, its class drawn.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy import special, stats

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from library import library  # noqa: E402

from probest import Problem, estimate  # noqa: E402


class Case(NamedTuple):
    problem: Problem
    log_prob: float


def _problem(adversary: Callable[[], Any], checker: Callable[[Any], Any]) -> Problem:
    return Problem(adversary, lambda x: x, lambda _, y: checker(y))


class Tools:
    """A library with arrays in single precision."""

    def __init__(self, backend: str) -> None:
        self.lib, self.backend = library(backend), backend
        self.xp, self.dist, self.sample = self.lib.xp, self.lib.dist, self.lib.sample

    def array(self, values: Any) -> Any:
        return self.lib.array(np.asarray(values, dtype=np.float32))

    def index(self, value: Any) -> Any:
        return value.long() if self.backend == "pyro" else value.astype(int)

    def normals(self, n: int) -> Any:
        return self.sample("x", self.dist.Normal(self.xp.zeros(n), 1.0).to_event(1))

    def negative_binomial(self, size: float, p: float) -> Any:
        if self.backend == "pyro":
            return self.dist.NegativeBinomial(total_count=self.array(size), probs=self.array(p))
        return self.dist.NegativeBinomialProbs(self.array(size), self.array(p))

    def zero_inflated(self, gate: float, rate: float) -> Any:
        if self.backend == "pyro":
            return self.dist.ZeroInflatedPoisson(self.array(rate), gate=self.array(gate))
        return self.dist.ZeroInflatedPoisson(self.array(gate), self.array(rate))

    def bernoulli(self, name: str, p: Any) -> Any:
        return self.sample(name, self.dist.Bernoulli(p))


def _unit(rng: np.random.Generator, *shape: int) -> np.ndarray:
    a = rng.standard_normal(shape)
    return a / np.linalg.norm(a, axis=-1, keepdims=True)


def switches(t: Tools, rng: np.random.Generator) -> Case:
    """One to three rare switches, each of which lowers the limit."""
    count, dim = int(rng.integers(1, 4)), int(rng.integers(3, 25))
    rates, axis = 10.0 ** rng.uniform(-5, -1.5, count), _unit(rng, dim)
    limit, drops = rng.uniform(5.5, 8.0), rng.uniform(2.0, 5.0, count)

    def adversary() -> Any:
        return [t.bernoulli(f"s{i}", t.array(rate)) for i, rate in enumerate(rates)], t.normals(dim)

    def checker(y: Any) -> Any:
        fallen = sum(t.array(drop) * s for drop, s in zip(drops, y[0], strict=True))
        return t.xp.sum(t.array(axis) * y[1]) - t.array(limit) + fallen

    terms = []
    for bits in itertools.product((0, 1), repeat=count):
        b = np.array(bits)
        log_p = float(np.sum(np.where(b, np.log(rates), np.log1p(-rates))))
        terms.append(log_p + stats.norm.logsf(limit - drops @ b))
    return Case(_problem(adversary, checker), float(special.logsumexp(terms)))


def half_spaces(t: Tools, rng: np.random.Generator) -> Case:
    """A categorical choice among half-spaces in 40 dimensions."""
    count = int(rng.integers(3, 21))
    normal, betas, weights = _unit(rng, count, 40), rng.uniform(3.5, 7.0, count), rng.dirichlet(np.ones(count))

    def adversary() -> Any:
        return t.sample("k", t.dist.Categorical(t.array(weights))), t.normals(40)

    def checker(y: Any) -> Any:
        k = t.index(y[0])
        return t.xp.sum(t.array(normal)[k] * y[1]) - t.array(betas)[k]

    return Case(_problem(adversary, checker), float(special.logsumexp(np.log(weights) + stats.norm.logsf(betas))))


def chains(t: Tools, rng: np.random.Generator) -> Case:
    """A Markov chain of three-way sites; each visit of the last state lowers the limit."""
    return _chain(t, rng, int(rng.integers(3, 8)))


def _chain(t: Tools, rng: np.random.Generator, length: int) -> Case:
    move, start = rng.dirichlet([6.0, 2.0, 0.3], 3), rng.dirichlet([6.0, 2.0, 0.3])
    limit, drop = rng.uniform(5.0, 7.0), rng.uniform(0.5, 1.2)

    def adversary() -> Any:
        state = t.sample("k0", t.dist.Categorical(t.array(start)))
        visits = 1.0 * (state == 2)
        for i in range(1, length):
            state = t.sample(f"k{i}", t.dist.Categorical(t.array(move)[t.index(state)]))
            visits = visits + 1.0 * (state == 2)
        return visits, t.normals(4)

    law = np.zeros((3, length + 1))  # of the state and the visits so far
    law[[0, 1, 2], [0, 0, 1]] = start
    for _ in range(1, length):
        moved = move.T @ law
        moved[2] = np.concatenate([[0.0], moved[2, :-1]])
        law = moved
    visits = np.arange(length + 1)
    with np.errstate(divide="ignore"):
        truth = special.logsumexp(np.log(law.sum(axis=0)) + stats.norm.logsf(limit - drop * visits))
    return Case(_problem(adversary, lambda y: y[1][0] - t.array(limit) + t.array(drop) * y[0]), float(truth))


def counts(t: Tools, rng: np.random.Generator) -> Case:
    """A binomial or Poisson count, each of which adds to a normal sum."""
    poisson, rate = bool(rng.integers(2)), 10.0 ** rng.uniform(-3, 0)
    n, limit, each = int(rng.integers(5, 200)), rng.uniform(5.0, 8.0), rng.uniform(0.5, 2.0)
    p = 10.0 ** rng.uniform(-5, -1)

    def adversary() -> Any:
        law = t.dist.Poisson(t.array(rate)) if poisson else t.dist.Binomial(n, t.array(p))
        return t.sample("n", law), t.normals(3)

    k = np.arange(200)
    log_p = stats.poisson.logpmf(k, rate) if poisson else stats.binom.logpmf(k, n, p)
    truth = special.logsumexp(log_p + stats.norm.logsf(limit - each * k))
    return Case(_problem(adversary, lambda y: y[1][0] - t.array(limit) + t.array(each) * y[0]), float(truth))


def compounds(t: Tools, rng: np.random.Generator) -> Case:
    """A count whose rate varies, or that is often 0: negative binomial, beta-binomial, zero-inflated Poisson."""
    kind, limit, each = int(rng.integers(3)), rng.uniform(5.0, 8.0), rng.uniform(0.5, 2.0)
    if kind == 0:
        size, p = rng.uniform(0.5, 4.0), 10.0 ** rng.uniform(-2.5, -0.3)
        law, k = lambda: t.negative_binomial(size, p), np.arange(400)
        log_p = stats.nbinom.logpmf(k, size, 1.0 - p)
    elif kind == 1:
        n, a, b = int(rng.integers(5, 40)), rng.uniform(0.3, 3.0), 10.0 ** rng.uniform(1.0, 3.0)
        law, k = lambda: t.dist.BetaBinomial(t.array(a), t.array(b), total_count=n), np.arange(n + 1)
        log_p = stats.betabinom.logpmf(k, n, a, b)
    else:
        gate, rate = rng.uniform(0.5, 0.999), 10.0 ** rng.uniform(-1.0, 0.5)
        law, k = lambda: t.zero_inflated(gate, rate), np.arange(200)
        log_p = np.log((1.0 - gate) * stats.poisson.pmf(k, rate) + gate * (k == 0) + 1e-300)

    def adversary() -> Any:
        return t.sample("n", law()), t.normals(3)

    truth = special.logsumexp(log_p + stats.norm.logsf(limit - each * k))
    return Case(_problem(adversary, lambda y: y[1][0] - t.array(limit) + t.array(each) * y[0]), float(truth))


def nested(t: Tools, rng: np.random.Generator) -> Case:
    """A switch whose rate depends on another, and a choice that depends on both."""
    first, second = 10.0 ** rng.uniform(-4, -1), 10.0 ** rng.uniform(-4, -0.5, 2)
    weights = rng.dirichlet(np.ones(3), (2, 2))
    limits = rng.uniform(3.0, 7.0, (2, 2, 3))

    def adversary() -> Any:
        a = t.index(t.bernoulli("a", t.array(first)))
        b = t.index(t.bernoulli("b", t.array(second)[a]))
        c = t.index(t.sample("c", t.dist.Categorical(t.array(weights)[a, b])))
        return t.array(limits)[a, b, c], t.normals(6)

    log_p = np.log(np.array([1 - first, first]))[:, None] + np.log(np.stack([1 - second, second], axis=1))
    truth = special.logsumexp(log_p[:, :, None] + np.log(weights) + stats.norm.logsf(limits))
    return Case(_problem(adversary, lambda y: y[1][0] - y[0]), float(truth))


def observed(t: Tools, rng: np.random.Generator) -> Case:
    """A hidden class, a noisy reading of it that was observed, and a limit that depends on it."""
    weights, limits = rng.dirichlet(np.ones(4)), rng.uniform(3.0, 6.0, 4)
    read = rng.dirichlet(np.ones(4) * 0.5, 4) * 0.9 + 0.025
    seen = int(rng.integers(4))

    def adversary() -> Any:
        k = t.index(t.sample("k", t.dist.Categorical(t.array(weights))))
        t.sample("reading", t.dist.Categorical(t.array(read)[k]), obs=t.lib.array(seen))
        return t.array(limits)[k], t.normals(6)

    log_p = np.log(weights) + np.log(read[:, seen])
    truth = special.logsumexp(log_p + stats.norm.logsf(limits)) - special.logsumexp(log_p)
    return Case(_problem(adversary, lambda y: y[1][0] - y[0]), float(truth))


def boolean(t: Tools, rng: np.random.Generator) -> Case:
    """At least so many rare failures, or one and a gust: only yes or no is known."""
    n, rate = int(rng.integers(4, 11)), 10.0 ** rng.uniform(-4, -1.5)
    least, limit = int(rng.integers(2, 4)), rng.uniform(2.0, 3.0)

    def adversary() -> Any:
        failed = t.sample("failed", t.dist.Bernoulli(t.array(np.full(n, rate))).to_event(1))
        return (1.0 * failed).sum(), t.normals(2)

    none, one = stats.binom.pmf([0, 1], n, rate)
    del none
    some = stats.binom.sf(least - 1, n, rate) + (one if least > 1 else 0.0) * stats.norm.sf(limit)
    between = sum(stats.binom.pmf(k, n, rate) for k in range(2, least)) * stats.norm.sf(limit)
    checker = lambda y: (y[0] >= least) | ((y[0] >= 1) & (y[1][0] >= t.array(limit)))  # noqa: E731
    return Case(_problem(adversary, checker), math.log(some + between))


def many(t: Tools, rng: np.random.Generator) -> Case:
    """More combinations than can be listed: a long chain, or many rare failures, beside a normal sum."""
    if rng.integers(2):
        return _chain(t, rng, int(rng.integers(10, 15)))
    n, p = int(rng.integers(20, 201)), 10.0 ** rng.uniform(-5, -2)
    limit, each = rng.uniform(4.0, 6.5), rng.uniform(0.7, 2.0)

    def adversary() -> Any:
        failed = t.sample("failed", t.dist.Bernoulli(t.array(np.full(n, p))).to_event(1))
        return (1.0 * failed).sum(), t.normals(4)

    k = np.arange(n + 1)
    truth = special.logsumexp(stats.binom.logpmf(k, n, p) + stats.norm.logsf(limit - each * k))
    return Case(_problem(adversary, lambda y: y[1][0] - t.array(limit) + t.array(each) * y[0]), float(truth))


FAMILIES: dict[str, Callable[[Tools, np.random.Generator], Case]] = {
    "switches": switches,
    "half_spaces": half_spaces,
    "chains": chains,
    "counts": counts,
    "compounds": compounds,
    "nested": nested,
    "observed": observed,
    "boolean": boolean,
    "many": many,
}


def run(name: str, backend: str, options: argparse.Namespace) -> dict[str, Any]:
    """A family on a backend: a row of the table."""
    errors, covered, converged, wrong, calls, seconds = [], [], [], [], [], []
    tools = Tools(backend)
    for number in range(options.programs):
        if backend == "numpyro":  # else hundreds of compiled programs exhaust the memory maps of one process
            import jax

            jax.clear_caches()
        case = FAMILIES[name](tools, np.random.default_rng([options.draw, number]))
        for seed in range(options.seeds):
            started = time.perf_counter()
            found = estimate(case.problem, budget=options.budget, seed=seed, progress=False)
            seconds.append(time.perf_counter() - started)
            error = abs(found.log_prob - case.log_prob) if math.isfinite(found.log_prob) else math.inf
            errors.append(error)
            covered.append(found.lower - 1e-6 <= case.log_prob <= found.upper + 1e-6)
            converged.append(found.converged)
            wrong.append(found.converged and error > 0.1 + 3.0 * found.std_error)
            calls.append(found.calls)
            if wrong[-1] or options.verbose:
                print(f"{name} {number} {seed}: {found!r}, truth {case.log_prob:.4f} {found.advice}", file=sys.stderr)
    return {
        "family": name,
        "backend": backend,
        "median_error": float(np.median(errors)),
        "p90_error": float(np.quantile(errors, 0.9)),
        "covered": float(np.mean(covered)),
        "converged": float(np.mean(converged)),
        "wrong": int(np.sum(wrong)),
        "runs": len(errors),
        "calls": float(np.mean(calls)),
        "most_calls": int(np.max(calls)),
        "seconds": float(np.median(seconds)),
    }


def digits(options: argparse.Namespace) -> list[dict[str, Any]]:
    from models import digits

    problem = digits.problem()
    rows = []
    for seed in range(options.seeds):
        found = estimate(problem, budget=300_000, precision=0.1, seed=seed, progress=False)
        rows.append({"seed": seed, "log_prob": found.log_prob, "std_error": found.std_error, "lower": found.lower,
                     "upper": found.upper, "converged": found.converged, "calls": found.calls})  # fmt: skip
    return rows


def table(rows: list[dict[str, Any]], title: str) -> Table:
    out = Table(title=title)
    for column in rows[0]:
        out.add_column(column, justify="left" if isinstance(rows[0][column], str) else "right")
    for row in rows:
        out.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--backends", default="pyro,numpyro")
    parser.add_argument("--programs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--budget", type=int, default=50_000)
    parser.add_argument("--draw", type=int, default=0, help="seed of the programs themselves")
    parser.add_argument("--digits", action="store_true")
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    console = Console(width=160)
    if options.digits:
        rows = digits(options)
    else:
        rows = []
        for backend, name in itertools.product(options.backends.split(","), options.families.split(",")):
            rows.append(run(name, backend, options))
            console.print(f"[dim]{backend} {name}: {rows[-1]['median_error']:.3f}, {rows[-1]['wrong']} wrong[/dim]")
    console.print(table(rows, f"{options.programs} programs, {options.seeds} seeds, budget {options.budget:,}"))
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1, allow_nan=True))


if __name__ == "__main__":
    main()
