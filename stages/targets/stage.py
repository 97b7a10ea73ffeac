"""Declares stage `target`: resolves the target model once; other stages read its `target.json` and load its folder."""

from __future__ import annotations

from draftsmith.stages.runtime.stage import Stage
from draftsmith.stages.targets.config import TargetConfig

STAGE = Stage(
    name="target",
    config=TargetConfig,
    inputs=(),
    body="draftsmith.stages.targets.body",
    volatile=("metrics.jsonl", "origin.json", "elsewhere.json"),  # a model that moves is the same model
)
