"""The test bed's target: a Qwen3-style causal LM of under a million parameters, trained on `text.py` in seconds.

Run as a program to build a bigger one for a benchmark: `python -m tests.testbed.target --recipe medium FOLDER`.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.testbed import cache, text

if TYPE_CHECKING:
    import torch

END_OF_TEXT, TURN_START, TURN_END, MASK = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRAIN_SEED, PROMPT_SEED = 1, 1001


@dataclass(frozen=True)
class TargetRecipe:
    """Shape and training of a target. The default is the test fixture."""

    name: str = "tiny"
    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    intermediate_size: int = 256
    vocab_size: int = 900
    max_positions: int = 1024
    tied: bool = False  # in the same time a tied one learns less of copying from the prompt
    documents: int = 4000  # different training examples
    steps: int = 400
    batch: int = 5  # packed rows a step
    row_tokens: int = 128  # hardly more than one document: copying is learned sooner
    learning_rate: float = 8e-3  # 4e-3 does not learn to copy in this many steps
    seed: int = 0


TINY = TargetRecipe()
MEDIUM = TargetRecipe(
    name="medium",
    hidden_size=256,
    layers=6,
    heads=8,
    kv_heads=4,
    intermediate_size=704,
    documents=20000,
    steps=1500,
    batch=8,
    learning_rate=4e-3,
)
RECIPES = {recipe.name: recipe for recipe in (TINY, MEDIUM)}


def training_examples(recipe: TargetRecipe) -> list[text.Example]:
    """What the target is taught."""
    return list(text.examples(TRAIN_SEED, recipe.documents))


def fresh_prompts(recipe: TargetRecipe, count: int, seed: int = PROMPT_SEED) -> list[text.Example]:
    """Examples whose prompts the target was not trained on."""
    seen = frozenset(example.prompt for example in training_examples(recipe))
    return list(text.examples(seed, count, exclude=seen))


def write_prompts(path: Path, recipe: TargetRecipe = TINY, count: int = 600, seed: int = PROMPT_SEED) -> None:
    """JSON Lines, `{"messages": [...], "family": ...}`, of prompts that the target was not trained on."""
    rows = (
        json.dumps({"messages": [{"role": "user", "content": example.prompt}], "family": example.family}) + "\n"
        for example in fresh_prompts(recipe, count, seed)
    )
    path.write_text("".join(rows), encoding="utf-8")


def build_tokenizer(recipe: TargetRecipe, corpus: list[str]) -> Any:
    """Byte-level BPE with the chat's special tokens; ids do not depend on anything but corpus and size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END, MASK],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
        max_token_length=8,  # or these few hundred words become one token each and answers come out too short
    )
    bpe.train_from_iterator(corpus, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=TURN_END, pad_token=END_OF_TEXT, mask_token=MASK, padding_side="left"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _document(example: text.Example) -> tuple[str, str]:
    """The text of the prompt up to where the answer begins, and the answer with its stop token."""
    return (
        f"{TURN_START}user\n{example.prompt}{TURN_END}\n{TURN_START}assistant\n",
        f"{example.answer}{TURN_END}\n",
    )


def _packed_rows(
    examples: list[text.Example], tokenizer: Any, recipe: TargetRecipe
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels, each [steps * batch, row_tokens]: every row begins with a document, its last one is cut.

    A label is the next id where that belongs to an answer, -100 elsewhere: prompts are drawn at random, and learning
    their slots' frequencies only adds noise to so short a training.
    """
    import torch

    documents: list[list[tuple[int, int]]] = []
    for example in examples:
        prompt, answer = (tokenizer.encode(part) for part in _document(example))
        documents.append([(token, -100) for token in prompt] + [(token, token) for token in answer])
    order = random.Random(recipe.seed)
    rows: list[list[tuple[int, int]]] = []
    while len(rows) < recipe.steps * recipe.batch:
        order.shuffle(documents)
        row: list[tuple[int, int]] = []
        for document in documents:
            row += document
            if len(row) > recipe.row_tokens:
                rows.append(row[: recipe.row_tokens + 1])
                row = []
    pairs = torch.tensor(rows[: recipe.steps * recipe.batch])  # [rows, row_tokens + 1, 2]
    return pairs[:, :-1, 0].contiguous(), pairs[:, 1:, 1].contiguous()


def build_target(folder: Path, recipe: TargetRecipe = TINY) -> dict[str, float]:
    """Train the target and save it as an ordinary Hugging Face folder. Returns what it cost and its last loss."""
    import torch
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    started = time.process_time()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        torch.manual_seed(recipe.seed)
        taught = training_examples(recipe)
        tokenizer = build_tokenizer(recipe, ["".join(_document(example)) for example in taught[:2000]])
        ids, labels = _packed_rows(taught, tokenizer, recipe)
        config = Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=recipe.hidden_size,
            intermediate_size=recipe.intermediate_size,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.kv_heads,
            head_dim=recipe.head_dim,
            max_position_embeddings=recipe.max_positions,
            tie_word_embeddings=recipe.tied,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            attn_implementation="sdpa",
        )
        model = Qwen3ForCausalLM(config)
        loss = _train(model, ids, labels, recipe)
        model.generation_config = GenerationConfig(
            eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id], pad_token_id=tokenizer.pad_token_id
        )
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    finally:
        torch.set_num_threads(threads)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"cpu_s": time.process_time() - started, "loss_nats": loss, "parameters": parameters}


def _train(model: Any, ids: torch.Tensor, labels: torch.Tensor, recipe: TargetRecipe) -> float:
    import torch

    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    other = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": other, "weight_decay": 0.0}],
        lr=recipe.learning_rate,
        betas=(0.9, 0.95),
        fused=True,
    )
    warmup = max(1, recipe.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / recipe.steps)) + 0.01),
    )
    model.train()
    last = math.nan
    for step in range(recipe.steps):
        rows = slice(step * recipe.batch, (step + 1) * recipe.batch)
        logits = model(input_ids=ids[rows], use_cache=False).logits  # [batch, row_tokens, vocabulary]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[rows].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        last = loss.item()
    model.eval()
    return last


def target_folder(recipe: TargetRecipe = TINY) -> Path:
    """The trained target, from the cache or built now."""
    from tests.testbed import target

    def build(folder: Path) -> None:
        build_target(folder, recipe)

    return cache.cached(f"target-{recipe.name}", build, code=(text, target), extra=repr(recipe))


def main() -> None:
    """Build a target of a named recipe into a folder, with its prompts beside it, and print what it cost."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--recipe", choices=sorted(RECIPES), default=TINY.name)
    arguments = parser.parse_args()
    recipe = RECIPES[arguments.recipe]
    print(json.dumps(build_target(arguments.folder, recipe)))
    write_prompts(arguments.folder / "prompts.jsonl", recipe)


if __name__ == "__main__":
    main()
