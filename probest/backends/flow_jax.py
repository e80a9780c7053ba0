"""Masked autoregressive spline flows of flowjax, fitted to weighted points. Reference: Durkan et al. (2019)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import paramax
from flowjax.bijections import RationalQuadraticSpline
from flowjax.distributions import Normal
from flowjax.flows import masked_autoregressive_flow

__all__ = ["JaxFlow", "LearnableFlow", "fit_flow", "learnable"]

_BLOCK = 4096


@dataclass(frozen=True)
class JaxFlow:
    """A density on ``(n, r)`` points: push-forward of standard normals. See :mod:`probest.guides.flow`."""

    flow: Any

    def push(self, x: np.ndarray) -> np.ndarray:
        return _padded(_push, self.flow, x)

    def log_density(self, v: np.ndarray) -> np.ndarray:
        return _padded(_log_density, self.flow, v)


class LearnableFlow(eqx.Module):
    """log q − log N(0, I) at points ``(n, r)``, with u = centre + factor v and v by the flow, which can be trained."""

    flow: Any
    frame: Any  # centre and factor, not trained

    def __call__(self, u: Any) -> Any:
        return _log_ratio(self, u)

    def pushed(self, x: Any) -> Any:
        """One standard-normal point ``(r,)`` as a draw."""
        centre, factor = paramax.unwrap(self.frame)
        return centre + factor @ paramax.unwrap(self.flow).bijection.transform(x)

    def push(self, x: np.ndarray) -> np.ndarray:
        """Standard-normal points ``(n, r)`` as draws."""
        centre, factor = (np.asarray(part, np.float64) for part in paramax.unwrap(self.frame))
        return np.asarray(centre + _padded(_push, self.flow, x) @ factor.T)


@eqx.filter_jit
def _log_ratio(learnt: LearnableFlow, u: Any) -> Any:
    centre, factor = paramax.unwrap(learnt.frame)
    v = jax.scipy.linalg.solve_triangular(factor, (u - centre).T, lower=True).T
    density = paramax.unwrap(learnt.flow).log_prob(v) - jnp.log(jnp.diagonal(factor)).sum()
    return density + 0.5 * (u * u).sum(-1) + 0.5 * math.log(2.0 * math.pi) * u.shape[-1]


def learnable(density: JaxFlow, centre: np.ndarray, factor: np.ndarray) -> LearnableFlow:
    """A fitted flow, to be trained on."""
    frame = tuple(jnp.asarray(part, jnp.result_type(float)) for part in (centre, factor))
    return LearnableFlow(density.flow, paramax.non_trainable(frame))


def _padded(fn: Any, flow: Any, x: np.ndarray) -> np.ndarray:
    """``fn`` in blocks of one size, so that it is compiled once."""
    pieces = []
    for start in range(0, max(len(x), 1), _BLOCK):
        part = x[start : start + _BLOCK]
        padded = np.concatenate([part, np.zeros((_BLOCK - len(part), x.shape[1]))])
        pieces.append(np.asarray(fn(flow, jnp.asarray(padded, jnp.result_type(float))), np.float64)[: len(part)])
    return np.concatenate(pieces)


@cache
def _untrained(rank: int) -> tuple[Any, Any]:
    """Arrays and structure of a flow before it is fitted: always the same objects, so that code is compiled once."""
    spline = RationalQuadraticSpline(knots=8, interval=5.0)
    base = paramax.non_trainable(Normal(jnp.zeros(rank)))  # draws push standard normals: they have to stay it
    flow = masked_autoregressive_flow(
        jax.random.key(0), base_dist=base, transformer=spline, flow_layers=2, nn_width=32, nn_depth=2
    )
    arrays, static = eqx.partition(flow, eqx.is_inexact_array, is_leaf=_frozen)
    return arrays, static


def _frozen(leaf: Any) -> bool:
    return isinstance(leaf, paramax.NonTrainable)


@eqx.filter_jit
def _push(flow: Any, x: Any) -> Any:
    return jax.vmap(paramax.unwrap(flow).bijection.transform)(x)


@eqx.filter_jit
def _log_density(flow: Any, v: Any) -> Any:
    return paramax.unwrap(flow).log_prob(v)


@eqx.filter_jit
def _advance(
    arrays: Any, state: Any, static: Any, learning_rate: float, u: Any, w: Any, u_test: Any, w_test: Any
) -> tuple[Any, Any, Any]:
    """Five steps of Adam, and the loss on what is held out before them."""
    optimizer = optax.adam(learning_rate)

    def loss(arrays: Any, u: Any, w: Any) -> Any:
        return -(w @ paramax.unwrap(eqx.combine(arrays, static)).log_prob(u))

    def one(carry: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], None]:
        arrays, state = carry
        updates, state = optimizer.update(jax.grad(loss)(arrays, u, w), state, arrays)
        return (eqx.apply_updates(arrays, updates), state), None

    value = loss(arrays, u_test, w_test)
    (arrays, state), _ = jax.lax.scan(one, (arrays, state), None, length=5)
    return arrays, state, value


def fit_flow(
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    *,
    steps: int,
    learning_rate: float,
    patience: int,
) -> JaxFlow:
    """Maximum likelihood by Adam on points and weights ``train``; keeps what predicts ``test`` best."""
    arrays, static = _untrained(train[0].shape[1])
    data = [jnp.asarray(part, jnp.result_type(float)) for pair in (train, test) for part in pair]
    state = optax.adam(learning_rate).init(arrays)
    best, kept, since = math.inf, arrays, 0
    for _ in range(steps // 5):
        before = arrays
        arrays, state, value = _advance(arrays, state, static, learning_rate, *data)
        since += 1
        if float(value) < best:
            best, kept, since = float(value), before, 0
        if since > patience:
            break
    return JaxFlow(eqx.combine(kept, static))
