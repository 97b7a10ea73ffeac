"""Replay of drafters that sample their proposals from a q of their own, on stored text of a sampled target.

It is exact in distribution.

P(proposed and kept) of a token y is min(p(y), q(y)), and P(committed) is p(y). So given that y was committed it was the
proposal, and kept, with probability min(1, q(y) / p(y)). Otherwise the step ended there: the rejected proposal has the
distribution max(q - p, 0), normalised, and the rest of the block was drawn from q behind it. As long as everything is
kept, the tokens that the drafter sees are the text's. A proposal that is an argmax is the case q(y) = 1: kept iff it is
y, on average over p.

A committed token that the stated top-k and top-p leave out (p(y) = 0) is verified by p before truncation. How many
there are is counted (`outside_nucleus`): of texts that were sampled as stated there are next to none, as other kernels
and dtypes move a token over the edge now and then. More of them say that the texts were sampled otherwise, so that tau
by replay is wrong.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from draftsmith.stages.data.trajectories import Trajectory
from draftsmith.stages.drafters.base import LOGITS_AT_ONCE, BlockSampler, Context, Drafter
from draftsmith.stages.drafters.lm_head import Head
from draftsmith.stages.drafters.sampling import (
    Purpose,
    is_truncated,
    probabilities,
    probability_of,
    sample_inverse_cdf,
    sampling_distribution,
    seed_from_name,
    truncate,
)
from draftsmith.stages.target.causal_lm import Target
from draftsmith.stages.target.kv_cache import Rows
from draftsmith.stages.target.sampling import SamplingParams

FEW_OUTSIDE = 0.01  # share that is no reason for a warning: random weights in bfloat16 came to 0.5 %


@dataclass(frozen=True)
class VerifiedBlocks:
    """Blocks behind [R, A] anchors, verified against the text."""

    proposed: torch.Tensor  # [R, A, K] token ids
    accepted: torch.Tensor  # [R, A] proposals accepted
    expected: torch.Tensor | None = None  # [R, A] float64 tokens committed, on average over what is sampled


@dataclass(frozen=True)
class TargetSampler:
    """R trajectories with what decides about their proposals: the target's distribution, and their own uniform numbers.

    They are those of the trajectory's name: the same for every drafter, whatever the batch, and independent of the
    numbers that the text was drawn with.
    """

    hidden: torch.Tensor  # [R, T, H] of the target; entry i predicts position i + 1
    numbers: torch.Tensor  # [R, T + K, purposes] float64
    lengths: torch.Tensor  # [R] tokens
    sampling: SamplingParams
    logits: Callable[[torch.Tensor], torch.Tensor]  # of hidden states [..., H]: [..., V]
    vocabulary: int  # V
    said: torch.Tensor | None = None  # [R, T] float64, filled as it is asked for: what `of_text` has found, else NaN

    @classmethod
    def for_trajectories(
        cls,
        target: Target,
        hidden: torch.Tensor,
        trajectories: Sequence[Trajectory],
        sampling: SamplingParams,
        proposals: int,
        salt: int = 0,
    ) -> TargetSampler:
        """hidden: [R, T, H]. salt: another one draws anew."""
        shape = hidden.shape[1] + proposals, len(Purpose)  # filled position by position: any width has the same numbers
        drawn = [np.random.default_rng(seed_from_name(t.trajectory_id, salt)).random(shape) for t in trajectories]
        numbers = torch.from_numpy(np.stack(drawn)).to(hidden.device)
        lengths = torch.tensor([len(t.tokens) for t in trajectories], device=hidden.device)
        said = torch.full(hidden.shape[:2], torch.nan, dtype=torch.float64, device=hidden.device)
        return cls(hidden, numbers, lengths, sampling, target.logits, len(target.head_weight), said)

    def select(self, rows: Rows) -> TargetSampler:
        """Some of the trajectories."""
        said = None if self.said is None else self.said[rows]
        return replace(
            self, hidden=self.hidden[rows], numbers=self.numbers[rows], lengths=self.lengths[rows], said=said
        )

    @property
    def positions_per_chunk(self) -> int:
        """In float64, over all tokens."""
        return max(1, LOGITS_AT_ONCE // (2 * self.vocabulary))

    @property
    def anchors_per_chunk(self) -> int:
        """Of each trajectory."""
        return max(1, self.positions_per_chunk // len(self.lengths))

    def numbers_at(self, positions: torch.Tensor, purpose: Purpose) -> torch.Tensor:
        """[R, A] of positions [R, A]."""
        return self.numbers[..., purpose].gather(1, positions)

    @torch.no_grad()
    def answer_probability(self, positions: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
        """float64 [R, N]: the probability of the text's own tokens `following` [R, N] behind positions [R, N]; 1 where
        there is none (-1). Of tokens that sampling leaves out, their probability before truncation. Every position is
        computed once."""
        at = positions.clamp(max=self.hidden.shape[1] - 1)
        said = torch.full_like(self.hidden[..., 0], torch.nan, dtype=torch.float64) if self.said is None else self.said
        # of a position that is asked for more than once, the text's token: another block may not reach it (-1)
        tokens = torch.full_like(said, -1, dtype=torch.int64).scatter_reduce_(1, at, following, "amax")
        rows, places = torch.nonzero((tokens >= 0) & said.isnan(), as_tuple=True)
        for row, place in zip(
            rows.split(self.positions_per_chunk), places.split(self.positions_per_chunk), strict=True
        ):
            said[row, place] = self._of_tokens(row, place, tokens[row, place])
        return torch.where(following >= 0, said.gather(1, at), 1.0)

    def _of_tokens(self, rows: torch.Tensor, positions: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Of each [n]; they fit into memory."""
        if not self.sampling.truncates:
            return probability_of(self._logits(rows, positions), tokens, self.sampling.temperature)
        whole = probabilities(self._logits(rows, positions), self.sampling.temperature)
        own, before = (p.gather(-1, tokens[:, None])[:, 0] for p in (truncate(whole, self.sampling), whole))
        return torch.where(own > 0, own, before)

    @torch.no_grad()
    def distribution_at(self, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """float64 [n, V]: what the target draws in rows [n] behind positions [n], behind the last one's too."""
        positions = positions.clamp(max=self.hidden.shape[1] - 1)
        return sampling_distribution(self._logits(rows, positions), self.sampling)

    def _logits(self, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        hidden = self.hidden[rows, positions]
        with torch.autocast(hidden.device.type, enabled=False):  # a training loop's is for the drafter alone
            return self.logits(hidden).float()


def acceptance_ratio(q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """From the distributions of a committed token: how probable it is, up to 1, that it was the proposal, and kept."""
    return q / p


def rejection_weights(q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """From the distributions of an offset [..., V]: weights that a proposal was drawn by of which it is known that it
    was rejected."""
    return (q - p).clamp(min=0)


class ExpectedCommits:
    """How far blocks are kept, offset after offset: as it was drawn, and on average.

    Σ_k Π_{j≤k} min(1, q_j(y_j) / p_j(y_j)) proposals are kept on average, less those that the text's end cuts off.
    """

    def __init__(self, text: TargetSampler, anchors: torch.Tensor):
        """anchors: [R, A] that the blocks are behind."""
        self.text, self.anchors = text, anchors
        self.offset = 0
        self.going = torch.ones_like(anchors, dtype=torch.bool)  # everything was kept so far
        self.accepted = torch.zeros_like(anchors)
        self.committed = torch.ones(anchors.shape, dtype=torch.float64, device=anchors.device)  # on average
        self._reached = self.committed.clone()

    def take(self, q: torch.Tensor, p: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Take the next offset of all blocks. Return where the step ends there with a rejected proposal, bool [R, A].

        q, p: float64 [R, A], what drafter and target (`of_text`) say of the text's own tokens [R, A], -1 after its end.
        """
        self.offset += 1
        judged = tokens >= 0
        chance = acceptance_ratio(q, p.clamp(min=torch.finfo(p.dtype).tiny)).clamp(max=1) * judged
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
def draft_sampled(
    drafter: Drafter,
    context: Context,
    text: TargetSampler,
    tokens: torch.Tensor,
    anchors: torch.Tensor,
    block_size: int,
    head: Head,
    *,
    with_proposals: bool,
) -> VerifiedBlocks:
    """Do what `draft` does for argmaxes: a block behind every anchor [R, A], sampled so that it fits the text.

    tokens: [R, T + K] of the text, -1 after its end. with_proposals: else they are zeros; how many are accepted is
    known without them.
    """
    parts = [
        _draft_part(drafter, context, text, tokens, part, block_size, head, with_proposals)
        for part in anchors.split(text.anchors_per_chunk, 1)
    ]
    return VerifiedBlocks(*(torch.cat(found, 1) for found in zip(*parts, strict=True)))


def _draft_part(
    drafter: Drafter,
    context: Context,
    text: TargetSampler,
    tokens: torch.Tensor,
    anchors: torch.Tensor,
    block_size: int,
    head: Head,
    with_proposals: bool,
) -> tuple[torch.Tensor, ...]:
    """Of anchors that fit into memory: proposals, how many are accepted, and tokens committed on average."""
    before = tokens.gather(1, anchors).clamp(min=0)
    ahead = anchors[..., None] + torch.arange(block_size - 1, device=anchors.device)  # positions before the offsets
    following = tokens.gather(1, (ahead + 1).flatten(1))
    said = text.answer_probability(ahead.flatten(1), following).view_as(ahead)
    on_text = drafter.block_sampler(context, before, anchors, block_size, head)
    own = _DrafterSampler(text, copy.copy(on_text), anchors, before) if with_proposals else None
    found = ExpectedCommits(text, anchors)
    for k, y in enumerate(following.view_as(ahead).unbind(-1)):
        q = on_text.probability(before, y, text.sampling.temperature)
        logits = None if own is None else own.logits()
        ends = found.take(q, said[..., k], y)
        before = y.clamp(min=0)
        if own is not None and logits is not None:
            own.take(logits, found.going, ends, before)
    proposed = torch.zeros_like(ahead) if own is None else torch.stack(own.ids, -1)
    return proposed, found.accepted, found.committed


class _DrafterSampler:
    """What is proposed behind anchors [R, A]: the text's tokens while they are accepted, sampled ones after that."""

    def __init__(self, text: TargetSampler, drafting: BlockSampler, anchors: torch.Tensor, before: torch.Tensor):
        """before: [R, A] the anchors' tokens."""
        self.text, self.drafting, self.anchors, self.before = text, drafting, anchors, before
        self.ids: list[torch.Tensor] = []

    def logits(self) -> torch.Tensor:
        """[R, A, V'] of the next offset."""
        return self.drafting.logits(self.before)

    def take(self, logits: torch.Tensor, kept: torch.Tensor, ends: torch.Tensor, y: torch.Tensor) -> None:
        """The proposals of an offset with these logits. kept: bool [R, A], they are the text's tokens y [R, A]; ends:
        the step ends here with a rejected one."""
        head, away, behind = self.drafting.head, ~kept, self.anchors + len(self.ids)
        weights, at_end = probabilities(logits[away], self.text.sampling.temperature), ends[away]
        if at_end.any():
            p = self.text.distribution_at(torch.nonzero(ends)[:, 0], behind[ends])
            weights[at_end] = rejection_weights(
                weights[at_end], p if head.token_ids is None else p[..., head.token_ids]
            )
        numbers = self.text.numbers_at(behind + 1, Purpose.PROPOSAL)
        columns, _ = head.to_columns(y)
        columns = columns.masked_scatter(away, sample_inverse_cdf(weights, numbers[away]))
        self.before = torch.where(kept, y, head.to_tokens(columns))
        self.ids.append(self.before)


@torch.no_grad()
def outside_nucleus(
    target: Target, hidden: torch.Tensor, trajectories: Sequence[Trajectory], sampling: SamplingParams
) -> list[int]:
    """Count the tokens of each trajectory that top-k and top-p leave out, of those that verify steps commit.

    hidden: [B, T, H] of the target. sampling: not greedy.
    """
    if not sampling.truncates:
        return [0] * len(trajectories)
    return [_count(target, row, trajectory, sampling) for row, trajectory in zip(hidden, trajectories, strict=True)]


def _count(target: Target, hidden: torch.Tensor, trajectory: Trajectory, sampling: SamplingParams) -> int:
    tokens = torch.tensor(trajectory.tokens[trajectory.first_anchor + 1 :], device=hidden.device)
    before = hidden[trajectory.first_anchor : len(trajectory.tokens) - 1]
    count, at_once = 0, max(1, LOGITS_AT_ONCE // (2 * len(target.head_weight)))  # float64, over all tokens
    for states, ahead in zip(before.split(at_once), tokens.split(at_once), strict=True):
        p = probabilities(target.logits(states), sampling.temperature)
        count += int(is_truncated(p, ahead, sampling).sum())
    return count


def truncation_warning(share: float | None, sampling: SamplingParams) -> str | None:
    """Return what to log for a share of tokens outside the nucleus; None for few, or where no drafter samples."""
    if share is None or share <= FEW_OUTSIDE:
        return None
    return (
        f"warning: {share:.1%} of the answers' tokens cannot be sampled with {sampling.truncation} at temperature "
        f"{sampling.temperature:g}, so tau may be wrong. Set logs.top_p and logs.top_k to what the answers were "
        "sampled with; min_p and penalties cannot be set, so use answers without them, or greedy ones."
    )
