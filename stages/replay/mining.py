"""Mining: the verification trace of the drafter on stored answers, as far as somebody reads it.

Where OPD takes its anchors from the table, all answers are mined. Else a sample is enough: for the review, and for the
parity gate.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.data.logs.rehearsal import lot
from draftsmith.stages.drafters.spec import NO_FREQUENT_TOKENS, DraftingConfig
from draftsmith.stages.replay.options import ReplayOptions, TokensPerForward
from draftsmith.stages.replay.parity import COMPARED, MaxParityMismatch, ParityTolerance, StepComparison, check_tau
from draftsmith.stages.runtime.stage import WHOLE, Compute, Config, FilledIn, Shard, Stage, StageContext

if TYPE_CHECKING:
    import numpy as np

    from draftsmith.stages.data.load import StoredTrajectories
    from draftsmith.stages.data.trajectories import TrajectoryRows
    from draftsmith.stages.replay.mined_shards import MinedShards


class MiningConfig(Config):
    """How the trace is rebuilt."""

    drafting: DraftingConfig = DraftingConfig()
    tokens_per_target_forward: TokensPerForward = 8192
    max_parity_mismatch: MaxParityMismatch = 0.25
    table: Annotated[
        Literal["sample", "full", "scored"],
        Field(
            description="sample: the steps of a few hundred answers; full: of all; scored: "
            "also the target's log-probs of what follows a rejected proposal"
        ),
        FilledIn(),
    ] = "scored"


SHARD = "shard.json"  # of a shard's artifact: what is in it
SAMPLE = 256  # answers: tau within about 2 %, and as sharp a parity gate


def run(ctx: StageContext, config: MiningConfig) -> None:
    """Replay and score what no shard has, kept so that a rerun continues; then the table, in the answers' order."""
    from transformers import AutoTokenizer

    from draftsmith.artifacts.tables.parquet import TableWriter
    from draftsmith.artifacts.tables.schemas import VERIFY_STEPS
    from draftsmith.stages.data.load import DRAFTER_FOLDER
    from draftsmith.stages.drafters.checkpoint import TOKENS_FILE, block_size_of, skeleton_of
    from draftsmith.stages.drafters.digest import drafter_digest
    from draftsmith.stages.replay.mined_table import MiningMetrics
    from draftsmith.stages.replay.replayer import samples_proposals
    from draftsmith.stages.replay.sampled import truncation_warning
    from draftsmith.stages.target.info import model_path, read_target_info

    stored = _read_answers(ctx, config)
    trajectories = stored.trajectories
    drafter_folder = ctx.inputs["drafter"] / DRAFTER_FOLDER
    says_frequent = (drafter_folder / TOKENS_FILE).is_file()
    if config.drafting.head_tokens and not says_frequent:
        ctx.log(f"drafter: {NO_FREQUENT_TOKENS}")
    shards = mine_shard(ctx, config, stored, ctx.work)
    trained = block_size_of(drafter_folder)
    tokenizer = AutoTokenizer.from_pretrained(model_path(ctx.inputs["target"]), local_files_only=True)

    # long answers have millions of steps: no Python object for each from here on, and never all of them in memory
    figures = MiningMetrics(config.drafting.block_size or trained)
    rows = shards.rows(trajectories.ids)
    total = int(rows.counts.sum())
    with TableWriter(ctx.out / "verify_steps.parquet", VERIFY_STEPS) as table:
        for part in rows.batches(VERIFY_STEPS.columns.names):
            table.append(part)
            figures.add(part)
            ctx.progress(table.rows, total, "steps put together")  # which takes minutes
            ctx.check_interrupted()
    summary = figures.summary(tokenizer)
    totals = shards.totals(trajectories.ids)
    summary["evaluated_blocks_per_step"] = totals["evaluated_blocks"] / figures.steps
    summary["trajectories"] = len(trajectories)
    summary["trajectories_too_short"] = stored.too_short
    drafted_as = {"drafter_digest": drafter_digest(drafter_folder), **config.drafting.model_dump()}
    dtype = read_target_info(ctx.inputs["target"]).dtype
    drawn = samples_proposals(skeleton_of(drafter_folder), stored.sampling)
    outside = totals["outside_nucleus"] / int(_committed(trajectories).sum()) if drawn else None
    summary["outside_nucleus_share"] = outside
    if warning := truncation_warning(outside, stored.sampling):
        ctx.log(warning)
    summary["parity"] = parity(
        ctx, trajectories, trained, drafted_as, dtype, config, drawn=drawn, says_frequent=says_frequent
    )
    (ctx.out / "summary.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    ctx.summary(
        **{k: summary[k] for k in ("tau", "steps", "error_positions", "evaluated_blocks_per_step")},
        **({} if (share := summary["certain_errors"]["share"]) is None else {"certain_error_share": share}),
        **({} if outside is None else {"outside_nucleus_share": outside}),
        **{
            f"parity_{name.removesuffix('_share')}": value
            for name, value in (summary["parity"] or {}).items()
            if name in ("mismatch_share", "tau_difference")
        },
    )


def shard(ctx: StageContext, config: MiningConfig, part: Shard) -> None:
    """The steps of the answers of one shard, as `run` reads them."""
    from draftsmith.artifacts.atomic import write_text
    from draftsmith.stages.replay.replayer import count_in

    stored = _read_answers(ctx, config)
    mine_shard(ctx, config, stored, ctx.out, part)
    count = count_in(stored.trajectories, config.tokens_per_target_forward, part)
    write_text(ctx.out / SHARD, json.dumps({"shard": part.index, "of": part.of, "trajectories": count}) + "\n")
    ctx.summary(trajectories=count)


def _read_answers(ctx: StageContext, config: MiningConfig) -> StoredTrajectories:
    """Return the answers that are mined, in the artifact's order."""
    from draftsmith.stages.data.load import load_trajectories

    stored = load_trajectories(ctx.inputs["trajectories"])
    count = len(stored.trajectories)
    if config.table != "sample" or count <= SAMPLE:
        return stored
    names = stored.trajectories.ids.to_pylist()
    first = sorted(range(count), key=lambda index: lot(ctx.seed, names[index].encode()))[:SAMPLE]
    ctx.log(f"mining {SAMPLE} of {count} answers: no anchor of opd is read from the table")
    return stored.choose(sorted(first))


def mine_shard(
    ctx: StageContext, config: MiningConfig, stored: StoredTrajectories, folder: Path, part: Shard = WHOLE
) -> MinedShards:
    """Replay and score the groups of a shard that are not in `folder` yet; where all shards are given, take these."""
    from draftsmith.stages.data.load import DRAFTER_FOLDER
    from draftsmith.stages.drafters.checkpoint import load_drafter
    from draftsmith.stages.replay.mined_shards import MinedShards
    from draftsmith.stages.replay.replayer import Replayer, count_in
    from draftsmith.stages.target.causal_lm import Target

    trajectories = stored.trajectories
    with MinedShards(folder, ctx.shards) as shards:
        finished = shards.rows(trajectories.ids).counts > 0
        done, total = int(finished.sum()), count_in(trajectories, config.tokens_per_target_forward, part)
        if ctx.shards or done == total:
            if done != total:
                raise DraftsmithError(f"mining: the shards hold {done} of {total} answers: add `--force mining`")
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
            shards.add(group)
            done += len(group.trajectories)
            ctx.progress(done, total, "trajectories")
            ctx.check_interrupted()
    return shards


def parity(
    ctx: StageContext,
    trajectories: TrajectoryRows,
    trained: int,
    drafted_as: dict[str, Any],
    dtype: str,
    config: MiningConfig,
    *,
    drawn: bool,
    says_frequent: bool,
) -> dict[str, Any] | None:
    """Compare what the engine recorded while it served with replay: its steps, and how many it counted.

    trained: the drafter's block size; drafted_as: its digest and how it drafts here; dtype: of this replay. drawn: are
    proposals drawn, so that steps are replay's in distribution, and only their number can be compared? says_frequent:
    does the drafter name the frequent tokens? Where it does not, head_tokens decided nothing. None unless the same
    drafter served with the same settings. Raises DraftsmithError if they differ in more steps than allowed: the drafter
    that was served is then not this one.
    """
    import numpy as np

    from draftsmith.artifacts.tables.parquet import index_in, read_table
    from draftsmith.artifacts.tables.readers import KeyedRows, RowReader
    from draftsmith.artifacts.tables.schemas import TIMINGS, TRACE, VERIFY_STEPS

    folder = ctx.inputs["trajectories"]
    path = folder / "trace.json"
    if not path.exists():
        return None
    told = json.loads(path.read_text())
    served_as = {name: told.get(name) for name in drafted_as}
    for settings in (served_as, drafted_as):
        settings["block_size"] = settings["block_size"] or trained  # left out: as it was trained
        settings["head_tokens"] = settings["head_tokens"] if says_frequent else None
    if served_as != drafted_as:
        if served_as["drafter_digest"] == drafted_as["drafter_digest"]:
            ctx.log(
                "served steps are not compared with replay: the rollout drafted with other settings "
                f"({_drafting(served_as)}) than section mining ({_drafting(drafted_as)})"
            )
        return None
    gate = ParityTolerance(
        "mining",
        float32=told.get("dtype") == dtype == "float32",
        greedy=told.get("temperature") == 0,
        allowed=config.max_parity_mismatch,
    )
    ids = trajectories.ids
    replayed = KeyedRows(RowReader(ctx.out / "verify_steps.parquet", VERIFY_STEPS), ids)
    recorded = KeyedRows(RowReader(folder / "trace.parquet", TRACE), ids)
    comparison = StepComparison()
    for indices in recorded.batch_indices():
        traced = indices[recorded.counts[indices] > 0]
        comparison.add(recorded.take(traced, COMPARED), replayed.take(traced, COMPARED))
        ctx.check_interrupted()
    figures = comparison.check(gate) if recorded.counts.any() and not drawn else {}
    timings = read_table(folder / "timings.parquet", TIMINGS, ["trajectory_id", "verify_steps", "retractions"])
    place = index_in(timings, "trajectory_id", ids)
    served, retractions = np.zeros((2, len(ids)), dtype=np.int64)
    for counts, name in ((served, "verify_steps"), (retractions, "retractions")):
        counts[place[place >= 0]] = timings[name].to_numpy()[place >= 0]
    whole = retractions == 0  # the others' steps are not replay's: a token of theirs was made without one
    if not whole.all():
        ctx.log(
            f"{(~whole).sum()} of {len(whole)} answers were retracted by a full server: their steps are not compared"
        )
    if whole.any():
        figures |= check_tau(gate, _committed(trajectories)[whole], served[whole], replayed.counts[whole])
    return figures


def _committed(trajectories: TrajectoryRows) -> np.ndarray:
    """[N] tokens of verify steps: the prefill's is committed before any."""
    return trajectories.lengths - trajectories.prompt_lengths - 1


def _drafting(settings: dict[str, Any]) -> str:
    found = {name: settings[name] for name in DraftingConfig.model_fields}
    return ", ".join(f"{name} {value}" for name, value in found.items() if value is not None)


STAGE = Stage(
    name="mining",
    config=MiningConfig,
    inputs=("target", "drafter", "trajectories"),
    body=__name__,
    compute=Compute.HEAVY,
    sharded=True,
    join_compute=Compute.LIGHT,
)
