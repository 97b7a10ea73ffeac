"""Sources of OPD's anchors: positions of the answer, their successors, chains of verify steps, or the mined table.

Every source gives `per_sequence` anchors per trajectory, so that kinds are compared at equal numbers of blocks. If it
has several rounds, it learns what the blocks of a round commit before it gives the next anchors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch

from draftsmith.stages.data.trajectories import Trajectory
from draftsmith.stages.drafters.base import Drafter, PreparedDrafter
from draftsmith.stages.replay.chains import replay_chains, successors
from draftsmith.stages.replay.steps import Steps
from draftsmith.stages.runtime.memory import to_device
from draftsmith.stages.runtime.ranks import Ranks
from draftsmith.stages.training.anchors import position_anchors, systematic_sample
from draftsmith.stages.training.drafted_blocks import DraftingView
from draftsmith.stages.training.loss_report import Ratio
from draftsmith.stages.training.opd.verify_steps import MinedTable, StepAnchors, StepKind, sample_steps
from draftsmith.stages.training.optimiser import StateDict


class AnchorSource(ABC):
    """A source of anchors. Its state is in the checkpoint, so a resumed training has the same anchors."""

    numbers = 1  # random numbers per row
    rounds = 1  # rounds in which the blocks of a row are drafted
    reads_context = True  # whether `sample` drafts

    @abstractmethod
    def sample(self, step: int, indices: Sequence[int], view: DraftingView, shifts: np.ndarray) -> StepAnchors:
        """Return the anchors of the view's trajectories, whose indices are `indices`.

        shifts: [B, numbers] random numbers in [0, 1), the same on any rank.
        """

    def following(
        self,
        trajectories: Sequence[Trajectory],
        drafted: Sequence[torch.Tensor],
        committed: torch.Tensor,
        shifts: np.ndarray,
    ) -> torch.Tensor:
        """Return the anchors [B, a] of the next round.

        drafted: [B, a] anchors of each round so far. committed: [B, a] numbers of tokens committed at those of the
        last round. shifts: same as in `sample`.
        """
        raise NotImplementedError

    def share(self, ranks: Ranks) -> None:  # noqa: B027
        """Exchange with the other ranks the traces mined since the last call."""

    def state_dict(self) -> StateDict:
        return {}

    def load_state_dict(self, state: StateDict) -> None:  # noqa: B027
        pass


class RandomAnchors(AnchorSource):
    """Positions spread over the answer, independent of the drafter: the paper's ablation."""

    reads_context = False

    def __init__(self, per_sequence: int):
        self.per_sequence = per_sequence

    def sample(self, step: int, indices: Sequence[int], view: DraftingView, shifts: np.ndarray) -> StepAnchors:  # noqa: ARG002
        batch = view.batch
        return StepAnchors(position_anchors(batch.trajectories, self.per_sequence, shifts[:, 0], batch.tokens.device))


class SuccessorAnchors(AnchorSource):
    """Successors: anchors one verify step of the current weights after positions sampled from the whole answer.

    Each trained block costs one more drafted block, at any length of the trajectory. A successor is on the trace or
    joins it soon: after a rejection at the same token all chains coincide.
    """

    numbers = 2

    def __init__(self, drafter: Drafter, proposals: int, per_sequence: int):
        """Sample `per_sequence` positions per trajectory. proposals: length of a served block."""
        self.drafter, self.proposals, self.per_sequence = drafter, proposals, per_sequence

    def sample(self, step: int, indices: Sequence[int], view: DraftingView, shifts: np.ndarray) -> StepAnchors:  # noqa: ARG002
        trajectories, device = view.batch.trajectories, view.batch.tokens.device
        following = successors(
            PreparedDrafter(self.drafter, view.head, self.proposals + 1),
            view.context,
            trajectories,
            position_anchors(trajectories, self.per_sequence, shifts[:, 0], device),
            view.sampler,
        )
        # two positions may share a successor: then another successor is trained twice
        chosen = [
            systematic_sample(np.unique(row), self.per_sequence, shift)
            for row, shift in zip(following.cpu().numpy(), shifts[:, 1], strict=True)
        ]
        return StepAnchors(to_device(np.stack(chosen), device))


ROUNDS = 4  # steps of a chain; their cost: "Chains of anchors" in `tests/benchmarks/README.md`


class ChainAnchors(AnchorSource):
    """Chains of verify steps under the current weights, from positions all over the answer: each block is trained.

    The first round drafts at positions spread over the answer, each later one where the blocks of the round before
    lead, which their loss shows. A chain that reaches the end continues at the answer's first anchor. Rounds are equal;
    if `rounds` does not divide the count, the first ones have one block more. No block is drafted twice while positions
    are free: where chains meet, or one reaches an earlier block, a new chain starts at a free position.
    """

    reads_context = False

    def __init__(self, per_sequence: int, rounds: int = ROUNDS):
        self.rounds = self.numbers = min(rounds, per_sequence)
        self._counts = [len(range(r, per_sequence, self.rounds)) for r in range(self.rounds)]

    def sample(self, step: int, indices: Sequence[int], view: DraftingView, shifts: np.ndarray) -> StepAnchors:  # noqa: ARG002
        batch = view.batch
        return StepAnchors(position_anchors(batch.trajectories, self._counts[0], shifts[:, 0], batch.tokens.device))

    def following(
        self,
        trajectories: Sequence[Trajectory],
        drafted: Sequence[torch.Tensor],
        committed: torch.Tensor,
        shifts: np.ndarray,
    ) -> torch.Tensor:
        count, of_round = self._counts[len(drafted)], shifts[:, len(drafted)]
        leads = drafted[-1] + committed
        so_far, reached = (x.cpu().numpy() for x in (torch.cat([*drafted], 1), leads))
        rows = zip(trajectories, so_far, reached, of_round, strict=True)
        chosen = [_next_anchors(*row, count) for row in rows]
        return to_device(np.stack(chosen), leads.device)


def _next_anchors(
    trajectory: Trajectory, drafted: np.ndarray, leads: np.ndarray, shift: float, count: int
) -> np.ndarray:
    """Return the `count` anchors of a row's next round.

    drafted: anchors of the row so far. leads: next positions of its chains, perhaps after the answer's end.
    """
    first, last = trajectory.first_anchor, trajectory.last_anchor
    reached = np.setdiff1d(np.where(leads > last, first, leads), drafted)
    if len(reached) >= count:
        return systematic_sample(reached, count, shift)
    everywhere = np.arange(first, last + 1)
    others = np.setdiff1d(everywhere, np.append(drafted, reached))
    started = systematic_sample(others if len(others) else everywhere, count - len(reached), shift)
    return np.sort(np.append(reached, started))


# Mined steps per chain. Fewer: many blocks that chains draft are in no trace. More: rounds are many and small.
STEPS_PER_CHAIN = 4


class TableAnchors(AnchorSource):
    """Steps of the mined table, mined again with the drafter's current weights when they are too old.

    A trajectory is mined again when a batch needs it and its trace is at least `every` optimiser steps old; 0: never.
    Older traces are dropped, so memory holds the traces of `every` steps, for any number of trajectories. Fresh steps
    depend on earlier weights, so they are part of the checkpoint.
    """

    def __init__(
        self, mined: MinedTable, drafter: Drafter, kind: StepKind, per_sequence: int, *, every: int, scored: bool
    ):
        """Start with mined steps. scored: whether the target scores sampled steps, for a rejected stream."""
        self.mined, self.drafter, self.every, self.scored = mined, drafter, every, scored
        self.kind, self.per_sequence = kind, per_sequence
        self._fresh: dict[int, Steps] = {}
        self._mined_at: dict[int, int] = {}  # trajectory -> optimiser step of its fresh trace
        self._unshared: set[int] = set()  # trajectories whose fresh traces other ranks do not have

    def sample(self, step: int, indices: Sequence[int], view: DraftingView, shifts: np.ndarray) -> StepAnchors:
        metrics = self.refresh(step, indices, view)
        known = [self.steps(i) for i in indices]  # read each trace once
        proposals, device = self.drafter.block_size - 1, view.batch.tokens.device
        steps = sample_steps(known, self.kind, self.per_sequence, shifts[:, 0], proposals, device)
        # a trace has far more steps than are trained: only those sampled from fresh traces are scored
        unscored = [row for row, i in enumerate(indices) if i in self._mined_at] if self.scored else []
        return StepAnchors(steps.anchors, steps, mined=True, metrics=metrics, unscored=unscored)

    def steps(self, index: int) -> Steps:
        """Return the newest steps of a trajectory."""
        return self._fresh[index] if index in self._fresh else self.mined.steps_of(index)

    def refresh(self, step: int, indices: Sequence[int], view: DraftingView) -> dict[str, float]:
        """Mine the view's trajectories again whose traces are too old. Return metrics of the changes."""
        if not self.every:
            return {}
        for i in [i for i, mined_at in self._mined_at.items() if step - mined_at >= self.every]:  # too old
            del self._mined_at[i], self._fresh[i]
        rows = {i: row for row, i in enumerate(indices) if i not in self._mined_at and step >= self.every}
        if not rows:
            return {}
        trajectories = [view.batch.trajectories[row] for row in rows.values()]
        mined = [self.mined.steps_of(i) for i in rows]
        mined_steps = np.mean([len(steps) for steps in mined])
        traces = self._replay(view, list(rows.values()), trajectories, max(1, round(mined_steps / STEPS_PER_CHAIN)))
        changed = total = 0
        for i, before, trace in zip(rows, mined, traces, strict=True):
            changed += _steps_gone(before, trace)
            total += len(before)
            self._fresh[i] = self._remembered(trace.length, trace.anchors, trace.accepted, trace.proposed)
            self._mined_at[i] = step
            self._unshared.add(i)
        return {"trace_changed_share": Ratio(changed, total), "remined_trajectories": len(rows)}

    def share(self, ranks: Ranks) -> None:
        """Send fresh traces to all ranks: the rank that trains an answer next must know how old its trace is."""
        if self.every:
            news = {i: (self._mined_at[i], self._fresh[i]) for i in sorted(self._unshared)}
            for of_rank in ranks.gather(news):
                for i, (step, fresh) in of_rank.items():
                    self._mined_at[i], self._fresh[i] = step, fresh
        self._unshared.clear()

    @torch.no_grad()
    def _replay(self, view: DraftingView, rows: list[int], trajectories: list[Trajectory], chains: int) -> list[Steps]:
        """Replay the trajectories in `rows` of a view. chains: chains per trajectory."""
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

    def state_dict(self) -> StateDict:
        """Return the fresh steps of all trajectories, concatenated."""
        order = sorted(self._mined_at)
        fresh = [self._fresh[i] for i in order]
        state: StateDict = {
            "trajectories": torch.tensor(order, dtype=torch.int64),
            "mined_at": torch.tensor([self._mined_at[i] for i in order], dtype=torch.int64),
            "counts": torch.tensor([len(steps) for steps in fresh], dtype=torch.int64),
            "lengths": torch.tensor([steps.length for steps in fresh], dtype=torch.int64),
        }
        columns = {name: [getattr(steps, name) for steps in fresh] for name in _COLUMNS} if fresh else {}
        return state | {name: torch.from_numpy(np.concatenate(arrays)) for name, arrays in columns.items()}

    def load_state_dict(self, state: StateDict) -> None:
        """Restore the fresh steps of a checkpoint."""
        self._fresh.clear()
        order, counts, lengths = (state[name].tolist() for name in ("trajectories", "counts", "lengths"))
        self._mined_at = dict(zip(order, state["mined_at"].tolist(), strict=True))
        start = 0
        for i, count, length in zip(order, counts, lengths, strict=True):
            rows = slice(start, start + count)
            self._fresh[i] = self._remembered(length, *(state[name][rows].numpy() for name in _COLUMNS))
            start += count

    def _remembered(self, length: int, anchors: np.ndarray, accepted: np.ndarray, proposed: np.ndarray) -> Steps:
        """Return fresh steps to keep, without proposals if no loss reads them."""
        kept = proposed if self.scored else np.zeros((len(anchors), 0), dtype=np.int64)
        return Steps(length, anchors, accepted, kept, proposals=self.mined.proposals)


_COLUMNS = ("anchors", "accepted", "proposed")  # of fresh steps in a checkpoint


def _steps_gone(mined: Steps, fresh: Steps) -> int:
    """Count the mined steps without a match (same anchor, same number accepted) in the fresh trace."""
    now = set(zip(fresh.anchors.tolist(), fresh.accepted.tolist(), strict=True))
    return sum(step not in now for step in zip(mined.anchors.tolist(), mined.accepted.tolist(), strict=True))
