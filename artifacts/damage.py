"""An artifact that is not what was written: how that is said, and what to do about it."""

from __future__ import annotations

from pathlib import Path

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.manifest import MANIFEST, Manifest, content_id, read_manifest

SHARD = ".shard"  # end of the name of a stage whose artifacts are parts of another's


def whole_manifest(folder: Path, stage: str) -> Manifest:
    """The manifest of a folder, whose files are those that its content id is of. Raises DraftsmithError."""
    try:
        manifest = read_manifest(folder)
    except DraftsmithError as error:
        raise DraftsmithError(f"{error}: {remedy(stage)}") from error
    check_content(manifest, folder / MANIFEST)
    return manifest


def check_content(manifest: Manifest, where: Path | str) -> None:
    """Raises DraftsmithError if a manifest's content id does not follow from its files."""
    if content_id(manifest.files) != manifest.content_id:
        raise damaged(where, manifest.stage, "its content id does not follow from its files")


def remedy(stage: str) -> str:
    return f"make it again: add `--force {stage.removesuffix(SHARD)}` to the command"


def damaged(where: Path | str, stage: str, what: str) -> DraftsmithError:
    """The error that names a file and says what is wrong with it, and how its artifact is made again."""
    return DraftsmithError(f"{where}: {what}; {remedy(stage)}")
