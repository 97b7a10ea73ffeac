"""Server processes: start, environment, API key, and an end together with the stage."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import httpx
import pytest

from draftsmith.stages.engines.config import SGLangLaunchConfig
from draftsmith.stages.engines.servers.http import key_header
from draftsmith.stages.engines.servers.process import ServerProcess, free_ports, server_processes
from draftsmith.stages.engines.sglang.server import cuda_environment as variables_on_cuda
from draftsmith.stages.runtime.process import use_expandable_segments
from tests.flows.processes import ROOT, wait_until
from tests.sglang_cpu.server import healthy
from tests.stages.engines.sglang.test_environment import cuda_environment, program
from tests.stages.engines.stand_ins import STAND_IN, living

COMMAND = [sys.executable, "-m", "sglang.launch_server"]


def process(folder: Path, mode: str = "serve", api_key: str | None = None) -> ServerProcess:
    (port,) = free_ports(1)
    return ServerProcess(COMMAND, {"PYTHONPATH": STAND_IN, "STAND_IN": mode}, folder / "server.log", port, api_key)


def test_a_server_may_end_gracefully_and_is_killed_otherwise(tmp_path: Path) -> None:
    polite, stubborn = process(tmp_path / "a", "polite"), process(tmp_path / "b", "stubborn")
    for server in (polite, stubborn):
        server.start()
        wait_until(partial(healthy, server.url), "it answers")
        server.stop(grace_s=2 if server is stubborn else 30)
    assert "said goodbye" in polite.tail()
    assert not living(tmp_path / "a")
    assert not living(tmp_path / "b")


def test_a_server_inherits_neither_packages_nor_allocator_of_the_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.delitem(os.environ, "PYTORCH_ALLOC_CONF", raising=False)
    use_expandable_segments()
    assert os.environ["PYTORCH_ALLOC_CONF"]
    monkeypatch.setitem(os.environ, "PYTHONPATH", "/of/the/stage")
    monkeypatch.setitem(os.environ, "PYTHONHOME", "/of/the/stage")
    server = process(tmp_path)
    server.start()
    try:
        wait_until(lambda: '"path"' in server.tail(), "it says what it inherited")
        said = json.loads(server.tail().splitlines()[-1])
        assert (said["path"], said["home"], said["allocator"]) == (STAND_IN, None, None)
    finally:
        server.stop(grace_s=0)


def test_a_server_on_cuda_finds_the_build_tools_of_its_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = program(
        cuda_environment(tmp_path / "env"),
        'ninja; "$CUDA_HOME/bin/nvcc"; c++; test -e "$LIBRARY_PATH/libcudart.so" && echo it links',
    )
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    launch = SGLangLaunchConfig.model_validate({})
    variables = variables_on_cuda(python, launch, tmp_path / "cuda")
    (server,) = server_processes(launch, [str(python)], variables, tmp_path / "logs" / "sglang.log")
    server.start()
    wait_until(lambda: server.ended() is not None, "it ends")
    server.stop(grace_s=0)
    tools = [f"{tool} of the environment" for tool in ("ninja", "nvcc", "c++")]
    assert server.tail().splitlines()[-4:] == [*tools, "it links"]


def test_the_key_of_a_server_is_in_no_command_line_and_in_no_log(tmp_path: Path) -> None:
    key = "0123456789abcdef" * 4
    server = process(tmp_path, "key", key)
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
        server.remove_key_file()
        assert not list(tmp_path.glob("*.yaml"))
    finally:
        server.stop(grace_s=0)
    assert key not in server.log_path.read_text() and "api_key='***'" in server.log_path.read_text()


@pytest.mark.parametrize("end", ["SIGKILL", "SIGTERM", "exit", "exception"])
def test_no_process_outlives_whoever_started_it(end: str, tmp_path: Path) -> None:
    program = f"""
        import sys, time, threading
        from pathlib import Path
        from tests.stages.engines.servers.test_process import process
        server = process(Path({str(tmp_path)!r}))
        server.start()
        print(server.url, flush=True)
        sys.stdin.readline()
        if {end!r} == "exception":
            raise RuntimeError("told to")
    """
    stage = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=ROOT,
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
    stage.wait(120)
    wait_until(lambda: not living(tmp_path), "all have ended")
