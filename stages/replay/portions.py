"""How much of a replay is in memory at once. The estimates read it, which load no torch."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from pydantic import Field

TREE_TOKENS = 512  # rejected proposals that the target scores in one forward, a trajectory
POSITIONS_PER_CHUNK = 1024  # whose logits are held at once
TokensPerForward: TypeAlias = Annotated[
    int,
    Field(
        ge=1,
        description="of answers, with padding, that the target reads in one forward (a longer answer alone); features, "
        "keys and values grow with it: lower where memory is tight, higher where a GPU is not busy",
    ),
]
