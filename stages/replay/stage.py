"""Declares stage `mining`: the verification trace of the drafter on stored answers. Its body is `body.py`.

If OPD takes its anchors from the table, all answers are mined. Otherwise a sample is enough for the review and for the
parity gate.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from draftsmith.stages.drafters.spec import DraftingConfig
from draftsmith.stages.replay.options import PARITY_MISMATCH, MaxParityMismatch, TokensPerForward
from draftsmith.stages.runtime.stage import Compute, Config, FilledIn, Stage


class MiningConfig(Config):
    """The settings of replay for mining."""

    drafting: DraftingConfig = DraftingConfig()
    tokens_per_target_forward: TokensPerForward = 8192
    max_parity_mismatch: MaxParityMismatch = PARITY_MISMATCH
    table: Annotated[
        Literal["sample", "full", "scored"],
        Field(
            description="sample: the steps of a few hundred answers; full: of all answers; scored: "
            "also the target's log-probs of the proposals after a rejected one"
        ),
        FilledIn(),
    ] = "scored"


SAMPLE = 256  # answers: tau within about 2 %, and as sharp a parity gate

STAGE = Stage(
    name="mining",
    config=MiningConfig,
    inputs=("target", "drafter", "trajectories"),
    body="draftsmith.stages.replay.body",
    compute=Compute.HEAVY,
    sharded=True,
    join_compute=Compute.LIGHT,
)
