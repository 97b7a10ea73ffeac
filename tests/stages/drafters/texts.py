"""Texts as drafters read them, and what a drafter makes of them."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from draftsmith.stages.data.trajectories import pad_tokens
from draftsmith.stages.drafters.base import Context, Drafter
from draftsmith.stages.drafters.lm_head import Head
from draftsmith.stages.targets.causal_lm import Target
from tests.testbed import random_target


class Texts:
    """Some trajectories as a drafter reads them."""

    def __init__(self, target: Target, drafter: Drafter, count: int = 3, seed: int = 4):
        self.target, self.drafter = target, drafter
        self.trajectories = random_target.trajectories(count, seed)
        self.tokens = pad_tokens(self.trajectories, target.device)
        features = target.read(self.tokens, drafter.target_layer_ids).features
        assert features is not None
        self.features = features
        self.positions = torch.arange(self.tokens.shape[1]).expand(count, -1)
        self.head: Head = drafter.head_over(target.head_weight, None)
        self.block = drafter.block_size

    @torch.no_grad()
    def context(self, rows: slice = slice(None), end: int | None = None) -> Context:
        part = (rows, slice(end))
        return self.drafter.encode(self.features[part], self.tokens[part], self.positions[part])

    def chains(self, anchors: torch.Tensor) -> torch.Tensor:
        """Return the tokens [B, A, K] from each anchor on; zeros after the end."""
        at = anchors[..., None] + torch.arange(self.block - 1)
        padded = F.pad(self.tokens, (0, self.block))
        return padded.gather(1, at.flatten(1)).view_as(at)

    @torch.no_grad()
    def alone(self, row: int, anchor: int) -> tuple[torch.Tensor, list[int]]:
        """Return hidden states [K, H] on the answer's tokens, and proposals, of a block with no context after it."""
        context, at = self.context(slice(row, row + 1), anchor), torch.tensor([[anchor]])
        chain = self.chains(at.expand(len(self.tokens), 1))[row : row + 1]
        hidden = self.drafter.block_hidden(context, chain, at)
        proposals = self.drafter.propose(context, chain[..., 0], at, self.block, self.head)
        return hidden[0, 0], proposals[0, 0].tolist()


def logits_of(drafter: Drafter, hidden: torch.Tensor, given: torch.Tensor, head: Head) -> torch.Tensor:
    """Return logits [B, A, K, V'] of the distribution that a loss sees, after the given tokens."""
    logits = head.logits(hidden)
    if not drafter.has_selector:
        return logits
    columns = drafter.selector_candidates(hidden, head)
    chosen = drafter.selector_logits(hidden, given, columns, head)
    return torch.full_like(logits, -torch.inf).scatter(-1, columns, chosen)
