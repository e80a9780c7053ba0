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
from functools import partial
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

    from probest.adversaries.programs import ProgramLaw
    from probest.evidence import Particles
    from probest.programs.event import Event
    from probest.search import SearchTuning

__all__ = ["CausalLM", "LanguageAdversary", "LanguageModelError", "Shared", "TokenSequences", "models_of"]


class LanguageModelError(ValueError):
    """A language model that cannot be used as a law of token sequences; the message says what to do."""


class _Prompts(NamedTuple):
    """Prompts on the left of padding: ids and mask, each ``(prompts, length)``."""

    ids: Tensor
    mask: Tensor


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
        room = getattr(config, "max_position_embeddings", None)
        if room is not None and ids.shape[1] + max_new_tokens > room:
            raise LanguageModelError(
                f"max_new_tokens={max_new_tokens} after a prompt of {ids.shape[1]} tokens: the model has {room} places"
            )
        self.register_buffer("allowed", self._checked(allowed), persistent=False)

    def forward(self) -> TokenSequences:
        """The law of what the model writes: event shape ``(max_new_tokens,)``; of several prompts a batch."""
        self._assert_deterministic()
        count = len(self.prompt_ids)
        rows = torch.arange(count, device=self.prompt_ids.device)
        return TokenSequences(self, rows if self.batched else rows[0])

    def train(self, mode: bool = True) -> CausalLM:
        """As of any module, but the language model stays in evaluation mode: parameters train, dropout is off."""
        super().train(mode)
        self.model.eval()
        return self

    def frozen(self) -> CausalLM:
        """A copy that no training reaches: the prior that a fine-tuned model is held against."""
        twin = copy.deepcopy(self)
        return twin.requires_grad_(False)

    def decode(self, tokens: Tensor) -> str | list[Any]:
        """The text of sequences ``(..., max_new_tokens)``, as nested lists for the leading axes."""
        if self.tokenizer is None:
            raise LanguageModelError("decode: there is no tokenizer; give CausalLM(model, tokenizer, ...) one")
        if tokens.ndim > 1:
            return [self.decode(row) for row in tokens]
        kept = tokens[self._alive(tokens[None])[0]]
        return str(self.tokenizer.decode([int(t) for t in kept if self.eos is None or int(t) != self.eos]))

    # --- prompts and masks -------------------------------------------------------------------------------------------

    def _encoded(self, prompts: Sequence[Any]) -> _Prompts:
        config: Any = self.model.config
        rows: list[list[int]] = []
        start = _first(getattr(self.tokenizer, "bos_token_id", None), getattr(config, "bos_token_id", None))
        for prompt in prompts:
            if isinstance(prompt, str) and prompt:
                if self.tokenizer is None:
                    raise LanguageModelError("prompt is text and there is no tokenizer: give one, or token ids")
                row = list(self.tokenizer(prompt)["input_ids"])
            else:
                row = [] if isinstance(prompt, str) else [int(t) for t in prompt]
            if not row and start is None:
                raise LanguageModelError("prompt is empty and the model has no beginning-of-sequence token: give one")
            row = row or [int(start)]
            if min(row) < 0 or max(row) >= self.vocabulary:
                raise LanguageModelError(f"prompt has token ids beyond the vocabulary of {self.vocabulary}")
            rows.append(row)
        longest = max(map(len, rows))
        device = next(self.model.parameters()).device
        ids = torch.tensor([[self.pad] * (longest - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
        return _Prompts(ids, mask)

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

    def _step_log_probs(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """log-probabilities of all tokens after each prefix, ``(n, length, vocabulary)``, by one pass.

        rows: the prompt of each sequence, ``(n,)``.
        """
        return self._read(rows, tokens)[0]

    def _read(self, rows: Tensor, tokens: Tensor, *, states: bool = False) -> tuple[Tensor, Tensor | None]:
        """What :meth:`_step_log_probs` gives; the model's last states ``(n, length, width)`` too where asked for."""
        ids = torch.cat([self.prompt_ids[rows], tokens[:, :-1]], dim=1)
        mask = torch.cat([self.prompt_mask[rows], self._alive(tokens)[:, :-1].long()], dim=1)
        out = self.model(
            input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=False,
            output_hidden_states=states,
        )  # fmt: skip
        log_p = self._log_softmax(out.logits[:, -self.max_new_tokens :], slice(None))
        return log_p, out.hidden_states[-1][:, -self.max_new_tokens :] if states else None

    @torch.no_grad()
    def _written(
        self, rows: Tensor, kept: Tensor, cut: Tensor, z: Tensor | None = None, twist: Twister | None = None
    ) -> tuple[Tensor, Tensor]:
        """Sequences that keep the first ``cut`` ``(n,)`` of ``kept`` tokens and draw the rest; log-probabilities.

        z: standard normals ``(n, max_new_tokens)`` that each draw is a function of; None draws at random. twist: of the
        law of the next token, by the model's last state and the token before.
        """
        n, ids, mask = len(rows), self.prompt_ids[rows], self.prompt_mask[rows]
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
    def _step_log_probs(self, rows: Tensor, tokens: Tensor) -> Tensor: ...
    def _written(self, rows: Tensor, kept: Tensor, cut: Tensor, z: Tensor | None = None) -> tuple[Tensor, Tensor]: ...


class TokenSequences(TorchDistribution):
    """Sequences of tokens that a :class:`CausalLM` writes: event ``(max_new_tokens,)``, int64; padding after the end.

    rows: the prompt of each batch entry; its shape is the batch's.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = False

    def __init__(self, lm: Writer, rows: Tensor) -> None:
        self.lm, self.rows = lm, rows
        super().__init__(rows.shape, torch.Size((lm.max_new_tokens,)), validate_args=False)

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> Any:
        return _Written(self.lm)

    def expand(self, batch_shape: Any, _instance: Any = None) -> TokenSequences:
        """Independent sequences, one for each entry of a batch that this one's broadcasts to."""
        return TokenSequences(self.lm, self.rows.expand(torch.Size(batch_shape)))

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draws ``sample_shape + batch_shape + (max_new_tokens,)``."""
        return self.sample_and_log_prob(sample_shape)[0]

    def sample_and_log_prob(self, sample_shape: Any = torch.Size()) -> tuple[Tensor, Tensor]:  # noqa: B008
        """Draws, and the log of each one's probability as it was drawn, without a gradient."""
        shape = torch.Size(sample_shape) + self.batch_shape
        rows = self.rows.expand(shape).reshape(-1)
        none = torch.zeros((len(rows), self.lm.max_new_tokens), dtype=torch.long, device=rows.device)
        return self._redrawn(rows, none, torch.zeros_like(rows), shape)

    def regenerate(self, value: Tensor, cut: int | Tensor) -> Tensor:
        """Keep the first ``cut`` tokens of sequences ``(..., max_new_tokens)`` and draw the rest anew.

        cut: from 0 (all is drawn) to ``max_new_tokens`` (nothing is); one number, or one for each sequence. What has
        ended before the cut stays as it is. The move leaves the law invariant, and is reversible for it.

        Raises LanguageModelError for a cut out of range.
        """
        shape = value.shape[:-1]
        cuts = torch.as_tensor(cut, device=value.device).expand(shape).reshape(-1)
        if (cuts < 0).any() or (cuts > self.lm.max_new_tokens).any():
            raise LanguageModelError(f"cut={cut!r}: expected whole numbers from 0 to {self.lm.max_new_tokens}")
        rows = self.rows.expand(shape).reshape(-1)
        return self._redrawn(rows, value.reshape(-1, self.lm.max_new_tokens), cuts, shape)[0]

    def from_normals(self, z: Tensor) -> Tensor:
        """The sequences at standard normals ``(..., max_new_tokens)``, one for each token: its quantile at Φ(z).

        Of independent normals it has this law. A prefix of z makes a prefix of the sequence.
        """
        shape = torch.broadcast_shapes(z.shape[:-1], self.batch_shape)
        rows = self.rows.expand(shape).reshape(-1)
        flat = z.expand((*shape, self.lm.max_new_tokens)).reshape(-1, self.lm.max_new_tokens)
        return self._redrawn(rows, torch.zeros_like(flat).long(), torch.zeros_like(rows), shape, flat)[0]

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
        return GaussianMap((*self.batch_shape, self.lm.max_new_tokens), partial(_together, self.from_normals), True)

    def _redrawn(
        self, rows: Tensor, kept: Tensor, cut: Tensor, shape: torch.Size, z: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        self.lm._assert_deterministic()
        size = self.lm.batch_size
        parts = [
            self.lm._written(rows[at], kept[at], cut[at], z if z is None else z[at])
            for at in (slice(i, i + size) for i in range(0, len(rows), size))
        ]
        if not parts:
            return kept.reshape((*shape, -1)), torch.zeros(shape, dtype=torch.float64, device=rows.device)
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
        return _together(lambda rows: self.token_log_prob(rows).sum(-1), value)

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
        rows = self.rows.expand(shape).reshape(-1)
        tokens = value.expand((*shape, length)).reshape(-1, length).long().clamp(0, self.lm.vocabulary - 1)
        size = max(1, min(self.lm.batch_size, _MOST // (length * self.lm.vocabulary)))
        parts = [
            fn(self.lm._step_log_probs(rows[i : i + size], tokens[i : i + size]), tokens[i : i + size])
            for i in range(0, len(rows), size)
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
        """The law that :func:`probest.search` learns; a twist that does nothing yet has searched for itself before."""
        from probest.adversaries.programs import Learnable
        from probest.estimators.learned import searched

        program = searched(event, self, self.budget, rng) if self.is_untwisted else self
        return Learnable(program).build(event, particles, rng)

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
            msg["fn"] = TokenSequences(self.models[msg["name"]], msg["fn"].rows)


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
    def forward(rows: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
        return fn(rows)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: Any, rows: Tensor, fn: Callable[[Tensor], Tensor]) -> tuple[Tensor, int]:  # noqa: ARG004
        return _together(fn, rows.movedim(in_dims[0], 0)), 0


def _together(fn: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """``fn(rows)``; under vmap once for the whole batch."""
    if torch._C._functorch.is_batchedtensor(rows):
        return cast(Tensor, _Together.apply(rows, fn))  # type: ignore[no-untyped-call]
    return fn(rows)


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
