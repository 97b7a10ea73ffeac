"""Prefect's servers: the password of the temporary one, a damaged database, one that does not answer, a slow start."""

from __future__ import annotations

import os
import subprocess
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from draftsmith.artifacts.errors import EXIT_RETRYABLE, DraftsmithError, RetryableError
from draftsmith.flows.orchestration import server
from tests.flows.processes import processes_of, toy_command, wait_until
from tests.flows.toy import write_config


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo what is set for Prefect, which this process has imported with other settings."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(server, "_temporary", {})


@pytest.mark.integration
def test_other_users_of_the_machine_cannot_use_a_runs_temporary_server(tmp_path: Path) -> None:
    home, started = tmp_path / "home", tmp_path / "started"
    config = write_config(tmp_path / "toy.yaml", target={"seconds_each": 1, "note_start": str(started)})
    with toy_command(home, "run", config) as run:
        wait_until(started.exists, "the first stage has started", limit_s=180)
        processes = [Path(f"/proc/{pid}") for pid in processes_of(home)]
        environments = [
            dict(v.split("=", 1) for v in p.joinpath("environ").read_text().split("\0") if v) for p in processes
        ]
        (url,) = {e["PREFECT_API_URL"] for e in environments if "PREFECT_API_URL" in e}
        (user,) = {e["PREFECT_API_AUTH_STRING"] for e in environments if "PREFECT_API_AUTH_STRING" in e}
        arguments = "".join(process.joinpath("cmdline").read_text() for process in processes)
        for path, body in (("admin/version", None), ("variables/", b'{"name": "a", "value": 1}')):
            request = urllib.request.Request(f"{url}/{path}", body, {"Content-Type": "application/json"})
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(request, timeout=30)
        out, err = run.communicate(timeout=600)
    assert run.returncode == 0, err
    password = user.partition(":")[2]
    assert len(password) > 30 and password not in arguments + out + err
    assert not [path for path in home.rglob("*") if path.is_file() and password.encode() in path.read_bytes()]


@pytest.mark.integration
def test_a_damaged_database_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    database = tmp_path / "prefect" / "prefect.db"
    database.parent.mkdir(parents=True)
    database.write_bytes(b"no database" * 1000)
    with pytest.raises(DraftsmithError, match=f"{database} away") as caught, server.prefect_server(tmp_path) as wait:
        wait(print)
    assert caught.value.exit_code == 2
    assert not processes_of(tmp_path)


@pytest.mark.integration
def test_an_error_of_the_plan_does_not_wait_for_the_server(tmp_path: Path) -> None:
    with pytest.raises(DraftsmithError, match="no such node"), server.prefect_server(tmp_path):
        raise DraftsmithError("no such node")
    (started,) = server._temporary.values()
    assert started.ended() is not None


def test_a_server_that_does_not_answer_is_a_retryable_error(tmp_path: Path) -> None:
    from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    os.environ["PREFECT_API_URL"] = url = "http://127.0.0.1:9/api"
    settings = {PREFECT_API_URL: url, PREFECT_CLIENT_MAX_RETRIES: 0}  # as if imported with this environment
    refused = pytest.raises(RetryableError, match=f"PREFECT_API_URL: {url}")
    with temporary_settings(settings), refused as caught, server.prefect_server(tmp_path) as wait:
        wait(print)
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
