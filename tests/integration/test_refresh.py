"""The whole refresh by the real command on the tiny target: once, again, killed, and on SGLang."""

from __future__ import annotations

import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from draftsmith.artifacts.store.local import Store
from draftsmith.artifacts.tables.parquet import read_table
from draftsmith.artifacts.tables.schemas import TRACE, TRAJECTORIES
from draftsmith.flows.execution.machine import FOLDER
from tests.faults.catalogue import alone
from tests.faults.home import copied
from tests.faults.scene import Scene, TooLate
from tests.faults.signals import kill_stage
from tests.faults.undisturbed import remembered
from tests.flows.processes import ROOT, processes_of
from tests.sglang_cpu.options import CPU_ENVIRONMENT, CPU_OPTIONS
from tests.testbed.refresh import small_refresh

pytestmark = pytest.mark.integration

NODES = [
    "target", "prompts", "rollout", "sft", "assisted", "mining", "opd", "heldout", "control", "evaluation", "report",
]  # fmt: skip


def config_of(target: Path, prompts: Path) -> dict[str, Any]:
    return small_refresh(
        "tiny", target, prompts, 32,
        stages={"grace_seconds": 10},
        prompts={"train": 40, "heldout": 10},
        rollout={"prompts": 30, "engine": {"slots": 16}},
        sft={"steps": 60, "gamma": 4.0},
        assisted={"skip": 30, "engine": {"slots": 10}},
        opd={"steps": 12},
        evaluation={"speed_prompts": 3, "rounds": 1, "block_sizes": [3, 6], "exactness_prompts": 3},
    )  # fmt: skip


@dataclass(frozen=True)
class Home:
    """A DRAFTSMITH_HOME and the config beside it."""

    folder: Path
    limit_s: float = 850  # of one command

    @property
    def path(self) -> Path:
        return self.folder / "home"

    @property
    def config(self) -> Path:
        return self.folder / "tiny.yaml"

    def run(self, *arguments: str | Path, module: str = "draftsmith.flows") -> subprocess.CompletedProcess[str]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_", "DRAFTSMITH_"))}
        return subprocess.run(
            [sys.executable, "-m", module, *map(str, arguments)],
            cwd=ROOT,
            env={**environment, "DRAFTSMITH_HOME": str(self.path), FOLDER: os.environ[FOLDER], "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=self.limit_s,
        )

    def refresh(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return self.run("refresh", self.config, *arguments)

    def folder_of(self, stage: str) -> Path:
        """Return the newest artifact of a stage."""
        newest = max((m for m in Store(self.path / "store").list() if m.stage == stage), key=lambda m: m.created_at)
        return Store(self.path / "store").path(stage, newest.key)

    def copied(self, folder: Path) -> Home:
        """Return a copy, which a test may change."""
        copy = replace(self, folder=folder)
        shutil.copytree(self.path, copy.path)
        shutil.copy(self.config, copy.config)
        return copy

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        with sqlite3.connect(self.path / "mlflow.db") as database:
            return database.execute(sql).fetchall()


def read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def nodes(output: str, ending: str) -> list[str]:
    """Return the nodes that were reused, or done, by their lines."""
    return [line.partition(":")[0] for line in output.splitlines() if ending in line and line.split(":")[0] in NODES]


def done(result: subprocess.CompletedProcess[str]) -> set[str]:
    return set(nodes(result.stdout, ": done in "))


def reused(result: subprocess.CompletedProcess[str]) -> set[str]:
    return set(nodes(result.stdout, ": reused"))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_target: Path, tiny_prompts: Path) -> Home:
    made = Home(tmp_path_factory.mktemp("refresh"))
    made.config.write_text(yaml.safe_dump(config_of(tiny_target, tiny_prompts)))
    return made


@pytest.fixture(scope="module")
def story(home: Home) -> Iterator[dict[str, Any]]:
    """A first refresh and an unchanged one."""
    runs: dict[str, Any] = {"first": home.refresh()}
    assert runs["first"].returncode == 0, runs["first"].stderr
    started = time.monotonic()
    runs["second"] = home.refresh()
    runs["second_s"] = time.monotonic() - started
    yield runs


def test_the_first_refresh_makes_every_node_and_ends_with_the_table(story: dict[str, Any], home: Home) -> None:
    out = story["first"].stdout
    assert done(story["first"]) == set(NODES)
    assert story["first"].stderr == ""
    table = out[out.index("report: done in") :]
    for word in ("acceptance length", "without a drafter", "SFT", "SFT + OPD", "SFT continued", "tokens/s"):
        assert word in table, f"{word} is not in\n{table}"
    assert f"mlflow ui --backend-store-uri sqlite:///{home.path}/mlflow.db" in table
    assert "report.html" in table
    assert not processes_of(home.path)


def test_the_metrics_of_the_table_are_those_of_the_evaluation(story: dict[str, Any], home: Home) -> None:
    evaluation = read_json(home.folder_of("evaluation") / "evaluation.json")
    for name in ("sft", "opd", "control"):
        assert f"{evaluation['drafters'][name]['tau']:.3f}" in story["first"].stdout
    assert evaluation["exactness"]["fp32_identical"] == evaluation["exactness"]["fp32_prompts"] == 3
    assert evaluation["exactness"]["identical_share"] == 1
    assert evaluation["drafters"]["sft"]["tau"] > 1


def test_an_unchanged_refresh_reuses_everything_and_is_fast(story: dict[str, Any]) -> None:
    second = story["second"]
    assert second.returncode == 0, second.stderr
    assert reused(second) == set(NODES)
    assert done(second) == set()
    assert story["second_s"] < 60  # seconds plus the start of Python and of Prefect's server
    table = story["first"].stdout.splitlines()[-12:]
    assert story["second"].stdout.splitlines()[-12:] == table


@pytest.mark.usefixtures("story")
def test_mlflow_holds_each_refresh_with_its_stages_nested(home: Home) -> None:
    runs = home.query("select run_uuid, name, status from runs")
    assert all(status == "FINISHED" for _, _, status in runs)
    refreshes = [run for run, name, _ in runs if name == "tiny"]
    assert len(refreshes) == 1, "the unchanged refresh is the first one's run"
    parents = dict(home.query("select run_uuid, value from tags where key = 'mlflow.parentRunId'"))
    nested = sorted(name for run, name, _ in runs if parents.get(run) in refreshes)
    assert nested == sorted(NODES)
    by_name = {name: run for run, name, _ in runs}
    metrics = home.query("select run_uuid, key, step from metrics")
    for name, key, steps in (("sft", "loss", 60), ("opd", "loss", 12)):
        assert len({step for run, k, step in metrics if run == by_name[name] and k == key}) == steps
    params = {(run, key): value for run, key, value in home.query("select run_uuid, key, value from params")}
    assert any(run == by_name["opd"] and "learning_rate" in key for run, key in params)
    assert any(run in refreshes and key == "tau.challenger" for run, key, _ in metrics)


def test_a_kill_at_a_seeded_moment_loses_nothing_and_repeats_nothing(
    story: dict[str, Any], home: Home, tmp_path: Path
) -> None:
    """One of the faults that `python -m tests.faults.run` injects into every stage."""
    calm = remembered(home.folder, home.config.name, story["first"].stdout, tmp_path / "kept")
    chance = random.Random(0)
    node = chance.choice(NODES)
    try:
        for attempt in range(3):
            with suppress(TooLate):
                alone(kill_stage)(Scene(calm, node, chance, earlier=0.5**attempt))
                break
        else:
            pytest.fail("the stage had always ended before the kill")
    finally:
        copied(calm.kept, calm.folder)


# ---- the same with SGLang as the engine of a rollout and of the evaluation, on the CPU

SERVED = ("assisted", "evaluation")
SERVED_LIMIT_S = 2400  # four servers, one after the other: half a minute each on a quiet machine


@pytest.mark.sglang
@pytest.mark.timeout(SERVED_LIMIT_S + 600)
def test_a_refresh_on_sglang_is_exact(story: dict[str, Any], home: Home, sglang_env: Path, tmp_path: Path) -> None:
    """Engines may be mixed: target, prompts, plain rollouts and SFT are those of the embedded refresh."""
    assert story["first"].returncode == 0
    served = replace(home.copied(tmp_path), limit_s=SERVED_LIMIT_S)
    config = yaml.safe_load(served.config.read_text())
    launch = {"options": CPU_OPTIONS, "environment": CPU_ENVIRONMENT}
    for section in SERVED:
        config[section]["engine"] = {"kind": "sglang", "python": str(sglang_env), "launch": launch, "concurrency": 8}
    config["evaluation"] |= {"concurrency": [1, 4], "block_sizes": None, "parity_prompts": 4}
    config["refresh"] = {"control": False}  # one server less
    served.config.write_text(yaml.safe_dump(config))
    result = served.refresh()
    assert result.returncode == 0, result.stdout + result.stderr
    assert done(result) == {*SERVED, "mining", "opd", "report"}
    assert not processes_of(served.path)  # servers inherit the environment, and are gone

    # ---- the assisted answers come from the engine that the config names, with their verify steps
    assisted = served.folder_of("rollout")
    engines = set(read_table(assisted / "trajectories.parquet", TRAJECTORIES)["engine"].to_pylist())
    assert [engine.split()[0] for engine in engines] == ["sglang"]
    traced = read_json(assisted / "trace.json")
    assert (traced["engine"], traced["dtype"], traced["temperature"]) == ("sglang", "float32", 0)
    trace = read_table(assisted / "trace.parquet", TRACE)
    assert trace["target_logprobs"].null_count == 0

    # ---- mining: the drafter that was trained is the one that was served, step for step
    parity = read_json(served.folder_of("mining") / "summary.json")["parity"]
    assert parity["served_steps"] == len(trace) > 20
    assert (parity["different_steps"], parity["tau_difference"]) == (0, 0)
    assert parity["served_tau"] > 1
    assert parity["largest_logprob_difference"] < 1e-3

    # ---- evaluation: all arms, exact outputs, served steps as replayed
    evaluation = read_json(served.folder_of("evaluation") / "evaluation.json")
    assert [s["concurrency"] for s in evaluation["speed_by_setting"]] == [1, 4]
    for setting in evaluation["speed_by_setting"]:
        assert setting["arms"].keys() == {"plain", "sft", "opd"}
        assert all(arm["identical_share"] == 1 for name, arm in setting["arms"].items() if name != "plain")
    assert evaluation["exactness"]["identical_share"] == 1
    assert evaluation["parity"].keys() == {"sft", "opd"}
    for metrics in evaluation["parity"].values():
        assert (metrics["different_steps"], metrics["tau_difference"]) == (0, 0)
    steps = evaluation["parity"]["opd"]["served_steps"]
    page = (served.folder_of("report") / "report.html").read_text()
    assert f"0 of {steps} served verify steps differ from replay" in page
