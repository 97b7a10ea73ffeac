"""The whole refresh by the real command with SGLang as the engine of rollouts and evaluation, on the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from draftsmith.artifacts.parquet import read_table
from draftsmith.artifacts.schemas import TRACE, TRAJECTORIES
from draftsmith.artifacts.store import Store
from tests.flows.pipeline.processes import processes_of
from tests.integration.test_refresh import NODES, Home, config_of, done
from tests.sglang_cpu.options import CPU_ENVIRONMENT, CPU_OPTIONS
from tests.testbed.databases import give_databases

LIMIT_S = 2400  # four servers, one after the other: half a minute each on a quiet machine
SERVED = ("assisted", "evaluation")
ALONE = set(NODES) - {"control"}  # one server less
pytestmark = [pytest.mark.integration, pytest.mark.sglang, pytest.mark.timeout(LIMIT_S + 600)]


def served_config(target: Path, prompts: Path, python: Path) -> dict[str, Any]:
    """The config of the embedded refresh, with servers; the plain rollouts stay embedded: engines may be mixed."""
    config = config_of(target, prompts)
    launch = {"options": CPU_OPTIONS, "environment": CPU_ENVIRONMENT}
    engine = {"kind": "sglang", "python": str(python), "launch": launch, "concurrency": 8}
    for section in SERVED:
        config[section]["engine"] = engine
    config["refresh"] = {"control": False}
    config["evaluation"] |= {"rounds": 1, "concurrency": [1, 4], "block_sizes": None, "parity_prompts": 4}
    return config


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_target: Path, tiny_prompts: Path, sglang_env: Path) -> Home:
    made = Home(tmp_path_factory.mktemp("sglang-refresh"), limit_s=LIMIT_S)
    give_databases(made.path)
    made.config.write_text(yaml.safe_dump(served_config(tiny_target, tiny_prompts, sglang_env)))
    return made


def read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def test_a_refresh_on_sglang_is_exact_and_passes_the_gate(home: Home) -> None:
    first = home.refresh()
    assert first.returncode == 0, first.stdout + first.stderr
    assert done(first) == ALONE
    assert not processes_of(home.path)  # servers inherit the environment, and are gone

    # ---- answers come from the engine that the config names, the assisted ones with their verify steps
    store = Store(home.path / "store")
    folders = [store.path("rollout", m.key) for m in store.list() if m.stage == "rollout"]
    answered_by = [set(read_table(f / "trajectories.parquet", TRAJECTORIES)["engine"].to_pylist()) for f in folders]
    assert sorted(len(engines) for engines in answered_by) == [1, 1, 1]
    assert sorted(engines.pop().split()[0] for engines in answered_by) == ["embedded", "embedded", "sglang"]
    (assisted,) = [folder for folder in folders if (folder / "trace.json").exists()]
    traced = read_json(assisted / "trace.json")
    assert (traced["engine"], traced["dtype"], traced["temperature"]) == ("sglang", "float32", 0)
    trace = read_table(assisted / "trace.parquet", TRACE)
    assert trace["target_logprobs"].null_count == 0

    # ---- mining: the drafter that was trained is the one that was served, step for step
    parity = read_json(home.folder_of("mining") / "summary.json")["parity"]
    assert parity["served_steps"] == len(trace) > 20
    assert (parity["different_steps"], parity["tau_difference"]) == (0, 0)
    assert parity["served_tau"] > 1
    assert parity["largest_logprob_difference"] < 1e-3

    # ---- evaluation: all arms, exact outputs, served steps as replayed
    evaluation = read_json(home.folder_of("evaluation") / "evaluation.json")
    assert [s["concurrency"] for s in evaluation["speed_by_setting"]] == [1, 4]
    for setting in evaluation["speed_by_setting"]:
        assert setting["arms"].keys() == {"plain", "sft", "opd"}
        assert all(arm["identical_share"] == 1 for name, arm in setting["arms"].items() if name != "plain")
    assert evaluation["exactness"]["identical_share"] == 1
    assert evaluation["parity"].keys() == {"sft", "opd"}
    for figures in evaluation["parity"].values():
        assert (figures["different_steps"], figures["tau_difference"]) == (0, 0)

    steps = evaluation["parity"]["opd"]["served_steps"]
    page = (home.folder_of("report") / "report.html").read_text()
    assert f"0 of {steps} served verify steps differ from replay" in page
    assert "Speed by setting" in page
