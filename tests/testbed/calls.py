"""Records the calls of a function that still does its work."""

from __future__ import annotations

from typing import Any

import pytest


def recorded(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[tuple[Any, ...]]:
    """Return the positional arguments of every call of `owner.name` from here on."""
    calls: list[tuple[Any, ...]] = []
    function = getattr(owner, name)

    def wrapper(*arguments: Any, **named: Any) -> Any:
        calls.append(arguments)
        return function(*arguments, **named)

    monkeypatch.setattr(owner, name, wrapper)
    return calls
