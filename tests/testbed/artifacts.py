"""Commits artifacts to a store without running a stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from draftsmith.artifacts.store.attempt import Attempt
from draftsmith.artifacts.store.local import Store
from draftsmith.artifacts.store.manifest import Artifact, InputEntry, Manifest, PendingManifest

Fill = Mapping[str, str] | Callable[[Path], object]


def committed(store: Store, stage: str, fill: Fill, key: str = "ab", *, force: bool = False, **fields: Any) -> Artifact:
    """Return the artifact of a key.

    fill: its files, or what writes them to a folder. key: 64 characters, or fewer, which are repeated. fields: of the
    manifest.
    """
    with store.claim(stage, (key * 64)[:64], force=force) as claim:
        assert isinstance(claim, Attempt)
        if callable(fill):
            fill(claim.out)
        else:
            for name, text in fill.items():
                (claim.out / name).parent.mkdir(parents=True, exist_ok=True)
                (claim.out / name).write_text(text)
        return claim.commit(made_from(claim, **fields))


def made_from(claim: Attempt, inputs: Mapping[str, Artifact] = {}, **fields: Any) -> PendingManifest:
    """Return what a claimed artifact is made from. fields: of the manifest, if they matter."""
    entries = {name: InputEntry.of(made) for name, made in inputs.items()}
    usual: dict[str, Any] = {"config": {}, "code_digest": "c", "seed": 0}
    return PendingManifest(stage=claim.stage, key=claim.key, inputs=entries, **(usual | fields))


def fake_artifact(stage: str, key: str, content_id: str, path: Path) -> Artifact:
    """Return an artifact that no store has."""
    given: dict[str, Any] = {
        "stage": stage,
        "key": key,
        "content_id": content_id,
        "files": {},
        "inputs": {},
        "metrics": {},
    }
    return Artifact(path, Manifest.model_construct(**given, created_at="2026-03-02", mlflow_run_id=None))
