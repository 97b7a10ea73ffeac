"""Stage `prompts`: its config and declaration. Prompts with token ids, in splits (train, validation, held-out)."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.data.held_out import HELDOUT_SHARE, HeldOutBy
from draftsmith.stages.data.listing import list_files
from draftsmith.stages.data.row_files import local_files, remote_versions
from draftsmith.stages.data.row_formats import FieldFilter, FieldNames, TemplateKwargs
from draftsmith.stages.data.time_window import Since, window_start
from draftsmith.stages.runtime.stage import NOT_FETCHED, Config, FilledIn, InputListing, NotInKey, Stage
from draftsmith.stages.targets.hub import hub_commit
from draftsmith.stages.targets.info import read_target_info

Split = Literal["train", "validation", "heldout"]
# Held-out prompts are selected first: a text that occurs twice stays held out and is not trained on.
SPLITS: tuple[Split, ...] = ("heldout", "validation", "train")
_DEPTH = "depth"  # slices by the tokens of context before a verify step (`replay/steps.py`)


class Counts(Config):
    """The number of prompts of each split that one source gives."""

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
        description="this source's share, in place of prompts.heldout_share; 1 for a benchmark never to be trained on",
    )
    suffix: str = Field(
        default="", description="appended to the last user message, e.g. an instruction on how to answer"
    )


class ReasoningGymSource(_SourceBase):
    """Procedural tasks of the reasoning-gym package in rotation; every split has its own seeds."""

    kind: Literal["reasoning_gym"] = "reasoning_gym"
    tasks: list[str] = Field(min_length=1, description="names of reasoning-gym data sets, e.g. gsm_symbolic")
    options: dict[str, Any] = Field(
        default={}, description="settings of these tasks; for tasks with other settings, add a source"
    )


class _RowSource(_SourceBase):
    """Rows with fields, from files or a data set."""

    label: str | None = Field(default=None, description="name in the tables. Default: the file's name or the id")
    field: str | None = Field(default=None, description="the field with the text or messages, e.g. question")
    filter: FieldFilter = Field(
        default={}, description="only rows whose fields have this value or one of these, e.g. {source: olympiads}"
    )


class JsonlSource(_RowSource):
    """Files of rows: JSON Lines, plain or compressed, or Parquet. Each row goes into at most one split.

    The order is by a hash of seed and text, so a file that grows still gives the same rows. `prompt_token_ids` of a row
    are the prompt, whatever text it also has. Rows without them that call tools or contain images are rejected.
    """

    kind: Literal["jsonl"] = "jsonl"
    path: str = Field(
        min_length=1,
        description="a file, folder or glob, relative to the current directory, or an address for fsspec such as s3://…",
    )
    since: Since | None = Field(
        default=None,
        description="prompts of rows from this time on are selected first, older ones (newest first) only if these are "
        "too few: 7d, 12h, an ISO date or time, or `last`, as in section logs",
    )
    fields: FieldNames = Field(default={}, description="names of a log's fields, as in section logs")

    @property
    def location(self) -> str:
        return self.path

    @property
    def set_name(self) -> str:
        """Return the name of its prompts in the tables."""
        return self.label or Path(self.path).name

    @property
    def since_time(self) -> datetime | None:
        """Return the beginning of the window; None without one, and while `last` has no meaning yet."""
        return window_start(self.since, self._listing)


class HuggingFaceSource(_RowSource):
    """A data set of the Hub, or a local folder of Parquet or JSON files, read by `datasets`."""

    kind: Literal["huggingface"] = "huggingface"
    id: str = Field(min_length=1, description="Hub id or local folder")
    name: str | None = Field(default=None, description="the data set's configuration")
    split: str = Field(default="train", description="the data set's split that all our splits are selected from")
    revision: str | None = Field(
        default=None,
        description="commit, branch or tag; a branch means its commit in the local cache, else the newest on the Hub",
    )

    @property
    def location(self) -> str:
        return self.id

    @property
    def set_name(self) -> str:
        """Return the name of its prompts in the tables."""
        return self.label or self.id

    @property
    def is_on_hub(self) -> bool:
        return not Path(self.id).is_dir()

    @property
    def commit(self) -> str | None:
        """Return the commit on the Hub; None if it could not be looked up."""
        return hub_commit(self.id, self.revision, "dataset")


PromptSource = Annotated[ReasoningGymSource | JsonlSource | HuggingFaceSource, Field(discriminator="kind")]


class PromptsConfig(Config):
    """The prompts. They depend only on this section and the target's tokenizer, not on the seed of the run."""

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
        description="share of all prompts that may be held out or validate, by a hash of their text. They are never "
        "trained on, in this refresh or another, and the other prompts never serve as tests. A larger share contains a "
        "smaller one; lowering it would train on prompts that may have served as tests",
    )
    heldout_by: HeldOutBy = Field(
        default="prompt",
        description="what is hashed: `prompt`, the whole text, so that the turns of a conversation, as separate rows, "
        "may fall into both classes; `conversation`, the user's first message, which all its turns share. A model line "
        "keeps to one of them",
    )
    slices: list[str] = Field(
        default=[],
        description="fields of the rows whose values are slices of the traffic, e.g. [thinking, language]: acceptance, "
        "drift and the gate are reported and judged for each value too, as they are for each source and depth",
    )
    max_bad_share: float = Field(
        default=0.01,
        ge=0,
        le=1,
        description="share of a source's rows that may be unreadable: they are rejected. 0: the first one is an error",
    )
    max_prompt_tokens: int = Field(default=512, ge=1, description="after the chat template")
    too_long: Literal["error", "skip"] = Field(default="error", description="what happens to a longer prompt")
    system: str | None = Field(
        default=None, description="system prompt for rows without one. Default: the template's own"
    )
    chat_template_kwargs: TemplateKwargs = Field(
        default={}, description="passed to the chat template, e.g. enable_thinking: false"
    )
    seed: int = Field(default=0, ge=0, description="another seed chooses other prompts")
    of_logs: Annotated[
        bool, FilledIn(), NotInKey(), Field(description="whether the sources are the logs, since none were given")
    ] = False

    @model_validator(mode="after")
    def _check_counts(self) -> PromptsConfig:
        totals = {split: getattr(self, split) for split in SPLITS}
        if not any(source.counts for source in self.sources):
            for split in ("train", "heldout"):
                if totals[split] is None:
                    raise ValueError(f"{split} is required. Set it here, or give every source its counts.")
            return self
        if without := [str(index) for index, source in enumerate(self.sources) if not source.counts]:
            raise ValueError(
                f"sources {', '.join(without)} have no counts, but others have. Give counts to all sources or to none."
            )
        if both := [split for split, total in totals.items() if total is not None]:
            raise ValueError(f"the sources have counts. Remove {', '.join(both)}.")
        return self

    @model_validator(mode="after")
    def _check_labels(self) -> PromptsConfig:
        for index, source in enumerate(self.sources):
            if isinstance(source, JsonlSource | HuggingFaceSource) and source.set_name == "all":
                raise ValueError(f"sources.{index}.label: `all` means the prompts of all sources. Set another label.")
        if _DEPTH in self.slices:
            raise ValueError(f"slices: `{_DEPTH}` is measured for every run. Remove it, or rename the rows' field.")
        return self

    @property
    def section(self) -> str:
        """Return the section of the config file that errors name."""
        return "logs" if self.of_logs else "prompts"

    @property
    def paths_field(self) -> str:
        """Return the field that names the files."""
        return "logs.paths" if self.of_logs else "prompts.sources"

    @property
    def max_heldout_share(self) -> float:
        """Return the heldout_share of prompts from elsewhere, such as logs.

        Any source except a benchmark (share 1) may test on them, so the largest share applies.
        """
        shares = [source.heldout_share for source in self.sources if source.heldout_share is not None]
        return max([self.heldout_share, *(share for share in shares if share < 1)])

    def prompt_count(self, split: Split) -> int:
        """Return the number of prompts of a split, over all sources."""
        if self.sources[0].counts is None:
            return getattr(self, split) or 0
        return sum(getattr(source.counts, split) for source in self.sources)

    def list_files(self) -> InputListing | None:
        windows = [source.since for source in self.sources if isinstance(source, JsonlSource)]
        return list_files(self._paths, self.paths_field, windows)

    def with_pinned_files(self, listing: InputListing) -> PromptsConfig:
        """Return this config and its sources, which then read only the listed files."""
        sources = [source.with_pinned_files(listing) for source in self.sources]
        return super().with_pinned_files(listing).model_copy(update={"sources": sources})

    @property
    def _paths(self) -> list[str]:
        return [source.path for source in self.sources if isinstance(source, JsonlSource)]

    def external_files(self) -> list[Path]:
        """Return the local files that the sources read; their content is part of the stage's key.

        Raises DraftsmithError if one is missing. Data sets of the Hub are identified by their commits instead.
        """
        files: list[Path] = []
        for source in self.sources:
            if isinstance(source, JsonlSource):
                files += local_files([source.path], self.paths_field, self.pinned_files)
            elif isinstance(source, HuggingFaceSource) and not source.is_on_hub:
                files += [path for path in Path(source.id).absolute().rglob("*") if path.is_file()]
        return sorted(set(files))

    def external_versions(self) -> dict[str, str]:
        """Return the remote files with their versions, and the data sets of the Hub with their commits."""
        sets = [source for source in self.sources if isinstance(source, HuggingFaceSource) and source.is_on_hub]
        commits = {f"datasets/{source.id}": source.commit or NOT_FETCHED for source in sets}
        return remote_versions(self._paths, self.paths_field, self.pinned_files) | commits


MORE_LOGS = "Add logs, or a section prompts with lower counts"  # the remedy if the prompts are rows of the logs


def preflight(config: PromptsConfig, target: Path) -> None:
    """Check that prompts of the allowed length leave room for an answer."""
    context_tokens = read_target_info(target).max_positions
    if config.max_prompt_tokens >= context_tokens:
        raise DraftsmithError(
            f"{config.section}.max_prompt_tokens {config.max_prompt_tokens} leaves no room in the target's context of "
            f"{context_tokens} tokens. Lower it."
        )


STAGE = Stage(
    name="prompts",
    config=PromptsConfig,
    inputs=("target",),
    body="draftsmith.stages.data.prompts.body",
    preflight=preflight,
)
