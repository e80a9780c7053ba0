"""Neural spline flows of zuko (torch), fitted to weighted points. Reference: Durkan et al. (2019)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.distributions import Distribution

_validates = Distribution._validate_args
import zuko  # noqa: E402 - its import turns validation off for all distributions of torch

Distribution.set_default_validate_args(_validates)

__all__ = ["LearnableFlow", "TorchFlow", "fit_flow", "learnable"]

_LOG2PI = math.log(2.0 * math.pi)


@dataclass(frozen=True)
class TorchFlow:
    """A density on ``(n, r)`` points in float64: push-forward of standard normals. See :mod:`probest.guides.flow`."""

    flow: Any

    def push(self, x: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return np.asarray(self.flow().transform.inv(torch.from_numpy(x)).numpy(), dtype=np.float64)

    def log_density(self, v: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return np.asarray(_log_density(self.flow, torch.from_numpy(v)).numpy(), dtype=np.float64)


def _log_density(flow: Any, v: torch.Tensor) -> torch.Tensor:
    """The change of variables, spelt out: the library's own would refuse a point that overflows."""
    x, log_jacobian = flow().transform.call_and_ladj(v)
    density: torch.Tensor = log_jacobian - 0.5 * (x * x).sum(-1) - 0.5 * _LOG2PI * v.shape[-1]
    return density


class LearnableFlow(torch.nn.Module):
    """log q − log N(0, I) at points ``(n, r)``, with u = centre + factor v and v by the flow, which can be trained."""

    flow: Any
    centre: torch.Tensor
    factor: torch.Tensor

    def __init__(self, flow: Any, centre: np.ndarray, factor: np.ndarray) -> None:
        super().__init__()
        self.flow = flow
        self.register_buffer("centre", torch.from_numpy(centre))
        self.register_buffer("factor", torch.from_numpy(factor))

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        given, u = u, u.to(self.centre.dtype)
        v = torch.linalg.solve_triangular(self.factor, (u - self.centre).T, upper=False).T
        density = _log_density(self.flow, v) - self.factor.diagonal().log().sum()
        ratio = density + 0.5 * (u * u).sum(-1) + 0.5 * _LOG2PI * u.shape[-1]
        return ratio.to(given.dtype)

    def pushed(self, x: torch.Tensor) -> torch.Tensor:
        """One standard-normal point ``(r,)`` as a draw."""
        v: torch.Tensor = self.flow().transform.inv(x.to(self.centre.dtype))
        return (self.centre + self.factor @ v).to(x.dtype)

    def push(self, x: np.ndarray) -> np.ndarray:
        """Standard-normal points ``(n, r)`` as draws."""
        v = TorchFlow(self.flow).push(x)
        return np.asarray(self.centre.numpy() + v @ self.factor.numpy().T)


def learnable(density: TorchFlow, centre: np.ndarray, factor: np.ndarray) -> LearnableFlow:
    """A fitted flow, to be trained on."""
    return LearnableFlow(density.flow.requires_grad_(True), centre, factor)


def fit_flow(
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    *,
    steps: int,
    learning_rate: float,
    patience: int,
) -> TorchFlow:
    """Maximum likelihood by Adam on points and weights ``train``; keeps what predicts ``test`` best."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        flow = zuko.flows.NSF(train[0].shape[1], transforms=2, bins=8, hidden_features=(32, 32)).double()
        (u, w), (u_test, w_test) = ([torch.from_numpy(part) for part in pair] for pair in (train, test))
        optimizer = torch.optim.Adam(flow.parameters(), lr=learning_rate)
        best, kept, since = torch.inf, flow.state_dict(), 0
        for step in range(steps):
            if step % 5 == 0:
                with torch.no_grad():
                    loss = -float(w_test @ _log_density(flow, u_test))
                since += 1
                if loss < best:
                    best, since = loss, 0
                    kept = {name: value.clone() for name, value in flow.state_dict().items()}
                if since > patience:
                    break
            optimizer.zero_grad()
            (-(w @ _log_density(flow, u))).backward()
            optimizer.step()
        flow.load_state_dict(kept)
    return TorchFlow(flow.requires_grad_(False))
