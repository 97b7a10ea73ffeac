"""Verify steps at the anchors of a batch: sampled from the mined table, or computed on the blocks just drafted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import pyarrow.compute as pc
import torch

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.tables.readers import KeyedRows, RowReader
from draftsmith.artifacts.tables.schemas import VERIFY_STEPS
from draftsmith.stages.data.trajectories import Trajectory, trajectory_ids, trajectory_lengths
from draftsmith.stages.drafters.base import LOGITS_PER_CHUNK, Drafter, argmax_tokens
from draftsmith.stages.drafters.lm_head import Head
from draftsmith.stages.drafters.sampling import probability_among, probability_of
from draftsmith.stages.replay.groups import KeptGroup
from draftsmith.stages.replay.sampled import ExpectedCommits, TargetSampler
from draftsmith.stages.replay.scoring import score
from draftsmith.stages.replay.step_tables import STORED, stored_steps
from draftsmith.stages.replay.steps import Steps
from draftsmith.stages.runtime.memory import to_device
from draftsmith.stages.runtime.ranks import ALONE, Ranks
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.training.anchors import systematic_sample
from draftsmith.stages.training.drafted_blocks import DraftedBlocks, block_labels, tokens_at
from draftsmith.stages.training.softmax_heads import SoftmaxHeads

StepKind = Literal["errors", "visited"]
STEP_COLUMNS = (*STORED, "rejected_offset")


@dataclass(frozen=True)
class StepAnchors:
    """The anchors of a training step, with their verify steps as far as they are known."""

    anchors: torch.Tensor  # [B, A] absolute positions
    steps: Steps[torch.Tensor] | None = None  # [B, A]; None: unknown until the blocks are drafted
    mined: bool = False  # the steps were found under earlier weights
    metrics: dict[str, float] = field(default_factory=dict)
    unscored: Sequence[int] = ()  # rows of steps that the target has yet to score for a loss

    @property
    def known_steps(self) -> Steps[torch.Tensor]:
        assert self.steps is not None, "a rejected stream needs verify steps"
        return self.steps


@torch.no_grad()
def verify_blocks(
    blocks: DraftedBlocks,
    heads: SoftmaxHeads,
    *,
    proposals: int,
    proposed: torch.Tensor | None = None,
    sampler: TargetSampler | None = None,
) -> Steps[torch.Tensor]:
    """Return the verify steps of drafted blocks, without a second forward of the drafter.

    Acceptance depends only on the trajectories' tokens, for any drafter: up to the first rejection the proposals are
    these tokens. A selector's proposals depend on its previous ones.

    proposals: length of a served block, at most K. If it is smaller, the first proposals of the trained block are used.
        They differ from a smaller block's if a block attends in both directions (replay drafts the smaller block).
    proposed: [B, A, K] proposals of an autoregressive drafter. Without them, its proposals after a rejection are wrong,
        because they depend on the rejected token.
    sampler: accepts sampled proposals; None: argmaxes. With it and without `proposed` the steps' proposals are 0.
    """
    batch, anchors, hidden, head, selector = blocks.batch, blocks.anchors, blocks.hidden, heads.drafter, heads.selector
    K = hidden.shape[2]
    labels, inside = block_labels(batch, anchors, K)
    inside = inside & (torch.arange(1, K + 1, device=hidden.device) <= proposals)
    answer, before = torch.where(inside, labels, -1), tokens_at(batch, anchors, 0, K)
    choice = None if selector is None else _choice(hidden, before, head, selector)
    if sampler is None:
        if choice is None:
            best = argmax_tokens(hidden, head)
        else:
            logits, candidates = choice
            best = candidates.gather(-1, logits.argmax(-1, keepdim=True))[..., 0]
        accepted = ((best == labels) & inside).long().cumprod(-1).sum(-1)
        if selector is not None and proposed is None:
            proposed = selector.selector_propose(hidden, before[..., 0], head)
        proposed = best if proposed is None else proposed
    else:
        q = _sampled_probability(hidden, answer, head, choice, sampler)
        accepted = _sampled_acceptance(q, answer, anchors, sampler)
        proposed = torch.zeros_like(labels) if proposed is None else proposed
    lengths = to_device([len(t.tokens) for t in batch.trajectories], hidden.device)[:, None]
    unscored = torch.full(labels.shape, torch.nan, device=hidden.device)
    return Steps(lengths, anchors, accepted, proposed, unscored, proposals=proposals)


Choice: TypeAlias = tuple[torch.Tensor, torch.Tensor]  # logits and token ids of candidates [..., k]


def _choice(hidden: torch.Tensor, before: torch.Tensor, head: Head, selector: Drafter) -> Choice:
    """Return the selector's logits of its candidates at hidden states [..., H] after tokens `before` [...].

    The head's rows of all candidates are far larger than the hidden states, so memory holds `LOGITS_PER_CHUNK` numbers.
    """
    columns = selector.selector_candidates(hidden, head)
    chunk = max(1, LOGITS_PER_CHUNK // (columns.shape[-1] * hidden.shape[-1]))
    flat = (x.split(chunk) for x in (hidden.flatten(0, -2), before.flatten(), columns.flatten(0, -2)))
    logits = torch.cat(
        [selector.selector_logits(states, tokens, among, head) for states, tokens, among in zip(*flat, strict=True)]
    )
    return logits.view(columns.shape), head.to_tokens(columns)


def _sampled_probability(
    hidden: torch.Tensor, answer: torch.Tensor, head: Head, choice: Choice | None, sampler: TargetSampler
) -> torch.Tensor:
    """Return the drafter's probability [B, A, K] of the answer's tokens `answer` [B, A, K] (-1 after the end)."""
    temperature = sampler.sampling.temperature
    if choice is not None:
        return probability_among(*choice, answer, temperature)
    columns, present = head.to_columns(answer.clamp(min=0))
    flat = (x.flatten(0, 2).split(sampler.positions_per_chunk) for x in (hidden, columns))
    chunks = [probability_of(head.logits(states), chosen, temperature) for states, chosen in zip(*flat, strict=True)]
    return torch.cat(chunks).view_as(answer) * (present & (answer >= 0))


def _sampled_acceptance(
    q: torch.Tensor, answer: torch.Tensor, anchors: torch.Tensor, sampler: TargetSampler
) -> torch.Tensor:
    """Return the numbers of accepted proposals [B, A], by the sampler's random numbers. q, answer: [B, A, K]."""
    positions = anchors[..., None] + torch.arange(answer.shape[2], device=answer.device)
    p = sampler.answer_probability(positions.flatten(1), answer.flatten(1)).view_as(q)
    expectation = ExpectedCommits(sampler, anchors)
    for of_q, of_p, tokens in zip(q.unbind(-1), p.unbind(-1), answer.unbind(-1), strict=True):
        expectation.take(of_q, of_p, tokens)
    return expectation.accepted


def score_steps(
    sampled: Sequence[tuple[Sequence[Trajectory], StepAnchors]],
    target: Target,
    proposals: int,
    tokens_per_forward: int,
    kept: Sequence[KeptGroup] = (),
    ranks: Ranks = ALONE,
    *,
    offsets: int | None = None,
) -> list[StepAnchors]:
    """Return the anchors with `score`'s target log-probs of the rejected proposals in their `unscored` rows.

    sampled: anchors of several micro-batches, each with its trajectories; all have steps. A step that was sampled more
    than once is scored once. Ranks that share the target score all their steps together. offsets: same as in `score`.
    """
    traces, indices = [], []  # per row: trajectory and trace; index [A] of each anchor in the trace
    for trajectories, step_anchors in sampled:
        if step_anchors.unscored:
            steps = step_anchors.known_steps
            columns = step_anchors.anchors, steps.accepted, steps.proposed[..., :proposals]
            anchors, accepted, proposed = (x.cpu().numpy() for x in columns)
            for row in step_anchors.unscored:
                positions, first, index = np.unique(anchors[row], return_index=True, return_inverse=True)
                length = len(trajectories[row].tokens)
                traces.append((trajectories[row], Steps(length, positions, accepted[row][first], proposed[row][first])))
                indices.append(index)
    of_ranks = ranks.gather_in_target_group(traces)
    everything = [pair for of_rank in of_ranks for pair in of_rank]
    answers, of_answers = [answer for answer, _ in everything], [trace for _, trace in everything]
    scores = score(target, answers, of_answers, tokens_per_forward, kept, offsets=offsets) if everything else []
    before = sum(map(len, of_ranks[: ranks.target_index]))
    own_scores = iter(zip(scores[before : before + len(traces)], indices, strict=True))
    scored = []
    for _, step_anchors in sampled:
        logprobs = step_anchors.known_steps.logprobs.clone()
        of_rows = [of_row.logprobs[index] for of_row, index in islice(own_scores, len(step_anchors.unscored))]
        if of_rows:
            rows = to_device(list(step_anchors.unscored), logprobs.device)
            logprobs[rows, :, :proposals] = to_device(np.stack(of_rows), logprobs.device)
        steps = replace(step_anchors.known_steps, target_logprobs=logprobs)
        scored.append(replace(step_anchors, steps=steps, unscored=()))
    return scored


@dataclass(frozen=True)
class MinedTable:
    """The mined steps of N trajectories, read when they are needed."""

    steps_of: Callable[[int], Steps]  # by index of a trajectory
    visited: np.ndarray  # [N] steps of each trajectory
    errors: np.ndarray  # [N] steps with a rejection
    proposals: int  # length of a mined block, at most that of the trained one

    @classmethod
    def without_steps(cls, proposals: int) -> MinedTable:
        """Return a table for anchors that are not mined steps. proposals: length of a served block."""
        none = np.zeros(0, dtype=np.int64)
        return cls([].__getitem__, none, none, proposals)

    def counts(self, kind: StepKind) -> np.ndarray:
        """Return the number of steps of this kind of each trajectory [N]."""
        return self.errors if kind == "errors" else self.visited

    def trajectories_with(self, kind: StepKind) -> list[int]:
        """Return the indices of the trajectories that have at least one such step."""
        indices: list[int] = np.flatnonzero(self.counts(kind)).tolist()
        if not indices:
            raise DraftsmithError(f"opd.anchors: no mined step is of kind {kind}. Train on kind visited or successors.")
        return indices


def sample_steps(
    traces: Sequence[Steps],
    kind: StepKind,
    per_sequence: int,
    shifts: np.ndarray,
    proposals: int,
    device: torch.device,
) -> Steps[torch.Tensor]:
    """Sample `per_sequence` evenly spaced steps of each of B traces, offset by `shifts` [B] in [0, 1).

    A trace that no longer has a step of the kind gives steps of any kind.
    proposals: length of the trained block; proposals that the traces lack are 0, with no score.
    """
    anchors, accepted = np.zeros((2, len(traces), per_sequence), dtype=np.int64)
    proposed = np.zeros((*anchors.shape, proposals), dtype=np.int64)
    logprobs = np.full(proposed.shape, np.nan, dtype=np.float32)
    for row, (trace, shift) in enumerate(zip(traces, shifts, strict=True)):
        candidates = np.flatnonzero(trace.rejected_offset) if kind == "errors" else np.arange(0)
        candidates = candidates if len(candidates) else np.arange(len(trace))
        chosen = systematic_sample(candidates, per_sequence, shift)
        anchors[row], accepted[row] = trace.anchors[chosen], trace.accepted[chosen]
        proposed[row, :, : trace.proposed.shape[1]] = trace.proposed[chosen]
        if trace.target_logprobs is not None:
            logprobs[row, :, : trace.width] = trace.target_logprobs[chosen]
    return Steps(
        to_device([[trace.length] for trace in traces], device),
        to_device(anchors, device),
        to_device(accepted, device),
        to_device(proposed, device),
        to_device(logprobs, device),
        proposals=traces[0].width,
    )


def load_mined(
    folder: Path,
    trajectories: Sequence[Trajectory],
    block_size: int,
    *,
    whole: bool = True,
    reader: RowReader | None = None,
) -> MinedTable:
    """Match verify_steps.parquet of a mining artifact to the trajectories that OPD trains on. The rows stay on disk.

    block_size: block size of the trained drafter. whole: whether every trajectory must be mined. reader: same as in
    `load_trajectories`. Raises DraftsmithError if a trajectory must be mined and is not, or if mined blocks are larger
    than the drafter's.
    """
    path = folder / "verify_steps.parquet"
    reader, ids = reader or RowReader(path, VERIFY_STEPS), trajectory_ids(trajectories)
    rows = KeyedRows(reader, ids)
    if whole and not rows.counts.all():
        name = ids[int(rows.counts.argmin())].as_py()
        raise DraftsmithError(
            f"{path}: trajectory {name} was not mined. Mine all answers of two tokens or more (`table: "
            "full` or `scored`)."
        )
    errors, longest, row = np.zeros(len(ids), dtype=np.int64), 0, 0
    for group in reader.row_groups(["rejected_offset", "proposed_ids"]):
        rejecting = rows.key_index(row + np.flatnonzero(group["rejected_offset"].to_numpy()))
        errors += np.bincount(rejecting[rejecting >= 0], minlength=len(ids))
        longest = max(longest, pc.max(pc.list_value_length(group["proposed_ids"])).as_py())
        row += group.num_rows
    if longest > block_size - 1:
        raise DraftsmithError(
            f"{path}: mined with blocks of {longest + 1} tokens, more than the drafter's {block_size}. Mine again."
        )
    lengths = trajectory_lengths(trajectories)

    def steps_of(index: int) -> Steps:
        return stored_steps(rows.take([index], STORED), int(lengths[index]), longest)

    return MinedTable(steps_of, rows.counts, errors, longest)
