"""That the hook of a promotion is called once: over launchers of one config, runs that are killed, and homes that share
an MLflow. What is known of it is a tag of the version."""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Mapping
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from typing import Any

from draftsmith.artifacts.home import home
from draftsmith.artifacts.locks import OTHERS_LIMIT_S, Lock, locked
from draftsmith.artifacts.registry import Version
from draftsmith.flows.refresh import hook
from draftsmith.flows.refresh.line import registry

log = logging.getLogger(__name__)
_HOOK = "on_promote"  # a version's tag: `due`, `calling: WHERE since WHEN`, `called`, or `failed: WHY`
_DUE, _CALLING, _CALLED, _FAILED = "due", "calling", "called", "failed"
_TOLD, _MOST = "on_promote.decision", 4900  # another: what is told; MLflow keeps 5,000 characters of a tag


class Telling:
    """Of the promotions of one line, by one run."""

    def __init__(self, line: str, config: hook.HookConfig | None) -> None:
        self._line, self._config = line, config
        self._told: dict[int, str | None] = {}  # versions whose hook was called, and why it failed

    def alone(self) -> AbstractContextManager[Lock]:
        """Of the runs of this home: one that is calling the hook has not said so yet."""
        patience = OTHERS_LIMIT_S + (self._config.timeout_s if self._config is not None else 0)
        lock = home() / "registry" / f".lock-{self._line}.on_promote"
        return locked(lock, run=f"promotion of {self._line}", limit_s=patience)

    def owed(self, decision: Mapping[str, Any]) -> dict[str, str]:
        """Tags of a version that is about to be promoted: who finds them calls the hook, if this run is killed. In this
        order: what is due can be told."""
        return {} if self._config is None else {_TOLD: _short(decision), _HOOK: _DUE}

    def tell(self, version: Version, decision: Mapping[str, Any]) -> str:
        """Call the hook, while `alone`, unless it was called; returns what became of it, empty if there is none."""
        if self._config is None:
            return ""
        if version.number not in self._told:  # else MLflow was lost behind it
            mine = f"{_CALLING}: {_here()} since {datetime.now(UTC).isoformat(timespec='seconds')}"
            says = registry().exchange(version, _HOOK, lambda said: mine if self._is_ours(said) else said)
            state, _, what = says.partition(": ")
            if says == mine:
                told = {"line": version.line, "version": version.number, "source": version.source, **decision}
                self._told[version.number] = hook.call(self._config, told)
            elif state == _CALLING:
                return f"on_promote is being called by {what}"
            else:  # another launcher of the same config was faster
                self._told[version.number] = what or None
        problem = self._told[version.number]
        registry().tag(version, {_HOOK: f"{_FAILED}: {problem}"[:1000] if problem else _CALLED})
        return f"on_promote failed: {problem}" if problem else "on_promote was called"

    def tell_what_is_due(self) -> None:
        """The hook of a promotion whose run ended before it could be called."""
        if self._config is None:
            return
        with self.alone():
            champion = registry().champion(self._line)
            if champion is not None and champion.tags.get(_HOOK, "").startswith((_DUE, _CALLING)):
                became = self.tell(champion, json.loads(champion.tags[_TOLD]))
                log.info("%s, which its run owed: %s", champion, became)

    def _is_ours(self, said: str) -> bool:
        """Whether to call it, where the tag says this. Who was calling it in this home is dead, as its lock is ours; in
        a home elsewhere it is given up for dead when a hook has long had its time."""
        assert self._config is not None
        state, _, what = said.partition(": ")
        if state != _CALLING:
            return state not in (_CALLED, _FAILED)
        where, _, since = what.rpartition(" since ")
        age_s = (datetime.now(UTC) - datetime.fromisoformat(since)).total_seconds()
        return where == _here() or age_s > self._config.timeout_s + OTHERS_LIMIT_S


def _here() -> str:
    return f"{platform.node()}:{home()}"


def _short(decision: Mapping[str, Any]) -> str:
    """As JSON, without its rules where they are too long for a tag."""
    said = json.dumps(decision)
    if len(said) > _MOST:
        said = json.dumps({**decision, "rules": [], "sentence": decision["sentence"][:2000]})
    return said
