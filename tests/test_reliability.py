"""The reliability problems: severities and log P against independent formulas, and the benchmark that runs them."""

from __future__ import annotations

import itertools
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import integrate, stats

from models import acas_xu, reliability, sphere
from models.reliability import Reliability

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

FAILURES = 1e-4  # of a statistical test, by chance
REFERENCE = Path(os.environ.get("PROBEST_REFERENCE", ROOT.parent / "shared" / "reference"))
Floats = np.ndarray


# Independent formulas: marginals by SciPy, limit states on the columns of an (n, dim) array ---------------------------


def lognormals(*params: tuple[float, float]) -> list[Any]:
    return [stats.lognorm(sd, scale=math.exp(mean)) for mean, sd in params]


STRENGTH = (4.782516577355461, 0.09975134511959267)
MARGINALS: dict[str, list[Any]] = {
    "RP8": lognormals(
        *[STRENGTH] * 4, (3.892412648851505, 0.19804220043536505), (3.6692690975372955, 0.19804220043536505)
    ),
    "RP14": [
        stats.uniform(70, 10),
        stats.norm(39, 0.1),
        stats.gumbel_r(1342.481377359007, 272.8938804317866),
        stats.norm(400, 0.1),
        stats.norm(250_000, 35_000),
    ],
    "RP38": [stats.norm(m, m / 10) for m in (350, 50.8, 3.81, 173, 9.38, 33.1, 0.036)],
    "RP55": [stats.uniform(-1, 2)] * 2,
    "RP54": [stats.expon()] * 20,
    "RP60": lognormals(
        (7.691237473919823, 0.09975134511959267),
        (7.64471745828493, 0.09975134511959267),
        (7.735689236490656, 0.09975134511959267),
        (7.595927294115498, 0.09975134511959267),
        (7.015866833216955, 0.38525317015992655),
    ),
    "R-S": [stats.norm(4, 1), stats.norm(2, 1)],
    "AxialBeam": [*lognormals((5.6988073092296165, 0.09975134511959267)), stats.norm(75_000, 5_000)],
}
ROOT2 = math.sqrt(2)


def g_rp14(x: Floats) -> Floats:
    shear, bending = 16 * x[:, 2] * x[:, 3], 32 * x[:, 4]  # twisting and bending of a shaft, combined
    return x[:, 0] - np.hypot(shear / 2, bending) / (np.pi * x[:, 1] ** 3)


def g_rp38(x: Floats) -> Floats:
    a, b, c, d, e, f, g = x.T
    top = d**2 - 4 * e * f * g**2 + d * (f + 4 * e + 2 * f * g)
    return 15.59e4 - a * b**3 / (2 * c**3) * (top / (d * e * (d + f + 2 * f * g)))


def g_rp55(x: Floats) -> Floats:
    d = x[:, 0] - x[:, 1]
    c = 0.2 + 0.6 * d**4
    return np.min([c - d / ROOT2, c + d / ROOT2, d + 5 / ROOT2 - 2.2, -d + 5 / ROOT2 - 2.2], axis=0)


def g_rp60(x: Floats) -> Floats:
    a, b, c, d, e = x.T
    one = np.min([b - e / 2, c - e / 2, d - e / 2], axis=0)
    two = np.maximum(d - e, np.minimum(b - e, c - e))
    return np.minimum(a - e, np.maximum(one, two))


def g_four_branch(x: Floats) -> Floats:
    a, b = x.T
    c = 3 + 0.1 * (a - b) ** 2
    return np.min([c - (a + b) / ROOT2, c + (a + b) / ROOT2, a - b + 7 / ROOT2, b - a + 7 / ROOT2], axis=0)


def g_leaf(x: Floats) -> Floats:
    return np.min([np.sum((x + 3.8) ** 2, axis=1), np.sum((x - 3.8) ** 2, axis=1)], axis=0) - 1


def g_lin(beta: float) -> Callable[[Floats], Floats]:
    return lambda x: beta - x.sum(axis=1) / math.sqrt(x.shape[1])


def g_union(x: Floats) -> Floats:
    return 5 - np.abs(x[:, :2]).max(axis=1)


LIMIT_STATES: dict[str, Callable[[Floats], Floats]] = {
    "RP8": lambda x: x @ [1.0, 2, 2, 1, -5, -5],
    "RP14": g_rp14,
    "RP22": lambda x: 2.5 - (x[:, 0] + x[:, 1]) / ROOT2 + 0.1 * (x[:, 0] - x[:, 1]) ** 2,
    "RP33": lambda x: np.minimum(-x.sum(axis=1) + 3 * math.sqrt(3), 3 - x[:, 2]),
    "RP35": lambda x: np.minimum(
        2 - x[:, 1] + np.exp(-0.1 * x[:, 0] ** 2) + (0.2 * x[:, 0]) ** 4, 4.5 - x[:, 0] * x[:, 1]
    ),
    "RP38": g_rp38,
    "RP55": g_rp55,
    "RP54": lambda x: x.sum(axis=1) - 8.951,
    "RP75": lambda x: 3 - x[:, 0] * x[:, 1],
    "RP89": lambda x: np.minimum(-(x[:, 0] ** 2) - x[:, 1] + 8, -x[:, 0] / 5 - x[:, 1] + 6),
    "RP107": lambda x: 5 * math.sqrt(10) - x.sum(axis=1),
    "RP60": g_rp60,
    "FourBranch": g_four_branch,
    "R-S": lambda x: x[:, 0] - x[:, 1],
    "AxialBeam": lambda x: x[:, 0] - x[:, 1] / (100 * np.pi),
    **{f"lin_d{d}_b{b}": g_lin(b) for d, b in ((2, 5), (2, 8), (10, 5), (10, 8), (100, 5), (1000, 5), (1000, 8))},
    "sphere_d100": lambda x: 14.4678125059 - np.linalg.norm(x, axis=1),
    "union4_d2": g_union,
    "union4_d50": g_union,
    "parab_d2_b5_k0.5": lambda x: 5 + 0.5 * x[:, 0] ** 2 - x[:, 1],
    "nofis_Leaf": g_leaf,
}


def native(name: str, z: Floats) -> Floats:
    """x at standard-normal z, from whichever tail is the nearer one."""
    laws = MARGINALS.get(name, [stats.norm()] * z.shape[1])
    assert len(laws) == z.shape[1]
    columns = [
        np.where(column < 0, law.ppf(stats.norm.cdf(column)), law.isf(stats.norm.sf(column)))
        for law, column in zip(laws, z.T, strict=True)
    ]
    return np.stack(columns, axis=1)


DRAWS = 200
SAME_CODE = {"lin_d2_b8", "lin_d10_b5", "lin_d100_b5", "lin_d1000_b5"}  # as another of the half-spaces


def points(dim: int) -> Floats:
    """Draws of D, draws on the sphere of radius 8, and, where there are few coordinates, each at ±8."""
    rng = np.random.default_rng(dim)
    z, far = rng.standard_normal((2, DRAWS, dim))
    far *= 8 / np.linalg.norm(far, axis=1, keepdims=True)
    axes = 8 * np.concatenate([np.eye(dim), -np.eye(dim)]) if dim <= 20 else np.empty((0, dim))
    return np.concatenate([z, far, axes])


@pytest.mark.parametrize("name", [name for name in reliability.NAMES if name not in SAME_CODE])
def test_severity_is_minus_the_limit_state_and_so_is_its_gradient(name: str, backend: Any) -> None:
    event = reliability.problem(backend, name=name).event
    assert event.dim == reliability.case(name).dim
    z = points(event.dim)
    found = event.evaluate(z, gradient=True)
    x = native(name, z)
    g = LIMIT_STATES[name](x)
    scale = np.abs(g[:DRAWS]).max()  # float32 rounds the terms of g, which can be larger than g
    np.testing.assert_allclose(found.severity, -g, rtol=1e-5, atol=5e-6 * scale)
    assert found.severity_grad is not None
    assert np.isfinite(found.severity_grad).all()
    step = 1e-4 * np.random.default_rng(1).standard_normal(event.dim)
    slope = (LIMIT_STATES[name](native(name, z + step)) - LIMIT_STATES[name](native(name, z - step))) / 2
    error = np.abs(found.severity_grad @ step + slope) / (np.abs(slope) + 1e-6 * scale)
    assert np.median(error) < 1e-3
    assert (error < 0.05).mean() > 0.97  # apart from kinks


def test_both_libraries_draw_from_the_same_native_sites(backend: Any) -> None:
    sites = reliability.problem(backend, name="RP14").event.sites
    assert [site.name for site in sites] == ["strength", "diameter", "force", "arm", "moment"]
    (site,) = reliability.problem(backend, name="lin_d1000_b8").event.sites
    assert site.size == 1000


# log P ----------------------------------------------------------------------------------------------------------------


def by_sampling(hits: Floats, log_prob: float) -> None:
    p, n = math.exp(log_prob), len(hits)
    assert abs(hits.mean() - p) < stats.norm.isf(FAILURES / 2) * math.sqrt(p * (1 - p) / n)


@pytest.mark.parametrize("name", [name for name in reliability.NAMES if reliability.log_prob(name) > math.log(5e-4)])
def test_reference_values_by_sampling_the_formulas(name: str) -> None:
    z = np.random.default_rng(7).standard_normal((400_000, reliability.case(name).dim))
    laws = MARGINALS.get(name, [stats.norm()] * z.shape[1])
    uniform = stats.norm.cdf(z)
    x = np.stack([law.ppf(u) for law, u in zip(laws, uniform.T, strict=True)], axis=1) if name in MARGINALS else z
    by_sampling(LIMIT_STATES[name](x) < 0, reliability.log_prob(name))


def test_rare_reference_values_in_closed_form_or_by_quadrature() -> None:
    tail = stats.norm.logsf
    for beta in (5, 8):
        for name in (n for n in reliability.NAMES if n.startswith("lin_") and n.endswith(f"b{beta}")):
            assert reliability.log_prob(name) == pytest.approx(tail(beta))
    assert reliability.log_prob("RP107") == pytest.approx(tail(5))
    for name in ("union4_d2", "union4_d50"):
        assert reliability.log_prob(name) == pytest.approx(math.log(4 * stats.norm.sf(5)), abs=1e-6)
    assert reliability.log_prob("sphere_d100") == pytest.approx(sphere.LOG_PROB, abs=1e-8)
    curved = integrate.quad(lambda x: stats.norm.pdf(x) * stats.norm.sf(5 + x**2 / 2), -9, 9, epsabs=0, points=[0])[0]
    assert reliability.log_prob("parab_d2_b5_k0.5") == pytest.approx(math.log(curved), abs=1e-8)

    def chord(x: float) -> float:
        half = math.sqrt(max(0.0, 1 - (x - 3.8) ** 2))
        return stats.norm.pdf(x) * (stats.norm.sf(3.8 - half) - stats.norm.sf(3.8 + half))

    leaf = integrate.quad(chord, 2.8, 4.8, epsabs=0)[0]
    assert reliability.log_prob("nofis_Leaf") == pytest.approx(math.log(2 * leaf), abs=1e-8)


def test_reference_values_are_those_published() -> None:
    if not (REFERENCE / "reliability.json").exists():
        pytest.skip(f"no {REFERENCE}/reliability.json; set PROBEST_REFERENCE to a folder that has it")
    published = {entry["name"]: entry for entry in json.loads((REFERENCE / "reliability.json").read_text())}
    assert set(published) == set(reliability.NAMES)
    for name, entry in published.items():
        spread = (entry["reference_std_error"] or 0) / entry["reference"]
        # The quadratures behind the published values are good to 1e-4.
        assert reliability.log_prob(name) == pytest.approx(math.log(entry["reference"]), abs=1e-4 + 4 * spread)
        assert reliability.case(name).dim == entry["dim"]


# Families -------------------------------------------------------------------------------------------------------------

EASY = [
    reliability.half_space(10, 1.5),
    reliability.union(3, (2.0, 1.5)),
    reliability.union(3, (1.5, 2.0, 1.8), scales=(10.0, 1.0, 0.1), two_sided=False),
    reliability.parabola(3, 1.0, 0.5),
    reliability.parabola(2, 2.0, -0.1),
    reliability.sphere(4, 3.0),
    reliability.band(2, 1.0, 1.5),
    reliability.islands(3, 2.0),
    reliability.case("FourBranch"),
]


@pytest.mark.parametrize("case", EASY, ids=lambda case: case.name)
def test_families_have_the_log_prob_they_say(case: Reliability, backend: Any) -> None:
    z = np.random.default_rng(3).standard_normal((20_000, case.dim))
    plain, turned = (c.problem(backend).event.evaluate(z).severity for c in (case, case.rotated(5)))
    by_sampling(plain >= 0, case.log_prob)
    by_sampling(turned >= 0, case.rotated(5).log_prob)
    assert np.abs(plain - turned).max() > 0.1 or case.name.startswith("sphere")


def test_a_rotation_is_orthogonal_and_only_of_standard_normals() -> None:
    q = reliability._rotation(30, 4)
    np.testing.assert_allclose(q @ q.T, np.eye(30), atol=1e-12)
    with pytest.raises(ValueError, match="AxialBeam: only problems of one standard-normal site"):
        reliability.case("AxialBeam").rotated(0)


@pytest.mark.parametrize("dim", [2, 1000])
def test_families_reach_far_into_the_tail(dim: int) -> None:
    assert reliability.half_space(dim, 11.4).log_prob == pytest.approx(stats.norm.logsf(11.4))
    assert reliability.union(dim, (11.4, 11.4)).log_prob == pytest.approx(stats.norm.logsf(11.4) + math.log(4))
    unequal = np.logaddexp(stats.norm.logsf(11.0), stats.norm.logsf(11.2)) + math.log(2)
    assert reliability.union(dim, (11.0, 11.2), scales=(1, 9)).log_prob == pytest.approx(unequal)
    # Breitung: curvature 2κ at distance β divides the tail of the plane by sqrt(1 + 2κβ), up to O(1/β²).
    plane = stats.norm.logsf(11.0) - math.log1p(2 * 0.5 * 11) / 2
    assert reliability.parabola(dim, 11.0, 0.5).log_prob == pytest.approx(plane, abs=0.01)
    edge = reliability.band(dim, 11.0, 12.0).log_prob
    assert edge == pytest.approx(math.log(stats.norm.sf(11) - stats.norm.sf(12)))


def test_unknown_names_and_unequal_lengths_are_errors() -> None:
    with pytest.raises(ValueError, match="name='RP1': expected one of RP8"):
        reliability.problem(name="RP1")
    with pytest.raises(ValueError, match="betas has 2 entries, scales 1, dim=3"):
        reliability.union(3, (1.0, 2.0), scales=(1.0,))


# ACAS Xu --------------------------------------------------------------------------------------------------------------


def random_network() -> acas_xu.Network:
    rng = np.random.default_rng(0)
    sizes = [5, *[8] * (acas_xu.LAYERS - 1), 5]
    weights = tuple(rng.standard_normal((b, a)) / math.sqrt(a) for a, b in itertools.pairwise(sizes))
    biases = tuple(0.1 * rng.standard_normal(b) for b in sizes[1:])
    middle, width = (acas_xu.LOW + acas_xu.HIGH) / 2, acas_xu.HIGH - acas_xu.LOW
    return acas_xu.Network(weights, biases, middle - width / 4, acas_xu.HIGH, middle, width)


@pytest.mark.parametrize("law", ["uniform", "normal"])
def test_acas_severity_is_the_cost_of_clear_of_conflict_less_the_largest_other(law: Any, backend: Any) -> None:
    network = random_network()
    z = np.random.default_rng(1).standard_normal((100, 5))
    a, b = acas_xu.parameters(law)
    x = a + (b - a) * stats.norm.cdf(z) if law == "uniform" else a + b * z
    hidden = (np.clip(x, network.mins, network.maxs) - network.means) / network.ranges
    for weights, bias in zip(network.weights[:-1], network.biases[:-1], strict=True):
        hidden = np.maximum(hidden @ weights.T + bias, 0)
    costs = hidden @ network.weights[-1].T + network.biases[-1]
    found = acas_xu.problem(backend, network, law=law).event.evaluate(z)
    np.testing.assert_allclose(found.severity, costs[:, 0] - costs[:, 1:].max(axis=1), atol=2e-5)
    np.testing.assert_allclose(acas_xu.severity(np, network, x.T), costs[:, 0] - costs[:, 1:].max(axis=1))


def test_acas_violations_by_sampling(backend: Any) -> None:
    path = REFERENCE / "acas_xu.npz"
    if not path.exists():
        pytest.skip(f"no {path}; set PROBEST_REFERENCE to a folder that has it")
    event = acas_xu.problem(backend, acas_xu.load(path, "2_7")).event
    severity = event.evaluate(np.random.default_rng(0).standard_normal((50_000, 5))).severity
    by_sampling(severity >= 0, math.log(265_104 / 1e7))


# The benchmark --------------------------------------------------------------------------------------------------------


def test_the_benchmark_runs_one_problem(tmp_path: Path, capsys: Any, backend: Any) -> None:
    import reliability as benchmark

    out = tmp_path / "rows.json"
    arguments = ["--problems", "R-S", "--seeds", "1", "--no-peers", "--backend", backend, "--out", str(out)]
    assert benchmark.main([*arguments, "--budget", "3000"]) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert row["problem"] == "R-S"
    assert row["calls"] <= 3_000
    assert row["log_prob"] == reliability.log_prob("R-S")
    assert "median |error| <= 0.1: 1 of 1" in capsys.readouterr().out


def test_failed_runs_are_infinitely_wrong_and_ratios_are_at_equal_accuracy() -> None:
    import reliability as benchmark

    case = benchmark.Case("case", -5.0, lambda seed: None, lambda: None)
    good = benchmark.Run(-5.02, -5.1, -4.9, 0.04, True, 600, 1.0)
    bad = benchmark.Run(-5.5, -5.6, -5.4, 0.05, True, 600, 3.0)
    failed = benchmark.Run(math.nan, math.nan, math.nan, math.nan, False, 10, 1.0)
    row = benchmark.summary(case, benchmark.OURS, [good, bad, good])
    assert (row.wrong, row.covered, row.calls) == (1, pytest.approx(2 / 3), 600)
    assert row.median_error == pytest.approx(0.02)
    assert benchmark.summary(case, "peer", [failed]).median_error == math.inf
    peers = [
        benchmark.summary(case, method, [good._replace(log_prob=-5 + error, calls=calls, seconds=0.5)])
        for method, error, calls in (("FORM/0", 0, 10), ("rough/300", 0.2, 300), ("fine/1000", 0.04, 1_200))
    ]
    compared = benchmark.with_ratios(row, peers)
    assert (compared.calls_ratio, compared.seconds_ratio, compared.cheapest_peer) == (0.5, 4.0, "fine/1000")
    assert benchmark.with_ratios(row, peers[:2]).calls_ratio is None
    lost = benchmark.summary(case, benchmark.OURS, [bad])
    assert benchmark.with_ratios(lost, peers).calls_ratio == math.inf
    assert benchmark.with_ratios(lost, peers[:2]).calls_ratio is None
