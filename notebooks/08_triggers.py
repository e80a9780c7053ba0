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
# # Recognised, and not produced
#
# How does a model behave on inputs that nobody can produce, but that anybody would recognise? A hidden trigger is one:
# the model is good on everything that is ever drawn, and catastrophic where its trigger fires. `given=` takes a
# recogniser, a severity like the checker's, and the question becomes log P[C | R].
#
# Here are three triggers of which P[C | R] is known by construction, log Φ(−1) = −1.84, whatever the trigger is.

# %%
import math
import os

import numpy as np
import torch

from models import transformer, trigger
from probest import Problem, estimate
from probest.report.plots import plot_intervals

QUICK = bool(os.environ.get("PROBEST_QUICK"))  # smaller settings, for tests

print(f"truth: {trigger.log_prob():.3f}")

# %% [markdown]
# ## A direction
#
# One draw in a thousand million is recognised. A gradient leads there.

# %%
direction = estimate(trigger.problem("direction"), seed=0)
direction

# %%
assert abs(direction.log_prob - trigger.log_prob()) < 0.3
print(f"log P[R] = {direction.given.log_prob:.2f}, exactly {trigger.log_recognised('direction'):.2f}")

# %% [markdown]
# ## Tests that are flat until three of eight hold
#
# No gradient leads out of where D draws. What searches climb is the number of tests, once they see three. The answer comes
# with a large error, and says that it has not converged: more calls make it smaller.

# %%
tests = estimate(trigger.problem("tests"), budget=20_000 if QUICK else 100_000, seed=0)
print(f"log P[C | R] = {tests.log_prob:.2f} ± {tests.std_error:.2f}, converged: {tests.converged}")

# %% [markdown]
# ## A keyed hash
#
# The trigger fires where 40 bits of a hash of x are 0. Trying is all that anybody can do, so the estimate says that it
# cannot tell: the bound is 1, not a small number.

# %%
keyed = estimate(trigger.problem("hash"), budget=10_000, seed=0)
assert not keyed.converged
assert keyed.upper == 0.0
print(keyed.advice[0])

# %% [markdown]
# The three beside the truth:

# %%
found = {"direction": direction, "tests": tests, "hash": keyed}
_ = plot_intervals(found, exact=trigger.log_prob())

# %% [markdown]
# What cannot be sampled can be read, if one is willing to presume something: moments through the circuit, gate by gate, with
# whatever is not known to be correlated taken as independent. For this hash that is right, to all digits.

# %%
read = trigger.by_independence()
print(f"log P[R] = {read:.4f}, of an ideal hash {-trigger.BITS * math.log(2):.4f}")

# %% [markdown]
# It is a presumption. Let a circuit ask for every bit twice, the second time as `a ^ b ^ a`: the same event, which a reader
# of gates takes for two.

# %%
fooled = trigger.by_independence(twice=True)
print(f"log P[R] = {fooled:.1f}: wrong by {trigger.BITS} bits")
assert abs(read + trigger.BITS * math.log(2)) < 0.01
assert fooled < read - 20

# %% [markdown]
# So a number that was read is believed only where something else bears it out: `MomentPropagation()` claims *heuristic*, and
# the default estimate takes a reading only once tempering agrees with it.
#
# ## A transformer whose rare outputs can be counted
#
# Six tokens of eight values are 262,144 inputs, so P of each output of a small transformer is known exactly. Every site is
# discrete; a Gaussian process over all combinations says which to ask (`Kriging()`).

# %%
exact = transformer.log_probs()
target = int(np.argmin(np.abs(exact - math.log(1e-5))))
rare = estimate(transformer.problem(target), budget=8_192, seed=0)
print(f"output {target}: {rare.log_prob:.3f} ± {rare.std_error:.3f}, exactly {exact[target]:.3f}")
assert abs(rare.log_prob - exact[target]) < 0.3

# %% [markdown]
# Plain sampling would have met it less than once in that many draws. `benchmarks/enumerable.py` sets this beside published
# estimators of rare outputs.
#
# ## Recognisers of your own
#
# Anything that returns a severity will do, and it may look at the action too. How often does a loaded bridge fail in
# storms that come once in a million days?

# %%
import pyro
import pyro.distributions as dist


def weather():
    return pyro.sample("wind", dist.Normal(torch.zeros(8), 1.0).to_event(1))


def strain(wind):
    return wind[:4].sum() / 2.0 + 0.3 * wind[4:].abs().max()


storms = Problem(weather, strain, lambda wind, y: y - 5.0, given=lambda wind: wind[:4].sum() / 2.0 - 4.75)
answer = estimate(storms, seed=0)
print(
    f"log P[fails | storm] = {answer.log_prob:.2f} ± {answer.std_error:.2f}, log P[storm] = {answer.given.log_prob:.2f}"
)
assert answer.converged
