"""Moments of a function of Gaussian inputs, by reading the function instead of drawing from it."""

from probest.moments.hermite import Quadrature
from probest.moments.propagate import Moments, moments, register_rule
from probest.moments.steps import MomentError

__all__ = ["MomentError", "Moments", "Quadrature", "moments", "register_rule"]
