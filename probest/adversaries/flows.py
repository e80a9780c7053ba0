r"""Normalizing flows as adversaries: the program's own randomness pushed through a network that can be inverted.

In standard-normal coordinates z the law is a neural spline flow in the subspace in which the severity's gradients at
catastrophes lie, and the adversary as it is in all other directions. What the program makes of z stays as it is, so
that draws are as plausible as its decoder: a flow over latents. The flow is zuko's for programs of Pyro, flowjax's for
those of NumPyro; it begins with a fit to the catastrophes.

It bends around curved events, for which a :class:`~probest.adversaries.Tilt` needs many components. It fails where
modes lie far apart: a flow is one connected piece, and what lies between them spends its draws and its KL.

Reference: Durkan, Bekasov, Murray & Papamakarios (2019), Neural spline flows.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from probest.adversaries.tilts import fitted_to, subspace
from probest.backends.base import Array, Parts
from probest.evidence import Floats, Particles
from probest.guides.flow import FLOWS, check_installed, fit_flow
from probest.programs.event import Event, ProblemError

__all__ = ["Flow", "FlowLaw"]

_LIBRARIES = {"torch": "zuko", "jax": "flowjax"}


@dataclass(frozen=True)
class Flow:
    """A family: a flow in at most ``rank`` directions. For programs of continuous sites.

    Needs zuko (``probest[flows-torch]``) or flowjax (``probest[flows-jax]``).
    """

    rank: int = 24

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank={self.rank!r}: expected a whole number of at least 1")

    def build(self, event: Event, particles: Particles, rng: np.random.Generator) -> FlowLaw:
        library = _LIBRARIES[event.backend.name]
        check_installed(library)
        if event.discrete_sites:
            raise ProblemError(
                f"adversary: a flow moves continuous draws alone, and the program has discrete ones "
                f"({event.discrete_sites[0]}): use probest.adversaries.Tilt(), which chooses among their values"
            )
        z = fitted_to(particles, rng)
        basis = subspace(event, z, rank=self.rank)
        fit = fit_flow(library, z, np.zeros(len(z)), basis, rng)
        learnt = importlib.import_module(FLOWS[library][0]).learnable(fit.density, fit.centre, fit.factor)
        return FlowLaw(event, basis, event.parts._replace(adversary=learnt, params={}))


@dataclass
class FlowLaw:
    """A :class:`~probest.adversaries.base.Law`; its points are ``u`` ``(n, r)`` and ``z`` ``(n, dim)``."""

    event: Event
    basis: Floats
    parts: Parts

    def log_ratio(self, parts: Parts, points: dict[str, Array]) -> Array:
        return parts.adversary(points["u"])

    def draw(self, parts: Parts, n: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        z = rng.standard_normal((n, len(self.basis)))
        inside = z @ self.basis
        u = parts.adversary.push(inside)
        return {"u": u, "z": z + (u - inside) @ self.basis.T}

    def plain(self, n: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        return self.points(rng.standard_normal((n, len(self.basis))))

    def points(self, z: Floats) -> dict[str, np.ndarray]:
        return {"u": z @ self.basis, "z": z}

    def features(self, points: dict[str, np.ndarray]) -> Floats:
        return points["u"]

    def severity(self, points: dict[str, np.ndarray]) -> Floats:
        return self.event.evaluate(points["z"]).severity

    def program(self, parts: Parts, share: float) -> Callable[..., Any]:
        """Sites ``pushed`` and ``noise``; the adversary's own are inside, and not seen."""
        event, size = self.event, len(self.basis)
        frontend, backend = event.composition.frontend, event.backend
        xp, axes = backend.special.xp, backend.from_host(self.basis)

        def pushed(*model: Any) -> Any:
            chosen = frontend.sample("pushed", "Bernoulli", backend.from_host(np.asarray(share)))
            noise = frontend.sample("noise", "Normal", xp.zeros(size), xp.ones(size), event_dims=1)
            inside = noise @ axes
            moved = noise + axes @ (parts.adversary.pushed(inside) - inside)
            return event.composition.replay(event.parts, xp.where(chosen == 1, moved, noise), *model)

        if event.composition.closed_loop:
            return lambda model: pushed(model)
        return lambda: pushed()
