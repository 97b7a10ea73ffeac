"""Writes a native head into a copy of its target's checkpoint, where engines find it without a draft path."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.home import apply_user_umask
from draftsmith.stages.drafters import checkpoint_format
from draftsmith.stages.drafters.checkpoint import read_config
from draftsmith.stages.drafters.digest import WEIGHTS_FILE
from draftsmith.stages.drafters.mtp.families import ENGINE_FIELD, find_head
from draftsmith.stages.drafters.registry import KINDS

HEAD_FILE, INDEX_FILE = "model-mtp.safetensors", "model.safetensors.index.json"


def export_stitched(source: Path, target_model: Path, folder: Path) -> None:
    """Write a copy of the checkpoint in `target_model` with the head in `source`. Files that stay are hard links.

    The head's tensors replace those of the same name, in the dtype that they had. For a target without a head they
    are added: to its only file, or in a file of their own that the index names.

    Raises DraftsmithError for a drafter of another kind, a quantised head, and a new head of a quantised target.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kind, config = read_config(source)
    if not KINDS[kind].native:
        raise DraftsmithError(f"{source}: is a {kind}, and no part of a target's checkpoint. Export without --format.")
    head, tensors = find_head(target_model, config), checkpoint_format.read_tensors(source)
    original = json.loads((target_model / checkpoint_format.CONFIG_FILE).read_text())
    if head is None and original.get("quantization_config"):
        raise DraftsmithError(
            f"{target_model}: is quantised and has no MTP head, so engines would read a new one as quantised. Export "
            "without --format, and serve the folder as the draft model."
        )
    index_path, written = target_model / INDEX_FILE, set[str]()
    files = dict(head.files) if head is not None else {}
    added = HEAD_FILE if index_path.is_file() else WEIGHTS_FILE
    for name in sorted({files[name].name if name in files else added for name in tensors}):
        content = load_file(target_model / name) if (target_model / name).exists() else {}
        for part, tensor in tensors.items():
            if (files[part].name if part in files else added) == name:
                content[part] = tensor.to(content[part].dtype) if part in content else tensor
        save_file(content, folder / name, metadata={"format": "pt"})
        written.add(name)
    if head is None and index_path.is_file():
        index = json.loads(index_path.read_text())
        index["weight_map"] |= dict.fromkeys(tensors, HEAD_FILE)
        total = index.get("metadata", {}).get("total_size", 0) + sum(tensor.nbytes for tensor in tensors.values())
        index["metadata"] = index.get("metadata", {}) | {"total_size": total}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
        written.add(INDEX_FILE)
    if head is None:  # the drafter's says that there is one
        raw = json.loads((source / checkpoint_format.CONFIG_FILE).read_text())
        fields = {name: value for name, value in raw.items() if name not in ("block_size", ENGINE_FIELD)}
        (folder / checkpoint_format.CONFIG_FILE).write_text(json.dumps(fields, indent=2) + "\n")
        written.add(checkpoint_format.CONFIG_FILE)
    apply_user_umask(folder)  # before the links, which share their permissions with the target's files
    for file in target_model.iterdir():
        if file.is_file() and file.name not in written:
            _link(file.resolve(), folder / file.name)  # a hub's snapshot has symbolic links


def _link(file: Path, to: Path) -> None:
    """Make a hard link, or a copy on another disk."""
    try:
        os.link(file, to)
    except OSError:
        shutil.copyfile(file, to)
