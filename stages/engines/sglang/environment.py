"""Checks of an SGLang engine's config before anything is started: cheap, and without importing SGLang or torch here."""

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

# Run by the other interpreter: reads installed metadata, imports nothing of SGLang. The current directory is left out:
# its own metadata (that of a checkout of this project) is not in that environment.
_PROBE = f"""
import sys
sys.path = [place for place in sys.path if place]
import importlib.metadata as m, json
def version(name):
    try: return m.version(name)
    except m.PackageNotFoundError: return None
plugin = [e.value for e in m.entry_points(group={PLUGIN_GROUP!r}) if e.name == {PLUGIN!r}]
names = {{"sglang": "sglang", "torch": "torch", "router": "sglang-router"}}
print(json.dumps({{key: version(name) for key, name in names.items()}} | {{"plugin": plugin}}))
"""


@dataclass(frozen=True)
class Installed:
    """What the interpreter of `engine.python` has."""

    sglang: str
    torch: str | None
    plugin: bool
    router: str | None = None


def installed(python: Path) -> Installed:
    """Ask the interpreter what it has. Raises DraftsmithError: no such interpreter, it fails, or no SGLang in it."""
    advice = "build one with `make sglang-gpu` (or `make sglang-cpu`) and give the path that it prints"
    path = python.expanduser()
    if not path.is_file():
        raise DraftsmithError(f"engine.python: {path.absolute()} does not exist: {advice}")
    if not os.access(path, os.X_OK):
        raise DraftsmithError(f"engine.python: {path.absolute()} cannot be executed: {advice}")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONHOME"}
    try:
        # Not resolved: a virtual environment's python is a link, and what it is called decides what it finds.
        done = subprocess.run(
            [os.fspath(path.absolute()), "-c", _PROBE],
            capture_output=True,
            text=True,
            timeout=_PROBE_TIMEOUT_S,
            check=True,
            env=environment,
        )
        found = json.loads(done.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        stderr = getattr(error, "stderr", None)
        reason = (str(stderr).strip().splitlines() or [str(error)])[-1] if stderr else str(error)
        raise DraftsmithError(
            f"engine.python: {path.absolute()} is not a Python that runs ({reason}): {advice}"
        ) from None
    if found["sglang"] is None:
        raise DraftsmithError(f"engine.python: {path.absolute()} has no sglang installed: {advice}")
    return Installed(found["sglang"], found["torch"], bool(found["plugin"]), found["router"])


def router_missing(config: SGLangEngineConfig, found: Installed) -> str | None:
    """Return what to do if a router is to be launched and is not installed; None: nothing."""
    if config.launch is None or config.launch.router is None or found.router is not None:
        return None
    return f"engine.launch.router: `{config.python} -m pip install sglang-router` adds it, or leave the field out"


def programs_of(engine: EmbeddedEngineConfig | SGLangEngineConfig) -> dict[str, str]:
    """Return SGLang's version, of servers that would be launched; running ones say theirs when they are asked."""
    if not isinstance(engine, SGLangEngineConfig) or engine.launch is None or engine.python is None:
        return {}
    try:
        return {"sglang": installed(engine.python).sglang}
    except DraftsmithError:
        return {}


def environment_warnings(config: SGLangEngineConfig, found: Installed) -> list[str]:
    """Return what will work less well than it could in this environment."""
    warnings = []
    if not supported(found.sglang):
        warnings.append(
            f"sglang {found.sglang} is outside the tested {SUPPORTED}: traces may be refused; "
            "install a release of that range"
        )
    if config.trace and not found.plugin:
        warnings.append(
            f"the plug-in ({PLUGIN_GROUP}: {PLUGIN}) is not installed beside sglang: mining will replay; "
            f"`{config.python} -m pip install --no-deps .` in this project's folder adds it"
        )
    return warnings


def unreachable(url: str) -> str | None:
    """Return why a server's /health does not answer; None if it does."""
    import httpx

    try:
        response = httpx.get(f"{url.rstrip('/')}/health", timeout=_URL_TIMEOUT_S)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return None if response.status_code == 200 else f"HTTP {response.status_code}"
