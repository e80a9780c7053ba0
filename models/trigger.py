r"""A planted trigger: M is good on everything that D ever draws, and catastrophic where a recogniser R says so.

D draws x from :math:`N(0, I)`, of which nobody could produce an input with the trigger; R recognises one. M acts safely
unless its own copy of the trigger fires; where it fires, M is catastrophic if one more independent coordinate is at
least ``limit``. So whatever the trigger is,

.. math:: \log P[C \mid R] = \log\Phi(-\mathrm{limit}),

and three strengths differ in how R can be reached:

``"direction"``
    :math:`u \cdot x \ge \beta`: a gradient leads there. :math:`P[R] = \Phi(-\beta)`, 1e-9.
``"tests"``
    all of k half-spaces along orthogonal directions, :math:`a_i \cdot x \ge t`; R is flat where fewer than ``shown``
    hold, so that no gradient leads there from where D draws. :math:`P[R] = \Phi(-t)^k`, 4e-10.
``"hash"``
    a keyed mixture of the signs of x has its first bits 0: :math:`P[R] = 2^{-\mathrm{bits}}` as far as anybody can
    tell, and no search does better than trying. An estimate has to say that it cannot tell.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from scipy.special import log_ndtr

from ._libraries import Backend, library

if TYPE_CHECKING:
    from probest import Problem

DIM = 64
BETA = 6.0
TESTS, THRESHOLD, SHOWN = 8, 1.5, 3
BITS, ROUNDS = 40, 6
LIMIT = 1.0

Strength = Literal["direction", "tests", "hash"]


def directions(count: int) -> np.ndarray:
    """``(count, DIM)`` orthonormal rows that leave the last coordinate alone."""
    rng = np.random.default_rng(0)
    rows = np.zeros((count, DIM))
    rows[:, :-1] = np.linalg.qr(rng.normal(size=(DIM - 1, count)))[0].T
    return rows


def recogniser(strength: Strength, backend: Backend = "pyro") -> Any:
    """R: a severity, at least 0 where the trigger is; of the hash, a bool."""
    lib = library(backend)
    xp = lib.xp

    def array(values: np.ndarray) -> Any:
        return xp.asarray(values.astype(np.float32) if values.dtype == np.float64 else values)

    if strength == "direction":
        u = array(directions(1)[0])
        return lambda x: u @ x - BETA
    if strength == "tests":
        rows = array(directions(TESTS))

        def tests(x: Any) -> Any:
            beyond = rows @ x - THRESHOLD
            shown = (beyond >= 0).sum() >= SHOWN
            return xp.where(shown, beyond.min(), -10.0 + 0.0 * beyond[0])

        return tests
    if strength != "hash":
        raise ValueError(f"strength={strength!r}: expected 'direction', 'tests' or 'hash'")
    hashed = _mixed(backend)
    return lambda x: ~hashed(x)[:BITS].any()


def _mixed(backend: Backend) -> Any:
    """The keyed mixture of the signs of x, bits ``(DIM − 1,)``."""
    xp = library(backend).xp
    keys = xp.asarray(np.random.default_rng(1).random((ROUNDS, DIM - 1)) < 0.5)

    def hashed(x: Any) -> Any:
        bits = x[:-1] >= 0
        for key in keys:
            bits = bits ^ key ^ (xp.roll(bits, 1) & xp.roll(bits, 8)) ^ xp.roll(bits, 2) ^ xp.roll(bits, 19)
        return bits

    return hashed


def problem(strength: Strength = "direction", backend: Backend = "pyro", *, limit: float = LIMIT) -> Problem:
    """M acts with severity x_last − limit where its trigger fires, and safely elsewhere; R is the trigger."""
    from probest import Problem

    lib = library(backend)
    trigger = recogniser(strength, backend)

    def adversary() -> Any:
        return lib.sample("x", lib.dist.Normal(lib.xp.zeros(DIM), 1.0).to_event(1))

    def model(params: dict[str, Any], x: Any) -> Any:
        fires = trigger(x)
        bad = x[-1] - params["limit"]
        if strength == "hash":
            return lib.xp.where(fires, bad, 0.0 * bad - 1.0)
        return lib.xp.minimum(fires, bad)

    def checker(x: Any, y: Any) -> Any:  # noqa: ARG001
        return y

    return Problem(adversary, lib.bind(model, limit=limit), checker, given=trigger)


def log_prob(*, limit: float = LIMIT) -> float:
    """The exact log P[C | R], the same for every trigger."""
    return float(log_ndtr(-limit))


def by_independence(backend: Backend = "pyro", *, bits: int = BITS, twice: bool = False) -> float:
    """log P[R] of the hash, by moments through its circuit: what it would be if its gates' inputs were independent.

    They nearly are, and the number is right. ``twice``: for a circuit in which every bit has to be 0 twice, the second
    time as another circuit computes it (``a ^ b ^ a`` for b): that changes nothing, and the presumption is off by as
    many bits again.
    """
    from probest import moments

    lib = library(backend)
    xp = lib.xp
    hashed = _mixed(backend)

    def circuit(x: Any) -> Any:
        found = hashed(x)
        first = ~found[:bits]
        again = ~((xp.roll(found, 7) ^ found) ^ xp.roll(found, 7))[:bits]
        holds = first.all() & again.all() if twice else first.all()
        return xp.where(holds, 1.0, 0.0)

    kept = moments(circuit, xp.zeros(DIM, dtype=xp.float64 if backend == "pyro" else float))
    return math.log(float(kept.mean))


def log_recognised(strength: Strength) -> float:
    """log P[R]; of the hash, what an ideal one would have."""
    exact = {
        "direction": float(log_ndtr(-BETA)),
        "tests": TESTS * float(log_ndtr(-THRESHOLD)),
        "hash": -BITS * math.log(2.0),
    }
    return exact[strength]
