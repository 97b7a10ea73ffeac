"""Sampling of tokens: top-k and top-p, the inverse CDF, one uniform number per seed and position."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from draftsmith.stages.drafters.sampling import (
    argmax,
    probabilities,
    probability_among,
    probability_of,
    sampling_distribution,
    truncation_mask,
    uniform,
)
from draftsmith.stages.engines.base import Request
from draftsmith.stages.engines.rejection_sampling import sample_target
from draftsmith.stages.targets.sampling import SamplingParams


def test_uniform_numbers_depend_on_seed_and_position_and_are_uniform() -> None:
    assert uniform(5, 9) == uniform(5, 9)
    assert len({uniform(seed, at) for seed in (0, 1, 2**63 - 1, 2**64 - 1) for at in range(50)}) == 200
    numbers = [uniform(seed, at) for seed in range(40) for at in range(100)]
    assert stats.kstest(numbers, "uniform").pvalue > 1e-3
    first, second = np.array([[uniform(seed, 1), uniform(seed, 2)] for seed in range(3000)]).T
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.07


def test_the_best_token_is_the_first_of_equal_ones_for_any_vocabulary_size() -> None:
    generator = torch.Generator().manual_seed(0)
    for vocabulary in (1, 97, 96, 1024, 3 * 512):
        for scores in (torch.randn(3, 2, vocabulary, generator=generator), torch.full((3, 2, vocabulary), -torch.inf)):
            rounded = (scores * 2).round()  # many equal ones
            for each in (scores, rounded, rounded.bfloat16(), rounded[0, 0]):
                assert torch.equal(argmax(each), each.argmax(-1))


@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.4, 0.01])
@pytest.mark.parametrize("top_k", [0, 1, 2, 20, 500])
@pytest.mark.parametrize("tied", [False, True])
def test_the_distribution_is_that_of_transformers_warpers(top_p: float, top_k: int, tied: bool) -> None:
    """Temperature, top-k, top-p in this order; top-k keeps all tokens that tie at rank k."""
    logits = 2 * torch.randn(64, 200, generator=torch.Generator().manual_seed(top_k)).double()
    if tied:  # as logits of half precision do; no top-p: which of equal tokens it keeps depends on the sort
        logits, top_p = (2 * logits).round() / 2, 1.0
    warped = TemperatureLogitsWarper(0.7)(None, logits)
    warped = TopKLogitsWarper(top_k)(None, warped) if top_k else warped
    warped = TopPLogitsWarper(top_p)(None, warped) if top_p < 1 else warped
    sampling = SamplingParams(0.7, top_p, top_k)
    found = sampling_distribution(logits, sampling)
    assert torch.equal(found == 0, warped.isinf())
    torch.testing.assert_close(found, torch.softmax(warped, -1), rtol=1e-12, atol=0)
    if sampling.truncates:
        assert torch.equal(truncation_mask(torch.softmax(logits / 0.7, -1), sampling), warped.isinf())
    if tied and top_k == 20:
        assert ((found > 0).sum(-1) > 20).any()


@pytest.mark.parametrize("temperature", [0.02, 0.7, 1.0, 3.0])
def test_probabilities_of_single_tokens_equal_those_of_the_whole_distribution(temperature: float) -> None:
    logits = 20 * torch.randn(50, 3, 4000, generator=torch.Generator().manual_seed(0)) + 200
    columns = logits.argsort(-1)[..., -3].clone()
    columns[:10] = 7
    whole = probabilities(logits, temperature)
    found = probability_of(logits, columns, temperature)
    torch.testing.assert_close(found, whole.gather(-1, columns[..., None])[..., 0], rtol=2e-5, atol=0)

    scores, candidates = logits[..., :16], torch.arange(100, 116).expand(50, 3, 16)
    tokens = torch.arange(90, 140)[:, None].expand(50, 3)
    expected = torch.zeros(50, 3, dtype=torch.float64)
    expected[10:26] = probabilities(scores, temperature)[torch.arange(10, 26), :, torch.arange(16)]
    assert torch.equal(probability_among(scores, candidates, tokens, temperature), expected)


def test_draw_inverts_the_cumulative_distribution_of_each_row() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 17, generator=generator) * 2
    positions = torch.arange(5) + torch.tensor([[10], [20], [30]])
    params = [SamplingParams(0.8, top_k=6), SamplingParams(), SamplingParams(1.3, 0.7)]
    requests = [Request("", [], 1, each, seed) for each, seed in zip(params, (4, 5, 6), strict=True)]
    tokens = sample_target(logits, positions, requests)
    assert torch.equal(tokens[1], logits[1].argmax(-1))
    for row, seed in ((0, 4), (2, 6)):
        p = sampling_distribution(logits[row], params[row]).numpy()
        for t in range(5):
            u, at = uniform(seed, int(positions[row, t])), int(tokens[row, t])
            assert p[t, at] > 0
            assert p[t, :at].sum() - 1e-12 <= u < p[t, : at + 1].sum() + 1e-12
