"""A student of the severity: its lessons, its guide, and what estimates gain by it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import integrate, special, stats

from probest.budget import Meter
from probest.estimators.combined import Combined
from probest.estimators.importance import Importance
from probest.estimators.tempering import Tempering
from probest.evidence import Floats
from probest.smc.population import State
from probest.smc.softening import EVENT, Noise, Softening
from probest.smc.transition import sketched_sweep
from probest.surrogates.guide import DistilledGuide
from probest.surrogates.network import Lesson, Network, _forward, _pulled, taught
from probest.surrogates.student import Distilled, Sketch, Student
from probest.surrogates.sums import fit_sums
from probest.surrogates.watched import Watched
from probest.testing import FAILURE_RATE
from probest.testing.events import ExactEvent, conditioned, half_space, numeric_gradient

DIM = 30


def seed(value: int) -> np.random.SeedSequence:
    return np.random.SeedSequence(value)


def bent(z: Floats) -> Floats:
    """Of two directions among thirty, each of them spread over many coordinates."""
    a, b = z @ AXES[0], z @ AXES[1]
    return np.asarray(a + 0.5 * np.sin(2.0 * b) * b - 4.2)


AXES = np.linalg.qr(np.random.default_rng(5).standard_normal((DIM, 2)))[0].T
BENT_LOG_PROB = math.log(
    integrate.quad(
        lambda b: stats.norm.pdf(b) * special.ndtr(0.5 * math.sin(2.0 * b) * b - 4.2), -9.0, 9.0, epsrel=1e-8, limit=200
    )[0]
)


def bent_event() -> ExactEvent:
    return ExactEvent("bent", DIM, BENT_LOG_PROB, bent, gradient=numeric_gradient(bent))


def test_the_gradient_of_a_lesson() -> None:
    rng = np.random.default_rng(0)
    drawn = Network.drawn(5, 7, rng, 3)
    net = Network(*(part.astype(np.float64) + 0.1 * rng.standard_normal(part.shape) for part in drawn))
    x, value, slope = rng.standard_normal((9, 5)), rng.standard_normal((9, 3)), rng.standard_normal((9, 5))
    which = np.arange(9) % 3

    def loss(net: Network) -> float:
        said, inner = _forward(net, x, which)
        return float(((said - value) ** 2).sum() + ((inner.slope - slope) ** 2).sum())

    said, inner = _forward(net, x, which)
    pulled = _pulled(net, x, inner, 2.0 * (said - value), 2.0 * (inner.slope - slope))
    for name, part, gradient in zip(net._fields, net, pulled, strict=True):
        step = 1e-6 * rng.standard_normal(part.shape)
        ahead, behind = (loss(net._replace(**{name: part + sign * step})) for sign in (1.0, -1.0))
        np.testing.assert_allclose((ahead - behind) / 2.0, np.sum(gradient * step), rtol=1e-5)


def test_a_network_learns_from_gradients_what_values_alone_do_not_say() -> None:
    rng = np.random.default_rng(1)
    x, new = rng.standard_normal((600, 8)), rng.standard_normal((500, 8))

    def square(x: Floats) -> tuple[Floats, Floats]:
        return 0.5 * np.sum(x**2, axis=1) * 0.3 + x[:, 0], 0.3 * x + np.eye(8)[0]

    value, slope = square(x)
    errors = []
    for known in (slope, np.full_like(slope, np.nan)):
        lesson = Lesson(x, value[:, None], known, np.ones(len(x)), np.ones((len(x), 1)))
        net = taught(Network.drawn(8, 32, rng), lesson, rng, steps=1500, batch=64, rate=1e-2, slopes=4.0)
        said, sloped = net.value_and_slope(new)
        np.testing.assert_allclose(said, net.value(new), rtol=1e-5, atol=1e-5)
        errors.append(float(np.sqrt(np.mean((said - square(new)[0]) ** 2))))
        if known is slope:
            assert np.sqrt(np.mean((sloped - square(new)[1]) ** 2)) < 0.1
    assert errors[0] < 0.1
    assert errors[0] < 0.7 * errors[1]


def curves(z: Floats) -> tuple[Floats, Floats]:
    """A sum over coordinates with many modes, and its gradient."""
    return np.asarray(np.sum(np.sin(3.0 * z + 1.0) + 0.2 * z, axis=1)), 3.0 * np.cos(3.0 * z + 1.0) + 0.2


def test_sums_are_learned_from_gradients() -> None:
    rng = np.random.default_rng(2)
    z, new = 1.5 * rng.standard_normal((1_000, 20)), rng.standard_normal((500, 20))
    sums, share = fit_sums(z, curves(z)[1], np.ones(len(z)))
    assert share > 0.97
    value, slope = sums.value_and_slope(new)
    exact, steep = curves(new)
    np.testing.assert_allclose(value, sums.value(new))
    assert np.std(value - exact) < 0.02 * np.std(exact)
    assert np.sqrt(np.mean((slope - steep) ** 2)) < 0.03 * np.sqrt(np.mean(steep**2))
    far, step = np.full((1, 20), 12.0), 1e-4 * np.eye(20)[0]
    drawn = sums._replace(constant=1.0, reach=10.0)
    for at in (new[:1], far):  # slopes are those of the values, beyond the grid too
        difference = (drawn.value(at + step) - drawn.value(at - step)) / 2e-4
        np.testing.assert_allclose(difference, drawn.value_and_slope(at)[1][:, 0], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(np.sinh(drawn.value(new) / 10.0) * 10.0, value + 1.0)


def test_what_is_no_sum_is_not_taken_for_one() -> None:
    rng = np.random.default_rng(3)
    z = rng.standard_normal((1_000, 20))
    turned = np.linalg.qr(rng.standard_normal((20, 20)))[0]
    for slope in (z[:, ::-1], np.cos(3.0 * z @ turned) @ turned.T, np.ones_like(z)):
        assert fit_sums(z, slope, np.ones(len(z)))[1] < 0.5
    student = Student()
    watched = Watched(bent_event())
    watched.evaluate(2.0 * z @ np.eye(20, DIM), gradient=True)
    assert not student.sums_up(watched.cases())
    with pytest.raises(ValueError, match="two are needed"):
        fit_sums(z[:1], z[:1], np.ones(1))
    for few in (2, 3, 5, 100, 101):
        assert np.isfinite(fit_sums(z[:few], curves(z[:few])[1], np.ones(few))[1])


@pytest.mark.parametrize(("dim", "summed"), [(20, True), (200, True), (200, False)])
def test_students_know_sums_when_they_see_them(dim: int, summed: bool) -> None:
    def severity(z: Floats) -> Floats:
        return curves(z)[0] if summed else np.asarray(np.sum(np.sin(3.0 * z) * z[:, ::-1], axis=1))

    gradient = (lambda z: curves(z)[1]) if summed else numeric_gradient(severity)
    watched = Watched(ExactEvent("curves", dim, -1.0, severity, gradient))
    watched.evaluate(np.random.default_rng(7).standard_normal((400, dim)), gradient=True)
    assert Student().sums_up(watched.cases()) == summed
    student = Student()
    known = student.teach(watched.cases(), np.random.default_rng(8), share=0.05)
    assert known is not None
    assert (known.sums is not None) == summed
    if summed:
        z = np.random.default_rng(9).standard_normal((300, dim))
        told, _ = student.told(watched.cases()._replace(z=z, severity=severity(z), slope=np.zeros((300, dim))))
        assert np.std(known.severity(z) - told) < 0.2 * np.std(told)
        value, slope = known.severity_and_slope(z[:1])
        ahead = known.severity(z[:1] + 1e-2 * np.eye(dim)[0]) - known.severity(z[:1] - 1e-2 * np.eye(dim)[0])
        np.testing.assert_allclose(value, known.severity(z[:1]), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(ahead / 2e-2, slope[:, 0], atol=0.05)


def test_a_sum_over_coordinates_with_many_modes_takes_few_calls() -> None:
    """Its law by convolution. Looks find some of its modes, a fitted mixture as many as it has components."""
    dim, step = 12, 1e-3
    grid = np.linspace(-9.0, 9.0, 400_001)
    one = curves(grid[:, None])[0]
    low = float(one.min())
    mass = np.bincount(np.rint((one - low) / step).astype(int), stats.norm.pdf(grid))
    size = 1 << math.ceil(math.log2(dim * len(mass)))
    law = np.fft.irfft(np.fft.rfft(mass / mass.sum(), size) ** dim, size)
    limit = 9.7
    log_prob = math.log(law[dim * low + step * np.arange(size) >= limit].sum())
    assert -12.0 < log_prob < -8.0
    event = ExactEvent("sum", dim, log_prob, lambda z: curves(z)[0] - limit, lambda z: curves(z)[1])
    run = Combined(precision=0.2).run(event, budget=10_000, seed=seed(0))
    taught = [line for line in run.ledger if line.method == "importance sampling"][-1]
    assert taught.diagnostics["ess"] > 100.0
    own = math.sqrt(taught.std_error**2 - taught.diagnostics["left_out"] ** 2)
    assert own < 0.2
    assert abs(taught.log_prob - log_prob) < stats.norm.isf(FAILURE_RATE / 2) * own
    lower, upper = run.conclusion.interval
    assert lower < log_prob < upper


def test_what_is_watched_is_kept_and_all_else_is_the_events_own() -> None:
    event = half_space(4, 2.0)
    watched = Watched(event, most=8 * 40)
    z = np.random.default_rng(2).standard_normal((20, 4))
    assert watched.cases().z.shape == (0, 4)
    watched.evaluate(z)
    found = watched.evaluate(z[:5], gradient=True)
    cases = watched.cases()
    assert found.severity_grad is not None
    np.testing.assert_allclose(cases.severity, np.concatenate([event.severity(z), event.severity(z[:5])]))
    assert np.isnan(cases.slope[:20]).all()
    np.testing.assert_allclose(cases.slope[20:], found.severity_grad, rtol=1e-6)
    assert watched.log_prob == event.log_prob
    watched.evaluate(z)  # more numbers than it may keep
    assert len(watched.cases().z) < 40


def test_severities_without_end_teach_nothing() -> None:
    event = ExactEvent("endless", 2, -1.0, lambda z: np.where(z[:, 0] > 0.0, z[:, 0], -np.inf))
    watched = Watched(event)
    watched.evaluate(np.random.default_rng(3).standard_normal((50, 2)))
    assert np.isfinite(watched.cases().severity).all()


def test_a_student_finds_the_directions_that_matter() -> None:
    watched = Watched(bent_event())
    rng = np.random.default_rng(4)
    for scale in (1.0, 2.0, 3.0):
        watched.evaluate(scale * rng.standard_normal((300, DIM)), gradient=True)
    student = Student()
    known = student.teach(watched.cases(), rng)
    assert known is not None
    assert known.basis.shape == (DIM, 2)
    np.testing.assert_allclose(known.basis.T @ known.basis, np.eye(2), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(known.basis.T @ AXES.T, axis=0), 1.0, atol=1e-3)
    z = rng.standard_normal((500, DIM)) + 3.0 * AXES[0]
    told, _ = student.told(watched.cases()._replace(z=z, severity=bent(z), slope=np.zeros((500, DIM))))
    student.examined(z @ known.basis, bent(z))
    assert student.known is not None
    assert student.known.noise < 0.2
    assert np.sqrt(np.mean((told - known.severity(z @ known.basis)) ** 2)) < student.known.noise


def test_nothing_to_learn_from() -> None:
    watched = Watched(bent_event())
    watched.evaluate(np.zeros((5, DIM)))
    assert Student().teach(watched.cases(), np.random.default_rng(0)) is None


def test_a_students_guide_has_the_density_that_it_draws_from() -> None:
    """E_q[φ/q · f] = E_φ[f], and ∫ q = 1, both by plain draws."""
    rng = np.random.default_rng(6)
    dim, rank, n = 4, 2, 200_000
    basis = np.linalg.qr(rng.standard_normal((dim, rank)))[0]
    known = Distilled(Network.drawn(rank, 8, rng), basis, np.array([1.5, 0.5]), 0.7)
    u = rng.standard_normal((n, rank))
    chance = np.exp(known.log_chance(u))
    mass = float(chance.mean())

    def more() -> Floats:
        fresh = rng.standard_normal((n, rank))
        return np.asarray(fresh[rng.random(n) < np.exp(known.log_chance(fresh))])  # by rejection

    guide = DistilledGuide(known, math.log(mass), 0.0, more)
    z = guide.sample(150_000, rng)
    ratio = np.exp(guide.log_ratio(z))
    for f in (z[:, 0] ** 2, z[:, 1] ** 2 * (z[:, 2] > 0.0) * 2.0, np.ones(len(z))):
        error = float(np.std(ratio * f)) / math.sqrt(len(z)) + float(np.std(chance)) / mass / math.sqrt(n)
        assert abs(float(np.mean(ratio * f)) - 1.0) < stats.norm.isf(FAILURE_RATE / 2) * error
    plain = np.exp(-guide.log_ratio(rng.standard_normal((n, dim))))
    assert abs(float(plain.mean()) - 1.0) < stats.norm.isf(FAILURE_RATE / 2) * float(np.std(plain)) * math.sqrt(2.0 / n)


@pytest.mark.parametrize("soft", [EVENT, Noise(2.0)], ids=["event", "softened"])
def test_moves_that_a_wrong_student_proposes_leave_the_target_alone(soft: Softening) -> None:
    """Exact draws of the target, by rejection, are exact draws of it after some moves."""
    rng = np.random.default_rng(7)
    event = ExactEvent("ridge", 3, 0.0, lambda z: z[:, 0] + 0.5 * z[:, 1] ** 2 - 0.7)
    sketch = Sketch(Distilled(Network.drawn(2, 8, rng), np.eye(3)[:, 1:], np.ones(2), 0.5), 1.0, 10.0)
    plain = rng.standard_normal((400_000, 3))
    target = plain[np.log(rng.random(len(plain))) < soft.log(event.severity(plain))]
    before, fixed = np.array_split(target, 2)
    state = State(before.copy(), event.severity(before), np.zeros(len(before)), None, None, np.zeros(1), soft=soft)
    meter = Meter(event, 10**9)
    accepted = [sketched_sweep(state, meter, rng, sketch, np.arange(len(before)), 6) for _ in range(3)]
    assert min(accepted) > 0.1
    np.testing.assert_allclose(state.severity, event.severity(state.z))
    assert np.mean(np.all(state.z == before, axis=1)) < 0.7
    for f in (lambda z: z, lambda z: z**2, lambda z: z * np.roll(z, 1, axis=1)):
        now, then = f(state.z), f(fixed)
        error = np.sqrt(np.var(now, axis=0) / len(now) + np.var(then, axis=0) / len(then))
        assert (np.abs(now.mean(axis=0) - then.mean(axis=0)) < stats.norm.isf(FAILURE_RATE / 18) * error).all()


def test_looks_whose_moves_a_student_proposes_are_unbiased() -> None:
    watched = Watched(bent_event())
    rng = np.random.default_rng(8)
    for scale in (1.0, 2.0, 3.0):
        watched.evaluate(scale * rng.standard_normal((200, DIM)), gradient=True)
    student = Student()
    assert student.teach(watched.cases(), rng) is not None
    method = Tempering(particles=128, max_moves=2, target=0.5, student=student)
    runs = [method.run(bent_event(), budget=20_000, seed=seed(100 + k)).conclusion for k in range(24)]
    ratios = np.exp(np.array([run.log_prob for run in runs]) - BENT_LOG_PROB)
    error = float(np.std(ratios)) / math.sqrt(len(ratios))
    assert abs(float(ratios.mean()) - 1.0) < special.stdtrit(len(ratios) - 1, 1.0 - FAILURE_RATE / 2) * error


def test_a_student_of_another_adversary_is_refused() -> None:
    watched = Watched(bent_event())
    watched.evaluate(np.random.default_rng(8).standard_normal((200, DIM)), gradient=True)
    student = Student()
    student.teach(watched.cases(), np.random.default_rng(9))
    with pytest.raises(ValueError, match="was taught 30 coordinates, the problem has 4"):
        Tempering(student=student).run(half_space(4, 3.0), budget=5_000, seed=seed(0))
    with pytest.raises(ValueError, match="does not know of observations"):
        Tempering(student=student).run(conditioned(DIM, 3.0, 1.0, 0.5), budget=5_000, seed=seed(0))


@pytest.mark.parametrize("method", [Combined(), Importance(guides=("mixture", "distilled"))], ids=lambda m: m.name)
def test_a_bent_event_among_many_coordinates(method: Combined | Importance) -> None:
    for value in (0, 1):
        run = method.run(bent_event(), budget=30_000, seed=seed(value))
        found = run.conclusion
        assert found.calls <= 30_000
        assert found.std_error < 0.15
        reach = float(special.stdtrit(20, 1.0 - FAILURE_RATE / 2)) * found.std_error
        assert abs(found.log_prob - BENT_LOG_PROB) < reach


def test_the_budget_is_a_ceiling_for_students_too() -> None:
    asked: list[int] = []

    class Counted(ExactEvent):
        def evaluate(self, z: Floats, *, gradient: bool = False):  # type: ignore[no-untyped-def]
            asked.append(len(z) * (3 if gradient else 1))
            return ExactEvent.evaluate(self, z, gradient=gradient)

    event = Counted("bent", DIM, BENT_LOG_PROB, bent, gradient=numeric_gradient(bent))
    for budget in (500, 5_000, 12_000):
        asked.clear()
        run = Importance(guides=("mixture", "distilled")).run(event, budget=budget, seed=seed(3))
        assert run.calls == sum(asked) <= budget


def test_the_same_seed_gives_the_same_estimate() -> None:
    first, second = (Combined().run(bent_event(), budget=15_000, seed=seed(4)).conclusion for _ in range(2))
    assert first.log_prob == second.log_prob
    assert first.calls == second.calls


def test_a_tempering_run_is_the_same_when_it_is_watched() -> None:
    method, kept = Tempering(particles=128, max_moves=2), Watched(bent_event())
    plain, watched = (method.run(event, budget=10_000, seed=seed(5)).conclusion for event in (bent_event(), kept))
    assert plain.log_prob == watched.log_prob
    cases = kept.cases()  # a gradient is 3 calls, and nothing was asked that is not kept
    assert len(cases.z) + 2 * np.count_nonzero(~np.isnan(cases.slope[:, 0])) == watched.calls == plain.calls
