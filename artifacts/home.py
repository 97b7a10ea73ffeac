"""Where Draftsmith keeps everything that it makes."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """The absolute folder of the store and of MLflow's database: `DRAFTSMITH_HOME`, or `.draftsmith` here."""
    return Path(os.environ.get("DRAFTSMITH_HOME") or ".draftsmith").expanduser().resolve()
