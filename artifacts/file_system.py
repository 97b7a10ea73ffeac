"""On what kind of file system a path lies."""

from __future__ import annotations

import re
from pathlib import Path

MOUNTS = Path("/proc/self/mounts")
# SQLite's locks and its write order are not kept there (https://www.sqlite.org/howtocorrupt.html, section 2.1).
NETWORK = frozenset(
    (
        *("9p", "afs", "beegfs", "ceph", "cifs", "coda", "davfs", "fhgfs", "glusterfs", "gpfs", "juicefs", "lustre"),
        *("ncpfs", "nfs", "nfs4", "orangefs", "pvfs2", "smb3", "smbfs", "wekafs"),
    )
)
_FUSE_NETWORK = re.compile(
    r"fuse\.(.*(nfs|ssh|smb|cifs|s3|gcs|blob|dav|rclone|juice|gluster|ceph|seaweed|alluxio|goofys|weka).*)"
)


def file_system(path: Path) -> tuple[str, str]:
    """(type, mount point) of the file system that a path, or the nearest folder above it that exists, lies on.

    ("", "") where the system does not say.
    """
    there = path.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    there = there.resolve()
    try:
        lines = MOUNTS.read_text("utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return "", ""
    found, place = "", ""
    for line in lines:
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        mounted = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal.group(1), 8)), fields[1])
        if there.is_relative_to(mounted) and len(mounted) >= len(place):  # the last one mounted there is on top
            found, place = fields[2], mounted
    return found, place


def network_file_system(path: Path) -> str | None:
    """The type and mount point of a file system that other machines may share, in words; None for a local one."""
    kind, place = file_system(path)
    return f"{kind} at {place}" if kind in NETWORK or _FUSE_NETWORK.fullmatch(kind) else None
