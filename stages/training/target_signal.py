"""What the target says at the positions that a loss trains, computed on demand."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from draftsmith.stages.drafters.lm_head import Head
from draftsmith.stages.drafters.sampling import truncation_mask
from draftsmith.stages.training import losses
from draftsmith.stages.training.blocks import LossContext
from draftsmith.stages.training.chunked_loss import chunked_values

NO_HIDDEN = "this loss reads the target's distribution: batches need its hidden states"


@dataclass(frozen=True)
class TargetSignal:
    """What the target says at N positions."""

    tokens: torch.Tensor  # [N] committed
    columns: torch.Tensor  # [N] the same as columns of the heads
    hidden: torch.Tensor | None  # [N, H] the target's, that predicted these tokens
    context: LossContext
    temperature: float  # of its distribution
    stored_logprob: torch.Tensor | None = None  # [N] as `token_logprob` returns it

    def logits(self) -> torch.Tensor:
        """Return its logits [N, V'] over the tokens of the training heads, at the temperature."""
        return losses.at_temperature(self._logits, self.temperature)

    def verifying_logits(self) -> torch.Tensor:
        """Return the logits [N, V'] that verify sampled proposals: at their temperature, with top-k and top-p."""
        sampling = self.context.sampling
        logits = self._logits / sampling.temperature
        if not sampling.truncates:
            return logits
        return logits.masked_fill(truncation_mask(logits.softmax(-1), sampling), losses.NOTHING)

    @cached_property
    def _logits(self) -> torch.Tensor:
        return self._under(self.context.heads.target)

    @torch.no_grad()
    def with_token_logprobs(self) -> TargetSignal:
        """Return the same with `token_logprob`, which losses read more than once, some again in their backward."""
        assert self.hidden is not None, NO_HIDDEN
        with torch.autocast(self.hidden.device.type, enabled=False):
            full = Head(self.context.target_head, logit_map=self.context.heads.target.logit_map)
            logprob = chunked_values(
                self.hidden,
                self.context.positions_per_chunk,
                lambda h, chunk: -losses.cross_entropy(full.logits(h), self.tokens[chunk]),
            )
        return replace(self, stored_logprob=logprob)

    @property
    def token_logprob(self) -> torch.Tensor:
        """Return the log-probability [N] of the committed tokens under the full head.

        Call `with_token_logprobs` first.
        """
        assert self.stored_logprob is not None
        return self.stored_logprob

    @torch.no_grad()
    def _under(self, head: Head) -> torch.Tensor:
        assert self.hidden is not None, NO_HIDDEN
        with torch.autocast(self.hidden.device.type, enabled=False):  # the training loop's is for the drafter alone
            return head.logits(self.hidden)

    def at(self, chunk: slice) -> TargetSignal:
        """Return the signal at a chunk of the positions."""
        hidden, logprob = (None if x is None else x[chunk] for x in (self.hidden, self.stored_logprob))
        return replace(
            self, tokens=self.tokens[chunk], columns=self.columns[chunk], hidden=hidden, stored_logprob=logprob
        )
