"""Versions of a model line: the registry, a version's tags, and its files in this home."""

from __future__ import annotations

import logging
import os
import shutil
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.home import UPLOADED, home
from draftsmith.artifacts.identifiers import sha256_digest
from draftsmith.artifacts.store.local import REPLACED, Store
from draftsmith.artifacts.store.manifest import MANIFEST, Artifact, InputEntry, read_manifest
from draftsmith.artifacts.store.mirror import open_store
from draftsmith.artifacts.tracking.registry import Registry, Version
from draftsmith.artifacts.tracking.runs import Tracking
from draftsmith.stages.data.trajectories import DRAFTER_FOLDER
from draftsmith.stages.drafters.digest import drafter_digest

log = logging.getLogger(__name__)

FASTEST_BLOCK = "fastest_block"  # tag: the block size that decoded fastest, anchor included
STEP_COSTS = "step_costs"  # tag: seconds of drafting by requests in flight, and of verifying by tokens
SCHEDULE = "schedule"  # tag: proposals by requests in flight, [[fewest, most, proposals], …]
CONFIDENCE = "confidence"  # tag: the calibration of a confidence head
BLOCK_SIZE = "drafting.block_size"  # one of the settings that metrics were measured with
KIND = "kind"  # tag: of the drafter
REFRESHED_AT = "refreshed_at"  # tag: when a refresh last ended with this version
MEASURED_WITH = "measured_with"  # tag: the settings that tau depends on
SHARES, BY, SUFFIXES = "heldout_shares", "heldout_by", "suffixes"  # tags: which prompts may have measured it


def registry() -> Registry:
    """Return the registry of this home's MLflow, or of `MLFLOW_TRACKING_URI`."""
    return Registry(Tracking(home()))


def artifact_folder(version: Version) -> Path:
    """Return the folder of a version's artifact, fetched if the store is a bucket."""
    store = open_store(home())
    return store.localize(find_artifact(version, store) or version.path)


def find_artifact(version: Version | InputEntry, store: Store) -> Path | None:
    """Return the folder in this home with the version's content; None if there is none.

    The path that a version states is outdated if the home was moved or copied, or if the same key was made again.
    """
    current = store.path(version.stage, version.key)
    for folder in (current, *current.parent.glob(f"{REPLACED}{current.name}-*")):
        with suppress(DraftsmithError):  # damaged: there may be another copy, or an upload
            if (folder / MANIFEST).is_file() and read_manifest(folder).content_id == version.content_id:
                return folder
    return None


def drafter_checkpoint(version: Version) -> Path:
    """Return the checkpoint of a version's drafter: from the store, or else its upload if there is one.

    Only a version with an upload is checked for damage, since no other has a copy to fall back to. A plan calls this,
    so files that were not touched since their last check are not read again.
    """
    store = open_store(home())
    if (folder := find_artifact(version, store)) is not None:
        try:
            if version.uploaded:
                store.verify_once(Artifact(folder, read_manifest(folder)), and_elsewhere=False)
        except DraftsmithError as damage:
            log.warning("%s: %s Using the uploaded copy.", version, damage)
            return download_upload(version)
        return folder / DRAFTER_FOLDER
    checkpoint = version.path / DRAFTER_FOLDER
    if not version.uploaded or checkpoint.is_dir():
        return checkpoint
    if store.manifest_at(version.stage, version.key) is not None:  # in a bucket, or replaced under the same key
        return artifact_folder(version) / DRAFTER_FOLDER
    return download_upload(version)


def download_upload(version: Version) -> Path:
    """Return this home's copy of a version's upload. Raises DraftsmithError if it is not what was registered."""
    expected = sha256_digest(version.tags.get("drafter_digest"), where=f"{version}: tag draftsmith.drafter_digest")
    folder = home() / UPLOADED / expected[:16] / DRAFTER_FOLDER
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".tmp-", dir=folder.parent) as scratch:
            copy = registry().download(version, Path(scratch))
            with suppress(OSError):  # another process was faster
                copy.rename(folder)
        if not folder.is_dir():
            raise DraftsmithError(f"{folder}: cannot be written. Check the disk.")
    if drafter_digest(folder) != expected:
        shutil.rmtree(folder)
        raise DraftsmithError(
            f"{version}: the copy in MLflow's artifact store is not what was registered. Run the same command again, "
            "or mount the store."
        )
    with suppress(OSError):  # the home may be read-only
        os.utime(folder.parent)  # `draftsmith prune` keeps recently used copies
    return folder
