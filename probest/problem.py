"""The triple that everything is about: an adversary D, a model M and a checker C."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

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
        backend: str | None = None,
        batching: Batching | None = None,
        chunk_size: int | None = None,
    ) -> None:
        for name, part in (("adversary", adversary), ("model", model), ("checker", checker)):
            if not callable(part):
                raise ProblemError(f"{name} is a {type(part).__name__}: it must be callable")
        if batching not in (None, "vmap", "model", "loop"):
            raise ProblemError(f"batching={batching!r} is not known: choose 'vmap', 'model' or 'loop'")
        if chunk_size is not None and chunk_size < 1:
            raise ProblemError(f"chunk_size={chunk_size} must be at least 1")
        self.adversary = adversary
        self.model = model
        self.checker = checker
        self.backend = backend
        self.batching: Batching | None = batching
        self.chunk_size = chunk_size

    @cached_property
    def event(self) -> Event:
        """The problem as functions of standard-normal coordinates."""
        return compile_event(
            self.adversary,
            self.model,
            self.checker,
            backend=self.backend,
            batching=self.batching,
            chunk_size=self.chunk_size,
        )

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

    def replaced(
        self, *, adversary: Callable[..., Any] | None = None, model: Callable[..., Any] | None = None
    ) -> Problem:
        """The same problem with another adversary or model."""
        return Problem(
            self.adversary if adversary is None else adversary,
            self.model if model is None else model,
            self.checker,
            backend=self.backend,
            batching=self.batching,
            chunk_size=self.chunk_size,
        )

    def __repr__(self) -> str:
        names = (getattr(part, "__name__", type(part).__name__) for part in (self.adversary, self.model, self.checker))
        return "Problem(adversary={}, model={}, checker={})".format(*names)
