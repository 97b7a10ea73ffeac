"""Checkpoints of a training: the last two, each with its checksum. If one is damaged, the one before is used.

A file is named `checkpoint-STEP-DIGEST.pt` after the number of completed optimiser steps and the sha256 of its bytes,
so that content and checksum appear in one rename. It is written and hashed in a thread while the next steps run.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from draftsmith.artifacts.atomic import TMP_PREFIX, atomic_path, disk_errors, fsync
from draftsmith.artifacts.store.manifest import sha256_file
from draftsmith.stages.runtime.stage import CHECKPOINTS_KEPT

_FIRST_S = 30.0  # after this a training first saves, at the end of a step: within a minute if steps take half of one
_SAVING_SHARE = 0.02  # largest share of the time that saving takes from then on
_DIGEST_DIGITS = 16
_NEW = "checkpoint.new"  # the name until the file is complete and its digest is known
_NAME = re.compile(r"checkpoint-(\d+)-([0-9a-f]+)\.pt")


class CheckpointWriter:
    """Saves checkpoints in a thread, one at a time. Use it in a `with` statement, which waits for the last one.

    Until a checkpoint is complete, the previous one is the newest.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        self._since, self._wait_s = time.monotonic(), _FIRST_S

    def are_due(self) -> bool:
        """Return whether the next checkpoint is due, by the time that the last one took."""
        return time.monotonic() - self._since >= self._wait_s

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()
        if error is None:
            self.finish()

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Wait for the previous write, copy `state` to host memory and start to write it, as `save_checkpoint` does."""
        self.finish()
        self._since, self._wait_s = time.monotonic(), math.inf
        self._writing = self._thread.submit(self._write, step, _copied(state))

    def _write(self, step: int, state: dict[str, Any]) -> None:
        save_checkpoint(self._folder, step, state)
        self._wait_s = (time.monotonic() - self._since) / _SAVING_SHARE

    def check(self) -> None:
        """Raise the error of a checkpoint that could not be written."""
        if self._writing is not None and self._writing.done():
            self.finish()

    def finish(self) -> None:
        """Wait until the checkpoint is written. Raises the error if that failed."""
        if self._writing is not None:
            self._writing.result()
        self._writing = None


def _copied(state: Any) -> Any:
    """Return a copy of nested dicts and lists with all tensors on the CPU."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {name: _copied(value) for name, value in state.items()}
    return [_copied(value) for value in state] if isinstance(state, list) else state


class _HashedFile(io.BufferedWriter):
    """A new file that hashes what is written to it."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "w"))
        self.sha256 = hashlib.sha256()

    def write(self, data: Any, /) -> int:
        self.sha256.update(data)
        return super().write(data)


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Save `state` (tensors and plain values) after `step` optimiser steps; keep the previous checkpoint too."""
    with disk_errors(f"writing a checkpoint in {folder}"):
        for leftover in folder.glob(f"{TMP_PREFIX}*-{_NEW}"):  # from an attempt that was killed while writing
            leftover.unlink()
        with atomic_path(folder / _NEW) as tmp, _HashedFile(tmp) as file:  # given a path, torch hides the error
            torch.save(state, file)
        digest = file.sha256.hexdigest()[:_DIGEST_DIGITS]
        path = (folder / _NEW).rename(folder / f"checkpoint-{step:08d}-{digest}.pt")
        fsync(folder)
        for old in list_checkpoints(folder)[CHECKPOINTS_KEPT:]:
            old.unlink()
    return path


def load_checkpoint(folder: Path, log: Callable[[str], None]) -> tuple[int, dict[str, Any]] | None:
    """Return the step and state of the newest intact checkpoint, on the CPU; None if there is none.

    A damaged checkpoint is renamed and reported to `log`: training continues from the one before.
    """
    for path in list_checkpoints(folder):
        step, digest = _step_and_digest(path)
        if sha256_file(path)[:_DIGEST_DIGITS] == digest:
            return step, torch.load(path, map_location="cpu", weights_only=True)
        damaged = path.with_name(f"{TMP_PREFIX}damaged-{path.name}")
        path.replace(damaged)
        older = list_checkpoints(folder)
        start = f"the checkpoint of step {_step_and_digest(older[0])[0]}" if older else "the beginning"
        log(f"warning: the checkpoint of step {step} is damaged (now {damaged}). Training continues from {start}.")
    return None


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder, the newest first."""
    paths = [path for path in folder.glob("checkpoint-*.pt") if _NAME.fullmatch(path.name)]
    return sorted(paths, key=lambda path: (_step_and_digest(path)[0], path.stat().st_mtime_ns), reverse=True)


def _step_and_digest(path: Path) -> tuple[int, str]:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1]), match[2]
