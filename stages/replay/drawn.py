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

from draftsmith.stages.drafters.base import LOGITS_AT_ONCE, Context, Drafter, Drafting, Proposals
from draftsmith.stages.drafters.cutting import KeptSoFar
from draftsmith.stages.drafters.drawing import (
    Purpose,
    pick,
    probabilities,
    probability_of,
    sampled,
    seed_of,
    truncated,
)
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
    said: torch.Tensor | None = None  # [R, T] float64, filled as it is asked for: what `of_text` has found, else NaN

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
        said = torch.full(hidden.shape[:2], torch.nan, dtype=torch.float64, device=hidden.device)
        return cls(hidden, numbers, lengths, law, target.logits, len(target.head_weight), said)

    def select(self, rows: Rows) -> SampledText:
        """Some of the trajectories."""
        said = None if self.said is None else self.said[rows]
        return replace(
            self, hidden=self.hidden[rows], numbers=self.numbers[rows], lengths=self.lengths[rows], said=said
        )

    @property
    def laws_at_once(self) -> int:
        """In float64, over all tokens."""
        return max(1, LOGITS_AT_ONCE // (2 * self.vocabulary))

    @property
    def anchors_at_once(self) -> int:
        """Of each trajectory."""
        return max(1, self.laws_at_once // len(self.lengths))

    def numbers_at(self, positions: torch.Tensor, purpose: Purpose) -> torch.Tensor:
        """[R, A] of positions [R, A]."""
        return self.numbers[..., purpose].gather(1, positions)

    @torch.no_grad()
    def of_text(self, positions: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
        """float64 [R, N]: what the law says of the text's own tokens `following` [R, N] behind positions [R, N]; 1
        where there is none (-1). Of tokens that the law leaves out, what it said before. Every position is computed
        once."""
        at = positions.clamp(max=self.hidden.shape[1] - 1)
        said = torch.full_like(self.hidden[..., 0], torch.nan, dtype=torch.float64) if self.said is None else self.said
        # of a position that is asked for more than once, the text's token: another block may not reach it (-1)
        tokens = torch.full_like(said, -1, dtype=torch.int64).scatter_reduce_(1, at, following, "amax")
        rows, places = torch.nonzero((tokens >= 0) & said.isnan(), as_tuple=True)
        for row, place in zip(rows.split(self.laws_at_once), places.split(self.laws_at_once), strict=True):
            said[row, place] = self._of_tokens(row, place, tokens[row, place])
        return torch.where(following >= 0, said.gather(1, at), 1.0)

    def _of_tokens(self, rows: torch.Tensor, positions: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Of each [n]; they fit into memory."""
        if not self.law.truncates:
            return probability_of(self._logits(rows, positions), tokens, self.law.temperature)
        whole = probabilities(self._logits(rows, positions), self.law.temperature)
        own, before = (p.gather(-1, tokens[:, None])[:, 0] for p in (truncated(whole, self.law), whole))
        return torch.where(own > 0, own, before)

    @torch.no_grad()
    def law_at(self, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """float64 [n, V]: what the target draws in rows [n] behind positions [n], behind the last one's too."""
        positions = positions.clamp(max=self.hidden.shape[1] - 1)
        return sampled(self._logits(rows, positions), self.law)

    def _logits(self, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        hidden = self.hidden[rows, positions]
        with torch.autocast(hidden.device.type, enabled=False):  # a training loop's is for the drafter alone
            return self.logits(hidden).float()


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
        self, q: torch.Tensor, p: torch.Tensor, tokens: torch.Tensor, verified: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The next offset of all blocks. Returns where the step ends there with a rejected proposal, bool [R, A].

        q, p: float64 [R, A], what drafter and target (`of_text`) say of the text's own tokens [R, A], -1 behind its
        end. verified: bool [R, A]; where a block is cut in front of the offset the step ends with a token of the
        target alone.
        """
        self.offset += 1
        judged = tokens >= 0
        chance = kept_by(q, p.clamp(min=torch.finfo(p.dtype).tiny)).clamp(max=1) * judged
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
    confidence: float | None,
    with_proposals: bool,
    with_logprobs: bool,
) -> Judged:
    """What `draft` does for argmaxes: a block behind every anchor [R, A], drawn so that it fits the text.

    tokens: [R, T + K] of the text, -1 behind its end. Log-probs are under the drafter's softmax, at temperature 1.
    with_proposals: else they are zeros; how far blocks are kept is known without them.
    """
    parts = [
        _drawn(drafter, context, text, tokens, part, block_size, head, confidence, with_proposals, with_logprobs)
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
    with_proposals: bool,
    with_logprobs: bool,
) -> tuple[torch.Tensor, ...]:
    temperature = text.law.temperature
    before = tokens.gather(1, anchors).clamp(min=0)
    ahead = anchors[..., None] + torch.arange(block_size - 1, device=anchors.device)  # behind which an offset stands
    following = tokens.gather(1, (ahead + 1).flatten(1))
    said = text.of_text(ahead.flatten(1), following).view_as(ahead)
    on_text = drafter.drafting(context, before, anchors, block_size, head)
    own = None
    if with_proposals or confidence is not None:  # where a block is cut depends on what is proposed
        own = _Own(text, copy.copy(on_text), anchors, before, with_logprobs)
    found = Expectation(text, anchors)
    # of the text, and of what is proposed: the same up to the first rejection
    kept_so_far = None if confidence is None else (KeptSoFar(confidence), KeptSoFar(confidence))
    verified, most = None, torch.zeros_like(anchors)
    for k, y in enumerate(following.view_as(ahead).unbind(-1)):
        q = on_text.probability(before, y, temperature)
        own_logits = None if own is None else own.logits()
        if kept_so_far is not None and own is not None:
            verified = kept_so_far[0].take(on_text.confidence())
            most = most + kept_so_far[1].take(own.drafting.confidence())
        ends = found.take(q, said[..., k], y, verified)
        before = y.clamp(min=0)
        if own is not None and own_logits is not None:
            own.take(own_logits, found.going, ends, before)
    if own is None:
        nothing = torch.zeros_like(ahead)
        return nothing, nothing.float(), found.accepted, found.committed, most
    return torch.stack(own.ids, -1), torch.stack(own.logprobs, -1), found.accepted, found.committed, most


class _Own:
    """What is proposed behind anchors [R, A]: the text's tokens as long as they are kept, what was drawn behind."""

    def __init__(
        self, text: SampledText, drafting: Drafting, anchors: torch.Tensor, before: torch.Tensor, with_logprobs: bool
    ):
        """before: [R, A] the anchors' tokens."""
        self.text, self.drafting, self.anchors, self.before = text, drafting, anchors, before
        self.with_logprobs = with_logprobs
        self.ids: list[torch.Tensor] = []
        self.logprobs: list[torch.Tensor] = []

    def logits(self) -> torch.Tensor:
        """[R, A, V'] of the next offset."""
        return self.drafting.logits(self.before)

    def take(self, logits: torch.Tensor, kept: torch.Tensor, ends: torch.Tensor, y: torch.Tensor) -> None:
        """The proposals of an offset with these logits. kept: bool [R, A], they are the text's tokens y [R, A]; ends:
        the step ends here with a rejected one."""
        head, away, behind = self.drafting.head, ~kept, self.anchors + len(self.ids)
        weights, at_end = probabilities(logits[away], self.text.law.temperature), ends[away]
        if at_end.any():
            p = self.text.law_at(torch.nonzero(ends)[:, 0], behind[ends])
            weights[at_end] = rejected_by(weights[at_end], p if head.token_ids is None else p[..., head.token_ids])
        numbers = self.text.numbers_at(behind + 1, Purpose.PROPOSAL)
        columns, _ = head.to_columns(y)
        columns = columns.masked_scatter(away, pick(weights, numbers[away]))
        self.before = torch.where(kept, y, head.to_tokens(columns))
        self.ids.append(self.before)
        self.logprobs.append(
            logits.log_softmax(-1).gather(-1, columns[..., None])[..., 0] if self.with_logprobs else y.float()
        )
