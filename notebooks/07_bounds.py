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
# # Bounds, and inference of your own
#
# An estimate is a number with an error. A bound says less and rests on less. And whoever writes programs in Pyro or
# NumPyro has inference of their own: NUTS, SVI, autoguides. Here they run on the catastrophe itself.
#
# A bridge with two cables, loaded by wind. It fails when either cable is overloaded.

# %%
import os

import arviz as az
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpyro
import numpyro.distributions as dist
from numpyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal

from probest import Autoguide, Bounds, Problem, estimate

QUICK = bool(os.environ.get("PROBEST_QUICK"))  # smaller settings, for tests


def storm():
    wind = numpyro.sample("wind", dist.Normal(jnp.zeros(6), 1.0).to_event(1))
    load = numpyro.sample("load", dist.LogNormal(0.0, 0.2))
    return {"wind": wind, "load": load}


def bridge(x):
    gust = x["wind"][:3].sum() / 3**0.5
    swing = x["wind"][3:].sum() / 3**0.5
    return jnp.stack([gust + 0.3 * swing, 0.9 * swing]) + x["load"]


problem = Problem(storm, bridge, lambda x, tension: tension.max() - 5.0)
result = estimate(problem, seed=0)
result

# %% [markdown]
# ## From below, whatever was missed
#
# P is above this with probability 0.99, for no other reason than that estimates have mean P.

# %%
print(f"log P = {result.log_prob:.2f}, at least {result.lower_bound(0.99):.2f}")

# %% [markdown]
# ## Between two bounds
#
# `Bounds()` takes the lower one from a guide's draws and the upper one from catastrophes that a second search found. The
# gap says how well the guide fits.

# %%
bracketed = estimate(problem, estimator=Bounds(), budget=20_000, seed=0)
bracketed.plot()
plt.show()

# %% [markdown]
# ## NUTS on the catastrophe
#
# `problem.conditioned(temperature)` is a program with a factor Φ(severity / temperature): the event, softened. The
# library's own sampler draws from it, and ArviZ reads what it drew.

# %%
kernel = NUTS(problem.conditioned(0.2))
warmup, draws = (80, 80) if QUICK else (300, 300)
mcmc = MCMC(kernel, num_warmup=warmup, num_samples=draws, num_chains=2, chain_method="sequential", progress_bar=False)
mcmc.run(jax.random.key(0))
drawn = az.from_numpyro(mcmc)
az.summary(drawn, var_names=["load", "severity"], kind="all")[["mean", "sd", "ess_bulk", "r_hat"]]

# %%
fig, ax = plt.subplots(figsize=(7, 3))
ax.hist(drawn.posterior["severity"].values.ravel(), bins=40)
ax.axvline(0.0, color="black", linewidth=1)
ax.set(xlabel="severity: beyond 0 the bridge fails", ylabel="draws")
plt.show()

# %% [markdown]
# What did the storms look like? `Predictive` replays them, with whatever else the program says.

# %%
replayed = Predictive(problem.conditioned(0.2), posterior_samples=mcmc.get_samples())(jax.random.key(1))
{name: value.shape for name, value in replayed.items()}

# %% [markdown]
# ## An autoguide as the proposal
#
# SVI trains a Gaussian on the softened program in standard normal coordinates. As a proposal it need not be right, only
# not too thin: its draws are weighed, a tenth come from the adversary itself, and catastrophes that tempering finds show
# what it leaves out.

# %%
softened = problem.conditioned(0.3, gaussianized=True)
auto = AutoMultivariateNormal(softened)
svi = SVI(softened, auto, numpyro.optim.Adam(0.02), Trace_ELBO(num_particles=8))
fitted = svi.run(jax.random.key(0), 300 if QUICK else 1_000, progress_bar=False)
mine = estimate(problem, guide=Autoguide(auto, fitted.params), budget=20_000, seed=0)
print(
    f"with the autoguide {mine.log_prob:.2f} ± {mine.std_error:.2f}, by default {result.log_prob:.2f} ± {result.std_error:.2f}"
)
mine

# %% [markdown]
# There are two ways to fail, and a Gaussian has one mode. If it settled on one cable, the check above says so, and the
# answer is not converged; if it covers both, thinly, the error is wide.
#
# ## Any adversary near this one
#
# How high can P get under an adversary within so many nats of D?

# %%
result.plot("worst_case")
plt.show()
