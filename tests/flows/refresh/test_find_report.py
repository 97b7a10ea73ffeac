"""A report is found by artifact, by its run in MLflow, and by config."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.store.local import Store
from draftsmith.artifacts.store.manifest import Artifact
from draftsmith.artifacts.tracking.refresh_runs import RefreshRun
from draftsmith.artifacts.tracking.registry import Registry
from draftsmith.artifacts.tracking.runs import Tracking
from draftsmith.flows.cli.main import main
from draftsmith.flows.cli.status import find_report, report_of_config
from draftsmith.flows.planning.plan import plan
from draftsmith.flows.refresh.graph import REFRESH
from draftsmith.flows.refresh.screen import review
from tests.flows.processes import ROOT
from tests.testbed.artifacts import committed, fake_artifact
from tests.testbed.refresh import load_config


def made(store: Store, name: str) -> Artifact:
    outcome = {"kind": "refused", "label": "Not promoted", "sentence": f"{name} stays.", "reasons": ["tau: too low"]}
    content = {"outcome": outcome, "speed_warnings": ["the clock changed"], "metrics": {"tau.opd": 2.5}}
    files = {"report.html": "<p>", "review.json": json.dumps(content)}
    return committed(store, "report", files, store.key("report", "c", {"name": name}, {}, 0))


def run_of(home: Path, experiment: str | None, name: str, **artifacts: Artifact) -> str | None:
    """Return the id of a finished run in MLflow with these artifacts."""
    record = RefreshRun(Tracking(home, experiment), name, {})
    run_id = record.open()
    record.close("FINISHED", artifacts, {}, [], {}, name=f"1 Dec: promoted {name}")
    return run_id


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def store(home: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("DRAFTSMITH_HOME", str(home))
    return Store(home / "store")


def test_a_report_is_found_by_run_and_by_artifact(store: Store, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = made(store, "week 1"), made(store, "week 2")
    run_id = run_of(home, "a-line", "weekly's", report=first)
    run_of(home, "a-line", "weekly's", drift=second)
    assert run_id is not None
    for name in ("weekly's", "1 Dec: promoted weekly's", run_id, first.key[:12], str(first.path)):
        assert find_report(name, REFRESH) == first.path / "report.html", "the last run with a report"
    assert main(["report", str(second.path)]) == 0
    assert capsys.readouterr().out.strip() == str(second.path / "report.html")
    shown = review({"report": first.path})
    assert shown is not None and "**Not promoted.** week 1 stays." in shown.description
    assert "- tau: too low" in shown.description and "- the clock changed" in shown.description


def test_the_report_of_a_version_is_found_also_when_the_store_has_it_no_more(store: Store, home: Path) -> None:
    report = made(store, "week 3")
    record = RefreshRun(Tracking(home, "b-line"), "weekly", {})
    run_id = record.open()
    record.close("FINISHED", {"report": report}, {}, [report.path / "report.html"], {})
    drafter = committed(store, "opd", {"drafter/config.json": "{}"}, "ef")
    Registry(Tracking(home)).register("b-line", drafter, {}, run_id=run_id)
    assert find_report("b-line@1", REFRESH) == find_report("b-line@challenger", REFRESH) == report.path / "report.html"
    shutil.rmtree(report.path)
    page = find_report("b-line@1", REFRESH)
    assert page.read_text() == "<p>" and page.is_relative_to(home) and not page.is_relative_to(store.root)


def test_an_unknown_name_is_an_error(store: Store) -> None:
    with pytest.raises(DraftsmithError, match="nothing-like-it: neither a config file"):
        find_report("nothing-like-it", REFRESH)
    (folder := store.root / "empty").mkdir(parents=True)
    assert main(["report", str(folder)]) == 2


def test_a_report_is_found_although_other_artifacts_are_damaged(store: Store, home: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    config = load_config(ROOT / "configs" / "quickstart.yaml", ["name=damaged", f"target.source={tmp_path}"])
    first = made(store, "damaged")
    run_of(home, config.experiment, "damaged", report=first)
    target = plan(config, store, REFRESH)[0]
    assert target.key is not None
    ref = committed(store, target.node.stage.name, {"target.json": "{}"}, target.key)
    (ref.path / "target.json").chmod(0o644)
    (ref.path / "target.json").unlink()
    with pytest.raises(DraftsmithError, match="is missing"):
        plan(config, store, REFRESH)
    assert report_of_config("damaged.yaml", config, REFRESH) == first.path / "report.html"


@pytest.mark.usefixtures("store")
def test_a_run_that_another_wrote_leads_to_no_page_outside_the_store(home: Path, tmp_path: Path) -> None:
    (home / "private").mkdir()
    (home / "private" / "report.html").write_text("<p>")
    run_of(home, "a-line", "theirs", report=fake_artifact("..", "private", "1" * 64, tmp_path))
    problem = r"^run 1 Dec: promoted theirs in MLflow: param made\.report: '\.\./private' is not a path"
    with pytest.raises(DraftsmithError, match=problem):
        find_report("theirs", REFRESH)
