"""Prompts of files of rows, in the order of a seed: all of them, or only as many as are asked for.

A log has far more rows than are asked for. So some multiple of that is kept while its files are read, and they are
read once more if it was not enough.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace
from typing import TypeAlias

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.prompting.aside import Aside
from draftsmith.stages.prompting.files import BadRow, Row, matched, no_rows, read_rows
from draftsmith.stages.prompting.rows import (
    Message,
    SetAside,
    is_unicode,
    messages_beside_ids,
    prompt_ids,
    renamed,
    row_messages,
)
from draftsmith.stages.prompting.sources import Candidate, JsonlSource
from draftsmith.stages.prompting.times import row_time

# A prompt's ids, and its messages where a row has them → its messages. Raises DraftsmithError for another target's ids.
ReadIds: TypeAlias = Callable[[list[int], list[Message] | None], list[Message]]
Finish: TypeAlias = Callable[[str, list[Message], str], Candidate]  # of a set's name, messages and where they stand
Place: TypeAlias = tuple[tuple[float, ...], bytes]  # by time, then by lot; equal prompts of a time have one place
Placed: TypeAlias = tuple[Place, Candidate]


def file_rows(
    source: JsonlSource,
    aside: Aside,
    read_ids: ReadIds | None = None,
    only: Collection[str] | None = None,
    *,
    as_they_are: bool = True,
) -> Iterator[tuple[Row, list[Message], list[int] | None]]:
    """Rows that the filter lets through, with their prompts, and these as token ids where a row has them; the others
    are counted in `aside`, which is checked. Without `read_ids` prompts of token ids alone have no messages.

    only: of the files (`matched`). as_they_are: nothing will be added to a prompt; else one of token ids is made anew
    of its messages too, and tools are lost.
    """
    for row in read_rows(matched([source.path], "prompts.sources", only)):
        aside.rows += 1
        if isinstance(row, BadRow):
            aside.unreadable(row)
            continue
        try:
            kept = source.keeps(row.fields, row.where)
            fields = renamed(row.fields, source.fields)
            ids = prompt_ids(fields, source.field, row.where) if kept else None
            if ids is not None:
                known = messages_beside_ids(fields, tools=as_they_are)
                messages = read_ids(ids, known) if read_ids is not None else known or []
            else:
                messages = row_messages(fields, source.field, row.where) if kept else []
        except SetAside as reason:
            aside.unusable(row.file, row.number, None, str(reason))
            continue
        except DraftsmithError as error:
            aside.unreadable(BadRow(row.file, row.number, str(error).removeprefix(f"{row.where}: ")))
            continue
        if not is_unicode(*(message["content"] for message in messages)):
            aside.unreadable(BadRow(row.file, row.number, "not valid Unicode (half a surrogate pair): correct the row"))
        elif kept:
            yield row, messages, ids
    if not aside.rows:
        raise DraftsmithError(no_rows([source.path]))
    aside.check()


def placed_rows(
    source: JsonlSource,
    rows: Iterable[tuple[Row, list[Message], list[int] | None]],
    finish: Finish,
    seed: int,
    aside: Aside,
) -> Iterator[Placed]:
    """The rows as candidates, with their places. Raises DraftsmithError, behind the last one, if there was none."""
    drawn, empty = f"{seed} 0", True
    for row, messages, ids in rows:
        empty, candidate = False, finish(source.set_name, messages, row.where)
        if ids is not None and candidate.messages == messages:  # nothing was added: its tokens are known
            candidate = replace(candidate, token_ids=ids)
        lot = hashlib.sha256(f"{drawn} {candidate.text_hash}".encode()).digest()
        yield (_age(source, row), lot), candidate
    if empty and aside.reasons:
        passed = "; the filter lets no other through" if source.filter else ""
        raise DraftsmithError(
            f"{source.path}: none of {aside.rows} rows can be a prompt ({aside.said()}{passed}): give other rows"
        )
    if empty:
        raise DraftsmithError(f"{source.path}: no row passes the filter {source.filter}: correct it")


def _age(source: JsonlSource, row: Row) -> tuple[float, ...]:
    """Its place by time: those inside the window are equal, behind them the newest is first, and last those without."""
    if (since := source.since_time) is None:
        return ()
    time = row_time(renamed(row.fields, source.fields))
    if time is None:
        return (2.0,)
    return (0.0,) if time >= since else (1.0, -time.timestamp())


def in_order(rows: Iterable[Placed]) -> Iterator[Candidate]:
    """All candidates by their places."""
    return iter([candidate for _, candidate in sorted(rows, key=lambda each: each[0])])


def nearest_first(read: Callable[[], Iterable[Placed]], most: int) -> Iterator[Candidate]:
    """The same, with at most twice `most` different ones in memory.

    read: gives all candidates; called here, and again whenever what was kept is used up (then four times as many are).
    """
    return _from_there(read, _nearest(read(), most, None), most)


def _from_there(
    read: Callable[[], Iterable[Placed]], nearest: tuple[dict[Place, Candidate], Counter[Place], bool], most: int
) -> Iterator[Candidate]:
    while True:
        kept, times, more = nearest
        for at in sorted(kept):
            for _ in range(times[at]):  # a duplicate is somebody else's to count
                yield kept[at]
        if not more:
            return
        most *= 4
        nearest = _nearest(read(), most, max(kept))


def _nearest(
    rows: Iterable[Placed], most: int, behind: Place | None
) -> tuple[dict[Place, Candidate], Counter[Place], bool]:
    """The `most` first different candidates behind a place, how often each is there, and whether there are more."""
    kept: dict[Place, Candidate] = {}
    times: Counter[Place] = Counter()
    last: Place | None = None  # what is behind it is not kept
    for at, candidate in rows:
        if (behind is not None and at <= behind) or (last is not None and at > last):
            continue
        kept.setdefault(at, candidate)
        times[at] += 1
        if len(kept) > 2 * most:
            last = _cut(kept, times, most)
    if len(kept) > most:
        last = _cut(kept, times, most)
    return kept, times, last is not None


def _cut(kept: dict[Place, Candidate], times: Counter[Place], most: int) -> Place:
    """Leaves the first `most`; returns the place of the last of them."""
    ordered = sorted(kept)
    for far in ordered[most:]:
        del kept[far], times[far]
    return ordered[most - 1]
