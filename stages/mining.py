"""Mining: the verification trace on stored trajectories, with what target and drafter said of every proposal."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from draftsmith.stages.contract import Compute, Config, Stage, StageContext
from draftsmith.stages.drafters.config import DraftingConfig
from draftsmith.stages.replay.parity import MaxParityMismatch

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pyarrow as pa

    from draftsmith.stages.drafters.base import Drafter
    from draftsmith.stages.replay.trace import Trajectory


class MiningConfig(Config):
    """How the trace is rebuilt."""

    drafting: DraftingConfig = DraftingConfig()
    chains: Annotated[int | None, Field(ge=1, description="parallel chains a trajectory; null: as many as pay")] = None
    top_k: Annotated[int, Field(ge=1, description="the target's best tokens kept at each rejection")] = 8
    tokens_per_target_forward: Annotated[int, Field(ge=1)] = 8192
    tree_tokens: Annotated[int, Field(ge=1, description="rejected proposals scored in one forward, a trajectory")] = 512
    max_parity_mismatch: MaxParityMismatch = 0.25


def run(ctx: StageContext, config: MiningConfig) -> None:
    """Replay and score group by group; each group is a shard, so an interrupted run continues with the next one."""
    from draftsmith.artifacts.atomic import write_text
    from draftsmith.artifacts.parquet import ShardWriter, ordered, read_shards, write_table
    from draftsmith.artifacts.schemas import VERIFY_STEPS
    from draftsmith.stages.drafters.checkpoint import load_drafter
    from draftsmith.stages.drafters.digest import drafter_digest
    from draftsmith.stages.replay.corpus import mine
    from draftsmith.stages.replay.table import rows_of_group, summarise
    from draftsmith.stages.stored import DRAFTER_FOLDER, load_trajectories
    from draftsmith.stages.targets.causal_lm import Target

    stored = load_trajectories(ctx.inputs["trajectories"])
    trajectories = stored.trajectories
    shards = ShardWriter(ctx.work / "verify_steps", VERIFY_STEPS)
    finished = set(
        read_shards(ctx.work / "verify_steps", VERIFY_STEPS, columns=["trajectory_id"])["trajectory_id"].to_pylist()
    )
    progress_file = ctx.work / "evaluated_blocks.json"
    evaluated: dict[str, int] = json.loads(progress_file.read_text()) if progress_file.exists() else {}

    target = Target.load(ctx.inputs["target"])
    drafter_folder = ctx.inputs["drafter"] / DRAFTER_FOLDER
    drafter = load_drafter(drafter_folder, target)
    block_size = config.drafting.block_size or drafter.block_size
    done = len(finished)
    for group in mine(
        target,
        drafter,
        trajectories,
        config.drafting,
        chains=config.chains,
        top_k=config.top_k,
        tokens_per_group=config.tokens_per_target_forward,
        tree_tokens=config.tree_tokens,
        finished=lambda group: all(t.trajectory_id in finished for t in group.trajectories),
        log=ctx.log,
    ):
        # written before the shard and by trajectory: a shard that is there is counted, one that was lost is not twice
        members = zip(group.trajectories, group.traces, strict=True)
        evaluated |= {t.trajectory_id: trace.evaluated_blocks for t, trace in members}
        write_text(progress_file, json.dumps(evaluated))
        shards.append(rows_of_group(group))
        done += len(group.trajectories)
        ctx.progress(done, len(trajectories), "trajectories")
        ctx.check_interrupted()

    # long answers have millions of steps: no Python object for each from here on
    whole = read_shards(ctx.work / "verify_steps", VERIFY_STEPS)
    table = ordered(whole, "trajectory_id", [t.trajectory_id for t in trajectories])
    write_table(ctx.out / "verify_steps.parquet", VERIFY_STEPS, table)
    summary = summarise(table, target.tokenizer, block_size)
    summary["evaluated_blocks_per_step"] = sum(evaluated.values()) / table.num_rows
    summary["trajectories_too_short"] = stored.too_short
    drafted_as = {"drafter_digest": drafter_digest(drafter_folder), **config.drafting.model_dump()}
    summary["parity"] = parity(ctx, table, trajectories, drafter, drafted_as, target.info.dtype, config)
    (ctx.out / "summary.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    ctx.summary(
        **{k: summary[k] for k in ("tau", "steps", "error_positions", "evaluated_blocks_per_step")},
        **{
            f"parity_{name.removesuffix('_share')}": value
            for name, value in (summary["parity"] or {}).items()
            if name in ("mismatch_share", "tau_difference")
        },
    )


def parity(
    ctx: StageContext,
    table: pa.Table,
    trajectories: Sequence[Trajectory],
    drafter: Drafter,
    drafted_as: dict[str, Any],
    dtype: str,
    config: MiningConfig,
) -> dict[str, Any] | None:
    """Compare what the engine recorded while it served with replay: its steps, and how many it counted.

    table: VERIFY_STEPS; drafted_as: the drafter's digest and how it drafts here; dtype: of this replay. None unless the
    same drafter served with the same settings. Raises DraftsmithError if they differ in more steps than allowed: the
    drafter that was served is then not this one.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    from draftsmith.artifacts.parquet import read_table
    from draftsmith.artifacts.schemas import TIMINGS, TRACE
    from draftsmith.stages.replay.parity import Gate, check_steps, check_tau

    folder = ctx.inputs["trajectories"]
    path = folder / "trace.json"
    if not path.exists():
        return None
    told = json.loads(path.read_text())
    served_as = {name: told.get(name) for name in drafted_as}
    for settings in (served_as, drafted_as):
        settings["block_size"] = settings["block_size"] or drafter.block_size  # left out: as it was trained
    if served_as != drafted_as:
        if served_as["drafter_digest"] == drafted_as["drafter_digest"]:
            ctx.log(
                "served steps are not compared with replay: the rollout drafted with other settings "
                f"({_drafting(served_as)}) than section mining ({_drafting(drafted_as)})"
            )
        return None
    gate = Gate(
        "mining",
        float32=told.get("dtype") == dtype == "float32",
        greedy=told.get("temperature") == 0,
        allowed=config.max_parity_mismatch,
    )
    known = {t.trajectory_id: t.response_length for t in trajectories}
    trace, timings = (
        rows.filter(pc.is_in(rows["trajectory_id"], value_set=pa.array(list(known), pa.string())))
        for rows in (
            read_table(folder / "trace.parquet", TRACE),
            read_table(folder / "timings.parquet", TIMINGS, ["trajectory_id", "verify_steps"]),
        )
    )
    figures = check_steps(gate, trace, table) if trace.num_rows else {}
    served = dict(zip(timings["trajectory_id"].to_pylist(), timings["verify_steps"].to_pylist(), strict=True))
    counts = table["trajectory_id"].value_counts()
    replayed = dict(zip(counts.field("values").to_pylist(), counts.field("counts").to_pylist(), strict=True))
    return figures | check_tau(
        gate,
        # the prefill's token is committed before any verify step
        *(np.array(each) for each in zip(*((known[t] - 1, served.get(t, 0), replayed[t]) for t in known), strict=True)),
    )


def _drafting(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {settings[name]}" for name in DraftingConfig.model_fields)


STAGE = Stage(
    name="mining", config=MiningConfig, inputs=("target", "drafter", "trajectories"), run=run, compute=Compute.HEAVY
)
