"""Mined steps on disk equal the mined ones, and a training that samples them holds a few row groups only."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.tables.parquet import TableWriter, select_in_order, write_table
from draftsmith.artifacts.tables.schemas import VERIFY_STEPS
from draftsmith.stages.replay.step_tables import steps_table
from draftsmith.stages.training.opd.verify_steps import load_mined
from tests.stages.replay.test_mined_table import K, mined


def test_steps_on_disk_equal_the_mined_ones(tmp_path: Path) -> None:
    """Even if the trained block is longer, and for answers in a different order."""
    group, more = mined(50), 2
    write_table(tmp_path / "verify_steps.parquet", VERIFY_STEPS, steps_table(VERIFY_STEPS, group), group_bytes=2000)
    for order in (slice(None), slice(None, None, -3)):
        trajectories, traces = zip(*group[order], strict=True)
        stored = load_mined(tmp_path, trajectories, K + 1 + more)
        assert stored.proposals == K
        for index, trace in enumerate(traces):
            steps = stored.steps_of(index)
            for name in ("anchors", "accepted", "committed", "rejected_offset", "proposed", "target_logprobs"):
                np.testing.assert_array_equal(getattr(steps, name), getattr(trace, name), err_msg=name)
        assert stored.counts("errors").tolist() == [np.count_nonzero(trace.rejected_offset) for trace in traces]
        assert stored.counts("visited").tolist() == [len(trace) for trace in traces]


def test_answers_that_were_not_mined_and_longer_blocks_are_refused(tmp_path: Path) -> None:
    group = mined(8)
    trajectories = [trajectory for trajectory, _ in group]
    names = [trajectory.trajectory_id for trajectory in trajectories]
    table = select_in_order(steps_table(VERIFY_STEPS, group), "trajectory_id", names[:-1])
    write_table(tmp_path / "verify_steps.parquet", VERIFY_STEPS, table)
    with pytest.raises(DraftsmithError, match="p7/0"):
        load_mined(tmp_path, trajectories, K + 1)
    assert load_mined(tmp_path, trajectories, K + 1, whole=False).counts("visited")[-1] == 0
    with pytest.raises(DraftsmithError):
        load_mined(tmp_path, trajectories[:-1], K)


def test_memory_is_flat_in_the_number_of_steps(tmp_path: Path) -> None:
    """8 and 40 times the same steps, 2 and 8 MB in row groups of 64 kB, read from all over the table."""
    group = mined(200)
    steps = steps_table(VERIFY_STEPS, group)
    names = steps["trajectory_id"].to_pylist()
    peaks = {}
    for times in (8, 40):
        trajectories = []
        with TableWriter(tmp_path / f"{times}" / "verify_steps.parquet", VERIFY_STEPS, group_bytes=1 << 16) as table:
            for copy in range(times):
                table.append(steps.set_column(0, "trajectory_id", pa.array([f"{copy}-{name}" for name in names])))
                trajectories += [replace(t, trajectory_id=f"{copy}-{t.trajectory_id}") for t, _ in group]
        before, peak = pa.total_allocated_bytes(), 0
        stored = load_mined(tmp_path / f"{times}", trajectories, K + 1)
        assert stored.visited.sum() == table.rows == times * steps.num_rows
        for i in range(0, len(trajectories), 100):
            assert len(stored.steps_of(i))
            peak = max(peak, pa.total_allocated_bytes() - before)
        peaks[times] = peak
    assert peaks[8] < 2**20
    assert peaks[40] - peaks[8] < 32 * 6400  # of each answer its name and row stay in memory
