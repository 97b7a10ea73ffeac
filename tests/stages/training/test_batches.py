"""Features, the order of training and the head that a step sees."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from draftsmith.stages.data.trajectories import Trajectory
from draftsmith.stages.drafters.lm_head import Head
from draftsmith.stages.runtime.ranks import Ranks
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.training.batches import (
    FeatureSource,
    frequent_tokens,
    step_rng,
    token_counts,
    trajectories_of_step,
)
from draftsmith.stages.training.config import SftConfig, TrainingConfig
from draftsmith.stages.training.sft.body import SftTraining
from draftsmith.stages.training.softmax_heads import HeadSource
from draftsmith.stages.training.trainer import TrainingData
from tests.stages.training.case import hidden_of
from tests.testbed import random_target
from tests.testbed.calls import recorded

TRAJECTORIES = random_target.trajectories(12, seed=5)
LAYERS = (2, 0)


def source_of(target: Target, memory_mb: float = 1e-6, **fields: Any) -> FeatureSource:
    """Return a source with small forwards of the target. With `ahead` the code is CUDA's but for the stream."""
    config = TrainingConfig(tokens_per_target_forward=64, feature_memory_mb=memory_mb)
    return FeatureSource(target, LAYERS, TRAJECTORIES, config, **fields)


@given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 3))
@settings(deadline=None)
def test_every_epoch_takes_each_trajectory_once(count: int, per_step: int, seed: int) -> None:
    order = [i for step in range(3 * count) for i in trajectories_of_step(count, per_step, step, seed)]
    epochs = [tuple(order[e : e + count]) for e in range(0, len(order), count)]
    assert len(order) == 3 * count * per_step
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)


def test_epochs_and_seeds_have_their_own_order() -> None:
    orders = {tuple(trajectories_of_step(9, 9, step, seed)) for step in range(3) for seed in range(3)}
    assert len(orders) == 9


@pytest.mark.parametrize("memory_mb", [2048, 1e-6])
@pytest.mark.parametrize("autocast", [False, True])
def test_features_equal_direct_reads(memory_mb: float, autocast: bool, plain_target: Target) -> None:
    source = source_of(plain_target, memory_mb)
    for indices in ([3, 0, 7], [11, 3, 3], [0, 1, 2, 4]):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):  # as the training loop calls it
            batch = source.batch(indices)
        assert [t.trajectory_id for t in batch.trajectories] == [TRAJECTORIES[i].trajectory_id for i in indices]
        width = max(len(TRAJECTORIES[i].tokens) for i in indices)
        assert batch.tokens.shape == batch.positions.shape == (len(indices), width)
        for row, i in enumerate(indices):
            tokens = TRAJECTORIES[i].tokens
            alone = plain_target.read(torch.tensor([tokens]), LAYERS)
            assert alone.features is not None
            assert batch.tokens[row, : len(tokens)].tolist() == tokens
            assert batch.positions[row].tolist() == list(range(width))
            assert batch.features.dtype == hidden_of(batch).dtype == plain_target.dtype
            torch.testing.assert_close(batch.features[row, : len(tokens)], alone.features[0], atol=2e-5, rtol=1e-5)
            torch.testing.assert_close(hidden_of(batch)[row, : len(tokens)], alone.hidden[0], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("memory_mb", [2048, 0.02, 1e-6])  # for all, for some, for none
def test_features_have_the_same_bits_in_any_order_without_hidden_states_and_read_ahead(
    memory_mb: float, plain_target: Target
) -> None:
    """Without hidden states, layers after the last feature are not run."""
    used, fresh = source_of(plain_target, memory_mb), source_of(plain_target, memory_mb)
    lean, ahead = source_of(plain_target, memory_mb, with_hidden=False), source_of(plain_target, memory_mb, ahead=True)
    for indices in ([5, 6], [1, 9], [6, 5]):
        used.batch(indices)
    ahead.prefetch([5, 6])  # another batch is read first
    for indices in ([9, 1], [5, 6], [2, 2]):
        expected, hidden = fresh.batch(indices), hidden_of(fresh.batch(indices))
        for source in (used, lean, ahead):
            assert torch.equal(source.batch(indices).features, expected.features)
        assert torch.equal(hidden_of(used.batch(indices)), hidden) and lean.batch(indices).hidden is None


@pytest.mark.parametrize(("memory_mb", "reads"), [(2048, 1), (1e-6, 2)])
def test_the_target_reads_each_answer_once_if_memory_holds_all(
    memory_mb: float, reads: int, plain_target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise for every step, in large forwards."""
    source = source_of(plain_target, memory_mb)
    calls = recorded(monkeypatch, source, "_read")
    order = [7, 0, 11, 3, 1, 9, 2, 5, 10, 4, 8, 6]  # neighbours are of different length
    for _ in range(2):
        for i in order:
            source.batch([i])
    assert sum(len(ids) for (ids,) in calls) == reads * len(TRAJECTORIES)
    if reads == 2:
        assert [tuple(ids.shape) for (ids,) in calls[:12]] == [(1, len(TRAJECTORIES[i].tokens)) for i in order]
        calls.clear()
        source.batch([7, 0, 11, 3, 7])
        seen = [ids.shape for (ids,) in calls]
        assert sum(rows for rows, _ in seen) == 4  # one of them twice in the batch
        assert len(seen) < 4 and all(rows * width <= 64 for rows, width in seen)
        assert not source._cache


class Recorded(list[Trajectory]):
    """Trajectories that record which of them are read."""

    def __init__(self, trajectories: list[Trajectory]):
        super().__init__(trajectories)
        self.read: list[int] = []

    def __getitem__(self, index: Any) -> Any:
        self.read.append(index)
        return super().__getitem__(index)


@pytest.mark.parametrize("head_tokens", [None, 8])
def test_a_rank_reads_its_own_answers_only_unless_a_head_needs_the_tokens_of_all(
    head_tokens: int | None, plain_target: Target
) -> None:
    trajectories = Recorded(TRAJECTORIES)
    config = SftConfig(steps=1, sequences_per_step=7, head_tokens=head_tokens, feature_memory_mb=1e-6)
    data, drafter = TrainingData(trajectories=trajectories), random_target.random_drafter(plain_target)
    rank_slice = SftTraining(drafter, plain_target, data, config, ranks=Ranks(1, 3)).rank_slice(0, None)
    step = trajectories_of_step(len(TRAJECTORIES), 7, 0, seed=0)
    assert len(rank_slice.indices) in (2, 3) and rank_slice.step_rows == 7
    assert rank_slice.indices == [step[row] for row in rank_slice.rows]
    read = rank_slice.indices if head_tokens is None else step
    assert set(trajectories.read) == set(read)
    assert head_tokens is not None or len(trajectories.read) == len(read)  # each once
    tokens = {t for i in read for t in TRAJECTORIES[i].tokens}
    assert set(rank_slice.step_tokens.unique().tolist()) | {0} == tokens | {0}


def test_frequent_tokens_are_ordered_by_their_count_in_the_answers() -> None:
    answers = [Trajectory("a", [9, 9, 9, 9, 4, 5, 4], 4), Trajectory("b", [9, 4, 5, 2], 1)]
    order = frequent_tokens(token_counts(answers, 11)).tolist()
    assert order[:3] == [4, 5, 2]
    assert order[3:] == [0, 1, 3, 6, 7, 8, 9, 10]  # never answered: by id; prompts do not count
    counts = torch.tensor([0, 2, 0, 5, 2])  # of equally frequent ones, the order that they had
    assert frequent_tokens(counts, torch.tensor([4, 2, 3, 1, 0])).tolist() == [3, 4, 1, 2, 0]


def test_a_reduced_head_holds_the_tokens_that_the_step_needs(plain_target: Target) -> None:
    needed = [torch.tensor([[1, 2], [2, 3]]), torch.tensor([50])]
    drafter = random_target.random_drafter(plain_target)
    drafter.frequent_tokens = torch.arange(99, -1, -1)

    def sampled(step: int, **fields: int | None) -> Head:
        source = HeadSource(drafter, torch.arange(100.0)[:, None], TrainingConfig.model_validate(fields))
        return source.sample(step_rng(0, step), needed).drafter

    head = sampled(0, head_tokens=4, head_negatives=6)
    assert head.token_ids is not None
    ids = head.token_ids.tolist()
    assert {96, 97, 98, 99, 1, 2, 3, 50} <= set(ids)
    assert 8 < len(ids) <= 14  # and random others
    assert head.weight[:, 0].tolist() == ids
    assert head.to_columns(torch.tensor([1, 2, 3, 50]))[1].all()
    other = sampled(1, head_tokens=4, head_negatives=6)
    assert other.token_ids is not None
    assert other.token_ids.tolist() != ids  # other negatives at every step
    for tokens in (None, 100, 1000):
        assert sampled(0, head_tokens=tokens).token_ids is None


# ---- features that are read ahead


STEPS = [[7, 0, 11], [3, 1, 9], [2, 5, 4]]


def trained(source: FeatureSource, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the order of events: the target reads for a step, its batch, its training."""
    events: list[str] = []
    read = source._read

    def noted(ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        row = [t.tokens == ids[0, : len(t.tokens)].tolist() for t in TRAJECTORIES].index(True)
        events.append(f"read {next(step for step, indices in enumerate(STEPS) if row in indices)}")
        return read(ids)

    monkeypatch.setattr(source, "_read", noted)
    for step, indices in enumerate(STEPS):
        source.batch(indices)
        events.append(f"batch {step}")
        if step + 1 < len(STEPS):
            source.prefetch(STEPS[step + 1])
        events.append(f"train {step}")
    return list(dict.fromkeys(events))


def test_the_next_step_is_read_before_the_training_of_this_one(
    plain_target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_turn = trained(source_of(plain_target, ahead=False), monkeypatch)
    ahead = trained(source_of(plain_target, ahead=True), monkeypatch)
    assert in_turn == [f"{event} {step}" for step in range(3) for event in ("read", "batch", "train")]
    assert ahead == [
        *("read 0", "batch 0", "read 1", "train 0", "batch 1", "read 2", "train 1", "batch 2", "train 2"),
    ]
