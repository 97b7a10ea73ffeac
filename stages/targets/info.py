"""A resolved target: `target.json` and `origin.json` of its artifact, its logit map, folder, tokenizer and digests."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from draftsmith.artifacts.atomic import write_text
from draftsmith.artifacts.errors import DraftsmithError, one_line
from draftsmith.stages.targets.config import TOKENIZER_FILES, TOKENIZER_PARTS, Dtype, Kind

if TYPE_CHECKING:
    import torch

INFO_FILE = "target.json"
# The model's place and source: not in the artifact's content id, so that moving a model makes nothing again.
ORIGIN_FILE = "origin.json"
_ORIGIN = {"source", "kind", "location", "revision"}
# Fields of config.json about the origin of a copy, not about what it computes.
_PROVENANCE = ("transformers_version", "_name_or_path", "_model_name_or_path")


@dataclass(frozen=True)
class LogitMap:
    """The map from the products of a target's head to its logits.

    logit = cap · tanh(scale · x / cap) / temperature of a product x of the head with a hidden state.
    Without a cap it is scale · x / temperature.
    """

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    @property
    def is_identity(self) -> bool:
        """Return whether the products are the logits."""
        return self.scale == self.temperature == 1.0 and self.softcap is None

    def with_temperature(self, temperature: float) -> LogitMap:
        """Return the map to the logits that are sampled from at a temperature above 0."""
        return replace(self, temperature=self.temperature * temperature)

    def __call__(self, products: torch.Tensor) -> torch.Tensor:
        """Map products of any shape; the result is a new tensor unless this is the identity."""
        scaled = products if self.scale == 1.0 else products * self.scale
        logits = scaled if self.softcap is None else (scaled / self.softcap).tanh() * self.softcap
        return logits if self.temperature == 1.0 else logits / self.temperature


IDENTITY = LogitMap()


class TargetInfo(BaseModel):
    """Facts about a target, for stages that do not load it."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    source: str
    kind: Kind
    location: str  # "model" inside the artifact, or an absolute path
    revision: str | None  # the hub's commit
    dtype: Dtype  # serving dtype
    digest: str  # sha256 over config and weights: identifies the target of a drafter
    tokenizer_digest: str  # sha256 over tokenizer, chat template and generation config
    architecture: str
    model_type: str
    vocab_size: int  # rows of the embedding; may exceed the tokenizer's size
    hidden_size: int
    num_layers: int
    max_positions: int
    eos_ids: list[int]  # ids that end an answer, the generation config's first
    mask_candidates: list[int]  # ids that no text contains, best first: for the drafter's mask token
    chat_template: bool
    tied_embeddings: bool
    layer_kinds: list[str] = Field(default_factory=lambda: ["full_attention"])  # each once
    rewindable: bool = True  # its cache can drop rejected tokens; otherwise committed ones are read again
    tree_forward: bool = True  # one forward can follow several continuations
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    quantisation: str | None = None  # quantisation method of the checkpoint's weights

    @property
    def logit_map(self) -> LogitMap:
        """Return the map from the products of the head to the logits."""
        return LogitMap(self.logit_scale, self.logit_softcap)


def read_target_info(folder: Path) -> TargetInfo:
    """Read `target.json` and `origin.json` of a complete target artifact."""
    files = f"{folder / INFO_FILE}, {ORIGIN_FILE}"
    try:
        parts = [dict(json.loads((folder / name).read_text(encoding="utf-8"))) for name in (INFO_FILE, ORIGIN_FILE)]
        return TargetInfo.model_validate(parts[0] | parts[1])
    except FileNotFoundError as error:
        missing = Path(error.filename).name
        raise DraftsmithError(f"{folder} has no {missing}. Use the folder of a target artifact.") from None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise DraftsmithError(f"{files}: {field} {first['msg']}. Run the target stage again with --force.") from error
    except (ValueError, TypeError) as error:
        raise DraftsmithError(f"{files}: not JSON objects. Run the target stage again with --force.") from error


def write_target_info(info: TargetInfo, out: Path) -> None:
    write_text(out / ORIGIN_FILE, info.model_dump_json(indent=2, include=_ORIGIN) + "\n")
    write_text(out / INFO_FILE, info.model_dump_json(indent=2, exclude=_ORIGIN) + "\n")


def model_path(folder: Path) -> Path:
    """Return the model folder of a complete target artifact. Raises DraftsmithError if the model is gone."""
    path = folder / read_target_info(folder).location  # an absolute location replaces the folder
    if not (path / "config.json").is_file():
        raise DraftsmithError(f"{path}: the target's model is gone. Restore it, or run the target stage with --force.")
    return path


def load_tokenizer(folder: Path) -> Any:
    """Return the tokenizer of a model folder. Raises DraftsmithError if there is none or it cannot be read."""
    from transformers import AutoTokenizer  # imports torch, and planning imports this module

    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise DraftsmithError(
            f"{folder}: no tokenizer ({TOKENIZER_FILES[0]} is missing). Copy the model's tokenizer there."
        )
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception on a damaged file
        raise DraftsmithError(f"{folder}: the tokenizer cannot be read ({one_line(error)}). Copy it again.") from error


def model_digest(folder: Path, weights: list[Path]) -> str:
    """Return the sha256 over the config (without its origin) and the bytes of the weights."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for name in _PROVENANCE:
        config.pop(name, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for path in weights:
        digest.update(f"\0{path.name}\0".encode())
        _update(digest, path)
    return digest.hexdigest()


def tokenizer_digest(folder: Path) -> str:
    """Return the sha256 over the files that decide token ids, prompts and the end of answers."""
    digest = hashlib.sha256()
    for name in sorted(TOKENIZER_PARTS):
        if (folder / name).is_file():
            digest.update(f"\0{name}\0".encode())
            _update(digest, folder / name)
    return digest.hexdigest()


def _update(digest: Any, path: Path) -> None:
    with path.open("rb") as file:
        hashlib.file_digest(file, lambda: digest)
