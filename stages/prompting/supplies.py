"""Prompts from their sources: tasks that make them, files and data sets of rows, each in the order of a seed."""

from __future__ import annotations

import difflib
import random
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, TypeAlias

from draftsmith.artifacts.errors import DraftsmithError, RetryableError, one_line
from draftsmith.stages.prompting.aside import Aside
from draftsmith.stages.prompting.file_prompts import (
    Finish,
    Placed,
    ReadIds,
    file_rows,
    in_order,
    nearest_first,
    placed_rows,
)
from draftsmith.stages.prompting.files import BadRow
from draftsmith.stages.prompting.held_out import HELDOUT_SHARE, HeldOutBy, identity, place
from draftsmith.stages.prompting.rows import Message, SetAside, row_messages
from draftsmith.stages.prompting.sources import (
    SPLITS,
    Candidate,
    Counts,
    HuggingFaceSource,
    JsonlSource,
    PromptSource,
    ReasoningGymSource,
    Split,
)
from draftsmith.stages.targets.hub import hub_answered, hub_reason

_KEPT, _KEPT_TIMES = 256, 4  # of a file: candidates at least, and for each that is asked for
_SEEDS_PER_SPLIT = 1_000_000  # a procedural task takes its item i from seed + i: splits own separate ranges of seeds

Draw: TypeAlias = Callable[[Split], Iterator[Candidate]]


class Supply:
    """Candidates of one source, split by split; `label` names the source in errors about the whole of it.

    A candidate serves only the splits of its class (`held_out.py`). Files and data sets have one stream for all splits,
    where what one class passes over waits for the other; tasks have a stream for each split.
    """

    def __init__(
        self,
        label: str,
        draw: Draw,
        heldout_share: float,
        *,
        one_stream: bool = False,
        aside: Aside | None = None,
        of_class: Counter[bool] | None = None,
    ):
        """of_class: has what was looked at already."""
        self.label, self.heldout_share, self.aside = label, heldout_share, aside
        self._draw, self._one_stream = draw, one_stream
        self._open: dict[str, Iterator[Candidate]] = {}
        self._waiting: dict[bool, deque[Candidate]] = {True: deque(), False: deque()}
        # candidates looked at; True: of the held-out class
        self.of_class: Counter[bool] = Counter() if of_class is None else of_class
        self.passed_over = 0  # for good: of a task, and of the wrong class

    def next(self, split: Split) -> Candidate | None:
        """The next candidate for this split, None when there is none left."""
        held_out = split != "train"
        if self._waiting[held_out]:
            return self._waiting[held_out].popleft()
        stream = "all" if self._one_stream else split
        if stream not in self._open:
            self._open[stream] = self._draw(split)
        for candidate in self._open[stream]:
            of_class = place(candidate.group) < self.heldout_share
            self.of_class[of_class] += 1
            if of_class == held_out:
                return candidate
            if self._one_stream:
                self._waiting[of_class].append(candidate)
            else:
                self.passed_over += 1
        return None


@dataclass(frozen=True)
class Supplying:
    """What the supplies of all sources have in common, from section `prompts`."""

    system: str | None = None
    seed: int = 0
    limit: int = 1  # items that are looked at for one split of a procedural task (some have few different ones)
    heldout_share: float = HELDOUT_SHARE
    heldout_by: HeldOutBy = "prompt"
    wanted: Counts | None = None  # of all sources together; None: nobody knows
    only: Collection[str] | None = None  # of the files of rows (`files.matched`)
    max_bad_share: float = 0.0
    listed: TextIO | None = None  # takes the rows that were set aside
    read_ids: ReadIds | None = None  # without it, rows of token ids have no messages
    looked_at: Callable[[], None] = lambda: None  # called for every candidate, wanted or not


def supplies(source: PromptSource, common: Supplying) -> list[Supply]:
    """The supplies of a source, which share its counts: one a procedural task, one for its files or its data set."""
    share = source.heldout_share if source.heldout_share is not None else common.heldout_share

    def finish(label: str, messages: list[Message], where: str) -> Candidate:
        common.looked_at()
        given = messages
        if source.suffix:
            last = max(index for index, message in enumerate(messages) if message["role"] == "user")
            messages = [dict(message) for message in messages]
            messages[last]["content"] += source.suffix
        if common.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": common.system}, *messages]
        # the turns of a conversation begin alike without the suffix, which each has in another message
        decides = given if common.heldout_by == "conversation" else messages
        return Candidate(label, messages, where, identity(decides, common.heldout_by))

    match source:
        case ReasoningGymSource():
            draws = [(task, _task_draw(task, source, finish, common.seed, common.limit)) for task in source.tasks]
            return [Supply(label, draw, share) for label, draw in draws]
        case JsonlSource():
            return [_file_supply(source, finish, common, share, as_they_are=not (source.suffix or common.system))]
        case HuggingFaceSource():
            aside = Aside("prompts.max_bad_share", common.max_bad_share, common.listed)
            rows = _dataset_candidates(source, finish, common.seed, aside)
            return [Supply(source.id, lambda _split: rows, share, one_stream=True, aside=aside)]


def _task_draw(task: str, source: ReasoningGymSource, finish: Finish, seed: int, limit: int) -> Draw:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        near = difflib.get_close_matches(task, DATASETS, n=3)
        hint = (
            f"did you mean {' or '.join(near)}?" if near else f"known are for example {', '.join(sorted(DATASETS)[:5])}"
        )
        raise DraftsmithError(f"prompts.sources: reasoning_gym has no task {task}: {hint}")
    limit = min(limit, _SEEDS_PER_SPLIT)
    # Below 2**32, which numpy's generators need.
    base = (7919 * seed % 1000) * len(SPLITS) * _SEEDS_PER_SPLIT

    def draw(split: Split) -> Iterator[Candidate]:
        first = base + SPLITS.index(split) * _SEEDS_PER_SPLIT
        try:
            items = reasoning_gym.create_dataset(task, **{**source.options, "size": limit, "seed": first})
        except (TypeError, ValueError, AssertionError) as error:
            reason = one_line(error)
            raise DraftsmithError(
                f"prompts.sources: options of reasoning_gym task {task}: {reason}: correct them"
            ) from error
        for index in range(limit):
            question = items[index]["question"]
            yield finish(task, [{"role": "user", "content": question}], f"{task}, seed {first + index}")

    return draw


def _file_supply(source: JsonlSource, finish: Finish, common: Supplying, share: float, *, as_they_are: bool) -> Supply:
    """Keeps no more than it may be asked for; where none of it is trained on, it gives the held-out class alone.

    as_they_are: nothing is added to a prompt, so that its token ids stay what they are.
    """
    aside = Aside("prompts.max_bad_share", common.max_bad_share, common.listed)
    of_class: Counter[bool] = Counter()
    wanted = source.counts or common.wanted
    trained = wanted is None or wanted.train > 0

    def placed() -> Iterator[Placed]:
        first = aside.rows == 0  # what is read once more is counted and listed once
        counted = aside if first else Aside("prompts.max_bad_share", common.max_bad_share)
        rows = file_rows(source, counted, common.read_ids, common.only, as_they_are=as_they_are)
        for at, candidate in placed_rows(source, rows, finish, common.seed, counted):
            if trained or place(candidate.group) < share:
                yield at, candidate
            elif first:
                of_class[False] += 1

    if wanted is None:
        candidates = in_order(placed())
    else:
        asked = float(wanted.validation + wanted.heldout)
        if trained and share < 1:  # of both classes, until each has given what is asked of it
            asked = max(asked / share, wanted.train / (1 - share))
        candidates = nearest_first(placed, max(_KEPT, int(_KEPT_TIMES * asked)))
    return Supply(source.path, lambda _split: candidates, share, one_stream=True, aside=aside, of_class=of_class)


def _dataset_candidates(source: HuggingFaceSource, finish: Finish, seed: int, aside: Aside) -> Iterator[Candidate]:
    rows = load_rows(source)
    name = f"{source.id}, split {source.split}"
    if len(rows) == 0:
        raise DraftsmithError(f"{name}: the data set is empty: give another split")
    order = _passing(rows, source)
    random.Random(f"{seed} 0 {source.id} {source.split}").shuffle(order)

    def draw() -> Iterator[Candidate]:
        for index in order:
            where = f"{name}, row {index + 1}"
            aside.rows += 1
            try:
                messages = row_messages(rows[index], source.field, where)
            except SetAside as reason:
                aside.unusable(name, index + 1, None, str(reason))
                continue
            except DraftsmithError as error:
                aside.unreadable(BadRow(name, index + 1, str(error).removeprefix(f"{where}: ")))
                continue
            yield finish(source.set_name, messages, where)

    return draw()


def _passing(rows: Any, source: HuggingFaceSource) -> list[int]:
    """Indices of the rows that the filter lets through; only its columns are read."""
    if not source.filter:
        return list(range(len(rows)))
    where = f"{source.id}, split {source.split}"
    source.keeps(dict.fromkeys(rows.column_names), where)  # names a column that is not there
    columns = rows.select_columns(list(source.filter))
    order = [index for index, row in enumerate(columns) if source.keeps(row, where)]
    if not order:
        raise DraftsmithError(f"{where}: no row passes the filter {source.filter}: correct it")
    return order


def load_rows(source: HuggingFaceSource) -> Any:
    """The data set as a sequence of rows.

    Every failure becomes one DraftsmithError; a RetryableError if the hub is away, ill or too slow.
    """
    import datasets
    import httpx
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    revision = (source.commit or source.revision) if source.of_hub else source.revision
    try:
        return datasets.load_dataset(source.id, source.name, split=source.split, revision=revision)
    except datasets.exceptions.DatasetGenerationError as error:
        reason, cause = f"cannot be read ({one_line(error.__cause__ or error)}): repair its files", error
    except (ConnectionError, FileNotFoundError, datasets.exceptions.DatasetNotFoundError) as error:
        if Path(source.id).is_dir():
            reason, cause = f"no data files found ({one_line(error)}): put Parquet or JSON files there", error
        else:
            reason = (
                "no such folder here, and not to be had from the hub: check the id and the network, or give a folder"
            )
            cause = error
            # one that the hub does not have, or that holds no data, has an error class of its own
            away = isinstance(error, ConnectionError) or type(error) is FileNotFoundError
            if away and not constants.HF_HUB_OFFLINE:
                raise RetryableError(f"prompts.sources: data set {source.id}: {reason}") from error
    except (httpx.HTTPError, HfHubHTTPError) as error:
        kind = DraftsmithError if hub_answered(error) else RetryableError
        raise kind(f"prompts.sources: data set {source.id}: {hub_reason(error, revision)}") from error
    except ValueError as error:  # unknown split or configuration: the message lists the known ones
        reason, cause = f"{one_line(error)}: correct name or split", error
    raise DraftsmithError(f"prompts.sources: data set {source.id}: {reason}") from cause
