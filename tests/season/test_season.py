"""A season of a model line with the real command: outcomes, MLflow, reports, rollback and export.

In its home then a refresh without a line: reused, killed, and measured stage by stage.
"""

from __future__ import annotations

import json
import random
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from draftsmith.artifacts.results.data import day
from draftsmith.artifacts.results.evaluation import EvaluationResult
from draftsmith.artifacts.tracking.runs import Tracking
from draftsmith.flows.cli.main import main
from draftsmith.stages.drafters.digest import drafter_digest
from tests.faults.catalogue import alone
from tests.faults.home import Ended, Home, copied
from tests.faults.scene import Scene, TooLate
from tests.faults.signals import kill_stage
from tests.faults.undisturbed import remembered
from tests.flows.processes import processes_of
from tests.gpu import refresh
from tests.season.season import LINE, SHORT, Week, config_of, play
from tests.testbed.refresh import load_config

pytestmark = [pytest.mark.integration, pytest.mark.timeout(3600)]

LEARNING = ["rollout", "sft", "assisted", "mining", "opd", "control"]
NODES = ["target", "prompts", "heldout", *LEARNING, "evaluation", "report"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("season")


@pytest.fixture(scope="module")
def weeks(folder: Path) -> list[Week]:
    return list(play(folder, SHORT))


def test_every_week_has_its_expected_outcome(weeks: list[Week]) -> None:
    output = "\n\n".join(f"{week}\n{week.output}" for week in weeks)
    assert [week.happened for week in weeks] == [week.expected for week in weeks], output
    first, unchanged, refused, revised = weeks
    assert "the baseline" in first.reason
    assert not any(line.startswith(("sft: started", "opd: started")) for line in unchanged.output.splitlines())
    assert "tau: " in refused.reason
    assert "the target has changed" in refused.output
    assert "the champion" in revised.reason


def test_the_first_week_makes_every_node_and_ends_with_the_table(weeks: list[Week], folder: Path) -> None:
    first, home = weeks[0], folder / "home"
    assert sorted(Ended(0, first.output, "", 0).nodes("done")) == sorted([*NODES, "gate"])
    assert first.stderr == ""
    table = first.output[first.output.index("report: done in") :]
    for word in ("acceptance length", "without a drafter", "SFT", "SFT + OPD", "SFT continued", "tokens/s"):
        assert word in table, f"{word} is not in\n{table}"
    assert f"mlflow ui --backend-store-uri sqlite:///{home}/mlflow.db" in table
    evaluation = EvaluationResult.read(newest(Home(folder, home), "evaluation", 0))
    assert evaluation.exactness.fp32_identical == evaluation.exactness.fp32_prompts == 4
    assert evaluation.exactness.identical_share == 1
    for name in ("sft", "opd", "control"):
        assert f"tau_{name}={evaluation.drafters[name].tau:.4g}" in table
    assert evaluation.drafters["sft"].tau > 1
    assert not processes_of(home)


def newest(home: Home, stage: str, index: int = -1) -> Path:
    """Return an artifact of a stage, in the order in which they were made."""
    manifests = sorted((m for m in home.store.list() if m.stage == stage), key=lambda manifest: manifest.created_at)
    return home.store.path(stage, manifests[index].key)


def test_mlflow_has_everything_that_a_review_needs(weeks: list[Week], folder: Path, tmp_path: Path) -> None:
    """An experiment for the line, a run for each refresh with its verdict and a few metrics, all others in a file."""
    assert len(weeks) == 4
    client, experiment = Tracking(folder / "home", LINE).connect()
    assert client.get_experiment(experiment).name == LINE
    refreshes = client.search_runs([experiment], "tags.stage = 'refresh'", order_by=["start_time"])
    outcomes = [run.data.tags["outcome"] for run in refreshes]
    assert outcomes == ["promoted", "current", "refused", "promoted"]
    notes = [run.data.tags["mlflow.note.content"] for run in refreshes]
    assert "is the line's first champion" in notes[0] and "is current" in notes[1]
    assert notes[2].startswith("**Not promoted.** Version 1 stays: ")
    assert notes[3].startswith("**Promoted.**") and "takes the place of version 1" in notes[3]

    when = day(datetime.fromtimestamp(refreshes[0].info.start_time / 1000, UTC))
    names = [f"{when}: promoted @1", f"{when}: current", f"{when}: refused @2", f"{when}: promoted @2"]
    assert [run.info.run_name for run in refreshes] == names

    nested = f"tags.mlflow.parentRunId = '{refreshes[0].info.run_id}'"
    stages = {run.info.run_name: run for run in client.search_runs([experiment], nested)}
    assert sorted(stages) == sorted([*NODES, "gate"])
    for name, steps in (("sft", SHORT.sft_steps), ("opd", SHORT.opd_steps)):
        assert len(client.get_metric_history(stages[name].info.run_id, "train/loss")) == steps
    counted = [refreshes[0], *stages.values()]
    metrics = [name for run in counted for name in run.data.metrics if not name.startswith("system/")]
    params = [name for run in counted for name in run.data.params]
    assert 20 < len(metrics) <= 60 and 20 < len(params) <= 60, (metrics, params)
    for number in ("1", "2"):
        assert len(client.get_model_version(LINE, number).tags) <= 10
    models = {model.name for model in client.search_logged_models([experiment])}
    assert models == {f"{name}, {when}" for name in ("SFT", "SFT + OPD", "SFT continued")}, "of equal weights, one"

    for run in refreshes[2:]:
        own = {name for name in run.data.tags if not name.startswith("mlflow.")}
        assert len(own) <= 8 and max(len(run.data.tags[name]) for name in own) <= 250, own
        report = folder / "home" / "store" / run.data.params["made.report"].partition("#")[0]
        assert 8 <= len(run.data.metrics) <= 12
        copy = Path(client.download_artifacts(run.info.run_id, "review.json", str(tmp_path)))
        review = json.loads(copy.read_text())
        assert len(review["metrics"]) > 100 and review["metrics"].items() >= run.data.metrics.items()
        assert review == json.loads((report / "review.json").read_text())
        for name in ("tau.challenger", "tau.champion", "tau_gain", "speedup.c1.t0", "tau.challenger.low"):
            wanted = f"metrics.`{name}` = {run.data.metrics[name]!r}"
            assert run.info.run_id in {hit.info.run_id for hit in client.search_runs([experiment], wanted)}, name
        page = (report / "report.html").read_text()
        for name, form in (("tau.challenger", ".3f"), ("tau.champion", ".3f"), ("speedup.c1.t0", ".3f")):
            assert format(run.data.metrics[name], form) in page, f"{name} is a headline"
        assert run.data.tags["version"] == f"{LINE}@2", "equal content is registered once"
        data = {each.tags[0].value: each.dataset.digest for each in run.inputs.dataset_inputs}
        assert {"prompts", "heldout"} <= data.keys()
        query = f"dataset.digest = '{data['prompts']}' and tags.stage = 'refresh'"
        assert run.info.run_id in {hit.info.run_id for hit in client.search_runs([experiment], query)}


def test_champions_rollback_promote_and_export(
    weeks: list[Week], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(weeks) == 4
    monkeypatch.setenv("DRAFTSMITH_HOME", str(folder / "home"))

    def run(*words: str | Path, code: int = 0) -> str:
        """Run a command in this process, which has imported MLflow already, and return its output."""
        capsys.readouterr()
        assert main([str(word) for word in words]) == code
        return "".join(capsys.readouterr())

    output = run("champions", LINE)
    events = [line for line in output.splitlines() if " promoted (before: " in line]
    assert [event.split()[1:3] for event in events] == [["version", "1"], ["version", "2"]]
    checked = [line.split()[2] for line in output.splitlines() if " checked: tau " in line]
    assert checked == ["1", "1"], "weeks 2 and 3: week 4 reuses the check of week 3"
    dry = run("rollback", LINE, "--dry-run")
    assert "version 1 would become the champion in place of version 2 (nothing was changed)" in dry
    assert "version 1 is the champion now" in run("rollback", LINE, "--why", "latency")
    assert "rolled back to (before: version 2)" in run("champions", LINE)
    assert "is the champion already" in run("promote", f"{LINE}@1")

    out = folder / "exported"
    run("export", f"{LINE}@champion", out)
    assert (out / "config.json").is_file() and (out / "model.safetensors").is_file()
    digest = json.loads((out / "drafter.json").read_text())["digest"]
    assert digest == drafter_digest(out)
    run("export", f"{LINE}@champion", folder / "for-vllm", "--format", "speculators")
    config = json.loads((folder / "for-vllm" / "config.json").read_text())
    assert config["speculators_model_type"] == "dflash"
    assert config["speculators_config"]["verifier"]["name_or_path"]
    assert {"lm_head.weight", "embed_tokens.weight"} <= load_file(folder / "for-vllm" / "model.safetensors").keys()
    assert "is not empty" in run("export", LINE, out, code=2)
    assert "has no version 9" in run("promote", f"{LINE}@9", code=2)


# ---- a refresh without a line, in the same home


@pytest.fixture(scope="module")
def plain(weeks: list[Week], folder: Path) -> tuple[Home, Ended]:
    """The home with a config without a line, and its first refresh."""
    assert weeks[0].happened == "promoted"
    config = {name: section for name, section in config_of(SHORT).items() if name not in ("registry", "gate")}
    home = Home(folder, folder / "plain.yaml")
    home.config.write_text(yaml.safe_dump({**config, "refresh": {"control": True}}))
    return home, home.refresh()


def test_a_refresh_reuses_what_the_line_has_made(plain: tuple[Home, Ended]) -> None:
    _, ended = plain
    assert (ended.code, ended.err) == (0, "")
    assert ended.nodes("done") == ["report"] and {*ended.nodes("reused"), "report"} == set(NODES)


def test_a_kill_at_a_seeded_moment_loses_nothing_and_repeats_nothing(
    weeks: list[Week], plain: tuple[Home, Ended], tmp_path: Path
) -> None:
    """One of the faults that `python -m tests.faults.run` injects into every stage."""
    home, _ = plain
    calm = remembered(home.folder, home.config.name, weeks[0].output, tmp_path / "kept")
    chance = random.Random(0)
    node = chance.choice(LEARNING)
    try:
        for attempt in range(3):
            with suppress(TooLate):
                alone(kill_stage)(Scene(calm, node, chance, earlier=0.5**attempt))
                break
        else:
            pytest.fail("the stage had always ended before the kill")
    finally:
        copied(calm.kept, calm.folder)


def test_every_stage_is_measured_on_a_gpu_machine(
    plain: tuple[Home, Ended], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`python -m tests.gpu.refresh`: it makes what is missing and reuses the rest."""
    home, _ = plain
    monkeypatch.setenv("DRAFTSMITH_HOME", str(home.path))
    before, missing = home.content_ids(), newest(home, "opd", 0)
    home.drop(f"opd/{missing.name}")
    rows = refresh.run(load_config(home.config), home.store)
    assert home.content_ids() == before
    assert sorted(row["stage"] for row in rows) == sorted(NODES[:-1])
    shown = capsys.readouterr().out
    for row in rows:
        assert row["stage"] in shown and row["content"] in shown
        assert row["peak_gb"] > 0
        if row["stage"] not in ("target", "prompts"):
            # nearly all of it is the process, which takes half as much again with a build of torch for CUDA
            assert 0.5 < row["peak_of_estimate"] < 2
    assert all(row["tokens_per_s"] > 0 for row in rows if row["stage"] in ("heldout", "rollout", "opd"))
