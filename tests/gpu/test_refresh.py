"""`python -m tests.gpu.refresh` in tiny shapes: every stage is a process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.gpu import refresh

pytestmark = pytest.mark.integration
STAGES = ["target", "prompts", "rollout", "sft"]  # more of them would show no more


def test_every_stage_is_measured_and_a_second_command_reuses_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DRAFTSMITH_HOME", "")  # which the command sets: restored after the test
    monkeypatch.setattr(refresh, "LAST", STAGES[-1])
    refresh.main(["tiny", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "refresh-tiny.json").read_text())["rows"]
    assert [row["stage"] for row in rows] == STAGES
    shown = capsys.readouterr().out
    for row in rows:
        assert row["stage"] in shown and row["content"] in shown
        assert row["peak_gb"] > 0
        if row["stage"] not in ("target", "prompts"):
            assert row["peak_of_estimate"] == pytest.approx(1, abs=0.5)  # nearly all of it is the process
    assert all(row["tokens_per_s"] > 0 for row in rows if row["stage"] in ("rollout", "sft"))
    logs = set((tmp_path / "tiny" / "logs").iterdir())
    refresh.main(["tiny", "--out", str(tmp_path)])
    assert json.loads((tmp_path / "refresh-tiny.json").read_text())["rows"] == rows
    assert set((tmp_path / "tiny" / "logs").iterdir()) == logs
