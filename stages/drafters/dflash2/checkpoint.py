"""DFlash2 checkpoints: z-lab's layout of DFlash with the tensors and fields that SGLang's `DFlash2DraftModel` loads."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.drafters import checkpoint_format
from draftsmith.stages.drafters.dflash import checkpoint as dflash
from draftsmith.stages.drafters.dflash2.config import DFlash2Config
from draftsmith.stages.drafters.dflash2.model import DFlash2Drafter
from draftsmith.stages.drafters.spec import RawConfig
from draftsmith.stages.targets.causal_lm import Target

ARCHITECTURE = "DFlash2DraftModel"
MODEL = DFlash2Drafter
UPGRADES = "dflash"  # the kind whose weights it can start from
# Fields of `dflash_config`:
NEW_SIZES = {  # as in z-lab's checkpoints
    "conv_kernel_size": 2,  # taps of the convolutions around every sublayer; 0, with conv_group_size: none
    "conv_group_size": 16,  # channels that share a dynamic kernel
    "selector_rank": 256,  # width of the tokens' codebooks
    "selector_top_k": 16,  # candidates of an offset
}
_MULTIPLIER, _SOFTCAP = "output_multiplier", "final_logit_softcapping"  # map the head's products to unary scores
check_fits, target_layer_ids, own_name = dflash.check_fits, dflash.target_layer_ids, dflash.own_name
save, load_weights = dflash.save, dflash.load_weights


def new_config(shape: DFlash2Config, target_config: Any, tokenizer: Callable[[], Any]) -> Qwen3Config:
    """Return the config of a new drafter: DFlash's, with the sizes of the additions."""
    return upgrade_config(dflash.new_config(shape, target_config, tokenizer))


def upgrade_config(config: Qwen3Config) -> Qwen3Config:
    """Return the config of a DFlash drafter that continues as a DFlash2. Shared fields stay as they are."""
    extended = copy.deepcopy(config)
    extended.architectures = [ARCHITECTURE]
    extended.dflash_config = {**config.dflash_config, **NEW_SIZES}
    _check_sizes("sft.drafter", extended)
    return extended


def _with_logits_of(target: Target, config: Qwen3Config) -> Qwen3Config:
    """Return the config with the target's scale and soft cap of logits, which engines read from it."""
    if target.logit_map.is_identity:
        return config
    extended = copy.deepcopy(config)
    scales = {_MULTIPLIER: target.logit_map.scale, _SOFTCAP: target.logit_map.softcap or 0}
    extended.dflash_config = {**config.dflash_config, **scales}
    return extended


def _check_sizes(where: str, config: Qwen3Config) -> None:
    sizes = {name: config.dflash_config.get(name) or 0 for name in NEW_SIZES}
    multiplier, softcap = config.dflash_config.get(_MULTIPLIER, 1), config.dflash_config.get(_SOFTCAP) or 0
    checkpoint_format.require_kinds(
        Path(where),
        [
            *(
                (f"dflash_config.{name}", value, checkpoint_format.is_integer(value) and value >= 0)
                for name, value in sizes.items()
            ),
            (f"dflash_config.{_MULTIPLIER}", multiplier, checkpoint_format.is_number(multiplier) and multiplier > 0),
            (f"dflash_config.{_SOFTCAP}", softcap, checkpoint_format.is_number(softcap) and softcap >= 0),
        ],
    )
    taps, group_size, rank, top_k = sizes.values()
    if not (rank and top_k):
        raise DraftsmithError(
            f"drafter {where}: a {ARCHITECTURE} needs dflash_config.selector_rank and selector_top_k. Add them."
        )
    if bool(taps) != bool(group_size):
        raise DraftsmithError(
            f"drafter {where}: dflash_config needs conv_kernel_size and conv_group_size together. Set both."
        )
    if group_size and config.hidden_size % group_size:
        raise DraftsmithError(
            f"drafter {where}: conv_group_size {group_size} does not divide hidden_size {config.hidden_size}. "
            "Use a divisor."
        )


def create(config: Qwen3Config, target: Target, frequent: torch.Tensor | None = None) -> DFlash2Drafter:  # noqa: ARG001
    return DFlash2Drafter(_with_logits_of(target, config), target.embedding)


def description(config: Qwen3Config, tokenizer: Callable[[], Any]) -> str:
    """Describe the shape in a few words."""
    sizes = config.dflash_config
    taps = sizes.get("conv_kernel_size")
    return (
        dflash.description(config, tokenizer).replace("DFlash", "DFlash2", 1)
        + (f", convolutions of {taps} taps" if taps else "")
        + f", a selector of rank {sizes['selector_rank']} over {sizes['selector_top_k']} candidates"
    )


def parse(path: Path, raw: RawConfig) -> Qwen3Config:
    """Parse the config.json of a checkpoint."""
    config = dflash.parse(path, raw, ARCHITECTURE, computed=(*NEW_SIZES, _MULTIPLIER, _SOFTCAP))
    _check_sizes(str(path), config)
    return config
