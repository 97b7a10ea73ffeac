"""Call a team's command or URL after a promotion, with the decision as JSON.

The call is made at least once: the decision is a tag of the version from before it is the champion until a call has
ended. A run that is killed in between leaves the tag, and the next run of the line calls again. All calls for one
promotion have the same `idempotency_key`: line, version, and how many promotions the line had. A failed hook is
reported and undoes nothing: the registry says who is the champion, and a server that did not reload serves a drafter
that was good until now.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, model_validator

from draftsmith.artifacts.home import user_umask
from draftsmith.flows.refresh.line import registry
from draftsmith.stages.runtime.stage import Config

_TAG = "on_promote"  # of a version: the decision as JSON while the call is due, then `called`, or `failed: WHY`
_TAG_CHARS = 4900  # MLflow keeps 5,000


class HookConfig(Config):
    """One of both."""

    command: Annotated[
        tuple[str, ...] | None,
        Field(min_length=1, description="and its arguments; the decision comes on standard input"),
    ] = None
    url: Annotated[str | None, Field(pattern="^https?://", description="the decision is its POST body")] = None
    timeout_s: Annotated[float, Field(gt=0, description="how long the hook may take")] = 60.0

    @model_validator(mode="after")
    def _one_of_both(self) -> HookConfig:
        if (self.command is None) == (self.url is None):
            raise ValueError("give command or url")
        return self


def due(hook: HookConfig | None, decision: Mapping[str, Any]) -> dict[str, str]:
    """Return the tags of a version that is about to be promoted: whoever finds them calls the hook."""
    if hook is None:
        return {}
    text = json.dumps(decision)
    if len(text) > _TAG_CHARS:
        text = json.dumps({**decision, "rules": [], "sentence": decision["sentence"][:2000]})
    return {_TAG: text}


def call_if_due(hook: HookConfig | None, line: str) -> str:
    """Call the hook for the champion of a line if that is due. Return what came of it, empty if nothing was due."""
    champion = registry().champion(line) if hook is not None else None
    if hook is None or champion is None or not champion.tags.get(_TAG, "").startswith("{"):
        return ""
    named = {"line": line, "version": champion.number, "source": champion.source}
    named["idempotency_key"] = f"{line}@{champion.number}#{len(registry().events(line))}"
    problem = call(hook, {**named, **json.loads(champion.tags[_TAG])})
    registry().tag(champion, {_TAG: f"failed: {problem}"[:1000] if problem else "called"})
    return f"on_promote failed: {problem}" if problem else "on_promote was called"


def call(hook: HookConfig, decision: Mapping[str, Any]) -> str | None:
    """Return why the call failed, None if it did not."""
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
                umask=user_umask(),
            )
            said.seek(0)
            printed = said.read().decode("utf-8", "replace").strip().splitlines()
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return f"{command[0]}: {error}"
    if done.returncode:
        return f"{command[0]}: ended with code {done.returncode} ({(printed or ['no message'])[-1]})"
    return None
