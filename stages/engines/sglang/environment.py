"""Cheap checks of an SGLang engine's config before anything starts; imports neither SGLang nor torch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.engines.config import EmbeddedEngineConfig, SGLangEngineConfig
from draftsmith.stages.engines.sglang.protocol import SUPPORTED, supported

PLUGIN_GROUP, PLUGIN = "sglang.srt.plugins", "draftsmith"
_CUDA, _DRIVER = 13, 580  # of the supported releases on PyPI, and the first driver that runs it
_SYSTEM_NVCC = "/usr/local/cuda/bin/nvcc"  # SGLang's last choice
_PROBE_TIMEOUT_S = 60.0
_URL_TIMEOUT_S = 3.0
_ADVICE = (
    "Install this project with its extra sglang, or set engine.python to the path that `make sglang-gpu` or "
    "`make sglang-cpu` prints."
)

# Run by the other interpreter: reads the metadata of installed packages, imports nothing of SGLang. The current
# directory is left out, since the metadata of a checkout of this project there is not that environment's.
_PROBE = f"""
import sys
sys.path = [folder for folder in sys.path if folder]
import importlib.metadata as m, json
def version(name):
    try: return m.version(name)
    except m.PackageNotFoundError: return None
plugin = [e.value for e in m.entry_points(group={PLUGIN_GROUP!r}) if e.name == {PLUGIN!r}]
names = {{"sglang": "sglang", "torch": "torch", "router": "sglang-router"}}
print(json.dumps({{key: version(name) for key, name in names.items()}} | {{"plugin": plugin}}))
"""


@dataclass(frozen=True)
class SGLangEnvironment:
    """The packages that the interpreter of `engine.python` has installed."""

    sglang: str
    torch: str | None
    plugin: bool
    router: str | None = None


def inspect_environment(python: Path) -> SGLangEnvironment:
    """Ask an interpreter for its packages. Raises DraftsmithError if it is missing, fails, or has no SGLang."""
    if not python.is_file():
        raise DraftsmithError(f"engine.python: {python} does not exist. {_ADVICE}")
    if not os.access(python, os.X_OK):
        raise DraftsmithError(f"engine.python: {python} cannot be executed. {_ADVICE}")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONHOME"}
    try:
        done = subprocess.run(
            [os.fspath(python), "-c", _PROBE],
            capture_output=True,
            text=True,
            timeout=_PROBE_TIMEOUT_S,
            check=True,
            env=environment,
        )
        versions = json.loads(done.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        stderr = getattr(error, "stderr", None)
        reason = (str(stderr).strip().splitlines() or [str(error)])[-1] if stderr else str(error)
        raise DraftsmithError(f"engine.python: {python} is not a Python that runs ({reason}). {_ADVICE}") from None
    if versions["sglang"] is None:
        raise DraftsmithError(f"engine.python: {python} has no sglang installed. {_ADVICE}")
    return SGLangEnvironment(versions["sglang"], versions["torch"], bool(versions["plugin"]), versions["router"])


def missing_router(config: SGLangEngineConfig, environment: SGLangEnvironment) -> str | None:
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


def engine_programs(engine: EmbeddedEngineConfig | SGLangEngineConfig) -> dict[str, str]:
    """Return SGLang's version for servers that would be launched; running ones report theirs in the handshake."""
    if not isinstance(engine, SGLangEngineConfig) or engine.launch is None:
        return {}
    try:
        return {"sglang": inspect_environment(engine.interpreter).sglang}
    except DraftsmithError:
        return {}


def environment_warnings(config: SGLangEngineConfig, environment: SGLangEnvironment) -> list[str]:
    """Return warnings about an untested release and a missing plug-in."""
    warnings = []
    if not supported(environment.sglang):
        warnings.append(
            f"sglang {environment.sglang} is outside the tested {SUPPORTED}, so traces may be refused. Install a "
            "release of that range."
        )
    if config.trace and not environment.plugin:
        warnings.append(
            f"the plug-in ({PLUGIN_GROUP}: {PLUGIN}) is not installed beside sglang, so mining will replay. "
            f"`{config.interpreter} -m pip install --no-deps .` in this project's folder adds it."
        )
    return warnings


def health_problem(url: str) -> str | None:
    """Return why a server's /health does not answer; None if it does."""
    import httpx  # 0.2 s, and planning imports this module

    try:
        response = httpx.get(f"{url.rstrip('/')}/health", timeout=_URL_TIMEOUT_S)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return None if response.status_code == 200 else f"HTTP {response.status_code}"
