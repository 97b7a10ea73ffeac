"""The stages of a whole refresh, in this process, whose OPD and control train adapters of the SFT drafter."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from draftsmith.artifacts.results.evaluation import EvaluationResult
from draftsmith.flows.planning.graph import topological_order
from draftsmith.flows.refresh.config import RefreshConfig
from draftsmith.flows.refresh.graph import refresh_nodes
from tests.testbed.context import RecordingContext
from tests.testbed.random_target import write_model
from tests.testbed.refresh import small_refresh


def test_a_refresh_with_adapters_evaluates_the_merged_drafters(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    rng = np.random.default_rng(0)
    rows = [{"prompt_token_ids": rng.integers(0, 60, 5).tolist()} for _ in range(80)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    fields = small_refresh(
        "lora", tmp_path / "model", tmp_path / "prompts.jsonl", 16,
        prompts={"train": 32, "heldout": 8, "heldout_share": 0.3}, rollout={"prompts": 24}, assisted={"skip": 24},
        sft={"steps": 30}, opd={"steps": 5, "lora": {"rank": 4}},
        evaluation={"exactness_prompts": 4, "speed_prompts": 4},
    )  # fmt: skip
    made: dict[str, Path] = {}
    for node in topological_order(refresh_nodes(RefreshConfig.model_validate(fields))):
        inputs = {name: made[source] for name, source in node.inputs.items()}
        context = RecordingContext(tmp_path / node.name, tmp_path / f"{node.name}.work", inputs, seed=1)
        node.stage.run(context, node.config)
        made[node.name] = context.out
    base = load_file(made["sft"] / "drafter" / "model.safetensors")
    digest = json.loads((made["sft"] / "drafter" / "drafter.json").read_text())["digest"]
    for name in ("opd", "control"):
        merged = load_file(made[name] / "drafter" / "model.safetensors")
        changed = {
            weight: merged[weight] - before for weight, before in base.items() if not merged[weight].equal(before)
        }
        assert changed and all(torch.linalg.matrix_rank(each, atol=1e-4) <= 4 for each in changed.values())
        info = json.loads((made[name] / "drafter" / "drafter.json").read_text())
        assert info["training"]["lora"] == {"rank": 4, "base": digest} and info["parents"] == [digest]
    result = EvaluationResult.read(made["evaluation"])
    assert {"sft", "control", "opd"} <= result.drafters.keys()
    assert result.exactness is not None and result.exactness.fp32_identical == result.exactness.fp32_prompts == 4
