"""MLflow's client against real HTTP servers: one answers late, one requires a password."""

from __future__ import annotations

import base64
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from draftsmith.artifacts.errors import DraftsmithError, RetryableError
from draftsmith.artifacts.tracking.refresh_runs import RefreshRun
from draftsmith.artifacts.tracking.registry import Registry, note_tracker
from draftsmith.artifacts.tracking.runs import Tracking
from tests.faults.servers import mlflow_server
from tests.testbed.artifacts import fake_artifact

pytestmark = pytest.mark.integration
TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"
ARTIFACTS = "/api/2.0/mlflow-artifacts/artifacts"
EXPERIMENT = {"experiment": {"experiment_id": "1", "name": "draftsmith", "lifecycle_stage": "active"}}
CANARY = "Zk9-marker.7Qx"
LATE_S = 2.0  # longer than the client's usual time-out


@contextmanager
def serving(answer: Callable[[BaseHTTPRequestHandler], tuple[int, bytes]]) -> Iterator[str]:
    """Yield the address of a server. answer: returns status and body of a request."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = answer(self)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_PUT(self) -> None:
            self.do_GET()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_weights_are_uploaded_to_a_server_that_answers_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    monkeypatch.setenv(TIMEOUT, "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    bucket: dict[str, bytes] = {}

    def slow_copy(request: BaseHTTPRequestHandler) -> tuple[int, bytes]:
        url = urlsplit(request.path)
        name = url.path.removeprefix(ARTIFACTS).strip("/")
        if request.command == "PUT":
            bucket[name] = request.rfile.read(int(request.headers["Content-Length"]))
            time.sleep(LATE_S)
            return 200, b"{}"
        if name:
            time.sleep(LATE_S)
            return 200, bucket[name]
        (folder,) = parse_qs(url.query)["path"]
        inside = [each.removeprefix(f"{folder}/") for each in bucket if each.startswith(f"{folder}/")]
        return 200, json.dumps({"files": [{"path": each, "is_dir": False} for each in inside]}).encode()

    made = fake_artifact("opd", "1" * 64, "2" * 64, tmp_path / "made")
    (made.path / "drafter").mkdir(parents=True)
    (made.path / "drafter" / "model.safetensors").write_bytes(b"weights" * 1000)
    tracking = Tracking(tmp_path / "home", "weekly")
    with serving(slow_copy) as address:
        client, _ = Tracking(tmp_path / "home", "another").connect()
        client.create_experiment("weekly", artifact_location=f"{address}{ARTIFACTS}/1")
        registry = Registry(tracking)
        version = registry.register("a-line", made, {})
        refresh = RefreshRun(tracking, "night", {})
        registry.upload(version, made.path / "drafter", refresh.open())
        shutil.rmtree(made.path)
        fetched = registry.download(registry.version("a-line", 1), tmp_path)
        refresh.close("FINISHED")
    assert (fetched / "model.safetensors").read_bytes() == b"weights" * 1000
    assert os.environ[TIMEOUT] == "1", "the time-out is restored"


@pytest.fixture
def password_server() -> Iterator[str]:
    """Host and port of a server that answers the requests of a check, for one user."""
    expected = "Basic " + base64.b64encode(b"team:hunter/2").decode()

    def answer(request: BaseHTTPRequestHandler) -> tuple[int, bytes]:
        if request.headers["Authorization"] != expected:
            return 401, b"who are you?"
        return 200, json.dumps(EXPERIMENT).encode() if "/experiments/" in request.path else b"{}"

    with serving(answer) as address:
        yield address.removeprefix("http://")


def test_user_and_password_are_sent_to_the_server_and_never_shown(
    password_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MLFLOW_EXPERIMENT_NAME", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://team:hunter%2F2@{password_server}")
    Tracking(tmp_path).check()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://team:hunter3@{password_server}")
    message = r"MLFLOW_TRACKING_URI http://127.*401.*who are you.*Correct user and password"
    with pytest.raises(DraftsmithError, match=message) as refused:
        Tracking(tmp_path).check()
    assert not isinstance(refused.value, RetryableError)
    assert "hunter" not in str(refused.value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://team:hunter3@127.0.0.1:1")
    with pytest.raises(RetryableError, match=r"MLFLOW_TRACKING_URI http://127\S+: \[Errno 111\] Conn") as absent:
        Tracking(tmp_path).check()
    assert "hunter" not in str(absent.value)


def test_the_password_in_an_address_is_nowhere_but_in_requests(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """With a real server: neither on the screen, nor in logs and errors, nor in what is stored."""
    made = fake_artifact("opd", "1" * 64, "2" * 64, tmp_path / "made")
    (made.path / "drafter").mkdir(parents=True)
    (made.path / "drafter" / "config.json").write_text("{}")
    (tmp_path / "server").mkdir()
    said: list[str] = []
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with mlflow_server(tmp_path / "server") as server:
        address = server.url.replace("//", f"//anna:{CANARY}@")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        tracking = Tracking(tmp_path / "home", "weekly")
        tracking.check()
        note_tracker(tracking)
        refresh = RefreshRun(tracking, "night", {"address": address})
        run_id = refresh.open()
        run = tracking.stage_run(run_id, "sft", "3" * 64)
        run.metrics(1, {"loss": 1.0})
        run.close("FINISHED")
        lines = Registry(tracking)
        version = lines.register("a-line", made, {})
        lines.upload(version, made.path / "drafter", run_id)
        lines.promote(lines.version("a-line", 1), expected=None, why="better")
        said += [tracking.link(run_id), tracking.ui_command, str(lines.unknown_line("b"))]
        refresh.close("FINISHED")
        lost = Tracking(tmp_path / "home", "weekly")
    for ask in (lost.check, lambda: lines.champion("a-line"), lambda: lines.upload(version, made.path, run_id)):
        with pytest.raises(DraftsmithError) as refused:
            ask()
        said.append(str(refused.value))
    RefreshRun(lost, "night", {}).open()  # a warning
    output = capfd.readouterr()
    texts = {"out": output.out, "err": output.err, "log": caplog.text, "said": "\n".join(said)}
    files = {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert server.url.partition("//")[2] in texts["said"] and any(path.endswith("server.db") for path in files)
    assert [(name, line) for name, text in texts.items() for line in text.splitlines() if CANARY in line] == []
    assert [name for name, content in files.items() if CANARY.encode() in content] == []
