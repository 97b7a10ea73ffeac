"""What a resolved target is: `target.json` and `origin.json` of its artifact, the folder of its model, its digests."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from draftsmith.artifacts.atomic import write_text
from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.target.config import Dtype
from draftsmith.stages.target.logit_map import LogitMap
from draftsmith.stages.target.source import TOKENIZER_PARTS, Kind

INFO_FILE = "target.json"
# Where the model is and came from: no part of the artifact's content, so that a model that moves makes nothing anew.
ORIGIN_FILE = "origin.json"
_ORIGIN = {"source", "kind", "location", "revision"}
# Fields of config.json that say where a copy came from, not what it computes.
_PROVENANCE = ("transformers_version", "_name_or_path", "_model_name_or_path")


class TargetInfo(BaseModel):
    """What the other stages need to know of the target without loading it."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    source: str
    kind: Kind
    location: str  # "model" inside the artifact, or an absolute path
    revision: str | None  # the hub's commit
    dtype: Dtype  # serving dtype
    digest: str  # sha256 over config and weights: what a drafter is made for
    tokenizer_digest: str  # sha256 over tokenizer, chat template and generation config
    architecture: str
    model_type: str
    vocab_size: int  # rows of the embedding; may exceed the tokenizer's size
    hidden_size: int
    num_layers: int
    max_positions: int
    eos_ids: list[int]  # every id that ends an answer, the generation config's first
    mask_candidates: list[int]  # ids that no text uses, best first: for the drafter's mask token
    chat_template: bool
    tied_embeddings: bool
    # what can be done with it
    layer_kinds: list[str] = Field(default_factory=lambda: ["full_attention"])  # each once
    rewindable: bool = True  # can its cache forget what was rejected? Else states are read again
    tree_forward: bool = True  # can one forward follow several continuations? Else each has its own
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    quantisation: str | None = None  # of the weights that are loaded

    @property
    def logit_map(self) -> LogitMap:
        """From the products of its head to its logits."""
        return LogitMap(self.logit_scale, self.logit_softcap)


def read_target_info(folder: Path) -> TargetInfo:
    """The `target.json` and `origin.json` of a complete target artifact."""
    files = f"{folder / INFO_FILE}, {ORIGIN_FILE}"
    try:
        parts = [dict(json.loads((folder / name).read_text(encoding="utf-8"))) for name in (INFO_FILE, ORIGIN_FILE)]
        return TargetInfo.model_validate(parts[0] | parts[1])
    except FileNotFoundError as error:
        missing = Path(error.filename).name
        raise DraftsmithError(f"{folder} has no {missing}: give the folder of a target artifact") from None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise DraftsmithError(f"{files}: {field} {first['msg']}: run the target stage again with --force") from error
    except (ValueError, TypeError) as error:
        raise DraftsmithError(f"{files}: not JSON objects: run the target stage again with --force") from error


def write_target_info(info: TargetInfo, out: Path) -> None:
    """Write `target.json`, last, and `origin.json`."""
    write_text(out / ORIGIN_FILE, info.model_dump_json(indent=2, include=_ORIGIN) + "\n")
    write_text(out / INFO_FILE, info.model_dump_json(indent=2, exclude=_ORIGIN) + "\n")


def model_path(folder: Path) -> Path:
    """The folder that transformers loads, for a complete target artifact. Raises if a linked model has gone."""
    path = folder / read_target_info(folder).location  # an absolute location replaces the folder
    if not (path / "config.json").is_file():
        raise DraftsmithError(f"{path}: the target's model is gone: put it back, or run the target stage with --force")
    return path


def model_digest(folder: Path, weights: list[Path]) -> str:
    """sha256 over the config (without provenance) and the bytes of the weights."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for name in _PROVENANCE:
        config.pop(name, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for path in weights:
        digest.update(f"\0{path.name}\0".encode())
        _update(digest, path)
    return digest.hexdigest()


def tokenizer_digest(folder: Path) -> str:
    """sha256 over the files that decide token ids, prompts and where answers end."""
    digest = hashlib.sha256()
    for name in sorted(TOKENIZER_PARTS):
        if (folder / name).is_file():
            digest.update(f"\0{name}\0".encode())
            _update(digest, folder / name)
    return digest.hexdigest()


def _update(digest: Any, path: Path) -> None:
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
