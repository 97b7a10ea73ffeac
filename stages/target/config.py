"""Config section `target`: the model that drafts are made for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from draftsmith.stages.runtime.stage import Config
from draftsmith.stages.target.source import adapter_files, source_files

Dtype = Literal["bfloat16", "float32", "float16"]
BASE = "base"  # in place of an adapter's name: the target alone


def _adapter_name(name: str) -> str:
    if name == BASE or not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise ValueError(f"{name!r} is no adapter's name. Use letters, digits, `-`, `_` and `.`, and not `{BASE}`.")
    return name


class TargetConfig(Config):
    """The frozen causal LM that the drafter is matched to. Code that a model ships with itself is never run."""

    source: str = Field(
        description="hub id (Qwen/Qwen3-4B), local folder, path to a .gguf file, or package:NAME "
        "(the one .gguf file inside an installed Python package)"
    )
    revision: str | None = Field(
        default=None,
        description="hub only: commit, tag or branch; a branch is resolved once, then reused until --force target",
    )
    dtype: Dtype = Field(default="bfloat16", description="serving dtype; a GGUF file is dequantised to it")
    adapters: dict[Annotated[str, AfterValidator(_adapter_name)], str] = Field(
        default={},
        description="LoRA adapters that the target is served with, name: folder in peft's format. One drafter is made "
        "for all; each row of prompts and logs has one (configs/own-logs.md)",
    )

    @field_validator("source")
    @classmethod
    def _source_is_named(cls, source: str) -> str:
        source = source.strip()
        if source in ("", "package:"):
            raise ValueError("is empty. Give a hub id, a folder, a .gguf file or package:NAME.")
        return source

    @model_validator(mode="after")
    def _revision_is_of_a_hub_model(self) -> Self:
        if self.revision is not None and (self.source.startswith("package:") or self.source.endswith(".gguf")):
            raise ValueError("revision is for models of the hub. Remove it for a package or a .gguf file.")
        return self

    def external_files(self) -> list[Path]:
        """Return the files outside the store that this config reads; their content is part of the cache key.

        Those of a model of the hub are identified by its revision. Raises DraftsmithError if a file does not exist.
        """
        adapters = [file for name, folder in self.adapters.items() for file in adapter_files(name, folder)]
        return source_files(self.source) + adapters
