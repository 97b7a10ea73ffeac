"""A target with seeded random weights: untrained, so that golden numbers do not depend on any.

Weights come from one generator in the order of their names, not from transformers' initialisation, which changes.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from draftsmith.stages.data.trajectories import Trajectory
from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.drafters.dflash.model import DFlashDrafter
from draftsmith.stages.targets.causal_lm import Target
from tests.testbed.context import RecordingContext

VOCAB_SIZE, HIDDEN_SIZE, LAYERS = 64, 32, 4
MASK, END = "<|mask|>", "<|end|>"  # ids 62 and 63
WIDTH = 40  # of a drafter's MLP; the target's is 48
TEXT_TOKENS = 62


def write_model(folder: Path, seed: int = 0, *, vocabulary: int = VOCAB_SIZE, positions: int = 256) -> None:
    """Write a Hugging Face folder: Qwen3 of 4 layers, hidden 32, untied, float32. The last ids are mask and end."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=HIDDEN_SIZE,
            intermediate_size=48,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=positions,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=vocabulary - 1,
        )
    )
    fill(model, seed)
    save(model, folder, vocabulary)


def fill(model: Any, seed: int) -> None:
    """Set random weights from one generator, in the order of their names; the vectors of norms are around 1."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if parameter.dim() == 1 else 0.15 * noise)


def save(model: Any, folder: Path, vocabulary: int) -> None:
    """Save the model with a tokenizer of words t0, t1, … whose last two tokens are mask and end."""
    from tokenizers import Tokenizer, models
    from transformers import GenerationConfig, PreTrainedTokenizerFast

    words = [f"t{i}" for i in range(vocabulary - 2)] + [MASK, END]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="t0")),
        eos_token=END,
        mask_token=MASK,
        unk_token="t0",
    )
    model.generation_config = GenerationConfig(eos_token_id=vocabulary - 1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_artifact(folder: Path, seed: int = 0) -> Path:
    """Write an artifact of stage `target` in `folder/out`, with the model next to it; return the artifact's folder."""
    write_model(folder / "model", seed)
    return resolved(folder)


def resolved(folder: Path) -> Path:
    """Run stage `target` on the model in `folder/model`, float32; return the artifact, `folder/out`."""
    from draftsmith.stages.targets.stage import STAGE, TargetConfig

    context = RecordingContext.under(folder)
    STAGE.run(context, TargetConfig(source=str(folder / "model"), dtype="float32"))
    return context.out


def random_target(folder: Path) -> Target:
    """Write the artifact and load it."""
    return Target.load(write_artifact(folder), device="cpu")


def trajectories(count: int, seed: int = 0) -> list[Trajectory]:
    """Return token sequences of different lengths by a rule that a drafter can learn: mostly y' = 3y + 7 (mod 50)."""
    r = random.Random(seed)
    made = []
    for index in range(count):
        tokens = [r.randrange(50) for _ in range(4)]
        for _ in range(r.randint(6, 30)):
            tokens.append((3 * tokens[-1] + 7) % 50 if r.random() < 0.9 else r.randrange(TEXT_TOKENS))
        made.append(Trajectory(f"p{index}/0", tokens, 4))
    return made


def write_trajectories(folder: Path, made: list[Trajectory], temperature: float = 0.0) -> Path:
    """Write the artifact of a rollout with these trajectories; return the folder."""
    from draftsmith.artifacts.tables.parquet import write_table
    from draftsmith.artifacts.tables.schemas import TRAJECTORIES

    rows = [
        {
            "trajectory_id": t.trajectory_id,
            "prompt_id": t.trajectory_id.split("/")[0],
            "split": "train",
            "sample": 0,
            "prompt_ids": t.tokens[: t.prompt_length],
            "response_ids": t.tokens[t.prompt_length :],
            "finish_reason": "length",
            "temperature": temperature,
            "top_p": 1.0,
            "top_k": 0,
            "seed": 0,
            "engine": "embedded",
        }
        for t in made
    ]
    folder.mkdir(parents=True, exist_ok=True)
    write_table(folder / "trajectories.parquet", TRAJECTORIES, rows)
    return folder


def random_drafter(target: Target, seed: int = 0, **fields: Any) -> DFlashDrafter:
    """Return a drafter of 2 layers, block 5, target layers 2 and 0, with large random weights.

    fields: of the checkpoint's config, such as `windows(3)`.
    """
    from draftsmith.stages.drafters.dflash import checkpoint
    from draftsmith.stages.drafters.dflash.config import DFlashConfig

    shape = DFlashConfig(num_layers=2, block_size=5, target_layer_ids=(2, 0), mask_token=MASK)
    config = checkpoint.new_config(shape, target.model.config, lambda: target.tokenizer)
    config.update({"intermediate_size": WIDTH, **fields})
    drafter = DFlashDrafter(config, target.embedding)
    randomise(drafter, seed)
    return drafter.eval()


def windows(size: int, *types: str) -> dict[str, Any]:
    """Return the fields of a drafter of 2 layers that slide, or of these types."""
    layers = list(types or ["sliding_attention"] * 2)
    return {"use_sliding_window": True, "sliding_window": size, "layer_types": layers}


def randomise(drafter: Drafter, seed: int, large: str = "") -> None:
    """Set random weights that all matter: matrices of deviation 0.3, others about 1.

    large: part of the names of matrices of deviation 1.
    """
    import torch

    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in drafter.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            size = 1.0 if large and large in name else 0.3
            parameter.copy_(size * noise if parameter.dim() == 2 else 1 + 0.3 * noise)
