r"""A transformer small enough to enumerate: one layer over 6 tokens of 8 values, 64 outputs, 262,144 inputs.

D draws each token by itself, with probabilities that fall like :math:`1/(1 + k)^{1.5}` over its values, in an order of
its own at each position; M returns the logits of what comes next; catastrophic is one output t, where its logit is the
largest:

.. math:: P_t = \sum_x p(x) \, \mathbf 1[\arg\max_v M(x)_v = t].

The weights are random, drawn from a seed. So are the published networks of which such probabilities are estimated from
few samples (Wu & Hilton 2024, "Estimating the probabilities of rare outputs in language models"), in a size whose
truth is a sum.
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ._libraries import Backend, library

if TYPE_CHECKING:
    from probest import Problem

LENGTH, VALUES, OUTPUTS = 6, 8, 64
WIDTH, HEADS, HIDDEN = 32, 4, 128


class Network(NamedTuple):
    """Weights by name, each an array of float64, and the probabilities ``(LENGTH, VALUES)`` of the tokens."""

    weights: dict[str, np.ndarray]
    tokens: np.ndarray


@cache
def network(seed: int = 0) -> Network:
    """A network and its inputs' law, by a seed."""
    rng = np.random.default_rng([seed, 0x7266_6D72])

    def matrix(rows: int, columns: int, gain: float = 1.0) -> np.ndarray:
        return rng.normal(size=(rows, columns)) * gain / np.sqrt(columns)

    weights = {
        "embed": rng.normal(size=(VALUES, WIDTH)),
        "place": 0.5 * rng.normal(size=(LENGTH, WIDTH)),
        "query": matrix(WIDTH, WIDTH, 1.5),
        "key": matrix(WIDTH, WIDTH, 1.5),
        "value": matrix(WIDTH, WIDTH),
        "out": matrix(WIDTH, WIDTH, 1.5),
        "up": matrix(HIDDEN, WIDTH, 1.4),
        "bias": 0.3 * rng.normal(size=HIDDEN),
        "down": matrix(WIDTH, HIDDEN, 1.4),
        "unembed": matrix(OUTPUTS, WIDTH),
        "unbias": 0.5 * rng.normal(size=OUTPUTS),
    }
    falling = 1.0 / (1.0 + np.arange(VALUES)) ** 1.5
    tokens = np.stack([rng.permutation(falling / falling.sum()) for _ in range(LENGTH)])
    return Network(weights, tokens)


def logits(params: Any, embedded: Any) -> Any:
    """``(..., OUTPUTS)`` logits from embedded tokens ``(..., LENGTH, WIDTH)``."""
    return stream(params, embedded) @ params["unembed"].T + params["unbias"]


def stream(params: Any, embedded: Any) -> Any:
    """``(..., WIDTH)`` what the logits are linear in: attention of the last token, an MLP, and a normalisation."""
    h = embedded + params["place"]
    seen, each = _normed(h), (HEADS, WIDTH // HEADS)
    query = (seen[..., -1, :] @ params["query"].T).reshape((*h.shape[:-2], 1, *each))
    key, value = ((seen @ params[name].T).reshape((*h.shape[:-1], *each)) for name in ("key", "value"))
    score = 2.0 ** ((key * query).sum(-1) / (each[1] ** 0.5 * math.log(2.0)))
    weight = score / score.sum(-2)[..., None, :]
    mixed = (weight[..., None] * value).sum(-3).reshape((*h.shape[:-2], WIDTH))
    last = h[..., -1, :] + mixed @ params["out"].T
    hidden = _normed(last) @ params["up"].T + params["bias"]
    return _normed(last + (hidden * (hidden > 0)) @ params["down"].T)


def _normed(h: Any) -> Any:
    centred = h - h.mean(-1)[..., None]
    return centred / ((centred**2).mean(-1)[..., None] + 1e-5) ** 0.5


def problem(target: int, backend: Backend = "pyro", *, seed: int = 0) -> Problem:
    """How likely is it that output ``target`` has the largest logit? Severity is its lead over the others."""
    from probest import Problem

    if not 0 <= target < OUTPUTS:
        raise ValueError(f"target={target!r}: expected one of the outputs 0 to {OUTPUTS - 1}")
    lib = library(backend)
    xp = lib.xp
    net = network(seed)
    probs = xp.asarray(net.tokens.astype(np.float32))
    others = [v for v in range(OUTPUTS) if v != target]

    def adversary() -> Any:
        return lib.sample("tokens", lib.dist.Categorical(probs=probs).to_event(1))

    def model(params: Any, tokens: Any) -> Any:
        return logits(params, params["embed"][tokens])

    def checker(tokens: Any, y: Any) -> Any:  # noqa: ARG001
        rest = xp.asarray(others)
        return y[target] - y[rest].max()

    return Problem(adversary, lib.bind(model, **net.weights), checker)


@cache
def inputs(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """All inputs ``(262144, LENGTH)`` and the log of each one's probability."""
    every = np.indices((VALUES,) * LENGTH).reshape(LENGTH, -1).T
    return every, np.log(network(seed).tokens)[np.arange(LENGTH), every].sum(axis=1)


@cache
def outputs(seed: int = 0) -> np.ndarray:
    """The output with the largest logit of each input, ``(262144,)``, in float64."""
    weights = network(seed).weights
    parts = np.array_split(inputs(seed)[0], 64)
    return np.concatenate([logits(weights, weights["embed"][part]).argmax(axis=1) for part in parts])


def log_probs(seed: int = 0) -> np.ndarray:
    """``(OUTPUTS,)`` the exact log P of each output; ``-inf`` of one that no input has."""
    with np.errstate(divide="ignore"):
        return np.log(np.bincount(outputs(seed), weights=np.exp(inputs(seed)[1]), minlength=OUTPUTS))
