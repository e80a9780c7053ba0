"""Moments of a function of Gaussian inputs, by reading the function instead of drawing from it."""

from probest.moments.hermite import Quadrature
from probest.moments.propagate import Moments, Traced, moments, register_rule, traced
from probest.moments.steps import MomentError

__all__ = ["MomentError", "Moments", "Quadrature", "Traced", "moments", "register_rule", "traced"]
