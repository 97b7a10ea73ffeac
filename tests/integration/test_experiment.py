"""A whole experiment by the real command: a target made here, its revision, arms over seeds, the comparison."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from draftsmith.artifacts.parquet import read_table
from draftsmith.artifacts.schemas import ACCEPTANCE
from draftsmith.artifacts.store import Store
from tests.integration.test_refresh import Home
from tests.testbed.databases import give_databases

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1800)]

SHAPE = {"hidden_size": 64, "layers": 4, "heads": 2, "kv_heads": 1, "intermediate_size": 128}
TAUGHT = {"documents": 300, "rows_per_step": 4, "learning_rate": 8.0e-3}
SAMPLING = {"max_new_tokens": 48, "temperature": 0.0}
TRAINING = {"sequences_per_step": 4, "anchors_per_sequence": 6, "compute_dtype": "float32"}
CONFIG: dict[str, Any] = {
    "kind": "experiment",
    "name": "small",
    "stages": {"threads": 1, "min_free_gb": 0.01},
    "target": {"kind": "procedural", "shape": SHAPE, "steps": 60, **TAUGHT},
    "revision": {"steps": 30, "revision_2": 1.0, **TAUGHT},
    "prompts": {
        "sources": [{"kind": "procedural", "families": ["record", "story"]}],
        "train": 40, "validation": 4, "heldout": 8,
    },
    "rollout": {"prompts": 20, "sampling": SAMPLING},
    "sft": {
        **TRAINING, "steps": 30, "learning_rate": 3e-3,
        "drafter": {"num_layers": 1, "block_size": 4, "target_layer_ids": [0, 1, 2]},
    },
    "fresh": {"skip": 20, "prompts": 20, "sampling": SAMPLING},
    "opd": {**TRAINING, "learning_rate": 1e-3},
    "heldout": {"splits": ["validation", "heldout"], "sampling": SAMPLING},
    "arms": {
        "sft": {"stage": "sft"},
        "opd": {"stage": "opd"},
    },
    "budgets": [6],
    "seeds": [0, 1],
    "comparison": {"control": "sft"},
}  # fmt: skip


def test_an_experiment_compares_its_arms_on_identical_trajectories(tmp_path: Path) -> None:
    home = Home(tmp_path, limit_s=1500)
    give_databases(home.path)
    home.config.write_text(yaml.safe_dump(CONFIG))

    first = home.run("run", home.config)
    assert first.returncode == 0, first.stderr
    store = Store(home.path / "store")
    comparisons = [m for m in store.list() if m.stage == "comparison"]
    assert len(comparisons) == 2  # before and after the change
    (manifest,) = [m for m in comparisons if len(m.inputs) > 5]
    folder = store.path("comparison", manifest.key)

    rows = json.loads((folder / "results.json").read_text())["heldout"]["arms"]
    found = {(row["arm"], row["steps"]): row for row in rows}
    assert set(found) == {("base", 0), ("sft", 6), ("opd", 6)}
    table = read_table(folder / "acceptance.parquet", ACCEPTANCE).to_pandas()
    for (arm, steps), row in found.items():
        of_arm = table[(table.arm == arm) & (table.steps == steps) & (table.split == "heldout")]
        sums = of_arm.groupby("seed")[["committed", "verify_steps"]].sum()
        assert row["tau_of_seeds"] == pytest.approx((sums.committed / sums.verify_steps).tolist())
        assert len(of_arm) == 8 * len(row["seeds"])
        if arm != "base":
            assert row["blocks"] == steps * 24
    assert "difference" in found["opd", 6]
    assert f"{found['opd', 6]['tau']:.3f}" in first.stdout
    assert "before the change, heldout: tau" in first.stdout
