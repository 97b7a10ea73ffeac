"""The refreshes that faults are injected into: as small as they can be with every stage in them.

Several configs, because no single refresh has every stage: `plain` is a refresh that stands alone, `line` the second
of a line of drafters, from logged answers, and `served` asks an SGLang server for its first rollout.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from draftsmith.stages.procedural.training import MASK
from tests.testbed import target

PLAIN, LINE, SERVED = "plain", "line", "served"
NODES = {
    PLAIN: (
        "target", "prompts", "heldout", "rollout", "sft", "assisted", "mining", "opd", "control", "evaluation",
        "report",
    ),
    LINE: ("champion", "drift", "earlier", "logs", "gate"),  # of its nodes, those that `plain` does not have
    SERVED: ("rollout",),
}  # fmt: skip
CHECKPOINT_EVERY = 4  # steps
ROWS_PER_SHARD = 2  # answers
_SAMPLING = {"max_new_tokens": 24, "temperature": 0.0}
_TRAINING = {
    "sequences_per_step": 4, "anchors_per_sequence": 4, "compute_dtype": "float32",
    "checkpoint_every": CHECKPOINT_EVERY,
}  # fmt: skip


def config_of(kind: str, folder: Path) -> dict[str, Any]:
    """The config; `folder` is where its files lie."""
    config: dict[str, Any] = {
        "name": kind,
        "stages": {"threads": 1, "min_free_gb": 0.001, "grace_seconds": 3, "retry_delay_seconds": 1},
        "target": {"source": str(target.target_folder()), "dtype": "float32"},
        "prompts": {
            "sources": [{"kind": "jsonl", "path": str(folder / "prompts.jsonl")}],
            "train": 16, "validation": 2, "heldout": 4, "heldout_share": 0.3,
        },
        "rollout": {"prompts": 10, "sampling": _SAMPLING, "engine": {"slots": 2}, "rows_per_shard": ROWS_PER_SHARD},
        "sft": {
            **_TRAINING, "steps": 24, "learning_rate": 3e-3,
            "drafter": {"num_layers": 1, "block_size": 4, "target_layer_ids": [0, 1, 2], "mask_token": MASK},
        },
        "assisted": {"skip": 10, "sampling": _SAMPLING, "engine": {"slots": 2}, "rows_per_shard": ROWS_PER_SHARD},
        "mining": {},
        "opd": {**_TRAINING, "steps": 12},
        "heldout": {
            "splits": ["validation", "heldout"], "sampling": _SAMPLING, "engine": {"slots": 2},
            "rows_per_shard": ROWS_PER_SHARD,
        },
        "evaluation": {
            "sampling": _SAMPLING, "speed_prompts": 2, "validation_prompts": 2, "block_sizes": [4],
            "exactness_prompts": 1, "rounds": 2,
        },
    }  # fmt: skip
    if kind == SERVED:
        engine = {"kind": "sglang", "concurrency": 2, "request_timeout_s": 10, "urls": ["http://127.0.0.1:1"]}
        config["rollout"] |= {"engine": engine, "sampling": {**_SAMPLING, "max_new_tokens": 80}}
    if kind == LINE:
        del config["rollout"], config["assisted"]
        config |= {
            "registry": {"name": "faults"},
            "logs": {"paths": [str(folder / "answers.jsonl")], "temperature": 0, "replay_share": 0.3},
            "gate": {"judge_speed": False},
            "drift": {"max_age_days": 1e-6},  # the champion is always due
        }
    return config


def write(kind: str, folder: Path, answers: Path | None = None) -> Path:
    """Config and prompts in `folder`. answers: of an earlier refresh, for `line`."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = target.prompts_file().read_text("utf-8").splitlines(keepends=True)
    (folder / "prompts.jsonl").write_text("".join(rows[:60]), "utf-8")
    if answers is not None:
        log_answers(answers, folder / "answers.jsonl")
    config = folder / f"{kind}.yaml"
    config.write_text(yaml.safe_dump(config_of(kind, folder)))
    return config


def log_answers(trajectories: Path, path: Path) -> None:
    """What the target answered in a rollout, as a server would have logged it."""
    from draftsmith.artifacts.parquet import read_table
    from draftsmith.artifacts.schemas import TRAJECTORIES

    rows = read_table(trajectories, TRAJECTORIES).to_pylist()
    logged = ({"prompt_token_ids": r["prompt_ids"], "completion_token_ids": r["response_ids"]} for r in rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in logged), "utf-8")
