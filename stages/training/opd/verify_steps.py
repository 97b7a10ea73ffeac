"""Verify steps at the anchors of a batch: sampled from the mined table, or found on blocks that were just drafted."""

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
from draftsmith.stages.replay.replayer import KeptGroup, score
from draftsmith.stages.replay.sampled import ExpectedCommits, TargetSampler
from draftsmith.stages.replay.step_tables import STORED, stored_steps
from draftsmith.stages.replay.steps import Steps
from draftsmith.stages.runtime.memory import to_device
from draftsmith.stages.runtime.ranks import ALONE, Ranks
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.training.drafted_blocks import DraftedBlocks, block_labels, systematic_sample, tokens_at
from draftsmith.stages.training.softmax_heads import SoftmaxHeads

StepKind = Literal["errors", "visited"]
STEP_COLUMNS = (*STORED, "rejected_offset")


@dataclass(frozen=True)
class StepAnchors:
    """The anchors of a step, and what is known of the verify steps there."""

    anchors: torch.Tensor  # [B, A] absolute positions
    steps: Steps[torch.Tensor] | None = None  # [B, A]; None: nobody knows them before the blocks are drafted
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
    """Return the verify steps of blocks that are drafted already, without a second pass of the drafter.

    The trajectories' own tokens decide what is accepted, for any drafter: up to the first rejection its proposals are
    these tokens. A selector proposes by its own tokens.

    proposals: how many of the K a served block has. With fewer, the first ones of the trained block stand in for the
        smaller block's, which differ where a block attends in both directions (replay drafts the smaller block itself).
    proposed: [B, A, K] of an autoregressive drafter, whose proposals after a rejection depend on the rejected one; left
        out, those are not its own.
    sampler: if proposals are sampled; without `proposed`, those of the steps are zeros then.
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

    The head's rows of all candidates are many times the hidden states: `LOGITS_PER_CHUNK` numbers are in memory.
    """
    columns = selector.selector_candidates(hidden, head)
    chunk = max(1, LOGITS_PER_CHUNK // (columns.shape[-1] * hidden.shape[-1]))
    flat = (x.split(chunk) for x in (hidden.flatten(0, -2), before.flatten(), columns.flatten(0, -2)))
    logits = torch.cat(
        [selector.selector_logits(own, tokens, among, head) for own, tokens, among in zip(*flat, strict=True)]
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
    chunks = [probability_of(head.logits(own), of_own, temperature) for own, of_own in zip(*flat, strict=True)]
    return torch.cat(chunks).view_as(answer) * (present & (answer >= 0))


def _sampled_acceptance(
    q: torch.Tensor, answer: torch.Tensor, anchors: torch.Tensor, sampler: TargetSampler
) -> torch.Tensor:
    """Return the accepted proposals [B, A], as the sampler's numbers decide. q, answer: [B, A, K]."""
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
) -> list[StepAnchors]:
    """Return the anchors with the target's log-probs of the rejected proposals in `unscored` rows, as `score` does.

    sampled: anchors of several micro-batches, each with its trajectories; all have steps. A step that was sampled more
    than once is scored once. Ranks that share the target score all their steps together.
    """
    traces, indices = [], []  # of each row: its trajectory and trace, and which of the trace's steps its anchors are
    for trajectories, found in sampled:
        if found.unscored:
            steps = found.known_steps
            columns = found.anchors, steps.accepted, steps.proposed[..., :proposals]
            anchors, accepted, proposed = (x.cpu().numpy() for x in columns)
            for row in found.unscored:
                positions, first, index = np.unique(anchors[row], return_index=True, return_inverse=True)
                length = len(trajectories[row].tokens)
                traces.append((trajectories[row], Steps(length, positions, accepted[row][first], proposed[row][first])))
                indices.append(index)
    of_ranks = ranks.gather_in_target_group(traces)
    everything = [pair for of_rank in of_ranks for pair in of_rank]
    answers, of_answers = [answer for answer, _ in everything], [trace for _, trace in everything]
    scores = score(target, answers, of_answers, tokens_per_forward, kept) if everything else []
    before = sum(map(len, of_ranks[: ranks.target_index]))
    own_scores = iter(zip(scores[before : before + len(traces)], indices, strict=True))
    scored = []
    for _, found in sampled:
        logprobs = found.known_steps.logprobs.clone()
        of_rows = [of_row.logprobs[index] for of_row, index in islice(own_scores, len(found.unscored))]
        if of_rows:
            rows = to_device(list(found.unscored), logprobs.device)
            logprobs[rows, :, :proposals] = to_device(np.stack(of_rows), logprobs.device)
        steps = replace(found.known_steps, target_logprobs=logprobs)
        scored.append(replace(found, steps=steps, unscored=()))
    return scored


@dataclass(frozen=True)
class MinedTable:
    """The mined steps of N trajectories, each read when it is needed."""

    steps_of: Callable[[int], Steps]  # takes the index of a trajectory
    visited: np.ndarray  # [N] steps of each trajectory
    errors: np.ndarray  # [N] those that rejected something
    proposals: int  # of a mined block: at most those of the trained block

    @classmethod
    def without_steps(cls, proposals: int) -> MinedTable:
        """Return a table for anchors that are no mined steps. proposals: of a served block."""
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
    phases: np.ndarray,
    proposals: int,
    device: torch.device,
) -> Steps[torch.Tensor]:
    """Sample `per_sequence` steps of each of B trajectories, at its phase in [0, 1) of `phases` [B].

    A trajectory that has no step of the kind any more gives any of its steps.
    proposals: of the trained block; those that the traces lack are 0 and not scored.
    """
    anchors, accepted = np.zeros((2, len(traces), per_sequence), dtype=np.int64)
    proposed = np.zeros((*anchors.shape, proposals), dtype=np.int64)
    logprobs = np.full(proposed.shape, np.nan, dtype=np.float32)
    for row, (trace, phase) in enumerate(zip(traces, phases, strict=True)):
        candidates = np.flatnonzero(trace.rejected_offset) if kind == "errors" else np.arange(0)
        candidates = candidates if len(candidates) else np.arange(len(trace))
        chosen = systematic_sample(candidates, per_sequence, phase)
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

    block_size: of the trained drafter. whole: whether every trajectory must be mined. reader: same as in
    `load_trajectories`. Raises DraftsmithError if a trajectory must be mined and is not, or if the table's proposals
    are longer than the drafter's block.
    """
    path = folder / "verify_steps.parquet"
    reader, ids = reader or RowReader(path, VERIFY_STEPS), trajectory_ids(trajectories)
    rows = KeyedRows(reader, ids)
    if whole and not rows.counts.all():
        name = ids[int(rows.counts.argmin())].as_py()
        raise DraftsmithError(
            f"{path}: trajectory {name} was not mined. Mine all answers (`table: full` or `scored`), and leave out "
            "answers of one token."
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
