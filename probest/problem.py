"""The triple that everything is about: an adversary D, a model M and a checker C."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from probest.checkers import Checker, all_of
from probest.programs.compile import compile_event
from probest.programs.event import Batching, Event, ProblemError, compose
from probest.programs.strata import Strata, strata_of

__all__ = ["Problem"]


class Problem:
    """How likely is it that model M does something catastrophic on observations from adversary D?

    Args:
        adversary: a Pyro or NumPyro program, written for one observation, that returns the observation: any pytree of
            arrays. If it takes one argument it is given the model, runs the closed loop itself, and returns the pair
            ``(observation, action)``.
        model: ``action = model(observation)``: a torch ``nn.Module``, an equinox or nnx module,
            ``jax.tree_util.Partial(fn, params)``, or a function. Gradients reach the arrays of a module or Partial;
            what a plain function closes over is a constant.
        checker: ``severity = checker(observation, action)``, a scalar: at least 0 is a catastrophe, larger is worse.
            It may be a bool, but then nothing tells how far a safe case is from a catastrophe. Build it from others, or
            from a function of NumPy arrays, with :mod:`probest.checkers`.
        given: a recogniser, ``severity = given(observation)`` or ``given(observation, action)``: an observation counts
            where it is at least 0, and log P is log P[catastrophe | recognised]. A bool says less, as of a checker.
        backend: ``"torch"`` or ``"jax"``; by default it follows from the library whose sites the adversary executes.
        batching: ``"vmap"`` batches everything; ``"model"`` batches adversary and checker and calls the model on the
            whole batch (for models that cannot be vmapped); ``"loop"`` runs one case at a time. None is ``"vmap"``, or
            ``"model"`` where only that works (torch's LSTM and GRU) and gives the numbers of single runs.
        chunk_size: how many cases are alive at once; the default keeps memory under 2 GB for models whose activations
            are not much larger than their input.

    The program is run and checked when :attr:`event` is first needed. Raises ProblemError, SiteError or SeverityError
    then, naming the part or site that is at fault.
    """

    def __init__(
        self,
        adversary: Callable[..., Any],
        model: Callable[..., Any],
        checker: Callable[..., Any],
        *,
        given: Callable[..., Any] | None = None,
        backend: str | None = None,
        batching: Batching | None = None,
        chunk_size: int | None = None,
    ) -> None:
        for name, part in (("adversary", adversary), ("model", model), ("checker", checker), ("given", given)):
            if not callable(part) and not (name == "given" and part is None):
                raise ProblemError(f"{name} is a {type(part).__name__}: it must be callable")
        if batching not in (None, "vmap", "model", "loop"):
            raise ProblemError(f"batching={batching!r} is not known: choose 'vmap', 'model' or 'loop'")
        if chunk_size is not None and chunk_size < 1:
            raise ProblemError(f"chunk_size={chunk_size} must be at least 1")
        self.adversary = adversary
        self.model = model
        self.checker = checker
        self.given = given
        self._recogniser = None if given is None else _Recogniser(given, _takes_action(given))
        self.backend = backend
        self.batching: Batching | None = batching
        self.chunk_size = chunk_size

    @cached_property
    def event(self) -> Event:
        """The problem as functions of standard-normal coordinates; with ``given``, recognised and catastrophic both."""
        if self.given is not None:
            return self.joint.event
        return compile_event(
            self.adversary,
            self.model,
            self.checker,
            backend=self.backend,
            batching=self.batching,
            chunk_size=self.chunk_size,
        )

    @cached_property
    def recognised(self) -> Problem:
        """How likely is it that an observation is recognised? Raises ProblemError without ``given``."""
        if self._recogniser is None:
            raise ProblemError("recognised: the problem has no recogniser; give it one, Problem(..., given=recogniser)")
        return self._with(self._recogniser)

    @cached_property
    def joint(self) -> Problem:
        """How likely is it that an observation is recognised, and the action catastrophic? Itself without ``given``.

        Where one of the two severities is a bool, the other is taken as one.
        """
        if self._recogniser is None:
            return self
        parts: list[Checker] = [self._recogniser, self.checker]
        bools = [self.recognised.event.boolean, self._with(self.checker).event.boolean]
        if any(bools) and not all(bools):
            parts[bools.index(False)] = _YesOrNo(parts[bools.index(False)])
        return self._with(all_of(*parts))

    @property
    def model_recognises(self) -> bool:
        """Whether recognition may depend on the model: the recogniser is given its action, or D is a closed loop."""
        if self._recogniser is None:
            return False
        return self._recogniser.of_action or self.recognised.event.composition.closed_loop

    def _with(self, checker: Checker) -> Problem:
        settings: dict[str, Any] = {"backend": self.backend, "batching": self.batching, "chunk_size": self.chunk_size}
        return Problem(self.adversary, self.model, checker, **settings)

    @cached_property
    def strata(self) -> Strata | None:
        """The combinations of values of discrete sites that ``estimate`` holds, the most probable first.

        None where there are none: no discrete site whose values can be listed, observations that leave few draws of
        weight, or a closed loop in which the values' probabilities depend on other draws.
        """
        return strata_of(self.event)

    @property
    def program(self) -> Callable[[], Any]:
        """D, M and C as one ordinary program of D's library, ``() -> (observation, action, severity)``.

        ``action``, ``severity`` and ``catastrophe`` are deterministic sites, so that the library's own tools
        (predictive, SVI, NUTS, autoguides) run on it.
        """
        if self.given is not None:
            return self.joint.program
        composition = self.event.composition
        checker = composition.in_program(self.event.boolean) if composition.black_boxes else self.checker
        program: Callable[[], Any] = compose(
            composition.frontend, composition.closed_loop, self.adversary, self.model, checker, record=True
        )
        return program

    @property
    def gaussianized(self) -> Callable[[], Any]:
        """:attr:`program` with each latent site ``name`` drawn as ``name_base ~ Normal(0, 1)`` and mapped."""
        return self.event.composition.frontend.gaussianize(self.program)

    def conditioned(self, temperature: float = 1.0, *, gaussianized: bool = False) -> Callable[[], Any]:
        """:attr:`program`, conditioned on a catastrophe that is softened: with a factor Φ(severity / temperature).

        A program of D's library, for its own inference: NUTS and SVI find catastrophes with it, and Predictive draws
        from what they found. Its evidence is that of the softened event; as ``temperature``, in units of the severity,
        goes to 0 it becomes P. gaussianized: with each latent site as in :attr:`gaussianized`, on which samplers and
        guides do best.

        Raises ProblemError where the severity has no gradient: the checker returns a bool, or is a black box.
        """
        if not (isinstance(temperature, int | float) and temperature > 0.0 and math.isfinite(temperature)):
            raise ProblemError(f"temperature={temperature!r}: expected a positive number, in units of the severity")
        event = self.event
        if event.boolean or event.composition.black_boxes:
            kind = "returns a bool" if event.boolean else "is a black box"
            raise ProblemError(f"conditioned: the checker {kind}, so there is no softened event. Return a severity")
        frontend, plain = event.composition.frontend, self.program
        special = frontend.backend.special

        def program() -> Any:
            value = plain()
            frontend.factor("softened", special.log_ndtr(frontend.backend.as_array(value[2]) / temperature))
            return value

        return frontend.gaussianize(program) if gaussianized else program

    def replaced(
        self, *, adversary: Callable[..., Any] | None = None, model: Callable[..., Any] | None = None
    ) -> Problem:
        """The same problem with another adversary or model."""
        return Problem(
            self.adversary if adversary is None else adversary,
            self.model if model is None else model,
            self.checker,
            given=self.given,
            backend=self.backend,
            batching=self.batching,
            chunk_size=self.chunk_size,
        )

    def __repr__(self) -> str:
        parts = {"adversary": self.adversary, "model": self.model, "checker": self.checker, "given": self.given}
        named = (f"{k}={getattr(v, '__name__', type(v).__name__)}" for k, v in parts.items() if v is not None)
        return f"Problem({', '.join(named)})"


@dataclass(frozen=True)
class _Recogniser:
    """A recogniser as a checker. of_action: whether it is given the action too."""

    fn: Callable[..., Any]
    of_action: bool

    @property
    def __name__(self) -> str:
        return getattr(self.fn, "__name__", type(self.fn).__name__)

    def __call__(self, observation: Any, action: Any) -> Any:
        return self.fn(observation, action) if self.of_action else self.fn(observation)


@dataclass(frozen=True)
class _YesOrNo:
    """A checker of which only yes or no is asked."""

    fn: Checker

    @property
    def __name__(self) -> str:
        return getattr(self.fn, "__name__", type(self.fn).__name__)

    def __call__(self, observation: Any, action: Any) -> Any:
        return self.fn(observation, action) >= 0


def _takes_action(given: Callable[..., Any]) -> bool:
    """Whether a recogniser takes (observation, action), and not the observation alone."""
    try:
        parameters = inspect.signature(given).parameters.values()
    except (TypeError, ValueError):
        return True
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = sum(p.kind in kinds and p.default is p.empty for p in parameters)
    if any(p.kind is p.VAR_POSITIONAL for p in parameters) or needed == 2:
        return True
    if needed > 2 or not any(p.kind in kinds for p in parameters):
        raise ProblemError(f"given takes {needed} arguments: expected given(observation) or given(observation, action)")
    return False
