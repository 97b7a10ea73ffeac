"""Rollout: the target answers prompts, alone (data for SFT) or with a drafter in the loop (data for mining and OPD)."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, model_validator

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.drafters.spec import NO_FREQUENT_TOKENS, DraftingConfig
from draftsmith.stages.engines.config import (
    NO_REDUCED_HEAD,
    EmbeddedEngineConfig,
    EngineConfig,
    SamplingConfig,
    SGLangEngineConfig,
    served_dtype,
)
from draftsmith.stages.engines.sglang.environment import programs_of
from draftsmith.stages.runtime.stage import Compute, Config, Stage, StageContext

if TYPE_CHECKING:
    from draftsmith.stages.data.load import PromptRows
    from draftsmith.stages.engines.base import Completion, Engine, Request
    from draftsmith.stages.engines.partial_answers import AnswerParts


_PART_ANSWERS = 64  # put together at a time


class RolloutConfig(Config):
    """Which prompts are answered, and how."""

    splits: Annotated[tuple[str, ...], Field(description="of the prompts")] = ("train",)
    skip: Annotated[int, Field(ge=0, description="prompts left out at the beginning of the splits")] = 0
    prompts: Annotated[int | None, Field(ge=1, description="how many; left out: all")] = None
    sampling: SamplingConfig = SamplingConfig()
    engine: EngineConfig = EmbeddedEngineConfig()
    drafting: DraftingConfig = DraftingConfig()
    rows_per_shard: Annotated[
        int | None,
        Field(
            ge=1,
            description="answers written at once: what a kill loses; the embedded engine decodes them together, which "
            "decides near-ties of half precision. Left out: 16 a slot, or 32 of servers",
        ),
    ] = None

    @model_validator(mode="after")
    def _engine_can_draft_so(self) -> RolloutConfig:
        if isinstance(self.engine, SGLangEngineConfig) and self.drafting.head_tokens is not None:
            raise ValueError(f"drafting.head_tokens: {NO_REDUCED_HEAD}")
        return self

    def programs(self) -> dict[str, str]:
        return programs_of(self.engine)

    def counts(self, available: Mapping[str, int]) -> dict[str, int]:
        """How many prompts of each split are answered. available: how many there are, in the order of their rows."""
        start, left = self.skip, math.inf if self.prompts is None else self.prompts
        counts = {}
        for split, number in available.items():
            there = number if split in self.splits else 0
            counts[split] = int(min(left, max(0, there - start)))
            start, left = max(0, start - there), left - counts[split]
        return counts


def too_few(config: RolloutConfig, available: int) -> str | None:
    """Return why so many prompts of the splits are not enough, None if they are."""
    left = available - config.skip
    if left > 0 and left >= (config.prompts or 0):
        return None
    return (
        f"splits {list(config.splits)} have {available} prompts, {config.skip} are skipped and "
        f"{config.prompts or 'all others'} wanted. Raise the counts in section prompts, or lower skip or prompts."
    )


def prompts_to_answer(config: RolloutConfig, folder: Path) -> PromptRows:
    """Of the artifact of stage `prompts` in `folder`. Raises DraftsmithError if there are none."""
    from draftsmith.stages.data.load import load_prompts

    there = load_prompts(folder, config.splits)
    if not (asked := there[config.skip :][: config.prompts]):
        raise DraftsmithError(f"rollout: {too_few(config, len(there))}")
    return asked


def preflight(config: RolloutConfig, target: Path) -> None:
    """The longest answer must fit into the target's context."""
    from draftsmith.stages.data.load import check_answer_fits

    check_answer_fits(config.sampling.max_new_tokens, target)


def run(ctx: StageContext, config: RolloutConfig) -> None:
    """Answer the prompts that have no answer yet, part by part; put the parts together in prompt order."""
    import pyarrow.compute as pc

    from draftsmith.artifacts.tables.parquet import TableWriter
    from draftsmith.artifacts.tables.readers import BATCH_ROWS
    from draftsmith.stages.data.load import DRAFTER_FOLDER
    from draftsmith.stages.drafters.digest import drafter_digest
    from draftsmith.stages.engines.partial_answers import SCHEMAS, AnswerParts
    from draftsmith.stages.target.info import read_target_info

    prompts = prompts_to_answer(config, ctx.inputs["prompts"])
    asked = _Asked(prompts, config.sampling, ctx.seed)
    parts = AnswerParts(ctx.work)
    _answer(ctx, config, parts, asked)

    drafter_folder = ctx.inputs["drafter"] / DRAFTER_FOLDER if "drafter" in ctx.inputs else None
    rows = parts.rows(asked.names)
    tables = {name: schema for name, schema in SCHEMAS.items() if name != "trace" or drafter_folder is not None}
    done, total = 0, sum(int(rows[name].counts.sum()) for name in tables)
    tokens = stopped = steps = 0
    for name, schema in tables.items():
        with TableWriter(ctx.out / f"{name}.parquet", schema) as table:
            for part in rows[name].batches(schema.columns.names, BATCH_ROWS if name == "trace" else _PART_ANSWERS):
                table.append(part)
                done += part.num_rows
                ctx.progress(done, total, "rows put together")  # of many long answers it takes minutes
                ctx.check_interrupted()
                if name == "trajectories":
                    tokens += pc.sum(pc.list_value_length(part["response_ids"])).as_py()
                    stopped += pc.sum(pc.equal(part["finish_reason"], "stop")).as_py()
                if name == "timings":
                    steps += pc.sum(part["verify_steps"]).as_py()
    if drafter_folder:
        served = {
            "drafter_digest": drafter_digest(drafter_folder),
            **config.drafting.key_material(),
            "engine": config.engine.kind,
            "dtype": served_dtype(config.engine, read_target_info(ctx.inputs["target"]).dtype),
            "temperature": config.sampling.temperature,
        }
        (ctx.out / "trace.json").write_text(json.dumps(served, indent=2, sort_keys=True) + "\n")
    ctx.summary(
        answers=len(asked),
        response_tokens=tokens,
        stopped_share=stopped / len(asked),
        **({"tau": (tokens - len(asked)) / steps} if steps else {}),
    )


class _Asked:
    """The requests of a rollout, by their place; each is made when it is sent. Names stay in memory."""

    def __init__(self, prompts: PromptRows, sampling: SamplingConfig, seed: int):
        self.prompts, self._seed = prompts, seed
        self._max_new_tokens, self._sampling = sampling.max_new_tokens, sampling.params()
        self.names = [f"{prompt}/0" for prompt in prompts.ids]

    def __len__(self) -> int:
        return len(self.names)

    def at(self, places: Iterable[int]) -> Iterator[Request]:
        from draftsmith.stages.data.load import request_seed
        from draftsmith.stages.engines.base import Request

        for place in places:
            prompt = self.prompts[place]
            seed = request_seed(self._seed, prompt.prompt_id, 0)
            yield Request(self.names[place], prompt.token_ids, self._max_new_tokens, self._sampling, seed)


def _answer(ctx: StageContext, config: RolloutConfig, parts: AnswerParts, asked: _Asked) -> None:
    """Make the parts that are missing."""
    from draftsmith.artifacts.store.manifest import write_versions
    from draftsmith.stages.data.load import DRAFTER_FOLDER, positions_needed
    from draftsmith.stages.target.info import read_target_info

    drafter_folder = ctx.inputs["drafter"] / DRAFTER_FOLDER if "drafter" in ctx.inputs else None
    if parts.finished(with_trace=drafter_folder is not None).issuperset(asked.names):
        return
    at_once = config.rows_per_shard or _rows_at_once(config.engine)
    limit = read_target_info(ctx.inputs["target"]).max_positions
    longest = positions_needed(asked.prompts, config.sampling.max_new_tokens, limit)
    splits = dict(zip(asked.prompts.ids, asked.prompts.splits, strict=True))
    with _engine(ctx, config, drafter_folder, longest) as engine:
        if engine.name.startswith("sglang"):
            write_versions(ctx.out, sglang=engine.name.removeprefix("sglang "))
        finished = parts.finished(with_trace=engine.records_trace)  # whole without steps where the engine has none
        missing = _missing(asked.names, finished, at_once, engine.batch_decides)
        done = len(asked) - sum(map(len, missing))
        if finished:
            ctx.log(f"{done} answers of an earlier attempt kept, {len(asked) - done} missing")
        tokens, started = 0, time.perf_counter()
        for places in missing:
            made: list[Completion] = []
            try:
                for completion in engine.generate(asked.at(places)):
                    made.append(completion)
                    tokens, done = tokens + len(completion.response_ids), done + 1
                    ctx.progress(done, len(asked), "answers", tokens_per_s=tokens / (time.perf_counter() - started))
                    if not engine.batch_decides and (len(made) >= at_once or ctx.interrupted):
                        parts.append(made, splits, engine.name)
                        made = []
                    ctx.check_interrupted()
            finally:  # an engine that was lost costs none of the answers that it gave
                if not engine.batch_decides or len(made) == len(places):
                    parts.append(made, splits, engine.name)
        ctx.summary(tokens_per_s=tokens / (time.perf_counter() - started))


@contextmanager
def _engine(ctx: StageContext, config: RolloutConfig, drafter: Path | None, longest: int) -> Iterator[Engine]:
    """Load an engine into this process, or connect to servers, which are stopped on exit if they were started here.

    drafter: its checkpoint. longest: positions of the longest request, prompt and response.
    """
    drafting = config.drafting
    if isinstance(config.engine, SGLangEngineConfig):
        from draftsmith.stages.engines.sglang.engine import open_sglang

        with open_sglang(
            config.engine,
            target_folder=ctx.inputs["target"],
            drafter_folder=drafter,
            drafting=drafting,
            longest=longest,
            work=ctx.work,
            log=ctx.log,
            check=ctx.check_interrupted,
        ) as engine:
            yield engine
        return

    from draftsmith.stages.drafters.checkpoint import load_drafter
    from draftsmith.stages.engines.embedded import EmbeddedEngine
    from draftsmith.stages.target.causal_lm import Target

    target = Target.load(ctx.inputs["target"])
    loaded = load_drafter(drafter, target) if drafter else None
    if loaded and drafting.head_tokens and loaded.frequent_tokens is None:
        ctx.log(f"drafter: {NO_FREQUENT_TOKENS}")
    block = (drafting.block_size or loaded.block_size) if loaded else 1
    yield EmbeddedEngine(target, loaded, slots=config.engine.slots, capacity=longest + block, drafting=drafting)


def _rows_at_once(engine: EmbeddedEngineConfig | SGLangEngineConfig) -> int:
    """At the end of a group slots run empty while its last answers are written: more of it, and less is lost to that;
    less, and a kill loses less."""
    return 32 if isinstance(engine, SGLangEngineConfig) else 16 * engine.slots


def _missing(names: Sequence[str], finished: set[str], group: int, batch_decides: bool) -> list[Sequence[int]]:
    """Places of the requests that the engine gets at once.

    Where the batch decides, groups that are the same whatever was there before: one of which anything is missing is
    made again, whole.
    """
    if not batch_decides:
        return [[place for place, name in enumerate(names) if name not in finished]]
    groups = [range(start, min(start + group, len(names))) for start in range(0, len(names), group)]
    return [each for each in groups if not finished.issuperset(names[place] for place in each)]


def _computes(config: RolloutConfig) -> Compute:
    """Servers that run already are not this run's."""
    given = isinstance(config.engine, SGLangEngineConfig) and config.engine.launch is None
    return Compute.LIGHT if given else Compute.HEAVY


STAGE = Stage(
    name="rollout",
    config=RolloutConfig,
    inputs=("target", "prompts", "drafter?"),
    body=__name__,
    preflight=preflight,
    compute=_computes,
    volatile=("metrics.jsonl", "timings.parquet", "versions.json"),
)
