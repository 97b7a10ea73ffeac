"""Random-weight targets of many families, made from transformers' own configs: tiny, float32, windows of 6 tokens."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.testbed.random_target import HIDDEN_SIZE, VOCAB_SIZE, fill, save

WINDOW = 6  # positions that a sliding layer reads
WORDS = VOCAB_SIZE - 4  # of the tokenizer; some families' tokenizers add one
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": WORDS - 1,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}


def _without(name: str) -> dict[str, Any]:
    return {field: value for field, value in SHAPE.items() if field != name}


_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
_DELTA = {  # gated delta rule
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
# multi-head latent attention: values narrower than keys, of which 4 of 12 numbers rotate
_MLA = _without("head_dim") | {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
}
_ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_shared_experts": 1}
_GROUPED = _ROUTED | {"n_group": 2, "topk_group": 1, "routed_scaling_factor": 1.5}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "mscale": 0.7,
    "mscale_all_dim": 1.0,
}
_INDEXER = {"index_topk": WINDOW, "index_n_heads": 8, "index_head_dim": 8}
_VISION = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "patch_size": 4}


_QWEN3_5_ROPE = {
    "rope_type": "default",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "mrope_section": [1, 1, 0],
}
_BY_LAYER = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
}
_MAMBA = {"d_state": 8, "n_groups": 1, "chunk_size": 8}
_TIED = SHAPE | {"tie_word_embeddings": True}


def _mamba(**fields: int) -> dict[str, int]:
    return {f"mamba_{name}": value for name, value in (_MAMBA | fields).items()}


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3-MoE": ("Qwen3Moe", {**SHAPE, **_EXPERTS, "decoder_sparse_step": 1, "norm_topk_prob": True}),
    "gpt-oss": ("GptOss", {
        **SHAPE, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW, "layer_types": ALTERNATING,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 150000.0, "factor": 4.0, "original_max_position_embeddings": 64,
        },
    }),
    "Gemma 2": ("Gemma2", {
        **_TIED, "sliding_window": WINDOW, "layer_types": ALTERNATING, "query_pre_attn_scalar": 8,
        "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0,
    }),
    "Gemma 3 with images": ("Gemma3", {
        "text_config": {
            **_TIED, "sliding_window": WINDOW, "layer_types": ALTERNATING, "query_pre_attn_scalar": 8,
            "rope_parameters": _BY_LAYER, "final_logit_softcapping": None,
        },
        "vision_config": {**_VISION, "num_hidden_layers": 1, "image_size": 8, "vision_use_head": False},
        "mm_tokens_per_image": 4,
    }),
    "Mistral": ("Mistral", {**SHAPE, "sliding_window": WINDOW}),
    "Command R7B": ("Cohere2", {
        **SHAPE, "sliding_window": WINDOW, "layer_types": ALTERNATING, "logit_scale": 0.25,
    }),
    "Granite": ("Granite", {**SHAPE, "logits_scaling": 4.0, "embedding_multiplier": 2.0}),
    "Qwen3-Next": ("Qwen3Next", {**SHAPE, **_EXPERTS, **_DELTA, "shared_expert_intermediate_size": 24}),
    "Qwen3.5 with images": ("Qwen3_5", {
        "text_config": {**SHAPE, **_DELTA, "rope_parameters": _QWEN3_5_ROPE},
        "vision_config": {
            "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": HIDDEN_SIZE,
            "patch_size": 4,
        },
    }),
    "LFM2": ("Lfm2", {
        **SHAPE, "layer_types": ["conv", "full_attention", "conv"], "conv_L_cache": 3,
        "block_auto_adjust_ff_dim": False,
    }),
    "Granite 4 hybrid": ("GraniteMoeHybrid", {
        **_without("head_dim"), **_mamba(n_heads=4, d_head=16), "layer_types": ["mamba", "attention", "mamba"],
        "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 24, "logits_scaling": 4.0,
    }),
    "Nemotron-H": ("NemotronH", {  # Mamba-2, attention, experts and an MLP, each in a separate layer
        **_without("num_hidden_layers"), "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1,
        "expand": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "chunk_size": 8,
        "moe_shared_expert_intermediate_size": 24,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
    }),
    "Falcon-H1": ("FalconH1", {  # attention and Mamba-2 in parallel in every layer
        **SHAPE, **_mamba(n_heads=4, d_head=16, d_ssm=64), "lm_head_multiplier": 0.25,
    }),
    "ZAYA1": ("Zaya", {  # full and sliding attention after a convolution in every layer
        **_without("intermediate_size"), "num_experts": 4, "moe_intermediate_size": 24, "router_hidden_size": 16,
        "sliding_window": WINDOW, "layer_types": ["hybrid", "hybrid_sliding", "hybrid"],
    }),
    "Kimi Linear": ("KimiLinear", {  # low-rank attention and delta-rule states
        **_without("head_dim"), "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "kv_lora_rank": 16,
        "num_key_value_heads": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
        "linear_num_heads": 4, "linear_head_dim": 8, "layer_types": _DELTA["layer_types"],
    }),
    "DeepSeek-V2": ("DeepseekV2", {
        **_MLA, **_GROUPED, "q_lora_rank": None, "topk_method": "group_limited_greedy", "first_k_dense_replace": 1,
    }),
    "DeepSeek-V3": ("DeepseekV3", {**_MLA, **_GROUPED, "first_k_dense_replace": 1, "rope_parameters": _YARN}),
    "DeepSeek-V3.2": ("DeepseekV32", {**_MLA, **_GROUPED, **_INDEXER, "first_k_dense_replace": 1}),
    "Kimi K2.5 with images": ("Kimi_K25", {
        "text_config": {
            "model_type": "kimi_k2", **_MLA, **_ROUTED, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
        },
        "vision_config": {**_VISION, "num_hidden_layers": 1, "pos_emb_height": 4, "pos_emb_width": 4},
        "projection_hidden_size": 16,
        "tie_word_embeddings": False,
    }),
    "GLM-4.7-Flash": ("Glm4MoeLite", {**_MLA, **_ROUTED, "mlp_layer_types": ["dense", "sparse", "sparse"]}),
    "GLM-5": ("GlmMoeDsa", {  # one layer chooses the entries for the next one too
        **_MLA, **_ROUTED, **_INDEXER, "first_k_dense_replace": 1, "indexer_types": ["full", "shared", "full"],
    }),
    "Mistral 4": ("Mistral4", {  # queries are scaled by their position
        **_MLA, **_ROUTED, "rope_parameters": _YARN | {"llama_4_scaling_beta": 0.1},
    }),
    "MiniCPM3": ("MiniCPM3", {**_MLA, "scale_emb": 1, "dim_model_base": 8}),
    "Llama 4": ("Llama4Text", {
        **SHAPE, "layer_types": ["chunked_attention", "full_attention", "chunked_attention"],
        "attention_chunk_size": WINDOW, "intermediate_size_mlp": 48, "num_local_experts": 4, "moe_layers": [1],
        "no_rope_layers": [1, 0, 1],
    }),
    "Gemma 4": ("Gemma4Text", {
        **_TIED, "sliding_window": WINDOW, "use_bidirectional_attention": "vision",
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"], "attention_k_eq_v": True,
        "global_head_dim": 16, "num_global_key_value_heads": 1, "hidden_size_per_layer_input": 0,
        "final_logit_softcapping": 3.0,
    }),
    "Gemma 4 E2B": ("Gemma4Text", {  # the last layers reuse earlier keys and values; every layer has its own embedding
        **_TIED, "num_hidden_layers": 4, "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2, "global_head_dim": 16,
        "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB_SIZE, "final_logit_softcapping": 3.0,
    }),
}  # fmt: skip
"""Family -> the name of its classes in transformers, and the fields of its config."""
RECURRENT = (
    "Qwen3-Next",
    "Qwen3.5 with images",
    "LFM2",
    "Granite 4 hybrid",
    "Nemotron-H",
    "Falcon-H1",
    "ZAYA1",
    "Kimi Linear",
)
NEWEST = (*RECURRENT, "DeepSeek-V3.2", "GLM-5")  # families that load with transformers 5.24, and not with 5.17


def family_config(family: str) -> Any:
    """Return a new config of transformers."""
    import transformers

    name, fields = FAMILIES[family]
    return getattr(transformers, f"{name}Config")(**copy.deepcopy(fields))


def write_family(folder: Path, family: str, seed: int = 0) -> None:
    """Write a model folder with weights from one seeded generator, as the family's own class saves them.

    Skips the test if the family needs a newer transformers.
    """
    import transformers

    if family in NEWEST:
        pytest.importorskip("transformers", minversion="5.24")
    name = FAMILIES[family][0].removesuffix("Text")
    kind = "ForConditionalGeneration" if "with images" in family else "ForCausalLM"
    model = getattr(transformers, name + kind)(family_config(family))
    fill(model, seed)
    with torch.no_grad():
        for label, parameter in model.named_parameters():
            if label.endswith("A_log"):  # decay of a state: what was read 10 positions ago should still count
                parameter.copy_(torch.log(torch.linspace(0.05, 0.4, parameter.numel())).view_as(parameter))
            if label.endswith(("residual_bias", "states_bias")):  # of a stream, whose states would else be alike
                parameter.sub_(1)
            if "embed_tokens" in label and "Gemma" in name:  # which multiply it
                parameter.mul_(HIDDEN_SIZE**-0.5)
        for label, buffer in model.named_buffers():
            if label.endswith("e_score_correction_bias"):  # added to the experts' scores
                buffer.copy_(torch.linspace(-0.3, 0.3, buffer.numel()))
    save(model, folder, WORDS)
