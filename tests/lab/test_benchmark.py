"""The refresh benchmark: what is shipped is unchanged, a rival trains as its paper says, scores follow the bars."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from draftsmith.stages.data.trajectories import DRAFTER_FOLDER, load_trajectories
from draftsmith.stages.drafters.checkpoint import load_drafter
from draftsmith.stages.drafters.dflash.model import DFlashDrafter
from draftsmith.stages.replay.trace import AcceptanceStats
from draftsmith.stages.training.batches import FeatureSource
from draftsmith.stages.training.blocks import encode_batch, pad_anchors, tokens_at
from tests.lab.benchmark import ARMS, FIRST, INDEX, SEASON, WEEKS, checksum, compare, loaded_target, promotes, run_stage
from tests.lab.benchmark import answers as answers_of
from tests.lab.benchmark import target_artifact as artifact_of
from tests.lab.rivals import hidden_after_prefix
from tests.testbed.refresh import load_config


def test_the_season_is_what_its_content_ids_say() -> None:
    index = json.loads((SEASON / INDEX).read_text())
    shipped = [path for path in SEASON.rglob("*") if path.suffix in (".parquet", ".safetensors")]
    assert sum(path.stat().st_size for path in shipped) < 20e6
    assert {str(path.relative_to(SEASON)): checksum(path) for path in shipped} == {
        name: fields["sha256"] for name, fields in index["files"].items()
    }


def test_weeks_are_split_by_time_and_share_no_prompt() -> None:
    seen: set[tuple[int, ...]] = set()
    latest = ""
    for number, week in enumerate(WEEKS):
        rows = pq.read_table(SEASON / f"week-{number}.parquet").to_pylist()
        times = [row["timestamp"] for row in rows]
        assert latest < times[0] and times == sorted(times)
        latest = times[-1]
        assert [row["split"] for row in rows] == ["train"] * week.trained + ["heldout"] * (len(rows) - week.trained)
        prompts = {tuple(row["prompt_token_ids"]) for row in rows}
        assert len(prompts) == len(rows) and not prompts & seen
        seen |= prompts


def test_the_config_for_any_drafter_is_valid() -> None:
    config = load_config(SEASON.with_name("season.yaml"))
    assert config.heldout.answers is not None and config.prompts.prompt_count("heldout") == 480


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The inputs of a training: a drafter that has learned next to nothing."""
    folder = tmp_path_factory.mktemp("first") / "out"
    inputs = {"target": artifact_of(SEASON / "target-0"), "trajectories": answers_of(0) / "train"}
    run_stage("sft", FIRST.model_copy(update={"steps": 2}).model_dump(), folder, inputs)
    return inputs | {"drafter": folder}


def test_the_rival_trains_a_checkpoint_that_loads(start: dict[str, Path], tmp_path: Path) -> None:
    trainer, config = ARMS["visible-prefix"]
    run_stage(trainer, {**config, "steps": 2}, tmp_path / "out", start)
    target = loaded_target(SEASON / "target-0")
    before, after = (load_drafter(folder / DRAFTER_FOLDER, target) for folder in (start["drafter"], tmp_path / "out"))
    weights = dict(after.named_parameters())
    assert weights.keys() == dict(before.named_parameters()).keys()
    assert any(not torch.equal(parameter, weights[name]) for name, parameter in before.named_parameters())


def test_with_one_visible_token_a_block_is_drafted_as_it_is_served(start: dict[str, Path]) -> None:
    target = loaded_target(SEASON / "target-0")
    drafter = load_drafter(start["drafter"] / DRAFTER_FOLDER, target)
    assert isinstance(drafter, DFlashDrafter)
    trajectories = load_trajectories(answers_of(0) / "train").trajectories[:2]
    batch = FeatureSource(target, drafter.target_layer_ids, trajectories, FIRST, with_hidden=False).batch([0, 1])
    anchors = pad_anchors([np.array([t.first_anchor, t.first_anchor + 3]) for t in trajectories], target.device)
    context = encode_batch(drafter, batch)
    served = drafter.block_hidden(context, tokens_at(batch, anchors, 0, drafter.block_size - 1), anchors.positions)
    one, two = (
        hidden_after_prefix(drafter, context, batch, anchors, torch.full_like(anchors.positions, visible))
        for visible in (1, 2)
    )
    torch.testing.assert_close(one, served)
    assert not torch.allclose(two, served)


def stats(committed: Any, steps: Any) -> AcceptanceStats:
    made = AcceptanceStats(len(committed))
    made.committed, made.steps = np.array(committed, dtype=float), np.array(steps, dtype=float)
    made.committed_at[:, 0], made.steps_at[:, 0] = made.committed, made.steps
    made.accepted = made.judged = np.zeros(8, dtype=np.int64)
    return made


def test_verdicts_and_gate_follow_the_measured_difference() -> None:
    steps, noise = np.full(80, 10.0), np.random.default_rng(0).normal(0, 1, 80)
    base, better = stats(30 + noise, steps), stats(33 + noise, steps)
    families = [("record",)] * 80
    assert compare([better], [base])["verdict"] == "wins" and compare([base], [better])["verdict"] == "loses"
    assert compare([base], [base])["verdict"] == "ties"
    assert compare([stats(30.1 + noise, steps)], [base])["verdict"] == "ties"  # measurable, and below 1 %
    assert promotes(better, base, families)
    assert not promotes(base, base, families) and not promotes(base, better, families)
