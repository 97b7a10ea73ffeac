"""The head over a part of the vocabulary."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from draftsmith.stages.drafters.lm_head import Head

V, H = 12, 4
WEIGHT = torch.randn(V, H, generator=torch.Generator().manual_seed(0))
subsets = st.lists(st.integers(0, V - 1), min_size=1, max_size=V - 1)  # any order, repetitions


@given(subsets)
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
def test_logits_are_the_columns_of_the_full_logits(ids: list[int]) -> None:
    hidden = torch.randn(2, 3, H, generator=torch.Generator().manual_seed(1))
    part, full = Head.over(WEIGHT, torch.tensor(ids)), Head(WEIGHT)
    torch.testing.assert_close(part.logits(hidden), full.logits(hidden)[..., sorted(set(ids))])
    torch.testing.assert_close(full.logits(hidden), hidden @ WEIGHT.T)


def test_the_full_head_changes_nothing() -> None:
    for head in (Head(WEIGHT), Head.over(WEIGHT, None), Head.over(WEIGHT, torch.arange(V))):
        assert head.token_ids is None
        tokens = torch.tensor([[3, 0], [V - 1, 5]])
        columns, present = head.to_columns(tokens)
        assert torch.equal(columns, tokens)
        assert present.all()
        assert torch.equal(head.to_tokens(tokens), tokens)


def test_repeated_ids_count_once() -> None:
    head = Head.over(WEIGHT, torch.tensor([2, 2, 7] * 4))  # as many ids as the vocabulary has
    assert head.token_ids is not None
    assert head.token_ids.tolist() == [2, 7]


def test_logits_are_float32_whatever_the_head() -> None:
    head = Head(WEIGHT.bfloat16())
    assert head.logits(torch.ones(1, H)).dtype == torch.float32


def test_a_view_of_hidden_states_gives_the_same_logits() -> None:
    hidden = torch.randn(2, 5, 3, H, generator=torch.Generator().manual_seed(2))[:, :, 1:]
    torch.testing.assert_close(Head(WEIGHT).logits(hidden), hidden.contiguous() @ WEIGHT.T)
