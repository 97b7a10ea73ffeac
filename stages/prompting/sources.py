"""Where prompts come from: the sources of section `prompts`, and a prompt as it comes from one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from draftsmith.stages.contract import Config
from draftsmith.stages.prompting.rows import FieldNames, Filter, Message, passes
from draftsmith.stages.prompting.times import Since, beginning

Split = Literal["train", "validation", "heldout"]
# Held-out prompts are drawn first: a text that comes up twice stays there and is not trained on.
SPLITS: tuple[Split, ...] = ("heldout", "validation", "train")


class Counts(Config):
    """How many prompts of each split one source gives."""

    train: int = Field(default=0, ge=0)
    validation: int = Field(default=0, ge=0)
    heldout: int = Field(default=0, ge=0)


class _SourceBase(Config):
    counts: Counts | None = Field(
        default=None, description="prompts of each split from this source; for every source or for none"
    )
    heldout_share: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="of this source, in place of prompts.heldout_share; 1 for a benchmark that nothing is trained on",
    )
    suffix: str = Field(default="", description="appended to the last user message, e.g. an instruction how to answer")


class ReasoningGymSource(_SourceBase):
    """Procedural tasks of the reasoning-gym package, in turn; every split has its own seeds."""

    kind: Literal["reasoning_gym"] = "reasoning_gym"
    tasks: list[str] = Field(min_length=1, description="names of reasoning-gym data sets, e.g. gsm_symbolic")
    options: dict[str, Any] = Field(
        default={}, description="settings of the tasks; other settings for others: another source"
    )


class _RowSource(_SourceBase):
    """What files and data sets have in common: rows with fields."""

    label: str | None = Field(default=None, description="name in the tables; left out: the file's name or the id")
    field: str | None = Field(default=None, description="the field with the text or messages, e.g. question")
    filter: Filter = Field(
        default={}, description="only rows whose fields have this value or one of these, e.g. {source: olympiads}"
    )

    def keeps(self, row: Mapping[str, Any], where: str) -> bool:
        """Whether `filter` lets the row through, as `passes` says."""
        return passes(self.filter, row, where)


class JsonlSource(_RowSource):
    """Files of rows: JSON Lines, plain or compressed, or Parquet. Each row goes into at most one split.

    Their order is by a hash of seed and text: a file that grows goes on giving what it has given. Rows of
    `prompt_token_ids` are prompts as they are, whatever text is beside them; rows of text alone that call tools or hold
    images are left out.
    """

    kind: Literal["jsonl"] = "jsonl"
    path: str = Field(
        min_length=1,
        description="a file, folder or glob, relative to the current directory, or an address for fsspec such as s3://…",
    )
    since: Since | None = Field(
        default=None,
        description="prompts of rows from this time on are drawn first, older ones (newest first) only where these are "
        "too few: 7d, 12h, an ISO date or time, or `last`, as in section logs",
    )
    fields: FieldNames = Field(default={}, description="names of a log's fields, as in section logs")

    @property
    def set_name(self) -> str:
        """What its prompts are called in the tables."""
        return self.label or Path(self.path).name

    @property
    def since_time(self) -> datetime | None:
        """None too where `last` means nothing yet."""
        return beginning(self.since, self._listing)


class HuggingFaceSource(_RowSource):
    """A data set of the hub, or a local folder of Parquet or JSON files, read by `datasets`."""

    kind: Literal["huggingface"] = "huggingface"
    id: str = Field(min_length=1, description="hub id or local folder")
    name: str | None = Field(default=None, description="the data set's configuration")
    split: str = Field(default="train", description="the data set's split that all of ours are cut from")
    revision: str | None = Field(
        default=None,
        description="commit, branch or tag; a branch means the commit that the hub's cache has, else the hub's newest",
    )

    @property
    def set_name(self) -> str:
        """What its prompts are called in the tables."""
        return self.label or self.id

    @property
    def of_hub(self) -> bool:
        return not Path(self.id).is_dir()

    @property
    def commit(self) -> str | None:
        """Of the hub; None if it could not be asked."""
        from draftsmith.stages.targets.hub import hub_commit

        return hub_commit(self.id, self.revision, "dataset")


PromptSource = Annotated[ReasoningGymSource | JsonlSource | HuggingFaceSource, Field(discriminator="kind")]


@dataclass(frozen=True)
class Candidate:
    """One prompt before the chat template. `where` names it in an error: file and row, or task and item."""

    source: str
    messages: list[Message]
    where: str
    group: bytes = b""  # of a prompt that is drawn: what its held-out class is decided by (`held_out.identity`)
    token_ids: list[int] | None = None  # of a log that has them

    @property
    def text_hash(self) -> str:
        """16 digits of sha256 over roles and texts, blank space aside: equal prompts have equal hashes."""
        plain = [(message["role"], " ".join(message["content"].split())) for message in self.messages]
        return hashlib.sha256(json.dumps(plain, ensure_ascii=False).encode()).hexdigest()[:16]
