"""Keep the draft models of speculative decoding matched to their target: `draftsmith`'s public Python API.

Everything is imported on first use: `import draftsmith` loads neither torch nor Prefect nor MLflow.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from draftsmith.artifacts.errors import DraftsmithError
    from draftsmith.flows.api import (
        Answers,
        Comparison,
        RefreshResult,
        compare,
        diff,
        load_drafter,
        load_target,
        read_answers,
        refresh,
    )

    __version__: str

__all__ = [
    "Answers",
    "Comparison",
    "DraftsmithError",
    "RefreshResult",
    "__version__",
    "compare",
    "diff",
    "load_drafter",
    "load_target",
    "read_answers",
    "refresh",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "__version__":
        value: Any = import_module("importlib.metadata").version("draftsmith")
    elif name == "DraftsmithError":
        value = import_module("draftsmith.artifacts.errors").DraftsmithError
    else:
        value = getattr(import_module("draftsmith.flows.api"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
