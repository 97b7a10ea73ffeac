"""How a token is drawn: the kept set of top-p, the inverse of the cumulative law, one number a seed and position."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from draftsmith.stages.drafters.drawing import argmax, probabilities, uniform
from draftsmith.stages.engines.base import SamplingParams
from draftsmith.stages.engines.sampling import draw


def test_uniform_numbers_depend_on_seed_and_position_and_are_uniform() -> None:
    assert uniform(5, 9) == uniform(5, 9)
    assert len({uniform(seed, at) for seed in (0, 1, 2**63 - 1, 2**64 - 1) for at in range(50)}) == 200
    numbers = [uniform(seed, at) for seed in range(40) for at in range(100)]
    assert stats.kstest(numbers, "uniform").pvalue > 1e-3
    first, second = np.array([[uniform(seed, 1), uniform(seed, 2)] for seed in range(3000)]).T
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.07


def test_the_best_token_is_the_first_of_equal_ones_however_a_vocabulary_divides() -> None:
    generator = torch.Generator().manual_seed(0)
    for vocabulary in (1, 97, 96, 1024, 3 * 512):
        for scores in (torch.randn(3, 2, vocabulary, generator=generator), torch.full((3, 2, vocabulary), -torch.inf)):
            rounded = (scores * 2).round()  # many equal ones
            for each in (scores, rounded, rounded.bfloat16(), rounded[0, 0]):
                assert torch.equal(argmax(each), each.argmax(-1))


def kept_by_hand(p: list[float], top_p: float) -> set[int]:
    """The plain definition: most likely tokens until their probability reaches top_p."""
    kept, mass = set(), 0.0
    for token in sorted(range(len(p)), key=lambda token: -p[token]):
        kept.add(token)
        mass += p[token]
        if mass >= top_p:
            break
    return kept


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=12, unique=True),
    st.floats(0.2, 3),
    st.floats(0.01, 0.999),
)
def test_top_p_keeps_the_smallest_sufficient_set(logits: list[float], temperature: float, top_p: float) -> None:
    whole = torch.softmax(torch.tensor(logits).double() / temperature, -1).tolist()
    ordered = np.cumsum(sorted(whole, reverse=True))
    if np.abs(ordered - top_p).min() < 1e-9 or len(set(whole)) < len(whole):
        return  # the definition itself rests on rounding
    p = probabilities(torch.tensor(logits), temperature, top_p).tolist()
    assert {token for token, value in enumerate(p) if value > 0} == kept_by_hand(whole, top_p)
    assert abs(sum(p) - 1) < 1e-12
    kept = [whole[token] for token, value in enumerate(p) if value > 0]
    assert np.allclose([value for value in p if value > 0], np.array(kept) / sum(kept))


def test_a_tiny_top_p_is_greedy_and_top_p_one_keeps_all() -> None:
    logits = torch.tensor([0.1, 2.0, -1.0, 1.9])
    assert probabilities(logits, 1.0, 1e-6).tolist() == [0, 1, 0, 0]
    assert torch.equal(probabilities(logits, 0.7, 1.0), torch.softmax(logits.double() / 0.7, -1))


def test_draw_inverts_the_cumulative_law_of_each_row() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 17, generator=generator) * 2
    positions = torch.arange(5) + torch.tensor([[10], [20], [30]])
    params = [SamplingParams(1, 0.8), SamplingParams(1), SamplingParams(1, 1.3, 0.7)]
    tokens = draw(logits, positions, params, [4, 5, 6])
    assert torch.equal(tokens[1], logits[1].argmax(-1))
    for row, seed in ((0, 4), (2, 6)):
        p = probabilities(logits[row], params[row].temperature, params[row].top_p).numpy()
        for t in range(5):
            u, at = uniform(seed, int(positions[row, t])), int(tokens[row, t])
            assert p[t, at] > 0
            assert p[t, :at].sum() - 1e-12 <= u < p[t, : at + 1].sum() + 1e-12


def test_drawn_tokens_follow_the_law() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5])
    count = 6000
    tokens = draw(logits.expand(1, count, -1), torch.arange(count)[None], [SamplingParams(1, 1.5)], [11])
    expected = probabilities(logits, 1.5, 1.0).numpy() * count
    observed = np.bincount(tokens[0].numpy(), minlength=5)
    assert stats.chisquare(observed, expected).pvalue > 1e-3
