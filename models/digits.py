"""A classifier of handwritten digits that is sure of the wrong digit, while a trusted reader is sure of the right one.

**D** draws an 8x8 digit from 85 latents: a class, 16 style factors (principal components of that class, fitted to
1,000 of scikit-learn's real digits), a sub-pixel shift, contrast, brightness, and noise on each of the 64 pixels.
**M** is a small network trained on those 1,000 images in seconds. **C** is a *reader* that is slow but trusted: it
compares x with all 1,000 images by a kernel density per class,

    p(x | c) = sum over images t of class c of exp(-|x - t|^2 / 2h^2),

with an eleventh class, "no digit", whose density is constant, so that it is never sure of what resembles nothing it
knows. With beliefs r of the reader and m of M, the severity, in nats, is

    max over i != j of logit(r_i m_j) - logit(SURE).

It is >= 0 exactly if the chance that both are right, in naming two different digits, is at least ``SURE``; then each
is at least that sure. ``logit(r m) = -log(e^-a + e^-b + e^-(a + b))`` for log-odds a and b: a smooth minimum of them.

Reference values: the reader names 98.9 % of the test images correctly, is ``SURE`` of 68 %, and of these none is wrong.
M as ``train_model()`` makes it has a test accuracy of 96.7 % and log P of about -11.8.

Everything is written for one image and works under ``torch.func.vmap``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

if TYPE_CHECKING:
    from probest import Problem

CLASSES = 10
SIDE = 8
PIXELS = SIDE * SIDE
EACH = 100  # training images of each class
STYLES = 16

STYLE_SCALE = 0.8  # of the fitted standard deviations
SHIFT_SCALE = 0.25  # pixels
CONTRAST_SCALE = 0.1  # of the logarithm
BRIGHTNESS_SCALE = 0.03
NOISE_SCALE = 0.06

READER_BANDWIDTH = 0.12**0.5
READER_REJECTS = 4.0  # squared distance at which one image and "no digit" are equally likely
SURE = 0.9995

BATCH = 100
DRAWN, KEPT = 1024, 128  # of the baseline: images sampled a step, and trained on

# Arguments of ``probest.train`` that work here. There are many modes, and a call is cheap: the budgets are large.
TRAINING = {
    "until_log_prob": -26.0,
    "learning_rate": 3e-3,
    "batch_size": BATCH,
    "steps": 700,
    "check_every": 100,
    "check_budget": 50_000,
    "budget": 120_000,
}


class Data(NamedTuple):
    """``images`` are ``(n, 64)`` in [0, 1]; ``labels`` are ``(n,)`` integers."""

    images: Tensor
    labels: Tensor


class Style(NamedTuple):
    """A linear-Gaussian model of each class: ``mean`` is ``(10, 64)``, ``loadings`` ``(10, 64, STYLES)``."""

    mean: Tensor
    loadings: Tensor


@cache
def load_data() -> tuple[Data, Data]:
    """The 1,797 real digits, shuffled once by a fixed seed: 100 of each class to train on, the other 797 to test on.

    The training images are in the order of their classes.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    ranked = [order[digits.target[order] == digit] for digit in range(CLASSES)]
    train, test = (np.concatenate([rows[part] for rows in ranked]) for part in (slice(EACH), slice(EACH, None)))
    images, labels = torch.tensor(digits.data / 16.0, dtype=torch.float32), torch.tensor(digits.target)
    return Data(images[train], labels[train]), Data(images[test], labels[test])


@cache
def fitted_style() -> Style:
    """The mean of each class in the training images and its leading principal components, scaled to unit factors."""
    images = load_data()[0].images.reshape(CLASSES, EACH, PIXELS).double()
    mean = images.mean(1)
    _, scale, directions = torch.linalg.svd(images - mean[:, None], full_matrices=False)
    loadings = directions[:, :STYLES].mT * scale[:, None, :STYLES] / EACH**0.5
    return Style(mean.float(), loadings.float())


# The adversary --------------------------------------------------------------------------------------------------------


def adversary(held: int | None = None) -> Tensor:
    """D: an image of shape ``(64,)``; of class ``held``, where one is given."""
    if held is None:
        digit = pyro.sample("digit", dist.Categorical(torch.ones(CLASSES) / CLASSES))
    else:
        digit = torch.tensor(held)
    style = pyro.sample("style", dist.Normal(torch.zeros(STYLES), 1.0).to_event(1))
    shift = pyro.sample("shift", dist.Normal(torch.zeros(2), SHIFT_SCALE).to_event(1))
    contrast = pyro.sample("contrast", dist.Normal(0.0, CONTRAST_SCALE))
    brightness = pyro.sample("brightness", dist.Normal(0.0, BRIGHTNESS_SCALE))
    noise = pyro.sample("noise", dist.Normal(torch.zeros(PIXELS), NOISE_SCALE).to_event(1))
    return make_image(digit, style, shift, contrast, brightness, noise)


def make_image(
    digit: Tensor, style: Tensor, shift: Tensor, contrast: Tensor, brightness: Tensor, noise: Tensor
) -> Tensor:
    """The image ``(64,)`` of one setting of the latents. Smooth in all but the digit; pixels are not clamped."""
    fitted = fitted_style()
    index = digit.long().reshape(1)
    mean, loadings = fitted.mean.index_select(0, index)[0], fitted.loadings.index_select(0, index)[0]
    ink = translate((mean + STYLE_SCALE * loadings @ style).reshape(SIDE, SIDE), shift).reshape(PIXELS)
    return contrast.exp() * ink + brightness + noise


def translate(image: Tensor, shift: Tensor) -> Tensor:
    """``image`` ``(8, 8)`` moved down and right by ``shift`` ``(2,)`` pixels, bilinearly, blank paper moving in."""
    grid = torch.arange(SIDE, dtype=image.dtype)
    tents = torch.relu(1 - (grid[:, None] - grid - shift[:, None, None]).abs())
    return tents[0] @ image @ tents[1].T


# The model ------------------------------------------------------------------------------------------------------------


def make_model(seed: int = 0) -> nn.Module:
    """An untrained network from ``(..., 64)`` to logits ``(..., 10)``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(PIXELS, 128), nn.GELU(), nn.Linear(128, 64), nn.GELU(), nn.Linear(64, CLASSES))


def task_loss(model: Callable[[Tensor], Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy of a minibatch ``(images, labels)``, in nats."""
    images, labels = batch
    return cross_entropy(model(images), labels)


def train_model(
    model: nn.Module | None = None, *, steps: int = 1500, batch_size: int = BATCH, seed: int = 0
) -> nn.Module:
    """A copy of ``model`` trained on the 1,000 images the ordinary way: Adam, minibatches, weight decay."""
    model = copy.deepcopy(model) if model is not None else make_model(seed)
    train, _ = load_data()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        batch = torch.randint(len(train.images), (batch_size,), generator=generator)
        optimizer.zero_grad()
        task_loss(model, (train.images[batch], train.labels[batch])).backward()
        optimizer.step()
    return model


def accuracy(model: Callable[[Tensor], Tensor]) -> float:
    """The share of the 797 test images that ``model`` classifies correctly."""
    _, test = load_data()
    with torch.no_grad():
        return (model(test.images).argmax(-1) == test.labels).float().mean().item()


# The checker ----------------------------------------------------------------------------------------------------------


def reader_log_beliefs(image: Tensor) -> Tensor:
    """The trusted reader's log-probability of each digit, ``(10,)``, from a look at all the training images."""
    known = load_data()[0].images
    squared_distance = known.square().sum(1) - 2 * known @ image + image.square().sum()
    log_density = torch.logsumexp(-squared_distance.reshape(CLASSES, EACH) / (2 * READER_BANDWIDTH**2), 1)
    no_digit = image.new_full((1,), -READER_REJECTS / (2 * READER_BANDWIDTH**2))
    return torch.log_softmax(torch.cat([log_density, no_digit]), 0)[:CLASSES]


def checker(image: Tensor, logits: Tensor) -> Tensor:
    """C: log-odds that the reader and M are both sure, of two different digits, beyond ``SURE``."""
    both = reader_log_beliefs(image)[:, None] + torch.log_softmax(logits, 0)
    worst = both.masked_fill(torch.eye(CLASSES, dtype=torch.bool), -torch.inf).amax()
    severity: Tensor = worst - torch.log(-torch.expm1(worst.clamp(max=-1e-6))) - math.log(SURE / (1 - SURE))
    return severity


def show(ax: Any, case: Any) -> None:
    """Draw one case: the image, what M takes it for, and what the reader does."""
    image, logits = np.asarray(case.observation), np.asarray(case.action)
    named = int(reader_log_beliefs(torch.tensor(image, dtype=torch.float32)).argmax())
    ax.imshow(image.reshape(SIDE, SIDE), cmap="gray_r", vmin=0.0, vmax=1.0)
    ax.set_axis_off()
    ax.set_title(f"M: {logits.argmax()}, reader: {named}", fontsize="x-small", pad=2)


def adversarial_baseline(model: nn.Module, calls: int, seed: int = 0) -> nn.Module:
    """A copy of ``model`` trained on the worst cases that sampling finds, what ``calls`` model calls buy.

    Each step draws ``DRAWN`` images from D (a call each), keeps the ``KEPT`` of greatest severity, labels them as the
    reader does, and descends the task loss on these (three calls each) together with a minibatch of real images.
    """
    model = copy.deepcopy(model)
    train, _ = load_data()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2)
    generator = torch.Generator().manual_seed(seed)
    event, rng = problem(model).event, np.random.default_rng(seed)
    for _ in range(max(1, calls // (DRAWN + 3 * KEPT))):
        images = event.observe(rng.standard_normal((DRAWN, event.dim)))
        with torch.no_grad():
            severity = torch.vmap(checker)(images, model(images))
        worst = images[severity.topk(KEPT).indices]
        named = torch.vmap(reader_log_beliefs)(worst).argmax(1)
        batch = torch.randint(len(train.images), (BATCH,), generator=generator)
        optimizer.zero_grad()
        loss = task_loss(model, (train.images[batch], train.labels[batch])) + task_loss(model, (worst, named))
        loss.backward()
        optimizer.step()
    return model


def problem(model: nn.Module | None = None, *, held: int | None = None) -> Problem:
    """The problem of ``model``, or of the ordinarily trained network; with images of class ``held`` alone."""
    from probest import Problem

    drawn = adversary if held is None else partial(adversary, held)
    return Problem(drawn, train_model() if model is None else model, checker)
