"""Checks before any long work: a home that can be written, enough disk, configs that fit the target."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from artifacts.errors import DraftsmithError, from_os_error
from flows.graph import Node
from flows.options import RunOptions


def check_home(home: Path, options: RunOptions) -> None:
    """The home exists, can be written, and its disk has room."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=home) as probe:
            probe.write(b"x")
    except OSError as error:
        raise from_os_error(error, f"preparing {home}:") from error
    disk = os.statvfs(home)
    free_gb = disk.f_bavail * disk.f_frsize / 1e9
    wanted_gb = options.stages.min_free_gb
    if free_gb < wanted_gb:
        raise DraftsmithError(
            f"{home}: {free_gb:.1f} GB free, {wanted_gb:g} GB wanted (stages.min_free_gb): free some space or point "
            "DRAFTSMITH_HOME at another disk"
        )


def check_target(nodes: Sequence[Node], target: Path) -> None:
    """Every stage's own checks of its config against the resolved target; no weights are loaded."""
    for node in nodes:
        check = node.stage.preflight
        if check is None:
            continue
        try:
            check(node.config, target)
        except DraftsmithError as error:
            raise type(error)(f"{node.name}: {error}") from error
