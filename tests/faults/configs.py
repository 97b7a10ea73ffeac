"""The refreshes that faults are injected into: as small as they can be, with every stage.

Several configs, because no single refresh has every stage: `plain` is a refresh without a line, `line` the second
of a line of drafters, from logged answers, and `served` asks an SGLang server for its first rollout.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from tests.testbed import target
from tests.testbed.refresh import small_refresh

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
_TRAINING = {"anchors_per_sequence": 4, "checkpoint_every": CHECKPOINT_EVERY}
_ROLLOUT = {"engine": {"slots": 2}, "rows_per_shard": ROWS_PER_SHARD}


def config_of(kind: str, folder: Path) -> dict[str, Any]:
    """The config; folder: of its files."""
    config = small_refresh(
        kind, target.target_folder(), folder / "prompts.jsonl", 24,
        stages={"min_free_gb": 0.001, "retry_delay_seconds": 1},
        prompts={"heldout_share": 0.3},
        rollout={**_ROLLOUT, "prompts": 10},
        sft={**_TRAINING, "steps": 24, "drafter": {"block_size": 4}},
        assisted={**_ROLLOUT, "skip": 10},
        opd={**_TRAINING, "steps": 12},
        heldout=_ROLLOUT,
        evaluation={"speed_prompts": 4, "block_sizes": [4], "exactness_prompts": 1, "rounds": 4},
    )  # fmt: skip
    if kind == SERVED:
        engine = {"kind": "sglang", "concurrency": 2, "request_timeout_s": 10, "urls": ["http://127.0.0.1:1"]}
        config["rollout"] |= {"engine": engine, "sampling": {"max_new_tokens": 80, "temperature": 0.0}}
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
    """Write config and prompts into `folder`. answers: of an earlier refresh, for `line`."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = target.prompts_file().read_text("utf-8").splitlines(keepends=True)
    (folder / "prompts.jsonl").write_text("".join(rows[:60]), "utf-8")
    if answers is not None:
        log_answers(answers, folder / "answers.jsonl")
    config = folder / f"{kind}.yaml"
    config.write_text(yaml.safe_dump(config_of(kind, folder)))
    return config


def log_answers(trajectories: Path, path: Path) -> None:
    """Write the answers of a rollout as a server would have logged them."""
    from draftsmith.artifacts.tables.parquet import read_table
    from draftsmith.artifacts.tables.schemas import TRAJECTORIES

    rows = read_table(trajectories, TRAJECTORIES).to_pylist()
    logged = ({"prompt_token_ids": r["prompt_ids"], "completion_token_ids": r["response_ids"]} for r in rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in logged), "utf-8")
