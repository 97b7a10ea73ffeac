"""DSpark checkpoints in the layout that SGLang loads (`Qwen3DSparkModel`). Also reads those of the authors and others.

A file's `block_size` counts proposals, without the anchor. In memory the anchor is included, as in all drafters here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.drafters import checkpoint_format, speculators
from draftsmith.stages.drafters.dflash import checkpoint as dflash
from draftsmith.stages.drafters.dspark.config import DSparkConfig
from draftsmith.stages.drafters.dspark.model import DSparkDrafter
from draftsmith.stages.drafters.spec import RawConfig
from draftsmith.stages.targets.causal_lm import Target

ARCHITECTURE = "Qwen3DSparkModel"
MODEL = DSparkDrafter
UPGRADES = "dflash"  # the kind whose weights it can start from
_RANK = 256  # of a new drafter's bias from the token before an offset
_HEAD = "vanilla"  # the head that is computed here; SGLang knows two others
OTHER_NAMES = ("DSparkDraftModel", "LingDSparkModel")  # other names of the same model
target_layer_ids = dflash.target_layer_ids
# SGLang uses the target's, and reads none of these from a drafter (srt/models/dspark.py).
_SHARED = ("embed_tokens.", "lm_head.", "rotary_emb.")
# Some checkpoints have fields at the top that others have in one of these objects.
_NESTED = ("dflash_config", "dspark_config")
_FLAGS = ("enable_confidence_head", "confidence_head_with_markov", "sample_from_anchor")  # true by default
_EITHER = ("block_size", "mask_token_id", "target_layer_ids", "markov_rank", "markov_head_type")


def new_config(shape: DSparkConfig, target_config: Any, tokenizer: Callable[[], Any]) -> Qwen3Config:
    """Return the config of a new drafter: widths, heads and rotary parameters are the target's."""
    return _with_additions(dflash.new_config(shape, target_config, tokenizer), from_anchor=True)


def upgrade_config(config: Qwen3Config) -> Qwen3Config:
    """Return the config of a DFlash drafter that continues as DSpark.

    Every offset keeps its query, so the anchor's query is unused.
    """
    return _with_additions(config, from_anchor=False)


def _with_additions(config: Qwen3Config, *, from_anchor: bool) -> Qwen3Config:
    extended = copy.deepcopy(config)
    extended.architectures = [ARCHITECTURE]
    extended.markov_rank, extended.markov_head_type = _RANK, _HEAD
    extended.enable_confidence_head, extended.confidence_head_with_markov = True, True
    extended.sample_from_anchor = from_anchor
    return extended


def check_fits(drafter: Qwen3Config, target: Any, where: str) -> None:
    """Refuse the same as DFlash, and targets for which SGLang divides a DSpark's states."""
    dflash.check_fits(drafter, target, where)
    if (divisor := getattr(target, "logits_mup_width_multiplier", None)) not in (None, 1):
        raise DraftsmithError(
            f"drafter {where}: the target's logits_mup_width_multiplier is {divisor}, and SGLang divides a DSpark's "
            "states by it, which is not implemented here. Use kind dflash or dflash2."
        )


def create(config: Qwen3Config, target: Target, frequent: torch.Tensor | None = None) -> DSparkDrafter:  # noqa: ARG001
    """Create a drafter for this target whose weights are not initialised."""
    return DSparkDrafter(config, target.embedding)


def description(config: Qwen3Config, tokenizer: Callable[[], Any]) -> str:
    """Describe the shape in a few words."""
    confidence = "with" if config.enable_confidence_head else "without"
    return (
        dflash.description(config, tokenizer).replace("DFlash", "DSpark", 1)
        + f", a bias of rank {config.markov_rank}, {confidence} a confidence head"
    )


def parse(path: Path, raw: RawConfig) -> Qwen3Config:
    """Parse the config.json of a checkpoint."""
    for name, value in raw.items():
        if name.startswith("dspark_") and name != "dspark_config" and value is not None:
            raise DraftsmithError(
                f"drafter {path}: {name} belongs to a drafter inside its target. Choose one with its own checkpoint."
            )
    fields = {name: _either(path, raw, name) for name in _EITHER}
    proposals, rank, kind = (fields[name] for name in ("block_size", "markov_rank", "markov_head_type"))
    if kind not in (None, _HEAD):
        raise DraftsmithError(f"drafter {path}: markov_head_type is {kind!r}. Only {_HEAD} is supported.")
    flags = {name: raw.get(name, True) for name in _FLAGS}
    checkpoint_format.require_kinds(
        path,
        [
            ("block_size", proposals, checkpoint_format.is_integer(proposals) and proposals >= 1),
            ("markov_rank", rank, checkpoint_format.is_integer(rank) and rank >= 1),
            ("markov_head_type", kind, kind is not None),
            *((name, value, isinstance(value, bool)) for name, value in flags.items()),
        ],
    )
    others = {name: raw[name] for name in raw.keys() - {*_EITHER, *_NESTED, *flags}}
    shared = {"mask_token_id": fields["mask_token_id"], "target_layer_ids": fields["target_layer_ids"]}
    nested = {name: value for within in _NESTED for name, value in (raw.get(within) or {}).items()}
    shared |= {"block_size": proposals + 1}
    as_dflash = others | {"block_size": proposals + 1, "dflash_config": nested | shared}
    config = dflash.parse(path, as_dflash | {"architectures": [ARCHITECTURE]}, ARCHITECTURE)
    config.markov_rank, config.markov_head_type = rank, kind
    for name, value in flags.items():
        setattr(config, name, value)
    return config


def _either(path: Path, raw: RawConfig, name: str) -> Any:
    """Return a field that engines read at the top or in an object of `_NESTED`. Refuses two values that differ."""
    values = [at[name] for at in (raw, *(raw.get(within) or {} for within in _NESTED)) if at.get(name) is not None]
    if any(value != values[0] for value in values):
        raise DraftsmithError(
            f"drafter {path}: {name} is given as {values[0]} and as {values[-1]}. Keep the trained one."
        )
    return values[0] if values else None


def save(drafter: DSparkDrafter, folder: Path, dtype: torch.dtype) -> None:
    """Write the checkpoint."""
    proposals = drafter.block_size - 1
    fields = {"block_size": proposals, "dflash_config": drafter.config.dflash_config | {"block_size": proposals}}
    checkpoint_format.save(drafter, folder, dtype, fields)


def own_name(name: str) -> str | None:
    """Return the name of a file's tensor in the model, without the prefix in some files; None for the target's."""
    name = name.removeprefix("model.")
    return None if name.startswith(_SHARED) else speculators.own_name(name)


def load_weights(drafter: DSparkDrafter, folder: Path, target: Target, dtype: torch.dtype) -> None:
    """Load the weights of a checkpoint, which may also hold the target's."""
    stored = checkpoint_format.read_tensors(folder)
    if checkpoint_format.is_speculators(folder):
        stored = speculators.own_tensors(stored, target.embedding, target.head_weight, str(folder))
    tensors = {name: tensor for stored_name, tensor in stored.items() if (name := own_name(stored_name)) is not None}
    checkpoint_format.load_tensors(drafter, folder, tensors, "SGLang's layout of DSpark", dtype)
