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
# # A first estimate
#
# How likely is it that a model does something catastrophic? probest takes three things: an **adversary** D, a
# probabilistic program that returns an observation *x*; a **model** M, *x* → *y*; a **checker** C, which gives a severity
# to (*x*, *y*): at least 0 for a catastrophe, and below 0 how far from one things are. It estimates log P, the
# log-probability that the severity is at least 0 when *x* comes from D.
#
# Here a mast leans in forty gusts of wind. The same problem is written twice, in NumPyro and in Pyro: probest sees from
# the program which library it is, and the rest is the same.

# %%
import math

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import pyro
import pyro.distributions as pdist
import torch
from jax.tree_util import Partial
from scipy.stats import norm

from probest import Problem, estimate

GUSTS = 40

# %% [markdown]
# ## In NumPyro
#
# Programs are written for **one** observation; the batching is not yours to do. The model is a plain function here; as a
# `Partial` it owns parameters, so that gradients reach them.


# %%
def adversary():
    with numpyro.plate("gust", GUSTS):
        return numpyro.sample("wind", dist.Normal(0.0, 1.0))


def lean(params, wind):
    return params["stiffness"] * wind.sum() / math.sqrt(GUSTS)


def checker(wind, lean):
    return lean - 6.0


mast = Problem(adversary, Partial(lean, {"stiffness": jnp.array(1.0)}), checker)
result = estimate(mast, seed=0)
result

# %% [markdown]
# The sum of the gusts is normal, so the exact answer is log Φ(−6). P is about one in a billion, and some hundred runs of
# the model were enough: where the severity has a gradient, it leads to the boundary of the event.

# %%
exact = norm.logcdf(-6.0)
print(f"log P = {result.log_prob:.3f} ± {result.std_error:.3f}, exactly {exact:.3f}, from {result.calls} model calls")
print(f"95 % interval {result.lower:.3f} to {result.upper:.3f}; converged: {result.converged}")
assert abs(result.log_prob - exact) < 0.3

# %% [markdown]
# ## In Pyro
#
# A torch module as the model, everything else as before.


# %%
class Mast(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.stiffness = torch.nn.Parameter(torch.tensor(1.0))

    def forward(self, wind):
        return self.stiffness * wind.sum(-1) / math.sqrt(GUSTS)


def pyro_adversary():
    with pyro.plate("gust", GUSTS):
        return pyro.sample("wind", pdist.Normal(0.0, 1.0))


pyro_mast = Problem(pyro_adversary, Mast(), checker)
pyro_result = estimate(pyro_mast, seed=0)
pyro_result

# %% [markdown]
# ## The argument
#
# An estimate is an argument: a ledger of what each method found, in order. Each row says by how much it moved the answer.

# %%
_ = result.plot()
# %% [markdown]
# ## The catastrophes
#
# A weighted sample of catastrophes comes with every estimate, with the names of the program's sites. Beside draws of D
# they show what goes wrong: here all gusts lean a little the same way.

# %%
result.catastrophes

# %%
_ = result.plot("pairs", most=3)
# %%
_ = result.plot("cases", rows=1, columns=4)
# %% [markdown]
# ## The gradient
#
# `log_prob_at` is log P as a function of the parameters of M (and of D). By JAX it is differentiated as any function, by
# torch with `backward()`. It is what `train` steps down.

# %%
gradient = jax.grad(lambda model: result.log_prob_at(model=model))(mast.model)
print("d log P / d stiffness, NumPyro:", float(gradient.args[0]["stiffness"]))

pyro_result.log_prob_at(model=pyro_mast.model).backward()
print("d log P / d stiffness, Pyro:   ", float(pyro_mast.model.stiffness.grad))

slope = math.exp(norm.logpdf(-6.0) - exact) * 6.0
print("exactly:                       ", slope)
assert abs(float(gradient.args[0]["stiffness"]) / slope - 1) < 0.2

# %% [markdown]
# ## The worst that an adversary can do
#
# How likely would a catastrophe be if D were the worst law within so many nats of this one? That needs no search:

# %%
for nats in (0.0, 1.0, 5.0, 10.0):
    print(f"within {nats:4.1f} nats: P ≤ {result.worst_case(kl=nats):.3g}")

# %% [markdown]
# Where to go on: *Writing the adversary* has programs that are less plain than this one, *Reading an estimate* says when
# not to believe a number.
