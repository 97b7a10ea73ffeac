"""Handles requests for another drafter in a server's processes: fields, the drafter's files, the answer of all ranks.

Anyone who reaches a server's port can send one, so only the server's environment says where uploads come from. Only
an upload needs another package (mlflow-skinny).
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from draftsmith.artifacts.identifiers import sha256_digest, upload_address
from draftsmith.artifacts.redaction import redacted
from draftsmith.stages.drafters.digest import DIGESTED, content_digest

MOST_BYTES = 32 << 30  # limit of an upload
_REASON_CHARS = 2000


@dataclass(frozen=True)
class WantedDrafter:
    """The drafter that a server is to serve, and where its files are."""

    drafter: str  # digest
    folder: str  # the checkpoint's, which may not be on this host
    upload: str  # `Version.uploaded`, empty if there is none


def wanted_drafter(fields: object) -> WantedDrafter:
    """Return the fields of a request; a later client may send others too. Raises ValueError if one is malformed."""
    if not isinstance(fields, dict):
        raise ValueError("the request is not a JSON object. Send the fields drafter, folder and upload.")
    folder, upload = fields.get("folder", ""), fields.get("upload", "")
    if not isinstance(folder, str) or not folder.startswith("/") or not folder.isprintable():
        raise ValueError("folder is not an absolute path. Send the checkpoint's.")
    if not isinstance(upload, str):
        raise ValueError("upload is not a string. Send the address of the version's upload.")
    if upload and not upload_address(upload, where="upload").startswith("runs:/"):
        raise ValueError("upload: only addresses such as runs:/ID/drafter are fetched. Correct it.")
    return WantedDrafter(sha256_digest(fields.get("drafter"), where="drafter"), folder, upload)


def read_drafter(wanted: WantedDrafter) -> dict[str, bytes]:
    """Return the files that a drafter's proposals depend on, by name; from its upload if its folder is not here.

    Raises ValueError if the files do not match the digest or are too large.
    """
    folder = Path(wanted.folder)
    with TemporaryDirectory() as scratch:
        fetched = wanted.upload and not folder.is_dir()
        source = _fetched(wanted.upload, Path(scratch)) if fetched else folder
        content = {name: (source / name).read_bytes() for name in DIGESTED if (source / name).exists()}
    if content_digest(content) != wanted.drafter:  # digest of the loaded bytes, since files may change
        raise ValueError(
            f"{folder} on the server's host does not have the files of drafter {wanted.drafter[:12]}. Mount the "
            "store there under the same path, or set registry.upload, and install mlflow-skinny and set "
            "MLFLOW_TRACKING_URI where the server runs."
        )
    return content


def _fetched(address: str, scratch: Path) -> Path:
    """Return this host's copy of an upload in the MLflow that the server's own environment names."""
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        raise ValueError(
            "MLFLOW_TRACKING_URI is not set in the server's environment, so no upload can be fetched. Set it there, "
            "or mount the store under the same path."
        )
    from mlflow.artifacts import download_artifacts  # here: a server without uploads need not have it

    run, _, path = address.removeprefix("runs:/").partition("/")
    if _size(run, path) > min(MOST_BYTES, shutil.disk_usage(scratch).free // 2):
        raise ValueError(f"{address} is too large for {scratch}. Free some space there, or mount the store.")
    return Path(download_artifacts(run_id=run, artifact_path=path, dst_path=str(scratch)))


def _size(run: str, path: str) -> int:
    """Return the bytes of all files of a run below a path."""
    from mlflow.artifacts import list_artifacts

    entries = list_artifacts(run_id=run, artifact_path=path)
    return sum(_size(run, file.path) if file.is_dir else int(file.file_size or 0) for file in entries)


def reason_of(error: Exception) -> str:
    """Return why a request is refused: for a log and an answer, without the secrets of this environment."""
    return redacted(str(error)[:_REASON_CHARS]) or type(error).__name__


def gather(state: str, group: Any) -> list[str]:
    """Return the states of all ranks of a group on the CPU, each of which calls this."""
    states = [state] * torch.distributed.get_world_size(group=group)
    torch.distributed.all_gather_object(states, state, group=group)
    return states
