"""Attempts at a stage that several processes train, and the files that they leave."""

from __future__ import annotations

import json
import os
import socket
import threading
from pathlib import Path
from typing import Any

from draftsmith.stages.__main__ import run_request
from draftsmith.stages.runtime.checkpoint import list_checkpoints
from draftsmith.stages.runtime.process import EventStream
from draftsmith.stages.runtime.stage import StageRequest

LONG = 100
CONFIG = {
    "drafter": {"num_layers": 1, "block_size": 4, "target_layer_ids": [0, 2]}, "steps": LONG, "sequences_per_step": 4,
    "anchors_per_sequence": 3, "compute_dtype": "float32", "checkpoint_every": 2,
}  # fmt: skip
TWO: dict[str, Any] = {"parallel": {"processes": 2}}


class Attempt:
    """One attempt at the stage `sft` in `folder`, in a thread: its parent is this process."""

    def __init__(
        self,
        folder: Path,
        inputs: dict[str, str],
        *,
        module: str = "draftsmith.stages.training.sft.stage",
        **fields: Any,
    ):
        self.folder, self.stop = folder, threading.Event()
        read_end, write_end = os.pipe()
        request = StageRequest(
            stage="sft",
            module=module,
            config={**CONFIG, **fields},
            inputs={name: Path(path) for name, path in inputs.items()},
            out=folder / "out",
            work=folder / "work",
            seed=1,
            threads=1,
        )
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read, args=(read_end,))
        self._runner = threading.Thread(target=self._run, args=(request, write_end))
        self._reader.start()
        self._runner.start()
        self.code: int | None = None

    def _read(self, read_end: int) -> None:
        with os.fdopen(read_end) as stream:
            self._lines.extend(stream)

    def _run(self, request: StageRequest, write_end: int) -> None:
        self.code = run_request(request, EventStream(write_end), self.stop)
        os.close(write_end)

    def ended(self) -> tuple[int | None, list[dict[str, Any]]]:
        """Wait for the end; return exit code and events."""
        self._runner.join(180)
        self._reader.join(10)
        return self.code, [json.loads(line) for line in self._lines]


def ranks_of(folder: Path) -> dict[int, int]:
    """Return rank -> process id."""
    found = (folder / "work" / "ranks").glob(f"*/{socket.gethostname()}.*")
    return {int(path.read_text()): int(path.name.rpartition(".")[2]) for path in found if path.read_text()}


def newest(folder: Path) -> int:
    return int(list_checkpoints(folder / "work")[0].name[11:19])
