"""DFlash2 checkpoints: the layout that SGLang's `DFlash2DraftModel` reads, and what it would read otherwise refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.drafters.checkpoint import load_drafter, plan_of_checkpoint, save_drafter
from draftsmith.stages.drafters.dflash2.shape import DFlash2Config
from draftsmith.stages.targets.causal_lm import Target
from tests.stages.drafters.edits import Edit, edit_config, edit_tensors
from tests.testbed import random_target
from tests.testbed.dflash2 import SIZES, random_dflash2


@pytest.fixture
def saved(tmp_path: Path, plain_target: Target) -> Path:
    """A checkpoint that is right."""
    save_drafter(random_dflash2(plain_target), tmp_path / "drafter", torch.float32)
    return tmp_path / "drafter"


def test_the_layout_is_the_one_that_sglang_reads(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    assert config["architectures"] == ["DFlash2DraftModel"]
    assert config["dflash_config"] == {"mask_token_id": 62, "target_layer_ids": [2, 0], "block_size": 5, **SIZES}
    tensors = load_file(saved / "model.safetensors")
    shapes = {
        "layers.1.attention_conv.base_kernel": (2, 2, 32),
        "layers.0.mlp_conv.kernel_projection.weight": (2 * 2 * 4, 32),
        "candidate_selector.predecessor_codebook": (64, 6),
        "candidate_selector.successor_codebook": (64, 6),
        "candidate_selector.hidden_projection.weight": (6, 32),
    }
    for name, shape in shapes.items():
        assert tuple(tensors[name].shape) == shape, name
    plain = {"fc.weight", "hidden_norm.weight", "norm.weight"}
    plain |= {name for name in tensors if ".self_attn." in name or ".mlp." in name}
    norms = {f"layers.{i}.{n}.weight" for i in range(2) for n in ("input_layernorm", "post_attention_layernorm")}
    added = {f"layers.{i}.{p}_conv.{n}" for i in range(2) for p in ("attention", "mlp") for n in _CONVOLUTION}
    assert tensors.keys() == plain | norms | added | {n for n in shapes if n.startswith("candidate")}


_CONVOLUTION = ("base_kernel", "kernel_projection.weight")

TRAPS: dict[str, tuple[Edit, str]] = {
    "no selector": (
        edit_config(lambda c: [c["dflash_config"].pop(n) for n in ("selector_rank", "selector_top_k")]),
        "needs dflash_config.selector_rank",
    ),
    "half a convolution": (edit_config(lambda c: c["dflash_config"].update(conv_kernel_size=0)), "together"),
    "groups that do not fit": (edit_config(lambda c: c["dflash_config"].update(conv_group_size=7)), "does not divide"),
    "a size that is none": (edit_config(lambda c: c["dflash_config"].update(selector_rank="wide")), "selector_rank"),
    "more candidates than are negative": (edit_config(lambda c: c["dflash_config"].update(selector_top_k=-1)), "top_k"),
    "a codebook is missing": (
        edit_tensors(lambda t: t.pop("candidate_selector.successor_codebook")),
        "lacks tensor candidate_selector",
    ),
    "a cap that is none": (
        edit_config(lambda c: c["dflash_config"].update(final_logit_softcapping=-3)),
        r"dflash_config\.final_logit_softcapping is -3",
    ),
    "a scale that is none": (
        edit_config(lambda c: c["dflash_config"].update(output_multiplier=0)),
        "output_multiplier is",
    ),
    "a sink": (edit_config(lambda c: c["dflash_config"].update(attention_sink_bias=True)), "attention_sink_bias"),
    "another model that chooses": (
        edit_config(lambda c: c.update(architectures=["DFlash2BeamDraftModel"])),
        "not DFlash",
    ),
    "a plain drafter with convolutions": (
        edit_config(lambda c: c.update(architectures=["DFlashDraftModel"])),
        r"dflash_config\.conv_kernel_size",
    ),
}


@pytest.mark.parametrize("name", TRAPS)
def test_a_trap_is_one_clear_error(name: str, saved: Path, plain_target: Target) -> None:
    edit, message = TRAPS[name]
    edit(saved)
    with pytest.raises(DraftsmithError, match=message) as error:
        load_drafter(saved, plain_target)
    assert "\n" not in str(error.value)


def test_the_plan_of_a_drafter_that_goes_on_as_dflash2(plain_target: Target, tmp_path: Path) -> None:
    save_drafter(random_target.random_drafter(plain_target), tmp_path, torch.float32)
    shape = DFlash2Config(kind="dflash2", **SIZES)
    plan = plan_of_checkpoint(tmp_path, plain_target.model.config, "here", lambda: plain_target.tokenizer, shape)
    assert (plan.kind, plan.block_size) == ("dflash2", 5)
    assert plan.parameters == sum(p.numel() for p in random_dflash2(plain_target).parameters())
    assert "DFlash2, 2 layers" in plan.description and "rank 6 over 7 candidates" in plan.description
    as_it_is = plan_of_checkpoint(tmp_path, plain_target.model.config, "here", lambda: plain_target.tokenizer)
    assert as_it_is.kind == "dflash"
