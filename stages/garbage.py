"""How often Python looks for garbage: seldom while a process starts."""

from __future__ import annotations

import gc

# How many new objects Python collects garbage after. While libraries are imported nearly all of them stay, and looking
# through them over and over would be a fifth of what a start takes.
_USUAL, _AT_START = gc.get_threshold(), (50_000, 20, 20)


def collect_seldom() -> None:
    """From here to the work itself: the first progress that a stage reports, the flow of a command."""
    gc.set_threshold(*_AT_START)


def collect_as_usual() -> None:
    """From here on."""
    gc.set_threshold(*_USUAL)
