"""The DFlash model against plain loops, and its three ways of computing one block against each other."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.drafters.checkpoint import create_drafter, load_drafter
from draftsmith.stages.drafters.config import DFlashConfig
from draftsmith.stages.drafters.dflash.model import DFlashDrafter, FeatureContext, SlotContext
from draftsmith.stages.drafters.head import Head
from draftsmith.stages.engines.estimate import decoding
from draftsmith.stages.replay.trace import pad_tokens
from draftsmith.stages.stored import DRAFTER_FOLDER, load_trajectories
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.targets.estimate import ModelSize, Sizes
from tests.stages.drafters.dflash import reference
from tests.testbed import random_target
from tests.testbed.drafter import DrafterArtifacts

TOLERANCE = 2e-5  # float32 against float64 on values of order one
PACKING_TOLERANCE = 2e-5  # the same sums in another order


def blocks_of(anchor_tokens: torch.Tensor, block_size: int) -> torch.Tensor:
    """[B, A, block_size-1]: the anchors' tokens and, where a parallel drafter must not read, zeros."""
    tokens = anchor_tokens.new_zeros(*anchor_tokens.shape, block_size - 1)
    tokens[..., 0] = anchor_tokens
    return tokens


SLIDING, FULL = "sliding_attention", "full_attention"
FORMS: dict[str, tuple[dict[str, Any], list[int | None], list[bool]]] = {  # what a config says, and what it means
    "everything": ({}, [None, None], [False, False]),
    "a window": ({"sliding_window": 4, "layer_types": (SLIDING, FULL)}, [4, None], [True, False]),
    "windows smaller than a block": ({"sliding_window": 2}, [2, 2], [True, True]),
    "windows read both ways": ({"sliding_window": 7, "is_causal": False}, [7, 7], [False, False]),
    "backwards": ({"is_causal": True}, [None, None], [True, True]),
}


@pytest.mark.parametrize("form", FORMS)
def test_block_hidden_equals_the_plain_float64_reference(form: str, plain_target: Target) -> None:
    fields, windows, causal = FORMS[form]
    plain_drafter = random_target.random_drafter(plain_target, **fields)
    plain_drafter.embedding_scale = 2.5  # as of a target that scales what its first layer reads
    trajectory = random_target.trajectories(1, seed=3)[0]
    tokens = torch.tensor([trajectory.tokens])
    read = plain_target.read(tokens, plain_drafter.target_layer_ids)
    assert read.features is not None
    positions = torch.arange(len(trajectory.tokens))[None]
    anchors = [4, 7, 11, 8]  # not in order, blocks overlap
    with torch.no_grad():
        hidden = plain_drafter.block_hidden(
            plain_drafter.encode(read.features, tokens, positions),
            blocks_of(tokens[:, anchors], plain_drafter.block_size),
            torch.tensor([anchors]),
        )
    config = plain_drafter.config
    for index, anchor in enumerate(anchors):
        expected = reference.block_hidden(
            dict(plain_drafter.named_parameters()),
            2.5 * plain_target.embedding,
            read.features[0],
            trajectory.tokens[anchor],
            anchor,
            block_size=plain_drafter.block_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            eps=config.rms_norm_eps,
            theta=config.rope_parameters["rope_theta"],
            mask_token=plain_target.tokenizer.mask_token_id,
            windows=windows,
            causal=causal,
        )
        torch.testing.assert_close(hidden[0, index].double(), expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_features_are_the_states_after_the_named_layers_in_their_order(
    plain_target: Target, plain_drafter: DFlashDrafter
) -> None:
    ids = torch.tensor([[1, 2, 3, 4]])
    features = plain_target.read(ids, plain_drafter.target_layer_ids).features
    with torch.no_grad():
        states = plain_target.model(ids, output_hidden_states=True, use_cache=False).hidden_states
    expected = torch.cat([states[layer + 1] for layer in (2, 0)], -1)  # hidden_states[0] is the embedding
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)


class Trained:
    """The trained drafter with the features of some held-out trajectories, and blocks drafted one at a time."""

    def __init__(self, made: DrafterArtifacts):
        self.target = Target.load(made.target, device="cpu")
        self.drafter: Drafter = load_drafter(made.drafter / DRAFTER_FOLDER, self.target)
        answered = [t for t in load_trajectories(made.heldout).trajectories if t.response_length >= 40]
        self.trajectories = answered[:3]  # without a near-tie
        self.block = self.drafter.block_size
        self.head = Head(self.target.head_weight)
        self.tokens = pad_tokens(self.trajectories, self.target.device)
        features = self.target.read(self.tokens, self.drafter.target_layer_ids).features
        assert features is not None
        self.features = features
        self.positions = torch.arange(self.tokens.shape[1]).expand(len(self.trajectories), -1)

    def alone(self, row: int, anchor: int, block: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states and proposals of one block, reading a context that ends at its anchor."""
        part = slice(row, row + 1)
        with torch.no_grad():
            seen = (part, slice(anchor))
            context = self.drafter.encode(self.features[seen], self.tokens[seen], self.positions[seen])
            token, at, size = self.tokens[part, anchor : anchor + 1], torch.tensor([[anchor]]), block or self.block
            hidden = self.drafter.block_hidden(context, blocks_of(token, size), at)
            return hidden[0, 0], self.drafter.propose(context, token, at, size, self.head).tokens[0, 0]


@pytest.fixture(scope="module")
def trained(tiny_drafter: DrafterArtifacts) -> Trained:
    return Trained(tiny_drafter)


def test_packed_anchors_equal_one_block_at_a_time(trained: Trained) -> None:
    anchors = torch.tensor(
        [[t.first_anchor + i * 5 for i in range(4)] + [t.last_anchor] for t in trained.trajectories]
    )  # the last block reaches beyond the trajectory
    with torch.no_grad():
        context = trained.drafter.encode(trained.features, trained.tokens, trained.positions)
        tokens_at = trained.tokens.gather(1, anchors)
        hidden = trained.drafter.block_hidden(context, blocks_of(tokens_at, trained.block), anchors)
        proposals = trained.drafter.propose(context, tokens_at, anchors, trained.block, trained.head)
    for row, index in product(range(anchors.shape[0]), range(anchors.shape[1])):
        expected, tokens = trained.alone(row, int(anchors[row, index]))
        torch.testing.assert_close(hidden[row, index], expected, atol=PACKING_TOLERANCE, rtol=PACKING_TOLERANCE)
        assert proposals.tokens[row, index].tolist() == tokens.tolist()
    logits = hidden @ trained.target.head_weight.T
    best = torch.log_softmax(logits.double(), -1).amax(-1)
    assert proposals.logprobs is not None
    torch.testing.assert_close(proposals.logprobs.double(), best, atol=1e-5, rtol=1e-5)


def test_drafting_from_slots_equals_the_whole_context_after_rejections(trained: Trained) -> None:
    rows, block = len(trained.trajectories), trained.block
    slots = trained.drafter.new_context(rows + 1, trained.tokens.shape[1] + block)
    anchors = torch.tensor([t.first_anchor + 3 * i for i, t in enumerate(trained.trajectories)])
    generator = torch.Generator().manual_seed(0)
    every = slice(0, rows)
    width = int(anchors.max())
    with torch.no_grad():
        prompts = (part[:, :width] for part in (trained.features, trained.tokens, trained.positions))
        trained.drafter.extend(slots, every, *prompts)
    for step in range(4):
        with torch.no_grad():
            at = anchors[:, None] + torch.arange(block)
            features = torch.stack([trained.features[row, at[row]] for row in range(rows)])
            kept = 1 + (step + torch.arange(rows)) % 3  # verified features stand before the new anchor,
            rejected = torch.arange(block) >= kept[:, None]  # those of rejected proposals at it and behind
            features[rejected] = torch.randn(features[rejected].shape, generator=generator)
            trained.drafter.extend(slots, every, features, trained.tokens.gather(1, at), at)
        anchors = anchors + kept
        context = trained.drafter.select(slots, every, int(anchors.max()))  # shorter rows hold rejected entries
        tokens = trained.tokens.gather(1, anchors[:, None])
        with torch.no_grad():
            hidden = trained.drafter.block_hidden(context, blocks_of(tokens, block), anchors[:, None])
            proposals = trained.drafter.propose(context, tokens, anchors[:, None], block, trained.head)
        for row in range(rows):
            expected, proposed = trained.alone(row, int(anchors[row]))
            torch.testing.assert_close(hidden[row, 0], expected, atol=PACKING_TOLERANCE, rtol=PACKING_TOLERANCE)
            assert proposals.tokens[row, 0].tolist() == proposed.tolist()


def test_a_moved_row_drafts_the_same(trained: Trained) -> None:
    slots = trained.drafter.new_context(4, trained.tokens.shape[1])
    anchor = trained.trajectories[2].first_anchor
    with torch.no_grad():
        for row in range(3):  # by index, not by slice
            seen = (part[row : row + 1, :anchor] for part in (trained.features, trained.tokens, trained.positions))
            trained.drafter.extend(slots, torch.tensor([row]), *seen)
        trained.drafter.move_row(slots, source=2, to=0)
        context = trained.drafter.select(slots, torch.tensor([0]), anchor)
        proposals = trained.drafter.propose(
            context, trained.tokens[2:3, anchor : anchor + 1], torch.tensor([[anchor]]), trained.block, trained.head
        )
    assert proposals.tokens[0, 0].tolist() == trained.alone(2, anchor)[1].tolist()


def test_a_smaller_block_is_drafted_as_if_trained_so(trained: Trained) -> None:
    hidden, tokens = trained.alone(0, trained.trajectories[0].first_anchor, block=4)
    assert hidden.shape == (3, trained.target.info.hidden_size)
    assert tokens.shape == (3,)


def test_the_context_behind_an_anchor_does_not_matter(plain_drafter: DFlashDrafter) -> None:
    features = torch.randn(1, 12, 2 * random_target.HIDDEN_SIZE, generator=torch.Generator().manual_seed(1))
    tokens, positions, anchors = torch.zeros(1, 12, dtype=torch.long), torch.arange(12)[None], torch.tensor([[5]])
    changed = features.clone()
    changed[:, 5:] += 100
    nearest = features.clone()
    nearest[:, 4] += 1
    with torch.no_grad():
        first, second, third = (
            plain_drafter.block_hidden(
                plain_drafter.encode(f, tokens, positions), blocks_of(torch.tensor([[9]]), 5), anchors
            )
            for f in (features, changed, nearest)
        )
    assert torch.equal(first, second)
    assert not torch.allclose(first, third, atol=1e-3)


def test_gradients_reach_every_parameter_and_not_the_target(plain_target: Target) -> None:
    drafter = random_target.random_drafter(plain_target)
    features = torch.randn(1, 8, 2 * random_target.HIDDEN_SIZE, generator=torch.Generator().manual_seed(1))
    context = drafter.encode(features, torch.zeros(1, 8, dtype=torch.long), torch.arange(8)[None])
    assert isinstance(context, FeatureContext)
    hidden = drafter.block_hidden(context, blocks_of(torch.tensor([[9]]), 5), torch.tensor([[5]]))
    hidden.square().sum().backward()
    assert [name for name, p in drafter.named_parameters() if p.grad is None or not p.grad.abs().sum()] == []
    assert plain_target.embedding.grad is None
    assert not any("embed" in name or "head" in name for name in drafter.state_dict())


def test_a_fresh_drafter_is_seeded_and_starts_at_logits_of_unit_spread(plain_target: Target) -> None:
    shape = DFlashConfig(num_layers=1, block_size=4, target_layer_ids=(1,))
    first, same, other = (create_drafter(shape, plain_target, seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), same.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))
    with torch.no_grad():
        tokens = torch.arange(30)[None]
        features = torch.randn(1, 30, random_target.HIDDEN_SIZE, generator=torch.Generator().manual_seed(0))
        context = first.encode(features, tokens, torch.arange(30)[None])
        anchors = torch.arange(1, 30)[None]
        hidden = first.block_hidden(context, blocks_of(anchors, 4), anchors)
        logits = Head(plain_target.head_weight).logits(hidden)
    assert 0.3 < float(logits.std()) < 3


def test_a_layer_with_a_window_keeps_what_its_window_can_reach(plain_target: Target) -> None:
    """Memory of requests in flight, however long they may become."""
    drafter = random_target.random_drafter(plain_target, sliding_window=20, layer_types=(SLIDING, FULL))
    for capacity in (10, 4096):
        context = drafter.new_context(2, capacity)
        assert isinstance(context, SlotContext)
        assert [slots.capacity for slots in context.layers] == [min(capacity, 20 + drafter.block_size), capacity]


def test_the_estimate_of_decoding_is_what_the_slots_hold(plain_target: Target) -> None:
    """Key/value memory of a drafter with windows, beside the target's, which keeps every position."""
    slots, longest = 3, 200
    drafter = random_target.random_drafter(plain_target, sliding_window=20, layer_types=(SLIDING, FULL))
    size = ModelSize.of(drafter.config, 0)
    target = ModelSize.of(plain_target.model.config, 0)
    sizes = Sizes(
        target, size, features=2, block_size=5, itemsize=4, longest_prompt=100, positions=256, kind=drafter.kind
    )
    estimated = decoding(slots, longest, True, 4, sizes, rings=True)["key/value memory"]
    context = drafter.new_context(slots, longest + 5)
    read = torch.zeros(slots, 4, 2 * random_target.HIDDEN_SIZE), torch.zeros(slots, 4, dtype=torch.long)
    with torch.no_grad():
        drafter.extend(context, slice(0, slots), *read, torch.arange(4).expand(slots, -1))
    assert isinstance(context, SlotContext)
    kept = [x.nbytes for s in context.layers for x in (s.keys, s.values) if x is not None]
    assert estimated == sum(kept) + slots * (longest + 5) * target.kv_bytes_per_token(4)
