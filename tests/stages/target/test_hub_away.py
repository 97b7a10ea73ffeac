"""A hub that answers 503 or too late gives a retryable error; a refusal does not."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest


class _Hub(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if "hangs" in self.path:
            time.sleep(4)
        status = 404 if "absent" in self.path else 503
        self.send_response(status)
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


PROGRAM = textwrap.dedent(
    """
    import sys
    import time
    from pathlib import Path

    time.sleep = lambda _seconds: None  # the hub's library has a back-off of its own

    from draftsmith.artifacts.errors import DraftsmithError
    from draftsmith.stages.drafters.checkpoint import drafter_source
    from draftsmith.stages.data.prompts import HuggingFaceSource
    from draftsmith.stages.data.prompt_streams import load_rows
    from draftsmith.stages.target.config import TargetConfig
    from draftsmith.stages.target.resolve import resolve_target

    for name in ("org/ill", "org/hangs", "org/absent"):
        rows = HuggingFaceSource.model_validate({"kind": "huggingface", "id": name, "split": "train", "field": "x"})
        fetches = [
            lambda: resolve_target(TargetConfig(source=name), Path(sys.argv[1]), print),
            lambda: drafter_source(name, None),
            lambda: load_rows(rows),
        ]
        for fetch in fetches[: 2 if name == "org/hangs" else 3]:
            try:
                fetch()
            except DraftsmithError as error:
                print(name, type(error).__name__)
    """
)


def test_a_failing_or_slow_hub_is_retryable_and_a_refusal_is_not(tmp_path: Path, hub: str) -> None:
    told = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "http", "HTTP"))}
    limits = {"HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment = {**told, **limits, "HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        *["org/ill RetryableError"] * 3,
        *["org/hangs RetryableError"] * 2,
        *["org/absent DraftsmithError"] * 3,
    ]
