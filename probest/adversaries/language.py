r"""A language model as a distribution over token sequences, for ``pyro.sample``.

:class:`CausalLM` wraps a causal language model of Hugging Face; called without arguments it returns the law of what
the model writes after its prompt, a Pyro distribution over sequences of ``max_new_tokens`` tokens: after the
end-of-sequence token comes padding. What is drawn and what has a density is the same law, exactly: one temperature and
one mask of allowed tokens serve both, nothing truncates it, and dropout is off.

.. math:: \log p(x) = \sum_t \log \operatorname{softmax}(\ell_t / T)_{x_t}, \qquad
    \ell_t = \text{logits after the prompt and } x_{<t}, \; -\infty \text{ where not allowed}.

Logits are the model's own; their log-softmax is in float64. A draw is made with a cache of keys and values, a density
by one pass over the whole sequence.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, cast

import pyro
import torch
from pyro.distributions import TorchDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import constraints

from probest.programs.maps import GaussianMap

if TYPE_CHECKING:
    import os

    import numpy as np

    from probest.adversaries.base import Law, Opponent
    from probest.adversaries.programs import ProgramLaw
    from probest.backends.base import Parts
    from probest.evidence import Particles
    from probest.programs.event import Event
    from probest.search import SearchTuning

__all__ = ["CausalLM", "LanguageAdversary", "LanguageModelError", "Shared", "TokenSequences", "models_of"]


class LanguageModelError(ValueError):
    """A language model that cannot be used as a law of token sequences; the message says what to do."""


class Prompt(NamedTuple):
    """What is read before writing: token ids and mask, each ``(..., length)``; 0 in the mask is nothing at all."""

    ids: Tensor
    mask: Tensor

    @property
    def shape(self) -> torch.Size:
        """Of the batch of prompts."""
        return self.ids.shape[:-1]

    def expand(self, shape: Sequence[int]) -> Prompt:
        """One for each entry of a batch of this shape."""
        return Prompt(*(part.expand(*shape, part.shape[-1]) for part in self))

    def flat(self, shape: Sequence[int]) -> Prompt:
        """The same, ``(n, length)``."""
        return Prompt(*(part.reshape(-1, part.shape[-1]) for part in self.expand(shape)))

    def at(self, rows: Any) -> Prompt:
        return Prompt(self.ids[rows], self.mask[rows])


Twister = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""log-probabilities of the next token ``(n, vocabulary)``, last states, tokens before and the step, to others."""

_MOST = 50_000_000  # log-probabilities that are alive at once


class CausalLM(nn.Module):
    """A causal language model, whose call is the law of what it writes.

    Args:
        model: a causal language model of transformers, or the name or path of one. It is put in evaluation mode and
            stays in it, also where ``train()`` is called: with dropout there would be no one law.
        tokenizer: of the model, or its name or path; by default that of ``model`` where that is a name. Needed where a
            prompt is text, and by :meth:`decode`.
        max_new_tokens: length of the sequences.
        prompt: text, token ids, or a list of these; several make a batch. Empty, it is the beginning-of-sequence token.
        temperature: of the softmax.
        allowed: bool mask of the tokens that may be written, ``(vocabulary,)``, or ``(max_new_tokens, vocabulary)``.
        eos_token_id, pad_token_id: by default those of the tokenizer or the model's configuration. Without the first,
            all sequences are ``max_new_tokens`` long; without the second, padding is the first.
        batch_size: sequences that are alive at once in a draw or a density.

    Raises:
        LanguageModelError: no prompt and no beginning-of-sequence token; a prompt of text without a tokenizer; an
            ``allowed`` of the wrong shape, or that allows nothing; a prompt that leaves the model's positions no room.
        ImportError: transformers is not installed, and ``model`` is a name.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        max_new_tokens: int,
        prompt: Any = "",
        temperature: float = 1.0,
        allowed: Tensor | None = None,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        batch_size: int = 256,
    ) -> None:
        super().__init__()
        if isinstance(model, str):
            model, tokenizer = _loaded(model, tokenizer)
        elif isinstance(tokenizer, str):
            tokenizer = _tokenizer(tokenizer)
        if not isinstance(model, nn.Module) or not hasattr(model, "config"):
            raise LanguageModelError(
                f"model is a {type(model).__name__}: expected a causal language model of transformers, or its name"
            )
        for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise LanguageModelError(f"{name}={value!r}: expected a whole number, 1 or more")
        if not temperature > 0.0:
            raise LanguageModelError(f"temperature={temperature!r}: expected a positive number")
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens
        self.temperature = float(temperature)
        self.batch_size = batch_size
        config: Any = model.config
        self.vocabulary = int(config.vocab_size)
        self.eos = _first(eos_token_id, getattr(tokenizer, "eos_token_id", None), getattr(config, "eos_token_id", None))
        pad = _first(pad_token_id, getattr(tokenizer, "pad_token_id", None), getattr(config, "pad_token_id", None))
        self.pad = int(_first(pad, self.eos, 0))
        self.batched = not isinstance(prompt, str) and not _is_ids(prompt)
        prompts = list(prompt) if self.batched else [prompt]
        if not prompts:
            raise LanguageModelError("prompt is an empty list: give at least one, or a text")
        ids, mask = self._encoded(prompts)
        self.prompt_ids: Tensor
        self.prompt_mask: Tensor
        self.allowed: Tensor
        self.register_buffer("prompt_ids", ids, persistent=False)
        self.register_buffer("prompt_mask", mask, persistent=False)
        self._check_room(ids.shape[1])
        self.register_buffer("allowed", self._checked(allowed), persistent=False)

    def forward(self) -> TokenSequences:
        """The law of what the model writes: event shape ``(max_new_tokens,)``; of several prompts a batch."""
        self._assert_deterministic()
        prompt = Prompt(self.prompt_ids, self.prompt_mask)
        return TokenSequences(self, prompt if self.batched else prompt.at(0))

    def after(self, text: Tensor, *, mask: Tensor | None = None, then: Any = "") -> TokenSequences:
        """The law of what the model writes after its prompt, the text and ``then``: how it answers.

        A model under test that is a language model draws its action as ``pyro.sample("answer", lm.after(x))``.

        Args:
            text: tokens ``(..., length)``, such as another language model wrote; the law's batch is that of the leading
                axes.
            mask: bool, of the same shape: which of them are text. By default all that come before an end of sequence of
                this model, which is none of its own.
            then: text or token ids between the text and the answer.

        Raises:
            LanguageModelError: there are several prompts; text is no whole numbers or is beyond the vocabulary; the
                model's positions leave no room.
        """
        self._assert_deterministic()
        if self.batched:
            raise LanguageModelError("after: there are several prompts; give CausalLM one, or none")
        if text.ndim < 1 or text.dtype == torch.bool or text.is_floating_point():
            raise LanguageModelError(f"text has shape {tuple(text.shape)} and type {text.dtype}: expected token ids")
        if mask is None:
            mask = torch.ones_like(text, dtype=torch.bool)
            if self.eos is not None:
                mask = (text == self.eos).long().cumsum(-1) == 0
        elif mask.dtype != torch.bool or mask.shape != text.shape:
            shape = tuple(text.shape)
            raise LanguageModelError(
                f"mask has shape {tuple(mask.shape)} and type {mask.dtype}: expected bools {shape}"
            )
        between = self._ids(then)
        self._check_room(self.prompt_ids.shape[1] + text.shape[-1] + len(between))
        device, shape = self.prompt_ids.device, text.shape[:-1]
        last = torch.tensor(between, dtype=torch.long, device=device)
        parts = (
            Prompt(self.prompt_ids[0], self.prompt_mask[0]).expand(shape),
            Prompt(torch.where(mask, text, self.pad), mask.long()),
            Prompt(last, torch.ones_like(last)).expand(shape),
        )
        return TokenSequences(self, Prompt(*(torch.cat(column, dim=-1) for column in zip(*parts, strict=True))))

    def train(self, mode: bool = True) -> CausalLM:
        """As of any module, but the language model stays in evaluation mode: parameters train, dropout is off."""
        super().train(mode)
        self.model.eval()
        return self

    def frozen(self) -> CausalLM:
        """A copy that no training reaches: the prior that a fine-tuned model is held against."""
        twin = copy.deepcopy(self)
        return twin.requires_grad_(False)

    def steered(self, towards: Tensor, away: Tensor, *, part: str, strength: float = 1.0) -> CausalLM:
        """A copy that writes more like some texts and less like others, by a vector added to its activations.

        The law of a proposal: ``estimate(problem, guide=lambda: pyro.sample("text", lm.steered(...)()))``, say towards
        catastrophes and away from plain draws.

        Args:
            towards: texts ``(n, max_new_tokens)``, after the (first) prompt.
            away: others.
            part: name of the module of the model whose output is shifted, such as ``"transformer.h.1"``.
            strength: times the difference of its mean output over the tokens of both.

        Raises:
            LanguageModelError: the model has no such part, or its output is no hidden states.

        Reference: Turner et al. (2023), Activation addition: steering language models without optimization.
        """
        self._assert_deterministic()
        if part not in dict(self.model.named_modules()):
            raise LanguageModelError(
                f"part={part!r}: the model has {', '.join(n for n, _ in self.model.named_children())}"
            )
        twin = copy.deepcopy(self)
        difference = self._mean_output(towards, part) - self._mean_output(away, part)
        steering = _Steering(strength * difference)
        twin.steering = steering  # its parameter is one of the copy's
        twin.model.get_submodule(part).register_forward_hook(steering.shifted)
        return twin

    @torch.no_grad()
    def _mean_output(self, texts: Tensor, part: str) -> Tensor:
        """Of a part of the model, ``(width,)``: over the tokens of texts."""
        found: list[Tensor] = []

        def heard(module: nn.Module, inputs: Any, output: Any) -> None:  # noqa: ARG001
            found.append(output[0] if isinstance(output, tuple) else output)

        texts = texts.reshape(-1, self.max_new_tokens).long()
        prompt = Prompt(self.prompt_ids[0], self.prompt_mask[0]).flat((len(texts),))
        sums, count = [], 0
        hook = self.model.get_submodule(part).register_forward_hook(heard)
        try:
            for i in range(0, len(texts), self.batch_size):
                at = slice(i, i + self.batch_size)
                self._read(prompt.at(at), texts[at])
                output = found.pop()
                if output.ndim != 3 or output.shape[1] < self.max_new_tokens:
                    raise LanguageModelError(
                        f"part={part!r}: its output has shape {tuple(output.shape)}, no hidden states"
                    )
                alive = self._alive(texts[at])[..., None]
                sums.append((output[:, -self.max_new_tokens :] * alive).sum((0, 1)))
                count += int(alive.sum())
        finally:
            hook.remove()
        if not count:
            raise LanguageModelError("steered: give at least one text on either side")
        return torch.stack(sums).sum(0) / count

    def decode(self, tokens: Tensor) -> str | list[Any]:
        """The text of sequences ``(..., max_new_tokens)``, as nested lists for the leading axes."""
        if self.tokenizer is None:
            raise LanguageModelError("decode: there is no tokenizer; give CausalLM(model, tokenizer, ...) one")
        if tokens.ndim > 1:
            return [self.decode(row) for row in tokens]
        kept = tokens[self._alive(tokens[None])[0]]
        return str(self.tokenizer.decode([int(t) for t in kept if self.eos is None or int(t) != self.eos]))

    # --- prompts and masks -------------------------------------------------------------------------------------------

    def _check_room(self, length: int) -> None:
        config: Any = self.model.config
        room = getattr(config, "max_position_embeddings", None)
        if room is not None and length + self.max_new_tokens > room:
            raise LanguageModelError(
                f"max_new_tokens={self.max_new_tokens} after {length} tokens: the model has {room} places"
            )

    def _ids(self, prompt: Any) -> list[int]:
        """Token ids of a text, or of a sequence of them."""
        if isinstance(prompt, str) and prompt:
            if self.tokenizer is None:
                raise LanguageModelError("prompt is text and there is no tokenizer: give one, or token ids")
            row = list(self.tokenizer(prompt)["input_ids"])
        else:
            row = [] if isinstance(prompt, str) else [int(t) for t in prompt]
        if row and (min(row) < 0 or max(row) >= self.vocabulary):
            raise LanguageModelError(f"prompt has token ids beyond the vocabulary of {self.vocabulary}")
        return row

    def _encoded(self, prompts: Sequence[Any]) -> Prompt:
        config: Any = self.model.config
        start = _first(getattr(self.tokenizer, "bos_token_id", None), getattr(config, "bos_token_id", None))
        rows = [self._ids(prompt) for prompt in prompts]
        if start is None and not all(rows):
            raise LanguageModelError("prompt is empty and the model has no beginning-of-sequence token: give one")
        rows = [row or [int(start)] for row in rows]
        longest = max(map(len, rows))
        device = next(self.model.parameters()).device
        ids = torch.tensor([[self.pad] * (longest - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
        return Prompt(ids, mask)

    def _checked(self, allowed: Tensor | None) -> Tensor:
        device = self.prompt_ids.device
        shape = (self.max_new_tokens, self.vocabulary)
        if allowed is None:
            return torch.ones(shape, dtype=torch.bool, device=device)
        mask = torch.as_tensor(allowed, device=device)
        if mask.dtype != torch.bool or tuple(mask.shape) not in (shape, shape[1:]):
            raise LanguageModelError(
                f"allowed has shape {tuple(mask.shape)} and type {mask.dtype}: expected bools {shape[1:]} or {shape}"
            )
        mask = mask.expand(shape).clone()
        if not mask.any(dim=1).all():
            raise LanguageModelError("allowed leaves no token that may be written, at some position")
        return mask

    def _assert_deterministic(self) -> None:
        for name, part in self.model.named_modules():
            if isinstance(part, nn.modules.dropout._DropoutNd) and part.training and part.p > 0.0:
                raise LanguageModelError(
                    f"model.{name} drops out: a language model in training mode has no one law. Call model.eval()"
                )

    # --- the law -----------------------------------------------------------------------------------------------------

    def _alive(self, tokens: Tensor) -> Tensor:
        """Which tokens of ``(n, length)`` are written: all up to the first end of sequence, that one included."""
        if self.eos is None:
            return torch.ones_like(tokens, dtype=torch.bool)
        ended = (tokens == self.eos).long().cumsum(1) - (tokens == self.eos).long()
        alive: Tensor = ended == 0
        return alive

    def _log_softmax(self, logits: Tensor, at: slice | int) -> Tensor:
        scaled: Tensor = logits.double() / self.temperature
        return scaled.masked_fill(~self.allowed[at], -torch.inf).log_softmax(-1)

    def _step_log_probs(self, prompt: Prompt, tokens: Tensor) -> Tensor:
        """log-probabilities of all tokens after each prefix, ``(n, length, vocabulary)``, by one pass.

        prompt: of each sequence, ``(n, ...)``.
        """
        return self._read(prompt, tokens)[0]

    def _read(self, prompt: Prompt, tokens: Tensor, *, states: bool = False) -> tuple[Tensor, Tensor | None]:
        """What :meth:`_step_log_probs` gives; the model's last states ``(n, length, width)`` too where asked for."""
        self._check_ids(prompt)
        ids = torch.cat([prompt.ids, tokens[:, :-1]], dim=1)
        mask = torch.cat([prompt.mask, self._alive(tokens)[:, :-1].long()], dim=1)
        out = self.model(
            input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=False,
            output_hidden_states=states,
        )  # fmt: skip
        log_p = self._log_softmax(out.logits[:, -self.max_new_tokens :], slice(None))
        return log_p, out.hidden_states[-1][:, -self.max_new_tokens :] if states else None

    def _check_ids(self, prompt: Prompt) -> None:
        if (prompt.ids < 0).any() or (prompt.ids >= self.vocabulary).any():
            raise LanguageModelError(f"text has token ids beyond the vocabulary of {self.vocabulary}")

    @torch.no_grad()
    def _written(
        self, prompt: Prompt, kept: Tensor, cut: Tensor, z: Tensor | None = None, twist: Twister | None = None
    ) -> tuple[Tensor, Tensor]:
        """Sequences that keep the first ``cut`` ``(n,)`` of ``kept`` tokens and draw the rest; log-probabilities.

        z: standard normals ``(n, max_new_tokens)`` that each draw is a function of; None draws at random. twist: of the
        law of the next token, by the model's last state and the token before.
        """
        self._check_ids(prompt)
        ids, mask = prompt
        n = len(ids)
        tokens = torch.full((n, self.max_new_tokens), self.pad, dtype=torch.long, device=ids.device)
        log_p = torch.zeros(n, dtype=torch.float64, device=ids.device)
        alive = torch.ones(n, dtype=torch.bool, device=ids.device)
        past, at, feed = None, (mask.cumsum(1) - 1).clamp(min=0), ids
        for t in range(self.max_new_tokens):
            out = self.model(
                input_ids=feed, attention_mask=mask, position_ids=at, past_key_values=past, use_cache=True,
                output_hidden_states=twist is not None,
            )  # fmt: skip
            past = out.past_key_values
            step = self._log_softmax(out.logits[:, -1], t)
            if twist is not None:
                step = twist(step, out.hidden_states[-1][:, -1], feed[:, -1], t)
            drawn = torch.multinomial(step.exp(), 1)[:, 0] if z is None else _quantile(step.exp(), z[:, t].double())
            token = torch.where(cut > t, kept[:, t], drawn)
            gain = step.gather(1, token[:, None])[:, 0]
            token = torch.where(alive, token, self.pad)
            log_p = log_p + torch.where(alive, gain, 0.0)
            tokens[:, t] = token
            mask = torch.cat([mask, alive[:, None].long()], dim=1)
            at = (mask.sum(1, keepdim=True) - 1).clamp(min=0)
            feed = token[:, None]
            if self.eos is not None:
                alive = alive & (token != self.eos)
                if not alive.any():
                    break
        return tokens, log_p


class Writer(Protocol):
    """What a law of token sequences asks of its language model: see :class:`CausalLM`."""

    @property
    def max_new_tokens(self) -> int: ...
    @property
    def vocabulary(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def pad(self) -> int: ...
    def _alive(self, tokens: Tensor) -> Tensor: ...
    def _assert_deterministic(self) -> None: ...
    def _step_log_probs(self, prompt: Prompt, tokens: Tensor) -> Tensor: ...
    def _written(self, prompt: Prompt, kept: Tensor, cut: Tensor, z: Tensor | None = None) -> tuple[Tensor, Tensor]: ...


class TokenSequences(TorchDistribution):
    """Sequences of tokens that a :class:`CausalLM` writes: event ``(max_new_tokens,)``, int64; padding after the end.

    prompt: of each batch entry; its shape is the batch's.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = False

    def __init__(self, lm: Writer, prompt: Prompt) -> None:
        self.lm, self.prompt = lm, prompt
        super().__init__(prompt.shape, torch.Size((lm.max_new_tokens,)), validate_args=False)

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> Any:
        return _Written(self.lm)

    def expand(self, batch_shape: Any, _instance: Any = None) -> TokenSequences:
        """Independent sequences, one for each entry of a batch that this one's broadcasts to."""
        return TokenSequences(self.lm, self.prompt.expand(torch.Size(batch_shape)))

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draws ``sample_shape + batch_shape + (max_new_tokens,)``."""
        return self.sample_and_log_prob(sample_shape)[0]

    def sample_and_log_prob(self, sample_shape: Any = torch.Size()) -> tuple[Tensor, Tensor]:  # noqa: B008
        """Draws, and the log of each one's probability as it was drawn, without a gradient."""
        shape = torch.Size(sample_shape) + self.batch_shape
        none = torch.zeros((*shape, self.lm.max_new_tokens), dtype=torch.long, device=self.prompt.ids.device)
        return self._redrawn(none, none[..., 0], shape)

    def regenerate(self, value: Tensor, cut: int | Tensor) -> Tensor:
        """Keep the first ``cut`` tokens of sequences ``(..., max_new_tokens)`` and draw the rest anew.

        cut: from 0 (all is drawn) to ``max_new_tokens`` (nothing is); one number, or one for each sequence. What has
        ended before the cut stays as it is. The move leaves the law invariant, and is reversible for it.

        Raises LanguageModelError for a cut out of range.
        """
        shape = value.shape[:-1]
        cuts = torch.as_tensor(cut, device=value.device).expand(shape)
        if (cuts < 0).any() or (cuts > self.lm.max_new_tokens).any():
            raise LanguageModelError(f"cut={cut!r}: expected whole numbers from 0 to {self.lm.max_new_tokens}")
        return self._redrawn(value, cuts, shape)[0]

    def from_normals(self, z: Tensor) -> Tensor:
        """The sequences at standard normals ``(..., max_new_tokens)``, one for each token: its quantile at Φ(z).

        Of independent normals it has this law. A prefix of z makes a prefix of the sequence.
        """
        shape = torch.broadcast_shapes(z.shape[:-1], self.batch_shape)
        whole = z.expand((*shape, self.lm.max_new_tokens))
        none = torch.zeros_like(whole, dtype=torch.long)
        return self._redrawn(none, none[..., 0], shape, whole)[0]

    @torch.no_grad()
    def to_normals(self, value: Tensor, uniform: Tensor) -> Tensor:
        """Normals that :meth:`from_normals` makes these sequences of, both ``(..., max_new_tokens)``.

        uniform: numbers between 0 and 1 of the same shape, that say where in its interval each normal is. Uniform and
        independent of the sequences they make normals of the law given the sequence. After the end all are in it.
        """
        steps = self._of_steps(value, lambda steps, tokens: steps).exp()  # noqa: ARG005
        at = value.long().clamp(0, self.lm.vocabulary - 1)[..., None]
        own = steps.gather(-1, at)[..., 0]
        below = (steps.cumsum(-1).gather(-1, at)[..., 0] - own).clamp(min=0.0)
        above = (steps.flip(-1).cumsum(-1).flip(-1).gather(-1, at)[..., 0] - own).clamp(min=0.0)
        tokens = value.reshape(-1, self.lm.max_new_tokens)
        alive = self.lm._alive(tokens).reshape(value.shape)
        low = torch.where(alive, below + uniform * own, uniform)
        high = torch.where(alive, above + (1.0 - uniform) * own, 1.0 - uniform)
        return torch.where(low < 0.5, torch.special.ndtri(low), -torch.special.ndtri(high))

    def gaussian_map(self) -> GaussianMap:
        """How probest draws it: all cases of a batch at once, by one pass a token."""
        return GaussianMap((*self.batch_shape, self.lm.max_new_tokens), self._from_normals, True)

    def _from_normals(self, z: Tensor) -> Tensor:
        """As :meth:`from_normals`; under vmap once for the whole batch."""
        return self._together(lambda law, z: law.from_normals(z), z)

    def _redrawn(self, kept: Tensor, cut: Tensor, shape: torch.Size, z: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Sequences ``(*shape, length)`` that keep the first ``cut`` ``shape`` tokens, and log-probabilities."""
        self.lm._assert_deterministic()
        prompt, cut, size, length = self.prompt.flat(shape), cut.reshape(-1), self.lm.batch_size, kept.shape[-1]
        kept = kept.reshape(-1, length)
        z = z if z is None else z.reshape(-1, length)
        parts = [
            self.lm._written(prompt.at(at), kept[at], cut[at], z if z is None else z[at])
            for at in (slice(i, i + size) for i in range(0, len(kept), size))
        ]
        if not parts:
            return kept.reshape((*shape, -1)), torch.zeros(shape, dtype=torch.float64, device=kept.device)
        tokens, log_p = (torch.cat(column) for column in zip(*parts, strict=True))
        return tokens.reshape((*shape, -1)), log_p.reshape(shape)

    def token_log_prob(self, value: Tensor) -> Tensor:
        """log-probability of each token given those before, ``(..., max_new_tokens)``; 0 after the end.

        Differentiable in the model's parameters. ``-inf`` for a token that is not allowed, and for one after the end
        that is no padding.
        """
        chosen = self._of_steps(value, lambda steps, tokens: steps.gather(2, tokens[..., None])[..., 0])
        tokens = value.reshape(-1, self.lm.max_new_tokens).long()
        alive = self.lm._alive(tokens).reshape(value.shape)
        stray = ~alive & (value != self.lm.pad)
        return torch.where(alive, chosen, 0.0).masked_fill(stray, -torch.inf)

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(x), ``(...,)``, in float64: differentiable in the model's parameters."""
        return self._together(lambda law, value: law.token_log_prob(value).sum(-1), value)

    def _together(self, fn: Callable[[TokenSequences, Tensor], Tensor], value: Tensor) -> Tensor:
        """``fn(law, value)``; under vmap once for the whole batch."""
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        return _together(
            lambda value, *prompt: fn(TokenSequences(self.lm, Prompt(*prompt)), value),
            value.expand(*shape, value.shape[-1]),
            *self.prompt.expand(shape),
        )

    def kl(self, value: Tensor, other: TokenSequences) -> Tensor:
        """Σ over tokens of KL(own ‖ other) of the next token given those before, ``(...,)``.

        Its mean over draws of this law is KL(own ‖ other) of whole sequences, with less variance than the difference
        of their log-probabilities (each step is summed over the vocabulary). ``inf`` where the other one does not allow
        what this one does. Differentiable in both.
        """
        theirs = other._of_steps(value, lambda steps, tokens: steps)  # noqa: ARG005
        ours = self._of_steps(value, lambda steps, tokens: steps)  # noqa: ARG005
        possible = torch.isfinite(ours)
        log_ratio = torch.where(possible, ours, 0.0) - torch.where(possible, theirs, 0.0)
        each = (torch.where(possible, ours, -torch.inf).exp() * log_ratio).sum(-1)
        tokens = value.reshape(-1, self.lm.max_new_tokens)
        return torch.where(self.lm._alive(tokens).reshape(value.shape), each, 0.0).sum(-1)

    def _of_steps(self, value: Tensor, fn: Any) -> Tensor:
        """A function of the log-probabilities of all tokens at each step, and of the tokens; in parts, by rows."""
        self.lm._assert_deterministic()
        length = self.lm.max_new_tokens
        if value.shape[-1:] != (length,):
            raise LanguageModelError(f"value has shape {tuple(value.shape)}: expected (..., {length})")
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        prompt = self.prompt.flat(shape)
        tokens = value.expand((*shape, length)).reshape(-1, length).long().clamp(0, self.lm.vocabulary - 1)
        size = max(1, min(self.lm.batch_size, _MOST // (length * self.lm.vocabulary)))
        parts = [
            fn(self.lm._step_log_probs(prompt.at(at), tokens[at]), tokens[at])
            for at in (slice(i, i + size) for i in range(0, len(tokens), size))
        ]
        if not parts:
            raise LanguageModelError("value has no sequences")
        whole = torch.cat(parts)
        return whole.reshape((*shape, *whole.shape[1:]))


class LanguageAdversary(nn.Module):
    """An adversary whose language models are its own copies of those it was made from, to be fine-tuned.

    It is a Pyro program like any other: a problem's adversary, or what :func:`probest.search` learns. The originals,
    the prior, stay as they are.

    Args:
        program: a :class:`CausalLM`, which is drawn as a site ``site``; begin with a prompt and it is that prompt's
            adversary. Or a program without arguments that draws text from such models: it is run with copies of them.
        site: name of the site, of a :class:`CausalLM`.
        lora: a ``peft.LoraConfig``: adapters are trained, instead of all parameters.
        twist: what is trained is a small network beside the model, which stays as it is and is shared
            (:mod:`probest.adversaries.twists`); needs far fewer texts to learn from.
        budget: model calls with which :func:`probest.search` looks for texts that a twist learns from before it climbs.

    Raises:
        LanguageModelError: the program draws no text.
        ImportError: ``lora`` is given, and peft is not installed.
    """

    def __init__(
        self,
        program: CausalLM | Callable[[], Any],
        *,
        site: str = "text",
        lora: Any = None,
        twist: bool = False,
        budget: int = 20_000,
    ) -> None:
        super().__init__()
        self.budget = budget
        if twist and lora is not None:
            raise LanguageModelError("lora and twist exclude each other: a twist leaves the model as it is")
        if isinstance(budget, bool) or not isinstance(budget, int) or budget < 500:
            raise LanguageModelError(f"budget={budget!r}: expected a whole number of model calls, 500 or more")
        self._program = Shared(_drawing(program, site) if isinstance(program, CausalLM) else program)
        found = models_of(self._program.value)
        if not found:
            raise LanguageModelError("program draws no text: give a CausalLM, or a program with a site drawn from one")
        self.sites = list(found)
        if twist:
            from probest.adversaries.twists import TwistedLM

            self.models = nn.ModuleList(TwistedLM(lm) for lm in found.values())
        else:
            self.models = nn.ModuleList(copy.deepcopy(lm).requires_grad_(True) for lm in found.values())
        if lora is not None:
            self._adapt(lora)

    def forward(self) -> Any:
        """Run the program, its text by these models."""
        with _Instead(dict(zip(self.sites, self.models, strict=True))):
            return self._program.value()

    @property
    def tuning(self) -> SearchTuning:
        """How :func:`probest.search` learns it, where not told otherwise: a draw costs more than one of a tilt."""
        from probest.search import SearchTuning

        return SearchTuning(particles=512, draws=128, final=2_048, patience=4)

    def build(self, event: Event, particles: Particles, rng: np.random.Generator) -> ProgramLaw:
        """The law that :func:`probest.search` learns; a twist that does nothing yet has searched for itself before.

        Where the model draws text too, that is drawn and weighed with it, and is not learned.
        """
        return (self._searched(event, rng) if self.is_untwisted else self).law(event)

    def law(self, event: Event) -> ProgramLaw:
        """The adversary as it is."""
        from probest.adversaries.programs import Learnable, answered

        if event.composition.late and not event.composition.closed_loop:
            return answered(event, Learnable(_Answering(self, event)).law(event.opened()))
        return Learnable(self).law(event)

    def check_playable(self, event: Event) -> None:
        """Raises LanguageModelError where the given adversary draws what is no text, or the model runs before it."""
        if event.composition.closed_loop:
            raise LanguageModelError("adversaries: opponents that write do not play against a closed loop")
        with torch.random.fork_rng(), torch.no_grad():
            nodes = pyro.poutine.trace(event.parts.adversary).get_trace().nodes
        for name, node in nodes.items():
            if node["type"] == "sample" and name not in self.sites and not pyro.poutine.util.site_is_subsample(node):
                raise LanguageModelError(f"adversaries: site {name!r} is no text that the opponent writes")

    def turned(self, turn: int) -> LanguageAdversary:
        """A copy: every search begins with the given weights, against another model."""
        return copy.deepcopy(self)

    def opponent(self, event: Event, law: Law, parts: Parts) -> Opponent:
        """What was learnt, to be played against."""
        from probest.adversaries.writers import TextOpponent

        learnt = parts.adversary
        return TextOpponent(
            replace(cast(Any, law), parts=parts), learnt.adversary if isinstance(learnt, _Answering) else learnt
        )

    def restored(self, event: Event, arrays: dict[str, np.ndarray]) -> Opponent:
        """The opponent with these weights."""
        twin = copy.deepcopy(self)
        twin.load_state_dict({name: torch.as_tensor(value) for name, value in arrays.items()})
        law = twin.law(event)
        return self.opponent(event, law, law.parts)

    def _searched(self, event: Event, rng: np.random.Generator) -> LanguageAdversary:
        """A copy with the twists of a search over all text that is drawn, the model's too."""
        from probest.estimators.learned import searched

        every = LanguageAdversary(event.program, twist=True) if event.composition.interleaved else self
        found = searched(event, every, self.budget, rng)
        if found.sites == self.sites:
            return found
        twin = copy.deepcopy(self)
        for name, lm in zip(twin.sites, twin.models, strict=True):
            lm.load_state_dict(found.models[found.sites.index(name)].state_dict())
        return twin

    @property
    def is_untwisted(self) -> bool:
        """Whether it has twists, and these have not learned anything yet."""
        return not any(isinstance(lm, CausalLM) or bool(lm.twist.mean.weight.any()) for lm in cast(Any, self.models))

    @property
    def lm(self) -> Any:
        """The language model, of the first site."""
        return self.models[0]

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write what is trained, one folder a site: models and adapters as transformers and peft read them."""
        from safetensors.torch import save_file

        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        for i, lm in enumerate(self.models):
            if isinstance(lm, CausalLM):
                cast(Any, lm.model).save_pretrained(folder / str(i))
            else:
                save_file(lm.state_dict(), folder / f"{i}.safetensors")
        (folder / "sites.json").write_text(json.dumps(self.sites))

    def load_pretrained(self, path: str | os.PathLike[str]) -> LanguageAdversary:
        """Go on from what :meth:`save_pretrained` wrote of an adversary like this one. Returns itself.

        Raises LanguageModelError if it was of other sites.
        """
        from safetensors.torch import load_file

        folder = Path(path)
        sites = json.loads((folder / "sites.json").read_text())
        if sites != self.sites:
            raise LanguageModelError(f"{folder} is of the sites {sites}; this adversary draws {self.sites}")
        for i, lm in enumerate(self.models):
            if not isinstance(lm, CausalLM):
                lm.load_state_dict(load_file(folder / f"{i}.safetensors"))
            elif hasattr(lm.model, "peft_config"):
                from peft import set_peft_model_state_dict

                set_peft_model_state_dict(lm.model, load_file(folder / str(i) / "adapter_model.safetensors"))
            else:
                lm.model.load_state_dict(load_file(folder / str(i) / "model.safetensors"), strict=False)
        return self

    def _adapt(self, lora: Any) -> None:
        try:
            from peft import get_peft_model
        except ImportError as error:
            raise ImportError("lora needs peft: pip install 'probest[lm]'") from error
        for lm in self.models:
            own = cast(CausalLM, lm)
            own.model = get_peft_model(own.model, lora).eval()


class _Steering(nn.Module):
    """A vector that is added to the output of a part of a model, as a hook of it."""

    def __init__(self, vector: Tensor) -> None:
        super().__init__()
        self.vector = nn.Parameter(vector)

    def shifted(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0] + self.vector.to(output[0].dtype), *output[1:])
        return output + self.vector.to(output.dtype)


class _Answering(nn.Module):
    """An adversary, and the model and the checker after it, which stay as they are."""

    def __init__(self, adversary: LanguageAdversary, event: Event) -> None:
        super().__init__()
        self.adversary = adversary
        model = copy.deepcopy(event.parts.model)
        if isinstance(model, nn.Module):
            model.requires_grad_(False)
        self._after = Shared((event.composition, model))

    def forward(self) -> Any:
        composition, model = self._after.value
        return composition.followed(self.adversary, model)()


class Shared:
    """What copies of its owner share with it."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __deepcopy__(self, memo: Any) -> Shared:
        return self


class _Instead(Messenger):
    """Sites of text are drawn from these models, with the same prompts."""

    def __init__(self, models: dict[str, Any]) -> None:
        super().__init__()
        self.models = models

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.models and isinstance(msg["fn"], TokenSequences):
            msg["fn"] = TokenSequences(self.models[msg["name"]], msg["fn"].prompt)


def _drawing(lm: CausalLM, site: str) -> Callable[[], Tensor]:
    return lambda: pyro.sample(site, lm())


def models_of(program: Callable[[], Any]) -> dict[str, CausalLM]:
    """The language model of each site of text, by name. Draws once.

    Raises LanguageModelError for a site that is drawn with a twist.
    """
    with torch.random.fork_rng(), torch.no_grad():
        nodes = pyro.poutine.trace(program).get_trace().nodes
    found: dict[str, CausalLM] = {}
    for name, site in nodes.items():
        law: Any = site.get("fn")
        if isinstance(law, TokenSequences):
            if not isinstance(law.lm, CausalLM):
                raise LanguageModelError(f"site {name!r} is drawn with a twist already: give the program without one")
            found[name] = law.lm
    return found


class _Together(torch.autograd.Function):
    """A function of rows, as an operation that vmap hands a whole batch. Autograd sees what it does with that."""

    generate_vmap_rule = False

    @staticmethod
    def forward(fn: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        return fn(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: Any, fn: Callable[..., Tensor], *tensors: Tensor) -> tuple[Tensor, int]:
        """What is not part of the batch gets an axis of it."""
        whole = (
            tensor.expand(info.batch_size, *tensor.shape) if axis is None else tensor.movedim(axis, 0)
            for tensor, axis in zip(tensors, in_dims[1:], strict=True)
        )
        return _together(fn, *whole), 0


def _together(fn: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """``fn(*tensors)``; under vmap once for the whole batch, with its axis in front of every tensor."""
    if any(map(torch._C._functorch.is_batchedtensor, tensors)):
        return cast(Tensor, _Together.apply(fn, *tensors))  # type: ignore[no-untyped-call]
    return fn(*tensors)


def _quantile(probs: Tensor, z: Tensor) -> Tensor:
    """The first place at which the sum of ``(n, k)`` probabilities reaches Φ(z), from above where z is positive."""
    below = (probs.cumsum(1)[:, :-1] < torch.special.ndtr(z)[:, None]).sum(1)
    above = (probs.flip(1).cumsum(1).flip(1)[:, 1:] >= torch.special.ndtr(-z)[:, None]).sum(1)
    return torch.where(z > 0.0, above, below)


class _Written(constraints.Constraint):
    """Tokens of the vocabulary, and padding after the end of the sequence."""

    is_discrete = True
    event_dim = 1

    def __init__(self, lm: Writer) -> None:
        self.lm = lm
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        tokens = value.reshape(-1, value.shape[-1])
        inside = (tokens >= 0) & (tokens < self.lm.vocabulary) & (tokens == tokens.round())
        padded = self.lm._alive(tokens) | (tokens == self.lm.pad)
        return (inside & padded).all(-1).reshape(value.shape[:-1])


def _first(*values: Any) -> Any:
    """The first that is not None; of several end-of-sequence tokens the first of these."""
    found = next((value for value in values if value is not None), None)
    return found[0] if isinstance(found, list | tuple) else found


def _is_ids(prompt: Any) -> bool:
    """Whether a prompt is one sequence of token ids, and not a list of prompts."""
    if isinstance(prompt, Tensor):
        return prompt.ndim == 1
    return isinstance(prompt, list | tuple) and bool(prompt) and all(isinstance(t, int) for t in prompt)


def _loaded(name: str, tokenizer: Any) -> tuple[Any, Any]:
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise ImportError("a language model by name needs transformers: pip install 'probest[lm]'") from error
    own = name if tokenizer is None else tokenizer
    return AutoModelForCausalLM.from_pretrained(name), _tokenizer(own) if isinstance(own, str) else own


def _tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name)
