"""What all estimates have in common: a ledger with a conclusion, cases to look at, and ways to show and keep them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
from scipy import optimize
from scipy.special import ndtri

from probest.evidence import Evidence, Floats
from probest.markov import lower_bound, upper_bound

if TYPE_CHECKING:
    import os
    from pathlib import Path

    from probest.programs.base import Observed

__all__ = ["Case", "Catastrophes", "Result", "Sample", "WorstCase", "WorstCaseCurve"]


class Result:
    """How likely a catastrophe is, and how far to believe it.

    ledger: the evidence in the order in which it was gathered; the last line is the conclusion. All log-probabilities
    are natural logarithms; intervals are intervals of log P. calls: model calls spent (a forward pass is 1, a gradient
    3). seconds: wall clock. settings: what makes the run reproducible: versions, seed, budget, estimator.
    """

    ledger: tuple[Evidence, ...]
    calls: int
    seconds: float
    settings: Mapping[str, Any]

    @property
    def conclusion(self) -> Evidence:
        """The last line of the ledger."""
        return self.ledger[-1]

    @property
    def log_prob(self) -> float:
        """log P; ``-inf`` when no catastrophe was found (then ``upper`` says how likely it can still be)."""
        return self.conclusion.log_prob

    @property
    def prob(self) -> float:
        """P; 0 if it underflows."""
        return math.exp(self.log_prob)

    @property
    def std_error(self) -> float:
        """Standard error of ``log_prob`` in nats (about the relative error of P)."""
        return self.conclusion.std_error

    @property
    def converged(self) -> bool:
        """Whether the methods agree and their diagnostics hold. If not, ``advice`` says what to do."""
        return self.conclusion.converged

    @property
    def advice(self) -> tuple[str, ...]:
        """What was wrong and what to do about it; empty when there is nothing to say."""
        return self.conclusion.notes

    @property
    def lower(self) -> float:
        """Lower end of the 95 % interval of log P; ``-inf`` when nothing bounds it from below."""
        return self.conclusion.interval[0]

    @property
    def upper(self) -> float:
        """Upper end of the 95 % interval of log P."""
        return self.conclusion.interval[1]

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Interval of log P at a confidence ``level`` in (0, 1), rescaled from the 95 % one."""
        if not 0 < level < 1:
            raise ValueError(f"level={level!r}: expected a number between 0 and 1, such as 0.95")
        lower, upper = self.conclusion.interval
        if not math.isfinite(self.log_prob):
            # No hits: (1 - u)^n = alpha at the exact binomial bound u.
            miss = -math.expm1(upper) if upper < 0 else 0.0
            power = math.log1p(-level) / math.log(0.05)
            return lower, math.log(-math.expm1(power * math.log(miss))) if 0 < miss < 1 else upper
        factor = float(ndtri(0.5 + level / 2) / ndtri(0.975))
        return self.log_prob + factor * (lower - self.log_prob), min(
            self.log_prob + factor * (upper - self.log_prob), 0.0
        )

    def lower_bound(self, level: float = 0.95) -> float:
        """What log P is above with probability ``level`` in (0, 1), whatever estimates missed; ``-inf`` for nothing.

        It rests on their having mean P and nothing else (:mod:`probest.markov`; tempering and line sampling, which
        adapt, have it nearly), so it needs no trust in their errors; it is lower than :attr:`lower`. There is none
        (``-inf``) for a conditioned adversary, or with a recogniser: a ratio has no such mean.
        """
        if not 0 < level < 1:
            raise ValueError(f"level={level!r}: expected a number between 0 and 1, such as 0.95")
        if self.observed or any(line.log_evidence for line in self.ledger):
            return -math.inf
        return lower_bound(self.ledger, level)

    def upper_bound(self, level: float = 0.95) -> float:
        """What log P is below with probability ``level`` in (0, 1), whatever estimates missed: by plain draws alone.

        0 where there were none of a number fixed beforehand, for a conditioned adversary, or with a recogniser.
        """
        if not 0 < level < 1:
            raise ValueError(f"level={level!r}: expected a number between 0 and 1, such as 0.95")
        if self.observed or any(line.log_evidence for line in self.ledger):
            return 0.0
        return upper_bound(self.ledger, level)

    def worst_case(self, kl: float, *, level: float = 0.95) -> WorstCase:
        """The largest probability of a catastrophe under any adversary q with KL(q ‖ D) ≤ ``kl`` nats.

        Closed form: it solves kl_bin(q ‖ P) = kl, by the data-processing inequality; tilting D towards the catastrophes
        attains it. 1 when ``kl`` ≥ −log P. It is a number with an ``interval``, what it is at the ends of that of log P
        at confidence ``level``.
        """
        if not kl >= 0:
            raise ValueError(f"kl={kl!r}: expected a number of nats, 0 or more")
        if not math.isfinite(self.log_prob):
            raise ValueError("no catastrophe was found, so only a bound is known: estimate again with a larger budget")
        lower, upper = self.interval(level)
        return WorstCase(_reached(self.log_prob, kl), (_reached(lower, kl), _reached(upper, kl)))

    def worst_case_curve(self, kl: Sequence[float] | Floats | None = None, *, level: float = 0.95) -> WorstCaseCurve:
        """:meth:`worst_case` for many ``kl``: by default from 0 to where any catastrophe is certain."""
        if kl is None:
            end = self.interval(level)[0] if math.isfinite(self.lower) else self.log_prob
            kl = np.linspace(0.0, -end if math.isfinite(end) else 1.0, 101)
        nats = np.asarray(kl, dtype=np.float64)
        found = [self.worst_case(float(one), level=level) for one in nats]
        return WorstCaseCurve(
            nats,
            np.array([float(one) for one in found]),
            np.array([one.interval[0] for one in found]),
            np.array([one.interval[1] for one in found]),
        )

    # Cases ------------------------------------------------------------------------------------------------------------

    @property
    def catastrophes(self) -> Catastrophes | None:
        """A weighted sample of catastrophes with their named sites, or None if none was found."""
        raise NotImplementedError

    def blocks(self, rows: int) -> Iterator[Catastrophes]:
        """All the catastrophes, so many at a time; their weights sum to 1 over all blocks."""
        if self.catastrophes is not None:
            yield self.catastrophes

    @property
    def drawn(self) -> Sample | None:
        """Some draws of the adversary itself, for comparison; None where it cannot be drawn from."""
        raise NotImplementedError

    @property
    def nearest(self) -> Case | None:
        """The catastrophe nearest to the middle of the adversary that was seen, or, where there was none, the case of
        greatest severity: what comes nearest to one. None if every case that was tried is impossible.
        """
        raise NotImplementedError

    @property
    def plates(self) -> Mapping[str, Sequence[str | None]]:
        """For each latent site, and each leading axis of its values, the plate that it lies along, or None."""
        return {}

    @property
    def observed(self) -> Mapping[str, Observed]:
        """Values of the adversary's observed sites, and their plates."""
        return {}

    # Showing and keeping ----------------------------------------------------------------------------------------------

    def plot(self, kind: str = "ledger", **options: Any) -> Any:
        """A picture, in matplotlib.

        Args:
            kind: ``"ledger"``: how each method moved the answer. ``"intervals"``: the methods, or with ``strata`` the
                strata, beside each other. ``"path"``: severity on tempering's way to the event. ``"pairs"``: where
                catastrophes lie, beside draws of D. ``"cases"``: some catastrophes as the model saw them.
                ``"diagnostics"``: effective sample size and Pareto k of each method. ``"worst_case"``: what other
                adversaries can reach (:meth:`worst_case_curve`).
            options: of the function in :mod:`probest.report.plots` that draws it, such as ``ax`` or ``show``.

        Returns:
            The matplotlib Axes, or an array of them.

        Raises:
            ValueError: the kind is not known, or the result holds nothing to draw.
        """
        from probest.report.plots import plot_result

        return plot_result(self, kind, **options)

    def report(self, path: str | os.PathLike[str], *, title: str = "", show: Callable[..., None] | None = None) -> Path:
        """Write an HTML file that stands alone: verdict, ledger, pictures, nearest case, and how to run it again.

        Args:
            path: where to.
            title: of the report.
            show: ``show(ax, case)`` draws one case, as in ``plot(kind="cases")``.
        """
        from probest.report.document import write_report

        return write_report(self, path, title=title, show=show)

    def to_arviz(
        self, *, dims: Mapping[str, Sequence[str]] | None = None, coords: Mapping[str, Any] | None = None
    ) -> Any:
        """Catastrophes as ArviZ data: an ``InferenceData``, or a ``DataTree`` with ArviZ 1.0 and later.

        Args:
            dims: for a site, names of the axes of its values that plates do not name.
            coords: for a dimension, the labels along it.
        """
        from probest.report.arviz import to_arviz

        return to_arviz(self, dims=dims, coords=coords)

    def to_netcdf(
        self,
        path: str | os.PathLike[str],
        *,
        dims: Mapping[str, Sequence[str]] | None = None,
        coords: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write all that :meth:`to_arviz` has, and every particle, to a netCDF file; :func:`probest.load` reads it."""
        from probest.report.netcdf import to_netcdf

        return to_netcdf(self, path, dims=dims, coords=coords)

    def __rich__(self) -> Any:
        from probest.report.tables import estimate_table

        return estimate_table(self)

    def __str__(self) -> str:
        from probest.report.tables import estimate_text

        return estimate_text(self)

    def _repr_html_(self) -> str:
        from probest.report.html import estimate_html

        return estimate_html(self)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(log_prob={self.log_prob:.4g}, std_error={self.std_error:.2g}, "
            f"interval=({self.lower:.4g}, {self.upper:.4g}), converged={self.converged}, calls={self.calls})"
        )


class WorstCase(float):
    """A probability with its ``interval``."""

    interval: tuple[float, float]

    def __new__(cls, value: float, interval: tuple[float, float]) -> Self:
        one = super().__new__(cls, value)
        one.interval = interval
        return one

    def __getnewargs__(self) -> tuple[Any, ...]:
        return float(self), self.interval


class WorstCaseCurve(NamedTuple):
    """What adversaries within so many nats can reach: each ``(n,)``; kl in nats, the others probabilities."""

    kl: Floats
    prob: Floats
    lower: Floats
    upper: Floats


def _reached(log_p: float, kl: float) -> float:
    """The q with kl_bin(q ‖ P) = kl and q ≥ P; 0 where P is."""
    if kl >= -log_p:
        return 1.0
    if log_p == -math.inf:
        return 0.0
    log_safe = math.log1p(-math.exp(log_p))

    def excess(log_q: float) -> float:
        q = math.exp(log_q)
        rest = 0.0 if q >= 1 else (1 - q) * (math.log1p(-q) - log_safe)
        return q * (log_q - log_p) + rest - kl

    return 1.0 if excess(0.0) < 0 else math.exp(float(optimize.brentq(excess, log_p, 0.0, xtol=1e-14)))


@dataclass(frozen=True, repr=False)
class Case:
    """One case: values of its sites by name, what M saw and did (pytrees of arrays), and its severity, at least 0 for a
    catastrophe.
    """

    sites: dict[str, np.ndarray]
    severity: float
    observation: Any
    action: Any

    def __repr__(self) -> str:
        from probest.report.tables import case_rows

        shown = "".join(f", {name}={value}" for name, value in case_rows(self))
        return f"Case(severity={self.severity:.4g}{shown})"

    def _repr_html_(self) -> str:
        from probest.report.html import case_html

        return case_html(self)


class Sample(Mapping[str, np.ndarray]):
    """Weighted cases: a mapping from site names to arrays ``(n, ...)``.

    weights: ``(n,)``, summing to 1. severity: ``(n,)``, at least 0 for a catastrophe. observation, action: pytrees of
    ``(n, ...)`` arrays.
    """

    def __init__(
        self, sites: dict[str, np.ndarray], weights: Floats, severity: Floats, observation: Any, action: Any
    ) -> None:
        self._sites = sites
        self.weights = weights
        self.severity = severity
        self.observation = observation
        self.action = action

    def __getitem__(self, name: str, /) -> np.ndarray:
        return self._sites[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.weights)} cases of {', '.join(self._sites)})"


class Catastrophes(Sample):
    """Weighted catastrophes."""
