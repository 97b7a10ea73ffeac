"""Parallel replay against the sequential reference, for random drafters, lengths and chains.

The drafters are tables with random proposals after each position, so any pattern of acceptance
comes up, which trained weights would not show.
"""

from __future__ import annotations

from dataclasses import dataclass
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from draftsmith.stages.data.trajectories import Trajectory
from draftsmith.stages.drafters.base import Context, Drafter, PreparedDrafter
from draftsmith.stages.drafters.lm_head import Head
from draftsmith.stages.replay import chains as replay
from draftsmith.stages.replay.chains import replay_chains, replay_sequentially
from draftsmith.stages.targets.kv_cache import Rows
from tests.stages.bench import assert_same

HEAD = Head(torch.zeros(1, 1))


@dataclass
class Table(Context):
    """The proposals after each position of each row, [B, T, K]."""

    tokens: torch.Tensor


class TableDrafter(Drafter):
    """Looks its proposals up, and records the shape of each call."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, int]] = []

    def encode(self, features: torch.Tensor, tokens: torch.Tensor, positions: torch.Tensor) -> Context:
        raise NotImplementedError

    operations = block_hidden = new_context = extend = move_row = head_over = encode  # type: ignore[assignment]

    def select(self, context: Context, rows: Rows, length: int) -> Table:
        assert isinstance(context, Table)
        assert length <= context.tokens.shape[1]
        return Table(context.tokens[rows])

    def propose(  # type: ignore[override]
        self,
        context: Table,
        anchor_tokens: torch.Tensor,
        anchors: torch.Tensor,
        block_size: int,
        head: Head,  # noqa: ARG002
    ) -> torch.Tensor:
        assert anchor_tokens.shape == anchors.shape and len(anchors) == len(context.tokens)
        self.shapes.append((anchors.shape[0], anchors.shape[1]))
        at = anchors[..., None].expand(-1, -1, block_size - 1)
        return context.tokens.gather(1, at)


@dataclass
class Case:
    trajectories: list[Trajectory]
    context: Table
    block_size: int

    @classmethod
    def random(
        cls, seed: int, responses: list[int], block_size: int, acceptance: float, vocabulary: int, by_token: bool = True
    ) -> Case:
        """Create a random case. acceptance: share of proposals that are the committed token, without chance hits.

        by_token: a hard token is missed from every anchor, as by real drafters; otherwise every anchor misses others.
        """
        rng = np.random.default_rng(seed)
        K = block_size - 1
        trajectories, tables = [], []
        prompts = rng.integers(1, 6, len(responses))
        T = max(int(p) + r for p, r in zip(prompts, responses, strict=True))
        for i, (prompt, response) in enumerate(zip(prompts.tolist(), responses, strict=True)):
            tokens = rng.integers(0, vocabulary, prompt + response)
            ahead = np.arange(T)[:, None] + 1 + np.arange(K)
            truth = np.append(tokens, np.zeros(T + K, int))[ahead]
            hits = rng.random(T + K + 1)[ahead] if by_token else rng.random((T, K))
            table = np.where(hits < acceptance, truth, rng.integers(0, vocabulary, (T, K)))
            trajectories.append(Trajectory(str(i), tokens.tolist(), prompt))
            tables.append(table)
        return cls(trajectories, Table(torch.tensor(np.array(tables))), block_size)

    def check(self, chains: int | None, blocks_per_round: int) -> tuple[int, int, int]:
        """Check that the traces equal the reference's. Return rounds, evaluated blocks, and steps."""
        drafter = TableDrafter()
        with patch.dict(replay.BLOCKS_PER_ROUND, cpu=blocks_per_round):
            found = replay_chains(
                PreparedDrafter(drafter, HEAD, self.block_size), self.context, self.trajectories, chains
            )
        for i, (trace, trajectory) in enumerate(zip(found, self.trajectories, strict=True)):
            alone = Table(self.context.tokens[i : i + 1])
            expected = replay_sequentially(TableDrafter(), alone, trajectory, self.block_size, HEAD)
            assert_same([trace], [expected])
            assert len(trace.anchors) <= trace.evaluated_blocks <= max(0, trajectory.answer_length - 1)
            if chains == 1:
                assert trace.evaluated_blocks == len(trace.anchors)
        steps = sum(len(t.anchors) for t in found)
        return len(drafter.shapes), sum(t.evaluated_blocks for t in found), steps


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    responses=st.lists(st.integers(0, 90), min_size=1, max_size=7),
    block_size=st.integers(2, 9),
    acceptance=st.sampled_from([0.0, 0.3, 0.7, 0.95, 1.0]),
    vocabulary=st.sampled_from([1, 2, 50]),
    chains=st.sampled_from([None, None, 1, 2, 5, 16, 200]),
    blocks_per_round=st.sampled_from([1, 4, 32, 500]),
    by_token=st.booleans(),
)
def test_any_number_of_chains_gives_the_reference_trace(
    seed: int, responses: list[int], block_size: int, acceptance: float, vocabulary: int, chains: int | None,
    blocks_per_round: int, by_token: bool,
) -> None:  # fmt: skip
    case = Case.random(seed, responses, block_size, acceptance, vocabulary, by_token)
    case.check(chains, blocks_per_round)


@pytest.mark.parametrize(("acceptance", "block_size"), [(0.0, 8), (0.5, 8), (0.8, 8), (0.9, 16)])
def test_automatic_chains_shorten_the_rounds_of_a_long_answer_at_few_extra_blocks(
    acceptance: float, block_size: int
) -> None:
    case = Case.random(1, [3000], block_size, acceptance, 1000)
    one, _, steps = case.check(1, 32)
    rounds, blocks, _ = case.check(None, 32)
    assert one == steps
    assert rounds * 5 < one
    assert blocks <= 1.3 * steps


def test_chains_of_a_drafter_that_is_never_rejected_are_not_split() -> None:
    """Two of them on one stretch would never meet, and do the work twice."""
    rounds, blocks, steps = Case.random(2, [2000], 8, 1.0, 1000).check(None, 64)
    assert rounds == blocks == steps == 250


def test_a_batch_that_fills_a_round_gets_one_chain_each() -> None:
    case = Case.random(3, [300] * 8, 8, 0.8, 1000)
    _, blocks, steps = case.check(None, 8)
    assert blocks == steps


def test_finished_rows_leave_the_batch() -> None:
    case = Case.random(4, [20, 20, 20, 400], 8, 0.5, 1000)
    drafter = TableDrafter()
    replay_chains(PreparedDrafter(drafter, HEAD, case.block_size), case.context, case.trajectories, 1)
    rows = [rows for rows, _ in drafter.shapes]
    assert rows[0] == 4 and rows[-1] == 1 and rows == sorted(rows, reverse=True)
    assert rows.count(1) > 0.8 * len(rows)
