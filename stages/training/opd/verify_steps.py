"""Verify steps at the anchors of a batch: sampled from the mined table, or found on blocks that were just drafted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import pyarrow.compute as pc
import torch

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.tables.parquet import pad_lists
from draftsmith.artifacts.tables.readers import KeyedRows, RowReader
from draftsmith.artifacts.tables.schemas import VERIFY_STEPS
from draftsmith.stages.data.trajectories import Trajectory, trajectory_ids
from draftsmith.stages.drafters.base import LOGITS_PER_CHUNK, Drafter, argmax_tokens
from draftsmith.stages.drafters.lm_head import Head
from draftsmith.stages.drafters.sampling import probability_among, probability_of
from draftsmith.stages.replay.replayer import KeptGroup, score
from draftsmith.stages.replay.sampled import ExpectedCommits, TargetSampler
from draftsmith.stages.replay.trace import Trace
from draftsmith.stages.runtime.memory import to_device
from draftsmith.stages.runtime.ranks import ALONE, Ranks
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.training.blocks import (
    DraftedBlocks,
    SoftmaxHeads,
    block_labels,
    systematic_sample,
    tokens_at,
)

StepKind = Literal["errors", "visited"]
_NUMBERS = ("anchor", "accepted", "committed", "rejected_offset")
STEP_COLUMNS = (*_NUMBERS, "proposed_ids", "target_logprobs")


@dataclass(frozen=True)
class VerifySteps:
    """The verify step at each anchor of a batch (K = proposals of the trained block)."""

    accepted: torch.Tensor  # [B, A] accepted proposals
    committed: torch.Tensor  # [B, A] tokens that the step committed: offsets 1 … committed are its response stream
    rejected_offset: torch.Tensor  # [B, A] 0 = nothing rejected
    proposed: torch.Tensor  # [B, A, K]
    target_logprobs: torch.Tensor  # [B, A, K] of the proposals after their own prefix, NaN where not scored


@dataclass(frozen=True)
class UnscoredSteps:
    """Verify steps at the anchors of B trajectories; the target is to score the rejected proposals of some rows."""

    steps: VerifySteps
    trajectories: Sequence[Trajectory]  # B
    anchors: torch.Tensor  # [B, A] absolute positions
    rows: Sequence[int]


@torch.no_grad()
def verify_blocks(
    blocks: DraftedBlocks,
    heads: SoftmaxHeads,
    *,
    proposals: int,
    proposed: torch.Tensor | None = None,
    sampler: TargetSampler | None = None,
) -> VerifySteps:
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
    verified = inside.long().sum(-1)
    lengths = to_device([len(t.tokens) for t in batch.trajectories], hidden.device)
    committed = torch.minimum(accepted + 1, lengths[:, None] - 1 - anchors)
    rejected_offset = torch.where(accepted < verified, accepted + 1, 0)
    unscored = torch.full(labels.shape, torch.nan, device=hidden.device)
    return VerifySteps(accepted, committed, rejected_offset, proposed, unscored)


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
    unscored: Sequence[UnscoredSteps],
    target: Target,
    proposals: int,
    tokens_per_forward: int,
    kept: Sequence[KeptGroup] = (),
    ranks: Ranks = ALONE,
) -> list[VerifySteps]:
    """Return the steps with the target's log-probs of the rejected proposals, as `score` computes them.

    A step that was sampled more than once is scored once. Ranks that share the target score all their steps together.
    """
    traces, indices = [], []  # of each row: its trajectory and trace, and which of the trace's steps its anchors are
    for group in (group for group in unscored if group.rows):
        steps = group.steps.accepted, group.steps.proposed[..., :proposals]
        positions, accepted, proposed = (x.cpu().numpy() for x in (group.anchors, *steps))
        for row in group.rows:
            length = len(group.trajectories[row].tokens)
            trace, index = _row_trace(length, positions[row], accepted[row], proposed[row])
            traces.append((group.trajectories[row], trace))
            indices.append(index)
    of_ranks = ranks.gather_in_target_group(traces)
    everything = [pair for of_rank in of_ranks for pair in of_rank]
    answers, of_answers = [answer for answer, _ in everything], [trace for _, trace in everything]
    scores = score(target, answers, of_answers, tokens_per_forward, kept) if everything else []
    before = sum(map(len, of_ranks[: ranks.target_index]))
    own_scores = iter(zip(scores[before : before + len(traces)], indices, strict=True))
    scored = []
    for group in unscored:
        logprobs = group.steps.target_logprobs.clone()
        of_rows = [of_row.target_logprobs[index] for of_row, index in islice(own_scores, len(group.rows))]
        if of_rows:
            rows = to_device(list(group.rows), logprobs.device)
            logprobs[rows, :, :proposals] = to_device(np.stack(of_rows), logprobs.device)
        scored.append(replace(group.steps, target_logprobs=logprobs))
    return scored


def _row_trace(
    length: int, anchors: np.ndarray, accepted: np.ndarray, proposed: np.ndarray
) -> tuple[Trace, np.ndarray]:
    """Return the steps at anchors [A] as a trace, each once, and the index [A] in it of the step at each anchor.

    length: tokens of the trajectory. accepted: [A]; proposed: [A, proposals].
    """
    positions, first, index = np.unique(anchors, return_index=True, return_inverse=True)
    return Trace(length, positions, accepted[first], proposed[first], len(first)), index


@dataclass(frozen=True)
class TrajectorySteps:
    """The verify steps of one trajectory (S steps, K proposals of the trained block)."""

    anchors: np.ndarray  # [S]
    accepted: np.ndarray  # [S]
    committed: np.ndarray  # [S]
    rejected_offset: np.ndarray  # [S] 0 = nothing rejected
    proposed: np.ndarray  # [S, K]
    target_logprobs: np.ndarray  # [S, K] float32, NaN where not scored

    def of_kind(self, kind: StepKind) -> np.ndarray:
        """Return the indices of the steps that qualify as anchors."""
        return np.flatnonzero(self.rejected_offset > 0) if kind == "errors" else np.arange(len(self.anchors))


class StoredSteps(Sequence[TrajectorySteps]):
    """The steps of N trajectories, each read from their table when it is needed."""

    def __init__(self, rows: KeyedRows, errors: np.ndarray, proposals: int):
        """Read rows of VERIFY_STEPS. errors: [N] steps that rejected something. proposals: K of the trained block."""
        self.rows, self.errors, self.proposals = rows, errors, proposals

    def __len__(self) -> int:
        return len(self.errors)

    def __getitem__(self, index: int) -> TrajectorySteps:  # type: ignore[override]  # nobody takes a slice
        table = self.rows.take([index], STEP_COLUMNS)
        anchors, accepted, committed, rejected = (table[name].to_numpy().astype(np.int64) for name in _NUMBERS)
        # blocks that were mined smaller than they are trained are padded
        proposed = pad_lists(table, "proposed_ids", self.proposals, 0, np.int64)
        logprobs = pad_lists(table, "target_logprobs", self.proposals, np.nan, np.float32)
        return TrajectorySteps(anchors, accepted, committed, rejected, proposed, logprobs)


@dataclass(frozen=True)
class MinedTable:
    """Steps of every trajectory, in the order of the trajectories."""

    steps: Sequence[TrajectorySteps]
    proposals: int  # of a mined block: at most those of the trained block

    def counts(self, kind: StepKind) -> np.ndarray:
        """Count the steps of this kind of each trajectory [N]."""
        if isinstance(self.steps, StoredSteps):
            return self.steps.errors if kind == "errors" else self.steps.rows.counts
        return np.array([len(s.of_kind(kind)) for s in self.steps], dtype=np.int64)

    def count(self, kind: StepKind) -> int:
        """Count all steps of this kind."""
        return int(self.counts(kind).sum())

    def trajectories_with(self, kind: StepKind) -> list[int]:
        """Return the indices of the trajectories that have at least one such step."""
        indices: list[int] = np.flatnonzero(self.counts(kind)).tolist()
        if not indices:
            raise DraftsmithError(f"opd.anchors: no mined step is of kind {kind}. Train on kind visited or successors.")
        return indices


def sample_steps(
    steps: Sequence[TrajectorySteps], kind: StepKind, per_sequence: int, phases: np.ndarray, device: torch.device
) -> tuple[torch.Tensor, VerifySteps]:
    """Sample `per_sequence` steps of each of B trajectories, at its phase in [0, 1) of `phases` [B].

    Returns their anchors [B, A], and what is known of them.

    A trajectory that has no step of the kind any more gives any of its steps.
    """
    chosen = []
    for row, phase in zip(steps, phases, strict=True):
        candidates = row.of_kind(kind)
        chosen.append(systematic_sample(candidates if len(candidates) else row.of_kind("visited"), per_sequence, phase))

    def column(name: str) -> torch.Tensor:
        values = [getattr(row, name)[indices] for row, indices in zip(steps, chosen, strict=True)]
        return to_device(np.stack(values), device)

    names = ("accepted", "committed", "rejected_offset", "proposed", "target_logprobs")
    return column("anchors"), VerifySteps(*(column(name) for name in names))


def load_mined(
    folder: Path,
    trajectories: Sequence[Trajectory],
    block_size: int,
    *,
    whole: bool = True,
    reader: RowReader | None = None,
) -> MinedTable:
    """Match verify_steps.parquet of a mining artifact to the trajectories that OPD trains on. The rows stay on disk.

    block_size: of the trained drafter. whole: whether every trajectory must be mined. reader: as of
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
    return MinedTable(StoredSteps(rows, errors, block_size - 1), longest)
