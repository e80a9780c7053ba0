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
# # A language model as the adversary
#
# D writes text, M reads it, and C, which can be trusted, knows what M should have said. Here D is a GPT-2 of 230,000
# parameters that learned to write English, sign by sign, from Python's own documentation; the first run of this
# notebook trains it in three minutes and keeps it. Any causal language model of Hugging Face takes its place.

# %%
import math
import os

import matplotlib.pyplot as plt
import pyro
import torch

from models import language
from probest import MonteCarlo, Problem, estimate, search, train
from probest.adversaries.language import CausalLM, LanguageAdversary

QUICK = bool(os.environ.get("PROBEST_QUICK"))  # smaller settings, for tests
SIGNS = 8 if QUICK else 32
LEAST = 3 if QUICK else 8

writer = language.letters_model(steps=15, cached=False) if QUICK else language.letters_model()
lm = CausalLM(writer, language.Letters(), max_new_tokens=SIGNS, batch_size=512)

_ = torch.manual_seed(0)
for text in lm.decode(lm().sample((5,))):
    print(repr(text))

# %% [markdown]
# ## How likely is a text?
#
# `lm()` is a distribution of Pyro like any other: D draws from it. First a catastrophe that anyone can check: a text with
# so many times the letter s. The severity is graded, by how many are missing.

# %%
S = language.SIGNS.index("s") + 1


def adversary():
    return pyro.sample("text", lm())


def too_many(x, y):
    return (y == S).sum() - (LEAST - 0.5)


problem = Problem(adversary, lambda x: x, too_many)
result = estimate(problem, budget=1_000 if QUICK else 60_000, progress=False)
result

# %% [markdown]
# About 30,000 texts say what two million plain ones would: a small network has read some thousand texts, learned from
# each prefix where the severity will end, and weighs the language model's next sign by that. What it proposes is
# corrected by weights. It learns twice, from scratch, and what the second search finds that the first would have
# missed counts against the answer.

# %%
if result.catastrophes is not None:
    for text in lm.decode(torch.as_tensor(result.catastrophes["text"][:5]).long()):
        print(repr(text))

# %% [markdown]
# ## The worst D within so many nats
#
# No adversary within KL nats of D reaches more than `worst_case(KL)`. How near does a learned one come?

# %%
NATS = 3.0 if QUICK else 8.0
settings = {"steps": 2, "refine": 1, "judge": 60} if QUICK else {}
if result.catastrophes is not None:
    family = LanguageAdversary(lm, twist=True, budget=500 if QUICK else 20_000)
    found = search(problem, family, kl=NATS, base=result, progress=False, **settings)
    print(found)
    print(f"at most {result.worst_case(found.kl):.2g}, reached {math.exp(found.log_prob):.2g}")
    found.plot()
    plt.show()

# %% [markdown]
# ## A reader of brackets
#
# Now M is a network that says whether all brackets of a text match, trained on 4,000 texts of D; C counts brackets. It
# is a catastrophe when M is sure of what is wrong. `train` looks for such texts, asks the teacher (the code that counts)
# what M should say of them, and teaches M.

# %%
texts = lm().sample((500 if QUICK else 8_000,))
data = (texts[: len(texts) // 2], language.teacher(texts[: len(texts) // 2]))
unseen = texts[len(texts) // 2 :]
reader = language.Reader()
optimizer = torch.optim.Adam(reader.parameters(), lr=3e-3)
for rows in torch.randint(len(data[0]), (100 if QUICK else 1_500, 64)):
    optimizer.zero_grad()
    language.task_loss(reader, (data[0][rows], data[1][rows])).backward()
    optimizer.step()

brackets = Problem(adversary, reader.eval(), language.checker)
run = train(
    brackets,
    task=language.task_loss,
    data=data,
    teacher=language.teacher,
    until_log_prob=-14.0,
    learning_rate=2e-3,
    max_pressure=0.5,
    steps=10 if QUICK else 300,
    budget=800 if QUICK else 20_000,
    check_budget=800 if QUICK else 10_000,
    audit=MonteCarlo(),
    audit_rounds=0,
    progress=False,
)
run

# %% [markdown]
# What does plain sampling say, of both, on the same texts? And has M become worse at its task?

# %%
with torch.no_grad():
    many = torch.cat([lm().sample((2_000,)) for _ in range(1 if QUICK else 100)])
    for name, model in {"before": reader, "after": run.model}.items():
        hits = int((language.checker(many, model(many)) >= 0.0).sum())
        right = float(((model(unseen) > 0.0) == (language.unmatched(unseen) == 0)).double().mean())
        print(f"{name}: {hits} catastrophes in {len(many):,} texts, {right:.1%} of answers right")

# %% [markdown]
# Training followed the catastrophes by rewriting them: a prefix is kept, and the language model writes another end.

# %%
run.plot()
plt.show()
