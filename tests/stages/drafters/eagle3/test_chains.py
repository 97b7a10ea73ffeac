"""The three ways of computing one chain of EAGLE-3 against each other: alone, packed with others, from slots."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch

from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.drafters.checkpoint import load_drafter
from draftsmith.stages.replay.trace import pad_tokens
from draftsmith.stages.stored import DRAFTER_FOLDER, load_trajectories
from draftsmith.stages.targets.causal_lm import Target
from tests.testbed import ties
from tests.testbed.drafter import DrafterArtifacts

PACKING_TOLERANCE = 2e-5  # the same sums in another order


class Trained:
    """The trained drafter with the features of some held-out trajectories, and chains drafted one at a time."""

    def __init__(self, made: DrafterArtifacts, artifact: Path):
        self.target = Target.load(made.target, device="cpu")
        self.drafter: Drafter = load_drafter(artifact / DRAFTER_FOLDER, self.target)
        answered = [t for t in load_trajectories(made.heldout).trajectories if t.response_length >= 40]
        self.trajectories = [t for t in answered if ties.draft_margin(self.target, self.drafter, t) > ties.DRAFT_TIE][
            :3
        ]
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
    slots = trained.drafter.new_context(4, trained.tokens.shape[1])
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
