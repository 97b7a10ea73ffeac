"""Call a team's command after a promotion, with the decision as JSON.

The call is made at least once. Before the promotion the decision becomes a tag of the version, and it stays until a
call has ended. If a run is killed in between, the next run of the line calls again. All calls for one promotion have
the same `idempotency_key`: line, version, and the number of promotions of the line. A failed hook is reported and
undoes nothing: the registry decides who is the champion, and a server that did not reload serves the previous one.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from draftsmith.artifacts.home import user_umask
from draftsmith.artifacts.results.gate import GateDecision
from draftsmith.flows.refresh.line import registry
from draftsmith.stages.runtime.stage import Config

_TAG = "on_promote"  # of a version: the decision as JSON while a call is pending, then `called` or `failed: WHY`
_MAX_TAG_CHARS = 4900  # MLflow keeps 5,000


class HookConfig(Config):
    """A command that is called after a promotion."""

    command: Annotated[
        tuple[str, ...], Field(min_length=1, description="and its arguments; the decision comes on standard input")
    ]
    timeout_s: Annotated[float, Field(gt=0, description="how long it may take")] = 60.0


def pending_tag(hook: HookConfig | None, decision: GateDecision) -> dict[str, str]:
    """Return the tag for a version that is about to be promoted; a run that finds it calls the hook."""
    if hook is None:
        return {}
    text = json.dumps(decision.to_json())
    if len(text) > _MAX_TAG_CHARS:
        text = json.dumps({**decision.to_json(), "rules": [], "sentence": decision.sentence[:2000]})
    return {_TAG: text}


def call_if_due(hook: HookConfig | None, line: str) -> str:
    """Call the hook for a line's champion if a call is pending. Return the result, empty if none was pending."""
    champion = registry().champion(line) if hook is not None else None
    if hook is None or champion is None or not champion.tags.get(_TAG, "").startswith("{"):
        return ""
    promotion = {"line": line, "version": champion.number, "source": champion.source}
    promotion["idempotency_key"] = f"{line}@{champion.number}#{len(registry().events(line))}"
    problem = call(hook, {**promotion, **json.loads(champion.tags[_TAG])})
    registry().tag(champion, {_TAG: f"failed: {problem}"[:1000] if problem else "called"})
    return f"on_promote failed: {problem}" if problem else "on_promote was called"


def call(hook: HookConfig, decision: Mapping[str, Any]) -> str | None:
    """Run the command with a decision as JSON on standard input. Return why it failed, None if it did not."""
    command = hook.command
    try:
        # a file and no pipe: a server that the command leaves in the background would keep a pipe open
        with tempfile.TemporaryFile() as errors:
            process = subprocess.run(
                command,
                input=json.dumps(decision).encode(),
                stdout=subprocess.DEVNULL,
                stderr=errors,
                timeout=hook.timeout_s,
                check=False,
                umask=user_umask(),
            )
            errors.seek(0)
            printed = errors.read().decode("utf-8", "replace").strip().splitlines()
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return f"{command[0]}: {error}"
    if process.returncode:
        return f"{command[0]}: ended with code {process.returncode} ({(printed or ['no message'])[-1]})"
    return None
