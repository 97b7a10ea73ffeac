"""Valid checkpoints of random weights, and ways to damage their folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from draftsmith.stages.drafters.base import Drafter, DrafterInfo
from draftsmith.stages.drafters.checkpoint import save_drafter
from draftsmith.stages.targets.causal_lm import Target

Edit = Callable[[Path], object]


def save(drafter: Drafter, target: Target, folder: Path) -> Path:
    """Write a whole checkpoint to `folder`: weights, frequent tokens, and a record of its training."""
    drafter.frequent_tokens = torch.arange(target.info.vocab_size).flip(0)
    drafter.info = DrafterInfo(target.info.digest, "here", ("a", "b"), {"stage": "sft", "steps": 3})
    save_drafter(drafter, folder, torch.float32)
    return folder


def edit_config(change: Callable[[dict[str, Any]], object]) -> Edit:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    return edit


def setting(**fields: Any) -> Edit:
    return set_fields("config.json", **fields)


def within(place: str, **fields: Any) -> Edit:
    """Return an edit of an object of the config."""
    return edit_config(lambda config: config[place].update(fields))


def without(*fields: str) -> Edit:
    """Return an edit that removes fields of the config, or `place.field` of an object of it."""

    def change(config: dict[str, Any]) -> None:
        for place, _, name in (field.rpartition(".") for field in fields):
            (config[place] if place else config).pop(name)

    return edit_config(change)


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Edit:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return edit


def write(name: str, content: str) -> Edit:
    return lambda folder: (folder / name).write_text(content)


def cut(name: str) -> Edit:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-40])


def remove(name: str) -> Edit:
    return lambda folder: (folder / name).unlink()


def set_fields(name: str, **fields: Any) -> Edit:
    """Set fields of a JSON file."""

    def edit(folder: Path) -> None:
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | fields))

    return edit


# of a DFlash drafter
with_another_mask = edit_config(lambda config: config["dflash_config"].update(mask_token_id=0))
without_a_layer = edit_tensors(lambda tensors: tensors.pop(min(name for name in tensors if "layers." in name)))
