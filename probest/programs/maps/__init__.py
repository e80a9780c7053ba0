"""From standard-normal coordinates to any distribution, exactly, however far out.

`gaussian_map(fn, special)` finds a transform of iid standard normals that has the law of the Pyro, torch or NumPyro
distribution `fn`. A law on the line is a monotone map of one coordinate z: its quantile at Φ(z), written in log Φ(z)
and log Φ(-z), never in Φ(z) itself, which in float32 is 1 from z = 5.42. What has no quantile in closed form is made
of those that do, with more coordinates (Beta, Dirichlet, Student's t and Wishart of Gammas and normals; compounds of
their parts). Discrete laws compare z with log-probabilities, from below in the lower half and from above in the upper.

Each rule is a small function in one of three tables, by class name, so the two libraries share them and neither is
imported. The class is looked for along the MRO of `fn`; a subclass that draws in a way of its own is not trusted to
have the law of its parent. A rule reads the parameters as they stand in `fn` and broadcasts over axes to the left of
its base, so it works under `vmap` and in expanded distributions.

A GaussianMap's transform is differentiable in the base and in the distribution's parameters, except where the value
is discrete. Larger z gives a larger value for laws on the line (but folded ones, whose quantile is not at hand).

References: Devroye, Non-Uniform Random Variate Generation (1986); NIST DLMF 7 and 8; Lewandowski, Kurowicka and Joe,
J. Multivariate Analysis 100 (2009), for LKJ; Bartlett, Proc. R. Soc. Edinburgh 53 (1933), for Wishart.
"""

from probest.programs.maps import counts, line, several
from probest.programs.maps.base import GaussianMap, MixtureMap, UnsupportedDistribution, coarseness, gaussian_map
from probest.programs.maps.choices import Listed, choices
from probest.programs.maps.several import mixture_map

__all__ = [
    "GaussianMap",
    "Listed",
    "MixtureMap",
    "UnsupportedDistribution",
    "choices",
    "coarseness",
    "counts",
    "gaussian_map",
    "line",
    "mixture_map",
    "several",
]
