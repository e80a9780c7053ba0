"""The pictures of README.md and of the documentation's front page: ``make figures`` writes them into docs/_static.

The digits' ledger and catastrophes, and the pendulum's training. Takes about two minutes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")

import matplotlib.pyplot as plt
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "docs" / "_static"
sys.path.insert(0, str(ROOT))

from models import digits, pendulum
from probest import Problem, estimate, train

STYLE = {"font.size": 9, "savefig.dpi": 150, "figure.facecolor": "white"}


def save(axes: Any, name: str) -> None:
    figure = np.ravel(axes)[0].figure
    figure.savefig(OUT / f"{name}.png", metadata={"Software": None})  # equal pictures are equal files
    plt.close(figure)
    sys.stdout.write(f"docs/_static/{name}.png\n")


def main() -> None:
    OUT.mkdir(exist_ok=True)
    with plt.rc_context(STYLE):
        reader = estimate(digits.problem(), budget=60_000, seed=0, progress=False)
        save(reader.plot("cases", show=digits.show, rows=2, columns=7), "cases")
        model = pendulum.train_model()
        problem: Problem = pendulum.problem(model)
        settings = {"seed": 0, "progress": False, **pendulum.TRAINING}
        run = train(problem, task=pendulum.task_loss, data=pendulum.load_data()[0], **settings)
        save(run.before.plot(), "ledger")
        save(run.plot(), "training")
        save(run.before.plot("cases", show=pendulum.show, rows=1, columns=4), "falls")
        save(run.before.plot("pairs", most=3), "pairs")


if __name__ == "__main__":
    main()
