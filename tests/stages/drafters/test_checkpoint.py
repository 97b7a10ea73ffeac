"""DFlash checkpoints: the layout that engines read, optional fields, and new drafters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.drafters.base import Drafter, DrafterInfo
from draftsmith.stages.drafters.checkpoint import (
    check_drafter,
    create_drafter,
    load_drafter,
    plan_of_checkpoint,
    read_info,
    save_drafter,
    upgrade_drafter,
)
from draftsmith.stages.drafters.dflash.checkpoint import default_layer_ids
from draftsmith.stages.drafters.dflash.config import DFlashConfig
from draftsmith.stages.drafters.dflash.model import AttentionSpan, DFlashDrafter
from draftsmith.stages.drafters.dflash2.config import DFlash2Config
from draftsmith.stages.drafters.dspark.config import DSparkConfig
from draftsmith.stages.drafters.eagle3.config import Eagle3Config
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.targets.info import read_target_info, write_target_info
from tests.stages.drafters.edits import Edit, edit_config, save, setting, within, without
from tests.testbed import random_target


@pytest.fixture
def saved(tmp_path: Path, plain_target: Target) -> Path:
    return save(random_target.random_drafter(plain_target), plain_target, tmp_path / "drafter")


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


def test_weights_that_overflow_the_serving_dtype_are_not_written(plain_target: Target, tmp_path: Path) -> None:
    drafter = random_target.random_drafter(plain_target)
    torch.nn.init.constant_(drafter.fc.weight, 1e5)  # float16 ends at 65504
    with pytest.raises(DraftsmithError, match=r"fc\.weight holds NaN or infinite weights"):
        save_drafter(drafter, tmp_path, torch.float16)
    assert not (tmp_path / "model.safetensors").exists()


def test_default_layers_are_spread_as_in_the_paper() -> None:
    assert default_layer_ids(36, 5) == [1, 9, 17, 25, 33]  # z-lab's Qwen3-4B draft
    assert default_layer_ids(36, 1) == [18]


NEUTRAL: dict[str, Edit] = {
    "what engines take as the default": setting(is_causal=False, use_gemma_norm=False, rope_is_neox_style=True),
    "the same of dflash_config": within("dflash_config", attention_value_scale=1.0, projector_type=None),
    "the block size only at the top": without("dflash_config.block_size"),
    "the block size only in dflash_config": without("block_size"),
    "an old config of the rotary base": edit_config(lambda c: (c.pop("rope_parameters"), c.update(rope_scaling=None))),
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_other_ways_to_write_the_same_config_are_read(name: str, saved: Path, plain_target: Target) -> None:
    NEUTRAL[name](saved)
    assert load_drafter(saved, plain_target).block_size == 5


def test_frequent_tokens_and_record_are_read_and_may_be_absent(saved: Path, plain_target: Target) -> None:
    head = load_drafter(saved, plain_target).drafting_head(plain_target.head_weight, 3)
    assert head.token_ids is not None and head.token_ids.tolist() == [61, 62, 63]
    (saved / "drafter.json").unlink()
    (saved / "frequent_tokens.npy").unlink()
    check_drafter(saved, plain_target.info)
    assert read_info(saved) == DrafterInfo()
    loaded = load_drafter(saved, plain_target)
    assert loaded.frequent_tokens is None
    assert loaded.drafting_head(plain_target.head_weight, 5).token_ids is None


@pytest.mark.parametrize(("candidates", "chosen"), [([7, 5], 7), ([], 63)], ids=["one that no text has", "the end"])
def test_a_mask_token_that_is_left_open_is_chosen(
    candidates: list[int], chosen: int, plain_artifact: Path, tmp_path: Path
) -> None:
    artifact = Path(shutil.copytree(plain_artifact, tmp_path / "target"))
    write_target_info(read_target_info(artifact).model_copy(update={"mask_candidates": candidates}), artifact)
    shape = DFlashConfig(num_layers=1, block_size=4)
    drafter = create_drafter(shape, Target.load(artifact, device="cpu"), 0)
    assert drafter.config.dflash_config["mask_token_id"] == chosen


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (DFlashConfig(target_layer_ids=(0, 4)), "target_layer_ids"),
        (DFlashConfig(target_layer_ids=(0, 1), mask_token="<none>"), "is not a token of the target"),
        (DFlashConfig(target_layer_ids=(0, 1), mask_token="two words"), "is not a token of the target"),
        (Eagle3Config(kind="eagle3", target_layer_ids=(0, 1, 4)), r"\[0, 1, 4\] do not fit layers 0 … 3"),
        (Eagle3Config(kind="eagle3", target_layer_ids=(0, 1, 1)), r"layer twice. .*in sft\.drafter\.target_layer_ids"),
        (Eagle3Config(kind="eagle3", target_layer_ids=(-1, 0, 1)), "do not fit"),
        (Eagle3Config(kind="eagle3", draft_vocab_size=65), "draft_vocab_size: 65 is more than the target's 64"),
    ],
)
def test_a_new_drafter_that_does_not_fit_the_target_is_refused(
    shape: DFlashConfig | Eagle3Config, message: str, plain_target: Target
) -> None:
    with pytest.raises(DraftsmithError, match=message):
        create_drafter(shape, plain_target, 0, torch.arange(random_target.VOCAB_SIZE))


def test_windows_are_written_where_engines_read_them(plain_target: Target, tmp_path: Path) -> None:
    types = ["sliding_attention", "full_attention"]
    drafter = random_target.random_drafter(plain_target, **random_target.windows(3, *types))
    save_drafter(drafter, tmp_path, torch.float32)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["layer_types"], config["sliding_window"], config["use_sliding_window"]) == (types, 3, True)
    loaded = load_drafter(tmp_path, plain_target)
    assert isinstance(loaded, DFlashDrafter)
    assert loaded.spans == [AttentionSpan(3, causal=True), AttentionSpan(None, causal=False)]


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        (DFlash2Config(kind="dflash2"), ("DFlash2, 2 layers", "rank 256 over 16 candidates")),
        (DSparkConfig(kind="dspark"), ("DSpark", "rank 256")),
    ],
)
def test_the_plan_of_an_upgrade_describes_the_trained_drafter(
    shape: DFlashConfig, words: tuple[str, str], saved: Path, plain_target: Target, plain_drafter: Drafter
) -> None:
    plan = plan_of_checkpoint(saved, plain_target.model.config, "here", lambda: plain_target.tokenizer, shape)
    assert (plan.kind, plan.block_size) == (shape.kind, 5)
    upgraded = upgrade_drafter(plain_drafter, shape, plain_target, seed=0)
    assert plan.parameters == sum(p.numel() for p in upgraded.parameters())
    assert all(each in plan.description for each in words)
    as_it_is = plan_of_checkpoint(saved, plain_target.model.config, "here", lambda: plain_target.tokenizer)
    assert as_it_is.kind == "dflash"
