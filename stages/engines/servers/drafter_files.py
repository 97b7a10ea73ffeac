"""Reads a drafter's files in a server's processes, for the plug-ins, and asks all ranks whether they can write it.

Only an upload needs another package (mlflow-skinny).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from draftsmith.stages.drafters.adapters import assemble
from draftsmith.stages.drafters.digest import content_digest


def read_drafter(wanted: Mapping[str, str]) -> dict[str, bytes]:
    """Return the files that a drafter's proposals depend on, by name; of its upload if its folder is not here.

    wanted: "drafter" (digest), "folder", "upload" (`Version.uploaded`), "tracking" (MLflow's URI).
    Raises ValueError if the files are others.
    """
    folder = Path(wanted["folder"])
    folders = [folder]
    with TemporaryDirectory() as copies:
        if not folder.is_dir() and wanted["upload"]:
            from mlflow.artifacts import download_artifacts  # here: a server without uploads need not have it

            folders = [
                Path(download_artifacts(address, dst_path=f"{copies}/{place}", tracking_uri=wanted["tracking"]))
                for place, address in enumerate(wanted["upload"].split())
            ]
        content = assemble(folders)
    if content_digest(content) != wanted["drafter"]:  # of what is loaded, and not of files that may change
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
