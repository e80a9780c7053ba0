"""How good are estimates over text, where all sequences can be listed?

    OMP_NUM_THREADS=1 python benchmarks/language.py --json build/language.json
    OMP_NUM_THREADS=1 python benchmarks/language.py --seeds 2 --budget 20000

models/language.py's network writes 7 tokens of 5; a catastrophe is that one of them comes up so many times. The default
estimate beside plain sampling at as many calls (its error from the binomial law): mean and root mean square error, the
root mean square of the stated error, the share within two of these, and of converged runs.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import pyro
import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)

STEPS = 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--budget", type=int, default=50_000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    from models import language
    from probest import Problem, estimate
    from probest.adversaries.language import CausalLM

    lm = CausalLM(language.tiny(1), max_new_tokens=STEPS, batch_size=4096)
    every = language.sequences(STEPS)
    with torch.no_grad():
        log_p = lm().log_prob(every)
    rows, table = [], Table(title=f"{options.seeds} seeds, {options.budget:,} calls")
    for column in ("event", "log P", "mean error", "rms", "stated", "plain sampling", "within 2", "converged"):
        table.add_column(column)
    for token in range(3):
        for least in range(4, STEPS + 1):
            truth = float(log_p[(every == token).sum(1) >= least].logsumexp(0))
            if not -12.0 < truth < -3.0:
                continue
            problem = Problem(
                lambda: pyro.sample("text", lm()),
                lambda x: x,
                lambda _, y, token=token, least=least: 1.0 * (y == token).sum() - (least - 0.5),
            )
            runs = [estimate(problem, budget=options.budget, seed=i, progress=False) for i in range(options.seeds)]
            error = np.array([run.log_prob - truth for run in runs])
            stated = np.array([run.std_error for run in runs])
            row = {
                "event": f"token {token}, {least} times",
                "log_prob": truth,
                "mean": float(error.mean()),
                "rms": float(np.sqrt(np.mean(error**2))),
                "stated": float(np.sqrt(np.mean(stated**2))),
                "plain": math.sqrt(-math.expm1(truth) / (options.budget * math.exp(truth))),
                "within": float(np.mean(np.abs(error) < 2.0 * stated)),
                "converged": float(np.mean([run.converged for run in runs])),
            }
            rows.append(row)
            table.add_row(str(row["event"]), *(f"{value:.3g}" for value in list(row.values())[1:]))
    Console().print(table)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
