"""The head that training computes its softmax over: the whole vocabulary, or a sample of it that holds what matters.

The sample is the most frequent tokens, every token of the step's trajectories, and fresh random others, so that no
token of the vocabulary escapes being pushed down: the exported drafter also serves with the full head.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from stages.drafters.head import Head
from stages.training.config import TrainingConfig


def training_head(
    head_weight: torch.Tensor,
    frequent_tokens: torch.Tensor | None,
    config: TrainingConfig,
    rng: np.random.Generator,
    needed: Sequence[torch.Tensor],
) -> Head:
    """head_weight: [V, H]; frequent_tokens: [V] ids by frequency; needed: ids that must be in it, any shape."""
    vocab = head_weight.shape[0]
    if config.head_tokens is None or frequent_tokens is None or config.head_tokens >= vocab:
        return Head(head_weight)
    others = torch.from_numpy(rng.integers(0, vocab, config.head_negatives)).to(head_weight.device)
    ids = torch.cat([frequent_tokens[: config.head_tokens], others, *(tokens.flatten() for tokens in needed)])
    return Head.over(head_weight, ids)
