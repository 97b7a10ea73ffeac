"""Texts of models do nothing to a terminal."""

from __future__ import annotations

import pytest

from draftsmith.artifacts.printable import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain text\n\twith lines", "plain text\n\twith lines"),
        ("naïve café 你好 🙂", "naïve café 你好 🙂"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("over\rwritten\b", "over\\x0dwritten\\x08"),
        ("\u202eevil", "\\u202eevil"),
        ("\x9b1m", "\\x9b1m"),
        ("half \ud800", "half \\ud800"),
    ],
)
def test_control_characters_are_written_out(text: str, shown: str) -> None:
    assert printable(text) == shown
    printable(text).encode("utf-8")
