"""An EAGLE-3 checkpoint of random weights for the test bed's target, which gives real verify steps when served."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path


def write_eagle3(folder: Path, target_model: Path, draft_tokens: Sequence[int], seed: int = 0) -> None:
    """Write one layer in the layout of the EAGLE-3 checkpoints that SGLang loads, float32.

    draft_tokens: that it can propose; frequent ones are sometimes accepted even from an untrained drafter.
    """
    import torch
    from safetensors.torch import save_file

    target = json.loads((target_model / "config.json").read_text())
    H, D, inner, V = target["hidden_size"], target["head_dim"], target["intermediate_size"], target["vocab_size"]
    queries, keys = target["num_attention_heads"] * D, target["num_key_value_heads"] * D
    vocabulary = torch.tensor(sorted(draft_tokens))
    draw = torch.Generator().manual_seed(seed)
    shapes = {
        "fc": (H, 3 * H),
        "midlayer.self_attn.q_proj": (queries, 2 * H),
        "midlayer.self_attn.k_proj": (keys, 2 * H),
        "midlayer.self_attn.v_proj": (keys, 2 * H),
        "midlayer.self_attn.o_proj": (H, queries),
        "midlayer.mlp.gate_proj": (inner, H),
        "midlayer.mlp.up_proj": (inner, H),
        "midlayer.mlp.down_proj": (H, inner),
        "lm_head": (len(vocabulary), H),
    }
    norms = ("norm", "midlayer.hidden_norm", "midlayer.input_layernorm", "midlayer.post_attention_layernorm")
    tensors = {f"{name}.weight": torch.randn(shape, generator=draw) * 0.05 for name, shape in shapes.items()}
    tensors |= {f"{name}.weight": torch.ones(H) for name in norms}
    tensors["d2t"] = vocabulary - torch.arange(len(vocabulary))  # offsets
    tensors["t2d"] = torch.isin(torch.arange(V), vocabulary)
    config = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_size": H,
        "intermediate_size": inner,
        "num_attention_heads": target["num_attention_heads"],
        "num_key_value_heads": target["num_key_value_heads"],
        "head_dim": D,
        "vocab_size": V,
        "draft_vocab_size": len(vocabulary),
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": target["max_position_embeddings"],
        "torch_dtype": "float32",
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 2]},
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2))
