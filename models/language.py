"""Language models small enough to check against: one of 5 tokens and 4 steps, whose sequences can all be listed.

Its weights are random, from a seed. Token 4 ends a sequence and token 3 pads it, so that there are 4 + 16 + 64 + ...
sequences in all, which :func:`sequences` lists.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from probest.adversaries.language import CausalLM

TOKENS, STEPS, PAD, END = 5, 4, 3, 4


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
