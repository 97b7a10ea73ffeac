"""`draftsmith prune`: what was left behind, and asked to, complete artifacts that nothing needs any more."""

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
from draftsmith.artifacts.tracking import registry_homes as registered
from draftsmith.artifacts.tracking.registry import Registry
from draftsmith.artifacts.tracking.runs import Tracking
from draftsmith.flows.execution.display import Display, folded_table


def prune(display: Display, days: float, *, artifacts: bool, delete: bool) -> None:
    """What was left behind and not touched for so many days; deletes it if asked to.

    artifacts: complete artifacts too that no run has used for so long, but for those that drafter lines need. Raises
    DraftsmithError for their deletion while a run of this home is alive.
    """
    with exclusive_for_prune(home()) if artifacts and delete else nullcontext():
        _prune(display, days, artifacts=artifacts, delete=delete)


def _prune(display: Display, days: float, *, artifacts: bool, delete: bool) -> None:
    before = time.time() - days * 86400
    found = leftovers(home(), before)
    replaced = [each for each in found if each.kind == REPLACED_ARTIFACT]
    found = [each for each in found if each not in replaced]
    if replaced and (named := _known(display, "replaced artifacts", Registry.content_ids)) is not None:
        found += [each for each in replaced if not _is_named(each, named)]
    if artifacts and (needed := _known(display, "complete artifacts", Registry.needed_content_ids)) is not None:
        found += unused_artifacts(open_store(home()).root, before, needed)
    if not found:
        display.line(f"nothing in {home()} was left behind and not touched for {days:g} days")
    elif delete:
        _delete(display, found)
    else:
        _list(display, found, f"draftsmith prune {'--artifacts ' if artifacts else ''}--days {days:g} --delete")
    if not artifacts:
        display.line("complete artifacts stay; `--artifacts` also takes those that nothing needs any more")


def _known(display: Display, what: str, ask: Callable[[Registry], set[str]]) -> set[str] | None:
    """Content ids that drafter lines need, by `ask`: a champion that was deleted has no other copy. None, and a line
    that says why, if nobody can say."""
    tracking = Tracking(home())
    if (why := registered.describe_other_trackers(tracking)) is not None:
        display.line(f"{what} are kept: {why}")
        return None
    try:
        return ask(Registry(tracking))
    except DraftsmithError as error:
        display.line(f"{what} are kept, as nobody can say whether a drafter line needs them: {error}")
        return None


def _is_named(replaced: Leftover, named: set[str]) -> bool:
    return replaced.content is not None and any(each.startswith(replaced.content) for each in named)


def _list(display: Display, found: Sequence[Leftover], command: str) -> None:
    table = folded_table("what", "path", "size", "last touched")
    for each in found:
        touched = local_time(datetime.fromtimestamp(each.touched, UTC))
        table.add_row(each.kind, str(each.path.relative_to(home())), format_bytes(each.bytes), touched)
    display.console.print(table)
    display.line(f"{_total(found)} in all; `{command}` removes it")


def _delete(display: Display, found: Sequence[Leftover]) -> None:
    removed = [each for each in found if each.remove()]
    kept = ", ".join(each.path.name for each in found if each not in removed)
    display.line(f"removed {_total(removed)}" + (f", but for what a run has taken up: {kept}" if kept else ""))


def _total(found: Sequence[Leftover]) -> str:
    return format_bytes(sum(each.bytes for each in found))
