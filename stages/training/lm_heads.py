"""The heads that training computes its softmax over: the same tokens for drafter and target.

A drafter with a head of its own is trained over its draft vocabulary. One that borrows the target's is trained over all
tokens, or over a sample that holds what matters: the most frequent tokens, every token of the step's answers, and fresh
random others, so that the drafter learns to give every token little probability: it also serves with the full head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.drafters.lm_head import Head
from draftsmith.stages.runtime.memory import to_device
from draftsmith.stages.training.config import TrainingConfig


@dataclass(frozen=True)
class SoftmaxHeads:
    """Two heads over the same tokens, in the same order."""

    drafter: Head
    target: Head
    trained: bool  # whether the drafter's head belongs to its weights, so that it needs a gradient
    selector: Drafter | None = None  # the drafter, if it selects among the head's candidates (`Drafter.has_selector`)
    confidence: Callable[[torch.Tensor], torch.Tensor] | None = None  # `Drafter.confidence`, if it has one


class HeadSource:
    """The heads of every step of a training."""

    def __init__(self, drafter: Drafter, target_head: torch.Tensor, config: TrainingConfig):
        """Keep the target's head over the drafter's vocabulary, if that is its own. target_head: [V, H]."""
        self.drafter, self.target_head, self.config = drafter, target_head, config
        own = drafter.head_over(target_head, None) if drafter.has_own_head else None
        self._target_over_own = Head.over(target_head, own.token_ids, drafter.logit_map) if own else None

    @property
    def is_reduced(self) -> bool:
        """Return whether a step's head holds a sample of the tokens only."""
        return self._target_over_own is None and self.config.head_tokens is not None

    def sample(self, rng: np.random.Generator, needed: Sequence[torch.Tensor]) -> SoftmaxHeads:
        """Return the heads of one step. needed: token ids that a reduced head must hold, any shape."""
        if self._target_over_own is not None:
            return SoftmaxHeads(self.drafter.head_over(self.target_head, None), self._target_over_own, trained=True)
        whole = Head(self.target_head, logit_map=self.drafter.logit_map)
        head = sampled_head(whole, self.drafter.frequent_tokens, self.config, rng, needed)
        if self.drafter.corrects_head:
            corrected = self.drafter.head_over(self.target_head, head.token_ids)
            confidence = self.drafter.confidence if self.drafter.has_confidence else None
            return SoftmaxHeads(corrected, head, trained=True, confidence=confidence)
        return SoftmaxHeads(head, head, trained=False, selector=self.drafter if self.drafter.has_selector else None)


def sampled_head(
    whole: Head,
    frequent_tokens: torch.Tensor | None,
    config: TrainingConfig,
    rng: np.random.Generator,
    needed: Sequence[torch.Tensor],
) -> Head:
    """Return the target's head over a sample of its tokens, or the whole head if the config asks for no sample.

    whole: the target's head. frequent_tokens: [V] ids by frequency. needed: ids that must be in it, any shape.
    """
    weight = whole.weight
    vocab = weight.shape[0]
    if config.head_tokens is None or frequent_tokens is None or config.head_tokens >= vocab:
        return whole
    others = to_device(rng.integers(0, vocab, config.head_negatives), weight.device)
    ids = torch.cat([frequent_tokens[: config.head_tokens], others, *(tokens.flatten() for tokens in needed)])
    return Head.over(weight, ids, whole.logit_map)
