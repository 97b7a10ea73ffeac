"""Attempts at a stage that several processes train, and the files that they leave."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

from draftsmith.stages.runtime.checkpoint import list_checkpoints
from tests.stages.runtime.test_stage_process import finish, start

SFT = "draftsmith.stages.training.sft.stage"
LONG = 100
CONFIG = {
    "drafter": {"num_layers": 1, "block_size": 4, "target_layer_ids": [0, 2]}, "steps": LONG, "sequences_per_step": 4,
    "anchors_per_sequence": 3, "compute_dtype": "float32", "checkpoint_every": 2,
}  # fmt: skip
TWO: dict[str, Any] = {"parallel": {"processes": 2}}


def attempt(folder: Path, inputs: dict[str, str], module: str = SFT, **fields: Any) -> tuple[int, list[dict[str, Any]]]:
    """Run the stage in `folder`; return its exit code and events."""
    code, events, _ = finish(start(folder, module, {**CONFIG, **fields}, inputs=inputs, threads=1), limit_s=180)
    return code, events


def ranks_of(folder: Path) -> dict[int, int]:
    """Return rank -> process id."""
    found = (folder / "work" / "ranks").glob(f"*/{socket.gethostname()}.*")
    return {int(path.read_text()): int(path.name.rpartition(".")[2]) for path in found if path.read_text()}


def newest(folder: Path) -> int:
    return int(list_checkpoints(folder / "work")[0].name[11:19])
