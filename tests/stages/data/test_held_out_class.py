"""Stage `logs` never trains on the held-out prompts of stage `prompts`, in this week or another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from draftsmith.stages.data.prompts import PromptsConfig
from tests.stages.data.logs.logs_run import Row, counts, table, write
from tests.stages.data.logs.logs_run import run as run_logs
from tests.stages.data.prompts_run import run as run_prompts
from tests.testbed.drafter import DrafterArtifacts

ANSWER = "the cat is here ."


def conversation(text: str, *before: str) -> Row:
    """Return a row of a conversation: its turns so far, each answered, and one more."""
    turns = [
        {"role": role, "content": turn} for text in before for role, turn in (("user", text), ("assistant", ANSWER))
    ]
    return {"messages": [*turns, {"role": "user", "content": text}], "completion": ANSWER}


def a_week(
    folder: Path, made: DrafterArtifacts, rows: list[Row], **prompts: Any
) -> tuple[list[Row], set[tuple[int, ...]]]:
    """Return the held-out prompts of a week, and the token ids of its training prompts."""
    folder.mkdir()
    log = write(folder / "log.jsonl", rows)
    source = {"kind": "jsonl", "path": str(log), **prompts.pop("source", {})}
    settings = {"train": 0, "validation": 2, "heldout": 14, "max_prompt_tokens": 200, **prompts}
    held_out = run_prompts(made.target, folder / "prompts", [source], **settings)
    ctx = run_logs(folder, made, log, inputs={"prompts": folder / "prompts" / "out"}, scored=0)
    assert counts(ctx)["set_aside"].keys() <= {"prompt of the validation or held-out split"}
    return held_out, {tuple(row["prompt_ids"]) for row in table(ctx)}


def test_the_heldout_share_of_a_source_applies_to_logs_too(tmp_path: Path, tiny_drafter: DrafterArtifacts) -> None:
    rows = [conversation(f"tell story {number} of the cat") for number in range(300)]
    own: Row = {"source": {"heldout_share": 0.3}}
    _, trained = a_week(tmp_path / "1", tiny_drafter, rows, **own)
    assert json.loads((tmp_path / "1" / "run" / "out" / "logs.json").read_text())["heldout_share"] == 0.3
    held_out, _ = a_week(
        tmp_path / "2", tiny_drafter, rows[100:180], **own
    )  # fewer, so that other prompts are held out
    assert trained and not {tuple(row["token_ids"]) for row in held_out} & trained


def test_a_benchmark_does_not_raise_the_heldout_share_of_logs() -> None:
    def share(section: float, *own: float | None) -> float:
        sources = [{"kind": "jsonl", "path": str(number), "heldout_share": each} for number, each in enumerate(own)]
        settings = {"sources": sources, "train": 0, "heldout": 1, "heldout_share": section}
        return PromptsConfig.model_validate(settings).max_heldout_share

    assert share(0.1, None) == share(0.1, 1) == share(0.1, 0.05, 1) == 0.1
    assert share(0.1, None, 0.3, 0.2, 1) == 0.3 and share(1, None) == 1


@pytest.mark.parametrize(("by", "suffix"), [("prompt", ""), ("conversation", ""), ("conversation", " in the end")])
def test_by_conversation_all_turns_of_a_held_out_one_are_excluded(
    by: str, suffix: str, tmp_path: Path, tiny_drafter: DrafterArtifacts
) -> None:
    rows: list[Row] = []
    for number in range(150):
        turns = [f"tell story {number} of the cat", "tell more", "tell the end"]
        rows += [conversation(turn, *turns[:index]) for index, turn in enumerate(turns)]
    held_out, _ = a_week(tmp_path / "1", tiny_drafter, rows, heldout_by=by, source={"suffix": suffix})
    assert all(row["messages"][-1]["content"].endswith(suffix) for row in held_out)
    kept = json.loads((tmp_path / "1" / "prompts" / "out" / "prompts.json").read_text())
    assert kept["heldout_by"] == by
    openings = {row["messages"][0]["content"].removesuffix(suffix) for row in held_out}
    log = write(tmp_path / "of-these.jsonl", [row for row in rows if row["messages"][0]["content"] in openings])
    again: dict[str, Any] = {"inputs": {"prompts": tmp_path / "1" / "prompts" / "out"}, "scored": 0}
    if by == "conversation":
        with pytest.raises(Exception, match=rf"none of {3 * len(openings)} rows of \S+ can be used"):
            run_logs(tmp_path / "2", tiny_drafter, log, **again)
    else:
        assert table(run_logs(tmp_path / "2", tiny_drafter, log, **again)), "another turn of theirs is trained on"
