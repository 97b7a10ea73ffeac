"""Speculative decoding of the embedded engine against what its parts allow: tau · t(1) / (t(B) + t(draft)).

t(1) and t(B) are the target's forward over one token and over a block of each request, logits included; t(draft) is the
drafter's proposal of a block: calls by themselves, behind as many positions as the answers have in the middle. The
bound is what speculative decoding could gain if the engine did nothing else and plain decoding took t(1) a step.
`gained` is what it does gain over the engine's own plain decoding, and `of_bound` its share.

Without `--drafter` the drafter is as the quickstart's is shaped, with random weights: what it proposes is as dear as of
a trained one, and seldom kept. tau is what was measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.drafters.checkpoint import create_drafter, load_drafter
from draftsmith.stages.drafters.config import DraftingConfig
from draftsmith.stages.drafters.dflash.shape import DFlashConfig
from draftsmith.stages.engines.base import Request, SamplingParams
from draftsmith.stages.engines.embedded import EmbeddedEngine
from draftsmith.stages.stored import DRAFTER_FOLDER, load_trajectories
from draftsmith.stages.targets.causal_lm import Target
from tests.benchmarks import harness
from tests.benchmarks.decode import make_prompts

CALLS = 5  # of a part, timed together
PLAIN, DRAFTED = "plain", "speculative"


class Decoding:
    """An engine's answers to some prompts; the last run's verify steps."""

    def __init__(self, target: Target, drafter: Drafter | None, prompts: list[list[int]], block_size: int):
        self.target, self.drafter, self.prompts, self.block_size = target, drafter, prompts, block_size
        self.tau = 1.0

    def run(self, new_tokens: int) -> None:
        """All requests at once, each in a slot."""
        capacity = max(map(len, self.prompts)) + new_tokens + self.block_size
        drafting = DraftingConfig(block_size=self.block_size) if self.drafter else None
        engine = EmbeddedEngine(
            self.target, self.drafter, slots=len(self.prompts), capacity=capacity, drafting=drafting
        )
        requests = [Request(str(i), ids, SamplingParams(new_tokens)) for i, ids in enumerate(self.prompts)]
        done = list(engine.generate(requests))
        steps = sum(each.verify_steps for each in done)
        if steps:
            self.tau = sum(len(each.response_ids) - 1 for each in done) / steps


def parts(target: Target, drafter: Drafter, rows: int, seen: int, block_size: int) -> dict[str, Callable[[], None]]:
    """One call of each part of a step as the engine makes it, for so many requests behind `seen` positions."""
    drafter, head = drafter.for_decoding(), drafter.drafting_head(target.head_weight, None).for_decoding(target)
    layer_ids = tuple(drafter.target_layer_ids)
    cache, context = target.new_cache(rows, seen + block_size), drafter.new_context(rows, seen + block_size)
    ids = torch.randint(0, target.info.vocab_size, (rows, seen + block_size), device=target.device)
    positions = torch.arange(seen + block_size, device=target.device).expand(rows, -1)
    every = slice(0, rows)
    out = target.step(ids[:, :seen], positions[:, :seen], cache, every, layer_ids=layer_ids)
    assert out.features is not None
    with torch.no_grad():
        drafter.extend(context, every, out.features, ids[:, :seen], positions[:, :seen])
    prefix = drafter.select(context, every, seen)

    def forward(width: int) -> Callable[[], None]:
        new = slice(seen, seen + width)
        layers = layer_ids if width > 1 else ()

        def work() -> None:
            for _ in range(CALLS):
                target.logits(target.step(ids[:, new], positions[:, new], cache, every, layer_ids=layers).hidden)

        return work

    def draft() -> None:
        for _ in range(CALLS):
            drafter.propose(prefix, ids[:, seen : seen + 1], positions[:, seen : seen + 1], block_size, head)

    return {"t(1)": forward(1), "t(B)": forward(block_size), "t(draft)": draft}


def measure(
    target: Target, drafter: Drafter, prompts: list[list[int]], block_size: int, new_tokens: int, repetitions: int
) -> dict[str, Any]:
    """A row of figures for one batch."""
    plain = Decoding(target, None, prompts, block_size)
    drafted = Decoding(target, drafter, prompts, block_size)
    seen = sum(map(len, prompts)) // len(prompts) + new_tokens // 2
    arms: dict[str, Callable[[], None]] = {
        f"{name}/{tokens}": lambda decoding=decoding, tokens=tokens: decoding.run(tokens)  # type: ignore[misc]
        for tokens in (1, new_tokens)
        for name, decoding in ((PLAIN, plain), (DRAFTED, drafted))
    }
    seconds = harness.alternate(arms | parts(target, drafter, len(prompts), seen, block_size), repetitions)
    step = {name: harness.median(seconds[name]) / CALLS for name in ("t(1)", "t(B)", "t(draft)")}
    rest = {
        name: harness.median(
            [b - a for a, b in zip(seconds[f"{name}/1"], seconds[f"{name}/{new_tokens}"], strict=True)]
        )
        for name in (PLAIN, DRAFTED)
    }
    bound = drafted.tau * step["t(1)"] / (step["t(B)"] + step["t(draft)"])
    gained = rest[PLAIN] / rest[DRAFTED]
    tokens = len(prompts) * (new_tokens - 1)
    return {
        "batch": len(prompts),
        "block": block_size,
        "tau": drafted.tau,
        **{f"{name}_ms": 1e3 * value for name, value in step.items()},
        "plain_step_ms": 1e3 * rest[PLAIN] / (new_tokens - 1),
        "speculative_tokens_per_s": tokens / rest[DRAFTED],
        "gained": gained,
        "bound": bound,
        "of_bound": gained / bound,
    }


def parse() -> argparse.Namespace:
    options = harness.parser(__doc__)
    harness.add_target(options)
    harness.add_clock(options)
    options.add_argument("--drafter", type=Path, help="artifact of stage `sft` or `opd`")
    options.add_argument("--trajectories", type=Path, help="artifact of stage `rollout`, whose prompts are answered")
    options.add_argument("--testbed", action="store_true", help="the small target made here and its drafter")
    options.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    options.add_argument("--block-size", type=int, default=4)
    options.add_argument("--new-tokens", type=int, default=48)
    return options.parse_args()


def main() -> None:
    options = parse()
    harness.set_process(options)
    harness.set_clock(options.cpu_time)
    if options.testbed:
        from tests.testbed.drafter import drafter_artifacts
        from tests.testbed.target import prompts_file, target_folder

        made = drafter_artifacts(target_folder(), prompts_file())
        options.target, options.drafter, options.trajectories = made.target, made.drafter, made.heldout
    target = harness.load_target(options.target)
    target.info = target.info.model_copy(update={"eos_ids": []})
    if options.drafter is None:
        mask = target.tokenizer.convert_ids_to_tokens(target.info.mask_candidates[0])
        shape = DFlashConfig(num_layers=2, block_size=8, num_target_features=5, mask_token=mask)
        drafter = create_drafter(shape, target, seed=0).to(target.dtype).eval()
    else:
        drafter = load_drafter(options.drafter / DRAFTER_FOLDER, target)
    rows = []
    for batch in options.batches:
        if options.trajectories is None:
            prompts = make_prompts(batch, 64, 128, target.info.vocab_size)
        else:
            stored = load_trajectories(options.trajectories).trajectories[:batch]
            prompts = [t.tokens[: t.prompt_length] for t in stored]
        rows.append(measure(target, drafter, prompts, options.block_size, options.new_tokens, options.repetitions))
    harness.print_table(f"{target.info.source}", list(rows[0]), [list(row.values()) for row in rows])
    harness.report("speculative", {"rows": rows}, options)


if __name__ == "__main__":
    harness.run(main)
