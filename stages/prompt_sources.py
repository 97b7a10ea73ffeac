"""Where prompts come from: procedural tasks, JSON Lines files and data sets, each read as chat messages."""

from __future__ import annotations

import difflib
import gzip
import hashlib
import json
import random
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field

from artifacts.errors import DraftsmithError
from stages.contract import Config

Split = Literal["train", "validation", "heldout"]
# Held-out prompts are drawn first: a text that comes up twice stays there and is not trained on.
SPLITS: tuple[Split, ...] = ("heldout", "validation", "train")
Message: TypeAlias = dict[str, str]  # role, content

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "function": "tool",
}
_SHAPES = '{"messages": [{"role", "content"}]}, {"conversations": [{"from", "value"}]} or {"prompt": text or messages}'
_SEEDS_PER_SPLIT = 1_000_000  # a procedural task takes its item i from seed + i: splits own separate ranges of seeds


class _SourceBase(Config):
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


class JsonlSource(_SourceBase):
    """A JSON Lines file, plain or .gz; rows are shuffled by seed and each goes into at most one split."""

    kind: Literal["jsonl"] = "jsonl"
    path: str = Field(min_length=1, description="relative to the current directory")
    field: str | None = Field(default=None, description="the field with the text or messages, e.g. question")


class HuggingFaceSource(_SourceBase):
    """A data set of the hub, or a local folder of Parquet or JSON files, read by `datasets`."""

    kind: Literal["huggingface"] = "huggingface"
    id: str = Field(min_length=1, description="hub id or local folder")
    name: str | None = Field(default=None, description="the data set's configuration")
    split: str = Field(default="train", description="the data set's split that all of ours are cut from")
    revision: str | None = None
    field: str | None = Field(default=None, description="the field with the text or messages, e.g. question")


PromptSource = Annotated[ReasoningGymSource | JsonlSource | HuggingFaceSource, Field(discriminator="kind")]


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
    """The supplies of a source: one a procedural task, one a file or data set.

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
    if limit > _SEEDS_PER_SPLIT:
        raise DraftsmithError(f"prompts: at most {_SEEDS_PER_SPLIT} prompts a split and task: lower the counts")
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


def _file_supply(source: JsonlSource, finish: Finish, seed: int) -> Supply:
    path = Path(source.path)
    rows = [(number, row_messages(row, source.field, f"{path}, row {number}")) for number, row in read_jsonl(path)]
    if not rows:
        raise DraftsmithError(f"{path}: the file is empty: give a JSON Lines file with one prompt a line")
    random.Random(f"{seed} {source.seed} {path.name}").shuffle(rows)
    shared = iter([finish(path.name, messages, f"{path}, row {number}") for number, messages in rows])
    return Supply(str(path), lambda _split: shared)


def _dataset_supply(source: HuggingFaceSource, finish: Finish, seed: int) -> Supply:
    rows = load_rows(source)
    if len(rows) == 0:
        raise DraftsmithError(f"{source.id}, split {source.split}: the data set is empty: give another split")
    order = list(range(len(rows)))
    random.Random(f"{seed} {source.seed} {source.id} {source.split}").shuffle(order)

    def draw() -> Iterator[Candidate]:
        for index in order:
            where = f"{source.id}, split {source.split}, row {index + 1}"
            yield finish(source.id, row_messages(rows[index], source.field, where), where)

    shared = draw()
    return Supply(source.id, lambda _split: shared)


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


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row number from 1, object) of a JSON Lines file, plain or .gz; blank lines are passed over."""
    try:
        with (
            gzip.open(path, "rt", encoding="utf-8-sig")
            if path.suffix == ".gz"
            else path.open(encoding="utf-8-sig") as file
        ):
            for number, line in zip(count(1), file, strict=False):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise DraftsmithError(
                        f"{path}, row {number}: not JSON ({error}): every line must be one JSON object"
                    ) from error
                if not isinstance(row, dict):
                    raise DraftsmithError(
                        f"{path}, row {number}: a JSON {_kind(row)}, not an object: every line must be one JSON object"
                    )
                yield number, row
    except FileNotFoundError:
        raise DraftsmithError(f"prompts.sources: {path.absolute()} does not exist: correct the path") from None
    except IsADirectoryError:
        raise DraftsmithError(
            f"prompts.sources: {path} is a folder: give a file, or use kind: huggingface for a folder"
        ) from None
    except UnicodeDecodeError as error:
        raise DraftsmithError(
            f"{path}: not UTF-8 text ({error.reason}): convert it, or name it .gz if compressed"
        ) from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DraftsmithError(f"{path}: damaged or cut off gzip ({error}): copy or download it again") from error


def row_messages(row: Mapping[str, Any], field: str | None, where: str) -> list[Message]:
    """The prompt of a row as messages that end before an answer; `where` names the row in errors.

    Answers at the end of a conversation (and a `completion` beside it) are left out: the target will give its own.
    """
    if field is not None:
        if row.get(field) is None:
            raise DraftsmithError(f"{where}: no field {field}: set field to one of {', '.join(sorted(row)) or 'none'}")
        name = field
    else:
        found = [name for name in ("messages", "conversations", "prompt") if row.get(name) is not None]
        if not found:
            known = ", ".join(sorted(row)) or "nothing"
            raise DraftsmithError(f"{where}: none of the shapes {_SHAPES}; it has {known}: set the source's field")
        name = found[0]
    messages = _messages(row[name], f"{where}: {name}")
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not any(message["role"] == "user" for message in messages):
        raise DraftsmithError(f"{where}: {name} has no user message: remove the row or add one")
    return messages


def _messages(value: Any, where: str) -> list[Message]:
    if isinstance(value, str):
        if not value.strip():
            raise DraftsmithError(f"{where} is blank: remove the row")
        return [{"role": "user", "content": value}]
    if not isinstance(value, list):
        raise DraftsmithError(f"{where} is a JSON {_kind(value)}: it must be text or a list of messages")
    if value and isinstance(value[0], str):  # the turns of a multi-turn question: its first one is a prompt
        return _messages(value[0], where)
    messages = []
    for index, entry in enumerate(value):
        place = f"{where}[{index}]"
        if not isinstance(entry, dict):
            raise DraftsmithError(f"{place} is a JSON {_kind(entry)}: it must be a message with role and content")
        role, content = entry.get("role", entry.get("from")), entry.get("content", entry.get("value"))
        if not isinstance(role, str) or role.lower() not in _ROLES:
            raise DraftsmithError(f"{place}: role {role!r} is not one of {', '.join(_ROLES)}: correct the row")
        if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            content = "".join(str(part.get("text", "")) for part in content)
        if not isinstance(content, str):
            raise DraftsmithError(f"{place}: content is a JSON {_kind(content)}: it must be text")
        messages.append({"role": _ROLES[role.lower()], "content": content})
    return messages


def _kind(value: Any) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")
