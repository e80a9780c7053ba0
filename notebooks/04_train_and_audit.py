# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Training a model far below one in n, and auditing it
#
# A model that was trained on a thousand examples has a probability of catastrophe that a thousand examples cannot show.
# Here a small network sets the speed of a vehicle from what its sensors say. A speed that is too high for the distance
# ahead is a catastrophe. After ordinary training that happens about once in a million scenes; we want it below one in a
# billion, with the task as good as it was.

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax.tree_util import Partial

from probest import Problem, estimate, search, train

QUICK = bool(os.environ.get("PROBEST_QUICK"))  # smaller settings, for tests
N = 1_000

# %% [markdown]
# ## D: scenes
#
# Distance, surface, and eight readings that blur both. The model sees readings only; the checker knows
# the truth, so a scene is both.


# %%
def scene():
    distance = numpyro.sample("distance", dist.LogNormal(3.0, 0.5))  # metres
    surface = numpyro.sample("surface", dist.Normal(0.0, 1.0))
    grip = numpyro.deterministic("grip", jax.nn.sigmoid(1.5 + 0.6 * surface))
    blur = numpyro.sample("blur", dist.Normal(0.0, 0.15).expand([8]).to_event(1))
    readings = jnp.concatenate([jnp.full(4, jnp.log(distance) - 3.0), jnp.full(4, surface / 2.0)]) + blur
    return {"distance": distance, "grip": grip, "readings": readings}


def stopping(distance, grip):
    """The speed (m/s) from which braking at this grip takes just this distance."""
    return jnp.sqrt(2.0 * 9.8 * grip * distance)


# %% [markdown]
# ## M, and its task
#
# The task is to drive at three quarters of the speed from which one could just stop, as recorded in a thousand scenes.


# %%
def speed(params, x):
    hidden = jnp.tanh(x["readings"] @ params["w1"] + params["b1"])
    hidden = jnp.tanh(hidden @ params["w2"] + params["b2"])
    return 12.0 + 10.0 * (hidden @ params["w3"])[..., 0]


def initial(seed):
    keys = jax.random.split(jax.random.PRNGKey(seed), 3)
    sizes = [(8, 32), (32, 32), (32, 1)]
    w1, w2, w3 = (jax.random.normal(k, s) / s[0] ** 0.5 for k, s in zip(keys, sizes, strict=True))
    return Partial(speed, {"w1": w1, "b1": jnp.zeros(32), "w2": w2, "b2": jnp.zeros(32), "w3": w3})


def task(model, batch):
    scenes, wanted = batch
    return jnp.mean((model(scenes) - wanted) ** 2)


def checker(x, speed):  # C: metres a second too fast to stop
    return speed - stopping(x["distance"], x["grip"])


def drawn(model, n, seed):
    """n scenes of D, with the speeds that the task wants."""
    event = Problem(scene, model, checker).event
    scenes = event.observe(np.random.default_rng(seed).standard_normal((n, event.dim)))
    return scenes, 0.75 * stopping(scenes["distance"], scenes["grip"])


model = initial(0)
recorded, held_out = drawn(model, N, 1), drawn(model, 4_000, 2)

# %% [markdown]
# ## Ordinary training

# %%
import optax

optimizer = optax.adam(3e-3)


@jax.jit
def step(model, state, rows):
    batch = jax.tree.map(lambda leaf: leaf[rows], recorded)
    slope = jax.grad(task)(model, batch)
    change, state = optimizer.update(slope, state)
    return optax.apply_updates(model, change), state


state, rng = optimizer.init(model), np.random.default_rng(3)
for _ in range(1_500):
    model, state = step(model, state, rng.integers(N, size=64))
print(f"held-out loss {task(model, held_out):.3f} (m/s)²")

vehicle = Problem(scene, model, checker)
before = estimate(vehicle, budget=10_000 if QUICK else 30_000, seed=0)
before

# %% [markdown]
# What are these catastrophes? Short distances, slippery roads, and readings that say otherwise.

# %%
_ = before.plot("pairs", names=["distance", "grip", "blur[0]", "blur[4]"])
# %% [markdown]
# ## Training them away
#
# `train` follows the catastrophes of the model as it changes, by a ladder of particles that reaches from what one draw in
# ten meets to the event itself, and steps log P down at every width of it. `max_pressure` says how much of the task may
# be given up for that. Where a trusted, slow function knows the right action, `teacher=` learns from its answers.

# %%
run = train(
    vehicle,
    task=task,
    data=recorded,
    until_log_prob=-22.0,
    steps=60 if QUICK else 1_000,
    learning_rate=2e-3,
    budget=3_000 if QUICK else 50_000,
    check_budget=2_000 if QUICK else 20_000,
    seed=1,
)
run

# %%
_ = run.plot()
# %%
_ = run.plot("costs")
# %%
print(f"held-out loss {task(model, held_out):.3f} before, {task(run.model, held_out):.3f} after")
print(f"log P {run.before.log_prob:.2f} before, {run.believed.log_prob:.2f} after")
print("converged:", run.converged, *run.advice)

# %% [markdown]
# ## The audit
#
# Training stops when its own looks say so; that is the number least to be believed. `run.audit` asked methods that
# training did not use, from other seeds, and `run.audit_gap` is by how much training's own estimate differs, with its
# interval. Of all of them, `run.believed` is the one that stands: where the audit is higher, the audit is believed.

# %%
gap, low, high = run.audit_gap
print(f"audit gap {gap:+.2f} nats, 95 % between {low:+.2f} and {high:+.2f}")
run.audit

# %% [markdown]
# ## Under a worse adversary
#
# D is not the world. `search` finds the adversary within so many nats of D under which the trained model is at its worst;
# the result is a program like any other, and can be audited like any other.

# %%
settings = {"steps": 20, "refine": 3, "judge": 300} if QUICK else {}
worst = search(run.problem, kl=3.0, base=run.believed, seed=0, **settings)
print(
    f"log P {worst.base.log_prob:.1f} under D, {worst.log_prob:.1f} under the worst adversary within {worst.kl:.1f} nats"
)
print(f"{worst.efficiency:.0%} of the most that so many nats allow")
_ = worst.plot()
# %% [markdown]
# What the two models do, where it is short: the trained one keeps its distance where readings cannot be trusted.

# %%
fig, ax = plt.subplots(figsize=(7, 3))
scenes, wanted = held_out
limit = stopping(scenes["distance"], scenes["grip"])
for name, driver in {"before": model, "after": run.model}.items():
    ax.hist(np.asarray(driver(scenes) - limit), bins=60, histtype="step", label=name)
ax.axvline(0.0, color="0.3")
ax.set_xlabel("speed above the limit (m/s); a catastrophe from 0")
ax.set_ylabel("scenes")
ax.set_yscale("log")
_ = ax.legend()
