"""Where prompts come from: procedural tasks, JSON Lines files and data sets, each read as chat messages."""

from __future__ import annotations

import difflib
import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.contract import Config
from draftsmith.stages.prompting.rows import Message, read_jsonl, row_messages

Split = Literal["train", "validation", "heldout"]
# Held-out prompts are drawn first: a text that comes up twice stays there and is not trained on.
SPLITS: tuple[Split, ...] = ("heldout", "validation", "train")

_PROCEDURAL_SEED = 1_000  # behind the seeds of the text that targets are trained on
_SEEDS_PER_SPLIT = 1_000_000  # a procedural task takes its item i from seed + i: splits own separate ranges of seeds


class Counts(Config):
    """How many prompts of each split one source gives."""

    train: int = Field(default=0, ge=0)
    validation: int = Field(default=0, ge=0)
    heldout: int = Field(default=0, ge=0)


class _SourceBase(Config):
    counts: Counts | None = Field(
        default=None, description="prompts of each split from this source; for every source or for none"
    )
    system: str | None = Field(default=None, description="system prompt of this source; overrides prompts.system")
    suffix: str = Field(default="", description="appended to the last user message, e.g. an instruction how to answer")
    seed: int = Field(default=0, ge=0)


class ReasoningGymSource(_SourceBase):
    """Procedural tasks of the reasoning-gym package, in turn; every split has its own seeds."""

    kind: Literal["reasoning_gym"] = "reasoning_gym"
    tasks: list[str] = Field(min_length=1, description="names of reasoning-gym data sets, e.g. gsm_symbolic")
    options: dict[str, Any] = Field(
        default={}, description="settings of the tasks; other settings for others: another source"
    )


Value: TypeAlias = str | int | float | bool


class _RowSource(_SourceBase):
    """What files and data sets have in common: rows with fields."""

    label: str | None = Field(default=None, description="name in the tables; left out: the file's name or the id")
    field: str | None = Field(default=None, description="the field with the text or messages, e.g. question")
    filter: dict[str, Value | list[Value]] = Field(
        default={}, description="only rows whose fields have this value or one of these, e.g. {source: olympiads}"
    )

    def keeps(self, row: Mapping[str, Any], where: str) -> bool:
        """Whether `filter` lets the row through; `where` names the row in the error for a field that it lacks."""
        for name, wanted in self.filter.items():
            if name not in row:
                known = ", ".join(sorted(row)) or "none"
                raise DraftsmithError(f"{where}: no field {name} to filter by: correct filter, its fields are {known}")
            if row[name] not in (wanted if isinstance(wanted, list) else [wanted]):
                return False
        return True


class ProceduralSource(_SourceBase):
    """Prompts of `stages/procedural/text.py`, families in turn: for experiments with a target trained on that text."""

    kind: Literal["procedural"] = "procedural"
    families: list[str] = Field(min_length=1, description="e.g. record, dialogue, story, program, problem")


class JsonlSource(_RowSource):
    """A JSON Lines file, plain or .gz; rows are shuffled by seed and each goes into at most one split."""

    kind: Literal["jsonl"] = "jsonl"
    path: str = Field(min_length=1, description="relative to the current directory")


class HuggingFaceSource(_RowSource):
    """A data set of the hub, or a local folder of Parquet or JSON files, read by `datasets`."""

    kind: Literal["huggingface"] = "huggingface"
    id: str = Field(min_length=1, description="hub id or local folder")
    name: str | None = Field(default=None, description="the data set's configuration")
    split: str = Field(default="train", description="the data set's split that all of ours are cut from")
    revision: str | None = None


PromptSource = Annotated[
    ReasoningGymSource | ProceduralSource | JsonlSource | HuggingFaceSource, Field(discriminator="kind")
]


@dataclass(frozen=True)
class Candidate:
    """One prompt before the chat template. `where` names it in an error: file and row, or task and item."""

    source: str
    messages: list[Message]
    where: str

    @property
    def text_hash(self) -> str:
        """16 digits of sha256 over roles and texts, blank space aside: equal prompts have equal hashes."""
        plain = [(message["role"], " ".join(message["content"].split())) for message in self.messages]
        return hashlib.sha256(json.dumps(plain, ensure_ascii=False).encode()).hexdigest()[:16]


class Supply:
    """Candidates of one source, split by split; `label` names the source in errors about the whole of it."""

    def __init__(self, label: str, draw: Callable[[Split], Iterator[Candidate]]):
        self.label, self._draw = label, draw
        self._open: dict[Split, Iterator[Candidate]] = {}

    def next(self, split: Split) -> Candidate | None:
        """The next candidate for this split, None when there is none left."""
        if split not in self._open:
            self._open[split] = self._draw(split)
        return next(self._open[split], None)


def supplies(source: PromptSource, system: str | None, seed: int, limit: int) -> list[Supply]:
    """The supplies of a source, which share its counts: one a procedural task, one a file or data set.

    `limit` bounds the items that are looked at for one split of a procedural task (some have few different ones).
    """
    system = source.system if source.system is not None else system

    def finish(label: str, messages: list[Message], where: str) -> Candidate:
        if source.suffix:
            last = max(index for index, message in enumerate(messages) if message["role"] == "user")
            messages = [dict(message) for message in messages]
            messages[last]["content"] += source.suffix
        if system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        return Candidate(label, messages, where)

    match source:
        case ReasoningGymSource():
            return [_task_supply(task, source, finish, seed, limit) for task in source.tasks]
        case ProceduralSource():
            return [_procedural_supply(family, source, finish, seed, limit) for family in source.families]
        case JsonlSource():
            return [_file_supply(source, finish, seed)]
        case HuggingFaceSource():
            return [_dataset_supply(source, finish, seed)]


Finish: TypeAlias = Callable[[str, list[Message], str], Candidate]


def _task_supply(task: str, source: ReasoningGymSource, finish: Finish, seed: int, limit: int) -> Supply:
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
    base = ((7919 * seed + source.seed) % 1000) * len(SPLITS) * _SEEDS_PER_SPLIT

    def draw(split: Split) -> Iterator[Candidate]:
        first = base + SPLITS.index(split) * _SEEDS_PER_SPLIT
        try:
            items = reasoning_gym.create_dataset(task, **{**source.options, "size": limit, "seed": first})
        except (TypeError, ValueError, AssertionError) as error:
            reason = _one_line(error)
            raise DraftsmithError(
                f"prompts.sources: options of reasoning_gym task {task}: {reason}: correct them"
            ) from error
        for index in range(limit):
            question = items[index]["question"]
            yield finish(task, [{"role": "user", "content": question}], f"{task}, seed {first + index}")

    return Supply(task, draw)


def _procedural_supply(family: str, source: ProceduralSource, finish: Finish, seed: int, limit: int) -> Supply:
    from draftsmith.stages.procedural.text import FAMILIES, examples

    if family not in FAMILIES:
        raise DraftsmithError(f"prompts.sources: no procedural family {family}, use some of {', '.join(FAMILIES)}")

    def draw(split: Split) -> Iterator[Candidate]:
        first = ((7919 * seed + source.seed) % 1000) * len(SPLITS) + SPLITS.index(split) + _PROCEDURAL_SEED
        for number, example in enumerate(examples(first, limit, families=[family])):
            where = f"{family}, seed {first}, item {number}"
            yield finish(family, [{"role": "user", "content": example.prompt}], where)

    return Supply(family, draw)


def _file_supply(source: JsonlSource, finish: Finish, seed: int) -> Supply:
    path, label = Path(source.path), source.label or Path(source.path).name
    rows = [
        (number, row_messages(row, source.field, f"{path}, row {number}"))
        for number, row in read_jsonl(path)
        if source.keeps(row, f"{path}, row {number}")
    ]
    if not rows and source.filter:
        raise DraftsmithError(f"{path}: no row passes the filter {source.filter}: correct it")
    if not rows:
        raise DraftsmithError(f"{path}: the file is empty: give a JSON Lines file with one prompt a line")
    random.Random(f"{seed} {source.seed} {path.name}").shuffle(rows)
    shared = iter([finish(label, messages, f"{path}, row {number}") for number, messages in rows])
    return Supply(str(path), lambda _split: shared)


def _dataset_supply(source: HuggingFaceSource, finish: Finish, seed: int) -> Supply:
    rows = load_rows(source)
    if len(rows) == 0:
        raise DraftsmithError(f"{source.id}, split {source.split}: the data set is empty: give another split")
    order = _passing(rows, source)
    random.Random(f"{seed} {source.seed} {source.id} {source.split}").shuffle(order)

    def draw() -> Iterator[Candidate]:
        for index in order:
            where = f"{source.id}, split {source.split}, row {index + 1}"
            yield finish(source.label or source.id, row_messages(rows[index], source.field, where), where)

    shared = draw()
    return Supply(source.id, lambda _split: shared)


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
    """The data set as a sequence of rows; every failure becomes one DraftsmithError."""
    import datasets

    try:
        return datasets.load_dataset(source.id, source.name, split=source.split, revision=source.revision)
    except datasets.exceptions.DatasetGenerationError as error:
        reason, cause = f"cannot be read ({_one_line(error.__cause__ or error)}): repair its files", error
    except (ConnectionError, FileNotFoundError, datasets.exceptions.DatasetNotFoundError) as error:
        if Path(source.id).is_dir():
            reason, cause = f"no data files found ({_one_line(error)}): put Parquet or JSON files there", error
        else:
            reason = (
                "no such folder here, and not to be had from the hub: check the id and the network, or give a folder"
            )
            cause = error
    except ValueError as error:  # unknown split or configuration: the message lists the known ones
        reason, cause = f"{_one_line(error)}: correct name or split", error
    raise DraftsmithError(f"prompts.sources: data set {source.id}: {reason}") from cause


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
