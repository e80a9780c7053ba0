"""A language model that was fine-tuned to write bad cases, as an opponent in training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from probest.adversaries.language import LanguageAdversary
from probest.adversaries.programs import ProgramLaw
from probest.adversaries.twists import laws_given, placed, tokens_of, untwisted
from probest.evidence import Floats
from probest.programs.event import Event

__all__ = ["TextOpponent"]


@dataclass
class TextOpponent:
    """An :class:`~probest.adversaries.base.Opponent`: what it writes is found in the given adversary's coordinates.

    law: of all sites, the model's text too where it draws any. adversary: what writes, with its learnt weights.
    """

    law: ProgramLaw
    adversary: LanguageAdversary

    def cases(self, event: Event, n: int, rng: np.random.Generator) -> tuple[Floats, None]:
        """Coordinates ``(m, dim)`` from which the given adversary draws what was written; what the model draws is anew.

        m is n, but for texts that it cannot draw by rounding.
        """
        values = self._written(n, rng)
        z, right = placed(event, untwisted(event.parts.adversary), values, rng.standard_normal((n, event.dim)), rng)
        return z[right], None

    def distance(self, other: Any, rng: np.random.Generator) -> float:
        """KL(this ‖ other) of what is written, from draws of this one."""
        values = self._written(1_024, rng)
        return float(np.mean(_log_density(self.adversary, values) - _log_density(other.adversary, values)))

    def played(self) -> Callable[..., Any]:
        """As a program of its library."""
        return self.law.program(self.law.parts, 1.0)

    def arrays(self) -> dict[str, np.ndarray]:
        """The weights, by name."""
        return {name: value.detach().cpu().numpy() for name, value in self.adversary.state_dict().items()}

    def _written(self, n: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        drawn = self.law.draw(self.law.parts, n, rng)
        return {name: drawn[name] for name in self.adversary.sites}


def _log_density(adversary: LanguageAdversary, values: dict[str, np.ndarray]) -> Floats:
    tokens = tokens_of(adversary, values)
    with torch.no_grad():
        laws = laws_given(adversary, tokens)
        each = [law.log_prob(value) for law, value in zip(laws, tokens.values(), strict=True)]
        total = torch.stack([one.reshape(len(one), -1).sum(1).double() for one in each]).sum(0)
    return np.asarray(total.cpu().numpy(), dtype=np.float64)
