"""A neural controller that keeps a pendulum upright in gusts of wind, until a bad sequence of gusts brings it down.

The pendulum is inverted and starts near the top; 50 times, 0.05 s apart, the controller reads the state (angle a,
angular velocity w) and sets a torque u = M(a, w), and a gust g of wind pushes:

    dw/dt = GRAVITY sin a - FRICTION w + u + g,    da/dt = w.

**D** is closed loop: the program ``adversary(model)`` draws the start and the 50 gusts, runs M fifty times, and
returns x = (start, gusts) and y = (angles, torques). **C** is a fall: the severity, in radians, is the largest |angle|
along the way minus ``FALLEN``. **M** is a small network in plain JAX, trained by descent through the simulation on
recorded weather that is mild: it has never seen what it needs to survive a storm.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array
from jax.tree_util import Partial

if TYPE_CHECKING:
    from probest import Problem

STEPS = 50
TIME_STEP = 0.05  # seconds
GRAVITY = 9.8
FRICTION = 0.1
MAX_TORQUE = 30.0
FALLEN = 1.0  # radians

START_SCALE = 0.1  # radians, and radians a second
GUST_SCALE = 8.0  # D's gusts, radians a second squared
RECORDED_SCALE = 3.0  # the recorded ones
TORQUE_COST = 0.02

BATCH = 64
DRAWN, KEPT = 256, 16  # of the baseline: cases sampled a step, and trained on
WORST_WEIGHT = 0.1

# Arguments of ``probest.train`` that work here.
TRAINING = {"until_log_prob": -22.0, "learning_rate": 1e-3, "batch_size": BATCH}

Controller = Callable[[Array], Array]


class Weather(NamedTuple):
    """x: ``start`` ``(..., 2)`` is the first angle and angular velocity, ``gusts`` ``(..., 50)``."""

    start: Array
    gusts: Array


class Trajectory(NamedTuple):
    """y: ``angles`` ``(..., 50)`` in radians after each step, ``torques`` ``(..., 50)`` applied in it."""

    angles: Array
    torques: Array


def simulate(model: Controller, weather: Weather) -> Trajectory:
    """The closed loop: semi-implicit Euler steps under ``model``."""

    def step(state: Array, gust: Array) -> tuple[Array, tuple[Array, Array]]:
        torque = model(state)
        angle, velocity = state
        velocity += TIME_STEP * (GRAVITY * jnp.sin(angle) - FRICTION * velocity + torque + gust)
        angle += TIME_STEP * velocity
        return jnp.stack([angle, velocity]), (angle, torque)

    _, (angles, torques) = jax.lax.scan(step, weather.start, weather.gusts)
    return Trajectory(angles, torques)


# The adversary and the checker ----------------------------------------------------------------------------------------


def adversary(model: Controller) -> tuple[Weather, Trajectory]:
    """D with M in its loop: 52 latents."""
    start = numpyro.sample("start", dist.Normal(0.0, START_SCALE).expand([2]).to_event(1))
    gusts = numpyro.sample("gusts", dist.Normal(0.0, GUST_SCALE).expand([STEPS]).to_event(1))
    weather = Weather(start, gusts)
    return weather, simulate(model, weather)


def checker(weather: Weather, trajectory: Trajectory) -> Array:  # noqa: ARG001
    """C: by how many radians the pendulum exceeds ``FALLEN`` at its worst."""
    return jnp.abs(trajectory.angles).max() - FALLEN


# The model ------------------------------------------------------------------------------------------------------------


def make_model(seed: int = 0) -> Partial:
    """An untrained controller ``(2,) -> ()``: a function of its parameters and the state, with the parameters bound."""
    first, second = jax.random.split(jax.random.key(seed))
    hidden = 32
    params = {
        "first": {"weight": jax.random.normal(first, (hidden, 2)) / 2**0.5, "bias": jnp.zeros(hidden)},
        "second": {"weight": jax.random.normal(second, (hidden,)) / hidden**0.5, "bias": jnp.zeros(())},
    }
    return Partial(control, params)  # type: ignore[no-untyped-call]


def control(params: dict[str, dict[str, Array]], state: Array) -> Array:
    """The torque, softly limited to ``MAX_TORQUE``."""
    first, second = params["first"], params["second"]
    activity = jnp.tanh(first["weight"] @ state + first["bias"])
    return MAX_TORQUE * jnp.tanh(second["weight"] @ activity + second["bias"])


@cache
def load_data(size: int = 1000) -> tuple[Weather, Weather]:
    """Recorded weather to train on and to test on, ``size`` mild sequences each, from a fixed seed."""

    def record(key: Array) -> Weather:
        start, gusts = jax.random.split(key)
        return Weather(
            START_SCALE * jax.random.normal(start, (size, 2)), RECORDED_SCALE * jax.random.normal(gusts, (size, STEPS))
        )

    train, test = jax.random.split(jax.random.key(0))
    return record(train), record(test)


def cost(model: Controller, weather: Weather) -> Array:
    """Mean over time of ``angle² + TORQUE_COST torque²``, for one sequence of weather."""
    trajectory = simulate(model, weather)
    return jnp.mean(trajectory.angles**2 + TORQUE_COST * trajectory.torques**2)


def task_loss(model: Controller, batch: tuple[Array, Array]) -> Array:
    """The mean cost over a minibatch ``(starts, gusts)``."""
    return jnp.mean(jax.vmap(partial(cost, model))(Weather(*batch)))


def train_model(model: Partial | None = None, *, steps: int = 1000, batch_size: int = BATCH, seed: int = 0) -> Partial:
    """``model`` trained on the recorded weather the ordinary way: Adam on the cost, through the simulation."""
    import optax

    model = make_model(seed) if model is None else model
    train, _ = load_data()
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(1e-2, steps)))

    def step(carry: tuple[Partial, optax.OptState], key: Array) -> tuple[tuple[Partial, optax.OptState], Array]:
        model, state = carry
        rows = jax.random.randint(key, (batch_size,), 0, len(train.start))
        loss, gradient = jax.value_and_grad(task_loss)(model, (train.start[rows], train.gusts[rows]))
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(model, updates), state), loss

    keys = jax.random.split(jax.random.key(seed), steps)
    (model, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, keys))((model, optimizer.init(model)))
    return model


def accuracy(model: Controller) -> float:
    """A score on the test weather, 1 at best: ``1 / (1 + mean cost)``."""
    _, test = load_data()
    return float(1 / (1 + task_loss(model, test)))


def show(ax: Any, case: Any) -> None:
    """Draw one case: the angle over time, and where the pendulum counts as fallen."""
    seconds = TIME_STEP * (1.0 + jnp.arange(STEPS))
    ax.plot(seconds, case.action.angles, color="C3", linewidth=1.0)
    for limit in (-FALLEN, FALLEN):
        ax.axhline(limit, color="0.4", linewidth=0.8, linestyle="--")
    ax.set_ylim(-1.8 * FALLEN, 1.8 * FALLEN)
    ax.set_xlabel("time (s)")
    if ax.get_subplotspec().is_first_col():
        ax.set_ylabel("angle (radians)")


def adversarial_baseline(model: Controller, calls: int, seed: int = 0) -> Controller:
    """``model`` trained on the worst weather that sampling finds, what ``calls`` model calls buy.

    Each step draws ``DRAWN`` cases from D (a call each), keeps the ``KEPT`` of greatest severity, and descends the cost
    in those (three calls each) together with the cost in a minibatch of recorded weather.
    """
    import optax

    train, _ = load_data()
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))

    def step(carry: tuple[Controller, optax.OptState], key: Array) -> tuple[tuple[Controller, optax.OptState], None]:
        model, state = carry
        drawing, choosing = jax.random.split(key)
        draw = jax.vmap(lambda key: numpyro.handlers.seed(adversary, key)(model))
        weather, trajectory = draw(jax.random.split(drawing, DRAWN))  # type: ignore[no-untyped-call]
        worst = jax.lax.top_k(jax.vmap(checker)(weather, trajectory), KEPT)[1]
        rows = jax.random.randint(choosing, (BATCH,), 0, len(train.start))

        def loss(model: Controller) -> Array:
            kept = weather.start[worst], weather.gusts[worst]
            return task_loss(model, (train.start[rows], train.gusts[rows])) + WORST_WEIGHT * task_loss(model, kept)

        updates, state = optimizer.update(jax.grad(loss)(model), state)
        return (optax.apply_updates(model, updates), state), None

    keys = jax.random.split(jax.random.key(seed), max(1, calls // (DRAWN + 3 * KEPT)))
    (model, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, keys))((model, optimizer.init(model)))
    return model


def problem(model: Controller | None = None) -> Problem:
    """The problem of ``model``, or of the ordinarily trained controller."""
    from probest import Problem

    return Problem(adversary, train_model() if model is None else model, checker)
