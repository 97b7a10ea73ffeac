"""Evaluation: what each drafter is worth on held-out prompts.

Acceptance is compared on identical held-out trajectories by replay (paired), speed by decoding the same prompts plainly
and with each drafter, in alternation on the same engine. Choices (the block size to decode with) are made on the
validation split only.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from pydantic import Field

from stages.contract import Config, Stage, StageContext
from stages.drafters.config import DraftingConfig
from stages.engines.config import SamplingConfig

DRAFTERS = ("sft", "control", "opd")


class EvaluationConfig(Config):
    """How much is measured."""

    sampling: SamplingConfig = SamplingConfig()
    concurrency: Annotated[int, Field(ge=1, description="requests in flight while speed is measured")] = 1
    speed_prompts: Annotated[int, Field(ge=1, description="held-out prompts decoded by every arm")] = 16
    validation_prompts: Annotated[int, Field(ge=1, description="validation prompts the block size is chosen on")] = 4
    block_sizes: Annotated[
        tuple[int, ...] | None, Field(description="candidates to decode with; left out: the trained one")
    ] = None
    head_tokens: Annotated[
        int | None, Field(ge=2, description="draft from this many frequent tokens only (embedded engine)")
    ] = None
    exactness_prompts: Annotated[int, Field(ge=0, description="held-out prompts compared token for token in fp32")] = 4
    chains: Annotated[int, Field(ge=1)] = 16
    tokens_per_target_forward: Annotated[int, Field(ge=1)] = 2048
    bootstrap_samples: Annotated[int, Field(ge=100)] = 5000
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95


def run(ctx: StageContext, config: EvaluationConfig) -> None:
    """Replay for tau, validation for the block size, alternating arms for speed, fp32 for exactness."""
    from artifacts.errors import DraftsmithError
    from artifacts.parquet import write_table
    from artifacts.schemas import REQUESTS
    from stages.drafters.checkpoint import load_drafter
    from stages.measure.acceptance import acceptance_table, has_loop, replay_all
    from stages.measure.speed import SpeedTest, choose_block_size, exactness_in_fp32, speed_table
    from stages.stored import DRAFTER_FOLDER, load_prompts, load_trajectories, positions_needed
    from stages.targets.causal_lm import Target

    target = Target.load(ctx.inputs["target"])
    folders = {name: ctx.inputs[name] / DRAFTER_FOLDER for name in DRAFTERS if name in ctx.inputs}
    drafters = {name: load_drafter(folder, target) for name, folder in folders.items()}
    heldout = load_prompts(ctx.inputs["prompts"], ["heldout"])
    validation = load_prompts(ctx.inputs["prompts"], ["validation"])[: config.validation_prompts]
    if not heldout or (not validation and config.block_sizes):
        raise DraftsmithError("evaluation: needs held-out and validation prompts; raise the counts in section prompts")
    positions_needed([*heldout, *validation], config.sampling.max_new_tokens, target.info.max_positions)
    stored = load_trajectories(ctx.inputs["trajectories"], ["heldout"])

    # ---- acceptance, paired on identical trajectories
    ctx.log(f"replaying {len(drafters)} drafters on {len(stored.trajectories)} held-out trajectories")
    settings = {"trained": DraftingConfig(head_tokens=config.head_tokens), "full_head": DraftingConfig()}
    if config.head_tokens is None:
        del settings["full_head"]
    traces = {
        setting: replay_all(
            ctx, target, drafters, stored.trajectories, drafting, config.chains, config.tokens_per_target_forward
        )
        for setting, drafting in settings.items()
    }
    looping = [has_loop(t.tokens[t.prompt_length :]) for t in stored.trajectories]
    table = acceptance_table(traces["trained"], looping, config.bootstrap_samples, config.confidence, ctx.seed)
    if "full_head" in traces:
        full = acceptance_table(traces["full_head"], looping, config.bootstrap_samples, config.confidence, ctx.seed)
        for name, figures in full.items():
            table[name]["tau_full_head"] = figures["tau"]

    # ---- speed
    test = SpeedTest(ctx, target, config, ctx.seed)
    block_size, candidates = choose_block_size(test, drafters["sft"], validation)
    ctx.log(f"decoding with blocks of {block_size}, chosen on {len(validation)} validation prompts")
    requests = test.alternate(drafters, heldout[: config.speed_prompts], block_size)
    speed = speed_table(requests, block_size, config.bootstrap_samples, config.confidence, ctx.seed)
    exactness = {"serving_dtype": target.info.dtype, **test.equality(requests)}
    exactness |= exactness_in_fp32(test, ctx.inputs["target"], folders["sft"], heldout, block_size)

    evaluation = {
        "definition_of_tau": "committed tokens per verify step, the target's own token included (+1); held-out "
        "trajectories, trained block size, ratio of sums over prompts, intervals by paired bootstrap over prompts",
        "heldout_trajectories": len(stored.trajectories),
        "temperature": config.sampling.temperature,
        "concurrency": config.concurrency,
        "head_tokens": config.head_tokens,
        "drafters": table,
        "block_size_candidates": candidates,
        "speed": speed,
        "exactness": exactness,
        "loop_share": sum(looping) / len(looping),
        "tau_without_loops": {name: figures["tau_without_loops"] for name, figures in table.items()},
    }
    (ctx.out / "evaluation.json").write_text(json.dumps(evaluation, indent=2) + "\n")
    write_table(ctx.out / "requests.parquet", REQUESTS, requests)
    ctx.summary(
        **{f"tau_{name}": figures["tau"] for name, figures in table.items()},
        **{f"speedup_{name}": figures["speedup"] for name, figures in speed.items() if "speedup" in figures},
        plain_tokens_per_s=speed["plain"]["tokens_per_s"],
    )


def preflight(config: EvaluationConfig, target: Path) -> None:
    """The answers must fit into the target's context."""
    from stages.rollout import RolloutConfig
    from stages.rollout import preflight as rollout_preflight

    rollout_preflight(RolloutConfig(sampling=config.sampling), target)


STAGE = Stage(
    name="evaluation",
    config=EvaluationConfig,
    inputs=("target", "prompts", "trajectories", "sft", "opd?", "control?"),
    run=run,
    preflight=preflight,
    volatile=("metrics.jsonl", "requests.parquet"),
)
