"""How much memory does tempering take? Peak resident memory of one run in a process of its own.

    python benchmarks/memory.py --particles 100000 --dim 1000 --limit-gb 2

The event is a half-space at distance 2: a few levels, each with every array that a long run has. Prints the peak, and
fails where it is above the limit.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def run(particles: int, dim: int, guided: bool) -> None:
    """One run; prints its result and the peak of this process in bytes."""
    from probest.estimators.tempering import Tempering
    from probest.testing.events import half_space

    event = half_space(dim, 2.0)
    started = time.perf_counter()
    method = Tempering(particles=particles, max_moves=2, guided=guided)
    evidence = method.run(event, budget=100 * particles, seed=np.random.SeedSequence(0)).conclusion
    error = evidence.log_prob - event.log_prob
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"error {error:+.3f}, {evidence.calls:,} calls, {time.perf_counter() - started:.0f} s", file=sys.stderr)
    print(peak)


def peak_memory(particles: int, dim: int, guided: bool = True) -> int:
    """Peak resident memory in bytes of one run in a fresh process."""
    command = [sys.executable, __file__, "--inside", "--particles", str(particles), "--dim", str(dim)]
    command += [] if guided else ["--local"]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--particles", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=1000)
    parser.add_argument("--limit-gb", type=float, default=2.0)
    parser.add_argument("--local", action="store_true", help="local gradient moves alone, which keep gradients")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        run(args.particles, args.dim, not args.local)
        return
    peak = peak_memory(args.particles, args.dim, not args.local) / 1e9
    numbers = 8e-9 * args.particles * args.dim
    print(f"{args.particles:,} particles × {args.dim:,} dimensions: peak {peak:.2f} GB (z alone {numbers:.2f} GB)")
    if peak > args.limit_gb:
        sys.exit(f"above the limit of {args.limit_gb:g} GB")


if __name__ == "__main__":
    main()
