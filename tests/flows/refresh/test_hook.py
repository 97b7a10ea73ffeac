"""What is called after a promotion: a command, or a URL."""

from __future__ import annotations

import http.server
import json
import os
import re
import stat
import sys
import threading
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from draftsmith.artifacts.home import private_files
from draftsmith.artifacts.locks import Lock
from draftsmith.artifacts.manifest import ArtifactRef
from draftsmith.artifacts.store import Store
from draftsmith.flows.pipeline.display import Display
from draftsmith.flows.pipeline.graph import Conclusion
from draftsmith.flows.refresh import commands, hook
from draftsmith.flows.refresh.course import RefreshCourse, resolve
from draftsmith.flows.refresh.hook import HookConfig, call
from draftsmith.flows.refresh.line import registry
from tests.flows.refresh.made import checked, config_of, gated

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


def test_a_command_may_leave_a_server_in_the_background() -> None:
    assert call(HookConfig(command=("sh", "-c", "sleep 9 & exit 0"), timeout_s=2), DECISION) is None


def test_what_a_command_makes_has_the_modes_that_its_user_gives(tmp_path: Path) -> None:
    """The home's files are for its owner alone; a drafter that a hook copies to a server is not."""
    before = os.umask(0o022)
    try:
        with private_files(tmp_path / "home"):
            assert call(HookConfig(command=("touch", str(tmp_path / "copied"))), DECISION) is None
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "copied").stat().st_mode) == 0o644


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


def test_a_hook_exports_the_drafter_that_it_is_called_for(
    line: str, home: Path, drafters: list[ArtifactRef], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By its name alone, which is the champion's already, or by what it is told."""
    config, told = config_of(line, on_promote={"command": ["true"]}), list[dict[str, Any]]()

    def deployment(_hook: HookConfig, said: dict[str, Any]) -> None:
        told.append(said)
        commands.export(Display(), line, tmp_path / "exported", dry_run=False)

    monkeypatch.setattr(hook, "call", deployment)
    RefreshCourse(resolve(config), ()).finish(gated(Store(home / "store"), drafters[0]), None)
    assert [(said["line"], said["version"], said["promote"]) for said in told] == [(line, 1, True)]
    assert told[0]["source"] == drafters[0].uri and {"outcome", "challenger", "sentence", "rules"} <= told[0].keys()
    for file in (drafters[0].path / "drafter").iterdir():
        assert (tmp_path / "exported" / file.name).read_bytes() == file.read_bytes()


def test_what_a_hook_rolls_back_is_not_promoted_by_a_launcher_that_waited_for_it(
    line: str, home: Path, drafters: list[ArtifactRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, config = Store(home / "store"), config_of(line, on_promote={"command": ["true"]})
    RefreshCourse(resolve(config_of(line)), ()).finish(gated(store, drafters[0]), None)
    made, waits, ended = gated(store, drafters[1]), threading.Event(), list[Conclusion | None]()
    fast, slow = (RefreshCourse(resolve(config), ()) for _ in range(2))
    waiter, alone = threading.Thread(target=lambda: ended.append(slow.finish(made, None))), slow._telling.alone
    told: list[int] = []

    def smoke_test(_hook: HookConfig, said: dict[str, Any]) -> None:
        told.append(said["version"])
        waiter.start()
        assert waits.wait(30)
        commands.rollback(Display(), line, "it accepts nothing", dry_run=False)

    def waiting() -> AbstractContextManager[Lock]:
        waits.set()
        return alone()

    monkeypatch.setattr(hook, "call", smoke_test)
    monkeypatch.setattr(slow._telling, "alone", waiting)
    fast.finish(made, None)
    waiter.join()
    (refused,) = ended
    assert refused is not None and refused.name == "Refused" and "(it accepts nothing)" in refused.message
    champion = registry().champion(line)
    assert champion is not None and (champion.number, told) == (1, [2])


def test_a_hook_is_called_once_over_homes_that_share_mlflow(
    line: str, home: Path, drafters: list[ArtifactRef], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the one home's is at work, another comes to its drift check, and to the same promotion: no lock is common
    to them."""
    config = config_of(line, on_promote={"command": ["true"]})
    fast, slow = (RefreshCourse(resolve(config), ()) for _ in range(2))
    made, told, ended = gated(Store(home / "store"), drafters[0]), list[int](), list[Conclusion | None]()

    def at_work(_hook: HookConfig, said: dict[str, Any]) -> None:
        told.append(said["version"])
        if len(told) == 1:
            with monkeypatch.context() as elsewhere:
                elsewhere.setenv("DRAFTSMITH_HOME", str(tmp_path / "other"))
                RefreshCourse(resolve(config), ()).stop(*checked(resolve(config), home))
                ended.append(slow.finish(made, None))

    monkeypatch.setattr(hook, "call", at_work)
    ended.append(fast.finish(made, None))
    beside, first = (each.message.rpartition("; ")[2] for each in ended if each is not None)
    assert re.fullmatch(rf"on_promote is being called by \S+:{home} since \S+", beside)
    assert (first, told) == ("on_promote was called", [1])
    (version,) = registry().versions(line)
    assert version.tags["on_promote"] == "called"

    lost = "calling: elsewhere:/home since 2020-01-01T00:00:00+00:00"
    for says, called in ((lost.replace("2020", "2120"), 1), (lost, 2), ("called", 2)):
        registry().tag(version, {"on_promote": says})
        RefreshCourse(resolve(config), ()).stop(*checked(resolve(config), home))
        assert len(told) == called, "a run elsewhere that has not ended when a hook has long had its time is dead"
