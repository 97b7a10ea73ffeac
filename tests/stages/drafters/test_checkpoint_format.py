"""Functions that the checkpoints of all architectures share."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers
from transformers import DeepseekV3Config, Glm4MoeLiteConfig

from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.drafters.checkpoint import load_drafter, save_drafter
from draftsmith.stages.drafters.checkpoint_format import target_fields, unservable_layers
from draftsmith.stages.targets.causal_lm import Target
from tests.testbed import random_target
from tests.testbed.eagle3 import random_eagle3


@pytest.mark.parametrize("kind", ["dflash", "eagle3"])
def test_rotary_frequencies_stay_float32_in_a_drafter_of_bfloat16(
    kind: str, plain_target: Target, tmp_path: Path
) -> None:
    """Engines do the same: rounded to bfloat16, some angles are off by over a radian at position 2000."""
    saved: Drafter = (random_target.random_drafter if kind == "dflash" else random_eagle3)(plain_target)
    save_drafter(saved, tmp_path, torch.bfloat16)
    loaded = load_drafter(tmp_path, plain_target, torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    positions = torch.tensor([[0, 1, 2000]])
    exact, ours = (cast("Any", each.rotary)(torch.zeros(1), position_ids=positions) for each in (saved, loaded))
    torch.testing.assert_close(exact, ours, rtol=0, atol=1e-6)  # cosines and sines


@pytest.mark.parametrize(("family", "theta"), [("Gemma3Text", 1e6), ("Zaya", 5e6), ("Beam", 1e4)])
def test_a_new_drafter_rotates_like_the_targets_full_attention_layers(family: str, theta: float) -> None:
    """If these layers have no positions (Beam), it rotates like the other layers."""
    if family == "Beam":
        pytest.importorskip("transformers", minversion="5.24")
    rope = target_fields(getattr(transformers, f"{family}Config")())["rope_parameters"]
    assert rope == {"rope_type": "default", "rope_theta": theta}


def test_a_new_drafter_has_few_key_heads_where_the_target_caches_a_latent() -> None:
    heads = [target_fields(config())["num_key_value_heads"] for config in (DeepseekV3Config, Glm4MoeLiteConfig)]
    assert heads == [8, 4]  # they divide 128 and 20 query heads


def test_layers_that_an_engine_would_pass_differently_are_refused() -> None:
    assert unservable_layers([0, 1, 2], 36) is unservable_layers([1, 9, 17, 25, 33], 36) is None
    assert "do not rise" in (unservable_layers([2, 0], 36) or "")
    assert "name the last layer" in (unservable_layers([0, 35], 36) or "")
