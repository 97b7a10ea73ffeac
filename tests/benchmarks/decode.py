"""Prefill and decode tokens/s of the embedded engine against transformers' own `generate`, on the same prompts.

Two separate model objects read the same weights: ours with grouped attention over slots, theirs as `from_pretrained`
makes it, with sdpa attention and its dynamic cache. Both decode greedily, ignore stop tokens and produce the same
number of tokens. Prefill is the time to the first tokens of a batch; decode is the rest of a longer run.

Operations are those of `target_flop` (`flows/checks/hours.py`), with logits once a prompt in prefill and for every
token in decode. Padding does not count. The share is of the measured matrix product rate of `machine`, in the model's
dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from draftsmith.flows.checks.hours import target_flop
from draftsmith.stages.engines.base import Request
from draftsmith.stages.engines.embedded import EmbeddedEngine
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.targets.estimate import ModelSize
from draftsmith.stages.targets.info import model_path
from tests.benchmarks import harness, machine

OURS, THEIRS = "embedded engine", "transformers generate"


def make_prompts(count: int, shortest: int, longest: int, vocab_size: int) -> list[list[int]]:
    """Return prompts of random tokens, lengths evenly spread: the tokens do not change the work."""
    rng = np.random.default_rng(0)
    lengths = np.linspace(shortest, longest, count).round().astype(int)
    rng.shuffle(lengths)
    return [rng.integers(0, vocab_size, int(n)).tolist() for n in lengths]


def engine_arm(target: Target, prompts: Sequence[list[int]], new_tokens: int) -> Callable[[], None]:
    """Run our engine, one slot a prompt."""
    capacity = max(len(p) for p in prompts) + new_tokens
    requests = [Request(str(i), p, new_tokens) for i, p in enumerate(prompts)]

    def work() -> None:
        engine = EmbeddedEngine(target, slots=len(prompts), capacity=capacity)
        assert all(len(done.response_ids) == new_tokens for done in engine.generate(requests))

    return work


def generate_arm(model: Any, prompts: Sequence[list[int]], new_tokens: int) -> Callable[[], None]:
    """Run transformers' generate on one batch, padded on the left."""
    width = max(len(p) for p in prompts)
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)

    def work() -> None:
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None,
            pad_token_id=0,
        )  # fmt: skip
        assert out.shape[1] == width + new_tokens

    return work


def load_models(folder: Any) -> tuple[Target, Any]:
    """Load our target, without stop tokens, and transformers' model of the same folder."""
    from transformers import AutoModelForCausalLM

    target = Target.load(folder)
    target.info = target.info.model_copy(update={"eos_ids": []})
    model = AutoModelForCausalLM.from_pretrained(
        model_path(folder), dtype=target.dtype, attn_implementation="sdpa", local_files_only=True
    ).to(target.device)
    model.generation_config.eos_token_id = None
    return target, model.eval()


def measure(target: Target, model: Any, prompts: Sequence[list[int]], new_tokens: int, repetitions: int) -> list[dict]:
    """Measure every arm; return a row for each."""
    arms = {
        f"{name}/{tokens}": make(which, prompts, tokens)
        for tokens in (1, new_tokens)
        for name, make, which in ((OURS, engine_arm, target), (THEIRS, generate_arm, model))
    }
    seconds = harness.alternate(arms, repetitions)
    size, batch = ModelSize.from_config(target.config, 0), len(prompts)
    rate = machine.peak_rate(target.dtype) * 1e9
    prompt_tokens = sum(len(p) for p in prompts)
    decoded = batch * (new_tokens - 1)
    prefill_operations = sum(target_flop(size, len(p), (len(p) + 1) / 2, logits=1) for p in prompts)
    context = prompt_tokens / batch + new_tokens / 2
    decode_operations = target_flop(size, decoded, context, logits=decoded)
    rows = []
    for name in (OURS, THEIRS):
        first = harness.median(seconds[f"{name}/1"])
        rest = harness.median(
            [b - a for a, b in zip(seconds[f"{name}/1"], seconds[f"{name}/{new_tokens}"], strict=True)]
        )
        rows.append(
            {
                "arm": name,
                "batch": batch,
                "prefill_tokens_per_s": prompt_tokens / first,
                "decode_tokens_per_s": decoded / rest,
                "decode_step_ms": 1e3 * rest / (new_tokens - 1),
                "prefill_share": prefill_operations / first / rate,
                "decode_share": decode_operations / rest / rate,
            }
        )
    return rows


def main() -> None:
    options = harness.parser(__doc__)
    harness.add_target(options)
    harness.add_clock(options)
    options.add_argument("--batches", type=int, nargs="+", default=[1, 8, 16])
    options.add_argument("--new-tokens", type=int, default=33)
    options.add_argument("--prompt-tokens", type=int, nargs=2, default=[64, 128], metavar=("SHORTEST", "LONGEST"))
    chosen = harness.parsed(options)
    target, model = load_models(chosen.target or harness.smollm2_folder())
    rows = []
    for batch in chosen.batches:
        shortest, longest = chosen.prompt_tokens
        prompts = make_prompts(batch, shortest, longest, target.info.vocab_size)
        rows += measure(target, model, prompts, chosen.new_tokens, chosen.repetitions)
    dtype = str(target.dtype).removeprefix("torch.")
    rate = machine.peak_rate(target.dtype)
    harness.print_rows(
        f"{target.info.source}, {dtype}, {chosen.new_tokens} new tokens after {chosen.prompt_tokens} prompt tokens; "
        f"shares of {rate:,.0f} GFLOP/s",
        rows,
    )
    harness.report("decode", {"rows": rows, "matmul_gflop_per_s": rate}, chosen)


if __name__ == "__main__":
    harness.run(main)
