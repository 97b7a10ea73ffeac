"""Replay of drafters that sample their proposals from their own q, on stored answers of a sampled target.

It is exact in distribution.

P(proposed and accepted) of a token y is min(p(y), q(y)), and P(committed) is p(y). So given that y was committed, it
was the proposal and was accepted with probability min(1, q(y) / p(y)). Otherwise the step ended there: the rejected
proposal has the distribution max(q - p, 0), normalised, and the rest of the block was sampled from q after it. As long
as everything is accepted, the tokens that the drafter sees are the answer's. A proposal that is an argmax is the case
q(y) = 1: accepted iff it is y, on average over p.

A committed token that the stated top-k and top-p exclude (p(y) = 0) is verified by p before truncation. Such tokens
are counted (`outside_nucleus`). Answers that were sampled as stated have almost none: other kernels and dtypes move a
token over the edge now and then. More of them show that the answers were sampled differently, so that tau by replay is
wrong.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from draftsmith.stages.data.trajectories import Trajectory
from draftsmith.stages.drafters.base import LOGITS_PER_CHUNK, Context, Drafter, PreparedDrafter
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
from draftsmith.stages.runtime.memory import to_device
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.targets.kv_cache import Rows
from draftsmith.stages.targets.sampling import SamplingParams

FEW_OUTSIDE = 0.01  # share up to which nothing is logged: random weights in bfloat16 came to 0.5 %


def samples_proposals(drafter: Drafter, sampling: SamplingParams) -> bool:
    """Return whether proposals at this sampling are sampled from the drafter's q; otherwise they are argmaxes."""
    return drafter.samples_proposals and not sampling.greedy


@dataclass(frozen=True)
class VerifiedBlocks:
    """Blocks after [R, A] anchors, verified against the answers."""

    proposed: torch.Tensor  # [R, A, K] token ids
    accepted: torch.Tensor  # [R, A] proposals accepted
    expected: torch.Tensor | None = None  # [R, A] float64 committed tokens, averaged over samples


@dataclass(frozen=True)
class TargetSampler:
    """The target's distributions along R trajectories, and the random numbers that verification uses there.

    The numbers depend only on the trajectory's name: they are the same for every drafter and in any batch, and
    independent of the numbers that the answer was sampled with.
    """

    hidden: torch.Tensor  # [R, T, H] of the target; entry i predicts position i + 1
    numbers: torch.Tensor  # [R, T + K, purposes] float64, uniform
    lengths: torch.Tensor  # [R] tokens
    sampling: SamplingParams
    logits: Callable[[torch.Tensor], torch.Tensor]  # from hidden states [..., H] to [..., V]
    vocabulary: int  # V
    cached: torch.Tensor  # [R, T] float64 results of `answer_probability`, NaN if not computed yet

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
        """Create the sampler of a group of trajectories.

        hidden: [R, T, H]. proposals: K of a block. salt: a different one gives other random numbers.
        """
        shape = hidden.shape[1] + proposals, len(Purpose)  # filled position by position: any width has the same numbers
        by_row = [np.random.default_rng(seed_from_name(t.trajectory_id, salt)).random(shape) for t in trajectories]
        numbers = to_device(np.stack(by_row), hidden.device)
        lengths = to_device([len(t.tokens) for t in trajectories], hidden.device)
        cached = torch.full(hidden.shape[:2], torch.nan, dtype=torch.float64, device=hidden.device)
        return cls(hidden, numbers, lengths, sampling, target.logits, len(target.head_weight), cached)

    def select(self, rows: Rows) -> TargetSampler:
        """Return the sampler of these trajectories."""
        own = ("hidden", "numbers", "lengths", "cached")
        return replace(self, **{name: getattr(self, name)[rows] for name in own})

    @property
    def positions_per_chunk(self) -> int:
        """Return the number of float64 distributions over the vocabulary in memory at a time."""
        return max(1, LOGITS_PER_CHUNK // (2 * self.vocabulary))

    def numbers_at(self, positions: torch.Tensor, purpose: Purpose) -> torch.Tensor:
        """Return the random numbers [R, A] of positions [R, A]."""
        return self.numbers[..., purpose].gather(1, positions)

    @torch.no_grad()
    def answer_probability(self, positions: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
        """Return float64 [R, N]: the probability of the answers' tokens `following` [R, N] after positions [R, N].

        It is 1 where there is no token (-1). For tokens that top-k or top-p exclude, it is the probability before
        truncation. Every position is computed once.
        """
        at = positions.clamp(max=self.hidden.shape[1] - 1)
        cached = self.cached
        # a position may occur with the answer's token and, from a block that ends before it, with -1
        tokens = torch.full_like(cached, -1, dtype=torch.int64).scatter_reduce_(1, at, following, "amax")
        missing = torch.nonzero((tokens >= 0) & cached.isnan())
        for chunk in missing.split(self.positions_per_chunk):
            row, position = chunk.unbind(1)
            cached[row, position] = self._probability(row, position, tokens[row, position])
        return torch.where(following >= 0, cached.gather(1, at), 1.0)

    def _probability(self, rows: torch.Tensor, positions: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Return float64 [n], for as many positions as fit into memory."""
        if not self.sampling.truncates:
            return probability_of(self._logits(rows, positions), tokens, self.sampling.temperature)
        whole = probabilities(self._logits(rows, positions), self.sampling.temperature)
        own, before = (p.gather(-1, tokens[:, None])[:, 0] for p in (truncate(whole, self.sampling), whole))
        return torch.where(own > 0, own, before)

    @torch.no_grad()
    def distribution_at(self, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return float64 [n, V]: the distributions that the target samples from in rows [n] after positions [n]."""
        positions = positions.clamp(max=self.hidden.shape[1] - 1)
        return sampling_distribution(self._logits(rows, positions), self.sampling)

    def _logits(self, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        hidden = self.hidden[rows, positions]
        with torch.autocast(hidden.device.type, enabled=False):  # a training loop's is for the drafter alone
            return self.logits(hidden).float()


def acceptance_ratio(q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Return the probability, once clamped to 1, that a committed token was the proposal and was accepted."""
    return q / p


def rejection_weights(q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Return the weights [..., V] that a proposal was sampled with, given that it was rejected."""
    return (q - p).clamp(min=0)


class ExpectedCommits:
    """Follows blocks offset by offset: how far they are accepted, with these random numbers and on average.

    On average Σ_k Π_{j≤k} min(1, q_j(y_j) / p_j(y_j)) proposals are accepted, less those after the end of the answer.
    """

    def __init__(self, sampler: TargetSampler, anchors: torch.Tensor):
        """Start at the anchors [R, A], with nothing accepted yet."""
        self.sampler, self.anchors = sampler, anchors
        self.offset = 0
        self.accepting = torch.ones_like(anchors, dtype=torch.bool)  # whether everything was accepted so far
        self.accepted = torch.zeros_like(anchors)
        self.committed = torch.ones(anchors.shape, dtype=torch.float64, device=anchors.device)  # on average
        self._survival = self.committed.clone()  # probability that everything was accepted so far

    def take(self, q: torch.Tensor, p: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Take the next offset of all blocks. Return bool [R, A]: whether a step ends there with a rejected proposal.

        q, p: float64 [R, A], the probabilities of the answer's tokens under drafter and target (`answer_probability`).
        tokens: [R, A] the answer's, -1 after its end.
        """
        self.offset += 1
        verified = tokens >= 0
        chance = acceptance_ratio(q, p.clamp(min=torch.finfo(p.dtype).tiny)).clamp(max=1) * verified
        self._survival = self._survival * chance
        # the last token of an answer is committed by a step that reaches it, whether it was proposed or not
        inside = self.anchors + self.offset < self.sampler.lengths[:, None] - 1
        self.committed = self.committed + self._survival * inside
        accepts = self.accepting & (self.sampler.numbers_at(self.anchors + self.offset, Purpose.ACCEPT) < chance)
        ends = self.accepting & ~accepts & verified
        self.accepting = accepts
        self.accepted = self.accepted + accepts
        return ends


@torch.no_grad()
def draft_sampled(
    drafter: PreparedDrafter,
    context: Context,
    sampler: TargetSampler,
    tokens: torch.Tensor,
    anchors: torch.Tensor,
    *,
    with_proposals: bool,
) -> VerifiedBlocks:
    """The counterpart of `draft` for sampled proposals: sample a block after every anchor, consistent with the answer.

    tokens: [R, T + K] of the answers, -1 after their ends; anchors: [R, A].
    with_proposals: False leaves the proposals zero; the accepted counts are known without them.
    """
    at_once = max(1, sampler.positions_per_chunk // len(anchors))
    if anchors.shape[1] > at_once:
        chunks = [
            draft_sampled(drafter, context, sampler, tokens, part, with_proposals=with_proposals)
            for part in anchors.split(at_once, 1)
        ]
        parts = zip(*((chunk.proposed, chunk.accepted, chunk.expected) for chunk in chunks), strict=True)
        return VerifiedBlocks(*(torch.cat(part, 1) for part in parts))
    before = tokens.gather(1, anchors).clamp(min=0)
    ahead = anchors[..., None] + torch.arange(drafter.block_size - 1, device=anchors.device)  # before each offset
    following = tokens.gather(1, (ahead + 1).flatten(1))
    p = sampler.answer_probability(ahead.flatten(1), following).view_as(ahead)
    on_answer = drafter.sampler(context, before, anchors)
    on_proposals = copy.copy(on_answer) if with_proposals else None
    commits = ExpectedCommits(sampler, anchors)
    proposed: list[torch.Tensor] = []
    for k, y in enumerate(following.view_as(ahead).unbind(-1)):
        q = on_answer.probability(before, y, sampler.sampling.temperature)
        logits = None if on_proposals is None else on_proposals.logits(proposed[-1] if proposed else before)
        ends = commits.take(q, p[..., k], y)
        before = y.clamp(min=0)
        if logits is not None:
            proposed.append(_propose(commits, on_answer.head, logits, ends, before))
    ids = torch.stack(proposed, -1) if with_proposals else torch.zeros_like(ahead)
    return VerifiedBlocks(ids, commits.accepted, commits.committed)


def _propose(
    commits: ExpectedCommits, head: Head, logits: torch.Tensor, ends: torch.Tensor, y: torch.Tensor
) -> torch.Tensor:
    """Return the proposals [R, A] of the offset that `commits` took: the answer's tokens y while they are accepted.

    logits: [R, A, V'] of the drafter. ends: bool [R, A], whether the step ends here with a rejected one.
    """
    sampler, diverged, positions = commits.sampler, ~commits.accepting, commits.anchors + commits.offset
    weights, at_end = probabilities(logits[diverged], sampler.sampling.temperature), ends[diverged]
    if at_end.any():
        p = sampler.distribution_at(torch.nonzero(ends)[:, 0], positions[ends] - 1)
        p = p if head.token_ids is None else p[..., head.token_ids]
        weights[at_end] = rejection_weights(weights[at_end], p)
    numbers = sampler.numbers_at(positions, Purpose.PROPOSAL)
    columns, _ = head.to_columns(y)
    columns = columns.masked_scatter(diverged, sample_inverse_cdf(weights, numbers[diverged]))
    return torch.where(commits.accepting, y, head.to_tokens(columns))


@torch.no_grad()
def outside_nucleus(
    target: Target, hidden: torch.Tensor, trajectories: Sequence[Trajectory], sampling: SamplingParams
) -> list[int]:
    """Count the tokens of each trajectory that verify steps commit and that top-k and top-p exclude.

    hidden: [B, T, H] of the target. sampling: not greedy.
    """
    if not sampling.truncates:
        return [0] * len(trajectories)
    counts, chunk = [0] * len(trajectories), max(1, LOGITS_PER_CHUNK // (2 * len(target.head_weight)))  # float64
    for row, trajectory in enumerate(trajectories):
        tokens = torch.tensor(trajectory.tokens[trajectory.first_anchor + 1 :], device=hidden.device)
        before = hidden[row, trajectory.first_anchor : len(trajectory.tokens) - 1]
        for states, following in zip(before.split(chunk), tokens.split(chunk), strict=True):
            p = probabilities(target.logits(states), sampling.temperature)
            counts[row] += int(is_truncated(p, following, sampling).sum())
    return counts


def truncation_warning(share: float | None, sampling: SamplingParams) -> str | None:
    """Return the warning for a share of tokens outside the nucleus; None for few, or if no drafter samples."""
    if share is None or share <= FEW_OUTSIDE:
        return None
    return (
        f"warning: {share:.1%} of the answers' tokens cannot be sampled with {sampling.truncation} at temperature "
        f"{sampling.temperature:g}, so tau may be wrong. Set logs.top_p and logs.top_k to the answers' "
        "values; min_p and penalties cannot be set, so use answers without them, or greedy ones."
    )
