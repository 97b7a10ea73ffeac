"""The stages of a whole refresh, in this process, for a target with two LoRA adapters: one drafter for both."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from draftsmith.artifacts.results.evaluation import EvaluationResult
from draftsmith.artifacts.tables.parquet import read_table
from draftsmith.artifacts.tables.schemas import ADAPTED_TRAJECTORIES
from draftsmith.stages.engines.base import Request
from draftsmith.stages.engines.embedded import EmbeddedEngine
from draftsmith.stages.targets.causal_lm import Target
from tests.testbed.adapters import merge, write_adapter
from tests.testbed.random_target import write_model
from tests.testbed.refresh import run_here, small_refresh


def test_a_refresh_under_adapters_is_lossless_and_measures_each(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    folders = {name: write_adapter(tmp_path / name, tmp_path / "model", seed=i) for i, name in enumerate("ab")}
    prompts, rng = tmp_path / "prompts.jsonl", np.random.default_rng(0)
    rows = [{"prompt_token_ids": rng.integers(0, 60, 5).tolist()} for _ in range(80)]
    prompts.write_text("\n".join(map(json.dumps, rows)))
    fields = small_refresh(
        "adapters", tmp_path / "model", prompts, 16,
        target={"adapters": {name: str(folder) for name, folder in folders.items()}},
        prompts={"train": 32, "heldout": 8, "heldout_share": 0.3}, rollout={"prompts": 24}, assisted={"skip": 24},
        sft={"steps": 60}, opd={"steps": 5}, evaluation={"exactness_prompts": 4, "speed_prompts": 4},
    )  # fmt: skip
    made = run_here(fields, tmp_path)

    for name in ("rollout", "assisted", "heldout"):  # the last two with a drafter and without
        answers = read_table(made[name] / "trajectories.parquet", ADAPTED_TRAJECTORIES).to_pylist()
        assert {row["adapter"] for row in answers} == {"a", "b"}
        for adapter, folder in folders.items():
            merged = Target.from_source(merge(tmp_path / "model", folder, tmp_path / f"{name}-{adapter}"), "float32")
            own = {row["trajectory_id"]: row for row in answers if row["adapter"] == adapter}
            asked = [Request(key, row["prompt_ids"], 16) for key, row in own.items()]
            for done in EmbeddedEngine(merged, capacity=32).generate(asked):
                assert done.response_ids == own[done.request.request_id]["response_ids"]
    result = EvaluationResult.read(made["evaluation"])
    assert result.exactness is not None and result.exactness.identical_share == 1.0
    assert result.exactness.fp32_identical == result.exactness.fp32_prompts == 4
    by_adapter = {name: arms for name, arms in result.sets.items() if name.startswith("adapter:")}
    assert by_adapter.keys() == {"adapter:a", "adapter:b"}
    for arms in by_adapter.values():
        assert {"sft", "control", "opd"} <= arms.keys() and {arms[arm].prompts for arm in ("sft", "opd")} == {4}
    counts = json.loads((made["prompts"] / "prompts.json").read_text())["slices"]
    assert counts == {f"adapter:{name}": {"heldout": 4, "train": 16, "validation": 1} for name in "ab"}
    assert (made["report"] / "report.html").is_file()
