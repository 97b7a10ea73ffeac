"""The body of stage `prompts`: selects the prompts of all splits from the sources' streams, and tokenises them."""

from __future__ import annotations

import json
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from draftsmith.artifacts.atomic import atomic_path
from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.results.data import PromptsSummary
from draftsmith.artifacts.tables.parquet import TableWriter, write_table
from draftsmith.artifacts.tables.schemas import LABELS, PROMPTS, QUESTIONS
from draftsmith.stages.data.chat_template import PromptCandidate, TemplateInverter, token_ids
from draftsmith.stages.data.prompts.stage import MORE_LOGS, SPLITS, PromptsConfig, Split
from draftsmith.stages.data.prompts.streams import PromptStream, ReadIds, open_streams
from draftsmith.stages.data.row_files import Throttle, describe_counts
from draftsmith.stages.data.row_formats import Message
from draftsmith.stages.runtime.stage import StageContext
from draftsmith.stages.targets.info import load_tokenizer, model_path, read_target_info

_REPORT_EVERY = 64  # prompts
_MOST_VALUES = 50  # values of a field in `slices`: more (users' ids) make slices that are too small


@dataclass
class _Selection:
    """Counts of the candidates that were selected, and of those that were not."""

    seen: int = 0  # candidates
    selected: int = 0
    tokens: dict[str, array[int]] = field(default_factory=lambda: defaultdict(lambda: array("q")))  # split -> lengths
    counts: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))  # source -> split -> rows
    labels: dict[str, tuple[str, ...]] = field(default_factory=dict)  # prompt -> its labels
    questions: dict[str, tuple[str, ...]] = field(default_factory=dict)  # prompt -> its further questions
    slices: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))  # label -> split -> rows
    text_hashes: set[str] = field(default_factory=set)  # over all splits
    held_out: set[bytes] = field(default_factory=set)  # identities, which ignore the system prompt
    rejected: Counter[str] = field(default_factory=Counter)  # reason -> rows
    wrong_class: int = 0  # candidates of tasks that may not serve the split they were made for
    duplicates: int = 0
    too_long: int = 0


def run(ctx: StageContext, config: PromptsConfig) -> None:
    """Write `prompts.parquet`, `prompts.json` and `set_aside.jsonl` (file, row, id, reason).

    Also write `labels.parquet` if the config names slices, and `questions.parquet` if prompts begin conversations.
    """
    info = read_target_info(ctx.inputs["target"])
    tokenizer = load_tokenizer(model_path(ctx.inputs["target"]))
    if not tokenizer.chat_template:
        ignored = " and chat_template_kwargs are ignored" if config.chat_template_kwargs else ""
        ctx.log(f"warning: the target has no chat template: prompts are plain text{ignored}")
    selection = _Selection()
    throttle, total = Throttle(), sum(config.prompt_count(split) for split in SPLITS)
    with (
        atomic_path(ctx.out / "set_aside.jsonl") as path,
        path.open("w", encoding="utf-8") as lines,
        TableWriter(ctx.out / "prompts.parquet", PROMPTS) as table,
    ):

        def on_candidate() -> None:
            selection.seen += 1
            if throttle.is_due():  # all rows of a file are read before the first one is selected
                ctx.progress(selection.selected, total, "prompts", looked_at=selection.seen)
            ctx.check_interrupted()

        def encode(candidate: PromptCandidate) -> list[int]:
            if candidate.token_ids is not None:
                return candidate.token_ids
            return token_ids(tokenizer, candidate.messages, candidate.where, config.chat_template_kwargs)

        read_ids = _id_reader(tokenizer, info.vocab_size, config)
        streams = [open_streams(source, config, lines, read_ids, on_candidate) for source in config.sources]
        rows: list[dict[str, object]] = []
        for split in SPLITS:
            for stream in _interleaved(_stream_counts(streams, split, config)):
                rows.append(_select_next(stream, split, selection, encode, config))
                if selection.selected % _REPORT_EVERY == 0 or selection.selected == total:
                    ctx.check_interrupted()
                    ctx.progress(selection.selected, total, "prompts")
                    table.append(rows)
                    rows = []
        for stream in (stream for source_streams in streams for stream in source_streams):
            selection.wrong_class += stream.discarded
            if stream.rejects is not None:
                stream.rejects.check()
                selection.rejected += stream.rejects.reasons
        _check_slices(selection, config)
    if selection.rejected:
        ctx.log(f"{selection.rejected.total()} rows rejected: {describe_counts(selection.rejected)}")
    if config.slices:
        labels = [{"prompt_id": prompt_id, "labels": labels} for prompt_id, labels in selection.labels.items()]
        write_table(ctx.out / "labels.parquet", LABELS, labels)
    if selection.questions:
        constants = {"chat_template_kwargs": json.dumps(config.chat_template_kwargs)}
        later = [{"prompt_id": prompt, "questions": texts} | constants for prompt, texts in selection.questions.items()]
        write_table(ctx.out / "questions.parquet", QUESTIONS, later)
    _summary(selection, config).write(ctx.out)
    ctx.summary(
        train=config.prompt_count("train"),
        validation=config.prompt_count("validation"),
        heldout=config.prompt_count("heldout"),
        duplicates_removed=selection.duplicates,
        too_long_skipped=selection.too_long,
        rows_set_aside=selection.rejected.total(),
    )


def _id_reader(tokenizer: Any, vocab_size: int, config: PromptsConfig) -> ReadIds:
    """Return a function that returns the messages of a prompt of token ids."""
    inverter = TemplateInverter(tokenizer, config.chat_template_kwargs)

    def read(ids: list[int], known: list[Message] | None) -> list[Message]:
        if max(ids) >= vocab_size:
            raise DraftsmithError(
                f"token id {max(ids)} is outside the target's vocabulary of {vocab_size}. Use a log of this target."
            )
        return inverter.messages(ids) if known is None else known

    return read


def _stream_counts(
    streams: list[list[PromptStream]], split: Split, config: PromptsConfig
) -> list[tuple[PromptStream, int]]:
    """Return how many prompts of a split each stream gives: equal shares of the total, or of its source's count.

    streams: those of each source.
    """

    def equal_shares(streams: list[PromptStream], total: int) -> list[tuple[PromptStream, int]]:
        share, rest = divmod(total, len(streams))
        return [(stream, share + (index < rest)) for index, stream in enumerate(streams)]

    if config.sources[0].counts is None:
        all_streams = [stream for source_streams in streams for stream in source_streams]
        return equal_shares(all_streams, config.prompt_count(split))
    return [
        count
        for source, source_streams in zip(config.sources, streams, strict=True)
        for count in equal_shares(source_streams, getattr(source.counts, split))
    ]


def _interleaved(counts: list[tuple[PromptStream, int]]) -> list[PromptStream]:
    """Return every stream as often as its count says, spread evenly: any range of rows has about the same mixture.

    The j-th of a stream's n places, from 0, is (j + 1/2) / n; streams with equal counts alternate.
    """
    positions = [
        (Fraction(2 * use + 1, 2 * count), index) for index, (_, count) in enumerate(counts) for use in range(count)
    ]
    return [counts[index][0] for _, index in sorted(positions)]


def _select_next(
    stream: PromptStream,
    split: Split,
    selection: _Selection,
    encode: Callable[[PromptCandidate], list[int]],
    config: PromptsConfig,
) -> dict[str, object]:
    """Return the next row of a split that is new and short enough. Raises DraftsmithError if there is none."""
    while (candidate := stream.next(split)) is not None:
        prompt_id, identity = candidate.text_hash, candidate.identity
        if prompt_id in selection.text_hashes or (split == "train" and identity in selection.held_out):
            selection.duplicates += 1
            continue
        selection.text_hashes.add(prompt_id)
        ids = encode(candidate)
        if len(ids) > config.max_prompt_tokens:
            if config.too_long == "error":
                raise DraftsmithError(
                    f"{candidate.where}: {len(ids)} tokens are more than prompts.max_prompt_tokens "
                    f"{config.max_prompt_tokens}. Shorten it, raise the limit or set prompts.too_long: skip."
                )
            selection.too_long += 1
            continue
        selection.selected += 1
        selection.tokens[split].append(len(ids))
        selection.counts[candidate.source][split] += 1
        if candidate.questions:
            selection.questions[prompt_id] = candidate.questions
        if candidate.labels:
            selection.labels[prompt_id] = candidate.labels
            for label in candidate.labels:
                selection.slices[label][split] += 1
        if split != "train":
            selection.held_out.add(identity)
        return {
            "prompt_id": prompt_id,
            "source": candidate.source,
            "split": split,
            "messages": candidate.messages,
            "token_ids": ids,
        }
    raise DraftsmithError(_ran_out_error(stream, split, selection, config))


def _ran_out_error(stream: PromptStream, split: Split, selection: _Selection, config: PromptsConfig) -> str:
    held_out = split != "train"
    kind = "held-out" if held_out else "training"
    needed = ", ".join(f"{config.prompt_count(name)} {name}" for name in reversed(SPLITS))
    rejected = ""
    if stream.rejects is not None and stream.rejects.reasons:
        rejected = f"; rejected: {stream.rejects.describe()}"
    remedy = "Lower the counts, add a source"
    if config.of_logs:
        remedy = MORE_LOGS
    elif held_out and stream.heldout_share < 1:
        remedy += (
            ", or raise heldout_share of section prompts or of the source (a larger share contains the smaller; the "
            "drafters of a line may have been trained on what it adds)"
        )
    return (
        f"{config.paths_field}: {stream.label} ran out of different prompts in split {split} (needed in all: {needed}; "
        f"so far {selection.selected} selected, {selection.duplicates} duplicates, {selection.too_long} too long; "
        f"{stream.class_counts[held_out]} of its {stream.class_counts.total()} are of the {kind} class, heldout_share "
        f"{stream.heldout_share:g}{rejected}). {remedy}."
    )


def _check_slices(selection: _Selection, config: PromptsConfig) -> None:
    """Raise DraftsmithError for a field that no prompt has, or that has too many values to be judged."""
    for name in config.slices:
        values = sum(label.startswith(f"{name}:") for label in selection.slices)
        if not values:
            raise DraftsmithError(f"prompts.slices: no selected prompt has a field {name}. Correct the name.")
        if values > _MOST_VALUES:
            raise DraftsmithError(
                f"prompts.slices: {name} has {values} values, at most {_MOST_VALUES} are allowed. Name a field with "
                "few values."
            )


def _summary(selection: _Selection, config: PromptsConfig) -> PromptsSummary:
    slices = {label: dict(sorted(splits.items())) for label, splits in sorted(selection.slices.items())}
    optional: dict[str, Any] = {"slices": slices} if slices else {}
    if selection.questions:
        optional["conversations"] = len(selection.questions)
    return PromptsSummary(
        counts={source: dict(sorted(splits.items())) for source, splits in sorted(selection.counts.items())},
        prompt_tokens={split: _quantiles(sorted(lengths)) for split, lengths in sorted(selection.tokens.items())},
        duplicates_removed=selection.duplicates,
        too_long_skipped=selection.too_long,
        heldout_share=config.max_heldout_share,
        heldout_by=config.heldout_by,
        wrong_class_passed_over=selection.wrong_class,
        set_aside=dict(selection.rejected.most_common()),
        **optional,
    )


def _quantiles(ordered: list[int]) -> dict[str, int]:
    """Return the nearest-rank quantiles of a sorted, non-empty list."""
    last = len(ordered) - 1
    return {
        name: ordered[round(share * last)] for name, share in (("min", 0.0), ("p50", 0.5), ("p90", 0.9), ("max", 1.0))
    }
