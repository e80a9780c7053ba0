"""Moments of a function of Gaussian inputs, by reading the function instead of drawing from it."""
