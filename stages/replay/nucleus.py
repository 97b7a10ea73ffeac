"""Tokens outside the nucleus: those of stored texts that the top-k and top-p which are stated for them leave out.

Of texts that were drawn as stated there are next to none: other kernels and dtypes move a token over the edge now and
then. More of them say that the law is not the texts': tau by replay of drawn proposals is then another's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from draftsmith.stages.drafters.base import LOGITS_AT_ONCE
from draftsmith.stages.drafters.drawing import is_outside, probabilities
from draftsmith.stages.law import Law
from draftsmith.stages.replay.trace import Trajectory
from draftsmith.stages.targets.causal_lm import Target

FEW = 0.01  # share that is no reason for a warning: random weights in bfloat16 came to 0.5 %


@torch.no_grad()
def outside_nucleus(target: Target, hidden: torch.Tensor, trajectories: Sequence[Trajectory], law: Law) -> list[int]:
    """How many tokens of each trajectory are, of those that verify steps commit: behind the first anchor.

    hidden: [B, T, H] of the target. law: not greedy.
    """
    if not law.truncates:
        return [0] * len(trajectories)
    return [_count(target, row, trajectory, law) for row, trajectory in zip(hidden, trajectories, strict=True)]


def _count(target: Target, hidden: torch.Tensor, trajectory: Trajectory, law: Law) -> int:
    tokens = torch.tensor(trajectory.tokens[trajectory.first_anchor + 1 :], device=hidden.device)
    before = hidden[trajectory.first_anchor : len(trajectory.tokens) - 1]
    count, at_once = 0, max(1, LOGITS_AT_ONCE // (2 * len(target.head_weight)))  # float64, over all tokens
    for states, ahead in zip(before.split(at_once), tokens.split(at_once), strict=True):
        p = probabilities(target.logits(states), law.temperature)
        count += int(is_outside(p, ahead, law).sum())
    return count


def doubt(share: float | None, law: Law) -> str | None:
    """What is to be said of so many tokens outside; None for few, or where nothing is drawn (share None)."""
    if share is None or share <= FEW:
        return None
    return (
        f"warning: {share:.1%} of the answers' tokens are none that {law.truncation} at temperature "
        f"{law.temperature:g} draws, so tau and what is kept are of another law: state what they were drawn with "
        "(logs.top_p, logs.top_k); min_p and penalties cannot be stated, so use answers without them, or greedy ones"
    )
