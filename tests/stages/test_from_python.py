"""The rooms without a run: what `stages/README.md` shows, executed as it stands there, on the tiny target."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from draftsmith.stages.replay.trace import tau
from draftsmith.stages.stored import DRAFTER_FOLDER, load_trajectories
from tests.testbed.drafter import DrafterArtifacts

README = Path(__file__).parents[2] / "stages" / "README.md"
MOST_LINES = 6  # of a block, blank lines aside


def blocks() -> list[str]:
    section = README.read_text("utf-8").partition("## From Python")[2].partition("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)


def test_every_block_is_short() -> None:
    assert len(blocks()) == 5
    for block in blocks():
        lines = [line for line in block.splitlines() if line]
        assert len(lines) <= MOST_LINES, block


def test_the_blocks_run_one_after_the_other(
    tiny_target: Path, tiny_drafter: DrafterArtifacts, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = load_trajectories(tiny_drafter.heldout).trajectories[:6]
    checkpoint = tiny_drafter.drafter / DRAFTER_FOLDER
    named = {
        "Qwen/Qwen3-4B": tiny_target,
        "z-lab/Qwen3-4B-DFlash-b16": checkpoint,
        "my-refresh/drafter": checkpoint,
    }
    known: dict[str, Any] = {"torch": torch, "answers": [(t.tokens, t.prompt_length) for t in stored]}
    for shown in blocks():
        code = shown
        for name, folder in named.items():
            code = code.replace(name, str(folder))
        exec(compile(code, str(README), "exec"), known)
    drafter, mined = known["drafter"], known["mined"]
    assert tau(known["traces"]) == known["tallies"]["one"].tau > 2  # a trained drafter
    assert mined.num_rows == known["tallies"]["one"].steps.sum()
    assert (known["difference"].value, known["difference"].interval(0.95)) == (0.0, (0.0, 0.0))  # the same one
    assert any(parameter.grad is None or parameter.grad.any() for parameter in drafter.parameters())
    assert known["optimiser"].state, "a step was taken"
    assert "0.0" in capsys.readouterr().out
