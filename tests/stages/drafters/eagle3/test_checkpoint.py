"""EAGLE-3 checkpoints: reading, target layers, and new drafters."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Glm4MoeConfig
from transformers.models.llama.configuration_llama import LlamaConfig

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.drafters.checkpoint import (
    check_complete,
    create_drafter,
    load_drafter,
    plan_of_checkpoint,
    plan_of_new,
    save_drafter,
)
from draftsmith.stages.drafters.dflash.checkpoint import check_fits
from draftsmith.stages.drafters.dflash.config import DFlashConfig
from draftsmith.stages.drafters.eagle3.checkpoint import DEFAULT_BLOCK_SIZE, default_layer_ids
from draftsmith.stages.drafters.eagle3.config import Eagle3Config
from draftsmith.stages.drafters.eagle3.model import Eagle3Drafter
from draftsmith.stages.targets.causal_lm import Target
from tests.stages.drafters.edits import edit_tensors, save, setting, within, without
from tests.testbed import random_target
from tests.testbed.eagle3 import RANDOM_VOCABULARY, random_eagle3

H, V = random_target.HIDDEN_SIZE, random_target.VOCAB_SIZE
EAGLE = "eagle_aux_hidden_state_layer_ids"


def proposals(drafter: Eagle3Drafter, target: Target) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    features, tokens = torch.randn(1, 9, 3 * H, generator=generator), torch.randint(0, V, (1, 9), generator=generator)
    with torch.no_grad():
        context = drafter.encode(features, tokens, torch.arange(9)[None])
    head = drafter.drafting_head(target.head_weight, None)
    anchors = torch.tensor([[3, 8]])
    return drafter.propose(context, tokens.gather(1, anchors), anchors, drafter.block_size, head)


def load(folder: Path, target: Target) -> Eagle3Drafter:
    loaded = load_drafter(folder, target)
    assert isinstance(loaded, Eagle3Drafter)
    return loaded


@pytest.fixture
def saved(tmp_path: Path, plain_target: Target) -> Path:
    return save(random_eagle3(plain_target), plain_target, tmp_path / "drafter")


# ---- right ones


def test_weights_are_stored_in_the_serving_dtype(plain_eagle3: Eagle3Drafter, tmp_path: Path) -> None:
    save_drafter(plain_eagle3, tmp_path, torch.bfloat16)
    dtypes = {name: tensor.dtype for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    assert (dtypes.pop("d2t"), dtypes.pop("t2d")) == (torch.int64, torch.bool)
    assert set(dtypes.values()) == {torch.bfloat16}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_drafter_over_the_whole_vocabulary_needs_no_maps(plain_target: Target, tmp_path: Path) -> None:
    shape = Eagle3Config(kind="eagle3", block_size=3, target_layer_ids=(0, 1, 2))
    drafter = create_drafter(shape, plain_target, 0)
    assert isinstance(drafter, Eagle3Drafter)
    save_drafter(drafter, tmp_path, torch.float32)
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["d2t"].tolist() == [0] * V
    assert tensors["t2d"].all()
    for name in ("none", "t2d", "d2t"):
        edit_tensors(lambda tensors, name=name: tensors.pop(name, None))(tmp_path)  # type: ignore[misc]
        loaded = load(tmp_path, plain_target)
        assert loaded.head_over(plain_target.head_weight, None).token_ids is None
        assert torch.equal(proposals(loaded, plain_target), proposals(drafter, plain_target))
    without("draft_vocab_size")(tmp_path)
    assert load_drafter(tmp_path, plain_target).head_over(plain_target.head_weight, None).weight.shape == (V, H)


def test_a_checkpoint_of_another_trainer_loads(saved: Path, plain_target: Target, tmp_path: Path) -> None:
    """It has no block size and no depth, and older names for the rotary base and float32."""
    without("block_size", "num_target_layers", "dtype", "rope_parameters")(saved)
    setting(torch_dtype="float32", rope_theta=5000.0)(saved)
    loaded = load(saved, plain_target)
    assert (loaded.target_layer_ids, loaded.block_size) == ([2, 0, 1], DEFAULT_BLOCK_SIZE)
    assert loaded.config.rope_parameters["rope_theta"] == 5000.0
    tensors = load_file(saved / "model.safetensors")
    assert loaded.draft_tokens.tolist() == tensors["t2d"].nonzero()[:, 0].tolist()
    assert torch.equal(loaded.lm_head.weight, tensors["lm_head.weight"])
    assert torch.equal(loaded.midlayer.hidden_norm.weight, tensors["midlayer.hidden_norm.weight"])
    assert set(proposals(loaded, plain_target).flatten().tolist()) <= set(loaded.draft_tokens.tolist())
    save_drafter(loaded, tmp_path / "again", torch.float32)
    again = load(tmp_path / "again", plain_target)
    assert torch.equal(proposals(again, plain_target), proposals(loaded, plain_target))


def test_an_embedding_in_the_file_is_replaced_by_the_targets(saved: Path, plain_target: Target) -> None:
    """Some checkpoints have an embedding, which engines replace."""
    expected = proposals(random_eagle3(plain_target), plain_target)
    edit_tensors(lambda t: t.update({"embed_tokens.weight": torch.zeros(V, H)}))(saved)
    assert torch.equal(proposals(load(saved, plain_target), plain_target), expected)


def test_the_number_of_heads_divides_the_width() -> None:
    """Transformers and engines require it of a Llama; the heads of GLM-4.5 do not divide its width."""
    config = plan_of_new(Eagle3Config(kind="eagle3"), Glm4MoeConfig(head_dim=128), lambda: None).config
    heads = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    assert (config.hidden_size, heads) == (4096, (32, 8, 128))


# ---- layers


@pytest.mark.parametrize(
    ("layers", "ids"),
    [(36, [1, 17, 32]), (32, [1, 15, 28]), (8, [1, 3, 4]), (7, [1, 2, 3]), (6, [0, 2, 4]), (4, [0, 1, 2])],
)
def test_default_layers_are_those_that_sglang_captures(layers: int, ids: list[int]) -> None:
    """They are before layers 2, L/2 and L-3 if these differ, otherwise at the beginning, middle and end."""
    assert default_layer_ids(layers) == ids
    assert layers < 7 or [layer + 1 for layer in ids] == [2, layers // 2, layers - 3]


def layers_of(checkpoint: Path, target_layers: int) -> list[int]:
    target = LlamaConfig(hidden_size=H, vocab_size=V, num_hidden_layers=target_layers)
    return plan_of_checkpoint(checkpoint, target, "here", lambda: None).target_layer_ids


def test_a_checkpoint_without_layer_ids_means_sglangs_choice(saved: Path) -> None:
    without("eagle_config", "num_target_layers")(saved)
    assert layers_of(saved, 28) == [1, 13, 24]
    check_complete(saved)
    with pytest.raises(DraftsmithError, match=rf"{EAGLE} is missing"):  # there SGLang's choice is not three layers
        layers_of(saved, 6)


def test_a_loaded_checkpoint_is_saved_with_its_layer_ids(saved: Path, plain_target: Target, tmp_path: Path) -> None:
    without("eagle_config.use_aux_hidden_state")(saved)
    save_drafter(load_drafter(saved, plain_target), tmp_path / "again", torch.float32)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["eagle_config"] == {EAGLE: [2, 0, 1]}


def test_a_drafter_may_have_another_rotary_base_than_the_target(saved: Path, plain_target: Target) -> None:
    for edit in (within("rope_parameters", rope_theta=5e5), setting(rope_theta=5e5)):
        edit(saved)
    assert load(saved, plain_target).config.rope_parameters["rope_theta"] == 5e5


# ---- new ones


def test_the_reduced_vocabulary_is_the_most_frequent_tokens(plain_target: Target) -> None:
    counted = torch.tensor([7, 3, 50, 11, 20, *(t for t in range(V) if t not in (7, 3, 50, 11, 20))])
    shape = Eagle3Config(kind="eagle3", target_layer_ids=(0, 1, 2), draft_vocab_size=4)
    drafter = create_drafter(shape, plain_target, 0, counted)
    assert isinstance(drafter, Eagle3Drafter)
    assert drafter.draft_tokens.tolist() == [3, 7, 11, 50]
    assert torch.equal(drafter.lm_head.weight, plain_target.head_weight[[3, 7, 11, 50]])
    with pytest.raises(DraftsmithError, match=r"sft\.drafter\.draft_vocab_size: needs the frequencies"):
        create_drafter(shape, plain_target, 0)


def test_a_plan_describes_the_new_drafter(plain_target: Target) -> None:
    shape = Eagle3Config(kind="eagle3", draft_vocab_size=RANDOM_VOCABULARY, block_size=5)
    plan = plan_of_new(shape, plain_target.model.config, lambda: None)
    assert (plan.block_size, plan.target_layer_ids) == (5, [0, 1, 2])
    assert plan.description == "EAGLE-3 on target layers [0, 1, 2], chains of 4, draft vocabulary 40 of 64 tokens"
    assert plan.parameters == sum(p.numel() for p in random_eagle3(plain_target).parameters())


def test_a_target_too_shallow_for_three_layers_is_refused() -> None:
    with pytest.raises(DraftsmithError, match="name a layer twice"):
        plan_of_new(Eagle3Config(kind="eagle3"), LlamaConfig(num_hidden_layers=3), lambda: None)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "partial_rotary_factor": 0.5},  # engines would read another part of the head
        {"rope_type": "dynamic", "factor": 2.0},  # SGLang's angles are others
        {"rope_type": "longrope", "original_max_position_embeddings": 64, "factor": 2.0}
        | {"short_factor": [1.0] * 64, "long_factor": [2.0] * 64},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "attention_factor": 1.0},
    ],
)
def test_angles_that_engines_disagree_on_are_replaced_by_default_ones(rope: dict[str, Any]) -> None:
    target = LlamaConfig(rope_parameters={"rope_theta": 3e4, **rope})
    tokenizer = SimpleNamespace(convert_ids_to_tokens=lambda _: None)  # the mask token is an unused row
    for shape in (Eagle3Config(kind="eagle3"), DFlashConfig(mask_token=5)):
        config = plan_of_new(shape, target, lambda: tokenizer).config
        assert (config.rope_parameters["rope_theta"], config.rope_parameters["rope_type"]) == (3e4, "default")
        assert config.rope_parameters.get("partial_rotary_factor", 1) == 1
    check_fits(config, target, "its own")
