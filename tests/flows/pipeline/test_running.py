"""`draftsmith status` says who makes an artifact, where, since when, and how far it is."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest
from rich.console import Console

from draftsmith.artifacts.store import Claim, Store
from draftsmith.flows.pipeline.display import Display
from draftsmith.flows.pipeline.graph import plan
from draftsmith.flows.pipeline.inspection import status_of_config
from draftsmith.flows.pipeline.running import RunningNote
from tests.flows.pipeline.toy import TOY, ToyConfig


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
