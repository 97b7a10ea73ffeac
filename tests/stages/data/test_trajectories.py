"""Stored trajectories behave like lists, and memory does not grow with their number."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from draftsmith.artifacts.tables.parquet import TableWriter
from draftsmith.artifacts.tables.schemas import TRAJECTORIES
from draftsmith.stages.data.load import load_trajectories
from draftsmith.stages.data.trajectories import answer_tokens, trajectory_ids, trajectory_lengths
from draftsmith.stages.training.batches import token_counts
from tests.testbed.random_target import VOCAB_SIZE, trajectories, write_trajectories


def test_stored_trajectories_equal_the_written_ones(tmp_path: Path) -> None:
    made = trajectories(40)
    stored = load_trajectories(write_trajectories(tmp_path, made)).trajectories
    assert len(stored) == 40
    assert list(stored) == made and stored[-1] == made[-1] and list(stored[3:30:4]) == made[3:30:4]
    with pytest.raises(IndexError):
        stored[40]


def test_lengths_and_ids_are_known_without_reading_tokens(tmp_path: Path) -> None:
    made = trajectories(40)
    stored = load_trajectories(write_trajectories(tmp_path, made)).trajectories
    for of in (stored, made):
        assert trajectory_lengths(of).tolist() == [len(t.tokens) for t in made]
        assert trajectory_ids(of).to_pylist() == [t.trajectory_id for t in made]
    for part in (slice(None), slice(5, 20, 3)):
        tokens = [token for t in made[part] for token in t.tokens[t.prompt_length :]]
        assert np.concatenate(list(answer_tokens(stored[part]))).tolist() == tokens
        assert token_counts(stored[part], VOCAB_SIZE).tolist() == np.bincount(tokens, minlength=VOCAB_SIZE).tolist()


def write_answers(folder: Path, count: int, tokens: int) -> Path:
    """Write the artifact of a rollout with many long answers."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    with TableWriter(folder / "trajectories.parquet", TRAJECTORIES, group_bytes=1 << 18) as table:
        for index in range(count):
            row = {"trajectory_id": f"{index}/0", "prompt_id": f"{index}", "split": "train", "sample": 0, "seed": 0}
            constants = {"finish_reason": "length", "temperature": 0.0, "top_p": 1.0, "top_k": 0, "engine": "made"}
            ids = rng.integers(0, VOCAB_SIZE, tokens).astype(np.int32)
            table.append([row | constants | {"prompt_ids": ids[:8], "response_ids": ids[8:]}])
    return folder


def test_memory_does_not_grow_with_the_number_of_answers(tmp_path: Path) -> None:
    """200 and 1,600 answers of 4,000 tokens (3 and 26 MB, row groups of 256 kB), read at random and in order."""
    peaks = {}
    for count in (200, 1600):
        folder = write_answers(tmp_path / str(count), count, 4000)
        before, peak = pa.total_allocated_bytes(), 0
        stored = load_trajectories(folder)
        for index in np.random.default_rng(1).permutation(count)[:50].tolist():
            assert len(stored.trajectories[index].tokens) == 4000
            peak = max(peak, pa.total_allocated_bytes() - before)
        for part in answer_tokens(stored.trajectories):
            peak = max(peak, pa.total_allocated_bytes() - before + part.nbytes)
        peaks[count] = peak
        del stored
    assert peaks[200] < 2.5 * 2**20
    assert peaks[1600] - peaks[200] < 32 * 1400  # a name and its place stay of each
