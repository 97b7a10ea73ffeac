"""A raw SGLang server, started without our engine, to test the engine and the plug-in."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from draftsmith.stages.engines.config import Options, OptionValue
from draftsmith.stages.engines.servers.process import ServerProcess, free_ports, option_arguments
from tests.sglang_cpu.options import HERE, Device

START_LIMIT_S = 800.0  # 20 to 120 s on a quiet machine; the tests may share two cores with others
_ROOT = Path(__file__).parents[2]


def sglang_python() -> Path | str:
    """Return the interpreter that has SGLang, or the reason why the tests that need it are skipped."""
    if given := os.environ.get("DRAFTSMITH_SGLANG_PYTHON"):
        python = Path(given)
        return python if python.is_file() else f"DRAFTSMITH_SGLANG_PYTHON: {python} does not exist"
    pythons = sorted(_ROOT.glob(".venv-sglang-cpu-*/bin/python"))
    return pythons[-1] if pythons else "no SGLang here: `make sglang-cpu` builds its environment"


@contextmanager
def running_server(
    python: Path,
    target_model: Path,
    drafter: Path | None = None,
    algorithm: str = "DFLASH",
    options: Mapping[str, OptionValue] | None = None,
    *,
    log: Path,
    environment: Mapping[str, str] | None = None,
    device: Device = HERE,
) -> Iterator[str]:
    """Start a server of this model and yield its URL; it is stopped on exit.

    drafter: a checkpoint's folder, served with `algorithm`. options, environment: added to the device's, as in
    `LaunchConfig`.
    """
    settings: Options = {"dtype": device.dtype, **device.options}
    if drafter is not None:
        settings |= {"speculative-algorithm": algorithm, "speculative-draft-model-path": str(drafter)}
    settings |= options or {}
    command = [str(python), "-m", "sglang.launch_server", "--model-path", str(target_model), "--host", "127.0.0.1"]
    command += option_arguments(settings)
    (port,) = free_ports(1)
    with started(ServerProcess(command, {**device.environment, **(environment or {})}, log, port)) as url:
        served = httpx.get(f"{url}/model_info", timeout=30).json()["model_path"]
        assert served == str(target_model), f"{url} serves {served}, not {target_model}"
        yield url


@contextmanager
def started(process: ServerProcess) -> Iterator[str]:
    """Start a server and yield its URL when it answers; it is stopped on exit, and an error has the end of its log."""
    process.start()
    deadline = time.monotonic() + START_LIMIT_S
    try:
        while not healthy(process.url):
            assert process.ended() is None
            assert time.monotonic() < deadline, f"no answer within {START_LIMIT_S:.0f} s"
            time.sleep(0.25)
        yield process.url
    except BaseException as error:
        error.add_note(f"{process.log_path}, its last lines:\n{process.tail()}")
        raise
    finally:
        process.stop(grace_s=0)  # killed: it has nothing to save, and a graceful end takes seconds


def healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=30, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def generate(url: str, requests: Sequence[Mapping[str, Any]], concurrency: int = 4) -> list[dict[str, Any]]:
    """Return the server's answers to bodies of /generate, in their order, with `concurrency` of them in flight."""
    with httpx.Client(base_url=url, timeout=300) as client, ThreadPoolExecutor(concurrency) as pool:

        def post(body: Mapping[str, Any]) -> dict[str, Any]:
            answer: dict[str, Any] = client.post("/generate", json=body).raise_for_status().json()
            return answer

        return list(pool.map(post, requests))
