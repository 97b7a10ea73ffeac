"""Targets of random weights that have a native head, one of every family: two layers, hidden 32.

A target's checkpoint is written with transformers, which knows no head; the head's tensors are then added under the
names that the family's published checkpoints have.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.testbed.random_target import VOCAB_SIZE, fill, resolved, save

if TYPE_CHECKING:
    import torch

    from draftsmith.stages.drafters.mtp.model import MtpDrafter
    from draftsmith.stages.targets.causal_lm import Target

HIDDEN, LAYERS = 32, 2
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE + 8,  # transformers adds a token to a Qwen2's tokenizer
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": VOCAB_SIZE - 1,
    "pad_token_id": None,
}
_EXPERTS = {
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1,
    "head_dim": 8,
}


def _mimo(**sizes: int) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**{**_SIZES, **sizes}, num_nextn_predict_layers=1))


def _glm() -> Any:
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    return Glm4MoeForCausalLM(Glm4MoeConfig(**_SIZES, **_EXPERTS, rope_parameters=rope, use_qk_norm=True))


def _deepseek() -> Any:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    latent = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
    sizes = _SIZES | {"num_key_value_heads": 4} | {k: v for k, v in _EXPERTS.items() if k != "head_dim"}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**sizes, **latent))


_LINEAR = {
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}


def _qwen_next() -> Any:
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    experts = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "decoder_sparse_step": 1,
    }
    return Qwen3NextForCausalLM(Qwen3NextConfig(**_SIZES, **_LINEAR, **experts))


def _qwen() -> Any:
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    return Qwen3_5ForCausalLM(Qwen3_5TextConfig(**_SIZES, **_LINEAR, mtp_num_hidden_layers=1))


# family -> a model of it, and the architecture in its config.json
MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "mimo": (_mimo, "MiMoForCausalLM"),
    "glm4_moe": (_glm, "Glm4MoeForCausalLM"),
    "deepseek_v3": (_deepseek, "DeepseekV3ForCausalLM"),
    "qwen3_next": (_qwen_next, "Qwen3NextForCausalLM"),
    "qwen3_5_text": (_qwen, "Qwen3_5ForCausalLM"),
}


def write_model(folder: Path, family: str, seed: int = 0, **sizes: int) -> None:
    """Write a model of a family with its head in `folder`, float32. sizes: fields of a MiMo's config."""
    make, architecture = MODELS[family]
    model = make(**sizes)
    fill(model, seed)
    save(model, folder, VOCAB_SIZE)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": [architecture]}))
    add_tensors(folder, head_tensors(folder, seed + 1))


def head_tensors(folder: Path, seed: int) -> dict[str, torch.Tensor]:
    """Return random tensors of the head of the model in `folder`, by their published names."""
    import torch

    from draftsmith.stages.drafters.checkpoint import read_target_config
    from draftsmith.stages.drafters.mtp.checkpoint import file_tensors, new_config
    from draftsmith.stages.drafters.mtp.config import MtpConfig
    from draftsmith.stages.drafters.mtp.model import MtpDrafter

    config = new_config(MtpConfig(kind="mtp"), read_target_config(folder), lambda: None)
    made = file_tensors(MtpDrafter(config, torch.empty(0)))
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, value in sorted(made.items()):
        noise = torch.randn(value.shape, generator=generator)
        about = 1 if value.dim() == 1 and not name.startswith("mtp.") else 0  # Qwen's norms multiply by 1 + weight
        tensors[name] = about + 0.3 * noise
    return tensors


def add_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Add tensors to a model's only file."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    together = {**{name: tensor.clone() for name, tensor in load_file(path).items()}, **tensors}
    path.unlink()  # mapped into memory: replaced, not overwritten
    save_file({name: tensor.contiguous() for name, tensor in together.items()}, path, metadata={"format": "pt"})


def target_with_head(folder: Path, family: str, seed: int = 0, **sizes: int) -> Target:
    """Write the artifact of stage `target` in `folder/out`, next to a model of the family, and load it."""
    from draftsmith.stages.targets.causal_lm import Target

    write_model(folder / "model", family, seed, **sizes)
    return Target.load(resolved(folder), device="cpu")


def native_head(target: Target, block_size: int = 4, engine: str = "sglang") -> MtpDrafter:
    """Return the target's own head, as stage `sft` reads it."""
    from draftsmith.stages.drafters.checkpoint import create_drafter
    from draftsmith.stages.drafters.mtp.config import MtpConfig
    from draftsmith.stages.drafters.mtp.model import MtpDrafter

    shape = MtpConfig.model_validate({"kind": "mtp", "block_size": block_size, "engine": engine})
    drafter = create_drafter(shape, target, 0)
    assert isinstance(drafter, MtpDrafter)
    return drafter.eval()
