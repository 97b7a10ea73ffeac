"""Native heads in a target's checkpoint, and in a folder of their own as SGLang and vLLM load it.

Such a folder has the target's config.json and the head's tensors under the target's names. `block_size` and
`mtp_engine` in config.json are this project's, and engines ignore them.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from draftsmith.artifacts.errors import DraftsmithError, one_line
from draftsmith.stages.drafters import checkpoint_format
from draftsmith.stages.drafters.mtp.config import MtpConfig
from draftsmith.stages.drafters.mtp.families import ARCHITECTURES, ENGINE_FIELD, FAMILIES, family_of, find_head
from draftsmith.stages.drafters.mtp.model import MtpDrafter
from draftsmith.stages.drafters.spec import RawConfig
from draftsmith.stages.targets.causal_lm import Target

ARCHITECTURE, OTHER_NAMES = ARCHITECTURES[0], ARCHITECTURES[1:]
MODEL = MtpDrafter


def new_config(shape: MtpConfig, target_config: Any, tokenizer: Callable[[], Any]) -> Any:  # noqa: ARG001
    """Return the target's config, with how the head drafts. Raises DraftsmithError for an unknown family."""
    if family_of(target_config) is None:
        raise DraftsmithError(
            f"sft.drafter: the layout of an MTP head of {target_config.model_type} is not known here. Known are those "
            f"of {', '.join(FAMILIES)}."
        )
    return _drafting(target_config, shape.block_size, shape.engine)


def _drafting(config: Any, block_size: int, engine: str) -> Any:
    config = copy.deepcopy(config)
    config.block_size = block_size
    setattr(config, ENGINE_FIELD, engine)
    return config


def parse(path: Path, raw: RawConfig) -> Any:
    """Parse the config.json of a head's folder. Without a block size it drafts three tokens, as engines' recipes do."""
    defaults = MtpConfig(kind="mtp")
    block_size, engine = raw.get("block_size", defaults.block_size), raw.get(ENGINE_FIELD, defaults.engine)
    kind = raw.get("model_type")
    checkpoint_format.require_kinds(
        path,
        [
            ("block_size", block_size, checkpoint_format.is_block(block_size)),
            (ENGINE_FIELD, engine, engine in ("sglang", "vllm")),
            ("model_type", kind, isinstance(kind, str) and kind in CONFIG_MAPPING),
        ],
    )
    try:
        config = CONFIG_MAPPING[kind].from_dict(raw).get_text_config()
    except Exception as error:  # transformers has its own error classes for its fields
        raise DraftsmithError(
            f"drafter {path}: cannot be read ({one_line(error)}). Copy the head from the target again."
        ) from error
    if family_of(config) is None:
        raise DraftsmithError(f"drafter {path}: {kind} has no known MTP head. Name another drafter.")
    return _drafting(config, block_size, engine)


def check_fits(drafter: Any, target: Any, where: str) -> None:
    """Refuse the head of another model: it reads the target's hidden states and embeddings."""
    names = ("model_type", "hidden_size", "vocab_size", "num_hidden_layers")
    checkpoint_format.check_equal(where, [(name, getattr(drafter, name), getattr(target, name)) for name in names])


def create(config: Any, target: Target, frequent: torch.Tensor | None = None) -> MtpDrafter:  # noqa: ARG001
    """Read the head from the target's checkpoint, in float32; a target without one gives its last layer."""
    assert target.folder is not None
    drafter = MtpDrafter(config, target.embedding)
    if find_head(target.folder, config) is not None:
        load_weights(drafter, target.folder, target, torch.float32)
        return drafter
    drafter.start_from(target.decoder)
    checkpoint_format.cast(drafter, torch.float32)
    drafter.follow(target.decoder.norm)
    raw = json.loads((target.folder / checkpoint_format.CONFIG_FILE).read_text())
    raw.get("text_config", raw)[drafter.family.fields[0]] = 1  # engines read how many layers a head has
    drafter.source = raw
    return drafter


def check_head(folder: Path, config: Any) -> None:
    """Check that a target's checkpoint has a whole head. config: as `new_config` returns it. Reads headers only.

    Raises DraftsmithError that names file and tensor.
    """
    with torch.device("meta"):
        drafter = MtpDrafter(config, torch.empty(0))
    head = find_head(folder, config)
    if head is None:
        family = drafter.family
        first = family.file_name("join.weight", config.num_hidden_layers)
        raise DraftsmithError(
            f"{folder}: the checkpoint has no MTP head: {first} is missing. An export of transformers drops it; use "
            "the original checkpoint, or a drafter of another kind."
        )
    _check_shapes(head.files, file_tensors(drafter))


def target_layer_ids(config: Any) -> list[int]:
    """Return the target layer whose hidden state the head reads, before or after the final norm: the last."""
    return [config.num_hidden_layers - 1]


def description(config: Any, tokenizer: Callable[[], Any]) -> str:  # noqa: ARG001
    return f"native MTP head of {config.model_type}, chains of {config.block_size - 1}, as {_engine(config)} serves it"


def _engine(config: Any) -> str:
    return {"sglang": "SGLang", "vllm": "vLLM"}[getattr(config, ENGINE_FIELD)]


def file_tensors(drafter: MtpDrafter) -> dict[str, torch.Tensor]:
    """Return the head's values by their names in a checkpoint: views, of which experts have one each."""
    tensors: dict[str, torch.Tensor] = {}
    for name, value in drafter.state_dict().items():
        parts = {name: value}
        holder, _, last = name.rpartition(".")
        if holder.endswith("experts") and value.dim() == 3:
            parts = {}
            for index, expert in enumerate(value):
                halves = expert.chunk(2) if last == "gate_up_proj" else (expert,)
                maps = ("gate_proj", "up_proj") if last == "gate_up_proj" else (last,)
                parts |= {
                    f"{holder}.{index}.{projection}.weight": half for projection, half in zip(maps, halves, strict=True)
                }
        layers = drafter.config.num_hidden_layers
        tensors |= {drafter.family.file_name(part, layers): tensor for part, tensor in parts.items()}
    return tensors


def save(drafter: MtpDrafter, folder: Path, dtype: torch.dtype) -> None:
    """Write the target's config.json and the head's tensors; biases that choose experts stay float32."""
    fields = {"block_size": drafter.block_size, ENGINE_FIELD: getattr(drafter.config, ENGINE_FIELD)}
    tensors = {
        name: value.to("cpu", torch.float32 if name.endswith("e_score_correction_bias") else dtype).contiguous()
        for name, value in file_tensors(drafter).items()
    }
    checkpoint_format.write_checkpoint(folder, {**drafter.source, **fields}, tensors)


def load_weights(drafter: MtpDrafter, folder: Path, target: Target, dtype: torch.dtype) -> None:
    """Load the weights of a head's own folder, or of a target's, whose final norm the head reads through."""
    check_head(folder, drafter.config)
    head = find_head(folder, drafter.config)
    assert head is not None
    drafter.source = json.loads((folder / checkpoint_format.CONFIG_FILE).read_text())
    for name, value in file_tensors(drafter).items():
        with safe_open(head.files[name], framework="pt") as file:
            value.copy_(file.get_tensor(name))
        if not bool(value.isfinite().all()):
            raise DraftsmithError(
                f"{head.files[name]}: {name} holds NaN or infinite weights. Copy or download the checkpoint again."
            )
    checkpoint_format.cast(drafter, dtype)
    drafter.follow(target.decoder.norm)


def _check_shapes(files: Mapping[str, Path], expected: Mapping[str, torch.Tensor]) -> None:
    """Check that the head has all tensors, and no others, with their shapes."""
    where = next(iter(files.values()))
    for problem, names in (("lacks", expected.keys() - files.keys()), ("has", files.keys() - expected.keys())):
        if names:
            unknown = ", which is unknown" if problem == "has" else ""
            raise DraftsmithError(
                f"{where}: the MTP head {problem} {min(names)}{unknown} ({len(names)} in all). Copy or download the "
                "checkpoint again."
            )
    for name, value in expected.items():
        try:
            with safe_open(files[name], framework="pt") as file:
                shape = tuple(file.get_slice(name).get_shape())
        except (OSError, SafetensorError) as error:
            raise DraftsmithError(
                f"{files[name]}: {name} cannot be read ({error}). Copy or download the checkpoint again."
            ) from error
        if shape != tuple(value.shape):
            raise DraftsmithError(
                f"{files[name]}: {name} has shape {list(shape)}, and by config.json {list(value.shape)}. Copy or "
                "download the checkpoint again."
            )
