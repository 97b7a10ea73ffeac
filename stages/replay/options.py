"""Options of replay, and the sizes that bound its memory. Plans read this module, so it imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, TypeAlias

from pydantic import Field

from draftsmith.stages.drafters.spec import DraftingConfig
from draftsmith.stages.runtime.stage import WHOLE, NotInKey, Shard
from draftsmith.stages.targets.sampling import GREEDY, SamplingParams

TREE_TOKENS = 512  # rejected proposals of a trajectory that the target scores in one forward
POSITIONS_PER_CHUNK = 1024  # positions whose logits are in memory at a time
TokensPerForward: TypeAlias = Annotated[
    int,
    Field(
        ge=1,
        description="tokens of answers, with padding, per forward of the target (a longer answer by itself); features, "
        "keys and values grow with it: lower where memory is tight, higher where a GPU is not busy",
    ),
]

MaxParityMismatch: TypeAlias = Annotated[
    float,
    Field(
        ge=0,
        le=1,
        description="share of served verify steps that replay may contradict, in accepted counts or in proposals up to "
        "the first rejection: near-ties in bf16. In float32 with greedy decoding none may, and all proposals count. "
        "tau as served may not be measurably lower than replay's in any case. 1: never fail",
    ),
    NotInKey(),
]
# By simulation (tests/stages/replay/test_parity_noise.py): noise that changes 20 % of the steps with 7 proposals (18 %
# is the most that was seen of a correct bfloat16 engine) contradicts at most 33 % of 80 steps with 15 proposals, and
# 26 % of 320, in 99 of 100 simulations. Layer ids off by one contradict at least 40 and 54 %.
PARITY_MISMATCH = 0.35


@dataclass(frozen=True)
class ReplayOptions:
    """The options of a replay."""

    drafting: DraftingConfig = field(default_factory=DraftingConfig)  # default: as each drafter was trained
    sampling: SamplingParams = GREEDY  # of the answers, and of proposals that a drafter samples
    chains: int | None = None  # as in `replay_chains`
    with_proposals: bool = True  # as in `replay_chains`
    with_confidence: bool = False  # if a drafter predicts it
    tokens_per_group: int = 4096  # with padding
    shard: Shard = WHOLE  # of the groups; all shards have the same groups
