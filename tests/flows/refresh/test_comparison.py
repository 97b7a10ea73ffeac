"""Two refreshes side by side: by artifact, by MLflow's run, and what is said where there is none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.manifest import ArtifactRef
from draftsmith.artifacts.store import Claim, Store
from draftsmith.artifacts.tracking import Tracking
from draftsmith.flows.cli import main
from draftsmith.flows.pipeline.graph import plan
from draftsmith.flows.pipeline.record import RunRecord
from draftsmith.flows.refresh.comparison import config_rows, figure_rows, report_of_config, report_of_text
from draftsmith.flows.refresh.graph import REFRESH
from draftsmith.flows.refresh.review import review
from tests.flows.pipeline.processes import ROOT
from tests.testbed.refresh import load_config


def made(store: Store, name: str, **told: Any) -> ArtifactRef:
    outcome = {"kind": "refused", "label": "Not promoted", "sentence": f"{name} stays.", "reasons": ["tau: too low"]}
    content = {"outcome": outcome, "doubts": [], "figures": {"tau.opd": 2.5}, "config": {"sft": {"steps": 3}}} | told
    with store.claim("report", store.key("report", "c", {"name": name}, {}, 0)) as claim:
        assert isinstance(claim, Claim)
        (claim.out / "report.html").write_text("<p>")
        (claim.out / "review.json").write_text(json.dumps(content))
        return store.commit(claim, config={}, inputs={}, code_digest="c", seed=0)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def store(home: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("DRAFTSMITH_HOME", str(home))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return Store(home / "store")


def test_runs_of_mlflow_and_artifacts_are_found_and_compared(
    store: Store, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = made(store, "week 1", doubts=["the clock changed"])
    second = made(store, "week 2", figures={"tau.opd": 2.75, "speedup.c1.t0": 1.2}, config={"sft": {"steps": 5}})
    record = RunRecord(Tracking(home, "a-line"), "weekly's", {})
    run_id = record.open()
    shown = review({"report": first.path})
    assert shown is not None and run_id is not None
    record.close("FINISHED", {"report": first}, shown.figures, [], {"mlflow.note.content": shown.description})
    assert report_of_text("weekly's").folder == report_of_text(run_id).folder == first.path
    later = RunRecord(Tracking(home, "a-line"), "weekly's", {})
    later.open()
    later.close("FINISHED", {"drift": second}, {}, [], {})
    assert report_of_text("weekly's").folder == first.path, "the last that came to its report"
    assert "**Not promoted.** week 1 stays." in shown.description
    assert "- tau: too low" in shown.description and "- the clock changed" in shown.description

    assert main(["report", "weekly's", second.key[:12]]) == 0
    out = capsys.readouterr().out
    for said in ("weekly's: Not promoted. week 1 stays.", "not to be relied on: the clock changed", "tau.opd", "+0.25"):
        assert said in out
    assert [line.split() for line in out.splitlines() if line.startswith("sft.steps")] == [["sft.steps", "3", "5"]]
    assert main(["report", str(second.path)]) == 0
    assert capsys.readouterr().out.strip() == str(second.path / "report.html")


def test_a_report_is_found_in_a_home_that_was_moved(
    store: Store, home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = made(store, "moved")
    record = RunRecord(Tracking(home, "a-line"), "moved", {})
    record.open()
    record.close("FINISHED", {"report": first}, {}, [], {})
    moved = shutil.copytree(home, tmp_path / "elsewhere")
    shutil.rmtree(first.path)
    monkeypatch.setenv("DRAFTSMITH_HOME", str(moved))
    assert report_of_text("moved").page == moved / "store" / "report" / first.key[:16] / "report.html"


def test_what_is_no_refresh_is_one_error(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    other = made(store, "week 3")
    with pytest.raises(DraftsmithError, match="nothing-like-it: neither a config file, nor a refresh's run"):
        report_of_text("nothing-like-it")
    (other.path / "review.json").chmod(0o644)
    (other.path / "review.json").unlink()
    assert main(["report", str(other.path), str(other.path)]) == 2
    assert "--force report" in capsys.readouterr().err
    assert main(["report", "a", "b", "c"]) == 2


def test_a_report_is_found_whatever_else_is_damaged(store: Store, home: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    config = load_config(ROOT / "configs" / "quickstart.yaml", ["name=damaged", f"target.source={tmp_path}"])
    first = made(store, "damaged")
    record = RunRecord(Tracking(home, config.experiment), "damaged", {})
    record.open()
    record.close("FINISHED", {"report": first}, {}, [], {})
    target = plan(config, store, REFRESH)[0]
    assert target.key is not None
    with store.claim(target.node.stage.name, target.key) as claim:
        assert isinstance(claim, Claim)
        (claim.out / "target.json").write_text("{}")
        ref = store.commit(claim, config={}, inputs={}, code_digest="c", seed=0)
    (ref.path / "target.json").chmod(0o644)
    (ref.path / "target.json").unlink()
    with pytest.raises(DraftsmithError, match="is missing"):
        plan(config, store, REFRESH)
    assert report_of_config("damaged.yaml", config, REFRESH).folder == first.path


def test_rows_say_what_differs_and_what_only_one_has() -> None:
    assert figure_rows({"positions": 345049.0}, {"positions": 345960.0}) == [["positions", "345049", "345960", "+911"]]
    assert figure_rows({"a": 1.0, "b": 2.0}, {"a": 1.0, "c": 3.0}) == [
        ["a", "1", "1", "="], ["b", "2", "—", "—"], ["c", "—", "3", "—"],
    ]  # fmt: skip
    rows = config_rows({"sft": {"steps": 3, "gamma": 4}}, {"sft": {"steps": 5, "gamma": 4}, "opd": {"loss": "paper"}})
    assert rows == [["sft.steps", "3", "5"], ["opd.loss", "(not there)", "paper"]]
