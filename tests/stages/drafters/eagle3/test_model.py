"""The EAGLE-3 model against plain loops, and its three ways of computing one chain against each other."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.drafters.checkpoint import create_drafter, load_drafter
from draftsmith.stages.drafters.config import Eagle3Config
from draftsmith.stages.drafters.eagle3.model import Eagle3Drafter, PrefixContext, chain_attention
from draftsmith.stages.drafters.head import Head
from draftsmith.stages.replay.trace import Trajectory, pad_tokens
from draftsmith.stages.stored import DRAFTER_FOLDER, load_trajectories
from draftsmith.stages.targets.causal_lm import Target
from tests.stages.drafters.eagle3 import reference
from tests.testbed import random_target
from tests.testbed.drafter import DrafterArtifacts
from tests.testbed.eagle3 import random_eagle3

TOLERANCE = 5e-5  # float32 against float64 on values of order one, at the end of a chain of four
PACKING_TOLERANCE = 2e-5  # the same sums in another order
K = 4  # proposals of the plain drafter
ANCHORS = [4, 7, 1, 11, 8]  # not in order, chains overlap; before anchor 1 there is one feature and no whole entry


# ---- against the reference


class Sequence:
    """A sequence with its features, as the plain drafter reads it."""

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
    """[1, A, count] the anchor's token and those behind it."""
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
    assert proposals.tokens.shape == (1, len(ANCHORS), K)
    assert proposals.logprobs is not None
    seen = set()
    for index, anchor in enumerate(ANCHORS):
        expected, logprobs = sequence.plainly(anchor).draft(
            int(tokens[0, index]), K, plain_eagle3.draft_tokens.tolist()
        )
        assert proposals.tokens[0, index].tolist() == expected
        torch.testing.assert_close(
            proposals.logprobs[0, index], torch.tensor(logprobs), atol=2e-4, rtol=2e-4
        )  # logits of some tens
        seen |= set(expected)
    assert len(seen) > 3, "the chains differ"
    assert any(token != column for column, token in enumerate(plain_eagle3.draft_tokens.tolist())), "ids are mapped"
    without = plain_eagle3.propose(*arguments, with_logprobs=False)
    assert torch.equal(without.tokens, proposals.tokens)
    assert without.logprobs is None


def test_its_own_proposals_as_tokens_give_the_states_that_proposed_them(
    sequence: Sequence, plain_target: Target, plain_eagle3: Eagle3Drafter
) -> None:
    """So a chain on proposals, which the rejected stream of OPD reads, is the chain that was drafted."""
    tokens, anchors = chains_of(sequence, ANCHORS, 1), torch.tensor([ANCHORS])
    head = plain_eagle3.head_over(plain_target.head_weight, None)
    proposals = plain_eagle3.propose(sequence.context(), tokens[..., 0], anchors, K + 1, head)
    with torch.no_grad():
        on_own = torch.cat([tokens, proposals.tokens[..., :-1]], -1)
        best = head.logits(plain_eagle3.block_hidden(sequence.context(), on_own, anchors)).log_softmax(-1).max(-1)
    assert torch.equal(head.to_tokens(best.indices), proposals.tokens)
    torch.testing.assert_close(best.values, proposals.logprobs, atol=1e-5, rtol=1e-5)


def test_a_reduced_head_proposes_from_its_tokens_alone(
    sequence: Sequence, plain_target: Target, plain_eagle3: Eagle3Drafter
) -> None:
    """Rows of the drafter's own head; tokens outside the draft vocabulary stay outside."""
    wanted = torch.arange(0, random_target.VOCAB_SIZE, 3)
    head = plain_eagle3.head_over(plain_target.head_weight, wanted)
    kept = sorted(set(wanted.tolist()) & set(plain_eagle3.draft_tokens.tolist()))
    assert head.token_ids is not None
    assert head.token_ids.tolist() == kept
    assert 5 < len(kept) < len(wanted)
    rows = torch.tensor([plain_eagle3.draft_tokens.tolist().index(token) for token in kept])
    assert torch.equal(head.weight, plain_eagle3.lm_head.weight[rows])
    tokens = chains_of(sequence, ANCHORS, 1)[..., 0]
    proposals = plain_eagle3.propose(sequence.context(), tokens, torch.tensor([ANCHORS]), K + 1, head)
    assert set(proposals.tokens.flatten().tolist()) <= set(kept)


def test_the_features_are_the_states_after_the_named_layers_in_their_order(sequence: Sequence) -> None:
    with torch.no_grad():
        states = sequence.target.model(sequence.tokens, output_hidden_states=True, use_cache=False).hidden_states
    expected = torch.cat([states[layer + 1] for layer in (2, 0, 1)], -1)  # hidden_states[0] is the embedding
    torch.testing.assert_close(sequence.features, expected, atol=1e-5, rtol=1e-5)


# ---- attention of chains


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_chain_attention_is_attention_under_the_mask_that_loops_write(data: st.DataObject) -> None:
    B, T, A, J, D = (data.draw(st.integers(1, n)) for n in (2, 6, 3, 4, 4))
    kv_heads, shared = data.draw(st.sampled_from([(1, 1), (1, 3), (2, 2), (3, 1)]))
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    queries = torch.randn(B, kv_heads * shared, A, D, generator=draw)
    prefix_keys, prefix_values = (torch.randn(B, kv_heads, T, D, generator=draw) for _ in range(2))
    own_keys, own_values = (torch.randn(B, kv_heads, A, J, D, generator=draw) for _ in range(2))
    visible = torch.randint(0, 2, (B, A, T), generator=draw).bool()
    visible[0, 0] = False  # a chain at the very beginning reads itself alone
    mask = torch.zeros(B, 1, A, T + A * J, dtype=torch.bool)
    for b, chain, key in product(range(B), range(A), range(T + A * J)):
        mask[b, 0, chain, key] = visible[b, chain, key] if key < T else (key - T) // J == chain
    expected = F.scaled_dot_product_attention(
        queries,
        torch.cat([prefix_keys, own_keys.flatten(2, 3)], 2),
        torch.cat([prefix_values, own_values.flatten(2, 3)], 2),
        attn_mask=mask,
        enable_gqa=True,
    )
    attended = chain_attention(queries, (prefix_keys, prefix_values), visible, (own_keys, own_values))
    torch.testing.assert_close(attended, expected.transpose(1, 2).flatten(2), atol=1e-5, rtol=1e-5)


# ---- one chain, computed in three ways


class Trained:
    """The trained drafter with the features of some held-out trajectories, and chains drafted one at a time."""

    def __init__(self, made: DrafterArtifacts, artifact: Path):
        self.target = Target.load(made.target, device="cpu")
        self.drafter: Drafter = load_drafter(artifact / DRAFTER_FOLDER, self.target)
        self.trajectories = load_trajectories(made.heldout).trajectories[:3]
        self.block = self.drafter.block_size
        self.head = self.drafter.drafting_head(self.target.head_weight, None)
        self.tokens = pad_tokens(self.trajectories, self.target.device)
        features = self.target.read(self.tokens, self.drafter.target_layer_ids).features
        assert features is not None
        self.features = features
        self.positions = torch.arange(self.tokens.shape[1]).expand(len(self.trajectories), -1)

    def chains(self, anchors: torch.Tensor) -> torch.Tensor:
        """[B, A, block-1] the trajectory's tokens from each anchor on, the last one again beyond the end."""
        at = (anchors[..., None] + torch.arange(self.block - 1)).clamp(max=self.tokens.shape[1] - 1)
        return self.tokens.gather(1, at.flatten(1)).view_as(at)

    def alone(self, row: int, anchor: int, block: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states and proposals of one chain, reading a context that ends at its anchor."""
        part, at = slice(row, row + 1), torch.tensor([[anchor]])
        context_of = (self.features, self.tokens, self.positions)
        with torch.no_grad():
            context = self.drafter.encode(*(x[part, :anchor] for x in context_of))
            chain = self.chains(torch.full((len(self.trajectories), 1), anchor))[part, :, : (block or self.block) - 1]
            hidden = self.drafter.block_hidden(context, chain, at)
            proposals = self.drafter.propose(context, chain[..., 0], at, block or self.block, self.head)
        return hidden[0, 0], proposals.tokens[0, 0]


@pytest.fixture(scope="module")
def trained(tiny_drafter: DrafterArtifacts, tiny_eagle3: Path) -> Trained:
    return Trained(tiny_drafter, tiny_eagle3)


def test_packed_anchors_equal_one_chain_at_a_time(trained: Trained) -> None:
    anchors = torch.tensor(
        [[t.first_anchor + i * 5 for i in range(4)] + [t.last_anchor] for t in trained.trajectories]
    )  # the last chain reaches beyond the trajectory
    with torch.no_grad():
        context = trained.drafter.encode(trained.features, trained.tokens, trained.positions)
        chains = trained.chains(anchors)
        hidden = trained.drafter.block_hidden(context, chains, anchors)
        proposals = trained.drafter.propose(context, chains[..., 0], anchors, trained.block, trained.head)
    for row, index in product(range(anchors.shape[0]), range(anchors.shape[1])):
        expected, tokens = trained.alone(row, int(anchors[row, index]))
        torch.testing.assert_close(hidden[row, index], expected, atol=PACKING_TOLERANCE, rtol=PACKING_TOLERANCE)
        assert proposals.tokens[row, index].tolist() == tokens.tolist()


def test_drafting_from_slots_equals_the_whole_context_after_rejections(trained: Trained) -> None:
    """The engine's rhythm: read a block from the anchor on, keep some of it, go on behind what was kept."""
    rows, block = len(trained.trajectories), trained.block
    slots = trained.drafter.new_context(rows + 1, trained.tokens.shape[1] + block)
    anchors = torch.tensor([t.first_anchor + 3 * i for i, t in enumerate(trained.trajectories)])
    generator = torch.Generator().manual_seed(0)
    every = slice(0, rows)
    width = int(anchors.max())  # shorter prompts are padded with what lies behind them
    with torch.no_grad():
        padded = trained.tokens[:, :width].clone()
        padded[torch.arange(width) >= anchors[:, None]] = 0
        trained.drafter.extend(slots, every, trained.features[:, :width], padded, trained.positions[:, :width])
    for step in range(5):
        context = trained.drafter.select(slots, every, int(anchors.max()))  # shorter rows hold rejected entries
        with torch.no_grad():
            chains = trained.chains(anchors[:, None])
            hidden = trained.drafter.block_hidden(context, chains, anchors[:, None])
            proposals = trained.drafter.propose(context, chains[..., 0], anchors[:, None], block, trained.head)
        for row in range(rows):
            expected, proposed = trained.alone(row, int(anchors[row]))
            torch.testing.assert_close(hidden[row, 0], expected, atol=PACKING_TOLERANCE, rtol=PACKING_TOLERANCE)
            assert proposals.tokens[row, 0].tolist() == proposed.tolist()
        at = anchors[:, None] + torch.arange(block)
        tokens = trained.tokens.gather(1, at)
        features = torch.stack([trained.features[row, at[row]] for row in range(rows)])
        kept = 1 + (step + torch.arange(rows)) % block  # one token at least, the whole block and the bonus at most
        rejected = torch.arange(block) >= kept[:, None]
        features[rejected] = 30 * torch.randn(features[rejected].shape, generator=generator)
        tokens[rejected] = torch.randint(0, 100, tokens[rejected].shape, generator=generator)
        with torch.no_grad():
            trained.drafter.extend(slots, every, features, tokens, at)
        anchors = anchors + kept


def test_a_moved_row_drafts_the_same(trained: Trained) -> None:
    slots = trained.drafter.new_context(4, 64)
    anchor = trained.trajectories[2].first_anchor
    with torch.no_grad():
        for row in range(3):  # by index, not by slice
            read = (x[row : row + 1, :anchor] for x in (trained.features, trained.tokens, trained.positions))
            trained.drafter.extend(slots, torch.tensor([row]), *read)
        trained.drafter.move_row(slots, source=2, to=0)
        context = trained.drafter.select(slots, torch.tensor([0]), anchor)
        proposals = trained.drafter.propose(
            context, trained.tokens[2:3, anchor : anchor + 1], torch.tensor([[anchor]]), trained.block, trained.head
        )
        assert proposals.tokens[0, 0].tolist() == trained.alone(2, anchor)[1].tolist()
        # and it goes on from there: the entry that the anchor's token completes needs the moved row's last feature
        ahead = slice(anchor, anchor + 2)
        read = (x[2:3, ahead] for x in (trained.features, trained.tokens, trained.positions))
        trained.drafter.extend(slots, slice(0, 1), *read)
        context, at = trained.drafter.select(slots, slice(0, 1), anchor + 2), torch.tensor([[anchor + 2]])
        hidden = trained.drafter.block_hidden(context, trained.chains(at.expand(3, -1))[2:3], at)
    torch.testing.assert_close(
        hidden[0, 0], trained.alone(2, anchor + 2)[0], atol=PACKING_TOLERANCE, rtol=PACKING_TOLERANCE
    )


def test_a_context_of_some_rows_and_positions_drafts_the_same(trained: Trained) -> None:
    """Replay drops rows that are finished and never looks behind its furthest anchor."""
    rows, anchor = torch.tensor([2, 0]), min(t.last_anchor for t in trained.trajectories) - 3
    with torch.no_grad():
        whole = trained.drafter.encode(trained.features, trained.tokens, trained.positions)
    for kept in (rows, slice(1, 3)):
        context = trained.drafter.select(whole, kept, anchor)
        numbers = list(range(len(trained.trajectories)))[kept] if isinstance(kept, slice) else kept.tolist()
        tokens, at = trained.tokens[kept, anchor : anchor + 1], torch.full((2, 1), anchor)
        proposals = trained.drafter.propose(context, tokens, at, trained.block, trained.head)
        for place, row in enumerate(numbers):
            assert proposals.tokens[place, 0].tolist() == trained.alone(row, anchor)[1].tolist()


def test_a_shorter_chain_is_the_beginning_of_a_longer_one(trained: Trained) -> None:
    anchor = trained.trajectories[0].first_anchor
    hidden, tokens = trained.alone(0, anchor)
    shorter, fewer = trained.alone(0, anchor, block=3)
    assert shorter.shape == (2, trained.target.info.hidden_size)
    torch.testing.assert_close(shorter, hidden[:2], atol=PACKING_TOLERANCE, rtol=PACKING_TOLERANCE)
    assert fewer.tolist() == tokens[:2].tolist()


# ---- what a chain reads


def test_a_chain_reads_nothing_at_or_behind_its_anchor(sequence: Sequence, plain_eagle3: Eagle3Drafter) -> None:
    """And of what lies before it the last token and the last feature."""
    anchor, chain = 6, chains_of(sequence, [6], K)

    def hidden(features: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            context = plain_eagle3.encode(features, tokens, sequence.positions)
            return plain_eagle3.block_hidden(context, chain, torch.tensor([[anchor]]))

    def moved(at: slice) -> torch.Tensor:
        features = sequence.features.clone()
        features[:, at] += 1
        return features

    def other(at: slice) -> torch.Tensor:
        tokens = sequence.tokens.clone()
        tokens[:, at] = (tokens[:, at] + 1) % random_target.TEXT_TOKENS
        return tokens

    expected = hidden(sequence.features, sequence.tokens)
    behind, last = slice(anchor, None), slice(anchor - 1, anchor)
    assert torch.equal(hidden(moved(behind), other(behind)), expected)
    assert not torch.allclose(hidden(moved(last), sequence.tokens), expected, atol=1e-3)
    assert not torch.allclose(hidden(sequence.features, other(last)), expected, atol=1e-3)
    assert torch.equal(hidden(sequence.features, other(slice(0, 1))), expected), "no entry holds the first token"


def test_a_token_of_the_chain_changes_the_states_from_its_own_on(
    sequence: Sequence, plain_eagle3: Eagle3Drafter
) -> None:
    chain, anchors = chains_of(sequence, [6], K), torch.tensor([[6]])
    with torch.no_grad():
        hidden = plain_eagle3.block_hidden(sequence.context(), chain, anchors)[0, 0]
        for k in range(K):
            changed = chain.clone()
            changed[..., k] = (changed[..., k] + 1) % random_target.TEXT_TOKENS
            other = plain_eagle3.block_hidden(sequence.context(), changed, anchors)[0, 0]
            assert torch.equal(other[:k], hidden[:k])
            assert all(not torch.allclose(a, b, atol=1e-3) for a, b in zip(other[k:], hidden[k:], strict=True))


# ---- training


def test_gradients_reach_every_parameter_and_not_the_target(plain_target: Target) -> None:
    drafter = random_eagle3(plain_target)
    features = torch.randn(1, 8, 3 * random_target.HIDDEN_SIZE, generator=torch.Generator().manual_seed(1))
    context = drafter.encode(features, torch.arange(8)[None], torch.arange(8)[None])
    hidden = drafter.block_hidden(context, torch.tensor([[[9, 3, 1, 7]]]), torch.tensor([[5]]))
    drafter.head_over(plain_target.head_weight, None).logits(hidden).square().sum().backward()
    assert [name for name, p in drafter.named_parameters() if p.grad is None or not p.grad.abs().sum()] == []
    assert drafter.lm_head.weight.grad is not None
    assert drafter.lm_head.weight.grad.abs().sum(-1).all()
    assert plain_target.embedding.grad is None and plain_target.head_weight.grad is None
    assert not any("embed" in name for name in drafter.state_dict())


def test_a_feature_of_the_first_position_reaches_the_end_of_a_chain(plain_target: Target) -> None:
    """Through the prefix's keys and values, and through the chain's own features."""
    drafter = random_eagle3(plain_target)
    features = torch.randn(1, 8, 3 * random_target.HIDDEN_SIZE, generator=torch.Generator().manual_seed(1))
    features.requires_grad_()
    context = drafter.encode(features, torch.arange(8)[None], torch.arange(8)[None])
    drafter.block_hidden(context, torch.tensor([[[9, 3, 1, 7]]]), torch.tensor([[5]]))[0, 0, -1].sum().backward()
    assert features.grad is not None
    reached = features.grad[0].abs().sum(-1) > 0
    assert reached.tolist() == [True] * 5 + [False] * 3


def test_a_fresh_drafter_is_seeded_and_starts_at_logits_of_unit_spread(plain_target: Target) -> None:
    shape = Eagle3Config(kind="eagle3", block_size=4, target_layer_ids=(0, 1, 3))
    first, same, other = (create_drafter(shape, plain_target, seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), same.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        tokens, positions = torch.randint(0, 60, (1, 30), generator=draw), torch.arange(30)[None]
        context = first.encode(torch.randn(1, 30, 3 * random_target.HIDDEN_SIZE, generator=draw), tokens, positions)
        anchors = torch.arange(1, 27)[None]
        chains = torch.stack([tokens[0, a : a + 3] for a in range(1, 27)])[None]
        logits = first.head_over(plain_target.head_weight, None).logits(first.block_hidden(context, chains, anchors))
    assert 0.3 < float(logits.std()) < 3


def test_a_fresh_head_is_the_targets_over_the_draft_vocabulary(plain_target: Target) -> None:
    shape = Eagle3Config(kind="eagle3", target_layer_ids=(0, 1, 3), draft_vocab_size=10)
    frequent = torch.arange(random_target.VOCAB_SIZE).flip(0)
    drafter = create_drafter(shape, plain_target, 0, frequent)
    head = drafter.head_over(plain_target.head_weight, None)
    assert head.token_ids is not None
    assert head.token_ids.tolist() == list(range(54, 64)), "sorted"
    assert torch.equal(head.weight, plain_target.head_weight[54:64])
    assert head.weight.data_ptr() != plain_target.head_weight.data_ptr()
    whole = create_drafter(Eagle3Config(kind="eagle3", target_layer_ids=(0, 1, 3)), plain_target, 0, frequent)
    assert isinstance(whole.head_over(plain_target.head_weight, None), Head)
    assert whole.head_over(plain_target.head_weight, None).token_ids is None
