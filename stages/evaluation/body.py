"""Body of stage `evaluation`: acceptance by replay, then the speed of all arms.

Acceptance is compared on the same held-out answers, paired over prompts. Speed is compared on the same prompts, decoded
without a drafter and with each: prompt by prompt in this process, or in timed runs of servers with equal settings.
Choices (the block size that each drafter decodes with) are made on the validation split only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from draftsmith.artifacts.atomic import write_text
from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.results.base import SetMetrics
from draftsmith.artifacts.results.evaluation import (
    ALL,
    CHAMPION,
    NATIVE,
    PLAIN,
    Acceptance,
    ArmComparison,
    Contexts,
    EvaluationResult,
    Look,
    SpeedMetrics,
    SpeedTable,
)
from draftsmith.artifacts.store.manifest import MANIFEST, read_manifest, write_versions
from draftsmith.artifacts.tables.parquet import write_table
from draftsmith.artifacts.tables.schemas import REQUESTS, TIMED_RUNS
from draftsmith.stages.data.held_out import independent_units
from draftsmith.stages.data.stored_prompts import positions_needed, prompt_labels
from draftsmith.stages.data.trajectories import DRAFTER_FOLDER, Trajectory, load_trajectories, stored_splits
from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.drafters.checkpoint import load_drafter, load_native_head
from draftsmith.stages.drafters.spec import NO_FREQUENT_TOKENS
from draftsmith.stages.engines.config import ServerEngineConfig
from draftsmith.stages.evaluation.acceptance import (
    ContextCollector,
    acceptance_table,
    as_served,
    calibration,
    has_loop,
    served_tallies,
    slices,
    tau_by_slice,
    tau_comparisons,
    tau_differences,
)
from draftsmith.stages.evaluation.config import DRAFTERS, PREFIX, EvaluationConfig, prompts_to_decode
from draftsmith.stages.evaluation.load_curve import from_timed_runs, measure_times, predict, step_table
from draftsmith.stages.evaluation.looks import Looks, needs_another, open_look
from draftsmith.stages.evaluation.speed_embedded import EmbeddedSpeedTest, measure_embedded
from draftsmith.stages.evaluation.speed_servers import ServerSpeedTest, measure_servers, shares_of
from draftsmith.stages.evaluation.speed_table import (
    Units,
    alternates,
    at_setting,
    log_ratios,
    speed_by_slice,
    speed_tables,
)
from draftsmith.stages.evaluation.speed_warnings import AGAIN, speed_warnings
from draftsmith.stages.evaluation.timed_runs import Setting, SpeedMeasurement, machine, one_thread, settings_of
from draftsmith.stages.evaluation.verdicts import Pair, comparison, pairs, verdicts
from draftsmith.stages.replay.options import ReplayOptions
from draftsmith.stages.replay.replayer import Replayer
from draftsmith.stages.replay.sampled import truncation_warning
from draftsmith.stages.replay.steps import AcceptanceStats
from draftsmith.stages.runtime.memory import release_memory
from draftsmith.stages.runtime.stage import INCONCLUSIVE, WHOLE, Shard, StageContext, progress_callback
from draftsmith.stages.runtime.statistics import Estimate, Unit
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.targets.sampling import SamplingParams

REPLAYED = "replayed"  # traces by replay, of an unfinished attempt or a shard
VALIDATION = "validation"
HELDOUT = "heldout"
_AS_SERVED = (
    "; of the verify steps that servers counted on the held-out prompts, because their target differs from "
    "replay's (`tau_replayed`)"
)
_DEFINITION_OF_TAU = (
    "committed tokens per verify step, with the target's own token (+1); held-out trajectories, trained block "
    "size, ratio of sums over prompts, intervals by jackknife over prompts (paired; the turns of a conversation that "
    "is held out as a whole count as one)"
)


def run(ctx: StageContext, config: EvaluationConfig) -> None:
    """Replay for tau, choose block sizes on the validation split, time all arms, compare outputs.

    `acceptance.json` depends only on the cache key; `evaluation.json` adds the results that depend on time.
    """
    looks = open_look(config, prompts_to_decode(config, ctx.inputs["prompts"])[0], ctx.earlier)
    if looks.of > 1:
        ctx.log(f"look {looks.number} of at most {looks.of} at the speeds: {len(looks.prompts)} prompts")
    speed, acceptance, tau_estimates, load = _measure(ctx, config, looks)
    acceptance.write(ctx.out, EvaluationResult.ACCEPTANCE_FILE)
    settings, arms = settings_of(config), list(acceptance.drafters)
    definition, difference = _DEFINITION_OF_TAU, speed.target_difference
    if difference is not None:
        ctx.log(f"tau is that of served answers: {difference.text}")
        tallies = served_tallies(speed.heldout, arms)
        asked = [row["prompt_id"] for row in speed.heldout if row["arm"] == arms[0]]
        independent = independent_units(ctx.inputs["prompts"], asked)
        acceptance = as_served(acceptance, tallies, independent, prompt_labels(ctx.inputs["prompts"], asked))
        tau_estimates, definition = tau_differences(tallies, independent), definition + _AS_SERVED
    decoded = list(dict.fromkeys(row["prompt_id"] for row in speed.requests))
    units = dict(zip(decoded, independent_units(ctx.inputs["prompts"], decoded), strict=True))
    labels = dict(zip(decoded, prompt_labels(ctx.inputs["prompts"], decoded), strict=True))
    tables = speed_tables(speed.runs, speed.requests, settings, units)
    first = tables[0].arms
    runs, requests = at_setting(speed.runs, settings[0]), at_setting(speed.requests, settings[0])
    by_slice = speed_by_slice(requests, labels, units, alternating=alternates(runs))
    ratios = log_ratios(runs, requests, pairs(arms), units)
    compared = speed_comparisons(speed, settings, arms, units)
    warnings = speed_warnings(speed.runs, speed.requests, settings)
    for warning in warnings:
        ctx.log(f"unreliable speeds, {warning.concurrency} in flight: {warning.text}")

    result = acceptance.model_copy(
        update={
            "definition_of_tau": definition,
            "engine": speed.engine,
            "temperature": settings[0].temperature,
            "concurrency": settings[0].concurrency,
            "head_tokens": config.head_tokens,
            "training_seeds": {arm: _training_seed(folder) for arm, folder in _drafters(ctx).items()},
            "verdicts": verdicts(tau_estimates, ratios, first[PLAIN].prompts),
            "block_size_candidates": speed.candidates,
            "validation_prompts": speed.validation_prompts,
            "speed": first,
            "speed_by_setting": tables,
            "speed_warnings": warnings,
            "look": Look(
                number=looks.number,
                of=looks.of,
                prompts=len(looks.prompts),
                seconds=sum(run["wall_seconds"] for run in speed.runs) / looks.number,
            ),
            "machine": machine(),
            "exactness": speed.exactness,
            "parity": speed.parity,
            "sets": _with_speed(acceptance.sets, by_slice),
            "comparisons": [*acceptance.comparisons, *compared],
            **({} if difference is None else {"target_difference": difference}),
            **(load or {"load": from_timed_runs(compared, tables)}),
        }
    )
    result.write(ctx.out)
    kind, _, version = speed.engine.partition(" ")
    if version:
        write_versions(ctx.out, **{kind: version})
    write_table(ctx.out / "requests.parquet", REQUESTS, speed.requests)
    write_table(ctx.out / "turns.parquet", TIMED_RUNS, speed.runs)
    undecided = config.min_speedup is not None and needs_another(result, config.min_speedup)
    if undecided or any(warning.kind in AGAIN for warning in warnings):
        ctx.summary(**{INCONCLUSIVE: 1.0})
    ctx.summary(**_summary(acceptance, tables))


def _summary(acceptance: EvaluationResult, tables: Sequence[SpeedTable]) -> dict[str, float]:
    """Return the final metrics of the stage."""
    taus = {f"tau_{arm}": metrics.tau for arm, metrics in acceptance.drafters.items()}
    for arm, metrics in acceptance.drafters.items():
        taus |= {f"tau_{arm}_minus_{other}": difference.value for other, difference in metrics.differences.items()}
    speeds = _speedups(tables[0].arms) | {"plain_tokens_per_s": tables[0].arms[PLAIN].tokens_per_s}
    for table in tables[1:]:
        where = f"t{table.temperature:g}.c{table.concurrency}"
        speeds |= {f"{name}.{where}": value for name, value in _speedups(table.arms).items()}
    return taus | speeds


def _speedups(arms: Mapping[str, SpeedMetrics]) -> dict[str, float]:
    return {f"speedup_{arm}": metrics.speedup for arm, metrics in arms.items() if metrics.speedup is not None}


def _with_speed(
    sets: Mapping[str, Mapping[str, SetMetrics]], speedups: Mapping[str, Mapping[str, SetMetrics]]
) -> dict[str, dict[str, SetMetrics]]:
    """Return the metrics of each slice and arm, with the speed-up if it is known."""
    merged = {name: dict(arms) for name, arms in sets.items()}
    for name, arms in speedups.items():
        measured = merged.setdefault(name, {})
        for arm, speedup in arms.items():
            measured[arm] = measured.get(arm, SetMetrics()).model_copy(update=speedup.to_json())
    return merged


def speed_comparisons(
    speed: SpeedMeasurement, settings: Sequence[Setting], arms: Sequence[str], units: Units
) -> list[ArmComparison]:
    """Compare every drafter with decoding without one and with the champion, at every setting."""
    others = [PLAIN, *([CHAMPION] if CHAMPION in arms else [])]
    compared = [(arm, other) for arm in arms for other in others if arm != other]
    comparisons = []
    for setting in settings:
        runs, requests = at_setting(speed.runs, setting), at_setting(speed.requests, setting)
        comparisons += [
            comparison("speed", pair, estimate, temperature=setting.temperature, concurrency=setting.concurrency)
            for pair, estimate in log_ratios(runs, requests, compared, units).items()
        ]
    return comparisons


def _drafters(ctx: StageContext) -> dict[str, Path]:
    """Return arm -> artifact of its drafter: first a refresh's arms, then any others in the order of the inputs."""
    arms = {name: ctx.inputs[name] for name in DRAFTERS if name in ctx.inputs}
    return arms | {n.removeprefix(PREFIX): folder for n, folder in ctx.inputs.items() if n.startswith(PREFIX)}


def _loaded(ctx: StageContext, target: Target, config: EvaluationConfig) -> dict[str, Drafter]:
    """Load the drafter of each arm, and last the target's own head, unless an arm has the same weights."""
    drafters = {arm: load_drafter(folder / DRAFTER_FOLDER, target) for arm, folder in _drafters(ctx).items()}
    if not drafters:
        raise DraftsmithError(
            f"evaluation: no drafter among the inputs. Add one of {', '.join(DRAFTERS)}, {PREFIX}NAME."
        )
    engine = config.engine.kind if isinstance(config.engine, ServerEngineConfig) else "sglang"
    try:
        head = load_native_head(target, ctx.work / NATIVE, engine)
    except DraftsmithError as error:
        ctx.log(f"the target's own head is not measured: {error}")
        return drafters
    if head is None or any(_have_same_weights(head, drafter) for drafter in drafters.values()):
        return drafters
    return {**drafters, NATIVE: head}


def _have_same_weights(one: Drafter, other: Drafter) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=False)
    return one.kind == other.kind and all(torch.equal(*pair) for pair in pairs)


def _training_seed(folder: Path) -> int | None:
    """Return the seed that a drafter was trained with; None if its artifact has no manifest."""
    return read_manifest(folder).seed if (folder / MANIFEST).is_file() else None


def _measure(
    ctx: StageContext, config: EvaluationConfig, looks: Looks
) -> tuple[SpeedMeasurement, EvaluationResult, dict[Pair, Estimate], dict[str, object]]:
    """Measure speed and acceptance; also return the estimated differences of tau, and the predictions by load.

    Nothing is predicted for servers.
    """
    target = Target.load(ctx.inputs["target"])
    drafters = _loaded(ctx, target, config)
    folders = {arm: drafter.folder for arm, drafter in drafters.items() if drafter.folder is not None}
    for arm, drafter in drafters.items():
        if config.head_tokens and drafter.frequent_tokens is None:
            ctx.log(f"{arm}: {NO_FREQUENT_TOKENS}")
    heldout, validation = prompts_to_decode(config, ctx.inputs["prompts"])
    if not heldout or (not validation and config.block_sizes):
        raise DraftsmithError("evaluation: no held-out or no validation prompts. Raise the counts in section prompts.")
    longest = positions_needed([*heldout, *validation], config.sampling.max_new_tokens, target.info.max_positions)
    acceptance, replayed = _Replays(ctx, config, target, drafters).acceptance()
    tau_estimates = tau_differences(replayed.tallies, replayed.units)
    if not isinstance(config.engine, ServerEngineConfig):
        test = EmbeddedSpeedTest(ctx, target, config, ctx.seed)
        speed = measure_embedded(test, folders, drafters, heldout, validation, looks)
        return speed, acceptance, tau_estimates, _load(test, drafters, replayed, speed)

    trained, dtype = {arm: drafter.block_size for arm, drafter in drafters.items()}, target.info.dtype
    del target, drafters  # servers need the memory
    release_memory()
    assert config.engine.launch is not None
    shares = shares_of(config.engine.launch)
    served = ServerSpeedTest(ctx, config, config.engine, folders, trained, longest, dtype, shares)
    return measure_servers(served, heldout, validation, looks), acceptance, tau_estimates, {}


@dataclass(frozen=True)
class _Replayed:
    """The results of replaying held-out answers with each drafter."""

    tallies: Mapping[str, AcceptanceStats]
    units: Sequence[Unit]  # one per answer
    answers: Sequence[Trajectory]


def _load(
    test: EmbeddedSpeedTest, drafters: Mapping[str, Drafter], replayed: _Replayed, speed: SpeedMeasurement
) -> dict[str, object]:
    """Return the fields of the result that predict speed by the number of requests in flight."""
    first = settings_of(test.config)[0]
    test.ctx.log("timing steps by the number of requests in flight")
    with one_thread(test.target):
        seconds = sum(run["wall_seconds"] for run in speed.runs)
        runs = at_setting(speed.runs, first)
        steps, average = measure_times(test, drafters, replayed.answers, first, runs, seconds)
    points = predict(steps, replayed.tallies, replayed.units, average)
    return {"step_times": step_table(steps), "load": points}


@dataclass(frozen=True)
class _Replays:
    """The replays of an evaluation."""

    ctx: StageContext
    config: EvaluationConfig
    target: Target
    drafters: Mapping[str, Drafter]

    def replayer(self, split: str, sampling: SamplingParams, shard: Shard) -> Replayer:
        """Return the replayer of a split's answers. sampling: theirs."""
        options = ReplayOptions(
            self.config.drafted(),
            sampling,
            with_proposals=split == HELDOUT,
            with_confidence=True,
            tokens_per_group=self.config.tokens_per_target_forward,
            shard=shard,
        )
        return Replayer(self.target, options, self.ctx.log)

    def acceptance(self) -> tuple[EvaluationResult, _Replayed]:
        """Replay every drafter on the same held-out answers."""
        ctx, prompts = self.ctx, self.ctx.inputs["prompts"]
        stored = load_trajectories(ctx.inputs["trajectories"], [HELDOUT])
        ctx.log(f"replaying {len(self.drafters)} drafters on {len(stored.trajectories)} held-out answers")
        looping = [has_loop(t.tokens[t.prompt_length :]) for t in stored.trajectories]
        units, labels = independent_units(prompts, stored.prompts), prompt_labels(prompts, stored.prompts)
        collectors = {arm: ContextCollector(labels) for arm in self.drafters}
        trained = self.replayer(HELDOUT, stored.sampling, WHOLE).acceptance(
            self.drafters,
            stored.trajectories,
            also=collectors,
            progress=progress_callback(ctx, "trajectories"),
            cache=ctx.work / REPLAYED / HELDOUT,
            shards=[folder / REPLAYED / HELDOUT for folder in ctx.shards],
        )
        # a share of the answers' tokens: the same for all drafters that sample
        shares = [tally.outside_nucleus_share for tally in trained.values()]
        outside = next((share for share in shares if share is not None), None)
        if warning := truncation_warning(outside, stored.sampling):
            ctx.log(warning)
        decode = self.target.tokenizer.decode
        Contexts({arm: collector.contexts(stored.trajectories, decode) for arm, collector in collectors.items()}).write(
            ctx.out
        )
        drafters: dict[str, Acceptance] = acceptance_table(trained, units, looping)
        validation, chosen_on = self.validation()
        for arm, tally in validation.items():
            if (correction := calibration(tally.decisions, trained[arm].decisions)) is not None:
                drafters[arm] = drafters[arm].model_copy(update={"confidence": correction})
        result = EvaluationResult(
            heldout_trajectories=len(stored.trajectories),
            outside_nucleus_share=outside,
            drafters=drafters,
            loop_share=sum(looping) / len(looping),
            tau_without_loops={arm: metrics.tau_without_loops for arm, metrics in drafters.items()},
            sets={name: arms for name, arms in tau_by_slice(trained, units, labels).items() if name != ALL},
            acceptance_by_offset={part.name: part.by_offset for part in slices(trained, units, labels) if part.name},
            comparisons=tau_comparisons(trained, units, labels),
            validation_tau={arm: tally.tau for arm, tally in validation.items()} or None,
            chosen_on=chosen_on,
        )
        return result, _Replayed(trained, units, stored.trajectories)

    def validation(self) -> tuple[dict[str, AcceptanceStats], int | None]:
        """Replay every drafter on the validation split, on which choices are made. Also returns its number of prompts.

        Empty and None without its answers.
        """
        ctx = self.ctx
        if VALIDATION not in stored_splits(ctx.inputs["trajectories"]):
            return {}, None
        stored = load_trajectories(ctx.inputs["trajectories"], [VALIDATION])
        tallies = self.replayer(VALIDATION, stored.sampling, WHOLE).acceptance(
            self.drafters,
            stored.trajectories,
            progress=progress_callback(ctx, "trajectories"),
            cache=ctx.work / REPLAYED / VALIDATION,
            shards=[folder / REPLAYED / VALIDATION for folder in ctx.shards],
        )
        return tallies, len(set(stored.prompts))


def shard(ctx: StageContext, config: EvaluationConfig, part: Shard) -> None:
    """Replay one shard of the answers for the acceptance of `run`, which measures speed."""
    target = Target.load(ctx.inputs["target"])
    replays, counts = _Replays(ctx, config, target, _loaded(ctx, target, config)), {}
    splits = [HELDOUT, *([VALIDATION] if VALIDATION in stored_splits(ctx.inputs["trajectories"]) else [])]
    for split in splits:
        stored = load_trajectories(ctx.inputs["trajectories"], [split])
        groups = replays.replayer(split, stored.sampling, part).groups(
            replays.drafters,
            stored.trajectories,
            progress=progress_callback(ctx, "trajectories"),
            cache=ctx.out / REPLAYED / split,
        )
        counts[split] = sum(len(indices) for indices, _ in groups)
    write_text(ctx.out / "shard.json", json.dumps({"shard": part.index, "of": part.of, **counts}) + "\n")
    ctx.summary(trajectories=sum(counts.values()))
