"""What a server's plug-in fetches for a request, from where, and what it says if it cannot."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow.exceptions import MlflowException

from draftsmith.stages.engines.servers.drafter_files import read_drafter, reason_of, wanted_drafter
from tests.stages.engines.http_server import HttpServer, serving

RUN = "0123456789abcdef0123456789abcdef"
WANTED: dict[str, Any] = {"drafter": "a" * 64, "folder": "/nonexistent", "upload": f"runs:/{RUN}/drafter"}


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> Iterator[HttpServer]:
    """The MLflow server of a server's environment, which has no run."""
    with serving(lambda _: {}) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
        monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "token-of-the-server")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        yield server


def test_a_request_does_not_choose_the_mlflow_server(mlflow: HttpServer) -> None:
    """Nor does the server's token go anywhere else."""
    with serving(lambda _: {}) as elsewhere:
        wanted = wanted_drafter({**WANTED, "tracking": elsewhere.url, "of a later client": [1]})
        with pytest.raises(MlflowException):
            read_drafter(wanted)
    assert not elsewhere.asked and set(mlflow.keys) == {"Bearer token-of-the-server"}


@pytest.mark.parametrize(
    "upload",
    [
        "http://127.0.0.1:9/drafter", "file:///etc", "s3://bucket/drafter", "mlflow-artifacts:/drafter",
        "dbfs:/drafter", "models:/a-line/1", f"runs:/{RUN}", f"runs:/{RUN}/../other", f"runs://host/{RUN}/drafter",
        f"runs:/{RUN}/drafter http://127.0.0.1:9/drafter",
    ],
)  # fmt: skip
def test_only_files_of_runs_are_fetched(upload: str) -> None:
    with pytest.raises(ValueError, match="upload"):
        wanted_drafter({**WANTED, "upload": upload})


def test_without_an_mlflow_server_nothing_is_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """MLflow's default is a new database in the working directory."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_URI is not set"):
        read_drafter(wanted_drafter(WANTED))
    assert not list(tmp_path.iterdir())


def test_a_refusal_shows_no_password_of_the_server(mlflow: HttpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the answer to a request, and a line of the server's log."""
    mlflow.stop()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow.url.replace("//", "//user:the-password@"))
    with pytest.raises(MlflowException, match="the-password") as error:
        read_drafter(wanted_drafter(WANTED))
    reason = reason_of(error.value)
    assert "the-password" not in reason and "127.0.0.1" in reason
