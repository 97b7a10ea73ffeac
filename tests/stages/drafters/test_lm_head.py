"""The head over a part of the vocabulary."""

from __future__ import annotations

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from draftsmith.stages.drafters.lm_head import Head

V, H = 12, 4
WEIGHT = torch.randn(V, H, generator=torch.Generator().manual_seed(0))
subsets = st.lists(st.integers(0, V - 1), min_size=1, max_size=V - 1)  # any order, repetitions


@given(subsets)
@example([2, 2, 7] * 4)  # as many as the vocabulary has
@settings(max_examples=50, deadline=None)
def test_columns_and_tokens_are_inverse_and_absent_tokens_are_marked(ids: list[int]) -> None:
    head = Head.over(WEIGHT, torch.tensor(ids))
    present_ids = sorted(set(ids))
    assert head.weight.shape == (len(present_ids), H)
    columns, present = head.to_columns(torch.arange(V))
    for token in range(V):
        assert bool(present[token]) == (token in present_ids)
        assert int(columns[token]) == (present_ids.index(token) if token in present_ids else 0)
    assert head.to_tokens(torch.arange(len(present_ids))).tolist() == present_ids


@given(subsets)
@settings(max_examples=20, deadline=None)
def test_logits_are_the_columns_of_the_full_logits_in_float32(ids: list[int]) -> None:
    hidden = torch.randn(2, 5, 3, H, generator=torch.Generator().manual_seed(1))[:, :, 1:]  # a view
    part, full = Head.over(WEIGHT, torch.tensor(ids)), Head(WEIGHT)
    torch.testing.assert_close(part.logits(hidden), full.logits(hidden)[..., sorted(set(ids))])
    torch.testing.assert_close(full.logits(hidden), hidden.contiguous() @ WEIGHT.T)
    assert Head(WEIGHT.bfloat16()).logits(hidden).dtype == torch.float32


def test_the_full_head_changes_nothing() -> None:
    for head in (Head(WEIGHT), Head.over(WEIGHT, None), Head.over(WEIGHT, torch.arange(V))):
        assert head.token_ids is None
        tokens = torch.tensor([[3, 0], [V - 1, 5]])
        columns, present = head.to_columns(tokens)
        assert torch.equal(columns, tokens) and present.all() and torch.equal(head.to_tokens(tokens), tokens)
