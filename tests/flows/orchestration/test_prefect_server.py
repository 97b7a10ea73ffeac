"""Prefect's temporary server: a damaged database, a slow start."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from draftsmith.artifacts.errors import EXIT_RETRYABLE, RetryableError
from draftsmith.flows.orchestration import server
from tests.flows.processes import processes_of, run_toy
from tests.flows.toy import write_config


@pytest.mark.integration
def test_a_damaged_database_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    home, config = tmp_path / "home", write_config(tmp_path / "toy.yaml")
    database = home / "prefect" / "prefect.db"
    database.parent.mkdir(parents=True)
    database.write_bytes(b"no database" * 1000)
    ended = run_toy(home, "refresh", config)
    assert ended.returncode == 2, ended.stderr
    assert f"{database} away" in ended.stderr
    assert not processes_of(home)


def test_a_server_that_starts_too_slowly_is_a_retryable_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_START_LIMIT_S", 0.5)
    monkeypatch.setattr(server, "_NOTICE_AFTER_S", 0.2)
    notices: list[str] = []
    with subprocess.Popen(["sleep", "60"]) as slow:
        with pytest.raises(RetryableError, match="did not start within") as caught:
            server._wait_until_healthy(slow, "http://127.0.0.1:9/api", tmp_path / "server.log", notices.append)
        slow.kill()
    assert len(notices) == 1 and notices[0].startswith("waiting for Prefect's server")
    assert caught.value.exit_code == EXIT_RETRYABLE
