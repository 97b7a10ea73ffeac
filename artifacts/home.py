"""Where Draftsmith keeps everything that it makes."""

from __future__ import annotations

import os
from pathlib import Path

from draftsmith.artifacts.errors import DraftsmithError

UPLOADED = "uploaded"  # in it: copies of drafters that MLflow has, touched whenever one is used


def home() -> Path:
    """The absolute folder of the store and of MLflow's database: `DRAFTSMITH_HOME`, or `.draftsmith` here.

    Raises DraftsmithError for one that cannot be.
    """
    path = Path(os.environ.get("DRAFTSMITH_HOME") or ".draftsmith")
    try:
        path = path.expanduser().resolve()
    except (RuntimeError, OSError) as error:  # no such user, or links in a circle
        raise DraftsmithError(f"DRAFTSMITH_HOME {path}: {error}: correct it") from error
    if bad := [sign for sign in "?%" if sign in str(path)]:
        raise DraftsmithError(
            f"{path}: a home's path with {bad[0]} is another in the address of MLflow's database: set DRAFTSMITH_HOME"
        )
    return path
