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
# # Bringing your own model, checker, guide and estimator
#
# Everything in a problem is a plain callable, and every estimator is a small object with `name` and `run`. What does not
# fit is refused before anything runs, and `probest.testing` has the checks that probest runs on its own parts.

# %%
import math
import os

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from scipy.stats import norm

from probest import Importance, Problem, ProgramGuide, estimate
from probest.checkers import all_of, any_of, black_box, negate
from probest.diagnostics import log_mean_exp, mean_interval
from probest.estimators import Evidence, Meter, Run, generator
from probest.testing import check_checker, check_estimator, check_model, check_program

QUICK = bool(os.environ.get("PROBEST_QUICK"))  # smaller settings, for tests

# %% [markdown]
# ## A model
#
# Any torch module, equinox or nnx module, `Partial`, or function. It is put into evaluation mode while it is estimated, and
# put back. Where a module cannot be vmapped (an LSTM, say), it is called on whole batches.


# %%
class Lookout(torch.nn.Module):
    """Reads sixteen seconds of radar, and says how hard to brake: a recurrent network."""

    def __init__(self):
        super().__init__()
        self.reads = torch.nn.LSTM(2, 8, batch_first=True)
        self.says = torch.nn.Linear(8, 1)

    def forward(self, echoes):
        return self.says(self.reads(echoes)[0][..., -1, :])


with torch.random.fork_rng():
    torch.manual_seed(0)
    lookout = Lookout()


def echoes():
    with pyro.plate("second", 16):
        return pyro.sample("echo", dist.Normal(torch.zeros(2), 1.0).to_event(1))


def too_hard(x, braking):
    return braking[0] - 0.05


braking = Problem(echoes, lookout, too_hard)
check_program(echoes)
check_model(braking)
check_checker(braking)
soft = estimate(braking, budget=10_000 if QUICK else 50_000, precision=0.15, seed=0)
soft

# %% [markdown]
# ## A checker
#
# A severity is at least 0 for a catastrophe, larger for worse, and below 0 as far from one as things are: that is what
# leads the search. Severities of parts combine to that of the whole; scale them alike.


# %%
def closing(x, braking):  # the last echo, nearer than two
    return x[-1, 0] - 2.0


def brakes(x, braking):
    return braking[0] + 0.1


unsafe = all_of(closing, negate(brakes))  # something is close, and M does not brake
ignored = estimate(
    Problem(echoes, lookout, any_of(unsafe, too_hard)), budget=10_000 if QUICK else 50_000, precision=0.15
)
ignored


# %% [markdown]
# A checker may also be any function of NumPy arrays: a simulator, a rule book, a person. It has no gradient then; a
# severity is learned that leads the search, and the checker still decides. `checker_budget` bounds what it is asked.


# %%
def simulator(x, braking):
    return float(x[:, 0].sum() / 4.0 - 4.5)


asked = estimate(Problem(echoes, lookout, black_box(simulator)), checker_budget=3_000, precision=0.15, seed=0)
exact = norm.logcdf(-4.5)  # the sum of sixteen echoes is normal
print(f"log P = {asked.log_prob:.2f} ± {asked.std_error:.2f}, exactly {exact:.2f}")
asked

# %% [markdown]
# ## A guide
#
# You may know where catastrophes are. A guide is a program that draws D's sites from another law. A share of the samples
# comes from D itself all the same, so that a guide which is wrong costs precision, and shows in the diagnostics.


# %%
def nearer():
    with pyro.plate("second", 16):
        pyro.sample("echo", dist.Normal(torch.tensor([1.2, 0.0]), 1.0).to_event(1))


guided = estimate(
    Problem(echoes, lookout, lambda x, braking: x[:, 0].sum() / 4 - 4.5),
    estimator=Importance(guide=ProgramGuide(nearer), precision=0.1),
    budget=20_000,
    seed=0,
)
print(f"log P = {guided.log_prob:.2f} ± {guided.std_error:.2f}, exactly {exact:.2f}")
guided

# %% [markdown]
# ## An estimator
#
# A frozen object with `name` and `run(event, budget, seed)`. It sees the problem as severities of standard normal points
# `z`, in NumPy, and leaves evidence. The meter counts calls and refuses more than the budget. What a method needs of an
# event it says as data (`needs`), and is refused by name where that is missing.


# %%
class Spread:
    """Draws wider than D, weighted back: the wider, the further it sees, and the less it sees sharply."""

    name = "spread"
    needs = frozenset({"unconditioned"})

    def __init__(self, scale=1.5):
        self.scale = scale

    def run(self, event, *, budget, seed):
        meter = Meter(event, budget)
        z = self.scale * generator(seed).standard_normal((budget, event.dim))
        log_ratio = event.dim * math.log(self.scale) - 0.5 * (1 - self.scale**-2) * np.sum(z**2, axis=1)
        log_w = np.where(meter.evaluate(z).severity >= 0.0, log_ratio, -np.inf)
        log_p, error = log_mean_exp(log_w)
        low, high = mean_interval(log_w)
        return Run.of(
            Evidence(
                self.name, min(log_p, 0.0), error, (low, min(high, 0.0)), "unbiased", meter.calls, meter.seconds,
                converged=error < 0.1, notes=() if error < 0.1 else ("raise the budget.",),
            )
        )  # fmt: skip


check_estimator(Spread(1.3), budget=1_000 if QUICK else 4_000)
own = estimate(Problem(echoes, lookout, lambda x, braking: x[:, 0].sum() / 4 - 3.0), estimator=Spread(1.3), seed=0)
own

# %% [markdown]
# It is an estimate as any other: with a ledger, catastrophes, a gradient, plots, a report.

# %%
_ = own.plot()
