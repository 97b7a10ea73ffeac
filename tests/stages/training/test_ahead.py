"""The next batch's features are read while a step trains: earlier, in the same order, with the same bits."""

from __future__ import annotations

import pytest
import torch

from draftsmith.stages.target.causal_lm import Target
from draftsmith.stages.training.batches import Batch, FeatureSource
from draftsmith.stages.training.config import TrainingConfig
from tests.stages.training.case import hidden_of
from tests.testbed import random_target

TRAJECTORIES = random_target.trajectories(12, seed=5)
STEPS = [[7, 0, 11], [3, 1, 9], [2, 5, 4]]


def source_of(target: Target, ahead: bool, memory_mb: float = 1e-6) -> FeatureSource:
    """Return a source on a CPU, where the code is CUDA's but for the stream."""
    config = TrainingConfig(tokens_per_target_forward=64, feature_memory_mb=memory_mb)
    return FeatureSource(target, (2, 0), TRAJECTORIES, config, ahead=ahead)


def trained(source: FeatureSource, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], list[Batch]]:
    """Return the order of events (the target reads for a step, its batch, its training) and the batches."""
    events: list[str] = []
    batches: list[Batch] = []
    read = source._read

    def recorded(ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        row = [t.tokens == ids[0, : len(t.tokens)].tolist() for t in TRAJECTORIES].index(True)
        events.append(f"read {next(step for step, indices in enumerate(STEPS) if row in indices)}")
        return read(ids)

    monkeypatch.setattr(source, "_read", recorded)
    for step, indices in enumerate(STEPS):
        batches.append(source.batch(indices))
        events.append(f"batch {step}")
        if step + 1 < len(STEPS):
            source.prefetch(STEPS[step + 1])
        events.append(f"train {step}")
    return list(dict.fromkeys(events)), batches


def test_prefetching_changes_neither_a_bit_nor_the_order_of_reads(
    plain_target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_turn, batches = trained(source_of(plain_target, ahead=False), monkeypatch)
    ahead, same = trained(source_of(plain_target, ahead=True), monkeypatch)
    assert in_turn == [f"{event} {step}" for step in range(3) for event in ("read", "batch", "train")]
    assert ahead == [
        *("read 0", "batch 0", "read 1", "train 0", "batch 1", "read 2", "train 1", "batch 2", "train 2"),
    ]
    for one, other in zip(batches, same, strict=True):
        assert one.trajectories == other.trajectories
        assert torch.equal(one.features, other.features)
        assert torch.equal(hidden_of(one), hidden_of(other))


def test_a_batch_other_than_the_prefetched_one_is_read(plain_target: Target) -> None:
    source, plain = source_of(plain_target, ahead=True), source_of(plain_target, ahead=False)
    source.prefetch([7, 0])
    for indices in ([3, 1], [7, 0]):
        assert torch.equal(source.batch(indices).features, plain.batch(indices).features)
