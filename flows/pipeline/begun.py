"""What a run begins with: the files of rows that a node lists by folder or pattern, and the time of its windows.

More files come while a refresh runs, and tomorrow `7d` begins a day later: the same command would read other rows when
it goes on with a refresh that was interrupted, and make again all that follows from them. So the plan of a run lists
every node's files once, the node reads no others, and the run notes them (`begun/NAME.json` in the home). A later plan
goes on with the notes until a run of the name has ended; what a run failed to make for its input is listed anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from draftsmith.artifacts.atomic import write_text
from draftsmith.artifacts.errors import EXIT_USER_ERROR, DraftsmithError
from draftsmith.artifacts.home import file_name, home
from draftsmith.flows.pipeline.process import PastLimitError
from draftsmith.stages.contract import Config

_GOES_ON_S = 3 * 86400.0  # next week's refresh begins anew, whatever became of this week's

C = TypeVar("C", bound=Config)


@dataclass(frozen=True)
class Begun:
    """What a node of a run reads."""

    at: float  # seconds since the epoch: windows such as `7d` are counted back from here
    config: str  # digest of what decides the result, as read then
    files: tuple[str, ...]
    ended: bool = False  # the run that it is of
    newer: int = 0  # files that came since, which are for the next run

    def read_by(self, config: C) -> C:
        """The node's config, reading these."""
        return _read_at(config, self.at).reading(self.files)

    def holds(self, now: float, *, ended: bool = False) -> bool:
        """Whether its run may be gone on with."""
        return (ended or not self.ended) and abs(now - self.at) <= _GOES_ON_S


def begin(config: Config, known: Begun | None, now: float, *, ended: bool = False) -> Begun | None:
    """What a node reads: what is `known` of an unfinished run (of one that has `ended` too, if asked for), where the
    config is the same and all files are there still; else what is there. None for a config that lists nothing.

    Raises DraftsmithError for a pattern that matches nothing, RetryableError for a bucket that does not answer.
    """
    if not (found := config.listing()):
        return None
    if known is not None and known.holds(now, ended=ended):
        newer = set(found).difference(known.files)
        if set(known.files) <= set(found) and _digest(_read_at(config, known.at)) == known.config:
            return replace(known, newer=len(newer))
    return Begun(now, _digest(_read_at(config, now)), tuple(found))


def notes(run: str) -> dict[str, Begun]:
    """What the last run of the name began with, by node."""
    try:
        said = json.loads(_path(run).read_text("utf-8"))
        return {
            node: Begun(float(note["at"]), note["config"], tuple(note["files"]), note["ended"])
            for node, note in said.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def note_begun(run: str, begun: Mapping[str, Begun], *, alone: bool = False) -> None:
    """A run begins with these, by node. Never an error itself: without it more is made again.

    alone: of a stage that is made alone. It begins no run, and ends none.
    """
    known = notes(run)
    for node, each in begun.items():
        of_a_run = not alone or (node in known and known[node].holds(each.at))
        known[node] = replace(each, ended=not of_a_run, newer=0)
    _write(run, known)


def note_ended(run: str) -> None:
    """A run of the name has come to its end: the next one reads what is there."""
    _write(run, {node: replace(note, ended=True) for node, note in notes(run).items()})


def note_failed(run: str, error: BaseException, node: str) -> None:
    """It was not made. Where the error says that the input was bad, the next run reads what is there: other files may
    be the remedy. After any other it goes on."""
    if (
        isinstance(error, DraftsmithError)
        and error.exit_code == EXIT_USER_ERROR
        and not isinstance(error, PastLimitError)
    ):
        _write(run, {name: note for name, note in notes(run).items() if name != node})


def _path(run: str) -> Path:
    return home() / "begun" / f"{file_name(run)}.json"


def _write(run: str, known: Mapping[str, Begun]) -> None:
    if known != notes(run):
        said = {node: asdict(note) for node, note in known.items()}
        with contextlib.suppress(DraftsmithError):
            write_text(_path(run), json.dumps(said))


def _read_at(config: C, at: float) -> C:
    return config.read_at(datetime.fromtimestamp(at, UTC))


def _digest(config: Config) -> str:
    return hashlib.sha256(json.dumps(config.key_material(), sort_keys=True).encode()).hexdigest()
