"""The ready problems: their data, their programs, their exact answers."""

from __future__ import annotations

import math
import subprocess
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from scipy import integrate, stats

from models import conditioned, discrete, exponential, halfspace, sphere, union
from probest import Problem, Tempering, estimate

FAILURES = 1e-4  # of a statistical test, by chance
Z = stats.norm.isf(FAILURES / 2)
EXACT = [halfspace, union, sphere, conditioned, exponential, discrete]
BACKENDS = ["pyro", "numpyro"]

# A larger P of each exact problem, for plain sampling.
EASY: dict[ModuleType, dict] = {
    halfspace: {"beta": 2.0, "location": 0.7, "angle": 0.5},
    union: {"betas": (2.0, 1.5, 2.5)},
    sphere: {"dim": 5, "radius": 3.0},
    exponential: {"terms": 4, "rate": 2.0, "limit": 4.0},
    discrete: {"parts": 10, "rate": 0.2, "limit": 5},
}


# Exact problems -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("module", EASY, ids=lambda module: module.__name__)
def test_sampling_the_program_agrees_with_the_exact_answer(module: ModuleType, backend: str) -> None:
    settings = EASY[module]
    event = module.problem(backend, **settings).event
    n = 5_000
    hits = (event.evaluate(np.random.default_rng(0).standard_normal((n, event.dim))).severity >= 0).mean()
    p = math.exp(module.log_prob(**settings))
    assert abs(hits - p) < Z * math.sqrt(p * (1 - p) / n)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weighting_the_conditioned_program_agrees_with_the_exact_answers(backend: str) -> None:
    settings = {"reading": 1.0, "noise": 0.8}
    event = conditioned.problem(backend, dim=2, beta=1.5, **settings).event
    n = 5_000
    found = event.evaluate(np.random.default_rng(0).standard_normal((n, 2)))
    weight = np.exp(found.log_weight)
    assert abs(weight.mean() - math.exp(conditioned.log_evidence(**settings))) < Z * weight.std() / math.sqrt(n)
    share = (weight * (found.severity >= 0)).mean() / weight.mean()
    spread = (weight * ((found.severity >= 0) - share)).std() / weight.mean()
    assert abs(share - math.exp(conditioned.log_prob(beta=1.5, **settings))) < Z * spread / math.sqrt(n)


@pytest.mark.parametrize("backend", BACKENDS)
def test_failures_drawn_one_by_one_or_by_their_number_are_the_same_problem(backend: str) -> None:
    settings = EASY[discrete]
    events = [discrete.problem(backend, law=law, **settings).event for law in ("bernoulli", "binomial")]
    assert [event.dim for event in events] == [10, 1]
    n = 5_000
    hits = (events[1].evaluate(np.random.default_rng(1).standard_normal((n, 1))).severity >= 0).mean()
    p = math.exp(discrete.log_prob(**settings))
    assert abs(hits - p) < Z * math.sqrt(p * (1 - p) / n)


def test_exact_answers_by_quadrature_and_enumeration() -> None:
    assert halfspace.log_prob() == pytest.approx(-15.0650, abs=1e-4)
    assert union.log_prob() == pytest.approx(-13.6787, abs=1e-4)
    assert union.log_prob(betas=[30.0] * 4) == pytest.approx(stats.norm.logsf(30) + math.log(4))

    density = lambda x: stats.norm.pdf(x) * stats.norm.pdf(3.0, x, 0.5) * stats.norm.sf((5 - 0.6 * x) / 0.8)  # noqa: E731
    joint = integrate.quad(density, -10, 12, epsabs=0, epsrel=1e-10, points=[0, 3, 6])[0]
    evidence = stats.norm.pdf(3.0, 0, math.sqrt(1.25))
    assert conditioned.log_evidence() == pytest.approx(math.log(evidence))
    assert conditioned.log_prob() == pytest.approx(math.log(joint / evidence), rel=1e-6)

    # A Gamma tail of integer shape is a Poisson sum; chi-squared is a Gamma.
    waiting = math.fsum(math.exp(-50 + k * math.log(50) - math.lgamma(k + 1)) for k in range(20))
    assert exponential.log_prob() == pytest.approx(math.log(waiting), rel=1e-9)
    half = sphere.radius_at() ** 2 / 2
    outside = math.fsum(math.exp(-half + k * math.log(half) - math.lgamma(k + 1)) for k in range(50))
    assert sphere.log_prob() == pytest.approx(math.log(outside), rel=1e-6)
    assert sphere.log_prob(dim=100, radius=sphere.radius_at()) == pytest.approx(sphere.log_prob(), rel=1e-6)
    failures = math.fsum(math.comb(50, k) * 0.05**k * 0.95 ** (50 - k) for k in range(13, 51))
    assert discrete.log_prob() == pytest.approx(math.log(failures), rel=1e-9)


def test_the_gradient_of_the_half_space_is_the_slope_of_its_answer() -> None:
    at = {"beta": 5.0, "angle": 0.4, "location": 0.8}
    for name, slope in halfspace.gradient(**at).items():
        above, below = (halfspace.log_prob(**{**at, name: at[name] + step}) for step in (1e-5, -1e-5))
        assert slope == pytest.approx((above - below) / 2e-5, rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_estimates_agree_with_exact_answers(backend: str) -> None:
    for module, settings in ((halfspace, {"dim": 10, "beta": 3.0}), (union, {"dim": 10, "betas": (3.0, 3.0)})):
        keywords = {name: value for name, value in settings.items() if name != "dim"}
        found = estimate(module.problem(backend, **settings), budget=20_000, seed=0, progress=False)
        assert found.log_prob == pytest.approx(module.log_prob(**keywords), abs=0.3)


def test_an_unknown_backend_is_an_error() -> None:
    with pytest.raises(ValueError, match="expected 'pyro' or 'numpyro'"):
        halfspace.problem("stan")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("program", "absent"),
    [
        ("import models.pendulum as m; m.problem(m.make_model())", "torch"),
        ("import models.halfspace as m; m.problem('numpyro')", "torch"),
        ("import models.digits as m; m.problem(m.make_model())", "jax"),
        ("import models.halfspace as m; m.problem('pyro')", "jax"),
    ],
)
def test_one_library_needs_no_other(program: str, absent: str) -> None:
    code = f"import sys; {program}; sys.exit({absent!r} in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# Digits ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classifier():
    from models import digits

    return digits.train_model()


def test_digits_are_the_same_every_time(classifier) -> None:
    import torch

    from models import digits

    train, test = digits.load_data()
    assert train.images.shape == (1000, 64)
    assert test.images.shape == (797, 64)
    assert 0 <= train.images.min() < train.images.max() <= 1
    assert train.labels.bincount().tolist() == [100] * 10
    seen = {tuple(row) for row in train.images.tolist()}
    assert sum(tuple(row) in seen for row in test.images.tolist()) <= 5  # disjoint, but for identical scans
    first, again = digits.make_model(3).state_dict(), digits.make_model(3).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_the_classifier_is_good(classifier) -> None:
    from models import digits

    assert 0.96 <= digits.accuracy(classifier) <= 0.99


def test_the_reader_can_be_trusted() -> None:
    import torch

    from models import digits

    _, test = digits.load_data()
    belief, named = torch.vmap(digits.reader_log_beliefs)(test.images).max(1)
    right = named == test.labels
    sure = belief.exp() >= digits.SURE
    assert right.float().mean() >= 0.98
    assert sure.float().mean() >= 0.5
    assert right[sure].float().mean() >= 0.998
    garbage = torch.rand(100, 64, generator=torch.Generator().manual_seed(0))
    assert torch.vmap(digits.reader_log_beliefs)(garbage).max() < math.log(0.5)


def test_images_follow_their_latents() -> None:
    import torch

    from models import digits

    image = digits.fitted_style().mean[4].reshape(8, 8)
    assert torch.equal(digits.translate(image, torch.zeros(2)), image)
    moved = digits.translate(image, torch.tensor([1.0, 0.0]))
    assert torch.allclose(moved[1:], image[:-1])
    assert torch.equal(moved[0], torch.zeros(8))
    plain = digits.make_image(
        torch.tensor(4), torch.zeros(16), torch.zeros(2), torch.tensor(0.0), torch.tensor(0.0), torch.zeros(64)
    )
    assert torch.allclose(plain, image.reshape(64))


def test_severity_is_that_both_are_sure_of_different_digits() -> None:
    import torch

    from models import digits

    train, _ = digits.load_data()
    image = train.images[250]  # a two
    own, other, unsure = torch.zeros(3, 10).unbind()
    own, other = own.index_fill(0, torch.tensor(2), 20.0), other.index_fill(0, torch.tensor(3), 20.0)
    assert digits.checker(image, other) > 0
    assert digits.checker(image, own) < 0
    assert digits.checker(image, unsure) < 0
    assert digits.checker(torch.ones(64), other) < 0
    assert torch.isfinite(torch.func.grad(digits.checker, argnums=1)(image, own)).all()


def test_the_digits_program_is_an_event_with_gradients(classifier) -> None:
    from models import digits

    event = digits.problem(classifier).event
    assert event.dim == 85
    z = np.random.default_rng(0).standard_normal((200, event.dim))
    found = event.evaluate(z, gradient=True)
    assert found.severity.shape == (200,)
    assert (found.severity < 0).mean() > 0.9
    assert np.isfinite(found.severity_grad).all()
    assert (np.linalg.norm(found.severity_grad, axis=1) > 0).all()


def worst(module: ModuleType, model: Any) -> float:
    """The severity that one draw in a hundred exceeds, over the same 4,000 draws each time."""
    event = module.problem(model).event
    severity = event.evaluate(np.random.default_rng(5).standard_normal((4_000, event.dim))).severity
    return float(np.quantile(severity, 0.99))


def test_digits_by_sampling_adversarially(classifier) -> None:
    from models import digits

    trained = digits.adversarial_baseline(classifier, calls=20_000, seed=1)
    assert digits.accuracy(trained) > digits.accuracy(classifier) - 0.02
    # what it is for: the worst of fresh draws become less severe, by much more than draws differ (they are the same)
    assert worst(digits, trained) < worst(digits, classifier) - 0.5
    assert all((a is not b) for a, b in zip(trained.parameters(), classifier.parameters(), strict=True))


# Pendulum -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def controller():
    from models import pendulum

    return pendulum.train_model()


def test_the_pendulum_falls_without_torque_and_keeps_its_energy() -> None:
    import jax.numpy as jnp

    from models import pendulum

    idle = pendulum.Weather(jnp.array([0.1, 0.0]), jnp.zeros(pendulum.STEPS))
    trajectory = pendulum.simulate(lambda state: 0.0 * state[0], idle)
    assert trajectory.angles.shape == trajectory.torques.shape == (50,)
    assert pendulum.checker(idle, trajectory) > 0
    # Near the top the angle follows a growing exponential of the linearised equation.
    rate = math.sqrt(pendulum.GRAVITY)
    assert float(trajectory.angles[9]) == pytest.approx(0.1 * math.cosh(rate * 0.5), rel=0.2)


def test_the_controller_is_good_and_the_same_every_time(controller) -> None:
    import jax

    from models import pendulum

    assert 0.92 <= pendulum.accuracy(controller) <= 0.95
    again = pendulum.make_model(5), pendulum.make_model(5)
    assert all((a == b).all() for a, b in zip(*map(jax.tree.leaves, again), strict=True))
    train, test = pendulum.load_data()
    assert train.start.shape == (1000, 2)
    assert test.gusts.shape == (1000, 50)


def test_the_pendulum_program_is_an_event_with_gradients(controller) -> None:
    from models import pendulum

    event = pendulum.problem(controller).event
    assert event.dim == 52
    found = event.evaluate(np.random.default_rng(0).standard_normal((100, 52)), gradient=True)
    assert (found.severity < 0).mean() > 0.9
    assert np.isfinite(found.severity_grad).all()


def test_the_pendulum_fell_about_as_often_as_said(controller) -> None:
    from models import pendulum

    problem: Problem = pendulum.problem(controller)
    found = estimate(problem, estimator=Tempering(particles=512), budget=60_000, seed=0, progress=False)
    assert -11 < found.log_prob < -8


def test_pendulum_by_sampling_adversarially(controller) -> None:
    from models import pendulum

    trained = pendulum.adversarial_baseline(controller, calls=10_000, seed=1)
    assert abs(pendulum.accuracy(trained) - pendulum.accuracy(controller)) < 0.02
    assert worst(pendulum, trained) < worst(pendulum, controller) - 0.05
