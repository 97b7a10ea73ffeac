"""Streams of prompts from their sources: tasks that generate them, and rows of files and data sets, in a seeded order.

A log has far more rows than prompts are needed. So a multiple of the needed prompts stays in memory while a file is
read, and the file is read again if that was not enough.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import random
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TextIO, TypeAlias

import httpx

from draftsmith.artifacts.errors import DraftsmithError, RetryableError, one_line
from draftsmith.stages.data.chat_template import PromptCandidate
from draftsmith.stages.data.held_out import hash_fraction, prompt_identity
from draftsmith.stages.data.prompts.stage import (
    SPLITS,
    HuggingFaceSource,
    JsonlSource,
    PromptsConfig,
    PromptSource,
    ReasoningGymSource,
    Split,
)
from draftsmith.stages.data.row_files import BadRow, RejectLog, Row, match_files, no_rows_error, read_rows
from draftsmith.stages.data.row_formats import (
    Message,
    RejectedRow,
    first_question,
    is_unicode,
    later_questions,
    matches_filter,
    messages_beside_ids,
    prompt_token_ids,
    rename_fields,
    row_labels,
)
from draftsmith.stages.data.time_window import row_time
from draftsmith.stages.targets.hub import hub_advice, is_hub_refusal

_MIN_KEPT, _KEPT_PER_PROMPT = 256, 4  # candidates of a file in memory: at least, and for each needed prompt
_SEEDS_PER_SPLIT = 1_000_000  # a task makes item i from seed + i; every split has a separate range of seeds

# Returns the messages of a prompt's ids, given the row's messages if it has any. Raises DraftsmithError for ids of
# another target.
ReadIds: TypeAlias = Callable[[list[int], list[Message] | None], list[Message]]
Rank: TypeAlias = tuple[tuple[float, ...], bytes]  # the order of a file's prompts: by time, then by seed and text
RankedCandidate: TypeAlias = tuple[Rank, PromptCandidate]


class PromptStream:
    """The candidates of one source, split by split; `label` names the source in errors.

    A candidate serves only the splits of its class (`held_out.py`). Files and data sets have one stream for all splits,
    in which candidates of the other class wait for their splits. Tasks have a stream for each split.
    """

    def __init__(
        self,
        label: str,
        candidates: Iterator[PromptCandidate] | Callable[[Split], Iterator[PromptCandidate]],
        heldout_share: float,
        rejects: RejectLog | None = None,
        class_counts: Counter[bool] | None = None,
    ):
        """Open the stream.

        candidates: those of all splits, or a function that returns those of one split. class_counts: counts of the
        candidates that were seen already.
        """
        self.label, self.heldout_share, self.rejects = label, heldout_share, rejects
        self._candidates = candidates
        self._open: dict[Split, Iterator[PromptCandidate]] = {}
        self._waiting: dict[bool, deque[PromptCandidate]] = {True: deque(), False: deque()}
        # candidates seen; True: of the held-out class
        self.class_counts: Counter[bool] = Counter() if class_counts is None else class_counts
        self.discarded = 0  # candidates of a task that were of the wrong class

    def next(self, split: Split) -> PromptCandidate | None:
        """Return the next candidate for the split; None if none is left."""
        held_out_split = split != "train"
        if self._waiting[held_out_split]:
            return self._waiting[held_out_split].popleft()
        if split not in self._open:
            self._open[split] = self._candidates(split) if callable(self._candidates) else self._candidates
        for candidate in self._open[split]:
            held_out = hash_fraction(candidate.identity) < self.heldout_share
            self.class_counts[held_out] += 1
            if held_out == held_out_split:
                return candidate
            if callable(self._candidates):
                self.discarded += 1
            else:
                self._waiting[held_out].append(candidate)
        return None


def open_streams(
    source: PromptSource,
    config: PromptsConfig,
    lines: TextIO | None = None,
    read_ids: ReadIds | None = None,
    on_candidate: Callable[[], None] = lambda: None,
) -> list[PromptStream]:
    """Return the streams of a source, which share its counts: one for each task, or one for its files or data set.

    lines: receives the rejected rows. read_ids: without it, rows of token ids have no messages. on_candidate: called
    for every candidate, used or not.
    """
    share = source.heldout_share or config.heldout_share

    def finish(candidate: PromptCandidate) -> PromptCandidate:
        on_candidate()
        messages = candidate.messages
        if source.suffix:
            last = max(index for index, message in enumerate(messages) if message["role"] == "user")
            messages = [dict(message) for message in messages]
            messages[last]["content"] += source.suffix
        if config.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": config.system}, *messages]
        # all turns of a conversation begin alike only without the suffix, which each has in another message
        hashed = candidate.messages if config.heldout_by == "conversation" else messages
        return replace(
            candidate,
            messages=messages,
            identity=prompt_identity(hashed, config.heldout_by),
            token_ids=candidate.token_ids if messages == candidate.messages else None,
            questions=tuple(f"{text}{source.suffix}" for text in candidate.questions),
        )

    if isinstance(source, ReasoningGymSource):
        return [PromptStream(task, _task_candidates(task, source, finish, config), share) for task in source.tasks]
    rejects = RejectLog(f"{config.section}.max_bad_share", config.max_bad_share, lines)
    unchanged = not (source.suffix or config.system)

    def candidates(rows: Iterable[Row | BadRow], rejects: RejectLog) -> Iterator[tuple[Row, PromptCandidate]]:
        for row, candidate in prompt_rows(
            source, rows, rejects, read_ids, unchanged=unchanged, slices=config.slices, of_logs=config.of_logs
        ):
            yield row, finish(candidate)

    if isinstance(source, HuggingFaceSource):
        stream = (candidate for _, candidate in candidates(_dataset_rows(source, config.seed), rejects))
        return [PromptStream(source.location, stream, share, rejects)]

    class_counts: Counter[bool] = Counter()
    counts = {split: getattr(source.counts, split) if source.counts else config.prompt_count(split) for split in SPLITS}

    def ranked() -> Iterator[RankedCandidate]:
        """Yield the candidates that may be used: without training prompts, only those of the held-out class."""
        first, empty = rejects.rows == 0, True  # a second reading must not count or list rows again
        counted = rejects if first else RejectLog(f"{config.section}.max_bad_share", config.max_bad_share)
        rows = read_rows(match_files([source.path], config.paths_field, source.pinned_files))
        for row, candidate in candidates(rows, counted):
            empty = False
            if counts["train"] or hash_fraction(candidate.identity) < share:
                digest = hashlib.sha256(f"{config.seed} 0 {candidate.text_hash}".encode()).digest()
                yield (_time_rank(source, row), digest), candidate
            elif first:
                class_counts[False] += 1
        if empty:
            raise DraftsmithError(_no_prompts_error(source, counted))

    needed = float(counts["validation"] + counts["heldout"])
    if counts["train"] and share < 1:  # candidates of both classes, until each has enough
        needed = max(needed / share, counts["train"] / (1 - share))
    in_order = by_rank(ranked, max(_MIN_KEPT, int(_KEPT_PER_PROMPT * needed)))
    return [PromptStream(source.location, in_order, share, rejects, class_counts)]


def _task_candidates(
    task: str,
    source: ReasoningGymSource,
    finish: Callable[[PromptCandidate], PromptCandidate],
    config: PromptsConfig,
) -> Callable[[Split], Iterator[PromptCandidate]]:
    """Return a function that returns the candidates of a task for one split."""
    from reasoning_gym.factory import DATASETS, create_dataset  # takes seconds to load, and few configs have tasks

    if task not in DATASETS:
        near = difflib.get_close_matches(task, DATASETS, n=3)
        hint = f"Did you mean {' or '.join(near)}?" if near else f"Examples: {', '.join(sorted(DATASETS)[:5])}."
        raise DraftsmithError(f"prompts.sources: reasoning_gym has no task {task}. {hint}")
    limit = min(_max_candidates(config), _SEEDS_PER_SPLIT)
    # below 2**32, the limit of numpy's generators
    base = (7919 * config.seed % 1000) * len(SPLITS) * _SEEDS_PER_SPLIT

    def candidates(split: Split) -> Iterator[PromptCandidate]:
        first = base + SPLITS.index(split) * _SEEDS_PER_SPLIT
        try:
            items = create_dataset(task, **{**source.options, "size": limit, "seed": first})
        except (TypeError, ValueError, AssertionError) as error:
            raise DraftsmithError(
                f"prompts.sources: reasoning_gym rejects the options of task {task} ({one_line(error)}). Correct them."
            ) from error
        for index in range(limit):
            messages = [{"role": "user", "content": items[index]["question"]}]
            yield finish(PromptCandidate(task, messages, f"{task}, seed {first + index}"))

    return candidates


def _max_candidates(config: PromptsConfig) -> int:
    """Return the limit of a task's candidates for one split: twenty per prompt, and more for those of wrong class."""
    shares = [source.heldout_share or config.heldout_share for source in config.sources]
    held_out = max(config.prompt_count("heldout"), config.prompt_count("validation")) / min(shares)
    train = config.prompt_count("train") / (1 - max(share for share in [*shares, 0.0] if share < 1))
    return math.ceil(20 * max(held_out, train) + 100 / min(shares))


def prompt_rows(
    source: JsonlSource | HuggingFaceSource,
    rows: Iterable[Row | BadRow],
    rejects: RejectLog,
    read_ids: ReadIds | None = None,
    *,
    unchanged: bool = True,
    slices: Sequence[str] = (),
    of_logs: bool = False,
) -> Iterator[tuple[Row, PromptCandidate]]:
    """Yield the rows that pass the filter, with their prompts, before suffix and system prompt are added.

    Unusable rows are counted in `rejects`, which is checked at the end.
    read_ids: without it, prompts that have only token ids have no messages. unchanged: nothing will be added to a
    prompt; otherwise a prompt of token ids is made again from its messages, which have no tools. slices: fields whose
    values are the labels of a prompt. of_logs: see `row_messages`.
    """
    for row in rows:
        rejects.rows += 1
        if isinstance(row, BadRow):
            rejects.add_unreadable(row)
            continue
        try:
            if not matches_filter(source.filter, row.fields, row.where):
                continue
            fields = rename_fields(row.fields, source.fields if isinstance(source, JsonlSource) else {})
            ids = prompt_token_ids(fields, source.field, row.where)
            later: tuple[str, ...] = ()
            if ids is None:
                messages = first_question(fields, source.field, row.where, of_logs=of_logs)
                later = later_questions(fields, source.field)
            else:
                known = messages_beside_ids(fields, tools=unchanged)
                messages = read_ids(ids, known) if read_ids is not None else known or []
            labels = row_labels(row.fields, slices)
            if not is_unicode(*(message["content"] for message in messages), *later, *labels):
                raise DraftsmithError("not valid Unicode (half a surrogate pair): correct the row")
        except RejectedRow as reason:
            rejects.add_unusable(row.file, row.number, None, str(reason))
        except DraftsmithError as error:
            rejects.add_unreadable(BadRow(row.file, row.number, str(error).removeprefix(f"{row.where}: ")))
        else:
            yield row, PromptCandidate(source.set_name, messages, row.where, b"", ids, labels, later)
    if not rejects.rows:
        raise DraftsmithError(no_rows_error([source.location]))
    rejects.check()


def _no_prompts_error(source: JsonlSource, rejects: RejectLog) -> str:
    if not rejects.reasons:
        return f"{source.path}: no row passes the filter {source.filter}. Correct it."
    passed = "; the filter excludes the others" if source.filter else ""
    return f"{source.path}: none of {rejects.rows} rows can be a prompt ({rejects.describe()}{passed}). Use other rows."


def _time_rank(source: JsonlSource, row: Row) -> tuple[float, ...]:
    """Return a row's rank by time: all rows in the window are equal, then newest first, then rows without time."""
    if (since := source.since_time) is None:
        return ()
    time = row_time(rename_fields(row.fields, source.fields))
    if time is None:
        return (2.0,)
    return (0.0,) if time >= since else (1.0, -time.timestamp())


def by_rank(read: Callable[[], Iterable[RankedCandidate]], size: int) -> Iterator[PromptCandidate]:
    """Return all candidates in the order of their ranks, with at most `2 * size` different ones in memory.

    read: returns all candidates. It is called here, and again (with four times the size) whenever those in memory are
    used up.
    """
    first = _lowest_ranks(read(), size, None)

    def candidates() -> Iterator[PromptCandidate]:
        kept, times, more = first
        limit = size
        while True:
            for rank in sorted(kept):
                for _ in range(times[rank]):  # the caller counts duplicates
                    yield kept[rank]
            if not more:
                return
            limit *= 4
            kept, times, more = _lowest_ranks(read(), limit, max(kept))

    return candidates()


def _lowest_ranks(
    rows: Iterable[RankedCandidate], size: int, after: Rank | None
) -> tuple[dict[Rank, PromptCandidate], Counter[Rank], bool]:
    """Return the first `size` different candidates after a rank, how often each occurs, and whether more follow."""
    kept: dict[Rank, PromptCandidate] = {}
    times: Counter[Rank] = Counter()
    last: Rank | None = None  # candidates after it are dropped
    for rank, candidate in rows:
        if (after is not None and rank <= after) or (last is not None and rank > last):
            continue
        kept.setdefault(rank, candidate)
        times[rank] += 1
        if len(kept) > 2 * size:
            last = _drop_highest(kept, times, size)
    if len(kept) > size:
        last = _drop_highest(kept, times, size)
    return kept, times, last is not None


def _drop_highest(kept: dict[Rank, PromptCandidate], times: Counter[Rank], size: int) -> Rank:
    """Keep the first `size`; return the rank of the last of them."""
    ordered = sorted(kept)
    for rank in ordered[size:]:
        del kept[rank], times[rank]
    return ordered[size - 1]


def _dataset_rows(source: HuggingFaceSource, seed: int) -> Iterator[Row]:
    """Yield the rows of a data set in the order of the seed. For the filter, only its columns are read."""
    rows = load_rows(source)
    name = f"{source.id}, split {source.split}"
    if len(rows) == 0:
        raise DraftsmithError(f"{name}: the data set is empty. Choose another split.")
    order = list(range(len(rows)))
    if source.filter:
        matches_filter(source.filter, dict.fromkeys(rows.column_names), name)  # raises for a column that is missing
        columns = rows.select_columns(list(source.filter))
        order = [index for index, row in enumerate(columns) if matches_filter(source.filter, row, name)]
        if not order:
            raise DraftsmithError(f"{name}: no row passes the filter {source.filter}. Correct it.")
    random.Random(f"{seed} 0 {source.id} {source.split}").shuffle(order)
    for index in order:
        yield Row(name, index + 1, rows[index])


def load_rows(source: HuggingFaceSource) -> Any:
    """Return the data set as a sequence of rows.

    Raises DraftsmithError, or RetryableError if the Hub does not answer.
    """
    import datasets  # takes a second to load, and `draftsmith check` needs it only for these sources
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    revision = (source.commit or source.revision) if source.is_on_hub else source.revision
    kind: type[DraftsmithError] = DraftsmithError
    try:
        return datasets.load_dataset(source.id, source.name, split=source.split, revision=revision)
    except datasets.exceptions.DatasetGenerationError as error:
        reason, cause = f"cannot be read ({one_line(error.__cause__ or error)}). Repair its files.", error
    except (httpx.HTTPError, HfHubHTTPError) as error:
        reason, cause = hub_advice(error, revision), error
        kind = DraftsmithError if is_hub_refusal(error) else RetryableError
    except (ConnectionError, FileNotFoundError) as error:
        cause = error
        if source.is_on_hub:
            reason = "no such folder here, and not on the Hub. Check the id and the network, or name a folder."
            # a data set that does not exist on the Hub, or has no data, raises another class
            away = isinstance(error, ConnectionError) or type(error) is FileNotFoundError
            kind = RetryableError if away and not constants.HF_HUB_OFFLINE else DraftsmithError
        else:
            reason = f"no data files found ({one_line(error)}). Put Parquet or JSON files there."
    except ValueError as error:  # unknown split or configuration: the message lists the known ones
        reason, cause = f"{one_line(error)}. Correct name or split.", error
    raise kind(f"prompts.sources: data set {source.id}: {reason}") from cause
