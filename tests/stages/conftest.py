"""Fixtures of the stages' tests: the tiny target and its drafters, loaded once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from draftsmith.artifacts.tables.parquet import read_table
from draftsmith.artifacts.tables.schemas import PROMPTS, TRAJECTORIES
from draftsmith.stages.data.trajectories import DRAFTER_FOLDER, load_trajectories
from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.drafters.checkpoint import create_drafter, load_drafter
from draftsmith.stages.drafters.eagle3.config import Eagle3Config
from draftsmith.stages.targets.body import resolve_target
from draftsmith.stages.targets.config import TargetConfig
from draftsmith.stages.training.batches import frequent_tokens, token_counts
from tests.stages.bench import Bench, cached_answers
from tests.stages.data.logs.logs_run import Logs
from tests.testbed.drafter import DrafterArtifacts


@pytest.fixture(scope="session")
def target(tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the artifact of stage `target` for the tiny target, float32."""
    out = tmp_path_factory.mktemp("target")
    resolve_target(TargetConfig(source=str(tiny_target), dtype="float32"), out, lambda _line: None)
    return out


@pytest.fixture(scope="session")
def eagle_bench(bench: Bench, tiny_drafter: DrafterArtifacts, tiny_eagle3: Path) -> Bench:
    """Return the bench with EAGLE-3 drafters, trained and untrained, both with a reduced vocabulary."""
    trained = load_drafter(tiny_eagle3 / DRAFTER_FOLDER, bench.target)
    counts = token_counts(load_trajectories(tiny_drafter.rollout).trajectories, bench.target.info.vocab_size)
    shape = Eagle3Config(kind="eagle3", block_size=6, target_layer_ids=(0, 1, 2), draft_vocab_size=90)
    untrained = create_drafter(shape, bench.target, 3, frequent_tokens(counts))
    untrained.frequent_tokens = frequent_tokens(counts)
    drafters: dict[str, Drafter] = {"trained": trained, "untrained": untrained.eval()}
    greedy = cached_answers("answers-eagle3", tiny_drafter.root.name, lambda: bench.with_drafters(drafters))
    return bench.with_answers(drafters, greedy)


@pytest.fixture(scope="session")
def logged_answers(tiny_drafter: DrafterArtifacts) -> list[dict[str, Any]]:
    """Return rows of 60 greedy answers of the tiny target with at least six tokens, and their messages."""
    messages = {
        row["prompt_id"]: row["messages"]
        for row in read_table(tiny_drafter.prompts / "prompts.parquet", PROMPTS).to_pylist()
    }
    rows = read_table(tiny_drafter.rollout / "trajectories.parquet", TRAJECTORIES).to_pylist()
    return [row | {"messages": messages[row["prompt_id"]]} for row in rows if len(row["response_ids"]) > 5][:60]


@pytest.fixture
def logs(tmp_path: Path, tiny_drafter: DrafterArtifacts, logged_answers: list[dict[str, Any]]) -> Logs:
    return Logs(tmp_path, tiny_drafter, logged_answers)
