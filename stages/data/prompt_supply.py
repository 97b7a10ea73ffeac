"""Prompts from their sources: tasks that make them, files and data sets of rows, each in the order of a seed.

A log has far more rows than are asked for. So of a file some multiple of that is kept while it is read, and it is read
once more if it was not enough.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import random
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, TextIO, TypeAlias

from draftsmith.artifacts.errors import DraftsmithError, RetryableError, one_line
from draftsmith.stages.data.held_out import identity, place
from draftsmith.stages.data.prompt_config import (
    SPLITS,
    Candidate,
    HuggingFaceSource,
    JsonlSource,
    PromptsConfig,
    PromptSource,
    ReasoningGymSource,
    Split,
)
from draftsmith.stages.data.rejects import Aside
from draftsmith.stages.data.row_files import BadRow, Row, matched, no_rows, read_rows
from draftsmith.stages.data.row_formats import (
    Message,
    SetAside,
    is_unicode,
    messages_beside_ids,
    passes,
    prompt_ids,
    renamed,
    row_messages,
)
from draftsmith.stages.data.time_window import row_time
from draftsmith.stages.target.hub import hub_answered, hub_reason

_KEPT, _KEPT_TIMES = 256, 4  # of a file: candidates at least, and for each that is asked for
_SEEDS_PER_SPLIT = 1_000_000  # a procedural task takes its item i from seed + i: splits own separate ranges of seeds

# A prompt's ids, and its messages where a row has them → its messages. Raises DraftsmithError for another target's ids.
ReadIds: TypeAlias = Callable[[list[int], list[Message] | None], list[Message]]
Finish: TypeAlias = Callable[[str, list[Message], str], Candidate]  # of a set's name, messages and where they stand
Place: TypeAlias = tuple[tuple[float, ...], bytes]  # in the order: by time, then by a hash of seed and text
Placed: TypeAlias = tuple[Place, Candidate]
Prompt: TypeAlias = tuple[Row, list[Message], list[int] | None]  # of a row: its messages, and token ids if it has them


class Supply:
    """Candidates of one source, split by split; `label` names the source in errors about the whole of it.

    A candidate serves only the splits of its class (`held_out.py`). Files and data sets have one stream for all splits,
    where what one class passes over waits for the other; tasks have a stream for each split.
    """

    def __init__(
        self,
        label: str,
        draw: Iterator[Candidate] | Callable[[Split], Iterator[Candidate]],
        heldout_share: float,
        aside: Aside | None = None,
        of_class: Counter[bool] | None = None,
    ):
        """draw: the stream of all splits, or what makes that of one. of_class: has what was looked at already."""
        self.label, self.heldout_share, self.aside = label, heldout_share, aside
        self._draw = draw
        self._open: dict[Split, Iterator[Candidate]] = {}
        self._waiting: dict[bool, deque[Candidate]] = {True: deque(), False: deque()}
        # candidates looked at; True: of the held-out class
        self.of_class: Counter[bool] = Counter() if of_class is None else of_class
        self.passed_over = 0  # for good: of a task, and of the wrong class

    def next(self, split: Split) -> Candidate | None:
        """Return the next candidate for this split, None when there is none left."""
        held_out = split != "train"
        if self._waiting[held_out]:
            return self._waiting[held_out].popleft()
        if split not in self._open:
            self._open[split] = self._draw(split) if callable(self._draw) else self._draw
        for candidate in self._open[split]:
            of_class = place(candidate.group) < self.heldout_share
            self.of_class[of_class] += 1
            if of_class == held_out:
                return candidate
            if callable(self._draw):
                self.passed_over += 1
            else:
                self._waiting[of_class].append(candidate)
        return None


def supplies(
    source: PromptSource,
    config: PromptsConfig,
    listed: TextIO | None = None,
    read_ids: ReadIds | None = None,
    looked_at: Callable[[], None] = lambda: None,
) -> list[Supply]:
    """Return the supplies of a source, which share its counts: one a task, one for its files or its data set.

    listed: takes the rows that are set aside. read_ids: without it, rows of token ids have no messages. looked_at:
    called for every candidate, wanted or not.
    """
    share = source.heldout_share or config.heldout_share

    def finish(label: str, messages: list[Message], where: str) -> Candidate:
        looked_at()
        given = messages
        if source.suffix:
            last = max(index for index, message in enumerate(messages) if message["role"] == "user")
            messages = [dict(message) for message in messages]
            messages[last]["content"] += source.suffix
        if config.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": config.system}, *messages]
        # the turns of a conversation begin alike without the suffix, which each has in another message
        decides = given if config.heldout_by == "conversation" else messages
        return Candidate(label, messages, where, identity(decides, config.heldout_by))

    if isinstance(source, ReasoningGymSource):
        return [Supply(task, _task_draw(task, source, finish, config), share) for task in source.tasks]
    aside = Aside("prompts.max_bad_share", config.max_bad_share, listed)
    as_they_are = not (source.suffix or config.system)

    def candidates(rows: Iterable[Row | BadRow], aside: Aside) -> Iterator[tuple[Row, Candidate]]:
        for row, messages, ids in prompt_rows(source, rows, aside, read_ids, as_they_are=as_they_are):
            candidate = finish(source.set_name, messages, row.where)
            if ids is not None and candidate.messages == messages:  # nothing was added: its tokens are known
                candidate = replace(candidate, token_ids=ids)
            yield row, candidate

    if isinstance(source, HuggingFaceSource):
        stream = (candidate for _, candidate in candidates(_dataset_rows(source, config.seed), aside))
        return [Supply(source.location, stream, share, aside)]

    of_class: Counter[bool] = Counter()
    wanted = {split: getattr(source.counts, split) if source.counts else config.wanted(split) for split in SPLITS}

    def placed() -> Iterator[Placed]:
        """Yield the candidates that may be asked for; where none is trained on, those of the held-out class alone."""
        first, empty = aside.rows == 0, True  # what is read once more is counted and listed once
        counted = aside if first else Aside("prompts.max_bad_share", config.max_bad_share)
        rows = read_rows(matched([source.path], "prompts.sources", source.pinned_files))
        for row, candidate in candidates(rows, counted):
            empty = False
            if wanted["train"] or place(candidate.group) < share:
                lot = hashlib.sha256(f"{config.seed} 0 {candidate.text_hash}".encode()).digest()
                yield (_age(source, row), lot), candidate
            elif first:
                of_class[False] += 1
        if empty:
            raise DraftsmithError(_no_prompts(source, counted))

    asked = float(wanted["validation"] + wanted["heldout"])
    if wanted["train"] and share < 1:  # of both classes, until each has given what is asked of it
        asked = max(asked / share, wanted["train"] / (1 - share))
    return [
        Supply(source.location, nearest_first(placed, max(_KEPT, int(_KEPT_TIMES * asked))), share, aside, of_class)
    ]


def _task_draw(
    task: str, source: ReasoningGymSource, finish: Finish, config: PromptsConfig
) -> Callable[[Split], Iterator[Candidate]]:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        near = difflib.get_close_matches(task, DATASETS, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"it has for example {', '.join(sorted(DATASETS)[:5])}"
        raise DraftsmithError(f"prompts.sources: reasoning_gym has no task {task}: {hint}")
    limit = min(_looked_at(config), _SEEDS_PER_SPLIT)
    # Below 2**32, which numpy's generators need.
    base = (7919 * config.seed % 1000) * len(SPLITS) * _SEEDS_PER_SPLIT

    def draw(split: Split) -> Iterator[Candidate]:
        first = base + SPLITS.index(split) * _SEEDS_PER_SPLIT
        try:
            items = reasoning_gym.create_dataset(task, **{**source.options, "size": limit, "seed": first})
        except (TypeError, ValueError, AssertionError) as error:
            raise DraftsmithError(
                f"prompts.sources: options of reasoning_gym task {task}: {one_line(error)}: correct them"
            ) from error
        for index in range(limit):
            question = items[index]["question"]
            yield finish(task, [{"role": "user", "content": question}], f"{task}, seed {first + index}")

    return draw


def _looked_at(config: PromptsConfig) -> int:
    """Return candidates of a task for one split: twenty for each prompt, more for each that is of the wrong class."""
    shares = [source.heldout_share or config.heldout_share for source in config.sources]
    held_out = max(config.wanted("heldout"), config.wanted("validation")) / min(shares)
    train = config.wanted("train") / (1 - max(share for share in [*shares, 0.0] if share < 1))
    return math.ceil(20 * max(held_out, train) + 100 / min(shares))


def prompt_rows(
    source: JsonlSource | HuggingFaceSource,
    rows: Iterable[Row | BadRow],
    aside: Aside,
    read_ids: ReadIds | None = None,
    *,
    as_they_are: bool = True,
) -> Iterator[Prompt]:
    """Yield the rows that the filter lets through, with their prompts; the others are counted in `aside`, and checked.

    read_ids: without it, prompts of token ids alone have no messages. as_they_are: nothing will be added to a prompt;
    else one of token ids is made anew of its messages too, and tools are lost.
    """
    for row in rows:
        aside.rows += 1
        if isinstance(row, BadRow):
            aside.unreadable(row)
            continue
        try:
            if not passes(source.filter, row.fields, row.where):
                continue
            fields = renamed(row.fields, source.fields if isinstance(source, JsonlSource) else {})
            ids = prompt_ids(fields, source.field, row.where)
            if ids is None:
                messages = row_messages(fields, source.field, row.where)
            else:
                known = messages_beside_ids(fields, tools=as_they_are)
                messages = read_ids(ids, known) if read_ids is not None else known or []
            if not is_unicode(*(message["content"] for message in messages)):
                raise DraftsmithError("not valid Unicode (half a surrogate pair): correct the row")
        except SetAside as reason:
            aside.unusable(row.file, row.number, None, str(reason))
        except DraftsmithError as error:
            aside.unreadable(BadRow(row.file, row.number, str(error).removeprefix(f"{row.where}: ")))
        else:
            yield row, messages, ids
    if not aside.rows:
        raise DraftsmithError(no_rows([source.location]))
    aside.check()


def _no_prompts(source: JsonlSource, aside: Aside) -> str:
    if not aside.reasons:
        return f"{source.path}: no row passes the filter {source.filter}: correct it"
    passed = "; the filter lets no other through" if source.filter else ""
    return f"{source.path}: none of {aside.rows} rows can be a prompt ({aside.said()}{passed}): give other rows"


def _age(source: JsonlSource, row: Row) -> tuple[float, ...]:
    """Return its place by time: those inside the window are equal, then the newest is first, and last those without."""
    if (since := source.since_time) is None:
        return ()
    time = row_time(renamed(row.fields, source.fields))
    if time is None:
        return (2.0,)
    return (0.0,) if time >= since else (1.0, -time.timestamp())


def nearest_first(read: Callable[[], Iterable[Placed]], most: int) -> Iterator[Candidate]:
    """Return all candidates by their places, with at most twice `most` different ones in memory.

    read: gives all candidates; called here, and again whenever what was kept is used up (then four times as many are).
    """
    nearest = _nearest(read(), most, None)

    def candidates() -> Iterator[Candidate]:
        kept, times, more = nearest
        size = most
        while True:
            for at in sorted(kept):
                for _ in range(times[at]):  # a duplicate is somebody else's to count
                    yield kept[at]
            if not more:
                return
            size *= 4
            kept, times, more = _nearest(read(), size, max(kept))

    return candidates()


def _nearest(
    rows: Iterable[Placed], most: int, after: Place | None
) -> tuple[dict[Place, Candidate], Counter[Place], bool]:
    """Return the `most` first different candidates after a place, how often each is there, and whether more follow."""
    kept: dict[Place, Candidate] = {}
    times: Counter[Place] = Counter()
    last: Place | None = None  # what is after it is not kept
    for at, candidate in rows:
        if (after is not None and at <= after) or (last is not None and at > last):
            continue
        kept.setdefault(at, candidate)
        times[at] += 1
        if len(kept) > 2 * most:
            last = _cut(kept, times, most)
    if len(kept) > most:
        last = _cut(kept, times, most)
    return kept, times, last is not None


def _cut(kept: dict[Place, Candidate], times: Counter[Place], most: int) -> Place:
    """Leave the first `most`; return the place of the last of them."""
    ordered = sorted(kept)
    for far in ordered[most:]:
        del kept[far], times[far]
    return ordered[most - 1]


def _dataset_rows(source: HuggingFaceSource, seed: int) -> Iterator[Row]:
    """Yield the rows of a data set in the order of the seed; of the filter only its columns are read."""
    rows = load_rows(source)
    name = f"{source.id}, split {source.split}"
    if len(rows) == 0:
        raise DraftsmithError(f"{name}: the data set is empty: give another split")
    order = list(range(len(rows)))
    if source.filter:
        passes(source.filter, dict.fromkeys(rows.column_names), name)  # names a column that is not there
        columns = rows.select_columns(list(source.filter))
        order = [index for index, row in enumerate(columns) if passes(source.filter, row, name)]
        if not order:
            raise DraftsmithError(f"{name}: no row passes the filter {source.filter}: correct it")
    random.Random(f"{seed} 0 {source.id} {source.split}").shuffle(order)
    for index in order:
        yield Row(name, index + 1, rows[index])


def load_rows(source: HuggingFaceSource) -> Any:
    """Return the data set as a sequence of rows.

    Raises DraftsmithError, RetryableError if the hub is away, ill or too slow.
    """
    import datasets
    import httpx
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    revision = (source.commit or source.revision) if source.of_hub else source.revision
    kind: type[DraftsmithError] = DraftsmithError
    try:
        return datasets.load_dataset(source.id, source.name, split=source.split, revision=revision)
    except datasets.exceptions.DatasetGenerationError as error:
        reason, cause = f"cannot be read ({one_line(error.__cause__ or error)}): repair its files", error
    except (httpx.HTTPError, HfHubHTTPError) as error:
        reason, cause = hub_reason(error, revision), error
        kind = DraftsmithError if hub_answered(error) else RetryableError
    except (ConnectionError, FileNotFoundError) as error:
        cause = error
        if source.of_hub:
            reason = "no such folder here, and not on the hub: check the id and the network, or give a folder"
            # one that the hub does not have, or that holds no data, has an error class of its own
            away = isinstance(error, ConnectionError) or type(error) is FileNotFoundError
            kind = RetryableError if away and not constants.HF_HUB_OFFLINE else DraftsmithError
        else:
            reason = f"no data files found ({one_line(error)}): put Parquet or JSON files there"
    except ValueError as error:  # unknown split or configuration: the message lists the known ones
        reason, cause = f"{one_line(error)}: correct name or split", error
    raise kind(f"prompts.sources: data set {source.id}: {reason}") from cause
