"""A simulated disk that loses what was not synced: every state that a crash may leave of a folder under POSIX.

A file's content is on disk as of its last fsync, a folder's entries as of the folder's last fsync. A crash between two
calls may leave anything between two extremes, and both are tested: only what was synced (`SYNCED`), or every change of
names but no content that was not synced (`NAMES_AHEAD`: journalled metadata).
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SYNCED, NAMES_AHEAD = "synced", "names ahead"
_CHANGING = ("rename", "replace", "unlink", "rmdir", "mkdir", "fsync")  # functions of os

Entries = dict[str, int]  # name -> inode


@dataclass(frozen=True)
class Crash:
    """The state of the disk at one moment."""

    after: str  # name of the last call
    root: int
    names: dict[int, Entries]  # inode of a folder -> entries, as programs see them
    synced_names: dict[int, Entries]
    synced_content: dict[int, bytes]
    folders: frozenset[int]

    def leaves(self, folder: Path, extreme: str) -> None:
        """Write what the crash leaves to `folder`, which must not exist."""
        self._write(self.root, folder, self.names if extreme == NAMES_AHEAD else self.synced_names)

    def _write(self, inode: int, folder: Path, names: dict[int, Entries]) -> None:
        folder.mkdir()
        for name, each in names.get(inode, {}).items():
            if each in self.folders:
                self._write(each, folder / name, names)
            else:
                (folder / name).write_bytes(self.synced_content.get(each, b""))


@dataclass
class ForgetfulDisk:
    """Records what this process does below `root`; all that exists at the start counts as synced."""

    root: Path
    crashes: list[Crash] = field(default_factory=list)
    sites: dict[str, int] = field(default_factory=dict)  # FILE:LINE of a call of fsync -> number of calls
    ignored: str | None = None  # site whose fsyncs have no effect
    _synced_names: dict[int, Entries] = field(default_factory=dict)
    _synced_content: dict[int, bytes] = field(default_factory=dict)
    _folders: set[int] = field(default_factory=set)
    _open: list[int] = field(default_factory=list)  # descriptors that keep inode numbers from being reused

    @contextmanager
    def watching(self, patch: Callable[[object, str, Any], None]) -> Iterator[None]:
        """Record the calls of the body. patch: `monkeypatch.setattr`, which the caller undoes."""
        for folder, names, files in os.walk(self.root):
            self._sync(Path(folder))
            for name in files:
                self._sync(Path(folder, name))
            del names
        for name in _CHANGING:
            patch(os, name, self._followed(name, getattr(os, name)))
        try:
            yield
            self._crash("the end")
        finally:
            for fd in self._open:
                os.close(fd)

    def _followed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def followed(*arguments: Any, **options: Any) -> Any:
            result = call(*arguments, **options)
            if name == "fsync" and self._is_ours(path := Path(f"/proc/self/fd/{arguments[0]}").readlink()):
                site = _site()
                self.sites[site] = self.sites.get(site, 0) + 1
                if site != self.ignored:
                    self._sync(path)
            self._crash(name)
            return result

        return followed

    def _is_ours(self, path: Path) -> bool:
        return path.is_relative_to(self.root) and path.exists()

    def _sync(self, path: Path) -> None:
        fd = os.open(path, os.O_RDONLY)
        self._open.append(fd)
        inode = os.fstat(fd).st_ino
        if path.is_dir():
            self._synced_names[inode] = _entries(path)
        else:
            self._synced_content[inode] = path.read_bytes()

    def _crash(self, after: str) -> None:
        names = {}
        for folder, _, _ in os.walk(self.root):
            inode = Path(folder).stat().st_ino
            names[inode] = _entries(Path(folder))
            self._folders.add(inode)
        self.crashes.append(
            Crash(
                after,
                self.root.stat().st_ino,
                names,
                dict(self._synced_names),
                dict(self._synced_content),
                frozenset(self._folders),
            )
        )


def _entries(folder: Path) -> Entries:
    entries = {}
    for entry in os.scandir(folder):
        status = entry.stat(follow_symlinks=False)
        if stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode):
            entries[entry.name] = status.st_ino
    return entries


def _site() -> str:
    """Return FILE:LINE of the caller of fsync, skipping functions named `fsync`."""
    frame = sys._getframe(2)
    while frame.f_code.co_name == "fsync" and frame.f_back is not None:
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
