"""The test bed's target: a Qwen3-style causal LM of under a million parameters, trained on procedural text.

It is shipped with its prompts, its drafters and their answers (`make.py`): another machine would train other weights.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from tests.testbed import cache
from tests.testbed.procedural import text, training
from tests.testbed.procedural.training import MASK, ShapeConfig, TrainingTextConfig, train_target, training_examples

__all__ = [
    "MASK",
    "SHAPE",
    "TAUGHT",
    "fresh_prompt_ids",
    "fresh_prompts",
    "prompts_file",
    "revision_folder",
    "shipped",
    "sums",
    "target_folder",
    "trained_target",
]

SHIPPED = Path(__file__).parent / "shipped"
NAME, REVISION_NAME, PROMPTS_NAME = "target-tiny", "target-tiny-revision", "prompts.jsonl"
ARTIFACTS, SUMS = "artifacts", "SHA256SUMS"
PROMPT_SEED = 1001
SHAPE = ShapeConfig(hidden_size=128, layers=4, heads=4, kv_heads=2, intermediate_size=256)
TAUGHT = TrainingTextConfig(
    documents=4000,
    steps=400,
    rows_per_step=5,
    learning_rate=8e-3,  # 4e-3 does not learn to copy in this many steps
)
REVISED = TAUGHT.model_copy(update={"steps": 60, "revision_2": 0.5, "learning_rate": 2e-3, "seed": 1})


def shipped() -> Path:
    """Return the folder of the files that tests judge: `DRAFTSMITH_TESTBED`, or the repository's."""
    return Path(os.environ.get("DRAFTSMITH_TESTBED") or SHIPPED).resolve()


def sums() -> str:
    """Return the checksums of the shipped files, on which what is derived from them depends."""
    return (shipped() / SUMS).read_text()


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
    """Return JSON Lines of 600 prompts (`messages`, `family`) that the target was not trained on."""
    return shipped() / PROMPTS_NAME


def target_folder() -> Path:
    """Return the target as a Hugging Face folder."""
    return shipped() / NAME


def revision_folder() -> Path:
    """Return the target after a little more training: another model with similar answers."""
    return shipped() / REVISION_NAME


def trained_target(name: str, taught: TrainingTextConfig, shape: ShapeConfig, parent: Path | None = None) -> Path:
    """Return a target that is trained here, a new one or one from `parent`, as a Hugging Face folder from the cache."""

    def build(folder: Path) -> None:
        train_target(folder, taught, shape, parent=parent)

    start = "" if parent is None else hashlib.sha256((parent / "model.safetensors").read_bytes()).hexdigest()
    return cache.cached(name, build, code=(text, training), extra=f"{shape} {taught} {start}")
