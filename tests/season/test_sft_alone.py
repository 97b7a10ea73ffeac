"""Two weeks of a model line whose refreshes are only SFT, with the real command, and the output of other commands."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from draftsmith.artifacts.home import home
from draftsmith.artifacts.results.gate import GateDecision, ReviewResult
from draftsmith.artifacts.store.local import Store
from draftsmith.artifacts.store.manifest import Manifest
from draftsmith.artifacts.tracking.runs import Tracking
from draftsmith.flows.cli.main import main
from draftsmith.flows.refresh.versions import registry
from tests.faults.home import Ended
from tests.season.season import LINE, SHORT, config_of, draftsmith
from tests.testbed.target import revision_folder

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1800)]

NODES = ["target", "prompts", "heldout", "rollout", "sft", "evaluation", "gate", "report"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sft-alone")


@pytest.fixture(scope="module")
def config(folder: Path) -> Path:
    fields = config_of(replace(SHORT, control=True))
    given = {name: section for name, section in fields.items() if name not in ("assisted", "mining")}
    path = folder / "season.yaml"
    path.write_text(yaml.safe_dump({**given, "opd": None}))
    return path


@pytest.fixture(scope="module")
def weeks(folder: Path, config: Path) -> list[Ended]:
    """The second week's target has another revision: a drafter of the first one is far worse there."""
    changes: list[list[str]] = [[], ["--set", f"target.source={revision_folder()}"]]
    processes = [draftsmith(folder / "home", "run", config, *changed) for changed in changes]
    return [Ended(process.returncode, process.stdout, process.stderr, 0) for process in processes]


@pytest.fixture
def in_home(weeks: list[Ended], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [week.code for week in weeks] == [0, 0], "\n\n".join(week.out + week.err for week in weeks)
    monkeypatch.setenv("DRAFTSMITH_HOME", str(folder / "home"))


def made(stage: str) -> list[Manifest]:
    """Return the artifacts of a stage, oldest first."""
    return [manifest for manifest in Store(home() / "store").list() if manifest.stage == stage]


@pytest.mark.usefixtures("in_home")
def test_the_drafter_of_sft_is_promoted(weeks: list[Ended]) -> None:
    first, _ = weeks
    assert sorted(first.nodes("done")) == sorted(NODES)
    assert "PROMOTED: tiny-dflash@1. SFT is the line's first champion" in first.out
    assert re.search(r"^SFT ◂ +\d", first.out, re.MULTILINE)
    assert not made("opd") and not made("mining")
    assert [version.tags["arm"] for version in registry().versions(LINE)] == ["sft", "sft"]


@pytest.mark.usefixtures("in_home")
def test_the_second_week_goes_on_from_the_champion(weeks: list[Ended]) -> None:
    _, second = weeks
    assert sorted([*second.nodes("done"), *second.nodes("reused")]) == sorted([*NODES, "champion", "drift"])
    assert "PROMOTED: tiny-dflash@2. SFT takes the place of version 1" in second.out
    first, then = made("sft")
    (champion,) = made("champion")
    assert "drafter" not in first.inputs and then.inputs["drafter"].key == champion.key
    assert champion.config["content_id"] == first.content_id
    decisions = [GateDecision.read(Store(home() / "store").path("gate", gate.key)) for gate in made("gate")]
    assert [(each.challenger, each.champion) for each in decisions] == [("sft", None), ("sft", "champion")]


@pytest.mark.usefixtures("in_home")
def test_mlflow_and_the_report_have_the_refresh() -> None:
    client, experiment = Tracking(home(), LINE).connect()
    refreshes = client.search_runs([experiment], "tags.stage = 'refresh'", order_by=["start_time"])
    assert [run.data.tags["outcome"] for run in refreshes] == ["promoted", "promoted"]
    assert {"tau.challenger", "tau.champion", "tau_gain"} <= refreshes[1].data.metrics.keys()
    assert {model.name.partition(",")[0] for model in client.search_logged_models([experiment])} == {"SFT"}
    for report, nodes in zip(made("report"), (NODES, [*NODES, "champion", "drift"]), strict=True):
        review = ReviewResult.read(Store(home() / "store").path("report", report.key))
        assert {*review.config, "report"} == set(nodes)


@pytest.mark.usefixtures("in_home")
def test_the_other_commands_know_the_line(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*words: str | Path) -> str:
        capsys.readouterr()
        assert main([str(word) for word in words]) == 0
        return capsys.readouterr().out

    compared = run("diff", f"{LINE}@1", f"{LINE}@2")
    assert re.search(r"^tau +\d", compared, re.MULTILINE) and "target.source" in compared and "opd" not in compared
    page = run("status", LINE)
    assert "champion: version 2 since" in page and "SFT takes the place of version 1" in page
    assert re.search(
        r"^  against sft/\w+, this node in the last run of season", run("why", config, "sft"), re.MULTILINE
    )
    checked = run("check", config)
    assert re.search(r"^ok +saved +assisted, mining, opd, control are skipped$", checked, re.MULTILINE)
    assert "the challenger is chosen by chance" not in checked
