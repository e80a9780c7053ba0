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
# # Reading an estimate, and when not to believe one
#
# A wrong number that is stated with confidence is worse than none. This notebook goes through what an estimate says of
# itself, and through five cases in which it should not, or not yet, be believed. All problems here have exact answers.

# %%
import math
import os

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from scipy.stats import norm

from probest import MonteCarlo, Problem, Tempering, audit, estimate
from probest.report.plots import plot_intervals

QUICK = bool(os.environ.get("PROBEST_QUICK"))  # smaller settings, for tests


def normals(n):
    return lambda: numpyro.sample("x", dist.Normal(0.0, 1.0).expand([n]).to_event(1))


# %% [markdown]
# ## A healthy one
#
# Four ways to fail, equally far: log P = log(4 Φ(−4.5)), to seven digits.

# %%
four = Problem(normals(20), lambda x: x[:4], lambda x, y: jnp.abs(y[:2]).max() - 4.5)
exact = math.log(4) + norm.logcdf(-4.5)
healthy = estimate(four, seed=0)
print(f"exactly {exact:.3f}")
healthy

# %% [markdown]
# - The **ledger** has a row for each method, in order. Read the last column: methods that look in different ways move
#   the answer little. The last row, in bold, is the conclusion.
# - **log P ± error** is in nats: ±0.05 is about ±5 % of P. The **interval** is for log P; with a fresh seed it should
#   cover the truth 95 times in 100.
# - The **claim** says what kind of number a row is: *unbiased* (has mean P), *consistent* (tends to P), a *lower* or *upper*
#   bound, or *heuristic* (leads others, claims nothing).
# - **Converged** is a verdict on all of it: methods agree, their diagnostics pass, the precision is reached.

# %%
print("converged:", healthy.converged)
print("advice:   ", healthy.advice or "none")
for row in healthy.ledger:
    print(f"{row.method:20} {row.claim:11}", {name: round(value, 2) for name, value in row.diagnostics.items()})

# %% [markdown]
# Effective sample size says how many independent cases a sample is worth; the Pareto k of its weights, whether they have
# a variance worth the name (below 0.7). `nearest` is the likeliest catastrophe that was met, ready to be looked at.

# %%
healthy.nearest

# %% [markdown]
# ## 1. Nothing was found
#
# A checker that says only yes or no leads nowhere. Without a catastrophe there is a bound, not a zero: three over the
# number of draws. It is not converged, and the advice says what to change.

# %%
blind = Problem(normals(20), lambda x: x[:4], lambda x, y: jnp.abs(y[:2]).max() > 7.0)
nothing = estimate(blind, budget=2_000 if QUICK else 20_000, seed=0)
print(f"log P = {nothing.log_prob}, at most {nothing.upper:.2f}")
print(nothing.advice)
nothing

# %% [markdown]
# ## 2. Too small a budget
#
# The number is the best that there is; the verdict is that it is not enough. The interval is meant to hold all the same.

# %%
ring = Problem(normals(30), lambda x: x, lambda x, y: jnp.sum(y**2) - 110.0)
hasty = estimate(ring, budget=2_500, estimator=Tempering(particles=64), seed=0)
print(hasty.converged, hasty.advice)
_ = hasty.plot()

# %% [markdown]
# ## 3. A mode that one method does not see
#
# Of two ways to fail, one is fifteen times as likely and has a severity that rises steeply, close to it. A single method can miss
# it and still look sure of itself: that is why the default runs several, and why estimates that disagree are reported,
# not averaged. Where two disagree, the higher one is nearer: what was missed makes an estimate low, never high.


# %%
def hidden(x, y):
    plain = y[0] - 5.5
    steep = 40.0 * (y[1] - 5.0)
    return jnp.maximum(plain, steep)


two = Problem(normals(10), lambda x: x[:2], hidden)
truth = float(jnp.logaddexp(norm.logcdf(-5.5), norm.logcdf(-5.0)))
found = {
    "default": estimate(two, seed=0),
    "tempering, 64 particles": estimate(two, budget=4_000, estimator=Tempering(particles=64, gradient=False), seed=0),
    "tempering": estimate(two, budget=20_000, estimator=Tempering(), seed=0),
}
for name, one in found.items():
    print(f"{name:25} {one.log_prob:8.2f} ± {one.std_error:.2f}  converged: {one.converged}")
_ = plot_intervals(found, exact=truth)
# %% [markdown]
# ## 4. A number that was selected
#
# Whoever chooses the best of many models by an estimator, or trains against it, has an estimate that is too low: the
# optimizer's curse. `audit` asks several methods afresh, from seeds that nobody has chosen by, and believes the highest
# that stands.

# %%
checked = audit(two, methods=[Tempering(), MonteCarlo(), Tempering(gradient=False)], budget=30_000, seed=7)
print(f"audit {checked.log_prob:.2f} ± {checked.std_error:.2f}, exactly {truth:.2f}")
checked

# %% [markdown]
# ## 5. A problem that is not the one you meant
#
# What cannot be estimated is refused before anything runs, with the part that is at fault and what to do about it.

# %%
for wrong in (
    Problem(normals(3), lambda x: x, lambda x, y: y),
    Problem(normals(3), lambda x: x, lambda x, y: jnp.log(y[0] - 9.0)),
):
    try:
        estimate(wrong)
    except Exception as error:
        print(f"{type(error).__name__}: {error}\n")

# %% [markdown]
# What no estimate can know: whether D draws what the world will, and whether C knows a catastrophe when it sees one. log P
# is about D and C as they are written.
#
# ## To pass it on
#
# `report` writes an HTML file that stands alone; `to_netcdf` keeps every particle, and `probest.load` reads it back.

# %%
import tempfile
from pathlib import Path

import probest

folder = Path(tempfile.mkdtemp())
healthy.report(folder / "report.html", title="Four ways to fail")
again = probest.load(healthy.to_netcdf(folder / "healthy.nc"))
print(again)
print({name: again.settings[name] for name in ("seed", "budget", "problem")})
