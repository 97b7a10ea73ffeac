"""Replay of drafters that draw their proposals from a q of their own: exact in law, on stored text of a sampled target.

P(proposed and kept) of a token y is min(p(y), q(y)), and P(committed) is p(y). So given that y was committed it was the
proposal, and kept, with probability min(1, q(y) / p(y)). Otherwise the step ended there: the rejected proposal has the
law max(q - p, 0), normalised, and the rest of the block was drawn from q behind it. As long as everything is kept, the
tokens that the drafter sees are the text's. A proposal that is an argmax is the case q(y) = 1: kept iff it is y, on
average over p.

A committed token that the stated law cannot draw (top-k or top-p leave it out, p(y) = 0) contradicts the law. It has
no such probability, and is judged by the law before truncation: min(1, q(y) / p(y)) with the p that they had not cut
yet. How many there are is counted (`nucleus.py`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from draftsmith.stages.drafters.base import LOGITS_AT_ONCE, Context, Drafter, Proposals
from draftsmith.stages.drafters.cutting import KeptSoFar
from draftsmith.stages.drafters.drawing import Purpose, pick, probabilities, seed_of, truncated
from draftsmith.stages.drafters.head import Head
from draftsmith.stages.law import Law
from draftsmith.stages.replay.trace import Trajectory
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.targets.slots import Rows


@dataclass(frozen=True)
class Judged:
    """Blocks behind [R, A] anchors, verified against the text."""

    proposals: Proposals
    accepted: torch.Tensor  # [R, A] proposals kept
    expected: torch.Tensor | None = None  # [R, A] float64 tokens committed, on average over what is drawn
    verified: torch.Tensor | None = None  # [R, A] proposals in front of the cut, where blocks are cut


@dataclass(frozen=True)
class SampledText:
    """R trajectories with what decides about their proposals: the target's law, and their own uniform numbers.

    They are those of the trajectory's name: the same for every drafter, whatever the batch, and independent of the
    numbers that the text was drawn with.
    """

    hidden: torch.Tensor  # [R, T, H] of the target; entry i predicts position i + 1
    numbers: torch.Tensor  # [R, T + K, purposes] float64
    lengths: torch.Tensor  # [R] tokens
    law: Law
    logits: Callable[[torch.Tensor], torch.Tensor]  # of hidden states [..., H]: [..., V]
    vocabulary: int  # V

    @classmethod
    def of(
        cls,
        target: Target,
        hidden: torch.Tensor,
        trajectories: Sequence[Trajectory],
        law: Law,
        proposals: int,
        salt: int = 0,
    ) -> SampledText:
        """hidden: [R, T, H]. salt: another one draws anew."""
        shape = hidden.shape[1] + proposals, len(Purpose)  # filled position by position: any width has the same numbers
        drawn = [np.random.default_rng(seed_of(t.trajectory_id, salt)).random(shape) for t in trajectories]
        numbers = torch.from_numpy(np.stack(drawn)).to(hidden.device)
        lengths = torch.tensor([len(t.tokens) for t in trajectories], device=hidden.device)
        return cls(hidden, numbers, lengths, law, target.logits, len(target.head_weight))

    def select(self, rows: Rows) -> SampledText:
        """Some of the trajectories."""
        return replace(self, hidden=self.hidden[rows], numbers=self.numbers[rows], lengths=self.lengths[rows])

    @property
    def anchors_at_once(self) -> int:
        """Of each trajectory: laws are float64, over all tokens."""
        return max(1, LOGITS_AT_ONCE // (2 * len(self.lengths) * self.vocabulary))

    def numbers_at(self, positions: torch.Tensor, purpose: Purpose) -> torch.Tensor:
        """[R, A] of positions [R, A]."""
        return self.numbers[..., purpose].gather(1, positions)

    @torch.no_grad()
    def law_behind(self, positions: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """float64 [R, A, V], what the target draws behind positions [R, A], behind the last one's too; and [R, A], what
        it says of `tokens` there: of those that the law leaves out, what it said before.

        tokens: [R, A], anything behind the text's end.
        """
        at = positions.clamp(max=self.hidden.shape[1] - 1)
        hidden = self.hidden.gather(1, at[..., None].expand(-1, -1, self.hidden.shape[-1]))
        with torch.autocast(hidden.device.type, enabled=False):  # a training loop's is for the drafter alone
            whole = probabilities(self.logits(hidden), self.law.temperature)
        p, y = truncated(whole, self.law), tokens.clamp(min=0)[..., None]
        of_tokens, before = p.gather(-1, y)[..., 0], whole.gather(-1, y)[..., 0]
        return p, torch.where(of_tokens > 0, of_tokens, before)


def kept_by(q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """From the laws of a committed token: how probable it is, up to 1, that it was the proposal, and kept."""
    return q / p


def rejected_by(q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """From the laws of an offset [..., V]: weights that a proposal was drawn by of which it is known that it was
    rejected."""
    return (q - p).clamp(min=0)


class Expectation:
    """How far blocks are kept, offset after offset: as it was drawn, and on average.

    Σ_k Π_{j≤k} min(1, q_j(y_j) / p_j(y_j)) proposals are kept on average, less those that the text's end cuts off.
    """

    def __init__(self, text: SampledText, anchors: torch.Tensor):
        """anchors: [R, A] that the blocks are behind."""
        self.text, self.anchors = text, anchors
        self.offset = 0
        self.going = torch.ones_like(anchors, dtype=torch.bool)  # everything was kept so far
        self.accepted = torch.zeros_like(anchors)
        self.committed = torch.ones(anchors.shape, dtype=torch.float64, device=anchors.device)  # on average
        self._reached = self.committed.clone()

    def take(
        self,
        q: torch.Tensor,
        of_p: torch.Tensor,
        tokens: torch.Tensor,
        head: Head,
        verified: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The next offset of all blocks. Returns where the step ends there with a rejected proposal, bool [R, A].

        q: [R, A, V'] of the drafter on the text, over the head's tokens; tokens: [R, A] of the text, -1 behind its end;
        of_p: [R, A], what the target says of them (`law_behind`). verified: bool [R, A]; where a block is cut in front
        of the offset the step ends with a token of the target alone.
        """
        self.offset += 1
        columns, present = head.to_columns(tokens.clamp(min=0))
        of_q = q.gather(-1, columns[..., None])[..., 0] * (present & (tokens >= 0))
        chance = kept_by(of_q, of_p.clamp(min=torch.finfo(of_p.dtype).tiny)).clamp(max=1)
        judged = tokens >= 0
        if verified is not None:
            chance, judged = chance * verified, judged & verified
        self._reached = self._reached * chance
        # the last token of a text is committed by a step that reaches it, whether it was proposed or not
        inside = self.anchors + self.offset < self.text.lengths[:, None] - 1
        self.committed = self.committed + self._reached * inside
        keeps = self.going & (self.text.numbers_at(self.anchors + self.offset, Purpose.ACCEPT) < chance)
        ends = self.going & ~keeps & judged
        self.going = keeps
        self.accepted = self.accepted + keeps
        return ends


@torch.no_grad()
def draft_drawn(
    drafter: Drafter,
    context: Context,
    text: SampledText,
    tokens: torch.Tensor,
    anchors: torch.Tensor,
    block_size: int,
    head: Head,
    *,
    confidence: float | None = None,
    with_logprobs: bool,
) -> Judged:
    """What `draft` does for argmaxes: a block behind every anchor [R, A], drawn so that it fits the text.

    tokens: [R, T + K] of the text, -1 behind its end. Log-probs are under the drafter's softmax, at temperature 1.
    """
    parts = [
        _drawn(drafter, context, text, tokens, part, block_size, head, confidence, with_logprobs)
        for part in anchors.split(text.anchors_at_once, 1)
    ]
    ids, logprobs, accepted, expected, most = (torch.cat(found, 1) for found in zip(*parts, strict=True))
    proposals = Proposals(ids, logprobs if with_logprobs else None)
    return Judged(proposals, accepted, expected, most if confidence is not None else None)


def _drawn(
    drafter: Drafter,
    context: Context,
    text: SampledText,
    tokens: torch.Tensor,
    anchors: torch.Tensor,
    block_size: int,
    head: Head,
    confidence: float | None,
    with_logprobs: bool,
) -> tuple[torch.Tensor, ...]:
    before = tokens.gather(1, anchors).clamp(min=0)
    on_text = drafter.drafting(context, before, anchors, block_size, head)
    own, own_before = copy.copy(on_text), before
    found = Expectation(text, anchors)
    # of the text, and of what is proposed: the same up to the first rejection
    kept_so_far = None if confidence is None else (KeptSoFar(confidence), KeptSoFar(confidence))
    verified, most = None, torch.zeros_like(anchors)
    ids, logprobs = [], []
    for k in range(1, block_size):
        y = tokens.gather(1, anchors + k)
        on_text_logits, own_logits = on_text.logits(before), own.logits(own_before)
        p, of_y = text.law_behind(anchors + k - 1, y)
        going = found.going
        if kept_so_far is not None:
            verified = kept_so_far[0].take(on_text.confidence())
            most = most + kept_so_far[1].take(own.confidence())
        ends = found.take(probabilities(on_text_logits, text.law.temperature), of_y, y, head, verified)
        weights = probabilities(own_logits, text.law.temperature)
        of_rejected = rejected_by(weights, p if head.token_ids is None else p[..., head.token_ids])
        weights = torch.where(ends[..., None], of_rejected, weights)
        columns = pick(weights, text.numbers_at(anchors + k, Purpose.PROPOSAL))
        before = y.clamp(min=0)
        kept = going & found.going
        own_before = torch.where(kept, before, head.to_tokens(columns))
        ids.append(own_before)
        if with_logprobs:
            columns = torch.where(kept, head.to_columns(before)[0], columns)
            logprobs.append(own_logits.log_softmax(-1).gather(-1, columns[..., None])[..., 0])
        else:
            logprobs.append(own_before.float())
    return torch.stack(ids, -1), torch.stack(logprobs, -1), found.accepted, found.committed, most
