"""Answers in shards, with drafters that sample proposals: mined and replayed as by one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from draftsmith.stages.data.trajectories import DRAFTER_FOLDER, load_trajectories
from draftsmith.stages.drafters.base import Drafter, DrafterInfo
from draftsmith.stages.drafters.checkpoint import save_drafter
from draftsmith.stages.evaluation.config import EvaluationConfig
from draftsmith.stages.evaluation.stage import STAGE as EVALUATION
from draftsmith.stages.replay.options import ReplayOptions
from draftsmith.stages.replay.replayer import Replayer
from draftsmith.stages.replay.stage import STAGE as MINING
from draftsmith.stages.replay.stage import MiningConfig
from draftsmith.stages.replay.trace import AcceptanceStats
from draftsmith.stages.runtime.stage import Shard
from draftsmith.stages.target.causal_lm import Target
from tests.testbed import random_target
from tests.testbed.context import RecordingContext
from tests.testbed.dflash2 import random_dflash2
from tests.testbed.dspark import random_dspark

DRAWING: dict[str, Callable[[Target], Drafter]] = {"dflash2": random_dflash2, "dspark": random_dspark}
TOKENS, SHARDS = 100, 3


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = random_target.trajectories(14, seed=7)
    folder = tmp_path_factory.mktemp("answers")
    return random_target.write_trajectories(folder, made, temperature=1.0, split="heldout")


@pytest.fixture(scope="module")
def drafters(tmp_path_factory: pytest.TempPathFactory, plain_target: Target) -> dict[str, Path]:
    """Return the artifacts of the drafters."""
    folder = tmp_path_factory.mktemp("drafters")
    for kind, make in DRAWING.items():
        drafter = make(plain_target)
        drafter.frequent_tokens = torch.arange(random_target.VOCAB_SIZE)
        drafter.info = DrafterInfo(plain_target.info.digest, plain_target.info.source, (), {})
        save_drafter(drafter, folder / kind / DRAFTER_FOLDER, torch.float32)
    return {kind: folder / kind for kind in DRAWING}


@pytest.mark.parametrize("kind", DRAWING)
def test_mining_in_shards_gives_the_same_bytes(
    kind: str, tmp_path: Path, plain_artifact: Path, answers: Path, drafters: dict[str, Path]
) -> None:
    inputs = {"target": plain_artifact, "drafter": drafters[kind], "trajectories": answers}
    config = MiningConfig(tokens_per_target_forward=TOKENS)
    whole = RecordingContext.under(tmp_path / "whole", inputs)
    MINING.run(whole, config)
    parts = [RecordingContext.under(tmp_path / str(index), inputs) for index in range(SHARDS)]
    for index, part in enumerate(parts):
        MINING.shard(part, config, Shard(index, SHARDS))
    assert all(part.summaries["trajectories"] for part in parts)
    joined = RecordingContext.under(tmp_path / "joined", inputs, shards=[part.out for part in parts])
    MINING.run(joined, config)
    for name in ("verify_steps.parquet", "summary.json"):
        assert (joined.out / name).read_bytes() == (whole.out / name).read_bytes(), name


def test_an_evaluation_in_shards_replays_like_one_process(
    tmp_path: Path, plain_artifact: Path, plain_target: Target, answers: Path, drafters: dict[str, Path]
) -> None:
    inputs = {"target": plain_artifact, "trajectories": answers, "sft": drafters["dflash2"], "opd": drafters["dspark"]}
    config = EvaluationConfig(tokens_per_target_forward=TOKENS)
    parts = [RecordingContext.under(tmp_path / str(index), inputs) for index in range(SHARDS)]
    for index, part in enumerate(parts):
        EVALUATION.shard(part, config, Shard(index, SHARDS))
    stored = load_trajectories(answers, ["heldout"])
    made = {"sft": random_dflash2(plain_target), "opd": random_dspark(plain_target)}
    replayed: list[int] = []

    def tallied(done: list[Path]) -> dict[str, AcceptanceStats]:
        replayed.clear()
        replayer = Replayer(plain_target, ReplayOptions(sampling=stored.sampling, tokens_per_group=TOKENS))
        return replayer.acceptance(
            made, stored.trajectories, shards=done, progress=lambda count, _total: replayed.append(count)
        )

    whole = tallied([])
    assert len(replayed) >= SHARDS
    joined = tallied([part.out / "replayed" / "trained" for part in parts])
    assert not replayed  # by the shards alone
    for arm, found in whole.items():
        assert 1 < found.tau == joined[arm].tau
        np.testing.assert_array_equal(found.committed, joined[arm].committed)
