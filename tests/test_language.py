"""Language models as laws of token sequences: against enumeration."""

from __future__ import annotations

import collections
import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

pytest.importorskip("transformers", reason="language models need the extra lm: pip install 'probest[lm]'")

from models import language
from probest import (
    GradientError,
    LearnedProposal,
    MonteCarlo,
    Pool,
    Problem,
    Splitting,
    UnmetNeedError,
    estimate,
    search,
    train,
)
from probest.adversaries.language import CausalLM, LanguageAdversary, LanguageModelError, models_of
from probest.testing import FAILURE_RATE

pytestmark = pytest.mark.global_rng  # draws are torch's


@pytest.fixture(autouse=True)
def fixed_seed() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


MASK = torch.tensor([True, True, False, False, True])
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cold": {"temperature": 0.6},
    "masked": {"allowed": MASK},
    "endless": {"allowed": torch.tensor([[True] * 4 + [False]] * 3 + [[True] * 5])},
    "prompted": {"prompt": [0, 2, 1]},
    "small batches": {"batch_size": 400},
}


def fits(counts: np.ndarray, probs: np.ndarray) -> bool:
    """Whether counts are those of these probabilities, by a likelihood ratio over cells of 5 expected and more."""
    n = counts.sum()
    large = n * probs >= 5.0
    seen = np.append(counts[large], counts[~large].sum())
    expected = np.append(n * probs[large], max(n * probs[~large].sum(), 1e-9))
    keep = expected >= 5.0
    seen, expected = seen[keep], expected[keep] * seen[keep].sum() / expected[keep].sum()
    return bool(stats.power_divergence(seen, expected, lambda_="log-likelihood").pvalue > FAILURE_RATE)


def counted(x: torch.Tensor) -> np.ndarray:
    found = collections.Counter(map(tuple, x.reshape(-1, x.shape[-1]).tolist()))
    every = [tuple(row) for row in language.sequences().tolist()]
    assert set(found) <= set(every)
    return np.array([found[row] for row in every])


@pytest.mark.parametrize("name", SETTINGS)
def test_probabilities_sum_to_one_and_are_those_of_the_draws(name: str) -> None:
    law = language.adversary(**SETTINGS[name])()
    with torch.no_grad():
        log_p = law.log_prob(language.sequences())
        assert float(log_p.exp().sum()) == pytest.approx(1.0, abs=1e-6)
        x, log_q = law.sample_and_log_prob((2_000,))
        torch.testing.assert_close(log_q, law.log_prob(x), atol=1e-5, rtol=0.0)
    assert x.shape == (2_000, language.STEPS)
    assert x.dtype == torch.int64
    assert fits(counted(x), log_p.exp().numpy())


def test_a_batch_of_prompts_is_each_of_them() -> None:
    prompts = [[0], [0, 1, 2, 2, 1], [2, 1]]
    together = language.adversary(prompt=prompts)()
    assert together.batch_shape == (3,)
    x = together.sample((50,))
    assert x.shape == (50, 3, language.STEPS)
    with torch.no_grad():
        both = together.log_prob(x)
        for i, prompt in enumerate(prompts):
            alone = language.adversary(prompt=prompt)()
            assert alone.batch_shape == ()
            torch.testing.assert_close(both[:, i], alone.log_prob(x[:, i]), atol=1e-5, rtol=0.0)
        every = language.sequences()[:, None].expand(-1, 3, -1)
        torch.testing.assert_close(together.log_prob(every).exp().sum(0), torch.ones(3, dtype=torch.float64))
    for i in range(3):
        drawn = together.sample((1_000,))[:, i]
        with torch.no_grad():
            assert fits(counted(drawn), together.log_prob(every)[:, i].exp().numpy())


def test_a_cache_changes_nothing() -> None:
    lm = language.adversary(prompt=[[0, 1], [2]])
    x, log_q = lm().sample_and_log_prob((200,))
    with torch.no_grad():
        ids = torch.cat([lm.prompt_ids.expand(200, 2, -1).reshape(400, -1), x.reshape(400, -1)], dim=1)
        for t in range(language.STEPS):  # one step at a time, without a cache and without padding
            rows = ids[1::2, 1 : 2 + t]
            logits = lm.model(rows).logits[:, -1].double().log_softmax(-1)
            one = lm().token_log_prob(x)[:, 1, t]
            alive = (x[:, 1, :t] != language.END).all(-1)
            torch.testing.assert_close(one[alive], logits.gather(1, x[:, 1, t, None])[alive, 0], atol=1e-5, rtol=0.0)
    assert torch.isfinite(log_q).all()


def test_what_cannot_be_written_has_probability_zero() -> None:
    law = language.adversary(allowed=MASK)()
    with torch.no_grad():
        log_p = law.log_prob(torch.tensor([[2, 0, 0, 0], [0, 4, 1, 0], [0, 4, 3, 3], [0, 1, 0, 1]]))
    assert torch.isinf(log_p).tolist() == [True, True, False, False]
    assert law.support.check(torch.tensor([[0, 4, 1, 0], [0, 4, 3, 3], [0, 9, 0, 0]])).tolist() == [False, True, False]


@pytest.mark.parametrize("cut", [0, 2, 4])
def test_regenerating_a_suffix_keeps_the_prefix_and_the_law(cut: int) -> None:
    law = language.adversary()()
    x = law.sample((4_000,))
    y = law.regenerate(x, cut)
    assert (y[:, :cut] == x[:, :cut]).all()
    with torch.no_grad():
        log_p = law.log_prob(language.sequences())
    assert fits(counted(y), log_p.exp().numpy())
    if cut == language.STEPS:
        assert (y == x).all()
    else:
        ended = (x[:, :cut] == language.END).any(1)
        assert (y[ended] == x[ended]).all()
        assert (y[~ended] != x[~ended]).any()


def test_each_sequence_has_its_own_cut() -> None:
    law = language.adversary()()
    x = law.sample((600,))
    cut = torch.randint(0, 5, (600,))
    y = law.regenerate(x, cut)
    kept = torch.arange(language.STEPS) < cut[:, None]
    assert (y[kept] == x[kept]).all()
    with pytest.raises(LanguageModelError, match="cut=5"):
        law.regenerate(x, 5)


def test_regeneration_is_reversible() -> None:
    """The flow from one set of sequences to another is that back, for a uniform cut."""
    law = language.adversary()()
    x = law.sample((6_000,))
    y = law.regenerate(x, torch.randint(0, language.STEPS, (6_000,)))
    forth, back = (((a[:, 0] == 0) & (b[:, 0] == 1)).sum().item() for a, b in ((x, y), (y, x)))
    assert stats.binomtest(forth, forth + back).pvalue > FAILURE_RATE


def test_gradients_are_those_of_central_differences() -> None:
    lm = language.adversary()
    x = lm().sample((5,))
    weight = lm.model.transformer.h[0].attn.c_attn.weight
    lm.double()
    lm().log_prob(x).sum().backward()
    analytic, step = weight.grad[0, 0].item(), 1e-5
    values = []
    for side in (1.0, -1.0):
        with torch.no_grad():
            weight[0, 0] += side * step
            values.append(lm().log_prob(x).sum().item())
            weight[0, 0] -= side * step
    assert analytic == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-4, abs=1e-8)


def test_kl_is_zero_at_first_and_that_of_enumeration_after() -> None:
    lm, every = language.adversary(), language.sequences()
    prior = lm.frozen()
    assert not any(p.requires_grad for p in prior.parameters())
    x = lm().sample((3_000,))
    with torch.no_grad():
        assert float(lm().kl(x, prior()).abs().max()) == 0.0
        for p in lm.model.parameters():
            p.add_(0.03 * torch.randn_like(p))
        ours, theirs = lm().log_prob(every), prior().log_prob(every)
        exact = float((ours.exp() * (ours - theirs)).sum())
        x = lm().sample((3_000,))
        steps, plain = lm().kl(x, prior()), lm().log_prob(x) - prior().log_prob(x)
    assert exact > 0.01
    assert float(steps.mean()) == pytest.approx(exact, abs=4.0 * float(steps.std()) / math.sqrt(3_000))
    assert float(steps.std()) < float(plain.std())
    assert (steps >= -1e-9).all()


def test_it_is_a_site_of_pyro() -> None:
    lm = language.adversary()

    def program() -> torch.Tensor:
        with pyro.plate("many", 6):
            return pyro.sample("text", lm())

    trace = pyro.poutine.trace(program).get_trace()
    trace.compute_log_prob()
    site = trace.nodes["text"]
    assert site["value"].shape == (6, language.STEPS)
    with torch.no_grad():
        torch.testing.assert_close(site["log_prob"].detach(), lm().log_prob(site["value"]))
    two = language.adversary(prompt=[[0], [1]])
    with pyro.plate("draws", 5, dim=-2), pyro.plate("prompts", 2, dim=-1):
        assert pyro.sample("text", two()).shape == (5, 2, language.STEPS)
    assert two().expand((5, 2)).sample().shape == (5, 2, language.STEPS)


# Estimates over text --------------------------------------------------------------------------------------------------


def text_problem(least: int, token: int = 2, steps: int = 6) -> tuple[Problem, CausalLM, torch.Tensor, torch.Tensor]:
    """A token comes up so many times: the problem, its language model, all sequences, and which are catastrophes."""
    lm = CausalLM(language.tiny(1), max_new_tokens=steps, batch_size=4096)
    every = language.sequences(steps)
    problem = Problem(
        lambda: pyro.sample("text", lm()), lambda x: x, lambda x, y: 1.0 * (y == token).sum() - (least - 0.5)
    )
    return problem, lm, every, (every == token).sum(1) >= least


@pytest.mark.parametrize(("least", "budget", "options"), [(3, 30_000, {}), (5, 50_000, {"precision": 0.02, "seed": 1})])
def test_estimates_of_text_agree_with_enumeration(least: int, budget: int, options: dict[str, Any]) -> None:
    """The second: with this seed a proposal that sits on one text, its weights all alike, was once preferred, 84,000
    draws of which were worth 43.
    """
    problem, lm, every, hit = text_problem(least)
    with torch.no_grad():
        truth = float(lm().log_prob(every)[hit].logsumexp(0))
    result = estimate(problem, budget=budget, progress=False, **options)
    assert result.conclusion.method == "learned proposal"
    assert result.converged
    assert result.calls < 40_000
    assert result.calls <= budget
    assert abs(result.log_prob - truth) < 4.0 * result.std_error
    assert result.std_error < 0.3
    assert result.lower_bound(0.99) < truth
    assert result.catastrophes is not None
    text = result.catastrophes["text"]
    assert ((text == 2).sum(1) >= least).all()


def test_a_steered_model_is_a_proposal() -> None:
    """Towards catastrophes: more of them, and, as a guide, log P by enumeration; the model itself stays as it is."""
    problem, lm, every, hit = text_problem(4)
    with torch.no_grad():
        before = lm().log_prob(every)
        truth = float(before[hit].logsumexp(0))
        steered = lm.steered(every[hit], lm().sample((500,)), part="transformer.h.0", strength=1.5)
        assert float(steered().log_prob(every).exp().sum()) == pytest.approx(1.0, abs=1e-6)
        assert float(steered().log_prob(every)[hit].logsumexp(0)) > truth + 1.0
        torch.testing.assert_close(lm().log_prob(every), before)
        again = copy.deepcopy(steered)
        steered.steering.vector.zero_()
        torch.testing.assert_close(steered().log_prob(every), before, atol=1e-5, rtol=0.0)
        assert float(again().log_prob(every)[hit].logsumexp(0)) > truth + 1.0
    result = estimate(problem, guide=lambda: pyro.sample("text", again()), budget=8_000, progress=False)
    assert abs(result.log_prob - truth) < 4.0 * result.std_error
    assert result.std_error < 0.1
    with pytest.raises(LanguageModelError, match="part='layers': the model has transformer, lm_head"):
        lm.steered(every[hit], every, part="layers")
    with pytest.raises(LanguageModelError, match="at least one text"):
        lm.steered(every[:0], every, part="transformer.h.0")


def test_text_is_placed_where_it_is_drawn_from() -> None:
    law = language.adversary(prompt=[[0], [1, 2]])()
    x = law.sample((500,))
    z = law.to_normals(x, 0.001 + 0.998 * torch.rand(x.shape))
    assert (law.from_normals(z) == x).all()
    assert stats.kstest(z[:, 0, 0].numpy(), "norm").pvalue > FAILURE_RATE


def test_a_checker_that_says_yes_or_no_gets_a_bound() -> None:
    lm = language.adversary()
    never = Problem(lambda: pyro.sample("text", lm()), lambda x: x, lambda _, y: (y == 9).any())
    result = estimate(never, budget=6_000, progress=False)
    assert not result.converged
    assert result.log_prob == -math.inf
    assert -7.6 < result.upper < -6.0  # three in what was drawn plainly
    seldom = Problem(lambda: pyro.sample("text", lm()), lambda x: x, lambda _, y: (y == 1).sum() >= 2)
    with torch.no_grad():
        every = language.sequences()
        truth = float(lm().log_prob(every)[(every == 1).sum(1) >= 2].logsumexp(0))
    result = estimate(seldom, budget=8_000, progress=False)
    assert abs(result.log_prob - truth) < 4.0 * result.std_error


def test_what_cannot_be_learned_is_split() -> None:
    problem, lm, _, _ = text_problem(3)
    with pytest.raises(UnmetNeedError, match="more than 2,000,000,000 log-probabilities"):
        estimate(problem, budget=10**8, estimator=LearnedProposal(), progress=False)
    twisted = Problem(LanguageAdversary(lm, twist=True), problem.model, problem.checker)
    with pytest.raises(UnmetNeedError, match="'text' is drawn with a twist already"):
        estimate(twisted, budget=2_000, estimator=LearnedProposal(), progress=False)
    assert estimate(twisted, budget=2_000, progress=False).conclusion.method == "splitting"
    normal = Problem(lambda: pyro.sample("x", pyro.distributions.Normal(0.0, 1.0)), lambda x: x, lambda x, y: y - 3.0)
    with pytest.raises(UnmetNeedError, match="draws text alone"):
        estimate(normal, budget=2_000, estimator=LearnedProposal(), progress=False)


@pytest.mark.parametrize("after", [200, 4_000])
def test_what_was_found_before_an_interruption_is_returned(after: int) -> None:
    problem, lm, every, hit = text_problem(5)

    def stop(done: int, total: int, text: str) -> None:
        if done >= after:
            raise KeyboardInterrupt

    result = estimate(problem, budget=20_000, callback=stop, progress=False)
    assert "interrupted" in {code.value for code in result.conclusion.codes}
    assert not result.converged
    with torch.no_grad():
        truth = float(lm().log_prob(every)[hit].logsumexp(0))
    if after > 1_000:
        assert abs(result.log_prob - truth) < 1.0
        assert result.catastrophes is not None
    else:
        assert result.log_prob == -math.inf


# Adversaries of one's own ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("twist", [False, True])
def test_a_language_adversary_begins_as_what_it_was_made_from(twist: bool, tmp_path: Path) -> None:
    lm, every = language.adversary(prompt=[0, 2]), language.sequences()
    own = LanguageAdversary(lm, twist=twist)
    with torch.no_grad():
        torch.testing.assert_close(own.lm().log_prob(every), lm().log_prob(every), atol=1e-6, rtol=0.0)
        for weight in own.parameters():
            weight += 0.3 * torch.randn_like(weight)
        assert float(own.lm().log_prob(every).exp().sum()) == pytest.approx(1.0, abs=1e-6)
        assert float((own.lm().log_prob(every) - lm().log_prob(every)).abs().max()) > 0.1
        x, log_q = own.lm().sample_and_log_prob((3_000,))
        torch.testing.assert_close(log_q, own.lm().log_prob(x), atol=2e-4, rtol=0.0)  # twists are float32
        assert fits(counted(x), own.lm().log_prob(every).exp().numpy())
        exact = (own.lm().log_prob(every).exp() * (own.lm().log_prob(every) - lm().log_prob(every))).sum()
        each = own.lm().kl(x, lm())
        assert abs(float(each.mean() - exact)) < 4.0 * float(each.std()) / len(x) ** 0.5
    own.save_pretrained(tmp_path)
    again = LanguageAdversary(lm, twist=twist).load_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(again.lm().log_prob(every), own.lm().log_prob(every))
    with pytest.raises(LanguageModelError, match=r"draws \['other'\]"):
        LanguageAdversary(lm, site="other", twist=twist).load_pretrained(tmp_path)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft 0.21 with transformers 5.23
def test_adapters_are_all_that_trains() -> None:
    peft = pytest.importorskip("peft", reason="adapters need the extra lm: pip install 'probest[lm]'")
    lm, every = language.adversary(), language.sequences()
    lora = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    own = LanguageAdversary(lm, lora=lora)
    assert all("lora" in name for name, weight in own.named_parameters() if weight.requires_grad)
    with torch.no_grad():
        torch.testing.assert_close(own.lm().log_prob(every), lm().log_prob(every), atol=1e-6, rtol=0.0)
    with pytest.raises(LanguageModelError, match="exclude each other"):
        LanguageAdversary(lm, lora=lora, twist=True)


def test_a_program_is_run_with_its_own_models() -> None:
    one, two = language.adversary(seed=1), language.adversary(seed=2, prompt=[[0], [1]])

    def program() -> Any:
        return pyro.sample("a", one()), pyro.sample("b", two())

    own = LanguageAdversary(program)
    assert own.sites == ["a", "b"]
    with torch.no_grad():
        for weight in own.models[0].parameters():
            weight += torch.randn_like(weight)
    trace = pyro.poutine.trace(own).get_trace()
    assert trace.nodes["a"]["fn"].lm is own.models[0]
    assert trace.nodes["b"]["value"].shape == (2, language.STEPS)
    with pytest.raises(LanguageModelError, match="draws no text"):
        LanguageAdversary(lambda: pyro.sample("x", pyro.distributions.Normal(0.0, 1.0)))
    with pytest.raises(LanguageModelError, match="budget=30"):
        LanguageAdversary(one, twist=True, budget=30)


def test_the_worst_adversary_within_nats_writes_catastrophes() -> None:
    problem, lm, _, _ = text_problem(5)
    own = LanguageAdversary(lm, twist=True, budget=3_000)
    found = search(problem, own, kl=4.0, budget=6_000, steps=10, refine=10, judge=1_000, progress=False)
    assert found.kl < 4.3
    assert found.efficiency > 0.5
    with torch.no_grad():
        text = found.problem.adversary()
    assert text.shape == (6,)


# A model that answers in text -----------------------------------------------------------------------------------------


class Answerer(torch.nn.Module):
    """M: a language model that continues what it is given."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.lm = CausalLM(language.tiny(2), max_new_tokens=3, batch_size=4096, **settings)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        return pyro.sample("answer", self.lm.after(text))


def dialogue(least: int) -> tuple[Problem, Callable[[torch.nn.Module], torch.Tensor]]:
    """Token 2 comes up so many times in a text of three tokens and an answer of three: the problem, and log P."""
    asker, every = CausalLM(language.tiny(1), max_new_tokens=3, batch_size=4096), language.sequences(3)
    counts = (every == 2).sum(1)

    def exact(model: Any) -> torch.Tensor:
        answers = torch.stack([model.lm.after(text).log_prob(every) for text in every])
        joint = asker().log_prob(every)[:, None] + answers
        return joint[counts[:, None] + counts >= least].logsumexp(0)

    def checker(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return 1.0 * (x == 2).sum() + 1.0 * (y == 2).sum() - (least - 0.5)

    return Problem(lambda: pyro.sample("text", asker()), Answerer(), checker), exact


@pytest.mark.parametrize("settings", [{}, {"prompt": [0, 2]}, {"temperature": 0.7}])
def test_answers_have_the_law_of_what_follows(settings: dict[str, Any]) -> None:
    """With a mask for what comes after a text's end; two ways to write the same prompt are one law."""
    lm, every = Answerer(**settings).lm, language.sequences(3)
    texts = torch.tensor([[1, 2, 0], [1, 4, 3], [4, 3, 3]])
    law = lm.after(texts, then=[1])
    assert law.batch_shape == (3,)
    with torch.no_grad():
        log_p = law.log_prob(every[:, None])
        torch.testing.assert_close(log_p.exp().sum(0), torch.ones(3, dtype=torch.float64))
        for i, kept in enumerate([[1, 2, 0], [1], []]):
            whole = [*lm.prompt_ids[0].tolist(), *kept, 1]
            alone = CausalLM(lm.model, max_new_tokens=3, prompt=whole, temperature=lm.temperature)()
            torch.testing.assert_close(log_p[:, i], alone.log_prob(every), atol=1e-5, rtol=0.0)
        drawn = law.sample((2_000,))
        for i in range(3):
            found = collections.Counter(map(tuple, drawn[:, i].tolist()))
            counts = np.array([found[tuple(row)] for row in every.tolist()])
            assert fits(counts, log_p[:, i].exp().numpy())
        masked = lm.after(texts, mask=torch.tensor([[True, False, True]] * 3))
        torch.testing.assert_close(masked.log_prob(every[0])[0], lm.after(texts[0][[0, 2]]).log_prob(every[0]))


def test_estimates_with_a_model_that_answers_agree_with_enumeration() -> None:
    """And so do their gradients in both language models."""
    problem, exact = dialogue(4)
    with torch.no_grad():
        truth = float(exact(problem.model))
    result = estimate(problem, budget=40_000, precision=0.02, progress=False)
    assert result.conclusion.method == "learned proposal"
    assert result.converged
    assert abs(result.log_prob - truth) < 4.0 * result.std_error
    assert result.catastrophes is not None
    assert set(result.catastrophes) == {"text", "answer"}
    split = estimate(problem, budget=20_000, estimator=Splitting(), progress=False)
    assert abs(split.log_prob - truth) < 4.0 * split.std_error
    weights = [lm.model.transformer.wte.weight for lm in models_of(problem.event.program).values()]
    result.log_prob_at(model=problem.model).backward()
    found = [weight.grad.clone() for weight in weights]
    for weight in weights:
        weight.grad = None
    exact(problem.model).backward()
    for weight, gradient in zip(weights, found, strict=True):
        assert float((gradient - weight.grad).norm() / weight.grad.norm()) < 0.05


def test_a_model_that_cannot_be_batched_is_split() -> None:
    class Asking(Answerer):
        def forward(self, text: torch.Tensor) -> torch.Tensor:
            return super().forward(text if text[0].item() >= 0 else -text)

    whole, exact = dialogue(3)
    problem = Problem(whole.adversary, Asking(), whole.checker, batching="loop")
    with pytest.raises(UnmetNeedError, match="a model that can be batched"):
        estimate(problem, budget=500, estimator=LearnedProposal(), progress=False)
    found = estimate(problem, budget=800, progress=False)
    assert found.conclusion.method == "splitting"
    with torch.no_grad():
        assert abs(found.log_prob - float(exact(problem.model))) < 4.0 * found.std_error


def test_what_a_model_does_beside_writing_has_no_gradient() -> None:
    lm = language.adversary()

    class Rater(Answerer):
        def forward(self, text: torch.Tensor) -> Any:
            answer = super().forward(text)
            return answer, (self.lm.model.transformer.wte.weight.sum() * answer.sum() > 0.0).long()

    problem = Problem(lambda: pyro.sample("text", lm()), Rater(), lambda x, y: 1.0 * (y[0] == 2).sum() - 1.5)
    for one in (problem, text_problem(3, steps=5)[0]):  # the second reads, and draws nothing
        result = estimate(one, budget=600, estimator=MonteCarlo(), progress=False)
        with pytest.raises(GradientError, match="the severity is piecewise constant"):
            result.log_prob_at(model=one.model)


def test_a_model_that_answers_is_trained() -> None:
    problem, exact = dialogue(5)
    with torch.no_grad():
        texts = models_of(problem.event.program)["text"]().sample((400,))
        data = texts, problem.model.lm.after(texts).sample()
        before = float(exact(problem.model))

    def task(model: Any, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return -model.lm.after(batch[0]).log_prob(batch[1]).mean()

    run = train(
        problem, task=task, data=data, until_log_prob=-30.0, steps=30, learning_rate=3e-3, max_pressure=0.3,
        particles=64, budget=500, check_budget=500, check_every=30, audit=MonteCarlo(), audit_rounds=0,
        progress=False,
    )  # fmt: skip
    with torch.no_grad():
        assert float(exact(run.model)) < before - 2.0
        assert float(exact(problem.model)) == before


def test_an_adversary_of_a_model_that_answers_is_searched_for() -> None:
    problem, _ = dialogue(5)
    own = LanguageAdversary(problem.adversary, twist=True, budget=1_500)
    found = search(problem, own, kl=2.0, budget=6_000, steps=10, refine=5, judge=1_000, progress=False)
    assert found.kl < 2.3
    assert found.log_prob > found.base.log_prob + 1.0
    judged = estimate(found.problem, budget=4_000, estimator=MonteCarlo(), progress=False)
    assert {site.name for site in found.problem.event.sites} == {"learnt", "given/text", "other/text", "answer"}
    assert abs(judged.log_prob - found.log_prob) < 4.0 * math.hypot(judged.std_error, 0.1)
    assert all(weight.grad is None for weight in problem.model.parameters())


def test_mistakes_in_what_is_answered_are_named() -> None:
    lm = language.adversary()
    with pytest.raises(LanguageModelError, match="there are several prompts"):
        language.adversary(prompt=[[0], [1]]).after(torch.tensor([1]))
    with pytest.raises(LanguageModelError, match="expected token ids"):
        lm.after(torch.tensor([0.5]))
    with pytest.raises(LanguageModelError, match="expected bools"):
        lm.after(torch.tensor([1, 2]), mask=torch.tensor([1, 0]))
    with pytest.raises(LanguageModelError, match="the model has 32 places"):
        lm.after(torch.zeros(40, dtype=torch.long))
    with pytest.raises(LanguageModelError, match="beyond the vocabulary of 5"):
        lm.after(torch.tensor([7])).sample()


# The ready problem ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "alone"), [("a (b) c.", 0), ("a (b", 1), ("b) c", 1), ("a)(b", 2), ("((a) b)", 0), ("(a)) (", 2)]
)
def test_brackets_are_counted(text: str, alone: int) -> None:
    ids = torch.tensor(language.Letters()(text)["input_ids"], dtype=torch.long)
    assert int(language.unmatched(ids)) == alone
    assert language.Letters().decode(ids.tolist()) == text
    assert float(language.teacher(ids)) == (alone == 0)
    sure, unsure = torch.tensor(language.SURE + 1.0), torch.tensor(0.0)
    assert (float(language.checker(ids, sure)) > 0.0) == (alone > 0)
    assert float(language.checker(ids, unsure)) < 0.0


def test_the_reader_is_batched_as_it_reads_one() -> None:
    reader, x = language.Reader(), torch.randint(1, 32, (7, 32))
    with torch.no_grad():
        together = reader(x)
        torch.testing.assert_close(together, torch.vmap(reader)(x), atol=1e-5, rtol=0.0)
        torch.testing.assert_close(together, torch.stack([reader(row) for row in x]), atol=1e-5, rtol=0.0)


# Training -------------------------------------------------------------------------------------------------------------


class Reads(torch.nn.Module):
    """M: the log-odds that text is harmless, by how often each token comes up."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0]))
        self.bias = torch.nn.Parameter(torch.tensor(-1.5))

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        counts = torch.stack([(text == token).float().sum(-1) for token in range(language.TOKENS)], -1)
        return counts @ self.weight + self.bias


def test_a_pool_of_language_adversaries_is_played_against() -> None:
    """M is to be unsure of what opponents write."""
    lm = CausalLM(language.tiny(1), max_new_tokens=6, batch_size=4096)
    texts = lm().sample((500,))
    problem = Problem(
        lambda: pyro.sample("text", lm()), Reads(), lambda x, y: torch.where((x == 2).sum(-1) >= 3, y, -5.0)
    )
    pool = Pool(kl=2.0, every=5, steps=10, most=2, family=LanguageAdversary(lm, twist=True, budget=500))
    options: dict[str, Any] = {
        "task": lambda model, batch: (model(batch[0]) - batch[1]).square().mean(),
        "data": (texts, 2.0 - 1.0 * (texts == 2).sum(-1)), "until_log_prob": -30.0, "steps": 6, "learning_rate": 0.01,
        "particles": 64, "budget": 1_000, "check_budget": 1_000, "check_every": 10, "audit": MonteCarlo(),
        "audit_rounds": 0, "progress": False, "adversaries": pool,
    }  # fmt: skip
    run = train(problem, **options)
    assert len(run.adversaries) == 1
    with torch.no_grad():
        many = torch.stack([run.adversaries[-1]() for _ in range(150)])
    given = float(((texts == 2).sum(-1) >= 3).double().mean())
    assert float(((many == 2).sum(-1) >= 3).double().mean()) > given + 0.1

    with pytest.raises(LanguageModelError, match="site 'k' is no text"):
        train(
            problem.replaced(adversary=lambda: (pyro.sample("k", dist.Normal(0.0, 1.0)), problem.adversary())[1]),
            **options,
        )


@pytest.mark.parametrize("answers", [False, True])
def test_what_an_opponent_writes_is_found_in_the_given_adversarys_coordinates(answers: bool) -> None:
    if answers:
        problem, lm = dialogue(5)[0], None
        family = LanguageAdversary(problem.adversary)
    else:
        problem, lm, _, _ = text_problem(5)
        family = LanguageAdversary(lm)
    own = family.models[0]
    with torch.no_grad():
        for weight in own.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    family.check_playable(problem.event)
    law = family.law(problem.event)
    writer, rng = family.opponent(problem.event, law, law.parts), np.random.default_rng(0)
    z, _ = writer.cases(problem.event, 4_000, rng)
    assert len(z) > 3_990
    name = family.sites[0]
    drawn = torch.as_tensor(problem.event.site_values(z)[name]).long()
    every = language.sequences(drawn.shape[1])
    with torch.no_grad():
        expected = own().log_prob(every).exp().double().numpy()
    index = (drawn * torch.tensor([5**k for k in range(drawn.shape[1])])).sum(1)
    place = (every * torch.tensor([5**k for k in range(every.shape[1])])).sum(1)
    order = {int(p): i for i, p in enumerate(place)}
    counts = np.bincount([order[int(i)] for i in index], minlength=len(every))
    rare = expected * len(z) < 8
    seen, wanted = np.append(counts[~rare], counts[rare].sum()), np.append(expected[~rare], expected[rare].sum())
    assert stats.chisquare(seen, wanted / wanted.sum() * len(z)).pvalue > FAILURE_RATE
    # another with its weights is at no distance, the given one at KL
    twin = LanguageAdversary(problem.adversary if answers else lm).restored(problem.event, writer.arrays())
    assert writer.distance(twin, rng) == pytest.approx(0.0, abs=1e-6)
    plain = LanguageAdversary(problem.adversary if answers else lm)
    given = plain.law(problem.event)
    with torch.no_grad():
        gap = np.log(expected) - plain.models[0]().log_prob(every).double().numpy()
    kl = float(expected @ gap)
    far = writer.distance(plain.opponent(problem.event, given, given.parts), rng)
    assert far == pytest.approx(kl, abs=5.0 * math.sqrt(float(expected @ gap**2) / 1_024))


@pytest.mark.parametrize("taught", [True, False])
def test_a_reader_of_text_is_trained(taught: bool) -> None:
    """Catastrophe: M is sure that text is harmless which has token 2 three times. By enumeration, before and after."""
    lm, every = CausalLM(language.tiny(1), max_new_tokens=6, batch_size=4096), language.sequences(6)

    def harmful(text: torch.Tensor) -> torch.Tensor:
        return (text == 2).sum(-1) >= 3

    def checker(text: torch.Tensor, log_odds: torch.Tensor) -> torch.Tensor:
        return torch.where(harmful(text), log_odds, -5.0)

    def task(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        return torch.nn.functional.binary_cross_entropy_with_logits(model(batch[0]), batch[1])

    def loss(model: torch.nn.Module) -> float:
        with torch.no_grad():
            return float(task(model, (x, (~harmful(x)).float())))

    def log_prob(model: torch.nn.Module) -> float:
        with torch.no_grad():
            hit = checker(every, model(every)) >= 0.0
            return float(lm().log_prob(every)[hit].logsumexp(0))

    problem = Problem(lambda: pyro.sample("text", lm()), Reads(), checker)
    x = lm().sample((500,))
    run = train(
        problem, task=task, data=(x, (~harmful(x)).float()),
        teacher=(lambda text: (~harmful(text)).float()) if taught else None,
        until_log_prob=-12.0, steps=40, learning_rate=0.1, particles=64, budget=900, check_budget=900,
        audit=MonteCarlo(), audit_rounds=0, progress=False,
    )  # fmt: skip
    assert log_prob(run.model) < log_prob(problem.model) - 3.0
    assert loss(run.model) < loss(problem.model)


def test_sequences_are_quantiles_of_normals() -> None:
    law = language.adversary(prompt=[[0], [1, 2]])()
    z = torch.randn(3_000, 2, language.STEPS)
    x = law.from_normals(z)
    with torch.no_grad():
        every = language.sequences()[:, None].expand(-1, 2, -1)
        probs = law.log_prob(every).exp().numpy()
    for i in range(2):
        assert fits(counted(x[:, i]), probs[:, i])
    z[..., 2:] = torch.randn(3_000, 2, language.STEPS - 2)
    assert (law.from_normals(z)[..., :2] == x[..., :2]).all(), "a prefix of z is a prefix of the sequence"
    far = torch.tensor([[8.0, -8.0, 8.0, -8.0]])
    assert torch.isfinite(language.adversary()().log_prob(language.adversary()().from_normals(far))).all()


def test_dropout_stays_off() -> None:
    lm = language.adversary()
    assert lm.model.config.resid_pdrop > 0.0
    x = lm().sample((20,))
    lm.train()
    with torch.no_grad():
        torch.testing.assert_close(lm().log_prob(x), lm().log_prob(x), atol=0.0, rtol=0.0)
    lm.model.train()
    with pytest.raises(LanguageModelError, match="drops out"):
        lm()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"prompt": "text"}, "no tokenizer"),
        ({"prompt": []}, "empty list"),
        ({"prompt": [7]}, "beyond the vocabulary of 5"),
        ({"allowed": torch.ones(4, dtype=torch.bool)}, "allowed has shape"),
        ({"allowed": torch.zeros(5, dtype=torch.bool)}, "leaves no token"),
        ({"max_new_tokens": 40}, "the model has 32 places"),
    ],
)
def test_mistakes_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(LanguageModelError, match=message):
        CausalLM(language.tiny(), **{"max_new_tokens": 4, **settings})


def test_what_is_no_model_or_value_is_refused() -> None:
    with pytest.raises(LanguageModelError, match="model is a Linear"):
        CausalLM(torch.nn.Linear(2, 2), max_new_tokens=4)
    with pytest.raises(LanguageModelError, match=r"value has shape \(2, 3\)"):
        language.adversary()().log_prob(torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(LanguageModelError, match="decode"):
        language.adversary().decode(torch.zeros(4, dtype=torch.long))
