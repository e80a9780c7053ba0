"""Learnable adversaries: laws of a program's draws that :func:`probest.search` fits."""

from probest.adversaries.programs import Learnable
from probest.adversaries.tilts import Tilt

__all__ = ["Learnable", "Tilt"]
