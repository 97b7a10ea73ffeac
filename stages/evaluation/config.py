"""The config section `evaluation`, and the prompts that an evaluation decodes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from draftsmith.stages.data.stored_prompts import Prompt, load_prompts
from draftsmith.stages.drafters.spec import DraftingConfig
from draftsmith.stages.engines.config import (
    NO_REDUCED_HEAD,
    EmbeddedEngineConfig,
    EngineConfig,
    SamplingConfig,
    ServerEngineConfig,
)
from draftsmith.stages.engines.environment import engine_programs
from draftsmith.stages.replay.options import PARITY_MISMATCH, MaxParityMismatch, TokensPerForward
from draftsmith.stages.runtime.stage import Config, FilledIn, NotInKey

DRAFTERS = ("champion", "sft", "control", "opd")  # the arms of a refresh
PREFIX = "drafter:"  # prefix of the inputs when other drafters are compared; the rest of the name is the arm's


def _several(value: Any) -> Any:
    """Return a single value as a tuple of one."""
    return (value,) if isinstance(value, int | float) else value


class EvaluationConfig(Config):
    """The measurement of acceptance, speed and exactness."""

    sampling: SamplingConfig = SamplingConfig()
    engine: Annotated[
        EngineConfig,
        Field(description="engine that speed is measured on; its `slots` or `concurrency` is not used"),
    ] = EmbeddedEngineConfig()
    concurrency: Annotated[
        tuple[Annotated[int, Field(ge=1)], ...],
        BeforeValidator(_several),
        Field(min_length=1, description="requests in flight while speed is measured: one number or several"),
    ] = (1,)
    temperatures: Annotated[
        Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(min_length=1)] | None,
        BeforeValidator(_several),
        Field(description="temperatures at which speed is measured; default: sampling.temperature"),
    ] = None
    rounds: Annotated[
        int,
        Field(
            ge=1,
            description="how often every arm decodes the prompts while speed is measured; doubled on a machine so "
            "busy that repetitions disagree. With one request in flight on the embedded engine the prompts are the "
            "repetitions, and 1 round is enough; 2 tell the machine's noise from the prompts' own spread. Servers need "
            "5 before speeds may be called different. With 64 prompts and 3 % noise between timed runs, 12 rounds find "
            "a difference of 5 %, and 5 rounds one of 10 %; "
            "with 16 in flight twice that",
        ),
    ] = 5
    speed_prompts: Annotated[
        int,
        Field(
            ge=1,
            description="held-out prompts decoded in every timed run, a sample of all served prompts. If a "
            "drafter's speed differs by 30 % from prompt to prompt of a set, 16 prompts give its speed-up within 16 %, "
            "64 within 8 % (at 95 %). With several requests in flight at least twice as many prompts are needed. Up to "
            "two further looks add as many prompts each, as long as the held-out prompts suffice",
        ),
    ] = 16
    validation_prompts: Annotated[
        int,
        Field(
            ge=1,
            description="validation prompts on which each arm's block size is chosen; at least as many as requests in "
            "flight at the first setting",
        ),
    ] = 8
    block_sizes: Annotated[
        tuple[Annotated[int, Field(ge=2)], ...] | None,
        Field(description="block sizes to choose from; default: the trained one"),
    ] = None
    head_tokens: Annotated[
        int | None, Field(ge=2, description="draft only from the most frequent tokens, this many (embedded engine)")
    ] = None
    exactness_prompts: Annotated[
        int, Field(ge=0, description="held-out prompts compared token for token in fp32 (embedded engine)")
    ] = 4
    parity_prompts: Annotated[
        int, Field(ge=1, description="held-out prompts whose verify steps on servers are compared with replay")
    ] = 8
    max_parity_mismatch: MaxParityMismatch = PARITY_MISMATCH
    tokens_per_target_forward: TokensPerForward = 2048
    min_speedup: Annotated[float | None, FilledIn(), NotInKey()] = None
    """The gate's, so that an undecided speed-up gets another look; None: no gate judges speed."""

    @model_validator(mode="after")
    def _servers_can_take_the_drafters(self) -> EvaluationConfig:
        if isinstance(self.engine, ServerEngineConfig):
            if self.engine.launch is None:
                raise ValueError("engine.urls: running servers cannot serve newly trained drafters. Use engine.launch.")
            if self.head_tokens is not None:
                raise ValueError(f"head_tokens: {NO_REDUCED_HEAD}")
        return self

    @property
    def by_prompt(self) -> bool:
        """Return whether arms alternate prompt by prompt, so that prompts, not rounds, are the repetitions."""
        return not isinstance(self.engine, ServerEngineConfig) and set(self.concurrency) == {1}

    def drafted(self, block_size: int | None = None) -> DraftingConfig:
        """Return how every drafter drafts. block_size: None: the trained one."""
        return DraftingConfig(block_size=block_size, head_tokens=self.head_tokens)

    def key_material(self) -> dict[str, Any]:
        """Add the launch settings of servers: they decide the speed, though not the answers of a rollout."""
        material = super().key_material()
        if isinstance(self.engine, ServerEngineConfig):
            launched = self.engine.model_dump(mode="json", include={"launch"}, exclude={"launch": {"start_timeout_s"}})
            material["engine"] |= launched
        return material

    def programs(self) -> dict[str, str]:
        """Return the versions of the engine's programs."""
        return engine_programs(self.engine)


def prompts_to_decode(config: EvaluationConfig, folder: Path) -> tuple[Sequence[Prompt], Sequence[Prompt]]:
    """Return held-out and validation prompts. folder: artifact of stage `prompts`."""
    choice = max(config.validation_prompts, config.concurrency[0])  # so that the first setting is reached
    return load_prompts(folder, ["heldout"]), load_prompts(folder, ["validation"])[:choice]
