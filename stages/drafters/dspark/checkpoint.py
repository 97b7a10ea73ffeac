"""DSpark checkpoints in the layout that SGLang loads (`Qwen3DSparkModel`); the authors' and published ones are read.

A file's `block_size` counts proposals: the anchor is not one of them. In memory it is included, as everywhere here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.drafters import checkpoint_format, speculators
from draftsmith.stages.drafters.dflash import checkpoint as dflash
from draftsmith.stages.drafters.dflash.model import DFlashDrafter
from draftsmith.stages.drafters.dspark.config import DSparkConfig
from draftsmith.stages.drafters.dspark.markov import KINDS
from draftsmith.stages.drafters.dspark.model import DSparkDrafter
from draftsmith.stages.target.causal_lm import Target

ARCHITECTURE = "Qwen3DSparkModel"
UPGRADES = "dflash"  # the kind whose weights it takes over
OTHER_NAMES = ("DSparkDraftModel", "LingDSparkModel")  # of the same model
target_layer_ids = dflash.target_layer_ids
# SGLang shares the target's, and reads none of these from a drafter (srt/models/dspark.py).
_SHARED = ("embed_tokens.", "lm_head.", "rotary_emb.")
# Fields that stand at the top of some checkpoints and in one of these objects of others.
_NESTED = ("dflash_config", "dspark_config")
_FLAGS = ("enable_confidence_head", "confidence_head_with_markov", "sample_from_anchor")  # true where left out
_EITHER = ("block_size", "mask_token_id", "target_layer_ids", "markov_rank", "markov_head_type")


def new_config(shape: DSparkConfig, target_config: Any, tokenizer: Callable[[], Any]) -> Qwen3Config:
    """Config of a new drafter: widths, heads and rotary parameters are the target's."""
    return _with_additions(dflash.new_config(shape, target_config, tokenizer), shape, from_anchor=True)


def upgraded_config(config: Qwen3Config, shape: DSparkConfig) -> Qwen3Config:
    """Of a DFlash drafter that goes on as DSpark: every offset keeps its query, so the anchor has one in vain."""
    return _with_additions(config, shape, from_anchor=False)


def _with_additions(config: Qwen3Config, shape: DSparkConfig, *, from_anchor: bool) -> Qwen3Config:
    made = copy.deepcopy(config)
    made.architectures = [ARCHITECTURE]
    made.markov_rank, made.markov_head_type = shape.markov_rank, shape.markov_head
    made.enable_confidence_head, made.confidence_head_with_markov = shape.confidence_head, True
    made.sample_from_anchor = from_anchor
    return made


def check_fits(drafter: Qwen3Config, target: Any, where: str) -> None:
    """As of DFlash; and refuse targets for which SGLang divides a DSpark's states. Configs only, no weights."""
    dflash.check_fits(drafter, target, where)
    if (divisor := getattr(target, "logits_mup_width_multiplier", None)) not in (None, 1):
        raise DraftsmithError(
            f"drafter {where}: the target's logits_mup_width_multiplier is {divisor}, and SGLang divides a DSpark's "
            "states by it, which is not computed here: use kind dflash or dflash2"
        )


def create(config: Qwen3Config, target: Target, seed: int, frequent: torch.Tensor | None = None) -> DSparkDrafter:  # noqa: ARG001
    """A drafter with random weights for this target, float32, seeded."""
    drafter = DSparkDrafter(config, target.embedding)
    drafter.initialise(torch.Generator().manual_seed(seed), target.head_weight)
    return drafter.to(target.device)


def upgraded(drafter: DFlashDrafter, shape: DSparkConfig, target: Target, seed: int) -> DSparkDrafter:
    """A DFlash drafter as one of DSpark that proposes the same: the same backbone, a bias of nothing."""
    config = upgraded_config(drafter.config, shape)
    check_fits(config, target.config, "sft.drafter")
    made = DSparkDrafter(config, target.embedding)
    made.load_state_dict(drafter.state_dict(), strict=False)
    made.initialise_additions(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        made.norm.weight.mul_(target.logit_map.scale)  # its products are the logits: see `DSparkDrafter`
    _cast(made, drafter.fc.weight.dtype)
    made.info, made.frequent_tokens = drafter.info, drafter.frequent_tokens
    return made.to(target.device)


def _cast(drafter: DSparkDrafter, dtype: torch.dtype) -> None:
    """Weights to `dtype`, in place; SGLang computes the confidence in float32."""
    checkpoint_format.cast(drafter, dtype)
    if drafter.confidence_head is not None:
        drafter.confidence_head.float()


def skeleton(config: Qwen3Config) -> DSparkDrafter:
    """Without an embedding, to count parameters."""
    return DSparkDrafter(config, torch.empty(0))


def description(config: Qwen3Config, tokenizer: Callable[[], Any]) -> str:
    """Its shape in a few words."""
    confidence = "with" if config.enable_confidence_head else "without"
    return (
        dflash.description(config, tokenizer).replace("DFlash", "DSpark", 1)
        + f", {config.markov_head_type} bias of rank {config.markov_rank}, {confidence} a confidence head"
    )


def read_config(folder: Path) -> Qwen3Config:
    """config.json of a checkpoint, with what engines would guess made explicit or refused."""
    path = folder / checkpoint_format.CONFIG_FILE
    with checkpoint_format.config_errors(str(path)):
        return _parsed(path, checkpoint_format.read_raw_config(folder))


def _parsed(path: Path, raw: dict[str, Any]) -> Qwen3Config:
    for name, value in raw.items():
        if name.startswith("dspark_") and name != "dspark_config" and value is not None:
            raise DraftsmithError(f"drafter {path}: {name} is of a drafter inside its target; give one of its own")
    fields = {name: _either(path, raw, name) for name in _EITHER}
    checkpoint_format.require_fields(
        path, [(name, fields[name]) for name in ("block_size", "markov_rank", "markov_head_type")]
    )
    proposals, rank, kind = (fields[name] for name in ("block_size", "markov_rank", "markov_head_type"))
    if kind not in KINDS:
        raise DraftsmithError(
            f"drafter {path}: markov_head_type is {kind!r}: supported are {', '.join(KINDS)}; give a drafter with one"
        )
    flags = {name: raw.get(name, True) for name in _FLAGS}
    checkpoint_format.require_kinds(
        path,
        [
            ("block_size", proposals, checkpoint_format.is_integer(proposals) and proposals >= 1),
            ("markov_rank", rank, checkpoint_format.is_integer(rank) and rank >= 1),
            *((name, value, isinstance(value, bool)) for name, value in flags.items()),
        ],
    )
    own = {name: raw[name] for name in raw.keys() - {*_EITHER, *_NESTED, *flags}}
    shared = {"mask_token_id": fields["mask_token_id"], "target_layer_ids": fields["target_layer_ids"]}
    nested = {name: value for within in _NESTED for name, value in (raw.get(within) or {}).items()}
    shared |= {"block_size": proposals + 1}
    as_dflash = own | {"block_size": proposals + 1, "dflash_config": nested | shared}
    config = dflash.parsed(path, as_dflash | {"architectures": [ARCHITECTURE]}, ARCHITECTURE)
    config.markov_rank, config.markov_head_type = rank, kind
    for name, value in flags.items():
        setattr(config, name, value)
    return config


def _either(path: Path, raw: Mapping[str, Any], name: str) -> Any:
    """A field that engines read at the top or within; two that differ are refused."""
    found = [at[name] for at in (raw, *(raw.get(within) or {} for within in _NESTED)) if at.get(name) is not None]
    if any(value != found[0] for value in found):
        raise DraftsmithError(f"drafter {path}: {name} is given as {found[0]} and as {found[-1]}; keep the trained one")
    return found[0] if found else None


def save(drafter: DSparkDrafter, folder: Path, dtype: torch.dtype) -> None:
    """Write config.json and model.safetensors, exactly the tensors that engines expect."""
    config, proposals = drafter.config, drafter.block_size - 1
    raw = config.to_dict() | {
        "architectures": [ARCHITECTURE],
        "model_type": "qwen3",
        "block_size": proposals,
        "dflash_config": config.dflash_config | {"block_size": proposals},
        **checkpoint_format.serving_fields(config, dtype),
    }
    tensors = {
        name: p.detach().to("cpu", torch.float32 if name.startswith("confidence_head.") else dtype).contiguous()
        for name, p in drafter.named_parameters()
    }
    checkpoint_format.write_checkpoint(folder, raw, tensors)


def own_name(name: str) -> str | None:
    """Of a tensor in a file, without the prefix that some write; None of one that the target has."""
    name = name.removeprefix("model.")
    return None if name.startswith(_SHARED) else speculators.own_name(name)


def load(folder: Path, target: Target, dtype: torch.dtype) -> DSparkDrafter:
    """Load a checkpoint for this target. Every tensor must be there, with its shape, and no other but the target's."""
    config = read_config(folder)
    check_fits(config, target.config, str(folder))
    drafter = DSparkDrafter(config, target.embedding)
    found = checkpoint_format.read_tensors(folder)
    if checkpoint_format.is_speculators(folder):
        found = speculators.own_tensors(found, target.embedding, target.head_weight, str(folder))
    tensors = {name: tensor for each, tensor in found.items() if (name := own_name(each)) is not None}
    expected = {name: tuple(p.shape) for name, p in drafter.named_parameters()}
    checkpoint_format.check_tensors(folder, tensors, expected, "SGLang's layout of DSpark")
    drafter.load_state_dict(tensors, strict=False)
    _cast(drafter, dtype)
    return drafter.to(target.device)
