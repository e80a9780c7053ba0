"""Rare outputs of a transformer that can be enumerated: us beside the published estimators.

    OMP_NUM_THREADS=1 python benchmarks/enumerable.py --json build/enumerable.json
    OMP_NUM_THREADS=1 python benchmarks/enumerable.py --networks 1 --calls 16384

models/transformer.py: 262,144 inputs, all outputs with P from 1e-8 to 1e-4. Methods:

    probest      the default estimate: kriging over all combinations
    guide        the cross-entropy method over discrete sites alone
    naive        plain sampling
    itgis        independent tokens, tilted by the mean gradient of the target's lead, in rounds
    mhis         Metropolis-Hastings from p exp(lead/T) with proposals by gradients, weighted back
    qld, gld     quadratic and Gaussian logit decomposition

The last four as Wu & Hilton (2024), "Estimating the probabilities of rare outputs in language models", describe them,
written anew; their gradients count as nothing, and their temperatures are the best of four in hindsight. The loss is
theirs (Itakura & Saito): p/q - log(p/q) - 1. As there, each method's estimates q are first mapped by a q^c + b, with
the a, b, c that are best for all other outputs: else one estimate of 0 makes it infinite. "log error": root mean square
of log q - log p, after the same map. "plain": the loss of those that are not 0, without the map. Zeros: their share.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy import optimize, special, stats

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)

TEMPERATURES = (0.3, 1.0, 3.0, 10.0)
FIRST = 10  # seeds of networks below this were used to make the method


class Net:
    """A network, its enumeration, and its logits and their gradients in one-hot tokens."""

    def __init__(self, seed: int) -> None:
        from models import transformer

        self.of, self.seed = transformer, seed
        net = transformer.network(seed)
        self.weights = {name: torch.tensor(value) for name, value in net.weights.items()}
        self.p = net.tokens
        self.log_probs = transformer.log_probs(seed)

    def draw(self, rng: np.random.Generator, n: int, law: np.ndarray | None = None) -> np.ndarray:
        law = self.p if law is None else law
        u = rng.random((n, len(law), 1))
        return np.minimum((u > law.cumsum(axis=1)).sum(axis=2), law.shape[1] - 1)

    def stream(self, x: np.ndarray) -> np.ndarray:
        embedded = self.weights["embed"][torch.from_numpy(x)]
        return np.asarray(self.of.stream(self.weights, embedded))

    def logits(self, x: np.ndarray) -> np.ndarray:
        return self.stream(x) @ self.weights["unembed"].numpy().T + self.weights["unbias"].numpy()

    def lead(self, x: np.ndarray, target: int) -> tuple[np.ndarray, np.ndarray]:
        """The target's logit less the largest of the others, and its gradient in one-hot tokens ``(n, 6, 8)``."""
        hot = torch.nn.functional.one_hot(torch.from_numpy(x), self.of.VALUES).double().requires_grad_()
        logits = self.of.logits(self.weights, hot @ self.weights["embed"])
        others = torch.cat([logits[:, :target], logits[:, target + 1 :]], dim=1)
        lead = logits[:, target] - others.amax(1)
        (slope,) = torch.autograd.grad(lead.sum(), hot)
        return lead.detach().numpy(), slope.numpy()


def naive(net: Net, target: int, calls: int, rng: np.random.Generator) -> float:
    return float((net.logits(net.draw(rng, calls)).argmax(axis=1) == target).mean())


def itgis(net: Net, target: int, calls: int, rng: np.random.Generator, temperature: float) -> float:
    """Sixteen rounds; the tilt of each is the mean gradient over those before, older ones counting less."""
    score, each, total = np.zeros_like(net.p), calls // 16, []
    place = np.arange(len(net.p))
    for i in range(16):
        law = net.p * np.exp((score - score.max(axis=1, keepdims=True)) / temperature)
        law /= law.sum(axis=1, keepdims=True)
        x = net.draw(rng, each, law)
        lead, slope = net.lead(x, target)
        weight = (np.log(net.p) - np.log(np.maximum(law, 1e-300)))[place, x].sum(axis=1)
        total.append(np.where(lead > 0.0, np.exp(weight), 0.0))
        keep = 0.0 if i == 0 else 0.9 * (1.0 - 0.9**i) / (1.0 - 0.9 ** (i + 1))
        score = keep * score + (1.0 - keep) * slope.mean(axis=0)
    return float(np.mean(total))


def mhis(net: Net, target: int, calls: int, rng: np.random.Generator, temperature: float) -> float:
    """64 chains; a step draws one token anew by p exp(gradient/2T) at its place. The first quarter is not used."""
    chains = 64
    x = net.draw(rng, chains)
    lead, slope = net.lead(x, target)
    row, up, down = np.arange(chains), 0.0, 0.0
    steps = calls // chains - 1
    for step in range(steps):
        at = rng.integers(len(net.p), size=chains)

        def law(slope: np.ndarray, at: np.ndarray = at) -> np.ndarray:
            return special.log_softmax(np.log(net.p)[at] + slope[row, at] / (2.0 * temperature), axis=1)

        forth = law(slope)
        new = (rng.gumbel(size=forth.shape) + forth).argmax(axis=1)
        y = x.copy()
        y[row, at] = new
        other, rise = net.lead(y, target)
        log_p = np.log(net.p)
        ratio = log_p[at, new] - log_p[at, x[row, at]] + (other - lead) / temperature
        ratio += law(rise)[row, x[row, at]] - forth[row, new]
        moved = np.log(rng.random(chains)) < ratio
        x[moved], lead[moved], slope[moved] = y[moved], other[moved], rise[moved]
        if step >= steps // 4:
            back = np.exp(-(lead - lead.mean()) / temperature) if temperature > 1e3 else np.exp(-lead / temperature)
            up, down = up + float(back[lead > 0.0].sum()), down + float(back.sum())
    return up / down


def gld(net: Net, target: int, calls: int, rng: np.random.Generator) -> float:
    logits = net.logits(net.draw(rng, calls))
    lead = logits[:, target] - np.delete(logits, target, axis=1).max(axis=1)
    return float(stats.norm.sf(-lead.mean() / lead.std()))


def qld(net: Net, target: int, calls: int, rng: np.random.Generator) -> float:
    """The stream as a d + b, d towards the nearest point (in its covariance) with the output; a and b paired anew."""
    v = net.stream(net.draw(rng, calls))
    mean, cov = v.mean(axis=0), np.cov(v.T)
    value, vectors = np.linalg.eigh(cov)
    value = np.maximum(value, 1e-6 * value.max())
    root = vectors * np.sqrt(value)
    unembed, bias = net.weights["unembed"].numpy(), net.weights["unbias"].numpy()
    gap = np.delete(unembed[target] - unembed, target, axis=0)
    lift = np.delete(bias[target] - bias, target)
    point = _least_distance(gap @ root, -(gap @ mean + lift))
    if point is None:
        return 0.0
    unit = point / np.linalg.norm(point)
    u = (v - mean) @ (vectors / np.sqrt(value))
    a = np.sort(u @ unit)
    b = mean + (u - np.outer(u @ unit, unit)) @ root.T
    rise, base = gap @ (root @ unit), b @ gap.T + lift
    with np.errstate(divide="ignore", invalid="ignore"):
        at = -base / rise
    low = np.where(rise > 0.0, at, -np.inf).max(axis=1)
    high = np.where(rise < 0.0, at, np.inf).min(axis=1)
    never = ((rise == 0.0) & (base < 0.0)).any(axis=1)
    inside = np.searchsorted(a, high) - np.searchsorted(a, low)
    return float(np.where(never, 0, np.maximum(inside, 0)).mean() / len(a))


def _least_distance(g: np.ndarray, h: np.ndarray) -> np.ndarray | None:
    """The shortest u with g u >= h (Lawson & Hanson 1974), or None."""
    e = np.concatenate([g.T, h[None]])
    f = np.append(np.zeros(g.shape[1]), 1.0)
    y, _ = optimize.nnls(e, f, maxiter=50 * len(h))
    r = e @ y - f
    return None if abs(r[-1]) < 1e-12 else -r[:-1] / r[-1]


def probest(net: Net, target: int, calls: int, rng: np.random.Generator) -> float:
    from probest import estimate

    result = estimate(
        net.of.problem(target, seed=net.seed), budget=calls, seed=int(rng.integers(2**31)), progress=False
    )
    assert result.calls <= calls
    return result.prob


def guide(net: Net, target: int, calls: int, rng: np.random.Generator) -> float:
    from probest import CrossEntropy, estimate

    problem, seed = net.of.problem(target, seed=net.seed), int(rng.integers(2**31))
    return estimate(problem, budget=calls, seed=seed, estimator=CrossEntropy(), progress=False).prob


Method = Callable[[Net, int, int, np.random.Generator], float]


def methods() -> dict[str, Method]:
    found: dict[str, Method] = {"probest": probest, "guide": guide, "naive": naive, "qld": qld, "gld": gld}
    for t in TEMPERATURES:
        for name, fn in (("itgis", itgis), ("mhis", mhis)):
            found[f"{name} {t:g}"] = lambda net, target, calls, rng, fn=fn, t=t: fn(net, target, calls, rng, t)
    return found


class Score(NamedTuple):
    loss: float
    log_error: float
    plain: float
    zeros: float


def loss(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return np.asarray(p / q - np.log(p / q) - 1.0)


def score(p: np.ndarray, q: np.ndarray) -> Score:
    """After a map a q^c + b that is fitted to all other outputs."""
    mapped = np.array([_mapped(np.delete(p, i), np.delete(q, i), q[i]) for i in range(len(p))])
    some = q > 0.0
    plain = float(loss(p[some], q[some]).mean()) if some.any() else math.inf
    return Score(
        float(loss(p, mapped).mean()),
        float(np.sqrt(np.mean((np.log(mapped) - np.log(p)) ** 2))),
        plain,
        float(np.mean(~some)),
    )


def _mapped(p: np.ndarray, q: np.ndarray, at: float) -> float:
    def value(theta: np.ndarray, q: Any) -> Any:
        return np.exp(theta[0]) * np.power(np.maximum(q, 0.0), np.exp(theta[1])) + np.exp(theta[2])

    def mean(theta: np.ndarray) -> float:
        with np.errstate(all="ignore"):
            total = float(loss(p, value(theta, q)).mean())
        return total if math.isfinite(total) else 1e9

    starts = [np.array([0.0, 0.0, b]) for b in (-25.0, -18.0, float(np.log(p.mean())))]
    best = min((optimize.minimize(mean, at, method="Nelder-Mead") for at in starts), key=lambda found: found.fun)
    return float(value(best.x, at))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=int, default=3)
    parser.add_argument("--calls", type=int, nargs="+", default=[2**14, 2**16])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    console, rows = Console(), []
    for calls in options.calls:
        p: list[float] = []
        q: dict[str, list[float]] = {name: [] for name in methods()}
        seconds = dict.fromkeys(q, 0.0)
        for seed in range(FIRST, FIRST + options.networks):
            net = Net(seed)
            for target in np.flatnonzero((net.log_probs >= math.log(1e-8)) & (net.log_probs <= math.log(1e-4))):
                p.append(float(np.exp(net.log_probs[target])))
                for i, (name, method) in enumerate(methods().items()):
                    start = time.perf_counter()
                    q[name].append(method(net, int(target), calls, np.random.default_rng([seed, int(target), i])))
                    seconds[name] += time.perf_counter() - start
        scores = {name: score(np.array(p), np.array(values)) for name, values in q.items()}
        table = Table(title=f"{len(p)} outputs, {calls} calls")
        for column in ("method", "loss", "log error", "plain", "zeros", "seconds"):
            table.add_column(column)
        for name in ("probest", "guide", "naive", "itgis", "mhis", "qld", "gld"):
            same = {k: v for k, v in scores.items() if k.split()[0] == name}
            best = min(same, key=lambda k: same[k].loss)
            each = seconds[best] / len(p)
            figures = (f"{v:.3g}" for v in (*scores[best][:3],))
            table.add_row(best, *figures, f"{scores[best].zeros:.0%}", f"{each:.2f}")
            rows.append({"calls": calls, "method": best, **scores[best]._asdict(), "seconds": each, "outputs": len(p)})
        console.print(table)
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps({"rows": rows, "p": p, "q": q}, indent=1))


if __name__ == "__main__":
    main()
