"""The plain reference: one block after the other, one trajectory at a time. Slow; tests hold `chains` against it."""

from __future__ import annotations

import math

import numpy as np
import torch

from draftsmith.stages.drafters.base import Context, Drafter, Proposals
from draftsmith.stages.drafters.head import Head
from draftsmith.stages.replay.trace import Trace, Trajectory


def replay_sequentially(
    drafter: Drafter,
    context: Context,
    trajectory: Trajectory,
    block_size: int,
    head: Head,
    confidence: float | None = None,
) -> Trace:
    """context: of this trajectory alone (batch of one), over all its positions. confidence: what blocks are cut by."""
    tokens, anchor = trajectory.tokens, trajectory.first_anchor
    device = head.weight.device
    anchors, accepted, proposed, logprobs, verified = [], [], [], [], []
    while anchor <= trajectory.last_anchor:
        block = drafter.propose(
            context,
            torch.tensor([[tokens[anchor]]], device=device),
            torch.tensor([[anchor]], device=device),
            block_size,
            head,
        )
        proposals = block.tokens[0, 0].tolist()
        most = block_size - 1 if confidence is None else _verified(block, confidence)
        kept = 0
        for proposal, token in zip(proposals[:most], tokens[anchor + 1 :], strict=False):
            if proposal != token:
                break
            kept += 1
        anchors.append(anchor)
        accepted.append(kept)
        verified.append(most)
        proposed.append(proposals)
        assert block.logprobs is not None
        logprobs.append(block.logprobs[0, 0].tolist())
        anchor += kept + 1
    return Trace(
        len(tokens),
        np.array(anchors, dtype=np.int64),
        np.array(accepted, dtype=np.int64),
        np.array(proposed, dtype=np.int64).reshape(len(anchors), block_size - 1),
        np.array(logprobs, dtype=np.float32).reshape(len(anchors), block_size - 1),
        len(anchors),
        verified=None if confidence is None else np.array(verified, dtype=np.int64),
    )


def _verified(block: Proposals, threshold: float) -> int:
    """Proposals in front of the cut."""
    assert block.confidence is not None
    reached, logits = 1.0, block.confidence[0, 0].tolist()
    for count, logit in enumerate(logits):
        reached *= 1 / (1 + math.exp(-logit))
        if reached < threshold:
            return count
    return len(logits)
