"""Sampling offset by offset against drafting a block, for every architecture."""

from __future__ import annotations

import copy

import pytest
import torch

from draftsmith.stages.data.trajectories import pad_tokens
from draftsmith.stages.drafters import base
from draftsmith.stages.drafters.base import Context, Drafter
from draftsmith.stages.drafters.dspark import model
from draftsmith.stages.drafters.lm_head import Head
from draftsmith.stages.target.causal_lm import Target
from tests.testbed import random_target
from tests.testbed.architectures import RANDOM

TOLERANCE = 2e-5  # the same sums in other shapes


@pytest.fixture(params=RANDOM)
def drafter(request: pytest.FixtureRequest, plain_target: Target) -> Drafter:
    return RANDOM[request.param](plain_target)


class Blocks:
    """Blocks after some anchors of two answers."""

    def __init__(self, target: Target, drafter: Drafter):
        texts = random_target.trajectories(2)
        self.tokens = pad_tokens(texts, target.device)
        features = target.read(self.tokens, drafter.target_layer_ids).features
        assert features is not None
        positions = torch.arange(self.tokens.shape[1]).expand(2, -1)
        with torch.no_grad():
            self.context: Context = drafter.encode(features, self.tokens, positions)
        self.anchors = torch.tensor([[4, 6, 7], [5, 4, 9]])
        self.at_anchors = self.tokens.gather(1, self.anchors)
        self.head: Head = drafter.drafting_head(target.head_weight, None)

    @property
    def arguments(self) -> tuple[Context, torch.Tensor, torch.Tensor]:
        return self.context, self.at_anchors, self.anchors


@torch.no_grad()
def test_greedy_proposals_are_the_best_token_of_every_offset(drafter: Drafter, plain_target: Target) -> None:
    blocks = Blocks(plain_target, drafter)
    block = drafter.propose(*blocks.arguments, drafter.block_size, blocks.head)
    drafting = drafter.block_sampler(*blocks.arguments, drafter.block_size, blocks.head)
    tokens = blocks.at_anchors
    for k in range(drafter.block_size - 1):
        tokens = blocks.head.to_tokens(drafting.logits(tokens).argmax(-1))
        assert torch.equal(tokens, block[..., k])


@torch.no_grad()
@pytest.mark.parametrize("numbers", [1, 3000])
def test_proposing_in_chunks_gives_the_same_blocks(
    drafter: Drafter, plain_target: Target, numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = Blocks(plain_target, drafter)
    whole = drafter.propose(*blocks.arguments, drafter.block_size, blocks.head)
    for module in (base, model):
        monkeypatch.setattr(module, "LOGITS_PER_CHUNK", numbers)
    assert torch.equal(drafter.propose(*blocks.arguments, drafter.block_size, blocks.head), whole)


@torch.no_grad()
def test_sampler_probabilities_equal_those_of_training(drafter: Drafter, plain_target: Target) -> None:
    blocks = Blocks(plain_target, drafter)
    K = drafter.block_size - 1
    given = torch.randint(0, 50, (2, 3, K), generator=torch.Generator().manual_seed(0))
    given[..., 0] = blocks.at_anchors
    trained = logits_of(drafter, drafter.block_hidden(blocks.context, given, blocks.anchors), given, blocks.head)
    drafting = drafter.block_sampler(*blocks.arguments, drafter.block_size, blocks.head)
    for k in range(K):
        other = copy.copy(drafting)  # goes its own way, and changes nothing here
        other.logits(given[..., k] + 1)
        assert torch.allclose(drafting.logits(given[..., k]), trained[..., k, :], atol=TOLERANCE)


def logits_of(drafter: Drafter, hidden: torch.Tensor, given: torch.Tensor, head: Head) -> torch.Tensor:
    """Return logits [B, A, K, V'] of the distribution that a loss sees, after the given tokens."""
    logits = head.logits(hidden)
    if not drafter.has_selector:
        return logits
    columns = drafter.selector_candidates(hidden, head)
    chosen = drafter.selector_logits(hidden, given, columns, head)
    return torch.full_like(logits, -torch.inf).scatter(-1, columns, chosen)
