"""DFlash2 checkpoints: refusal of what SGLang reads differently, and plans of upgrades."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.drafters.checkpoint import load_drafter, plan_of_checkpoint, save_drafter
from draftsmith.stages.drafters.dflash2.config import DFlash2Config
from draftsmith.stages.target.causal_lm import Target
from tests.stages.drafters.edits import Edit, edit_config
from tests.testbed import random_target
from tests.testbed.dflash2 import SIZES, random_dflash2


@pytest.fixture
def saved(tmp_path: Path, plain_target: Target) -> Path:
    """Return a valid checkpoint."""
    save_drafter(random_dflash2(plain_target), tmp_path / "drafter", torch.float32)
    return tmp_path / "drafter"


TRAPS: dict[str, tuple[Edit, str]] = {
    "no selector": (
        edit_config(lambda c: [c["dflash_config"].pop(n) for n in ("selector_rank", "selector_top_k")]),
        "needs dflash_config.selector_rank",
    ),
    "half a convolution": (edit_config(lambda c: c["dflash_config"].update(conv_kernel_size=0)), "together"),
    "groups that do not fit": (edit_config(lambda c: c["dflash_config"].update(conv_group_size=7)), "does not divide"),
    "a size that is none": (edit_config(lambda c: c["dflash_config"].update(selector_rank="wide")), "selector_rank"),
    "more candidates than are negative": (edit_config(lambda c: c["dflash_config"].update(selector_top_k=-1)), "top_k"),
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


def test_the_plan_of_an_upgrade_to_dflash2(plain_target: Target, tmp_path: Path) -> None:
    save_drafter(random_target.random_drafter(plain_target), tmp_path, torch.float32)
    shape = DFlash2Config(kind="dflash2", **SIZES)
    plan = plan_of_checkpoint(tmp_path, plain_target.model.config, "here", lambda: plain_target.tokenizer, shape)
    assert (plan.kind, plan.block_size) == ("dflash2", 5)
    assert plan.parameters == sum(p.numel() for p in random_dflash2(plain_target).parameters())
    assert "DFlash2, 2 layers" in plan.description and "rank 6 over 7 candidates" in plan.description
    as_it_is = plan_of_checkpoint(tmp_path, plain_target.model.config, "here", lambda: plain_target.tokenizer)
    assert as_it_is.kind == "dflash"
