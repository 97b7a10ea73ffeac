"""Verify steps at the anchors of a batch: read from a table, or judged on the blocks that a step has just drafted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from draftsmith.stages.drafters.base import Drafter, best_of
from draftsmith.stages.drafters.drawing import probabilities
from draftsmith.stages.drafters.head import Head
from draftsmith.stages.parallel.ranks import ALONE, Ranks
from draftsmith.stages.replay.corpus import score
from draftsmith.stages.replay.drawn import Expectation, SampledText
from draftsmith.stages.replay.trace import Trace, Trajectory
from draftsmith.stages.targets.causal_lm import Target
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
    text: SampledText | None = None,
) -> VerifySteps:
    """The verify steps of blocks that were drafted already: no second pass of the drafter.

    hidden: [B, A, K, H] on the trajectories' own tokens, which decide what is accepted for any drafter: up to the first
    rejection its proposals are these tokens. proposals: how many of the K the serving block has; with fewer, the first
    ones of the trained block stand in for a smaller block's own, which differ where a block attends in both directions
    (replay drafts the smaller block itself). proposed: [B, A, K] of an autoregressive drafter, whose proposals behind a
    rejection depend on it; without them those are not its own. chooser: a drafter that chooses among the head's
    candidates, by the trajectory's tokens where that decides what is accepted, and by its own for what it proposes.
    """
    K = hidden.shape[2]
    labels, inside = labels_of(batch, anchors, K)
    inside = inside & (torch.arange(1, K + 1, device=hidden.device) <= proposals)
    before = tokens_at(batch, anchors, 0, K)
    if chooser is None:
        best = best_of(hidden, head, with_logprobs=False).tokens
    else:
        columns = chooser.candidates(hidden, head)
        place = chooser.choices(hidden, before, columns, head).argmax(-1, keepdim=True)
        best = head.to_tokens(columns.gather(-1, place)[..., 0])
        if proposed is None:
            proposed = chooser.choose(hidden, before[..., 0], head).tokens
    if text is None:
        accepted = ((best == labels) & inside).long().cumprod(-1).sum(-1)
    else:
        on_text = torch.where(inside, labels, -1)
        accepted = torch.minimum(_drawn(hidden, before, on_text, anchors, head, chooser, text), inside.long().sum(-1))
    judged = inside.long().sum(-1)
    lengths = torch.tensor([len(t.tokens) for t in batch.trajectories], device=hidden.device)
    committed = torch.minimum(accepted + 1, lengths[:, None] - 1 - anchors.positions)
    rejected_offset = torch.where(accepted < judged, accepted + 1, 0)
    unscored = torch.full(best.shape, torch.nan, device=hidden.device)
    return VerifySteps(accepted, committed, rejected_offset, best if proposed is None else proposed, unscored)


def _drawn(
    hidden: torch.Tensor,
    before: torch.Tensor,
    on_text: torch.Tensor,
    anchors: Anchors,
    head: Head,
    chooser: Drafter | None,
    text: SampledText,
) -> torch.Tensor:
    """[B, A] proposals kept, as the text's numbers decide. before, on_text: [B, A, K] tokens of the text in front of
    each offset and at it, -1 behind the end."""
    accepted = []
    for positions, own, tokens, previous in zip(
        *(each.split(text.anchors_at_once, 1) for each in (anchors.positions, hidden, on_text, before)), strict=True
    ):
        found = Expectation(text, positions)
        for k in range(hidden.shape[2]):
            logits = head.logits(own[:, :, k])
            if chooser is not None:
                columns = chooser.candidates(own[:, :, k], head)
                choices = chooser.choices(own[:, :, k], previous[..., k], columns, head)
                logits = torch.full_like(logits, -torch.inf).scatter(-1, columns, choices)
            q = probabilities(logits, text.law.temperature)
            _, p = text.law_behind(positions + k, tokens[..., k])
            found.take(q, p, tokens[..., k], head)
        accepted.append(found.accepted)
    return torch.cat(accepted, 1)


def with_scores(
    steps: VerifySteps,
    target: Target,
    batch: Batch,
    anchors: Anchors,
    proposals: int,
    tokens_per_forward: int = 2048,
) -> VerifySteps:
    """The same with the target's log-probs of the rejected proposals, as `score` has them, in all rows of the batch."""
    unscored = Unscored(steps, batch.trajectories, anchors, range(len(batch.trajectories)))
    (scored,) = all_scored([unscored], target, proposals, tokens_per_forward)
    return scored


def all_scored(
    parts: Sequence[Unscored], target: Target, proposals: int, tokens_per_forward: int = 2048, ranks: Ranks = ALONE
) -> list[VerifySteps]:
    """The same of several batches, in some rows of each. Ranks that share the target ask it for all of theirs at once.

    A step that was drawn more than once is scored once.
    """
    asked, places = [], []
    for part in parts:
        for row in part.rows:
            trajectory, trace, place = _asked(part, row, proposals)
            asked.append((trajectory, trace))
            places.append(place)
    of_ranks = ranks.gather_from_sharers(asked)
    everything = [each for of_rank in of_ranks for each in of_rank]
    texts, traces = [text for text, _ in everything], [trace for _, trace in everything]
    scores = score(target, texts, traces, tokens_per_forward) if everything else []
    before = sum(map(len, of_ranks[: ranks.place]))
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
        np.full(proposed.shape, np.nan, dtype=np.float32),
        len(proposed),
    )
    return trajectory, trace, place
