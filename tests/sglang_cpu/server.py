"""A raw SGLang server, started without our engine, to test the engine and the plug-in."""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from draftsmith.stages.engines.config import OptionValue
from draftsmith.stages.runtime.child_process import ChildProcess
from tests.sglang_cpu.options import HERE, Device

START_LIMIT_S = 400.0  # 20 to 50 s on a quiet machine; the tests may share two cores with others
_POLL_S = 0.25
_PORTS = range(24000, 24100)  # below the kernel's ephemeral range
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
    `LaunchConfig`. An error during the start or in the body of the `with` shows the end of the log.
    """
    settings: dict[str, OptionValue] = {"dtype": device.dtype, **device.options}
    if drafter is not None:
        settings |= {"speculative-algorithm": algorithm, "speculative-draft-model-path": str(drafter)}
    settings |= options or {}
    command = [str(python), "-m", "sglang.launch_server", "--model-path", str(target_model), "--host", "127.0.0.1"]
    for name, value in settings.items():
        if value is not False:
            command += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    try:
        added = {**device.environment, **(environment or {})}
        with reserved_port() as port, _process([*command, "--port", str(port)], added, log) as process:
            url = f"http://127.0.0.1:{port}"
            _wait(process, url, target_model)
            yield url
    except BaseException as error:
        error.add_note(f"{log}, its last lines:\n{tail(log)}")
        raise


@contextmanager
def reserved_port() -> Iterator[int]:
    """Yield a port that no other test of this user takes meanwhile: SGLang binds it only after loading its model."""
    for port in _PORTS:
        with (Path(tempfile.gettempdir()) / f"draftsmith-test-port-{os.getuid()}-{port}").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released by the kernel when this process dies
                with socket.socket() as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind(("127.0.0.1", port))
            except OSError:  # another test's, or another program's
                continue
            yield port
            return
    raise RuntimeError(f"no free port in {_PORTS}")


@contextmanager
def _process(command: Sequence[str], environment: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run the server, which also dies when the test process is killed."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    with log.open("ab") as output:
        child = ChildProcess(
            command,
            environment={**inherited, "PYTHONUNBUFFERED": "1", **environment},
            stdout=output,
            stderr=output,
            folder=log.parent,
        )
    try:
        yield child.process
    finally:
        child.end()  # killed: it has nothing to save, and a graceful end takes seconds


def _wait(process: subprocess.Popen[bytes], url: str, model: Path) -> None:
    """Wait until the server of this model answers. AssertionError if it ends, serves another model, or is too slow."""
    import httpx

    deadline = time.monotonic() + START_LIMIT_S
    while process.poll() is None:
        assert time.monotonic() < deadline, f"no answer within {START_LIMIT_S:.0f} s"
        with suppress(httpx.TransportError):
            if httpx.get(f"{url}/health", timeout=30).status_code == 200:
                served = httpx.get(f"{url}/get_model_info", timeout=30).json()["model_path"]
                assert served == str(model), f"{url} serves {served}, not {model}"
                return
        time.sleep(_POLL_S)
    raise AssertionError(f"the server ended with code {process.returncode} before it answered")


def tail(log: Path, lines: int = 60) -> str:
    """Return the last lines of a log."""
    with log.open(encoding="utf-8", errors="replace") as file:
        return "".join(deque(file, maxlen=lines))


def generate(url: str, requests: Sequence[Mapping[str, Any]], concurrency: int = 4) -> list[dict[str, Any]]:
    """Return the server's answers to bodies of /generate, in their order, with `concurrency` of them in flight."""
    from concurrent.futures import ThreadPoolExecutor

    import httpx

    with httpx.Client(base_url=url, timeout=300) as client, ThreadPoolExecutor(concurrency) as pool:

        def post(body: Mapping[str, Any]) -> dict[str, Any]:
            answer: dict[str, Any] = client.post("/generate", json=body).raise_for_status().json()
            return answer

        return list(pool.map(post, requests))
