"""`draftsmith status` says who makes an artifact, where, since when, and how far it is."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest
from rich.console import Console

from draftsmith.artifacts.errors import StageInterrupted
from draftsmith.artifacts.store import Claim, Store
from draftsmith.artifacts.tracking import Tracking
from draftsmith.flows.pipeline import devices
from draftsmith.flows.pipeline.display import Display
from draftsmith.flows.pipeline.graph import plan
from draftsmith.flows.pipeline.inspection import status_of_config, status_of_store
from draftsmith.flows.pipeline.node import Workshop, make
from draftsmith.flows.pipeline.running import RunningNote
from draftsmith.stages.contract import Compute
from tests.flows.pipeline.toy import TOY, ToyConfig, toy_nodes


def test_a_running_node_is_told_with_its_process_and_its_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRAFTSMITH_HOME", str(tmp_path))
    monkeypatch.setattr("draftsmith.flows.pipeline.running._EVERY_S", 0.0)
    config, store = ToyConfig(name="t"), Store(tmp_path / "store")
    key = plan(config, store, TOY)[0].key
    assert key is not None

    def status() -> str:
        console = Console(width=400, record=True)
        status_of_config(Display(console), config, TOY)
        return console.export_text()

    with store.claim("collect", key) as claim:
        assert isinstance(claim, Claim)
        note = RunningNote(tmp_path / "logs", "collect", key, "t", "target")
        note.progress(1, 5, "numbers")
        assert f"running: node target of t on {platform.node()} (pid {os.getpid()}, user " in status()
        assert ", 1/5 numbers, said " in status()
    assert "running" not in status()  # a process that was killed leaves its note, and no lock
    note.close()
    assert not list((tmp_path / "logs").iterdir())


def test_a_node_that_waits_for_a_device_does_not_run_yet(
    tmp_path: Path, tracking: Tracking, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRAFTSMITH_HOME", str(tmp_path))
    monkeypatch.setenv(devices.FOLDER, str(tmp_path / "devices"))
    monkeypatch.setattr("draftsmith.flows.pipeline.devices.gpu_names", list)
    config = ToyConfig(name="t")

    def status(of_store: bool = False) -> str:
        console = Console(width=400, record=True)
        status_of_store(Display(console)) if of_store else status_of_config(Display(console), config, TOY)
        return console.export_text()

    seen: list[str] = []

    def look() -> None:
        if not (seen and "waits for the device" in seen[-1]):
            seen.append(status())
            return
        raise StageInterrupted("that is enough")

    workshop = Workshop(tmp_path, config, TOY, Display(), tracking, check=look)
    target = next(node for node in toy_nodes(config) if node.name == "target")
    with (
        devices.devices_of(Compute.TIMED, run="", limit_s=1, waiting=lambda *_: None),
        pytest.raises(StageInterrupted),
    ):
        make(workshop, target, {})
    assert "waiting: node target of t on" in seen[-1]
    assert ", waits for the device cpu, which is in use by another run" in seen[-1]
    assert "to do" in status().splitlines()[1], "it has saved nothing"
    assert "unfinished, nothing is saved yet" in status(of_store=True)
