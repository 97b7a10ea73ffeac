"""Lists the architectures by kind; no other module does. Plans read this module, so it imports no torch."""

from __future__ import annotations

from functools import reduce
from importlib import import_module
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from pydantic import Discriminator, Tag

from draftsmith.stages.drafters.spec import DrafterShape, Traits

# One line per architecture: the module that holds its `TRAITS`.
_CONFIGS = (
    "draftsmith.stages.drafters.dflash.config",
    "draftsmith.stages.drafters.dflash2.config",
    "draftsmith.stages.drafters.dspark.config",
    "draftsmith.stages.drafters.eagle3.config",
    "draftsmith.stages.drafters.mtp.config",
)
KINDS: dict[str, Traits] = {traits.kind: traits for traits in (import_module(name).TRAITS for name in _CONFIGS)}


def is_native(kind: str) -> bool:
    """Return whether a kind is a target's own head; False for an unknown one."""
    return kind in KINDS and KINDS[kind].native


def _kind_of(value: Any) -> str:
    kind = value.get("kind", "dflash") if isinstance(value, dict) else getattr(value, "kind", "")
    return str(kind)


# The shape of a new drafter; `drafter` in a config.
if TYPE_CHECKING:
    DrafterConfig: TypeAlias = DrafterShape
else:
    DrafterConfig = Annotated[
        reduce(or_, (Annotated[traits.shape, Tag(kind)] for kind, traits in KINDS.items())),
        Discriminator(
            _kind_of,
            custom_error_type="drafter_kind",
            custom_error_message=f"kind must be {' or '.join(', '.join(KINDS).rsplit(', ', 1))}",
        ),
    ]
