"""The EAGLE-3 model against plain loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from draftsmith.stages.drafters.eagle3.model import Eagle3Drafter
from draftsmith.stages.targets.causal_lm import Target
from tests.stages.drafters.eagle3 import reference
from tests.stages.drafters.texts import Texts
from tests.testbed import random_target

TOLERANCE = 5e-5  # float32 against float64 on values of order one, at the end of a chain of four
K = 4  # proposals of the plain drafter
# not in order, chains overlap; before anchor 1 there is one feature and no whole entry
ANCHORS = torch.tensor([[4, 7, 1, 11, 8]])


@pytest.fixture(scope="module")
def texts(plain_target: Target, plain_eagle3: Eagle3Drafter) -> Texts:
    return Texts(plain_target, plain_eagle3, count=1, seed=3)


def plainly(texts: Texts, anchor: int) -> reference.Chain:
    drafter: Any = texts.drafter
    config = drafter.config
    theta = config.rope_parameters["rope_theta"]
    shape = reference.Shape(config.num_attention_heads, config.num_key_value_heads, config.rms_norm_eps, theta)
    tensors, tokens = dict(drafter.named_parameters()), texts.trajectories[0].tokens
    return reference.Chain(tensors, texts.target.embedding, texts.features[0], tokens, anchor, shape)


def test_the_training_time_test_equals_the_plain_float64_reference(texts: Texts, plain_eagle3: Eagle3Drafter) -> None:
    chains = texts.chains(ANCHORS)
    with torch.no_grad():
        hidden = plain_eagle3.block_hidden(texts.context(), chains, ANCHORS)
    for index, anchor in enumerate(ANCHORS[0].tolist()):
        plain = plainly(texts, anchor)
        expected = torch.stack([plain.step(token) for token in chains[0, index].tolist()])
        torch.testing.assert_close(hidden[0, index].double(), expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_drafting_equals_a_greedy_loop_over_the_reference(texts: Texts, plain_eagle3: Eagle3Drafter) -> None:
    tokens = texts.tokens[:, ANCHORS[0]]
    proposals = plain_eagle3.propose(texts.context(), tokens, ANCHORS, K + 1, texts.head)
    seen = set()
    for index, anchor in enumerate(ANCHORS[0].tolist()):
        expected = plainly(texts, anchor).draft(int(tokens[0, index]), K, plain_eagle3.draft_tokens.tolist())
        assert proposals[0, index].tolist() == expected
        seen |= set(expected)
    assert len(seen) > 3, "the chains differ"
    assert any(token != column for column, token in enumerate(plain_eagle3.draft_tokens.tolist())), "ids are mapped"
    shorter = plain_eagle3.propose(texts.context(), tokens, ANCHORS, 3, texts.head)
    assert torch.equal(shorter, proposals[..., :2]), "a shorter chain is the beginning of a longer one"


def test_a_reduced_head_proposes_from_its_tokens_alone(
    texts: Texts, plain_target: Target, plain_eagle3: Eagle3Drafter
) -> None:
    """It has rows of the drafter's own head; tokens outside the draft vocabulary stay outside."""
    wanted = torch.arange(0, random_target.VOCAB_SIZE, 3)
    head = plain_eagle3.head_over(plain_target.head_weight, wanted)
    reduced = sorted(set(wanted.tolist()) & set(plain_eagle3.draft_tokens.tolist()))
    assert head.token_ids is not None and head.token_ids.tolist() == reduced
    assert 5 < len(reduced) < len(wanted)
    rows = torch.tensor([plain_eagle3.draft_tokens.tolist().index(token) for token in reduced])
    assert torch.equal(head.weight, plain_eagle3.lm_head.weight[rows])
    proposals = plain_eagle3.propose(texts.context(), texts.tokens[:, ANCHORS[0]], ANCHORS, K + 1, head)
    assert set(proposals.flatten().tolist()) <= set(reduced)
