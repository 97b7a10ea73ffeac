"""Fresh answers with a drafter in the loop, and the verify steps that are mined on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from draftsmith.stages.engines.stage import STAGE as ROLLOUT
from draftsmith.stages.replay.stage import STAGE as MINING
from tests.testbed.context import RecordingContext


def mined_answers(
    folder: Path, target: Path, prompts: Path, drafter: Path, count: int = 16, **sampling: Any
) -> dict[str, Path]:
    """Return the inputs of a training that continues from the drafter: target, drafter, `trajectories`, `mined`."""
    inputs = {"target": target, "drafter": drafter}
    rollout = RecordingContext.under(folder / "rollout", {**inputs, "prompts": prompts})
    sampling = {"max_new_tokens": 60, **sampling}
    rollout.run(ROLLOUT, splits=["heldout"], prompts=count, sampling=sampling, engine={"slots": count})
    inputs["trajectories"] = rollout.out
    return {**inputs, "mined": RecordingContext.under(folder / "mining", inputs).run(MINING).out}
