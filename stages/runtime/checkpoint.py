"""Checkpoints of a training: two generations, each with its checksum; a damaged one falls back to the one before.

A file is named `checkpoint-STEP-DIGEST.pt` after the optimiser steps it holds and the sha256 of its bytes, so that what
it says of itself appears with it in one rename.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from draftsmith.artifacts.atomic import TMP_PREFIX, atomic_path, disk_errors, fsync
from draftsmith.artifacts.store.manifest import sha256_file

GENERATIONS = 2
_DIGITS = 16  # of the digest
_NEW = "checkpoint.new"  # written whole, then named after its digest
_NAME = re.compile(r"checkpoint-(\d+)-([0-9a-f]+)\.pt")


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Keep `state` (tensors and plain values) as what was reached after `step` steps, and the generation before it."""
    import torch

    for left in folder.glob(f"{TMP_PREFIX}*-{_NEW}"):  # by an attempt that was killed amid its own
        left.unlink()
    with atomic_path(folder / _NEW) as tmp, tmp.open("wb") as file:  # of a path, torch does not say why it failed
        torch.save(state, file)
    with disk_errors(f"writing a checkpoint in {folder}"):
        digest = sha256_file(folder / _NEW)[:_DIGITS]
        path = (folder / _NEW).rename(folder / f"checkpoint-{step:08d}-{digest}.pt")
        fsync(folder)
        for old in checkpoints(folder)[GENERATIONS:]:
            old.unlink()
    return path


def load_checkpoint(folder: Path, log: Callable[[str], None]) -> tuple[int, dict[str, Any]] | None:
    """Return steps and state of the newest whole checkpoint, on the CPU; None: the training begins.

    A damaged one is set aside and told to `log`: what it held is computed again.
    """
    import torch

    for path in checkpoints(folder):
        step, digest = _parts(path)
        if sha256_file(path)[:_DIGITS] == digest:
            return step, torch.load(path, map_location="cpu", weights_only=True)
        aside = path.with_name(f"{TMP_PREFIX}damaged-{path.name}")
        path.replace(aside)
        rest = [_parts(older)[0] for older in checkpoints(folder)]
        onwards = f"the one of step {rest[0]}" if rest else "the beginning, there is none before it"
        log(f"the checkpoint of step {step} is damaged (now {aside}): going on from {onwards}")
    return None


def checkpoints(folder: Path) -> list[Path]:
    """Those of a folder, the newest first."""
    found = [path for path in folder.glob("checkpoint-*.pt") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: (_parts(path)[0], path.stat().st_mtime_ns), reverse=True)


def _parts(path: Path) -> tuple[int, str]:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1]), match[2]
