"""Causal LMs trained on procedural text, a new Qwen3-style one or any one further; saved as a Hugging Face folder."""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, field_validator

from draftsmith.stages.runtime.stage import Config
from draftsmith.stages.targets.config import TOKENIZER_PARTS
from tests.testbed.procedural.text import EASY, FAMILIES, Example, examples

if TYPE_CHECKING:
    import torch

END_OF_TEXT, TURN_START, TURN_END, MASK = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_VOCABULARY_DOCUMENTS = 2000


class ShapeConfig(Config):
    """Shape of a new target. The default has 4.9 million parameters."""

    hidden_size: int = 256
    layers: int = 6
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 32
    intermediate_size: int = 704
    vocab_size: int = 900
    max_positions: int = 1024
    tied: bool = False  # in the same time a tied one learns less of copying from the prompt
    full_attention_every: Annotated[
        int | None,
        Field(
            ge=1,
            description="layers as in Qwen3.5: one in this many has full attention, the others are recurrent "
            "(gated delta nets); by default as in Qwen3",
        ),
    ] = None


class TrainingTextConfig(Config):
    """What a target is taught, and for how long."""

    families: Annotated[tuple[str, ...], Field(min_length=1)] = EASY
    revision_2: Annotated[float, Field(ge=0, le=1, description="share of answers worded as in revision 2")] = 0.0
    documents: Annotated[int, Field(ge=1, description="different training examples")] = 20000
    steps: Annotated[int, Field(ge=1)] = 1500
    rows_per_step: Annotated[int, Field(ge=1, description="packed rows")] = 8
    row_tokens: Annotated[int, Field(ge=8, description="hardly more than a document: copying is learned sooner")] = 128
    learning_rate: Annotated[float, Field(gt=0)] = 4e-3
    seed: Annotated[int, Field(ge=0, description="of weights and order")] = 0
    text_seed: Annotated[int, Field(ge=0, description="of the examples")] = 1

    @field_validator("families")
    @classmethod
    def _families_are_known(cls, families: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := sorted(set(families) - FAMILIES.keys()):
            raise ValueError(f"no family {', '.join(unknown)}, use some of {', '.join(FAMILIES)}")
        return families


def training_examples(config: TrainingTextConfig) -> list[Example]:
    """What the target is taught."""
    seed, count = config.text_seed, config.documents
    return list(examples(seed, count, families=config.families, revision_2=config.revision_2))


def build_tokenizer(vocab_size: int, corpus: Sequence[str]) -> Any:
    """Byte-level BPE with the chat's special tokens; ids do not depend on anything but corpus and size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
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


def _document(example: Example) -> tuple[str, str]:
    """The text of the prompt up to where the answer begins, and the answer with its stop token."""
    return (
        f"{TURN_START}user\n{example.prompt}{TURN_END}\n{TURN_START}assistant\n",
        f"{example.answer}{TURN_END}\n",
    )


def _packed_rows(
    taught: Sequence[Example], tokenizer: Any, config: TrainingTextConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels, each [steps * rows, row_tokens]: every row begins with a document, its last one is cut.

    A label is the next id where that belongs to an answer, -100 elsewhere: prompts are drawn at random, and learning
    their slots' frequencies only adds noise to so short a training.
    """
    import torch

    documents: list[list[tuple[int, int]]] = []
    for example in taught:
        prompt, answer = (tokenizer.encode(text, add_special_tokens=False) for text in _document(example))
        documents.append([(token, -100) for token in prompt] + [(token, token) for token in answer])
    order = random.Random(config.seed)
    rows: list[list[tuple[int, int]]] = []
    while len(rows) < config.steps * config.rows_per_step:
        order.shuffle(documents)
        row: list[tuple[int, int]] = []
        for document in documents:
            row += document
            if len(row) > config.row_tokens:
                rows.append(row[: config.row_tokens + 1])
                row = []
    pairs = torch.tensor(rows[: config.steps * config.rows_per_step])  # [rows, row_tokens + 1, 2]
    return pairs[:, :-1, 0].contiguous(), pairs[:, 1:, 1].contiguous()


def new_model(shape: ShapeConfig, tokenizer: Any, seed: int) -> Any:
    """Random weights."""
    import torch
    from transformers import GenerationConfig

    torch.manual_seed(seed)
    common = {
        "vocab_size": len(tokenizer),
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.max_positions,
        "tie_word_embeddings": shape.tied,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "attn_implementation": "sdpa",
    }
    if shape.full_attention_every is None:
        from transformers import Qwen3Config, Qwen3ForCausalLM

        model: Any = Qwen3ForCausalLM(Qwen3Config(**common))
    else:
        from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

        kinds = [_kind(layer, shape.full_attention_every) for layer in range(shape.layers)]
        recurrent = {
            "layer_types": kinds,
            "linear_key_head_dim": shape.head_dim,
            "linear_value_head_dim": shape.head_dim,
            "linear_num_key_heads": shape.kv_heads,
            "linear_num_value_heads": shape.heads,
        }
        model = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**common, **recurrent))
    model.generation_config = GenerationConfig(
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id], pad_token_id=tokenizer.pad_token_id
    )
    return model


def _kind(layer: int, full_attention_every: int) -> str:
    return "linear_attention" if (layer + 1) % full_attention_every else "full_attention"


def train_target(folder: Path, config: TrainingTextConfig, shape: ShapeConfig, *, parent: Path | None = None) -> None:
    """Train a target in float32 and save it in `folder`: a new one, or on from `parent`, whose shape and tokenizer it
    keeps."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from draftsmith.stages.targets.loading import load_weights

    taught = training_examples(config)
    if parent is None:
        corpus = ["".join(_document(example)) for example in taught[:_VOCABULARY_DOCUMENTS]]
        tokenizer = build_tokenizer(shape.vocab_size, corpus)
        model = new_model(shape, tokenizer, config.seed)
    else:
        tokenizer = AutoTokenizer.from_pretrained(parent, local_files_only=True)
        model = load_weights(AutoModelForCausalLM, parent, dtype="float32")
    _train(model, *_packed_rows(taught, tokenizer, config), config)
    model.save_pretrained(folder)
    if parent is None:
        tokenizer.save_pretrained(folder)
    else:  # byte for byte: loading and saving may write the same tokenizer in another form
        for path in parent.iterdir():
            if path.name in TOKENIZER_PARTS:
                shutil.copyfile(path, folder / path.name)


def _train(model: Any, ids: torch.Tensor, labels: torch.Tensor, config: TrainingTextConfig) -> None:
    import torch

    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    other = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": other, "weight_decay": 0.0}],
        lr=config.learning_rate,
        betas=(0.9, 0.95),
        fused=True,
    )
    warmup = max(1, config.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / config.steps)) + 0.01),
    )
    model.train()
    for step in range(config.steps):
        rows = slice(step * config.rows_per_step, (step + 1) * config.rows_per_step)
        logits = model(input_ids=ids[rows], use_cache=False).logits  # [rows, row_tokens, vocabulary]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[rows].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()
