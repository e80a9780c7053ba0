"""How good is the default strategy where modes are many, limits have corners, or tails are heavy? Exact answers.

    python benchmarks/modes.py --seeds 10 --out modes.json
    python benchmarks/modes.py --families waves,unions --members 3 --seeds 5

Families, each with members drawn at random: corners (several limits at once), bowls (squared distances, from the origin
and from elsewhere), waves (sums of sines, with many modes), unions of 30 to 100 half-spaces, heavy tails (sums and
maxima of Cauchy, Student, Pareto and lognormal variables), and shy ones (the likeliest mode is one that few gradient
walks reach), and bumps (functions of two directions, some of which no gradient leads to). The truth is a product, a
chi-square or Cauchy law, or a quadrature. The columns are those of reliability.py.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from scipy import integrate, special, stats

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from reliability import Case, add_members, of_exact_event, told  # noqa: E402

from probest.evidence import Floats  # noqa: E402
from probest.testing.events import Batch, ExactEvent  # noqa: E402

Pick = Callable[..., np.ndarray]


def frame(rng: np.random.Generator, dim: int, count: int) -> Floats:
    """Orthonormal columns ``(dim, count)``."""
    return np.asarray(np.linalg.qr(rng.standard_normal((dim, count)))[0])


def limits(axes: Floats, beta: Floats, scale: Floats, pick: Pick) -> tuple[Batch, Batch]:
    """Severity and gradient of several half-spaces, each in units of its own: the one that ``pick`` chooses counts."""

    def each(z: Floats) -> Floats:
        return np.asarray(scale * (z @ axes - beta))

    def severity(z: Floats) -> Floats:
        margins = each(z)
        return np.asarray(margins[np.arange(len(z)), pick(margins, axis=1)])

    def gradient(z: Floats) -> Floats:
        chosen = pick(each(z), axis=1)
        return np.asarray(scale[chosen, None] * axes.T[chosen])

    return severity, gradient


def corner(rng: np.random.Generator) -> ExactEvent:
    dim, count = int(rng.integers(5, 60)), int(rng.integers(2, 6))
    axes, beta = frame(rng, dim, count), rng.uniform(0.3, 2.8, count)
    severity, gradient = limits(axes, beta, 10.0 ** rng.uniform(-1, 1, count), np.argmin)
    return ExactEvent(f"corner{count}_d{dim}", dim, float(stats.norm.logsf(beta).sum()), severity, gradient)


def bowl(rng: np.random.Generator) -> ExactEvent:
    dim, kind = int(rng.choice([10, 30, 100])), int(rng.integers(3))
    target = rng.uniform(-25.0, -9.0)
    if kind == 0:  # near the origin
        square = float(stats.chi2.ppf(math.exp(target), dim))
        return ExactEvent(f"bowl_inside_d{dim}", dim, target, lambda z: square - np.sum(z**2, 1), lambda z: -2.0 * z)
    if kind == 1:  # far from it
        square = float(stats.chi2.isf(math.exp(target), dim))
        return ExactEvent(f"bowl_outside_d{dim}", dim, target, lambda z: np.sum(z**2, 1) - square, lambda z: 2.0 * z)
    away = frame(rng, dim, 1)[:, 0] * rng.uniform(3.0, 6.0)
    square = float(stats.ncx2.ppf(math.exp(target), dim, float(away @ away)))
    log_prob = float(stats.ncx2.logcdf(square, dim, float(away @ away)))

    def severity(z: Floats) -> Floats:
        return np.asarray(square - np.sum((z - away) ** 2, axis=1))

    return ExactEvent(f"bowl_aside_d{dim}", dim, log_prob, severity, lambda z: -2.0 * (z - away))


def wave(rng: np.random.Generator) -> ExactEvent:
    """Sum of sin(ω z_i + phase) + z_i / 4 beyond a limit: about as many modes as each term has, to the power dim."""
    dim, omega, phase = int(rng.integers(8, 40)), rng.uniform(1.5, 4.0), rng.uniform(0, 2 * math.pi)
    target = rng.uniform(-18.0, -8.0)
    step = 1e-3
    z = np.linspace(-10, 10, 2_000_001)
    mass = stats.norm.pdf(z) * (z[1] - z[0])
    value = np.sin(omega * z + phase) + 0.25 * z
    low = value.min()
    histogram = np.bincount(np.rint((value - low) / step).astype(int), weights=mass)
    histogram /= histogram.sum()
    # tilted, so that the tail is found in double precision
    points = low + step * np.arange(len(histogram))
    grid = np.linspace(0.0, 6.0, 400)
    cumulant = np.array([special.logsumexp(t * points, b=histogram) for t in grid])
    slope = np.gradient(cumulant, grid)
    rate = int(np.argmin(np.abs(dim * (cumulant - grid * slope) - target - 1.5)))
    tilt = grid[rate]
    tilted = histogram * np.exp(tilt * points - cumulant[rate])
    size = 1 << math.ceil(math.log2(dim * len(histogram)))
    law = np.fft.irfft(np.fft.rfft(tilted, size) ** dim, size)
    sums = dim * low + step * np.arange(size)
    limit = float(dim * slope[rate])
    beyond = sums >= limit
    log_prob = float(special.logsumexp(dim * cumulant[rate] - tilt * sums[beyond], b=np.maximum(law[beyond], 0.0)))

    def severity(x: Floats) -> Floats:
        return np.asarray(np.sum(np.sin(omega * x + phase) + 0.25 * x, axis=1) - limit)

    def gradient(x: Floats) -> Floats:
        return np.asarray(omega * np.cos(omega * x + phase) + 0.25)

    return ExactEvent(f"wave{omega:.1f}_d{dim}", dim, log_prob, severity, gradient)


def union(rng: np.random.Generator) -> ExactEvent:
    count = int(rng.integers(30, 101))
    dim = int(rng.integers(count, 151))
    axes, beta = frame(rng, dim, count), rng.uniform(4.0, 6.0) + rng.exponential(0.3, count)
    severity, gradient = limits(axes, beta, 10.0 ** rng.uniform(-0.5, 0.5, count), np.argmax)
    log_prob = float(np.log(-np.expm1(np.sum(stats.norm.logcdf(beta)))))
    return ExactEvent(f"union{count}_d{dim}", dim, log_prob, severity, gradient)


def _through(law: object, z: Floats) -> Floats:
    """Quantiles at Φ(z), exact in both tails."""
    return np.where(z < 0, law.ppf(special.ndtr(z)), law.isf(special.ndtr(-z)))  # type: ignore[attr-defined]


def _summed(name: str, dim: int, law: object, limit: float, log_prob: float, most: bool = False) -> ExactEvent:
    """Sum, or largest, of independent variables of a law, beyond a limit."""

    def severity(z: Floats) -> Floats:
        x = _through(law, z)
        return np.asarray((x.max(axis=1) if most else x.sum(axis=1)) - limit)

    def gradient(z: Floats) -> Floats:
        x = _through(law, z)
        slope = np.exp(stats.norm.logpdf(z) - law.logpdf(x))  # type: ignore[attr-defined]
        if most:
            slope = slope * (np.arange(dim) == x.argmax(axis=1)[:, None])
        return np.asarray(np.nan_to_num(slope, posinf=1e300))

    return ExactEvent(name, dim, log_prob, severity, gradient)


def heavy(rng: np.random.Generator) -> ExactEvent:
    kind, target = int(rng.integers(4)), rng.uniform(-18.0, -9.0)
    if kind == 0:
        dim = int(rng.integers(1, 12))
        limit = float(stats.cauchy.isf(math.exp(target)) * dim)
        return _summed(f"cauchy_sum_d{dim}", dim, stats.cauchy, limit, target)
    if kind == 1:
        dim, freedom = int(rng.integers(2, 20)), rng.uniform(2.0, 6.0)
        law = stats.t(freedom)
        limit = float(law.isf(-math.expm1(math.log1p(-math.exp(target)) / dim)))
        return _summed(f"student_max_d{dim}", dim, law, limit, target, most=True)
    law = stats.pareto(rng.uniform(1.5, 3.0)) if kind == 2 else stats.lognorm(rng.uniform(0.7, 1.3))
    limit = float(2.0 * law.isf(math.exp(target)))
    low, high = float(law.ppf(0.0)), limit - float(law.ppf(0.0))
    # P(X + Y > t) = 2 P(X > t - low) + ∫ f(x) P(Y > t − x) over what is left, split where it peaks
    inner = sum(
        integrate.quad(lambda x: law.pdf(x) * law.sf(limit - x), a, b, limit=500, epsabs=0.0, epsrel=1e-9)[0]
        for a, b in ((low, low + 1.0), (low + 1.0, limit / 2), (limit / 2, high - 1.0), (high - 1.0, high))
    )
    log_prob = math.log(inner + float(law.sf(high)))
    return _summed(f"{'pareto' if kind == 2 else 'lognormal'}_sum_d2", 2, law, limit, log_prob)


def shy(rng: np.random.Generator) -> ExactEvent:
    """A rippled plane that walks from near the origin lead to, and a likelier corner that few of them find.

    The corner's severity is steeper, and so the lower one near the origin.
    """
    ripples, faces = int(rng.integers(1, 6)), int(rng.integers(2, 4))
    dim = int(rng.integers(1 + ripples + faces, 40))
    axes = frame(rng, dim, 1 + ripples + faces)
    height, omega = rng.uniform(0.05, 0.3), rng.uniform(0.8, 2.0)
    beyond = rng.uniform(-26.0, -16.0)  # log P of the corner
    apex = float(-special.ndtri_exp(beyond / faces))
    plane = float(-special.ndtri_exp(beyond - rng.uniform(3.0, 8.0)))
    steep = rng.uniform(1.3, 2.0) * plane / apex
    # the law of the ripples, by convolution
    z, step = np.linspace(-10, 10, 400_001), 1e-4
    wave = np.bincount(np.rint((height * np.sin(omega * z) + height) / step).astype(int), stats.norm.pdf(z))
    size = 1 << math.ceil(math.log2(ripples * len(wave)))
    law = np.maximum(np.fft.irfft(np.fft.rfft(wave / wave.sum(), size) ** ripples, size), 0.0)
    sums = step * np.arange(size) - ripples * height
    rippled = float(special.logsumexp(stats.norm.logsf(plane + sums), b=law))
    log_prob = float(np.logaddexp(rippled, beyond + math.log1p(-math.exp(rippled))))

    def margins(z: Floats) -> tuple[Floats, Floats, Floats]:
        u = z @ axes
        flat = u[:, 0] - plane - height * np.sin(omega * u[:, 1 : 1 + ripples]).sum(axis=1)
        return u, flat, steep * (u[:, 1 + ripples :].min(axis=1) - apex)

    def severity(z: Floats) -> Floats:
        _, flat, corner = margins(z)
        return np.asarray(np.maximum(flat, corner))

    def gradient(z: Floats) -> Floats:
        u, flat, corner = margins(z)
        slope = np.zeros_like(u)
        slope[:, 0] = 1.0
        slope[:, 1 : 1 + ripples] = -height * omega * np.cos(omega * u[:, 1 : 1 + ripples])
        least = 1 + ripples + u[:, 1 + ripples :].argmin(axis=1)
        inside = corner > flat
        slope[inside] = 0.0
        slope[inside, least[inside]] = steep
        return np.asarray(slope @ axes.T)

    return ExactEvent(f"shy{faces}_d{dim}", dim, log_prob, severity, gradient)


def _step(t: Floats, at: float) -> Floats:
    return np.asarray((t > at) * 1.0)


CURVES: dict[str, tuple[Batch, Batch]] = {  # of one variable, with their derivatives
    "line": (lambda t: t, np.ones_like),
    "ripple": (lambda t: t + 1.5 * np.sin(2 * t), lambda t: 1 + 3 * np.cos(2 * t)),
    "cube": (lambda t: 0.1 * t**3, lambda t: 0.3 * t**2),
    "vee": (lambda t: np.abs(t) - 0.5, np.sign),
    "tanh": (lambda t: 3 * np.tanh(t), lambda t: 3 / np.cosh(t) ** 2),
    "exp": (lambda t: 0.2 * np.exp(0.8 * t), lambda t: 0.16 * np.exp(0.8 * t)),
    "hill": (lambda t: -0.3 * (t - 2.5) ** 2, lambda t: -0.6 * (t - 2.5)),
    "wave": (lambda t: 2 * np.cos(3 * t) + 0.3 * t, lambda t: 0.3 - 6 * np.sin(3 * t)),
    "bump": (
        lambda t: 4 * np.exp(-8 * (t - 2.8) ** 2) + 0.5 * t,
        lambda t: 0.5 - 64 * (t - 2.8) * np.exp(-8 * (t - 2.8) ** 2),
    ),
    "roof": (lambda t: np.minimum(t, 4 - t), lambda t: 1 - 2 * _step(t, 2.0)),
    "clip": (lambda t: np.clip(t, -1.0, 2.5), lambda t: _step(t, -1.0) * (1 - _step(t, 2.5))),
}


def bump(rng: np.random.Generator) -> ExactEvent:
    """Two functions of one direction each, added, or the larger or the product of the two; by a sum over both."""
    grid, spacing = np.linspace(-9.0, 9.0, 3001, retstep=True)
    shifted = grid + 0.5 * spacing
    weights, others = (np.multiply.outer(w, w).ravel() for w in (spacing * stats.norm.pdf(t) for t in (grid, shifted)))
    while True:
        dim = int(rng.choice([2, 3, 8, 20, 60]))
        names, how = rng.choice(list(CURVES), 2), str(rng.choice(["sum", "larger", "product"]))
        (f, df), (g, dg) = (CURVES[str(name)] for name in names)
        scale, axes = rng.uniform(0.5, 1.5), frame(rng, dim, 2)

        def joined(a: Floats, b: Floats, how: str = how) -> Floats:
            return np.asarray(a + b if how == "sum" else np.maximum(a, b) if how == "larger" else a * b)

        values, between = (joined(f(t)[:, None], scale * g(t)[None, :]).ravel() for t in (grid, shifted))
        order = np.argsort(-values)
        rank = int(np.searchsorted(np.cumsum(weights[order]), 10.0 ** -rng.uniform(2.0, 9.0)))
        limit = float(values[order[min(rank, len(order) - 1)]])
        found = [float(weights[values >= limit - slack].sum()) for slack in (0.0, 1e-3)]
        found.append(float(others[between >= limit].sum()))
        if rank == len(order) or not min(found) > 0.0:
            continue
        log_prob = math.log(0.5 * (found[0] + found[2]))
        if abs(math.log(found[1] / found[0])) < 0.02 and abs(math.log(found[2] / found[0])) < 0.02:
            break  # no step at the limit, and nothing that is narrower than the grid

    def severity(z: Floats) -> Floats:
        u = z @ axes
        return joined(f(u[:, 0]), scale * g(u[:, 1])) - limit

    def gradient(z: Floats) -> Floats:
        u = z @ axes
        a, b, da, db = f(u[:, 0]), scale * g(u[:, 1]), df(u[:, 0]), scale * dg(u[:, 1])
        if how == "product":
            da, db = da * b, db * a
        elif how == "larger":
            da, db = da * (a >= b), db * (a < b)
        return np.asarray(np.stack([da, db], axis=1) @ axes.T)

    return ExactEvent(f"{names[0]}_{how}_{names[1]}_d{dim}", dim, log_prob, severity, gradient)


FAMILIES: dict[str, Callable[[np.random.Generator], ExactEvent]] = {
    "corners": corner,
    "bowls": bowl,
    "waves": wave,
    "unions": union,
    "heavy": heavy,
    "shy": shy,
    "bumps": bump,
}


def cases(options: argparse.Namespace) -> Iterator[Case]:
    for family in options.families.split(","):
        for i in range(options.members):
            event = FAMILIES[family](np.random.default_rng((20_261_126, i, *family.encode())))
            yield of_exact_event(event, options)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_members(parser, FAMILIES, seeds=10)
    options = parser.parse_args(argv)
    return told(cases(options), options)


if __name__ == "__main__":
    raise SystemExit(main())
