"""Whatever a drafter's config.json holds, it is read, or refused by one of our errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from transformers import Qwen3Config

from draftsmith.stages.drafters.checkpoint import architecture_of, check_layers, read_info
from tests.test_properties import changed, with_file

SHAPE = {
    "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "vocab_size": 500, "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "rope_scaling": None, "tie_word_embeddings": False, "layer_types": ["full_attention"],
}  # fmt: skip
DFLASH = {
    **SHAPE, "architectures": ["DFlashDraftModel"], "model_type": "qwen3", "num_hidden_layers": 1, "block_size": 8,
    "num_target_layers": 6, "dflash_config": {"mask_token_id": 3, "target_layer_ids": [0, 2, 4]},
}  # fmt: skip
WINDOWS = {
    **DFLASH, "layer_types": ["sliding_attention"], "sliding_window": 16, "use_sliding_window": True, "is_causal": None,
}  # fmt: skip
DFLASH2 = {
    **DFLASH, "architectures": ["DFlash2DraftModel"], "dflash_config": {
        "mask_token_id": 3, "target_layer_ids": [0, 2, 4], "conv_kernel_size": 2, "conv_group_size": 16,
        "selector_rank": 8, "selector_top_k": 4,
    },
}  # fmt: skip
DSPARK = {
    **DFLASH, "architectures": ["Qwen3DSparkModel"], "markov_rank": 8, "markov_head_type": "vanilla",
    "enable_confidence_head": True, "confidence_head_with_markov": True, "sample_from_anchor": True,
}  # fmt: skip
SPECULATORS = {
    "architectures": ["DSparkDraftModel"], "speculators_model_type": "dspark", "block_size": 7, "mask_token_id": 3,
    "aux_hidden_state_layer_ids": [1, 3, 5], "draft_vocab_size": 500, "markov_rank": 8, "sample_from_anchor": True,
    "sliding_window_non_causal": True,
    "transformer_layer_config": {**SHAPE, "model_type": "qwen3", "num_hidden_layers": 1, "sliding_window": None},
}  # fmt: skip
EAGLE3 = {
    **SHAPE, "architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "num_hidden_layers": 1,
    "draft_vocab_size": 100, "block_size": 5, "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2, 3]},
}  # fmt: skip
TARGET = Qwen3Config(**{**SHAPE, "num_hidden_layers": 6, "layer_types": None})


CONFIGS = (DFLASH, WINDOWS, DFLASH2, DSPARK, SPECULATORS, EAGLE3)


@given(st.one_of([changed(config) for config in CONFIGS]))
def test_any_value_in_a_drafters_config(config: Any) -> None:
    def read(path: Path) -> None:
        architecture = architecture_of(path.parent)
        architecture.check_fits(architecture.read_config(path.parent), TARGET, str(path.parent))
        check_layers(path.parent, 6)

    with_file("config.json", json.dumps(config).encode(), read)


@given(
    st.one_of(
        st.binary(max_size=40),
        changed({"digest": "a", "target_digest": "b", "parents": ["c"]}).map(lambda info: json.dumps(info).encode()),
    )
)
def test_any_record_of_a_drafter(content: bytes) -> None:
    with_file("drafter.json", content, lambda path: read_info(path.parent))


def test_the_configs_that_are_changed_are_right(tmp_path: Path) -> None:
    for config in CONFIGS:
        (tmp_path / "config.json").write_text(json.dumps(config))
        architecture = architecture_of(tmp_path)
        architecture.check_fits(architecture.read_config(tmp_path), TARGET, "here")
