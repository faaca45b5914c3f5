"""Each step of sampling against its formula, and against transformers' own processors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from moehive.coordinator.engine import sampler
from moehive.coordinator.engine.sampler import Sampler
from moehive.coordinator.types import CoordinatorError, SamplingParams

torch.set_num_threads(1)

LOGITS = st.builds(
    lambda seed, size, scale: torch.randn(size, generator=torch.Generator().manual_seed(seed)) * scale,
    st.integers(0, 1 << 32),
    st.integers(1, 300),
    st.sampled_from([0.1, 1.0, 5.0]),
)


def kept(logits: torch.Tensor) -> set[int]:
    return set(torch.isfinite(logits).nonzero().flatten().tolist())


def warped(warper: object, logits: torch.Tensor, seen: list[int] | None = None) -> torch.Tensor:
    result: torch.Tensor = warper(torch.tensor([seen or [0]]), logits[None].clone())[0]  # type: ignore[operator]
    return result


@given(LOGITS, st.integers(1, 320))
def test_top_k(logits: torch.Tensor, k: int) -> None:
    k = min(k, len(logits))
    ours = set(sampler.top_k_ids(logits, k).tolist())
    assert ours == kept(warped(TopKLogitsWarper(k), logits))
    assert ours == set(torch.argsort(logits, descending=True)[:k].tolist())


@given(LOGITS, st.floats(0.01, 0.999))
def test_top_p(logits: torch.Tensor, p: float) -> None:
    ours = sampler.keep_top_p(logits, p)
    assert torch.equal(ours, warped(TopPLogitsWarper(p), logits))
    probabilities = torch.softmax(logits.double(), -1)
    total = float(probabilities[list(kept(ours))].sum())
    least = float(probabilities[list(kept(ours))].min())
    assert total >= p - 1e-5, "the set is large enough"
    assert len(kept(ours)) == 1 or total - least < p + 1e-5, "and not larger than needed"


@pytest.mark.parametrize("scale", [0.1, 3.0, 8.0])
@pytest.mark.parametrize("p", [0.05, 0.5, 0.9, 0.99])
def test_top_p_of_a_large_vocabulary(p: float, scale: float) -> None:
    """The set ends among the likeliest thousand, or not: the same set either way, but for rounding at its edge."""
    logits = torch.randn(20_000, generator=torch.Generator().manual_seed(int(100 * p + scale))) * scale
    ours, theirs = kept(sampler.keep_top_p(logits, p)), kept(warped(TopPLogitsWarper(p), logits))
    assert len(ours ^ theirs) <= max(1, len(theirs) // 1000)
    least = float(logits[list(ours)].min())
    assert all(float(logits[token]) <= least for token in theirs - ours)


@given(LOGITS, st.floats(0.001, 1.0))
def test_min_p(logits: torch.Tensor, min_p: float) -> None:
    ours = sampler.keep_min_p(logits, min_p)
    assert torch.equal(ours, warped(MinPLogitsWarper(min_p), logits))


@given(LOGITS, st.floats(0.1, 10.0), st.data())
def test_repetition_penalty(logits: torch.Tensor, penalty: float, data: st.DataObject) -> None:
    seen = data.draw(st.lists(st.integers(0, len(logits) - 1), min_size=1, max_size=20))
    mask = torch.zeros(len(logits), dtype=torch.bool)
    mask[seen] = True
    ours = sampler.penalize_repetition(logits, mask, penalty)
    torch.testing.assert_close(ours, warped(RepetitionPenaltyLogitsProcessor(penalty), logits, seen))


def test_presence_and_frequency() -> None:
    logits = torch.tensor([1.0, 2.0, -3.0])
    ours = sampler.penalize_counts(logits, torch.tensor([0.0, 1.0, 4.0]), presence=0.5, frequency=0.25)
    assert ours.tolist() == [1.0, 2.0 - 0.5 - 0.25, -3.0 - 0.5 - 4 * 0.25]


def test_penalties_count_prompt_and_answer_as_they_should() -> None:
    logits = torch.tensor([3.0, 2.9, 0.0, 0.0])
    repetition = Sampler(SamplingParams(temperature=0, repetition_penalty=2), (0,), 4, 0)
    assert repetition.next(logits).id == 1, "the prompt's token 0 is halved"
    presence = Sampler(SamplingParams(temperature=0, presence_penalty=1), (0,), 4, 0)
    assert [presence.next(logits).id for _ in range(3)] == [0, 1, 0], "the prompt does not count, each answer once"
    frequency = Sampler(SamplingParams(temperature=0, frequency_penalty=2), (), 4, 0)
    assert [frequency.next(logits).id for _ in range(5)] == [0, 1, 0, 1, 2]


@settings(max_examples=30)
@given(LOGITS, st.integers(0, (1 << 64) - 1), st.floats(0.2, 3), st.integers(0, 50), st.floats(0.1, 1))
def test_draws_follow_the_whole_chain(
    logits: torch.Tensor, seed: int, temperature: float, top_k: int, top_p: float
) -> None:
    """What can be drawn is what transformers' chain leaves, and the same seed draws the same."""
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=0.01, seed=seed)
    chain = [TemperatureLogitsWarper(temperature)] + ([TopKLogitsWarper(top_k)] if top_k else [])
    chain += [TopPLogitsWarper(top_p + 1e-5 if top_p < 0.999 else 1.0), MinPLogitsWarper(0.01 * (1 - 1e-5))]
    allowed = logits
    for warper in chain:
        allowed = warped(warper, allowed)
    first, second = (Sampler(params, (0,), len(logits), 0) for _ in range(2))
    drawn = [first.next(logits).id for _ in range(20)]
    assert set(drawn) <= kept(allowed)
    assert drawn == [second.next(logits).id for _ in range(20)]


def test_frequencies_of_draws() -> None:
    probabilities = torch.tensor([0.5, 0.25, 0.15, 0.1])
    one = Sampler(SamplingParams(seed=1), (), 4, 0)
    counts = torch.zeros(4)
    draws = 4000
    for _ in range(draws):
        counts[one.next(probabilities.log()).id] += 1
    chi_square = float(((counts - draws * probabilities) ** 2 / (draws * probabilities)).sum())
    assert chi_square < 16.3  # 0.999 quantile, 3 degrees of freedom


@given(LOGITS)
def test_greedy_and_logprobs(logits: torch.Tensor) -> None:
    params = SamplingParams(temperature=0, repetition_penalty=1.3, presence_penalty=0.5)
    token = Sampler(params, (0,), len(logits), 3).next(logits)
    distribution = torch.log_softmax(logits, -1)
    assert token.logprob == pytest.approx(float(distribution[token.id]), abs=1e-6)
    assert [i for i, _ in token.top] == torch.topk(logits, min(3, len(logits))).indices.tolist()
    assert [p for _, p in token.top] == pytest.approx(distribution[[i for i, _ in token.top]].tolist(), abs=1e-6)
    plain = Sampler(SamplingParams(temperature=0), (0,), len(logits), 0).next(logits)
    assert plain.id == int(logits.argmax()) and plain.logprob is None and plain.top == ()


@pytest.mark.parametrize("temperature", [0, 1e-30, 1e-6, 1e-4, 100])
def test_extreme_temperatures(temperature: float) -> None:
    logits = torch.tensor([1e30, -1e30, 5.0, 1e30 * (1 - 1e-3)])
    token = Sampler(SamplingParams(temperature=temperature, seed=0), (), 4, 1).next(logits)
    assert token.id == 0
    assert token.logprob == 0


@pytest.mark.parametrize("bad", [[0.0, math.nan], [math.inf, 0.0], [-math.inf, -math.inf]])
def test_logits_that_are_not_numbers(bad: list[float]) -> None:
    with pytest.raises(CoordinatorError, match="not a number"):
        Sampler(SamplingParams(), (), 2, 0).next(torch.tensor(bad))
    masked = Sampler(SamplingParams(), (), 2, 0).next(torch.tensor([-math.inf, 0.0]))
    assert masked.id == 1
