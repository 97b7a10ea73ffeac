"""Options of replay, and the sizes that bound its memory. Plans read this module, so it imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, TypeAlias

from pydantic import Field

from draftsmith.stages.drafters.spec import DraftingConfig
from draftsmith.stages.runtime.stage import WHOLE, NotInKey, Shard
from draftsmith.stages.target.sampling import GREEDY, SamplingParams

TREE_TOKENS = 512  # rejected proposals of a trajectory that the target scores in one forward
POSITIONS_PER_CHUNK = 1024  # whose logits are in memory together
TokensPerForward: TypeAlias = Annotated[
    int,
    Field(
        ge=1,
        description="of answers, with padding, that the target reads in one forward (a longer answer alone); features, "
        "keys and values grow with it: lower where memory is tight, higher where a GPU is not busy",
    ),
]

MaxParityMismatch: TypeAlias = Annotated[
    float,
    Field(
        ge=0,
        le=1,
        description="share of served verify steps that replay may contradict: near-ties in bf16, more of them the less "
        "a drafter is trained (seen: 5 to 18 %); a wrong drafter contradicts nearly all. In float32 with greedy "
        "decoding none may. tau as served may not be measurably lower than replay's in any case. 1: never fail",
    ),
    NotInKey(),
]


@dataclass(frozen=True)
class ReplayOptions:
    """The options of a replay."""

    drafting: DraftingConfig = field(default_factory=DraftingConfig)  # left out: as each drafter was trained
    sampling: SamplingParams = GREEDY  # of the answers; drafters with `samples_proposals` sample their proposals so too
    chains: int | None = None  # as in `replay_chains`
    with_proposals: bool = True  # as in `replay_chains`
    tokens_per_group: int = 4096  # with padding
    shard: Shard = WHOLE  # of the groups, which are the same for all shards
