"""Runs whose process is gone are closed by a later run."""

from __future__ import annotations

import gc
import shutil
from pathlib import Path

import pytest

from draftsmith.artifacts.store.attempt import Attempt
from draftsmith.artifacts.store.local import Store
from draftsmith.artifacts.tracking.refresh_runs import RefreshRun, close_dead_runs
from draftsmith.artifacts.tracking.runs import Tracking
from tests.artifacts.tracking.test_tracking import KEY, run_of
from tests.testbed.artifacts import made_from


def test_runs_of_a_replaced_container_are_closed_by_the_next_one(
    tracking: Tracking, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host name is another, but the disk is the same: the lock file is there, and it is unlocked."""
    store, dead = Store(tracking.folder / "store"), Tracking(tracking.folder)
    monkeypatch.setattr("platform.node", lambda: "pod-1")
    refresh = RefreshRun(dead, "monday", {})
    parent = refresh.open()
    run = dead.stage_run(parent, "sft", KEY)
    monkeypatch.setattr("platform.node", lambda: "pod-2")
    assert close_dead_runs(tracking, store) == [], "its process is alive"
    refresh._alive.pop_all()  # like a killed process, which does not remove its lock file
    gc.collect()
    assert close_dead_runs(tracking, store) == ["monday", "sft"]
    assert {run_of(tracking, each).info.status for each in (parent, run.run_id)} == {"KILLED"}


def test_runs_of_a_moved_home_are_closed_at_its_new_path(tracking: Tracking, tmp_path: Path) -> None:
    dead, folder = Tracking(tracking.folder), tmp_path / "moved"
    refresh = RefreshRun(dead, "monday", {})
    run = dead.stage_run(refresh.open(), "sft", KEY)
    (folder / "refreshes").mkdir(parents=True)
    shutil.copy(tracking.folder / "mlflow.db", folder)
    (lock,) = refresh._files
    shutil.copy(lock, folder / "refreshes")
    assert close_dead_runs(Tracking(folder), Store(folder / "store")) == ["monday", "sft"]
    run.close("FINISHED")
    refresh.close("FINISHED")


def test_runs_of_another_machine_are_left_alone(tracking: Tracking, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.node", lambda: "elsewhere")
    run = tracking.stage_run(None, "sft", KEY)
    monkeypatch.undo()
    other = Tracking(tracking.folder)
    assert close_dead_runs(other, Store(tracking.folder / "store")) == []
    assert run_of(other, run.run_id).info.status == "RUNNING"


def test_a_dead_run_is_finished_if_it_made_the_artifact_and_killed_if_another_did(tracking: Tracking) -> None:
    store = Store(tracking.folder / "store")
    with store.claim("sft", KEY) as claim:
        assert isinstance(claim, Attempt)
        run = tracking.stage_run(None, "sft", KEY)
        (claim.out / "x").write_text("x")
        claim.commit(made_from(claim, mlflow_run_id=run.run_id, metrics={"tau": 2.0}))
    assert close_dead_runs(tracking, store) == ["sft"]
    assert run_of(tracking, run.run_id).info.status == "FINISHED"
    with store.claim("sft", KEY, force=True):
        forced = tracking.stage_run(None, "sft", KEY)
    assert forced.run_id != run.run_id
    assert close_dead_runs(tracking, store) == ["sft"]
    assert run_of(tracking, forced.run_id).info.status == "KILLED"


@pytest.mark.parametrize("tag", ["stage", "key"])
def test_a_run_whose_tags_lead_elsewhere_is_left_alone(tag: str, tracking: Tracking) -> None:
    run = tracking.stage_run(None, "sft", KEY)
    assert run.run_id is not None
    tracking.connect()[0].set_tag(run.run_id, tag, "../..")
    assert close_dead_runs(tracking, Store(tracking.folder / "store")) == []
    assert run_of(tracking, run.run_id).info.status == "RUNNING"
