"""Time and cost that are said before a run: of what took how long here, by its size; else of counted operations."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from draftsmith.artifacts.manifest import InputEntry, Manifest
from draftsmith.flows.checks import duration
from draftsmith.flows.checks.duration import check_duration
from draftsmith.flows.checks.findings import Findings
from draftsmith.flows.pipeline.graph import Node
from draftsmith.flows.pipeline.options import StageOptions
from draftsmith.stages.contract import Config
from draftsmith.stages.estimates import of_opd, of_sft
from draftsmith.stages.parallel.config import ParallelConfig
from draftsmith.stages.rollout import RolloutConfig
from draftsmith.stages.targets.config import TargetConfig
from draftsmith.stages.targets.estimate import Answers, Estimate, Use
from draftsmith.stages.training.config import SftConfig
from draftsmith.stages.training.on_policy.config import OpdConfig
from tests.flows.checks.test_estimates import qwen_sizes

TARGET, OTHER = TargetConfig(source="/models/one"), TargetConfig(source="/models/other")
SFT = SftConfig(steps=200)
NODES = [
    Node("target", "draftsmith.stages.target", TARGET),
    Node("rollout", "draftsmith.stages.rollout", RolloutConfig(), {"target": "target"}),
    Node("sft", "draftsmith.stages.sft", SFT, {"target": "target", "trajectories": "rollout"}),
]
NEEDED = {"rollout": Estimate(makes=Answers(100, count=300)), "sft": of_sft(SFT, Use(qwen_sizes()))}


def made(stage: str, config: Config, seconds: float, inputs: tuple[str, ...] = (), **metrics: float) -> Manifest:
    """An artifact of the target with key `one`, or of another where its config says so."""
    key = "one" if config != OTHER else "other"
    entries = {name: InputEntry(stage=name, key="one", content_id="c", volatile_id="") for name in inputs}
    return Manifest(
        schema_version=1, stage=stage, key=key, content_id="c", created_at="", config=config.model_dump(mode="json"),
        inputs=entries, external={}, code_digest="", modules={}, seed=0, files={}, metrics=metrics,
        mlflow_run_id=None, duration_s=seconds, versions={},
    )  # fmt: skip


HERE = [
    made("target", TARGET, 30),
    made("rollout", RolloutConfig(), 60, ("target",), answers=100.0),
    made("sft", SftConfig(steps=50), 100, ("target", "trajectories")),
    made("target", OTHER, 7000),
]


def lines(
    monkeypatch: pytest.MonkeyPatch, history: list[Manifest], gpus: int = 0, nodes: list[Node] = NODES, **options: Any
) -> dict[str, str]:
    monkeypatch.setattr(duration, "store_of", lambda _home: SimpleNamespace(list=lambda: history))
    monkeypatch.setattr(duration, "gpus", lambda: (80e9,) * gpus)
    monkeypatch.setattr(duration, "gpu_model", lambda: "NVIDIA H100 80GB HBM3" if gpus else None)
    found = Findings()
    check_duration(found, NODES, nodes, NEEDED, Path("home"), StageOptions(**options))
    return {line.check: line.text for line in found.lines}


def test_a_stage_takes_what_it_took_here_by_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    said = lines(monkeypatch, HERE, price_per_hour=3.6)
    assert said["time"] == "about 10 min 10 s: sft 6 min 40 s, rollout 3 min 00 s, target 30 s"
    assert said["cost"] == "about 0.17 hours of this machine, 0.61 at 3.6 each (stages.price_per_hour)"
    assert "cost" not in lines(monkeypatch, HERE)  # a machine without a price and without GPUs


def test_what_is_done_and_what_another_target_took_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lines(monkeypatch, HERE, nodes=NODES[1:2])["time"] == "about 3 min 00 s: rollout 3 min 00 s"
    assert lines(monkeypatch, HERE, nodes=[]) == {}
    assert lines(monkeypatch, HERE[3:])["time"] == "not estimated: nothing of what is to be made has run here"
    assert lines(monkeypatch, HERE[:2])["time"].endswith("; not known: sft")


def test_of_a_training_that_was_resumed_all_attempts_count(monkeypatch: pytest.MonkeyPatch) -> None:
    resumed = made("sft", SftConfig(steps=50), 20, ("target", "trajectories"))
    resumed.metrics["seconds"] = 95.0  # of its steps, which its checkpoint counts on
    said = lines(monkeypatch, [*HERE[:2], resumed], nodes=NODES[2:])
    assert said["time"] == "about 6 min 20 s: sft 6 min 20 s"


def test_a_training_that_ran_on_several_processes_is_longer_on_one(monkeypatch: pytest.MonkeyPatch) -> None:
    many = SftConfig(steps=50, parallel=ParallelConfig(processes=4))
    said = lines(monkeypatch, [*HERE[:2], made("sft", many, 100, ("target", "trajectories"))], nodes=NODES[2:])
    assert said["time"] == "about 26 min 40 s: sft 26 min 40 s"


def test_a_training_that_never_ran_here_is_counted_on_known_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    said = lines(monkeypatch, HERE[:2], gpus=1)
    operations = NEEDED["sft"].operations
    seconds = operations / (0.4 * 989e12)
    assert f"({operations:.1e} operations)" in said["time"] and "at 40% of 989 TFLOP/s a GPU" in said["time"]
    assert said["cost"] == f"about {(210 + seconds) / 3600:.2g} GPU hours"
    assert "TFLOP/s" not in lines(monkeypatch, HERE, gpus=1)["time"]


def test_processes_share_the_operations_of_a_training() -> None:
    apart = SFT.model_copy(update={"parallel": ParallelConfig(processes=8)})
    alone, together = (of_sft(config, Use(qwen_sizes())) for config in (SFT, apart))
    assert (alone.devices, together.devices) == (1, 8)
    assert alone.operations == together.operations
    again = OpdConfig(steps=200)
    assert of_opd(again, Use(qwen_sizes())).operations > of_sft(SFT, Use(qwen_sizes())).operations
