"""Evaluation: what each drafter is worth on held-out prompts.

Acceptance is compared on identical held-out trajectories by replay (paired), speed by decoding the same prompts plainly
and with each drafter: in alternation in this process, or on SGLang servers with equal settings that take turns. Choices
(the block size to decode with) are made on the validation split only.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draftsmith.stages.contract import Stage, StageContext, follow
from draftsmith.stages.drafters.config import DraftingConfig
from draftsmith.stages.engines.config import (
    SGLangEngineConfig,
)
from draftsmith.stages.measure.config import DRAFTERS, PREFIX, EvaluationConfig, prompts_to_decode

if TYPE_CHECKING:
    from draftsmith.stages.measure.requests import Measured


def run(ctx: StageContext, config: EvaluationConfig) -> None:
    """Replay for tau; then validation for the block size and all arms for speed; exactness from the outputs."""
    from draftsmith.artifacts.parquet import write_table
    from draftsmith.artifacts.schemas import REQUESTS
    from draftsmith.stages.measure.requests import settings_of
    from draftsmith.stages.measure.speed import speed_by_setting

    measured, acceptance = _measure(ctx, config)
    table = acceptance["drafters"]
    settings = settings_of(config)
    by_setting = speed_by_setting(measured.rows, settings, config.bootstrap_samples, ctx.seed)
    speed = by_setting[0]["arms"]

    evaluation = {
        "definition_of_tau": "committed tokens per verify step, the target's own token included (+1); held-out "
        "trajectories, trained block size, ratio of sums over prompts, intervals by paired bootstrap over prompts",
        "engine": measured.engine,
        "temperature": settings[0].temperature,
        "concurrency": settings[0].concurrency,
        "head_tokens": config.head_tokens,
        "block_size_candidates": measured.candidates,
        "speed": speed,
        "speed_by_setting": by_setting,
        "exactness": measured.exactness,
        "parity": measured.parity,
        **acceptance,
    }
    (ctx.out / "evaluation.json").write_text(json.dumps(evaluation, indent=2) + "\n")
    write_table(ctx.out / "requests.parquet", REQUESTS, measured.rows)
    ctx.summary(
        **{f"tau_{name}": figures["tau"] for name, figures in table.items()},
        **{name: value for name, value in table.get("opd", {}).items() if name.startswith("diff_")},
        **{f"speedup_{name}": figures["speedup"] for name, figures in speed.items() if "speedup" in figures},
        plain_tokens_per_s=speed["plain"]["tokens_per_s"],
        **{
            f"speedup_{name}.t{point['temperature']:g}.c{point['concurrency']}": figures["speedup"]
            for point in by_setting[1:]
            for name, figures in point["arms"].items()
            if "speedup" in figures
        },
    )


def _measure(ctx: StageContext, config: EvaluationConfig) -> tuple[Measured, dict[str, Any]]:
    """Speed and acceptance. The target of the replay is gone from memory before servers start."""
    from draftsmith.artifacts.errors import DraftsmithError
    from draftsmith.stages.drafters.checkpoint import load_drafter
    from draftsmith.stages.measure.embedded import measure_embedded
    from draftsmith.stages.measure.served import Served, measure_served, release_memory
    from draftsmith.stages.stored import DRAFTER_FOLDER, positions_needed
    from draftsmith.stages.targets.causal_lm import Target

    target = Target.load(ctx.inputs["target"])
    named = [(name.removeprefix(PREFIX), name) for name in (*DRAFTERS, *ctx.inputs) if name in ctx.inputs]
    folders = {arm: ctx.inputs[name] / DRAFTER_FOLDER for arm, name in named if name in DRAFTERS or arm != name}
    if not folders:
        raise DraftsmithError(f"evaluation: needs a drafter as an input: {', '.join(DRAFTERS)} or {PREFIX}NAME")
    drafters = {name: load_drafter(folder, target) for name, folder in folders.items()}
    heldout, validation = prompts_to_decode(config, ctx.inputs["prompts"])
    if not heldout or (not validation and config.block_sizes):
        raise DraftsmithError("evaluation: needs held-out and validation prompts; raise the counts in section prompts")
    longest = positions_needed([*heldout, *validation], config.sampling.max_new_tokens, target.info.max_positions)
    acceptance = _acceptance(ctx, config, target, drafters)
    if not isinstance(config.engine, SGLangEngineConfig):
        return measure_embedded(ctx, config, target, folders, drafters, heldout, validation), acceptance

    trained, dtype = {name: drafter.block_size for name, drafter in drafters.items()}, target.info.dtype
    del target, drafters
    release_memory()
    served = Served(ctx, config, config.engine, folders, trained, longest, dtype)
    return measure_served(served, heldout, validation), acceptance


def _acceptance(ctx: StageContext, config: EvaluationConfig, target: Any, drafters: dict[str, Any]) -> dict[str, Any]:
    """Every drafter replayed on the same held-out trajectories."""
    from draftsmith.stages.measure.acceptance import acceptance_table, has_loop
    from draftsmith.stages.replay.corpus import replay_all
    from draftsmith.stages.stored import load_trajectories

    stored = load_trajectories(ctx.inputs["trajectories"], ["heldout"])
    ctx.log(f"replaying {len(drafters)} drafters on {len(stored.trajectories)} held-out trajectories")
    settings = {"trained": DraftingConfig(head_tokens=config.head_tokens)}
    if config.head_tokens is not None:
        settings["full_head"] = DraftingConfig()
    looping = [has_loop(t.tokens[t.prompt_length :]) for t in stored.trajectories]
    tables = {}
    for setting, drafting in settings.items():
        traces = replay_all(
            target,
            drafters,
            stored.trajectories,
            drafting,
            chains=config.chains,
            tokens_per_group=config.tokens_per_target_forward,
            progress=follow(ctx, "trajectories"),
        )
        tables[setting] = acceptance_table(traces, looping, config.bootstrap_samples, ctx.seed)
    table = tables["trained"]
    if "full_head" in tables:
        for name, figures in tables["full_head"].items():
            table[name]["tau_full_head"] = figures["tau"]
    return {
        "heldout_trajectories": len(stored.trajectories),
        "drafters": table,
        "loop_share": sum(looping) / len(looping),
        "tau_without_loops": {name: figures["tau_without_loops"] for name, figures in table.items()},
    }


def preflight(config: EvaluationConfig, target: Path) -> None:
    """The answers must fit into the target's context."""
    from draftsmith.stages.stored import check_answer_fits

    check_answer_fits(config.sampling.max_new_tokens, target)


STAGE = Stage(
    name="evaluation",
    config=EvaluationConfig,
    inputs=("target", "prompts", "trajectories", "sft?", "opd?", "control?", f"{PREFIX}*"),
    run=run,
    preflight=preflight,
    volatile=("metrics.jsonl", "requests.parquet"),
)
