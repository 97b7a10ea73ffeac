"""The EAGLE-3 model against plain loops, and its initial weights."""

from __future__ import annotations

import pytest
import torch

from draftsmith.stages.data.trajectories import Trajectory
from draftsmith.stages.drafters.checkpoint import create_drafter
from draftsmith.stages.drafters.eagle3.config import Eagle3Config
from draftsmith.stages.drafters.eagle3.model import Eagle3Drafter, PrefixContext
from draftsmith.stages.target.causal_lm import Target
from tests.stages.drafters.eagle3 import reference
from tests.testbed import random_target

TOLERANCE = 5e-5  # float32 against float64 on values of order one, at the end of a chain of four
K = 4  # proposals of the plain drafter
ANCHORS = [4, 7, 1, 11, 8]  # not in order, chains overlap; before anchor 1 there is one feature and no whole entry


# ---- against the reference


class Sequence:
    """A sequence with its features, as the reference reads it."""

    def __init__(self, target: Target, drafter: Eagle3Drafter):
        self.target, self.drafter = target, drafter
        self.trajectory: Trajectory = random_target.trajectories(1, seed=3)[0]
        self.tokens = torch.tensor([self.trajectory.tokens])
        features = target.read(self.tokens, drafter.target_layer_ids).features
        assert features is not None
        self.features = features
        self.positions = torch.arange(self.tokens.shape[1])[None]

    def context(self) -> PrefixContext:
        with torch.no_grad():
            return self.drafter.encode(self.features, self.tokens, self.positions)

    def plainly(self, anchor: int) -> reference.Chain:
        config = self.drafter.config
        theta = config.rope_parameters["rope_theta"]
        shape = reference.Shape(config.num_attention_heads, config.num_key_value_heads, config.rms_norm_eps, theta)
        tensors = dict(self.drafter.named_parameters())
        return reference.Chain(tensors, self.target.embedding, self.features[0], self.trajectory.tokens, anchor, shape)


@pytest.fixture(scope="module")
def sequence(plain_target: Target, plain_eagle3: Eagle3Drafter) -> Sequence:
    return Sequence(plain_target, plain_eagle3)


def chains_of(sequence: Sequence, anchors: list[int], count: int) -> torch.Tensor:
    """Return the tokens [1, A, count] from each anchor on."""
    return torch.tensor([[sequence.trajectory.tokens[anchor : anchor + count] for anchor in anchors]])


def test_the_training_time_test_equals_the_plain_float64_reference(
    sequence: Sequence, plain_eagle3: Eagle3Drafter
) -> None:
    chains = chains_of(sequence, ANCHORS, K)
    with torch.no_grad():
        hidden = plain_eagle3.block_hidden(sequence.context(), chains, torch.tensor([ANCHORS]))
    assert hidden.shape == (1, len(ANCHORS), K, random_target.HIDDEN_SIZE)
    for index, anchor in enumerate(ANCHORS):
        plain = sequence.plainly(anchor)
        expected = torch.stack([plain.step(token) for token in chains[0, index].tolist()])
        torch.testing.assert_close(hidden[0, index].double(), expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_drafting_equals_a_greedy_loop_over_the_reference(
    sequence: Sequence, plain_target: Target, plain_eagle3: Eagle3Drafter
) -> None:
    tokens = torch.tensor([[sequence.trajectory.tokens[anchor] for anchor in ANCHORS]])
    head = plain_eagle3.drafting_head(plain_target.head_weight, None)
    arguments = (sequence.context(), tokens, torch.tensor([ANCHORS]), plain_eagle3.block_size, head)
    proposals = plain_eagle3.propose(*arguments)
    assert proposals.shape == (1, len(ANCHORS), K)
    seen = set()
    for index, anchor in enumerate(ANCHORS):
        expected = sequence.plainly(anchor).draft(int(tokens[0, index]), K, plain_eagle3.draft_tokens.tolist())
        assert proposals[0, index].tolist() == expected
        seen |= set(expected)
    assert len(seen) > 3, "the chains differ"
    assert any(token != column for column, token in enumerate(plain_eagle3.draft_tokens.tolist())), "ids are mapped"
    shorter = plain_eagle3.propose(*arguments[:3], 3, head)
    assert torch.equal(shorter, proposals[..., :2]), "a shorter chain is the beginning of a longer one"


def test_a_reduced_head_proposes_from_its_tokens_alone(
    sequence: Sequence, plain_target: Target, plain_eagle3: Eagle3Drafter
) -> None:
    """It has rows of the drafter's own head; tokens outside the draft vocabulary stay outside."""
    wanted = torch.arange(0, random_target.VOCAB_SIZE, 3)
    head = plain_eagle3.head_over(plain_target.head_weight, wanted)
    reduced = sorted(set(wanted.tolist()) & set(plain_eagle3.draft_tokens.tolist()))
    assert head.token_ids is not None
    assert head.token_ids.tolist() == reduced
    assert 5 < len(reduced) < len(wanted)
    rows = torch.tensor([plain_eagle3.draft_tokens.tolist().index(token) for token in reduced])
    assert torch.equal(head.weight, plain_eagle3.lm_head.weight[rows])
    tokens = chains_of(sequence, ANCHORS, 1)[..., 0]
    proposals = plain_eagle3.propose(sequence.context(), tokens, torch.tensor([ANCHORS]), K + 1, head)
    assert set(proposals.flatten().tolist()) <= set(reduced)


# ---- new ones


def test_a_fresh_drafter_is_seeded_and_starts_at_logits_of_unit_spread(plain_target: Target) -> None:
    shape = Eagle3Config(kind="eagle3", block_size=4, target_layer_ids=(0, 1, 3))
    first, same, other = (create_drafter(shape, plain_target, seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), same.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        tokens, positions = torch.randint(0, 60, (1, 30), generator=generator), torch.arange(30)[None]
        context = first.encode(
            torch.randn(1, 30, 3 * random_target.HIDDEN_SIZE, generator=generator), tokens, positions
        )
        anchors = torch.arange(1, 27)[None]
        chains = torch.stack([tokens[0, a : a + 3] for a in range(1, 27)])[None]
        logits = first.head_over(plain_target.head_weight, None).logits(first.block_hidden(context, chains, anchors))
    assert 0.3 < float(logits.std()) < 3
