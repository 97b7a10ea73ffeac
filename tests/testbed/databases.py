"""Empty databases of Prefect and MLflow, created once: their migrations take seven and five seconds in every new home.

`tests/season/test_season.py` begins without a home and covers the migrations themselves.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from tests.testbed.cache import cached

_PREFECT = Path("prefect", "prefect.db")
_MLFLOW = Path("mlflow.db")
_START_PREFECT = (
    "import sys\nfrom pathlib import Path\n"
    "from draftsmith.flows.orchestration.server import prefect_server\n"
    "with prefect_server(Path(sys.argv[1])) as wait:\n    wait(print)\n"
)
_OPEN_MLFLOW = "import sys; from mlflow import MlflowClient; MlflowClient(f'sqlite:///{sys.argv[1]}/mlflow.db').search_experiments()"


def give_databases(home: Path) -> None:
    """Create a missing home with both databases; leave an existing one unchanged."""
    if home.exists():
        return
    home.mkdir(mode=0o700, parents=True)
    (home / _PREFECT).parent.mkdir(mode=0o700)
    shutil.copy(_made("prefect", _START_PREFECT, _PREFECT), home / _PREFECT)
    shutil.copy(_made("mlflow", _OPEN_MLFLOW, _MLFLOW), home / _MLFLOW)


@contextmanager
def given_to_new_homes() -> Iterator[None]:
    """Make this process open a copy wherever MLflow's database would be a new file, whatever server the shell names."""
    from draftsmith.artifacts.tracking.client import sqlite_file
    from draftsmith.artifacts.tracking.runs import Tracking

    open_ = Tracking._open

    def opened(self: Tracking, uri: str) -> Any:
        database = sqlite_file(uri)
        if database is not None and database.parent.is_dir() and not database.exists():
            made = _made("mlflow", _OPEN_MLFLOW, _MLFLOW)
            database.touch(mode=0o644)  # as SQLite: who may read it is what the umask leaves of this
            shutil.copyfile(made, database)
        return open_(self, uri)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
            patch.delenv(name, raising=False)
        patch.setattr(Tracking, "_open", opened)
        yield


def _made(package: str, program: str, place: Path) -> Path:
    """Return the database that the program creates in the home that is its argument."""

    def build(folder: Path) -> None:
        home = folder / "home"
        home.mkdir()
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_", "DRAFTSMITH_"))}
        subprocess.run([sys.executable, "-c", program, str(home)], env=environment, check=True, timeout=300, cwd=home)
        database = folder / place.name
        with closing(sqlite3.connect(home / place)) as source, closing(sqlite3.connect(database)) as copy:
            source.backup(copy)
        database.chmod(0o600)
        shutil.rmtree(home)

    return cached(f"{package}-database", build, extra=version(package) + program) / place.name
