"""How good are estimates over text, adversaries that write it, and training against them?

    OMP_NUM_THREADS=1 python benchmarks/language.py --json build/language.json
    OMP_NUM_THREADS=1 python benchmarks/language.py --parts english --seeds 10 --budget 60000
    OMP_NUM_THREADS=1 python benchmarks/language.py --parts adversary training --seeds 5

enumerated: models/language.py's network writes 7 tokens of 5; a catastrophe is that one of them comes up so many times.
The default estimate beside splitting, and plain sampling at as many calls (its error from the binomial law): mean and
root mean square error, the root mean square of the stated error, the share within two of these, and of converged runs.

english: the writer of English; a catastrophe is that a letter comes up so many times in 32 signs. The truth is from
``PLAIN`` plain texts, with its error.

adversary: search() for the worst adversary within ``--kl`` nats on the first of these events: P under what is found,
KL, what that reaches of the closed form, and the share of the KL that the event itself needs, kl(q || P) / KL.

training: the reader of brackets: ordinary; trained on the worst of sampled texts; against a writer that REINFORCE
trains; by train() with a teacher, for as many model calls; and by train() against a pool of writers too. Catastrophes
among ``--judge`` fresh texts, the same for all, and the accuracy.

answers: a language model that goes on with texts, ordinary, trained by the policy gradient of P (REINFORCE), and by
train() without a teacher, for as many model calls: catastrophes among ``--judge`` fresh texts and answers, and the loss
on English that was not trained on.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyro
import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)

if TYPE_CHECKING:
    from probest import Problem
    from probest.adversaries.language import CausalLM

Row = dict[str, "str | float"]
STEPS = 7
PLAIN = {"s, 8 times": (327, 2_007_040), "e, 10 times": (93, 2_007_040), "s, 9 times": (39, 2_007_040)}
"""Catastrophes among plain texts of the writer of English (torch's seeds 5 and 9)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--budget", type=int, default=50_000)
    parser.add_argument("--kl", type=float, default=10.0)
    parser.add_argument("--judge", type=int, default=1_000_000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = {}
    for part in options.parts:
        rows = found[part] = list(PARTS[part](options))
        table = Table(title=f"{part}: {options.seeds} seeds, {options.budget:,} calls")
        for column in rows[0]:
            table.add_column(column)
        for row in rows:
            table.add_row(*(value if isinstance(value, str) else f"{value:.3g}" for value in row.values()))
        Console().print(table)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1))


def seeds_of(options: argparse.Namespace) -> range:
    return range(options.first_seed, options.first_seed + options.seeds)


def compared(event: str, problem: Problem, truth: float, options: argparse.Namespace) -> Iterator[Row]:
    """The default estimate and splitting on one problem."""
    from probest import LearnedProposal, Splitting, estimate

    for method in (LearnedProposal(), Splitting()):
        runs = [
            estimate(problem, budget=options.budget, seed=i, estimator=method, progress=False)
            for i in seeds_of(options)
        ]
        error = np.array([run.log_prob - truth for run in runs])
        stated = np.array([run.std_error for run in runs])
        yield {
            "event": event,
            "log P": truth,
            "method": method.name,
            "mean": float(error.mean()),
            "rms": float(np.sqrt(np.mean(error**2))),
            "stated": float(np.sqrt(np.mean(stated**2))),
            "within 2": float(np.mean(np.abs(error) < 2.0 * stated)),
            "within 20 %": float(np.mean(np.abs(np.expm1(error)) < 0.2)),
            "converged": float(np.mean([run.converged for run in runs])),
            "calls": float(np.mean([run.calls for run in runs])),
            "plain": math.sqrt(-math.expm1(truth) / (options.budget * math.exp(truth))),
            "seconds": float(np.mean([run.seconds for run in runs])),
        }


def counted(lm: CausalLM, token: int, least: int) -> Problem:
    """A token comes up so many times."""
    from probest import Problem

    return Problem(
        lambda: pyro.sample("text", lm()), lambda x: x, lambda _, y: 1.0 * (y == token).sum() - (least - 0.5)
    )


def enumerated(options: argparse.Namespace) -> Iterator[Row]:
    from models import language
    from probest.adversaries.language import CausalLM

    lm = CausalLM(language.tiny(1), max_new_tokens=STEPS, batch_size=4096)
    every = language.sequences(STEPS)
    with torch.no_grad():
        log_p = lm().log_prob(every)
    for token in range(3):
        for least in range(4, STEPS + 1):
            truth = float(log_p[(every == token).sum(1) >= least].logsumexp(0))
            if -20.0 < truth < -3.0:
                yield from compared(f"{token}, {least} times", counted(lm, token, least), truth, options)


def english(options: argparse.Namespace) -> Iterator[Row]:
    from models import language

    for event, (hits, n) in PLAIN.items():
        sign, least = event.split(", ")
        problem = counted(language.english_writer(), language.SIGNS.index(sign) + 1, int(least.split()[0]))
        for row in compared(event, problem, math.log(hits / n), options):
            yield {**row, "truth ±": 1.0 / math.sqrt(hits)}


def adversary(options: argparse.Namespace) -> Iterator[Row]:
    from models import language
    from probest import estimate, search
    from probest.adversaries.language import LanguageAdversary

    lm = language.english_writer()
    problem = counted(lm, language.SIGNS.index("s") + 1, 8)
    hits, n = PLAIN["s, 8 times"]
    given = hits / n
    for seed in seeds_of(options):
        base = estimate(problem, budget=options.budget, seed=seed, progress=False)
        own = LanguageAdversary(lm, twist=True)
        found = search(problem, own, kl=options.kl, base=base, seed=seed, progress=False)
        q = math.exp(found.log_prob)
        needed = q * math.log(q / given) + (1.0 - q) * math.log((1.0 - q) / (1.0 - given))
        yield {
            "seed": str(seed),
            "q(C)": q,
            "KL": found.kl,
            "of the closed form": found.efficiency,
            "kl(q || P) / KL": needed / found.kl,
            "calls": float(found.calls),
            "seconds": found.seconds,
        }


def training(options: argparse.Namespace) -> Iterator[Row]:
    from models import language
    from probest import MonteCarlo, Pool, train
    from probest.adversaries.language import LanguageAdversary

    texts = written(options.judge)
    for seed in seeds_of(options):
        ordinary = language.train_model(seed=seed)
        settings = {**language.TRAINING, "audit": MonteCarlo(), "audit_rounds": 0, "seed": seed, "progress": False}
        settings["budget"] = 1_000  # of the estimates before and after, which nobody reads here
        problem, data = language.problem(ordinary), language.load_data()[0]
        family = LanguageAdversary(language.english_writer(), twist=True, budget=5_000)
        pool = Pool(kl=3.0, every=100, steps=20, most=2, family=family)
        run = train(problem, task=language.task_loss, data=data, **settings)
        played = train(problem, task=language.task_loss, data=data, adversaries=pool, **settings)
        calls = run.costs.steps.calls + run.costs.looks.calls
        models = {
            "ordinary": (ordinary, 0),
            "worst of sampled": (language.adversarial_baseline(ordinary, calls, seed), calls),
            "REINFORCE adversary": (language.reinforced_adversary(ordinary, calls, seed), calls),
            "train()": (run.model, calls),
            "train(), pool of writers": (played.model, played.costs.steps.calls + played.costs.looks.calls),
        }
        for name, (model, spent) in models.items():
            with torch.no_grad():
                hits = sum(int((language.checker(part, model(part)) >= 0.0).sum()) for part in texts.split(4_096))
            row: Row = {
                "seed": str(seed),
                "training": name,
                "catastrophes": float(hits),
                "of texts": float(len(texts)),
                "accuracy": language.accuracy(model),
                "calls": float(spent),
            }
            print(json.dumps(row), file=sys.stderr)
            yield row


def written(count: int) -> torch.Tensor:
    """So many texts of the writer of English, the same at each call; minutes for a million."""
    from models import language

    law = language.english_writer()()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1_000)
        return torch.cat([law.sample((2_048,)).to(torch.uint8) for _ in range(-(-count // 2_048))])


def answers(options: argparse.Namespace) -> Iterator[Row]:
    from models import language
    from probest import MonteCarlo, estimate, train

    for seed in seeds_of(options):
        problem = language.answer_problem()
        settings = {**language.ANSWER_TRAINING, "audit": MonteCarlo(), "audit_rounds": 0, "seed": seed}
        run = train(problem, data=language.answer_data()[0], progress=False, **settings)
        calls = run.costs.steps.calls + run.costs.looks.calls
        models = {
            "ordinary": problem.model,
            "policy gradient": language.reinforced(problem.model, calls, seed),
            "train()": run.model,
        }
        for name, model in models.items():
            told = estimate(
                language.answer_problem(model), estimator=MonteCarlo(precision=None), budget=options.judge,
                seed=1_000 + seed, progress=False,
            ).conclusion  # fmt: skip
            with torch.no_grad():
                loss = float(language.answer_loss(model, language.answer_data()[1]))
            yield {
                "seed": str(seed),
                "training": name,
                "catastrophes": told.diagnostics["hits"],
                "of answers": told.diagnostics["samples"],
                "nats a sign": loss,
                "calls": 0.0 if name == "ordinary" else float(calls),
            }


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
    "enumerated": enumerated,
    "english": english,
    "adversary": adversary,
    "training": training,
    "answers": answers,
}

if __name__ == "__main__":
    main()
