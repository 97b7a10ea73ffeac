"""Turns of a conversation that is held out as a whole are no independent observations."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from draftsmith.artifacts.parquet import read_table, write_table
from draftsmith.artifacts.schemas import ACCEPTANCE, PROMPTS
from draftsmith.artifacts.store import Claim, Store
from draftsmith.stages.drafters.checkpoint import save_drafter
from draftsmith.stages.drift import STAGE as DRIFT
from draftsmith.stages.evaluation import STAGE as EVALUATION
from draftsmith.stages.experiments.comparison import STAGE as COMPARISON
from draftsmith.stages.experiments.comparison import ComparisonConfig
from draftsmith.stages.measure.config import EvaluationConfig
from draftsmith.stages.measure.drift import DriftConfig
from draftsmith.stages.prompting.held_out import units_of
from draftsmith.stages.statistics import jackknife, ratio_difference
from draftsmith.stages.stored import DRAFTER_FOLDER
from draftsmith.stages.targets.causal_lm import Target
from tests.testbed.context import RecordingContext
from tests.testbed.drafter import DrafterArtifacts
from tests.testbed.dspark import random_dspark


@pytest.fixture
def prompts(tmp_path: Path, tiny_drafter: DrafterArtifacts) -> Path:
    """The tiny drafter's, every three of them turns of one conversation."""
    folder = tmp_path / "prompts"
    shutil.copytree(tiny_drafter.prompts, folder)
    rows = read_table(folder / "prompts.parquet", PROMPTS).to_pylist()
    places: Counter[str] = Counter()
    for row in rows:
        first = {"role": "user", "content": f"{row['split']} {places[row['split']] // 3}"}
        places[row["split"]] += 1
        row["messages"] = [first, {"role": "assistant", "content": "Yes."}, *row["messages"]]
    write_table(folder / "prompts.parquet", PROMPTS, rows)
    (folder / "prompts.json").write_text(json.dumps({"heldout_by": "conversation"}))
    return folder


def test_a_prompt_is_its_own_unit_or_its_conversation_s(prompts: Path, tiny_drafter: DrafterArtifacts) -> None:
    rows = read_table(prompts / "prompts.parquet", PROMPTS).to_pylist()
    names = [row["prompt_id"] for row in rows if row["split"] == "heldout"]
    assert units_of(tiny_drafter.prompts, names) == names
    assert set(Counter(units_of(prompts, names)).values()) == {3}
    assert units_of(prompts, ["of logs"]) == ["of logs"]
    bare = [row | {"messages": []} for row in rows]
    write_table(prompts / "prompts.parquet", PROMPTS, bare)
    assert units_of(prompts, names) == names, "of token ids alone nothing is known"


def test_intervals_are_over_conversations(prompts: Path, tmp_path: Path, tiny_drafter: DrafterArtifacts) -> None:
    inputs = {"target": tiny_drafter.target, "prompts": prompts, "trajectories": tiny_drafter.heldout}
    drafters = {"champion": tiny_drafter.drafter, "opd": tiny_drafter.drafter}
    drift = RecordingContext.under(tmp_path / "drift", inputs | drafters)
    DRIFT.run(drift, DriftConfig())
    assert json.loads((drift.out / "drift.json").read_text())["all"]["prompts"] == 20
    ctx = RecordingContext.under(tmp_path / "evaluation", inputs | drafters)
    config: dict[str, Any] = {"sampling": {"max_new_tokens": 4}, "speed_prompts": 1, "rounds": 1}
    EVALUATION.run(ctx, EvaluationConfig.model_validate(config | {"exactness_prompts": 0}))
    found = json.loads((ctx.out / "evaluation.json").read_text())
    assert found["drafters"]["opd"]["prompts"] == found["verdicts"][0]["prompts"] == 20
    assert found["compared"][0]["units"] == sum(each["opd"]["prompts"] for each in found["sets"].values()) == 20


def test_an_experiment_s_intervals_are_too(prompts: Path, tmp_path: Path, tiny_drafter: DrafterArtifacts) -> None:
    store = Store(tmp_path / "store")
    inputs = {"target": tiny_drafter.target, "prompts": prompts, "trajectories": tiny_drafter.heldout}
    for arm, key in (("sft", "ab" * 32), ("opd", "cd" * 32)):
        with store.claim(arm, key) as claim:
            assert isinstance(claim, Claim)
            if arm == "sft":
                shutil.copytree(tiny_drafter.drafter / DRAFTER_FOLDER, claim.out / DRAFTER_FOLDER)
            else:
                save_drafter(random_dspark(Target.load(tiny_drafter.target)), claim.out / DRAFTER_FOLDER, torch.float32)
            made = store.commit(claim, config={}, inputs={}, code_digest="c", seed=0)
        inputs[f"drafter:{arm}:5:0"] = made.path
    ctx = RecordingContext.under(tmp_path / "comparison", inputs)
    COMPARISON.run(ctx, ComparisonConfig(control="sft", splits=("heldout",)))
    found = json.loads((ctx.out / "results.json").read_text())["heldout"]
    assert found["trajectories"] == 60 and found["prompts"] == 20

    rows = read_table(ctx.out / "acceptance.parquet", ACCEPTANCE).to_pandas()
    rows["unit"] = units_of(prompts, [trajectory.split("/")[0] for trajectory in rows.trajectory_id])
    sums = rows.groupby(["arm", "unit"])[["committed", "verify_steps"]].sum()
    parts = [sums.loc[arm][name].to_numpy() for arm in ("opd", "sft") for name in ("committed", "verify_steps")]
    (row,) = [each for each in found["arms"] if each["arm"] == "opd"]
    interval = jackknife(ratio_difference, *parts).interval()
    assert (row["difference_low"], row["difference_high"]) == pytest.approx(interval)
