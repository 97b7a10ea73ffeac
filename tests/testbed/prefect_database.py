"""Prefect's empty database, made once: its migrations take seven of the nine seconds of CPU that a new home's server
needs to start. That they work is seen where a test begins with no home at all (`tests/integration/test_refresh.py`)."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from importlib.metadata import version
from pathlib import Path

from tests.testbed.cache import cached

_PLACE = Path("prefect", "prefect.db")
_START = (
    "import sys; from pathlib import Path; "
    "from draftsmith.flows.pipeline.prefect_server import start_prefect_server; "
    "start_prefect_server(Path(sys.argv[1])).wait()"
)


def give_database(home: Path) -> None:
    """A home that is not there yet gets one with Prefect's database. Others stay as they are."""
    if home.exists():
        return
    made = cached("prefect-database", _build, extra=version("prefect"))
    home.mkdir(mode=0o700, parents=True)
    (home / _PLACE).parent.mkdir(mode=0o700)
    shutil.copy(made / _PLACE.name, home / _PLACE)


def _build(folder: Path) -> None:
    home = folder / "home"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "DRAFTSMITH_"))}
    subprocess.run([sys.executable, "-c", _START, str(home)], env=environment, check=True, timeout=300)
    database = folder / _PLACE.name
    with closing(sqlite3.connect(home / _PLACE)) as source, closing(sqlite3.connect(database)) as copy:
        source.backup(copy)
    database.chmod(0o600)
    shutil.rmtree(home)
