"""Ways to damage a checkpoint's folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Edit = Callable[[Path], None]


def edit_config(change: Callable[[dict[str, Any]], object]) -> Edit:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    return edit


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Edit:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return edit


def write(name: str, content: str) -> Edit:
    def edit(folder: Path) -> None:
        (folder / name).write_text(content)

    return edit


def cut(name: str) -> Edit:
    def edit(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:-40])

    return edit


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
