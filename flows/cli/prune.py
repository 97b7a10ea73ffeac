"""`draftsmith prune`: removes leftovers of unfinished work and, on request, artifacts that nothing needs any more."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import UTC, datetime

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.home import home
from draftsmith.artifacts.store.manifest import local_time
from draftsmith.artifacts.store.mirror import open_store
from draftsmith.artifacts.store.retention import (
    REPLACED_ARTIFACT,
    Leftover,
    exclusive_for_prune,
    leftovers,
    unused_artifacts,
)
from draftsmith.artifacts.text import format_bytes
from draftsmith.artifacts.tracking.registry import Registry, describe_other_trackers
from draftsmith.artifacts.tracking.runs import Tracking
from draftsmith.flows.execution.display import Display, folded_table


def prune(display: Display, days: float, *, artifacts: bool, delete: bool) -> None:
    """List leftovers that were not touched for so many days, or delete them.

    artifacts: also complete artifacts that no run has used for so long, except those that drafter lines need. Raises
    DraftsmithError if these are to be deleted while a run of this home is alive.
    """
    with exclusive_for_prune(home()) if artifacts and delete else nullcontext():
        _prune(display, days, artifacts=artifacts, delete=delete)


def _prune(display: Display, days: float, *, artifacts: bool, delete: bool) -> None:
    before = time.time() - days * 86400
    obsolete = leftovers(home(), before)
    replaced = [item for item in obsolete if item.kind == REPLACED_ARTIFACT]
    obsolete = [item for item in obsolete if item not in replaced]
    if replaced and (needed := _ids_of_lines(display, "replaced artifacts", Registry.content_ids)) is not None:
        obsolete += [item for item in replaced if not _is_needed(item, needed)]
    if artifacts and (needed := _ids_of_lines(display, "complete artifacts", Registry.needed_content_ids)) is not None:
        obsolete += unused_artifacts(open_store(home()).root, before, needed)
    if not obsolete:
        display.line(f"nothing in {home()} was left over and not touched for {days:g} days")
    elif delete:
        _delete(display, obsolete)
    else:
        _list(display, obsolete, f"draftsmith prune {'--artifacts ' if artifacts else ''}--days {days:g} --delete")
    if not artifacts:
        display.line("Complete artifacts are kept. `--artifacts` also removes those that nothing needs any more.")


def _ids_of_lines(display: Display, what: str, ask: Callable[[Registry], set[str]]) -> set[str] | None:
    """Return the content ids that drafter lines need, or None if they are unknown, which a line reports.

    A champion has no other copy, so that nothing is deleted then.
    """
    tracking = Tracking(home())
    if (why := describe_other_trackers(tracking)) is not None:
        display.line(f"{what} are kept: {why}")
        return None
    try:
        return ask(Registry(tracking))
    except DraftsmithError as error:
        display.line(f"{what} are kept, as it is unknown whether a drafter line needs them: {error}")
        return None


def _is_needed(replaced: Leftover, needed: set[str]) -> bool:
    return replaced.content is not None and any(content_id.startswith(replaced.content) for content_id in needed)


def _list(display: Display, obsolete: Sequence[Leftover], command: str) -> None:
    table = folded_table("what", "path", "size", "last touched")
    for item in obsolete:
        touched = local_time(datetime.fromtimestamp(item.touched, UTC))
        table.add_row(item.kind, str(item.path.relative_to(home())), format_bytes(item.bytes), touched)
    display.console.print(table)
    display.line(f"{_total(obsolete)} in all. `{command}` removes them.")


def _delete(display: Display, obsolete: Sequence[Leftover]) -> None:
    removed = [item for item in obsolete if item.remove()]
    kept = ", ".join(item.path.name for item in obsolete if item not in removed)
    display.line(f"removed {_total(removed)}" + (f", except what a run uses again: {kept}" if kept else ""))


def _total(items: Sequence[Leftover]) -> str:
    return format_bytes(sum(item.bytes for item in items))
