"""Files outside the store that stages read: what they hold, and which of them an unfinished run began with.

Where prompts and logs are listed by folder or pattern, more files come while a refresh runs. The same command would
read these too when it goes on with a refresh that was interrupted: other rows, and all that follows made again. So a
run notes the files that each node began with (`begun/NAME.json` in the home), and a later one reads no others until a
run of the name has ended; behind that, one that is to make only some of its nodes again (`--force`, `--from`) does not.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from draftsmith.artifacts.atomic import write_text
from draftsmith.artifacts.checksums import Checksums
from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.home import home
from draftsmith.stages.contract import Config

_GOES_ON_S = 3 * 86400.0  # next week's refresh begins anew, whatever became of this week's


def external_digests(config: Config) -> dict[str, str]:
    """What a config's files outside the store hold: path -> sha256, or a version of what is far away."""
    checksums = Checksums(home())
    return {str(path): checksums.of(path) for path in config.external_files()} | config.external_versions()


def note_begun(run: str, node: str, config: Config, external: Mapping[str, str]) -> None:
    """A node of a run is made from these files. Never an error itself: without it more is made again."""
    if not external:
        return
    notes, of_config = _read(run), _digest(config)
    known = notes.get(node)
    if known is not None and not known["ended"] and known["config"] == of_config and known["files"] == external:
        return
    notes[node] = {"at": time.time(), "config": of_config, "files": dict(external), "ended": False}
    _write(run, notes)


def as_begun(run: str, node: str, config: Config, *, ended: bool = False) -> Config:
    """The config, reading no other files than an unfinished run of the name began with (or the last one, though it has
    `ended`), if these are all there still, unchanged."""
    known = _read(run).get(node)
    if known is None or known["config"] != _digest(config) or time.time() - known["at"] > _GOES_ON_S:
        return config
    if known["ended"] and not ended:
        return config
    with contextlib.suppress(DraftsmithError):  # said where the files are read
        found, files = external_digests(config), known["files"]
        if found != files and files.items() <= found.items():
            begun = config.reading(files)
            return begun if external_digests(begun) == files else config  # of a folder that is read whole
    return config


def note_ended(run: str) -> None:
    """A run of the name has come to its end: the next one reads what is there."""
    if notes := _read(run):
        _write(run, {node: known | {"ended": True} for node, known in notes.items()})


def _path(run: str) -> Path:
    return home() / "begun" / f"{quote(run, safe='')}.json"


def _write(run: str, notes: Mapping[str, Any]) -> None:
    with contextlib.suppress(DraftsmithError):
        write_text(_path(run), json.dumps(notes))


def _read(run: str) -> dict[str, Any]:
    """The notes of a run, by node: when, the config's digest, the files, and whether the run has ended."""
    try:
        notes = json.loads(_path(run).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return notes if isinstance(notes, dict) else {}


def _digest(config: Config) -> str:
    return hashlib.sha256(json.dumps(config.key_material(), sort_keys=True).encode()).hexdigest()
