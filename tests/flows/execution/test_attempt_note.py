"""`draftsmith status` shows who builds an artifact, where, since when, and its progress."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest
from rich.console import Console

from draftsmith.artifacts.store.local import Claim, Store
from draftsmith.flows.cli.main import main
from draftsmith.flows.cli.status import show_config_status
from draftsmith.flows.execution import attempt_note
from draftsmith.flows.execution.attempt_note import AttemptNote
from draftsmith.flows.execution.display import Display
from draftsmith.flows.planning.graph import plan
from tests.flows.toy import TOY, ToyConfig, write_config


def test_a_running_node_is_shown_with_its_process_and_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRAFTSMITH_HOME", str(tmp_path))
    monkeypatch.setattr(attempt_note, "_EVERY_S", 0.0)
    config, store = ToyConfig(name="t"), Store(tmp_path / "store")
    key = plan(config, store, TOY)[0].key
    assert key is not None

    def status() -> str:
        console = Console(width=400, record=True)
        show_config_status(Display(console), config, TOY)
        return console.export_text()

    with store.claim("collect", key) as claim:
        assert isinstance(claim, Claim)
        note = AttemptNote(claim.out.parent, "t", "target")
        note.progress(1, 5, "numbers")
        assert f"running: node target of t on {platform.node()} (pid {os.getpid()}, user " in status()
        assert ", 1/5 numbers, " in status()
    assert "to do" in status().splitlines()[1], "a process that was killed leaves its note, and no lock"
    note.failed(ValueError("the matrix is\nsingular"))
    assert "failed" in status() and "the matrix is singular" in status()
    (claim.out.parent / attempt_note.NOTE).write_text('{"run": ')
    assert "failed" not in status()


@pytest.mark.usefixtures("home")
def test_an_unbuilt_node_is_shown_with_its_last_artifact(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a promotion the plan starts from the new champion; the last artifacts are still shown."""
    monkeypatch.setenv("COLUMNS", "300")
    config = str(write_config(tmp_path / "toy.yaml", target={"count": 3}))
    for node in ("target", "left"):
        assert main(["stage", node, config], TOY) == 0

    def status(*options: str) -> dict[str, list[str]]:
        capsys.readouterr()
        assert main(["status", config, *options], TOY) == 0
        return {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line.strip()}

    made = status()
    assert made["target"][-1] == made["left"][-1] == "done"
    anew = status("--set", "target.count=4")
    assert " ".join(anew["target"]).endswith(f"to do; last time collect/{made['target'][2]}")
    assert " ".join(anew["left"]).endswith(f"waits for target; last time combine/{made['left'][2]}")
