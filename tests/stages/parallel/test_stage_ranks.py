"""A stage that several processes train: who reports, what a lost one leaves, signals, and a second node."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from draftsmith.stages import join
from draftsmith.stages.checkpoints import checkpoints
from draftsmith.stages.parallel.config import RENDEZVOUS
from draftsmith.stages.process import EventStream, run_request
from draftsmith.stages.stored import DRAFTER_FOLDER
from tests.flows.pipeline.processes import assert_gone, wait_until
from tests.stages.test_stage_process import finish, start
from tests.testbed import random_target

STEPS = 60
CONFIG = {
    "drafter": {"num_layers": 1, "block_size": 4, "target_layer_ids": [0, 2]}, "steps": STEPS, "sequences_per_step": 4,
    "anchors_per_sequence": 3, "compute_dtype": "float32", "checkpoint_every": 2,
}  # fmt: skip
TWO = {"parallel": {"processes": 2}}


class Attempt:
    """One attempt at the stage `sft` in `folder`, in a thread: its parent is this process."""

    def __init__(self, folder: Path, inputs: dict[str, str], **fields: Any):
        self.folder, self.stop = folder, threading.Event()
        read_end, write_end = os.pipe()
        request = {
            "stage": "sft", "module": "draftsmith.stages.sft", "config": {**CONFIG, **fields}, "inputs": inputs,
            "out": str(folder / "out"), "work": str(folder / "work"), "seed": 1, "threads": 1,
        }  # fmt: skip
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read, args=(read_end,))
        self._runner = threading.Thread(target=self._run, args=(request, write_end))
        self._reader.start()
        self._runner.start()
        self.code: int | None = None

    def _read(self, read_end: int) -> None:
        with os.fdopen(read_end) as stream:
            self._lines.extend(stream)

    def _run(self, request: dict[str, Any], write_end: int) -> None:
        self.code = run_request(request, EventStream(write_end), self.stop)
        os.close(write_end)

    def wait_for_step(self, step: int) -> None:
        """Until a checkpoint behind it is there."""

        def there() -> bool:
            assert self._runner.is_alive(), "it ended"
            return any(int(path.name[11:19]) > step for path in checkpoints(self.folder / "work"))

        wait_until(there, f"a checkpoint behind step {step}", limit_s=180)

    def ended(self) -> tuple[int | None, list[dict[str, Any]]]:
        """Exit code and events."""
        self._runner.join(180)
        self._reader.join(10)
        return self.code, [json.loads(line) for line in self._lines]


def ranks_of(folder: Path) -> dict[int, int]:
    """Rank -> process id."""
    found = (folder / "work" / "ranks").glob(f"{socket.gethostname()}.*")
    return {int(path.read_text()): int(path.name.rpartition(".")[2]) for path in found if path.read_text()}


def newest(folder: Path) -> int:
    return int(checkpoints(folder / "work")[0].name[11:19])


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, plain_artifact: Path) -> dict[str, str]:
    made = random_target.trajectories(8, seed=2)
    answers = random_target.write_trajectories(tmp_path_factory.mktemp("answers"), made)
    return {"target": str(plain_artifact), "trajectories": str(answers)}


def test_a_lost_rank_ends_all_and_the_stage_goes_on(
    tmp_path: Path, inputs: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed, then asked to stop, then on two nodes; each attempt goes on from what the one before kept."""
    lost = Attempt(tmp_path, inputs, **TWO)
    lost.wait_for_step(3)
    ranks = ranks_of(tmp_path)
    assert ranks.keys() == {0, 1}
    os.kill(ranks[1], signal.SIGKILL)
    code, events = lost.ended()
    errors = [event for event in events if event["event"] == "error"]
    assert (code, len(errors)) == (75, 1)
    assert "rank 1 of 2 was lost, with exit code -9" in errors[0]["message"]
    for pid in ranks.values():
        assert_gone(pid)

    kept = newest(tmp_path)
    stopped = Attempt(tmp_path, inputs, **TWO)
    stopped.wait_for_step(kept + 2)
    stopped.stop.set()
    code, events = stopped.ended()
    assert (code, events[-1]["kind"]) == (130, "StageInterrupted")
    logs = [event["message"] for event in events if event["event"] == "log"]
    assert f"continuing from the checkpoint at step {kept} of {STEPS}" in logs
    done = [event["done"] for event in events if event["event"] == "progress"]
    assert newest(tmp_path) == done[-1] > kept, "what was asked to stop saved where it was"

    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv(RENDEZVOUS, f"localhost:{port}")
    end = threading.Event()
    joining = threading.Thread(target=join.join, args=("localhost", port, end))
    joining.start()
    try:
        code, events = Attempt(tmp_path, inputs, parallel={"nodes": 2}).ended()
    finally:
        end.set()
        joining.join(60)
    assert (code, events[-1]["event"]) == (0, "done")
    assert ranks_of(tmp_path).keys() == {0, 1}
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(STEPS))
    assert (tmp_path / "out" / DRAFTER_FOLDER / "model.safetensors").exists()


def test_bad_input_is_one_error_however_many_read_it(tmp_path: Path, inputs: dict[str, str]) -> None:
    code, events = Attempt(tmp_path, inputs, init_from=str(tmp_path / "nothing"), **TWO).ended()
    errors = [event for event in events if event["event"] == "error"]
    assert (code, len(errors)) == (2, 1)
    assert "nothing" in errors[0]["message"]


def test_ranks_die_with_their_stage(tmp_path: Path, inputs: dict[str, str]) -> None:
    """Of a real stage process whose parent is gone, in whatever way."""
    lifeline, our_end = os.pipe()
    process = start(tmp_path, "draftsmith.stages.sft", {**CONFIG, **TWO}, inputs=inputs, lifeline=lifeline, threads=1)
    os.close(lifeline)

    def begun() -> bool:
        assert process.poll() is None, process.communicate()
        return bool(checkpoints(tmp_path / "work"))

    wait_until(begun, "the first checkpoint", limit_s=180)
    ranks = ranks_of(tmp_path)
    os.close(our_end)
    code, events, _ = finish(process)
    assert code == -signal.SIGKILL
    assert events[-1]["event"] in ("progress", "metrics"), "the first rank reports where the stage does"
    for pid in ranks.values():
        assert_gone(pid)
