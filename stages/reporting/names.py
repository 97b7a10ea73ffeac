"""What arms, and figures that are not there, are called where people read them."""

from __future__ import annotations

NAMES = {
    "plain": "plain decoding",
    "champion": "the champion",
    "sft": "SFT",
    "opd": "SFT + OPD",
    "control": "SFT continued",
}
ABSENT = "—"


def name_of(arm: str) -> str:
    """Any arm; those that have no other name are called what they are."""
    return NAMES.get(arm, arm)
