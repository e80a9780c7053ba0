"""Special functions that torch and jax lack, written once in array code: exact in both tails, in either precision.

Every function takes the backend's module (`special_torch` or `special_jax`) as `s`: its array namespace `s.xp` and the
few names that no namespace has. Tails are carried as logarithms, lower (log P) and upper (log Q), and whichever of
the two is small is the one that is matched, so nothing here ever forms 1 - p.

The incomplete gamma function is one quadrature for all concentrations. With t = x e^(±s),

    P(a, x) = x^a e^-x / Γ(a) · ∫_0^∞ exp(-a s + x (1 - e^-s)) ds
    Q(a, x) = x^a e^-x / Γ(a) · ∫_0^∞ exp( a s - x (e^s - 1)) ds

(DLMF 8.2.1, 8.2.2): smooth, log-concave integrands, decreasing on their own side of x = a, whose integral is also the
inverse of |d log P / d log x|. Gauss–Legendre on the interval where they exceed the rounding error gives full relative
accuracy for a from 1e-3 to 1e6 and more, where series and continued fractions need about √a terms.
"""

import math
from typing import Any, NamedTuple

import numpy as np

Array = Any

LOG_2 = math.log(2.0)
LOG_SQRT_2PI = 0.5 * math.log(2.0 * math.pi)
STIRLING_FROM = 12.0  # concentration above which Stirling's series is exact to double precision


def log_ndtr_slope(s: Any, z: Array, log_cdf: Array) -> Array:
    """d log Φ(z) / dz = φ(z) / Φ(z), the inverse Mills ratio: -z and a little more far below 0.

    There z²/2 and log Φ(z) cancel, and Laplace's continued fraction (DLMF 7.9.1), which tends to -z, is exact instead.
    """
    reach = 30.0 if float(s.xp.finfo(z.dtype).eps) < 1e-10 else 8.0
    far = z < -reach
    size = s.xp.where(far, -z, reach)
    fraction = size
    for k in range(10, 0, -1):
        fraction = size + k / fraction
    body = s.xp.exp(-0.5 * s.xp.where(far, 0.0, z) ** 2 - LOG_SQRT_2PI - s.xp.where(far, -LOG_2, log_cdf))
    return s.xp.where(far, fraction, body)


def log_neg_log_ndtr(s: Any, z: Array) -> Array:
    """log(-log Φ(z)), finite where Φ(z) has long been rounded to 1."""
    far, upper = z > 5.0, s.log_ndtr(-z)
    return s.xp.where(far, upper + 0.5 * s.xp.exp(upper), s.xp.log(-s.log_ndtr(s.xp.where(far, 0.0, z))))


def log1mexp(s: Any, y: Array) -> Array:
    """log(1 - e^y) for y <= 0 (Mächler 2012), finite at y = 0."""
    y = s.clip(y, None, -float(s.xp.finfo(y.dtype).tiny))
    near = y > -LOG_2
    return s.xp.where(
        near,
        s.xp.log(-s.xp.expm1(s.xp.where(near, y, -1.0))),
        s.xp.log1p(-s.xp.exp(s.xp.where(near, -1.0, y))),
    )


def ndtri_exp(s: Any, log_p: Array) -> Array:
    """The w <= 0 with log Φ(w) = log_p, for log_p <= log ½; by Newton.

    log Φ is concave and Φ(-t) <= ½ exp(-t²/2), so the start lies left of the root and Newton climbs to it monotonely.
    """

    def climb(w: Array) -> Array:
        log_cdf = s.log_ndtr(w)
        return w + (log_p - log_cdf) / log_ndtr_slope(s, w, log_cdf)

    return s.repeat(6, climb, -s.xp.sqrt(s.clip(-2.0 * (log_p + LOG_2), 0.0, None)))


def log_half_normal(s: Any, z: Array) -> Array:
    """log |x| for x standard normal, at the level Φ(z): log √2 erf⁻¹(Φ(z)), which is -ndtri_exp(log Φ(-z) - log 2)."""
    xp = s.xp
    lower = s.log_ndtr(z)
    near, high = lower < -9.0, z > 0
    series = lower + 0.5 * math.log(math.pi / 2) + math.pi / 12 * xp.exp(2 * xp.where(near, lower, -9.0))
    middle = xp.log(math.sqrt(2.0) * s.erfinv(xp.exp(xp.where(near | high, -LOG_2, lower))))
    tail = xp.log(-s.ndtri_exp(xp.where(high, s.log_ndtr(-z), -LOG_2) - LOG_2))
    return xp.where(high, tail, xp.where(near, series, middle))


class GammaTail(NamedTuple):
    """The smaller tail of Gamma(a, 1) at x, and what its derivatives need; all of the broadcast shape of a and x."""

    low: Array  # bool: whether the tail is P (x <= max(a, 1)) or Q
    log_tail: Array  # log P or log Q
    width: Array  # ∫ exp(-exponent) ds, the inverse of |d log tail / d log x|
    moment: Array  # the derivative of that integral in the concentration, up to the terms in closed form


def gamma_tail(s: Any, a: Array, mu: Array) -> GammaTail:
    """log P(a, x) or log Q(a, x) at x = a e^mu, whichever is at hand without cancellation."""
    xp = s.xp
    nodes, weights, depth = _quadrature(float(xp.finfo(mu.dtype).eps))
    x = a * xp.exp(mu)
    low = x <= s.clip(a, 1.0, None)
    # P is taken at a + 1, P's integral being (1 + x · the integral at a + 1) / a, so that a small a is not singular.
    side = 1 - 2 * xp.astype(low, mu.dtype)
    slope = s.clip(0.5 * (1 - side) + side * a * xp.expm1(mu), 0.0, None)

    def exponent(t: Array, slope: Array, x: Array, side: Array) -> Array:
        return slope * t + x * (xp.expm1(side * t) - side * t)

    # From the right of where the exponent reaches `depth`, by bounds of it, then Newton (it is convex).
    b = xp.where(low, slope - depth / 3, slope)
    c = xp.where(low, slope / 3 + x / 2, x / 2)
    end = 2 * depth / (b + xp.sqrt(b * b + 4 * c * depth))
    for _ in range(3):
        end = end - (exponent(end, slope, x, side) - depth) / (slope + x * side * xp.expm1(side * end))
    t = end[..., None] * s.array(nodes, end)
    mass = (
        end[..., None] * s.array(weights, end) * xp.exp(-exponent(t, slope[..., None], x[..., None], side[..., None]))
    )
    integral, moment = xp.sum(mass, axis=-1), xp.sum(mass * t, axis=-1)

    peak = -a * (xp.expm1(mu) - mu) - _log_stirling(s, a)  # log of x^a e^-x / Γ(a + 1)
    series = 1 + x * integral
    return GammaTail(
        low,
        peak + xp.where(low, xp.log(series), xp.log(a * integral)),
        xp.where(low, series / a, integral),
        xp.where(low, x * moment / a, moment),
    )


def gamma_log_quantile(s: Any, a: Array, z: Array) -> Array:
    """log x with P(a, x) = Φ(z): Halley's iteration in log x on log P below about x = a, on log Q above."""
    xp = s.xp
    lower, upper = s.log_ndtr(z), s.log_ndtr(-z)
    log_a = xp.log(a)

    def halley(mu: Array) -> Array:
        tail = gamma_tail(s, a, mu)
        sign = 2 * xp.astype(tail.low, mu.dtype) - 1
        newton = sign * tail.width * (tail.log_tail - xp.where(tail.low, lower, upper))
        bend = 1 - 0.5 * newton * (-a * xp.expm1(mu) - sign / tail.width)
        return mu - newton / s.clip(bend, 0.5, 2.0)

    # P <= x^a / Γ(a + 1); Wilson and Hilferty (1931); Q ≈ a E_1(x) for a small.
    power = (lower + s.lgamma(a + 1)) / a
    cube = 1 - 1 / (9 * a) + z / (3 * xp.sqrt(a))
    body = xp.where(a >= 0.5, 3 * xp.log(s.clip(cube, 0.02, None)), xp.log(s.clip(log_a - upper, 0.3, None)) - log_a)
    start = xp.where((a < 0.5) & (power < -1.0), power - log_a, s.maximum(body, power - log_a))
    return log_a + s.repeat(4, halley, start)


def gamma_log_quantile_slopes(s: Any, a: Array, z: Array, log_x: Array) -> tuple[Array, Array]:
    """Derivatives of `gamma_log_quantile` in a and z, from P(a, x) = Φ(z) by the implicit function theorem.

    ∂ log P/∂a = E[log t | t < x] - ψ(a) and ∂ log Q/∂a = E[log t | t > x] - ψ(a), t ~ Gamma(a, 1): the same quadrature.
    """
    xp = s.xp
    mu = log_x - xp.log(a)
    tail = gamma_tail(s, a, mu)
    by_z = tail.width * log_ndtr_slope(s, xp.where(tail.low, z, -z), xp.where(tail.low, s.log_ndtr(z), s.log_ndtr(-z)))
    centred = mu + _log_minus_digamma(s, a)  # log x - ψ(a)
    by_a = xp.where(tail.low, tail.moment - (centred - 1 / a) * tail.width, centred * tail.width + tail.moment)
    return by_a, by_z


def poisson_quantile(s: Any, rate: Array, z: Array) -> Array:
    """The smallest k with P(X <= k) >= Φ(z), X ~ Poisson(rate), as a float; P(X <= k) = Q(k + 1, rate).

    Bisection between Chernoff's bounds, exact up to the rounding of log P and log Q; counts up to 2^26 from the mean.
    """
    xp = s.xp
    rate, z = xp.broadcast_arrays(s.clip(rate, float(xp.finfo(z.dtype).tiny), None), z)
    lower, upper = s.log_ndtr(z), s.log_ndtr(-z)

    def halve(bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        below, reached = bracket
        middle = xp.floor(0.5 * (below + reached))
        a = s.clip(middle + 1, 0.5, None)
        tail = gamma_tail(s, a, xp.log(rate) - xp.log(a))
        enough = (middle >= 0) & xp.where(tail.low, tail.log_tail <= upper, tail.log_tail >= lower)
        enough = enough | (middle >= reached)
        return xp.where(enough, below, middle), xp.where(enough, middle, reached)

    below = s.clip(xp.floor(rate - xp.sqrt(-2 * rate * lower)) - 1, -1.0, None)
    reached = xp.ceil(rate - upper / 3 + xp.sqrt(upper * upper / 9 - 2 * rate * upper)) + 1
    return s.repeat(27, halve, (below, reached))[1]


def _quadrature(eps: float) -> tuple[np.ndarray, np.ndarray, float]:
    """Gauss–Legendre nodes and weights on (0, 1), and the exponent at which an integrand is cut off."""
    order, depth = (40, 38.0) if eps < 1e-10 else (20, 18.0)
    nodes, weights = np.polynomial.legendre.leggauss(order)
    return (nodes + 1) / 2, weights / 2, depth


def _log_stirling(s: Any, a: Array) -> Array:
    """log Γ(a + 1) - (a log a - a), without cancellation for large a (DLMF 5.11.1)."""
    large = s.clip(a, STIRLING_FROM, None)
    small = s.clip(a, None, STIRLING_FROM)
    r = 1 / (large * large)
    series = (1 / 12 - r * (1 / 360 - r * (1 / 1260 - r * (1 / 1680 - r / 1188)))) / large
    exact = s.lgamma(small + 1) - small * (s.xp.log(small) - 1)
    return s.xp.where(a > STIRLING_FROM, LOG_SQRT_2PI + 0.5 * s.xp.log(large) + series, exact)


def _log_minus_digamma(s: Any, a: Array) -> Array:
    """log a - ψ(a), without cancellation for large a (DLMF 5.11.2)."""
    large = s.clip(a, STIRLING_FROM, None)
    small = s.clip(a, None, STIRLING_FROM)
    r = 1 / (large * large)
    series = 1 / (2 * large) + r * (1 / 12 - r * (1 / 120 - r * (1 / 252 - r * (1 / 240 - r / 132))))
    return s.xp.where(a > STIRLING_FROM, series, s.xp.log(small) - s.digamma(small))
