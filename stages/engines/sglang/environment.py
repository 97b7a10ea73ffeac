"""Cheap checks of an SGLang engine's config before anything starts; imports neither SGLang nor torch."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.engines.config import EmbeddedEngineConfig, SGLangEngineConfig
from draftsmith.stages.engines.sglang.protocol import SUPPORTED, supported

PLUGIN_GROUP, PLUGIN = "sglang.srt.plugins", "draftsmith"
_PROBE_TIMEOUT_S = 60.0
_URL_TIMEOUT_S = 3.0
_ADVICE = "Build one with `make sglang-gpu` (or `make sglang-cpu`) and set engine.python to the path that it prints."

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
    path = python.expanduser()
    if not path.is_file():
        raise DraftsmithError(f"engine.python: {path.absolute()} does not exist. {_ADVICE}")
    if not os.access(path, os.X_OK):
        raise DraftsmithError(f"engine.python: {path.absolute()} cannot be executed. {_ADVICE}")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONHOME"}
    try:
        # Not resolved: a virtual environment's python is a link, whose path decides what it finds.
        done = subprocess.run(
            [os.fspath(path.absolute()), "-c", _PROBE],
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
        raise DraftsmithError(
            f"engine.python: {path.absolute()} is not a Python that runs ({reason}). {_ADVICE}"
        ) from None
    if versions["sglang"] is None:
        raise DraftsmithError(f"engine.python: {path.absolute()} has no sglang installed. {_ADVICE}")
    return SGLangEnvironment(versions["sglang"], versions["torch"], bool(versions["plugin"]), versions["router"])


def missing_router(config: SGLangEngineConfig, environment: SGLangEnvironment) -> str | None:
    """Return the error for a router that is to be launched and is not installed; None if there is no problem."""
    if config.launch is None or config.launch.router is None or environment.router is not None:
        return None
    return (
        f"engine.launch.router: sglang-router is not installed. `{config.python} -m pip install sglang-router` adds "
        "it, or remove the field."
    )


def engine_programs(engine: EmbeddedEngineConfig | SGLangEngineConfig) -> dict[str, str]:
    """Return SGLang's version for servers that would be launched; running ones report theirs in the handshake."""
    if not isinstance(engine, SGLangEngineConfig) or engine.launch is None or engine.python is None:
        return {}
    try:
        return {"sglang": inspect_environment(engine.python).sglang}
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
            f"`{config.python} -m pip install --no-deps .` in this project's folder adds it."
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
