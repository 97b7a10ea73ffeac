"""Evaluation: what each drafter is worth on held-out prompts.

Acceptance is compared on identical held-out trajectories by replay (paired over prompts). Speed is compared on the same
prompts, decoded without a drafter and with each: prompt by prompt in this process, or in turns of SGLang servers with
equal settings. Choices (the block size that each drafter decodes with) are made on the validation split only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.drafters.spec import NO_FREQUENT_TOKENS, DraftingConfig
from draftsmith.stages.engines.config import SGLangEngineConfig
from draftsmith.stages.evaluation.config import DRAFTERS, PREFIX, EvaluationConfig, prompts_to_decode
from draftsmith.stages.replay.options import ReplayOptions
from draftsmith.stages.runtime.stage import INCONCLUSIVE, WHOLE, Compute, Shard, Stage, StageContext, progress_callback
from draftsmith.stages.target.sampling import SamplingParams

if TYPE_CHECKING:
    from draftsmith.stages.evaluation.timed_runs import Measured, Setting
    from draftsmith.stages.evaluation.verdicts import Pair
    from draftsmith.stages.runtime.statistics import Estimate

CONTEXTS = "contexts.json"  # arm -> where it is worst, and where it is as usual
REPLAYED = "replayed"  # traces by replay, of an unfinished attempt or a shard
VALIDATION = "validation"
TOLD = "trained"  # the drafting whose worst contexts are told, with what was proposed there


def run(ctx: StageContext, config: EvaluationConfig) -> None:
    """Replay for tau; validation for the block sizes, then turns of all arms for speed; exactness from the outputs.

    `acceptance.json` is what the key decides; `evaluation.json` is that and what depends on time.
    """
    from draftsmith.artifacts.atomic import write_text
    from draftsmith.artifacts.store.manifest import write_versions
    from draftsmith.artifacts.tables.parquet import write_table
    from draftsmith.artifacts.tables.schemas import REQUESTS, TURNS
    from draftsmith.stages.data.held_out import independent_units
    from draftsmith.stages.data.load import prompt_sets
    from draftsmith.stages.evaluation.machine_load import machine
    from draftsmith.stages.evaluation.speed_table import (
        alternates,
        at_setting,
        log_ratios,
        speed_by_set,
        speed_by_setting,
    )
    from draftsmith.stages.evaluation.timed_runs import settings_of
    from draftsmith.stages.evaluation.validity import AGAIN, doubts
    from draftsmith.stages.evaluation.verdicts import pairs, verdicts

    measured, acceptance, tau_differences = _measure(ctx, config)
    write_text(ctx.out / "acceptance.json", json.dumps(acceptance, indent=2) + "\n")
    table = acceptance["drafters"]
    settings = settings_of(config)
    asked = list(dict.fromkeys(row["prompt_id"] for row in measured.rows))
    units = dict(zip(asked, independent_units(ctx.inputs["prompts"], asked), strict=True))
    by_setting = speed_by_setting(measured.turns, measured.rows, settings, units)
    speed = by_setting[0]["arms"]
    acceptance["compared"] += _speeds_compared(measured, settings, list(table), units)  # not in its own file
    turns, rows = (at_setting(each, settings[0]) for each in (measured.turns, measured.rows))
    of_prompt = dict(zip(asked, prompt_sets(ctx.inputs["prompts"], asked), strict=True))
    for name, arms in speed_by_set(rows, of_prompt, units, alternating=alternates(turns)).items():
        for arm, speedup in arms.items():
            acceptance["sets"].setdefault(name, {}).setdefault(arm, {}).update(speedup)
    ratios = log_ratios(turns, rows, pairs(list(table)), units)
    doubted = doubts(measured.turns, measured.rows, settings)
    for doubt in doubted:
        ctx.log(f"unreliable speeds, {doubt['concurrency']} in flight: {doubt['said']}")

    evaluation = {
        "definition_of_tau": "committed tokens per verify step, the target's own token included (+1); held-out "
        "trajectories, trained block size, ratio of sums over prompts, intervals by jackknife over prompts (paired; "
        "turns of a conversation that is held out as a whole count as one)",
        "engine": measured.engine,
        "temperature": settings[0].temperature,
        "concurrency": settings[0].concurrency,
        "head_tokens": config.head_tokens,
        "training_seeds": {arm: _training_seed(folder) for arm, folder in _drafters_of(ctx).items()},
        "verdicts": verdicts(tau_differences, ratios, speed["plain"]["prompts"]),
        "block_size_candidates": measured.candidates,
        "validation_prompts": measured.validation_prompts,
        "speed": speed,
        "speed_by_setting": by_setting,
        "doubts": doubted,
        "machine": machine(),
        "exactness": measured.exactness,
        "parity": measured.parity,
        **acceptance,
    }
    (ctx.out / "evaluation.json").write_text(json.dumps(evaluation, indent=2) + "\n")
    if measured.engine.startswith("sglang"):
        write_versions(ctx.out, sglang=measured.engine.removeprefix("sglang "))
    write_table(ctx.out / "requests.parquet", REQUESTS, measured.rows)
    write_table(ctx.out / "turns.parquet", TURNS, measured.turns)
    if any(doubt["kind"] in AGAIN for doubt in doubted):
        ctx.summary(**{INCONCLUSIVE: 1.0})
    ctx.summary(
        **{f"tau_{name}": figures["tau"] for name, figures in table.items()},
        **{
            f"tau_{name}_minus_{other}": difference["value"]
            for name, figures in table.items()
            for other, difference in figures["differences"].items()
        },
        **{f"speedup_{name}": figures["speedup"] for name, figures in speed.items() if "speedup" in figures},
        plain_tokens_per_s=speed["plain"]["tokens_per_s"],
        **{
            f"speedup_{name}.t{point['temperature']:g}.c{point['concurrency']}": figures["speedup"]
            for point in by_setting[1:]
            for name, figures in point["arms"].items()
            if "speedup" in figures
        },
    )


def _drafters_of(ctx: StageContext) -> dict[str, Path]:
    """Arm -> artifact of its drafter: those of a refresh, then any others in the order of the inputs."""
    arms = {name: ctx.inputs[name] for name in DRAFTERS if name in ctx.inputs}
    return arms | {n.removeprefix(PREFIX): folder for n, folder in ctx.inputs.items() if n.startswith(PREFIX)}


def _training_seed(folder: Path) -> int | None:
    """Of the training that made a drafter; None if its artifact does not tell."""
    from draftsmith.artifacts.store.manifest import MANIFEST, read_manifest

    return read_manifest(folder).seed if (folder / MANIFEST).is_file() else None


def _measure(ctx: StageContext, config: EvaluationConfig) -> tuple[Measured, dict[str, Any], Mapping[Pair, Estimate]]:
    """Speed; acceptance, as figures and as differences. The target of the replay is gone from memory before servers
    start."""
    from draftsmith.stages.data.load import DRAFTER_FOLDER, positions_needed
    from draftsmith.stages.drafters.checkpoint import load_drafter
    from draftsmith.stages.evaluation.speed_embedded import measure_embedded
    from draftsmith.stages.evaluation.speed_sglang import Served, measure_served
    from draftsmith.stages.runtime.memory import release_memory
    from draftsmith.stages.target.causal_lm import Target

    target = Target.load(ctx.inputs["target"])
    folders = {arm: folder / DRAFTER_FOLDER for arm, folder in _drafters_of(ctx).items()}
    if not folders:
        raise DraftsmithError(f"evaluation: needs a drafter as an input: {', '.join(DRAFTERS)} or {PREFIX}NAME")
    drafters = {name: load_drafter(folder, target) for name, folder in folders.items()}
    for name in [name for name, drafter in drafters.items() if config.head_tokens and drafter.frequent_tokens is None]:
        ctx.log(f"{name}: {NO_FREQUENT_TOKENS}")
    heldout, validation = prompts_to_decode(config, ctx.inputs["prompts"])
    if not heldout or (not validation and config.block_sizes):
        raise DraftsmithError("evaluation: needs held-out and validation prompts; raise the counts in section prompts")
    longest = positions_needed([*heldout, *validation], config.sampling.max_new_tokens, target.info.max_positions)
    acceptance, differences = _acceptance(ctx, config, target, drafters)
    if not isinstance(config.engine, SGLangEngineConfig):
        measured = measure_embedded(ctx, config, target, folders, drafters, heldout, validation)
        return measured, acceptance, differences

    trained, dtype = {name: drafter.block_size for name, drafter in drafters.items()}, target.info.dtype
    del target, drafters
    release_memory()
    served = Served(ctx, config, config.engine, folders, trained, longest, dtype)
    return measure_served(served, heldout, validation), acceptance, differences


def _acceptance(
    ctx: StageContext, config: EvaluationConfig, target: Any, drafters: dict[str, Any]
) -> tuple[dict[str, Any], Mapping[Pair, Estimate]]:
    """Every drafter replayed on the same held-out trajectories: figures, and the differences that verdicts are of."""
    from draftsmith.stages.data.held_out import independent_units
    from draftsmith.stages.data.load import load_trajectories, prompt_sets
    from draftsmith.stages.evaluation.acceptance import (
        acceptance_table,
        has_loop,
        tau_by_set,
        tau_differences,
        taus_compared,
    )
    from draftsmith.stages.evaluation.worst_contexts import Contexts
    from draftsmith.stages.replay.replayer import Replayer
    from draftsmith.stages.replay.sampled import truncation_warning

    stored = load_trajectories(ctx.inputs["trajectories"], ["heldout"])
    ctx.log(f"replaying {len(drafters)} drafters on {len(stored.trajectories)} held-out trajectories")
    looping = [has_loop(t.tokens[t.prompt_length :]) for t in stored.trajectories]
    tallies = {}
    worst = {arm: Contexts() for arm in drafters}
    for setting, drafting in _draftings(config).items():
        options = _replay_options(config, drafting, stored.sampling, with_proposals=setting == TOLD)
        tallies[setting] = Replayer(target, options, ctx.log).acceptance(
            drafters,
            stored.trajectories,
            also=worst if setting == TOLD else {},
            progress=progress_callback(ctx, "trajectories"),
            cache=ctx.work / REPLAYED / setting,
            shards=[folder / REPLAYED / setting for folder in ctx.shards],
        )
    units = independent_units(ctx.inputs["prompts"], stored.prompts)
    table = acceptance_table(tallies["trained"], units, looping)
    # of the answers, so the same for all drafters that draw
    shares = [found.outside_nucleus_share for found in tallies["trained"].values()]
    outside = next((share for share in shares if share is not None), None)
    if warning := truncation_warning(outside, stored.sampling):
        ctx.log(warning)
    sets = prompt_sets(ctx.inputs["prompts"], stored.prompts)
    decode = target.tokenizer.decode
    contexts = {arm: found.told(stored.trajectories, sets, decode) for arm, found in worst.items()}
    (ctx.out / CONTEXTS).write_text(json.dumps(contexts, indent=1) + "\n")
    for name, found in tallies.get("full_head", {}).items():
        table[name]["tau_full_head"] = found.tau
    figures = {
        "heldout_trajectories": len(stored.trajectories),
        "outside_nucleus_share": outside,
        "drafters": table,
        "loop_share": sum(looping) / len(looping),
        "tau_without_loops": {name: each["tau_without_loops"] for name, each in table.items()},
        "sets": tau_by_set(tallies["trained"], units, sets),
        "compared": taus_compared(tallies["trained"], units, sets),
        "validation_tau": _validation_tau(ctx, config, target, drafters),
    }
    return figures, tau_differences(tallies["trained"], units)


def _draftings(config: EvaluationConfig) -> dict[str, DraftingConfig]:
    """How the drafters draft in the replays of held-out answers, by a name for each."""
    settings = {"trained": config.drafted()}
    if config.head_tokens is not None:
        settings["full_head"] = DraftingConfig()
    return settings


def _replay_options(
    config: EvaluationConfig,
    drafting: DraftingConfig,
    sampling: SamplingParams,
    *,
    with_proposals: bool = False,
    shard: Shard = WHOLE,
) -> ReplayOptions:
    return ReplayOptions(
        drafting,
        sampling,
        with_proposals=with_proposals,
        tokens_per_group=config.tokens_per_target_forward,
        shard=shard,
    )


def shard(ctx: StageContext, config: EvaluationConfig, part: Shard) -> None:
    """The replays of one shard of the answers, as the acceptance of `run` reads them. Speed is measured there."""
    from draftsmith.artifacts.atomic import write_text
    from draftsmith.stages.data.load import DRAFTER_FOLDER, load_trajectories, stored_splits
    from draftsmith.stages.drafters.checkpoint import load_drafter
    from draftsmith.stages.replay.replayer import Replayer
    from draftsmith.stages.target.causal_lm import Target

    target = Target.load(ctx.inputs["target"])
    drafters = {arm: load_drafter(folder / DRAFTER_FOLDER, target) for arm, folder in _drafters_of(ctx).items()}
    replays = {name: ("heldout", drafting) for name, drafting in _draftings(config).items()}
    if VALIDATION in stored_splits(ctx.inputs["trajectories"]):
        replays[VALIDATION] = (VALIDATION, config.drafted())
    counts = {}
    for name, (split, drafting) in replays.items():
        stored = load_trajectories(ctx.inputs["trajectories"], [split])
        options = _replay_options(config, drafting, stored.sampling, with_proposals=name == TOLD, shard=part)
        groups = Replayer(target, options, ctx.log).groups(
            drafters,
            stored.trajectories,
            progress=progress_callback(ctx, "trajectories"),
            cache=ctx.out / REPLAYED / name,
        )
        counts[name] = sum(len(indices) for indices, _ in groups)
    write_text(ctx.out / "shard.json", json.dumps({"shard": part.index, "of": part.of, **counts}) + "\n")
    ctx.summary(trajectories=sum(counts.values()))


def _validation_tau(
    ctx: StageContext, config: EvaluationConfig, target: Any, drafters: dict[str, Any]
) -> dict[str, float] | None:
    """tau of each drafter on the validation split, which choices between them are made on; None without its answers."""
    from draftsmith.stages.data.load import load_trajectories, stored_splits
    from draftsmith.stages.replay.replayer import Replayer

    if VALIDATION not in stored_splits(ctx.inputs["trajectories"]):
        return None
    stored = load_trajectories(ctx.inputs["trajectories"], [VALIDATION])
    tallies = Replayer(target, _replay_options(config, config.drafted(), stored.sampling), ctx.log).acceptance(
        drafters,
        stored.trajectories,
        progress=progress_callback(ctx, "trajectories"),
        cache=ctx.work / REPLAYED / VALIDATION,
        shards=[folder / REPLAYED / VALIDATION for folder in ctx.shards],
    )
    return {name: found.tau for name, found in tallies.items()}


def _speeds_compared(
    measured: Measured, settings: Sequence[Setting], arms: Sequence[str], units: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Every drafter against plain decoding and the champion, at every setting."""
    from draftsmith.stages.evaluation.gate_rules import CHAMPION, PLAIN, compared
    from draftsmith.stages.evaluation.speed_table import at_setting, log_ratios

    others = [PLAIN, *([CHAMPION] if CHAMPION in arms else [])]
    wanted = [(arm, other) for arm in arms for other in others if arm != other]
    found = []
    for setting in settings:
        where = {"temperature": setting.temperature, "concurrency": setting.concurrency}
        turns, rows = (at_setting(each, setting) for each in (measured.turns, measured.rows))
        for (arm, other), estimate in log_ratios(turns, rows, wanted, units).items():
            found.append(compared("speed", arm, other, estimate, **where))
    return found


def preflight(config: EvaluationConfig, target: Path) -> None:
    """The answers must fit into the target's context."""
    from draftsmith.stages.data.load import check_answer_fits

    check_answer_fits(config.sampling.max_new_tokens, target)


STAGE = Stage(
    name="evaluation",
    config=EvaluationConfig,
    inputs=("target", "prompts", "trajectories", *(f"{name}?" for name in DRAFTERS), f"{PREFIX}*"),
    body=__name__,
    preflight=preflight,
    compute=Compute.TIMED,
    sharded=True,
    volatile=("metrics.jsonl", "evaluation.json", "requests.parquet", "turns.parquet", "versions.json"),
)
