"""Databases of SQLite: which file an address means, where one may not lie, and how one is read that is not ours."""

from __future__ import annotations

import atexit
import re
import shutil
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.host import network_file_system


def refuse_shared_database(path: Path, whose: str, advice: str) -> None:
    """Raise DraftsmithError if a database of SQLite would lie on a network file system."""
    if (shared := network_file_system(path)) is not None:
        raise DraftsmithError(
            f"{whose} {path} lies on a network file system ({shared}), where SQLite's locks fail and data are lost: "
            f"{advice}, or point DRAFTSMITH_HOME at a local disk"
        )


def sqlite_file(uri: str) -> Path | None:
    """The file of a database's address; None for another kind of database, or one in memory."""
    found = re.fullmatch(r"sqlite(?:\+\w+)?:///(?!:memory:)([^?]+)(?:\?.*)?", uri)
    return Path(found.group(1)) if found else None


def copy_to_read(uri: str) -> Path:
    """What the database of an address holds now, in a folder that goes with this process. Nothing is written there."""
    folder = Path(tempfile.mkdtemp(prefix="draftsmith-read-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with (
        closing(sqlite3.connect(f"file:{quote(str(sqlite_file(uri)))}?mode=ro", uri=True)) as there,
        closing(sqlite3.connect(folder / "copy.db")) as here,
    ):
        there.backup(here)
    return folder / "copy.db"
