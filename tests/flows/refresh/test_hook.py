"""What is called after a promotion: a command, or a URL."""

from __future__ import annotations

import http.server
import json
import sys
import threading
from pathlib import Path

import pytest
from pydantic import ValidationError

from draftsmith.flows.refresh.hook import HookConfig, call

DECISION = {"line": "tiny", "version": 3, "promote": True}


def test_a_command_reads_the_decision(tmp_path: Path) -> None:
    code = "import sys; open(sys.argv[1], 'w').write(sys.stdin.read())"
    hook = HookConfig(command=(sys.executable, "-c", code, str(tmp_path / "told")))
    assert call(hook, DECISION) is None
    assert json.loads((tmp_path / "told").read_text()) == DECISION


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("no-such-command",), "no-such-command: "),
        ((sys.executable, "-c", "raise SystemExit('no server')"), "ended with code 1 (no server)"),
        ((sys.executable, "-c", "import time; time.sleep(9)"), "timed out"),
        (("sh", "-c", "printf '\\351t\\351' >&2; exit 3"), "ended with code 3 (\ufffdt\ufffd)"),  # Latin-1
    ],
)
def test_a_command_that_fails_says_why(command: tuple[str, ...], said: str) -> None:
    assert said in str(call(HookConfig(command=command, timeout_s=1), DECISION))


def test_a_url_is_posted_the_decision() -> None:
    told: list[bytes] = []

    class Receiver(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            told.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(204 if self.path == "/ok" else 500)
            self.end_headers()

        def log_message(self, *_arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert call(HookConfig(url=f"{url}/ok"), DECISION) is None
        assert json.loads(told[0]) == DECISION
        assert call(HookConfig(url=f"{url}/broken"), DECISION) == f"{url}/broken: HTTP 500"
        server.shutdown()
    assert "ConnectError" in str(call(HookConfig(url="http://127.0.0.1:9/x"), DECISION))


def test_a_hook_is_one_of_both() -> None:
    for fields in ({}, {"command": ("a",), "url": "http://a"}, {"command": ()}, {"url": "ftp://a"}):
        with pytest.raises(ValidationError):
            HookConfig.model_validate(fields)
