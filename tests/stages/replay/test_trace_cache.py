"""Continuation of an interrupted replay, and groups that do not fit into memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from draftsmith.artifacts.tables.parquet import BufferedShards, shard_paths
from draftsmith.stages.data.trajectories import Trajectory
from draftsmith.stages.drafters.dflash.model import DFlashDrafter
from draftsmith.stages.replay.options import ReplayOptions
from draftsmith.stages.replay.replayer import Replayer
from draftsmith.stages.replay.steps import Steps
from draftsmith.stages.targets.causal_lm import Target
from tests.stages.bench import assert_same
from tests.testbed.calls import recorded

GENERATOR = np.random.default_rng(0)
TEXTS = [Trajectory(f"t{i}", GENERATOR.integers(0, 60, 12 + i).tolist(), 4) for i in range(9)]


class StoppedError(Exception):
    """Replaces a request to stop the stage."""


def replayed(target: Target, drafter: DFlashDrafter, folder: Path | None, stop_at: int = 99) -> tuple[Any, list[int]]:
    """Return the traces of two drafters, and how many trajectories were done after each group."""
    done: list[int] = []

    def progress(count: int, _total: int) -> None:
        done.append(count)
        if count >= stop_at:
            raise StoppedError

    drafters = {"drafter:a:5:0": drafter, "b": drafter}
    replayer = Replayer(target, ReplayOptions(tokens_per_group=40))
    return replayer.traces(drafters, TEXTS, cache=folder, progress=progress), done


def assert_equal(ours: dict[str, list[Steps]], expected: dict[str, list[Steps]]) -> None:
    assert ours.keys() == expected.keys()
    for name in ours:
        assert_same(ours[name], expected[name])
        assert [trace.evaluated_blocks for trace in ours[name]] == [trace.evaluated_blocks for trace in expected[name]]


@pytest.fixture
def read(plain_target: Target, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return the batches that the target reads."""
    return recorded(monkeypatch, plain_target, "features")


def test_an_interrupted_replay_continues_with_the_missing_groups(
    tmp_path: Path, plain_target: Target, plain_drafter: DFlashDrafter, read: list[Any]
) -> None:
    whole, groups = replayed(plain_target, plain_drafter, None)
    assert len(groups) > 4
    read.clear()
    with pytest.raises(StoppedError):
        replayed(plain_target, plain_drafter, tmp_path, stop_at=groups[2])
    assert len(read) == 3
    again, _ = replayed(plain_target, plain_drafter, tmp_path)
    assert len(read) == len(groups)  # no group twice
    assert_equal(again, whole)
    replayed(plain_target, plain_drafter, tmp_path)
    assert len(read) == len(groups)


@pytest.mark.parametrize("damage", ["flipped", "cut short"])
def test_damaged_traces_are_replayed_again(
    damage: str,
    tmp_path: Path,
    plain_target: Target,
    plain_drafter: DFlashDrafter,
    read: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(BufferedShards, "LONGEST_WAIT_S", 0.0)  # a file a group, as a killed process leaves them
    whole, groups = replayed(plain_target, plain_drafter, tmp_path)
    first, *others = shard_paths(tmp_path / "traces")
    assert len(others) == len(groups) - 1
    content = bytearray(first.read_bytes())
    column = pq.ParquetFile(first).metadata.row_group(0).column(0)
    content[column.dictionary_page_offset + column.total_compressed_size - 1] ^= 1  # the last byte of its last page
    first.write_bytes(content if damage == "flipped" else content[:50])
    read.clear()
    again, _ = replayed(plain_target, plain_drafter, tmp_path)
    assert len(read) == 1
    assert_equal(again, whole)


def test_a_group_that_does_not_fit_into_memory_is_replayed_in_halves(
    plain_target: Target, plain_drafter: DFlashDrafter, read: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch's allocator really refuses more than five rows of a group of nine."""
    drafters = {"a": plain_drafter}
    whole = Replayer(plain_target).traces(drafters, TEXTS)
    features, step = plain_target.features, plain_target.step
    fits = 5

    def refuses(ids: torch.Tensor) -> None:
        if len(ids) > fits:
            torch.empty(1 << 50)

    def small_features(ids: torch.Tensor, *arguments: Any) -> torch.Tensor:
        refuses(ids)
        return features(ids, *arguments)

    def small_step(ids: torch.Tensor, *arguments: Any, **more: Any) -> Any:
        refuses(ids)
        return step(ids, *arguments, **more)

    monkeypatch.setattr(plain_target, "features", small_features)
    read.clear()
    logs: list[str] = []
    halved = Replayer(plain_target, log=logs.append).traces(drafters, TEXTS)
    assert [len(ids) for ids, *_ in read] == [4, 5]
    assert logs == ["out of memory with 9 items at once. Trying 4."]
    assert_same(halved["a"], whole["a"])

    (mined,) = Replayer(plain_target).mine(plain_drafter, TEXTS)
    monkeypatch.setattr(plain_target, "step", small_step)
    (retry_in_halves,) = Replayer(plain_target).mine(plain_drafter, TEXTS)
    for (trajectory, ours), (expected_trajectory, expected_steps) in zip(retry_in_halves, mined, strict=True):
        assert trajectory == expected_trajectory
        np.testing.assert_allclose(ours.logprobs, expected_steps.logprobs, atol=2e-4)
    fits = 2
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        Replayer(plain_target).traces(drafters, TEXTS)
