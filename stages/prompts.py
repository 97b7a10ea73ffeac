"""Stage `prompts`: chat prompts with their token ids, in disjoint splits (training, validation, held-out)."""

from __future__ import annotations

import json
import math
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from draftsmith.artifacts.atomic import atomic_path, write_text
from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.parquet import TableWriter
from draftsmith.artifacts.schemas import PROMPTS
from draftsmith.stages.contract import NOT_FETCHED, SOURCES, Config, Listing, Operational, Stage, StageContext
from draftsmith.stages.prompting.files import local_files, remote_versions
from draftsmith.stages.prompting.held_out import HELDOUT_SHARE, HeldOutBy
from draftsmith.stages.prompting.listing import SourcesConfig
from draftsmith.stages.prompting.pace import Pace
from draftsmith.stages.prompting.rows import Message
from draftsmith.stages.prompting.sources import (
    SPLITS,
    Candidate,
    Counts,
    HuggingFaceSource,
    JsonlSource,
    PromptSource,
    Split,
)
from draftsmith.stages.prompting.supplies import ReadIds, Supply, Supplying, supplies
from draftsmith.stages.prompting.template import token_ids

_REPORT_EVERY = 64
OF_MORE_LOGS = "give more logs, or a section prompts with lower counts"  # where prompts are rows of the logs


class PromptsConfig(Config):
    """Which prompts. They depend on this section and the target's tokenizer alone, not on the seed of the run."""

    sources: list[PromptSource] = Field(
        min_length=1, description="tasks, files and data sets have equal shares unless every source has counts"
    )
    train: int | None = Field(default=None, ge=0, description="required unless the sources have counts")
    validation: int | None = Field(default=None, ge=0)
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
    too_long: Literal["error", "skip"] = "error"
    system: str | None = Field(
        default=None, description="system prompt where a row has none; the template's own if not set"
    )
    chat_template_kwargs: dict[str, bool | int | float | str | None] = Field(
        default={}, description="passed to the chat template, e.g. enable_thinking: false"
    )
    seed: int = Field(default=0, ge=0)
    of_logs: Annotated[bool, Operational()] = Field(
        default=False, description="filled in where the section is left out beside `logs`, whose rows it then names"
    )

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

    def reading(self, listing: Listing) -> PromptsConfig:
        """Return this config, and each of its sources, reading the files of a listing."""
        sources = [source.reading(listing) for source in self.sources]
        return super().reading(listing).model_copy(update={"sources": sources})

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
                found += local_files([source.path], self.of_paths, self.listed_files)
            elif isinstance(source, HuggingFaceSource) and not source.of_hub:
                found += [path for path in Path(source.id).absolute().rglob("*") if path.is_file()]
        return sorted(set(found))

    def external_versions(self) -> dict[str, str]:
        """Files of rows elsewhere, with their versions, and data sets of the hub, with their commits."""
        sets = [source for source in self.sources if isinstance(source, HuggingFaceSource) and source.of_hub]
        commits = {f"datasets/{source.id}": source.commit or NOT_FETCHED for source in sets}
        return remote_versions(self._paths, self.of_paths, self.listed_files) | commits


def preflight(config: PromptsConfig, target: Path) -> None:
    """Files exist, and prompts of the allowed length leave room for an answer."""
    from draftsmith.stages.targets.info import read_target_info

    config.external_files()
    context_tokens = read_target_info(target).max_positions
    if config.max_prompt_tokens >= context_tokens:
        raise DraftsmithError(
            f"{config.section}.max_prompt_tokens {config.max_prompt_tokens} leaves no room in the target's context of "
            f"{context_tokens} tokens: lower it"
        )


@dataclass
class _Drawn:
    """What was taken, and what was passed over."""

    taken: int = 0
    tokens: dict[str, array[int]] = field(default_factory=lambda: defaultdict(lambda: array("q")))  # split -> of each
    counts: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))  # source -> split -> rows
    seen: set[str] = field(default_factory=set)  # hashes of texts, over all splits
    measured: set[bytes] = field(default_factory=set)  # identities of what is held out: another system prompt is no way
    set_aside: Counter[str] = field(default_factory=Counter)  # reason -> rows
    wrong_class: int = 0  # made by a task for a split that they may not serve
    duplicates: int = 0
    too_long: int = 0


def run(ctx: StageContext, config: PromptsConfig) -> None:
    """Write `prompts.parquet` and `prompts.json`."""
    from draftsmith.stages.prompting.tokenised import Tokenised
    from draftsmith.stages.targets.info import model_path, read_target_info
    from draftsmith.stages.targets.resolve import load_tokenizer

    preflight(config, ctx.inputs["target"])
    tokenizer = load_tokenizer(model_path(ctx.inputs["target"]))
    if not tokenizer.chat_template:
        ignored = " and chat_template_kwargs are ignored" if config.chat_template_kwargs else ""
        ctx.log(f"warning: the target has no chat template: prompts are plain text{ignored}")
    drawn = _Drawn()
    pace, total = Pace(), sum(config.wanted(split) for split in SPLITS)
    with (
        atomic_path(ctx.out / "set_aside.jsonl") as path,
        path.open("w", encoding="utf-8") as listed,
        Tokenised(ctx.work / "tokenised") as kept,
        TableWriter(ctx.out / "prompts.parquet", PROMPTS) as table,
    ):

        def looked_at() -> None:
            if pace.step():  # of a large file all rows are read before the first is taken
                ctx.progress(drawn.taken, total, "prompts", looked_at=pace.rows)
            ctx.check_interrupted()

        def ids_of(candidate: Candidate) -> list[int]:
            if candidate.token_ids is not None:
                return candidate.token_ids
            ids, _, _ = kept.of(
                candidate.text_hash, lambda: (token_ids(tokenizer, candidate, config.chat_template_kwargs), [], "")
            )
            return ids

        common = Supplying(
            system=config.system,
            seed=config.seed,
            limit=_looked_at(config),
            heldout_share=config.heldout_share,
            heldout_by=config.heldout_by,
            wanted=Counts(**{split: config.wanted(split) for split in SPLITS}),
            only=config.listed_files,
            max_bad_share=config.max_bad_share,
            listed=listed,
            read_ids=_reader_of_ids(tokenizer, read_target_info(ctx.inputs["target"]).vocab_size, config),
            looked_at=looked_at,
        )
        taken = [supplies(source, common) for source in config.sources]
        rows: list[dict[str, Any]] = []
        for split in SPLITS:
            for supply in _mixed(_shares(taken, split, config)):
                rows.append(_draw_one(supply, split, drawn, ids_of, config))
                if drawn.taken % _REPORT_EVERY == 0 or drawn.taken == total:
                    ctx.check_interrupted()
                    ctx.progress(drawn.taken, total, "prompts")
                    table.append(rows)
                    rows = []
        for supply in (supply for each in taken for supply in each):
            drawn.wrong_class += supply.passed_over
            if supply.aside is not None:
                supply.aside.check()
                drawn.set_aside += supply.aside.reasons
    if drawn.set_aside:
        reasons = ", ".join(f"{count} {reason}" for reason, count in drawn.set_aside.most_common())
        ctx.log(f"{drawn.set_aside.total()} rows set aside: {reasons}")
    if kept.kept:
        ctx.log(f"{kept.kept} prompts were tokenised by an earlier attempt")
    write_text(ctx.out / "prompts.json", json.dumps(_summary(drawn, config), indent=2) + "\n")
    ctx.summary(
        train=config.wanted("train"),
        validation=config.wanted("validation"),
        heldout=config.wanted("heldout"),
        duplicates_removed=drawn.duplicates,
        too_long_skipped=drawn.too_long,
        rows_set_aside=drawn.set_aside.total(),
    )


def _reader_of_ids(tokenizer: Any, vocab_size: int, config: PromptsConfig) -> ReadIds:
    from draftsmith.stages.prompting.unrendered import Unrendered

    unrendered = Unrendered(tokenizer, config.chat_template_kwargs)

    def read(ids: list[int], known: list[Message] | None) -> list[Message]:
        if max(ids) >= vocab_size:
            raise DraftsmithError(
                f"token id {max(ids)} outside the target's vocabulary of {vocab_size}: is it another model's log?"
            )
        return unrendered.messages(ids) if known is None else known

    return read


def _shares(taken: list[list[Supply]], split: Split, config: PromptsConfig) -> list[tuple[Supply, int]]:
    """How many prompts of a split each supply gives: equal shares, of the whole or of its source's own count."""

    def equal(supplies: list[Supply], total: int) -> list[tuple[Supply, int]]:
        whole, rest = divmod(total, len(supplies))
        return [(supply, whole + (index < rest)) for index, supply in enumerate(supplies)]

    if config.sources[0].counts is None:
        return equal([supply for supplies in taken for supply in supplies], config.wanted(split))
    return [
        share
        for source, supplies in zip(config.sources, taken, strict=True)
        for share in equal(supplies, getattr(source.counts, split))
    ]


def _mixed(shares: list[tuple[Supply, int]]) -> list[Supply]:
    """Every supply as often as its share says, spread evenly: any part of the rows has about the mixture of all.

    Use j of n stands at (j + 1/2) / n of the way; equal shares come in turn.
    """
    places = [
        (Fraction(2 * use + 1, 2 * share), index) for index, (_, share) in enumerate(shares) for use in range(share)
    ]
    return [shares[index][0] for _, index in sorted(places)]


def _draw_one(
    supply: Supply, split: Split, drawn: _Drawn, ids_of: Callable[[Candidate], list[int]], config: PromptsConfig
) -> dict[str, Any]:
    """The next row of this split that is new and short enough."""
    while (candidate := supply.next(split)) is not None:
        prompt_id, group = candidate.text_hash, candidate.group
        if prompt_id in drawn.seen or (split == "train" and group in drawn.measured):
            drawn.duplicates += 1
            continue
        drawn.seen.add(prompt_id)
        ids = ids_of(candidate)
        if len(ids) > config.max_prompt_tokens:
            if config.too_long == "error":
                raise DraftsmithError(
                    f"{candidate.where}: {len(ids)} tokens, over prompts.max_prompt_tokens {config.max_prompt_tokens}: "
                    "shorten it, raise the limit or set prompts.too_long: skip"
                )
            drawn.too_long += 1
            continue
        drawn.taken += 1
        drawn.tokens[split].append(len(ids))
        drawn.counts[candidate.source][split] += 1
        if split != "train":
            drawn.measured.add(group)
        return {
            "prompt_id": prompt_id,
            "source": candidate.source,
            "split": split,
            "messages": candidate.messages,
            "token_ids": ids,
        }
    if supply.aside is not None:
        supply.aside.check()
    raise DraftsmithError(_ran_out(supply, split, drawn, config))


def _ran_out(supply: Supply, split: Split, drawn: _Drawn, config: PromptsConfig) -> str:
    held_out = split != "train"
    remedy = "lower the counts, add a source"
    left_out = f"; left out: {supply.aside.said()}" if supply.aside is not None and supply.aside.reasons else ""
    of_class = f"{supply.of_class[held_out]} of its {supply.of_class.total()} are of the"
    if config.of_logs:
        remedy = OF_MORE_LOGS
    elif held_out and supply.heldout_share < 1:
        remedy += (
            ", or raise heldout_share of section prompts or of the source (a larger share contains the smaller; the "
            "drafters of a line may have been trained on what it adds)"
        )
    return (
        f"{config.of_paths}: {supply.label} ran out of different prompts in split {split} "
        f"(asked for in all: {', '.join(f'{config.wanted(each)} {each}' for each in reversed(SPLITS))}; so far "
        f"{drawn.taken} taken, {drawn.duplicates} duplicates, {drawn.too_long} too long; "
        f"{of_class} {'held-out' if held_out else 'training'} class, heldout_share {supply.heldout_share:g}"
        f"{left_out}): {remedy}"
    )


def _looked_at(config: PromptsConfig) -> int:
    """Candidates of a task for one split: twenty for each prompt, and for each that is of the wrong class more."""
    shares = [source.heldout_share or config.heldout_share for source in config.sources]
    held_out = max(config.wanted("heldout"), config.wanted("validation")) / min(shares)
    train = config.wanted("train") / (1 - max(share for share in [*shares, 0.0] if share < 1))
    return math.ceil(20 * max(held_out, train) + 100 / min(shares))


def _summary(drawn: _Drawn, config: PromptsConfig) -> dict[str, Any]:
    return {
        "counts": {source: dict(sorted(splits.items())) for source, splits in sorted(drawn.counts.items())},
        "prompt_tokens": {split: _quantiles(sorted(values)) for split, values in sorted(drawn.tokens.items())},
        "duplicates_removed": drawn.duplicates,
        "too_long_skipped": drawn.too_long,
        "heldout_share": config.share_elsewhere,  # the stage `logs` reads both
        "heldout_by": config.heldout_by,
        "wrong_class_passed_over": drawn.wrong_class,
        "set_aside": dict(drawn.set_aside.most_common()),
    }


def _quantiles(ordered: list[int]) -> dict[str, int]:
    """Nearest-rank quantiles of a sorted, non-empty list."""
    last = len(ordered) - 1
    return {
        name: ordered[round(share * last)] for name, share in (("min", 0.0), ("p50", 0.5), ("p90", 0.9), ("max", 1.0))
    }


STAGE = Stage(name="prompts", config=PromptsConfig, inputs=("target", f"{SOURCES}?"), run=run, preflight=preflight)
