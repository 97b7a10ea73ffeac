"""Reads a drafter's files in a server's processes, for the plug-ins, and asks all ranks whether they can write it.

Only an upload needs another package (mlflow-skinny).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from draftsmith.stages.drafters.digest import DIGESTED


def read_drafter(wanted: Mapping[str, str]) -> dict[str, bytes]:
    """Return the files that a drafter's proposals depend on, by name; of its upload if its folder is not here.

    wanted: "drafter" (digest), "folder", "upload" (an address in MLflow's artifact store), "tracking" (MLflow's URI).
    Raises ValueError if the files are others.
    """
    folder, content = Path(wanted["folder"]), {}
    with TemporaryDirectory() as copy:
        if not folder.is_dir() and wanted["upload"]:
            from mlflow.artifacts import download_artifacts  # here: a server without uploads need not have it

            tracking = wanted["tracking"]
            folder = Path(download_artifacts(wanted["upload"], dst_path=copy, tracking_uri=tracking))
        digest = hashlib.sha256()  # as `drafter_digest`, of what is loaded and not of a file that may change
        for name in DIGESTED:
            if (path := folder / name).exists():
                content[name] = path.read_bytes()
                digest.update(name.encode() + b"\0" + content[name])
    if digest.hexdigest() != wanted["drafter"]:
        raise ValueError(
            f"{folder} on the server's host does not have the files of drafter {wanted['drafter'][:12]}. Mount the "
            "store there under the same path, or set registry.upload and install mlflow-skinny beside the server"
        )
    return content


def gather(state: str, group: Any) -> list[str]:
    """Return the states of all ranks of a group on the CPU, each of which calls this."""
    states = [state] * torch.distributed.get_world_size(group=group)
    torch.distributed.all_gather_object(states, state, group=group)
    return states
