"""The hub: which commit is meant, whether what lies here is whole, what went wrong and whether to try again."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from draftsmith.artifacts.atomic import write_text
from draftsmith.artifacts.errors import DraftsmithError, RetryableError, find_disk_error, one_line

_COMMIT = re.compile(r"[0-9a-f]{40}")
_ASK_TIMEOUT_S = 10.0


def hub_answered(error: Exception) -> bool:
    """Whether the hub said no (or the id was wrong); else it could not be asked, and may be later."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if not isinstance(error, HfHubHTTPError) or isinstance(error, LocalEntryNotFoundError):
        return isinstance(error, HFValidationError)
    status = getattr(error.response, "status_code", None)
    return status is None or (status < 500 and status != 429)  # else it is busy or ill


def hub_reason(error: Exception, revision: str | None) -> str:
    """What went wrong with the hub and what to do, to follow the name of the field. revision: that was asked for."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, GatedRepoError):  # a RepositoryNotFoundError too: must come first
        return "access is restricted: accept its terms on the hub and set HF_TOKEN"
    if isinstance(error, RepositoryNotFoundError):
        return "no such folder here and no such model on the hub: check the name, or set HF_TOKEN if it is private"
    if isinstance(error, RevisionNotFoundError):
        return f"the hub has no revision {revision}: correct it"
    if isinstance(error, HFValidationError):
        return "neither an existing folder nor a hub id: check the name"
    if not hub_answered(error):
        return (
            f"not a folder here, not in the hub's cache, and no network to the hub ({one_line(error, 99)}): connect, "
            "or give a local folder"
        )
    return f"the hub answered: {one_line(error)}: try again, or give a local folder"


def hub_snapshot(
    field: str,
    repo: str,
    revision: str | None,
    allow: list[str],
    ignore: list[str] | None = None,
    unreached: type[DraftsmithError] | None = None,
) -> Path:
    """Files of a hub repository by their patterns, in the hub's own cache; needs no network when the cache has them.

    field: the config's, for the error. Raises DraftsmithError if the hub does not have it, `unreached` if it could not
    be asked: left out, RetryableError, unless the environment says that there is no hub.
    """
    from huggingface_hub import constants, snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=allow, ignore_patterns=ignore))
    except Exception as error:  # the hub's library raises its HTTP client's own errors too
        if find_disk_error(error) is not None:
            raise
        unreached = unreached or (DraftsmithError if constants.HF_HUB_OFFLINE else RetryableError)
        kind = DraftsmithError if hub_answered(error) else unreached
        raise kind(f"{field} {repo}: {hub_reason(error, revision)}") from error


def hub_commit(repo: str, revision: str | None, kind: Literal["model", "dataset"] = "model") -> str | None:
    """The commit that a branch or tag of a hub repository means here; None: the hub's cache does not say, and the hub
    could not be asked.

    What the cache says holds until something fetches the branch anew: a run that is continued goes on from the commit
    that it began with.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.file_download import repo_folder_name

    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    try:
        folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type=kind)
    except HFValidationError:  # no hub id: whoever fetches it says so
        return None
    reference = folder / "refs" / (revision or constants.DEFAULT_REVISION)
    if reference.is_file():
        return reference.read_text(encoding="utf-8").strip()
    if constants.HF_HUB_OFFLINE:
        return None
    try:
        commit = HfApi().repo_info(repo, repo_type=kind, revision=revision, timeout=_ASK_TIMEOUT_S).sha
    except Exception:  # whoever fetches it next says what is wrong
        return None
    if commit is not None:
        write_text(reference, commit)  # as the hub's own library keeps it
    return commit


def check_snapshot(folder: Path, checksum: Callable[[Path], str]) -> None:
    """Compare the files of a hub snapshot with the names of what they link to: sha256, or git's sha1 of small ones.

    Files that are no links into the cache's blobs say nothing of themselves. Raises DraftsmithError for a damaged one.
    """
    for path in sorted(folder.rglob("*")):
        blob = path.resolve()
        if not path.is_symlink() or blob.parent.name != "blobs":
            continue
        if len(blob.name) == 64:
            whole = checksum(blob) == blob.name
        elif _COMMIT.fullmatch(blob.name):
            content = blob.read_bytes()
            whole = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest() == blob.name
        else:
            continue
        if not whole:
            raise DraftsmithError(
                f"{path}: is damaged in the hub's cache: delete {blob} and run the same command again, which fetches it"
            )
