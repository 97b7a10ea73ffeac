"""Writes a target artifact without the weights, from config, tokenizer and generation config: enough for `check`."""

from __future__ import annotations

import os
from pathlib import Path

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.target.config import TargetConfig
from draftsmith.stages.target.hub import hub_snapshot
from draftsmith.stages.target.info import TargetInfo, write_target_info
from draftsmith.stages.target.source import check_weights, gguf_file, model_folder, source_kind


class HubUnreachableError(DraftsmithError):
    """The hub cannot be reached and its cache has no copy: the source could not be checked."""


def fetch_metadata(source: str, revision: str | None, field: str) -> Path:
    """Return the folder with the small files of a hub repository, never its weights, in the hub's own cache.

    field: of the config, for the error. Raises HubUnreachableError without network and cache, DraftsmithError if the
    hub does not have the repository.
    """
    patterns = ["*.json", "*.jinja", "*.txt", "*.model"]
    return hub_snapshot(field, source, revision, patterns, unreached=HubUnreachableError)


def metadata_artifact(config: TargetConfig, out: Path) -> TargetInfo:
    """Write a `target.json` without the digest to `out`: enough for the preflight of every stage.

    A folder's weights are checked for completeness (headers only); those of the hub are not fetched. Config and
    tokenizer of a GGUF file are written to `out/model`.
    """
    # These import torch, and planning imports this module.
    from draftsmith.stages.target.describe import describe_metadata
    from draftsmith.stages.target.gguf_model import extract_metadata

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
        extract_metadata(gguf_file(config.source), folder)
    info = describe_metadata(folder, config, kind=kind, location=location, revision=revision)
    write_target_info(info, out)
    return info
