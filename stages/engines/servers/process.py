"""Servers that the stage starts: their GPUs, ports and log. They end together with the stage."""

from __future__ import annotations

import json
import os
import random
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.home import open_0600
from draftsmith.artifacts.host import all_gpus, visible_gpus
from draftsmith.artifacts.redaction import MASK
from draftsmith.stages.engines.config import LaunchConfig, Options, option_name
from draftsmith.stages.runtime.child_process import ChildProcess, last_lines
from draftsmith.stages.runtime.process import EXPANDABLE_SEGMENTS

_STOP_GRACE_S = 20.0  # SGLang checks for SIGTERM every 5 s, then frees its memory itself
_KILL_WAIT_S = 5.0  # for killed processes to disappear; zombies that no parent reaps stay
_USAGE_ERROR = 2  # argparse's exit code
_PORTS = range(20000, 32000)
_NUMBERED = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}  # as nvidia-smi numbers the GPUs


def usable_gpus() -> list[str]:
    """Return the values for CUDA_VISIBLE_DEVICES, one per GPU; empty on a machine without one."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None and not all_gpus():  # the only source for GPUs other than NVIDIA's
        return [name.strip() for name in listed.split(",") if name.strip() not in ("", "-1")]
    # numbers, since SGLang reads them as such where several GPUs hold a copy; a slice of a GPU has none
    numbers = {gpu.uuid: str(number) for number, gpu in enumerate(all_gpus())}
    return [numbers.get(gpu.uuid, gpu.uuid) for gpu in visible_gpus()]


def assign_gpus(launch: LaunchConfig, gpus: Sequence[str]) -> list[str | None]:
    """Return CUDA_VISIBLE_DEVICES of every server, None without GPUs. Raises DraftsmithError if there are too few."""
    if not gpus or launch.on_cpu:
        return [None] * launch.servers
    per_server = launch.tensor_parallel
    if launch.servers * per_server > len(gpus):
        raise DraftsmithError(
            f"engine.launch: {launch.servers} servers of tensor_parallel {per_server} need "
            f"{launch.servers * per_server} GPUs, {len(gpus)} are visible. Lower one of these numbers."
        )
    return [",".join(gpus[i * per_server : (i + 1) * per_server]) for i in range(launch.servers)]


class ServerProcess:
    """A server, or a router, as a `ChildProcess` that logs to a file.

    api_key: required of every request, so that other users of the machine cannot use the server. It is passed in a file
    with mode 0600, which keeps it out of the command line, which everybody can read. None: the environment has it.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        log_path: Path,
        port: int,
        api_key: str | None = None,
    ):
        self.log_path, self._command, self._environment = log_path, command, environment
        self.use_port(port)
        self._api_key, self._key_file = api_key, log_path.with_suffix(".key.yaml")
        self._child: ChildProcess | None = None

    def use_port(self, port: int) -> None:
        """Make the next start listen on this port."""
        self.url, self._port = f"http://127.0.0.1:{port}", port

    def start(self) -> None:
        """Start the server, its output appended to the log."""
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        command = [*self._command, "--port", str(self._port), *self._key_arguments()]
        # without variables that would lead another interpreter to this one's packages
        inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
        if inherited.get(EXPANDABLE_SEGMENTS[0]) == EXPANDABLE_SEGMENTS[1]:  # for this process's own allocator
            del inherited[EXPANDABLE_SEGMENTS[0]]
        try:
            with open(self.log_path, "ab", opener=open_0600) as log:
                log.write(f"# {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(command)}\n".encode())
                log.flush()
                self._child = ChildProcess(
                    command,
                    environment={**inherited, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1", **self._environment},
                    stdout=log,
                    stderr=log,
                    folder=self.log_path.parent,
                )
        except OSError as error:
            raise DraftsmithError(
                f"engine.launch: {command[0]} cannot be started ({error}). Correct engine.python."
            ) from error

    def _key_arguments(self) -> list[str]:
        """Write the key to a file for the option `--config`; it is removed when the server answers or has ended."""
        if self._api_key is None:
            return []
        self._key_file.unlink(missing_ok=True)
        with open(self._key_file, "x", opener=open_0600) as file:
            file.write(f"api-key: {json.dumps(self._api_key)}\n")
        return ["--config", os.fspath(self._key_file.absolute())]

    def remove_key_file(self) -> None:
        """Remove the file of the API key, once the server has read its options."""
        self._key_file.unlink(missing_ok=True)

    def ended(self) -> str | None:
        """Return how the server ended; None while it runs."""
        return "was not started" if self._child is None else self._child.ended()

    @property
    def refused_options(self) -> bool:
        """Return whether it ended because it did not understand its command, so that another start would too."""
        return self._child is not None and self._child.process.poll() == _USAGE_ERROR

    def tail(self) -> str:
        """Return the last lines of the log."""
        return self._without_key(last_lines(self.log_path))

    def _without_key(self, text: str) -> str:
        return text.replace(self._api_key, MASK) if self._api_key else text

    def stop(self, grace_s: float = _STOP_GRACE_S) -> None:
        """Terminate the server, wait up to `grace_s`, then kill it with all its descendants."""
        if self._child is None:
            return
        self._child.end(grace_s, _KILL_WAIT_S)
        self._key_file.unlink(missing_ok=True)
        with suppress(OSError):  # SGLang writes all its options to its log
            text = self.log_path.read_text(encoding="utf-8", errors="surrogateescape")
            if (masked := self._without_key(text)) != text:
                self.log_path.write_text(masked, encoding="utf-8", errors="surrogateescape")


def free_ports(count: int) -> list[int]:
    """Return ports below the kernel's ephemeral range, since a server binds its port only after loading its model."""
    ports = []
    for port in random.sample(_PORTS, 200 + count):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            ports.append(port)
        if len(ports) == count:
            return ports
    raise DraftsmithError(f"engine.launch: no free port in {_PORTS.start} to {_PORTS.stop - 1}. Stop other servers.")


def server_processes(
    launch: LaunchConfig,
    command: Sequence[str],
    environment: Mapping[str, str],
    log_path: Path,
    api_key: str | None = None,
) -> list[ServerProcess]:
    """Return the servers of a config, not started yet.

    environment: variables in addition to this process's. log_path: the logs', to which servers' numbers are added.
    """
    shares = assign_gpus(launch, usable_gpus())
    return [
        ServerProcess(
            command,
            {**({**_NUMBERED, "CUDA_VISIBLE_DEVICES": share} if share is not None else {}), **environment},
            log_path.with_name(f"{log_path.stem}-{index}.log"),
            port,
            api_key,
        )
        for index, (share, port) in enumerate(zip(shares, free_ports(len(shares)), strict=True))
    ]


def option_arguments(options: Options) -> list[str]:
    """Return the arguments of a section `options`."""
    parts: list[str] = []
    for key, value in options.items():
        if value is False:
            continue
        parts.append(f"--{option_name(key)}")
        if value is not True:
            parts += [str(item) for item in (value if isinstance(value, tuple) else (value,))]
    return parts
