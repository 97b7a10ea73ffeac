"""The services of `configs/team/compose.yaml`, whose commands and environments tests run without containers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from tests.flows.processes import ROOT

TEAM = ROOT / "configs" / "team"


def secret_names() -> list[str]:
    """Return the variables that the README's command writes into `.env`."""
    written = re.search(r"for name in ([\w ]+); do", (TEAM / "README.md").read_text())
    assert written is not None
    return written[1].split()


def filled(text: str, known: Mapping[str, str]) -> str:
    """Interpolate like Compose: `$$` is a dollar sign, and a variable without value or default is an error."""

    def value(found: re.Match[str]) -> str:
        if found[0] == "$$":
            return "$"
        name, _, rest = found[1].partition(":")
        if name not in known and not rest.startswith("-"):
            raise KeyError(name)
        return known.get(name, rest[1:])

    return re.sub(r"\$\$|\$\{([^}]*)\}", value, text)


def compose(known: Mapping[str, str], here: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return the file with its variables filled in. here: what stands for addresses and folders of containers."""
    text = filled((TEAM / "compose.yaml").read_text(), known)
    for place, other in (here or {}).items():
        assert place in text, place
        text = text.replace(place, other)
    content: dict[str, Any] = yaml.safe_load(text)
    return content
