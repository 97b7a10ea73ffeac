"""The body of stage `mining`: replays and scores the answers, writes the table, and compares it with the served steps.

Mined groups stay on disk, so that a rerun continues after them.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from transformers import AutoTokenizer

from draftsmith.artifacts.atomic import write_text
from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.results.drafting import TraceSource
from draftsmith.artifacts.tables.parquet import TableWriter, index_in, read_table
from draftsmith.artifacts.tables.readers import KeyedRows, RowReader
from draftsmith.artifacts.tables.schemas import TIMINGS, TRACE, VERIFY_STEPS
from draftsmith.stages.data.trajectories import (
    DRAFTER_FOLDER,
    StoredTrajectories,
    Trajectory,
    TrajectoryRows,
    load_trajectories,
    random_rank,
)
from draftsmith.stages.drafters.base import PreparedDrafter
from draftsmith.stages.drafters.checkpoint import TOKENS_FILE, block_size_of, load_drafter, skeleton_of
from draftsmith.stages.drafters.digest import drafter_digest
from draftsmith.stages.drafters.spec import NO_FREQUENT_TOKENS, DraftingConfig
from draftsmith.stages.replay.groups import count_in
from draftsmith.stages.replay.mined_table import MinedShards, MiningMetrics
from draftsmith.stages.replay.near_ties import explained_by_ties
from draftsmith.stages.replay.options import ReplayOptions
from draftsmith.stages.replay.parity import COMPARED, ParityMetrics, ParityTolerance, StepComparison, check_tau
from draftsmith.stages.replay.replayer import Replayer
from draftsmith.stages.replay.sampled import samples_proposals, truncation_warning
from draftsmith.stages.replay.stage import SAMPLE, MiningConfig
from draftsmith.stages.runtime.stage import WHOLE, Shard, StageContext
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.targets.info import model_path, read_target_info

SHARD = "shard.json"  # the content list of a shard's artifact


def run(ctx: StageContext, config: MiningConfig) -> None:
    """Mine the answers that no shard holds yet, then write the table in the order of the answers, and its summary."""
    stored = _read_answers(ctx, config)
    trajectories = stored.trajectories
    drafter = ctx.inputs["drafter"] / DRAFTER_FOLDER
    if config.drafting.head_tokens and not (drafter / TOKENS_FILE).is_file():
        ctx.log(f"drafter: {NO_FREQUENT_TOKENS}")
    shards = mine_shard(ctx, config, stored, ctx.work)
    tokenizer = AutoTokenizer.from_pretrained(model_path(ctx.inputs["target"]), local_files_only=True)

    # Long answers have millions of steps: from here on none is a Python object, and never are all in memory.
    metrics = MiningMetrics(config.drafting.block_size or block_size_of(drafter))
    rows = shards.rows(trajectories.ids)
    total = int(rows.counts.sum())
    with TableWriter(ctx.out / "verify_steps.parquet", VERIFY_STEPS) as table:
        for batch in rows.batches(VERIFY_STEPS.columns.names):
            table.append(batch)
            metrics.add(batch)
            ctx.progress(table.rows, total, "steps put together")  # takes minutes
            ctx.check_interrupted()
    totals = shards.totals(trajectories.ids)
    sampled = samples_proposals(skeleton_of(drafter), stored.sampling)
    outside = totals["outside_nucleus"] / int(_committed(trajectories).sum()) if sampled else None
    if warning := truncation_warning(outside, stored.sampling):
        ctx.log(warning)
    parity = check_parity(ctx, trajectories, config, sampled=sampled)
    summary = metrics.summary(tokenizer) | {
        "evaluated_blocks_per_step": totals["evaluated_blocks"] / metrics.steps,
        "trajectories": len(trajectories),
        "trajectories_too_short": stored.too_short,
        "outside_nucleus_share": outside,
        "parity": parity,
    }
    (ctx.out / "summary.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    reported = {
        **{name: summary[name] for name in ("tau", "steps", "error_positions", "evaluated_blocks_per_step")},
        "certain_error_share": summary["certain_errors"]["share"],
        "outside_nucleus_share": outside,
        "parity_mismatch": (parity or {}).get("mismatch_share"),
        "parity_tau_difference": (parity or {}).get("tau_difference"),
    }
    ctx.summary(**{name: value for name, value in reported.items() if value is not None})


def shard(ctx: StageContext, config: MiningConfig, part: Shard) -> None:
    """Mine the answers of one shard, for `run` to read."""
    stored = _read_answers(ctx, config)
    mine_shard(ctx, config, stored, ctx.out, part)
    count = count_in(stored.trajectories, config.tokens_per_target_forward, part)
    write_text(ctx.out / SHARD, json.dumps({"shard": part.index, "of": part.of, "trajectories": count}) + "\n")
    ctx.summary(trajectories=count)


def _read_answers(ctx: StageContext, config: MiningConfig) -> StoredTrajectories:
    """Return the answers to mine, in the artifact's order."""
    stored = load_trajectories(ctx.inputs["trajectories"])
    count = len(stored.trajectories)
    if config.table != "sample" or count <= SAMPLE:
        return stored
    names = stored.trajectories.ids.to_pylist()
    first = sorted(range(count), key=lambda index: random_rank(ctx.seed, names[index].encode()))[:SAMPLE]
    ctx.log(f"mining a sample of {SAMPLE} of {count} answers, since OPD takes no anchors from the table")
    return stored.select(sorted(first))


def mine_shard(
    ctx: StageContext, config: MiningConfig, stored: StoredTrajectories, folder: Path, part: Shard = WHOLE
) -> MinedShards:
    """Replay and score the groups of a shard that are not in `folder` yet, or open the shards if all were made.

    Raises DraftsmithError if the shards do not hold all answers.
    """
    trajectories = stored.trajectories
    with MinedShards(folder, ctx.shards) as shards:
        finished = shards.rows(trajectories.ids).counts > 0
        done, total = int(finished.sum()), count_in(trajectories, config.tokens_per_target_forward, part)
        if ctx.shards or done == total:
            if done != total:
                raise DraftsmithError(f"mining: the shards hold {done} of {total} answers. Add `--force mining`.")
            return shards
        target = Target.load(ctx.inputs["target"])
        options = ReplayOptions(
            config.drafting, stored.sampling, tokens_per_group=config.tokens_per_target_forward, shard=part
        )
        for group in Replayer(target, options, ctx.log).mine(
            load_drafter(ctx.inputs["drafter"] / DRAFTER_FOLDER, target),
            trajectories,
            suffixes=config.table == "scored",
            finished=lambda indices: bool(finished[indices].all()),
        ):
            shards.add_group(group)
            done += len(group)
            ctx.progress(done, total, "trajectories")
            ctx.check_interrupted()
    return shards


def check_parity(
    ctx: StageContext, trajectories: TrajectoryRows, config: MiningConfig, *, sampled: bool
) -> ParityMetrics | None:
    """Compare the steps that the engine recorded and counted while it served with the replayed ones.

    sampled: whether proposals are sampled. Steps then equal replay's in distribution; only their number is compared.

    Returns None unless the same drafter served with the same settings. Raises DraftsmithError if more steps differ than
    allowed: then another drafter was served.
    """
    folder, drafter = ctx.inputs["trajectories"], ctx.inputs["drafter"] / DRAFTER_FOLDER
    served_with = TraceSource.read_if_there(folder)
    if served_with is None or served_with.drafter_digest != drafter_digest(drafter):
        return None

    def effective(block_size: int | None, head_tokens: int | None) -> DraftingConfig:
        return DraftingConfig(
            block_size=block_size or block_size_of(drafter),
            head_tokens=head_tokens if (drafter / TOKENS_FILE).is_file() else None,  # without them it has no effect
        )

    served_drafting = effective(served_with.block_size, served_with.head_tokens)
    drafting = effective(config.drafting.block_size, config.drafting.head_tokens)
    if served_drafting != drafting:
        ctx.log(
            "served steps are not compared with replay: the rollout drafted with other settings "
            f"({_describe(served_drafting)}) than section mining ({_describe(drafting)})"
        )
        return None
    tolerance = ParityTolerance(
        "mining",
        float32=served_with.dtype == read_target_info(ctx.inputs["target"]).dtype == "float32",
        greedy=served_with.temperature == 0,
        allowed=config.max_parity_mismatch,
        same_target=not served_with.differs,
    )
    ids = trajectories.ids
    replayed = KeyedRows(RowReader(ctx.out / "verify_steps.parquet", VERIFY_STEPS), ids)
    recorded = KeyedRows(RowReader(folder / "trace.parquet", TRACE), ids)

    def load() -> tuple[Target, PreparedDrafter]:
        target = Target.load(ctx.inputs["target"])
        return target, Replayer(target, ReplayOptions(config.drafting)).prepare(load_drafter(drafter, target))

    def trajectory(name: str) -> Trajectory:
        return trajectories[trajectories.ids.index(name).as_py()]

    comparison = StepComparison(tolerance, explained_by_ties(load, trajectory))
    for indices in recorded.batch_indices():
        traced = indices[recorded.counts[indices] > 0]
        comparison.add(recorded.take(traced, COMPARED), replayed.take(traced, COMPARED))
        ctx.check_interrupted()
    metrics: ParityMetrics = {}
    if recorded.counts.any() and not sampled:
        metrics |= comparison.check()
        if comparison.tied:
            ctx.log(f"{len(comparison.tied)} of {len(ids)} answers have near-ties: their steps are not compared")
    timings = read_table(folder / "timings.parquet", TIMINGS, ["trajectory_id", "verify_steps", "retractions"])
    index = index_in(timings, "trajectory_id", ids)
    served, retractions = np.zeros((2, len(ids)), dtype=np.int64)
    for counts, name in ((served, "verify_steps"), (retractions, "retractions")):
        counts[index[index >= 0]] = timings[name].to_numpy()[index >= 0]
    complete = retractions == 0  # a retracted answer has a token that no verify step made
    tied = pc.is_in(ids, pa.array(sorted(comparison.tied), ids.type)).to_numpy(zero_copy_only=False)
    if not complete.all():
        ctx.log(
            f"{(~complete).sum()} of {len(complete)} answers were retracted by a full server: their steps are not "
            "compared"
        )
    if (complete := complete & ~tied).any():
        metrics |= check_tau(tolerance, _committed(trajectories)[complete], served[complete], replayed.counts[complete])
    return metrics


def _committed(trajectories: TrajectoryRows) -> np.ndarray:
    """Return [N] the tokens that verify steps committed: all but the first, which prefill commits."""
    return trajectories.lengths - trajectories.prompt_lengths - 1


def _describe(drafting: DraftingConfig) -> str:
    return ", ".join(f"{name} {value}" for name, value in drafting if value is not None)
