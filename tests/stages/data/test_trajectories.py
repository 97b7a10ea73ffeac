"""Stored trajectories behave like lists, and memory does not grow with their number; which are usable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.tables.parquet import TableWriter, write_table
from draftsmith.artifacts.tables.schemas import TRAJECTORIES
from draftsmith.stages.data.trajectories import answer_tokens, load_trajectories, trajectory_ids, trajectory_lengths
from draftsmith.stages.runtime.ranks import ALONE
from draftsmith.stages.targets.sampling import SamplingParams
from draftsmith.stages.training.batches import token_counts
from draftsmith.stages.training.trainer import load_answers
from tests.testbed.context import RecordingContext
from tests.testbed.random_target import VOCAB_SIZE, trajectories, write_trajectories


def test_stored_trajectories_equal_the_written_ones(tmp_path: Path) -> None:
    made = trajectories(40)
    context = RecordingContext.under(tmp_path, {"trajectories": write_trajectories(tmp_path / "made", made)})
    for stored in (
        load_trajectories(tmp_path / "made").trajectories,
        load_answers(context, ALONE).trajectories,  # from a copy
    ):
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


def write(folder: Path, *changes: dict[str, Any]) -> Path:
    row: dict[str, Any] = {
        "trajectory_id": "p/0", "prompt_id": "p", "split": "train", "sample": 0, "prompt_ids": [1, 2],
        "response_ids": [3, 4, 5], "finish_reason": "stop", "temperature": 0.0, "top_p": 1.0, "top_k": 0, "seed": 0,
        "engine": "e",
    }  # fmt: skip
    rows = [row | {"trajectory_id": f"p/{i}"} | change for i, change in enumerate(changes)]
    write_table(folder / "trajectories.parquet", TRAJECTORIES, rows)
    return folder


SAMPLED = {"split": "heldout", "temperature": 0.5}


def test_sampling_is_read_from_the_rows(tmp_path: Path) -> None:
    """Greedy answers have no top-p and no top-k, whatever their columns say."""
    both = {"top_p": 0.75, "top_k": 20}
    assert load_trajectories(write(tmp_path, SAMPLED | both)).sampling == SamplingParams(0.5, 0.75, 20)
    assert load_trajectories(write(tmp_path, both, {})).sampling == SamplingParams()


def test_answers_of_one_token_are_counted_and_left_out(tmp_path: Path) -> None:
    found = load_trajectories(write(tmp_path, {}, {"response_ids": [3]}, {"split": "heldout"}), ["train"])
    assert [t.trajectory_id for t in found.trajectories] == ["p/0"]
    assert found.trajectories[0].tokens == [1, 2, 3, 4, 5]
    assert found.too_short == 1


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{}, {"split": "validation"}], "no answer of split heldout, only of train, validation"),
        ([{"split": "heldout", "response_ids": [3]}], "no answer of two or more tokens"),
        (
            [{"split": "heldout"}, {"split": "heldout", "temperature": 1.0}],
            r"mixes the values \[0.0, 1.0\] of temperature",
        ),
        ([SAMPLED, {**SAMPLED, "top_p": 0.5}], r"mixes the values \[0.5, 1.0\] of top_p"),
        ([SAMPLED, {**SAMPLED, "top_k": 20}], r"mixes the values \[0, 20\] of top_k"),
    ],
)
def test_trajectories_that_cannot_be_used_are_an_error(
    tmp_path: Path, rows: list[dict[str, Any]], expected: str
) -> None:
    with pytest.raises(DraftsmithError, match=expected):
        load_trajectories(write(tmp_path, *rows), ["heldout"])
