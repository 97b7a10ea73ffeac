"""Which processes of a launched server are alive."""

from __future__ import annotations

from pathlib import Path


def living(folder: Path) -> list[int]:
    """Processes that were started in this folder: servers and what they started."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (entry / "cwd").readlink() == folder.resolve():
                found.append(int(entry.name))
        except OSError:
            continue  # ended meanwhile, or a zombie
    return found
