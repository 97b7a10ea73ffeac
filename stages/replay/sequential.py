"""The plain reference: one block after the other, one trajectory at a time. Slow; tests hold `chains` against it."""

from __future__ import annotations

import numpy as np
import torch

from draftsmith.stages.drafters.base import Context, Drafter
from draftsmith.stages.drafters.head import Head
from draftsmith.stages.replay.trace import Trace, Trajectory


def replay_sequentially(
    drafter: Drafter, context: Context, trajectory: Trajectory, block_size: int, head: Head
) -> Trace:
    """context: of this trajectory alone (batch of one), over all its positions."""
    tokens, anchor = trajectory.tokens, trajectory.first_anchor
    device = head.weight.device
    anchors, accepted, proposed = [], [], []
    while anchor <= trajectory.last_anchor:
        block = drafter.propose(
            context,
            torch.tensor([[tokens[anchor]]], device=device),
            torch.tensor([[anchor]], device=device),
            block_size,
            head,
        )
        proposals = block[0, 0].tolist()
        kept = 0
        for proposal, token in zip(proposals, tokens[anchor + 1 :], strict=False):
            if proposal != token:
                break
            kept += 1
        anchors.append(anchor)
        accepted.append(kept)
        proposed.append(proposals)
        anchor += kept + 1
    return Trace(
        len(tokens),
        np.array(anchors, dtype=np.int64),
        np.array(accepted, dtype=np.int64),
        np.array(proposed, dtype=np.int64).reshape(len(anchors), block_size - 1),
        len(anchors),
    )
