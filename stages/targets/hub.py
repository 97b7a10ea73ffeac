"""Access to the hub: snapshots, commits of branches, checks of cached files, and errors with their remedy."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import huggingface_hub  # loads its parts when they are used, so planning may import it
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from draftsmith.artifacts.atomic import write_text
from draftsmith.artifacts.errors import DraftsmithError, RetryableError, find_disk_error, one_line

_COMMIT = re.compile(r"[0-9a-f]{40}")
_ASK_TIMEOUT_S = 10.0


def is_hub_refusal(error: Exception) -> bool:
    """Return whether the hub refused, or the id is malformed; if not, the hub was unreachable, and a retry may help."""
    if not isinstance(error, HfHubHTTPError) or isinstance(error, LocalEntryNotFoundError):
        return isinstance(error, HFValidationError)
    status = getattr(error.response, "status_code", None)
    return status is None or (status < 500 and status != 429)  # otherwise it is busy or fails


def hub_advice(error: Exception, revision: str | None) -> str:
    """Return cause and remedy of a hub error, as text after a field's name. revision: the requested one."""
    if isinstance(error, GatedRepoError):  # a subclass of RepositoryNotFoundError
        return "access is restricted. Accept its terms on the hub and set HF_TOKEN."
    if isinstance(error, RepositoryNotFoundError):
        return "no such folder here and no such model on the hub. Check the name, or set HF_TOKEN if it is private."
    if isinstance(error, RevisionNotFoundError):
        return f"the hub has no revision {revision}. Correct it."
    if isinstance(error, HFValidationError):
        return "neither an existing folder nor a hub id. Check the name."
    if not is_hub_refusal(error):
        return (
            f"not a folder here, not in the hub's cache, and no network to the hub ({one_line(error, 99)}). Connect, "
            "or use a local folder."
        )
    return f"the hub answered: {one_line(error)}. Try again, or use a local folder."


def hub_snapshot(
    field: str,
    repo: str,
    revision: str | None,
    allow: list[str],
    ignore: list[str] | None = None,
    unreached: type[DraftsmithError] | None = None,
) -> Path:
    """Return the folder of a hub repository's files in the hub's own cache; no network is needed if they are cached.

    field: the config field, for the error. allow, ignore: patterns of file names. Raises DraftsmithError if the hub
    does not have them, and `unreached` if it cannot be reached (by default RetryableError, in offline mode
    DraftsmithError).
    """
    try:
        return Path(
            huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=allow, ignore_patterns=ignore)
        )
    except Exception as error:  # the hub's library raises its HTTP client's own errors too
        if find_disk_error(error) is not None:
            raise
        unreached = unreached or (DraftsmithError if constants.HF_HUB_OFFLINE else RetryableError)
        kind = DraftsmithError if is_hub_refusal(error) else unreached
        raise kind(f"{field} {repo}: {hub_advice(error, revision)}") from error


def hub_commit(repo: str, revision: str | None, kind: Literal["model", "dataset"] = "model") -> str | None:
    """Return the commit of a branch or tag of a hub repository; None if neither cache nor hub knows it.

    The cache takes precedence until the branch is fetched again, so that a continued run keeps its commit.
    """
    from huggingface_hub.file_download import repo_folder_name  # 0.4 s, and planning imports this module

    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    try:
        folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type=kind)
    except HFValidationError:  # not a hub id: fetching it reports that
        return None
    reference = folder / "refs" / (revision or constants.DEFAULT_REVISION)
    if reference.is_file():
        return reference.read_text(encoding="utf-8").strip()
    if constants.HF_HUB_OFFLINE:
        return None
    try:
        commit = huggingface_hub.HfApi().repo_info(repo, repo_type=kind, revision=revision, timeout=_ASK_TIMEOUT_S).sha
    except Exception:  # fetching it reports the cause
        return None
    if commit is not None:
        write_text(reference, commit)  # as the hub's own library stores it
    return commit


def check_snapshot(folder: Path, checksum: Callable[[Path], str]) -> None:
    """Compare the files of a hub snapshot with the checksums in the names of the blobs that they link to.

    A blob's name is its sha256, or git's sha1 for a small file. Other files are not checked. Raises DraftsmithError for
    a damaged one.
    """
    for path in sorted(folder.rglob("*")):
        blob = path.resolve()
        if not path.is_symlink() or blob.parent.name != "blobs":
            continue
        if len(blob.name) == 64:
            intact = checksum(blob) == blob.name
        elif _COMMIT.fullmatch(blob.name):
            content = blob.read_bytes()
            intact = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest() == blob.name
        else:
            continue
        if not intact:
            raise DraftsmithError(
                f"{path}: is damaged in the hub's cache. Delete {blob} and run the same command again."
            )
