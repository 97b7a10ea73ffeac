"""Server processes: how they start, what they inherit, and that nothing of them outlives the stage."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from draftsmith.artifacts.errors import DraftsmithError, RetryableError
from draftsmith.stages.drafters.config import DraftingConfig
from draftsmith.stages.engines.config import SGLangEngineConfig
from draftsmith.stages.engines.open import open_engine
from draftsmith.stages.engines.sglang.client import key_header
from draftsmith.stages.engines.sglang.server import ServerProcess
from tests.flows.pipeline.processes import wait_until
from tests.stages.engines.server_processes import living
from tests.testbed.drafter import DrafterArtifacts

STAND_IN = Path(__file__).with_name("stand_in")
COMMAND = [sys.executable, "-m", "sglang.launch_server"]


def process(folder: Path, mode: str = "serve") -> ServerProcess:
    return ServerProcess(COMMAND, {"PYTHONPATH": str(STAND_IN), "STAND_IN": mode}, folder / "server.log")


def healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.HTTPError:
        return False


def test_a_server_starts_and_stops_with_all_its_processes(tmp_path: Path) -> None:
    server = process(tmp_path)
    server.start()
    wait_until(partial(healthy, server.url), "it answers")
    assert len(living(tmp_path)) >= 3  # itself, its child, the guard of its lifeline
    assert server.ended() is None
    server.stop()
    assert not living(tmp_path)
    server.stop()  # twice is fine


def test_a_server_may_end_by_itself_and_a_stubborn_one_is_killed(tmp_path: Path) -> None:
    polite, stubborn = process(tmp_path / "a", "polite"), process(tmp_path / "b", "stubborn")
    for server in (polite, stubborn):
        server.start()
        wait_until(partial(healthy, server.url), "it answers")
        server.stop(grace_s=2 if server is stubborn else 30)
    assert "said goodbye" in polite.tail()
    assert not living(tmp_path / "a")
    assert not living(tmp_path / "b")


def test_a_server_does_not_inherit_this_interpreters_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/of/the/stage")
    monkeypatch.setenv("PYTHONHOME", "/of/the/stage")
    server = process(tmp_path)
    server.start()
    try:
        wait_until(lambda: '"path"' in server.tail(), "it says what it inherited")
        said = json.loads(server.tail().splitlines()[-1])
        assert (said["path"], said["home"]) == (str(STAND_IN), None)
    finally:
        server.stop(grace_s=0)


def test_the_key_of_a_server_is_in_no_command_line_and_in_no_log(tmp_path: Path) -> None:
    key = "0123456789abcdef" * 4
    server = ServerProcess(
        COMMAND, {"PYTHONPATH": str(STAND_IN), "STAND_IN": "key"}, tmp_path / "server.log", api_key=key
    )
    server.start()
    try:
        wait_until(partial(healthy, server.url), "it answers")
        (file,) = tmp_path.glob("*.yaml")
        assert file.stat().st_mode & 0o777 == 0o600 and key in file.read_text()
        for pid in living(tmp_path):
            assert key not in Path(f"/proc/{pid}/cmdline").read_bytes().decode()
        assert key in server.log_path.read_text()  # as SGLang does, which logs its options
        assert server.log_path.stat().st_mode & 0o777 == 0o600
        assert key not in server.tail() and "api_key='***'" in server.tail()
        assert httpx.get(f"{server.url}/model_info").status_code == 401
        assert httpx.get(f"{server.url}/model_info", headers=key_header(key)).status_code == 200
        server.answers()
        assert not list(tmp_path.glob("*.yaml"))
    finally:
        server.stop(grace_s=0)
    assert key not in server.log_path.read_text() and "api_key='***'" in server.log_path.read_text()


@pytest.mark.parametrize("end", ["SIGKILL", "SIGTERM", "exit", "exception"])
def test_no_process_outlives_whoever_started_it(end: str, tmp_path: Path) -> None:
    program = f"""
        import sys, time, threading
        from pathlib import Path
        from draftsmith.stages.engines.sglang.server import ServerProcess
        server = ServerProcess({COMMAND!r}, {{"PYTHONPATH": {str(STAND_IN)!r}}}, Path({str(tmp_path)!r}) / "server.log")
        server.start()
        print(server.url, flush=True)
        sys.stdin.readline()
        if {end!r} == "exception":
            raise RuntimeError("told to")
    """
    stage = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert stage.stdout is not None and stage.stdin is not None
    url = stage.stdout.readline().strip()
    wait_until(partial(healthy, url), "it answers")
    assert len(living(tmp_path)) >= 3
    if end.startswith("SIG"):
        stage.send_signal(getattr(signal, end))
    else:
        stage.stdin.write("\n")
        stage.stdin.flush()
    stage.wait(30)
    wait_until(lambda: not living(tmp_path), "all have ended")


def open_launched(made: DrafterArtifacts, work: Path, mode: str, logs: list[str], **launch: Any) -> None:
    config = SGLangEngineConfig.model_validate(
        {
            "kind": "sglang",
            "python": sys.executable,
            "launch": {"environment": {"PYTHONPATH": str(STAND_IN), "STAND_IN": mode}, **launch},
        }
    )
    with open_engine(
        config,
        target_folder=made.target,
        drafter_folder=None,
        drafting=DraftingConfig(),
        longest=100,
        work=work,
        log=logs.append,
    ):
        raise AssertionError("it must not open")


def test_a_server_that_ends_while_it_starts_is_one_error_with_its_log(
    tmp_path: Path, tiny_drafter: DrafterArtifacts
) -> None:
    logs: list[str] = []
    with pytest.raises(RetryableError, match="ended with code 1 while it started") as caught:
        open_launched(tiny_drafter, tmp_path, "fail", logs)
    assert str(tmp_path / "servers" / "sglang-0.log") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert any("no CUDA device here" in line for line in logs)
    assert not living(tmp_path / "servers")


def test_a_command_that_sglang_does_not_understand_is_not_worth_a_retry(
    tmp_path: Path, tiny_drafter: DrafterArtifacts
) -> None:
    with pytest.raises(DraftsmithError, match=r"engine\.launch\.options: .*sglang-0\.log") as caught:
        open_launched(tiny_drafter, tmp_path, "refuse", [])
    assert not isinstance(caught.value, RetryableError)


def test_a_server_that_never_answers_is_stopped_at_the_time_limit(
    tmp_path: Path, tiny_drafter: DrafterArtifacts
) -> None:
    with pytest.raises(RetryableError, match=r"gave no answer in 2 s \(engine\.launch\.start_timeout_s\)"):
        open_launched(tiny_drafter, tmp_path, "mute", [], start_timeout_s=2)
    assert not living(tmp_path / "servers")


def test_what_answers_but_is_no_sglang_is_refused_and_stopped(tmp_path: Path, tiny_drafter: DrafterArtifacts) -> None:
    with pytest.raises(DraftsmithError, match="is it a SGLang server"):
        open_launched(tiny_drafter, tmp_path, "serve", [])
    assert not living(tmp_path / "servers")


def test_no_server_at_the_given_addresses_is_one_error(tiny_drafter: DrafterArtifacts, tmp_path: Path) -> None:
    config = SGLangEngineConfig.model_validate({"kind": "sglang", "urls": ["http://127.0.0.1:9", "http://127.0.0.1:9"]})
    with (
        pytest.raises(RetryableError, match=r"http://127\.0\.0\.1:9 cannot be reached"),
        open_engine(
            config,
            target_folder=tiny_drafter.target,
            drafter_folder=None,
            drafting=DraftingConfig(),
            longest=100,
            work=tmp_path,
            log=print,
        ),
    ):
        pass
    assert os.listdir(tmp_path) == []  # noqa: PTH208
