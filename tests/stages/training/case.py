"""A batch with anchors and verify steps of all kinds, for any drafter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from draftsmith.stages.data.trajectories import Trajectory
from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.replay.steps import Steps
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.targets.sampling import GREEDY, SamplingParams
from draftsmith.stages.training.batches import Batch, FeatureSource, RankSlice
from draftsmith.stages.training.config import TrainingConfig
from draftsmith.stages.training.drafted_blocks import DraftedBlocks, draft_blocks, encode_batch
from draftsmith.stages.training.opd.verify_steps import MinedTable
from draftsmith.stages.training.softmax_heads import HeadSource, LossContext, SoftmaxHeads
from tests.testbed import random_target

K = 4  # proposals of the plain drafter's block
CHUNK = 5  # many chunks, the last one smaller


@dataclass
class Case:
    """Three trajectories with anchors up to their ends, and steps that fit them."""

    batch: Batch
    anchors: torch.Tensor  # [B, A]
    steps: Steps[torch.Tensor]
    trajectories: list[Trajectory]

    def blocks(self) -> list[tuple[int, int, int]]:
        """Return (row, index of the anchor, its position) of the anchors."""
        return [(b, a, at) for b, row in enumerate(self.anchors.tolist()) for a, at in enumerate(row)]


def blocks_of(case: Case, drafter: Drafter) -> DraftedBlocks:
    """Draft the case's blocks with gradient."""
    return draft_blocks(drafter, encode_batch(drafter, case.batch), case.batch, case.anchors)


def whole_step(indices: Sequence[int], batch: Batch, micro_batches: Sequence[slice] = ()) -> RankSlice:
    """Return the slice of a single training process. micro_batches: by default one, the whole batch."""
    rows = list(range(len(indices)))
    return RankSlice(list(indices), batch, list(micro_batches) or [slice(0, len(rows))], rows, len(rows), batch.tokens)


def mined_table(steps: Sequence[Steps], proposals: int) -> MinedTable:
    """Return the steps of every trajectory as a table in memory. proposals: of a mined block."""
    errors = [np.count_nonzero(each.rejected_offset) for each in steps]
    return MinedTable(steps.__getitem__, np.array([len(each) for each in steps]), np.array(errors), proposals)


def hidden_of(batch: Batch) -> torch.Tensor:
    """Return the target's hidden states [B, T, H], which batches for losses on its distribution carry."""
    assert batch.hidden is not None
    return batch.hidden


def heads_of(drafter: Drafter, target: Target) -> SoftmaxHeads:
    """Return heads over all tokens that the drafter can propose."""
    return HeadSource(drafter, target.head_weight, TrainingConfig()).sample(np.random.default_rng(0), [])


def loss_context(heads: SoftmaxHeads, target: Target, sampling: SamplingParams = GREEDY) -> LossContext:
    """Return a context whose losses take many chunks."""
    return LossContext(heads, target.head_weight, CHUNK, sampling)


def make_case(target: Target, layer_ids: Sequence[int]) -> Case:
    """Return the same case for every test."""
    trajectories = random_target.trajectories(3, seed=11)
    source = FeatureSource(target, layer_ids, trajectories, TrainingConfig())
    rng = np.random.default_rng(0)
    anchors = torch.tensor(
        [
            [t.first_anchor, t.first_anchor + 3, t.last_anchor - 2, t.last_anchor - 1, t.last_anchor]
            for t in trajectories
        ]
    )
    shape = tuple(anchors.shape)
    accepted = np.zeros(shape, int)
    logprobs = rng.uniform(-14, -0.01, (*shape, K)).astype(np.float32)  # some below the floor
    for b, t in enumerate(trajectories):
        for a, anchor in enumerate(anchors[b].tolist()):
            verified = min(K, len(t.tokens) - 1 - anchor)
            count = (b + a) % (verified + 1)  # all kinds: nothing, some, everything, cut by the end
            accepted[b, a] = count
            logprobs[b, a, verified:] = np.nan
    proposed = rng.integers(0, random_target.TEXT_TOKENS, (*shape, K))
    lengths = torch.tensor([[len(t.tokens)] for t in trajectories])
    steps = Steps(lengths, anchors, torch.from_numpy(accepted), torch.from_numpy(proposed), torch.from_numpy(logprobs))
    assert (steps.rejected_offset == 0).any()
    assert (steps.rejected_offset > 1).any()
    return Case(source.batch([0, 1, 2]), anchors, steps, trajectories)
