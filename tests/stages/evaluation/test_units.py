"""Turns of a conversation that is held out as a whole are no independent observations."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

from draftsmith.artifacts.tables.parquet import read_table, write_table
from draftsmith.artifacts.tables.schemas import LABELS, PROMPTS
from draftsmith.stages.data.held_out import independent_units
from draftsmith.stages.evaluation.drift import STAGE as DRIFT
from draftsmith.stages.evaluation.stage import STAGE as EVALUATION
from draftsmith.stages.runtime.statistics import Unit
from tests.testbed.context import RecordingContext
from tests.testbed.drafter import DrafterArtifacts


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
    (source,) = {row["source"] for row in rows}
    of_prompts = [Unit(source, name) for name in names]
    assert independent_units(tiny_drafter.prompts, names) == of_prompts
    conversations = independent_units(prompts, names)
    assert set(Counter(conversations).values()) == {3} and {unit.stratum for unit in conversations} == {source}
    assert independent_units(prompts, ["of logs"]) == [Unit("logs", "of logs")]
    bare = [row | {"messages": []} for row in rows]
    write_table(prompts / "prompts.parquet", PROMPTS, bare)
    assert independent_units(prompts, names) == of_prompts, "token ids show nothing"


def test_drift_and_evaluation_measure_conversations(
    prompts: Path, tmp_path: Path, tiny_drafter: DrafterArtifacts
) -> None:
    """Labels are slices of the drift check."""
    rows = read_table(prompts / "prompts.parquet", PROMPTS).to_pylist()
    labels = [
        {"prompt_id": row["prompt_id"], "labels": [f"language:{('de', 'en')[index % 2]}"]}
        for index, row in enumerate(rows)
    ]
    write_table(prompts / "labels.parquet", LABELS, labels)
    inputs = {"target": tiny_drafter.target, "prompts": prompts, "trajectories": tiny_drafter.heldout}
    inputs |= {"champion": tiny_drafter.drafter, "opd": tiny_drafter.drafter}
    found = RecordingContext.under(tmp_path / "drift", inputs).run(DRIFT).json("drift.json")
    sources = {row["source"] for row in rows if row["split"] == "heldout"}
    assert found.keys() == {"all", *sources, "language:de", "language:en"}
    assert min(found[name]["tau"] for name in ("language:de", "language:en")) < found["all"]["tau"]
    assert found["all"]["prompts"] == 20

    (prompts / "labels.parquet").unlink()
    ctx = RecordingContext.under(tmp_path / "evaluation", inputs)
    ctx.run(EVALUATION, sampling={"max_new_tokens": 4}, speed_prompts=1, rounds=1, exactness_prompts=0)
    found = ctx.json("evaluation.json")
    assert found["drafters"]["opd"]["prompts"] == found["verdicts"][0]["prompts"] == 20
    assert found["comparisons"][0]["units"] == sum(each["opd"]["prompts"] for each in found["sets"].values()) == 20
