"""The test bed's target: a Qwen3-style causal LM of under a million parameters, trained on procedural text."""

from __future__ import annotations

import json
from pathlib import Path

from tests.testbed import cache
from tests.testbed.procedural import text, training
from tests.testbed.procedural.training import MASK, ShapeConfig, TrainingTextConfig, train_target, training_examples

__all__ = ["MASK", "SHAPE", "TAUGHT", "fresh_prompt_ids", "fresh_prompts", "prompts_file", "target_folder"]

PROMPT_SEED = 1001
SHAPE = ShapeConfig(hidden_size=128, layers=4, heads=4, kv_heads=2, intermediate_size=256)
TAUGHT = TrainingTextConfig(
    documents=4000,
    steps=400,
    rows_per_step=5,
    learning_rate=8e-3,  # 4e-3 does not learn to copy in this many steps
)


def fresh_prompts(count: int) -> list[text.Example]:
    """Return examples whose prompts the target was not trained on."""
    seen = frozenset(example.prompt for example in training_examples(TAUGHT))
    return list(text.examples(PROMPT_SEED, count, exclude=seen))


def fresh_prompt_ids(model: Path, count: int) -> list[list[int]]:
    """Return the token ids of such prompts in the chat template of a model of the test bed."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    messages = [[{"role": "user", "content": example.prompt}] for example in fresh_prompts(count)]
    ids: list[list[int]] = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return ids


def prompts_file() -> Path:
    """Return JSON Lines of 600 prompts (`messages`, `family`) that the target was not trained on, cached."""

    def build(folder: Path) -> None:
        rows = (
            json.dumps({"messages": [{"role": "user", "content": example.prompt}], "family": example.family}) + "\n"
            for example in fresh_prompts(600)
        )
        path = folder / "prompts.jsonl"
        path.write_text("".join(rows), encoding="utf-8")

    return cache.cached("prompts-tiny", build, code=(text,), extra=f"{TAUGHT}") / "prompts.jsonl"


def target_folder(
    name: str = "target-tiny",
    taught: TrainingTextConfig = TAUGHT,
    shape: ShapeConfig = SHAPE,
    parent: Path | None = None,
) -> Path:
    """Return the trained target, another one, or one trained from `parent`, as a Hugging Face folder.

    It comes from the cache.
    """

    def build(folder: Path) -> None:
        train_target(folder, taught, shape, parent=parent)

    start = f" {parent.name}" if parent is not None else ""
    return cache.cached(name, build, code=(text, training), extra=f"{shape} {taught}{start}")
