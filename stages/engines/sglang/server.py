"""SGLang servers that the stage starts: their command, their GPUs, their log, and their end together with the stage."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.home import private
from draftsmith.artifacts.redaction import MASK
from draftsmith.stages import lifeline
from draftsmith.stages.drafters.config import DraftingConfig
from draftsmith.stages.engines.config import LaunchConfig, OptionValue, SGLangEngineConfig, option_name

# What runs inside the servers (pyproject's entry point). Answers' records are its work: named here, it counts in the
# code's digest of every stage that asks servers.
PLUGIN = "draftsmith.stages.engines.sglang.plugin:activate"

_STOP_GRACE_S = 20.0  # SGLang looks for SIGTERM every 5 s, then frees its memory itself
_LAST_WAIT_S = 5.0  # for killed processes to be gone; zombies that nobody collects stay
_TAIL_LINES = 15
_USAGE = 2  # argparse's exit code
_PORTS = range(20000, 32000)


def algorithm_of(drafter_folder: Path) -> str:
    """Return DFLASH, DSPARK or EAGLE3, by the architecture in the drafter's config.json."""
    names = _drafter_config(drafter_folder).get("architectures") or []
    told = " ".join(map(str, names)).lower()
    return next((algorithm for algorithm in ("EAGLE3", "DSPARK") if algorithm.lower() in told), "DFLASH")


def block_size_of(drafter_folder: Path, drafting: DraftingConfig, algorithm: str) -> int:
    """Anchor and proposals of a verify step. Raises DraftsmithError if nothing says it, or if it was not trained."""
    raw = _drafter_config(drafter_folder)
    trained = raw.get("block_size") or (raw.get("dflash_config") or {}).get("block_size")
    if algorithm == "EAGLE3":
        if (block_size := drafting.block_size or trained) is None:
            raise DraftsmithError(
                "drafting.block_size: this EAGLE-3 checkpoint does not say how far it drafts; "
                "set it (4 = the anchor and three proposals)"
            )
        return int(block_size)
    if trained is None:
        raise DraftsmithError(f"drafter {drafter_folder / 'config.json'}: field block_size is missing; add it")
    trained += algorithm == "DSPARK"  # whose checkpoints count proposals alone
    if (drafting.block_size or 0) > trained:
        raise DraftsmithError(
            f"drafting.block_size: {drafting.block_size} is larger than the trained {trained}; lower it"
        )
    return int(drafting.block_size or trained)


def _drafter_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DraftsmithError(f"drafter {path}: cannot be read ({error}); give a drafter's folder") from error
    if not isinstance(raw, dict):
        raise DraftsmithError(f"drafter {path}: is not a JSON object; give a drafter's folder")
    return raw


def command(
    config: SGLangEngineConfig,
    *,
    model_folder: Path,
    dtype: str,
    drafter_folder: Path | None,
    algorithm: str | None,
    block_size: int | None,
) -> list[str]:
    """The server's command line without its port."""
    assert config.launch is not None and config.python is not None
    python, launch = config.python.expanduser().absolute(), config.launch  # not resolved: a venv's link is its identity
    if not python.is_file():
        raise DraftsmithError(
            f"engine.python: {python} is not there; `make sglang-gpu` builds the environment and prints its path"
        )
    parts = [os.fspath(python), "-m", "sglang.launch_server", "--model-path", os.fspath(model_folder.absolute())]
    parts += ["--host", "127.0.0.1", "--dtype", launch.dtype or dtype]
    if launch.tensor_parallel > 1:
        parts += ["--tp-size", str(launch.tensor_parallel)]
    if launch.data_parallel > 1:
        parts += ["--dp-size", str(launch.data_parallel)]
    if launch.memory_fraction is not None:
        parts += ["--mem-fraction-static", str(launch.memory_fraction)]
    if drafter_folder is not None and algorithm is not None and block_size is not None:
        parts += drafting_options(drafter_folder, algorithm, block_size)
    return parts + _options(launch.options)


def drafting_options(folder: Path, algorithm: str, block_size: int) -> list[str]:
    """By which a server drafts with this checkpoint, `block_size - 1` tokens a step."""
    parts = ["--speculative-algorithm", algorithm, "--speculative-draft-model-path", os.fspath(folder.absolute())]
    if algorithm == "EAGLE3":  # a chain has one branch
        parts += ["--speculative-num-steps", str(block_size - 1), "--speculative-eagle-topk", "1"]
    if algorithm == "DSPARK":  # it takes its checkpoint's size, and refuses another one beside it
        parts += ["--speculative-dspark-block-size", str(block_size - 1)]
    return [*parts, "--speculative-num-draft-tokens", str(block_size)]


def _options(options: Mapping[str, OptionValue | tuple[OptionValue, ...]]) -> list[str]:
    parts: list[str] = []
    for key, value in options.items():
        if value is False:
            continue
        parts.append(f"--{option_name(key)}")
        if value is not True:
            parts += [str(item) for item in (value if isinstance(value, tuple) else (value,))]
    return parts


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may be set to, one entry a GPU; empty on a machine without one."""
    if (listed := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name.strip() for name in listed.split(",") if name.strip() not in ("", "-1")]
    import torch

    if count := torch.cuda.device_count():
        return [str(index) for index in range(count)]
    try:  # this environment's torch may be built for the CPU, the servers' is not
        query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return []


def share_gpus(launch: LaunchConfig, gpus: Sequence[str]) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of every server; None where there is no GPU. Raises DraftsmithError if there are too few."""
    if not gpus or launch.on_cpu:
        return [None] * launch.servers
    each = launch.gpus
    if launch.servers * each > len(gpus):
        shape = f"tensor_parallel {launch.tensor_parallel}"
        shape += f" and data_parallel {launch.data_parallel}" if launch.data_parallel > 1 else ""
        raise DraftsmithError(
            f"engine.launch: {launch.servers} servers of {shape} need {launch.servers * each} GPUs, "
            f"{len(gpus)} can be seen; lower one of them"
        )
    return [",".join(gpus[i * each : (i + 1) * each]) for i in range(launch.servers)]


class ServerProcess:
    """A server in a process group of its own, which dies when this process ends in whatever way.

    Start it from a thread that outlives it: the kernel also kills it when the thread that started it ends.
    api_key: what requests must show, so that other users of the machine cannot ask the server. SGLang reads it from no
    variable; a file that only we may read keeps it out of the command line, which everybody may.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], log_path: Path, api_key: str | None = None
    ):
        self._command, self._environment, self.log_path = list(command), dict(environment), log_path
        self._api_key, self._key_file = api_key, log_path.with_suffix(".key.yaml")
        self._process: subprocess.Popen[bytes] | None = None
        self._our_end = -1
        self.url = ""

    def start(self, port: int | None = None) -> None:
        """Start the server on a free port or on this one, its output appended to the log. `url` is where it will
        answer."""
        assert self._process is None
        port = port or free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        line, self._our_end = os.pipe()
        arguments = [*self._command, "--port", str(port), *self._key_arguments()]
        try:
            with open(self.log_path, "ab", opener=private) as log:
                log.write(f"# {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(arguments)}\n".encode())
                log.flush()
                self._process = subprocess.Popen(
                    [sys.executable, "-I", lifeline.__file__, str(line), *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    pass_fds=(line,),
                    cwd=self.log_path.parent,
                    env=self._full_environment(),
                )
        except OSError as error:
            os.close(self._our_end)
            raise DraftsmithError(f"engine.launch: {arguments[0]} cannot be started: {error}") from error
        finally:
            os.close(line)

    def _key_arguments(self) -> list[str]:
        """A file with the key, for the option `--config`; it goes when the server answers, or has ended."""
        if self._api_key is None:
            return []
        self._key_file.unlink(missing_ok=True)
        with open(self._key_file, "x", opener=private) as file:
            file.write(f"api-key: {json.dumps(self._api_key)}\n")
        return ["--config", os.fspath(self._key_file.absolute())]

    def answers(self) -> None:
        """To be called when the server answers: it has read its options."""
        self._key_file.unlink(missing_ok=True)

    def _full_environment(self) -> dict[str, str]:
        """This process's environment without what would lead another interpreter to this one's packages."""
        ours = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
        return {**ours, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1", **self._environment}

    def ended(self) -> str | None:
        """How the server ended; None while it runs."""
        code = self._process.poll() if self._process else 0
        if code is None:
            return None
        return f"was killed ({signal.Signals(-code).name})" if code < 0 else f"ended with code {code}"

    @property
    def refused_options(self) -> bool:
        """Whether it ended because it did not understand its command: another start would end the same way."""
        return self._process is not None and self._process.poll() == _USAGE

    def tail(self) -> str:
        """The last lines of the log."""
        with suppress(OSError), self.log_path.open(encoding="utf-8", errors="replace") as log:
            return self._without_key("".join(deque(log, maxlen=_TAIL_LINES)).rstrip())
        return ""

    def _without_key(self, text: str) -> str:
        return text.replace(self._api_key, MASK) if self._api_key else text

    def _forget_key(self) -> None:
        """SGLang writes all its options to its log."""
        self._key_file.unlink(missing_ok=True)
        with suppress(OSError):
            said = self.log_path.read_text(encoding="utf-8", errors="surrogateescape")
            if (without := self._without_key(said)) != said:
                with self.log_path.open("w", encoding="utf-8", errors="surrogateescape") as log:
                    log.write(without)

    def stop(self, grace_s: float = _STOP_GRACE_S) -> None:
        """Ask the server to end, wait up to `grace_s`, then kill its whole group."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None and grace_s > 0:
            process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(grace_s)
        # The guard of the lifeline holds the group's number until the pipe is closed.
        deadline = time.monotonic() + _LAST_WAIT_S
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            while time.monotonic() < deadline:  # its children hold memory that the next server needs
                os.killpg(process.pid, 0)
                time.sleep(0.02)
        os.close(self._our_end)
        process.wait()
        self._forget_key()


def free_port() -> int:
    """Below the range from which kernels give out ports: a server binds it only when its model is loaded."""
    for port in random.sample(_PORTS, 200):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise DraftsmithError(f"engine.launch: no free port found in {_PORTS}")


def server_processes(
    launch: LaunchConfig, command: Sequence[str], folder: Path, api_key: str | None
) -> list[ServerProcess]:
    """The servers of a config, not started yet; their logs in `folder`."""
    shares = share_gpus(launch, () if launch.on_cpu else visible_gpus())
    return [
        ServerProcess(
            command,
            {**({"CUDA_VISIBLE_DEVICES": share} if share is not None else {}), **launch.environment},
            folder / f"sglang-{index}.log",
            api_key,
        )
        for index, share in enumerate(shares)
    ]
