"""The section `prompts`: its sources, how many prompts are taken, and a prompt as it comes from a source."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from draftsmith.stages.data.held_out import HELDOUT_SHARE, HeldOutBy
from draftsmith.stages.data.listing import SourcesConfig
from draftsmith.stages.data.row_files import local_files, remote_versions
from draftsmith.stages.data.row_formats import FieldNames, Filter, Message
from draftsmith.stages.data.time_window import Since, beginning
from draftsmith.stages.runtime.stage import NOT_FETCHED, Config, FilledIn, InputListing, NotInKey

Split = Literal["train", "validation", "heldout"]
# Held-out prompts are drawn first: a text that comes up twice stays there and is not trained on.
SPLITS: tuple[Split, ...] = ("heldout", "validation", "train")


class Counts(Config):
    """How many prompts of each split one source gives."""

    train: int = Field(default=0, ge=0, description="prompts that are trained on")
    validation: int = Field(default=0, ge=0, description="prompts that choices are made on")
    heldout: int = Field(default=0, ge=0, description="prompts that drafters are measured on")


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
    def location(self) -> str:
        return self.path

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
    def location(self) -> str:
        return self.id

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
        from draftsmith.stages.target.hub import hub_commit

        return hub_commit(self.id, self.revision, "dataset")


PromptSource = Annotated[ReasoningGymSource | JsonlSource | HuggingFaceSource, Field(discriminator="kind")]


class PromptsConfig(Config):
    """Which prompts. They depend on this section and the target's tokenizer alone, not on the seed of the run."""

    sources: list[PromptSource] = Field(
        min_length=1, description="tasks, files and data sets have equal shares unless every source has counts"
    )
    train: int | None = Field(default=None, ge=0, description="required unless the sources have counts")
    validation: int | None = Field(default=None, ge=0, description="prompts that choices are made on")
    heldout: int | None = Field(default=None, ge=0, description="required unless the sources have counts")
    heldout_share: float = Field(
        default=HELDOUT_SHARE,
        gt=0,
        le=1,
        description="share of all prompts that may be held out or validate, by a hash of their text; they are never "
        "trained on, in this refresh or another, and the others never measured on. A larger share contains the "
        "smaller; lowering it gives prompts to training that may have measured before",
    )
    heldout_by: HeldOutBy = Field(
        default="prompt",
        description="what decides the class: `prompt`, its whole text, so that a conversation's turns, rows of their "
        "own, may fall into both classes; `conversation`, the user's first message, which all its turns share. A line "
        "of drafters keeps to one of them",
    )
    max_bad_share: float = Field(
        default=0.01,
        ge=0,
        le=1,
        description="share of a source's rows that may be unreadable: they are set aside. 0: the first one is an error",
    )
    max_prompt_tokens: int = Field(default=512, ge=1, description="after the chat template")
    too_long: Literal["error", "skip"] = Field(default="error", description="what a longer prompt is")
    system: str | None = Field(
        default=None, description="system prompt where a row has none; the template's own if not set"
    )
    chat_template_kwargs: dict[str, bool | int | float | str | None] = Field(
        default={}, description="passed to the chat template, e.g. enable_thinking: false"
    )
    seed: int = Field(default=0, ge=0, description="another seed chooses other prompts")
    of_logs: Annotated[
        bool, FilledIn(), NotInKey(), Field(description="whether the sources are the logs, as none were given")
    ] = False

    @model_validator(mode="after")
    def _counted_once(self) -> PromptsConfig:
        totals = {split: getattr(self, split) for split in SPLITS}
        if not any(source.counts for source in self.sources):
            for split in ("train", "heldout"):
                if totals[split] is None:
                    raise ValueError(f"{split} is required: give it here, or give every source its counts")
            return self
        if without := [str(index) for index, source in enumerate(self.sources) if not source.counts]:
            raise ValueError(f"sources {', '.join(without)} have no counts, others have: give them to all or to none")
        if both := [split for split, total in totals.items() if total is not None]:
            raise ValueError(f"the sources have counts: leave out {', '.join(both)}")
        return self

    @model_validator(mode="after")
    def _no_set_is_called_all(self) -> PromptsConfig:
        for index, source in enumerate(self.sources):
            if isinstance(source, JsonlSource | HuggingFaceSource) and source.set_name == "all":
                raise ValueError(f"sources.{index}.label: `all` means the prompts of all sources; give another one")
        return self

    @property
    def section(self) -> str:
        """The section of the file that this is made of: what errors name."""
        return "logs" if self.of_logs else "prompts"

    @property
    def of_paths(self) -> str:
        """The field that names files."""
        return "logs.paths" if self.of_logs else "prompts.sources"

    @property
    def share_elsewhere(self) -> float:
        """heldout_share of prompts that come from elsewhere, as those of logs: any source may measure on them, but for
        a benchmark (1), so that the largest holds."""
        own = [each.heldout_share for each in self.sources if each.heldout_share is not None]
        return max([self.heldout_share, *(share for share in own if share < 1)])

    def wanted(self, split: Split) -> int:
        """Prompts of a split, over all sources."""
        if self.sources[0].counts is None:
            return getattr(self, split) or 0
        return sum(getattr(source.counts, split) for source in self.sources)

    @property
    def to_list(self) -> SourcesConfig | None:
        """What stage `sources` lists for it; None where nothing has to be listed."""
        windows = [source.since for source in self.sources if isinstance(source, JsonlSource)]
        return SourcesConfig.of(self._paths, self.of_paths, windows)

    def with_pinned_files(self, listing: InputListing) -> PromptsConfig:
        """Return this config, and each of its sources, reading the files of a listing."""
        sources = [source.with_pinned_files(listing) for source in self.sources]
        return super().with_pinned_files(listing).model_copy(update={"sources": sources})

    @property
    def _paths(self) -> list[str]:
        return [source.path for source in self.sources if isinstance(source, JsonlSource)]

    def external_files(self) -> list[Path]:
        """Files outside the store that this config reads; their content belongs into the stage's key.

        Raises DraftsmithError if one is not there. Data sets of the hub are not listed: their commits say them.
        """
        found: list[Path] = []
        for source in self.sources:
            if isinstance(source, JsonlSource):
                found += local_files([source.path], self.of_paths, self.pinned_files)
            elif isinstance(source, HuggingFaceSource) and not source.of_hub:
                found += [path for path in Path(source.id).absolute().rglob("*") if path.is_file()]
        return sorted(set(found))

    def external_versions(self) -> dict[str, str]:
        """Files of rows elsewhere, with their versions, and data sets of the hub, with their commits."""
        sets = [source for source in self.sources if isinstance(source, HuggingFaceSource) and source.of_hub]
        commits = {f"datasets/{source.id}": source.commit or NOT_FETCHED for source in sets}
        return remote_versions(self._paths, self.of_paths, self.pinned_files) | commits


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
