"""DFlash checkpoints: the layout that engines read, optional fields, and refusal of every trap of the format."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.drafters.base import DrafterInfo
from draftsmith.stages.drafters.checkpoint import (
    check_drafter,
    check_shape,
    create_drafter,
    load_drafter,
    read_info,
    save_drafter,
)
from draftsmith.stages.drafters.dflash.checkpoint import default_layer_ids
from draftsmith.stages.drafters.dflash.config import DFlashConfig
from draftsmith.stages.drafters.dflash.model import AttentionSpan, DFlashDrafter
from draftsmith.stages.target.causal_lm import Target
from draftsmith.stages.target.info import model_path
from tests.stages.drafters.edits import Edit, cut, edit_config, edit_tensors, remove, write
from tests.testbed import random_target


@pytest.fixture
def saved(tmp_path: Path, plain_target: Target) -> Path:
    """Return a valid checkpoint."""
    drafter = random_target.random_drafter(plain_target)
    drafter.frequent_tokens = torch.arange(random_target.VOCAB_SIZE).flip(0)
    drafter.info = DrafterInfo(plain_target.info.digest, "here", ("a", "b"), {"stage": "sft", "steps": 3})
    save_drafter(drafter, tmp_path / "drafter", torch.float32)
    return tmp_path / "drafter"


def test_the_layout_is_the_one_engines_read(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    assert config["architectures"] == ["DFlashDraftModel"]
    assert config["model_type"] == "qwen3"
    assert config["block_size"] == config["dflash_config"]["block_size"] == 5
    assert config["dflash_config"]["target_layer_ids"] == [2, 0]
    assert config["dflash_config"]["mask_token_id"] == 62
    assert (config["num_hidden_layers"], config["num_target_layers"]) == (2, 4)
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    names = {"fc.weight", "hidden_norm.weight", "norm.weight"} | {
        f"layers.{i}.{part}.weight"
        for i in range(2)
        for part in (
            *(f"self_attn.{p}" for p in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")),
            *(f"mlp.{p}_proj" for p in ("gate", "up", "down")),
            "input_layernorm",
            "post_attention_layernorm",
        )
    }
    tensors = load_file(saved / "model.safetensors")
    assert tensors.keys() == names
    assert tensors["fc.weight"].shape == (32, 2 * 32)


def test_weights_that_overflow_the_serving_dtype_are_not_written(plain_drafter: DFlashDrafter, tmp_path: Path) -> None:
    torch.nn.init.constant_(plain_drafter.fc.weight, 1e5)  # float16 ends at 65504
    with pytest.raises(DraftsmithError, match=r"fc\.weight holds NaN or infinite weights"):
        save_drafter(plain_drafter, tmp_path, torch.float16)
    assert not (tmp_path / "model.safetensors").exists()


def test_default_layers_are_spread_as_in_the_paper() -> None:
    assert default_layer_ids(36, 5) == [1, 9, 17, 25, 33]  # z-lab's Qwen3-4B draft
    assert default_layer_ids(36, 1) == [18]


def _set_within(field: str, value: object, config: dict[str, Any]) -> None:
    config["dflash_config"][field] = value


TRAPS: dict[str, tuple[Edit, str]] = {
    "a weight is no number": (
        edit_tensors(lambda t: t["norm.weight"][:1].fill_(float("nan"))),
        r"norm\.weight holds NaN or infinite weights \(1 in all\)",
    ),
    "the weights are cut short": (cut("model.safetensors"), r"model\.safetensors: cannot be read"),
    "the weights are gone": (remove("model.safetensors"), r"model\.safetensors: cannot be read"),
    "the config is gone": (remove("config.json"), r"config\.json: cannot be read"),
    "the config is cut short": (cut("config.json"), r"config\.json: cannot be read"),
    "the config is no object": (write("config.json", "[]"), r"config\.json"),
    "no layer ids": (edit_config(lambda c: c["dflash_config"].pop("target_layer_ids")), "target_layer_ids is missing"),
    "no mask token": (edit_config(lambda c: c["dflash_config"].pop("mask_token_id")), "mask_token_id is missing"),
    "no block size": (
        edit_config(lambda c: (c.pop("block_size"), c["dflash_config"].pop("block_size"))),
        "block_size is missing",
    ),
    "two block sizes": (edit_config(lambda c: c.update(block_size=7)), "block_size"),
    "another width": (edit_config(lambda c: c.update(hidden_size=48)), "hidden_size is 48, the target's is 32"),
    "another vocabulary": (edit_config(lambda c: c.update(vocab_size=99)), "vocab_size is 99, the target's is 64"),
    "another depth": (edit_config(lambda c: c.update(num_target_layers=9)), "num_target_layers is 9"),
    "another rotary base": (edit_config(lambda c: c["rope_parameters"].update(rope_theta=5e5)), "rope_theta is"),
    "another rotary base in an old config": (
        edit_config(lambda c: (c.pop("rope_parameters"), c.update(rope_theta=5e5))),
        "rope_theta is",
    ),
    "no rotary base": (edit_config(lambda c: (c.pop("rope_parameters"), c.pop("rope_theta"))), "rope"),
    "another rotary type": (
        edit_config(lambda c: c["rope_parameters"].update(rope_type="linear", factor=4.0)),
        "rope",
    ),
    "a part of the head rotates": (
        edit_config(lambda c: c["rope_parameters"].update(partial_rotary_factor=0.5)),
        "rope|rotary",
    ),
    "angles that an engine computes otherwise": (
        edit_config(lambda c: c["rope_parameters"].update(rope_type="dynamic", factor=2.0)),
        "rope_parameters has rope_type dynamic, which SGLang computes otherwise",
    ),
    "a scale of angles that an engine does not read": (
        edit_config(
            lambda c: c["rope_parameters"].update(
                rope_type="yarn", factor=4.0, original_max_position_embeddings=64, attention_factor=1.0
            )
        ),
        "rope_parameters has attention_factor",
    ),
    "windows that an engine leaves out": (
        edit_config(lambda c: c.update(layer_types=["sliding_attention"] * 2, sliding_window=4)),
        "use_sliding_window is not true",
    ),
    "windows of no size": (
        edit_config(lambda c: c.update(layer_types=["sliding_attention"] * 2, use_sliding_window=True)),
        "sliding_window is None",
    ),
    "small windows read both ways": (
        edit_config(
            lambda c: c.update(
                layer_types=["sliding_attention"] * 2, sliding_window=4, use_sliding_window=True, is_causal=False
            )
        ),
        "sliding_window 4 is smaller than the block of 5",
    ),
    "layers of another kind": (
        edit_config(lambda c: c.update(layer_types=["chunked_attention", "full_attention"])),
        "layer_types has chunked_attention",
    ),
    "kinds of other layers": (edit_config(lambda c: c.update(layer_types=["full_attention"])), "layer_types"),
    "no truth value": (edit_config(lambda c: c.update(is_causal=1)), "is_causal is 1"),
    "norms of Gemma": (edit_config(lambda c: c.update(use_gemma_norm=True)), "use_gemma_norm is true"),
    "interleaved rotation": (edit_config(lambda c: c.update(rope_is_neox_style=False)), "rope_is_neox_style is false"),
    "interleaved rotation, older name": (edit_config(lambda c: c.update(is_neox_style=False)), "is_neox_style"),
    "another activation": (edit_config(lambda c: c.update(hidden_act="gelu")), 'hidden_act is "gelu"'),
    "quantised weights": (
        edit_config(lambda c: c.update(quantization_config={"quant_method": "fp8"})),
        "quantization_config",
    ),
    "settings in a place that engines prefer": (
        edit_config(lambda c: c.update(text_config={"is_causal": True})),
        "text_config",
    ),
    "an embedding of its own": (edit_config(lambda c: c.update(has_embed_tokens=True)), "has_embed_tokens is true"),
    **{
        f"{field} of dflash_config": (
            edit_config(partial(_set_within, field, value)),
            rf"dflash_config\.{field} is ",
        )
        for field, value in {
            "attention_value_scale": 0.5,
            "attention_sink_bias": True,
            "output_multiplier": 0.25,
            "final_logit_softcapping": 30.0,
            "conv_kernel_size": 3,
            "selector_rank": 8,
            "projector_type": "domino",
            "sample_from_anchor": False,
        }.items()
    },
    "a projector named at the top": (edit_config(lambda c: c.update(projector_type="domino")), "projector_type"),
    "another method's architecture": (
        edit_config(lambda c: c.update(architectures=["DFlashLagunaForCausalLM"])),
        "architectures names DFlashLagunaForCausalLM",
    ),
    "a layer that the target lacks": (
        edit_config(lambda c: c["dflash_config"].update(target_layer_ids=[0, 4])),
        r"target_layer_ids \[0, 4\]",
    ),
    "no layers at all": (edit_config(lambda c: c["dflash_config"].update(target_layer_ids=[])), "target_layer_ids"),
    "a mask token outside": (edit_config(lambda c: c["dflash_config"].update(mask_token_id=64)), "mask_token_id"),
    "another target": (
        write("drafter.json", json.dumps({"digest": "", "target_digest": "f" * 64})),
        "trained for the target ffffffffffff",
    ),
    "a damaged record": (write("drafter.json", '{"target_'), r"drafter\.json"),
    "frequent tokens cut short": (cut("frequent_tokens.npy"), r"frequent_tokens\.npy"),
}


@pytest.mark.parametrize("name", TRAPS)
def test_a_trap_is_one_clear_error(name: str, saved: Path, plain_target: Target) -> None:
    edit, message = TRAPS[name]
    edit(saved)
    with pytest.raises(DraftsmithError, match=message) as error:
        load_drafter(saved, plain_target)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["another width", "no layer ids", "another rotary base", "another depth"])
def test_the_preflight_finds_a_wrong_shape_without_weights(name: str, saved: Path, plain_artifact: Path) -> None:
    (saved / "model.safetensors").unlink()
    check_shape(saved, model_path(plain_artifact))
    edit, message = TRAPS[name]
    edit(saved)
    with pytest.raises(DraftsmithError, match=message):
        check_shape(saved, model_path(plain_artifact))


def test_fields_with_neutral_values_are_accepted(saved: Path, plain_target: Target) -> None:
    """A config may state what engines take as the default."""
    edit_config(lambda c: c.update(is_causal=False, use_gemma_norm=False, rope_is_neox_style=True))(saved)
    edit_config(lambda c: c["dflash_config"].update(attention_value_scale=1.0, projector_type=None))(saved)
    load_drafter(saved, plain_target)


@pytest.mark.parametrize("place", ["top", "inside"])
def test_the_block_size_is_read_from_either_place(place: str, saved: Path, plain_target: Target) -> None:
    edit_config(lambda c: (c if place == "inside" else c["dflash_config"]).pop("block_size"))(saved)
    assert load_drafter(saved, plain_target).block_size == 5


def test_an_old_config_with_the_same_rotary_base_is_read(saved: Path, plain_target: Target) -> None:
    edit_config(lambda c: (c.pop("rope_parameters"), c.update(rope_scaling=None)))(saved)
    load_drafter(saved, plain_target)


def test_a_checkpoint_made_elsewhere_has_an_empty_record(saved: Path, plain_target: Target) -> None:
    (saved / "drafter.json").unlink()
    (saved / "frequent_tokens.npy").unlink()
    check_drafter(saved, plain_target.info.digest)
    assert read_info(saved) == DrafterInfo()
    loaded = load_drafter(saved, plain_target)
    assert loaded.frequent_tokens is None
    assert loaded.drafting_head(plain_target.head_weight, 5).token_ids is None


def test_a_drafting_head_has_the_most_frequent_tokens(saved: Path, plain_target: Target) -> None:
    head = load_drafter(saved, plain_target).drafting_head(plain_target.head_weight, 3)
    assert head.token_ids is not None
    assert head.token_ids.tolist() == [61, 62, 63]


def test_a_new_drafter_that_does_not_fit_the_target_is_refused(plain_target: Target) -> None:
    for shape, message in (
        (DFlashConfig(target_layer_ids=(0, 4)), "target_layer_ids"),
        (DFlashConfig(target_layer_ids=(0, 1), mask_token="<none>"), "is not a token of the target"),
        (DFlashConfig(target_layer_ids=(0, 1), mask_token="two words"), "is not a token of the target"),
    ):
        with pytest.raises(DraftsmithError, match=message):
            create_drafter(shape, plain_target, 0)


def test_windows_are_written_where_engines_read_them(plain_target: Target, tmp_path: Path) -> None:
    types = ["sliding_attention", "full_attention"]
    drafter = random_target.random_drafter(plain_target, sliding_window=3, layer_types=tuple(types))
    save_drafter(drafter, tmp_path, torch.float32)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["layer_types"], config["sliding_window"], config["use_sliding_window"]) == (types, 3, True)
    loaded = load_drafter(tmp_path, plain_target)
    assert isinstance(loaded, DFlashDrafter)
    assert loaded.spans == [AttentionSpan(3, causal=True), AttentionSpan(None, causal=False)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer_types": ("full_attention",)}, "names 1 layers of 5"),
        ({"layer_types": ("sliding_attention",) * 5}, "give both, or neither"),
        ({"layer_types": ("full_attention",) * 5, "sliding_window": 8}, "give both, or neither"),
    ],
)
def test_contradictory_windows_of_a_new_drafter_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DFlashConfig(**fields)
