"""DSpark checkpoints: dtypes, and checkpoints of other trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from draftsmith.stages.drafters.checkpoint import load_drafter, save_drafter
from draftsmith.stages.drafters.dspark.model import DSparkDrafter
from draftsmith.stages.targets.causal_lm import Target
from tests.stages.drafters.edits import edit_config, save
from tests.testbed.dspark import random_dspark


def test_in_half_precision_the_confidence_stays_float32(plain_target: Target, tmp_path: Path) -> None:
    save_drafter(random_dspark(plain_target), tmp_path, torch.bfloat16)
    stored = load_file(tmp_path / "model.safetensors")
    assert {name for name, tensor in stored.items() if tensor.dtype == torch.float32} == {
        "confidence_head.proj.weight",
        "confidence_head.proj.bias",
    }
    loaded = load_drafter(tmp_path, plain_target, torch.bfloat16)
    assert isinstance(loaded, DSparkDrafter) and loaded.confidence_head is not None
    assert loaded.confidence_head.proj.weight.dtype == torch.float32
    assert loaded.markov_head.markov_w1.weight.dtype == torch.bfloat16


def test_the_authors_own_layout_is_read(tmp_path: Path, plain_target: Target) -> None:
    """It has fields at the top, the target's embedding and head among the tensors, and names with a prefix."""

    def flat(raw: dict[str, Any]) -> None:
        nested = raw.pop("dflash_config")
        raw |= {name: nested[name] for name in ("mask_token_id", "target_layer_ids")}
        raw |= {"architectures": ["DSparkDraftModel"], "num_anchors": 512}
        del raw["sample_from_anchor"]

    drafter = random_dspark(plain_target)
    saved = save(drafter, plain_target, tmp_path)
    edit_config(flat)(saved)
    tensors = {f"model.{name}": tensor for name, tensor in load_file(saved / "model.safetensors").items()}
    shared = {"model.embed_tokens.weight": plain_target.embedding, "lm_head.weight": plain_target.head_weight}
    save_file(tensors | {name: tensor.clone() for name, tensor in shared.items()}, saved / "model.safetensors")
    loaded, state = load_drafter(saved, plain_target), drafter.state_dict()
    assert isinstance(loaded, DSparkDrafter)
    assert (loaded.block_size, loaded.from_anchor) == (drafter.block_size, drafter.from_anchor)
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
