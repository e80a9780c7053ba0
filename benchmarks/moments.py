"""How good are propagated moments, and what do they cost?

    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python benchmarks/moments.py --samples 1000000 --json build/moments.json

(With more threads OpenBLAS spins, and the CPU time that is counted doubles.)

Each line sets ``moments(fn, mean, cov)`` beside as many draws: the worst and the root-mean-square error of the
standard deviations of the outputs, as a share of them; the worst error of a mean, in standard deviations; and the cost
in batched forward passes of the same function in the same process, without and with the tracing. What sampling itself
misses is in the column ``noise``: one standard error of a standard deviation. Networks are random: weights
N(0, gain² / fan-in), gain √2 for ReLU and 1 else, biases N(0, 0.1²).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)

Case = tuple[str, Callable[[Tensor], Tensor], Tensor, Tensor]


class Residual(nn.Module):
    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)) for _ in range(blocks)
        )
        self.last = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.last(x)


class Attention(nn.Module):
    """A causal transformer block, layer norm first."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.width, self.heads = width, heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.shape[-2]
        q, k, v = self.qkv(self.first(x)).split(self.width, dim=-1)
        q, k, v = (t.reshape(tokens, self.heads, -1).transpose(0, 1) for t in (q, k, v))
        scores = q @ k.transpose(-1, -2) / (self.width / self.heads) ** 0.5
        later = torch.triu(torch.ones(tokens, tokens, dtype=torch.bool), 1)
        mixed = scores.masked_fill(later, -torch.inf).softmax(-1) @ v
        x = x + self.out(mixed.transpose(0, 1).reshape(tokens, self.width))
        return x + self.mlp(self.second(x))


def drawn(module: nn.Module, gain: float, seed: int) -> nn.Module:
    """The module with random weights, of float64, without gradients."""
    generator = torch.Generator().manual_seed(seed)
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            fan = layer.weight[0].numel()
            layer.weight.data = gain / fan**0.5 * torch.randn(layer.weight.shape, generator=generator)
            layer.bias.data = 0.1 * torch.randn(layer.bias.shape, generator=generator)
    return module.double().eval().requires_grad_(False)


def dense(width: int, depth: int, activation: type[nn.Module]) -> nn.Module:
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(width, width), activation()]
    return nn.Sequential(*layers, nn.Linear(width, 4))


def cases(largest: int, seeds: int) -> Iterator[Case]:
    for width in (16, 64, 256, 1024):
        for depth in (1, 3, 6):
            for activation, gain in ((nn.ReLU, 2**0.5), (nn.GELU, 1.0), (nn.Tanh, 1.0)):
                for seed in range(seeds if width < 1024 else 1):
                    if width <= largest:
                        net = drawn(dense(width, depth, activation), gain, seed)
                        yield f"{activation.__name__} {width}/{depth}", net, *standard(width)
    for width in (64, 256):
        yield f"residual {width}, 3 blocks", drawn(Residual(width, 3), 1.0, 0), *standard(width)
    convolutional = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(32, 4),
    )  # fmt: skip
    yield "convolutional 8×8", drawn(convolutional, 2**0.5, 0), *standard(1, 1, 8, 8)
    for width, tokens in ((16, 8), (32, 8), (64, 4)):
        for gain in (0.5, 1.0):
            block = drawn(Attention(width, 2), gain, 0)
            yield f"attention {tokens}×{width}, gain {gain:g}", block, *standard(tokens, width)
    yield digits()


def standard(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(shape, dtype=torch.float64), torch.eye(math.prod(shape), dtype=torch.float64)


def digits() -> Case:
    """The trained network on images of threes: the class's mean, its principal components, and the pixels' noise."""
    from models import digits

    style = digits.fitted_style()
    cov = style.loadings[3].double() @ style.loadings[3].double().T
    net = digits.train_model().double().requires_grad_(False)
    noise = digits.NOISE_SCALE**2 * torch.eye(digits.PIXELS, dtype=torch.float64)
    return "digits, trained", net, style.mean[3].double(), cov + noise


def sampled(fn: Callable[[Tensor], Tensor], mean: Tensor, cov: Tensor, samples: int) -> tuple[Tensor, Tensor, float]:
    """Mean and standard deviation of each output, and seconds for one pass."""
    generator = torch.Generator().manual_seed(1)
    root = torch.linalg.cholesky(cov + 1e-12 * torch.eye(len(cov), dtype=cov.dtype))
    many = fn if mean.ndim == 1 else torch.func.vmap(fn)
    count, total, square, seconds = 0, 0.0, 0.0, math.inf
    while count < samples:
        size = min(2000, samples - count)
        noise = torch.randn(size, len(cov), generator=generator, dtype=cov.dtype)
        x = mean + (noise @ root.T).reshape(size, *mean.shape)
        started = time.process_time()
        y = many(x).reshape(size, -1)
        seconds = min(seconds, (time.process_time() - started) / size)
        total, square, count = total + y.sum(0), square + (y**2).sum(0), count + size
    first = total / count
    return first, (square / count - first**2).sqrt(), seconds


def measured(case: Case, samples: int) -> dict[str, Any]:
    from probest import moments, traced

    name, fn, mean, cov = case
    once = traced(fn, mean)
    moments(once, mean, cov)  # the first call loads things
    apart, whole = math.inf, math.inf
    for _ in range(3):
        started = time.process_time()
        found = moments(once, mean, cov)
        apart = min(apart, time.process_time() - started)
        started = time.process_time()
        moments(fn, mean, cov)
        whole = min(whole, time.process_time() - started)
    first, std, seconds = sampled(fn, mean, cov, samples)
    ratio = found.std.reshape(-1) / std - 1
    return {
        "case": name,
        "std_error_worst": float(ratio.abs().max()),
        "std_error_rms": float((ratio**2).mean().sqrt()),
        "mean_error_worst": float(((found.mean.reshape(-1) - first) / std).abs().max()),
        "noise": (0.5 / samples) ** 0.5,
        "passes": apart / seconds,
        "passes_with_tracing": whole / seconds,
        "milliseconds": 1e3 * apart,
    }


def pendulum(samples: int) -> dict[str, Any]:
    """The angles after 1, 10, 25 and 50 steps of the trained controller's closed loop, in JAX."""
    import jax
    import jax.numpy as jnp

    from models import pendulum
    from probest import moments, traced

    with jax.enable_x64(True):
        model = jax.tree.map(lambda x: jnp.asarray(x, float), pendulum.train_model())
        scales = jnp.concatenate([jnp.full(2, pendulum.START_SCALE), jnp.full(pendulum.STEPS, pendulum.GUST_SCALE)])

        def fn(x: Any) -> Any:
            x = x * scales
            return pendulum.simulate(model, pendulum.Weather(x[:2], x[2:])).angles[jnp.array([0, 9, 24, 49])]

        mean = jnp.zeros(2 + pendulum.STEPS)
        once = traced(fn, mean)
        moments(once, mean)
        started = time.process_time()
        found = moments(once, mean)
        apart = time.process_time() - started
        started = time.process_time()
        moments(fn, mean)
        whole = time.process_time() - started
        many = jax.jit(jax.vmap(fn))
        x = jax.random.normal(jax.random.key(1), (samples, len(mean)))
        many(x).block_until_ready()
        started = time.process_time()
        y = many(x).block_until_ready()
        seconds = (time.process_time() - started) / samples
        first, std = y.mean(0), y.std(0)
        ratio, off = found.std / std - 1, jnp.abs(found.mean - first) / std
        errors = {
            "std_error_worst": float(jnp.abs(ratio).max()),
            "std_error_rms": float((ratio**2).mean() ** 0.5),
            "mean_error_worst": float(off.max()),
        }
    return {
        "case": "pendulum, trained, 50 steps",
        **errors,
        "noise": (0.5 / samples) ** 0.5,
        "passes": apart / seconds,
        "passes_with_tracing": whole / seconds,
        "milliseconds": 1e3 * apart,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--largest", type=int, default=256, help="width of the widest networks (1024: an hour at 1e6)")
    parser.add_argument("--seeds", type=int, default=3, help="networks of each kind")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    table = Table(*("case", "σ worst", "σ rms", "mean worst", "noise", "passes", "with tracing", "ms"))
    results: dict[str, list[dict[str, Any]]] = {}
    found = (measured(case, args.samples) for case in cases(args.largest, args.seeds))
    for result in itertools.chain([pendulum(args.samples)], found):
        results.setdefault(result["case"], []).append(result)
        print(json.dumps(result), file=sys.stderr)
    for name, group in results.items():
        worst = max(r["std_error_worst"] for r in group)
        rms = (sum(r["std_error_rms"] ** 2 for r in group) / len(group)) ** 0.5
        mean = max(r["mean_error_worst"] for r in group)
        last = group[-1]
        table.add_row(
            name, f"{worst:.2%}", f"{rms:.2%}", f"{mean:.3f}", f"{last['noise']:.2%}", f"{last['passes']:,.0f}",
            f"{last['passes_with_tracing']:,.0f}", f"{last['milliseconds']:,.0f}",
        )  # fmt: skip
    Console(width=120).print(table)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"samples": args.samples, "results": results}, indent=1))


if __name__ == "__main__":
    main()
