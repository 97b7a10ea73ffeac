"""The digest that identifies a drafter. Standard library only: the plug-in in SGLang's servers computes it too."""

from __future__ import annotations

import hashlib
from pathlib import Path

DIGESTED = ("config.json", "model.safetensors", "frequent_tokens.npy")  # the files that its proposals depend on


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
