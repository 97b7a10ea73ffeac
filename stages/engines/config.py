"""Which engine generates, and how tokens are drawn."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from stages.contract import Config


class EmbeddedEngineConfig(Config):
    """The engine in this process."""

    kind: Literal["embedded"] = "embedded"
    slots: Annotated[int, Field(ge=1, description="requests in flight")] = 8


class SamplingConfig(Config):
    """How the target's tokens are drawn."""

    max_new_tokens: Annotated[int, Field(ge=2)] = 512
    temperature: Annotated[float, Field(ge=0, description="0 = greedy")] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
