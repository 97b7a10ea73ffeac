"""The heads of a step's softmax: of the drafter and of the target, over the same tokens.

A drafter with its own head is trained over its draft vocabulary. A drafter that uses the target's head is trained over
all tokens, or over a sample: the most frequent tokens, every token of the step's answers, and new random tokens in
every step. From these it learns to give all wrong tokens little probability, since it also serves with the full head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.drafters.lm_head import Head
from draftsmith.stages.runtime.memory import to_device
from draftsmith.stages.targets.sampling import GREEDY, SamplingParams
from draftsmith.stages.training.config import TrainingConfig


@dataclass(frozen=True)
class SoftmaxHeads:
    """Two heads over the same tokens, in the same order."""

    drafter: Head
    target: Head
    trained: bool  # whether the drafter's head has weights of the drafter, so that it needs a gradient
    selector: Drafter | None = None  # the drafter, if it selects among the head's candidates (`Drafter.has_selector`)
    confidence: Callable[[torch.Tensor], torch.Tensor] | None = None  # `Drafter.confidence`, if it has one


class HeadSource:
    """The heads of every step of a training."""

    def __init__(self, drafter: Drafter, target_head: torch.Tensor, config: TrainingConfig):
        """Keep the target's head over the drafter's vocabulary, if the drafter has its own. target_head: [V, H]."""
        self.drafter, self.target_head, self.config = drafter, target_head, config
        head = drafter.head_over(target_head, None) if drafter.has_own_head else None
        self._target_over_own = Head.over(target_head, head.token_ids, drafter.logit_map) if head else None

    @property
    def is_reduced(self) -> bool:
        """Return whether a step's head holds only a sample of the tokens."""
        return self._target_over_own is None and self.config.head_tokens is not None

    def sample(self, rng: np.random.Generator, needed: Sequence[torch.Tensor]) -> SoftmaxHeads:
        """Return the heads of one step. needed: token ids that a reduced head must hold, any shape."""
        if self._target_over_own is not None:
            return SoftmaxHeads(self.drafter.head_over(self.target_head, None), self._target_over_own, trained=True)
        head = self._target_sample(rng, needed)
        if self.drafter.corrects_head:
            corrected = self.drafter.head_over(self.target_head, head.token_ids)
            confidence = self.drafter.confidence if self.drafter.has_confidence else None
            return SoftmaxHeads(corrected, head, trained=True, confidence=confidence)
        return SoftmaxHeads(head, head, trained=False, selector=self.drafter if self.drafter.has_selector else None)

    def _target_sample(self, rng: np.random.Generator, needed: Sequence[torch.Tensor]) -> Head:
        """Return the target's head over a sample of its tokens, or the whole head if the config asks for no sample."""
        count, frequent, vocab = self.config.head_tokens, self.drafter.frequent_tokens, len(self.target_head)
        if count is None or frequent is None or count >= vocab:
            return Head(self.target_head, logit_map=self.drafter.logit_map)
        others = to_device(rng.integers(0, vocab, self.config.head_negatives), self.target_head.device)
        ids = torch.cat([frequent[:count], others, *(tokens.flatten() for tokens in needed)])
        return Head.over(self.target_head, ids, self.drafter.logit_map)


@dataclass(frozen=True)
class LossContext:
    """What a loss reads in addition to the blocks; the same for all micro-batches of a step."""

    heads: SoftmaxHeads
    target_head: torch.Tensor  # [V, H] the target's own
    positions_per_chunk: int  # bounds the memory for logits
    sampling: SamplingParams = GREEDY  # sampling of tokens and proposals; greedy: proposals are argmaxes

    @property
    def proposal_temperature(self) -> float:
        """Return the divisor of the drafter's logits when it samples proposals."""
        return 1.0 if self.sampling.greedy else self.sampling.temperature
