"""SGLang servers that the stage starts: their command, their GPUs, their log, and their end together with the stage."""

from __future__ import annotations

import json
import os
import random
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.home import open_0600
from draftsmith.artifacts.host import all_gpus
from draftsmith.artifacts.redaction import MASK
from draftsmith.stages.drafters.spec import DraftingConfig
from draftsmith.stages.engines.config import LaunchConfig, OptionValue, SGLangEngineConfig, option_name
from draftsmith.stages.runtime.child_process import ChildProcess, last_lines

# What runs inside the servers (pyproject's entry point). Answers' records are its work: named here, it counts in the
# code's digest of every stage that asks servers.
PLUGIN = "draftsmith.stages.engines.sglang.plugin:activate"

_STOP_GRACE_S = 20.0  # SGLang looks for SIGTERM every 5 s, then frees its memory itself
_LAST_WAIT_S = 5.0  # for killed processes to be gone; zombies that nobody collects stay
_USAGE = 2  # argparse's exit code
_PORTS = range(20000, 32000)


def algorithm_of(drafter_folder: Path) -> str:
    """Return DFLASH, DSPARK or EAGLE3, by the architecture in the drafter's config.json."""
    names = _drafter_config(drafter_folder).get("architectures") or []
    told = " ".join(map(str, names)).lower()
    return next((algorithm for algorithm in ("EAGLE3", "DSPARK") if algorithm.lower() in told), "DFLASH")


def block_size_of(drafter_folder: Path, drafting: DraftingConfig, algorithm: str) -> int:
    """Return the tokens of a verify step. Raises DraftsmithError if nothing says it, or if it was not trained."""
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
    return drafting.block_of(int(trained))


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
    """Return the server's command line without its port."""
    assert config.launch is not None and config.python is not None
    python, launch = config.python.expanduser().absolute(), config.launch  # not resolved: a venv's link is its identity
    if not python.is_file():
        raise DraftsmithError(
            f"engine.python: {python} is not there; `make sglang-gpu` builds the environment and prints its path"
        )
    parts = [os.fspath(python), "-m", "sglang.launch_server", "--model-path", os.fspath(model_folder.absolute())]
    parts += ["--host", "127.0.0.1", "--dtype", dtype]
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
    """Return the options by which a server drafts with this checkpoint, `block_size - 1` tokens a step."""
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


def usable_gpus() -> list[str]:
    """Return what CUDA_VISIBLE_DEVICES may be set to, one entry a GPU; empty on a machine without one."""
    if (listed := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:  # names GPUs of every maker
        return [name.strip() for name in listed.split(",") if name.strip() not in ("", "-1")]
    return [gpu.uuid for gpu in all_gpus()]


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
    """A server, or a router, as a `ChildProcess` that logs to a file.

    api_key: what requests must show, so that other users of the machine cannot ask the server. SGLang reads it from no
    variable; a file that only we may read keeps it out of the command line, which everybody may.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        log_path: Path,
        port: int,
        api_key: str | None = None,
    ):
        self.url, self.log_path = f"http://127.0.0.1:{port}", log_path
        self._command, self._environment = [*command, "--port", str(port)], environment
        self._api_key, self._key_file = api_key, log_path.with_suffix(".key.yaml")
        self._child: ChildProcess | None = None

    def start(self) -> None:
        """Start the server, its output appended to the log."""
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        command = [*self._command, *self._key_arguments()]
        # without what would lead another interpreter to this one's packages
        ours = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
        try:
            with open(self.log_path, "ab", opener=open_0600) as log:
                log.write(f"# {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(command)}\n".encode())
                log.flush()
                self._child = ChildProcess(
                    command,
                    environment={**ours, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1", **self._environment},
                    stdout=log,
                    stderr=log,
                    folder=self.log_path.parent,
                )
        except OSError as error:
            raise DraftsmithError(f"engine.launch: {command[0]} cannot be started: {error}") from error

    def _key_arguments(self) -> list[str]:
        """Write a file with the key, for the option `--config`; it goes when the server answers, or has ended."""
        if self._api_key is None:
            return []
        self._key_file.unlink(missing_ok=True)
        with open(self._key_file, "x", opener=open_0600) as file:
            file.write(f"api-key: {json.dumps(self._api_key)}\n")
        return ["--config", os.fspath(self._key_file.absolute())]

    def answers(self) -> None:
        """Forget the file of the key: the server has read its options."""
        self._key_file.unlink(missing_ok=True)

    def ended(self) -> str | None:
        """Return how the server ended; None while it runs."""
        return "was not started" if self._child is None else self._child.ended()

    @property
    def refused_options(self) -> bool:
        """Return whether it ended because it did not understand its command: another start would end the same way."""
        return self._child is not None and self._child.process.poll() == _USAGE

    def tail(self) -> str:
        """Return the last lines of the log."""
        return self._without_key(last_lines(self.log_path))

    def _without_key(self, text: str) -> str:
        return text.replace(self._api_key, MASK) if self._api_key else text

    def stop(self, grace_s: float = _STOP_GRACE_S) -> None:
        """Ask the server to end, wait up to `grace_s`, then kill it with all that it started."""
        if self._child is None:
            return
        self._child.end(grace_s, _LAST_WAIT_S)
        self._key_file.unlink(missing_ok=True)
        with suppress(OSError):  # SGLang writes all its options to its log
            said = self.log_path.read_text(encoding="utf-8", errors="surrogateescape")
            if (without := self._without_key(said)) != said:
                self.log_path.write_text(without, encoding="utf-8", errors="surrogateescape")


def free_ports(count: int) -> list[int]:
    """Return ports below the range from which kernels give them out: a server binds its own when it has its model."""
    found = []
    for port in random.sample(_PORTS, 200 + count):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise DraftsmithError(f"engine.launch: no free port found in {_PORTS}")


def server_processes(
    launch: LaunchConfig, command: Sequence[str], folder: Path, api_key: str | None
) -> list[ServerProcess]:
    """Return the servers of a config, not started yet; their logs in `folder`."""
    shares = share_gpus(launch, () if launch.on_cpu else usable_gpus())
    return [
        ServerProcess(
            command,
            {**({"CUDA_VISIBLE_DEVICES": share} if share is not None else {}), **launch.environment},
            folder / f"sglang-{index}.log",
            port,
            api_key,
        )
        for index, (share, port) in enumerate(zip(shares, free_ports(len(shares)), strict=True))
    ]
