"""Verify steps at the anchors of a batch: read from a table, or judged on the blocks that a step has just drafted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch

from draftsmith.stages.data.trajectories import Trajectory
from draftsmith.stages.drafters.base import LOGITS_AT_ONCE, Drafter, argmax_tokens
from draftsmith.stages.drafters.lm_head import Head
from draftsmith.stages.drafters.sampling import probability_among, probability_of
from draftsmith.stages.replay.replayer import score
from draftsmith.stages.replay.sampled import ExpectedCommits, TargetSampler
from draftsmith.stages.replay.trace import Trace
from draftsmith.stages.runtime.ranks import ALONE, Ranks
from draftsmith.stages.target.causal_lm import Target
from draftsmith.stages.training.batches import Batch
from draftsmith.stages.training.blocks import Anchors, labels_of, tokens_at


@dataclass(frozen=True)
class VerifySteps:
    """The verify step at each anchor of a batch (K = proposals of the trained block)."""

    accepted: torch.Tensor  # [B, A] proposals kept
    committed: torch.Tensor  # [B, A] tokens that the step committed: offsets 1 … committed are its response stream
    rejected_offset: torch.Tensor  # [B, A] 0 = nothing rejected
    proposed: torch.Tensor  # [B, A, K]
    target_logprobs: torch.Tensor  # [B, A, K] on the draft-induced prefix, NaN where not judged or not scored


@dataclass(frozen=True)
class Unscored:
    """Verify steps at the anchors of some trajectories; the target is to score what it rejected in some rows."""

    steps: VerifySteps
    trajectories: Sequence[Trajectory]  # B
    anchors: Anchors  # [B, A]
    rows: Sequence[int]


@torch.no_grad()
def judge(
    hidden: torch.Tensor,
    batch: Batch,
    anchors: Anchors,
    head: Head,
    *,
    proposals: int,
    proposed: torch.Tensor | None = None,
    chooser: Drafter | None = None,
    text: TargetSampler | None = None,
) -> VerifySteps:
    """The verify steps of blocks that were drafted already: no second pass of the drafter.

    hidden: [B, A, K, H] on the trajectories' own tokens, which decide what is accepted for any drafter: up to the first
    rejection its proposals are these tokens. proposals: how many of the K the serving block has; with fewer, the first
    ones of the trained block stand in for a smaller block's own, which differ where a block attends in both directions
    (replay drafts the smaller block itself). proposed: [B, A, K] of an autoregressive drafter, whose proposals behind a
    rejection depend on it; without them those are not its own. chooser: a drafter that chooses among the head's
    candidates, by the trajectory's tokens where that decides what is accepted, and by its own for what it proposes.
    text: proposals are drawn; without `proposed` those of the steps are zeros.
    """
    K = hidden.shape[2]
    labels, inside = labels_of(batch, anchors, K)
    inside = inside & (torch.arange(1, K + 1, device=hidden.device) <= proposals)
    on_text, before = torch.where(inside, labels, -1), tokens_at(batch, anchors, 0, K)
    choice = None if chooser is None else _choice(hidden, before, head, chooser)
    if text is None:
        best = _best(hidden, head, choice)
        accepted = ((best == labels) & inside).long().cumprod(-1).sum(-1)
        if chooser is not None and proposed is None:
            proposed = chooser.selector_propose(hidden, before[..., 0], head)
        proposed = best if proposed is None else proposed
    else:
        accepted = _drawn(hidden, on_text, anchors, head, choice, text)
        proposed = torch.zeros_like(labels) if proposed is None else proposed
    judged = inside.long().sum(-1)
    lengths = torch.tensor([len(t.tokens) for t in batch.trajectories], device=hidden.device)
    committed = torch.minimum(accepted + 1, lengths[:, None] - 1 - anchors.positions)
    rejected_offset = torch.where(accepted < judged, accepted + 1, 0)
    unscored = torch.full(labels.shape, torch.nan, device=hidden.device)
    return VerifySteps(accepted, committed, rejected_offset, proposed, unscored)


Choice: TypeAlias = tuple[torch.Tensor, torch.Tensor]  # scores and token ids of candidates [..., k]


def _choice(hidden: torch.Tensor, before: torch.Tensor, head: Head, chooser: Drafter) -> Choice:
    """Of the candidates at hidden states [..., H], behind tokens [...]. The head's rows of all of them, which are many
    times the hidden states, are there for `LOGITS_AT_ONCE` numbers at a time."""
    columns = chooser.selector_candidates(hidden, head)
    at_once = max(1, LOGITS_AT_ONCE // (columns.shape[-1] * hidden.shape[-1]))
    flat = (x.split(at_once) for x in (hidden.flatten(0, -2), before.flatten(), columns.flatten(0, -2)))
    scores = torch.cat(
        [chooser.selector_logits(own, tokens, among, head) for own, tokens, among in zip(*flat, strict=True)]
    )
    return scores.view(columns.shape), head.to_tokens(columns)


def _best(hidden: torch.Tensor, head: Head, choice: Choice | None) -> torch.Tensor:
    """[B, A, K] behind the tokens of the text."""
    if choice is None:
        return argmax_tokens(hidden, head)
    scores, candidates = choice
    return candidates.gather(-1, scores.argmax(-1, keepdim=True))[..., 0]


def _drawn(
    hidden: torch.Tensor,
    on_text: torch.Tensor,
    anchors: Anchors,
    head: Head,
    choice: Choice | None,
    text: TargetSampler,
) -> torch.Tensor:
    """[B, A] proposals kept, as the text's numbers decide. on_text: [B, A, K] tokens of the text, -1 behind the end."""
    temperature = text.sampling.temperature
    if choice is not None:
        q = probability_among(*choice, on_text, temperature)
    else:
        columns, present = head.to_columns(on_text.clamp(min=0))
        flat = (x.flatten(0, 2).split(text.positions_per_chunk) for x in (hidden, columns))
        parts = [probability_of(head.logits(own), of_own, temperature) for own, of_own in zip(*flat, strict=True)]
        q = torch.cat(parts).view_as(on_text) * (present & (on_text >= 0))
    behind = anchors.positions[..., None] + torch.arange(hidden.shape[2], device=hidden.device)
    p = text.answer_probability(behind.flatten(1), on_text.flatten(1)).view_as(q)
    found = ExpectedCommits(text, anchors.positions)
    for of_q, of_p, tokens in zip(q.unbind(-1), p.unbind(-1), on_text.unbind(-1), strict=True):
        found.take(of_q, of_p, tokens)
    return found.accepted


def all_scored(
    parts: Sequence[Unscored], target: Target, proposals: int, tokens_per_forward: int, ranks: Ranks = ALONE
) -> list[VerifySteps]:
    """Return the same with the target's log-probs of the rejected proposals, as `score` has them, in some rows of each.

    A step that was drawn more than once is scored once. Ranks that share the target ask it for all of theirs at once.
    """
    asked, places = [], []
    for part in parts:
        for row in part.rows:
            trajectory, trace, place = _asked(part, row, proposals)
            asked.append((trajectory, trace))
            places.append(place)
    of_ranks = ranks.gather_in_target_group(asked)
    everything = [each for of_rank in of_ranks for each in of_rank]
    texts, traces = [text for text, _ in everything], [trace for _, trace in everything]
    scores = score(target, texts, traces, tokens_per_forward) if everything else []
    before = sum(map(len, of_ranks[: ranks.target_index]))
    mine = iter(zip(scores[before : before + len(asked)], places, strict=True))
    found = []
    for part in parts:
        logprobs = part.steps.target_logprobs.clone()
        for row in part.rows:
            of_row, place = next(mine)
            logprobs[row, :, :proposals] = torch.from_numpy(of_row.target_logprobs[place]).to(logprobs.device)
        found.append(replace(part.steps, target_logprobs=logprobs))
    return found


def _asked(part: Unscored, row: int, proposals: int) -> tuple[Trajectory, Trace, np.ndarray]:
    """A trajectory, its steps, each once, and which of these the steps of the row are."""
    steps, trajectory = part.steps, part.trajectories[row]
    positions, first, place = np.unique(
        part.anchors.positions[row].cpu().numpy(), return_index=True, return_inverse=True
    )
    proposed = steps.proposed[row, :, :proposals].cpu().numpy()[first]
    trace = Trace(
        len(trajectory.tokens),
        positions,
        steps.accepted[row].cpu().numpy()[first],
        proposed,
        len(proposed),
    )
    return trajectory, trace, place
