"""SGLang servers that the stage starts: command line, GPUs, log, and an end together with the stage."""

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
from draftsmith.stages.engines.sglang.environment import build_tools
from draftsmith.stages.runtime.child_process import ChildProcess, last_lines
from draftsmith.stages.runtime.process import EXPANDABLE_SEGMENTS

# Runs inside the servers (pyproject's entry point) and records verify steps. Named here, it counts in the code digest
# of every stage that uses servers.
PLUGIN = "draftsmith.stages.engines.sglang.plugin:activate"

_STOP_GRACE_S = 20.0  # SGLang checks for SIGTERM every 5 s, then frees its memory itself
_KILL_WAIT_S = 5.0  # for killed processes to disappear; zombies that nobody reaps stay
_USAGE_ERROR = 2  # argparse's exit code
_PORTS = range(20000, 32000)


def speculative_algorithm(drafter_folder: Path) -> str:
    """Return DFLASH, DSPARK or EAGLE3, by the architecture in the drafter's config.json."""
    names = _drafter_config(drafter_folder).get("architectures") or []
    architectures = " ".join(map(str, names)).lower()
    return next((name for name in ("EAGLE3", "DSPARK") if name.lower() in architectures), "DFLASH")


def served_block_size(drafter_folder: Path, drafting: DraftingConfig, algorithm: str) -> int:
    """Return the tokens of a verify step. Raises DraftsmithError if it is unknown, or larger than the trained one."""
    raw = _drafter_config(drafter_folder)
    trained = raw.get("block_size") or (raw.get("dflash_config") or {}).get("block_size")
    if algorithm == "EAGLE3":
        if (block_size := drafting.block_size or trained) is None:
            raise DraftsmithError(
                "drafting.block_size: this EAGLE-3 checkpoint does not state how far it drafts. "
                "Set it (4 = the anchor and three proposals)."
            )
        return int(block_size)
    if trained is None:
        raise DraftsmithError(f"drafter {drafter_folder / 'config.json'}: field block_size is missing. Add it.")
    trained += algorithm == "DSPARK"  # its checkpoints count proposals without the anchor
    return drafting.block_of(int(trained))


def _drafter_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DraftsmithError(f"drafter {path}: cannot be read ({error}). Give a drafter's folder.") from error
    if not isinstance(raw, dict):
        raise DraftsmithError(f"drafter {path}: is not a JSON object. Give a drafter's folder.")
    return raw


def server_command(
    config: SGLangEngineConfig,
    *,
    model_folder: Path,
    dtype: str,
    drafter_folder: Path | None,
    algorithm: str | None,
    block_size: int | None,
) -> list[str]:
    """Return the server's command line without its port."""
    assert config.launch is not None
    python, launch = config.interpreter, config.launch
    if not python.is_file():
        raise DraftsmithError(
            f"engine.python: {python} does not exist. `make sglang-gpu` builds the environment and prints its path."
        )
    parts = [os.fspath(python), "-m", "sglang.launch_server", "--model-path", os.fspath(model_folder.absolute())]
    parts += ["--host", "127.0.0.1", "--dtype", dtype]
    if launch.tensor_parallel > 1:
        parts += ["--tp-size", str(launch.tensor_parallel)]
    if launch.data_parallel > 1:
        parts += ["--dp-size", str(launch.data_parallel)]
    # With a drafter SGLang computes 48 requests at a time by default, without one 2,048 or more. All that are in flight
    # may be at one replica.
    replicas = launch.data_parallel * (launch.servers if launch.router is not None else 1)
    parts += ["--max-running-requests", str(config.concurrency * replicas)]
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
    if algorithm == "DSPARK":  # must equal the checkpoint's
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
    """Return the values for CUDA_VISIBLE_DEVICES, one per GPU; empty on a machine without one."""
    if (listed := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:  # the only source for GPUs other than NVIDIA's
        return [name.strip() for name in listed.split(",") if name.strip() not in ("", "-1")]
    return [gpu.uuid for gpu in all_gpus()]


def assign_gpus(launch: LaunchConfig, gpus: Sequence[str]) -> list[str | None]:
    """Return CUDA_VISIBLE_DEVICES of every server, None without GPUs. Raises DraftsmithError if there are too few."""
    if not gpus or launch.on_cpu:
        return [None] * launch.servers
    each = launch.gpus
    if launch.servers * each > len(gpus):
        shape = f"tensor_parallel {launch.tensor_parallel}"
        shape += f" and data_parallel {launch.data_parallel}" if launch.data_parallel > 1 else ""
        raise DraftsmithError(
            f"engine.launch: {launch.servers} servers of {shape} need {launch.servers * each} GPUs, "
            f"{len(gpus)} are visible. Lower one of them."
        )
    return [",".join(gpus[i * each : (i + 1) * each]) for i in range(launch.servers)]


class ServerProcess:
    """A server, or a router, as a `ChildProcess` that logs to a file.

    api_key: required of every request, so that other users of the machine cannot use the server. SGLang does not read
    it from the environment; a file with mode 0600 keeps it out of the command line, which everybody can read.
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


def cuda_environment(python: Path, launch: LaunchConfig, folder: Path) -> dict[str, str]:
    """Return the variables that a server on CUDA gets in addition to this process's.

    folder: gets libcudart.so, with which SGLang links its kernels: pip installs the library as libcudart.so.13 alone.
    """
    inherited = {**os.environ, **launch.environment}
    variables = {**launch.environment, **build_tools(python, inherited)}
    cuda = {**inherited, **variables}.get("CUDA_HOME")
    if cuda and (runtime := next(Path(cuda).glob("lib/libcudart.so.*"), None)) and not (Path(cuda) / "lib64").exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "libcudart.so").unlink(missing_ok=True)
        (folder / "libcudart.so").symlink_to(runtime)
        paths = [os.fspath(folder.absolute()), inherited.get("LIBRARY_PATH")]
        variables["LIBRARY_PATH"] = os.pathsep.join(filter(None, paths))
    return variables


def server_processes(
    launch: LaunchConfig, command: Sequence[str], folder: Path, api_key: str | None
) -> list[ServerProcess]:
    """Return the servers of a config, not started yet; their logs go to `folder`."""
    shares = assign_gpus(launch, () if launch.on_cpu else usable_gpus())
    environment = launch.environment if launch.on_cpu else cuda_environment(Path(command[0]), launch, folder / "cuda")
    return [
        ServerProcess(
            command,
            {**({"CUDA_VISIBLE_DEVICES": share} if share is not None else {}), **environment},
            folder / f"sglang-{index}.log",
            port,
            api_key,
        )
        for index, (share, port) in enumerate(zip(shares, free_ports(len(shares)), strict=True))
    ]
