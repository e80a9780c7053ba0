"""Learnable adversaries: laws of a program's draws that :func:`probest.search` fits."""

from probest.adversaries.flows import Flow
from probest.adversaries.programs import Learnable
from probest.adversaries.tilts import Tilt

__all__ = ["Flow", "Learnable", "Tilt"]
