"""Accelerators that are held at Prefect's server: a wait that is called off, a server that is lost, a lease that is."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from tests.flows.pipeline.processes import beside_server

IMPORTS = """
from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.flows.pipeline import accelerator
from draftsmith.flows.pipeline.accelerator import held
"""
WAITS = textwrap.dedent(
    """
    said, checks = [], []

    class CalledOff(Exception):
        pass

    def check():
        checks.append(len(said))
        if len(checks) == 2:
            raise CalledOff

    with held(print):
        try:
            with held(said.append, check):
                print("held by two")
        except CalledOff:
            print("called off:", *said)
    with held(print, check):
        print("held by the next")
    """
)
# In the place of the server that was lost something answers that is ill, as a proxy in front of it does.
LOSES = textwrap.dedent(
    """
    import atexit, http.server, threading, urllib.parse
    from prefect.concurrency import _leases

    _leases._RENEWAL_FRACTION = _leases._RENEWAL_RETRY_BASE_DELAY = 0.001  # of five minutes; of a second

    class Ill(http.server.BaseHTTPRequestHandler):
        def answer(self):
            self.send_error(502)

        do_GET = do_POST = answer

        def log_message(self, *_):
            pass

    def lose():
        atexit.unregister(server._stop)
        server._stop()
        for thread in threading.enumerate():
            if thread.name.startswith("concurrency-lease-renewal"):
                thread.join()
        ill = http.server.ThreadingHTTPServer(("127.0.0.1", urllib.parse.urlsplit(server.url).port), Ill)
        threading.Thread(target=ill.serve_forever, daemon=True).start()

    def ends(error):
        # a stage on another accelerator
        accelerator.accelerators = lambda: [type(error).__name__]
        try:
            with held(said.append):
                yield
                raise error
        except BaseException as ended:
            print(type(ended).__name__, ended, *said, sep=": ")
        said.clear()
        yield

    said, own = [], accelerator.accelerators
    errors = DraftsmithError("row 3"), KeyboardInterrupt("stop"), SystemExit(143)
    others = [ends(error) for error in errors]
    for other in others:
        next(other)
    accelerator.accelerators = own
    with held(print):
        lose()
        for other in others:
            next(other)
        print("worked to its end")
    try:
        with held(print):
            pass
    except Exception as error:
        print(type(error).__name__, error, sep=": ")
    server.leave(0)
    """
)


pytestmark = pytest.mark.integration


def said(folder: Path, program: str, **variables: str) -> list[str]:
    ended = beside_server(folder / "home", IMPORTS + program, **variables)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.splitlines()


def test_a_wait_is_called_off_by_its_check(tmp_path: Path) -> None:
    called_off, held = said(tmp_path, WAITS)
    assert called_off.startswith("called off: waits for accelerator.") and called_off.count("waits for") == 1
    assert held == "held by the next"


def test_a_stage_ends_as_it_does_though_its_lease_cannot_be_renewed(tmp_path: Path) -> None:
    *ended, worked, released, next_one = said(tmp_path, LOSES, PREFECT_CLIENT_MAX_RETRIES="0")
    lost = "Prefect's server is lost, and does not know yet that accelerator."
    errors = ["DraftsmithError: row 3", "KeyboardInterrupt: stop", "SystemExit: 143"]
    for error, line in zip(errors, ended, strict=True):
        assert line.startswith(f"{error}: {lost}{error.partition(':')[0]} is free")
    assert worked == "worked to its end"
    assert released.startswith(lost)
    assert next_one.startswith("RetryableError: Prefect's server was lost (")
