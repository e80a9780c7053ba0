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
# # Writing the adversary as a program
#
# D is an ordinary NumPyro or Pyro program. It may have latents of most distributions, plates, discrete switches, neural
# decoders and observed sites. This notebook writes one of each, and then runs NumPyro's and Pyro's own inference on
# the composed program.

# %%
import os
from functools import partial

import arviz as az
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpyro
import numpyro.distributions as dist
import pyro
import pyro.distributions as pdist
import torch
from jax.scipy.special import log_ndtr
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal

from probest import Problem, estimate

QUICK = bool(os.environ.get("PROBEST_QUICK"))  # smaller settings, for tests

# %% [markdown]
# ## Latents and plates
#
# A drone flies through wind that has a mood of its own. Sites need not be normal: each becomes a function of standard
# normal coordinates that is exact far into its tails.


# %%
def weather(report=None):
    strength = numpyro.sample("strength", dist.LogNormal(0.5, 0.5))
    if report is not None:  # see below
        numpyro.sample("station", dist.Normal(strength, 0.5), obs=report)
    with numpyro.plate("second", 30):
        gust = numpyro.sample("gust", dist.Normal(0.0, 1.0))
    return strength * gust


def drift(wind):  # M: a controller that takes out half of where it is, one second later
    lag = jnp.arange(30)[:, None] - jnp.arange(30)
    return jnp.where(lag >= 0, 0.5 ** jnp.abs(lag), 0.0) @ wind


flight = Problem(weather, drift, lambda wind, at: at.max() - 25.0)
calm = estimate(flight, budget=5_000 if QUICK else 30_000, precision=0.1, seed=1)
calm

# %% [markdown]
# What is peculiar about these flights? Strong weather, and a few gusts in a row.

# %%
_ = calm.plot("pairs", names=["strength", "observation[5]", "observation[20]"])

# %% [markdown]
# ## Discrete switches
#
# A sensor fails once in a thousand flights. A method that walks would see one value of the switch and call it the world;
# probest holds each value and adds up: P = Σ pₖ Pₖ, with pₖ exact from the program.


# %%
def weather_and_failures():
    broken = numpyro.sample("broken", dist.Bernoulli(1e-3))
    return weather(), broken


def drift_when_blind(x):
    wind, broken = x
    return drift(wind) * (1.0 + 3.0 * broken)


failing = Problem(weather_and_failures, drift_when_blind, lambda x, at: at.max() - 25.0)
both = estimate(failing, budget=5_000 if QUICK else 30_000, precision=0.15, seed=1)
both

# %%
_ = both.plot("intervals")
# %% [markdown]
# ## A neural decoder
#
# Where observations are images or sentences, D is a prior over latents and a decoder. The decoder is fixed here; as a
# module with parameters it could be searched over (`probest.search`). This one is written in Pyro.

# %%
decoder = torch.nn.Sequential(torch.nn.Linear(4, 32), torch.nn.Tanh(), torch.nn.Linear(32, 64))
reader = torch.nn.Sequential(torch.nn.Linear(64, 16), torch.nn.GELU(), torch.nn.Linear(16, 2))
generator = torch.Generator().manual_seed(0)
with torch.no_grad():
    for parameter in (*decoder.parameters(), *reader.parameters()):
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / max(parameter.shape[-1], 8) ** 0.5)


def pictures():
    style = pyro.sample("style", pdist.Normal(torch.zeros(4), 1.0).to_event(1))
    grain = pyro.sample("grain", pdist.Normal(torch.zeros(64), 0.05).to_event(1))
    return decoder(style) + grain


def confident(picture, scores):  # far more sure of the second class than any picture warrants
    return scores[1] - scores[0] - 1.5


seen = Problem(pictures, reader, confident)
odd = estimate(seen, budget=10_000 if QUICK else 30_000, seed=1)
odd

# %%
_ = odd.plot("cases", shape=(8, 8), rows=1, columns=6)
# %% [markdown]
# ## Conditioning
#
# "Given what the station reported": observed sites make D a posterior, which nobody can sample directly. log P is then the
# probability of a catastrophe under that posterior.

# %%
forecast = Problem(partial(weather, 6.0), drift, flight.checker)
given = estimate(forecast, budget=15_000 if QUICK else 60_000, precision=0.2, seed=1)
print(f"log P without the report {calm.log_prob:.2f}, with it {given.log_prob:.2f}")
given

# %% [markdown]
# ## The library's own inference on the composed program
#
# `problem.program` is an ordinary program, D, M and C in one, with `action`, `severity` and `catastrophe` as deterministic
# sites; `problem.gaussianized` is the same in standard normal coordinates, which samplers like. Catastrophe probability
# is an evidence: a factor tempers the program towards the event, and NUTS samples what it is like near there.

# %%
WIDTH = 3.0  # metres: how soft the limit is


def near_catastrophe():
    _, _, severity = flight.gaussianized()
    numpyro.factor("near", log_ndtr(severity / WIDTH))


warmup, draws = (60, 60) if QUICK else (500, 1000)
sampler = MCMC(NUTS(near_catastrophe), num_warmup=warmup, num_samples=draws, num_chains=1, progress_bar=False)
sampler.run(jax.random.PRNGKey(0))
chain = az.from_numpyro(sampler)
az.summary(chain, var_names=["strength", "severity"], kind="stats")

# %% [markdown]
# A chain says what catastrophes are like, not how likely they are, and a chain that started in one mode may stay there.
# Read beside the catastrophes of the estimate, which have weights, and come from several searches:

# %%
found = calm.to_arviz()
fig, ax = plt.subplots(figsize=(7, 2.6))
for name, data in {"estimate": found, "NUTS near the event": chain}.items():
    strength = data["posterior"]["strength"].values.ravel()
    ax.hist(strength, bins=24, density=True, histtype="step", label=name)
ax.set_xlabel("strength")
ax.set_ylabel("density")
_ = ax.legend()

# %% [markdown]
# Pyro's NUTS and SVI run on a Pyro program in the same way. NUTS finds what the estimate found; the guide that SVI fits
# settles somewhere else, just short of the event, with a bound that is nats too low. Guides do that, and do not say so.

# %%
EDGE = 0.1  # narrow: with a wide one, most of the mass would lie well outside of the event


def odd_pictures():
    _, _, severity = seen.gaussianized()
    pyro.factor("near", torch.special.log_ndtr(severity / EDGE))


pyro.set_rng_seed(0)
kernel = pyro.infer.NUTS(odd_pictures, max_tree_depth=6)
pyro_sampler = pyro.infer.MCMC(
    kernel, num_samples=20 if QUICK else 500, warmup_steps=20 if QUICK else 300, disable_progbar=True
)
pyro_sampler.run()

pyro.clear_param_store()
normal = pyro.infer.autoguide.AutoNormal(odd_pictures, init_scale=0.5)
fit = pyro.infer.SVI(odd_pictures, normal, pyro.optim.Adam({"lr": 0.02}), pyro.infer.Trace_ELBO())
losses = [fit.step() for _ in range(60 if QUICK else 2_000)]

styles = {
    "estimate": odd.catastrophes.weights @ odd.catastrophes["style"],
    "NUTS": pyro_sampler.get_samples()["style_base"].mean(0).numpy(),
    "SVI": normal.median()["style_base"].numpy(),
}
for name, style in styles.items():
    print(f"{name:9} mean style near the event", style.round(2))

# %% [markdown]
# ## A variational guide, and what it is worth
#
# So a guide alone is not to be believed. probest uses it as a proposal, with a defensive share drawn from D itself, and
# its diagnostics say how good it was: here SVI did well.


# %%
def tempered():
    _, _, severity = flight.program()
    numpyro.factor("near", log_ndtr(severity / WIDTH))


guide = AutoNormal(tempered, init_scale=0.3)
steps = 100 if QUICK else 3_000
svi = SVI(tempered, guide, numpyro.optim.Adam(0.02), Trace_ELBO(num_particles=4))
fitted = svi.run(jax.random.PRNGKey(1), steps, progress_bar=False).params
found_by_svi = guide.median(fitted)


def proposal():  # D's own sites from another law: around what SVI found, and wider
    numpyro.sample("strength", dist.LogNormal(jnp.log(found_by_svi["strength"]), 0.4))
    with numpyro.plate("second", 30):
        numpyro.sample("gust", dist.Normal(found_by_svi["gust"], 1.1))


guided = estimate(flight, guide=proposal, budget=5_000 if QUICK else 20_000, seed=1)
guided

# %%
_ = guided.plot("diagnostics")
