"""Prefect's servers: a damaged database, one that does not answer, a slow start."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from draftsmith.artifacts.errors import EXIT_RETRYABLE, DraftsmithError, RetryableError
from draftsmith.flows.orchestration import server
from tests.flows.processes import processes_of


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo what is set for Prefect, which this process has imported with other settings."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(server, "_temporary", {})


@pytest.mark.integration
def test_a_damaged_database_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    database = tmp_path / "prefect" / "prefect.db"
    database.parent.mkdir(parents=True)
    database.write_bytes(b"no database" * 1000)
    with pytest.raises(DraftsmithError, match=f"{database} away") as caught:
        server.start_prefect_server(tmp_path)(print)
    assert caught.value.exit_code == 2
    assert not processes_of(tmp_path)


def test_a_server_that_does_not_answer_is_a_retryable_error(tmp_path: Path) -> None:
    from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    os.environ["PREFECT_API_URL"] = url = "http://127.0.0.1:9/api"
    settings = {PREFECT_API_URL: url, PREFECT_CLIENT_MAX_RETRIES: 0}  # as if imported with this environment
    with temporary_settings(settings), pytest.raises(RetryableError, match=f"PREFECT_API_URL: {url}") as caught:
        server.start_prefect_server(tmp_path)(print)
    assert caught.value.exit_code == EXIT_RETRYABLE


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
