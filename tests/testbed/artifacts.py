"""Commits artifacts to a store without running a stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from draftsmith.artifacts.store.local import Claim, Store
from draftsmith.artifacts.store.manifest import ArtifactRef, Provenance

Fill = Mapping[str, str] | Callable[[Path], object]


def committed(
    store: Store, stage: str, fill: Fill, key: str = "ab", *, force: bool = False, **fields: Any
) -> ArtifactRef:
    """Return the artifact of a key.

    fill: its files, or what writes them to a folder. key: of 64 characters, or repeated to so many. fields: of the
    manifest.
    """
    with store.claim(stage, (key * 64)[:64], force=force) as claim:
        assert isinstance(claim, Claim)
        if callable(fill):
            fill(claim.out)
        else:
            for name, text in fill.items():
                (claim.out / name).parent.mkdir(parents=True, exist_ok=True)
                (claim.out / name).write_text(text)
        measured = {name: fields.pop(name) for name in ("metrics", "volatile") if name in fields}
        usual: dict[str, Any] = {"config": {}, "inputs": {}, "code_digest": "c", "seed": 0}
        return store.commit(claim, Provenance(**(usual | fields)), **measured)
