"""A season of a model line with the real command: outcomes, MLflow, reports, rollback and export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from draftsmith.artifacts.tracking.runs import Tracking
from draftsmith.flows.cli.main import main
from draftsmith.stages.drafters.digest import drafter_digest
from tests.season.season import LINE, SHORT, Week, play

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("season")


@pytest.fixture(scope="module")
def weeks(folder: Path) -> list[Week]:
    return list(play(folder, SHORT))


def test_every_week_has_its_expected_outcome(weeks: list[Week]) -> None:
    output = "\n\n".join(f"{week}\n{week.output}" for week in weeks)
    assert [week.happened for week in weeks] == [week.expected for week in weeks], output
    first, unchanged, broken, revised = weeks
    assert "the baseline" in first.reason
    assert not any(line.startswith(("sft: started", "opd: started")) for line in unchanged.output.splitlines())
    assert "tau: " in broken.reason
    assert "the target has changed" in revised.output
    assert "the champion" in revised.reason


def test_mlflow_has_everything_that_a_review_needs(
    weeks: list[Week], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An experiment for the line, a run for each refresh with its verdict, and every metric of the report."""
    assert len(weeks) == 4
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    client, experiment = Tracking(folder / "home", LINE).connect()
    assert client.get_experiment(experiment).name == LINE
    refreshes = client.search_runs([experiment], "tags.stage = 'refresh'", order_by=["start_time"])
    outcomes = [run.data.tags["outcome"] for run in refreshes]
    assert outcomes == ["promoted", "current", "refused", "promoted"]
    notes = [run.data.tags["mlflow.note.content"] for run in refreshes]
    assert "is the line's first champion" in notes[0] and "is current" in notes[1]
    assert notes[2].startswith("**Not promoted.** Version 1 stays: ")
    assert notes[3].startswith("**Promoted.**") and "takes the place of version 1" in notes[3]

    for run in refreshes[2:]:
        own = {name for name in run.data.tags if not name.startswith("mlflow.")}
        assert len(own) <= 8 and max(len(run.data.tags[name]) for name in own) <= 250, own
        assert len([name for name in run.data.metrics if not name.startswith("detail/")]) <= 12
        report = folder / "home" / "store" / run.data.params["made.report"].partition("#")[0]
        review = json.loads((report / "review.json").read_text())
        metrics = {name.removeprefix("detail/"): value for name, value in run.data.metrics.items()}
        assert metrics.items() >= review["figures"].items(), "MLflow has every metric"
        for name in ("tau.challenger", "tau.champion", "tau_gain", "speedup.c1.t0", "tau.challenger.low"):
            wanted = f"metrics.`{name}` = {run.data.metrics[name]!r}"
            assert run.info.run_id in {hit.info.run_id for hit in client.search_runs([experiment], wanted)}, name
        page = (report / "report.html").read_text()
        for name, form in (("tau.challenger", ".3f"), ("tau.champion", ".3f"), ("speedup.c1.t0", ".3f")):
            assert format(run.data.metrics[name], form) in page, f"{name} is a headline"
        (version,) = client.search_model_versions(f"name = '{LINE}' and run_id = '{run.info.run_id}'")
        assert f"{LINE}@{version.version}" == run.data.tags["version"]
        data = {each.tags[0].value: each.dataset.digest for each in run.inputs.dataset_inputs}
        assert {"prompts", "heldout"} <= data.keys()
        query = f"dataset.digest = '{data['prompts']}' and tags.stage = 'refresh'"
        assert run.info.run_id in {hit.info.run_id for hit in client.search_runs([experiment], query)}


def test_champions_rollback_promote_and_export(
    weeks: list[Week], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(weeks) == 4
    monkeypatch.setenv("DRAFTSMITH_HOME", str(folder / "home"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def run(*words: str | Path, code: int = 0) -> str:
        """Run a command in this process, which has imported MLflow already, and return its output."""
        capsys.readouterr()
        assert main([str(word) for word in words]) == code
        return "".join(capsys.readouterr())

    output = run("champions", LINE)
    events = [line for line in output.splitlines() if " promoted (before: " in line]
    assert [event.split()[1:3] for event in events] == [["version", "1"], ["version", "3"]]
    checked = [line.split()[2] for line in output.splitlines() if " checked: tau " in line]
    assert checked == ["1", "1", "1"], "weeks 2, 4 and 5"
    dry = run("rollback", LINE, "--dry-run")
    assert "version 1 would become the champion in place of version 3 (nothing was changed)" in dry
    assert "version 1 is the champion now" in run("rollback", LINE, "--why", "latency")
    assert "rolled back to (before: version 3)" in run("champions", LINE)
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
