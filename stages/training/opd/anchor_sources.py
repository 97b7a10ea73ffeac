"""Where OPD takes a step's anchors from: positions of the answer, what follows them, or the mined table.

Every source gives `per_sequence` anchors a trajectory, so that kinds are compared at equal numbers of block positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from draftsmith.stages.data.trajectories import Trajectory
from draftsmith.stages.drafters.base import Drafter, PreparedDrafter
from draftsmith.stages.replay.chains import replay_chains, successors
from draftsmith.stages.replay.trace import Trace
from draftsmith.stages.runtime.memory import to_device
from draftsmith.stages.runtime.ranks import Ranks
from draftsmith.stages.training.blocks import (
    Anchors,
    DraftingView,
    Ratio,
    pad_anchors,
    position_anchors,
    sample_positions,
    systematic_sample,
)
from draftsmith.stages.training.loop import Resumable, StateDict
from draftsmith.stages.training.opd.verify_steps import MinedTable, StepKind, TrajectorySteps, VerifySteps, sample_steps


@dataclass(frozen=True)
class StepAnchors:
    """The anchors of a step, and what is known of the verify steps there."""

    anchors: Anchors
    steps: VerifySteps | None  # of the source; None: they are found on the blocks that the step drafts
    metrics: dict[str, float] = field(default_factory=dict)
    verified: VerifySteps | None = None  # found on these blocks, if the step needs them before it trains the blocks
    unscored: Sequence[int] = ()  # rows of steps that the target has yet to score for a loss

    @property
    def known_steps(self) -> VerifySteps | None:
        """Return the verify steps, wherever they come from; None if nobody knows them yet."""
        return self.steps or self.verified


class AnchorSource(Resumable, Protocol):
    """A source of anchors. What it remembers goes into the checkpoint: a resumed training has the same anchors."""

    numbers: int  # random numbers that a row takes

    def sample(self, step: int, indices: Sequence[int], view: DraftingView, phases: np.ndarray) -> StepAnchors:
        """Return the anchors of the trajectories `indices`, which the view shows.

        phases: [B, numbers] in [0, 1); a row has the same ones on any rank.
        """

    def share(self, ranks: Ranks) -> None:
        """Exchange with the other ranks what was learnt of trajectories since the last call."""


class StatelessSource:
    """The base of sources that remember nothing between steps."""

    def state_dict(self) -> StateDict:
        return {}

    def load_state_dict(self, state: StateDict) -> None:
        pass

    def share(self, ranks: Ranks) -> None:
        pass


class RandomAnchors(StatelessSource):
    """Positions of the answer, whatever the drafter does there: the paper's ablation."""

    numbers = 1

    def __init__(self, per_sequence: int):
        self.per_sequence = per_sequence

    def sample(self, step: int, indices: Sequence[int], view: DraftingView, phases: np.ndarray) -> StepAnchors:  # noqa: ARG002
        batch = view.batch
        return StepAnchors(
            position_anchors(batch.trajectories, self.per_sequence, phases[:, 0], batch.tokens.device), None
        )


class SuccessorAnchors(StatelessSource):
    """Where verification continues: one step of the current weights after positions sampled from the whole answer.

    Training on fresh steps then costs one drafted block for each trained one, however long a trajectory is. A successor
    is on the trace or soon will be: a rejection leads where it leads every chain that was rejected there.
    """

    numbers = 2

    def __init__(self, drafter: Drafter, proposals: int, per_sequence: int):
        """Take positions of `per_sequence` blocks. proposals: of a served block."""
        self.drafter, self.proposals, self.per_sequence = drafter, proposals, per_sequence

    def sample(self, step: int, indices: Sequence[int], view: DraftingView, phases: np.ndarray) -> StepAnchors:  # noqa: ARG002
        trajectories, device = view.batch.trajectories, view.batch.tokens.device
        positions = np.stack(sample_positions(trajectories, self.per_sequence, phases[:, 0]))
        following = successors(
            PreparedDrafter(self.drafter, view.head, self.proposals + 1),
            view.context,
            trajectories,
            to_device(positions, device),
            view.sampler,
        )
        # two positions may have the same successor: another one is trained twice then
        chosen = [
            systematic_sample(np.unique(row), self.per_sequence, phase)
            for row, phase in zip(following.cpu().numpy(), phases[:, 1], strict=True)
        ]
        return StepAnchors(pad_anchors(chosen, device), None)


# Steps of the mined trace for each chain. With fewer, chains draft much in vain; with more, rounds are many and small.
STEPS_PER_CHAIN = 4


class TableAnchors:
    """Steps of the mined table, mined again with the drafter's current weights when they are too old.

    A trajectory is mined again when a batch needs it and its last mining is `every` or more optimiser steps old; 0
    keeps all as they were mined. So only what is trained is mined. Older traces are dropped: memory holds those of
    `every` steps, however many trajectories there are. The fresh steps depend on earlier weights, so they are part of
    the checkpoint.
    """

    numbers = 1

    def __init__(
        self, mined: MinedTable, drafter: Drafter, kind: StepKind, per_sequence: int, *, every: int, scored: bool
    ):
        """Start with mined steps. scored: whether the target scores sampled ones, for a loss with a rejected stream."""
        self.mined, self.drafter, self.every, self.scored = mined, drafter, every, scored
        self.kind, self.per_sequence = kind, per_sequence
        self._fresh: dict[int, TrajectorySteps] = {}
        self._mined_at: dict[int, int] = {}  # trajectory -> optimiser step of its fresh trace
        self._unshared: set[int] = set()  # trajectories whose fresh traces other ranks do not have

    def sample(self, step: int, indices: Sequence[int], view: DraftingView, phases: np.ndarray) -> StepAnchors:
        metrics = self.refresh(step, indices, view)
        known = [self.steps(i) for i in indices]  # each read once
        anchors, steps = sample_steps(known, self.kind, self.per_sequence, phases[:, 0], view.batch.tokens.device)
        return StepAnchors(anchors, steps, metrics, unscored=self.unscored(indices))

    def steps(self, index: int) -> TrajectorySteps:
        """Return the newest steps of a trajectory."""
        return self._fresh[index] if index in self._fresh else self.mined.steps[index]

    def refresh(self, step: int, indices: Sequence[int], view: DraftingView) -> dict[str, float]:
        """Mine again what is too old among the trajectories `indices` of a view. Return metrics of what changed."""
        if not self.every:
            return {}
        self._forget(step)
        rows = {i: row for row, i in enumerate(indices) if i not in self._mined_at and step >= self.every}
        if not rows:
            return {}
        trajectories = [view.batch.trajectories[row] for row in rows.values()]
        mined = [self.mined.steps[i] for i in rows]
        mined_steps = np.mean([len(steps.anchors) for steps in mined])
        traces = self._replay(view, list(rows.values()), trajectories, max(1, round(mined_steps / STEPS_PER_CHAIN)))
        changed = total = 0
        for i, before, trace in zip(rows, mined, traces, strict=True):
            fresh = self._padded(trace)
            changed += _steps_gone(before, fresh)
            total += len(before.anchors)
            self._fresh[i], self._mined_at[i] = fresh, step
            self._unshared.add(i)
        return {"trace_changed_share": Ratio(changed, total), "remined_trajectories": len(rows)}

    def _forget(self, step: int) -> None:
        """Drop traces that are too old: a step that needs their trajectories mines them again."""
        for i in [i for i, mined_at in self._mined_at.items() if step - mined_at >= self.every]:
            del self._mined_at[i], self._fresh[i]

    def share(self, ranks: Ranks) -> None:
        """Send fresh traces to all ranks: the rank that trains an answer next must know how old its trace is."""
        if self.every:
            news = {
                i: (self._mined_at[i], {name: getattr(self._fresh[i], name) for name in self._remembered})
                for i in sorted(self._unshared)
            }
            for of_rank in ranks.gather(news):
                for i, (step, columns) in of_rank.items():
                    self._mined_at[i], self._fresh[i] = step, self._steps_of(columns)
        self._unshared.clear()

    @torch.no_grad()
    def _replay(self, view: DraftingView, rows: list[int], trajectories: list[Trajectory], chains: int) -> list[Trace]:
        """Replay the trajectories in `rows` of a view, each in so many chains."""
        width = max(len(t.tokens) for t in trajectories)
        chosen = to_device(rows, view.batch.tokens.device)
        return replay_chains(
            PreparedDrafter(self.drafter, view.head, self.mined.proposals + 1),
            self.drafter.select(view.context, chosen, width),
            trajectories,
            chains,
            sampler=None if view.sampler is None else view.sampler.select(chosen),
            with_proposals=self.scored,
        )

    def unscored(self, indices: Sequence[int]) -> list[int]:
        """Return the rows of `indices` whose steps the target has yet to score: those of fresh traces.

        A trace has many times the steps that are trained: only sampled ones are scored.
        """
        return [row for row, i in enumerate(indices) if i in self._mined_at] if self.scored else []

    def _padded(self, trace: Trace) -> TrajectorySteps:
        """Pad a trace to the trained block. Proposals that no loss reads are left out: checkpoints stay small."""
        shape = (len(trace.anchors), self.drafter.block_size - 1)
        proposed, unscored = _not_scored(shape)
        if self.scored:
            proposed = np.pad(trace.proposed, ((0, 0), (0, shape[1] - trace.proposed.shape[1])))
        return TrajectorySteps(
            trace.anchors, trace.accepted, trace.committed, trace.rejected_offset, proposed, unscored
        )

    def state_dict(self) -> StateDict:
        """Return the fresh steps of all trajectories, concatenated."""
        order = sorted(self._mined_at)
        fresh = [self._fresh[i] for i in order]
        state: StateDict = {
            "trajectories": torch.tensor(order, dtype=torch.int64),
            "mined_at": torch.tensor([self._mined_at[i] for i in order], dtype=torch.int64),
            "counts": torch.tensor([len(s.anchors) for s in fresh], dtype=torch.int64),
        }
        return state | {name: _joined([getattr(s, name) for s in fresh]) for name in self._remembered}

    def load_state_dict(self, state: StateDict) -> None:
        """Restore the fresh steps of a checkpoint."""
        self._fresh.clear()
        order, counts = state["trajectories"].tolist(), state["counts"].tolist()
        self._mined_at = dict(zip(order, state["mined_at"].tolist(), strict=True))
        start = 0
        for i, count in zip(order, counts, strict=True):
            rows = slice(start, start + count)
            self._fresh[i] = self._steps_of({name: state[name][rows].numpy() for name in self._remembered})
            start += count

    @property
    def _remembered(self) -> tuple[str, ...]:
        """Return the columns of fresh steps that are stored."""
        return (*_TRACE, "proposed") if self.scored else _TRACE

    def _steps_of(self, columns: Mapping[str, np.ndarray]) -> TrajectorySteps:
        """Return steps from the columns that are stored."""
        proposed, logprobs = _not_scored((len(columns["anchors"]), self.drafter.block_size - 1))
        anchors, accepted, committed, rejected = (columns[name] for name in _TRACE)
        return TrajectorySteps(anchors, accepted, committed, rejected, columns.get("proposed", proposed), logprobs)


_TRACE = ("anchors", "accepted", "committed", "rejected_offset")


def _joined(arrays: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(arrays)) if arrays else torch.zeros(0)


def _not_scored(shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return proposals and log-probs of unscored steps; they take no memory, which many trajectories would need."""
    return np.broadcast_to(np.int64(0), shape), np.broadcast_to(np.float32(np.nan), shape)


def _steps_gone(mined: TrajectorySteps, fresh: TrajectorySteps) -> int:
    """Count the mined steps that the fresh trace lacks: same anchor, same number of accepted proposals."""
    now = set(zip(fresh.anchors.tolist(), fresh.accepted.tolist(), strict=True))
    return sum(step not in now for step in zip(mined.anchors.tolist(), mined.accepted.tolist(), strict=True))
