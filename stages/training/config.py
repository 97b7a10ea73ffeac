"""How a drafter is trained: what SFT and OPD have in common."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from draftsmith.stages.contract import Config, Operational


class OptimiserConfig(Config):
    """How the weights move."""

    steps: Annotated[int, Field(ge=1)] = 1000
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.05
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    compute_dtype: Annotated[
        Literal["bfloat16", "float32"], Field(description="weights stay float32; bfloat16 = autocast")
    ] = "bfloat16"
    checkpoint_every: Annotated[int, Field(ge=1, description="steps"), Operational()] = 100


class TrainingConfig(OptimiserConfig):
    """What a step is made of."""

    sequences_per_step: Annotated[int, Field(ge=1)] = 8
    anchors_per_sequence: Annotated[int, Field(ge=1)] = 16
    spacing: Annotated[
        Literal["even", "random"],
        Field(
            description="which of the possible anchors of a trajectory: even takes every n-th from a random one on, so "
            "that the blocks of a step overlap little; random draws them independently"
        ),
    ] = "even"
    head_tokens: Annotated[
        int | None,
        Field(
            ge=2,
            description="softmax over this many most frequent tokens, those of the step's trajectories and "
            "`head_negatives` random others, instead of the whole vocabulary; OPD judges verify steps over them too",
        ),
    ] = None
    head_negatives: Annotated[int, Field(ge=0)] = 1024
    positions_per_chunk: Annotated[int, Field(ge=1, description="bounds the memory for logits")] = 512
    feature_memory_mb: Annotated[
        float,
        Field(gt=0, description="target features kept in memory; if it does not hold all, rounding differs"),
        Operational(),
    ] = 2048.0
    tokens_per_target_forward: Annotated[int, Field(ge=1)] = 2048

    def passes(self, trajectories: int) -> float:
        """How often a training of all steps draws each of so many trajectories: SFT learns few answers by heart."""
        return self.steps * self.sequences_per_step / trajectories
