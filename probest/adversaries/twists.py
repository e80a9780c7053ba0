r"""Twists: a language model's next token weighed by what it leads to.

The law of a model's texts, given that their severity passes a level, is the model's own with each next token weighed by
the probability ψ that the text, once finished, passes (Doob's h-transform):

.. math:: q(x_t \mid x_{<t}) \propto p(x_t \mid x_{<t}) \, \psi(x_{\le t}), \qquad
    \psi = \Phi\!\Big(\frac{\mu(x_{\le t}) - \ell}{\sigma(x_{<t})}\Big).

A small recurrent network reads the tokens and the model's last states and says for each next token where the severity
will end, μ ± σ, in units in which that of the model's own texts is standard normal (its ranks). That is learned from
plain texts, all of which say something of it; with the level ℓ raised it reaches further than they do. Afterwards
log q − log p is fitted to what it has to be: the same for all catastrophes, and less by a slope for what is none.

The model itself is not trained: fitted to a few hundred texts it learns them by heart (seen: 233,000 parameters, 150
texts of 32 signs, worse on others after ten steps).

References: Zhao, Brekelmans, Makhzani & Grosse (2024), Probabilistic inference in language models via twisted
sequential Monte Carlo; Richter, Boustati, Nüsken, Ruiz & Akyildiz (2020), VarGrad (the variance of log q − log p as a
loss).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import pyro
import torch
from torch import Tensor, nn

from probest.adversaries.language import CausalLM, LanguageAdversary, Prompt, Shared, TokenSequences, Writer
from probest.evidence import Floats
from probest.programs.event import Event
from probest.tuning import tuned

__all__ = ["Fit", "Texts", "Twist", "TwistedLM", "at_level", "to_normals", "untwisted"]

_SD = (-4.0, 1.5)  # log σ, from and to
_CHUNK = 2_000
_BY = "language.py"
_Loss = Callable[[LanguageAdversary, Any, Tensor], Tensor]  # of an adversary at rows with weights


class Twist(nn.Module):
    """The network: where severity ends, for each next token, and how sure that is."""

    def __init__(self, states: int, vocabulary: int, length: int, width: int = 64) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.zeros(length, width))
        self.token = nn.Embedding(vocabulary, width)
        self.state = nn.Linear(states, width)
        self.reader = nn.GRU(2 * width, width, batch_first=True)
        self.middle = nn.Linear(width, width)
        self.mean = nn.Linear(width, vocabulary)
        self.log_sd = nn.Linear(width, 1)
        self.level = nn.Parameter(torch.zeros(()))
        for layer in (self.mean, self.log_sd):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self, states: Tensor, before: Tensor, memory: Tensor | None = None, at: slice = slice(None)
    ) -> tuple[Tensor, Tensor, Tensor]:
        """μ ``(n, steps, vocabulary)``, log σ ``(n, steps, 1)`` and memory, from states and the tokens before."""
        seen = self.state(states.to(self.place.dtype)) + self.place[at]
        read, memory = self.reader(torch.cat([seen, self.token(before)], -1), memory)
        read = torch.relu(self.middle(read))
        return self.mean(read), self.log_sd(read).clamp(*_SD), memory

    def log_psi(self, mean: Tensor, log_sd: Tensor) -> Tensor:
        """log ψ, in float64."""
        log_psi: Tensor = torch.special.log_ndtr(((mean - self.level) / log_sd.exp()).double())
        return log_psi


class TwistedLM(nn.Module):
    """A language model with a twist, whose call is a law of token sequences as :class:`CausalLM`'s is.

    Copies have twists of their own, and share the model.
    """

    def __init__(self, base: CausalLM, width: int = 64) -> None:
        super().__init__()
        self._base = Shared(base)
        device = base.prompt_ids.device
        empty = torch.zeros(1, base.max_new_tokens, dtype=torch.long, device=device)
        with torch.no_grad():
            _, states = base._read(Prompt(base.prompt_ids[:1], base.prompt_mask[:1]), empty, states=True)
        assert states is not None
        with torch.random.fork_rng():
            torch.manual_seed(0)  # the same every time
            self.twist = Twist(states.shape[-1], base.vocabulary, base.max_new_tokens, width).to(device)

    @property
    def base(self) -> CausalLM:
        found: CausalLM = self._base.value
        return found

    def forward(self) -> TokenSequences:
        """The law of what is written."""
        return TokenSequences(self, self.base().prompt)

    # what a law of token sequences asks of its model

    @property
    def max_new_tokens(self) -> int:
        return self.base.max_new_tokens

    @property
    def vocabulary(self) -> int:
        return self.base.vocabulary

    @property
    def batch_size(self) -> int:
        return self.base.batch_size

    @property
    def pad(self) -> int:
        return int(self.base.pad)

    def _alive(self, tokens: Tensor) -> Tensor:
        return self.base._alive(tokens)

    def _assert_deterministic(self) -> None:
        self.base._assert_deterministic()

    def _step_log_probs(self, prompt: Prompt, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            log_p, states = self.base._read(prompt, tokens, states=True)
        assert states is not None
        return self.twisted(log_p, states, self.before(prompt, tokens))

    def before(self, prompt: Prompt, tokens: Tensor) -> Tensor:
        """The token before each, ``(n, length)``; before the first, the prompt's last."""
        return torch.cat([prompt.ids[:, -1:], tokens[:, :-1]], dim=1)

    def twisted(self, log_p: Tensor, states: Tensor, before: Tensor) -> Tensor:
        """log q of all next tokens, ``(n, length, vocabulary)``."""
        mean, log_sd, _ = self.twist(states, before)
        return (log_p + self.twist.log_psi(mean, log_sd)).log_softmax(-1)

    def _written(self, prompt: Prompt, kept: Tensor, cut: Tensor, z: Tensor | None = None) -> tuple[Tensor, Tensor]:
        memory: list[Tensor | None] = [None]

        def by(step: Tensor, state: Tensor, before: Tensor, t: int) -> Tensor:
            mean, log_sd, memory[0] = self.twist(state[:, None], before[:, None], memory[0], slice(t, t + 1))
            return (step + self.twist.log_psi(mean[:, 0], log_sd[:, 0])).log_softmax(-1)

        return self.base._written(prompt, kept, cut, z, by)


class Readings(NamedTuple):
    """What a language model makes of texts that it wrote, kept so that twists are fitted and compared quickly.

    tokens ``(n, length)``; before: the token before each; states ``(n, length, width)``; log_p ``(n, length,
    vocabulary)`` of each next token; alive: which are written; own ``(n,)``: log p of the text.
    """

    tokens: Tensor
    before: Tensor
    states: Tensor
    log_p: Tensor
    alive: Tensor
    own: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, lm: TwistedLM, tokens: Tensor, prompt: Prompt) -> Readings:
        """Readings of texts ``(n, length)`` after prompts ``(n, ...)``."""
        parts = []
        for i in range(0, len(tokens), lm.batch_size):
            at = slice(i, i + lm.batch_size)
            log_p, states = lm.base._read(prompt.at(at), tokens[at], states=True)
            assert states is not None
            parts.append((states.float(), log_p.float()))
        states, log_p = (torch.cat(column) for column in zip(*parts, strict=True))
        alive = lm._alive(tokens)
        own = torch.where(alive, log_p.gather(2, tokens[..., None])[..., 0].double(), 0.0).sum(1)
        return cls(tokens, lm.before(prompt, tokens), states, log_p, alive, own)

    def plus(self, other: Readings) -> Readings:
        return Readings(*(torch.cat(pair) for pair in zip(self, other, strict=True)))

    def at(self, rows: Any) -> Readings:
        return Readings(*(column[rows] for column in self))

    def log_density(self, lm: TwistedLM) -> Tensor:
        """log q ``(n,)`` of these texts under a twist, differentiable in it."""
        steps = lm.twisted(self.log_p.double(), self.states, self.before)
        chosen = steps.gather(2, self.tokens[..., None])[..., 0]
        return torch.where(self.alive, chosen, 0.0).sum(1)

    def misfit(self, lm: TwistedLM, score: Tensor) -> Tensor:
        """Mean negative log-density of scores ``(n,)`` as normal ones after each prefix, less a constant."""
        mean, log_sd, _ = lm.twist(self.states, self.before)
        mean, log_sd = mean.gather(2, self.tokens[..., None])[..., 0], log_sd[..., 0]
        each = log_sd + 0.5 * ((score[:, None] - mean) / log_sd.exp()) ** 2
        return torch.where(self.alive, each, 0.0).sum() / self.alive.sum()


@dataclass
class Texts:
    """What is known of draws of an adversary: readings of each of its texts. owner: the site of each."""

    readings: list[Readings]
    owner: list[int]

    @classmethod
    def of(cls, adversary: LanguageAdversary, values: dict[str, np.ndarray]) -> Texts:
        """Of values of the sites, each ``(n, ..., length)``."""
        readings, owner = [], []
        tokens = tokens_of(adversary, values)
        for i, (law, value) in enumerate(zip(laws_given(adversary, tokens), tokens.values(), strict=True)):
            lm = law.lm
            assert isinstance(lm, TwistedLM)
            n, length = len(value), value.shape[-1]
            prompt = law.prompt.expand(value.shape[:-1])
            rows = value.reshape(n, -1, length)
            ids, mask = (part.reshape(n, rows.shape[1], -1) for part in prompt)
            for j in range(rows.shape[1]):
                readings.append(Readings.of(lm, rows[:, j], Prompt(ids[:, j], mask[:, j])))
                owner.append(i)
        return cls(readings, owner)

    def __len__(self) -> int:
        return len(self.readings[0].tokens)

    @property
    def device(self) -> torch.device:
        return self.readings[0].own.device

    @property
    def own(self) -> Floats:
        """log p of all texts of a draw, ``(n,)``."""
        return _host(torch.stack([one.own for one in self.readings]).sum(0))

    def plus(self, other: Texts) -> Texts:
        pairs = zip(self.readings, other.readings, strict=True)
        return Texts([one.plus(two) for one, two in pairs], self.owner)

    def at(self, rows: Any) -> Texts:
        return Texts([one.at(rows) for one in self.readings], self.owner)

    def log_ratio(self, adversary: LanguageAdversary) -> Tensor:
        """log q − log p ``(n,)``, differentiable in the twists."""
        lms: Any = adversary.models
        parts = [one.log_density(lms[i]) - one.own for one, i in zip(self.readings, self.owner, strict=True)]
        return torch.stack(parts).sum(0)

    def misfit(self, adversary: LanguageAdversary, score: Tensor) -> Tensor:
        """How badly severities are foreseen, after each prefix of each text."""
        lms: Any = adversary.models
        parts = [one.misfit(lms[i], score) for one, i in zip(self.readings, self.owner, strict=True)]
        return torch.stack(parts).mean()

    def density(self, adversary: LanguageAdversary) -> Floats:
        """log q on the host, in parts."""
        with torch.no_grad():
            ratio = [self.at(slice(i, i + _CHUNK)).log_ratio(adversary) for i in range(0, len(self), _CHUNK)]
        return self.own + _host(torch.cat(ratio))

    def distinct(self) -> np.ndarray:
        """Which text each is, ``(n,)``: equal ones have a number in common."""
        flat = torch.cat([one.tokens for one in self.readings], dim=1)
        return np.asarray(torch.unique(flat, dim=0, return_inverse=True)[1].cpu().numpy())


@dataclass(frozen=True)
class Fit:
    """How twists are fitted: Adam on minibatches of what is shown, until what is not shown is no better for so long."""

    learning_rate: float = tuned(2e-3, "of Adam", _BY)
    steps: int = tuned(1_000, "of training, at most", _BY)
    passes: int = tuned(20, "over what is shown, at most", _BY)
    judged: int = tuned(25, "steps between judgements", _BY)
    patience: int = tuned(4, "judgements without progress", _BY)
    size: int = tuned(128, "texts of a minibatch", _BY)
    unshown: float = tuned(0.2, "of the distinct texts, which judge", _BY)
    floor: float = tuned(10.0, "nats below catastrophes at which log q - log p does not matter further", _BY)

    def foresee(
        self, adversary: LanguageAdversary, texts: Texts, score: Floats, rng: np.random.Generator
    ) -> LanguageAdversary:
        """Learn where severities end, from draws of the adversary itself. score ``(n,)``: standard normal there."""
        at = torch.as_tensor(score, dtype=torch.float32, device=texts.device)
        return self._fitted(
            adversary, texts, np.ones(len(score)), lambda twin, rows, _: texts.at(rows).misfit(twin, at[rows]), rng
        )

    def flatten(
        self, adversary: LanguageAdversary, texts: Texts, slope: Floats, weight: Floats, rng: np.random.Generator
    ) -> LanguageAdversary:
        """Make log q − log p − slope the same everywhere.

        slope ``(n,)``: 0 at what is aimed at, down to ``-floor``, from where on anything lower will do. weight: of
        each draw.
        """
        target = torch.as_tensor(slope, device=texts.device)
        graded = target > -self.floor

        def loss(twin: LanguageAdversary, rows: Any, share: Tensor) -> Tensor:
            ratio, up = texts.at(rows).log_ratio(twin), graded[rows]
            counted = share * up
            constant = (counted @ (ratio - target[rows])).detach() / counted.sum().clamp(min=1e-300)
            gap = torch.where(up, ratio - target[rows] - constant, (ratio - constant + self.floor).clamp(min=0.0))
            return (share @ gap**2) / share.sum()

        return self._fitted(adversary, texts, weight, loss, rng)

    def _fitted(
        self,
        adversary: LanguageAdversary,
        texts: Texts,
        weight: Floats,
        loss: _Loss,
        rng: np.random.Generator,
    ) -> LanguageAdversary:
        """A copy whose twists are fitted. Minibatches are drawn by weight, so they count alike."""
        which = texts.distinct()
        hidden = (rng.random(int(which.max()) + 1) < self.unshown)[which]
        shown, unshown = np.flatnonzero(~hidden), np.flatnonzero(hidden)
        if not (weight[shown].sum() > 0.0 and weight[unshown].sum() > 0.0):
            return adversary
        twin = copy.deepcopy(adversary)
        optimizer = torch.optim.Adam(twin.parameters(), lr=self.learning_rate)
        best, kept, since = math.inf, twin.state_dict(), 0
        law = weight[shown] / weight[shown].sum()
        alike = torch.ones(self.size, dtype=torch.float64, device=texts.device)
        for step in range(min(self.steps, math.ceil(self.passes * len(shown) / self.size)) + 1):
            if step % self.judged == 0:
                judged = self._judged(twin, unshown, weight, loss, texts.device)
                since += 1
                if judged < best:
                    best, kept, since = judged, {k: v.clone() for k, v in twin.state_dict().items()}, 0
                if since > self.patience:
                    break
            rows = shown[rng.choice(len(shown), size=self.size, p=law)]
            optimizer.zero_grad()
            loss(twin, rows, alike).backward()
            nn.utils.clip_grad_norm_(twin.parameters(), 10.0)
            optimizer.step()
        twin.load_state_dict(kept)
        return twin

    def _judged(
        self, twin: LanguageAdversary, rows: np.ndarray, weight: Floats, loss: _Loss, device: torch.device
    ) -> float:
        parts = [rows[i : i + _CHUNK] for i in range(0, len(rows), _CHUNK)]
        with torch.no_grad():
            each = np.array([float(loss(twin, part, torch.as_tensor(weight[part], device=device))) for part in parts])
        share = np.array([weight[part].sum() for part in parts])
        return float(each @ share / share.sum())


def untwisted(program: Callable[[], Any]) -> LanguageAdversary:
    """The program with twists that do nothing yet."""
    return LanguageAdversary(program, twist=True)


def at_level(adversary: LanguageAdversary, level: float) -> LanguageAdversary:
    """A copy whose twists aim at severities so many standard deviations out."""
    twin = copy.deepcopy(adversary)
    with torch.no_grad():
        for lm in twin.models:
            assert isinstance(lm, TwistedLM)
            lm.twist.level.fill_(level)
    return twin


def to_normals(
    adversary: LanguageAdversary, values: dict[str, np.ndarray], uniform: dict[str, np.ndarray]
) -> dict[str, Floats]:
    """Coordinates from which the untwisted program draws these values of its sites; see TokenSequences.to_normals."""
    tokens, found = tokens_of(adversary, values), {}
    for law, (name, value) in zip(laws_given(adversary, tokens), tokens.items(), strict=True):
        assert isinstance(law.lm, TwistedLM)
        plain = TokenSequences(law.lm.base, law.prompt.expand(value.shape[:-1]))
        found[name] = _host(plain.to_normals(value, torch.as_tensor(uniform[name], device=value.device)))
    return found


def placed(
    event: Event, adversary: LanguageAdversary, values: dict[str, np.ndarray], z: Floats, rng: np.random.Generator
) -> tuple[Floats, np.ndarray]:
    """z ``(n, dim)`` with coordinates at which the event's sites have these values, and which rows do."""
    inside = {name: rng.uniform(1e-3, 1.0 - 1e-3, size=value.shape) for name, value in values.items()}
    for name, normals in to_normals(adversary, values, inside).items():
        z[:, event.composition.slices[name]] = normals.reshape(len(z), -1)
    drawn = event.site_values(z, tuple(values))
    return z, np.all([(drawn[name] == value).reshape(len(z), -1).all(axis=1) for name, value in values.items()], axis=0)


def tokens_of(adversary: LanguageAdversary, values: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """Values of the adversary's sites, in its order."""
    found = {}
    for name, lm in zip(adversary.sites, adversary.models, strict=True):
        device = cast(CausalLM, lm.base if isinstance(lm, TwistedLM) else lm).prompt_ids.device
        found[name] = torch.as_tensor(values[name], device=device).long()
    return found


def laws_given(adversary: LanguageAdversary, tokens: dict[str, Tensor]) -> list[TokenSequences]:
    """The law of each site, given values ``(n, ..., length)`` of all of them: what is read may be another's text."""

    def prompts(row: dict[str, Tensor]) -> list[tuple[Tensor, ...]]:
        nodes: Any = pyro.poutine.trace(pyro.poutine.condition(adversary, data=row)).get_trace().nodes
        return [tuple(nodes[name]["fn"].prompt) for name in row]

    with torch.no_grad():
        found = torch.func.vmap(prompts)(tokens)
    return [
        TokenSequences(cast(Writer, lm), Prompt(*prompt)) for lm, prompt in zip(adversary.models, found, strict=True)
    ]


def _host(value: Tensor) -> Floats:
    return np.asarray(value.detach().cpu().numpy(), dtype=np.float64)
