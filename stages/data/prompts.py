"""Stage `prompts`: chat prompts with their token ids, in disjoint splits (training, validation, held-out)."""

from __future__ import annotations

from pathlib import Path

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.data.prompt_config import PromptsConfig
from draftsmith.stages.runtime.stage import SOURCES, Stage
from draftsmith.stages.target.info import read_target_info

MORE_LOGS = "Give more logs, or a section prompts with lower counts"  # the remedy if the prompts are rows of the logs


def preflight(config: PromptsConfig, target: Path) -> None:
    """Check that the files exist, and that prompts of the allowed length leave room for an answer."""
    config.external_files()
    context_tokens = read_target_info(target).max_positions
    if config.max_prompt_tokens >= context_tokens:
        raise DraftsmithError(
            f"{config.section}.max_prompt_tokens {config.max_prompt_tokens} leaves no room in the target's context of "
            f"{context_tokens} tokens. Lower it."
        )


STAGE = Stage(
    name="prompts",
    config=PromptsConfig,
    inputs=("target", f"{SOURCES}?"),
    body="draftsmith.stages.data.prompt_selection",
    preflight=preflight,
)
