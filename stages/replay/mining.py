"""The body of stage `mining`: replays and scores the answers, writes the table, and compares it with the served steps.

Groups that were mined stay on disk, so that a rerun goes on after them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
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
    TrajectoryRows,
    load_trajectories,
    random_rank,
)
from draftsmith.stages.drafters.checkpoint import TOKENS_FILE, block_size_of, load_drafter, skeleton_of
from draftsmith.stages.drafters.digest import drafter_digest
from draftsmith.stages.drafters.spec import NO_FREQUENT_TOKENS, DraftingConfig
from draftsmith.stages.replay.mined_table import MinedShards, MiningMetrics
from draftsmith.stages.replay.options import ReplayOptions
from draftsmith.stages.replay.parity import COMPARED, ParityMetrics, ParityTolerance, StepComparison, check_tau
from draftsmith.stages.replay.replayer import Replayer, count_in, samples_proposals
from draftsmith.stages.replay.sampled import truncation_warning
from draftsmith.stages.replay.stage import SAMPLE, MiningConfig
from draftsmith.stages.runtime.stage import WHOLE, Shard, StageContext
from draftsmith.stages.target.causal_lm import Target
from draftsmith.stages.target.info import model_path, read_target_info

SHARD = "shard.json"  # of a shard's artifact: what is in it


def run(ctx: StageContext, config: MiningConfig) -> None:
    """Mine what no shard holds yet, then write the table in the order of the answers, and its summary."""
    stored = _read_answers(ctx, config)
    trajectories = stored.trajectories
    drafter_folder = ctx.inputs["drafter"] / DRAFTER_FOLDER
    drafter = _MinedDrafter(
        drafter_digest(drafter_folder),
        block_size_of(drafter_folder),
        samples_proposals(skeleton_of(drafter_folder), stored.sampling),
        has_frequent_tokens=(drafter_folder / TOKENS_FILE).is_file(),
    )
    if config.drafting.head_tokens and not drafter.has_frequent_tokens:
        ctx.log(f"drafter: {NO_FREQUENT_TOKENS}")
    shards = mine_shard(ctx, config, stored, ctx.work)
    tokenizer = AutoTokenizer.from_pretrained(model_path(ctx.inputs["target"]), local_files_only=True)

    # Long answers have millions of steps: none is a Python object from here on, and never are all in memory.
    metrics = MiningMetrics(config.drafting.block_size or drafter.block_size)
    rows = shards.rows(trajectories.ids)
    total = int(rows.counts.sum())
    with TableWriter(ctx.out / "verify_steps.parquet", VERIFY_STEPS) as table:
        for batch in rows.batches(VERIFY_STEPS.columns.names):
            table.append(batch)
            metrics.add(batch)
            ctx.progress(table.rows, total, "steps put together")  # which takes minutes
            ctx.check_interrupted()
    summary = metrics.summary(tokenizer)
    totals = shards.totals(trajectories.ids)
    summary["evaluated_blocks_per_step"] = totals["evaluated_blocks"] / metrics.steps
    summary["trajectories"] = len(trajectories)
    summary["trajectories_too_short"] = stored.too_short
    committed = int(_committed(trajectories).sum())
    outside = totals["outside_nucleus"] / committed if drafter.samples_proposals else None
    summary["outside_nucleus_share"] = outside
    if warning := truncation_warning(outside, stored.sampling):
        ctx.log(warning)
    parity = check_parity(ctx, trajectories, config, drafter)
    summary["parity"] = parity
    (ctx.out / "summary.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    ctx.summary(
        tau=summary["tau"],
        steps=summary["steps"],
        error_positions=summary["error_positions"],
        evaluated_blocks_per_step=summary["evaluated_blocks_per_step"],
        **({} if (share := summary["certain_errors"]["share"]) is None else {"certain_error_share": share}),
        **({} if outside is None else {"outside_nucleus_share": outside}),
        **{
            f"parity_{name.removesuffix('_share')}": value
            for name, value in (parity or {}).items()
            if name in ("mismatch_share", "tau_difference") and value is not None
        },
    )


def shard(ctx: StageContext, config: MiningConfig, part: Shard) -> None:
    """Mine the answers of one shard, for `run` to read."""
    stored = _read_answers(ctx, config)
    mine_shard(ctx, config, stored, ctx.out, part)
    count = count_in(stored.trajectories, config.tokens_per_target_forward, part)
    write_text(ctx.out / SHARD, json.dumps({"shard": part.index, "of": part.of, "trajectories": count}) + "\n")
    ctx.summary(trajectories=count)


def _read_answers(ctx: StageContext, config: MiningConfig) -> StoredTrajectories:
    """Return the answers that are mined, in the artifact's order."""
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
            done += len(group.trajectories)
            ctx.progress(done, total, "trajectories")
            ctx.check_interrupted()
    return shards


@dataclass(frozen=True)
class _MinedDrafter:
    """The properties of the drafter that decide how far served steps can be compared with replay."""

    digest: str
    block_size: int  # as trained
    samples_proposals: bool  # then steps are replay's in distribution, and only their number can be compared
    has_frequent_tokens: bool  # without them `head_tokens` has no effect

    def effective(self, drafting: DraftingConfig) -> DraftingConfig:
        """Return the settings that drafting with this drafter comes to."""
        return DraftingConfig(
            block_size=drafting.block_size or self.block_size,
            head_tokens=drafting.head_tokens if self.has_frequent_tokens else None,
        )


def check_parity(
    ctx: StageContext, trajectories: TrajectoryRows, config: MiningConfig, drafter: _MinedDrafter
) -> ParityMetrics | None:
    """Compare the steps that the engine recorded and counted while it served with the replayed ones.

    Returns None unless the same drafter served with the same settings. Raises DraftsmithError if more steps differ than
    allowed: the drafter that was served is then not this one.
    """
    folder = ctx.inputs["trajectories"]
    served_with = TraceSource.read_if_there(folder)
    if served_with is None or served_with.drafter_digest != drafter.digest:
        return None
    recorded_drafting = DraftingConfig(block_size=served_with.block_size, head_tokens=served_with.head_tokens)
    served_drafting, drafting = drafter.effective(recorded_drafting), drafter.effective(config.drafting)
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
    comparison = StepComparison(tolerance)
    for indices in recorded.batch_indices():
        traced = indices[recorded.counts[indices] > 0]
        comparison.add(recorded.take(traced, COMPARED), replayed.take(traced, COMPARED))
        ctx.check_interrupted()
    metrics: ParityMetrics = {}
    if recorded.counts.any() and not drafter.samples_proposals:
        metrics |= comparison.check()
    timings = read_table(folder / "timings.parquet", TIMINGS, ["trajectory_id", "verify_steps", "retractions"])
    index = index_in(timings, "trajectory_id", ids)
    served, retractions = np.zeros((2, len(ids)), dtype=np.int64)
    for counts, name in ((served, "verify_steps"), (retractions, "retractions")):
        counts[index[index >= 0]] = timings[name].to_numpy()[index >= 0]
    complete = retractions == 0  # a retracted answer has a token that no verify step made
    if not complete.all():
        ctx.log(
            f"{(~complete).sum()} of {len(complete)} answers were retracted by a full server: their steps are not "
            "compared"
        )
    if complete.any():
        metrics |= check_tau(tolerance, _committed(trajectories)[complete], served[complete], replayed.counts[complete])
    return metrics


def _committed(trajectories: TrajectoryRows) -> np.ndarray:
    """Return [N] the tokens that verify steps committed: all but the first, which prefill commits."""
    return trajectories.lengths - trajectories.prompt_lengths - 1


def _describe(drafting: DraftingConfig) -> str:
    return ", ".join(f"{name} {value}" for name, value in drafting if value is not None)
