"""Any content of a drafter's config.json is read, or refused with a DraftsmithError."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import Qwen3Config

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.drafters.checkpoint import (
    check_layers,
    plan_of_checkpoint,
    read_info,
    skeleton_of,
)
from tests.test_properties import changed, ours, places, replaced, with_file

SHAPE = {
    "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "vocab_size": 500, "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "rope_scaling": None, "tie_word_embeddings": False, "layer_types": ["full_attention"],
}  # fmt: skip
DFLASH = {
    **SHAPE, "architectures": ["DFlashDraftModel"], "model_type": "qwen3", "num_hidden_layers": 1, "block_size": 8,
    "num_target_layers": 6, "dflash_config": {"mask_token_id": 3, "target_layer_ids": [0, 2, 4]},
}  # fmt: skip
ROTARY = {name: value for name, value in DFLASH.items() if not name.startswith("rope_")}
ROTARY["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
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
    "rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128},
    "draft_vocab_size": 100, "block_size": 5, "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2, 3]},
}  # fmt: skip
ROTATES = {"rope_scaling": None, "rope_parameters": ROTARY["rope_parameters"]}
TARGET = Qwen3Config(**{**SHAPE, "num_hidden_layers": 6, "layer_types": None})


CONFIGS = (DFLASH, ROTARY, WINDOWS, DFLASH2, DSPARK, SPECULATORS, EAGLE3)


def read(folder: Path) -> None:
    """Read a config as checks and stages do before they read weights."""
    plan_of_checkpoint(folder, TARGET, str(folder), lambda: Words)
    check_layers(folder, 6)
    skeleton_of(folder)


class Words:
    """Replaces a tokenizer."""

    @staticmethod
    def convert_ids_to_tokens(index: int) -> str:
        return str(index)


@given(st.one_of([changed(config) for config in CONFIGS]))
def test_any_json_as_config_is_read_or_refused(config: Any) -> None:
    with_file("config.json", json.dumps(config).encode(), lambda path: read(path.parent))


WRONG = [None, True, -1, 0, 10**30, "x", [], [None], {"a": 1}]


@pytest.mark.parametrize("value", WRONG, ids=json.dumps)
@pytest.mark.parametrize(
    "config", CONFIGS, ids=("dflash", "rotary", "windows", "dflash2", "dspark", "speculators", "eagle3")
)
def test_a_wrong_value_in_any_field_is_refused(config: Any, value: Any, tmp_path: Path) -> None:
    """Change every field in turn that is not as in another config of the same reader."""
    known = DFLASH if config in (ROTARY, WINDOWS, DFLASH2, DSPARK) else {}
    for place in filter(None, places(config)):
        if place[0] in known and config[place[0]] == known[place[0]]:
            continue
        (tmp_path / "config.json").write_text(json.dumps(replaced(config, place, value)))
        with ours():
            read(tmp_path)


@pytest.mark.parametrize(
    ("config", "field", "values"),
    [
        (DFLASH, "architectures", [3, "DFlashDraftModel", [None]]),
        (DFLASH, "dflash_config", [3, "x", [1]]),
        (DFLASH, "layer_types", [3, [None]]),
        (DFLASH, "rope_scaling", [3, "x", [1]]),
        (DFLASH, "rope_theta", [[], {}, "", "1e4", -1, 0, True]),
        (ROTARY, "rope_parameters", [3, "x", [1]]),
        (ROTARY, "rope_parameters.rope_theta", [[], {}, "", "1e4", -1, 0]),
        (DFLASH, "rms_norm_eps", [0, -1, 2, float("nan")]),
        *((DFLASH, name, [-1, 0, 10**30]) for name in SHAPE if name.startswith(("num_", "head_", "inter", "max_"))),
        (DSPARK, "dspark_config", [3, "x", [1]]),
        (SPECULATORS, "transformer_layer_config", [None, 3, "x", [1]]),
        (SPECULATORS, "aux_hidden_state_layer_ids", [3, ["1"], [1.5]]),
        (SPECULATORS, "block_size", ["7", [7], {}]),
        (WINDOWS, "sliding_window", [0, -1, 10**30, "16"]),
        (EAGLE3 | ROTATES, "rope_parameters.rope_type", ["own", 3]),
        (EAGLE3, "eagle_config", [3, "x", [1]]),
        (EAGLE3, "draft_vocab_size", [-1, 1, 10**30]),
    ],
)
def test_the_error_names_the_wrong_field(config: Any, field: str, values: list[Any], tmp_path: Path) -> None:
    for value in values:
        (tmp_path / "config.json").write_text(json.dumps(replaced(config, tuple(field.split(".")), value)))
        with pytest.raises(DraftsmithError, match=rf"config\.json: .*\b{field.replace('.', '[.]')}\b"):
            read(tmp_path)


@given(
    st.one_of(
        st.binary(max_size=40),
        changed({"digest": "a", "target_digest": "b", "parents": ["c"]}).map(lambda info: json.dumps(info).encode()),
    )
)
def test_any_json_as_drafter_record_is_read_or_refused(content: bytes) -> None:
    with_file("drafter.json", content, lambda path: read_info(path.parent))


def test_the_unchanged_configs_are_valid(tmp_path: Path) -> None:
    for config in CONFIGS:
        (tmp_path / "config.json").write_text(json.dumps(config))
        plan_of_checkpoint(tmp_path, TARGET, "here", lambda: Words)
