"""Full and read-only disks: real ones, mounted for the scene. Needs the right to mount (`run.py` gets it)."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.faults.home import Ended, copied, copied_into
from tests.faults.scene import COMMITTING, STARTING, WORKING, Scene, Strike, TooLate

_DISK_MB = 400  # several homes


def disk_filled(scene: Scene) -> Ended:
    """Let somebody else fill up the home's disk while the stage runs or is committed."""
    with _on_its_own_disk(scene.home.path):
        running = scene.start()
        scene.reach(running, (STARTING, WORKING, COMMITTING))
        with _kept_full(scene.home.path):
            ended = running.wait()
        if ended.code == scene.undisturbed.code and scene.node in ended.nodes("done"):
            raise TooLate
        scene.check_end(ended, [2], "disk is full")
        scene.nothing_left()
    return ended


def store_read_only(scene: Scene) -> Ended:
    """Mount the store's disk again, read-only, while the stage runs."""
    store = scene.home.path / "store"
    running = scene.start()
    scene.reach(running, (STARTING, WORKING))
    same = scene.home.folder / "same"  # a second mount of the store, to which nobody writes while it becomes read-only
    same.mkdir(exist_ok=True)
    _mount("--bind", str(store), str(same))
    _mount("-o", "remount,bind,ro", str(same))
    _mount("--move", str(same), str(store))
    try:
        ended = running.wait()
    finally:
        subprocess.run(["umount", "--lazy", str(store)], check=True)
    return scene.check_end(ended, [2], "read-only")


@contextmanager
def _on_its_own_disk(home: Path) -> Iterator[None]:
    """Move the folder's content to a mounted disk, and back after the block."""
    original = home.with_name("original")
    home.rename(original)
    home.mkdir()
    _mount("-t", "tmpfs", "-o", f"size={_DISK_MB}m", "faults", str(home))
    try:
        copied_into(original, home)
        yield
        copied(home, original)
    finally:
        subprocess.run(["umount", "--lazy", str(home)], check=True)
        shutil.rmtree(home)
        original.rename(home)


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


@contextmanager
def _kept_full(folder: Path) -> Iterator[None]:
    """Keep the disk full with a file, which is removed after the block."""
    path, ended = folder / "of-somebody-else", threading.Event()

    def write() -> None:
        with path.open("wb") as file:
            while not ended.wait(0.005):
                disk = os.statvfs(folder)
                size, free = file.seek(0, os.SEEK_END), disk.f_bavail * disk.f_frsize
                with suppress(OSError):  # the stage was faster
                    if free:
                        os.posix_fallocate(file.fileno(), size, free)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        yield
    finally:
        ended.set()
        writer.join()
        path.unlink()


FAULTS: dict[str, Strike] = {
    "full disk": disk_filled,
    "read-only store": store_read_only,
}
