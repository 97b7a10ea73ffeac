"""The functions of ours on a stack: those of flows, stages and artifacts, and of the toy's flow."""

from __future__ import annotations

import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_OURS = (
    *(f"{ROOT / folder}/" for folder in ("flows", "stages", "artifacts")),
    f"{ROOT}/tests/flows/toy_flow.py",
)


def is_ours(file: str) -> bool:
    """Return whether a file is one of ours."""
    return file.startswith(_OURS)


def frames_of_ours() -> list[str]:
    """Return the functions of ours that are running in this thread, the outermost first."""
    found = traceback.extract_stack()
    return [f"{Path(each.filename).stem}.{each.name}" for each in found if is_ours(each.filename)]
