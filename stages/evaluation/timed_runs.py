"""What evaluation decodes: settings, requests, rows of requests and turns, and the comparison with plain decoding."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from draftsmith.stages.data.load import Prompt, request_seed
from draftsmith.stages.engines.base import Completion, Request
from draftsmith.stages.runtime.stage import StageContext

if TYPE_CHECKING:
    from draftsmith.stages.evaluation.config import EvaluationConfig
PLAIN = "plain"
Row = dict[str, Any]  # of the table `requests` or `turns`


@dataclass(frozen=True)
class Setting:
    """One point at which all arms are measured."""

    temperature: float  # 0 = greedy
    concurrency: int  # requests in flight


@dataclass(frozen=True)
class Measured:
    """What decoding with every arm gave."""

    engine: str  # with its version where it has one
    rows: list[Row]  # a request each
    turns: list[Row]
    candidates: dict[str, dict[str, float]]  # arm -> block size -> tokens/s; without the arms that had no choice
    validation_prompts: int  # that the candidates decoded, each of them once
    exactness: dict[str, Any]
    parity: dict[str, dict[str, Any]] | None = None  # arm -> figures of the gate; None: nothing was served


def settings_of(config: EvaluationConfig) -> list[Setting]:
    """Every temperature at every concurrency, in the order of the config: the first one is the headline's."""
    temperatures = config.temperatures or (config.sampling.temperature,)
    return [Setting(temperature, concurrency) for temperature in temperatures for concurrency in config.concurrency]


def rounds_of(ctx: StageContext, config: EvaluationConfig, is_steady: Callable[[], bool]) -> Iterator[tuple[int, int]]:
    """Yield every round with how many there are: as many again where repetitions disagree after the config's."""
    most = config.rounds
    for round in itertools.count():
        if round == config.rounds and not is_steady():
            most *= 2
            ctx.log("repetitions differ much, as on a busy machine: as many rounds again are measured")
        if round == most:
            return
        yield round, most


def requests_for(
    prompts: Sequence[Prompt],
    config: EvaluationConfig,
    setting: Setting,
    seed: int,
    max_new: int | None = None,
    round: int = 0,
) -> list[Request]:
    """One request a prompt; every arm gets the same ones. round: each has numbers of its own, since what arms that draw
    answer to the same ones differs too, by luck, which would be the same in every round and no error of any."""
    limit = config.sampling.max_new_tokens
    most, sampling = min(max_new or limit, limit), config.sampling.params(setting.temperature)
    return [Request(p.prompt_id, p.token_ids, most, sampling, request_seed(seed, p.prompt_id, round)) for p in prompts]


def accepted_lengths(answer: Completion) -> list[int]:
    """Proposals kept by each verify step; in ascending order where the engine only counted them.

    Such a count knows nothing of the answer's end: a last step that went past it is counted in full.
    """
    if answer.steps:
        return [step.accepted for step in answer.steps]
    return [kept for kept, count in enumerate(answer.accepted_counts) for _ in range(count)]


def turn_of(
    engine: str,
    round: int,
    order: int,
    arm: str,
    block_size: int,
    setting: Setting,
    answers: Sequence[Completion],
    wall: float,
    others_share: float,
    batches: int = 1,
) -> Row:
    """Return a row of the table `turns`.

    wall: seconds in which all of the answers were decoded. others_share: as `LoadMeter` has it. batches: in how many
    parts, between which the other arms had theirs.
    """
    return {
        "round": round,
        "order": order,
        "arm": arm,
        "engine": engine,
        "block_size": block_size,
        "temperature": setting.temperature,
        "concurrency": setting.concurrency,
        "prompts": len(answers),
        "batches": batches,
        "tokens": sum(len(answer.response_ids) for answer in answers),
        "wall_seconds": wall,
        "draft_seconds": sum(answer.draft_seconds for answer in answers),
        "verify_seconds": sum(answer.verify_seconds for answer in answers),
        "verify_steps": sum(answer.verify_steps for answer in answers),
        "others_share": None if np.isnan(others_share) else others_share,
    }


def row_of(engine: str, round: int, arm: str, block_size: int, setting: Setting, answer: Completion) -> Row:
    """A row of the table `requests` that is not compared with plain decoding yet."""
    prompt_id = answer.request.request_id
    return {
        "round": round,
        "request_id": f"{prompt_id}/{arm}",
        "prompt_id": prompt_id,
        "arm": arm,
        "engine": engine,
        "block_size": block_size,
        "temperature": setting.temperature,
        "concurrency": setting.concurrency,
        "tokens": len(answer.response_ids),
        "response_ids": answer.response_ids,
        "verify_steps": answer.verify_steps,
        "accepted": accepted_lengths(answer) or None,
        "latency_seconds": answer.seconds,
        "first_token_seconds": answer.first_token_seconds,
        "draft_seconds": answer.draft_seconds,
        "verify_seconds": answer.verify_seconds,
        "identical": None,
        "first_difference": -1,
        "margin": float("nan"),
    }


def compare_with_plain(rows: Sequence[Row], sampled: bool) -> None:
    """Fill `identical` and `first_difference` of the speculative rows.

    sampled: whether answers drawn at a temperature are the same ones with and without a drafter (they follow the same
    distribution on any engine, but only the embedded one draws the same numbers for both).
    """
    plain = {place_of(row): row for row in rows if row["arm"] == PLAIN}
    for row in rows:
        if row["arm"] != PLAIN and (sampled or row["temperature"] == 0):
            difference = first_difference(row["response_ids"], plain[place_of(row)]["response_ids"])
            row["identical"], row["first_difference"] = difference < 0, difference


def place_of(row: Row) -> tuple[Any, ...]:
    """What an answer and that of plain decoding beside it have in common."""
    return row["round"], row["temperature"], row["concurrency"], row["prompt_id"]


def first_difference(a: Sequence[int], b: Sequence[int]) -> int:
    """Index of the first differing token, -1 if equal."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return -1 if len(a) == len(b) else min(len(a), len(b))


def equality(rows: Sequence[Row]) -> dict[str, Any]:
    """Share of compared outputs equal to plain decoding in the serving dtype, and the known margins where they part."""
    compared = [row for row in rows if row["identical"] is not None]
    margins = [row["margin"] for row in compared if row["first_difference"] >= 0 and not np.isnan(row["margin"])]
    return {
        "identical_share": sum(row["identical"] for row in compared) / len(compared) if compared else None,
        "compared_outputs": len(compared),
        "median_margin": float(np.median(margins)) if margins else None,
        "largest_margin": max(margins) if margins else None,
    }


def candidate_sizes(config: EvaluationConfig, trained: int) -> list[int]:
    """Block sizes to choose from: none larger than the trained one."""
    return sorted({min(size, trained) for size in config.block_sizes or (trained,)})


def told(sizes: Mapping[str, int]) -> str:
    """What each drafter decodes with, for the log."""
    return "decoding with blocks of " + ", ".join(f"{size} ({arm})" for arm, size in sizes.items())


def fastest(speeds: Mapping[int, float]) -> int:
    """The block size with the most tokens/s; the smaller one of equals."""
    return max(speeds, key=speeds.__getitem__)
