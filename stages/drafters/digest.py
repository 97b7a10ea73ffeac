"""The digest that identifies a drafter. Standard library only: the plug-ins in servers compute it too."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

EAGLE3_LAYERS = "eagle_aux_hidden_state_layer_ids"  # in `eagle_config`; an export for vLLM has it at the top too
# Fields of config.json that do not distinguish drafters.
BOOKKEEPING = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "auto_map", "use_cache"}
BOOKKEEPING |= {"rope_theta", "rope_scaling"}  # older names of fields of `rope_parameters`
BOOKKEEPING |= {EAGLE3_LAYERS}
WEIGHTS_FILE = "model.safetensors"
DIGESTED = ("config.json", WEIGHTS_FILE, "frequent_tokens.npy")  # the files that its proposals depend on


def drafter_digest(folder: Path) -> str:
    """Return sha256 over name, zero byte and content of every file of `DIGESTED` in a checkpoint."""
    digest = hashlib.sha256()
    for name in DIGESTED:
        if (path := folder / name).exists():
            digest.update(name.encode() + b"\0")
            with path.open("rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
    return digest.hexdigest()


def content_digest(content: Mapping[str, bytes]) -> str:
    """Return the `drafter_digest` of files in memory. content: file contents by name."""
    digest = hashlib.sha256()
    for name in DIGESTED:
        if name in content:
            digest.update(name.encode() + b"\0" + content[name])
    return digest.hexdigest()


def served_digest(folder: Path) -> str:
    """Return the digest of the drafter that a server reads from a folder; for an export for vLLM, its source's."""
    config = json.loads((folder / "config.json").read_text())
    if "speculators_model_type" in config or EAGLE3_LAYERS in config:
        try:
            return str(json.loads((folder / "drafter.json").read_text())["parents"][-1])
        except (OSError, ValueError, LookupError):
            pass  # it was exported elsewhere
    return drafter_digest(folder)
