"""Drafter checkpoints: the engine's files of the architecture, beside them `drafter.json` with where it comes from."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from artifacts.errors import DraftsmithError
from stages.drafters.base import Drafter, DrafterInfo
from stages.drafters.config import DFlashConfig
from stages.drafters.dflash import checkpoint as dflash
from stages.drafters.dflash.model import DFlashDrafter
from stages.targets.causal_lm import Target

INFO_FILE, TOKENS_FILE = "drafter.json", "frequent_tokens.npy"


def create_drafter(shape: DFlashConfig, target: Target, seed: int) -> Drafter:
    """A new drafter with seeded random weights, float32."""
    return dflash.create(shape, target, seed)


def save_drafter(drafter: Drafter, folder: Path, dtype: torch.dtype) -> None:
    """Write the checkpoint in the layout that engines load, in the dtype that they serve."""
    assert isinstance(drafter, DFlashDrafter)
    folder.mkdir(parents=True, exist_ok=True)
    dflash.save(drafter, folder, dtype)
    if drafter.frequent_tokens is not None:
        np.save(folder / TOKENS_FILE, drafter.frequent_tokens.cpu().numpy().astype(np.int32))
    write_info(folder, drafter.info)


def write_info(folder: Path, info: DrafterInfo) -> None:
    """Write drafter.json beside the weights."""
    record = {"digest": drafter_digest(folder), **asdict(info)}
    (folder / INFO_FILE).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")


def load_drafter(folder: Path, target: Target, dtype: torch.dtype | None = None) -> Drafter:
    """Load a checkpoint (ours, or any in z-lab's layout) for this target, in `dtype` (default: the target's)."""
    check_drafter(folder, target.info.digest)
    drafter = dflash.load(folder, target, dtype or target.dtype)
    drafter.info = read_info(folder)
    if (tokens := folder / TOKENS_FILE).exists():
        try:
            drafter.frequent_tokens = torch.from_numpy(np.load(tokens).astype(np.int64)).to(target.device)
        except (OSError, ValueError, EOFError) as error:
            raise DraftsmithError(f"drafter {tokens}: cannot be read ({error}); it is cut short or damaged") from error
    return drafter.eval()


def read_info(folder: Path) -> DrafterInfo:
    """drafter.json, or an empty record for a checkpoint made elsewhere. Raises DraftsmithError if it is damaged."""
    if not (path := folder / INFO_FILE).exists():
        return DrafterInfo()
    try:
        raw = json.loads(path.read_text())
        raw.pop("digest", None)
        return DrafterInfo(**{**raw, "parents": tuple(raw.get("parents", ()))})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DraftsmithError(
            f"drafter {path}: cannot be read ({error}); remove it to use the checkpoint without its record"
        ) from error


def check_drafter(folder: Path, target_digest: str) -> None:
    """Refuse a drafter trained for another revision of the target. Reads JSON only."""
    made_for = read_info(folder).target_digest
    if made_for and made_for != target_digest:
        raise DraftsmithError(
            f"drafter {folder / INFO_FILE}: made for the target {made_for[:12]}, this target is {target_digest[:12]}; "
            "give a drafter of this target, or remove target_digest from that file to continue from it knowingly"
        )


def drafter_digest(folder: Path) -> str:
    """sha256 over the files that decide what the drafter proposes."""
    digest = hashlib.sha256()
    for name in ("config.json", "model.safetensors", TOKENS_FILE):
        if (path := folder / name).exists():
            digest.update(name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def drafter_source(source: str) -> Path:
    """A local folder, or a hub id downloaded once. Raises DraftsmithError if neither can be had."""
    if (folder := Path(source).expanduser()).is_dir():
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors", "*.npy"]))
    except Exception as error:  # the hub library raises many kinds, all meaning: not there or not reachable
        raise DraftsmithError(
            f"sft.init_from: {source!r} is no folder and cannot be fetched from the hub ({type(error).__name__}); "
            "give an existing folder or hub id"
        ) from error


def check_shape(folder: Path, target_model: Path) -> None:
    """Refuse a drafter whose config does not fit the target's. Configs only."""
    from transformers import AutoConfig

    target_config = AutoConfig.from_pretrained(target_model, local_files_only=True)
    dflash.check_fits(dflash.read_config(folder), target_config, str(folder))


def check_new(shape: DFlashConfig, target_model: Path) -> None:
    """Refuse a shape that does not fit the target: layer ids, mask token. Config and tokenizer only."""
    from transformers import AutoConfig, AutoTokenizer

    target_config = AutoConfig.from_pretrained(target_model, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(target_model, local_files_only=True)
    config = dflash.new_config(shape, target_config, dflash.mask_token_id(tokenizer, shape.mask_token))
    dflash.check_fits(config, target_config, "sft.drafter")
