"""Texts that others wrote, such as a model, as a terminal or a log may show them."""

from __future__ import annotations

import re
import unicodedata

_PLAIN = re.compile(r"[\t\n\x20-\x7e]*")
_ESCAPED = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}  # control, direction and joining marks, halves of surrogate pairs


def printable(text: str) -> str:
    """The text with control characters and invisible marks written out (`\\x1b`, `\\u202e`); tab and newline stay.

    A terminal acts on control characters (colours, its title, the clipboard); marks of direction reorder what is read.
    """
    if _PLAIN.fullmatch(text):
        return text
    return "".join(_shown(character) for character in text)


def _shown(character: str) -> str:
    if character in "\t\n" or unicodedata.category(character) not in _ESCAPED:
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
