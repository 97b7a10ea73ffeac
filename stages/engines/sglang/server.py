"""The command line of a SGLang server, its environment, and the servers of a router.

The environment of launched servers is checked before anything starts, without importing SGLang or torch.

A router forwards only known fields of a request (0.3.2: not `custom_params`, `stream_interval` or
`/abort_request`). So its servers record verify steps only if their environment asks for it; a request through the
router tests this. An abort goes to each of them.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import httpx

from draftsmith.artifacts.atomic import write_text
from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.engines.config import LaunchConfig, SGLangEngineConfig
from draftsmith.stages.engines.environment import PLUGIN, PLUGIN_GROUPS, EngineEnvironment
from draftsmith.stages.engines.servers.http import (
    RefusedRequestError,
    check_status,
    query,
    reachable,
)
from draftsmith.stages.engines.servers.process import option_arguments
from draftsmith.stages.engines.servers.requirements import ServerRequirements
from draftsmith.stages.engines.sglang.releases import SUPPORTED, supported

# Runs inside the servers (pyproject's entry point) and records verify steps. Named here, it counts in the code digest
# of every stage that uses servers.
ENTRY_POINT = "draftsmith.stages.engines.sglang.plugin:activate"
_CUDA, _DRIVER = 13, 580  # CUDA of the supported releases on PyPI, and its first driver
_SYSTEM_NVCC = "/usr/local/cuda/bin/nvcc"  # SGLang's last choice


def server_command(config: SGLangEngineConfig, required: ServerRequirements) -> list[str]:
    """Return the server's command line without its port."""
    assert config.launch is not None
    python, launch = config.interpreter, config.launch
    if not python.is_file():
        raise DraftsmithError(
            f"engine.python: {python} does not exist. `make sglang-gpu` builds the environment and prints its path."
        )
    parts = [
        os.fspath(python),
        "-m",
        "sglang.launch_server",
        "--model-path",
        os.fspath(required.model_folder.absolute()),
    ]
    parts += ["--host", "127.0.0.1", "--dtype", required.target.dtype]
    if launch.tensor_parallel > 1:
        parts += ["--tp-size", str(launch.tensor_parallel)]
    # With a drafter SGLang computes 48 requests at a time by default, without one 2,048 or more.
    parts += ["--max-running-requests", str(config.concurrency)]
    if launch.memory_fraction is not None:
        parts += ["--mem-fraction-static", str(launch.memory_fraction)]
    if required.drafter_folder is not None:
        assert required.algorithm is not None and required.block_size is not None
        parts += drafting_options(required.drafter_folder, required.algorithm, required.block_size)
    return parts + option_arguments(launch.options)


def drafting_options(folder: Path, algorithm: str, block_size: int) -> list[str]:
    """Return the options for a server to draft with this checkpoint, `block_size - 1` tokens per step."""
    parts = ["--speculative-algorithm", algorithm, "--speculative-draft-model-path", os.fspath(folder.absolute())]
    if algorithm in ("EAGLE3", "NEXTN"):  # a chain has one branch
        parts += ["--speculative-num-steps", str(block_size - 1), "--speculative-eagle-topk", "1"]
    if algorithm == "DSPARK":  # must equal the checkpoint's
        parts += ["--speculative-dspark-block-size", str(block_size - 1)]
    return [*parts, "--speculative-num-draft-tokens", str(block_size)]


def write_schedule(folder: Path, schedule: Sequence[Sequence[int]]) -> list[str]:
    """Write SGLang's adaptive config next to an EAGLE-3 checkpoint; return the options that make SGLang read it.

    schedule: [fewest, most, proposals] for each range of requests in flight. With one candidate per range, SGLang uses
    the range of the batch and adapts nothing else. It does so only for EAGLE and EAGLE3.
    """
    path = folder.absolute() / "sglang-adaptive.json"
    steps = {str(fewest): {"candidate_steps": [proposals]} for fewest, _, proposals in schedule}
    write_text(path, json.dumps(steps, indent=1) + "\n")
    return ["--speculative-adaptive", "--speculative-adaptive-config", os.fspath(path)]


def write_step_costs(folder: Path, drafting: Mapping[str, float], verifying: Mapping[str, float]) -> list[str]:
    """Write the step times by which DSPARK's ragged modes choose the number of verified proposals; return options.

    drafting: seconds by requests in flight. verifying: seconds by tokens of all requests. SGLang adds both to
    `bias_seconds`.
    """
    path, least = folder.absolute() / "sglang-step-times.json", min(verifying.values())
    table = {
        "bias_seconds": least,
        "bs_probes": [int(requests) for requests in drafting],
        "alpha_seconds": list(drafting.values()),
        "m_probes": [int(tokens) for tokens in verifying],
        "theta_seconds": [seconds - least for seconds in verifying.values()],
    }
    write_text(path, json.dumps(table, indent=1) + "\n")
    return ["--speculative-dspark-sps-table-path", os.fspath(path)]


def cuda_packages(python: Path) -> Path | None:
    """Return the folder of CUDA 13 that pip installs into an interpreter's environment; None if it is not there."""
    return next(python.parent.parent.glob("lib/python3*/site-packages/nvidia/cu13"), None)


def build_tools(python: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """Return PATH and CUDA_HOME with which a server on CUDA finds ninja and nvcc, since it compiles its kernels.

    pip installs both into the environment, which is on no PATH unless it is activated.
    environment: the server's, without the tools. Its CUDA_HOME is kept.
    """
    variables = {"PATH": os.pathsep.join([os.fspath(python.parent), environment.get("PATH", os.defpath)])}
    cuda = cuda_packages(python)
    if not environment.get("CUDA_HOME") and cuda is not None and (cuda / "bin" / "nvcc").is_file():
        variables["CUDA_HOME"] = os.fspath(cuda)
    return variables


def cuda_environment(python: Path, launch: LaunchConfig, folder: Path) -> dict[str, str]:
    """Return the variables that a server on CUDA gets in addition to this process's.

    folder: gets libcudart.so, with which SGLang links its kernels: pip installs the library only as libcudart.so.13.
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


def build_problems(config: SGLangEngineConfig, driver: tuple[str, int] | None) -> list[str]:
    """Return errors about the tools and the driver that a launched server on CUDA needs.

    driver: its version, and the highest major version of CUDA that it runs; None if unknown.
    """
    assert config.launch is not None
    python, problems = config.interpreter, []
    environment = {**os.environ, **config.launch.environment}
    environment |= build_tools(python, environment)
    cuda = environment.get("CUDA_HOME") or environment.get("CUDA_PATH")

    def is_missing(program: str) -> bool:
        return shutil.which(program, path=environment["PATH"]) is None

    if is_missing("ninja"):
        problems.append(f"ninja, with which SGLang compiles, is missing. `{python} -m pip install ninja` adds it.")
    if cuda and not (Path(cuda) / "bin" / "nvcc").is_file():
        problems.append(f"CUDA_HOME: {cuda} has no bin/nvcc, with which SGLang compiles. Correct or unset it.")
    elif not cuda and is_missing("nvcc") and is_missing(_SYSTEM_NVCC):
        problems.append(
            f"nvcc, with which SGLang compiles, is missing. `{python} -m pip install nvidia-cuda-nvcc` adds it, or set "
            "CUDA_HOME to a CUDA toolkit."
        )
    if is_missing(compiler := environment.get("CXX", "c++")):
        problems.append(f"{compiler}, with which SGLang compiles, is missing. Install g++, or set CXX to a compiler.")
    if driver is not None and driver[1] < _CUDA and cuda_packages(python) is not None:
        problems.append(
            f"the NVIDIA driver {driver[0]} runs CUDA {driver[1]} at most, and {python} has packages of CUDA {_CUDA}. "
            f"Install a newer driver ({_DRIVER} or later)."
        )
    return problems


def environment_warnings(config: SGLangEngineConfig, environment: EngineEnvironment) -> list[str]:
    """Return warnings about an untested release and a missing plug-in."""
    warnings = []
    if not supported(environment.version):
        warnings.append(
            f"sglang {environment.version} is outside the tested {SUPPORTED}, so traces may be refused. Install a "
            "release of that range."
        )
    if not environment.plugin:
        warnings.append(
            f"the plug-in ({PLUGIN_GROUPS[config.kind]}: {PLUGIN}) is not installed next to sglang, so mining will "
            f"replay. `{config.interpreter} -m pip install --no-deps .` in this project's folder adds it."
        )
    return warnings


async def router_workers(client: httpx.AsyncClient, url: str) -> list[str] | None:
    """Return the addresses of a router's healthy servers; None: not a router.

    Raises RetryableError if it does not answer or cannot say, DraftsmithError if it asks for a key.
    """
    with reachable(url):
        response = await query(client, "GET", f"{url}/workers")
        if response.status_code == 501:
            return None  # a gateway that knows no such path
        try:
            check_status("of the handshake", url, response.status_code, response.text)
            return [str(worker["url"]) for worker in response.json()["workers"] if worker.get("is_healthy")]
        except (RefusedRequestError, ValueError, KeyError, TypeError):
            return None  # a server, or a gateway in front of one, which the handshake checks
