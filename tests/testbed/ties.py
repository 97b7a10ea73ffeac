"""Margins to near-ties, which another processor or kernel shape may decide differently.

Tests that compare two programs token by token leave out answers with a margin below these bounds.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from draftsmith.stages.data.trajectories import Trajectory
    from draftsmith.stages.drafters.base import Drafter
    from draftsmith.stages.targets.causal_lm import Target
    from draftsmith.stages.targets.sampling import SamplingParams

# In float32, logits of the tiny target differ by less than 1e-4 between programs, of its drafters by about 1e-5 between
# shapes; drawn numbers are held against sums of probabilities that differ by a few 1e-6, as do confidences.
TARGET_TIE, DRAFT_TIE, DRAW_TIE, CUT_TIE = 1e-3, 1e-4, 5e-5, 5e-5


def target_margin(target: Target, trajectory: Trajectory) -> float:
    """Return the smallest difference of the target's two best logits over an answer."""
    start = trajectory.prompt_length - 1
    tokens = torch.tensor([trajectory.tokens[:-1]])
    return _margin(target.logits(target.read(tokens).hidden[0, start:]))


@torch.no_grad()
def draft_margin(
    target: Target,
    drafter: Drafter,
    trajectory: Trajectory,
    block_size: int | None = None,
    head_tokens: int | None = None,
) -> float:
    """Return the smallest difference of the drafter's two best logits over all blocks of an answer."""
    if trajectory.last_anchor < trajectory.first_anchor:
        return float("inf")
    tokens = torch.tensor([trajectory.tokens])
    features = target.read(tokens, drafter.target_layer_ids).features
    assert features is not None
    context = drafter.encode(features, tokens, torch.arange(tokens.shape[1])[None])
    anchors = torch.arange(trajectory.first_anchor, trajectory.last_anchor + 1)[None]
    head, block_size = drafter.drafting_head(target.head_weight, head_tokens), block_size or drafter.block_size
    at = tokens[0][anchors]
    own = drafter.propose(context, at, anchors, block_size, head)
    drafting = drafter.block_sampler(context, at, anchors, block_size, head)
    chains = torch.cat([at[..., None], own], -1)
    return min(_margin(drafting.logits(chains[..., k])) for k in range(block_size - 1))


def draw_margin(target: Target, trajectory: Trajectory, sampling: SamplingParams, seed: int) -> float:
    """Return the smallest distance of a sampled answer's random numbers from the next token.

    It includes the distance of top-p from its cut, and that of the last token in top-k from the next one.
    """
    from draftsmith.stages.drafters.sampling import sampling_distribution, uniform

    logits = target.logits(
        target.read(torch.tensor([trajectory.tokens[:-1]])).hidden[0, trajectory.prompt_length - 1 :]
    )
    p = sampling_distribution(logits, sampling)
    drawn = torch.tensor([[uniform(seed, at)] for at in range(trajectory.prompt_length, len(trajectory.tokens))])
    apart = (drawn - p.cumsum(-1)).abs().min()
    if sampling.top_k:
        at_the_edge = logits.topk(sampling.top_k + 1).values[..., -2:]
        apart = torch.minimum(apart, (at_the_edge[..., 0] - at_the_edge[..., 1]).min().double())
    if sampling.top_p < 1:
        whole = sampling_distribution(logits, replace(sampling, top_p=1.0)).sort(-1, descending=True).values
        apart = torch.minimum(apart, (whole.cumsum(-1) - sampling.top_p).abs().min())
    return float(apart)


def _margin(logits: torch.Tensor) -> float:
    best = logits.topk(2).values
    return float((best[..., 0] - best[..., 1]).min())
