"""An interrupted rollout gives the answers of an uninterrupted one, also where the batch decides near-ties."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from draftsmith.artifacts.errors import StageInterrupted
from draftsmith.artifacts.store.manifest import content_id, describe_files
from draftsmith.artifacts.tables.parquet import write_table
from draftsmith.artifacts.tables.schemas import PROMPTS
from draftsmith.stages.engines.stage import STAGE, RolloutConfig
from draftsmith.stages.target.info import INFO_FILE
from tests.testbed.context import StoppingContext
from tests.testbed.random_target import TEXT_TOKENS


@pytest.fixture
def inputs(plain_artifact: Path, tmp_path: Path) -> dict[str, Path]:
    """Return the random target in bfloat16, and prompts for it."""
    target, prompts = Path(shutil.copytree(plain_artifact, tmp_path / "target")), tmp_path / "prompts"
    info = json.loads((target / INFO_FILE).read_text())
    (target / INFO_FILE).write_text(json.dumps(info | {"dtype": "bfloat16"}))
    draw = random.Random(0)
    rows = [
        {
            "prompt_id": f"p{index}",
            "source": "random",
            "split": "train",
            "messages": [],
            "token_ids": [draw.randrange(TEXT_TOKENS) for _ in range(draw.randint(2, 12))],
        }
        for index in range(40)
    ]
    write_table(prompts / "prompts.parquet", PROMPTS, rows)
    return {"target": target, "prompts": prompts}


def test_an_interruption_changes_no_answer_in_half_precision(inputs: dict[str, Path], tmp_path: Path) -> None:
    config = RolloutConfig.model_validate(
        {"sampling": {"max_new_tokens": 60, "temperature": 1.0}, "engine": {"slots": 5}, "rows_per_shard": 16}
    )

    def rollout(name: str, *stops: int, **changes: Any) -> str:
        for stop in stops:
            with pytest.raises(StageInterrupted):
                STAGE.run(StoppingContext.under(tmp_path / name, inputs, stop_after=stop), config)
        last = StoppingContext.under(tmp_path / name, inputs)
        STAGE.run(last, config.model_copy(update=changes))
        return content_id(describe_files(last.out, STAGE.volatile))

    whole = rollout("whole")
    assert rollout("cut", 3, 22) == whole
    if rollout("other", rows_per_shard=7) == whole:
        pytest.skip("on this processor nothing depends on the batch: what is above shows nothing")
