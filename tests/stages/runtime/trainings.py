"""Small trainings of every kind on a random target, and the entry of the ranks that run them."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from draftsmith.artifacts.errors import EXIT_INTERRUPTED, StageInterrupted
from draftsmith.stages.runtime.launch import note_start
from draftsmith.stages.runtime.ranks import Ranks, process_group
from tests.testbed.context import RecordingContext, StoppingContext

STEPS, MIDDLE = 6, 3
SHARED = {
    "steps": STEPS, "sequences_per_step": 5, "anchors_per_sequence": 4, "learning_rate": 1e-3, "warmup_fraction": 0.2,
    "compute_dtype": "float32",
}  # fmt: skip
REDUCED = {"head_tokens": 12, "head_negatives": 4}
IN_PARTS = {"micro_batch_tokens": 70}  # of one or two answers
AGAIN = {"loss": "paper", "anchors": "visited", "remine_every": 3}


@dataclass(frozen=True)
class Training:
    """A stage with its config and inputs."""

    name: str
    stage: str  # module
    config: Mapping[str, Any]
    inputs: Mapping[str, str] = field(default_factory=dict)

    def run(self, context: RecordingContext, **fields: Any) -> None:
        stage = importlib.import_module(self.stage).STAGE
        stage.run(context, stage.config.model_validate({**SHARED, **self.config, **fields}))


def run_all(trainings: Sequence[Training], folder: str, stop_after: int | None, fields: Mapping[str, Any]) -> int:
    """Run every training in one rank until it is done or rank 0 is asked to stop."""
    torch.set_num_threads(1)
    note_start(Path(folder) / "ranks", int(os.environ["RANK"]))
    code = 0
    with process_group():
        ranks = Ranks.current()
        for training in trainings:
            place = Path(folder) / training.name
            place = place if ranks.is_main else place / f"rank {ranks.rank}"
            context = StoppingContext.under(place, {name: Path(path) for name, path in training.inputs.items()})
            context.work = Path(folder) / training.name / "work"
            context.stop_after = stop_after if ranks.is_main else None
            try:
                training.run(context, **fields)
            except StageInterrupted:
                code = EXIT_INTERRUPTED
            assert ranks.is_main or not list(context.out.iterdir()), "only the first rank writes"
            if ranks.is_main:
                reports = {"measured": context.measured, "logs": context.logs, "summaries": context.summaries}
                (place / f"reports-{ranks.world}.json").write_text(json.dumps(reports))
    return code
