"""Where random numbers come from: a tree of named seeds, the same on every backend."""

from __future__ import annotations

import numpy as np

__all__ = ["child_seed", "generator", "number"]


def child_seed(seed: np.random.SeedSequence, *key: int) -> np.random.SeedSequence:
    """A child of ``seed`` by name. Unlike ``seed.spawn`` it leaves no trace: the same key gives the same child."""
    return np.random.SeedSequence(entropy=seed.entropy, spawn_key=(*seed.spawn_key, *key), pool_size=seed.pool_size)


def generator(seed: np.random.SeedSequence) -> np.random.Generator:
    """The random numbers of a seed: counter-based (Philox), float64, on the host.

    They spawn from a copy of the seed (scipy's Sobol sequences do spawn), which is left without a trace.
    """
    return np.random.Generator(np.random.Philox(child_seed(seed)))


def number(root: np.random.SeedSequence, *key: int) -> int:
    """A seed for ``estimate`` from a key, different for each purpose."""
    return int(child_seed(root, *key).generate_state(1, np.uint64)[0] >> np.uint64(1))
