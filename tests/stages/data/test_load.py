"""Stored trajectories: which are usable, and the errors if none is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.tables.parquet import write_table
from draftsmith.artifacts.tables.schemas import TRAJECTORIES
from draftsmith.stages.data.load import load_trajectories
from draftsmith.stages.target.sampling import SamplingParams


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
