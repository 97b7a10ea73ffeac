"""Cheap checks of what launched SGLang servers need, before anything starts; imports neither SGLang nor torch."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from draftsmith.stages.engines.config import SGLangEngineConfig
from draftsmith.stages.engines.environment import PLUGIN, PLUGIN_GROUPS, EngineEnvironment
from draftsmith.stages.engines.sglang.protocol import SUPPORTED, supported

_CUDA, _DRIVER = 13, 580  # of the supported releases on PyPI, and the first driver that runs it
_SYSTEM_NVCC = "/usr/local/cuda/bin/nvcc"  # SGLang's last choice


def missing_router(config: SGLangEngineConfig, environment: EngineEnvironment) -> str | None:
    """Return the error for a router that is to be launched and is not installed; None if there is no problem."""
    if config.launch is None or config.launch.router is None or environment.router is not None:
        return None
    return (
        f"engine.launch.router: sglang-router is not installed. `{config.interpreter} -m pip install sglang-router` "
        "adds it, or remove the field."
    )


def cuda_packages(python: Path) -> Path | None:
    """Return the folder of CUDA 13 that pip installs into an interpreter's environment; None if it is not there."""
    return next(python.parent.parent.glob("lib/python3*/site-packages/nvidia/cu13"), None)


def build_tools(python: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """Return PATH and CUDA_HOME with which a server on CUDA finds ninja and nvcc, since it compiles its kernels.

    pip installs both into the environment, where no PATH leads unless it is activated.
    environment: the server's without them. A CUDA_HOME there stays.
    """
    variables = {"PATH": os.pathsep.join([os.fspath(python.parent), environment.get("PATH", os.defpath)])}
    cuda = cuda_packages(python)
    if not environment.get("CUDA_HOME") and cuda is not None and (cuda / "bin" / "nvcc").is_file():
        variables["CUDA_HOME"] = os.fspath(cuda)
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
    if config.trace and not environment.plugin:
        warnings.append(
            f"the plug-in ({PLUGIN_GROUPS[config.kind]}: {PLUGIN}) is not installed beside sglang, so mining will "
            f"replay. `{config.interpreter} -m pip install --no-deps .` in this project's folder adds it."
        )
    return warnings
