"""What is known of a target without its weights: config, tokenizer and generation config, as a target artifact."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from draftsmith.artifacts.errors import DraftsmithError, one_line
from draftsmith.stages.target.config import TargetConfig
from draftsmith.stages.target.hub import hub_snapshot
from draftsmith.stages.target.info import TargetInfo, write_target_info
from draftsmith.stages.target.resolve import describe_metadata
from draftsmith.stages.target.source import check_weights, gguf_file, model_folder, source_kind


class UnreachableError(DraftsmithError):
    """The hub cannot be asked and its cache has nothing: not known to be wrong, only not checked."""


def fetch_metadata(source: str, revision: str | None, field: str) -> Path:
    """The small files of a hub repository, in the hub's own cache; never its weights.

    Raises UnreachableError without network and cache, DraftsmithError if the hub does not have it. `field`: the
    config's, for the error.
    """
    patterns = ["*.json", "*.jinja", "*.txt", "*.model"]
    return hub_snapshot(field, source, revision, patterns, unreached=UnreachableError)


def metadata_artifact(config: TargetConfig, out: Path) -> TargetInfo:
    """Write a `target.json` without the digest into `out`: enough for the preflight of every stage.

    A folder's weights are checked for being whole (headers only); those of the hub are not fetched. Of a GGUF file the
    config and the tokenizer are written to `out/model`.
    """
    kind, revision = source_kind(config.source), None
    if kind == "hub":
        folder = fetch_metadata(config.source, config.revision, "target.source")
        location, revision = os.fspath(folder), folder.name
    elif kind == "folder":
        folder = model_folder(config.source)
        location = os.fspath(folder)
        check_weights(folder)
    else:
        folder, location = out / "model", "model"
        _extract_gguf(gguf_file(config.source), folder)
    info = describe_metadata(folder, config, kind=kind, location=location, revision=revision)
    write_target_info(info, out)
    return info


def _extract_gguf(source: Path, folder: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    def read(load: Callable[..., object]) -> object:
        try:
            return load(source.parent, gguf_file=source.name, local_files_only=True)
        except Exception as error:  # of gguf, transformers and tokenizers
            raise DraftsmithError(
                f"{source}: transformers cannot read this GGUF model ({one_line(error)}): give the model's folder "
                "instead"
            ) from error

    for part in (read(AutoConfig.from_pretrained), read(AutoTokenizer.from_pretrained)):
        part.save_pretrained(folder)  # type: ignore[attr-defined]
    config = folder / "config.json"
    if '"architectures"' not in config.read_text(encoding="utf-8"):
        _name_architecture(config)


def _name_architecture(path: Path) -> None:
    """What the file does not say: the causal LM of its model type."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    raw = json.loads(path.read_text(encoding="utf-8"))
    raw["architectures"] = [CAUSAL.get(raw["model_type"], "")]
    path.write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
