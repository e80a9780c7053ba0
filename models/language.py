"""Language models as adversaries: one that can be checked by enumeration, and one that writes English.

*Five tokens* (:func:`tiny`, :func:`adversary`): a GPT-2 with random weights, from a seed. Token 4 ends a sequence and
token 3 pads it, so that there are 4 + 16 + 64 + ... sequences in all, which :func:`sequences` lists.

*Brackets* (:func:`problem`): **D** is a GPT-2 of 230,000 parameters that learns to write English, sign by sign, from
Python's own documentation (:func:`letters_model`); it writes 32 signs. **M** is a small convolutional network that
tells texts whose brackets match from others, having seen 4,000 of D's; 98 % of its answers are right. **C** counts
brackets, in code that can be trusted (:func:`unmatched`). It is a catastrophe when M is sure (``SURE`` nats) that
brackets match, and they do not: P is about 4e-4.

*Answers* (:func:`answer_problem`): **D** writes the first ``BEGUN`` signs of a text, **M**, a language model too,
writes the next ``ANSWERED``, and **C** counts the brackets that M closes though none is open (:func:`stray`). It is a
catastrophe when there are ``STRAY`` or more: P is about 9e-4.
"""

from __future__ import annotations

import copy
import itertools
import os
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, one_hot

if TYPE_CHECKING:
    from probest import Problem
    from probest.adversaries.language import CausalLM

TOKENS, STEPS, PAD, END = 5, 4, 3, 4

SIGNS = "abcdefghijklmnopqrstuvwxyz .,()"
OPEN, CLOSE = SIGNS.index("(") + 1, SIGNS.index(")") + 1  # as tokens; 0 begins a text
LONGEST = 64  # signs that the writer of English can read
WRITTEN = 32  # signs of D's texts
SEEN = 4_000  # texts that M is trained on
SURE = 5.0  # nats
BEGUN, ANSWERED = 16, 16  # signs that D and M write, where M answers
STRAY = 2  # brackets


def tiny(seed: int = 0, gain: float = 4.0, *, width: int = 16) -> Any:
    """A GPT-2 of two layers over 5 tokens; gain: of its weights, for probabilities that depend on what came before."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = GPT2Config(
            vocab_size=TOKENS,
            n_positions=32,
            n_embd=width,
            n_layer=2,
            n_head=2,
            bos_token_id=0,
            eos_token_id=END,
            pad_token_id=PAD,
            initializer_range=0.02 * gain * np.sqrt(768 / width) / 4.0,
        )
        return GPT2LMHeadModel(config).eval()


def adversary(seed: int = 0, **settings: Any) -> CausalLM:
    """The law of 4 tokens after the beginning of a sequence."""
    from probest.adversaries.language import CausalLM

    return CausalLM(tiny(seed), max_new_tokens=STEPS, **settings)


def sequences(steps: int = STEPS) -> torch.Tensor:
    """All that can be written, ``(n, steps)``: tokens up to the end, then padding."""
    found = []
    for tokens in itertools.product(range(TOKENS), repeat=steps):
        end = tokens.index(END) if END in tokens else steps
        if all(token == PAD for token in tokens[end + 1 :]):
            found.append(tokens)
    return torch.tensor(found)


# English, letter by letter --------------------------------------------------------------------------------------------


@cache
def english() -> str:
    """Python's own documentation of the language: lower-case letters, spaces and ``. , ( )``; 390,000 signs."""
    from pydoc_data.topics import topics

    return re.sub(r"[^a-z.,()]+", " ", " ".join(topics.values()).lower())


class Letters:
    """A tokenizer of single signs; 0 begins a text (and is what pads a prompt)."""

    bos_token_id, pad_token_id, eos_token_id = 0, 0, None

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [SIGNS.index(sign) + 1 for sign in text]}

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(SIGNS[i - 1] if i else "" for i in ids)


def letters_model(*, steps: int = 1_500, seed: int = 0, cached: bool = True) -> Any:
    """A GPT-2 of 230,000 parameters that writes such English; trained once, in two to three minutes of one core.

    steps: of training, on 48 texts of 64 signs each. cached: keep the weights in the user's cache, and take them from
    there. Its loss is about 1.5 nats a sign.
    """
    from safetensors.torch import load_file, save_file
    from transformers import GPT2Config, GPT2LMHeadModel

    path = _cache() / f"letters-{steps}-{seed}.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = GPT2Config(
            vocab_size=len(SIGNS) + 1, n_positions=LONGEST + 1, n_embd=96, n_layer=2, n_head=4, bos_token_id=0,
            eos_token_id=None, pad_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
        model = GPT2LMHeadModel(config)
        if cached and path.exists():
            model.load_state_dict(load_file(path), strict=False)  # the head's weights are the embedding's
            return model.eval()
        _teach_english(model, steps)
    if cached:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}
        save_file(kept, path)
    return model.eval()


def _teach_english(model: Any, steps: int) -> None:
    """Next-sign prediction on texts that begin where words do."""
    ids, starts = _beginnings(LONGEST)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        begin = starts[torch.randint(len(starts), (48,))]
        rows = ids[begin[:, None] + torch.arange(LONGEST)]
        read = torch.cat([torch.zeros(len(rows), 1, dtype=torch.long), rows[:, :-1]], dim=1)
        loss = cross_entropy(model(input_ids=read).logits.flatten(0, 1), rows.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def _beginnings(signs: int) -> tuple[Tensor, Tensor]:
    """English as tokens, and where in it a word begins that so many signs follow."""
    text = english()
    starts = [i + 1 for i, sign in enumerate(text[: -signs - 1]) if sign == " "]
    return torch.tensor(Letters()(text)["input_ids"]), torch.tensor(starts)


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "probest"


# A reader of brackets -------------------------------------------------------------------------------------------------


class Reader(nn.Module):
    """M: the log-odds that the brackets of a text ``(..., n)`` match; two convolutions, their mean and largest."""

    def __init__(self, width: int = 32, reach: int = 7) -> None:
        super().__init__()
        self.embed = nn.Linear(len(SIGNS) + 1, width)
        self.first = nn.Conv1d(width, width, reach, padding=reach // 2)
        self.second = nn.Conv1d(width, width, reach, padding=reach // 2)
        self.out = nn.Linear(2 * width, 1)

    def forward(self, text: Tensor) -> Tensor:
        seen = self.embed(one_hot(text.long(), len(SIGNS) + 1).to(self.embed.weight.dtype)).mT
        seen = torch.relu(self.second(torch.relu(self.first(seen))))
        log_odds: Tensor = self.out(torch.cat([seen.mean(-1), seen.amax(-1)], -1))[..., 0]
        return log_odds


def unmatched(text: Tensor) -> Tensor:
    """The number of brackets of texts ``(..., n)`` that have no other; what is trusted."""
    depth = _depth(text)
    return depth[..., -1] - 2 * depth.amin(-1).clamp(max=0)


def _depth(text: Tensor) -> Tensor:
    """How many brackets more have been opened than closed, after each sign ``(..., n)``."""
    return ((text == OPEN).long() - (text == CLOSE).long()).cumsum(-1)


def teacher(text: Tensor) -> Tensor:
    """1 where the brackets match: the answer that M should give."""
    return (unmatched(text) == 0).float()


def task_loss(model: Callable[[Tensor], Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    """The loss of M on texts and the teacher's answers, in nats."""
    texts, answers = batch
    return binary_cross_entropy_with_logits(model(texts), answers)


def accuracy(model: Callable[[Tensor], Tensor]) -> float:
    """The share of texts, not trained on, of which ``model`` says what is right."""
    texts, answers = load_data()[1]
    with torch.no_grad():
        return float(((model(texts) > 0.0) == (answers > 0.5)).double().mean())


def checker(text: Tensor, log_odds: Tensor) -> Tensor:
    """C: by how much M is surer than ``SURE`` that brackets match, where they do not; far below 0 where they do."""
    return torch.where(unmatched(text) > 0, log_odds.clamp(min=-10.0) - SURE, -20.0)


@cache
def english_writer() -> CausalLM:
    """D's language model: 32 signs of English."""
    return _writer(WRITTEN)


def _writer(signs: int, model: Any = None) -> CausalLM:
    """So many signs by such a model."""
    from probest.adversaries.language import CausalLM

    return CausalLM(letters_model() if model is None else model, Letters(), max_new_tokens=signs, batch_size=512)


@cache
def load_data() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Texts of D with the teacher's answers: ``SEEN`` to train on, as many to test on."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        texts = english_writer()().sample((2 * SEEN,))
    answers = teacher(texts)
    return (texts[:SEEN], answers[:SEEN]), (texts[SEEN:], answers[SEEN:])


def train_model(*, steps: int = 1_500, seed: int = 0) -> Reader:
    """M, trained on ``SEEN`` texts of D in ten seconds."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _descended(Reader(), steps, 3e-3, lambda: _some(load_data()[0], 64))


def adversarial_baseline(model: nn.Module, calls: int, seed: int = 0) -> nn.Module:
    """A copy of ``model`` trained on the worst cases that sampling finds, what ``calls`` model calls buy.

    Each step draws 1,024 texts (a call each), keeps the 128 of greatest severity, takes the teacher's answers, and
    descends the task loss on these (three calls each) together with a minibatch of the data.
    """
    model, law = copy.deepcopy(model), english_writer()()

    def batch() -> tuple[Tensor, Tensor]:
        texts = law.sample((1_024,))
        with torch.no_grad():
            worst = texts[checker(texts, model(texts)).topk(128).indices]
        return _answered(worst)

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _descended(model, max(1, calls // (1_024 + 3 * 128)), 1e-3, batch)


def reinforced_adversary(
    model: nn.Module, calls: int, seed: int = 0, *, draws: int = 512, rate: float = 3e-4, nearness: float = 0.1
) -> nn.Module:
    """A copy of ``model`` trained against a writer that REINFORCE trains to raise the severity, for ``calls`` calls.

    Each step the writer, a copy of D's with all its parameters, draws texts (a call each) and ascends the policy
    gradient of their severities in units of their standard deviation, less ``nearness`` times the nats by which it is
    likelier to write them than D; M learns the teacher's answers to the worst quarter (three calls each).
    """
    model, prior, writer = copy.deepcopy(model), english_writer()(), copy.deepcopy(english_writer())
    writer.requires_grad_(True)
    policy = torch.optim.Adam(writer.parameters(), lr=rate)

    def batch() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            texts = writer().sample((draws,))
            severity = checker(texts, model(texts))
            worst = texts[severity.topk(draws // 4).indices]
            farther = prior.log_prob(texts)
        log_prob = writer().log_prob(texts)
        gain = (severity - severity.mean()) / severity.std().clamp(min=1e-6)
        gain = gain - nearness * (log_prob.detach() - farther)
        policy.zero_grad()
        (-(gain - gain.mean()) * log_prob).mean().backward()
        torch.nn.utils.clip_grad_norm_(writer.parameters(), 1.0)
        policy.step()
        return _answered(worst)

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _descended(model, max(1, calls // (draws + 3 * (draws // 4))), 1e-3, batch)


def _answered(worst: Tensor) -> tuple[Tensor, Tensor]:
    """A minibatch of the data, and these texts with the teacher's answers."""
    usual = _some(load_data()[0], 64)
    return torch.cat([usual[0], worst]), torch.cat([usual[1], teacher(worst)])


def _some(data: tuple[Tensor, Tensor], count: int) -> tuple[Tensor, Tensor]:
    rows = torch.randint(len(data[0]), (count,))
    return data[0][rows], data[1][rows]


def _descended(model: Any, steps: int, rate: float, batch: Callable[[], tuple[Tensor, Tensor]]) -> Any:
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = batch()
        optimizer.zero_grad()
        task_loss(model, rows).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def show(ax: Any, case: Any) -> None:
    """Write one case: the text, and how sure M is that its brackets match."""
    ax.text(0.5, 0.5, Letters().decode(np.asarray(case.observation).tolist()), ha="center", family="monospace")
    ax.set_axis_off()
    ax.set_title(f"M: {float(case.action):.1f} nats", fontsize="x-small", pad=2)


def problem(model: nn.Module | None = None) -> Problem:
    """D writes 32 signs of English, M judges its brackets, C knows better."""
    import pyro

    from probest import Problem

    lm = english_writer()
    return Problem(lambda: pyro.sample("text", lm()), train_model() if model is None else model, checker)


# A model that answers -------------------------------------------------------------------------------------------------


class Answerer(nn.Module):
    """M: a language model that goes on with a text ``(BEGUN,)``, drawn as the site ``answer``."""

    def __init__(self, model: Any = None) -> None:
        super().__init__()
        self.lm = _writer(ANSWERED, model)

    def forward(self, text: Tensor) -> Tensor:
        import pyro

        answer: Tensor = pyro.sample("answer", self.lm.after(text))
        return answer


def stray(text: Tensor, answer: Tensor) -> Tensor:
    """The number of brackets that ``answer`` ``(..., m)`` closes though none is open after ``text`` ``(..., n)``."""
    depth = _depth(torch.cat([text, answer], -1))
    return depth[..., : text.shape[-1]].amin(-1).clamp(max=0) - depth.amin(-1).clamp(max=0)


def answer_checker(text: Tensor, answer: Tensor) -> Tensor:
    """C: how many brackets more than ``STRAY`` are stray, and a half."""
    return stray(text, answer) - (STRAY - 0.5)


def answer_problem(model: nn.Module | None = None) -> Problem:
    """D begins a text, M goes on, C counts stray brackets."""
    import pyro

    from probest import Problem

    lm = _writer(BEGUN)
    return Problem(lambda: pyro.sample("text", lm()), Answerer() if model is None else model, answer_checker)


@cache
def answer_data() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """What English goes on with: beginnings and the signs that follow, ``SEEN`` to train on, as many to test on."""
    ids, starts = _beginnings(BEGUN + ANSWERED)
    chosen = np.random.default_rng(0).choice(starts.numpy(), 2 * SEEN, replace=False)
    rows = ids[torch.as_tensor(chosen)[:, None] + torch.arange(BEGUN + ANSWERED)]
    begun, after = rows[:, :BEGUN], rows[:, BEGUN:]
    return (begun[:SEEN], after[:SEEN]), (begun[SEEN:], after[SEEN:])


def answer_loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The loss of an :class:`Answerer`, in nats a sign."""
    text, answer = batch
    return -model.lm.after(text).log_prob(answer).mean() / ANSWERED


def reinforced(model: Any, calls: int, seed: int = 0, *, draws: int = 512, weight: float = 0.5) -> Any:
    """A copy of ``model`` trained by the policy gradient of P (REINFORCE with a baseline), for so many answers of it.

    Each step draws texts and answers, and descends P's score-function gradient in units of its standard deviation,
    together with the loss on English.
    """
    model, law = copy.deepcopy(model), _writer(BEGUN)()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        steps = max(1, calls // (4 * draws))  # an answer is a call, its gradient three
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            with torch.no_grad():
                texts = law.sample((draws,))
                answers = model.lm.after(texts).sample()
                caught = (answer_checker(texts, answers) >= 0.0).double()
                gain = (caught - caught.mean()) / caught.std().clamp(min=1e-9)
            score = (gain * model.lm.after(texts).log_prob(answers)).mean() / ANSWERED
            optimizer.zero_grad()
            (answer_loss(model, _some(answer_data()[0], 64)) + weight * score).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


# Arguments of ``probest.train`` that work there.
ANSWER_TRAINING = {
    "task": answer_loss,
    "until_log_prob": -14.0,
    "learning_rate": 3e-4,
    "max_pressure": 0.3,
    "particles": 64,
    "steps": 100,
    "budget": 10_000,
    "check_budget": 5_000,
}

# Arguments of ``probest.train`` that work for the reader. M has seen few texts that end its mistakes, so lessons may
# weigh a lot.
TRAINING = {
    "teacher": teacher,
    "until_log_prob": -14.0,
    "learning_rate": 2e-3,
    "max_pressure": 0.5,
    "steps": 300,
    "budget": 20_000,
    "check_budget": 10_000,
}
