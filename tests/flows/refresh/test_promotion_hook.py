"""The command after a promotion."""

from __future__ import annotations

import stat
import sys
from pathlib import Path
from typing import Any

import pytest

from draftsmith.artifacts.home import home_umask
from draftsmith.artifacts.store.local import Store
from draftsmith.artifacts.store.manifest import ArtifactRef
from draftsmith.flows.execution.display import Display
from draftsmith.flows.refresh import decisions, registry_commands
from draftsmith.flows.refresh.config import HookConfig
from draftsmith.flows.refresh.decisions import call_hook
from tests.flows.refresh.line_runs import config_of, finished, gated

DECISION = {"line": "tiny", "version": 3, "promote": True}


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ((sys.executable, "-c", "raise SystemExit('no server')"), "ended with code 1 (no server)"),
        ((sys.executable, "-c", "import time; time.sleep(9)"), "timed out"),
        (("sh", "-c", "printf '\\351t\\351' >&2; exit 3"), "ended with code 3 (\ufffdt\ufffd)"),  # Latin-1
    ],
)
def test_a_failed_command_returns_its_reason(command: tuple[str, ...], reason: str) -> None:
    assert reason in str(call_hook(HookConfig(command=command, timeout_s=1), DECISION))


def test_a_command_may_leave_a_server_in_the_background() -> None:
    assert call_hook(HookConfig(command=("sh", "-c", "sleep 9 & exit 0"), timeout_s=2), DECISION) is None


@pytest.mark.usefixtures("usual_umask")
def test_files_of_a_command_have_the_users_permissions(tmp_path: Path) -> None:
    """The home's files are private, but a drafter that a hook copies to a server is not."""
    with home_umask(tmp_path / "home"):
        assert call_hook(HookConfig(command=("touch", str(tmp_path / "copied"))), DECISION) is None
    assert stat.S_IMODE((tmp_path / "copied").stat().st_mode) == 0o644


def test_a_hook_can_export_the_new_champion_by_name(
    line: str, home: Path, drafters: list[ArtifactRef], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = config_of(line, on_promote={"command": ["true"]})

    def deployment(_hook: HookConfig, _decision: dict[str, Any]) -> None:
        registry_commands.export(Display(), line, tmp_path / "exported")

    monkeypatch.setattr(decisions, "call_hook", deployment)
    finished(config, gated(Store(home / "store"), drafters[0]))
    for file in (drafters[0].path / "drafter").iterdir():
        assert (tmp_path / "exported" / file.name).read_bytes() == file.read_bytes()
