"""Stage `prompts`: chat prompts with their token ids, in disjoint splits (training, validation, held-out)."""

from __future__ import annotations

import json
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from draftsmith.artifacts.atomic import atomic_path, write_text
from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.tables.parquet import TableWriter
from draftsmith.artifacts.tables.schemas import PROMPTS
from draftsmith.stages.data.chat_template import TemplateInverter, token_ids
from draftsmith.stages.data.prompt_config import SPLITS, Candidate, PromptsConfig, Split
from draftsmith.stages.data.prompt_supply import ReadIds, Supply, supplies
from draftsmith.stages.data.rejects import by_frequency
from draftsmith.stages.data.row_files import Throttle
from draftsmith.stages.data.row_formats import Message
from draftsmith.stages.runtime.stage import SOURCES, Stage, StageContext

_REPORT_EVERY = 64
OF_MORE_LOGS = "give more logs, or a section prompts with lower counts"  # where prompts are rows of the logs


def preflight(config: PromptsConfig, target: Path) -> None:
    """Files exist, and prompts of the allowed length leave room for an answer."""
    from draftsmith.stages.target.info import read_target_info

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

    looked_at: int = 0  # candidates
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
    """Write `prompts.parquet`, `prompts.json` and `set_aside.jsonl` (file, row, id, reason)."""
    from draftsmith.stages.target.info import model_path, read_target_info
    from draftsmith.stages.target.resolve import load_tokenizer

    preflight(config, ctx.inputs["target"])
    tokenizer = load_tokenizer(model_path(ctx.inputs["target"]))
    if not tokenizer.chat_template:
        ignored = " and chat_template_kwargs are ignored" if config.chat_template_kwargs else ""
        ctx.log(f"warning: the target has no chat template: prompts are plain text{ignored}")
    drawn = _Drawn()
    throttle, total = Throttle(), sum(config.wanted(split) for split in SPLITS)
    with (
        atomic_path(ctx.out / "set_aside.jsonl") as path,
        path.open("w", encoding="utf-8") as listed,
        TableWriter(ctx.out / "prompts.parquet", PROMPTS) as table,
    ):

        def look_at() -> None:
            drawn.looked_at += 1
            if throttle.is_due():  # of a large file all rows are read before the first is taken
                ctx.progress(drawn.taken, total, "prompts", looked_at=drawn.looked_at)
            ctx.check_interrupted()

        def ids_of(candidate: Candidate) -> list[int]:
            if candidate.token_ids is not None:
                return candidate.token_ids
            return token_ids(tokenizer, candidate, config.chat_template_kwargs)

        read_ids = _reader_of_ids(tokenizer, read_target_info(ctx.inputs["target"]).vocab_size, config)
        taken = [supplies(source, config, listed, read_ids, look_at) for source in config.sources]
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
        ctx.log(f"{drawn.set_aside.total()} rows set aside: {by_frequency(drawn.set_aside)}")
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
    inverter = TemplateInverter(tokenizer, config.chat_template_kwargs)

    def read(ids: list[int], known: list[Message] | None) -> list[Message]:
        if max(ids) >= vocab_size:
            raise DraftsmithError(
                f"token id {max(ids)} outside the target's vocabulary of {vocab_size}: is it another model's log?"
            )
        return inverter.messages(ids) if known is None else known

    return read


def _shares(taken: list[list[Supply]], split: Split, config: PromptsConfig) -> list[tuple[Supply, int]]:
    """Return how many prompts of a split each supply gives: equal shares, of the whole or of its source's own count."""

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
    """Return every supply as often as its share says, spread evenly: any part of the rows has about the mixture of all.

    Use j of n stands at (j + 1/2) / n of the way; equal shares come in turn.
    """
    places = [
        (Fraction(2 * use + 1, 2 * share), index) for index, (_, share) in enumerate(shares) for use in range(share)
    ]
    return [shares[index][0] for _, index in sorted(places)]


def _draw_one(
    supply: Supply, split: Split, drawn: _Drawn, ids_of: Callable[[Candidate], list[int]], config: PromptsConfig
) -> dict[str, Any]:
    """Return the next row of this split that is new and short enough. Raises DraftsmithError if there is none."""
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
    raise DraftsmithError(_ran_out(supply, split, drawn, config))


def _ran_out(supply: Supply, split: Split, drawn: _Drawn, config: PromptsConfig) -> str:
    held_out = split != "train"
    kind = "held-out" if held_out else "training"
    asked = ", ".join(f"{config.wanted(each)} {each}" for each in reversed(SPLITS))
    left_out = f"; left out: {supply.aside.said()}" if supply.aside is not None and supply.aside.reasons else ""
    remedy = "lower the counts, add a source"
    if config.of_logs:
        remedy = OF_MORE_LOGS
    elif held_out and supply.heldout_share < 1:
        remedy += (
            ", or raise heldout_share of section prompts or of the source (a larger share contains the smaller; the "
            "drafters of a line may have been trained on what it adds)"
        )
    return (
        f"{config.of_paths}: {supply.label} ran out of different prompts in split {split} (asked for in all: {asked}; "
        f"so far {drawn.taken} taken, {drawn.duplicates} duplicates, {drawn.too_long} too long; "
        f"{supply.of_class[held_out]} of its {supply.of_class.total()} are of the {kind} class, heldout_share "
        f"{supply.heldout_share:g}{left_out}): {remedy}"
    )


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


STAGE = Stage(
    name="prompts", config=PromptsConfig, inputs=("target", f"{SOURCES}?"), body=__name__, preflight=preflight
)
