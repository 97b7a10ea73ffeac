"""DFlash checkpoints in z-lab's layout: what SGLang and vLLM load. Refuses what those engines would load wrongly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config

from artifacts.errors import DraftsmithError
from stages.drafters.config import DFlashConfig
from stages.drafters.dflash.model import DFlashDrafter
from stages.targets.causal_lm import Target

ARCHITECTURE = "DFlashDraftModel"
MASK_ADVICE = "set sft.drafter.mask_token to a special token that never occurs in text"


def default_layer_ids(num_target_layers: int, count: int) -> list[int]:
    """DFlash's default choice of target layers (METHOD: after layer k)."""
    if count == 1:
        return [num_target_layers // 2]
    return [round(1 + i * (num_target_layers - 4) / (count - 1)) for i in range(count)]


def mask_token_id(tokenizer: Any, wanted: str | int | None) -> int:
    """The id of the mask token. Raises DraftsmithError if the vocabulary does not hold it as one token.

    An id is taken as it is: it may lie behind the tokenizer's tokens, where models keep unused rows.
    """
    if isinstance(wanted, int):
        return wanted
    token = wanted if wanted is not None else tokenizer.mask_token
    if token is None:
        raise DraftsmithError(f"sft.drafter.mask_token: the target's tokenizer has no mask token; {MASK_ADVICE}")
    index = tokenizer.convert_tokens_to_ids(token)
    if index is None or index == tokenizer.unk_token_id or tokenizer.convert_ids_to_tokens(index) != token:
        raise DraftsmithError(f"sft.drafter.mask_token: {token!r} is not a token of the target; {MASK_ADVICE}")
    return int(index)


def new_config(shape: DFlashConfig, target_config: Any, mask_id: int) -> Qwen3Config:
    """Config of a new drafter: widths, heads and rotary parameters are the target's."""
    layers = target_config.num_hidden_layers
    ids = shape.target_layer_ids or default_layer_ids(layers, shape.num_target_features or shape.num_layers)
    heads = target_config.num_attention_heads
    rope = getattr(target_config, "rope_parameters", None) or {"rope_type": "default", "rope_theta": 10000.0}
    return Qwen3Config(
        architectures=[ARCHITECTURE],
        vocab_size=target_config.vocab_size,
        hidden_size=target_config.hidden_size,
        intermediate_size=shape.intermediate_size or target_config.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=heads,
        num_key_value_heads=target_config.num_key_value_heads,
        head_dim=getattr(target_config, "head_dim", None) or target_config.hidden_size // heads,
        max_position_embeddings=target_config.max_position_embeddings,
        rms_norm_eps=target_config.rms_norm_eps,
        rope_parameters=dict(rope),
        attention_bias=False,
        tie_word_embeddings=False,
        use_sliding_window=False,
        num_target_layers=layers,
        block_size=shape.block_size,
        dflash_config={"mask_token_id": mask_id, "target_layer_ids": list(ids), "block_size": shape.block_size},
    )


def create(shape: DFlashConfig, target: Target, seed: int) -> DFlashDrafter:
    """A drafter with random weights for this target, float32, seeded."""
    config = new_config(shape, target.model.config, mask_token_id(target.tokenizer, shape.mask_token))
    check_fits(config, target.model.config, "sft.drafter")
    drafter = DFlashDrafter(config, target.embedding)
    drafter.initialise(torch.Generator().manual_seed(seed), target.head_weight)
    return drafter.to(target.device)


def read_config(folder: Path) -> Qwen3Config:
    """config.json of a checkpoint, with what engines would guess made explicit or refused."""
    path = folder / "config.json"
    try:
        raw: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DraftsmithError(f"drafter {path}: cannot be read ({error}); give a folder in z-lab's layout") from error
    if not isinstance(raw, dict):
        raise DraftsmithError(f"drafter {path}: is not a JSON object; give a folder in z-lab's layout")
    dflash = raw.get("dflash_config") or {}
    block_size = raw.get("block_size") or dflash.get("block_size")
    if dflash.get("block_size", block_size) != block_size:
        raise DraftsmithError(
            f"drafter {path}: block_size is {block_size} at the top and {dflash['block_size']} in dflash_config "
            "(engines read either); keep the trained one"
        )
    if "rope_parameters" not in raw and "rope_theta" in raw:
        scaling = raw.pop("rope_scaling", None) or {}
        scaling["rope_type"] = scaling.pop("type", None) or scaling.get("rope_type", "default")
        raw["rope_parameters"] = {**scaling, "rope_theta": raw["rope_theta"]}
    for field, value in (
        ("block_size", block_size),
        ("dflash_config.target_layer_ids", dflash.get("target_layer_ids")),
        ("dflash_config.mask_token_id", dflash.get("mask_token_id")),
        ("rope_parameters.rope_theta", (raw.get("rope_parameters") or {}).get("rope_theta")),
    ):
        if value is None:
            raise DraftsmithError(f"drafter {path}: field {field} is missing (an engine would guess it); add it")
    raw["block_size"] = block_size
    raw.pop("architectures", None)
    if sliding := {kind for kind in raw.get("layer_types") or () if kind != "full_attention"}:
        raise DraftsmithError(f"drafter {path}: layer_types has {min(sliding)}; only full_attention is supported")
    try:
        return Qwen3Config(**{**raw, "architectures": [ARCHITECTURE]})
    except Exception as error:  # transformers checks fields with error classes of its own
        reason = " ".join(str(error).split())
        raise DraftsmithError(f"drafter {path}: cannot be read ({reason}); give a folder in z-lab's layout") from error


def check_fits(drafter: Qwen3Config, target: Any, where: str) -> None:
    """Refuse a drafter made for a target of another shape. Configs only, no weights."""
    ids, layers = drafter.dflash_config["target_layer_ids"], target.num_hidden_layers
    checks = [
        ("hidden_size", drafter.hidden_size, target.hidden_size),
        ("vocab_size", drafter.vocab_size, target.vocab_size),
        ("num_target_layers", getattr(drafter, "num_target_layers", layers), layers),
    ]
    drafter_rope, target_rope = (getattr(c, "rope_parameters", None) or {} for c in (drafter, target))
    if drafter_rope.get("rope_theta") and target_rope.get("rope_theta"):
        checks.append(("rope_theta", float(drafter_rope["rope_theta"]), float(target_rope["rope_theta"])))
        checks += [
            (f"rope_parameters.{field}", drafter_rope.get(field, usual), target_rope.get(field, usual))
            for field, usual in (("rope_type", "default"), ("factor", 1.0), ("partial_rotary_factor", 1.0))
        ]
    for field, has, needs in checks:
        if has != needs:
            raise DraftsmithError(
                f"drafter {where}: {field} is {has}, the target's is {needs}: it was made for another target; "
                "give a drafter of this target or leave sft.init_from out"
            )
    if len(set(ids)) < len(ids):
        raise DraftsmithError(
            f"drafter {where}: target_layer_ids {list(ids)} name a layer twice; ask for fewer num_target_features"
        )
    if not ids or min(ids) < 0 or max(ids) >= layers:
        raise DraftsmithError(f"drafter {where}: target_layer_ids {list(ids)} do not fit layers 0 … {layers - 1}")
    if not 0 <= drafter.dflash_config["mask_token_id"] < target.vocab_size:
        raise DraftsmithError(f"drafter {where}: mask_token_id lies outside the target's vocabulary; {MASK_ADVICE}")


def save(drafter: DFlashDrafter, folder: Path, dtype: torch.dtype) -> None:
    """Write config.json and model.safetensors, exactly the tensors that engines expect."""
    raw = drafter.config.to_dict()
    raw |= {
        "architectures": [ARCHITECTURE],
        "model_type": "qwen3",
        "block_size": drafter.block_size,
        "rope_theta": drafter.config.rope_parameters["rope_theta"],  # engines older than rope_parameters read this
        "dtype": str(dtype).removeprefix("torch."),
    }
    (folder / "config.json").write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n")
    tensors = {name: p.detach().to("cpu", dtype).contiguous() for name, p in drafter.named_parameters()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def load(folder: Path, target: Target, dtype: torch.dtype) -> DFlashDrafter:
    """Load a checkpoint for this target. Every tensor must be there, with its shape, and no other."""
    config = read_config(folder)
    check_fits(config, target.model.config, str(folder))
    path = folder / "model.safetensors"
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise DraftsmithError(f"drafter {path}: cannot be read ({error}); the file is missing or cut short") from error
    drafter = DFlashDrafter(config, target.embedding)
    expected = {name: tuple(p.shape) for name, p in drafter.named_parameters()}
    shared = expected.keys() & tensors.keys()
    for problem, names in (
        ("lacks tensor", expected.keys() - tensors.keys()),
        ("has the unknown tensor", tensors.keys() - expected.keys()),
        (
            "has the wrong shape for",
            {name for name in shared if tuple(tensors[name].shape) != expected[name]},
        ),
    ):
        if names:
            raise DraftsmithError(
                f"drafter {path}: {problem} {min(names)} ({len(names)} in all); expected z-lab's layout"
            )
    drafter.load_state_dict(tensors, strict=False)
    return drafter.to(device=target.device, dtype=dtype)
