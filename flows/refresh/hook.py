"""What a team does when a drafter was promoted: a command, or a call of a URL, with the decision as JSON.

A failed hook is reported and undoes nothing: the registry says who is the champion, and a server that did not reload
serves a drafter that was good until now.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from typing import Annotated, Any

from pydantic import Field, model_validator

from draftsmith.artifacts.home import users_umask
from draftsmith.stages.contract import Config


class HookConfig(Config):
    """One of both."""

    command: Annotated[
        tuple[str, ...] | None,
        Field(min_length=1, description="and its arguments; the decision comes on standard input"),
    ] = None
    url: Annotated[str | None, Field(pattern="^https?://", description="the decision is its POST body")] = None
    timeout_s: Annotated[float, Field(gt=0)] = 60.0

    @model_validator(mode="after")
    def _one_of_both(self) -> HookConfig:
        if (self.command is None) == (self.url is None):
            raise ValueError("give command or url")
        return self


def call(hook: HookConfig, decision: dict[str, Any]) -> str | None:
    """Why it failed, None if it did not."""
    body = json.dumps(decision)
    if hook.command is not None:
        return _run(hook.command, body, hook.timeout_s)
    import httpx

    try:
        answer = httpx.post(
            str(hook.url), content=body, headers={"content-type": "application/json"}, timeout=hook.timeout_s
        )
    except Exception as error:  # a name that cannot be encoded, among others
        return f"{hook.url}: {type(error).__name__} {error}".strip()
    return None if answer.is_success else f"{hook.url}: HTTP {answer.status_code}"


def _run(command: tuple[str, ...], body: str, timeout_s: float) -> str | None:
    """What it prints goes to a file: a server that it leaves in the background would hold a pipe open."""
    try:
        with tempfile.TemporaryFile() as said:
            done = subprocess.run(
                command,
                input=body.encode(),
                stdout=subprocess.DEVNULL,
                stderr=said,
                timeout=timeout_s,
                check=False,
                umask=users_umask(),
            )
            said.seek(0)
            printed = said.read().decode("utf-8", "replace").strip().splitlines()
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return f"{command[0]}: {error}"
    if done.returncode:
        return f"{command[0]}: ended with code {done.returncode} ({(printed or ['no message'])[-1]})"
    return None
