"""The MLflow run of a flow, with a real SQLite database: opened once, found again, never empty."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from draftsmith.artifacts.store.manifest import Artifact
from draftsmith.artifacts.tracking.refresh_runs import OUTCOME, REUSED, RefreshRun
from draftsmith.artifacts.tracking.runs import Tracking
from tests.testbed.artifacts import fake_artifact

pytestmark = pytest.mark.integration


def artifacts(folder: Path, content: str = "c" * 64) -> dict[str, Artifact]:
    names = ("prompts", "line@champion", "report")
    return {name: fake_artifact(name, "k" * 64, content, folder / name) for name in names}


def test_the_same_artifacts_reuse_the_run_and_others_open_one(tracking: Tracking, tmp_path: Path) -> None:
    client, experiment = tracking.connect()
    made = artifacts(tmp_path)
    first = RefreshRun(tracking, "weekly", {"seed": 0}, data=("prompts",))
    openers = [threading.Thread(target=first.open) for _ in range(4)]  # stages that run at the same time
    for opener in openers:
        opener.start()
    for opener in openers:
        opener.join()
    run_id = first.open()
    assert len(client.search_runs([experiment])) == 1
    assert first.find_or_open(made) == run_id
    first.close("FINISHED", made, {"tau.opd": 2.5}, [], {"mlflow.note.content": "**Promoted.**"})

    for times in ("1", "2"):
        again = RefreshRun(tracking, "weekly", {"seed": 0})
        assert again.find_or_open(made) == run_id
        again.close("FINISHED", made, {}, [], {"mlflow.note.content": "nothing was made"})
        tags = client.get_run(run_id).data.tags
        assert (tags[REUSED].split()[0], tags["mlflow.note.content"]) == (times, "**Promoted.**")
    part = RefreshRun(tracking, "weekly", {})
    assert part.find_or_open({"prompts": made["prompts"]}) == run_id, "a part of what it made"
    (data,) = client.get_run(run_id).inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("prompts", "c" * 36)

    for record, others in (
        (RefreshRun(tracking, "weekly", {}), artifacts(tmp_path, "d" * 64)),  # rebuilt with other content
        (RefreshRun(tracking, "another", {}), made),
    ):
        assert record.find_or_open(others) not in (None, run_id)
        record.close("FINISHED", others, {}, [], {})
    assert len(client.search_runs([experiment])) == 3


def test_a_conclusion_is_recorded_in_the_earlier_run_that_had_none(tracking: Tracking, tmp_path: Path) -> None:
    """After `--until report` every artifact exists, and the whole run only concludes."""
    client, _ = tracking.connect()
    made = artifacts(tmp_path)
    looked = RefreshRun(tracking, "weekly", {})
    run_id = looked.open()
    assert run_id is not None
    looked.close("FINISHED", made, {"tau.opd": 2.5}, [], {"mlflow.note.content": "**Nothing has followed yet.**"})

    def again(of: dict[str, Artifact], outcome: str, note: str) -> dict[str, str]:
        record = RefreshRun(tracking, "weekly", {})
        assert record.find_or_open(of) == run_id
        record.close(
            "FINISHED", of, {"promoted": 1.0}, [], {OUTCOME: outcome, "mlflow.note.content": note}, concluded=True
        )
        return dict(client.get_run(run_id).data.tags)

    part = again({"prompts": made["prompts"]}, "current", "**Current.**")
    assert OUTCOME not in part and "Nothing has followed" in part["mlflow.note.content"], "it has made more than this"
    whole = again(made, "promoted", "**Promoted.**")
    assert (whole[OUTCOME], whole["mlflow.note.content"]) == ("promoted", "**Promoted.**")
    assert whole[REUSED].startswith("2 times")
    assert client.get_run(run_id).data.metrics == {"tau.opd": 2.5, "promoted": 1.0}
    assert again(made, "refused", "**Refused.**")[OUTCOME] == "promoted", "what it came to stays"


def test_a_run_that_mlflow_failed_to_open_is_opened_later(
    tracking: Tracking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, experiment = tracking.connect()
    create, left = client.create_run, [2]

    def lost_twice(*arguments: Any, **named: Any) -> Any:
        left[0] -= 1
        if left[0] >= 0:
            raise ConnectionError("connection refused")
        return create(*arguments, **named)

    monkeypatch.setattr(client, "create_run", lost_twice)
    record = RefreshRun(tracking, "weekly", {"seed": 0})
    assert [record.open() is None for _ in range(3)] == [True, True, False]
    assert record.find_or_open(artifacts(tmp_path)) == record.open()
    record.close("FINISHED", artifacts(tmp_path), {"tau.opd": 2.5}, [], {})
    left[0] = 1
    again = RefreshRun(tracking, "weekly", {"seed": 1})
    others = artifacts(tmp_path, "d" * 64)
    assert [again.find_or_open(others) is None for _ in range(2)] == [True, False]
    again.close("FINISHED", others, {}, [], {})
    assert [run.info.status for run in client.search_runs([experiment])] == ["FINISHED", "FINISHED"]
    assert not list((tracking.folder / "refreshes").iterdir()), "no run counts as alive"


def test_a_run_without_stages_leaves_none_and_a_failed_one_is_not_reused(tracking: Tracking, tmp_path: Path) -> None:
    client, experiment = tracking.connect()
    RefreshRun(tracking, "weekly", {}).close("FAILED", {}, {}, [], {})
    assert len(client.search_runs([experiment])) == 0
    failed = RefreshRun(tracking, "weekly", {})
    run_id = failed.open()
    failed.close("FAILED", artifacts(tmp_path), {}, [], {})
    assert RefreshRun(tracking, "weekly", {}).find_or_open(artifacts(tmp_path)) != run_id
