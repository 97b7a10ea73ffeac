"""A batch with anchors and verify steps of all kinds, and the slow float64 form of what a loss reads there.

The loops of the tests take the drafter's hidden states one block at a time (`test_model.py` holds those) and do the
rest in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from draftsmith.stages.drafters.dflash.model import DFlashDrafter
from draftsmith.stages.replay.trace import Trajectory
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.training.anchors import pad_anchors
from draftsmith.stages.training.batches import Batch, FeatureSource
from draftsmith.stages.training.blocks import Anchors, LossReport
from draftsmith.stages.training.on_policy.verify_steps import VerifySteps
from tests.testbed import random_target

K = 4  # proposals of the plain drafter's block
CHUNK = 5  # many chunks, the last one smaller
TOLERANCE = 1e-4


@dataclass
class Case:
    """Three trajectories with anchors up to their ends, one of them short of anchors, and steps that fit them."""

    batch: Batch
    anchors: Anchors
    steps: VerifySteps
    trajectories: list[Trajectory]

    def blocks(self) -> list[tuple[int, int, int]]:
        """(row, index of the anchor, its position) of the real anchors."""
        valid, positions = self.anchors.valid.tolist(), self.anchors.positions.tolist()
        return [(b, a, positions[b][a]) for b in range(len(valid)) for a in range(len(valid[b])) if valid[b][a]]


def hidden_of(batch: Batch) -> torch.Tensor:
    """[B, T, H] the target's, which batches for losses on its distribution carry."""
    assert batch.hidden is not None
    return batch.hidden


def make_case(target: Target, layer_ids: Sequence[int]) -> Case:
    """The same for every test."""
    trajectories = random_target.trajectories(3, seed=11)
    source = FeatureSource(target, layer_ids, trajectories)
    rng = np.random.default_rng(0)
    chosen = [
        np.array([t.first_anchor, t.first_anchor + 3, t.last_anchor - 2, t.last_anchor - 1, t.last_anchor])
        for t in trajectories
    ]
    chosen[1] = chosen[1][[1, 4]]
    anchors = pad_anchors(chosen, torch.device("cpu"))
    shape = tuple(anchors.positions.shape)
    kept, committed, rejected_offset = (np.zeros(shape, int) for _ in range(3))
    logprobs = rng.uniform(-14, -0.01, (*shape, K)).astype(np.float32)  # some below the floor
    for b, t in enumerate(trajectories):
        for a, anchor in enumerate(anchors.positions[b].tolist()):
            judged = min(K, len(t.tokens) - 1 - anchor)
            accepted = (b + a) % (judged + 1)  # all kinds: nothing, a part, everything, cut by the end
            kept[b, a] = accepted
            committed[b, a] = min(accepted + 1, len(t.tokens) - 1 - anchor)
            rejected_offset[b, a] = accepted + 1 if accepted < judged else 0
            logprobs[b, a, judged:] = np.nan
    assert (rejected_offset == 0).any()
    assert (rejected_offset > 1).any()
    proposed = rng.integers(0, random_target.TEXT_TOKENS, (*shape, K))
    steps = VerifySteps(*(torch.from_numpy(x) for x in (kept, committed, rejected_offset, proposed, logprobs)))
    return Case(source.batch([0, 1, 2]), anchors, steps, trajectories)


@dataclass
class Slow:
    """The drafter's and the target's distributions at one position, and sums that divide at the end."""

    case: Case
    drafter: DFlashDrafter
    weight: torch.Tensor  # [V, H]
    head_tokens: list[int] = field(default_factory=lambda: list(range(random_target.VOCAB_SIZE)))

    def log_q(self, row: int, anchor: int) -> torch.Tensor:
        """[K, V'] over the head's tokens, float64, with gradient; the context ends at the anchor."""
        batch, before = self.case.batch, (slice(row, row + 1), slice(anchor))
        context = self.drafter.encode(batch.features[before], batch.tokens[before], batch.positions[before])
        tokens = torch.full((1, 1, K), self.case.trajectories[row].tokens[anchor])  # all that a parallel drafter reads
        hidden = self.drafter.block_hidden(context, tokens, torch.tensor([[anchor]]))[0, 0]
        return torch.log_softmax((hidden @ self.weight[self.head_tokens].T).double(), -1)

    def target_logits(self, row: int, position: int) -> torch.Tensor:
        """[V] logits of the token at `position`, read off the position before it."""
        return (self.weight @ hidden_of(self.case.batch)[row, position - 1]).double()


def assert_equal(report: LossReport, slow: torch.Tensor, drafter: DFlashDrafter) -> None:
    """Same value and same gradient in every parameter."""
    torch.testing.assert_close(report.loss.detach().double(), slow.detach(), rtol=TOLERANCE, atol=TOLERANCE)
    parameters = list(drafter.parameters())
    fast = torch.autograd.grad(report.loss, parameters)
    for (name, _), a, b in zip(drafter.named_parameters(), fast, torch.autograd.grad(slow, parameters), strict=True):
        scale = float(b.abs().max())
        assert float((a - b).abs().max()) <= 1e-3 * scale + 1e-6, name
