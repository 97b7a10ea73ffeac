"""Stage `rollout`: the target answers prompts without a drafter (data for SFT) or with one (for mining and OPD)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.data.row_files import local_files
from draftsmith.stages.data.stored_prompts import PromptRows, check_answer_fits, load_prompts
from draftsmith.stages.drafters.spec import DraftingConfig
from draftsmith.stages.engines.config import (
    NO_REDUCED_HEAD,
    EmbeddedEngineConfig,
    EngineConfig,
    SamplingConfig,
    ServerEngineConfig,
)
from draftsmith.stages.engines.environment import engine_programs
from draftsmith.stages.runtime.stage import Compute, Config, Stage


class RolloutConfig(Config):
    """Selects the prompts to answer, the engine, and how tokens are sampled."""

    splits: Annotated[tuple[str, ...], Field(description="splits of the prompts to answer")] = ("train",)
    skip: Annotated[int, Field(ge=0, description="prompts to skip at the beginning of the splits")] = 0
    prompts: Annotated[int | None, Field(ge=1, description="number of prompts; default: all")] = None
    sampling: SamplingConfig = SamplingConfig()
    engine: EngineConfig = EmbeddedEngineConfig()
    answers: Annotated[
        str | None,
        Field(
            description="a file or glob of answers that the target gave before, in rows of prompt_token_ids and "
            "completion_token_ids as in section logs; they are used, and nothing is generated"
        ),
    ] = None
    drafting: DraftingConfig = DraftingConfig()
    rows_per_shard: Annotated[
        int | None,
        Field(
            ge=1,
            description="answers in one batch: a killed stage loses at most these. The embedded engine decodes them "
            "together, which decides near-ties in half precision. Default: 16 per slot; with servers, 32",
        ),
    ] = None

    @model_validator(mode="after")
    def _engine_has_a_reduced_head(self) -> RolloutConfig:
        if isinstance(self.engine, ServerEngineConfig) and self.drafting.head_tokens is not None:
            raise ValueError(f"drafting.head_tokens: {NO_REDUCED_HEAD}")
        return self

    def programs(self) -> dict[str, str]:
        return engine_programs(self.engine)

    def external_files(self) -> list[Path]:
        """Return the files of logged answers. Raises DraftsmithError if there are none."""
        return [] if self.answers is None else local_files([self.answers], "answers")

    def counts(self, available: Mapping[str, int]) -> dict[str, int]:
        """Return the number of prompts to answer per split.

        available: the number of prompts per split, in the order of their rows.
        """
        skip, left = self.skip, math.inf if self.prompts is None else self.prompts
        counts = {}
        for split, number in available.items():
            selected = number if split in self.splits else 0
            counts[split] = int(min(left, max(0, selected - skip)))
            skip, left = max(0, skip - selected), left - counts[split]
        return counts


def prompt_shortage(config: RolloutConfig, available: int) -> str | None:
    """Return why `available` prompts of the splits are too few; None if they are enough."""
    left = available - config.skip
    if left > 0 and left >= (config.prompts or 0):
        return None
    return (
        f"splits {list(config.splits)} have {available} prompts, {config.skip} are skipped and "
        f"{config.prompts or 'all others'} requested. Raise the counts in section prompts, or lower skip or prompts."
    )


def prompts_to_answer(config: RolloutConfig, folder: Path) -> PromptRows:
    """Load the prompts to answer from an artifact of stage `prompts`. Raises DraftsmithError if there are too few."""
    available = load_prompts(folder, config.splits)
    if not (selected := available[config.skip :][: config.prompts]):
        raise DraftsmithError(f"rollout: {prompt_shortage(config, len(available))}")
    return selected


def preflight(config: RolloutConfig, target: Path) -> None:
    """Check that the longest answer fits into the target's context."""
    check_answer_fits(config.sampling.max_new_tokens, target)


def _compute(config: RolloutConfig) -> Compute:
    """Return what the stage needs: none of this machine's devices if the servers run already."""
    running = isinstance(config.engine, ServerEngineConfig) and config.engine.launch is None
    return Compute.LIGHT if running else Compute.HEAVY


STAGE = Stage(
    name="rollout",
    config=RolloutConfig,
    inputs=("target", "prompts", "drafter?"),
    body="draftsmith.stages.engines.body",
    preflight=preflight,
    compute=_compute,
    volatile=("metrics.jsonl", "timings.parquet", "versions.json"),
)
