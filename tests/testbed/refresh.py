"""Configs of refreshes: a small one with every stage, which tests override, and YAML files. Runs single nodes."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from draftsmith.flows.config.load import merge_configs, read_config
from draftsmith.flows.planning.graph import Node, topological_order
from draftsmith.flows.refresh.config import RefreshConfig
from draftsmith.flows.refresh.graph import refresh_nodes
from draftsmith.stages.catalog import STAGES
from draftsmith.stages.runtime.stage import Config
from tests.testbed.context import RecordingContext
from tests.testbed.procedural.training import MASK


def small_refresh(name: str, target: Path | str, prompts: Path | str, answer: int, /, **fields: Any) -> dict[str, Any]:
    """Return a config with greedy answers of at most `answer` tokens. fields: override it, as an extending file."""
    sampling = {"max_new_tokens": answer, "temperature": 0.0}
    training = {"sequences_per_step": 4, "anchors_per_sequence": 8, "compute_dtype": "float32"}
    drafter = {"num_layers": 1, "block_size": 6, "target_layer_ids": [0, 1, 2], "mask_token": MASK}
    base = {
        "name": name,
        "stages": {"threads": 1, "min_free_gb": 0.01, "retry_delay_seconds": 0},
        "target": {"source": str(target), "dtype": "float32"},
        "prompts": {"sources": [{"kind": "jsonl", "path": str(prompts)}], "train": 16, "validation": 2, "heldout": 4},
        "rollout": {"prompts": 8, "sampling": sampling},
        "sft": {**training, "learning_rate": 3e-3, "drafter": drafter},
        "assisted": {"skip": 8, "sampling": sampling},
        "mining": {},
        "opd": training,
        "heldout": {"splits": ["validation", "heldout"], "sampling": sampling},
        # one round: a machine that is busy with other tests has no repetitions that disagree
        "evaluation": {"sampling": sampling, "validation_prompts": 2, "rounds": 1},
    }
    return merge_configs(base, fields)


def load_config(path: Path, overrides: Sequence[str] = ()) -> RefreshConfig:
    """Load the config of a refresh from a YAML file, with overrides such as `opd.steps=200`."""
    return read_config(path, overrides, RefreshConfig)


def node_of(stage: str, inputs: Mapping[str, str] | None = None, node: str = "", /, **fields: Any) -> Node:
    """Return a node of a stage of the catalogue. node: its name, by default the stage's. fields: of its config."""
    made = Node(node or stage, STAGES[stage], Config(), inputs or {})
    return replace(made, config=made.stage.config.model_validate(fields))


def run_here(fields: Mapping[str, Any], folder: Path) -> dict[str, Path]:
    """Run every stage of a refresh in this process; return its artifacts by node."""
    made: dict[str, Path] = {}
    for node in topological_order(refresh_nodes(RefreshConfig.model_validate(fields))):
        inputs = {name: made[source] for name, source in node.inputs.items()}
        context = RecordingContext(folder / node.name, folder / f"{node.name}.work", inputs, seed=1)
        node.stage.run(context, node.config)
        shutil.rmtree(context.work)
        made[node.name] = context.out
    return made
