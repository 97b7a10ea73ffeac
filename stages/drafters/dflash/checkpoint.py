"""DFlash checkpoints in z-lab's layout, which SGLang and vLLM load. Refuses what those engines would load wrongly."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.drafters import checkpoint_format, speculators
from draftsmith.stages.drafters.dflash.config import DFlashConfig
from draftsmith.stages.drafters.dflash.model import DFlashDrafter
from draftsmith.stages.drafters.spec import RawConfig
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.targets.layers import is_size

ARCHITECTURE = "DFlashDraftModel"
MODEL = DFlashDrafter
# Fields that SGLang's DFlash reads and this package does not compute, with the values that change nothing
# (srt/models/dflash.py, srt/speculative/dflash_utils.py; 0.5.20 and 0.5.23).
_COMPUTED = {"has_embed_tokens": False, "attention_sink_bias": False}
_COMPUTED_WITHIN = {  # `dflash_config`
    "attention_sink_bias": False,
    "attention_value_scale": 1,
    "output_multiplier": 1,
    "final_logit_softcapping": 0,
    "conv_kernel_size": 0,
    "conv_group_size": 0,
    "selector_rank": 0,
    "selector_top_k": 0,
}
_COMPUTED_EITHER = {"projector_type": None, "sample_from_anchor": True}  # at the top or within
# Architectures with the same config fields that draft differently.
_OTHER_ARCHITECTURES = ("DFlash2", "DFlashLaguna", "DSpark")
own_name, save = speculators.own_name, checkpoint_format.save
MASK_ADVICE = "Remove sft.drafter.mask_token: a token that no text contains is then chosen."


def default_layer_ids(num_target_layers: int, count: int) -> list[int]:
    """Return DFlash's default choice of target layers; layer k = the hidden state AFTER target layer k."""
    if count == 1:
        return [num_target_layers // 2]
    return [round(1 + i * (num_target_layers - 4) / (count - 1)) for i in range(count)]


def mask_token_id(tokenizer: Any, token: str | int) -> int:
    """Return the id of the mask token. Raises DraftsmithError if it is not one token of the vocabulary.

    token: an id is used as it is, because models keep unused rows after the tokenizer's tokens.
    """
    if isinstance(token, int):
        return token
    index = tokenizer.convert_tokens_to_ids(token)
    if index is None or index == tokenizer.unk_token_id or tokenizer.convert_ids_to_tokens(index) != token:
        raise DraftsmithError(f"sft.drafter.mask_token: {token!r} is not a token of the target. {MASK_ADVICE}")
    return int(index)


def new_config(shape: DFlashConfig, target_config: Any, tokenizer: Callable[[], Any]) -> Qwen3Config:
    """Return the config of a new drafter: widths, heads and rotary parameters are the target's."""
    layers = target_config.num_hidden_layers
    ids = shape.target_layer_ids or default_layer_ids(layers, shape.num_target_features or shape.num_layers)
    assert shape.mask_token is not None  # `with_mask_token`
    mask_id = mask_token_id(tokenizer(), shape.mask_token)
    return Qwen3Config(
        architectures=[ARCHITECTURE],
        **checkpoint_format.target_fields(target_config),
        intermediate_size=checkpoint_format.intermediate_size(target_config),
        num_hidden_layers=shape.num_layers,
        use_sliding_window=False,
        num_target_layers=layers,
        block_size=shape.block_size,
        dflash_config={"mask_token_id": mask_id, "target_layer_ids": list(ids), "block_size": shape.block_size},
    )


def create(config: Qwen3Config, target: Target, frequent: torch.Tensor | None = None) -> DFlashDrafter:  # noqa: ARG001
    return DFlashDrafter(config, target.embedding)


def target_layer_ids(config: Qwen3Config) -> list[int]:
    """Return the target layers whose hidden states the drafter reads."""
    return list(config.dflash_config["target_layer_ids"])


def description(config: Qwen3Config, tokenizer: Callable[[], Any]) -> str:
    """Describe the shape in a few words."""
    mask = config.dflash_config["mask_token_id"]
    token = tokenizer().convert_ids_to_tokens(mask)  # rows of a padded vocabulary have no text
    name = repr(token) if token is not None else "(beyond the tokenizer's tokens)"
    layers, sliding = config.num_hidden_layers, config.layer_types.count("sliding_attention")
    windows = f" ({sliding} of them with a window of {config.sliding_window})" if sliding else ""
    return (
        f"DFlash, {layers} layer{'s' * (layers != 1)}{windows} on target layers {target_layer_ids(config)}, blocks of "
        f"{config.block_size}, mask token {mask} {name}"
    )


def parse(path: Path, raw: RawConfig, architecture: str = ARCHITECTURE, computed: Collection[str] = ()) -> Qwen3Config:
    """Parse a config.json in this layout, also of an architecture that adds to it.

    computed: fields of `dflash_config` that this architecture reads itself.
    """
    dflash = raw.get("dflash_config") or {}
    for name in raw.get("architectures") or []:
        if name != architecture and any(other in name for other in _OTHER_ARCHITECTURES):
            raise DraftsmithError(
                f"drafter {path}: architectures names {name}, which is not DFlash. Choose a DFlash drafter."
            )
    checkpoint_format.refuse_other_models(path, raw, checkpoint_format.COMPUTED | _COMPUTED | _COMPUTED_EITHER)
    within = {name: value for name, value in _COMPUTED_WITHIN.items() if name not in computed}
    checkpoint_format.refuse_other_models(path, dflash, within | _COMPUTED_EITHER, "dflash_config.")
    block_size = raw.get("block_size") or dflash.get("block_size")
    if dflash.get("block_size", block_size) != block_size:
        raise DraftsmithError(
            f"drafter {path}: block_size is {block_size} at the top and {dflash['block_size']} in dflash_config "
            "(engines read either). Keep the trained one."
        )
    ids, mask_id = dflash.get("target_layer_ids"), dflash.get("mask_token_id")
    theta = (raw.get("rope_parameters") or {}).get("rope_theta")
    checkpoint_format.require_kinds(
        path,
        [
            ("block_size", block_size, checkpoint_format.is_block(block_size)),
            ("dflash_config.target_layer_ids", ids, checkpoint_format.are_integers(ids)),
            ("dflash_config.mask_token_id", mask_id, checkpoint_format.is_integer(mask_id)),
            ("rope_parameters.rope_theta", theta, theta is not None),
        ],
    )
    checkpoint_format.refuse_other_rotations(path, raw)
    config: Qwen3Config = checkpoint_format.parse_config(
        raw | {"block_size": block_size}, Qwen3Config, architecture, path
    )
    _check_windows(path, raw, config)
    return config


def _check_windows(path: Path, raw: RawConfig, config: Qwen3Config) -> None:
    """Refuse windows that engines do not read, or read differently."""
    types, causal = config.layer_types, raw.get("is_causal")
    checkpoint_format.require_kinds(path, [("is_causal", causal, causal is None or isinstance(causal, bool))])
    if other := set(types) - {"full_attention", "sliding_attention"}:
        raise DraftsmithError(
            f"drafter {path}: layer_types contains {min(other)}. Use full_attention or sliding_attention."
        )
    if "sliding_attention" not in types:
        return
    window = config.sliding_window
    if window is None and checkpoint_format.is_integer(raw.get("sliding_window")):
        raise DraftsmithError(
            f"drafter {path}: use_sliding_window is not true, so an engine ignores sliding_window and fails. Set it "
            "to true."
        )
    checkpoint_format.require_kinds(path, [("sliding_window", window, is_size(window))])
    if causal is False and window < config.block_size:
        raise DraftsmithError(
            f"drafter {path}: sliding_window {window} is smaller than the block of {config.block_size}, which "
            "is_causal false reads in both directions, and engines differ there. Use a larger window."
        )


def check_fits(drafter: Qwen3Config, target: Any, where: str) -> None:
    """Refuse a drafter for a target of another shape."""
    layers = target.num_hidden_layers
    checkpoint_format.check_equal(
        where,
        [
            ("hidden_size", drafter.hidden_size, target.hidden_size),
            ("vocab_size", drafter.vocab_size, target.vocab_size),
            ("num_target_layers", getattr(drafter, "num_target_layers", layers), layers),
            *checkpoint_format.rope_checks(drafter, target),
        ],
    )
    checkpoint_format.check_layer_ids(
        where, target_layer_ids(drafter), layers, ask_for="Ask for fewer num_target_features."
    )
    if not 0 <= drafter.dflash_config["mask_token_id"] < target.vocab_size:
        raise DraftsmithError(f"drafter {where}: mask_token_id lies outside the target's vocabulary. {MASK_ADVICE}")


def load_weights(drafter: DFlashDrafter, folder: Path, target: Target, dtype: torch.dtype) -> None:
    """Load the weights of a checkpoint."""
    stored = checkpoint_format.read_tensors(folder)
    tensors = speculators.own_tensors(stored, target.embedding, target.head_weight, str(folder))
    checkpoint_format.load_tensors(drafter, folder, tensors, "z-lab's layout", dtype)
