"""Decoding speed in this process: the arms alternate group by group of prompts on one loaded target."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from draftsmith.stages.contract import StageContext
from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.drafters.checkpoint import load_drafter
from draftsmith.stages.drafters.config import DraftingConfig
from draftsmith.stages.engines.base import Completion
from draftsmith.stages.engines.embedded import EmbeddedEngine
from draftsmith.stages.measure.requests import (
    PLAIN,
    Measured,
    Row,
    Setting,
    candidate_sizes,
    compare_with_plain,
    equality,
    fastest,
    requests_for,
    row_of,
    settings_of,
)
from draftsmith.stages.stored import Prompt
from draftsmith.stages.targets.causal_lm import Target

if TYPE_CHECKING:
    from draftsmith.stages.measure.config import EvaluationConfig


def measure_embedded(
    ctx: StageContext,
    config: EvaluationConfig,
    target: Target,
    folders: Mapping[str, Path],
    drafters: Mapping[str, Drafter],
    heldout: Sequence[Prompt],
    validation: Sequence[Prompt],
) -> Measured:
    """Choose the block size on validation prompts with the first drafter, decode held-out ones with every arm, compare
    the outputs. folders: the drafters' checkpoints."""
    test = SpeedTest(ctx, target, config, ctx.seed)
    settings = settings_of(config)
    block_size, candidates = choose_block_size(test, next(iter(drafters.values())), validation, settings[0])
    ctx.log(f"decoding with blocks of at most {block_size}, chosen on {len(validation)} validation prompts")
    rows: list[Row] = []
    for setting in settings:
        rows += test.alternate(drafters, heldout[: config.speed_prompts], block_size, setting)
    compare_with_plain(rows, sampled=True)
    test.add_margins(rows, heldout)
    exactness = {"serving_dtype": target.info.dtype, **equality(rows)}
    first_of_kind: dict[str, Path] = {}
    for name, drafter in drafters.items():
        first_of_kind.setdefault(drafter.kind, folders[name])
    checkpoints = first_of_kind.values()
    exactness |= exactness_in_fp32(test, ctx.inputs["target"], checkpoints, heldout, block_size, settings[0])
    return Measured("embedded", rows, candidates, exactness)


class SpeedTest:
    """Runs prompts through one engine a measured arm; every arm sees the same prompts, settings and seeds."""

    def __init__(self, ctx: StageContext, target: Target, config: EvaluationConfig, seed: int):
        self.ctx, self.target, self.config, self.seed = ctx, target, config, seed

    def decode(
        self,
        target: Target,
        drafter: Drafter | None,
        block_size: int,
        prompts: Sequence[Prompt],
        setting: Setting,
        max_new: int | None = None,
    ) -> tuple[list[Completion], float]:
        """Answers in the order of the prompts, and the wall time in seconds."""
        block_size = drafted_block(drafter, block_size)
        capacity = max(len(p.token_ids) for p in prompts) + self.config.sampling.max_new_tokens + block_size
        drafting = DraftingConfig(block_size=block_size, head_tokens=self.config.head_tokens) if drafter else None
        engine = EmbeddedEngine(target, drafter, slots=setting.concurrency, capacity=capacity, drafting=drafting)
        requests = requests_for(prompts, self.config, setting, self.seed, max_new)
        started = time.perf_counter()
        done = {c.request.request_id: c for c in engine.generate(requests)}
        return [done[p.prompt_id] for p in prompts], time.perf_counter() - started

    def warm_up(self, drafter: Drafter | None, block_size: int, prompts: Sequence[Prompt], setting: Setting) -> None:
        """First calls allocate and pick kernels; they are not measured."""
        self.decode(self.target, drafter, block_size, prompts[: setting.concurrency], setting, max_new=4)

    def alternate(
        self, drafters: Mapping[str, Drafter], prompts: Sequence[Prompt], block_size: int, setting: Setting
    ) -> list[Row]:
        """Rows of the table `requests`: groups of `concurrency` prompts, the order of the arms rotating by group."""
        arms: list[tuple[str, Drafter | None]] = [(PLAIN, None), *drafters.items()]
        for _, drafter in arms:
            self.warm_up(drafter, block_size, prompts, setting)
        rows: list[Row] = []
        groups = [prompts[i : i + setting.concurrency] for i in range(0, len(prompts), setting.concurrency)]
        for g, group in enumerate(groups):
            decoded: dict[str, tuple[list[Completion], float]] = {}
            for name, drafter in arms[g % len(arms) :] + arms[: g % len(arms)]:
                decoded[name] = self.decode(self.target, drafter, block_size, group, setting)
                self.ctx.check_interrupted()
            for name, drafter in arms:
                answers, wall = decoded[name]
                drafted = drafted_block(drafter, block_size)
                # the group's wall time, shared equally by its prompts
                rows += [row_of("embedded", 0, name, drafted, setting, answer, wall / len(group)) for answer in answers]
            self.ctx.progress(g + 1, len(groups), "groups of prompts")
        return rows

    def add_margins(self, rows: Sequence[Row], prompts: Sequence[Prompt]) -> None:
        """The target's logit margin (best minus second) where greedy outputs part: small = a near-tie of the dtype."""
        prompt_ids = {prompt.prompt_id: prompt.token_ids for prompt in prompts}
        for row in rows:
            difference = row["first_difference"]
            if row["temperature"] == 0 and difference >= 0:  # up to there the answer is the one of plain decoding
                tokens = prompt_ids[row["prompt_id"]] + row["response_ids"][:difference]
                out = self.target.read(torch.tensor([tokens], device=self.target.device))
                best = self.target.logits(out.hidden[0, -1]).topk(2).values
                row["margin"] = float(best[0] - best[1])


def drafted_block(drafter: Drafter | None, block_size: int) -> int:
    """The block that an arm decodes with where `block_size` was chosen for all: no larger than it was trained on."""
    return block_size if drafter is None else min(block_size, drafter.block_size)


def choose_block_size(
    test: SpeedTest, drafter: Drafter, prompts: Sequence[Prompt], setting: Setting
) -> tuple[int, dict[str, float]]:
    """The fastest candidate on validation prompts, and tokens/s of each. All arms then decode with `drafted_block`."""
    candidates = candidate_sizes(test.config, drafter.block_size)
    if len(candidates) == 1:
        return candidates[0], {}
    speeds = {}
    for size in candidates:
        test.warm_up(drafter, size, prompts, setting)
        answers, seconds = test.decode(test.target, drafter, size, prompts, setting)
        speeds[size] = sum(len(a.response_ids) for a in answers) / seconds
    return fastest(speeds), {str(size): value for size, value in speeds.items()}


def exactness_in_fp32(
    test: SpeedTest,
    target_folder: Path,
    checkpoints: Iterable[Path],
    prompts: Sequence[Prompt],
    block_size: int,
    setting: Setting,
) -> dict[str, int]:
    """Plain against speculative decoding in float32, token for token. Returns how many prompts, and how many came out
    equal with every checkpoint."""
    if not test.config.exactness_prompts:
        return {"fp32_prompts": 0, "fp32_identical": 0}
    chosen = prompts[: test.config.exactness_prompts]
    target = Target.load(target_folder, dtype="float32")
    plain, _ = test.decode(target, None, 1, chosen, setting)
    equal = [True] * len(chosen)
    for folder in checkpoints:
        speculative, _ = test.decode(target, load_drafter(folder, target), block_size, chosen, setting)
        pairs = zip(equal, plain, speculative, strict=True)
        equal = [so_far and a.response_ids == b.response_ids for so_far, a, b in pairs]
    return {"fp32_prompts": len(chosen), "fp32_identical": sum(equal)}
