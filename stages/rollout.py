"""Rollout: the target answers prompts, alone (data for SFT) or with a drafter in the loop (data for mining and OPD)."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, model_validator

from draftsmith.stages.contract import Config, Operational, Stage, StageContext
from draftsmith.stages.drafters.config import DraftingConfig
from draftsmith.stages.engines.config import (
    NO_REDUCED_HEAD,
    EmbeddedEngineConfig,
    EngineConfig,
    SamplingConfig,
    SGLangEngineConfig,
)

if TYPE_CHECKING:
    import pyarrow as pa

    from draftsmith.artifacts.parquet import ShardWriter
    from draftsmith.stages.engines.base import Completion
    from draftsmith.stages.stored import Prompt


class RolloutConfig(Config):
    """Which prompts are answered, and how."""

    splits: tuple[str, ...] = ("train",)
    skip: Annotated[int, Field(ge=0, description="prompts left out at the beginning of the splits")] = 0
    prompts: Annotated[int | None, Field(ge=1, description="how many; left out: all")] = None
    samples_per_prompt: Annotated[int, Field(ge=1)] = 1
    sampling: SamplingConfig = SamplingConfig()
    engine: EngineConfig = EmbeddedEngineConfig()
    drafting: DraftingConfig = DraftingConfig()
    rows_per_shard: Annotated[
        int, Field(ge=1, description="answers written at once; bounds what a kill loses"), Operational()
    ] = 32

    @model_validator(mode="after")
    def _engine_can_draft_so(self) -> RolloutConfig:
        if isinstance(self.engine, SGLangEngineConfig) and self.engine.launch and self.engine.launch.tree:
            raise ValueError("engine.launch.tree: trees are for the speed of an evaluation; a rollout drafts chains")
        if isinstance(self.engine, SGLangEngineConfig) and self.drafting.head_tokens is not None:
            raise ValueError(f"drafting.head_tokens: {NO_REDUCED_HEAD}")
        return self

    def counts(self, available: Mapping[str, int]) -> dict[str, int]:
        """How many prompts of each split are answered. available: how many there are, in the order of their rows."""
        start, left = self.skip, math.inf if self.prompts is None else self.prompts
        counts = {}
        for split, number in available.items():
            there = number if split in self.splits else 0
            counts[split] = int(min(left, max(0, there - start)))
            start, left = max(0, start - there), left - counts[split]
        return counts


def prompts_to_answer(config: RolloutConfig, folder: Path) -> list[Prompt]:
    """Of the artifact of stage `prompts` in `folder`."""
    from draftsmith.stages.stored import load_prompts

    return load_prompts(folder, config.splits)[config.skip :][: config.prompts]


def preflight(config: RolloutConfig, target: Path) -> None:
    """The longest answer must fit into the target's context."""
    from draftsmith.stages.stored import check_answer_fits

    check_answer_fits(config.sampling.max_new_tokens, target)


def run(ctx: StageContext, config: RolloutConfig) -> None:
    """Answer the prompts that have no answer yet; write shards; put them together in prompt order."""
    import numpy as np
    import pyarrow.compute as pc

    from draftsmith.artifacts.errors import DraftsmithError
    from draftsmith.artifacts.parquet import ShardWriter, read_shards, write_table
    from draftsmith.artifacts.schemas import TIMINGS, TRACE, TRAJECTORIES
    from draftsmith.stages.drafters.digest import drafter_digest
    from draftsmith.stages.engines.base import Request, SamplingParams
    from draftsmith.stages.engines.config import served_dtype
    from draftsmith.stages.engines.open import open_engine
    from draftsmith.stages.stored import DRAFTER_FOLDER, positions_needed, request_seed
    from draftsmith.stages.targets.info import read_target_info

    prompts = prompts_to_answer(config, ctx.inputs["prompts"])
    if not prompts:
        raise DraftsmithError(
            f"rollout: no prompts left in splits {list(config.splits)} after skip={config.skip}; "
            "raise the counts in section prompts or lower skip"
        )
    params = SamplingParams(**config.sampling.model_dump())
    wanted = [
        Request(f"{p.prompt_id}/{sample}", p.token_ids, params, request_seed(ctx.seed, p.prompt_id, sample))
        for p in prompts
        for sample in range(config.samples_per_prompt)
    ]
    prompt_of = {f"{p.prompt_id}/{sample}": p for p in prompts for sample in range(config.samples_per_prompt)}

    schemas = {"trajectories": TRAJECTORIES, "timings": TIMINGS, "trace": TRACE}
    shards = {name: ShardWriter(ctx.work / name, schema) for name, schema in schemas.items()}
    finished = _complete_answers(ctx.work, with_trace="drafter" in ctx.inputs)
    missing = [request for request in wanted if request.request_id not in finished]

    drafter_folder = ctx.inputs["drafter"] / DRAFTER_FOLDER if "drafter" in ctx.inputs else None
    if missing:
        longest = positions_needed(prompts, params.max_new_tokens, read_target_info(ctx.inputs["target"]).max_positions)
        buffer: list[Completion] = []
        tokens, started = 0, time.perf_counter()
        with open_engine(
            config.engine,
            target_folder=ctx.inputs["target"],
            drafter_folder=drafter_folder,
            drafting=config.drafting,
            longest=longest,
            work=ctx.work,
            log=ctx.log,
            check=ctx.check_interrupted,
        ) as engine:
            if not engine.records_trace:  # without a drafter or the plug-in, answers are whole without steps
                finished = _complete_answers(ctx.work, with_trace=False)
                missing = [request for request in wanted if request.request_id not in finished]
            if finished:
                ctx.log(f"{len(finished)} answers of an earlier attempt kept, {len(missing)} missing")
            try:
                for done, completion in enumerate(engine.generate(missing), start=len(finished) + 1):
                    buffer.append(completion)
                    tokens += len(completion.response_ids)
                    ctx.progress(done, len(wanted), "answers", tokens_per_s=tokens / (time.perf_counter() - started))
                    if len(buffer) >= config.rows_per_shard or ctx.interrupted:
                        _write(shards, buffer, prompt_of, engine.name)
                        buffer = []
                        ctx.check_interrupted()
            finally:  # an engine that was lost costs none of the answers that it gave
                _write(shards, buffer, prompt_of, engine.name)
        ctx.summary(tokens_per_s=tokens / (time.perf_counter() - started))

    tables = {}
    for name, schema in schemas.items():
        tables[name] = _latest(read_shards(ctx.work / name, schema), [request.request_id for request in wanted])
        if name != "trace" or drafter_folder:
            write_table(ctx.out / f"{name}.parquet", schema, tables[name])
    if drafter_folder:
        served = {
            "drafter_digest": drafter_digest(drafter_folder),
            **config.drafting.model_dump(),
            "engine": config.engine.kind,
            "dtype": served_dtype(config.engine, read_target_info(ctx.inputs["target"]).dtype),
            "temperature": params.temperature,
        }
        (ctx.out / "trace.json").write_text(json.dumps(served, indent=2, sort_keys=True) + "\n")
    lengths = pc.list_value_length(tables["trajectories"]["response_ids"]).to_numpy()
    steps = int(tables["timings"]["verify_steps"].to_numpy().sum())
    ctx.summary(
        answers=len(lengths),
        response_tokens=int(lengths.sum()),
        stopped_share=float(np.mean(pc.equal(tables["trajectories"]["finish_reason"], "stop").to_numpy())),
        **({"tau": float(lengths.sum() - len(lengths)) / steps} if steps else {}),
    )


def _complete_answers(work: Path, with_trace: bool) -> set[str]:
    """Answers of an earlier attempt that all tables hold whole; one whose shard was set aside is made again."""
    from draftsmith.artifacts.parquet import read_shards
    from draftsmith.artifacts.schemas import TIMINGS, TRACE, TRAJECTORIES

    answers = set(read_shards(work / "trajectories", TRAJECTORIES, ["trajectory_id"])["trajectory_id"].to_pylist())
    timings = read_shards(work / "timings", TIMINGS, ["trajectory_id", "verify_steps"]).to_pylist()
    steps = {row["trajectory_id"]: row["verify_steps"] for row in timings}
    answers &= steps.keys()
    if not with_trace:
        return answers
    recorded = Counter(read_shards(work / "trace", TRACE, ["trajectory_id"])["trajectory_id"].to_pylist())
    return {answer for answer in answers if recorded[answer] >= steps[answer]}


def _latest(rows: pa.Table, answers: list[str]) -> pa.Table:
    """Rows in the order of the answers; what a killed attempt wrote in part is replaced by its repetition."""
    import numpy as np
    import pyarrow as pa

    from draftsmith.artifacts.parquet import ordered, places

    begins = rows["step"].to_numpy() == 0 if "step" in rows.column_names else np.ones(rows.num_rows, dtype=bool)
    attempt, answer = np.cumsum(begins), places(rows, "trajectory_id", answers)
    assert (answer >= 0).all(), "the shards of an attempt hold answers of its own requests"
    last = np.zeros(len(answers), dtype=attempt.dtype)
    np.maximum.at(last, answer, attempt)
    return ordered(rows.filter(pa.array(attempt == last[answer])), "trajectory_id", answers)


def _write(
    shards: Mapping[str, ShardWriter], completions: list[Completion], prompt_of: dict[str, Prompt], engine: str
) -> None:
    """One shard of each table."""
    ids = [c.request.request_id for c in completions]
    shards["timings"].append(
        [
            {
                "trajectory_id": i,
                "seconds": c.seconds,
                "first_token_seconds": c.first_token_seconds,
                "verify_steps": c.verify_steps,
                "draft_seconds": c.draft_seconds,
                "verify_seconds": c.verify_seconds,
            }
            for i, c in zip(ids, completions, strict=True)
        ]
    )
    shards["trace"].append([row for completion in completions for row in completion.trace_rows()])
    shards["trajectories"].append(
        [
            {
                "trajectory_id": i,
                "prompt_id": prompt_of[i].prompt_id,
                "split": prompt_of[i].split,
                "sample": int(i.rsplit("/", 1)[1]),
                "prompt_ids": c.request.prompt_ids,
                "response_ids": c.response_ids,
                "finish_reason": c.finish_reason,
                "temperature": c.request.sampling.temperature,
                "top_p": c.request.sampling.top_p,
                "seed": c.request.seed,
                "engine": engine,
            }
            for i, c in zip(ids, completions, strict=True)
        ]
    )


STAGE = Stage(
    name="rollout",
    config=RolloutConfig,
    inputs=("target", "prompts", "drafter?"),
    run=run,
    accelerator=True,
    preflight=preflight,
    volatile=("metrics.jsonl", "timings.parquet"),
)
